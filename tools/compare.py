"""Accuracy against latency: every mode, and latent with 0..K steps, of one checkpoint, as table and picture.

    pip install matplotlib
    python -m tools.compare --png compare.png                          turtle world, train.py's checkpoint
    python -m tools.compare --png compare.png --data DIR --task all    your own tasks
"""

import engine.threads  # before torch

import functools
import math
import time
from dataclasses import dataclass

import numpy as np

from engine.flags import command, parse_flags
from engine.kept import Embedder, fingerprint
from eval import evenly_spaced, score
from files.errors import DataError
from files.writing import write_json
from tasks.find import find_tasks, load_model, select
from tools.plots import check_output, new_figure, save_figure

MODES = {  # their names in the picture
    "single": "single pass", "latent": "latent steps", "cot": "cot, {tokens:.0f} tokens",
    "auto": "auto, {tokens:.0f} tokens"}


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
    rounds: int = 15  # times that every mode is timed, all in turns; the median counts
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


def compare(model, tasks, batch_size, limit, rounds):
    """{name: Task} -> a row for each mode, of latent for each number of steps up to K; {name: chance}

    A row: mode, steps (None but in mode latent), mean and hits {name: hit@1}, tokens and ms per query.
    """
    latent = [("latent", steps) for steps in range(model.settings["latent_steps"] + 1)]
    ways = [("single", None), *latent, ("cot", None)]
    if model.says_when_done:
        ways.append(("auto", None))
    makers = [(name, functools.partial(tasks.get, name)) for name in tasks]
    checkpoint_hash, rows = fingerprint(model), []
    for mode, steps in ways:
        took = {"queries": 0, "seconds": 0.0, "tokens": 0}
        embedder = Embedder(model, mode, steps, batch_size, limit, checkpoint_hash=checkpoint_hash)
        results = dict(score(embedder, makers, took=took))
        hits = {name: result["hit@1"] for name, result in results.items()}
        rows.append(dict(mode=mode, steps=steps, tokens=took["tokens"] / took["queries"], hits=hits,
                         mean=float(np.mean(list(hits.values())))))
    some = []
    for task in tasks.values():  # one batch together
        count = math.ceil(batch_size / len(tasks))
        some += [task.queries[i] for i in evenly_spaced(len(task.queries), count)]
    some = some[:batch_size]
    for row, ms in zip(rows, milliseconds(model, ways, some, rounds, batch_size, limit)):
        row["ms"] = ms
    return rows, {name: result["chance"] for name, result in results.items()}


def milliseconds(model, ways, queries, rounds, batch_size, limit):
    """Of the model alone, per query: the median of so many rounds for each (mode, steps).

    The ways take turns: what else the machine does hits all alike.
    """
    spent = {way: [] for way in ways}
    for _ in range(rounds):
        for mode, steps in ways:
            took = dict(seconds=0.0, tokens=0)
            model.encode(queries, mode, steps, batch_size, limit=limit, took=took)
            spent[mode, steps].append(1e3 * took["seconds"] / len(queries))
    return [float(np.median(times)) for times in spent.values()]


def compare_table(rows, chance):
    """What `compare` gives as text."""
    labels = {name: name.replace("/turtle_hard", "*").replace("/turtle", "") for name in chance}
    widths = {name: max(8, len(label) + 2) for name, label in labels.items()}
    heads = "".join(f"{labels[name]:>{width}}" for name, width in widths.items())
    lines = [f"{'mode':8}{'steps':>7}{'tokens':>8}{'ms/query':>10}{'hit@1':>8}  {heads}"]
    for r in rows:
        steps = "" if r["steps"] is None else r["steps"]
        hits = "".join(f"{r['hits'][name]:{width}.1%}" for name, width in widths.items())
        lines.append(f"{r['mode']:8}{steps:>7}{r['tokens']:8.1f}{r['ms']:10.2f}{r['mean']:8.1%}  {hits}")
    shares = "".join(f"{chance[name]:{width}.1%}" for name, width in widths.items())
    lines.append(f"{'chance':33}{np.mean(list(chance.values())):8.1%}  {shares}")
    if any(label.endswith("*") for label in labels.values()):
        lines.append("* ranked against hard candidates only")
    return "\n".join(lines)


def draw_comparison(rows, path, title):
    """Writes `compare`'s rows as a PNG: mean hit@1 against milliseconds per query, a point for each."""
    figure, (axes,) = new_figure(1000, 620)
    for mode, name in MODES.items():
        mine = [r for r in rows if r["mode"] == mode]
        if mine:
            axes.plot([r["ms"] for r in mine], [r["mean"] for r in mine], "o-", label=name.format(**mine[0]))
    for r in rows:
        if r["mode"] == "latent":  # neighbours' numbers above and below the line
            place, side = (7, "bottom") if r["steps"] % 2 == 0 else (-7, "top")
            axes.annotate(r["steps"], (r["ms"], r["mean"]), (0, place), textcoords="offset points",
                          ha="center", va=side)
    axes.set(xlabel="milliseconds per query; numbers at the points: latent steps", ylim=(-0.08, 1.08),
             ylabel="hit@1", title=title)
    axes.set_xscale("log", subs=(1.5, 2, 3, 5, 7))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(color="#dddddd")
    figure.legend(loc="outside lower center", ncols=4)
    save_figure(figure, path)


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if min(cfg.batch_size, cfg.limit, cfg.rounds) < 1:
        raise DataError(f"--batch_size {cfg.batch_size}, --limit {cfg.limit} and --rounds {cfg.rounds} must "
                        "be at least 1")
    check_output("png", cfg.png, cfg.json)
    model = load_model(cfg.ckpt, cfg.device, cfg.dtype)
    how = dict(moves=cfg.moves, rules=cfg.rules, codes=cfg.codes, prompts=model.settings["prompts"])
    names, make = find_tasks(cfg.data, model.processor, **how)
    tasks = {name: make(name) for name in select(names, cfg.task, cfg.data or "turtle world")}
    begun = time.time()
    rows, chance = compare(model, tasks, cfg.batch_size, cfg.limit, cfg.rounds)
    print(f"{cfg.ckpt}: every mode, {model.device}, batches of {cfg.batch_size}, "
          f"{time.time() - begun:.0f} s; tokens: decoded per query; ms/query: of the model alone, median of "
          f"{cfg.rounds} rounds")
    print(compare_table(rows, chance))
    draw_comparison(rows, cfg.png, f"mean of {len(tasks)} tasks")
    print(f"accuracy against latency: {cfg.png}")
    if cfg.json:
        about = dict(ckpt=cfg.ckpt, data=cfg.data, batch_size=cfg.batch_size, rounds=cfg.rounds)
        write_json(cfg.json, dict(about, device=str(model.device), rows=rows, chance=chance))


if __name__ == "__main__":
    command(main)
