"""Evaluate a checkpoint on retrieval tasks: encode every corpus and query once, rank, report.

    python eval.py --task video_ret                               turtle world, the checkpoint that train.py wrote
    python eval.py --data DIR --task all                          every task below DIR
    python eval.py --data DIR --task video_ret --mode single      one meta-task, the single-pass embedding
    python eval.py --data DIR --task image_ret/openmoji_t2i --steps 4 --json out.json
    python eval.py --data MMEB-V2 --task video_ret --ckpt DIR     the real benchmark: see README, "MMEB-V2"
    python eval.py --data MMEB-V2 --check                         what of it is there; encodes nothing
    torchrun --nproc_per_node=8 eval.py --data ... as above       the same scores on 8 GPUs
    python eval.py --compare compare.png                          all modes and 0..K steps, accuracy against latency
    python eval.py --compare a.json b.json                        two score files, task by task
    python eval.py --task speed --preset mid --prefix 40,160      one pass, latent steps, written rationales: time, memory, floor

A folder with rows/, image-tasks/, video-tasks/ or visdoc-tasks/ is a copy of MMEB-V2 (data.MMEB has its 78 tasks); in any other
DIR/<meta-task>/<dataset>/ holds corpus.jsonl ({"_id", "text"?, "image"?, "video"?}), queries.jsonl (the same keys, and
perhaps "candidates": [ids], to be ranked only against those) and qrels.tsv (query-id, corpus-id, score; a header line).

hit@k: share of queries with a relevant document among the first k.  ndcg@5: linear gains from the graded scores.
A tie counts against the model, so a constant embedding is never right by luck.  chance: expected hit@1 of a random ranking.
95%: interval of the task's own metric over 1,000 bootstrap samples of its queries.
"""

import datetime
import functools
import glob
import hashlib
import inspect
import json
import math
import os
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import av
import numpy as np
import PIL
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import DynamicCache

from data import (META, MMEB, DataError, Side, World, collate, copies, download, frame_files, list_tasks, modality, nearest, parse_flags,
                  read_published, read_task, target_size, to_device, video_classes, world_tasks, writing)
from latent import Graphs, greedy
from model import MODES, RELEASED, SHAPES, LiveBytes, Plume, pick_device

TIE = 1e-6  # cosines closer than this are a tie: more than float32 rounding, less than any difference that means something


@dataclass
class Config:
    # what
    data: str = ""  # folder of the tasks; media paths are relative to it; default: turtle world
    task: str = "all"  # all, image, video, visdoc, a meta-task (video_ret) or data set (MSVD), several with commas between; or speed
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    # how
    mode: str = "latent"  # latent, single (one pass) or cot (writes its rationale)
    compare: tuple = ()  # one PNG: all modes, and latent with 0..K steps, drawn into it; two JSON files of scores: their differences
    steps: int = -1  # latent steps 0..32; -1: the checkpoint's own
    limit: int = 512  # tokens a rationale may have in mode cot
    batch_size: int = 32  # items encoded together; does not change the result
    protocol: str = "clean"  # clean, or released: as the released checkpoint was scored; see README, "MMEB-V2"
    check: bool = False  # only look whether rows, media and counts of the tasks are there
    skip_bad: bool = False  # leave out what cannot be read, name it in the score file, and mark the score as partial
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast
    # --task speed
    preset: str = ""  # random weights in this shape instead of --ckpt: tiny, mid, qwen2vl_2b
    batch_sizes: str = "1,8,32"  # queries a batch
    prefix: str = "160"  # tokens of a query of text, with commas between
    image: str = ""  # WIDTHxHEIGHT: a query is a picture instead
    frames: int = 0  # a query is a clip of so many frames of the size of --image
    tokens: int = 403  # of a written rationale; the paper's mean
    repeats: int = 5  # timed rounds; what takes over 5 s is timed twice
    training: bool = True  # also a training step
    growth: str = ""  # instead: draw into this PNG how cost grows with prefix, steps and batch
    # report
    scores: str = ""  # folder for a JSON a task, tables, and the embeddings with which a stopped run goes on; for MMEB-V2: out/scores
    json: str = ""  # also write the scores, and the rank of every query, to this file


def select(tasks, wanted, root):
    """--task -> the names it stands for."""
    means = {t: {"all", t, *t.split("/"), modality(t)} for t in tasks}
    known = dict.fromkeys(["all", *(modality(t) for t in tasks), *(t.split("/")[0] for t in tasks), *tasks, *(t.split("/")[1] for t in tasks)])
    for name in wanted.split(","):
        if name not in known:
            raise DataError(f"--task {name!r}: no such task in {root!r}.{nearest(name, known)}")
    return [t for t in tasks if means[t] & set(wanted.split(","))]


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
    single = {f"hit@{k}": [hit(r, k) for r in ranks] for k in (1, 5, 10)}
    single["ndcg@5"] = [ndcg(r, 5, g) for r, g in zip(ranks, gold)]
    scores = {metric: float(np.mean(values)) for metric, values in single.items()}
    draws = np.random.default_rng(0).integers(n, size=(1000, n))
    interval = np.quantile(np.array(single[task.metric], float)[draws].mean(1), (0.025, 0.975)).tolist()
    return dict(scores, metric=task.metric, interval=interval, queries=n, candidates=float(np.mean(sizes)), chance=chance,
                at_chance=scores["hit@1"] <= chance + 2 * math.sqrt(chance * (1 - chance) / n),
                ranks={q: min(r for _, r in ranks_) for q, ranks_ in zip(task.query_ids, ranks)})


METRICS = ("hit@1", "hit@5", "hit@10", "ndcg@5")


def table(results):
    wide = max(len("mean"), *(len(t) for t in results)) + 2
    lines = [f"{'task':{wide}}" + "".join(f"{m:>8}" for m in METRICS) + f"{'chance':>8}{'queries':>9}{'candidates':>12}   95%"]
    for name, r in results.items():
        notes = [f"{r['metric']} {r['interval'][0]:.1%} - {r['interval'][1]:.1%}", r.get("version"),
                 f"{r['not_judged']} queries are not judged" if r.get("not_judged") else "",
                 f"partial: {len(r['bad'])} problems" if r.get("bad") else "", "hit@1 is at chance" if r["at_chance"] else ""]
        lines.append(f"{name:{wide}}" + "".join(f"{r[m]:8.1%}" for m in METRICS) + f"{r['chance']:8.1%}{r['queries']:9d}{r['candidates']:12.0f}   "
                     + "   ".join(filter(None, notes)))
    if len(results) > 1:
        mean = {m: np.mean([r[m] for r in results.values()]) for m in (*METRICS, "chance")}
        lines.append(f"{'mean':{wide}}" + "".join(f"{mean[m]:8.1%}" for m in (*METRICS, "chance")))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ encoding


def short_hash(*texts):
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()


def fingerprint(model):
    """Hash of everything a checkpoint is: weights as they were loaded, configuration, settings, tokenizer."""
    config = {k: v for k, v in model.backbone.config.to_dict().items() if k not in ("plume", "transformers_version", "_name_or_path")}
    h = hashlib.blake2b(json.dumps([config, model.settings], sort_keys=True, default=str).encode() + model.processor.backend.to_str().encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


class Embedder:
    """Embeds every item once, on all ranks, batched and shared out by cost; what a run before embedded comes from its files.

    An item is known by the hash of its texts and of the bytes of its media.  What a batch holds depends on neither the number of
    ranks nor on what is known already, so neither changes a bit of the result, where a product has as many threads.
    folder: one file a process of records (16 bytes of hash, D float32), in a folder named after the hash of everything else an
    embedding depends on; "": nothing is kept.
    """

    def __init__(self, model, cfg, mode, steps, folder="", checkpoint_hash=None):
        self.model, self.cfg, self.how = model, cfg, (mode, steps)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.record = np.dtype([("key", "V16"), ("vector", "<f4", (model.lm.config.hidden_size,))])
        code = [inspect.getsource(sys.modules[name]) for name in ("adapter", "latent", "model", "data")]
        self.about = dict(checkpoint_hash=checkpoint_hash or fingerprint(model), code_hash=short_hash(*code), mode=mode, steps=steps,
                          limit=cfg.limit if mode == "cot" else None, protocol=cfg.protocol, dtype=str(model.lm.norm.weight.dtype),
                          device=model.device.type, torch=torch.__version__, transformers=transformers.__version__, pillow=PIL.__version__, av=av.__version__)
        self.run_hash = short_hash(json.dumps(self.about, sort_keys=True))
        self.folder, self.file, self.known, self.planned, self.bad, self.hashed = folder and os.path.join(folder, self.run_hash), None, {}, set(), {}, {}
        self.asked = self.encoded = 0
        if folder:
            os.makedirs(self.folder, exist_ok=True)
        kept = glob.glob(os.path.join(glob.escape(self.folder), "*.bin")) if folder and self.rank == 0 else []
        for path in sorted(kept):
            records = np.fromfile(path, self.record, os.path.getsize(path) // self.record.itemsize)  # one cut off at the end is no record
            whole = np.abs(np.linalg.norm(records["vector"], axis=1) - 1) < 1e-3
            self.known.update((key.tobytes(), vector) for key, vector in zip(records["key"][whole], records["vector"][whole]))

    def weigh(self, side):
        """-> key, tokens, patches of a Side.  Reads all bytes of its media once, decodes none."""
        processor, h, tokens, patches = self.model.processor, hashlib.blake2b(digest_size=16), 0, 0
        for kind, value in side.parts:
            h.update(f"{kind}\0{len(value) if isinstance(value, (list, tuple)) else ''}\0".encode())
            if kind not in ("image", "video"):
                tokens += len(processor.encode(value or ""))
                h.update(f"{len(value or '')}\0{value}".encode())
                continue
            limits = processor.limits
            low, high = (limits.min_pixels, limits.max_pixels) if kind == "image" else (limits.video_min_pixels, limits.video_max_pixels)
            sources = value if isinstance(value, (list, tuple)) else [value]
            if kind == "video" and isinstance(value, str) and os.path.isdir(value):
                sources = frame_files(value)
            area, count = high, limits.num_frames  # of a video file, which only decoding would tell
            for source in sources:
                digest, size = self.hash(source)
                h.update(digest)
                if kind == "image" and not size:
                    h.update(str(source).encode())  # broken ones of equal bytes are told apart by their names
                if size:
                    try:
                        area, count = math.prod(target_size(*size, low, high)), min(len(sources), limits.num_frames)
                    except DataError:
                        pass  # a picture that cannot be used: the error comes when it is read
            patches += area // 196 * ((count + 1) // 2)
        return h.digest(), tokens + patches // 4, patches

    def hash(self, source):
        """-> hash of a picture's or video's bytes, and the size of a picture."""
        if isinstance(source, Image.Image):
            return hashlib.blake2b(f"{source.mode} {source.size} {source.getpalette()}".encode() + source.tobytes(), digest_size=16).digest(), source.size
        if source not in self.hashed:
            h, size = hashlib.blake2b(digest_size=16), None
            try:
                with open(source, "rb") as f:
                    while chunk := f.read(1 << 20):
                        h.update(chunk)
                with Image.open(source) as image:
                    size = image.size
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                pass  # a video; or it cannot be read, which is an error when it is decoded
            self.hashed[source] = h.digest(), size
        return self.hashed[source]

    def plan(self, sides, weights):
        """-> for each rank its (key, Side)s, batch behind batch, the longest items first; ranks get equal cost, not equal rows."""
        new = {}
        for i, (key, _, _) in enumerate(weights):
            if key not in self.planned:
                new.setdefault(key, i)
        self.planned |= new.keys()
        order, size = sorted(new.values(), key=lambda i: (-weights[i][1], i)), self.cfg.batch_size
        batches = [order[a : a + size] for a in range(0, len(order), size)]
        batches = [b for b in batches if any(weights[i][0] not in self.known for i in b)]
        parameters = lambda module: sum(p.numel() for p in module.parameters())
        patch = parameters(self.model.backbone.model.visual) / parameters(self.model.lm.layers)  # in tokens of the decoder
        load, share = [0.0] * self.world, [[] for _ in range(self.world)]
        cost = [len(b) * weights[b[0]][1] + patch * sum(weights[i][2] for i in b) for b in batches]
        for n in sorted(range(len(batches)), key=lambda n: -cost[n]):
            rank = load.index(min(load))
            share[rank].append(n)
            load[rank] += cost[n]
        return [[(weights[i][0], sides[i]) for n in sorted(mine) for i in batches[n]] for mine in share]

    def work(self, items, label=False, took=None):
        """(key, Side)s -> their embeddings (n, D), NaN where one could not be read, and {its number: why}; kept in this process's file."""
        bad, out = {} if self.cfg.skip_bad else None, np.full((len(items), self.record["vector"].shape[0]), np.nan, np.float32)
        keys = [key for key, _ in items]
        sides, size = [side for _, side in items], self.cfg.batch_size
        begin = 0
        for vectors in self.model.encoding(sides, *self.how, size, label, self.cfg.limit, took, sort=False, bad=bad):
            out[begin : begin + len(vectors)] = vectors
            rows = [i for i in range(begin, begin + len(vectors)) if not bad or i not in bad]
            begin += len(vectors)
            if self.folder and rows:
                if self.file is None:  # a name of this process alone: no other run's file is written over
                    self.file = open(os.path.join(self.folder, f"{self.rank}-{secrets.token_hex(4)}.bin"), "xb")
                records = np.empty(len(rows), self.record)
                records["key"], records["vector"] = np.frombuffer(b"".join(keys[i] for i in rows), "V16"), out[rows]
                self.file.write(records.tobytes())
                self.file.flush()
        return out, bad or {}

    def serve(self):
        """What the other ranks do: encode what rank 0 gives out, until there is nothing more."""
        while (items := self.give(None)) is not None:
            vectors, bad = self.work(items)
            if items:
                dist.send(torch.from_numpy(vectors), 0)
            dist.gather_object(bad, None, 0)
        dist.destroy_process_group()

    def give(self, shares):
        """Rank 0's shares -> this rank's.  None ends `serve`."""
        if self.world == 1:
            return shares and shares[0]
        mine = [None]
        dist.scatter_object_list(mine, shares or [None] * self.world if self.rank == 0 else None, 0)
        return mine[0]

    def __call__(self, sides, label, took=None):
        """Sides -> (N, D) unit embeddings on the CPU; rows that could not be read are NaN, and stand with the reason in `bad`."""
        with ThreadPoolExecutor(8) as pool:
            weights = list(tqdm(pool.map(self.weigh, sides), f"{label}: hashing", len(sides), unit="item", leave=False))
        shares = self.plan(sides, weights)
        self.asked += len(sides)
        self.encoded += sum(map(len, shares))
        if took is not None:
            took["queries"] += sum(map(len, shares))
        if any(shares):
            found = [self.work(self.give(shares), label + f", rank 0 of {self.world}" * (self.world > 1), took)]
            if self.world > 1:
                others = [torch.empty(len(share), self.record["vector"].shape[0]) for share in shares[1:]]
                for rank, vectors in enumerate(others, 1):
                    if len(vectors):
                        dist.recv(vectors, rank)
                bads = [None] * self.world
                dist.gather_object(found[0][1], bads, 0)
                found += [(vectors.numpy(), bad) for vectors, bad in zip(others, bads[1:])]
            for share, (vectors, bad) in zip(shares, found):
                self.known.update((key, vector) for (key, _), vector in zip(share, vectors))
                self.bad.update((share[i][0], why) for i, why in bad.items())
        reasons = [self.bad.get(key) for key, _, _ in weights]
        reasons = [why if why is None or why.startswith(side.where) else f"{side.where}: the same as {why}" for why, side in zip(reasons, sides)]
        return torch.from_numpy(np.stack([self.known[key] for key, _, _ in weights])), reasons


def without_bad(task, queries, corpus):
    """Task and what the Embedder gave for both -> the same without what could not be read, and without queries that lost all right candidates."""
    place = {row: n for n, row in enumerate(row for row, why in enumerate(corpus[1]) if why is None)}
    bad, kept = [*task.bad, *filter(None, corpus[1])], []
    relevant = [{place[row]: gain for row, gain in gains.items() if row in place} for gains in task.relevant]
    candidates = [c and [place[row] for row in c if row in place] for c in task.candidates]
    for i, (why, gains) in enumerate(zip(queries[1], relevant)):
        if why is None and gains and (candidates[i] is None or len(candidates[i]) > 1):
            kept.append(i)
        else:
            bad.append(why or f"{task.queries[i].where}: {'no right' if not gains else 'only the right'} candidate is left")
    if not kept:
        raise DataError(f"{task.name}: no query is left; {len(bad)} problems, the first: {bad[0]}")
    pick = lambda values: [values[i] for i in kept]
    task = replace(task, queries=pick(task.queries), corpus=[s for s, why in zip(task.corpus, corpus[1]) if why is None], relevant=pick(relevant),
                   candidates=pick(candidates), query_ids=pick(task.query_ids), bad=bad)
    return task, (queries[0][kept], corpus[0][list(place)])


def score(embedder, tasks, folder="", took=None):
    """(name, function that makes the Task)s -> yields (name, scores); each is also written to folder/<name>_score.json as soon as it is known.

    With skip_bad a task that cannot be made or has nothing left is dict(left_out=why).
    took: what the model alone takes for the queries is added to its "seconds", "tokens" and "queries".
    """
    for name, make in tasks:
        begun, before = time.perf_counter(), embedder.encoded
        try:
            task = make()
            queries, asked = embedder(task.queries, f"{name} queries", took), embedder.encoded - before
            seconds = time.perf_counter() - begun
            corpus = embedder(task.corpus, f"{name} corpus")
            words = [value or "" for side in (*task.queries, *task.corpus) for kind, value in side.parts if kind in ("text", "disc")]
            task, vectors = without_bad(task, queries, corpus)
        except DataError as e:
            if not embedder.cfg.skip_bad:
                raise
            yield name, dict(left_out=str(e))
            continue
        result = dict(evaluate(task, vectors), **task.about, **embedder.about, bad=task.bad, partial=bool(task.bad), run_hash=embedder.run_hash,
                       prompt_hash=short_hash(embedder.model.settings["prompt"], *words), seconds=time.perf_counter() - begun,
                       items_encoded=embedder.encoded - before, queries_per_s=asked / seconds if asked else None)
        if folder:
            path = os.path.join(folder, f"{name}_score.json")
            old = read_score(path)
            if not result["items_encoded"] and (old.get("run_hash"), old.get("prompt_hash")) == (result["run_hash"], result["prompt_hash"]):
                result |= {k: old[k] for k in ("seconds", "items_encoded", "queries_per_s")}  # all was known: the times of the run that encoded it
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_json(path, result)
        yield name, result


def read_score(path):
    """A score file of an earlier run; {} when there is none, or not a whole one."""
    try:
        with open(path) as f:
            value = json.load(f)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------------------------- MMEB-V2

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


# --------------------------------------------------------------------------------------------------------------- speed


def speed_batch(model, cfg, prefix, size):
    """`size` equal queries: text of exactly `prefix` tokens, or a picture or clip of noise."""
    width, height = map(int, cfg.image.split("x")) if cfg.image else (224, 224)
    noise = np.random.default_rng(0).integers(0, 256, (max(cfg.frames, 1), height, width, 3), np.uint8)
    media = [Image.fromarray(frame) for frame in noise]
    if cfg.frames or cfg.image:
        item = Side([("video", media) if cfg.frames else ("image", media[0]), ("text", " forward")])
    else:
        item = lambda words: Side([("text", " forward" * words)])
        bare = len(model.processor.render(item(0))["ids"])
        if prefix <= bare:
            raise DataError(f"--prefix {prefix}: this checkpoint's prompt alone has {bare} tokens")
        item = item(prefix - bare)
    samples = [model.processor.render(item)] * size
    return dict(to_device(collate(samples, model.processor), model.device), samples=samples)


def as_transformers(model, batch):
    """A batch of equally long queries, with pictures or with clips, as the inputs of transformers' own model."""
    kinds = (batch["ids"] == model.processor.id["<|image_pad|>"]).int() + 2 * (batch["ids"] == model.processor.id["<|video_pad|>"]).int()
    inputs = dict(input_ids=batch["ids"], attention_mask=torch.ones_like(batch["ids"]))
    if batch["pixels"] is not None:
        pixels, grid = ("pixel_values_videos", "video_grid_thw") if (kinds == 2).any() else ("pixel_values", "image_grid_thw")
        inputs |= {pixels: batch["pixels"], grid: batch["grid"].to(model.device), "mm_token_type_ids": kinds}
    return inputs


def one_by_one(model, batch, steps):
    """The latent embedding of a batch of one query through transformers' modules and cache: how it can be done without latent.py."""
    inner, lm = model.backbone.model, model.lm
    pos = int(batch["positions"].max()) + 1 if model.settings["latent_positions"] == "mrope" else batch["ids"].shape[1]
    inner.rope_deltas = None
    cache = DynamicCache(config=lm.config)
    inputs = dict(as_transformers(model, batch), position_ids=batch["positions"])
    h = inner(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[0]
    run = lambda x, start: lm(inputs_embeds=x, past_key_values=cache, use_cache=True, position_ids=torch.arange(
        start, start + x.shape[1], device=x.device).expand(3, 1, -1)).last_hidden_state[0]
    anchor, z = h[batch["disc"]], h[-1:]
    for k in range(steps):
        z = run(model.adapter(z, k, anchor)[0][:, None], pos + k)
    return torch.nn.functional.normalize(run(lm.embed_tokens(batch["suffix"]), pos + steps)[batch["gen"]].float(), dim=-1)


def replayed(model, batch, graphs):
    """The latent embedding with K = 8, what comes behind the prefix as one graph."""
    model.graphs = graphs
    try:
        return model.embed(batch, "latent", 8)
    finally:
        model.graphs = None


def speed_methods(model, batch, cfg):
    """{name: (function, decoder passes behind the prefill)}"""
    gen, head = model.processor.id["<gen_emb>"], model.backbone.lm_head
    rows = [to_device(collate([sample], model.processor), model.device) for sample in batch["samples"]]
    at = torch.tensor([gen], device=model.device)
    endless = lambda h: head(h).index_fill(-1, at, -math.inf)  # never ends early
    methods = {"single": (lambda: model.embed(batch, "single"), 0)}
    methods |= {f"latent, K = {k}": (lambda k=k: model.embed(batch, "latent", k), max(1, k)) for k in (0, 4, 6, 8)}
    if model.device.type == "cuda":
        methods["latent graph, K = 8"] = (functools.partial(replayed, model, batch, Graphs()), 8)
    methods["one by one, K = 8"] = (lambda: [one_by_one(model, row, 8) for row in rows], 9)
    methods[f"cot, {cfg.tokens} tokens"] = (lambda: greedy(
        model.lm, model.lm.embed_tokens, endless, model.prefix(batch), gen, cfg.tokens), cfg.tokens)
    methods["cot, transformers"] = (lambda: model.backbone.generate(
        **as_transformers(model, batch), max_new_tokens=cfg.tokens, min_new_tokens=cfg.tokens, do_sample=False), cfg.tokens - 1)
    return methods


def clock(function, device):
    """Seconds of one call."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    begun = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begun


def peak_bytes(function, device):
    """The most memory that one call takes, beside what is there before: by CUDA's allocator, or all tensors alive."""
    if device.type != "cuda":
        with LiveBytes() as live:
            function()
        return live.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def rounds(functions, repeats, device):
    """{name: seconds of each call}, the functions by turns, so that all of them meet the same noise."""
    times = {name: [] for name in functions}
    for i in tqdm(range(repeats), desc="timed rounds", leave=False):
        for name, function in functions.items():
            if i < 2 or times[name][0] < 5:
                times[name].append(clock(function, device))
    return times


def peak_rates(device, dtype):
    """What the device gives now: FLOP a second in a large matrix product, bytes a second read by a large sum."""
    n, size = (8192, 1 << 33) if device.type == "cuda" else (1536, 1 << 28)
    a, long = torch.randn(n, n, device=device, dtype=dtype), torch.zeros(size // 4, device=device)
    times = rounds({"mm": lambda: a @ a, "sum": long.sum}, 6, device)
    return 2 * n**3 / min(times["mm"]), size / min(times["sum"])


# the attention kernel that torch's counter does not know: two products of q's rows with all keys
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *a, **kw: 4 * math.prod(q) * k[-2]}


@torch.no_grad()
def measure_speed(model, batch, cfg, rates):
    """-> rows of the speed table for one batch: every method's time, work and memory, and the least time that work takes."""
    methods, device, size, work = speed_methods(model, batch, cfg), model.device, len(batch["ids"]), {}
    for name, (function, _) in methods.items():  # also the warm-up
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
            peak = peak_bytes(function, device)
        if name.startswith("latent graph"):
            peak = peak_bytes(function, device)  # the second call records, and takes the places that stay
        work[name] = flops.get_total_flops(), peak
    times = rounds({name: function for name, (function, _) in methods.items()}, cfg.repeats, device)
    middle = {name: float(np.median(t)) for name, t in times.items()}
    # bytes that must be read: in every pass the decoder's weights and the keys and values so far, once the vision tower's
    size_of = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    lm, vision = model.lm, size_of(model.backbone.model.visual) if batch["pixels"] is not None else 0
    weights, key = size_of(lm.layers), lm.layers[0].self_attn.k_proj.out_features * lm.norm.weight.element_size()
    column = 2 * key * len(lm.layers)  # of one token's keys and values
    rows, (single, _) = [], work["single"]
    for name, (_, passes) in methods.items():
        t, (flops, peak) = middle[name], work[name]
        again = size if name.startswith("one by one") else 1  # each query reads all weights by itself
        adapted = int(name.split()[-1]) if name.startswith(("latent", "one")) else 0
        cache = column * (batch["ids"].numel() + size * passes / 2) / again
        each = weights + cache + size_of(lm.embed_tokens) * name.startswith("cot")
        steps = (each * passes + size_of(model.adapter) * adapted) * again
        floor = max(single / rates[0], (weights + vision) * again / rates[1]) + max((flops - single) / rates[0], steps / rates[1])
        row = dict(method=name, batch=size, prefix=batch["ids"].shape[1], queries_per_s=size / t, gflop=flops / 1e9 / size,
                   ms=1e3 * t / size, low=1e3 * min(times[name]) / size, high=1e3 * max(times[name]) / size,
                   to_single=t / middle["single"], cot_to_this=middle[f"cot, {cfg.tokens} tokens"] / t,
                   transformers_cot_to_this=middle["cot, transformers"] / t, gbytes=((weights + vision) * again + steps) / 1e9,
                   floor=t / floor, peak_mib=peak / 2**20)
        if name.startswith("latent, K"):
            suffix = (middle["latent, K = 0"] - middle["single"]) / t
            row["shares"] = [middle["single"] / t, 1 - middle["single"] / t - suffix, suffix]
        rows.append(row)
    return rows


COLUMNS = (  # title, width, format, key
    ("ms/query", 10, ".2f", "ms"), ("lowest", 9, ".2f", "low"), ("highest", 9, ".2f", "high"), ("queries/s", 11, ".1f", "queries_per_s"),
    ("x single", 10, ".2f", "to_single"), ("cot/this", 10, ".1f", "cot_to_this"), ("transformers cot/this", 23, ".1f", "transformers_cot_to_this"),
    ("GFLOP/query", 13, ".2f", "gflop"), ("GB/batch", 10, ".2f", "gbytes"), ("x floor", 9, ".1f", "floor"), ("peak MiB", 10, ".0f", "peak_mib"))


def speed_table(rows):
    lines = [f"{'method':20}" + "".join(f"{title:>{width}}" for title, width, _, _ in COLUMNS) + "   prefill  steps  suffix"]
    for r in rows:
        shares = "  ".join(f"{x:6.0%}" for x in r.get("shares", ()))
        lines.append((f"{r['method']:20}" + "".join(f"{r[key]:{width}{form}}" for _, width, form, key in COLUMNS) + f"   {shares}").rstrip())
    return "\n".join(lines)


def training_step(model, batch, cfg):
    """Queries a second of forward, backward and AdamW with K = 8, as we do it and one query at a time -> a row."""
    rows = [to_device(collate([sample], model.processor), model.device) for sample in batch["samples"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(embed):
        vectors = embed()
        (10 * vectors @ vectors.T).logsumexp(-1).mean().backward()  # every vector depends on all, as in a contrastive loss
        optimizer.step()
        optimizer.zero_grad()

    ways = {"ours": lambda: step(lambda: model(batch, 8)["gen"]),
            "one by one": lambda: step(lambda: torch.cat([one_by_one(model, row, 8) for row in rows]))}
    for way in ways.values():
        way()
    rate = {name: len(rows) / float(np.median(t)) for name, t in rounds(ways, min(cfg.repeats, 3), model.device).items()}
    print(f"a training step: {rate['ours']:.1f} queries/s, one by one {rate['one by one']:.1f}: {rate['ours'] / rate['one by one']:.1f} times faster")
    return dict(method="training", batch=len(rows), prefix=batch["ids"].shape[1], ours=rate["ours"], one_by_one=rate["one by one"])


def speed(cfg, given):
    if "ckpt" in given and "preset" in given or cfg.preset not in ("", *SHAPES):
        raise DataError(f"--preset {cfg.preset!r}: one of {', '.join(SHAPES)}, and without --ckpt")
    try:
        sizes, prefixes = ([int(n) for n in text.split(",")] for text in (cfg.batch_sizes, cfg.prefix))
        side = [int(n) for n in cfg.image.split("x")] if cfg.image else [224, 224]
        if min(*sizes, *prefixes, *side, cfg.repeats, cfg.tokens) < 1 or len(side) != 2 or cfg.frames < 0:
            raise ValueError
    except ValueError:
        raise DataError(f"--batch_sizes {cfg.batch_sizes!r}, --prefix {cfg.prefix!r}: needs numbers with commas between; --image {cfg.image!r}: as 448x448; "
                        f"--repeats {cfg.repeats}, --tokens {cfg.tokens}: at least 1; --frames {cfg.frames}: at least 0") from None
    if "ckpt" in given:
        model = Plume.from_pretrained(cfg.ckpt, cfg.device or None, cfg.dtype or None)
    else:
        device, dtype = pick_device(cfg.device or None, cfg.dtype or None)
        shape = cfg.preset or "tiny"
        texts = [*World("test").texts(), *[SHAPES[shape]["prompt"]] * 20]  # so that the prompt has tokens of whole words
        model = Plume.random(texts, shape, device=device).to(dtype)
    limits = model.processor.limits
    limits.max_pixels = limits.video_max_pixels = max(limits.max_pixels, side[0] * side[1])
    limits.num_frames, limits.max_len = max(cfg.frames, limits.num_frames), 1 << 20
    model.eval()
    dtype = model.lm.norm.weight.dtype
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device)
    result = dict(date=time.strftime("%Y-%m-%d"), device=device, dtype=str(dtype), threads=torch.get_num_threads(), torch=torch.__version__,
                  model=cfg.ckpt if "ckpt" in given else f"random weights, {shape}", image=cfg.image, frames=cfg.frames, rows=[])
    save = lambda: write_json(cfg.json, result) if cfg.json else None
    print(f"{result['model']}, {result['device']}, {dtype}, {result['threads']} threads", end="")
    if cfg.growth:
        print()
        with torch.no_grad():
            result["rows"] = growth(model, cfg)
        return save()
    rates = peak_rates(model.device, dtype)
    result |= dict(flops=rates[0], bytes_per_s=rates[1])
    print(f"; it gives {rates[0] / 1e12:.2f} TFLOP/s and {rates[1] / 1e9:.0f} GB/s")
    for prefix in [0] if cfg.image or cfg.frames else prefixes:
        for size in sizes:
            batch = speed_batch(model, cfg, prefix, size)
            rows = measure_speed(model, batch, cfg, rates)
            patches = 0 if batch["pixels"] is None else len(batch["pixels"]) // size
            print(f"\n{size} equal queries a batch, prefix of {batch['ids'].shape[1]} tokens, {patches} patches", speed_table(rows), sep="\n")
            if cfg.training:
                rows.append(training_step(model, batch, cfg))
            result["rows"] += rows
            save()  # after every batch: what is measured is kept


GROWTH = dict(prefix=(64, 128, 256, 512, 1024, 2048), K=(0, 2, 4, 8, 16, 32), batch=(1, 2, 4, 8, 16, 32, 64))  # one grows, the others stay
STAYS = dict(prefix=256, K=8, batch=4)


def growth(model, cfg):
    """Time and memory of the latent embedding of a batch of text, as prefix, latent steps and batch grow -> rows; drawn into --growth."""
    rows, device = [], model.device
    for what, values in GROWTH.items():
        for value in tqdm(values, desc=what, leave=False):
            now = dict(STAYS, **{what: value})
            batch = speed_batch(model, cfg, now["prefix"], now["batch"])
            run = lambda: model.embed(batch, "latent", now["K"])
            peak = peak_bytes(run, device)
            seconds = rounds({what: run}, cfg.repeats, device)[what]
            middle = float(np.median(seconds))
            rows.append(row := dict(now, grows=what, ms=1e3 * middle, queries_per_s=now["batch"] / middle, peak_mib=peak / 2**20))
            print(f"{what:7}{value:6}{row['ms']:12.1f} ms a batch{row['queries_per_s']:10.1f} queries/s{row['peak_mib']:10.0f} MiB at most")
    W, H, top, bottom, font = 420, 420, 60, 60, ImageFont.load_default(16)
    image = Image.new("RGB", (W * len(GROWTH), H), "white")
    draw = ImageDraw.Draw(image)
    for panel, what in enumerate(GROWTH):
        mine, left = [r for r in rows if r["grows"] == what], panel * W + 30
        draw.rectangle((left, top, left + W - 60, H - bottom), outline="#bbbbbb")
        fixed = ", ".join(f"{k} {v}" for k, v in STAYS.items() if k != what)
        draw.text((left, 12), f"{what} 0 to {mine[-1][what]}\n{fixed}", fill="black", font=font)
        for key, unit, colour, at in (("ms", "ms a batch", "#1f77b4", 0), ("peak_mib", "MiB at most", "#d62728", 1)):
            most = max(r[key] for r in mine)
            points = [(left + r[what] / mine[-1][what] * (W - 60), H - bottom - r[key] / most * (H - top - bottom)) for r in mine]
            draw.line(points, fill=colour, width=2)
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            draw.text((left, H - 48 + 20 * at), f"0 to {most:,.0f} {unit}", fill=colour, font=font)
    with writing(cfg.growth, "wb") as f:
        image.save(f, "PNG")
    return rows


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def write_text(path, text):
    with writing(path) as f:
        f.write(text)


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    if cfg.mode not in MODES or not -1 <= cfg.steps <= 32 or (cfg.steps >= 0 and cfg.mode != "latent"):
        raise DataError(f"--mode {cfg.mode!r} --steps {cfg.steps}: mode is one of {MODES}, steps are 0..32 and belong to mode latent")
    two_files = len(cfg.compare) == 2
    if len(cfg.compare) > 2 or two_files and (given != {"compare"} or any(f.lower().endswith(".png") for f in cfg.compare)):
        raise DataError("--compare takes one PNG to draw, or two JSON files of scores and no other flag")
    if two_files:
        return print(differences(cfg.compare))
    if cfg.compare and not cfg.compare[0].lower().endswith(".png"):
        raise DataError(f"--compare {cfg.compare[0]}: one file is a picture to draw and must end in .png; name two JSON files to compare their scores")
    if cfg.compare and given & {"mode", "steps", "scores", "check", "skip_bad"}:
        raise DataError("--compare runs every mode: leave out --mode, --steps, --scores, --check and --skip_bad")
    if cfg.protocol not in ("clean", "released"):
        raise DataError(f"--protocol {cfg.protocol!r}: needs clean or released")
    writable = lambda f: not os.path.isdir(f) and os.path.isdir(os.path.dirname(os.path.abspath(f)))
    if cfg.batch_size < 1 or cfg.limit < 1 or not all(map(writable, (cfg.json, cfg.growth, *cfg.compare))):
        raise DataError(f"--batch_size {cfg.batch_size} and --limit {cfg.limit} must be at least 1, --json {cfg.json!r}, --compare {' '.join(cfg.compare)!r} "
                        f"and --growth {cfg.growth!r} files in folders that exist")
    of_speed = {"preset", "batch_sizes", "prefix", "image", "frames", "tokens", "repeats", "training", "growth"}
    of_scores = {"data", "mode", "compare", "steps", "limit", "batch_size", "protocol", "check", "skip_bad", "scores"}
    if wrong := given & (of_scores if cfg.task == "speed" else of_speed):
        raise DataError(f"--{' --'.join(sorted(wrong))}: {'not with' if cfg.task == 'speed' else 'only with'} --task speed")
    if cfg.growth and (wrong := given & {"batch_sizes", "prefix", "image", "frames", "tokens", "training"}):
        raise DataError(f"--{' --'.join(sorted(wrong))}: not with --growth, which has its own")
    world, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and (cfg.task == "speed" or cfg.compare or cfg.check):
        raise DataError("--task speed, --compare and --check run as one process: python instead of torchrun")
    if cfg.task == "speed":
        return speed(cfg, given)

    published = any(os.path.isdir(os.path.join(cfg.data, d)) for d in ("rows", "image-tasks", "video-tasks", "visdoc-tasks")) if cfg.data else False
    if not published and (wrong := given & {"check", "protocol"}):
        raise DataError(f"--{' --'.join(sorted(wrong))}: for MMEB-V2 only; --data {cfg.data!r} has no rows/, image-tasks/, video-tasks/ or visdoc-tasks/")
    if not published and cfg.skip_bad:
        raise DataError("--skip_bad: for MMEB-V2 only")
    turtle = {} if cfg.data else world_tasks()
    names = [t.full_name for t in MMEB.values()] if published else list_tasks(cfg.data) if cfg.data else list(turtle)
    names = select(names, cfg.task, cfg.data or "turtle world")
    released = cfg.protocol == "released"
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))  # only tasks and embeddings travel
    first = world == 1 or dist.get_rank() == 0
    if published and first:
        lines, wrong = check(cfg.data, names, released)
        if cfg.check:
            print(f"{lines}\n{len(names) - wrong} of {len(names)} tasks are there without a problem")
            return 1 if wrong else None
        if wrong and not cfg.skip_bad:
            problems = "\n".join(line for line in lines.splitlines() if ", the first: " in line)
            raise DataError(f"{wrong} of {len(names)} tasks have problems; mend them, choose others with --task, or leave out what is bad with "
                            f"--skip_bad\n{problems}")
    if not os.path.exists(cfg.ckpt) and cfg.ckpt == Config.ckpt:
        raise DataError(f"{cfg.ckpt}: no checkpoint there yet; train one with: python train.py, or name one with --ckpt")
    device = f"cuda:{local}" if world > 1 and cfg.device in ("", "cuda") and torch.cuda.is_available() else cfg.device
    as_released = {}
    if released:
        as_released = {k: RELEASED[k] for k in ("latent_positions", "white_image", "prompt", "template")}
        as_released["limits"] = RELEASED["limits"] | {"num_frames": 64}  # all frames that the readers give
    model, begun = Plume.from_pretrained(cfg.ckpt, device or None, cfg.dtype or None, **as_released), time.time()
    if published:
        make = lambda name: read_published(cfg.data, name.split("/")[1], released, cfg.skip_bad)
    else:
        make = lambda name: turtle[name] if turtle else read_task(cfg.data, name)
    if cfg.compare:
        tasks = [make(name) for name in names]
        rows = compare(model, tasks, cfg)
        print(f"{cfg.ckpt}: every mode, {model.device}, batches of {cfg.batch_size}, {time.time() - begun:.0f} s; tokens: decoded per query; "
              "ms/query: the model alone")
        print(compare_table(rows, tasks))
        draw_comparison(rows, cfg.compare[0], f"mean of {len(tasks)} tasks")
        print(f"accuracy against latency: {cfg.compare[0]}")
        if cfg.json:
            write_json(cfg.json, dict(ckpt=cfg.ckpt, data=cfg.data, batch_size=cfg.batch_size, device=str(model.device), rows=rows))
        return
    steps = None if cfg.mode != "latent" else model.settings["latent_steps"] if cfg.steps < 0 else cfg.steps
    root, ours = cfg.scores or ("out/scores" if published else ""), "-".join(os.path.normpath(cfg.ckpt).split(os.sep)[-2:])
    embedder = Embedder(model, cfg, cfg.mode, steps, root and os.path.join(root, "embeddings"))
    folder = root and os.path.join(root, f"{ours}-{cfg.mode}{'' if steps is None else steps}{'-released' * released}-{embedder.run_hash[:6]}")
    if not first:
        return embedder.serve()
    results, left_out = {}, {}
    try:
        tasks = [(name, functools.partial(make, name)) for name in names]
        if not published:  # all are read before the first is encoded; those of MMEB-V2 `check` has looked at
            tasks = [(name, lambda task=read(): task) for name, read in tasks]
        for name, result in score(embedder, tasks, folder):
            (left_out if "left_out" in result else results)[name] = result
            if published:
                tqdm.write(f"{name}: " + (f"left out: {result['left_out']}" if "left_out" in result else
                                          f"{result['metric']} {result[result['metric']]:.1%}, {result['seconds']:.0f} s"))
    except KeyboardInterrupt:
        kept = f"; the embeddings so far are in {embedder.folder}, the same command goes on with them" if folder else ""
        raise DataError(f"interrupted after {len(results)} of {len(names)} tasks{kept}") from None
    if world > 1:
        embedder.give(None)
        dist.destroy_process_group()
    how = cfg.mode if steps is None else f"{cfg.mode}, {steps} latent steps"
    print(f"{cfg.ckpt}, mode {how}: {embedder.asked} items, {embedder.encoded} encoded, {len(embedder.planned) - embedder.encoded} known from before, "
          f"{embedder.asked - len(embedder.planned)} shared; {time.time() - begun:.0f} s")
    if not results:
        raise DataError(f"no task is left: {'; '.join(r['left_out'] for r in left_out.values())}")
    print(table(results))
    if cfg.json:
        write_json(cfg.json, dict(ckpt=cfg.ckpt, mode=cfg.mode, steps=steps, data=cfg.data, tasks=results, left_out=left_out))
    if published:
        earlier = {t.full_name: read_score(os.path.join(folder, f"{t.full_name}_score.json")) for t in MMEB.values() if t.full_name not in names}
        earlier = {name: r for name, r in earlier.items() if r.get("run_hash") == embedder.run_hash and r.get("data") == os.path.realpath(cfg.data)}
        everything = earlier | results
        print(f"\n{len(results)} tasks of this command" + f" and {len(earlier)} that were scored before with the same checkpoint and settings" * bool(earlier))
        print(paper_table(everything, ours))
        write_json(os.path.join(folder, "leaderboard.json"), leaderboard(everything, ours, model))
        write_text(os.path.join(folder, "table.md"), paper_table(everything, ours, markdown=True) + "\n")
        print(f"scores: {folder}/<meta-task>/<data set>_score.json, {folder}/leaderboard.json, {folder}/table.md")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (DataError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
