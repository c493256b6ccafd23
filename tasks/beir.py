"""Retrieval tasks from your own folders, in the layout of BEIR with media.

    DIR/<meta-task>/<dataset>/corpus.jsonl     {"_id", "text"?, "image"?, "video"?}
                              queries.jsonl    the same keys, and perhaps "candidates": [ids], to be ranked only against those
                              qrels.tsv        a header, then query-id, corpus-id, score

Media paths are relative to DIR.  `Task` is what every kind of task becomes before it is ranked.
"""

import os
import re
from dataclasses import dataclass, field

from data import DataError, parse_item, parse_json, quote, spans_of


@dataclass
class Task:
    """A retrieval task: items to encode, and for query i the graded relevant documents {corpus row: gain}."""

    name: str
    queries: list  # Side
    corpus: list  # Side
    relevant: list  # one dict a query
    candidates: list  # for each query its list of corpus rows, or None: the whole corpus
    query_ids: list
    metric: str = "hit@1"  # the one that is reported
    about: dict = field(default_factory=dict)  # where it comes from
    bad: list = field(default_factory=list)  # what was left out, and why


def qrels_file(folder):
    """The judgements of a task: ours, or where BEIR's own archives have them; None when there is neither."""
    places = (os.path.join(folder, "qrels.tsv"), os.path.join(folder, "qrels", "test.tsv"))
    return next((path for path in places if os.path.isfile(path)), None)


def list_tasks(root):
    """All "<meta-task>/<dataset>" below root that hold a qrels.tsv, sorted."""
    if not os.path.isdir(root):
        raise DataError(f"--data {root!r}: no such folder; it must hold <meta-task>/<dataset>/corpus.jsonl, queries.jsonl, qrels.tsv")
    found = [f"{m}/{d}" for m in sorted(os.listdir(root)) if os.path.isdir(os.path.join(root, m))
             for d in sorted(os.listdir(os.path.join(root, m))) if qrels_file(os.path.join(root, m, d))]
    if not found:
        raise DataError(f"--data {root!r}: no <meta-task>/<dataset>/qrels.tsv below it")
    return found


def read_task(root, name):
    """Read one task in the BEIR layout with media.  Raises DataError naming file and line for anything that is off.

    BEIR's own files are read as its loader does: a document's title stands in front of its text, `metadata` is not used,
    and of queries.jsonl only those count that qrels/test.tsv judges.
    """
    folder = os.path.join(root, name)

    def items(file, more):  # -> {id: row}, [Side], [raw object]; more: the key that only this file has
        path, rows, sides, raws = os.path.join(folder, file), {}, [], []
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file; a task needs corpus.jsonl, queries.jsonl and qrels.tsv")
        with open(path, "rb") as f:
            for n, (_, _, text) in enumerate(spans_of(f, path), 1):
                raw = parse_json(text, where := f"{path}: record {n}")
                if not isinstance(raw, dict) or "_id" not in raw:
                    raise DataError(f"{where}: needs an object with '_id'")
                if rows.setdefault(str(raw["_id"]), len(rows)) != len(sides):
                    raise DataError(f"{where}: the id {quote(raw['_id'])} stands there twice")
                item = {k: v for k, v in raw.items() if k not in ("_id", "metadata", more)}
                if more == "title" and "title" in raw:
                    words = raw["title"] or "", item.get("text") or ""
                    if not all(isinstance(word, str) for word in words):
                        raise DataError(f"{where}: 'title' and 'text' must be strings")
                    item["text"] = " ".join(words).strip()
                sides.append(parse_item(item, root, where))
                raws.append(raw)
        if not sides:
            raise DataError(f"{path}: no record in this file")
        return rows, sides, raws

    corpus_row, corpus, _ = items("corpus.jsonl", "title")
    query_row, queries, raws = items("queries.jsonl", "candidates")
    path = qrels_file(folder) or os.path.join(folder, "qrels.tsv")
    judged = read_qrels(path, query_row, corpus_row)
    relevant, candidates, kept = [], [], []
    for row, (side, raw) in enumerate(zip(queries, raws)):
        if row not in judged and not path.endswith("qrels.tsv"):
            continue
        gold, rows = {doc: gain for doc, gain in judged.get(row, {}).items() if gain > 0}, raw.get("candidates")
        if rows is not None:
            if not isinstance(rows, list):
                raise DataError(f"{side.where}: 'candidates' must be a list of ids, got {quote(rows)}")
            if unknown := [c for c in rows if str(c) not in corpus_row]:
                raise DataError(f"{side.where}: candidate {quote(unknown[0])} is not in corpus.jsonl")
            rows = list(dict.fromkeys(corpus_row[str(c)] for c in rows))
        if not gold or (rows is not None and not set(gold) & set(rows)):
            where = "among its candidates" if gold else f"in {os.path.basename(path)}"
            raise DataError(f"{side.where}: query {quote(raw['_id'])} has no relevant document {where}")
        relevant.append(gold)
        candidates.append(rows)
        kept.append(row)
    if not kept:
        raise DataError(f"{path}: it judges none of the queries")
    ids = list(query_row)
    about = dict(not_judged=len(queries) - len(kept))
    queries, ids = [queries[row] for row in kept], [ids[row] for row in kept]
    return Task(name, queries, corpus, relevant, candidates, ids, about=about)


def read_qrels(path, query_row, corpus_row):
    """-> {query row: {corpus row: gain}} of a tab-separated file; its header names the columns, in any order."""
    needed, judged = ("query-id", "corpus-id", "score"), {}
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        columns = [cell.strip().lower().replace("_", "-") for cell in f.readline().split("\t")]
        if sorted(columns) != sorted(needed):
            raise DataError(f"{path}: line 1 must be a header with the columns {', '.join(needed)}, got "
                            + quote(columns))
        for n, line in enumerate(f, 2):
            if not line.strip():
                continue
            cells = dict(zip(columns, line.rstrip("\r\n").split("\t")))
            query, doc, gain = (cells.get(name, "") for name in needed)
            known = query in query_row and doc in corpus_row and line.count("\t") == 2
            if not known or not re.fullmatch(r"-?\d+", gain):
                raise DataError(f"{path}: line {n}: needs a known query id, a known corpus id and a whole-number score, got "
                                + quote(cells))
            gains = judged.setdefault(query_row[query], {})
            if gains.setdefault(corpus_row[doc], int(gain)) != int(gain):
                before = gains[corpus_row[doc]]
                raise DataError(f"{path}: line {n}: {quote(query)}, {quote(doc)} was judged {before} before")
    return judged
