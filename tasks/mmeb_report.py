"""MMEB-V2 in print: the paper's table, the leaderboard's file, and a score file for each task."""

import hashlib
import json
import os
import time

import numpy as np

from files.errors import DataError
from files.writing import write_json, write_text
from tasks.mmeb import META, MMEB, modality, read_published

# Means over image, video and document tasks and all 78, as the PLUME paper (arXiv 2604.02073) prints them.
PAPER = {
    "PLUME, paper": (66.3, 44.1, 67.5, 61.6),
    "UME-R1, paper": (66.6, 42.2, 63.9, 60.1),
    "VLM2Vec-V2, paper": (64.9, 34.9, 65.4, 58.0)}
PARTS = ("image", "video", "visdoc")


def mean_cell(results, tasks):
    """The mean of the tasks' own metrics in per cent; * some are missing or partial, - all are missing."""
    there = [results[t.full_name] for t in tasks if t.full_name in results]
    if not there:
        return "-"
    mean = 100 * np.mean([r[r["metric"]] for r in there])
    whole = len(there) == len(tasks) and not any(r["partial"] for r in there)
    return f"{mean:.1f}" if whole else f"{mean:.1f}*"


def paper_rows(results, ours):
    """-> the paper's table as rows of strings, the header first, and whether anything is missing or partial.

    results: {"<meta-task>/<task>": scores}; ours: name of our row.  Cells are means over tasks in per cent.
    """
    header, row = ["model"], [ours]
    for part in PARTS:
        of_part = []
        for meta, column in META.items():
            if modality(meta) == part:
                tasks = [t for t in MMEB.values() if t.meta == meta]
                of_part += tasks
                header.append(column)
                row.append(mean_cell(results, tasks))
        header.append(part)
        row.append(mean_cell(results, of_part))
    of_all = mean_cell(results, list(MMEB.values()))
    rows = [header + ["all"], row + [of_all]]
    for name, (*means, overall) in PAPER.items():
        published = [name]
        for mean in means:
            published += ["-"] * 4 + [f"{mean:.1f}"]  # each part has four columns
        rows.append(published + [f"{overall:.1f}"])
    return rows, of_all.endswith(("*", "-"))


def paper_table(results, ours, markdown=False):
    """`paper_rows` as text."""
    rows, missing = paper_rows(results, ours)
    note = "\n* of a part of its tasks, or of tasks where something was left out" if missing else ""
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n" + note
    wide = max(len(row[0]) for row in rows)
    lines = []
    for name, *cells in rows:
        lines.append(f"{name:{wide}}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines) + note


def leaderboard(results, ours, model):
    """The scores in the format of the MMEB leaderboard, its names of data sets and metrics."""
    metrics, incomplete = {part: {} for part in PARTS}, []
    for t in MMEB.values():
        r = results.get(t.full_name)
        if not r or r["partial"]:
            incomplete.append(t.name)
        if not r:
            continue
        mended = t.versions and r["version"] == "fixed" and t.is_document
        name = f"{t.name}-fixed" if mended else t.name
        metrics[modality(t.meta)][name] = {
            "hit@1": r["hit@1"], "hit@5": r["hit@5"], "hit@10": r["hit@10"], "ndcg_linear@5": r["ndcg@5"],
            "num_pred": r["queries"], "num_data": r["rows"]}
    metadata = dict(
        model_name=ours,
        model_backbone=model.backbone.config.model_type,
        model_size=round(sum(p.numel() for p in model.parameters()) / 1e9, 3),  # billions
        embedding_dimension=model.lm.config.hidden_size,
        max_length_tokens=model.processor.limits.max_len,
        model_release_date="",
        data_source="Self-Reported",
        url="",
        report_generated_date=time.strftime("%Y-%m-%d"),
        incomplete=incomplete)
    return dict(metadata=metadata, metrics=metrics)


def ranked_hash(task, embedder, dim, code):
    """Hash of all that scores come from: what is ranked, how it is judged, and the file that does it."""
    judged = [task.query_ids, task.corpus_ids, task.relevant, task.candidates, task.metric, dim]
    h = hashlib.blake2b(repr(judged).encode("utf-8", "backslashreplace"), digest_size=8)
    for side in (*task.queries, *task.corpus):
        h.update(embedder.weigh(side).key)
    with open(code, "rb") as f:
        h.update(f.read())
    return h.hexdigest()


def keep_score(path, result, old):
    """Writes a score file.  When all was known, the times are those of the run that encoded it: of `old`."""
    if old and not result["items_encoded"]:
        for name in ("seconds", "items_encoded", "queries_per_s"):
            result[name] = old[name]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_json(path, result)


def read_score(path):
    """A score file of an earlier run; {} when there is none, or not a whole one."""
    try:
        with open(path) as f:
            value = json.load(f)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def files_now(root, task, released):
    """The hash of a task's files as they are, or "" when they cannot be used."""
    try:
        return read_published(root, task.name, released, skip_bad=True, extract=False).about["files_hash"]
    except DataError:
        return ""


def report_published(root, names, results, folder, ours, embedder):
    """The paper's table, of this run's tasks and of those on which the checkpoint was scored before."""
    earlier, changed = {}, []
    for task in MMEB.values():
        name = task.full_name
        old = read_score(os.path.join(folder, f"{name}_score.json")) if name not in names else {}
        if old.get("run_hash") == embedder.run_hash and old.get("data") == os.path.realpath(root):
            if old.get("files_hash") == files_now(root, task, embedder.about["protocol"] == "released"):
                earlier[name] = old
            else:
                changed.append(name)
    everything = earlier | results
    also = ""
    if earlier:
        also = f" and {len(earlier)} that were scored before with the same checkpoint, settings and files"
    if changed:
        also += f"; scored before, but on other files, so not in the table: {', '.join(changed)}"
    print(f"\n{len(results)} tasks of this command{also}")
    print(paper_table(everything, ours))
    write_json(os.path.join(folder, "leaderboard.json"), leaderboard(everything, ours, embedder.model))
    write_text(os.path.join(folder, "table.md"), paper_table(everything, ours, markdown=True) + "\n")
    print(f"scores: {folder}/<meta-task>/<data set>_score.json, {folder}/leaderboard.json, {folder}/table.md")
