"""What is said about MMEB-V2: the paper's table, the leaderboard's file, what is missing, and two score files compared."""

import json
import os
import time

import numpy as np
from tqdm import tqdm

from data import DataError
from tasks.mmeb import META, MMEB, copies, download, modality, read_published, video_classes

# Means over the image, video and document tasks and over all 78, as the PLUME paper (arXiv 2604.02073) prints them.
PAPER = {"PLUME, paper": (66.3, 44.1, 67.5, 61.6), "UME-R1, paper": (66.6, 42.2, 63.9, 60.1), "VLM2Vec-V2, paper": (64.9, 34.9, 65.4, 58.0)}
PARTS = ("image", "video", "visdoc")


def paper_rows(results, ours):
    """-> the paper's table as rows of strings, the header first: per cent, the mean over the tasks of a column; * some are missing or partial."""
    header, row, missing = ["model"], [ours], False

    def mean(chosen):
        nonlocal missing
        there = [results[t.full_name] for t in chosen if t.full_name in results]
        short = len(there) < len(chosen) or any(r["partial"] for r in there)
        missing |= short
        return f"{100 * np.mean([r[r['metric']] for r in there]):.1f}{'*' * short}" if there else "-"

    for part in PARTS:
        columns = {column: [t for t in MMEB.values() if t.meta == meta] for meta, column in META.items() if modality(meta) == part}
        columns[part] = sum(columns.values(), [])
        header += columns
        row += map(mean, columns.values())
    rows = [header + ["all"], row + [mean(MMEB.values())]]
    for name, (*means, overall) in PAPER.items():
        rows.append([name, *(cell for m in means for cell in ["-"] * 4 + [f"{m:.1f}"]), f"{overall:.1f}"])
    return rows, missing


def paper_table(results, ours, markdown=False):
    rows, missing = paper_rows(results, ours)
    note = "\n* of a part of its tasks, or of tasks where something was left out" * missing
    if markdown:
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]) + "\n" + note
    wide = [max(len(row[0]) for row in rows)] + [7] * (len(rows[0]) - 1)
    return "\n".join("".join(f"{cell:{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, wide))) for row in rows) + note


def leaderboard(results, ours, model):
    """The scores in the format of the MMEB leaderboard, its names of data sets and metrics."""
    metrics = {part: {} for part in PARTS}
    for t in MMEB.values():
        if r := results.get(t.full_name):
            name = f"{t.name}-fixed" if t.versions and r["version"] == "fixed" and t.is_document else t.name
            metrics[modality(t.meta)][name] = {**{m: r[m] for m in ("hit@1", "hit@5", "hit@10")}, "ndcg_linear@5": r["ndcg@5"], "num_pred": r["queries"],
                                               "num_data": r["rows"]}
    metadata = dict(model_name=ours, model_backbone="qwen2_vl", model_size=round(sum(p.numel() for p in model.parameters()) / 1e9, 3),
                    embedding_dimension=model.lm.config.hidden_size, max_length_tokens=model.processor.limits.max_len, model_release_date="",
                    data_source="Self-Reported", url="", report_generated_date=time.strftime("%Y-%m-%d"),
                    incomplete=[t.name for t in MMEB.values() if results.get(t.full_name, dict(partial=True))["partial"]])
    return dict(metadata=metadata, metrics=metrics)


def check(root, names, released):
    """-> (one line a task: what is there of what was published, and commands that get the rest; number of tasks with problems)."""
    lines, hubs, wrong = [f"{'task':58}{'queries':>14}{'candidates':>14}{'media':>18}  version   problems"], {}, 0
    of = lambda n, published: f"{n:,}" + (f" / {published:,}" if published else "")
    for name in tqdm(names, desc="looking at the files", leave=False):
        published = MMEB[name.split("/")[1]]
        try:
            task = read_published(root, published.name, released, skip_bad=True, extract=False)
            about, corpus, bad = task.about, len(task.corpus), task.bad
        except DataError as e:
            about, corpus, bad = dict(rows=0, version="", media=0, media_wanted=0), 0, [str(e)]
        short = about["rows"] != published.queries or published.corpus and corpus != published.corpus
        if published.read is video_classes:  # its corpus is not in the repository
            short = not any(map(os.path.isdir, copies(root, published.hub)))
        if short or about["version"] == "original":
            hubs[published.hub] = download(root, published.hub)
        wrong += bool(bad)
        counts = f"{of(about['rows'], published.queries):>14}{of(corpus, published.corpus):>14}{of(about['media'], about['media_wanted']):>18}"
        lines.append((f"{name:58}{counts}  {about['version']:8}" + (f"  {len(bad)}, the first: {bad[0]}" if bad else "")).rstrip())
    lines += ["", "rows that are not there, not all there, or not the mended ones:", *hubs.values()] if hubs else []
    return "\n".join(lines), wrong


def main_scores(path):
    """A file that --json wrote, or one in the leaderboard's format -> {"video/MSVD": the task's own metric}."""
    try:
        with open(path) as f:
            raw = json.load(f)
        if "tasks" in raw:
            ours = {t.full_name: f"{modality(t.meta)}/{t.name}" for t in MMEB.values()}
            return {ours.get(name, name): r[r["metric"]] for name, r in raw["tasks"].items()}
        return {f"{part}/{name.removesuffix('-fixed')}": r["ndcg_linear@5" if part == "visdoc" else "hit@1"]
                for part, found in raw["metrics"].items() for name, r in found.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise DataError(f"{path}: neither a file that --json writes nor a leaderboard.json: {type(e).__name__} {e}") from e


def differences(paths):
    """Two score files -> a table of the tasks that both have, the biggest difference first."""
    a, b = map(main_scores, paths)
    both = sorted(a.keys() & b.keys(), key=lambda t: (-abs(b[t] - a[t]), t))
    if not both:
        raise DataError(f"{paths[0]} and {paths[1]}: no task is in both")
    wide = max(map(len, [*both, "mean"])) + 2
    line = lambda name, x, y: f"{name:{wide}}{x:8.1%}{y:8.1%}{100 * (y - x):+8.1f}"
    lines = [f"{'task':{wide}}{'a':>8}{'b':>8}{'b - a':>8}", *(line(t, a[t], b[t]) for t in both)]
    lines.append(line("mean", *(float(np.mean([x[t] for t in both])) for x in (a, b))))
    for name, path, only in (("a", paths[0], a.keys() - b.keys()), ("b", paths[1], b.keys() - a.keys())):
        lines += [f"only in {name} ({path}): {', '.join(sorted(only))}"] if only else []
    return "\n".join(lines)
