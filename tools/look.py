"""Look at what the model sees, and how fast it is read.

    python -m tools.look --show sheet.png                             one example of each data set, both sides
    python -m tools.look --bench --data pairs.jsonl --workers 8       pictures, clips and pairs a second
"""

import functools
import os
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones.families import Limits
from curriculum import Curriculum
from data import Batches, Processor, train_tokenizer
from engine.flags import command, parse_flags
from files.clips import load_frames
from files.errors import DataError
from files.pictures import load_image
from files.records import Pairs
from files.writing import writing
from tasks.turtle import World

TEXT_WIDTH = 700  # pixels of the sheet for texts; the pictures stand to the right of them
LINE_HEIGHT = 26


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
    """One example of each data set as a picture: what is shown on both sides, and what is learnt to write."""
    rows = []  # (lines, pictures)
    for number, name in enumerate(pairs.names):
        first = int(np.flatnonzero(pairs.dataset == number)[0])
        query, target = pairs[first][:2]
        lines = [name, *lines_of("query", query), *lines_of("target", target)]
        gap = [None]
        pictures = pictures_of(query, num_frames) + gap + pictures_of(target, num_frames) + gap
        rows.append(([line[:110] for line in lines], pictures))
    widths = [sum(map(width_of, pictures)) for _, pictures in rows]
    heights = [height_of(*row) for row in rows]
    sheet = Image.new("RGB", (TEXT_WIDTH + max(widths), sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    top = 0
    for (lines, pictures), height in zip(rows, heights):
        for i, line in enumerate(lines):
            colour = "#1f77b4" if i == 0 else "black"
            draw.text((16, top + 16 + LINE_HEIGHT * i), line, fill=colour, font=font)
        left = TEXT_WIDTH
        for picture in pictures:
            if picture is not None:
                sheet.paste(picture, (left, top + 16))
            left += width_of(picture)
        top += height
        draw.line((0, top - 1, sheet.width, top - 1), fill="#cccccc")
    return sheet


def lines_of(label, side):
    """What a side says, with <image> and <video> where they stand, and what its model learns to write."""
    words = ""
    for kind, value in side.parts:
        if kind == "text":
            words += value
        elif kind != "disc":
            words += f"<{kind}>"
    lines = [f"{label}:  {' '.join(words.split())}"]
    for what, text in (("rationale", side.rationale), ("answer", side.answer)):
        if text:
            lines.append(f"   {what}: {text.strip()}")
    return lines


def pictures_of(side, num_frames):
    """The pictures and frames of a side, enlarged."""
    images = []
    for kind, value in side.parts:
        if kind == "image":
            images.append(load_image(value))
        elif kind == "video":
            images += load_frames(value, num_frames)
    return [enlarged(image) for image in images]


def enlarged(image):
    """Three times as large, but at most 240 pixels wide and high."""
    zoom = min(3, 240 / max(image.size))
    size = (round(image.width * zoom), round(image.height * zoom))
    return image.resize(size, Image.NEAREST)


def width_of(picture):
    """What a picture, or None for a gap, takes of a row."""
    return 40 if picture is None else picture.width + 6


def height_of(lines, pictures):
    """What a row of the sheet takes, with the space around it."""
    heights = [picture.height for picture in pictures if picture is not None]
    return max([LINE_HEIGHT * len(lines), *heights]) + 36


def bench(pairs, processor, workers, count):
    """Prints what the workers can give a second.

    Of the drawn pairs: their pictures and clips each for itself, and the pairs as training batches of 4.
    """
    if workers < 0 or count < 8:
        raise DataError(f"--workers {workers}, --count {count}: needs at least 0 workers and 8 pairs")
    drawn = np.random.default_rng(0).permutation(len(pairs))[:count]
    media = {"image": [], "video": []}
    for i in drawn:
        for side in pairs[i]:
            for kind, value in side.parts:
                if kind in media:
                    media[kind].append(value)
    print(f"{len(drawn)} pairs of {len(pairs.names)} data sets, {workers} workers, {os.cpu_count()} cores")
    for name, kind in (("pictures", "image"), ("clips", "video")):
        read_one = functools.partial(processor.media, kind)
        measure(name, 1, DataLoader(media[kind], batch_size=None, num_workers=workers, collate_fn=read_one))
    curriculum, size = Curriculum(), 4
    whole = len(drawn) // size * size
    jobs = [(0, curriculum.stages[0], drawn[i : i + size]) for i in range(0, whole, size)]
    batches = Batches(pairs, processor, curriculum)
    measure("pairs", size, DataLoader(batches, batch_size=None, num_workers=workers, sampler=jobs))


def measure(name, size, loader):
    """Prints how many a second a loader gives; size: how many each of its items holds."""
    if len(loader) < 2:
        print(f"{name:8}  fewer than 2")
        return
    begun = None
    for _ in tqdm(loader, desc=name, leave=False):
        if begun is None:  # behind the first: workers have started
            begun = time.perf_counter()
    rate = (len(loader) - 1) * size / (time.perf_counter() - begun)
    print(f"{name:8}  {rate:9,.1f} a second  ({len(loader) * size} read)")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if bool(cfg.show) == cfg.bench:
        raise DataError("name a picture to write with --show sheet.png, or measure with --bench")
    pairs = Pairs(cfg.data, cfg.media or None) if cfg.data else World()
    if cfg.bench:
        sizes = dict(
            max_pixels=cfg.max_pixels, video_max_pixels=cfg.video_max_pixels, num_frames=cfg.num_frames)
        limits = Limits(**{name: size for name, size in sizes.items() if size})
        processor = Processor(train_tokenizer(pairs.texts()), "", limits)
        return bench(pairs, processor, cfg.workers, cfg.count)
    sheet = contact_sheet(pairs)
    with writing(cfg.show, "wb") as f:
        sheet.save(f, "PNG")
    print(f"one example of each data set: {cfg.show}")


if __name__ == "__main__":
    command(main)
