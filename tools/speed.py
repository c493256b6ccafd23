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

Behind it the time of one pass against transformers' own, and the kernels of one latent step: about what a GPU
has to start, whatever the batch.
"""

import functools
import math
import time
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from backbones.reference import transformers_inputs
from backbones.shapes import SHAPES
from data import collate, to_device
from engine.flags import command, parse_flags
from engine.ranks import pick_device
from files.errors import DataError
from files.items import Side
from files.writing import writable, write_json, writing
from latent import Graphs, greedy, naive_rollout, select_column, unit
from model import Plume
from tasks.turtle import World
from tools.dry_run import LiveBytes

# names of rows
FORWARD, GRAPH, GENERATED = "single, transformers", "latent graph, K = 8", "cot, transformers"


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


# ------------------------------------------------------------------------------------------ queries


def whole_numbers(flag, text, between, example):
    """"1,8,32" -> [1, 8, 32]"""
    try:
        numbers = [int(number) for number in text.split(between)]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise DataError(f"--{flag} {text!r}: needs numbers of at least 1, as {example}")
    return numbers


def image_size(cfg):
    """-> (width, height) of --image in pixels."""
    size = whole_numbers("image", cfg.image or "224x224", "x", "448x448")
    if len(size) != 2:
        raise DataError(f"--image {cfg.image!r}: needs width and height in pixels, as 448x448")
    return size


def query_side(processor, cfg, prefix):
    """A query: text that makes `prefix` tokens together with the prompt, or a picture or clip of noise."""
    if cfg.image or cfg.frames:
        width, height = image_size(cfg)
        shape = (max(cfg.frames, 1), height, width, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        frames = [Image.fromarray(frame) for frame in noise]
        media = ("video", frames) if cfg.frames else ("image", frames[0])
        return Side([media, ("text", " forward")])
    prompt = len(processor.render(Side([("text", "")]))["ids"])
    if prefix <= prompt:
        raise DataError(f"--prefix {prefix}: the model's prompt alone has {prompt} tokens; ask for more")
    return Side([("text", " forward" * (prefix - prompt))])


def ranges(text):
    """--prefix: "40,100-1600" -> [(40, 40), (100, 1600)]"""
    found = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        low, high = whole_numbers("prefix", f"{low},{high if dash else low}", ",", "40,160 or 100-1600")
        if low > high:
            raise DataError(f"--prefix {part}: the smaller number goes first, as 100-1600")
        found.append((low, high))
    return found


def speed_batch(model, cfg, prefix, size):
    """`size` queries, collated on the model's device; "samples" are the same one by one.

    prefix: the least and the most tokens of a query of text; between them lengths are drawn at random.
    """
    low, high = prefix
    lengths = np.random.default_rng(0).integers(low, high + 1, size).tolist()
    sides = {n: query_side(model.processor, cfg, n) for n in lengths}
    rendered = {n: model.processor.render(side) for n, side in sides.items()}
    samples = [rendered[n] for n in lengths]
    return dict(to_device(collate(samples, model.processor), model.device), samples=samples)


def batches_of_one(model, samples):
    """Each sample as a batch on the model's device."""
    return [to_device(collate([sample], model.processor), model.device) for sample in samples]


# ------------------------------------------------------------------------------- ways to embed them


class Method(NamedTuple):
    """A way to embed a batch, and what it has to read."""

    embed: Callable  # embeds the batch
    passes: int  # of the decoder, behind the prefill
    steps: int = 0  # of these with the adapter
    alone: bool = False  # each query by itself: every one of them reads all weights
    writes: bool = False  # tokens: every pass also reads the vocabulary's matrix


def speed_methods(model, batch, cfg):
    """-> {name: Method}"""
    rows = batches_of_one(model, batch["samples"])
    methods = {"single": Method(functools.partial(model.embed, batch, "single"), passes=0)}
    methods[FORWARD] = Method(functools.partial(transformers_forward, model, batch), passes=0)
    for k in (0, 4, 6, 8):  # the last step shares its pass with the suffix
        methods[f"latent, K = {k}"] = Method(functools.partial(model.embed, batch, "latent", k), max(1, k), k)
    if model.device.type == "cuda":
        replay = functools.partial(replayed, model, batch, Graphs())
        methods[GRAPH] = Method(replay, passes=8, steps=8)
    alone = functools.partial(all_one_by_one, model, rows, 8)
    methods["one by one, K = 8"] = Method(alone, passes=9, steps=8, alone=True)
    write = functools.partial(write_rationale, model, batch, cfg.tokens)
    methods[f"cot, {cfg.tokens} tokens"] = Method(write, passes=cfg.tokens, writes=True)
    inputs = padded_left(batch, model.processor)
    generate = functools.partial(model.backbone.generate, **inputs, do_sample=False,
                                 min_new_tokens=cfg.tokens, max_new_tokens=cfg.tokens)
    methods[GENERATED] = Method(generate, passes=cfg.tokens - 1, writes=True)
    return methods


def replayed(model, batch, graphs):
    """The latent embedding with K = 8, what comes behind the prefix as one graph."""
    model.graphs = graphs
    try:
        return model.embed(batch, "latent", 8)
    finally:
        model.graphs = None


def write_rationale(model, batch, tokens):
    """The embedding behind a rationale of exactly `tokens` tokens."""
    gen = model.processor.id["<gen_emb>"]
    end = torch.tensor([gen], device=model.device)

    def logits(h):  # never those of <gen_emb>: no row ends early
        return model.backbone.lm_head(h).index_fill(-1, end, -math.inf)

    return greedy(model.lm, model.lm.embed_tokens, logits, model.prefix(batch), gen, tokens)


def padded_left(batch, processor):
    """A batch as inputs of transformers' own model, as its `generate` wants them."""
    inputs = transformers_inputs(batch, processor)
    rows = zip(batch["ids"], batch["lengths"].tolist())
    inputs["input_ids"] = torch.stack([row.roll(len(row) - n) for row, n in rows])
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


@torch.no_grad()
def transformers_forward(model, batch):
    """One pass through transformers' own model -> (B, D) unit, as `Plume.embed` in mode single."""
    model.backbone.model.rope_deltas = None  # transformers keeps those of the last call
    inputs = dict(transformers_inputs(batch, model.processor), position_ids=batch["positions"])
    h = model.backbone.model(**inputs, use_cache=False).last_hidden_state  # (B, P, D)
    return unit(select_column(h, batch["disc"]))


def one_by_one(model, batch, steps):
    """The latent embedding of a batch of one query without latent.py's decoder -> (1, D)."""
    r = naive_rollout(
        model.backbone.model, model.adapter, transformers_inputs(batch, model.processor), batch["positions"],
        batch["disc"].item(), steps, model.lm.embed_tokens(batch["suffix"]),
        model.settings["latent_positions"])
    return unit(select_column(r.suffix, batch["gen"]))


def all_one_by_one(model, rows, steps):
    """Batches of one query -> (B, D)"""
    return torch.cat([one_by_one(model, row, steps) for row in rows])


# ---------------------------------------------------------------------------------- clock and count


def wait_for(device):
    if device.type != "cpu":  # others are still at work when a call returns
        torch.accelerator.synchronize()


def clock(function, device):
    """Seconds of one call."""
    wait_for(device)
    begun = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - begun


def rounds(functions, repeats, device):
    """{name: seconds of each call}, the functions by turns, so that all of them meet the same noise."""
    times = {name: [] for name in functions}
    for i in tqdm(range(repeats), desc="timed rounds", leave=False):
        for name, function in functions.items():
            if i < 2 or times[name][0] < 5:
                times[name].append(clock(function, device))
    return times


def peak_bytes(function, device):
    """The most memory that one call takes beside what is there before.

    On CUDA as its allocator counts, elsewhere the bytes of all tensors that are alive.
    """
    if device.type != "cuda":
        with LiveBytes() as live:
            function()
        return live.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def peak_rates(device, dtype):
    """What the device gives now: FLOP a second in a large matrix product, bytes a second read by a sum."""
    n, size = (8192, 1 << 33) if device.type == "cuda" else (1536, 1 << 28)
    a = torch.randn(n, n, device=device, dtype=dtype)
    long = torch.zeros(size // 4, device=device)
    times = rounds({"product": functools.partial(torch.mm, a, a), "sum": long.sum}, 6, device)
    return 2 * n**3 / min(times["product"]), size / min(times["sum"])


def attention_flops(q, k, *others, **more):
    """Two products of q's rows with all keys; q and k are shapes (B, H, L, d)."""
    return 4 * math.prod(q) * k[-2]


# the attention kernel that torch's counter does not know
UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def count_work(method, device):
    """-> FLOP of one call, peak bytes.  It is also the warm-up."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as flops:
        peak = peak_bytes(method.embed, device)
    return flops.get_total_flops(), peak


class Kernels(TorchDispatchMode):
    """Counts operators that compute or move something: on a GPU each is a kernel, or a few."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        looks_only = operator.is_view or operator in (torch.ops.aten._unsafe_view.default,
                                                      torch.ops.aten.promote_types.default)
        self.count += not looks_only
        return operator(*args, **(kwargs or {}))


@torch.no_grad()
def kernels_of_a_step(model, batch):
    """Kernels of one latent step: those of 8 steps without those of 4, divided by 4."""
    counts = {}
    for steps in (4, 8):
        with Kernels() as kernels:
            model.embed(batch, "latent", steps)
        counts[steps] = kernels.count
    return (counts[8] - counts[4]) / 4


# ---------------------------------------------------------------------------------------- the table


def parameter_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def bytes_to_read(model, batch, method):
    """-> bytes that a method has to read: (in the prefill, behind it)."""
    lm, size = model.lm, len(batch["ids"])
    weights = parameter_bytes(lm.layers)
    vision = 0 if batch["pixels"] is None else parameter_bytes(model.backbone.model.visual)
    times = size if method.alone else 1
    # keys and values of one token; half of the passes' columns are there on average
    column = 2 * len(lm.layers) * lm.layers[0].self_attn.k_proj.out_features * lm.norm.weight.element_size()
    cached = column * (batch["ids"].numel() + size * method.passes / 2) / times
    a_pass = weights + cached
    if method.writes:
        a_pass += parameter_bytes(lm.embed_tokens)
    behind = a_pass * method.passes + parameter_bytes(model.adapter) * method.steps
    return (weights + vision) * times, behind * times


@torch.no_grad()
def measure_speed(model, batch, cfg, rates):
    """-> a row for each method: time, work and memory for this batch, and the least time that the work takes.

    rates: FLOP and bytes a second, of `peak_rates`.
    """
    methods, size = speed_methods(model, batch, cfg), len(batch["ids"])
    work = {name: count_work(method, model.device) for name, method in methods.items()}
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


def training_step(model, batch, cfg):
    """Forward, backward and AdamW with K = 8, as we do it and one by one -> a row, in queries a second."""
    rows = batches_of_one(model, batch["samples"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(vectors):
        # every vector depends on all, as in a contrastive loss
        (10 * vectors @ vectors.T).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def ours():
        step(model(batch, 8)["per_pair"]["gen"])

    def alone():
        step(all_one_by_one(model, rows, 8))

    ours()  # the warm-up
    alone()
    times = rounds(dict(ours=ours, alone=alone), min(cfg.repeats, 3), model.device)
    rate = {name: len(rows) / float(np.median(seconds)) for name, seconds in times.items()}
    print(f"a training step: {rate['ours']:.1f} queries/s, one by one {rate['alone']:.1f}: "
          f"{rate['ours'] / rate['alone']:.1f} times faster")
    return dict(method="training", batch=len(rows), prefix=batch["ids"].shape[1], ours=rate["ours"],
                one_by_one=rate["alone"])


def speed_tables(model, cfg, result, save):
    """Prints a table for each length and batch size, and saves its rows in result["rows"]."""
    rates = peak_rates(model.device, model.lm.norm.weight.dtype)
    result |= dict(flops=rates[0], bytes_per_s=rates[1])
    print(f"; it gives {rates[0] / 1e12:.2f} TFLOP/s and {rates[1] / 1e9:.0f} GB/s")
    lengths = ranges(cfg.prefix)
    if cfg.image or cfg.frames:
        lengths = [(0, 0)]  # a picture has its own
    for prefix in lengths:
        for size in whole_numbers("batch_sizes", cfg.batch_sizes, ",", "1,8,32"):
            batch = speed_batch(model, cfg, prefix, size)
            rows = measure_speed(model, batch, cfg, rates)
            shortest, longest = batch["lengths"].min(), batch["lengths"].max()
            tokens = f"{shortest} to {longest}" if shortest < longest else f"{longest}"
            patches = 0 if batch["pixels"] is None else len(batch["pixels"]) // size
            kernels = kernels_of_a_step(model, batch)
            print(f"\n{size} queries a batch, prefix of {tokens} tokens, {patches} patches")
            print(speed_table(rows))
            to_theirs = rows[0]["ms"] / rows[1]["ms"]
            print(f"one pass takes {to_theirs:.2f} times transformers' time; "
                  f"a latent step is {kernels:.0f} kernels")
            rows.append(dict(method="a latent step", batch=size, prefix=rows[0]["prefix"], kernels=kernels))
            if cfg.training:
                rows.append(training_step(model, batch, cfg))
            result["rows"] += rows
            save()


# ------------------------------------------------------------------------------------------- growth


# one grows, the others stay
GROWTH = dict(
    prefix=(64, 128, 256, 512, 1024, 2048),
    K=(0, 2, 4, 8, 16, 32),
    batch=(1, 2, 4, 8, 16, 32, 64),
)
STAYS = dict(prefix=256, K=8, batch=4)


@torch.no_grad()
def growth(model, cfg):
    """Time and memory of the latent embedding of text, as prefix, latent steps and batch grow -> rows."""
    rows = []
    for what, values in GROWTH.items():
        for value in tqdm(values, desc=what, leave=False):
            now = dict(STAYS, **{what: value})
            batch = speed_batch(model, cfg, (now["prefix"],) * 2, now["batch"])
            embed = functools.partial(model.embed, batch, "latent", now["K"])
            peak = peak_bytes(embed, model.device) / 2**20
            seconds = float(np.median(rounds({what: embed}, cfg.repeats, model.device)[what]))
            rate = now["batch"] / seconds
            rows.append(dict(now, grows=what, ms=1e3 * seconds, queries_per_s=rate, peak_mib=peak))
            print(f"{what:7}{value:6}{1e3 * seconds:12.1f} ms a batch{rate:10.1f} queries/s"
                  f"{peak:10.0f} MiB at most")
    return rows


WIDTH, HEIGHT, MARGIN = 420, 420, 60  # of one panel, in pixels


def draw_growth(rows, path):
    """`growth`'s rows as a PNG: a panel for each of what grows, a line each for time and memory, from 0."""
    image = Image.new("RGB", (WIDTH * len(GROWTH), HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    for panel, what in enumerate(GROWTH):
        left, mine = panel * WIDTH + MARGIN // 2, [r for r in rows if r["grows"] == what]
        draw.rectangle((left, MARGIN, left + WIDTH - MARGIN, HEIGHT - MARGIN), outline="#bbbbbb")
        fixed = ", ".join(f"{name} {value}" for name, value in STAYS.items() if name != what)
        draw.text((left, 12), f"{what} 0 to {mine[-1][what]}\n{fixed}", fill="black", font=font)
        for key, unit, colour, y in (
            ("ms", "ms a batch", "#1f77b4", HEIGHT - 48),
            ("peak_mib", "MiB at most", "#d62728", HEIGHT - 28),
        ):
            most, points = max(r[key] for r in mine), []
            for r in mine:
                x = left + r[what] / mine[-1][what] * (WIDTH - MARGIN)
                points.append((x, HEIGHT - MARGIN - r[key] / most * (HEIGHT - 2 * MARGIN)))
            draw.line(points, fill=colour, width=2)
            for point in points:
                draw.circle(point, 3, fill=colour)
            draw.text((left, y), f"0 to {most:,.0f} {unit}", fill=colour, font=font)
    with writing(path, "wb") as f:
        image.save(f, "PNG")


# ------------------------------------------------------------------------------------------ command


def check_flags(cfg, given):
    """Raises DataError for flags that cannot be right, before anything is loaded."""
    if not writable(cfg.json) or not writable(cfg.growth):
        raise DataError(f"--json {cfg.json!r} and --growth {cfg.growth!r}: name files in folders that exist")
    wrong = given & {"batch_sizes", "prefix", "image", "frames", "tokens", "training"}
    if cfg.growth and wrong:
        raise DataError(f"--{' --'.join(sorted(wrong))}: not with --growth, which has its own; leave it out")
    if cfg.ckpt and "preset" in given or cfg.preset not in SHAPES:
        raise DataError(f"--preset {cfg.preset!r}: one of {', '.join(SHAPES)}, and without --ckpt")
    if min(cfg.repeats, cfg.tokens) < 1 or cfg.frames < 0:
        raise DataError(f"--repeats {cfg.repeats} and --tokens {cfg.tokens} must be at least 1, "
                        f"--frames {cfg.frames} at least 0")
    whole_numbers("batch_sizes", cfg.batch_sizes, ",", "1,8,32")
    ranges(cfg.prefix)
    image_size(cfg)


def load_model(cfg):
    """--ckpt, or random weights, with limits that leave the queries as they are."""
    if cfg.ckpt:
        model = Plume.from_pretrained(cfg.ckpt, cfg.device or None, cfg.dtype or None)
        if model.adapter.kind == "parallel":
            raise DataError(f"{cfg.ckpt}: its learnt tokens take one pass, there are no steps to time; "
                            "python -m tools.lengths")
    else:
        device, dtype = pick_device(cfg.device or None, cfg.dtype or None)
        # the prompt stands there often, so that the tokenizer learns its words as whole tokens
        texts = [*World("test").texts(), *[SHAPES[cfg.preset]["prompt"]] * 20]
        model = Plume.random(texts, cfg.preset, device=device).to(dtype)
    limits, area = model.processor.limits, math.prod(image_size(cfg))
    limits.max_pixels = limits.video_max_pixels = max(limits.max_pixels, area)
    limits.num_frames = max(cfg.frames, limits.num_frames)
    limits.max_len = 1 << 20
    return model.eval()


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    check_flags(cfg, given)
    model = load_model(cfg)
    result = dict(
        date=time.strftime("%Y-%m-%d"),
        device=torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device),
        dtype=str(model.lm.norm.weight.dtype), threads=torch.get_num_threads(), torch=torch.__version__,
        model=cfg.ckpt or f"random weights, {cfg.preset}", image=cfg.image, frames=cfg.frames, rows=[])
    print(f"{result['model']}, {result['device']}, {result['dtype']}, {result['threads']} threads", end="")

    def save():
        if cfg.json:
            write_json(cfg.json, result)

    if not cfg.growth:
        return speed_tables(model, cfg, result, save)
    print()
    result["rows"] = growth(model, cfg)
    draw_growth(result["rows"], cfg.growth)
    print(f"growth of time and memory: {cfg.growth}")
    save()


if __name__ == "__main__":
    command(main)
