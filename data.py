"""From files to batches: media, records, the prompt, collation, the batch schedule, retrieval tasks.

    media      load_image, load_frames     any picture or clip -> RGB Pillow images, limits checked before decoding
    pixels     patchify                    Qwen2-VL's resize rule and patch layout
    records    Pairs, parse_side           training JSONL, indexed by byte offset
    prompt     Processor.render            the one place where text, media and special tokens become ids
    batches    collate, Schedule, Batches  left-padded tensors; which records make which step
    tasks      read_task                   corpus.jsonl, queries.jsonl, qrels.tsv
    MMEB-V2    MMEB, read_published        its 78 tasks, from the published files
    world      World, world_tasks          turtle world, the default data: drawn on demand, no download
    look       contact_sheet, bench        python data.py --show sheet.png, --bench [--data pairs.jsonl]

Nothing here is skipped, replaced or cut silently: what cannot be used raises DataError, which names the file, the
record and the reason.
"""

import contextlib
import csv
import difflib
import fnmatch
import functools
import glob
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import secrets
import shlex
import shutil
import struct
import sys
import threading
import time
import warnings
from array import array
from dataclasses import dataclass, field, fields, replace

import av
import numpy as np
import tokenizers
import torch
import yaml
from huggingface_hub import metadata_load
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from curriculum import Curriculum, segment

PATCH, MERGE, TEMPORAL = 14, 2, 2  # Qwen2-VL: pixels a patch, patches a token side, frames a temporal patch
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, used by Qwen2-VL
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_PIXELS = 89_478_485  # of a stored picture or frame; Pillow only warns there, here it is an error


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `to_rgb` makes it an error
LOADING = threading.Lock()  # Pillow reads the file of a picture when it is first used; two threads may be given the same picture


class DataError(ValueError):
    """Bad input: the message says what was given, where, and what is needed."""


def said(error):
    """The message of an error; of one that a data worker raised, the last line of its traceback."""
    return str(error).strip().splitlines()[-1].removeprefix("data.DataError: ") if "Original Traceback" in str(error) else str(error)


def quote(value):
    """Somebody's data in a message: its repr, at most 200 characters of it."""
    text = repr(value[:200]) if isinstance(value, (str, bytes)) else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def nearest(name, known):
    """A hint for an unknown name: ' Did you mean ...?' and the known ones."""
    return f"{closest(name, known)} Known: {', '.join(map(str, known))}."


def closest(name, known):
    found = difflib.get_close_matches(str(name)[:200], [str(k)[:200] for k in known], 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def reason(error):
    """The first line of somebody else's error, at most 200 characters of it."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextlib.contextmanager
def write_errors(file):
    """Whatever is raised when a file cannot be written becomes an OSError that names it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have their own
        folder = os.path.dirname(os.path.abspath(file))
        full = os.path.isdir(folder) and shutil.disk_usage(folder).free < 1 << 20
        raise OSError(f"{file}: cannot be written: {'the disk is full' if full else reason(e)}") from e


@contextlib.contextmanager
def writing(path, mode="w"):
    """A new file that becomes `path` when the block ends well.  Its name is this call's own: nothing else is lost."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout
        with open(path, mode) as f:
            yield f
        return
    part = f"{path}.{secrets.token_hex(4)}.writing"
    try:
        with write_errors(path):
            with open(part, mode.replace("w", "x")) as f:
                yield f
            os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


# ------------------------------------------------------------------------------------------------------------- media


# What Pillow's and FFmpeg's readers raise on broken files, other than their own errors
DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, EOFError, struct.error, Image.DecompressionBombError,
                  Image.DecompressionBombWarning)
Image.init()
IMAGE_FORMATS = [f for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if f in Image.OPEN]  # others can start programs (EPS)
IMAGE_SUFFIXES = tuple(suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS)
PICTURE = (Image.Image, np.ndarray, bytes, bytearray, memoryview, io.IOBase)  # what a picture may be, besides a path
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")  # for a hint; any file may be a clip
VIDEO_OPTIONS = {"protocol_whitelist": "file",  # a playlist must not open other files or addresses
                 "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,flv,asf,ogg,h264,hevc,ivf,y4m"}


def load_image(source):
    """A path, Pillow image, array, bytes or open file -> RGB Pillow image, upright, on white where it was transparent.

    Animations give their first frame.  Raises DataError for anything unreadable, truncated, too large or not 8/16-bit.
    """
    try:
        source = as_image(source)
        if isinstance(source, Image.Image):
            with LOADING:
                return to_rgb(source)
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            return to_rgb(image)
    except DECODER_ERRORS as e:
        name = source if isinstance(source, (str, os.PathLike)) else quote(source)
        raise DataError(f"{name}: cannot be used as a picture: {e}") from e


def as_image(source):
    """An array (height, width, 3 or 4) of uint8, the bytes of a file, or a file open for reading -> Pillow image.

    What is a path or a Pillow image stays as it is.  Raises DataError, or one of DECODER_ERRORS.
    """
    if not isinstance(source, (str, os.PathLike, *PICTURE)):
        raise DataError(f"needs a path, Pillow image, array, bytes or open file, got {type(source).__name__}")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] not in (3, 4) or not source.size:
            raise DataError(f"an array of {source.dtype} with the shape {source.shape}; a picture is uint8, (height, "
                            "width, 3 or 4)")
        return Image.fromarray(source)
    if isinstance(source, io.IOBase):
        with LOADING:  # the same file may be given twice
            source.seek(0)
            source = source.read()
        if isinstance(source, str):
            raise DataError("a file that is open for text; open it with mode 'rb'")
    if isinstance(source, (bytes, bytearray, memoryview)):
        try:
            return Image.open(io.BytesIO(bytes(source)), formats=IMAGE_FORMATS)
        except UnidentifiedImageError as e:
            raise DataError(f"{len(source)} bytes that are no picture: they begin with {quote(bytes(source[:16]))}") from e
    return source


def clear_colour(image):
    """The one grey or colour that a PNG calls transparent, in the 8 bits to which Pillow scales pixels, or None.

    A file that is not read yet tells how many bits it has; Pillow does not scale this value.
    """
    value = image.info.get("transparency")
    bits = image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    if isinstance(value, int) and bits in ("L;2", "L;4"):
        return value * {"L;2": 85, "L;4": 17}[bits]
    if isinstance(value, tuple) and bits == "RGB;16B":
        return tuple(part >> 8 for part in value)
    return value


def to_rgb(image):
    if image.width * image.height == 0:
        raise DataError(f"{image.width}x{image.height} pixels: an empty picture")
    if image.width * image.height > MAX_PIXELS:  # before anything is decoded
        raise DataError(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS:,}")
    clear = clear_colour(image)
    try:
        image = ImageOps.exif_transpose(image)
    except (ValueError, TypeError, KeyError):  # a broken EXIF block says nothing about the pixels
        image.load()
    if image.mode in ("F", "I"):
        raise DataError("32-bit pixels have no fixed range; convert to 8 or 16 bit first")
    if image.mode.startswith("I;16"):  # 65535 -> 255
        grey = np.asarray(image)
        white = grey == (-1 if clear is None else clear)
        return Image.fromarray(np.where(white, 255, grey // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        if clear is not None:
            image.info["transparency"] = clear
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def frame_files(folder):
    """The paths of the pictures in a folder, in natural order."""
    names = [n for n in os.listdir(folder) if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
    names.sort(key=lambda n: [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", n)])
    return [os.path.join(folder, n) for n in names]


def load_frames(source, count):
    """A clip -> at most `count` RGB Pillow images, evenly spaced in time from the first frame to the last.

    source: a video file, a folder of frame files (natural order), or a list of what `load_image` takes.
    A clip with fewer frames gives all it has.  Frames of a file are shown as a player does: with the rotation and the
    aspect ratio that the file asks for.  Decoding keeps only the chosen frames in memory.
    """
    if count < 1:
        raise DataError(f"num_frames {count}: a clip needs at least 1")
    if isinstance(source, (list, tuple)) or os.path.isdir(source):
        frames = source
        if not isinstance(source, (list, tuple)):
            frames = frame_files(source)
        if not frames:
            raise DataError(f"{quote(source)}: a clip given as frames, but there is no frame in it")
        if len(frames) > count:
            frames = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, count)]
        return [load_image(f) for f in frames]
    try:
        return decode_frames(source, count)
    except DECODER_ERRORS as e:  # FFmpegError is an OSError or ValueError
        raise DataError(f"{source}: cannot be used as a video: {e}") from e


def decode_frames(source, count):
    with av.open(source, options=VIDEO_OPTIONS) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise DataError("no video track in this file")
        index, width, height = stream.index, stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise DataError(f"frames of {width}x{height} pixels, the limit is {MAX_PIXELS:,}")
        shape = display_size(width, height, stream.sample_aspect_ratio)
        # First pass, headers only: when is each frame shown?  What is in front of the first key frame, in the file or
        # on the screen, hangs on frames that are not there.  (Empty packets flush; discarded ones are never shown.)
        packets = [(p.pts, p.duration or 0, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
        first = next((n for n, (_, _, key, _) in enumerate(packets) if key), 0)
        start = packets[first][0] if packets else None
        shown = [(pts, duration) for pts, duration, _, discard in packets[first:] if not discard]
        timed = start is not None and all(pts is not None for pts, _ in shown)
        packets = [(pts, duration) for pts, duration in shown if not timed or pts >= start]
        if not packets:
            raise DataError("no frames in the video track")
        stamps = sorted(pts for pts, _ in packets) if timed else list(range(len(packets)))
        if timed and container.duration and not container.streams.audio:
            end, promised = float(max(map(sum, packets)) * stream.time_base), container.duration / av.time_base
            if end < 0.8 * promised:
                warnings.warn(f"{source}: {promised:.1f} s promised, but the frames end after {end:.1f} s (cut off?); using these")
    wanted = stamps if len(stamps) <= count else np.linspace(stamps[0], stamps[-1], count)
    frames, before = [], None  # before: (stamp, frame) decoded last

    def take(frame):
        image = frame.to_image()
        if shape != (width, height):
            image = image.resize(shape, Image.BICUBIC)
        return to_rgb(image.rotate(frame.rotation, expand=True))  # phones store frames sideways

    with av.open(source, options=VIDEO_OPTIONS) as container:
        encoded = (p for p in container.demux(container.streams[index]) if p.size or p.dts is None)  # the last flushes
        decoded = (frame for packet in itertools.islice(encoded, first, None) for frame in packet.decode())
        for i, frame in enumerate(decoded):
            stamp = frame.pts if timed and frame.pts is not None else i
            if timed and stamp < start:
                continue
            if frame.is_corrupt:
                raise DataError(f"frame {i} is corrupt")
            while len(frames) < len(wanted) and stamp >= wanted[len(frames)]:  # the nearer of the two around it
                target = wanted[len(frames)]
                frames.append(take(before[1] if before and target - before[0] < stamp - target else frame))
            before = stamp, frame
            if len(frames) == len(wanted):
                break
    if before is None:
        raise DataError("no frames could be decoded")
    return frames + [take(before[1])] * (len(wanted) - len(frames))  # times behind the last decoded frame: that one


def display_size(width, height, aspect):
    """Size at which stored frames are shown.  aspect: of one pixel, width : height, or None; the smaller side grows."""
    aspect = float(aspect or 1)
    if not 1 / 200 < aspect < 200 or width * height * max(aspect, 1 / aspect) > MAX_PIXELS:
        raise DataError(f"frames of {width}x{height} pixels, each {aspect:g} times as wide as it is high: too large when "
                        "shown")
    return (round(width * aspect), height) if aspect >= 1 else (width, round(height / aspect))


# ------------------------------------------------------------------------------------------------------------ pixels


def target_size(width, height, min_pixels, max_pixels):
    """Qwen2-VL's resize rule: sides to multiples of 28, area between the limits, shape kept.  -> (width, height)"""
    if min(width, height) < 1:
        raise DataError(f"a picture of {width}x{height} pixels: needs at least 1x1")
    if max_pixels < (PATCH * MERGE) ** 2:
        raise DataError(f"max_pixels {max_pixels}: needs at least {(PATCH * MERGE) ** 2}, one token")
    if max(width, height) > 200 * min(width, height):
        raise DataError(f"a picture of {width}x{height} pixels: sides differ by more than 200 to 1, crop or pad it")
    unit = PATCH * MERGE
    h, w = round(height / unit) * unit, round(width / unit) * unit
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / unit) * unit for side in (height, width))
    return w, h


def patchify(frames, min_pixels, max_pixels):
    """RGB Pillow images of one picture (1) or clip (any number) -> patches (t*h*w, 1176) float32 and the grid (t, h, w).

    The order is Qwen2-VL's: the four patches of a 2x2 token stand together; a patch is (channel, 2 frames, 14, 14).
    Frames of another size take the first one's; an odd last frame is repeated.
    """
    size = target_size(*frames[0].size, min_pixels, max_pixels)
    arrays = [np.asarray(f if f.size == size else f.resize(size, Image.BICUBIC)) for f in frames]
    arrays += arrays[-1:] * (-len(arrays) % TEMPORAL)
    t, h, w = len(arrays) // TEMPORAL, size[1] // PATCH, size[0] // PATCH
    x = np.stack(arrays).reshape(t, TEMPORAL, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3, -1)  # (t, h/2, w/2, 2, 2 | 3 | 2, 14, 14)
    x = (x.astype(np.float32) * np.float32(1 / 255) - MEAN[:, None]) / STD[:, None]
    return x.reshape(t * h * w, -1), (t, h, w)


# ----------------------------------------------------------------------------------------------------------- records


@dataclass
class Side:
    """One side of a pair, or one item to embed: a list of ("text" | "image" | "video" | "disc", value) and the target."""

    parts: list
    rationale: str = ""
    answer: str = ""
    where: str = "item"  # file and record, for errors

    def key(self):
        """Equal for sides with the same text and media: what makes two targets the same target."""
        return repr([(kind, value if isinstance(value, (str, list)) else id(value)) for kind, value in self.parts])


ALIASES = {"images": "image", "videos": "video"}
RECORD_KEYS, SIDE_KEYS = ("dataset_name", "qry", "pos"), ("conversations", "image", "images", "video", "videos")
TURN_KEYS, ITEM_KEYS = ("from", "value", "role", "content"), ("text", "image", "video")


def only_keys(raw, known, where):
    for key in raw:
        if key not in known:
            raise DataError(f"{where}: unknown key {quote(key)}.{nearest(key, known)}")


def parse_side(raw, root, where):
    """`qry` or `pos` of a training record -> Side.  root: folder of the media; where: "file: record n: qry" for errors."""
    if isinstance(raw, list) and len(raw) == 1:  # seen in the wild
        raw = raw[0]
    if not isinstance(raw, dict):
        raise DataError(f"{where}: needs an object with 'conversations', got {type(raw).__name__}")
    only_keys(raw, SIDE_KEYS, where)
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'conversations' must be a list of turns")
    said = {}
    for turn in turns:
        who = text = None
        if isinstance(turn, dict):
            only_keys(turn, TURN_KEYS, f"{where}: a turn")
            who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
            who = {"user": "human", "assistant": "gpt"}.get(str(who), who)
        if who not in ("human", "gpt") or not isinstance(text, str) or len(turn) != 2:
            raise DataError(f"{where}: a turn needs 'from' ('human' or 'gpt') and a text 'value', got {quote(turn)}")
        if who in said:
            raise DataError(f"{where}: more than one {who!r} turn; one question and one answer make a side")
        said[who] = printable(text, where)
    if "human" not in said:
        raise DataError(f"{where}: no 'human' turn")
    media = {"image": [], "video": []}
    for key, value in raw.items():
        kind = ALIASES.get(key, key)
        if kind in media and value not in (None, []):
            if media[kind]:
                raise DataError(f"{where}: both {kind!r} and {kind + 's'!r} are given")
            media[kind] = value if isinstance(value, list) and key != "video" else [value]
    for kind, given in media.items():
        if said["human"].count(f"<{kind}>") != len(given):
            raise DataError(f"{where}: {said['human'].count(f'<{kind}>')} <{kind}> in the text, {len(given)} {kind} given")
    parts = place(said["human"], media, root, where, disc=True)
    if sum(kind == "disc" for kind, _ in parts) > 1:
        raise DataError(f"{where}: more than one <disc_emb> in the text")
    return Side(parts, *parse_target(said.get("gpt", ""), where), where)


def place(text, media, root, where, disc=False):
    """Text with markers -> parts: each <image>, <video> takes the next of its kind in media.

    disc: <disc_emb> is a marker, too.  A line break directly behind a medium's marker belongs to the marker: published
    records have one there, an item that is {"image", "text"} has none, and both give the same parts.  In front of
    <disc_emb> it is the prompt's.
    """
    kinds = "|".join(media)
    text = re.sub(rf"(<(?:{kinds})>)\r?\n(?!<disc_emb>)", r"\1", text)
    queue, parts = {kind: iter(given) for kind, given in media.items()}, []
    for piece in re.split(rf"(<(?:{kinds})>{'|<disc_emb>' if disc else ''})", text):
        kind = piece[1:-1]
        if kind in media and piece == f"<{kind}>":
            parts.append((kind, resolve(next(queue[kind]), kind, root, where)))
        elif disc and piece == "<disc_emb>":
            parts.append(("disc", None))
        elif piece:
            parts.append(("text", piece))
    return parts


def printable(text, where):
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where}: the text is not valid Unicode: {e}") from e
    return text


def parse_target(text, where):
    """The gpt turn -> (rationale, answer).  Without tags the whole text is the answer."""
    found = {}
    for tag in ("think", "answer"):
        match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        if not match and (f"<{tag}>" in text or f"</{tag}>" in text):
            raise DataError(f"{where}: <{tag}> is opened or closed only once in {quote(text)}")
        found[tag] = match.group(1).strip() if match else None
        text = text.replace(match.group(0), "", 1) if match else text
    rest = text.replace("<gen_emb>", "").strip()
    if found["answer"] is not None and rest:
        raise DataError(f"{where}: text outside <think> and <answer>: {quote(rest)}")
    return found["think"] or "", rest if found["answer"] is None else found["answer"]


def parse_item(item, root="", where="item"):
    """An item to embed -> Side.  item: a string, a picture, or {"text"?, "image"?, "video"?}.

    image: a path, Pillow image, array (height, width, 3 or 4) of uint8, the bytes of a file or an open file, or a list
    of these; video: a path, a folder of frames, or a list of frames, each as an image.  A bare Pillow image, Path or
    array is a picture.  Media stand in front of the text, unless the text says where with one <image> (<video>) for each.
    """
    if isinstance(item, (Image.Image, np.ndarray, os.PathLike)):
        item = {"image": item}
    if isinstance(item, str):
        return Side([("text", printable(item, where))], where=where)
    if not isinstance(item, dict) or all(v is None for v in item.values()):
        raise DataError(f"{where}: needs a string, a picture or an object with some of {ITEM_KEYS}, got {quote(item)}")
    only_keys(item, ITEM_KEYS, where)
    text, image, video = (item.get(k) for k in ITEM_KEYS)
    if not isinstance(text, (str, type(None))):
        raise DataError(f"{where}: 'text' must be a string, got {type(text).__name__}")
    if isinstance(image, (list, tuple)) and not image:
        raise DataError(f"{where}: 'image' is an empty list")
    media = {"image": list(image) if isinstance(image, (list, tuple)) else [] if image is None else [image],
             "video": [] if video is None else [video]}
    front, marked, text = [], {}, printable(text or "", where)
    for kind, given in media.items():
        n = text.count(f"<{kind}>")
        if given and n not in (0, len(given)):
            raise DataError(f"{where}: {n} <{kind}> in the text, {len(given)} {kind} given")
        if given and n:
            marked[kind] = given
        else:
            front += [(kind, resolve(m, kind, root, where)) for m in given]
    return Side(front + (place(text, marked, root, where) if marked else [("text", text)]), where=where)


def resolve(source, kind, root, where):
    """A medium (kind: image, video or a frame of one) -> a path under the root, a Pillow image, or a list of these."""
    if isinstance(source, PICTURE) and kind != "video":
        try:
            return as_image(source)
        except DECODER_ERRORS as e:
            raise DataError(f"{where}: {kind}: {e}") from e
    if isinstance(source, (list, tuple)) and kind == "video" and source:
        return [resolve(frame, "frame", root, where) for frame in source]
    if not isinstance(source, (str, os.PathLike)):
        what = "path or a list of frames" if kind == "video" else "path (or a Pillow image, array, bytes or open file)"
        raise DataError(f"{where}: {kind} needs a {what}, got {type(source).__name__}")
    name = os.fsdecode(source)
    if not name:
        raise DataError(f"{where}: {kind} is an empty path")
    path = os.path.join(root, name)
    if not os.path.isfile(path) and not (kind == "video" and os.path.isdir(path)):
        raise DataError(f"{where}: {kind} {quote(name)} does not exist under {os.fspath(root) or '.'!r}")
    return path


class Pairs:
    """The training pairs of one file, by byte offset: the file itself is never in memory.

    path: JSON lines, or one JSON array of the same objects; media: folder of the media, default the file's own.
    Every record is parsed once here, so that a bad one is found before training: an error, or with skip_bad a line in
    `self.bad`.  Arrays over the N good records: dataset (index into `names`), target (hash: equal targets, equal hash).
    """

    def __init__(self, path, media=None, skip_bad=False, progress=True):
        self.path, self.media, self.bad = path, media or os.path.dirname(os.path.abspath(path)), []
        spans, dataset, target, number = array("q"), array("i"), array("q"), array("q")
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file; --data takes a JSONL of training pairs")
        ids, digest = {}, hashlib.blake2b(digest_size=8)
        with open(path, "rb") as f, tqdm(total=os.path.getsize(path), desc="reading pairs", unit="B", unit_scale=True, leave=False, disable=not progress) as bar:
            for n, (start, end, text) in enumerate(spans_of(f, path), 1):
                bar.update(end - start)
                try:
                    raw = parse_json(text, f"{path}: record {n}")
                    _, pos = self.parse(raw, n)
                except DataError as e:
                    if not skip_bad:
                        raise
                    self.bad.append(str(e))
                    continue
                spans.extend((start, end))
                number.append(n)
                digest.update(text)
                dataset.append(ids.setdefault(raw["dataset_name"], len(ids)))
                target.append(int.from_bytes(hashlib.blake2b(pos.key().encode(), digest_size=8).digest(), "little", signed=True))
        self.digest = digest.hexdigest()
        self.names, self.dataset, self.target = list(ids), np.array(dataset, np.int32), np.array(target, np.int64)
        self.spans, self.number = np.array(spans, np.int64).reshape(-1, 2), np.array(number, np.int64)
        if not len(self):
            raise DataError(f"{path}: no training pair in this file" + (f"; {len(self.bad)} bad records, the first: {self.bad[0]}" if self.bad else ""))

    def __len__(self):
        return len(self.spans)

    def parse(self, raw, n):
        where = f"{self.path}: record {n}"
        if not isinstance(raw, dict):
            raise DataError(f"{where}: needs an object, got {type(raw).__name__}")
        only_keys(raw, RECORD_KEYS, where)
        for key in RECORD_KEYS:
            if key not in raw:
                raise DataError(f"{where}: no {key!r}; a record has {', '.join(RECORD_KEYS)}")
        if not isinstance(raw["dataset_name"], str):
            raise DataError(f"{where}: 'dataset_name' must be a string")
        return tuple(parse_side(raw[k], self.media, f"{where}: {k}") for k in ("qry", "pos"))

    def texts(self):
        """Every text of the file, for training a tokenizer."""
        return (v for i in range(len(self)) for s in self[i] for v in (*(p for k, p in s.parts if k == "text"), s.rationale, s.answer))

    def __getitem__(self, i):
        """-> (query Side, target Side)"""
        with open(self.path, "rb") as f:
            f.seek(self.spans[i, 0])
            text = f.read(int(self.spans[i, 1] - self.spans[i, 0]))
        return self.parse(parse_json(text, f"{self.path}: record {self.number[i]}"), self.number[i])


def parse_json(text, where):
    def no_key_twice(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{where}: the key {quote(twice)} stands twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=no_key_twice)
    except DataError:
        raise
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON: {e}") from e


def spans_of(f, path):
    """(start, end, bytes) of every record in an open binary file: JSON lines, or the objects of one JSON array.

    A file that starts with [ is read whole.
    """
    blank = b"\xef\xbb\xbf \t\r\n"
    while (head := f.read(4096)) and not head.strip(blank):
        pass
    is_array = head.lstrip(blank)[:1] == b"["
    f.seek(0)
    if not is_array:
        start = 0
        for line in f:
            if text := line.strip(blank):
                yield start, start + len(line), text
            start += len(line)
        return
    raw = f.read()
    text = raw.decode("latin-1")  # a character is a byte, and what JSON is made of is ASCII
    broken = f"{path}: a file that starts with [ must be one JSON array of objects; it is not, at byte "
    at, gap, decoder = text.index("[") + 1, re.compile(r"[ \t\r\n]*"), json.JSONDecoder()
    first = True
    while True:
        at = gap.match(text, at).end()
        if text[at : at + 1] == "]" and text[at + 1 :].strip(blank.decode("latin-1")) == "":
            return
        if not first:
            if text[at : at + 1] != ",":
                raise DataError(f"{broken}{at}")
            at = gap.match(text, at + 1).end()
        if text[at : at + 1] != "{":
            raise DataError(f"{broken}{at}")
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{broken}{at}: {e}") from e
        yield at, end, raw[at:end]
        at, first = end, False


# ------------------------------------------------------------------------------------------------------------ prompt

QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>")
PLUME_TOKENS = ("<gen_emb>", "<disc_emb>", "<bot>", "<eot>", "<ct>")  # <ct> is the released code's placeholder; unused here

# The chat template: everything that stands around an item.  A checkpoint carries its own in the `plume` block.
TEMPLATE = dict(
    system="You are a helpful assistant.",
    turns="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{item}<|im_end|>\n"
          "<|im_start|>assistant\n<think><bot>",
    anchor="\n<disc_emb>\n{prompt}",  # ends the item, unless a record writes <disc_emb> itself; the prompt follows it
    closing="</think>\n",  # between <eot> and <gen_emb>, which end the thought and the whole
    answer="<answer>{answer}</answer>\n",  # behind the closing, as long as the curriculum writes it
)
NEEDED = dict(turns=("{item}", "<bot>"), anchor=("<disc_emb>",), answer=("{answer}",))  # once each


def fixed_strings(template):
    """What a template writes around every item, between special tokens and places that are filled in."""
    turns = template["turns"].replace("{system}", template["system"])
    text = "{}".join([turns, template["closing"], template["answer"]])
    return [piece for piece in re.split(r"<\|\w+\|>|<bot>|\{\w*\}", text) if piece.strip()]


def train_tokenizer(texts, whole=(), size=8192):
    """A byte-level BPE of at most `size` entries, split like Qwen2's, with all special tokens; strings of `whole` are one token."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.normalizer = tokenizers.normalizers.NFC()
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[*QWEN_TOKENS, *PLUME_TOKENS], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(texts, trainer)
    t.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in whole])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@dataclass
class Limits:
    """Pixel and token limits.  They belong to the checkpoint: an embedding is only comparable under the same ones."""

    min_pixels: int = 56 * 56  # a picture is scaled up to this area
    max_pixels: int = 28 * 28 * 1280  # and down to this one
    video_min_pixels: int = 56 * 56  # the same for each frame of a clip
    video_max_pixels: int = 28 * 28 * 32
    num_frames: int = 8  # frames sampled from a clip
    max_len: int = 8192  # tokens in one sequence: prefix and suffix, in training also the latent steps

    def __post_init__(self):
        for name, value in vars(self).items():
            least = (PATCH * MERGE) ** 2 if name in ("max_pixels", "video_max_pixels") else 1  # one token
            if type(value) is not int or value < least:
                raise DataError(f"{name} {quote(value)}: needs a whole number of at least {least}")
        for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
            if vars(self)[low] > vars(self)[high]:
                raise DataError(f"{low} {vars(self)[low]} is above {high} {vars(self)[high]}")


class Processor:
    """Tokenizer, prompt, limits and chat template: everything between an item and the model's ids."""

    def __init__(self, tokenizer, prompt, limits, white_image=False, template=TEMPLATE):
        self.tokenizer, self.prompt, self.limits, self.white_image = tokenizer, prompt, limits, white_image
        self.template = template
        for name, needed in NEEDED.items():
            if wrong := [piece for piece in needed if template[name].count(piece) != 1]:
                raise DataError(f"the template's {name!r} must have {wrong[0]!r} once, it is {quote(template[name])}")
        if not template["turns"].endswith("<bot>"):
            raise DataError("the template's 'turns' must end in '<bot>', where the thought begins: "
                            + quote(template["turns"]))
        before, behind = template["turns"].split("{item}")
        self.before = before.replace("{system}", template["system"])
        self.behind = behind.replace("{system}", template["system"])
        # a copy that reads special tokens in a user's text as plain characters; ours are added by id
        self.backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.encode_special_tokens = True
        self.known = {}
        self.id = {t: self.backend.token_to_id(t) for t in QWEN_TOKENS + PLUME_TOKENS}
        if missing := [t for t, i in self.id.items() if i is None]:
            needed = " ".join(QWEN_TOKENS + PLUME_TOKENS)
            raise DataError(f"the tokenizer has no {' '.join(missing)}; PLUME needs all of {needed}")

    def __reduce__(self):  # the copy's setting does not survive pickling to a worker: make it anew there
        return Processor, (self.tokenizer, self.prompt, self.limits, self.white_image, self.template)

    def pieces(self, text, tokens=QWEN_TOKENS + PLUME_TOKENS):
        """A text of ours -> its special tokens as ids, and what is between them as strings."""
        found = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
        return [self.id[piece] if piece in tokens else piece for piece in found]

    def encode(self, text):
        """Text -> token ids.  What was encoded lately is remembered: the prompt around every item is the same."""
        ids = self.known.get(text)
        if ids is None:
            ids = self.backend.encode(text, add_special_tokens=False).ids if text else []
            if len(self.known) >= 4096:
                self.known = {}
            self.known[text] = ids
        return ids

    def media(self, kind, source):
        limits = self.limits
        try:
            if kind == "image":
                return patchify([load_image(source)], limits.min_pixels, limits.max_pixels)
            return patchify(load_frames(source, limits.num_frames), limits.video_min_pixels, limits.video_max_pixels)
        except DataError as e:
            named = not isinstance(source, (str, os.PathLike)) or str(source) in str(e)
            raise DataError(str(e) if named else f"{source}: {e}") from e

    def render(self, side, stage=None, curriculum=None):
        """The one prompt of training, evaluation and `encode`: a Side -> ids, positions, pixels, suffix.

        Without a stage the suffix is inference's: <eot>, the template's closing, <gen_emb>.  With one, it is the
        curriculum's text for that stage; a rationale too long for `max_len` loses its end (counted in "cut"), and nothing else ever does.
        Raises DataError when question and media alone are too long, or a medium cannot be read.
        """
        t, parts = self.id, list(side.parts)
        if self.white_image and not any(kind in ("image", "video") for kind, _ in parts):
            parts = [("image", Image.new("RGB", (28, 28), "white")), *parts]  # the released text-only form
        if not any(kind == "disc" for kind, _ in parts):
            end, prompt = self.template["anchor"].split("<disc_emb>")
            parts += [("text", end), ("disc", None), ("text", prompt.replace("{prompt}", self.prompt))]
        seq = self.pieces(self.before)
        for i, (kind, value) in enumerate(parts):
            if kind == "text" and i and parts[i - 1][0] == "disc":  # the prompt: the released one names <gen_emb>, as a token
                seq += self.pieces(value, ("<gen_emb>",))
            elif kind == "text":
                seq.append(value)
            elif kind == "disc":
                seq.append(t["<disc_emb>"])
            else:
                seq += [t["<|vision_start|>"], (kind, value), t["<|vision_end|>"]]
        seq += self.pieces(self.behind)

        ids, positions, pixels, grids, nxt, text = [], [], [], [], 0, ""
        for token in seq + [None]:
            if isinstance(token, str):
                text += token  # neighbouring texts are tokenized as one
                continue
            run = self.encode(text) + ([token] if isinstance(token, int) else [])
            text = ""
            ids += run
            positions.append(np.broadcast_to(np.arange(nxt, nxt + len(run)), (3, len(run))))
            nxt += len(run)
            if isinstance(token, tuple):
                kind, source = token
                try:
                    patches, (gt, gh, gw) = self.media(kind, source)
                except DataError as e:
                    raise DataError(f"{side.where}: {e}") from e
                h, w = gh // MERGE, gw // MERGE
                ids += [t[f"<|{kind}_pad|>"]] * (gt * h * w)
                positions.append(np.indices((gt, h, w)).reshape(3, -1) + nxt)  # M-RoPE: time, row, column
                nxt += max(gt, h, w)  # text goes on behind the largest position of any axis: Qwen2-VL's own rule
                pixels.append(patches)
                grids.append((gt, gh, gw))

        K = stage.latent_steps if stage else 0
        replaced = [self.encode(text)[:1] for text in segment(side.rationale, curriculum.segments)[: stage.index]] if K else []
        rest, answer = curriculum.rewrite(side.rationale, side.answer, stage) if stage else ("", "")
        lead = self.template["closing"] + self.template["answer"].split("{answer}")[0]
        closing = self.template["closing"] + (self.template["answer"].replace("{answer}", answer) if answer else "")
        before_answer = sum(a == b for a, b in zip(self.encode(lead), self.encode(closing)))
        rest, closing = self.encode(rest), self.encode(closing)
        room = self.limits.max_len - len(ids) - K - 2 - len(closing)
        if room < 0:
            raise DataError(f"{side.where}: {len(ids)} tokens of question and media and {K + 2 + len(closing)} behind them exceed "
                            f"max_len {self.limits.max_len}; raise max_len, or lower max_pixels or num_frames")
        kept, eot = rest[:room], [t["<eot>"]]
        suffix = (eot + kept if curriculum and curriculum.rest_of_rationale == "after" else kept + eot) + closing + [t["<gen_emb>"]]
        first = int(suffix[0] == t["<eot>"]) + (0 if kept else before_answer)
        return dict(ids=ids, positions=np.concatenate(positions, 1), disc=ids.index(t["<disc_emb>"]), pixels=pixels,
                    grids=grids, suffix=suffix, cut=len(rest) - len(kept), first=first if side.rationale else None,
                    replaced=[(i * curriculum.steps_per_segment, token) for i, tokens in enumerate(replaced) for token in tokens])


# ----------------------------------------------------------------------------------------------------------- batches


def collate(samples, processor):
    """Rendered samples -> one batch of tensors, prefixes padded on the left, suffixes on the right.

    ids (B, P), positions (3, B, P), lengths (B,), disc (B,), suffix (B, T), gen (B,) column of <gen_emb>;
    media (M,) flat places of the M media tokens in (B, P), pixels and grid of all media in that order (or None);
    label_at (N,) flat places in (B, T), labels (N,), first (n,) rows of label_at that are the first token that can be
    wrong: of the rationale that is left, or else of the answer, in rows that have a rationale;
    replaced (m, 3): row, latent step and token, where a step stands for a part of the rationale: its first token.
    """
    B, P = len(samples), max(len(s["ids"]) for s in samples)
    T = max(len(s["suffix"]) for s in samples)
    pad = processor.id["<|endoftext|>"]
    ids, suffix = torch.full((B, P), pad), torch.full((B, T), pad)
    positions = torch.zeros(3, B, P, dtype=torch.long)
    label_at, labels, first, replaced = [], [], [], []
    for b, s in enumerate(samples):
        n, m = len(s["ids"]), len(s["suffix"])
        ids[b, P - n :] = torch.tensor(s["ids"])
        positions[:, b, P - n :] = torch.from_numpy(s["positions"])
        suffix[b, :m] = torch.tensor(s["suffix"])
        if s.get("labelled", True):
            first += [len(labels) + s["first"]] if s["first"] is not None else []
            replaced += [(b, step, token) for step, token in s["replaced"]]
            label_at += range(b * T, b * T + m)
            labels += s["suffix"]
    lengths = torch.tensor([len(s["ids"]) for s in samples])
    pixels = [torch.from_numpy(p) for s in samples for p in s["pixels"]]
    is_media = (ids == processor.id["<|image_pad|>"]) | (ids == processor.id["<|video_pad|>"])
    return dict(ids=ids, positions=positions, lengths=lengths, disc=torch.tensor([s["disc"] for s in samples]) + P - lengths,
                suffix=suffix, gen=torch.tensor([len(s["suffix"]) - 1 for s in samples]),
                media=is_media.flatten().nonzero()[:, 0], pixels=torch.cat(pixels) if pixels else None,
                grid=torch.tensor([g for s in samples for g in s["grids"]]) if pixels else None,
                label_at=torch.tensor(label_at, dtype=torch.long), labels=torch.tensor(labels, dtype=torch.long),
                first=torch.tensor(first, dtype=torch.long), replaced=torch.tensor(replaced, dtype=torch.long).view(-1, 3))


class Schedule:
    """Which records make which step: a pure function of (seed, step), so workers, ranks and resumed runs agree.

    Every global batch comes from one data set (its other rows are hard negatives).  A data set gets steps in proportion
    to its size, spread over the whole run, and passes through all its records before it shows one again.
    dataset (pairs,): number of each record's data set, -1: held out.
    """

    def __init__(self, dataset, names, global_batch, steps, seed):
        self.rows = [np.flatnonzero(dataset == d) for d in range(len(names))]
        self.global_batch, self.steps, self.seed = global_batch, steps, seed
        share = np.array([len(r) for r in self.rows])
        share = share / share.sum() * steps
        self.counts = np.floor(share).astype(int)
        for d in np.argsort(self.counts - share, kind="stable")[: steps - self.counts.sum()]:  # largest remainders
            self.counts[d] += 1
        which = np.repeat(np.arange(len(names)), self.counts)
        nth = np.concatenate([np.arange(c) for c in self.counts])
        at = (nth + np.random.default_rng([seed, 0]).random(steps)) / self.counts[which]
        order = np.argsort(at, kind="stable")
        self.which, self.nth, self.laps = which[order], nth[order], {}  # laps: the permutations used last, by data set

    def __getitem__(self, step):
        """-> the record numbers of this step's global batch"""
        d, size = int(self.which[step]), self.global_batch
        place = np.arange(self.nth[step] * size, (self.nth[step] + 1) * size)
        rows, old = self.rows[d], self.laps.get(d, {})
        self.laps[d] = {lap: old[lap] if lap in old else np.random.default_rng([self.seed, 1, d, lap]).permutation(rows)
                        for lap in (place // len(rows)).tolist()}
        return np.array([self.laps[d][lap][i] for lap, i in zip(*np.divmod(place, len(rows)))])


class StepSampler(torch.utils.data.Sampler):
    """(step, stage, indices of this rank) from `start` on: the stage travels with the indices, so a worker that
    prefetches ahead always writes the text of the right one."""

    def __init__(self, schedule, progress, start=0, rank=0, world=1):
        self.schedule, self.progress, self.start, self.rank, self.rows = schedule, progress, start, rank, schedule.global_batch // world

    def __iter__(self):
        for step in range(self.start, self.schedule.steps):
            yield step, self.progress.stage(step), self.schedule[step][self.rank * self.rows : (self.rank + 1) * self.rows]

    def __len__(self):
        return self.schedule.steps - self.start


class Batches(torch.utils.data.Dataset):
    """(step, stage, indices) -> a batch of B pairs, collated in micro-batches.

    micro: list of collated batches of up to `micro_batch` queries followed by their targets (0: all B in one);
    step, dataset (name), stage, target (B,) hashes, valid (B,), cut (rationale tokens lost to max_len) and bad: with
    skip_bad a record whose media cannot be read is named there and left out of every loss.
    """

    def __init__(self, pairs, processor, curriculum, skip_bad=False, micro_batch=0):
        self.pairs, self.processor, self.curriculum, self.skip_bad, self.micro_batch = pairs, processor, curriculum, skip_bad, micro_batch

    def __getitem__(self, job):
        step, stage, indices = job
        rows, bad = [], []
        for i in indices:
            try:
                rows.append([self.processor.render(side, stage, self.curriculum) for side in self.pairs[i]])
            except DataError as e:
                if not self.skip_bad:
                    raise
                bad.append(str(e))
                blank = self.processor.render(Side([("text", "")]), stage, self.curriculum)
                rows.append([dict(blank, labelled=False)] * 2)
        parts = [rows[i : i + (self.micro_batch or len(rows))] for i in range(0, len(rows), self.micro_batch or len(rows))]
        return dict(micro=[collate([query for query, _ in part] + [target for _, target in part], self.processor) for part in parts],
                    step=step, dataset=self.pairs.names[self.pairs.dataset[indices[0]]], stage=stage, bad=bad,
                    target=torch.from_numpy(self.pairs.target[indices]), cut=sum(side["cut"] for row in rows for side in row),
                    valid=torch.tensor([query.get("labelled", True) for query, _ in rows]))


def to_device(batch, device):
    """The grid stays on the CPU: the vision tower reads its numbers, and would wait for the device in every layer."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) and k != "grid" else v for k, v in batch.items()}


# ------------------------------------------------------------------------------------------------------------- tasks


@dataclass
class Task:
    """A retrieval task: items to encode, and for query i the graded relevant documents {corpus row: gain}."""

    name: str
    queries: list  # Side
    corpus: list  # Side
    relevant: list  # one dict a query
    candidates: list  # for each query its list of corpus rows, or None: the whole corpus
    query_ids: list
    metric: str = "hit@1"  # the one that is reported
    about: dict = field(default_factory=dict)  # where it comes from
    bad: list = field(default_factory=list)  # what was left out, and why


def qrels_file(folder):
    """The judgements of a task: ours, or where BEIR's own archives have them; None when there is neither."""
    places = (os.path.join(folder, "qrels.tsv"), os.path.join(folder, "qrels", "test.tsv"))
    return next((path for path in places if os.path.isfile(path)), None)


def list_tasks(root):
    """All "<meta-task>/<dataset>" below root that hold a qrels.tsv, sorted."""
    if not os.path.isdir(root):
        raise DataError(f"--data {root!r}: no such folder; it must hold <meta-task>/<dataset>/corpus.jsonl, queries.jsonl, qrels.tsv")
    found = [f"{m}/{d}" for m in sorted(os.listdir(root)) if os.path.isdir(os.path.join(root, m))
             for d in sorted(os.listdir(os.path.join(root, m))) if qrels_file(os.path.join(root, m, d))]
    if not found:
        raise DataError(f"--data {root!r}: no <meta-task>/<dataset>/qrels.tsv below it")
    return found


def read_task(root, name):
    """Read one task in the BEIR layout with media.  Raises DataError naming file and line for anything that is off.

    BEIR's own files are read as its loader does: a document's title stands in front of its text, `metadata` is not used,
    and of queries.jsonl only those count that qrels/test.tsv judges.
    """
    folder = os.path.join(root, name)

    def items(file, more):  # -> {id: row}, [Side], [raw object]; more: the key that only this file has
        path, rows, sides, raws = os.path.join(folder, file), {}, [], []
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file; a task needs corpus.jsonl, queries.jsonl and qrels.tsv")
        with open(path, "rb") as f:
            for n, (_, _, text) in enumerate(spans_of(f, path), 1):
                raw = parse_json(text, where := f"{path}: record {n}")
                if not isinstance(raw, dict) or "_id" not in raw:
                    raise DataError(f"{where}: needs an object with '_id'")
                if rows.setdefault(str(raw["_id"]), len(rows)) != len(sides):
                    raise DataError(f"{where}: the id {quote(raw['_id'])} stands there twice")
                item = {k: v for k, v in raw.items() if k not in ("_id", "metadata", more)}
                if more == "title" and "title" in raw:
                    words = raw["title"] or "", item.get("text") or ""
                    if not all(isinstance(word, str) for word in words):
                        raise DataError(f"{where}: 'title' and 'text' must be strings")
                    item["text"] = " ".join(words).strip()
                sides.append(parse_item(item, root, where))
                raws.append(raw)
        if not sides:
            raise DataError(f"{path}: no record in this file")
        return rows, sides, raws

    corpus_row, corpus, _ = items("corpus.jsonl", "title")
    query_row, queries, raws = items("queries.jsonl", "candidates")
    path = qrels_file(folder) or os.path.join(folder, "qrels.tsv")
    judged = read_qrels(path, query_row, corpus_row)
    relevant, candidates, kept = [], [], []
    for row, (side, raw) in enumerate(zip(queries, raws)):
        if row not in judged and not path.endswith("qrels.tsv"):
            continue
        gold, rows = {doc: gain for doc, gain in judged.get(row, {}).items() if gain > 0}, raw.get("candidates")
        if rows is not None:
            if not isinstance(rows, list):
                raise DataError(f"{side.where}: 'candidates' must be a list of ids, got {quote(rows)}")
            if unknown := [c for c in rows if str(c) not in corpus_row]:
                raise DataError(f"{side.where}: candidate {quote(unknown[0])} is not in corpus.jsonl")
            rows = list(dict.fromkeys(corpus_row[str(c)] for c in rows))
        if not gold or (rows is not None and not set(gold) & set(rows)):
            where = "among its candidates" if gold else f"in {os.path.basename(path)}"
            raise DataError(f"{side.where}: query {quote(raw['_id'])} has no relevant document {where}")
        relevant.append(gold)
        candidates.append(rows)
        kept.append(row)
    if not kept:
        raise DataError(f"{path}: it judges none of the queries")
    ids = list(query_row)
    about = dict(not_judged=len(queries) - len(kept))
    queries, ids = [queries[row] for row in kept], [ids[row] for row in kept]
    return Task(name, queries, corpus, relevant, candidates, ids, about=about)


def read_qrels(path, query_row, corpus_row):
    """-> {query row: {corpus row: gain}} of a tab-separated file; its header names the columns, in any order."""
    needed, judged = ("query-id", "corpus-id", "score"), {}
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        columns = [cell.strip().lower().replace("_", "-") for cell in f.readline().split("\t")]
        if sorted(columns) != sorted(needed):
            raise DataError(f"{path}: line 1 must be a header with the columns {', '.join(needed)}, got "
                            + quote(columns))
        for n, line in enumerate(f, 2):
            if not line.strip():
                continue
            cells = dict(zip(columns, line.rstrip("\r\n").split("\t")))
            query, doc, gain = (cells.get(name, "") for name in needed)
            known = query in query_row and doc in corpus_row and line.count("\t") == 2
            if not known or not re.fullmatch(r"-?\d+", gain):
                raise DataError(f"{path}: line {n}: needs a known query id, a known corpus id and a whole-number score, got "
                                + quote(cells))
            gains = judged.setdefault(query_row[query], {})
            if gains.setdefault(corpus_row[doc], int(gain)) != int(gain):
                before = gains[corpus_row[doc]]
                raise DataError(f"{path}: line {n}: {quote(query)}, {quote(doc)} was judged {before} before")
    return judged


# ----------------------------------------------------------------------------------------------------------- MMEB-V2

# The 78 tasks of MMEB-V2 (facts: VLM2Vec, github.com/TIGER-AI-Lab/VLM2Vec, its src/data/eval_dataset and experiments/public).
# Rows are copies of hub repositories under DIR/rows/<owner>/<name>, media the extracted archives of TIGER-Lab/MMEB-V2.
META = dict(  # meta-task -> its column in the paper's table
    image_cls="CLS", image_qa="QA", image_ret="RET", image_gd="GD", video_cls="CLS", video_qa="QA", video_ret="RET", video_mret="MRET",
    vidore_v1="VDRv1", vidore_v2="VDRv2", visrag="VR", visdoc_ood="OOD")
CLIP_FRAMES, QUOTE = 8, '"'  # frames of every clip
CHOOSE = ("Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact text of your "
          "chosen answer. Question: ")
WATCH, PAGE = "Understand the content of the provided video.", "Understand the content of the provided document image."
FIND_PAGE, FIND_MOMENT = "Find a document image that matches the given query:", "Find the clip that corresponds to the described scene in the given video:"
MVBENCH = ("episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action object_existence object_interaction "
           "object_shuffle moving_direction action_localization scene_transition action_count moving_count moving_attribute state_change fine_grained_pose "
           "character_order egocentric_navigation counterfactual_inference").split()


def modality(meta):
    """image, video or visdoc of a meta-task; of another one its first word."""
    return "visdoc" if meta.startswith(("vidore", "visrag")) else meta.split("_")[0]


def say(instruction, text=""):
    """Instruction and text as one; a row's own image tokens are dropped, pictures have their place in the prompt."""
    if not isinstance(text, str):
        raise DataError(f"needs a text, got {quote(text)}")
    return re.sub(r"<\|image_\d+\|>\n?", "", f"{instruction} {text}").strip()


def say_of_picture(instruction, text=""):
    """As `say`, for what stands beside a picture: there VLM2Vec takes blanks in front of a line break away."""
    return say(instruction, text).replace(" \n", "\n")


# Readers: a row -> the query, its candidates {name: item}, the names of the right ones.  An item is (text, "" | "image" | "video", where that is).


def image_query(row):
    """The instruction, without the blanks around it, and the text."""
    instruction = re.sub(r"<\|image_\d+\|>", "", row["qry_inst"] or "").strip()
    return (say_of_picture if row["qry_img_path"] else say)(instruction, row["qry_text"] or "")


def image_texts(tree, row):
    texts = row.texts("tgt_text")
    return (image_query(row), "image", row["qry_img_path"]), {t: (t, "", "") for t in texts}, texts[:1]


def pictures(row, name):
    """The candidates of a row: pictures, with captions when the first has one.

    name: makes one of path and caption; the first to bear it counts.
    """
    named, paths, instruction = {}, row.texts("tgt_img_path"), row["tgt_inst"] or ""
    captions = [caption or "" for caption in row["tgt_text"] or [""] * len(paths)]
    captioned = bool(captions and captions[0].strip())
    for path, caption in zip(paths, captions, strict=True):
        text = say_of_picture(instruction, caption if captioned else "")
        named.setdefault(name(path, caption), (text, "image", path))
    return named, [*named][:1]


def image_pictures(tree, row):
    return (image_query(row), "", ""), *pictures(row, lambda path, caption: path)


def image_pairs(tree, row):  # several captions may share a picture
    candidates = pictures(row, lambda path, caption: f"{path}:{caption.strip(QUOTE)}")
    return (image_query(row), "image", row["qry_img_path"]), *candidates


def video_classes(tree, row):  # the corpus is the list of classes
    return (tree.task.query, "video", row["video_id"]), {}, [row["pos_text"]]


def ssv2(tree, row):
    return (tree.task.query, "video", row["video_id"]), {t: (t, "", "") for t in row.texts("neg_text")}, [row["pos_text"]]


def found_by(text_key, id_key="video_id"):
    """Readers of video retrieval: a caption, or the first of several, finds the clip with this id."""

    def read(tree, row):
        name, text = str(row[id_key]), row[text_key]
        name = os.path.splitext(os.path.basename(name))[0] if id_key == "video" else name
        return (say(tree.task.query, text if isinstance(text, str) else text[0]), "", ""), {name: (tree.task.target, "video", name)}, [name]

    return read


def answers(clip, question, texts, right, shown=None):
    """A question about a clip.  texts: the candidates; shown: what of each is embedded, when that is not all."""
    return (say(CHOOSE, question), "video", clip), {t: (s, "", "") for t, s in zip(texts, shown or texts)}, [texts[right]]


def lettered(texts):
    return [f"({chr(65 + i)}) {text}" for i, text in enumerate(texts)]


def unlettered(texts):
    """"A. a text." -> "a text"; as in VLM2Vec, of a text without ". " only the last character stays."""
    return [t[t.find(". ") :].strip(". ") for t in texts]


def video_mme(tree, row):
    texts = row.texts("options")
    return answers(row["videoID"], "\n".join([row["question"], *texts]), texts, "ABCD".index(row["answer"]), unlettered(texts))


def egoschema(tree, row):
    texts = row.texts("option")
    return answers(row["video_idx"], row["question"] + " ".join(texts), texts, int(row["answer"]), unlettered(texts))


def nextqa(tree, row):
    texts = [row[f"a{i}"] for i in range(5)]
    return answers(row["video"], "\n".join([row["question"], "Options:", *lettered(texts)]), texts, row["answer"])


def mvbench(tree, row):
    options = row.texts("candidates")
    texts = lettered(options)
    question = "\n".join([row["question"], "Options:", *texts])
    right = [n for n, option in enumerate(options) if option == row["answer"]]
    if not right:
        raise DataError(f"the answer {quote(row['answer'])} is none of the candidates")
    return answers(os.path.join(row["subset"], row["video"]), question, texts, right[-1])  # of equal options the last


def activitynetqa(tree, row):
    return answers(f"v_{row['video_name']}", f"{row['question']}? (A) yes; (B) no.", ["yes", "no"], ["yes", "no"].index(row["answer"]))


def moments(tree, row):  # the folder of a query holds a folder for it and one for each candidate
    stem = os.path.splitext(os.path.basename(row["video_path"]))[0]
    folder = tree.find(stem, lambda path: os.path.isdir(path) and os.listdir(path))
    names = [n for n in sorted(os.listdir(folder)) if n != "query" and os.path.isdir(os.path.join(folder, n))]
    named = {os.path.join(stem, n): (tree.task.target, "video", os.path.join(stem, n)) for n in names}
    return (say(tree.task.query, row["query"]), "video", os.path.join(stem, "query")), named, [os.path.join(stem, n) for n in names if n.startswith("positive")]


def momentseeker(tree, row):
    stored = lambda path: os.path.join("video_frames", path.split(".mp4")[0].replace("/", "_"))  # "a/b.mp4" -> the folder of its frames
    given, kind, where, text = row["input_frames"] or "", "", "", "Find the clip that corresponds to the given text:"
    if given.endswith(".mp4"):
        kind, where, text = "video", stored(given), "Find the clip that corresponds to the given sentence and video segment:"
    elif given.endswith(".jpg"):
        kind, where, text = "image", f"query_{given}", "Select the video clip that aligns with the given text and image:"
    elif given:
        raise DataError(f"'input_frames' is {quote(given)}; needs .mp4, .jpg or nothing")
    right, wrong = ([e.get("frame_path") or stored(e["output_path"]) for e in row[key]] for key in ("positive_frames", "negative_frames"))
    return (say(text, row["query"]), kind, where), {p: (tree.task.target, "video", p) for p in right + wrong}, right


def pages(tree, row):
    return (say(tree.task.query, row["query"]), "", ""), {}, tree.judged.get(str(row["query-id"]), {})


@dataclass
class Published:
    """A task of MMEB-V2.  queries, corpus: the published counts (0: not published); versions: {repository: (version, queries)}."""

    name: str
    meta: str
    read: object
    hub: str
    subset: str = ""
    split: str = "test"
    query: str = ""
    target: str = ""
    folder: str = ""  # of its frames or pages
    queries: int = 1000
    corpus: int = 0
    versions: dict = None

    @property
    def full_name(self):
        return f"{self.meta}/{self.name}"

    @property
    def is_document(self):
        return modality(self.meta) == "visdoc"

    @property
    def is_global(self):  # ranked against the whole corpus
        return self.is_document or self.meta == "video_ret" or self.read is video_classes


def published():
    """-> {name: Published}, all 78, meta-tasks in the paper's order."""
    image = lambda meta, read, names: [Published(n, meta, read, "ziyjiang/MMEB_Test_Instruct", n) for n in names.split()]
    video = lambda name, meta, read, hub, queries=1000, folder="", **rest: Published(
        name, meta, read, hub if "/" in hub else f"VLM2Vec/{hub}", queries=queries, folder=folder or name, **rest)
    page = lambda name, meta, hub, queries, corpus=0, split="test", **rest: Published(
        name, meta, pages, hub, split=split, query=FIND_PAGE, target=PAGE, folder=name, queries=queries, corpus=corpus, **rest)
    seen = dict(target=WATCH)
    vidore = {"arxivqa": (500, 500), "docvqa": (451, 500), "infovqa": (494, 500), "tabfquad": (280, 70), "tatdqa": (1646, 277), "shiftproject": (100, 1000),
              "syntheticDocQA_artificial_intelligence": (100, 968), "syntheticDocQA_energy": (100, 977), "syntheticDocQA_government_reports": (100, 972),
              "syntheticDocQA_healthcare_industry": (100, 965)}
    vidore2 = {"esg_reports_human_labeled_v2": (52, 1538), "biomedical_lectures_v2_multilingual": (640, 1016),
               "economics_reports_v2_multilingual": (232, 452), "esg_reports_v2_multilingual": (228, 1538)}
    visrag = {"ArxivQA": 816, "ChartQA": 63, "MP-DocVQA": 591, "SlideVQA": 556, "InfoVQA": 718, "PlotQA": 863}
    fixed = lambda hub, old, n, m=0: {hub: ("fixed", n), f"VLM2Vec/{old}": ("original", m or n)}
    tasks = [
        *image("image_cls", image_texts, "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211"),
        *image("image_qa", image_texts, "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA"),
        *image("image_ret", image_pictures, "VisDial VisualNews_t2i MSCOCO_t2i WebQA Wiki-SS-NQ EDIS"),
        *image("image_ret", image_texts, "VisualNews_i2t MSCOCO_i2t"),
        *image("image_ret", image_pairs, "CIRR NIGHTS FashionIQ OVEN"),
        *image("image_gd", image_pairs, "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing"),
        video("K700", "video_cls", video_classes, "Kinetics-700", corpus=700, query="Recognize the category of the video content."),
        video("SmthSmthV2", "video_cls", ssv2, "SmthSmthV2", folder="SSv2",
              query="What actions or object interactions are being performed by the person in the video?"),
        video("HMDB51", "video_cls", video_classes, "HMDB51", corpus=51, query="What actions or objects interactions are the person in the video doing?"),
        video("UCF101", "video_cls", video_classes, "UCF101", corpus=101, query="What activities or sports are being performed by the person in the video?"),
        video("Breakfast", "video_cls", video_classes, "Breakfast", 433, corpus=10,
              query="Recognize the breakfast type that the person is cooking in the video."),
        video("MVBench", "video_qa", mvbench, "MVBench", 4000, split="train"),
        video("Video-MME", "video_qa", video_mme, "Video-MME", 2700),
        video("NExTQA", "video_qa", nextqa, "NExTQA", 8564, subset="MC"),
        video("EgoSchema", "video_qa", egoschema, "EgoSchema", 500, subset="Subset"),
        video("ActivityNetQA", "video_qa", activitynetqa, "ActivityNetQA"),
        video("DiDeMo", "video_ret", found_by("caption", "video"), "DiDeMo", 1004, query="Find a video that includes the following described scenes:", **seen),
        video("MSR-VTT", "video_ret", found_by("caption"), "MSR-VTT", subset="test_1k",
              query="Find a video that contains the following visual content:", **seen),
        video("MSVD", "video_ret", found_by("caption"), "MSVD", 670,
              query="Find the video snippet that corresponds to the given summary:", **seen),
        video("VATEX", "video_ret", found_by("enCap", "videoID"), "VATEX", 4478, query="Select a video that fits the description provided:", **seen),
        video("YouCook2", "video_ret", found_by("sentence", "id"), "lmms-lab/YouCook2", 3179, split="val",
              query="Find a video that demonstrates the following action while making a recipe:", **seen),
        video("QVHighlight", "video_mret", moments, "QVHighlight", 1083, query=FIND_MOMENT, **seen),
        video("Charades-STA", "video_mret", moments, "Charades-STA", 727, query=FIND_MOMENT, **seen),
        video("MomentSeeker", "video_mret", momentseeker, "MomentSeeker", 1602, target="Understand the content of the provided video clip.",
              versions=fixed("VLM2Vec/MomentSeeker", "MomentSeeker_1k8", 1602, 1800)),
        *(page(f"ViDoRe_{n}", "vidore_v1", f"vidore/{n}_test{'' if n[:4] in ('tatd', 'shif', 'synt') else '_subsampled'}_beir", *c) for n, c in vidore.items()),
        *(page(f"ViDoRe_{n}", "vidore_v2", f"vidore/{n.removesuffix('_multilingual')}", *c) for n, c in vidore2.items()),
        *(page(f"VisRAG_{n}", "visrag", f"openbmb/VisRAG-Ret-Test-{n}", q, split="train") for n, q in visrag.items()),
        page("ViDoSeek-page", "visdoc_ood", "VLM2Vec/ViDoSeek-page-fixed", 1142, versions=fixed("VLM2Vec/ViDoSeek-page-fixed", "ViDoSeek-page", 1142)),
        page("ViDoSeek-doc", "visdoc_ood", "VLM2Vec/ViDoSeek", 1142),
        page("MMLongBench-page", "visdoc_ood", "VLM2Vec/MMLongBench-page-fixed", 838, 6492,
             versions=fixed("VLM2Vec/MMLongBench-page-fixed", "MMLongBench", 838)),
        page("MMLongBench-doc", "visdoc_ood", "VLM2Vec/MMLongBench-doc", 838, 6492)]
    return {t.name: t for t in tasks}


MMEB = published()


class Row(dict):
    """A row of a data set that knows where it stands."""

    def __init__(self, row, where, **more):
        super().__init__(row, **more)
        self.where = where

    def __missing__(self, key):
        raise DataError(f"{self.where}: no column {key!r}.{closest(key, self)} There are {quote(list(self))}.")

    def texts(self, key):
        """A column that must be a list of texts."""
        if not isinstance(self[key], list) or not all(isinstance(text, str) for text in self[key]):
            raise DataError(f"{self.where}: {key!r} must be a list of texts, got {quote(self[key])}")
        return self[key]


def row_files(folder, subset, split):
    """The files of one subset and split in the copy of a hub data set: by the `configs` of its README.md, otherwise by their names."""
    files = sorted(os.path.relpath(os.path.join(at, n), folder) for at, _, names in os.walk(folder) for n in names
                   if n.endswith((".parquet", ".jsonl", ".json", ".tsv")) and f"{os.sep}." not in at[len(folder) :] and n != "dataset_infos.json")
    of_subset = [f for f in files if not subset or subset in f.split(os.sep) or re.match(rf"{re.escape(subset)}(-\d|\.)", os.path.basename(f))]
    splits = {f: re.findall(r"(?<![a-z])(train|test|val|validation|dev)(?![a-z])", f.lower()) for f in of_subset}
    right = [f for f in of_subset if split in splits[f] or not split or split == "val" and "validation" in splits[f]]
    right = right or ([] if any(splits.values()) else of_subset)
    readme = os.path.join(folder, "README.md")
    try:
        configs = (metadata_load(readme) or {}).get("configs") or [] if os.path.isfile(readme) else []
        for config in configs:
            if config.get("config_name") == (subset or "default") or len(configs) == 1 and not subset:
                given = config.get("data_files") or []
                given = given if isinstance(given, list) else [given]
                patterns = [g["path"] if isinstance(g, dict) else g for g in given if not isinstance(g, dict) or g.get("split", split) == split]
                patterns = [p for path in patterns for p in ([path] if isinstance(path, str) else path)]
                patterns = [os.path.normpath(p) for path in patterns for p in (path, os.path.join(path, "*"))]
                right = [f for f in files if any(fnmatch.fnmatch(f, p) for p in patterns)] or right
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise DataError(f"{readme}: its 'configs' cannot be read: {str(e).splitlines()[0]}") from e
    shards = {}
    for f in right:
        if m := re.fullmatch(r"(.*)-\d+-of-(\d+)(?:-\w+)?(\.\w+)", f):
            shards.setdefault(m.groups()[::2] + (int(m[2]),), []).append(f)
    for (stem, suffix, count), parts in shards.items():
        if len(parts) != count:
            raise DataError(f"{os.path.join(folder, stem)}-...-of-{count:05d}{suffix}: {len(parts)} of {count} files are there; get the others as well")
    return right


def rows_of(folder, subset, split, columns=None):
    """The Rows of the copy of a hub data set, one after the other; of .parquet files only the columns asked for."""
    files = [os.path.join(folder, f) for f in row_files(folder, subset, split)]
    if not files:
        raise DataError(f"{folder}: no .parquet, .jsonl, .json or .tsv file of {f'subset {subset!r}, ' if subset else ''}split {split!r}")
    for path in files:
        if path.endswith(".parquet"):
            try:
                import pyarrow.parquet  # only here
            except ImportError as e:
                raise DataError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from e
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    batches = file.iter_batches(64, columns=[c for c in file.schema_arrow.names if not columns or c in columns])
                    yield from (Row(row, f"{path}: row {n}") for n, row in enumerate((r for b in batches for r in b.to_pylist()), 1))
            except (pyarrow.ArrowException, OSError) as e:
                raise DataError(f"{path}: not a readable .parquet file: {e}") from e
        elif path.endswith(".tsv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                for n, raw in enumerate(csv.DictReader(file, delimiter="\t"), 1):
                    number = re.compile(r"0|-?[1-9]\d*")  # 007 is a name
                    yield Row({k: int(v) if number.fullmatch(v or "") else v for k, v in raw.items()}, f"{path}: row {n}")
        else:
            with open(path, "rb") as file:
                for n, (_, _, text) in enumerate(spans_of(file, path), 1):
                    raw = parse_json(text, where := f"{path}: row {n}")
                    if not isinstance(raw, dict):
                        raise DataError(f"{where}: needs an object, got {type(raw).__name__}")
                    yield Row(raw, where)


def download(root, hub):
    """The command that copies a hub repository's rows to where they are looked for."""
    parts = " ".join(f"--include '{pattern}'" for pattern in ("*.parquet", "*.json*", "*.tsv", "README.md"))
    return f"hf download {hub} --repo-type dataset {parts} --local-dir {shlex.quote(copies(root, hub)[0])}"


def copies(root, hub):
    """Where a hub repository's rows may lie; the second is how visdoc-tasks.data.tar.gz holds them."""
    return [os.path.join(root, "rows", *hub.split("/")), *(os.path.join(root, *doubled, "data", hub.split("/")[1])
                                                           for doubled in (["visdoc-tasks"], ["visdoc-tasks"] * 2))]


class Tree:
    """The local files of one task: rows of its hub repository, media in any of the spellings that are in use.

    extract: pages that are only in the rows are written to DIR/visdoc-tasks/extracted.
    """

    def __init__(self, root, task, released=False, extract=True):
        self.root, self.extract, self.judged, self.frames, self.media = root, extract, {}, {}, {}  # media: is each one there?
        if released and task.read is pages and task.meta != "visrag":
            task = replace(task, query="", target="")
        self.released = released
        self.task, self.max_frames = task, 10**6 if released and task.read is momentseeker else CLIP_FRAMES
        there = [(hub, c) for hub in task.versions or [task.hub] for c in copies(root, hub) if os.path.isdir(c)]
        self.hub, self.copy = there[0] if there else (task.hub, "")
        self.revision = revision(self.copy)
        stems = [f"{task.name.lower()}_1k6"] * bool(task.versions) + [task.name.lower(), task.name.lower().replace("-", "_"), task.folder.lower()]
        stems = [stem for stem in stems if os.path.exists(os.path.join(root, "video-tasks", "data", f"{stem}.jsonl"))]
        self.jsonl = stems[0] if stems else ""  # some trees have the rows beside the videos
        if not self.copy and not self.jsonl:
            raise DataError(f"{copies(root, task.hub)[0]}: no such folder; get it with: {download(root, task.hub)}")
        own = os.path.join("visdoc-tasks", "extracted", *self.hub.split("/"), self.revision)
        if task.is_document:
            names = [task.folder, task.folder.removeprefix("ViDoRe_"), self.hub.split("/")[1]]
            places = [own, *(os.path.join("visdoc-tasks", *m, n) for m in ((), ("images",), ("visdoc-tasks",), ("visdoc-tasks", "images")) for n in names)]
        elif task.folder:  # video_ret.tar.gz holds its folders below data/ziyan/video_retrieval
            spellings = dict.fromkeys([task.folder, task.folder.replace("-", "_"), task.folder.replace("_", "-"), task.folder.lower()])
            groups = [task.meta, *(os.path.join(m, "data", "ziyan", "video_retrieval") for m in (task.meta, "") if task.meta == "video_ret")]
            places = [os.path.join("video-tasks", *m, g, n, *end) for m in (("frames",), ()) for g in groups for n in spellings for end in ((), ("frames",))]
        else:
            places = ["image-tasks", os.path.join("image-tasks", "MMEB")]
        self.own, self.places = os.path.join(root, own), [p for p in (os.path.join(root, p) for p in places) if os.path.isdir(p)]

    def rows(self, config=None, columns=None):
        """The task's Rows, or those of one config of its repository."""
        if not self.copy:
            return rows_of(os.path.join(self.root, "video-tasks", "data"), self.jsonl, "")
        if self.task.read is mvbench:
            return (Row(row, row.where, subset=subset) for subset in MVBENCH for row in rows_of(self.copy, subset, self.task.split))
        rows = rows_of(self.copy, config or self.task.subset, self.task.split, columns)
        return itertools.islice(rows, 1000) if self.task.read is ssv2 else rows

    def find(self, name, usable=os.path.isfile):
        """The path of a file, or of a folder that is usable, in one of the places."""
        for place in self.places if name not in ("", None) else ():
            if usable(path := os.path.join(place, str(name))):
                return path
        raise DataError(f"{quote(name)} is not in {' or '.join(self.places) if self.places else 'the folder of this task, which does not exist'}")

    def has_frames(self, path):
        if path not in self.frames:
            frames = frame_files(path) if os.path.isdir(path) else []
            n = len(frames)
            self.frames[path] = [frames[i] for i in (range(n) if n <= self.max_frames else np.linspace(0, n - 1, self.max_frames, dtype=int))]
        return bool(self.frames[path])

    def side(self, item, where):
        """An item -> Side.  Of a clip at most 8 frames: in natural order, evenly spaced."""
        text, kind, name = item
        text = text.strip() if self.released else text  # as its collator does
        if not kind:
            return Side([("text", printable(text, where))], where=where)
        self.media.setdefault((kind, name), False)
        media = self.find(name) if kind == "image" else self.frames[self.find(name, self.has_frames)]
        self.media[kind, name] = True
        return Side([(kind, media), ("text", printable(text, where))], where=where)

    def corpus(self):
        """What there is to find besides the candidates of the rows: yields (where, name, item)."""
        if self.task.read is video_classes:
            path = os.path.join(self.root, "classes", f"{self.task.name}.txt")
            if not os.path.exists(path):
                raise DataError(f"{path}: no such file; write the names of the {self.task.corpus} classes there, one a line, as they stand in VLM2Vec's "
                                "src/data/eval_dataset/video_classification_utils.py: the repository of the rows does not hold them")
            try:
                with open(path, encoding="utf-8-sig") as f:
                    names = [line.strip() for line in f]
            except UnicodeDecodeError as e:
                raise DataError(f"{path}: not UTF-8: {e}") from e
            yield from ((f"{path}: line {n}", name, (name, "", "")) for n, name in enumerate(names, 1) if name)
        elif self.task.is_document:
            for row in self.rows("qrels"):
                gains = self.judged.setdefault(str(row["query-id"]), {})
                if not isinstance(row["score"], (int, float)):
                    raise DataError(f"{row.where}: 'score' must be a number, got {quote(row['score'])}")
                if row["score"] > 0:
                    gains[str(row["corpus-id"])] = max(row["score"], gains.get(str(row["corpus-id"]), 0))
            names = [(row.where, str(row["corpus-id"])) for row in self.rows("corpus", ["corpus-id"])]
            files = {}
            for where, name in names:
                if (other := files.setdefault(self.page_file(name), name)) != name:
                    raise DataError(f"{where}: the pages {quote(other)} and {quote(name)} have one file name, "
                                    f"{quote(self.page_file(name))}; rename one in corpus and qrels")
            # pages of a data set that has versions are those of its rows: an archive does not say which version it has
            trusted = [p for p in self.places if p == self.own or not self.task.versions]
            missing = files.keys() - {n for place in trusted for n in os.listdir(place)}
            in_rows = self.take_out(missing) if missing else set()
            for where, name in names:
                file = self.page_file(name)
                self.media["image", file] = file in in_rows
                yield where, name, (self.task.target, "" if file in in_rows else "image", file)

    def page_file(self, name):
        base, ext = os.path.splitext(name)  # as VLM2Vec names them; a separator must not lead out of the folder
        file = f"{base[:50]}_{hashlib.md5(name.encode()).hexdigest()[:8]}{ext}" if self.task.meta == "visrag" else f"{name}.png"
        return re.sub(r"[/\\]", "_", file)

    def take_out(self, missing):
        """Write the pages that no place has as they stand in the rows.  -> those that are only there: all, when nothing is to be written."""
        for row in tqdm(self.rows("corpus"), desc=f"{self.task.name}: taking pages out of the rows", leave=False):
            file, image = self.page_file(str(row["corpus-id"])), row.get("image")
            content = image.get("bytes") if isinstance(image, dict) else None
            if file in missing and content:
                if not self.extract:
                    return missing  # one is there: the others are not looked at
                os.makedirs(self.own, exist_ok=True)
                with writing(os.path.join(self.own, file), "wb") as f:  # another process may take out the same page
                    f.write(content)
        self.places = [p for p in dict.fromkeys((self.own, *self.places)) if os.path.isdir(p)]
        return set()


def revision(folder):
    """The commit of a copy that `hf download --local-dir` made, or ""."""
    found = folder and sorted(glob.glob(os.path.join(folder, ".cache", "huggingface", "download", "**", "*.metadata"), recursive=True))
    if not found:
        return ""
    with open(found[0]) as f:
        return f.readline().strip()


def read_published(root, name, released=False, skip_bad=False, extract=True):
    """A task of MMEB-V2 from its local files -> Task.

    Raises DataError naming task, file and row for anything that is missing or broken; with skip_bad what cannot be used
    is left out and named in Task.bad.  released: the prompts and frames of the released evaluation.
    """
    tree = Tree(root, MMEB[name], released, extract)
    task, bad, sides, known, renamed = tree.task, [], [], {}, 0  # known: candidate -> (item, its row in the corpus, or None)

    def complain(where, error):
        text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        text = text if where in text else f"{where}: {text}"
        text = text if text.startswith(f"{name}: ") else f"{name}: {text}"
        if not skip_bad:
            raise DataError(text)
        bad.append(text)

    def add(where, key, item):
        nonlocal renamed
        if key not in known:
            known[key] = item, None
            try:
                side = tree.side(item, f"{name}: {where}")
                known[key] = item, len(sides)
                sides.append(side)
            except DataError as e:
                complain(where, e)
        renamed += known[key][0] != item
        return known[key][1]

    for where, key, item in tree.corpus():
        if key in known:
            complain(where, DataError(f"the id {quote(key)} stands there twice"))
        add(where, key, item)
    queries, relevant, candidates, ids, seen, count = [], [], [], [], set(), 0
    for row in tree.rows("queries" if task.is_document else None):
        count, where = count + 1, row.where
        try:
            item, named, right = task.read(tree, row)
            key = str(row["query-id"]) if task.is_document else str(count)
            if key in seen:
                raise DataError(f"the id {quote(key)} stands there twice")
            seen.add(key)
            query = tree.side(item, f"{name}: {where}")
            rows = [r for r in [add(where, n, candidate) for n, candidate in named.items()] if r is not None]
            if strange := [n for n in right if n not in (known if task.is_global else named)]:
                raise DataError(f"the right candidate {quote(strange[0])} is none of the candidates")
            gains = {known[n][1]: right[n] if isinstance(right, dict) else 1 for n in right if known[n][1] is not None}
            if not gains or not task.is_global and len(rows) < 2:
                raise DataError("no right candidate for this query" if not gains else "a query with one candidate: it cannot be wrong")
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as e:
            complain(where, e)
            continue
        queries.append(query)
        relevant.append(gains)
        candidates.append(None if task.is_global else rows)
        ids.append(key)
    version, expected = (task.versions or {}).get(tree.hub, ("", task.queries))
    if count != expected:  # MomentSeeker's repository held the original until 2025-07-31
        version, expected = next((v for v in (task.versions or {}).values() if v[1] == count), ("unknown" if version else "", expected))
    if count != expected:
        complain(tree.copy or tree.jsonl, DataError(f"{count} queries, {expected} are published" + ": an unknown version" * (version == "unknown")))
    if task.corpus and len(known) != task.corpus:
        complain(tree.copy, DataError(f"{len(known)} candidates, {task.corpus} are published"))
    if not queries:
        raise DataError(f"{name}: no query is left" + (f"; {len(bad)} problems, the first: {bad[0]}" if bad else ""))
    about = dict(data=os.path.realpath(root), hub=tree.hub, version=version, revision=tree.revision, rows=count, renamed=renamed,
                 media=sum(tree.media.values()), media_wanted=len(tree.media))
    return Task(task.full_name, queries, sides, relevant, candidates, ids, "ndcg@5" if task.is_document else "hit@1", about, bad)


# ------------------------------------------------------------------------------------------------------- small world

MOVES, HEADINGS = ("forward", "left", "right"), ((0, -1), (1, 0), (0, 1), (-1, 0))  # north, east, south, west
STATES = [(x, y, h) for x in range(4) for y in range(4) for h in range(4)]
N = 8  # moves
FAMILIES = {  # as the benchmark's meta-tasks: how the program arrives, how the start does, how the final state is shown
    "image_cls": ("tiles", "words", "text"),
    "image_qa": ("words", "board", "text"),
    "image_ret": ("words", "words", "board"),
    "video_cls": ("frames", "words", "text"),
    "video_qa": ("frames", "board", "text"),
    "video_ret": ("words", "words", "clip"),
    "visdoc_ret": ("page", "words", "board"),
}


class World:
    """Turtle world, what `train.py` and `eval.py` use without --data: no files, pictures are drawn when they are needed.

    A turtle on a 4x4 torus executes N moves; only their order decides where it ends.  The rationale is the states passed
    through, the answer is the last.  Attributes as Pairs'.
    """

    def __init__(self, split="train", families="", test=400):
        self.names, self.bad = families.split(",") if families else list(FAMILIES), []
        for name in self.names:
            if name not in FAMILIES:
                raise DataError(f"--families: {name!r} is none of turtle world's.{nearest(name, FAMILIES)}")
        if len(set(self.names)) < len(self.names):
            raise DataError(f"--families {families!r}: one stands there twice")
        rng = np.random.default_rng(0)  # always the same split, whatever a run's seed
        programs = rng.permutation(len(MOVES) ** N)
        programs = programs[test:] if split == "train" else programs[:test]  # disjoint
        self.dataset = np.repeat(np.arange(len(self.names)), len(programs)).astype(np.int32)
        self.programs, self.digest = np.tile(programs, len(self.names)), f"turtle world {split} {families}"
        self.starts = rng.integers(len(STATES), size=len(self.programs))
        self.target = np.array([STATES.index(walk(*job)[-1]) for job in zip(self.starts, self.programs)], np.int64)

    def __len__(self):
        return len(self.dataset)

    def texts(self):
        """For the tokenizer: every word is one token, and so is every state."""
        return (word for word in [" " + m for m in MOVES] + [state_word(s) for s in STATES] for _ in range(20))

    def __getitem__(self, i):
        """-> (query Side, target Side)"""
        program, start, shown = FAMILIES[self.names[self.dataset[i]]]
        return program_side(self.programs[i], self.starts[i], program, start), state_side(self.target[i], shown)


def walk(start, program):
    """Number of the start state, program number in base 3 -> the 8 states after each move."""
    (x, y, h), passed = STATES[start], []
    for move in moves(program):
        h = (h + {"left": 3, "right": 1}.get(move, 0)) % 4
        if move == "forward":
            x, y = (x + HEADINGS[h][0]) % 4, (y + HEADINGS[h][1]) % 4
        passed.append((x, y, h))
    return passed


def moves(program):
    return tuple(MOVES[int(program) // 3**k % 3] for k in range(N))


def state_word(state):
    """(1, 2, 1) -> " byE": column a-d, row w-z, heading.  The blank belongs to it: it makes the token the same everywhere."""
    return " " + "abcd"[state[0]] + "wxyz"[state[1]] + "NESW"[state[2]]


def program_side(program, start, program_as, start_as):
    """Start and program as a query.  A frame of a clip stands twice: two frames make one visual token, so each shows one thing."""
    words, passed, state = moves(program), walk(start, program), STATES[start]
    media = {"tiles": lambda: [("image", stack([draw_tile(w) for w in words]))], "page": lambda: [("image", stack([draw_line(w) for w in words]))],
             "frames": lambda: [("video", [draw_tile(w) for w in words for _ in range(2)])], "board": lambda: [("image", draw_board(state))]}
    parts = [p for shown in (start_as, program_as) if shown != "words" for p in media[shown]()]
    text = state_word(state) * (start_as == "words") + "".join(f" {w}" for w in words) * (program_as == "words")
    return Side(parts + [("text", text)] * (text != ""), "".join(map(state_word, passed)), state_word(passed[-1]), f"turtle program {program}")


def state_side(index, shown):
    """One of the 64 states as text, as a board, or as a clip of a walk that ends there."""
    x, y, h = state = STATES[index]
    walked = [((x - k * HEADINGS[h][0]) % 4, (y - k * HEADINGS[h][1]) % 4, h) for k in (3, 2, 1, 0)]
    clip = lambda: [draw_board(s, tuple(walked[:k])) for k, s in enumerate(walked) for _ in range(2)]
    part = ("text", state_word(state)) if shown == "text" else ("image", draw_board(state)) if shown == "board" else ("video", clip())
    return Side([part], "", state_word(state), f"turtle state{state_word(state)}")


# Pictures stand on the grey that becomes 0 when pixels are normalised (MEAN): what is drawn is all that the vision tower
# sees, and it learns to read in fewer steps than on a white ground.
GROUND = tuple(round(255 * float(m)) for m in MEAN)


def arrow(draw, cx, cy, r, heading, fill):
    """A triangle that points north, east, south or west."""
    dx, dy = HEADINGS[heading]
    tail, side = (cx - r * dx, cy - r * dy), (0.7 * r * dy, -0.7 * r * dx)
    draw.polygon([(cx + r * dx, cy + r * dy), (tail[0] - side[0], tail[1] - side[1]), (tail[0] + side[0], tail[1] + side[1])], fill=fill)


def stack(images):
    """Pictures of one width, one below the other."""
    out = Image.new("RGB", (images[0].width, sum(i.height for i in images)))
    for i, image in enumerate(images):
        out.paste(image, (0, i * image.height))
    return out


@functools.cache
def draw_tile(word):
    """A move as an arrow: up is forward."""
    image = Image.new("RGB", (28, 28), GROUND)
    ImageDraw.Draw(image).rectangle((0, 0, 27, 27), outline="gray")
    arrow(ImageDraw.Draw(image), 14, 14, 10, *{"forward": (0, "black"), "left": (3, "blue"), "right": (1, "red")}[word])
    return image


@functools.cache
def draw_line(word):
    """A line of a page."""
    image = Image.new("RGB", (56, 28), GROUND)
    ImageDraw.Draw(image).text((2, 6), word, fill="black", font=ImageFont.load_default(14))
    return image


@functools.cache
def draw_board(state, trail=()):
    """The torus, 7 pixels a cell: one visual token.  States of the trail leave their cells dark, which tells a clip's frames apart."""
    image, (x, y, h) = Image.new("RGB", (28, 28), GROUND), state
    draw = ImageDraw.Draw(image)
    for i in range(16):
        draw.rectangle((i % 4 * 7, i // 4 * 7, i % 4 * 7 + 6, i // 4 * 7 + 6), outline="gray")
    for i, j, _ in trail:
        draw.rectangle((7 * i + 1, 7 * j + 1, 7 * i + 5, 7 * j + 5), fill="black")
    arrow(draw, 7 * x + 3, 7 * y + 3, 3, h, "white")
    return image


def world_tasks():
    """Every family as a Task "<family>/turtle": unseen programs against all 64 final states; and for the question answering
    ones "<family>/turtle_hard": only against the states where one wrong move would have led."""
    test = World("test")
    n = len(test) // len(FAMILIES)
    tasks = {}
    for f, name in enumerate(test.names):
        rows = range(f * n, (f + 1) * n)
        task = Task(f"{name}/turtle", [test[i][0] for i in rows], [state_side(s, FAMILIES[name][2]) for s in range(len(STATES))],
                    [{int(test.target[i]): 1} for i in rows], [None] * n, [str(test.programs[i]) for i in rows])
        tasks[task.name] = task
        if name.endswith("_qa"):
            near = [sorted({STATES.index(walk(test.starts[i], p)[-1]) for p in one_wrong_move(test.programs[i])} | {int(test.target[i])}) for i in rows]
            tasks[f"{task.name}_hard"] = replace(task, name=f"{task.name}_hard", candidates=near)
    return tasks


def one_wrong_move(program):
    """The numbers of the 2 N programs that differ from this one in one move."""
    return [program + (other - program // 3**k % 3) * 3**k for k in range(N) for other in range(3) if other != program // 3**k % 3]


# ------------------------------------------------------------------------------------------------------ contact sheet


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


# ------------------------------------------------------------------------------------------------------ command line


def parse_flags(config_class, argv, about):
    """`--key value` and `--key=value` -> an instance of a dataclass whose fields have defaults, and the set of names given.
    `--flag` alone is true.

    The help is the class's own source: the comment behind each field.  Unknown names and values of the wrong type end
    the program with the nearest right name.
    """
    known, values, argv = {f.name: f.type for f in fields(config_class)}, {}, list(argv)
    if "-h" in argv or "--help" in argv:
        print(about.strip() + "\n\nflags (--key value or --key=value):")
        for line in inspect.getsource(config_class).splitlines()[2:]:
            if m := re.match(r"    (\w+): (\w+) = (.*?)  # (.*)", line):
                print(f"  --{m[1]} {m[2].upper()}".ljust(30) + f"{m[4]} [{m[3]}]")
            elif m := re.match(r"    # (.*)", line):
                print(f"\n {m[1]}")
        raise SystemExit(0)
    while argv:
        flag, equals, value = argv.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or name not in known:
            raise SystemExit(f"error: unknown argument {flag!r}.{nearest(name, known)}")
        kind = known[name]
        if kind is tuple:  # all values up to the next flag
            value = [value] if equals else []
            while argv and not argv[0].startswith("--"):
                value.append(argv.pop(0))
            value = value or None
        elif not equals:
            value = argv.pop(0) if argv and not argv[0].startswith("--") else "true" if kind is bool else None
        try:
            if value is None:
                raise ValueError
            values[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise SystemExit(f"error: --{name} needs {'true or false' if kind is bool else 'a value' if kind is tuple else f'a value of type {kind.__name__}'}, got {value!r}") from None
    return config_class(**values), set(values)


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


def main(argv):
    cfg, _ = parse_flags(Config, argv, "Look at what the model sees: python data.py --show sheet.png\n"
                         "How fast it is read:         python data.py --bench --data pairs.jsonl --workers 8")
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
    try:
        main(sys.argv[1:])
    except (DataError, OSError) as e:
        sys.exit(f"error: {said(e)}")
