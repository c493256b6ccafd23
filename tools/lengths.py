"""Accuracy and time by the length of the program, in turtle world: what it buys to think as long as it takes.

    pip install matplotlib
    python -m tools.lengths --moves 2-12 --ckpt out/adaptive/checkpoint out/k12/checkpoint --png lengths.png

Of every checkpoint: latent with all its steps, and auto when it says when it is done; of the first also
single and cot.  Queries of all families together, one length at a time, so that a length's time is its own,
then as many of all lengths mixed; the median of --rounds.
"""

import engine.threads  # before torch

import itertools
import math
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from engine.flags import command, parse_flags
from eval import keep_queries, per_query_scores
from files.errors import DataError
from files.writing import write_json
from tasks.find import find_tasks, load_model
from tasks.turtle import lengths_of, moves_lost, World
from tools.plots import check_output, new_figure, save_figure

MIXED = "mixed"  # in place of a length: queries of all lengths in one batch


@dataclass
class Config:
    png: str = "lengths.png"  # the picture to draw
    json: str = ""  # also write the rows to this file
    moves: str = "2-12"  # of the programs, the fewest and the most
    rules: bool = False  # whether they show a rule book, as in train.py
    ckpt: tuple = ("out/checkpoint",)  # checkpoint folders
    done: float = 0.5  # in mode auto a row stops when <eot> has a probability above this
    limit: int = 64  # tokens a rationale may have in modes cot and auto
    batch_size: int = 32  # items encoded together; time depends on it
    rounds: int = 3  # times that everything is timed; the median counts
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


def ways_of(models):
    """[(label, model, mode)] of the rows, from {name of a checkpoint: model}."""
    ways = []
    for name, model in models.items():
        kind = "parallel" if model.adapter.kind == "parallel" else "latent"
        prefix = f"{name}: " if len(models) > 1 else ""
        if not ways:
            ways += [(f"{prefix}single", model, "single"), (f"{prefix}cot", model, "cot")]
        ways.append((f"{prefix}{kind} {model.settings['latent_steps']}", model, "latent"))
        if model.says_when_done:
            ways.append((f"{prefix}auto", model, "auto"))
    return ways


def measure(model, mode, tasks, corpora, mine, how):
    """mine: numbers of every task's queries; corpora: its candidates' embeddings -> hit, ms, steps, tokens"""
    queries = [task.queries[i] for task in tasks for i in mine]
    took, spent, hits = dict(seconds=0.0, tokens=0), {}, []
    vectors = torch.from_numpy(model.encode(queries, mode, took=took, spent=spent, **how))
    for task, corpus, part in zip(tasks, corpora, vectors.split(len(mine))):
        _, scores = per_query_scores(keep_queries(task, mine), (part, corpus))
        hits += scores["hit@1"].tolist()
    return dict(hit=float(np.mean(hits)), ms=1e3 * took["seconds"] / len(queries),
                steps=float(np.mean(spent["steps"])), tokens=float(np.mean(spent["tokens"])))


def compare(ways, tasks, rows, cfg):
    """rows: {length or MIXED: numbers of queries} -> {label: what `measure` gives of each, median time}"""
    how = dict(batch_size=cfg.batch_size, limit=cfg.limit, done=cfg.done)
    corpora = {label: [torch.from_numpy(model.encode(task.corpus, mode, **how)) for task in tasks]
               for label, model, mode in ways}
    found = {label: {n: dict(length=n) for n in rows} for label in corpora}
    times = {(label, n): [] for label in corpora for n in rows}
    # the ways take turns: what else the machine does hits all alike
    turns = list(itertools.product(range(cfg.rounds), rows, ways))
    for _, n, (label, model, mode) in tqdm(turns, desc="lengths", unit="turn"):
        now = measure(model, mode, tasks, corpora[label], rows[n], how)
        times[label, n].append(now["ms"])
        found[label][n] |= now | dict(ms=float(np.median(times[label, n])))
    return {label: list(of_length.values()) for label, of_length in found.items()}


def as_text(found, lengths):
    """The rows as tables, one for each thing that was measured."""
    wide = max(map(len, found)) + 2
    lines = []
    for key, title, form in (
            ("hit", "hit@1", ".1%"), ("ms", "ms per query", ".2f"), ("steps", "latent steps", ".1f"),
            ("tokens", "tokens written", ".1f")):
        lines.append(f"{title:{wide}}" + "".join(f"{n:>8}" for n in (*lengths, "mean", MIXED)))
        for label, rows in found.items():
            *values, mixed = [row[key] for row in rows]
            values += [np.mean(values), mixed]
            lines.append(f"{label:{wide}}" + "".join(f"{value:8{form}}" for value in values))
        lines.append("")
    return "\n".join(lines[:-1])


def draw(found, lengths, path):
    """Two plots side by side over the number of moves: hit@1, and milliseconds a query."""
    figure, panels = new_figure(1200, 560, 2)
    named = ("hit", "hit@1", "{x:.0%}"), ("ms", "milliseconds per query", "{x:g}")
    for axes, (key, label, form) in zip(panels, named):
        for n, (way, (*rows, _)) in enumerate(found.items()):  # without MIXED
            axes.plot(lengths, [row[key] for row in rows], "o-", label=way if key == "hit" else None,
                      markersize=4 + 1.5 * (len(found) - n), clip_on=False)  # equal ones are seen as rings
        axes.set(xlabel="moves", xticks=lengths, ylabel=label, ylim=(0, None))
        axes.yaxis.set_major_formatter(form)
        axes.grid(axis="y", color="#dddddd")
    figure.legend(loc="outside lower center", ncols=4)
    save_figure(figure, path)


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    lengths = lengths_of(cfg.moves)
    if len(lengths) < 2:
        raise DataError(f"--moves {cfg.moves}: needs the fewest and the most, as 2-12")
    if min(cfg.rounds, cfg.batch_size, cfg.limit) < 1 or len(cfg.ckpt) > 4:  # there are ten colours
        raise DataError("--rounds, --batch_size and --limit must be at least 1; 4 checkpoints at most")
    if not 0 <= cfg.done <= 1:
        raise DataError(f"--done {cfg.done}: needs a probability, 0 .. 1")
    check_output("png", cfg.png, cfg.json)
    models = {}
    for path in cfg.ckpt:
        name = os.path.normpath(path).removesuffix("/checkpoint").split("/")[-1]
        if name in models:
            raise DataError(f"--ckpt: two of them are called {name!r}; their folders need other names")
        models[name] = load_model(path, cfg.device, cfg.dtype)
        if lost := moves_lost(models[name].processor, cfg.moves):
            raise DataError(f"{path}: {lost}")
    begun, ways = time.time(), ways_of(models)
    processor = ways[0][1].processor
    names, make = find_tasks("", processor, moves=cfg.moves, rules=cfg.rules)
    tasks = [make(name) for name in names if not name.endswith("_hard")]
    world = World("test", moves=cfg.moves, rules=cfg.rules)
    of_one_task = world.lengths[: len(tasks[0].queries)]
    rows = {n: np.flatnonzero(of_one_task == n).tolist() for n in lengths}
    each = len(rows[lengths[0]])
    some = [i for mine in rows.values() for i in mine[: math.ceil(each / len(rows))]]
    rows[MIXED] = np.random.default_rng(0).permutation(some).tolist()
    found = compare(ways, tasks, rows, cfg)
    print(f"{each * len(tasks)} queries of each length, {len(some) * len(tasks)} mixed, in batches of "
          f"{cfg.batch_size}, {processor.limits.num_frames} frames of a clip, {cfg.rounds} rounds, "
          f"{time.time() - begun:.0f} s")
    print(as_text(found, lengths))
    draw(found, lengths, cfg.png)
    print(f"accuracy and time by length: {cfg.png}")
    if cfg.json:
        about = {name: value for name, value in asdict(cfg).items() if name not in ("png", "json")}
        write_json(cfg.json, dict(about, rows=found))


if __name__ == "__main__":
    command(main)
