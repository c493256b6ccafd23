"""Look at what the model sees, and how fast it is read.

    python -m tools.look --show sheet.png                             one example of each data set, both sides
    python -m tools.look --bench --data pairs.jsonl --workers 8       pictures, clips and pairs a second
"""

import functools
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from curriculum import Curriculum
from data import (
    Batches, DataError, Limits, Pairs, Processor, command, load_frames, load_image, parse_flags,
    train_tokenizer, writing)
from tasks.turtle import World


@dataclass
class Config:
    # contact sheet
    show: str = ""  # PNG to write: one example of each data set, both sides
    # speed of reading
    bench: bool = False  # pictures, clips and pairs a second that the workers make ready for the model
    workers: int = 2  # processes, as train.py has on each rank
    count: int = 512  # pairs drawn at random
    max_pixels: int = 0  # a picture is scaled down to this area; 0: Qwen2-VL's
    video_max_pixels: int = 0  # the same for each frame of a clip
    num_frames: int = 0  # frames sampled from a clip
    # both
    data: str = ""  # JSONL of training pairs; default: turtle world
    media: str = ""  # folder that media paths are relative to; default: the folder of --data


def contact_sheet(pairs, num_frames=8):
    """One example of each data set as a picture: what the model is shown on both sides, and what it learns to write."""
    rows, font, zoom = [], ImageFont.load_default(18), 3
    shrink = lambda image: image.resize((round(image.width * z), round(image.height * z)), Image.NEAREST) if (z := min(zoom, 240 / max(image.size))) else image
    for d, name in enumerate(pairs.names):
        shown, lines = [], [name]
        for label, side in zip(("query", "target"), pairs[int(np.flatnonzero(pairs.dataset == d)[0])]):
            said = " ".join("".join(v if kind == "text" else f"<{kind}>" for kind, v in side.parts if kind != "disc").split())
            lines += [f"{label}:  {said}"] + [f"   {what}: {text.strip()}" for what, text in (("rationale", side.rationale), ("answer", side.answer)) if text]
            for kind, value in side.parts:
                shown += [shrink(f) for f in ([load_image(value)] if kind == "image" else load_frames(value, num_frames) if kind == "video" else [])]
            shown.append(None)  # a gap between query and target
        rows.append(([line[:110] for line in lines], shown))
    heights = [max([26 * len(lines), *(i.height for i in shown if i)]) + 36 for lines, shown in rows]
    width = 700 + max(sum(i.width + 6 if i else 40 for i in shown) for _, shown in rows)
    sheet, y = Image.new("RGB", (width, sum(heights)), "white"), 0
    draw = ImageDraw.Draw(sheet)
    for (lines, shown), height in zip(rows, heights):
        for i, line in enumerate(lines):
            draw.text((16, y + 16 + 26 * i), line, fill="black" if i else "#1f77b4", font=font)
        x = 700
        for image in shown:
            if image:
                sheet.paste(image, (x, y + 16))
            x += image.width + 6 if image else 40
        y += height
        draw.line((0, y - 1, width, y - 1), fill="#cccccc")
    return sheet


def bench(pairs, processor, workers, count):
    """What the workers can give: of the drawn pairs' media each for itself, and of the pairs as training batches of 4."""
    if workers < 0 or count < 8:
        raise DataError(f"--workers {workers}, --count {count}: needs at least 0 workers and 8 pairs")
    drawn, curriculum = np.random.default_rng(0).permutation(len(pairs))[:count], Curriculum()
    parts = [part for i in drawn for side in pairs[i] for part in side.parts]
    print(f"{len(drawn)} pairs of {len(pairs.names)} data sets, {workers} workers, {os.cpu_count()} cores")
    for name, kind, size in (("pictures", "image", 1), ("clips", "video", 1), ("pairs", None, 4)):
        if kind:
            jobs, how = [source for k, source in parts if k == kind], dict(collate_fn=functools.partial(processor.media, kind))
        else:
            jobs = Batches(pairs, processor, curriculum)
            how = dict(sampler=[(0, curriculum.stages[0], drawn[i : i + size]) for i in range(0, len(drawn) // size * size, size)])
        loader = torch.utils.data.DataLoader(jobs, batch_size=None, num_workers=workers, **how)
        if len(loader) < 2:
            print(f"{name:8}  fewer than 2")
            continue
        begun = None
        for made in tqdm(loader, desc=name, leave=False):
            begun = begun or time.perf_counter()  # behind the first: workers have started
        rate = (len(loader) - 1) * size / (time.perf_counter() - begun)
        print(f"{name:8}  {rate:9,.1f} a second  ({len(loader) * size} read)")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if bool(cfg.show) == cfg.bench:
        raise DataError("name a picture to write with --show sheet.png, or measure with --bench")
    pairs = Pairs(cfg.data, cfg.media or None) if cfg.data else World()
    if cfg.bench:
        given = dict(max_pixels=cfg.max_pixels, video_max_pixels=cfg.video_max_pixels, num_frames=cfg.num_frames)
        limits = Limits(**{k: v for k, v in given.items() if v})
        return bench(pairs, Processor(train_tokenizer(pairs.texts()), "", limits), cfg.workers, cfg.count)
    sheet = contact_sheet(pairs)
    with writing(cfg.show, "wb") as f:
        sheet.save(f, "PNG")
    print(f"one example of each data set: {cfg.show}")


if __name__ == "__main__":
    command(main)
