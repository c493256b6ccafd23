"""Look inside: do the latent steps matter, what do they say, what was found?

    python -m tools.probe                                      turtle world, the checkpoint of train.py
    python -m tools.probe --task video_ret --html report.html  one family, and a report to look at
    python -m tools.probe --data DIR --task all --ckpt DIR     your own tasks
    python -m tools.probe --task video_ret --ids 4711,12       the trajectories of these queries

The same queries are embedded again and again with one thing changed: fewer steps; other inputs of the steps;
an adapter, experts or an anchor that they were not trained with.  What changes the score is used, what does
not is not.  Candidates are embedded once, as trained; for `single` and `cot` in that mode, too.
docs/probe.md says how to read each number.
"""

import engine.threads  # before torch

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from curriculum import Curriculum
from engine.flags import command, parse_flags
from engine.kept import Embedder, fingerprint
from engine.stream import MODES
from eval import evenly_spaced, interval, keep_queries, per_query_scores
from files.errors import closest, DataError
from files.writing import writable, write_json
from tasks.find import find_tasks, load_model, select
from tools.probe_report import AGREEMENT, between, CHANGED, counted, write_report
from tools.probe_thoughts import as_text, chosen, Thoughts, trajectory
from tools.probe_ways import NEEDS_OTHERS, Queries, TRAINED, ways_of

COMPARED = {  # rows that are modes, what they are
    "single": "queries and candidates by the embedding of one pass",
    "cot": "queries and candidates with a rationale written first"}


@dataclass
class Config:
    # what
    data: str = ""  # folder of the tasks, as eval.py's; default: turtle world
    moves: str = "8"  # of turtle world's programs, and
    rules: bool = False  # whether they show a rule book, as in train.py
    task: str = "all"  # as eval.py's: all, a meta-task (video_ret), a data set, several with commas between
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    # how
    queries: int = 200  # of a task, at most, evenly spaced
    segments: int = 0  # --segments of train.py: parts of a rationale; 0: one for each latent step
    limit: int = 512  # tokens a rationale may have in mode cot; 0: leave cot out
    batch_size: int = 32  # queries embedded together; inputs and anchors are exchanged between these
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast
    # report
    ids: str = ""  # ids of queries, with commas between: only their trajectories are shown, as text, too
    show: int = 3  # otherwise so many queries of a task where latent wins over single, loses, and of the rest
    html: str = ""  # write a report with pictures to this file
    json: str = ""  # write all numbers and the trajectories to this file


# ---- a task
@torch.no_grad()
def probe_task(model, task, embedders, curriculum, batch_size):
    """-> {row: (N, D) embeddings of the queries}, {row: (M, D) of the candidates}, Thoughts"""
    ways, thoughts, n = ways_of(model), Thoughts(), len(task.queries)
    if n == 1:
        ways = {name: way for name, way in ways.items() if name not in NEEDS_OTHERS}
    vectors, corpus = {name: [] for name in ways}, {}
    as_trained, _ = embedders[TRAINED](task.corpus, f"{task.name} candidates")
    count = max(1, min(-(-n // batch_size), n // 2))  # no batch has one query alone, if there are two
    batches = np.array_split(np.arange(n), count)
    for rows in tqdm(batches, f"{task.name} queries", unit="batch", leave=False):
        sides = [task.queries[row] for row in rows]
        queries = Queries(model, sides)
        for name, way in ways.items():
            vectors[name].append(way.embed(queries))
        thoughts.add(queries, curriculum, sides)
    for name in ways:
        vectors[name], corpus[name] = torch.cat(vectors[name]), as_trained
    for mode, embedder in embedders.items():
        if mode != TRAINED:
            vectors[mode], _ = embedder(task.queries, f"{task.name} queries, {mode}")
            corpus[mode], _ = embedder(task.corpus, f"{task.name} candidates, {mode}")
    return vectors, corpus, thoughts


# ---- tables
def verdict(name, subject, values, base):
    """One line on a row: values and base (N,) are the scores of its queries, and as trained."""
    before, now = base.mean(), values.mean()
    low, high = interval(base - values)  # of what is lost
    numbers = f"{100 * before:.1f} -> {100 * now:.1f}"
    if name in MODES:
        said = "latent is no better than"
        if low > 0:
            said = "latent is better than"
        elif high < 0:
            said = "latent is worse than"
        return f"{said} {name}: {100 * before:.1f} against {100 * now:.1f}"
    if high < 0:
        return f"{subject} in the way: {numbers}"
    if low <= 0 and high >= 0.1 * before:
        return f"undecided with {len(values):,} queries: {numbers}"
    if low <= 0:
        return f"{subject} not used: {numbers}"
    little = "a little " if now > 0.9 * before else ""
    return f"{subject} {little}used: {numbers}"


def rows_of(values, ways):
    """{row: (N,) scores}, {row: Way} -> {row: dict}, as JSON has it."""
    rows = {}
    for name, mine in values.items():
        way = ways.get(name)
        rows[name] = dict(score=float(mine.mean()), interval=interval(mine), verdict="",
                          what=way.what if way else COMPARED[name])
        if name != TRAINED:
            rows[name]["verdict"] = verdict(name, way.subject if way else "", mine, values[TRAINED])
    return rows


def agreement_of(shares, by_step):
    """What `Thoughts.agreement` gives -> as JSON has it: {} without rationales."""
    if not shares:
        return {}
    return dict(score=float(np.mean(shares)), interval=interval(np.array(shares)), by_step=by_step)


def text_table(result):
    """All tasks together with interval and verdict, every task's scores, and agreement."""
    names, everything, metric = list(result["tasks"]), result["all"], f"{result['metric']} %"
    wide = max(9, len(metric) + 2)
    lines = [f"{CHANGED:32}{metric:>{wide}}   {'95%':14} verdict"]
    for name, row in everything.items():
        lines.append(f"{name:32}{100 * row['score']:{wide}.1f}   {between(row):14} {row['verdict']}".rstrip())
    labels = names
    if not result["data"]:
        labels = [name.replace("/turtle_hard", "*").replace("/turtle", "") for name in names]
    if len(names) > 1:
        wide = [max(8, len(label) + 2) for label in labels]
        heads = "".join(f"{label:>{w}}" for label, w in zip(labels, wide))
        lines += ["", f"each task, {metric}", f"{CHANGED:32}{heads}"]
        for row in everything:
            cells = ""
            for name, w in zip(names, wide):
                found = result["tasks"][name]["rows"].get(row)
                cells += f"{100 * found['score']:{w}.1f}" if found else f"{'-':>{w}}"
            lines.append(f"{row:32}{cells}")
    if result["agreement"]:
        lines += ["", AGREEMENT, f"{'task':32}{'steps %':>9}   95%"]
        found = {label: result["tasks"][name]["agreement"] for label, name in zip(labels, names)}
        for label, row in (found | {"all": result["agreement"]}).items():
            if row:
                lines.append(f"{label:32}{100 * row['score']:9.1f}   {between(row)}")
    return "\n".join(lines)


# ---- command
def check_flags(cfg):
    """Raises DataError for flags that make no sense."""
    if cfg.queries < 1 or cfg.batch_size < 2 or min(cfg.segments, cfg.limit, cfg.show) < 0:
        raise DataError(f"--queries {cfg.queries} must be at least 1, --batch_size {cfg.batch_size} at least "
                        f"2, --segments {cfg.segments}, --limit {cfg.limit}, --show {cfg.show} at least 0")
    if not writable(cfg.html) or not writable(cfg.json):
        raise DataError(f"--html {cfg.html!r} and --json {cfg.json!r} must be files in folders that exist")


def curriculum_of(cfg, model):
    """How rationales were cut for a checkpoint."""
    K = model.settings["latent_steps"]
    if model.adapter.kind == "parallel":
        raise DataError(f"{cfg.ckpt}: its K learnt tokens take one pass, there are no steps to look into")
    if K == 0:
        raise DataError(f"{cfg.ckpt}: a checkpoint with K = 0 has no latent steps to look into; its score: "
                        "python eval.py --mode single")
    segments = cfg.segments or K
    if K % segments or (model.settings["adaptive"] and K != segments):
        raise DataError(f"--segments {segments}: the checkpoint's {K} latent steps are no multiple of it; "
                        "needs what train.py was given")
    return Curriculum(segments, K // segments, adaptive=model.settings["adaptive"])


def tasks_of(cfg, model):
    """-> the Tasks with the queries that are looked at, how many there are in all, the ids of --ids."""
    how = dict(moves=cfg.moves, rules=cfg.rules, prompts=model.settings["prompts"])
    names, make = find_tasks(cfg.data, model.processor, **how)
    ids, tasks, known, total = set(filter(None, cfg.ids.split(","))), [], {}, 0
    for task_name in select(names, cfg.task, cfg.data or "turtle world"):
        task = make(task_name)
        rows = set(evenly_spaced(len(task.queries), cfg.queries))
        rows |= {i for i, name in enumerate(task.query_ids) if name in ids}
        known |= dict.fromkeys(task.query_ids)
        total += len(task.queries)
        tasks.append(keep_queries(task, sorted(rows)))
    for name in sorted(ids - known.keys()):
        raise DataError(f"--ids {name!r}: no query has this id.{closest(name, known)}")
    return tasks, total, ids


def what_is_left_out(model, cfg, tasks, total, agreement):
    """Sentences on what the table does not have, and why."""
    said, looked = [], sum(len(task.queries) for task in tasks)
    if looked < total:
        said.append(f"{looked:,} of {total:,} queries, evenly spaced (--queries {cfg.queries})")
    if model.adapter.kind == "none":
        said.append("the checkpoint has no adapter: no rows for adapter, experts and anchor")
    elif not model.adapter.experts:
        said.append("the adapter is one MLP: no rows for experts and anchor")
    elif not model.adapter.anchor:
        said.append("the router does not see the anchor: no rows for it")
    if not cfg.limit:
        said.append("cot is left out (--limit 0)")
    alone = [task.name for task in tasks if len(task.queries) == 1]
    if alone:
        said.append(f"one query has no other: no rows {', '.join(NEEDS_OTHERS)} for {', '.join(alone)}")
    if not agreement:
        said.append("no query comes with a rationale: whether the steps say it is not known")
    return said


def embedders_of(model, cfg):
    """{TRAINED, single and cot: what embeds the candidates, and for a mode the queries}"""
    modes = {TRAINED: ("latent", model.settings["latent_steps"]), "single": ("single", None)}
    if cfg.limit:
        modes["cot"] = ("cot", None)
    weights = fingerprint(model)
    return {name: Embedder(model, *mode, cfg.batch_size, max(cfg.limit, 1), checkpoint_hash=weights)
            for name, mode in modes.items()}


def probe(model, tasks, total, ids, cfg):
    """-> everything as JSON has it; for each query shown its trajectory, its Side, those of what it found"""
    begun, K = time.time(), model.settings["latent_steps"]
    curriculum, embedders = curriculum_of(cfg, model), embedders_of(model, cfg)
    ways, results, values, all_agreement, shown = ways_of(model), {}, {}, [], []
    for task in tasks:
        vectors, corpus, thoughts = probe_task(model, task, embedders, curriculum, cfg.batch_size)
        ranks, scores = {}, {}
        for name in vectors:
            ranks[name], per_query = per_query_scores(task, (vectors[name], corpus[name]))
            scores[name] = per_query[task.metric]
            values.setdefault(name, []).append(scores[name])
        agreement, by_step = thoughts.agreement()
        all_agreement += agreement
        results[task.name] = dict(
            metric=task.metric, queries=len(task.queries), candidates=len(task.corpus),
            rows=rows_of(scores, ways), agreement=agreement_of(agreement, by_step),
            experts=np.mean(thoughts.router, 0).tolist())
        for kind, rows in chosen(ids, task.query_ids, ranks, cfg.show).items():
            for i in rows:
                found, candidates = trajectory(model, task, i, vectors, corpus, thoughts, ranks)
                shown.append((found | dict(list=kind), task.queries[i], candidates))
    pooled = {name: np.concatenate(mine) for name, mine in values.items() if len(mine) == len(tasks)}
    return dict(
        ckpt=cfg.ckpt, data=cfg.data, steps=K, device=str(model.device), seconds=time.time() - begun,
        notes=what_is_left_out(model, cfg, tasks, total, all_agreement),
        metric=" or ".join(sorted({task.metric for task in tasks})), all=rows_of(pooled, ways),
        agreement=agreement_of(all_agreement, {}), tasks=results,
        trajectories=[found for found, _, _ in shown]), shown


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    check_flags(cfg)
    model = load_model(cfg.ckpt, cfg.device, cfg.dtype)
    tasks, total, ids = tasks_of(cfg, model)
    result, shown = probe(model, tasks, total, ids, cfg)
    how = f"K = {result['steps']}, {result['device']}, {result['seconds']:.0f} s"
    print(f"{cfg.ckpt}: {counted(len(tasks), 'task', 'tasks')}, {how}")
    print(*result["notes"], text_table(result), sep="\n")
    if ids:
        print(*map(as_text, result["trajectories"]), sep="\n")
    if cfg.json:
        write_json(cfg.json, result)
    if cfg.html:
        print(write_report(cfg.html, result, shown))


if __name__ == "__main__":
    command(main)
