"""Speed: one pass, latent steps, written rationales: time, memory, and the least time that the work takes.

    python -m tools.speed --preset mid --prefix 40,160       random weights in a shape
    python -m tools.speed --ckpt out/checkpoint              a checkpoint
    python -m tools.speed --preset mid --growth growth.png   how cost grows with prefix, steps and batch
"""

import functools
import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import DynamicCache

from data import DataError, Side, collate, parse_flags, said, to_device, writing
from eval import writable, write_json
from latent import Graphs, greedy
from model import SHAPES, Plume, pick_device
from tasks.turtle import World
from tools.dry_run import LiveBytes


@dataclass
class Config:
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    preset: str = ""  # random weights in this shape instead of --ckpt: tiny, mid, qwen2vl_2b
    batch_sizes: str = "1,8,32"  # queries a batch
    prefix: str = "160"  # tokens of a query of text, with commas between
    image: str = ""  # WIDTHxHEIGHT: a query is a picture instead
    frames: int = 0  # a query is a clip of so many frames of the size of --image
    tokens: int = 403  # of a written rationale; the paper's mean
    repeats: int = 5  # timed rounds; what takes over 5 s is timed twice
    training: bool = True  # also a training step
    growth: str = ""  # instead: draw into this PNG how cost grows with prefix, steps and batch
    json: str = ""  # also write the rows to this file
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


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


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    if not writable(cfg.json) or not writable(cfg.growth):
        raise DataError(f"--json {cfg.json!r} and --growth {cfg.growth!r} must be files in folders that exist")
    if cfg.growth and (wrong := given & {"batch_sizes", "prefix", "image", "frames", "tokens", "training"}):
        raise DataError(f"--{' --'.join(sorted(wrong))}: not with --growth, which has its own")
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


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (DataError, OSError) as e:
        sys.exit(f"error: {said(e)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
