"""Evaluate a checkpoint on retrieval tasks: encode every corpus and query once, rank, report.

    python eval.py --task video_ret                               turtle world, the checkpoint that train.py wrote
    python eval.py --data DIR --task all                          every task below DIR
    python eval.py --data DIR --task video_ret --mode single      one meta-task, the single-pass embedding
    python eval.py --data DIR --task image_ret/openmoji_t2i --steps 4 --json out.json
    python eval.py --data MMEB-V2 --task video_ret --ckpt DIR     the real benchmark: see docs/mmeb_v2.md
    python eval.py --data MMEB-V2 --check                         what of it is there; encodes nothing
    torchrun --nproc_per_node=8 eval.py --data ... as above       the same scores on 8 GPUs
    python eval.py --compare a.json b.json                        two score files, task by task

A folder with rows/, image-tasks/, video-tasks/ or visdoc-tasks/ is a copy of MMEB-V2 (tasks/mmeb.py has its 78 tasks); in any other
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
import json
import math
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
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

from data import DataError, command, frame_files, nearest, parse_flags, target_size, writing
from model import MODES, RELEASED, Plume
from tasks.beir import list_tasks, read_task
from tasks.mmeb import MMEB, modality, read_published
from tasks.mmeb_report import check, differences, leaderboard, paper_table
from tasks.turtle import world_tasks

HERE = os.path.dirname(os.path.abspath(__file__))
# what an embedding comes from: kept ones are used again only while all of these are the same
SOURCES = ("adapter.py", "curriculum.py", "latent.py", "data.py", "model.py", "tasks/beir.py", "tasks/mmeb.py", "tasks/turtle.py")
TIE = 1e-6  # cosines closer than this are a tie: more than float32 rounding, less than any difference that means something


@dataclass
class Config:
    # what
    data: str = ""  # folder of the tasks; media paths are relative to it; default: turtle world
    task: str = "all"  # all, image, video, visdoc, a meta-task (video_ret) or data set (MSVD), several with commas between
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    # how
    mode: str = "latent"  # latent, single (one pass) or cot (writes its rationale)
    compare: tuple = ()  # two JSON files of scores: their differences, and nothing else is done
    steps: int = -1  # latent steps 0..32; -1: the checkpoint's own
    limit: int = 512  # tokens a rationale may have in mode cot
    batch_size: int = 32  # items encoded together; does not change the result
    protocol: str = "clean"  # clean, or released: as the released checkpoint was scored; see docs/mmeb_v2.md
    check: bool = False  # only look whether rows, media and counts of the tasks are there
    skip_bad: bool = False  # leave out what cannot be read, name it in the score file, and mark the score as partial
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast
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
        code = [Path(HERE, name).read_text(encoding="utf-8") for name in SOURCES]
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


# -------------------------------------------------------------------------------------------------------------- command

def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def write_text(path, text):
    with writing(path) as f:
        f.write(text)


def load(cfg, device="", **settings):
    """The model of --ckpt."""
    if not os.path.exists(cfg.ckpt) and cfg.ckpt == Config.ckpt:
        raise DataError(f"{cfg.ckpt}: no checkpoint there yet; train one with: python train.py, or name one with --ckpt")
    return Plume.from_pretrained(cfg.ckpt, device or cfg.device or None, cfg.dtype or None, **settings)


def writable(file):
    return not os.path.isdir(file) and os.path.isdir(os.path.dirname(os.path.abspath(file)))


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    if cfg.task == "speed":
        raise DataError("--task speed is a command of its own now: python -m tools.speed")
    if cfg.mode not in MODES or not -1 <= cfg.steps <= 32 or (cfg.steps >= 0 and cfg.mode != "latent"):
        raise DataError(f"--mode {cfg.mode!r} --steps {cfg.steps}: mode is one of {MODES}, steps are 0..32 and belong to mode latent")
    if cfg.compare:
        if len(cfg.compare) != 2 or given != {"compare"}:
            raise DataError("--compare takes two JSON files of scores and no other flag; accuracy against latency as a "
                            "picture: python -m tools.compare --png compare.png")
        return print(differences(cfg.compare))
    if cfg.protocol not in ("clean", "released"):
        raise DataError(f"--protocol {cfg.protocol!r}: needs clean or released")
    if cfg.batch_size < 1 or cfg.limit < 1 or not writable(cfg.json):
        raise DataError(f"--batch_size {cfg.batch_size} and --limit {cfg.limit} must be at least 1, --json {cfg.json!r} a "
                        "file in a folder that exists")
    world, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and cfg.check:
        raise DataError("--check runs as one process: python instead of torchrun")

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
    device = f"cuda:{local}" if world > 1 and cfg.device in ("", "cuda") and torch.cuda.is_available() else cfg.device
    as_released = {}
    if released:
        as_released = {k: RELEASED[k] for k in ("latent_positions", "white_image", "prompt", "template")}
        as_released["limits"] = RELEASED["limits"] | {"num_frames": 64}  # all frames that the readers give
    model, begun = load(cfg, device, **as_released), time.time()
    if published:
        make = lambda name: read_published(cfg.data, name.split("/")[1], released, cfg.skip_bad)
    else:
        make = lambda name: turtle[name] if turtle else read_task(cfg.data, name)
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
    command(main)
