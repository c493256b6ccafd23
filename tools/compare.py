"""Accuracy against latency: every mode, and latent with 0..K steps, of one checkpoint, as a table and a picture.

    python -m tools.compare --png compare.png                          turtle world, the checkpoint that train.py wrote
    python -m tools.compare --png compare.png --data DIR --task all    your own tasks
"""

import math
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import eval as evaluation
from data import DataError, command, parse_flags, writing
from eval import Embedder, fingerprint, load, score, select, writable, write_json
from tasks.beir import list_tasks, read_task
from tasks.turtle import world_tasks


@dataclass
class Config:
    png: str = "compare.png"  # the picture to draw
    json: str = ""  # also write the rows to this file
    data: str = ""  # folder of the tasks; default: turtle world
    task: str = "all"  # as eval.py's: all, a meta-task (video_ret), a data set, several with commas between
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    limit: int = 512  # tokens a rationale may have in mode cot
    batch_size: int = 32  # items encoded together; time depends on it
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


def compare(model, tasks, cfg):
    """One row for each mode, and for each number of latent steps up to the checkpoint's K."""
    rows, checkpoint_hash = [], fingerprint(model)
    for mode, steps in [("single", None), *(("latent", k) for k in range(model.settings["latent_steps"] + 1)), ("cot", None)]:
        model.encode(tasks[0].queries[: cfg.batch_size], mode, steps, cfg.batch_size, limit=cfg.limit)  # the first call is slower
        took = {"queries": 0, "seconds": 0.0, "tokens": 0}
        results = dict(score(Embedder(model, cfg, mode, steps, "", checkpoint_hash), [(t.name, lambda t=t: t) for t in tasks], took=took))
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
    with writing(path, "wb") as f:
        image.save(f, "PNG")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if not cfg.png.lower().endswith(".png") or not writable(cfg.png) or not writable(cfg.json):
        raise DataError(f"--png {cfg.png!r} must end in .png, and --json {cfg.json!r} and it be in folders that exist")
    if cfg.batch_size < 1 or cfg.limit < 1:
        raise DataError(f"--batch_size {cfg.batch_size} and --limit {cfg.limit} must be at least 1")
    turtle = {} if cfg.data else world_tasks()
    names = select(list_tasks(cfg.data) if cfg.data else list(turtle), cfg.task, cfg.data or "turtle world")
    tasks = [read_task(cfg.data, name) if cfg.data else turtle[name] for name in names]
    model, begun = load(cfg), time.time()
    rows = compare(model, tasks, evaluation.Config(batch_size=cfg.batch_size, limit=cfg.limit))
    print(f"{cfg.ckpt}: every mode, {model.device}, batches of {cfg.batch_size}, {time.time() - begun:.0f} s; tokens: decoded "
          "per query; ms/query: the model alone")
    print(compare_table(rows, tasks))
    draw_comparison(rows, cfg.png, f"mean of {len(tasks)} tasks")
    print(f"accuracy against latency: {cfg.png}")
    if cfg.json:
        write_json(cfg.json, dict(ckpt=cfg.ckpt, data=cfg.data, batch_size=cfg.batch_size, device=str(model.device), rows=rows))


if __name__ == "__main__":
    command(main)
