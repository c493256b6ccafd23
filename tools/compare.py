"""Accuracy against latency: every mode, and latent with 0..K steps, of one checkpoint, as table and picture.

    python -m tools.compare --png compare.png                          turtle world, train.py's checkpoint
    python -m tools.compare --png compare.png --data DIR --task all    your own tasks
"""

import functools
import math
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.flags import command, parse_flags
from engine.kept import Embedder, fingerprint
from eval import score
from files.errors import DataError
from files.writing import writable, write_json, writing
from tasks.find import find_tasks, load_model, select

COLOURS = {"single": "#d62728", "latent": "#1f77b4", "cot": "#2ca02c", "auto": "#ff7f0e"}  # of a mode


@dataclass
class Config:
    png: str = "compare.png"  # the picture to draw
    json: str = ""  # also write the rows to this file
    data: str = ""  # folder of the tasks; default: turtle world
    moves: str = "8"  # of turtle world's programs,
    rules: bool = False  # whether they show a rule book, and
    codes: bool = False  # whether it is pages with code words, as in train.py
    task: str = "all"  # as eval.py's: all, a meta-task (video_ret), a data set, several with commas between
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    limit: int = 512  # tokens a rationale may have in modes cot and auto
    batch_size: int = 32  # items encoded together; time depends on it
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


def compare(model, tasks, batch_size, limit):
    """One row for each mode, and for each number of latent steps up to the checkpoint's K.

    -> [dict: mode, steps (None but in mode latent), mean and hits {task: hit@1}, tokens and ms per query]
    """
    ways = [("single", None)]
    ways += [("latent", steps) for steps in range(model.settings["latent_steps"] + 1)]
    ways.append(("cot", None))
    if model.says_when_done:
        ways.append(("auto", None))
    by_name = {task.name: task for task in tasks}
    makers = [(name, functools.partial(by_name.get, name)) for name in by_name]
    first_batch = tasks[0].queries[:batch_size]
    checkpoint_hash = fingerprint(model)
    rows = []
    for mode, steps in ways:
        model.encode(first_batch, mode, steps, batch_size, limit=limit)  # the first call is slower
        took = {"queries": 0, "seconds": 0.0, "tokens": 0}
        embedder = Embedder(model, mode, steps, batch_size, limit, checkpoint_hash=checkpoint_hash)
        hits = {name: result["hit@1"] for name, result in score(embedder, makers, took=took)}
        tokens = took["tokens"] / took["queries"]
        ms = 1e3 * took["seconds"] / took["queries"]
        mean = float(np.mean(list(hits.values())))
        rows.append(dict(mode=mode, steps=steps, tokens=tokens, ms=ms, hits=hits, mean=mean))
    return rows


def chance_of(task):
    """The expected hit@1 of a random ranking."""
    shares = []
    for gains, among in zip(task.relevant, task.candidates):
        size = len(task.corpus) if among is None else len(among)
        shares.append(len(gains) / size)
    return float(np.mean(shares))


def compare_table(rows, tasks):
    """`compare`'s rows as text, with the chance level below."""
    labels, wide = {}, {}
    for task in tasks:
        label = task.name.replace("/turtle_hard", "*").replace("/turtle", "")
        labels[task.name] = label
        wide[task.name] = max(8, len(label) + 2)
    heads = "".join(f"{labels[name]:>{w}}" for name, w in wide.items())
    lines = [f"{'mode':8}{'steps':>7}{'tokens':>8}{'ms/query':>10}{'hit@1':>8}  {heads}"]
    for r in rows:
        steps = "" if r["steps"] is None else r["steps"]
        hits = "".join(f"{r['hits'][name]:{w}.1%}" for name, w in wide.items())
        lines.append(f"{r['mode']:8}{steps:>7}{r['tokens']:8.1f}{r['ms']:10.2f}{r['mean']:8.1%}  {hits}")
    chance = {task.name: chance_of(task) for task in tasks}
    cells = "".join(f"{chance[name]:{w}.1%}" for name, w in wide.items())
    lines.append(f"{'chance':33}{np.mean(list(chance.values())):8.1%}  {cells}")
    if any(label.endswith("*") for label in labels.values()):
        lines.append("* ranked against hard candidates only")
    return "\n".join(lines)


def label_of(row):
    """What stands beside a row's point."""
    if row["mode"] == "latent":
        return str(row["steps"])
    if row["mode"] in ("cot", "auto"):
        return f"{row['mode']}, {row['tokens']:.0f} tokens"
    return "single pass"


def draw_comparison(rows, path, title):
    """Writes `compare`'s rows as a PNG, a point for each.

    Mean hit@1 (0..1, upwards) against milliseconds per query (logarithmic).
    """
    width, height = 1000, 620
    left, right, top, bottom = 90, width - 60, 60, height - 80  # edges of the plot
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    low = math.log(min(r["ms"] for r in rows) / 1.3)
    high = math.log(max(r["ms"] for r in rows) * 1.3)

    def x_of(ms):
        return left + (math.log(ms) - low) / (high - low) * (right - left)

    def y_of(mean):
        return bottom - mean * (bottom - top)

    # axes
    for tenths in range(0, 11, 2):
        y = y_of(tenths / 10)
        draw.line((left, y, right, y), fill="#dddddd")
        draw.text((left - 12, y), f"{tenths * 10}%", fill="black", font=small, anchor="rm")
    for exponent in range(-2, 6):
        for digit in (1, 2, 5):
            ms = digit * 10**exponent
            if low <= math.log(ms) <= high:
                x = x_of(ms)
                draw.line((x, bottom, x, bottom + 6), fill="black")
                draw.text((x, bottom + 10), f"{ms:g}", fill="black", font=small, anchor="mt")
    draw.line((left, bottom, right, bottom), fill="black")
    below = ((left + right) / 2, height - 20)
    draw.text(below, "milliseconds per query", fill="black", font=font, anchor="mb")
    draw.text((left, 18), f"hit@1, {title}", fill="black", font=font, anchor="lt")

    # points
    latent = [(x_of(r["ms"]), y_of(r["mean"])) for r in rows if r["mode"] == "latent"]
    draw.line(latent, fill=COLOURS["latent"], width=2)
    for r in rows:
        x, y, colour = x_of(r["ms"]), y_of(r["mean"]), COLOURS[r["mode"]]
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
        if r["mode"] == "latent":
            draw.text((x, y - 10), label_of(r), fill=colour, font=small, anchor="mb")
        else:
            draw.text((x, y + 10), label_of(r), fill=colour, font=small, anchor="mt")
    with writing(path, "wb") as f:
        image.save(f, "PNG")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if not cfg.png.lower().endswith(".png") or not writable(cfg.png) or not writable(cfg.json):
        raise DataError(f"--png {cfg.png!r} must end in .png, and --json {cfg.json!r} and it be in folders "
                        "that exist")
    if cfg.batch_size < 1 or cfg.limit < 1:
        raise DataError(f"--batch_size {cfg.batch_size} and --limit {cfg.limit} must be at least 1")
    model = load_model(cfg.ckpt, cfg.device, cfg.dtype)
    names, make = find_tasks(
        cfg.data, model.processor, moves=cfg.moves, rules=cfg.rules, codes=cfg.codes)
    tasks = [make(name) for name in select(names, cfg.task, cfg.data or "turtle world")]
    begun = time.time()
    rows = compare(model, tasks, cfg.batch_size, cfg.limit)
    seconds = time.time() - begun
    print(f"{cfg.ckpt}: every mode, {model.device}, batches of {cfg.batch_size}, {seconds:.0f} s; tokens: "
          "decoded per query; ms/query: the model alone")
    print(compare_table(rows, tasks))
    draw_comparison(rows, cfg.png, f"mean of {len(tasks)} tasks")
    print(f"accuracy against latency: {cfg.png}")
    if cfg.json:
        about = dict(ckpt=cfg.ckpt, data=cfg.data, batch_size=cfg.batch_size, device=str(model.device))
        write_json(cfg.json, dict(about, rows=rows))


if __name__ == "__main__":
    command(main)
