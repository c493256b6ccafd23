"""Evaluate a checkpoint on retrieval tasks: encode every corpus and query once, rank, report.

    python eval.py --task video_ret                             turtle world, the checkpoint of train.py
    python eval.py --data DIR --task all                        every task below DIR
    python eval.py --data DIR --task video_ret --mode single    one meta-task, the single-pass embedding
    python eval.py --data DIR --task image_ret/openmoji_t2i --steps 4 --json out.json
    python eval.py --data MMEB-V2 --task video_ret --ckpt DIR   the real benchmark: see docs/mmeb_v2.md
    python eval.py --data MMEB-V2 --check                       what of it is there; encodes nothing
    torchrun --nproc_per_node=8 eval.py --data ... as above     the same scores on 8 GPUs
    python eval.py --compare a.json b.json                      two score files, task by task

A folder with rows/, image-tasks/, video-tasks/ or visdoc-tasks/ is a copy of MMEB-V2 (tasks/mmeb.py has its
78 tasks); in any other DIR/<meta-task>/<dataset>/ holds corpus.jsonl ({"_id", "text"?, "image"?, "video"?,
"start"?, "end"?}; seconds of a video file), queries.jsonl (the same keys, and perhaps "candidates": [ids], to
be ranked only against those) and qrels.tsv (query-id, corpus-id, score; a header line).

hit@k: share of queries with a relevant document among the first k.
ndcg@5: linear gains from the graded scores.
A tie counts against the model, so a constant embedding is never right by luck.
chance: expected hit@1 of a random ranking.
95%: interval of the task's own metric over 1,000 bootstrap samples of its queries.
"""

import datetime
import functools
import glob
import hashlib
import json
import math
import os
import secrets
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import PIL
import torch
import torch.distributed as dist
import transformers
from PIL import Image
from tqdm import tqdm

from data import (
    QWEN2_VL, DataError, Part, command, frame_files, nearest, parse_flags, target_size, writing)
from model import MODES, RELEASED, Plume, unit
from tasks.beir import list_tasks, read_task
from tasks.mmeb import MMEB, modality, read_published
from tasks.mmeb_report import check, differences, leaderboard, paper_table
from tasks.turtle import moves_lost, world_tasks

HERE = os.path.dirname(os.path.abspath(__file__))
# What an embedding comes from: kept ones are used again only while all of these are the same
SOURCES = ("adapter.py", "latent.py", "data.py", "model.py",
           "tasks/beir.py", "tasks/mmeb.py", "tasks/turtle.py")
METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5")
TIE = 1e-6  # cosines closer than this are a tie: more than float32 rounding, less than means something


@dataclass
class Config:
    # what
    data: str = ""  # folder of the tasks; media paths are relative to it; default: turtle world
    moves: str = "8"  # of turtle world's programs,
    rules: bool = False  # whether they show a rule book, and
    codes: bool = False  # whether it is pages with code words, as in train.py
    task: str = "all"  # all, image, video, visdoc, a meta-task (video_ret) or data set (MSVD);
    #     several with commas between
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    # how
    mode: str = "latent"  # latent, single (one pass), cot (writes its rationale) or auto (as many steps as it
    #     takes; writes what they do not hold)
    done: float = 0.5  # in mode auto a row stops when <eot> has a probability above this
    compare: tuple = ()  # two JSON files of scores: their differences, and nothing else is done
    steps: int = -1  # latent steps 0..32; -1: the checkpoint's own
    limit: int = 512  # tokens a rationale may have in modes cot and auto
    dim: int = 0  # rank by so many first components; made for checkpoints of train.py --matryoshka; 0: all
    batch_size: int = 32  # items encoded together; does not change the result
    protocol: str = "clean"  # clean, or released: as the released checkpoint was scored; see docs/mmeb_v2.md
    check: bool = False  # only look whether rows, media and counts of the tasks are there
    skip_bad: bool = False  # leave out what cannot be read, name it in the score file, and mark the score
    #     as partial
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast
    # report
    scores: str = ""  # folder for a JSON a task, tables, and the embeddings with which a stopped run goes on;
    #     for MMEB-V2: out/scores
    json: str = ""  # also write the scores, and of every query rank and first ten with scores, to this file


def select(tasks, wanted, root):
    """--task -> the names it stands for, of tasks named "<meta-task>/<dataset>"."""
    means = {"all": tasks}  # what may be asked for -> tasks
    for name_of in (modality, meta_task, str, data_set):
        for task in tasks:
            means.setdefault(name_of(task), []).append(task)
    chosen = set()
    for name in wanted.split(","):
        if name not in means:
            raise DataError(f"--task {name!r}: no such task in {root!r}.{nearest(name, means)}")
        chosen.update(means[name])
    return [task for task in tasks if task in chosen]


def meta_task(name):
    return name.split("/")[0]


def data_set(name):
    return name.split("/")[1]


# --------------------------------------------------------------------------------------- ranking and metrics


def candidate_scores(queries, corpus, candidates, elements=1 << 26):
    """Yields the scores of each query's candidates, and their corpus rows (None: all).

    queries (N, D), corpus (M, D) unit rows; candidates: corpus rows a query, or None for all.
    At most about `elements` scores are in memory.
    """
    block = max(1, elements // len(corpus))
    for begin in range(0, len(queries), block):
        scores = (queries[begin : begin + block] @ corpus.T).cpu().numpy()
        for row, among in zip(scores, candidates[begin : begin + block]):
            if among is None:
                yield row, None
            else:
                among = list(dict.fromkeys(among))
                yield row[among], among


def rank(queries, corpus, relevant, candidates, elements=1 << 26):
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
        out.append(list(zip(found, best.values.tolist())))
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
        ranks=dict(zip(task.query_ids, map(first_rank, ranks))), **runs(task, vectors))


def runs(task, vectors, count=10):
    """The first `count` a query with scores, and what is right: {query id: {corpus id: score}}, as BEIR."""
    found, relevant, ids = {}, {}, task.corpus_ids
    for query, gains, first in zip(
            task.query_ids, task.relevant, first_found(*vectors, task.candidates, count)):
        found[query] = {ids[row]: round(score, 6) for row, score in first}
        relevant[query] = {ids[row]: gain for row, gain in gains.items()}
    return dict(found=found, relevant=relevant)


def per_query_scores(task, vectors):
    """Task and (query vectors, corpus vectors) -> ranks as `rank` gives them, {metric: (N,) of 0..1}."""
    if not all(v.isfinite().all() for v in vectors):
        raise DataError(f"{task.name}: the embeddings are not finite numbers; the checkpoint is broken")
    ranks = rank(*vectors, task.relevant, task.candidates)
    firsts = np.array([first_rank(r) for r in ranks])
    per_query = {f"hit@{k}": (firsts <= k).astype(float) for k in (1, 5, 10)}
    per_query["ndcg@5"] = np.array([ndcg(r, 5) for r in ranks])
    return ranks, per_query


def interval(values):
    """(N,) -> the 95% interval of their mean over 1,000 bootstrap samples."""
    n = len(values)
    draws = np.random.default_rng(0).integers(n, size=(1000, n))
    return np.quantile(values[draws].mean(1), (0.025, 0.975)).tolist()


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


# -------------------------------------------------------------------------------------------------- encoding


def short_hash(*texts):
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()


def fingerprint(model):
    """Hash of everything a checkpoint is: weights as they were loaded, configuration, settings, tokenizer."""
    config = model.backbone.config.to_dict()
    for name in ("plume", "transformers_version", "_name_or_path"):
        config.pop(name, None)
    h = hashlib.blake2b(digest_size=8)
    h.update(json.dumps([config, model.settings], sort_keys=True, default=str).encode())
    h.update(model.processor.backend.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


Weight = namedtuple("Weight", "key tokens patches")  # of an item: its hash, and what it costs to encode


class Embedder:
    """Embeds every item once, on all ranks; what a run before embedded comes from its files.

    An item is known by the hash of its texts and of the bytes of its media.  Batches are shared out by cost.
    What a batch holds depends on neither the number of ranks nor on what is known already, so neither changes
    a bit of the result, where a product has as many threads.
    folder: one file a process of records (16 bytes of hash, D float32), in a folder named after the hash of
    everything else an embedding depends on; "": nothing is kept.
    """

    def __init__(self, model, cfg, mode, steps, folder="", checkpoint_hash=None):
        self.model, self.cfg, self.how = model, cfg, (mode, steps)
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.width = model.lm.config.hidden_size
        self.record = np.dtype([("key", "V16"), ("vector", "<f4", (self.width,))])
        code = [Path(HERE, name).read_text(encoding="utf-8") for name in SOURCES]
        self.about = dict(
            checkpoint_hash=checkpoint_hash or fingerprint(model), code_hash=short_hash(*code), mode=mode,
            steps=steps, limit=cfg.limit if mode in ("cot", "auto") else None,
            done=cfg.done if mode == "auto" else None, protocol=cfg.protocol,
            dtype=str(model.lm.norm.weight.dtype), device=model.device.type, torch=torch.__version__,
            transformers=transformers.__version__, pillow=PIL.__version__, av=av.__version__)
        self.run_hash = short_hash(json.dumps(self.about, sort_keys=True))
        self.known, self.bad = {}, {}  # key -> vector, reason
        self.planned, self.hashed = set(), {}  # keys that were asked for; file -> what `hash` gives
        self.asked = self.encoded = 0
        self.folder, self.file = "", None
        if folder:
            self.folder = os.path.join(folder, self.run_hash)
            os.makedirs(self.folder, exist_ok=True)
            if self.rank == 0:
                self.read_kept()

    def read_kept(self):
        """What earlier runs have written.  A record that was cut off or damaged is none."""
        for path in sorted(glob.glob(os.path.join(glob.escape(self.folder), "*.bin"))):
            records = np.fromfile(path, self.record, os.path.getsize(path) // self.record.itemsize)
            whole = np.abs(np.linalg.norm(records["vector"], axis=1) - 1) < 1e-3
            for key, vector in records[whole]:
                self.known[key.tobytes()] = vector

    def keep(self, keys, vectors):
        """Appends records to this process's own file."""
        if not self.folder or not keys:
            return
        if self.file is None:  # with a name of its own, so that no other run's is written over
            self.file = open(os.path.join(self.folder, f"{self.rank}-{secrets.token_hex(4)}.bin"), "xb")
        records = np.empty(len(keys), self.record)
        records["key"], records["vector"] = np.frombuffer(b"".join(keys), "V16"), vectors
        self.file.write(records.tobytes())
        self.file.flush()

    def weigh(self, side):
        """-> Weight of a Side.  Reads all bytes of its media once, decodes none."""
        h, tokens, patches = hashlib.blake2b(digest_size=16), 0, 0
        for kind, value in side.parts:
            several = len(value) if isinstance(value, (list, tuple)) else ""
            h.update(f"{kind}\0{several}\0".encode())
            if kind in ("image", "video"):
                patches += self.weigh_medium(kind, value, h)
            else:
                text = value or ""
                tokens += len(self.model.processor.encode(text))
                h.update(f"{len(text)}\0{value}".encode())
        return Weight(h.digest(), tokens + patches // 4, patches)

    def weigh_medium(self, kind, value, h):
        """Adds the bytes of a picture or clip to the hash h -> its number of patches, about."""
        limits, facts = self.model.processor.limits, self.model.processor.backbone
        low, high = limits.video_min_pixels, limits.video_max_pixels
        if kind == "image":
            low, high = limits.min_pixels, limits.max_pixels
        sources = value if isinstance(value, (list, tuple)) else [value]
        if kind == "video" and isinstance(value, str) and os.path.isdir(value):
            sources = frame_files(value)
        area, count = high, limits.num_frames  # of a video file: only decoding would tell
        if isinstance(value, Part):
            sources = [value.video]
            h.update(f"{value.start} {value.end}".encode())
        for source in sources:
            digest, size = self.hash(source)
            h.update(digest)
            if size:
                count = min(len(sources), limits.num_frames)
                with suppress(DataError):  # a picture that cannot be used: the error comes when it is read
                    area = math.prod(target_size(*size, low, high, facts))
            elif kind == "image":
                h.update(str(source).encode())  # broken ones of equal bytes are told apart by their names
        return area // facts.patch**2 * ((count + 1) // 2)

    def hash(self, source):
        """-> hash of a picture's or video's bytes, and the size of a picture."""
        if isinstance(source, Image.Image):
            h = hashlib.blake2b(f"{source.mode} {source.size} {source.getpalette()}".encode(), digest_size=16)
            h.update(source.tobytes())
            return h.digest(), source.size
        if source not in self.hashed:
            h, size = hashlib.blake2b(digest_size=16), None
            # of a video, or of what cannot be read, which is an error when it is decoded
            with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                with open(source, "rb") as f:
                    while chunk := f.read(1 << 20):
                        h.update(chunk)
                with Image.open(source) as image:
                    size = image.size
            self.hashed[source] = h.digest(), size
        return self.hashed[source]

    def plan(self, sides, weights):
        """-> for each rank its (key, Side)s, batch behind batch, the longest items first; of equal cost."""
        new = {}
        for weight, side in zip(weights, sides):
            if weight.key not in self.planned:
                new.setdefault(weight.key, (weight, side))
        self.planned |= new.keys()
        items, size = sorted(new.values(), key=lambda item: -item[0].tokens), self.cfg.batch_size
        batches = [items[a : a + size] for a in range(0, len(items), size)]
        batches = [batch for batch in batches if any(w.key not in self.known for w, _ in batch)]

        visual, decoder = self.model.backbone.model.visual, self.model.lm.layers
        patch = parameters(visual) / parameters(decoder)  # its cost in tokens of the decoder
        cost = [len(b) * b[0][0].tokens + patch * sum(w.patches for w, _ in b) for b in batches]
        load, rank_of = [0.0] * self.world, [0] * len(batches)
        for n in np.argsort(cost)[::-1]:  # the dearest first, each to the rank with the least to do
            rank = rank_of[n] = load.index(min(load))
            load[rank] += cost[n]
        shares = [[] for _ in range(self.world)]
        for batch, rank in zip(batches, rank_of):
            shares[rank] += [(weight.key, side) for weight, side in batch]
        return shares

    def work(self, items, label=False, took=None):
        """This rank's (key, Side)s -> embeddings (n, D), NaN where one cannot be read, and {number: why}."""
        cfg, sides, bad = self.cfg, [side for _, side in items], {}
        windows = self.model.encoding(
            sides, *self.how, cfg.batch_size, label, cfg.limit, took, sort=False,
            bad=bad if cfg.skip_bad else None, done=cfg.done)
        out, begin = np.empty((len(items), self.width), np.float32), 0
        for vectors in windows:
            end = begin + len(vectors)
            out[begin:end] = vectors
            rows = [i for i in range(begin, end) if i not in bad]
            self.keep([items[i][0] for i in rows], out[rows])
            begin = end
        return out, bad

    def serve(self):
        """What the other ranks do: encode what rank 0 gives out, until there is nothing more."""
        while (items := self.give(None)) is not None:
            vectors, bad = self.work(items)
            if items:
                dist.send(torch.from_numpy(vectors), 0)
            dist.gather_object(bad, None, 0)
        dist.destroy_process_group()

    def give(self, shares):
        """Rank 0's shares, one for each rank -> this rank's.  None, given by rank 0, ends `serve`."""
        mine = [None]
        dist.scatter_object_list(mine, shares or [None] * self.world if self.rank == 0 else None, 0)
        return mine[0]

    def share_out(self, shares, label, took):
        """shares of all ranks -> what `work` makes of each."""
        if self.world == 1:
            return [self.work(shares[0], label, took)]
        found = [self.work(self.give(shares), f"{label}, rank 0 of {self.world}", took)]
        vectors = [np.empty((len(share), self.width), np.float32) for share in shares]
        for rank in range(1, self.world):
            if shares[rank]:
                dist.recv(torch.from_numpy(vectors[rank]), rank)
        bad = [None] * self.world
        dist.gather_object(found[0][1], bad, 0)
        return found + list(zip(vectors, bad))[1:]

    def __call__(self, sides, label, took=None):
        """Sides -> (N, D) unit embeddings on the CPU, NaN where one cannot be read; the reasons, or None."""
        with ThreadPoolExecutor(8) as pool:
            weighing = pool.map(self.weigh, sides)
            weights = list(tqdm(
                weighing, f"{label}: hashing", len(sides), unit="item", leave=False, disable=not label))
        shares = self.plan(sides, weights)
        encoded = sum(map(len, shares))
        self.asked, self.encoded = self.asked + len(sides), self.encoded + encoded
        if took is not None:
            took["queries"] += encoded
        if encoded:
            for share, (vectors, bad) in zip(shares, self.share_out(shares, label, took)):
                for (key, _), vector in zip(share, vectors):
                    self.known[key] = vector
                for i, why in bad.items():
                    self.bad[share[i][0]] = why
        reasons = []
        for weight, side in zip(weights, sides):
            why = self.bad.get(weight.key)
            if why and not why.startswith(side.where):
                why = f"{side.where}: the same as {why}"
            reasons.append(why)
        return torch.from_numpy(np.stack([self.known[weight.key] for weight in weights])), reasons


def parameters(module):
    return sum(p.numel() for p in module.parameters())


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
        if among is not None:
            among = [place[row] for row in among if row in place]
        if why is None and not gains:
            why = f"{task.queries[i].where}: no right candidate is left"
        elif why is None and among is not None and len(among) < 2:
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


def spread(n, count):
    """At most `count` of the numbers 0 .. n-1, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, count).round().astype(int)).tolist()


def only(task, rows):
    """The task with these of its queries."""
    some = {}
    for name in ("queries", "query_ids", "relevant", "candidates"):
        values = getattr(task, name)
        some[name] = [values[row] for row in rows]
    return replace(task, **some)


def steps_do_nothing(embedder, task, vectors):
    """Whether the score is above that of K = 0 by no more than the 95% interval of the difference.

    A second evaluation would cost as much as the first.  So only queries are embedded again, with K = 0, at
    most 100 of a task, and ranked against the same candidates: turtle world takes 12.3 s and not 11.0 (2 CPU
    cores, 2026-11-26).
    """
    rows = spread(len(task.queries), 100)
    task = only(task, rows)
    label, size = f"{task.name} with K = 0", embedder.cfg.batch_size
    dim = embedder.cfg.dim or None
    without = embedder.model.encode(task.queries, "latent", 0, size, progress=label, dim=dim)
    values = []
    for queries in (vectors[0][rows], torch.from_numpy(without)):
        _, per_query = per_query_scores(task, (queries, vectors[1]))
        values.append(per_query[task.metric])
    low, _ = interval(values[0] - values[1])
    return low <= 0


def score(embedder, tasks, folder="", took=None, check_steps=False):
    """(name, function that makes the Task)s -> yields (name, scores), each as soon as it is known.

    folder: each is also written to folder/<name>_score.json.
    With skip_bad a task that cannot be made or has nothing left is dict(left_out=why).
    took: what the model alone takes for the queries is added to its "seconds", "tokens" and "queries".
    check_steps: whether the latent steps do nothing is looked at, too, if it is not known from before.
    """
    for name, make in tasks:
        begun, before = time.perf_counter(), embedder.encoded
        try:
            task = make()
            queries, asked = embedder(task.queries, f"{name} queries", took), embedder.encoded - before
            seconds = time.perf_counter() - begun
            corpus = embedder(task.corpus, f"{name} corpus")
            texts = texts_of(task)
            task, vectors = without_bad(task, queries, corpus)
            if embedder.cfg.dim:
                vectors = [unit(v[:, : embedder.cfg.dim]) for v in vectors]
        except DataError as e:
            if not embedder.cfg.skip_bad:
                raise
            yield name, dict(left_out=str(e))
            continue
        result = dict(
            evaluate(task, vectors), **task.about, **embedder.about, bad=task.bad, partial=bool(task.bad),
            run_hash=embedder.run_hash, prompt_hash=short_hash(embedder.model.settings["prompt"], *texts),
            seconds=time.perf_counter() - begun, items_encoded=embedder.encoded - before,
            queries_per_s=asked / seconds if asked else None)
        old = read_score(os.path.join(folder, f"{name}_score.json")) if folder else {}
        same = all(old.get(key) == result[key] for key in ("run_hash", "prompt_hash"))
        if check_steps and same and "steps_do_nothing" in old:
            result["steps_do_nothing"] = old["steps_do_nothing"]
        elif check_steps:
            result["steps_do_nothing"] = steps_do_nothing(embedder, task, vectors)
        if folder:
            keep_score(os.path.join(folder, f"{name}_score.json"), result, old if same else {})
        yield name, result


def texts_of(task):
    """All texts of a task, in order."""
    texts = []
    for side in (*task.queries, *task.corpus):
        texts += [value or "" for kind, value in side.parts if kind in ("text", "disc")]
    return texts


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


# --------------------------------------------------------------------------------------------------- command


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def write_text(path, text):
    with writing(path) as f:
        f.write(text)


def writable(file):
    return not os.path.isdir(file) and os.path.isdir(os.path.dirname(os.path.abspath(file)))


def load(cfg, device="", **settings):
    """The model of --ckpt."""
    if not os.path.exists(cfg.ckpt) and cfg.ckpt == Config.ckpt:
        raise DataError(f"{cfg.ckpt}: no checkpoint there yet; train one with: python train.py, or name one "
                        "with --ckpt")
    return Plume.from_pretrained(cfg.ckpt, device or cfg.device or None, cfg.dtype or None, **settings)


def refuse(cfg, given, published, world):
    """Raises DataError for flags that make no sense."""
    if cfg.task == "speed":
        raise DataError("--task speed is a command of its own now: python -m tools.speed")
    if cfg.compare and (len(cfg.compare) != 2 or given != {"compare"}):
        raise DataError("--compare takes two JSON files of scores and no other flag; accuracy against "
                        "latency as a picture: python -m tools.compare --png compare.png")
    if cfg.mode not in MODES or not -1 <= cfg.steps <= 32 or (cfg.steps >= 0 and cfg.mode != "latent"):
        raise DataError(f"--mode {cfg.mode!r} --steps {cfg.steps}: mode is one of {MODES}, steps are 0..32 "
                        "and belong to mode latent")
    if cfg.protocol not in ("clean", "released"):
        raise DataError(f"--protocol {cfg.protocol!r}: needs clean or released")
    if cfg.batch_size < 1 or cfg.limit < 1 or not writable(cfg.json):
        raise DataError(f"--batch_size {cfg.batch_size} and --limit {cfg.limit} must be at least 1, --json "
                        f"{cfg.json!r} a file in a folder that exists")
    if world > 1 and cfg.check:
        raise DataError("--check runs as one process: python instead of torchrun")
    wrong = sorted(given & {"check", "protocol"})
    if wrong and not published:
        raise DataError(f"--{' --'.join(wrong)}: for MMEB-V2 only; --data {cfg.data!r} has no rows/, "
                        "image-tasks/, video-tasks/ or visdoc-tasks/")
    if cfg.data and given & {"moves", "rules", "codes"}:
        raise DataError("--moves, --rules and --codes are turtle world's: leave them out, or --data")
    if not 0 <= cfg.done <= 1 or ("done" in given and cfg.mode != "auto"):
        raise DataError(f"--done {cfg.done}: needs a probability, 0 .. 1, and --mode auto")
    if cfg.skip_bad and not published:
        raise DataError("--skip_bad: for MMEB-V2 only")


def is_published(root):
    """Whether a folder is a copy of MMEB-V2."""
    folders = ("rows", "image-tasks", "video-tasks", "visdoc-tasks")
    return bool(root) and any(os.path.isdir(os.path.join(root, folder)) for folder in folders)


def find_tasks(cfg, published, processor=None):
    """-> names of all tasks of --data, and a function: name -> its Task

    processor: the model's, for which turtle world draws its pictures; None: a Qwen2-VL's.
    """
    if published:
        def make(name):
            return read_published(cfg.data, data_set(name), cfg.protocol == "released", cfg.skip_bad)
        return [task.full_name for task in MMEB.values()], make
    if cfg.data:
        return list_tasks(cfg.data), functools.partial(read_task, cfg.data)
    turtle = world_tasks(processor.backbone if processor else QWEN2_VL, cfg.moves, cfg.rules, cfg.codes)
    if processor and moves_lost(processor, cfg.moves):
        warnings.warn(moves_lost(processor, cfg.moves))
    return list(turtle), turtle.get


def looked_at(cfg, names):
    """Looks what of the benchmark is there; --check prints it, otherwise what is wrong is an error."""
    lines, wrong = check(cfg.data, names, cfg.protocol == "released")
    if cfg.check:
        print(f"{lines}\n{len(names) - wrong} of {len(names)} tasks are there without a problem")
    elif wrong and not cfg.skip_bad:
        problems = "\n".join(line for line in lines.splitlines() if ", the first: " in line)
        raise DataError(f"{wrong} of {len(names)} tasks have problems; mend them, choose others with --task, "
                        f"or leave out what is bad with --skip_bad\n{problems}")
    return 1 if wrong else 0


def report_published(cfg, names, results, folder, ours, embedder):
    """The paper's table, of this run's tasks and of those on which the checkpoint was scored before."""
    everything, earlier = {}, 0
    for task in MMEB.values():
        name = task.full_name
        if name in names:
            continue
        old = read_score(os.path.join(folder, f"{name}_score.json"))
        if old.get("run_hash") == embedder.run_hash and old.get("data") == os.path.realpath(cfg.data):
            everything[name], earlier = old, earlier + 1
    everything |= results
    also = f" and {earlier} that were scored before with the same checkpoint and settings" if earlier else ""
    print(f"\n{len(results)} tasks of this command{also}")
    print(paper_table(everything, ours))
    write_json(os.path.join(folder, "leaderboard.json"), leaderboard(everything, ours, embedder.model))
    write_text(os.path.join(folder, "table.md"), paper_table(everything, ours, markdown=True) + "\n")
    print(f"scores: {folder}/<meta-task>/<data set>_score.json, {folder}/leaderboard.json, {folder}/table.md")


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    published = is_published(cfg.data)
    refuse(cfg, given, published, world)
    if cfg.compare:
        return print(differences(cfg.compare))

    # tasks
    names, make = find_tasks(cfg, published)
    names = select(names, cfg.task, cfg.data or "turtle world")
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))  # only embeddings travel
    first = world == 1 or dist.get_rank() == 0
    if published and first:
        status = looked_at(cfg, names)
        if cfg.check:
            return status

    # model
    device, settings = cfg.device, {}
    if world > 1 and cfg.device in ("", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    if cfg.protocol == "released":
        settings = {k: RELEASED[k] for k in ("latent_positions", "white_image", "prompt", "template")}
        settings["limits"] = RELEASED["limits"] | {"num_frames": 64}  # all frames that the readers give
    model, begun = load(cfg, device, **settings), time.time()
    model_type = model.backbone.config.model_type
    if cfg.protocol == "released" and model_type != "qwen2_vl":
        raise DataError(f"--protocol released is how a Qwen2-VL was scored; {cfg.ckpt} is a {model_type}")
    if not cfg.data:
        _, make = find_tasks(cfg, published, model.processor)
    width = model.lm.config.hidden_size
    if not 0 <= cfg.dim <= width:
        raise DataError(f"--dim {cfg.dim}: the checkpoint has {width} components; 0: all of them")
    steps = None
    if cfg.mode == "latent":
        steps = model.settings["latent_steps"] if cfg.steps < 0 else cfg.steps

    # embeddings and scores
    root = cfg.scores or ("out/scores" if published else "")
    embedder = Embedder(model, cfg, cfg.mode, steps, root and os.path.join(root, "embeddings"))
    if not first:
        return embedder.serve()
    ours = "-".join(os.path.normpath(cfg.ckpt).split(os.sep)[-2:])
    as_released = "-released" if cfg.protocol == "released" else ""
    cut = f"-dim{cfg.dim}" if cfg.dim else ""
    how = f"{cfg.mode}{'' if steps is None else steps}{as_released}{cut}"
    folder = root and os.path.join(root, f"{ours}-{how}-{embedder.run_hash[:6]}")
    if not published:  # all are read before the first is encoded; those of MMEB-V2 `check` has looked at
        make = {name: make(name) for name in names}.get
    tasks = [(name, functools.partial(make, name)) for name in names]
    results, left_out = {}, {}
    try:
        for name, result in score(embedder, tasks, folder, check_steps=bool(steps)):
            if "left_out" in result:
                left_out[name] = result
                said = f"left out: {result['left_out']}"
            else:
                results[name] = result
                said = f"{result['metric']} {result[result['metric']]:.1%}, {result['seconds']:.0f} s"
            if published:
                tqdm.write(f"{name}: {said}")
    except KeyboardInterrupt:
        message = f"interrupted after {len(results)} of {len(names)} tasks"
        if folder:
            message += f"; the embeddings so far are in {embedder.folder}, the same command goes on with them"
        raise DataError(message) from None
    if world > 1:
        embedder.give(None)
        dist.destroy_process_group()

    # report
    mode = cfg.mode if steps is None else f"{cfg.mode}, {steps} latent steps"
    if cfg.dim:
        mode += f", the first {cfg.dim} components"
    asked, encoded, different = embedder.asked, embedder.encoded, len(embedder.planned)
    print(f"{cfg.ckpt}, mode {mode}: {asked} items, {encoded} encoded, {different - encoded} known from "
          f"before, {asked - different} shared; {time.time() - begun:.0f} s")
    if not results:
        raise DataError(f"no task is left: {'; '.join(r['left_out'] for r in left_out.values())}")
    print(table(results))
    idle = sum(1 for r in results.values() if r.get("steps_do_nothing"))
    if idle:
        print(f"warning: the latent steps do nothing that shows in {idle} of {len(results)} tasks, K = 0 "
              "with at most 100 queries of each is within the interval: python -m tools.probe")
    if cfg.json:
        write_json(cfg.json, dict(ckpt=cfg.ckpt, mode=cfg.mode, steps=steps, dim=cfg.dim, data=cfg.data,
                                  tasks=results, left_out=left_out))
    if published:
        report_published(cfg, names, results, folder, ours, embedder)


if __name__ == "__main__":
    command(main)
