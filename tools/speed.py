"""Speed: one pass, latent steps, written rationales: time, memory, and the least time that the work takes.

    python -m tools.speed                                    random weights in the tiny shape
    python -m tools.speed --preset mid --prefix 40,160       in another one, for queries of two lengths
    python -m tools.speed --preset mid --prefix 100-1600     each query of a batch of another length
    python -m tools.speed --ckpt out/checkpoint              a checkpoint
    python -m tools.speed --preset mid --growth growth.png   how cost grows with prefix, steps and batch

A table for each batch size and each length, a line for each way to embed the same queries:

    single                one pass: the hidden state at <disc_emb>; "transformers": its own forward
    latent, K = 8         prefill, 8 latent steps, suffix; "graph": the same replayed as a CUDA graph
    one by one, K = 8     the same without latent.py: each query alone through transformers' modules and cache
    cot, 403 tokens       a written rationale by latent.greedy; "transformers": by generate

    ms/query, lowest, highest   median, least and most of the timed rounds, divided by the batch
    x single                    time against one pass
    cot/this                    time of a written rationale against this line's, by greedy and by generate
    GFLOP/query                 as torch's FlopCounterMode counts: a multiplication and an addition are two
    GB/batch                    weights, keys and values that have to be read
    x floor                     time against what the counted work takes at the rates in the first line
    peak MiB                    the most memory that one call takes beside the model
    prefill  steps  suffix      shares of the time

Behind it the kernels of one latent step: about what a GPU has to start.  --growth needs matplotlib.
"""

import engine.threads  # before torch

import functools
import itertools
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from backbones.shapes import SHAPES
from engine.flags import command, parse_flags, whole_numbers
from engine.ranks import pick_device
from files.errors import DataError
from files.writing import writable, write_json
from hub.settings import RELEASED_PROMPT
from hub.weights import align_weights
from model import Plume
from tasks.turtle import World
from tools.counts import count_work, kernels_of_a_step, peak_bytes, peak_rates, rounds
from tools.plots import check_output, new_figure, save_figure
from tools.speed_methods import (
    batches_of_one, bytes_to_read, GENERATED, GRAPH, one_by_one, speed_batch, speed_methods)

GROWTH = dict(  # one grows, the others stay
    prefix=(64, 128, 256, 512, 1024, 2048), K=(0, 2, 4, 8, 16, 32), batch=(1, 2, 4, 8, 16, 32, 64))
STAYS = dict(prefix=256, K=8, batch=4)
AXES = dict(prefix="tokens of the prefix", K="latent steps K", batch="queries in a batch")


@dataclass
class Config:
    # model
    ckpt: str = ""  # checkpoint folder or hub name; default: random weights
    preset: str = "tiny"  # shape of the random weights: tiny, mid, qwen2vl_2b
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast
    # queries
    batch_sizes: str = "1,8,32"  # queries in a batch, with commas between; fewer if memory is short
    prefix: str = "160"  # tokens of a query of text, with commas between; 100-1600: of each another length
    image: str = ""  # WIDTHxHEIGHT in pixels: a query is a picture instead
    frames: int = 0  # a query is a clip of so many frames, of the size of --image or 224x224
    # what is timed
    tokens: int = 403  # of a written rationale; the default is the paper's mean, 8 gives a quick look
    repeats: int = 5  # timed rounds; what takes over 5 s is timed twice
    training: bool = True  # also a training step
    growth: str = ""  # instead of the table: draw into this PNG how cost grows with prefix, steps and batch
    json: str = ""  # also write the rows to this file


@torch.no_grad()
def measure_speed(model, batch, cfg, rates):
    """-> a row for each method: time, work, memory, and the least time that this takes at `peak_rates`."""
    methods, size = speed_methods(model, batch, cfg.tokens), len(batch["ids"])
    work = {name: count_work(method.embed, model.device) for name, method in methods.items()}
    if GRAPH in methods:  # its second call records, and takes the places that stay
        flops, _ = work[GRAPH]
        work[GRAPH] = flops, peak_bytes(methods[GRAPH].embed, model.device)
    times = rounds({name: method.embed for name, method in methods.items()}, cfg.repeats, model.device)
    middle = {name: float(np.median(seconds)) for name, seconds in times.items()}
    single, written, generated = middle["single"], middle[f"cot, {cfg.tokens} tokens"], middle[GENERATED]
    prefill_flops, _ = work["single"]
    rows = []
    for name, method in methods.items():
        seconds, (flops, peak) = middle[name], work[name]
        prefill_bytes, more_bytes = bytes_to_read(model, batch, method)
        # arithmetic and reading may overlap, the prefill and what waits for it may not
        prefill_floor = max(prefill_flops / rates[0], prefill_bytes / rates[1])
        floor = prefill_floor + max((flops - prefill_flops) / rates[0], more_bytes / rates[1])
        row = dict(
            method=name, batch=size, prefix=batch["ids"].shape[1],
            ms=1e3 * seconds / size, low=1e3 * min(times[name]) / size, high=1e3 * max(times[name]) / size,
            queries_per_s=size / seconds, to_single=seconds / single, cot_to_this=written / seconds,
            transformers_cot_to_this=generated / seconds, gflop=flops / 1e9 / size,
            gbytes=(prefill_bytes + more_bytes) / 1e9, floor=seconds / floor, peak_mib=peak / 2**20)
        if name.startswith("latent, K"):
            prefill, suffix = single / seconds, (middle["latent, K = 0"] - single) / seconds
            row["shares"] = [prefill, 1 - prefill - suffix, suffix]
        rows.append(row)
    return rows


COLUMNS = (  # title, width, format, key
    ("ms/query", 10, ".2f", "ms"),
    ("lowest", 9, ".2f", "low"),
    ("highest", 9, ".2f", "high"),
    ("queries/s", 11, ".1f", "queries_per_s"),
    ("x single", 10, ".2f", "to_single"),
    ("cot/this", 10, ".1f", "cot_to_this"),
    ("transformers cot/this", 23, ".1f", "transformers_cot_to_this"),
    ("GFLOP/query", 13, ".2f", "gflop"),
    ("GB/batch", 10, ".2f", "gbytes"),
    ("x floor", 9, ".1f", "floor"),
    ("peak MiB", 10, ".0f", "peak_mib"),
)


def speed_table(rows):
    """`measure_speed`'s rows as text."""
    titles = "".join(f"{title:>{width}}" for title, width, _, _ in COLUMNS)
    lines = [f"{'method':20}{titles}   prefill  steps  suffix"]
    for r in rows:
        cells = "".join(f"{r[key]:{width}{form}}" for _, width, form, key in COLUMNS)
        shares = "  ".join(f"{share:6.0%}" for share in r.get("shares", ()))
        lines.append(f"{r['method']:20}{cells}   {shares}".rstrip())
    return "\n".join(lines)


def training_step(model, batch, repeats):
    """Forward, backward and AdamW with K = 8, as we do it and one by one -> a row, in queries a second."""
    rows = batches_of_one(model, batch["samples"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(ours):
        vectors = model([batch], 8)["per_pair"]["gen"] if ours else one_by_one(model, rows, 8)
        # every vector depends on all, as in a contrastive loss
        (10 * vectors @ vectors.T).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    ways = dict(ours=functools.partial(step, True), one_by_one=functools.partial(step, False))
    rounds(ways, 1, model.device)  # the warm-up
    times = rounds(ways, min(repeats, 3), model.device)
    ours, alone = (len(rows) / float(np.median(times[name])) for name in ways)
    print(f"a training step: {ours:.1f} queries/s, one by one {alone:.1f}: {ours / alone:.1f} times faster")
    return dict(method="training", batch=len(rows), prefix=batch["ids"].shape[1], ours=ours, one_by_one=alone)


def everything_of(model, batch, cfg, rates):
    """Prints what is measured with one batch -> its rows."""
    size, rows = len(batch["ids"]), measure_speed(model, batch, cfg, rates)
    shortest, longest = batch["lengths"].min(), batch["lengths"].max()
    tokens = f"{shortest} to {longest}" if shortest < longest else f"{longest}"
    patches = 0 if batch["pixels"] is None else len(batch["pixels"]) // size
    kernels = kernels_of_a_step(model, batch)
    print(f"\n{size} queries a batch, prefix of {tokens} tokens, {patches} patches")
    print(speed_table(rows))
    print(f"one pass takes {rows[0]['ms'] / rows[1]['ms']:.2f} times transformers' time; a latent step is "
          f"{kernels:.0f} kernels")
    rows.append(dict(method="a latent step", batch=size, prefix=rows[0]["prefix"], kernels=kernels))
    if cfg.training:
        rows.append(training_step(model, batch, cfg.repeats))
    return rows


@torch.no_grad()
def growth(model, repeats):
    """Time and memory of the latent embedding of text, as prefix, latent steps and batch grow -> rows."""
    rows = []
    for what, values in GROWTH.items():
        for value in tqdm(values, desc=what, leave=False):
            now = dict(STAYS, **{what: value})
            batch = speed_batch(model, None, (now["prefix"],) * 2, now["batch"])
            embed = functools.partial(model.embed, batch, "latent", now["K"])
            peak = peak_bytes(embed, model.device) / 2**20
            seconds = float(np.median(rounds({what: embed}, repeats, model.device)[what]))
            ms, rate = 1e3 * seconds, now["batch"] / seconds
            rows.append(dict(now, grows=what, ms=ms, queries_per_s=rate, peak_mib=peak))
            print(f"{what:7}{value:6}{ms:12.1f} ms a batch{rate:10.1f} queries/s{peak:10.0f} MiB at most")
    return rows


def draw_growth(rows, path):
    """`growth`'s rows as a PNG: a panel for each of what grows, a line each for time and memory, from 0."""
    figure, panels = new_figure(1260, 420, len(GROWTH))
    for left, what in zip(panels, GROWTH):
        mine = [r for r in rows if r["grows"] == what]
        left.set(xlabel=AXES[what], title=", ".join(f"{k} {v}" for k, v in STAYS.items() if k != what))
        for axes, key, unit, colour in (
                (left, "ms", "ms a batch", "C0"), (left.twinx(), "peak_mib", "MiB at most", "C3")):
            axes.plot([r[what] for r in mine], [r[key] for r in mine], "o-", color=colour, clip_on=False)
            axes.set_ylabel(unit, color=colour)
            axes.tick_params(axis="y", labelcolor=colour)
            axes.set_ylim(bottom=0)
    save_figure(figure, path)


def ranges(text):
    """--prefix: "40,100-1600" -> [(40, 40), (100, 1600)]"""
    found = []
    for part in text.split(","):
        numbers = whole_numbers("prefix", part, "-", "numbers of at least 1, as 40,160 or 100-1600")
        if len(numbers) > 2 or numbers[0] > numbers[-1]:
            raise DataError(f"--prefix {part}: two numbers at most, the smaller number goes first: 100-1600")
        found.append((numbers[0], numbers[-1]))
    return found


def check_flags(cfg, given):
    """What can be known to be wrong before anything is loaded -> prefix, batch_sizes, image as numbers"""
    own = {"batch_sizes", "prefix", "image", "frames", "tokens", "training"}
    if cfg.growth and (wrong := given & own):
        raise DataError(f"--{' --'.join(sorted(wrong))}: not with --growth, which has its own; leave it out")
    if cfg.ckpt and "preset" in given or cfg.preset not in SHAPES:
        raise DataError(f"--preset {cfg.preset!r}: one of {', '.join(SHAPES)}, and without --ckpt")
    if min(cfg.repeats, cfg.tokens) < 1 or cfg.frames < 0:
        raise DataError(f"--repeats {cfg.repeats} and --tokens {cfg.tokens} must be at least 1, "
                        f"--frames {cfg.frames} at least 0")
    if cfg.growth:
        check_output("growth", cfg.growth, cfg.json)
    elif not writable(cfg.json):
        raise DataError(f"--json {cfg.json!r}: name a file in a folder that exists")
    size = whole_numbers("image", cfg.image or "224x224", "x", "numbers of at least 1, as 448x448")
    if len(size) != 2:
        raise DataError(f"--image {cfg.image!r}: needs width and height in pixels, as 448x448")
    batch_sizes = whole_numbers("batch_sizes", cfg.batch_sizes, ",", "numbers of at least 1, as 1,8,32")
    return ranges(cfg.prefix), batch_sizes, size


def load_model(cfg, area):
    """--ckpt, or random weights, with limits that leave pictures of so many pixels as they are."""
    if cfg.ckpt:
        model = Plume.from_pretrained(cfg.ckpt, cfg.device or None, cfg.dtype or None)
        if model.adapter.kind == "parallel":
            raise DataError(f"{cfg.ckpt}: its learnt tokens take one pass, there are no steps to time; "
                            "python -m tools.lengths")
    else:
        device, dtype = pick_device(cfg.device or None, cfg.dtype or None)
        # the prompt stands there often, so that the tokenizer learns its words as whole tokens
        prompt = SHAPES[cfg.preset].get("prompt", RELEASED_PROMPT)
        texts = [*World("test").texts(), *[prompt] * 20]
        model = align_weights(Plume.random(texts, cfg.preset, device=device).to(dtype))
    limits = model.processor.limits
    limits.max_pixels = limits.video_max_pixels = max(limits.max_pixels, area)
    limits.num_frames = max(cfg.frames, limits.num_frames)
    limits.max_len = 1 << 20
    return model.eval()


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    prefixes, batch_sizes, size = check_flags(cfg, given)
    model = load_model(cfg, math.prod(size))
    result = dict(
        date=time.strftime("%Y-%m-%d"),
        device=torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device),
        dtype=str(model.lm.norm.weight.dtype), threads=torch.get_num_threads(), torch=torch.__version__,
        model=cfg.ckpt or f"random weights, {cfg.preset}", image=cfg.image, frames=cfg.frames, rows=[])
    print(f"{result['model']}, {result['device']}, {result['dtype']}, {result['threads']} threads", end="")
    if cfg.growth:
        print()
        result["rows"] = growth(model, cfg.repeats)
        draw_growth(result["rows"], cfg.growth)
        print(f"growth of time and memory: {cfg.growth}")
        if cfg.json:
            write_json(cfg.json, result)
        return
    rates = peak_rates(model.device, model.lm.norm.weight.dtype)
    result |= dict(flops=rates[0], bytes_per_s=rates[1])
    print(f"; it gives {rates[0] / 1e12:.2f} TFLOP/s and {rates[1] / 1e9:.0f} GB/s")
    media = None
    if cfg.image or cfg.frames:
        prefixes, media = [(0, 0)], (*size, cfg.frames)  # a picture has its own length
    for prefix, count in itertools.product(prefixes, batch_sizes):
        batch = speed_batch(model, media, prefix, count)
        result["rows"] += everything_of(model, batch, cfg, rates)
        if cfg.json:
            write_json(cfg.json, result)


if __name__ == "__main__":
    command(main)
