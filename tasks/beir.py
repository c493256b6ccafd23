"""Retrieval tasks from your own folders, in the layout of BEIR with media.

    DIR/<meta-task>/<dataset>/corpus.jsonl     {"_id", "text"?, "image"?, "video"?}
                              queries.jsonl    the same keys, and perhaps "candidates": [ids]
                              qrels.tsv        a header, then query-id, corpus-id, score

Of a video file "start" and "end" may say in seconds which part is meant.
A query with candidates is ranked only against those.  Media paths are relative to DIR.

Without candidates a query is ranked against the corpus, but for a document with the query's own id: that is
the query itself (ArguAna, Quora) and would be found first.  So BEIR's evaluation leaves it out.  Here it
counts where the qrels call it relevant: there the two merely have the same number.
`Task` is what every kind of task becomes before it is ranked.
"""

import glob
import os
import re
from dataclasses import dataclass, field

from files.errors import DataError, lfs_hint, quote
from files.items import parse_item
from files.jsonl import parse_json, spans_of
from files.named import FileNameWarning
from hub.prompts import with_prompt


@dataclass
class AllBut:
    """The candidates of a query that stands in the corpus itself: `size` documents without this row."""

    row: int
    size: int

    def __len__(self):
        return self.size - 1


@dataclass
class Task:
    """A retrieval task: items to encode, and for query i the graded relevant documents {corpus row: gain}."""

    name: str
    queries: list  # Side
    corpus: list  # Side
    relevant: list  # one dict a query
    candidates: list  # for each query its list of corpus rows, AllBut one, or None: the whole corpus
    query_ids: list
    corpus_ids: list
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
        raise DataError(f"--data {root!r}: no such folder; it must hold <meta-task>/<dataset>/corpus.jsonl, "
                        "queries.jsonl, qrels.tsv")
    names = sorted(glob.glob("*/*", root_dir=root), key=os.path.split)
    found = [name for name in names if qrels_file(os.path.join(root, name))]
    if not found:
        raise DataError(f"--data {root!r}: no <meta-task>/<dataset>/qrels.tsv below it")
    return found


def read_task(root, name, prompts=None):
    """Read one task in the BEIR layout with media -> Task.

    prompts: of a checkpoint, {"query", "document": template}; what is read gets them.
    Raises DataError naming file and line for anything that is off.
    BEIR's own files are read as its loader does: a document's title stands in front of its text, `metadata`
    is not used, and of queries.jsonl only those count that qrels/test.tsv judges.
    """
    folder = os.path.join(root, name)
    corpus_row, corpus, _ = read_items(os.path.join(folder, "corpus.jsonl"), root, "title")
    query_row, queries, raws = read_items(os.path.join(folder, "queries.jsonl"), root, "candidates")
    path = qrels_file(folder) or os.path.join(folder, "qrels.tsv")
    judged = read_qrels(path, query_row, corpus_row)
    all_count = path.endswith("qrels.tsv")
    task = Task(name, [], corpus, [], [], [], list(corpus_row))
    for (query_id, row), side, raw in zip(query_row.items(), queries, raws):
        if row not in judged and not all_count:
            continue
        gold = {doc: gain for doc, gain in judged.get(row, {}).items() if gain > 0}
        among = raw.get("candidates")
        if among is not None:
            among = candidate_rows(among, corpus_row, side.where)
        no_document = f"{side.where}: query {quote(raw['_id'])} has no relevant document"
        if not gold:
            raise DataError(f"{no_document} in {os.path.basename(path)}")
        if among is not None and gold.keys().isdisjoint(among):
            raise DataError(f"{no_document} among its candidates")
        own = corpus_row.get(query_id)
        if among is None and own is not None and own not in gold:
            among = AllBut(own, len(corpus))
        task.queries.append(side)
        task.relevant.append(gold)
        task.candidates.append(among)
        task.query_ids.append(query_id)
    if not task.queries:
        raise DataError(f"{path}: it judges none of the queries")
    task.about["not_judged"] = len(queries) - len(task.queries)
    if prompts:
        task.queries = [with_prompt(side, prompts["query"]) for side in task.queries]
        task.corpus = [with_prompt(side, prompts["document"]) for side in task.corpus]
        task.about["prompts"] = {name: prompts[name] for name in ("query", "document")}
    return task


def read_items(path, root, own_key):
    """corpus.jsonl or queries.jsonl -> {id: row}, [Side], [record as it stands there].

    own_key: what only records of this file may have, beside what every item has.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; a task needs corpus.jsonl, queries.jsonl and qrels.tsv")
    rows, sides, raws, warning = {}, [], [], FileNameWarning(root)
    with open(path, "rb") as f:
        for n, (_, _, text) in enumerate(spans_of(f, path), 1):
            where = f"{path}: record {n}"
            raw = parse_json(text, where)
            if not isinstance(raw, dict) or "_id" not in raw:
                raise DataError(f"{where}: needs an object with '_id'")
            name = str(raw["_id"])
            if name in rows:
                raise DataError(f"{where}: the id {quote(raw['_id'])} stands there twice")
            rows[name] = len(rows)
            item = {k: v for k, v in raw.items() if k not in ("_id", "metadata", own_key)}
            if own_key == "title" and "title" in raw:
                item["text"] = with_title(raw, where)
            sides.append(parse_item(item, root, where))
            warning.look_at_side(sides[-1])
            raws.append(raw)
    if not sides:
        raise DataError(f"{path}: no record in this file")
    return rows, sides, raws


def with_title(raw, where):
    """A document's title and text as one text."""
    title, text = raw["title"] or "", raw.get("text") or ""
    if not isinstance(title, str) or not isinstance(text, str):
        raise DataError(f"{where}: 'title' and 'text' must be strings")
    return f"{title} {text}".strip()


def candidate_rows(ids, corpus_row, where):
    """A query's `candidates` -> their rows in the corpus; each must be there, and named once."""
    if not isinstance(ids, list):
        raise DataError(f"{where}: 'candidates' must be a list of ids, got {quote(ids)}")
    rows = {}  # id -> row
    for value in ids:
        name = str(value)
        if name not in corpus_row:
            raise DataError(f"{where}: candidate {quote(value)} is not in corpus.jsonl")
        if name in rows:
            raise DataError(f"{where}: candidate {quote(value)} stands there twice")
        rows[name] = corpus_row[name]
    return list(rows.values())


def read_qrels(path, query_row, corpus_row):
    """A tab-separated file -> {query row: {corpus row: gain}}; its header names the columns, in any order."""
    needed = ("query-id", "corpus-id", "score")
    judged = {}
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        columns = [cell.strip().lower().replace("_", "-") for cell in f.readline().split("\t")]
        if sorted(columns) != sorted(needed):
            raise DataError(f"{path}: line 1 must be a header with the columns {', '.join(needed)}, "
                            f"got {quote(columns)}{lfs_hint(path)}")
        for n, line in enumerate(f, 2):
            if not line.strip():
                continue
            cells = dict(zip(columns, line.rstrip("\r\n").split("\t")))
            query, doc, gain = (cells.get(name, "") for name in needed)
            known = query in query_row and doc in corpus_row and line.count("\t") == 2
            if not known or not re.fullmatch(r"-?\d+", gain):
                raise DataError(f"{path}: line {n}: needs a known query id, a known corpus id and a "
                                f"whole-number score, got {quote(cells)}")
            gains = judged.setdefault(query_row[query], {})
            if gains.setdefault(corpus_row[doc], int(gain)) != int(gain):
                before = gains[corpus_row[doc]]
                raise DataError(f"{path}: line {n}: {quote(query)}, {quote(doc)} was judged {before} before")
    return judged
