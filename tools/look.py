"""Look at what the model sees, and how fast it is read.

    python -m tools.look --show sheet.png                             one example of each data set, both sides
    python -m tools.look --bench --data pairs.jsonl --workers 8       pictures, clips and pairs a second
"""

import engine.threads  # before torch

import bisect
import functools
import os
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones.families import Limits
from curriculum import Curriculum
from backbones.tokens import train_tokenizer
from data import Batches, Processor, SPECIAL
from engine.flags import command, parse_flags
from files.clips import load_frames
from files.errors import DataError
from files.packing import pack
from files.pictures import load_image
from files.records import Pairs
from files.writing import writing
from tasks.turtle import World

TEXT_WIDTH = 700  # pixels of the sheet for texts; the pictures stand to the right of them
LINE_HEIGHT = 26
GAP = 40  # pixels between the pictures of two sides


@dataclass
class Config:
    # contact sheet
    show: str = ""  # PNG to write: one example of each data set, both sides
    # speed of reading
    bench: bool = False  # pictures, clips and pairs a second that the workers make ready for the model
    workers: int = 2  # processes, as train.py has on each rank
    count: int = 512  # pairs drawn at random
    max_pixels: int = Limits.max_pixels  # a picture is scaled down to this area
    video_max_pixels: int = Limits.video_max_pixels  # the same for each frame of a clip
    num_frames: int = Limits.num_frames  # frames sampled from a clip
    # both
    data: str = ""  # JSONL of training pairs; default: turtle world
    media: str = ""  # folder that media paths are relative to; default: the folder of --data


def contact_sheet(pairs):
    """One example of each data set as a picture: what is shown on both sides, and what is learnt to write."""
    font, rows = ImageFont.load_default(18), []  # (lines, the pictures of both sides side by side)
    for number, name in enumerate(pairs.names):
        first = int(np.flatnonzero(pairs.dataset == number)[0])
        query, target = pairs[first][:2]
        lines = [name]
        for text in (*lines_of("query", query), *lines_of("target", target)):
            lines += wrapped(text, font, TEXT_WIDTH - 32)
        rows.append((lines, side_by_side([named("query", query, font), named("target", target, font)], GAP)))
    heights = [36 + max(LINE_HEIGHT * len(lines), pictures.height) for lines, pictures in rows]
    width = TEXT_WIDTH + max(pictures.width for _, pictures in rows)
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for (lines, pictures), height in zip(rows, heights):
        for i, line in enumerate(lines):
            colour = "#1f77b4" if i == 0 else "black"
            draw.text((16, top + 16 + LINE_HEIGHT * i), line, fill=colour, font=font)
        sheet.paste(pictures, (TEXT_WIDTH, top + 16))
        top += height
        draw.line((0, top - 1, sheet.width, top - 1), fill="#cccccc")
    return sheet


def lines_of(label, side):
    """What a side says, with <image> and <video> where they stand, and what its model learns to write."""
    words = "".join(value if kind == "text" else f"<{kind}>" for kind, value in side.parts if kind != "disc")
    lines = [f"{label}: {words}"]
    for what, text in (("rationale", side.rationale), ("answer", side.answer)):
        if text:
            lines.append(f"{label}'s {what}: {text}")
    return lines


def wrapped(text, font, width):
    """The whole text in lines of at most so many pixels, cut at a blank where a line has one."""
    text, lines = " ".join(text.split()), []

    def pixels(count):
        return font.getlength(text[:count])

    while text:
        end = max(1, bisect.bisect(range(len(text[:500]) + 1), width, key=pixels) - 1)
        if end < len(text):
            blank = text.rfind(" ", 0, end + 1)
            end = blank if blank > 0 else end
        lines.append(text[:end])
        text = text[end:].lstrip()
    return lines


def named(label, side, font):
    """The pictures of a side under its name; nothing where it has none."""
    pictures = pictures_of(side)
    if not pictures:
        return Image.new("RGB", (0, 0))
    row = side_by_side(pictures, 6)
    image = Image.new("RGB", (max(row.width, 80), LINE_HEIGHT + row.height), "white")
    ImageDraw.Draw(image).text((0, 0), label, fill="black", font=font)
    image.paste(row, (0, LINE_HEIGHT))
    return image


def side_by_side(images, gap):
    """Images in a row, each with so many white pixels behind it."""
    size = sum(image.width + gap for image in images), max(image.height for image in images)
    row, left = Image.new("RGB", size, "white"), 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def pictures_of(side):
    """The pictures and frames of a side, three times as large, but at most 240 pixels wide and high."""
    images = []
    for kind, value in side.parts:
        if kind == "image":
            images.append(load_image(value))
        elif kind == "video":
            images += load_frames(value, 8)
    return [ImageOps.scale(image, min(3, 240 / max(image.size)), Image.NEAREST) for image in images]


def bench(pairs, processor, workers, count):
    """Prints what the workers give a second: pictures and clips for themselves, pairs in batches of 4."""
    if workers < 0 or count < 8:
        raise DataError(f"--workers {workers}, --count {count}: needs at least 0 workers and 8 pairs")
    drawn = np.random.default_rng(0).permutation(len(pairs))[:count]
    parts = [part for i in drawn for side in pairs[i] for part in side.parts]
    print(f"{len(drawn)} pairs of {len(pairs.names)} data sets, {workers} workers, {os.cpu_count()} cores")
    for name, kind in (("pictures", "image"), ("clips", "video")):
        media = [value for of_kind, value in parts if of_kind == kind]
        read_one = functools.partial(processor.media, kind)
        measure(name, 1, DataLoader(media, batch_size=None, num_workers=workers, collate_fn=read_one))
    curriculum, size = Curriculum(), 4
    jobs = [(0, curriculum.stages[0], drawn[i : i + size]) for i in range(0, len(drawn) - size + 1, size)]
    batches = Batches(pairs, processor, curriculum)
    given = dict(num_workers=workers, sampler=jobs, collate_fn=pack)
    measure("pairs", size, DataLoader(batches, batch_size=None, **given))


def measure(name, size, loader):
    """Prints how many a second a loader gives; size: how many each of its items holds."""
    if len(loader) < 2:
        print(f"{name:8}  fewer than 2")
        return
    items = iter(tqdm(loader, desc=name, leave=False))
    next(items)  # workers have started
    begun = time.perf_counter()
    rate = sum(size for _ in items) / (time.perf_counter() - begun)
    print(f"{name:8}  {rate:9,.1f} a second  ({len(loader) * size} read)")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if bool(cfg.show) == cfg.bench:
        raise DataError("name a picture to write with --show sheet.png, or measure with --bench")
    pairs = Pairs(cfg.data, cfg.media or None) if cfg.data else World()
    if cfg.bench:
        limits = Limits(
            max_pixels=cfg.max_pixels, video_max_pixels=cfg.video_max_pixels, num_frames=cfg.num_frames)
        processor = Processor(train_tokenizer(pairs.texts(), SPECIAL), "", limits)
        return bench(pairs, processor, cfg.workers, cfg.count)
    sheet = contact_sheet(pairs)
    with writing(cfg.show, "wb") as f:
        sheet.save(f, "PNG")
    print(f"one example of each data set: {cfg.show}")


if __name__ == "__main__":
    command(main)
