"""From files to batches: media, records, the prompt, collation, the batch schedule.

    media      load_image, load_frames     any picture or clip -> RGB Pillow images, limits checked before decoding
    pixels     patchify                    Qwen2-VL's resize rule and patch layout
    records    Pairs, parse_side           training JSONL, indexed by byte offset
    prompt     Processor.render            the one place where text, media and special tokens become ids
    batches    collate, Schedule, Batches  left-padded tensors; which records make which step

Nothing here is skipped, replaced or cut silently: what cannot be used raises DataError, which names the file, the
record and the reason.
"""

import contextlib
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import struct
import sys
import threading
import warnings
from array import array
from dataclasses import dataclass, fields

import av
import numpy as np
import tokenizers
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from curriculum import segment

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


# ------------------------------------------------------------------------------------------------------- command line


def parse_flags(config_class, argv, about, moved={}):
    """`--key value` and `--key=value` -> an instance of a dataclass whose fields have defaults, and the set of names given.
    `--flag` alone is true.  moved: {a flag of an earlier version: the command that does it now}.

    The help is the class's own source: the comment behind each field.  Unknown names and values of the wrong type end
    the program with the nearest right name.
    """
    known, values, argv = {f.name: f.type for f in fields(config_class)}, {}, list(argv)
    if "-h" in argv or "--help" in argv:
        print(about.strip() + "\n\nflags (--key value or --key=value):")
        classes = [c for c in reversed(config_class.__mro__) if c is not object]
        for line in (line for c in classes for line in inspect.getsource(c).splitlines()[2:]):
            if m := re.match(r"    (\w+): (\w+) = (.*?)  # (.*)", line):
                print(f"  --{m[1]} {m[2].upper()}".ljust(30) + f"{m[4]} [{m[3]}]")
            elif m := re.match(r"    # (.*)", line):
                print(f"\n {m[1]}")
        raise SystemExit(0)
    while argv:
        flag, equals, value = argv.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name in moved:
            raise SystemExit(f"error: {flag} is a command of its own now: {moved[name]}")
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


if __name__ == "__main__":
    sys.exit("this file is read by the others; to look at data: python -m tools.look --show sheet.png")
