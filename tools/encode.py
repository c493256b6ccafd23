"""Items to vectors, on any number of machines: a folder of parts that only has to be shared.

    python -m tools.encode corpus.jsonl OUT                       {"_id"?, "text"?, "image"?, "video"?} a line
    python -m tools.encode pages.parquet OUT --type float16       the same keys as columns
    python -m tools.encode FOLDER OUT                             pictures, clips, pages of PDF files
    python -m tools.encode corpus.jsonl OUT --shard 3 --of 64     the fourth of any scheduler's 64 jobs
    torchrun --nproc_per_node 8 -m tools.encode corpus.jsonl OUT  a shard a GPU

The same command again goes on with the parts that are missing, whatever ended the run before.
tools/encode_parts.py says what is in the folder, docs/scale.md how others open it.
"""

import engine.threads  # before torch

import itertools
import os
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from engine.flags import command, parse_words
from engine.kept import fingerprint
from engine.lock import lock_file
from engine.ranks import rank_and_world
from engine.stream import check_mode, encoding
from files.errors import DataError, Interrupted, nearest, quote
from files.items import Side
from files.writing import write_json
from hub.folders import LOCK
from hub.prompts import template_of, with_prompt
from tasks.find import load_model
from tools.encode_input import count_records, open_source
from tools.encode_parts import (
    MANIFEST, narrowed, part_folder, read_json, read_manifest, TYPES, whole_parts, write_part)
from tools.search_index import printable

GOES_ON = "the parts that are there stay, the same command goes on with the rest"
LOOKED_AT = 20  # records at the beginning: when none of them can be used, it is not what the user meant


@dataclass
class Config:
    # input
    media: str = ""  # folder to which the paths of media are relative; default: that of the input file
    # output
    type: str = "float32"  # of the vectors; float16 takes half of it, int8 a quarter
    dim: int = 0  # only so many first components; 0: all
    part_size: int = 4096  # records in a part: what a killed run loses at most
    # which part of the work
    shard: int = -1  # this process's number, 0 .. N - 1; default: torchrun's RANK, or 0
    of: int = 0  # N, the number of processes; default: torchrun's WORLD_SIZE, or 1
    # how
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    prompt: str = "document"  # the checkpoint's prompt around each item, by its name; '': none
    mode: str = "latent"  # latent, single, cot or auto
    steps: int = -1  # latent steps; default: the checkpoint's
    batch_size: int = 16  # items embedded together; does not change the result
    workers: int = 4  # threads that read and decode
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


class Row(NamedTuple):
    record: int  # number of the record, from 0 on
    id: str
    vector: np.ndarray  # (dim,)
    why: str  # it could not be read; ""


def check_flags(cfg, given):
    if ("shard" in given) != ("of" in given):
        raise DataError("--shard and --of belong together")
    if "of" not in given:
        cfg.shard, cfg.of, _ = rank_and_world()
    if not 0 <= cfg.shard < cfg.of:
        raise DataError(f"--shard {cfg.shard} --of {cfg.of}: shards are numbered from 0 to N - 1")
    if cfg.type not in TYPES:
        raise DataError(f"--type {cfg.type!r}: needs one of {', '.join(TYPES)}.{nearest(cfg.type, TYPES)}")
    if min(cfg.part_size, cfg.batch_size, cfg.workers) < 1 or cfg.dim < 0:
        raise DataError(f"--part_size {cfg.part_size}, --batch_size {cfg.batch_size} and --workers "
                        f"{cfg.workers} must be at least 1, --dim {cfg.dim} at least 0")
    try:
        check_mode(cfg.mode, cfg.steps if "steps" in given else None)
    except ValueError as e:
        raise DataError(f"--{e}") from e


def facts_of_run(model, cfg, source):
    """What all parts of a folder have in common: the manifest without its sizes."""
    width, steps = model.lm.config.hidden_size, None
    if cfg.dim > width:
        raise DataError(f"--dim {cfg.dim}: this model has {width} components")
    if cfg.mode == "latent":
        steps = model.settings["latent_steps"] if cfg.steps < 0 else cfg.steps
    dtype = str(model.lm.norm.weight.dtype).removeprefix("torch.")
    template = template_of(model.settings["prompts"], cfg.prompt or None)
    return dict(
        checkpoint=fingerprint(model), prompt=template, mode=cfg.mode, steps=steps, dim=cfg.dim or width,
        type=cfg.type, dtype=dtype, part_size=cfg.part_size, input=source.digest())


def write_or_compare_manifest(out, about, source, area):
    """-> the manifest.  The first process looks through the input and writes it, others wait for it.

    DataError where the folder holds vectors with other facts, and for input that cannot be meant.
    """
    with open(os.path.join(out, LOCK), "a+") as f:
        lock_file(f, out, say_who_is_waited_for)
        if not os.path.exists(os.path.join(out, MANIFEST)):
            items = source.items(lambda number: number < LOOKED_AT, area)
            first = [side for _, _, side in itertools.islice(items, LOOKED_AT)]
            if not first:
                raise DataError(f"{source.path}: no item in it")
            if all(isinstance(side, DataError) for side in first):
                raise DataError(f"none of the first {len(first)} items can be used; {first[0]}")
            count = count_records(source)
            sizes = dict(items=count, parts=-(-count // about["part_size"]))
            write_json(os.path.join(out, MANIFEST), about | sizes)
        manifest = read_manifest(out)
    other = [f"{name} {quote(manifest.get(name))}, now {quote(value)}" for name, value in about.items()
             if manifest.get(name) != value]
    if other:
        raise DataError(f"{out} holds vectors with {'; '.join(other)}: choose another folder, or delete it")
    return manifest


def say_who_is_waited_for(who):
    print(f"{who} looks through the input: waiting for its {MANIFEST}", flush=True)


def embedded(model, items, cfg, manifest):
    """Items of a source -> Rows in the same order."""
    ahead, bad = deque(), {}

    def sides():
        for number, name, side in items:
            ahead.append((number, name, str(side) if isinstance(side, DataError) else ""))
            if isinstance(side, Side):
                side = with_prompt(side, manifest["prompt"])
            yield side  # `encoding` puts into `bad` what is no Side

    windows = encoding(
        model, sides(), cfg.mode, manifest["steps"], cfg.batch_size, workers=cfg.workers, bad=bad,
        dim=manifest["dim"], unfit=bad)  # one item must not hold a million others up
    row = 0
    with closing(windows):
        for vectors in windows:
            for vector in vectors:
                number, name, why = ahead.popleft()
                unread = bad.pop(row, "")
                row += 1
                yield Row(number, name, vector, why or unread)


def encode_parts(out, rows, manifest, bar):
    """Writes the parts that the rows are of, each when it is complete -> number of records."""
    records, last = 0, -1
    for part, rows_of_part in itertools.groupby(rows, lambda row: row.record // manifest["part_size"]):
        ids, vectors, bad = [], [np.empty((0, manifest["dim"]), np.float32)], []
        for row in rows_of_part:
            if row.record > last:  # a PDF file has several rows
                records, last = records + 1, row.record
                bar.update()
            if row.why:
                bad.append(dict(_id=row.id, why=row.why))
            else:
                ids.append(row.id)
                vectors.append(row.vector[None])
        write_part(out, part, ids, narrowed(np.concatenate(vectors), manifest["type"]), bad)
    return records


def report(out, manifest):
    """What is in the folder by now, in lines."""
    parts, bad, vectors = whole_parts(out), [], 0
    for part in parts:
        vectors += len(read_json(os.path.join(part_folder(out, part), "ids.json")))
        bad += read_json(os.path.join(part_folder(out, part), "bad.json"))
    yield f"{out}: {len(parts)} of {manifest['parts']} parts are there, with {vectors:,} vectors"
    if bad:
        yield f"{len(bad):,} items could not be read, see bad.json in the parts; the first:"
        yield from (f"  {item['_id']}: {item['why']}" for item in bad[:3])
    left = [name for name in os.listdir(out) if name.endswith(".writing")]
    if left and len(parts) == manifest["parts"]:
        yield f"{len(left)} that killed runs left behind may be deleted: {os.path.join(out, '*.writing')}"


def main(argv):
    cfg, given, words = parse_words(Config, argv, __doc__)
    if len(words) != 2:
        raise DataError(f"needs the input and the folder of the vectors; got {words}")
    path, out = words
    check_flags(cfg, given)
    source = open_source(path, cfg.media, out)
    device, local = cfg.device, rank_and_world()[2]
    if local and device in ("", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    model = load_model(cfg.ckpt, device, cfg.dtype)
    area, about = model.processor.limits.max_pixels, facts_of_run(model, cfg, source)
    os.makedirs(out, exist_ok=True)
    manifest = write_or_compare_manifest(out, about, source, area)

    mine, size = set(range(cfg.shard, manifest["parts"], cfg.of)), cfg.part_size
    todo = mine - set(whole_parts(out))
    count = sum(min(size, manifest["items"] - size * part) for part in todo)
    print(f"shard {cfg.shard} of {cfg.of}: {len(mine)} of {manifest['parts']} parts, "
          f"{len(mine) - len(todo)} of them are there; {count:,} records to encode", flush=True)
    begun = time.perf_counter()
    items = source.items(lambda number: number // size in todo, area) if todo else ()
    rows = embedded(model, items, cfg, manifest)
    try:
        with closing(rows), tqdm(total=count, desc="encode", unit="record", disable=not count) as bar:
            records = encode_parts(out, rows, manifest, bar)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {GOES_ON}") from None
    except OSError as e:
        raise DataError(f"{e}; {GOES_ON}") from e
    if records != count:
        raise DataError(f"{path}: was changed while it was read: {records:,} records instead of {count:,}; "
                        f"delete {out}, and encode again")
    took = time.perf_counter() - begun
    if count:
        print(f"{count:,} records in {took:.1f} s, {count / took:,.1f} a second")
    for line in report(out, manifest):
        print(printable(line))


if __name__ == "__main__":
    command(main)
