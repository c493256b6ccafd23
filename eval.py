"""Evaluate a checkpoint on retrieval tasks: encode every corpus and query once, rank, report.

    python eval.py --task video_ret                               turtle world, the checkpoint that train.py wrote
    python eval.py --data DIR --task all                          every task below DIR
    python eval.py --data DIR --task video_ret --mode single      one meta-task, the single-pass embedding
    python eval.py --data DIR --task image_ret/openmoji_t2i --steps 4 --json out.json
    python eval.py --compare compare.png                          all modes and 0..K steps, accuracy against latency

DIR/<meta-task>/<dataset>/ holds corpus.jsonl ({"_id", "text"?, "image"?, "video"?}), queries.jsonl (the same keys, and
perhaps "candidates": [ids], to be ranked only against those) and qrels.tsv (query-id, corpus-id, score; a header line).

hit@k: share of queries with a relevant document among the first k.  ndcg@5: linear gains from the graded scores.
A tie counts against the model, so a constant embedding is never right by luck.  chance: expected hit@1 of a random ranking.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import DataError, list_tasks, nearest, parse_flags, read_task, world_tasks
from model import MODES, Plume

TIE = 1e-6  # cosines closer than this are a tie: more than float32 rounding, less than any difference that means something


@dataclass
class Config:
    # what
    data: str = ""  # folder of the tasks; media paths are relative to it; default: turtle world
    task: str = "all"  # all, a meta-task (video_ret) or one data set (video_ret/filmed_t2v); several with commas between
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    # how
    mode: str = "latent"  # latent, single (one pass) or cot (writes its rationale)
    compare: str = ""  # all modes, and latent with 0..K steps, in one table; accuracy against latency is drawn into this PNG
    steps: int = -1  # latent steps 0..32; -1: the checkpoint's own
    limit: int = 512  # tokens a rationale may have in mode cot
    batch_size: int = 32  # items encoded together; does not change the result
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast
    # report
    json: str = ""  # also write the scores, and the rank of every query, to this file


def select(tasks, wanted, root):
    """--task -> the names it stands for."""
    known = ["all", *dict.fromkeys(t.split("/")[0] for t in tasks), *tasks]
    for name in wanted.split(","):
        if name not in known:
            raise DataError(f"--task {name!r}: no such task in {root!r}.{nearest(name, known)}")
    return [t for t in tasks if {"all", t, t.split("/")[0]} & set(wanted.split(","))]


def rank(queries, corpus, relevant, candidates, block=(1024, 16384)):
    """Rank of every relevant document, ties counted against the model.

    queries (N, D), corpus (M, D) unit rows; relevant: a dict {corpus row: gain} a query; candidates: corpus rows a
    query, or None for all.  -> a list of (gain, rank from 1) a query.  Scores are computed in blocks: memory does not
    grow with N x M.
    """
    above = []  # for each query {relevant row: (its score less TIE, number of other documents that score at least that)}
    for a in range(0, len(queries), block[0]):
        q = queries[a : a + block[0]]
        pairs = [(i, row) for i in range(len(q)) if candidates[a + i] is None for row in relevant[a + i]]
        qi, ri = torch.tensor(pairs, dtype=torch.long, device=q.device).reshape(-1, 2).unbind(1)
        floor = (q[qi] * corpus[ri]).sum(-1, keepdim=True) - TIE
        count = torch.zeros(len(pairs), dtype=torch.long, device=q.device)
        for c in range(0, len(corpus), block[1]):
            scores = q @ corpus[c : c + block[1]].T
            here = (ri >= c) & (ri < c + scores.shape[1])
            scores[qi[here], ri[here] - c] = -math.inf  # relevant ones do not compete with each other
            for part in torch.arange(len(pairs), device=q.device).split(block[0]):
                count[part] += (scores[qi[part]] >= floor[part]).sum(-1)
        found = dict(zip(pairs, zip(floor[:, 0].tolist(), count.tolist())))
        for i in range(len(q)):
            if candidates[a + i] is None:
                above.append({row: found[i, row] for row in relevant[a + i]})
            else:  # ranked against its own list only
                rows = candidates[a + i]
                scores = dict(zip(rows, (corpus[rows] * q[i]).sum(-1).tolist()))
                others = [s for row, s in scores.items() if row not in relevant[a + i]]
                above.append({row: (scores[row] - TIE, sum(s >= scores[row] - TIE for s in others)) for row in relevant[a + i] if row in scores})

    def before(j, i, gains, rows):  # among relevant documents: is j ranked before i?  The lesser one goes first in a tie
        gap = rows[j][0] - rows[i][0]
        return gap > TIE or (gap >= -TIE and (gains[j], j) < (gains[i], i))

    return [[(gains[i], 1 + rows[i][1] + sum(before(j, i, gains, rows) for j in rows)) for i in rows] for gains, rows in zip(relevant, above)]


def hit(ranks, k):
    return min(r for _, r in ranks) <= k


def ndcg(ranks, k, gains):
    """Linear gains: sum of gain / log2(rank + 1) over the first k, divided by that of the best order of all `gains`."""
    best = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(gains, reverse=True)[:k]))
    return sum(g / math.log2(r + 1) for g, r in ranks if r <= k) / best


def evaluate(task, vectors):
    """Task and (query vectors, corpus vectors) -> scores as a dict."""
    if not all(v.isfinite().all() for v in vectors):
        raise DataError(f"{task.name}: the model's embeddings are not finite numbers; the checkpoint is broken")
    ranks = rank(*vectors, task.relevant, task.candidates)
    sizes = [len(task.corpus) if c is None else len(c) for c in task.candidates]
    right = [len(g) if c is None else len(set(g) & set(c)) for g, c in zip(task.relevant, task.candidates)]
    gold = [[g for row, g in gains.items() if c is None or row in set(c)] for gains, c in zip(task.relevant, task.candidates)]
    n, chance = len(ranks), float(np.mean([r / s for r, s in zip(right, sizes)]))
    scores = {f"hit@{k}": sum(hit(r, k) for r in ranks) / n for k in (1, 5, 10)}
    scores["ndcg@5"] = sum(ndcg(r, 5, g) for r, g in zip(ranks, gold)) / n
    return dict(scores, queries=n, candidates=float(np.mean(sizes)), chance=chance,
                at_chance=scores["hit@1"] <= chance + 2 * math.sqrt(chance * (1 - chance) / n),
                ranks={q: min(r for _, r in ranks_) for q, ranks_ in zip(task.query_ids, ranks)})


METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5")


def table(results):
    wide = max(len("mean"), *(len(t) for t in results)) + 2
    lines = [f"{'task':{wide}}" + "".join(f"{m:>8}" for m in METRICS) + f"{'chance':>8}{'queries':>9}{'candidates':>12}"]
    for name, r in results.items():
        warning = "   hit@1 is at chance" if r["at_chance"] else ""
        lines.append(f"{name:{wide}}" + "".join(f"{r[m]:8.1%}" for m in METRICS) + f"{r['chance']:8.1%}{r['queries']:9d}{r['candidates']:12.0f}{warning}")
    if len(results) > 1:
        mean = {m: np.mean([r[m] for r in results.values()]) for m in (*METRICS, "chance")}
        lines.append(f"{'mean':{wide}}" + "".join(f"{mean[m]:8.1%}" for m in (*METRICS, "chance")))
    return "\n".join(lines)


def score(model, tasks, cfg, mode, steps):
    """-> ({task: scores}, what it took).  Items that tasks share are encoded once."""
    known, took, total = {}, {"queries": 0, "seconds": 0.0, "tokens": 0}, 0

    def encode(sides, label, took=None):
        new = list({s.key(): s for s in sides if s.key() not in known}.values())
        if new:
            vectors = model.encode(new, mode, steps, cfg.batch_size, progress=label, limit=cfg.limit, took=took)
            known.update((s.key(), v) for s, v in zip(new, vectors))
        if took is not None:
            took["queries"] += len(new)
        return torch.from_numpy(np.stack([known[s.key()] for s in sides])).to(model.device)

    results = {}
    for task in tasks:
        results[task.name] = evaluate(task, (encode(task.queries, f"{task.name} queries", took), encode(task.corpus, f"{task.name} corpus")))
        total += len(task.queries) + len(task.corpus)
    return results, dict(took, items=len(known), shared=total - len(known))


def compare(model, tasks, cfg):
    """One row for each mode, and for each number of latent steps up to the checkpoint's K."""
    rows = []
    for mode, steps in [("single", None), *(("latent", k) for k in range(model.settings["latent_steps"] + 1)), ("cot", None)]:
        model.encode(tasks[0].queries[: cfg.batch_size], mode, steps, cfg.batch_size, limit=cfg.limit)  # the first call is slower
        results, took = score(model, tasks, cfg, mode, steps)
        rows.append(dict(mode=mode, steps=steps, tokens=took["tokens"] / took["queries"], ms=1e3 * took["seconds"] / took["queries"],
                         hits={t: r["hit@1"] for t, r in results.items()}, mean=float(np.mean([r["hit@1"] for r in results.values()]))))
    return rows


def compare_table(rows, tasks):
    """`compare`'s rows as text, with the chance level below."""
    short = {t.name: t.name.replace("/turtle_hard", "*").replace("/turtle", "") for t in tasks}
    wide = {n: max(8, len(label) + 2) for n, label in short.items()}
    lines = [f"{'mode':8}{'steps':>7}{'tokens':>8}{'ms/query':>10}{'hit@1':>8}  " + "".join(f"{short[n]:>{w}}" for n, w in wide.items())]
    for r in rows:
        steps = "" if r["steps"] is None else r["steps"]
        lines.append(f"{r['mode']:8}{steps:>7}{r['tokens']:8.1f}{r['ms']:10.2f}{r['mean']:8.1%}  " + "".join(f"{r['hits'][n]:{w}.1%}" for n, w in wide.items()))
    chance = {t.name: float(np.mean([len(g) / (len(t.corpus) if c is None else len(c)) for g, c in zip(t.relevant, t.candidates)])) for t in tasks}
    lines.append(f"{'chance':33}{np.mean(list(chance.values())):8.1%}  " + "".join(f"{chance[n]:{w}.1%}" for n, w in wide.items()))
    return "\n".join(lines) + "\n* ranked against hard candidates only" * any(label.endswith("*") for label in short.values())


def draw_comparison(rows, path, title):
    """Mean hit@1 (0..1, upwards) against milliseconds per query (logarithmic) as a PNG: a point for each row of `compare`."""
    W, H, left, right, top, bottom = 1000, 620, 90, 60, 60, 80
    image = Image.new("RGB", (W, H), "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(20), ImageFont.load_default(16)
    low, high = math.log(min(r["ms"] for r in rows) / 1.3), math.log(max(r["ms"] for r in rows) * 1.3)
    place = lambda r: (left + (math.log(r["ms"]) - low) / (high - low) * (W - left - right), H - bottom - r["mean"] * (H - top - bottom))
    for i in range(0, 11, 2):
        y = H - bottom - i / 10 * (H - top - bottom)
        draw.line((left, y, W - right, y), fill="#dddddd")
        draw.text((left - 12, y), f"{i * 10}%", fill="black", font=small, anchor="rm")
    for ms in (m * 10**e for e in range(-2, 6) for m in (1, 2, 5)):
        if low <= math.log(ms) <= high:
            x = place(dict(ms=ms, mean=0))[0]
            draw.line((x, H - bottom, x, H - bottom + 6), fill="black")
            draw.text((x, H - bottom + 10), f"{ms:g}", fill="black", font=small, anchor="mt")
    draw.line((left, H - bottom, W - right, H - bottom), fill="black")
    draw.text(((left + W - right) / 2, H - 20), "milliseconds per query", fill="black", font=font, anchor="mb")
    draw.text((left, 18), f"hit@1, {title}", fill="black", font=font, anchor="lt")
    draw.line([place(r) for r in rows if r["mode"] == "latent"], fill="#1f77b4", width=2)
    for r in rows:
        (x, y), colour = place(r), {"single": "#d62728", "latent": "#1f77b4", "cot": "#2ca02c"}[r["mode"]]
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
        label = str(r["steps"]) if r["mode"] == "latent" else f"cot, {r['tokens']:.0f} tokens" if r["mode"] == "cot" else "single pass"
        above = r["mode"] == "latent"
        draw.text((x, y - 10 if above else y + 10), label, fill=colour, font=small, anchor="mb" if above else "mt")
    image.save(path + ".writing", "PNG")
    os.replace(path + ".writing", path)


def write_json(path, value):
    with open(path + ".writing", "w") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".writing", path)


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    if cfg.mode not in MODES or not -1 <= cfg.steps <= 32 or (cfg.steps >= 0 and cfg.mode != "latent"):
        raise DataError(f"--mode {cfg.mode!r} --steps {cfg.steps}: mode is one of {MODES}, steps are 0..32 and belong to mode latent")
    if cfg.compare and given & {"mode", "steps"}:
        raise DataError("--compare runs every mode: leave out --mode and --steps")
    if cfg.batch_size < 1 or cfg.limit < 1 or any(os.path.isdir(f) or not os.path.isdir(os.path.dirname(os.path.abspath(f))) for f in (cfg.json, cfg.compare)):
        raise DataError(f"--batch_size {cfg.batch_size} and --limit {cfg.limit} must be at least 1, --json {cfg.json!r} and --compare {cfg.compare!r} "
                        "files in folders that exist")
    if not os.path.exists(cfg.ckpt) and cfg.ckpt == Config.ckpt:
        raise DataError(f"{cfg.ckpt}: no checkpoint there yet; train one with: python train.py, or name one with --ckpt")
    if cfg.data:
        tasks = [read_task(cfg.data, name) for name in select(list_tasks(cfg.data), cfg.task, cfg.data)]
    else:
        tasks = world_tasks()
        tasks = [tasks[name] for name in select(list(tasks), cfg.task, "turtle world")]
    model, begun = Plume.from_pretrained(cfg.ckpt, cfg.device or None, cfg.dtype or None), time.time()
    if cfg.compare:
        rows = compare(model, tasks, cfg)
        print(f"{cfg.ckpt}: every mode, {model.device}, batches of {cfg.batch_size}, {time.time() - begun:.0f} s; tokens: decoded per query; "
              "ms/query: the model alone")
        print(compare_table(rows, tasks))
        draw_comparison(rows, cfg.compare, f"mean of {len(tasks)} tasks")
        print(f"accuracy against latency: {cfg.compare}")
        if cfg.json:
            write_json(cfg.json, dict(ckpt=cfg.ckpt, data=cfg.data, batch_size=cfg.batch_size, device=str(model.device), rows=rows))
        return
    steps = None if cfg.mode != "latent" else model.settings["latent_steps"] if cfg.steps < 0 else cfg.steps
    results, took = score(model, tasks, cfg, cfg.mode, steps)
    how = cfg.mode if steps is None else f"{cfg.mode}, {steps} latent steps"
    print(f"{cfg.ckpt}, mode {how}: {took['items']} items encoded ({took['shared']} shared), {time.time() - begun:.0f} s")
    print(table(results))
    if cfg.json:
        write_json(cfg.json, dict(ckpt=cfg.ckpt, mode=cfg.mode, steps=steps, data=cfg.data, tasks=results))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
