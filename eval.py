"""Evaluate a checkpoint on retrieval tasks: encode every corpus and query once, rank, report.

    python eval.py --task video_ret                             turtle world, the checkpoint of train.py
    python eval.py --data DIR --task all                        every task below DIR
    python eval.py --data DIR --task video_ret --mode single    one meta-task, the single-pass embedding
    python eval.py --data DIR --task image_ret/openmoji_t2i --steps 4 --json out.json
    python eval.py --index single                               latent queries, corpora embedded in one pass
    python eval.py --data MMEB-V2 --task video_ret --ckpt DIR   the real benchmark: see docs/mmeb_v2.md
    torchrun --nproc_per_node=8 eval.py --data ... as above     the same scores on 8 GPUs
    python -m tasks.check --data MMEB-V2                        what of the benchmark is there
    python -m tasks.compare a.json b.json                       two score files, task by task

A folder with rows/, image-tasks/, video-tasks/ or visdoc-tasks/ is a copy of MMEB-V2 (tasks/mmeb.py has its
78 tasks); in any other DIR/<meta-task>/<dataset>/ holds corpus.jsonl ({"_id", "text"?, "image"?, "video"?,
"start"?, "end"?}; seconds of a video file), queries.jsonl (the same keys, and perhaps "candidates": [ids], to
be ranked only against those) and qrels.tsv (query-id, corpus-id, score; a header line).  There queries and
corpora get the checkpoint's prompts `query` and `document`; other tasks have instructions of their own.

hit@k: share of queries with a relevant document among the first k.
ndcg@5: linear gains from the graded scores.
A tie counts against the model, so a constant embedding is never right by luck.
chance: expected hit@1 of a random ranking.
95%: interval of the task's own metric over 1,000 bootstrap samples of its queries.
"""

import engine.threads  # before torch

import datetime
import functools
import math
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.eval_flags import check_flags, check_model
from engine.flags import command, parse_flags
from engine.kept import Embedder, short_hash
from engine.ranks import rank_and_world, watch_peers
from files.errors import DataError, Interrupted
from files.writing import write_json
from hub.settings import RELEASED, warn_of_two_spaces
from latent import unit
from tasks.beir import AllBut
from tasks.check import require_tasks
from tasks.find import find_tasks, is_published, load_model, select
from tasks.mmeb_report import keep_score, ranked_hash, read_score, report_published

METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5")
TIE = 1e-6  # cosines closer than this are a tie: more than float32 rounding, less than means something


@dataclass
class Config:
    # what
    data: str = ""  # folder of the tasks; media paths are relative to it; default: turtle world
    moves: str = "8"  # moves in turtle world's programs, as in train.py
    rules: bool = False  # turtle world with rule books, as in train.py
    codes: bool = False  # turtle world of pages with code words, as in train.py
    task: str = "all"  # all, image, video, visdoc, a meta-task (video_ret) or data set (MSVD);
    #     several with commas between
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    # how
    mode: str = "latent"  # latent, single (one pass), cot (writes its rationale) or auto (as many steps as it
    #     takes; writes what they do not hold)
    index: str = ""  # the corpora's mode, where it is another: single, or latent with --mode single; made for
    #     checkpoints of train.py --w_cross
    done: float = 0.5  # in mode auto a row stops when <eot> has a probability above this
    steps: int = -1  # latent steps 0..32; -1: the checkpoint's own
    limit: int = 512  # tokens a rationale may have in modes cot and auto
    dim: int = 0  # rank by so many first components; made for checkpoints of train.py --matryoshka; 0: all
    batch_size: int = 32  # items encoded together; does not change the result
    protocol: str = "clean"  # clean, or released: as the released checkpoint was scored; see docs/mmeb_v2.md
    skip_bad: bool = False  # leave out what cannot be read, name it in the score file, and mark the score
    #     as partial
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast
    # report
    scores: str = ""  # folder for a JSON a task, tables, and the embeddings with which a stopped run goes on;
    #     for MMEB-V2: out/scores
    json: str = ""  # file that also gets the scores and, for every query, the rank of its answer and the
    #     first ten found


# ---- ranking
def candidate_scores(queries, corpus, candidates, elements=1 << 26):
    """Yields the scores of each query's candidates, and their corpus rows (None: all).

    queries (N, D), corpus (M, D) unit rows; candidates: corpus rows a query, AllBut one, or None for all.
    At most about `elements` scores are in memory.
    """
    block = max(1, elements // len(corpus))
    for begin in range(0, len(queries), block):
        scores = (queries[begin : begin + block] @ corpus.T).cpu().numpy()
        for row, among in zip(scores, candidates[begin : begin + block]):
            if isinstance(among, AllBut):
                row[among.row] = -math.inf
            if not isinstance(among, list):
                yield row, None
            else:
                among = list(dict.fromkeys(among))
                yield row[among], among


def rank_relevant(queries, corpus, relevant, candidates, elements=1 << 26):
    """Rank of every relevant document, ties counted against the model.

    relevant: a dict {corpus row: gain} a query; the others as for `candidate_scores`.
    -> a list of (gain, rank from 1) a query.
    """
    out = []
    for gains, (scores, rows) in zip(relevant, candidate_scores(queries, corpus, candidates, elements)):
        if rows is not None:  # ranked against its own list only
            gains = {place: gains[row] for place, row in enumerate(rows) if row in gains}
        out.append(ranks_of(scores, gains))
    return out


def first_found(queries, corpus, candidates, count):
    """-> for each query its first `count` candidates as (corpus row, score), best first."""
    out = []
    for scores, rows in candidate_scores(queries, corpus, candidates):
        best = torch.from_numpy(scores).topk(min(count, len(scores)))
        found = best.indices.tolist()
        if rows is not None:
            found = [rows[place] for place in found]
        found = zip(found, best.values.tolist())
        out.append([(row, score) for row, score in found if score > -math.inf])  # -inf: AllBut this one
    return out


def ranks_of(scores, gains):
    """One query: scores (M,) of its candidates, gains {place of a relevant one: gain} -> [(gain, rank)].

    In a tie all others go ahead of a relevant one, and of the relevant ones the lesser.
    """
    others, ranks = np.delete(scores, list(gains)), []
    for i, gain in gains.items():
        ahead = int((others >= scores[i] - TIE).sum())
        for j, other_gain in gains.items():
            gap = scores[j] - scores[i]
            tie_goes_first = gap >= -TIE and (other_gain, j) < (gain, i)
            if gap > TIE or tie_goes_first:
                ahead += 1
        ranks.append((gain, 1 + ahead))
    return ranks


# ---- metrics
def first_rank(ranks):
    return min(rank for _, rank in ranks)


def ndcg(ranks, k):
    """Linear gains: the sum of gain / log2(rank + 1) over the first k, as a share of the best order's.

    ranks: (gain, rank) of all relevant documents of a query.
    """
    best = sorted((gain for gain, _ in ranks), reverse=True)
    ideal = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(best[:k], 1))
    return sum(gain / math.log2(rank + 1) for gain, rank in ranks if rank <= k) / ideal


def evaluate(task, vectors):
    """Task and (query vectors, corpus vectors) -> scores as a dict."""
    ranks, per_query = per_query_scores(task, vectors)
    sizes = [len(task.corpus) if c is None else len(c) for c in task.candidates]
    scores = {metric: float(np.mean(values)) for metric, values in per_query.items()}
    n, chance = len(ranks), float(np.mean([len(r) / size for r, size in zip(ranks, sizes)]))
    return dict(
        scores, metric=task.metric, interval=interval(per_query[task.metric]),
        queries=n, candidates=float(np.mean(sizes)), chance=chance,
        at_chance=scores["hit@1"] <= chance + 2 * math.sqrt(chance * (1 - chance) / n),
        ranks=dict(zip(task.query_ids, map(first_rank, ranks))), **found_and_relevant(task, vectors))


def found_and_relevant(task, vectors, count=10):
    """The first `count` a query with scores, and what is right: {query id: {corpus id: score}}, as BEIR."""
    found, relevant, ids = {}, {}, task.corpus_ids
    for query, gains, first in zip(
            task.query_ids, task.relevant, first_found(*vectors, task.candidates, count)):
        found[query] = {ids[row]: round(score, 6) for row, score in first}
        relevant[query] = {ids[row]: gain for row, gain in gains.items()}
    return dict(found=found, relevant=relevant)


def per_query_scores(task, vectors):
    """Task and (query vectors, corpus vectors) -> ranks as of `rank_relevant`, {metric: (N,) of 0..1}."""
    if not all(v.isfinite().all() for v in vectors):
        raise DataError(f"{task.name}: the embeddings are not finite numbers; the checkpoint is broken")
    ranks = rank_relevant(*vectors, task.relevant, task.candidates)
    firsts = np.array([first_rank(r) for r in ranks])
    per_query = {f"hit@{k}": (firsts <= k).astype(float) for k in (1, 5, 10)}
    per_query["ndcg@5"] = np.array([ndcg(r, 5) for r in ranks])
    return ranks, per_query


def interval(values):
    """(N,) -> the 95% interval of their mean over 1,000 bootstrap samples."""
    n = len(values)
    draws = np.random.default_rng(0).integers(n, size=(1000, n))
    return np.quantile(values[draws].mean(1), (0.025, 0.975)).tolist()


# ---- report
def table(results):
    """{task: scores} -> lines for people."""
    wide = max(len("mean"), *(len(t) for t in results)) + 2
    heads = "".join(f"{m:>8}" for m in (*METRICS, "chance"))
    lines = [f"{'task':{wide}}{heads}{'queries':>9}{'candidates':>12}   95%"]
    for name, r in results.items():
        notes = [f"{r['metric']} {r['interval'][0]:.1%} - {r['interval'][1]:.1%}"]
        if r.get("version"):
            notes.append(r["version"])
        if r.get("not_judged"):
            notes.append(f"{r['not_judged']} queries are not judged")
        if r.get("bad"):
            notes.append(f"partial: {len(r['bad'])} problems")
        if r["at_chance"]:
            notes.append("hit@1 is at chance")
        if r.get("steps_do_nothing"):
            notes.append("not above K = 0")
        cells = "".join(f"{r[m]:8.1%}" for m in (*METRICS, "chance"))
        lines.append(f"{name:{wide}}{cells}{r['queries']:9d}{r['candidates']:12.0f}   " + "   ".join(notes))
    if len(results) > 1:
        means = [np.mean([r[m] for r in results.values()]) for m in (*METRICS, "chance")]
        lines.append(f"{'mean':{wide}}" + "".join(f"{mean:8.1%}" for mean in means))
    return "\n".join(lines)


# ---- scores of a task
def without_bad(task, queries, corpus):
    """Task and what the Embedder gave for both -> the same without what could not be read.

    A query goes, too, when all its right candidates, or all the others, are gone.
    """
    rows = [row for row, why in enumerate(corpus[1]) if why is None]
    place, bad, kept = {row: n for n, row in enumerate(rows)}, [*task.bad, *filter(None, corpus[1])], []
    relevant, candidates = [], []
    for i, why in enumerate(queries[1]):
        gains, among = task.relevant[i], task.candidates[i]
        gains = {place[row]: gain for row, gain in gains.items() if row in place}
        if isinstance(among, AllBut):
            among = AllBut(place[among.row], len(rows)) if among.row in place else None
        elif among is not None:
            among = [place[row] for row in among if row in place]
        if why is None and not gains:
            why = f"{task.queries[i].where}: no right candidate is left"
        elif why is None and isinstance(among, list) and len(among) < 2:
            why = f"{task.queries[i].where}: only the right candidate is left"
        if why is not None:
            bad.append(why)
            continue
        kept.append(i)
        relevant.append(gains)
        candidates.append(among)
    if not kept:
        raise DataError(f"{task.name}: no query is left; {len(bad)} problems, the first: {bad[0]}")
    task = replace(
        task, queries=[task.queries[i] for i in kept], query_ids=[task.query_ids[i] for i in kept],
        corpus=[task.corpus[row] for row in rows], corpus_ids=[task.corpus_ids[row] for row in rows],
        relevant=relevant, candidates=candidates, bad=bad)
    return task, (queries[0][kept], corpus[0][rows])


def evenly_spaced(n, count):
    """At most `count` of the numbers 0 .. n-1, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, count).round().astype(int)).tolist()


def keep_queries(task, rows):
    """The task with these of its queries."""
    some = {}
    for name in ("queries", "query_ids", "relevant", "candidates"):
        values = getattr(task, name)
        some[name] = [values[row] for row in rows]
    return replace(task, **some)


def steps_do_nothing(embedder, task, vectors, dim=0):
    """Whether the score is above that of K = 0 by no more than the 95% interval of the difference.

    A second evaluation would cost as much as the first.  So only queries are embedded again, with K = 0, at
    most 100 of a task, and ranked against the same candidates: turtle world takes 12.3 s and not 11.0 (2 CPU
    cores, 2026-11-26).
    """
    rows = evenly_spaced(len(task.queries), 100)
    task = keep_queries(task, rows)
    without = embedder.model.encode(
        task.queries, "latent", 0, embedder.batch_size, progress=f"{task.name} with K = 0", dim=dim or None)
    values = []
    for queries in (vectors[0][rows], torch.from_numpy(without)):
        _, per_query = per_query_scores(task, (queries, vectors[1]))
        values.append(per_query[task.metric])
    low, _ = interval(values[0] - values[1])
    return low <= 0


def score(embedder, tasks, folder="", took=None, check_steps=False, dim=0):
    """(name, function that makes the Task)s -> yields (name, scores), each as soon as it is known.

    folder: each is also written to folder/<name>_score.json.
    With skip_bad a task that cannot be made or has nothing left is dict(left_out=why).
    took: what the model alone takes for the queries is added to its "seconds", "tokens" and "queries".
    check_steps: whether the latent steps do nothing is looked at, too, if it is not known from before.
    dim: only so many first components count; 0: all.
    """
    index = embedder.index
    for name, make in tasks:
        begun, before = time.perf_counter(), embedder.encoded
        try:
            task = make()
            queries, asked = embedder(task.queries, f"{name} queries", took), embedder.encoded - before
            seconds, before = time.perf_counter() - begun, index.encoded
            corpus = index(task.corpus, f"{name} corpus")
            texts = texts_of(task)
            task, vectors = without_bad(task, queries, corpus)
            if dim:
                vectors = [unit(v[:, :dim]) for v in vectors]
        except DataError as e:
            if not embedder.skip_bad:
                raise
            yield name, dict(left_out=str(e))
            continue
        result = dict(
            evaluate(task, vectors), **task.about, **embedder.about, index=index.mode, bad=task.bad,
            partial=bool(task.bad), run_hash=embedder.run_hash,
            prompt_hash=short_hash(embedder.model.settings["prompt"], *texts),
            seconds=time.perf_counter() - begun, items_encoded=asked + index.encoded - before,
            queries_per_s=asked / seconds if asked else None,
            ranked_hash=ranked_hash(task, embedder, dim, __file__))
        old = read_score(os.path.join(folder, f"{name}_score.json")) if folder else {}
        same = all(old.get(key) == result[key] for key in ("run_hash", "ranked_hash"))
        if check_steps and same and "steps_do_nothing" in old:
            result["steps_do_nothing"] = old["steps_do_nothing"]
        elif check_steps:
            result["steps_do_nothing"] = steps_do_nothing(embedder, task, vectors, dim)
        if folder:
            keep_score(os.path.join(folder, f"{name}_score.json"), result, old if same else {})
        yield name, result


def texts_of(task):
    """All texts of a task, in order."""
    texts = []
    for side in (*task.queries, *task.corpus):
        texts += [value or "" for kind, value in side.parts if kind in ("text", "disc")]
    return texts


# ---- command
def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    process, world, local = rank_and_world()
    published, released = is_published(cfg.data), cfg.protocol == "released"
    check_flags(cfg, given, published)
    cfg.index = cfg.index or cfg.mode

    # tasks
    names, make = find_tasks(cfg.data, None, released, cfg.skip_bad, cfg.moves, cfg.rules, cfg.codes)
    names = select(names, cfg.task, cfg.data or "turtle world")
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))  # only embeddings travel
    peers_are_done = watch_peers()
    if published and process == 0:
        require_tasks(cfg.data, names, released, cfg.skip_bad)

    # model
    device, settings = cfg.device, {}
    if world > 1 and cfg.device in ("", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    if released:
        settings = {k: RELEASED[k] for k in ("latent_positions", "white_image", "prompt", "template")}
        settings["limits"] = RELEASED["limits"] | {"num_frames": 64}  # all frames that the readers give
    begun = time.time()
    model = load_model(cfg.ckpt, device, cfg.dtype, **settings)
    check_model(cfg, model)
    steps = None
    if cfg.mode == "latent":
        steps = model.settings["latent_steps"] if cfg.steps < 0 else cfg.steps

    # embeddings and scores
    root = cfg.scores or ("out/scores" if published else "")
    embedder = make_embedder(cfg, model, steps, root and os.path.join(root, "embeddings"))
    if process > 0:
        embedder.serve()
        peers_are_done()
        return dist.destroy_process_group()
    ours = "-".join(os.path.normpath(cfg.ckpt).split(os.sep)[-2:])
    data = os.path.realpath(cfg.data) if cfg.data else f"turtle {cfg.moves} {cfg.rules} {cfg.codes}"
    key = short_hash(embedder.run_hash, data, str(model.settings["prompts"]))[:6]
    folder = root and os.path.join(root, f"{ours}-{name_of_mode(cfg, steps)}-{key}")
    if not published:  # all are read before the first is encoded; those of MMEB-V2 have been looked at
        how = dict(moves=cfg.moves, rules=cfg.rules, codes=cfg.codes, prompts=model.settings["prompts"])
        _, make = find_tasks(cfg.data, model.processor, **how)  # drawn for this model, or with its prompts
        make = {name: make(name) for name in names}.get
    tasks = [(name, functools.partial(make, name)) for name in names]
    results, left_out = {}, {}
    try:
        for name, result in score(embedder, tasks, folder, check_steps=bool(steps), dim=cfg.dim):
            if "left_out" in result:
                left_out[name] = result
                message = f"left out: {result['left_out']}"
            else:
                results[name] = result
                message = f"{result['metric']} {result[result['metric']]:.1%}, {result['seconds']:.0f} s"
            if published:
                tqdm.write(f"{name}: {message}")
    except KeyboardInterrupt:
        message = f"interrupted after {len(results)} of {len(names)} tasks"
        if folder:
            message += f"; the embeddings so far are in {embedder.folder}, the same command goes on with them"
        raise Interrupted(message) from None
    if world > 1:
        embedder.give(None)
        peers_are_done()
        dist.destroy_process_group()

    # report
    mode = cfg.mode if steps is None else f"{cfg.mode}, {steps} latent steps"
    if cfg.index != cfg.mode:
        mode += f", corpora {cfg.index}"
    if cfg.dim:
        mode += f", the first {cfg.dim} components"
    print(f"{cfg.ckpt}, mode {mode}: {embedder.counts()}; {time.time() - begun:.0f} s")
    if not results:
        raise DataError(f"no task is left: {'; '.join(r['left_out'] for r in left_out.values())}")
    print(table(results))
    idle = sum(1 for r in results.values() if r.get("steps_do_nothing"))
    if idle:
        print(f"warning: the latent steps do nothing that shows in {idle} of {len(results)} tasks, K = 0 "
              "with at most 100 queries of each is within the interval: python -m tools.probe")
    if cfg.json:
        write_json(cfg.json, dict(ckpt=cfg.ckpt, mode=cfg.mode, steps=steps, index=cfg.index, dim=cfg.dim,
                                  data=cfg.data, tasks=results, left_out=left_out))
    if published:
        report_published(cfg.data, names, results, folder, ours, embedder)


def make_embedder(cfg, model, steps, folder):
    """That of queries; its `index` is that of corpora, another one where --index is another mode."""
    how = cfg.batch_size, cfg.limit, cfg.done, cfg.protocol, cfg.skip_bad, folder
    embedder = Embedder(model, cfg.mode, steps, *how)
    if cfg.index != cfg.mode:
        steps = model.settings["latent_steps"] if cfg.index == "latent" else None
        embedder.index_with(Embedder(model, cfg.index, steps, *how, embedder.about["checkpoint_hash"]))
        if embedder.rank == 0:
            warn_of_two_spaces(model.settings, cfg.mode, cfg.index)
    return embedder


def name_of_mode(cfg, steps):
    """In the name of the folder of scores: latent8, cot-released, latent8-single, latent8-dim64."""
    name = cfg.mode if steps is None else f"{cfg.mode}{steps}"
    if cfg.index != cfg.mode:
        name += f"-{cfg.index}"
    if cfg.protocol == "released":
        name += "-released"
    if cfg.dim:
        name += f"-dim{cfg.dim}"
    return name


if __name__ == "__main__":
    command(main)
