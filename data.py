"""From files to batches: media, records, the prompt, collation, the batch schedule.

    media      load_image, load_frames     any picture or clip -> RGB Pillow images, limits checked first
    pixels     patchify                    the backbone's resize rule and patch layout
    records    Pairs, parse_side           training JSONL, indexed by byte offset
    prompt     Processor.render            the one place where text, media and special tokens become ids
    batches    collate, Schedule, Batches  padded tensors; which records make which step

Nothing here is skipped, replaced or cut silently: what cannot be used raises DataError, which names the file,
the record and the reason.
"""

import bisect
import contextlib
import difflib
import functools
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
import string
import struct
import sys
import threading
import warnings
from array import array
from collections import namedtuple
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import av
import numpy as np
import tokenizers
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.glm4v.video_processing_glm4v import smart_resize as resize_clip
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

MERGE, TEMPORAL = 2, 2  # all backbones: patches a visual token's side, frames a temporal patch


@dataclass(frozen=True)
class Backbone:
    """What a model type wants of pictures and clips."""

    patch: int = 14  # pixels of a patch's side
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the pixels' channels; CLIP's
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    # How a clip tells the time of its frame pairs.  "steps": their M-RoPE positions are 0, 1, 2, ..
    # "seconds": they are seconds times `rate`.  "text": each pair is a picture, with "<1.2 seconds>" in front
    time: str = "steps"
    rate: int = 0  # positions a second; the configuration's

    @property
    def side(self):
        """Pixels of a visual token's side."""
        return self.patch * MERGE


QWEN2_VL = Backbone()
BACKBONES = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": Backbone(time="seconds"),
    "qwen3_vl": Backbone(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), time="text"),
}


class DataError(ValueError):
    """Bad input: the message says what was given, where, and what is needed."""


def said(error):
    """The message of an error; of one that a data worker raised, the last line of its traceback."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].removeprefix("data.DataError: ")
    return text


def quote(value):
    """Somebody's data in a message: its repr, at most 200 characters of it."""
    text = repr(value[:200] if isinstance(value, (str, bytes)) else value)
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
    """A new file, with a name of its own until the block ends well; then it becomes `path`."""
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


# ---------------------------------------------------------------------------------------------------- media

MAX_PIXELS = 89_478_485  # of a stored picture or frame; Pillow only warns there, here it is an error
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
LOADING = threading.Lock()  # Pillow reads a picture's file late; two threads may be given the same picture

# What Pillow's and FFmpeg's readers raise on broken files, other than their own errors
DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, LookupError, ArithmeticError,
                  EOFError, struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning)
Image.init()
# Others can start programs (EPS)
IMAGE_FORMATS = [f for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if f in Image.OPEN]
IMAGE_SUFFIXES = tuple(end for end, name in Image.registered_extensions().items() if name in IMAGE_FORMATS)
PICTURE = (Image.Image, np.ndarray, bytes, bytearray, memoryview, io.IOBase)  # besides a path
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")  # for a hint only
VIDEO_OPTIONS = {  # a playlist must not open other files or addresses
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,flv,asf,ogg,"
                        "h264,hevc,ivf,y4m"}


def load_image(source):
    """A path, Pillow image, array, bytes or open file -> RGB Pillow image, upright, on white.

    Animations give their first frame.
    Raises DataError for anything unreadable, truncated, too large or not 8/16-bit.
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
    """An array, the bytes of a file, or an open file -> Pillow image; anything else stays as it is.

    An array is (height, width, 3 or 4) of uint8.  Raises DataError, or one of DECODER_ERRORS.
    """
    if not isinstance(source, (str, os.PathLike, *PICTURE)):
        raise DataError(f"needs a path, Pillow image, array, bytes or file, got {type(source).__name__}")
    if isinstance(source, np.ndarray):
        colours = source.shape[2] if source.ndim == 3 else 0
        if source.dtype != np.uint8 or colours not in (3, 4) or not source.size:
            raise DataError(f"an array of {source.dtype} with the shape {source.shape}; "
                            "a picture is uint8, (height, width, 3 or 4)")
        return Image.fromarray(source)
    if isinstance(source, io.IOBase):
        with LOADING:  # the same file may be given twice
            source.seek(0)
            source = source.read()
        if isinstance(source, str):
            raise DataError("a file that is open for text; open it with mode 'rb'")
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = bytes(source)
        try:
            return Image.open(io.BytesIO(source), formats=IMAGE_FORMATS)
        except UnidentifiedImageError as e:
            begin = quote(source[:16])
            raise DataError(f"{len(source)} bytes that are no picture: they begin with {begin}") from e
    return source


def clear_colour(image):
    """The one grey or colour that a PNG calls transparent, or None.

    Pillow scales pixels to 8 bits, but not this value; a file that is not read yet tells its bits.
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
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        eight = grey // 257  # 65535 -> 255
        if clear is not None:
            eight = np.where(grey == clear, 255, eight)
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        if clear is not None:
            image.info["transparency"] = clear
        if image.mode == "La":  # Pillow converts it to LA only
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def frame_files(folder):
    """The paths of the pictures in a folder, in natural order: frame10 behind frame9."""
    def by_number(name):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    names = [n for n in os.listdir(folder) if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
    return [os.path.join(folder, name) for name in sorted(names, key=by_number)]


@dataclass(frozen=True)
class Part:
    """Of a video file what is shown from second `start` to right before `end`; its first frame is at 0."""

    video: str
    start: float = 0.0
    end: float = math.inf

    def __str__(self):
        return f"{self.video} ({self.start:g} - {self.end:g} s)"


def load_frames(source, count):
    """The frames of `load_clip` alone."""
    frames, _ = load_clip(source, count)
    return frames


def load_clip(source, count, frame_rate=2.0):
    """A clip -> at most `count` RGB Pillow images, evenly spaced in time from the first frame to the last.

    And in seconds when each of them begins, counted from the first one's begin, and when the clip ends.
    source: a video file, a `Part` of one, a folder of frame files (natural order), or a list of what
    `load_image` takes.  frame_rate: frames a second where the source does not tell.
    A clip with fewer frames gives all it has.  Frames of a file are shown as a player does: with the rotation
    and the aspect ratio that the file asks for.  Decoding keeps only the chosen frames in memory.
    """
    if count < 1:
        raise DataError(f"num_frames {count}: a clip needs at least 1")
    is_list = isinstance(source, (list, tuple))
    if is_list or not isinstance(source, Part) and os.path.isdir(source):
        frames = source if is_list else frame_files(source)
        if not frames:
            raise DataError(f"{quote(source)}: a clip given as frames, but there is no frame in it")
        chosen = [round(i) for i in np.linspace(0, len(frames) - 1, min(count, len(frames)))]
        return [load_image(frames[i]) for i in chosen], [i / frame_rate for i in (*chosen, len(frames))]
    part = source if isinstance(source, Part) else Part(source)
    try:
        return decode_clip(part, count, frame_rate)
    except DECODER_ERRORS as e:  # FFmpegError is an OSError or ValueError
        raise DataError(f"{source}: cannot be used as a video: {e}") from e


def decode_clip(part, count, frame_rate):
    """The headers say when each frame is shown; those nearest to `count` evenly spaced times are decoded.

    What lies between two of them is jumped over where a key frame stands there.  Where the frames then do not
    come at the times of their headers, all are decoded.
    """
    source = part.video
    with av.open(source, options=VIDEO_OPTIONS) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise DataError("no video track in this file")
        size = stream.codec_context.width, stream.codec_context.height
        shape = display_size(*size, stream.sample_aspect_ratio)
        track = read_headers(container, stream, source)
    times = times_within(track, part)
    wanted = times if len(times) <= count else np.linspace(times[0], times[-1], count)
    behind = track.times[bisect.bisect(track.times, times[-1]) :]  # the last of them ends where this begins
    end = behind[0] if behind else track.end
    unit = 1 / frame_rate if track.start is None else track.unit

    def shown(frame):
        image = frame.to_image()
        if shape != size:
            image = image.resize(shape, Image.BICUBIC)
        return to_rgb(image.rotate(frame.rotation, expand=True))  # phones store frames sideways

    def decoded(track):
        frames, begin = [], []
        for time, frame in nearest_frames(source, track, wanted):
            frames.append(shown(frame))
            begin.append(time)
        return frames, [round((time - times[0]) * unit, 6) for time in (*begin, end)]

    if len(track.keys) > 1:
        with contextlib.suppress(*DECODER_ERRORS):  # among them: DataError
            return decoded(track)
    return decoded(replace(track, keys=[]))


@dataclass
class Track:
    """What the headers of a video track say; times in its own unit."""

    index: int  # of the track in the file
    first: int  # number of its first key frame's packet
    start: int | None  # that one's time; None where a header lacks its time: then frames are counted
    times: list  # of all frames that are shown, sorted
    keys: list  # of the key frames among them, sorted
    end: float  # when the last frame is no longer shown
    unit: float  # in seconds


Header = namedtuple("Header", "time duration is_key is_discarded")  # of a packet


def read_headers(container, stream, source):
    """The headers of all packets -> Track.

    What is in front of the first key frame, in the file or on the screen, hangs on frames that are not there.
    """
    headers = [Header(p.pts, p.duration or 0, p.is_keyframe, p.is_discard)
               for p in container.demux(stream) if p.size]  # empty packets flush
    first = next((n for n, header in enumerate(headers) if header.is_key), 0)
    start = headers[first].time if headers else None
    shown = [header for header in headers[first:] if not header.is_discarded]
    if start is None or any(header.time is None for header in shown):
        start, times, keys, end = None, list(range(len(shown))), [], len(shown)
    else:
        shown = [header for header in shown if header.time >= start]
        times = sorted(header.time for header in shown)
        keys = sorted(header.time for header in shown if header.is_key)
        end = max((header.time + header.duration for header in shown), default=0)
    if not times:
        raise DataError("no frames in the video track")
    if start is not None and container.duration and not container.streams.audio:
        seconds, promised = float(end * stream.time_base), container.duration / av.time_base
        if seconds < 0.8 * promised:
            warnings.warn(f"{source}: {promised:.1f} s promised, but the frames end after {seconds:.1f} s "
                          "(cut off?); using these")
    if end == times[-1]:  # the header says no duration: the last frame is shown as long as the others
        end += (times[-1] - times[0]) / max(1, len(times) - 1)
    return Track(stream.index, first, start, times, keys, end, float(stream.time_base))


def times_within(track, part):
    """The times of the frames that begin in a part; where none does, of the one that is shown meanwhile."""
    if part.start == 0 and part.end == math.inf:
        return track.times
    if track.start is None:
        raise DataError("a part of it is wanted, but the file does not say when its frames are shown")
    seconds = [round((time - track.times[0]) * track.unit, 6) for time in track.times]
    begin, end = bisect.bisect_left(seconds, part.start), bisect.bisect_left(seconds, part.end)
    if begin < end:
        return track.times[begin:end]
    length = (track.end - track.times[0]) * track.unit
    if part.start >= length:
        raise DataError(f"the part begins at {part.start:g} s, and the clip ends after {length:.2f} s")
    return track.times[begin - 1 : begin]


def nearest_frames(source, track, wanted):
    """For each of the sorted times in `wanted` the decoded (time, frame) nearest to it; of two the later."""
    with av.open(source, options=VIDEO_OPTIONS) as container:
        frames = timed_frames(container, track)
        before, now = None, next(frames, None)  # two neighbours, (time, frame) each
        for time in wanted:
            if track.keys:
                right = nearest_time(track.times, time)
                key = track.keys[bisect.bisect(track.keys, right) - 1]
                if now is not None and now[0] < key:
                    frames = timed_frames(container, track, key)
                    before, now = None, next(frames, None)
            while now is not None and now[0] < time:
                before, now = now, next(frames, None)
            if now is None and before is None:
                raise DataError("no frames could be decoded")
            found = now
            if now is None or (before is not None and time - before[0] < now[0] - time):
                found = before
            if track.keys and found[0] != right:
                raise DataError(f"a frame at {found[0]} instead of {right}")
            yield found


def nearest_time(times, wanted):
    """The one of the sorted times that is nearest; of two the later one."""
    n = min(bisect.bisect_left(times, wanted), len(times) - 1)
    if n > 0 and wanted - times[n - 1] < times[n] - wanted:
        n -= 1
    return times[n]


def timed_frames(container, track, key=None):
    """Decode a track -> (time, frame) from its first key frame on, or from the one whose time is `key`."""
    stream, skip, start = container.streams[track.index], track.first, track.start
    if key is not None:
        container.seek(key, stream=stream)
        skip, start = 0, key
    packets = container.demux(stream)
    packets = (p for p in packets if p.size or p.dts is None)  # without dts: the last one, which flushes
    packets = itertools.islice(packets, skip, None)
    if key is not None:
        packet = next(packets, None)
        if packet is None or packet.pts != key:
            raise DataError(f"no packet at {key} where the file was asked for it")
        packets = itertools.chain([packet], packets)
    for i, frame in enumerate(frame for packet in packets for frame in packet.decode()):
        time = i if start is None or frame.pts is None else frame.pts
        if start is not None and time < start:
            continue
        if frame.is_corrupt:
            raise DataError(f"frame {i} is corrupt")
        yield time, frame


def display_size(width, height, aspect):
    """Size at which stored frames are shown: the smaller side grows.  aspect: of a pixel."""
    aspect = float(aspect or 1)
    if width * height > MAX_PIXELS:
        raise DataError(f"frames of {width}x{height} pixels, the limit is {MAX_PIXELS:,}")
    if not 1 / 200 < aspect < 200 or width * height * max(aspect, 1 / aspect) > MAX_PIXELS:
        raise DataError(f"frames of {width}x{height} pixels, each {aspect:g} times as wide as it is high: "
                        "too large when shown")
    if aspect < 1:
        return width, round(height / aspect)
    return round(width * aspect), height


# --------------------------------------------------------------------------------------------------- pixels


def target_size(width, height, min_pixels, max_pixels, backbone=QWEN2_VL, together=0):
    """The backbone's resize rule -> (width, height): whole tokens, area between the limits, shape kept.

    together: frames whose areas are limited as a sum (Qwen3-VL's rule for clips); 0: a picture, or one frame.
    """
    if min(width, height) < 1:
        raise DataError(f"a picture of {width}x{height} pixels: needs at least 1x1")
    if max_pixels < backbone.side**2:
        raise DataError(f"max_pixels {max_pixels}: needs at least {backbone.side**2}, one token")
    if max(width, height) > 200 * min(width, height):
        raise DataError(f"a picture of {width}x{height} pixels: sides differ by more than 200 to 1, crop it")
    if together:
        together = max(together, TEMPORAL)  # a single frame is shown twice
        size = resize_clip(together, height, width, TEMPORAL, backbone.side, min_pixels, max_pixels)
    else:
        size = smart_resize(height, width, backbone.side, min_pixels, max_pixels)
    height, width = size
    return width, height


def patchify(frames, size, patch=QWEN2_VL.patch):
    """RGB images of a picture (1) or clip (any number) -> patches (t*h*w, 6 patch^2) uint8, grid (t, h, w).

    size: (width, height), whole visual tokens.  The order is Qwen-VL's: the four patches of a token stand
    together; a patch is (3, 2 frames, rows, columns).  An odd last frame is repeated.
    """
    arrays = [np.asarray(f if f.size == size else f.resize(size, Image.BICUBIC)) for f in frames]
    arrays += arrays[-1:] * (-len(arrays) % TEMPORAL)
    t, h, w = len(arrays) // TEMPORAL, size[1] // patch, size[0] // patch
    x = np.stack(arrays).reshape(t, TEMPORAL, h // MERGE, MERGE, patch, w // MERGE, MERGE, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/2, w/2, 2, 2, 3, 2, patch, patch)
    return x.reshape(t * h * w, -1), (t, h, w)


def normalised(patches, backbone=QWEN2_VL):
    """Patches (n, 6 patch^2) uint8 -> float32, as the backbone's own processor gives them.

    They travel as bytes: a quarter of the memory, and of what is copied to a device.
    """
    x = patches.view(len(patches), 3, -1).float() * (1 / 255)
    for channel in range(3):
        x[:, channel].sub_(backbone.mean[channel]).div_(backbone.std[channel])
    return x.flatten(1)


# -------------------------------------------------------------------------------------------------- records


@dataclass
class Side:
    """One side of a pair, or one item to embed, and the target of its training."""

    parts: list  # of ("text" | "image" | "video" | "disc", value)
    rationale: str = ""
    answer: str = ""
    where: str = "item"  # file and record, for errors

    def key(self):
        """Equal for sides with the same text and media: what makes two targets the same target."""
        return repr([(kind, v if isinstance(v, (str, list, Part)) else id(v)) for kind, v in self.parts])

    def hash(self):
        """`key` as a signed number of 64 bits."""
        digest = hashlib.blake2b(self.key().encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


RECORD_KEYS = ("dataset_name", "qry", "pos", "neg")
MEDIA_KEYS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
SIDE_KEYS = ("conversations", *MEDIA_KEYS)
TURN_KEYS = ("from", "value", "role", "content")
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
ITEM_KEYS = ("text", "image", "video", "start", "end")


def only_keys(raw, known, where):
    """raw must be an object with no key that is not known."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: needs an object with {next(iter(known))!r}, got {type(raw).__name__}")
    for key in raw:
        if key not in known:
            raise DataError(f"{where}: unknown key {quote(key)}.{nearest(key, known)}")


def printable(text, where):
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where}: the text is not valid Unicode: {e}") from e
    return text


def listed(value):
    """None, one or several -> a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def parse_side(raw, root, where):
    """A side of a training record -> Side.  root: folder of the media; where: for errors.

    raw: {"conversations": turns, "image"?, "video"?}, or an item to embed, without rationale or answer.
    """
    if isinstance(raw, list) and len(raw) == 1:  # seen in the wild
        raw = raw[0]
    if isinstance(raw, str) or isinstance(raw, dict) and raw and raw.keys() <= set(ITEM_KEYS):
        return parse_item(raw, root, where)
    only_keys(raw, SIDE_KEYS, where)
    spoken = parse_turns(raw.get("conversations"), where)
    media = {"image": [], "video": []}
    for key, kind in MEDIA_KEYS.items():
        given = raw.get(key)
        if given in (None, []):
            continue
        if media[kind]:
            raise DataError(f"{where}: both {kind!r} and {kind + 's'!r} are given")
        media[kind] = [given] if key == "video" else listed(given)  # a list as "video": one clip's frames
    parts = place(spoken["human"], media, root, where, disc=True)
    if [kind for kind, _ in parts].count("disc") > 1:
        raise DataError(f"{where}: more than one <disc_emb> in the text")
    return Side(parts, *parse_target(spoken.get("gpt", ""), where), where)


def parse_turns(turns, where):
    """The list under 'conversations' -> {"human": its text, "gpt": its text, if there is such a turn}."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: 'conversations' must be a list of turns")
    spoken = {}
    for turn in turns:
        only_keys(turn, TURN_KEYS, f"{where}: a turn")
        who = SPEAKERS.get(str(turn.get("from", turn.get("role"))))
        text = turn.get("value", turn.get("content"))
        if who is None or not isinstance(text, str) or len(turn) != 2:
            needs = "'from' ('human' or 'gpt') and a text 'value'"
            raise DataError(f"{where}: a turn needs {needs}, got {quote(turn)}")
        if who in spoken:
            raise DataError(f"{where}: more than one {who!r} turn; a side is one question and one answer")
        spoken[who] = printable(text, where)
    if "human" not in spoken:
        raise DataError(f"{where}: no 'human' turn")
    return spoken


def parse_target(text, where):
    """The gpt turn -> (rationale, answer).  Without tags the whole text is the answer."""
    found = {}
    for tag in ("think", "answer"):
        match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        if match:
            found[tag] = match[1].strip()
            text = text.replace(match[0], "", 1)
        elif f"<{tag}>" in text or f"</{tag}>" in text:
            raise DataError(f"{where}: <{tag}> is opened or closed only once in {quote(text)}")
    rest = text.replace("<gen_emb>", "").strip()
    if "answer" in found and rest:
        raise DataError(f"{where}: text outside <think> and <answer>: {quote(rest)}")
    return found.get("think", ""), found.get("answer", rest)


def parse_item(item, root="", where="item"):
    """An item to embed -> Side.  item: a string, a picture, or {"text"?, "image"?, "video"?}.

    image: what `as_image` takes, or a list of these; video: a path, a folder of frames, or a list of frames.
    Beside the path of a video file "start" and "end" may say in seconds which part of it is meant.
    A bare Pillow image, Path or array is a picture.  Media stand in front of the text, unless it has one
    <image> (<video>) for each.
    """
    if isinstance(item, (Image.Image, np.ndarray, os.PathLike)):
        item = {"image": item}
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict) or all(value is None for value in item.values()):
        needs = f"a string, a picture or an object with some of {ITEM_KEYS[:3]}"
        raise DataError(f"{where}: needs {needs}, got {quote(item)}")
    only_keys(item, ITEM_KEYS, where)
    text, image, video, start, end = (item.get(key) for key in ITEM_KEYS)
    if start is not None or end is not None:
        video = part_of(video, start, end, where)
    if not isinstance(text, (str, type(None))):
        raise DataError(f"{where}: 'text' must be a string, got {type(text).__name__}")
    if isinstance(image, (list, tuple)) and not image:
        raise DataError(f"{where}: 'image' is an empty list")
    text = printable(text or "", where)
    front, marked = [], {}
    for kind, given in (("image", listed(image)), ("video", [] if video is None else [video])):
        if given and f"<{kind}>" in text:
            marked[kind] = given
        else:
            front += [(kind, resolve(source, kind, root, where)) for source in given]
    return Side(front + place(text, marked, root, where), where=where)


def part_of(video, start, end, where):
    """The item's values of these keys -> Part."""
    if not isinstance(video, (str, os.PathLike)):
        raise DataError(f"{where}: 'start' and 'end' belong to a 'video' that is a file, not {quote(video)}")
    start, end = 0 if start is None else start, math.inf if end is None else end
    for seconds in (start, end):
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise DataError(f"{where}: 'start' and 'end' are seconds, got {quote(seconds)}")
    if not 0 <= start < end or start == math.inf:
        raise DataError(f"{where}: 'start' {start}, 'end' {end}: need 0 <= start < end, in seconds")
    return Part(os.fsdecode(video), float(start), float(end))


def place(text, media, root, where, disc=False):
    """Text with markers -> parts: each <image>, <video> takes the next of its kind in media, a dict of lists.

    disc: <disc_emb> is a marker, too.  A line break directly behind a medium's marker belongs to the marker:
    published records have one there, an item of "image" and "text" has none, and both give the same parts.
    In front of <disc_emb> it is the prompt's.
    """
    for kind, given in media.items():
        n = text.count(f"<{kind}>")
        if n != len(given):
            raise DataError(f"{where}: {n} <{kind}> in the text, {len(given)} {kind} given")
    if not media:
        return [("text", text)]
    queues = {f"<{kind}>": iter(given) for kind, given in media.items()}
    markers = "|".join(queues)
    text = re.sub(rf"({markers})\r?\n(?!<disc_emb>)", r"\1", text)
    if disc:
        markers += "|<disc_emb>"
    parts = []
    for piece in re.split(f"({markers})", text):
        if piece in queues:
            kind = piece[1:-1]
            parts.append((kind, resolve(next(queues[piece]), kind, root, where)))
        elif disc and piece == "<disc_emb>":
            parts.append(("disc", None))
        elif piece:
            parts.append(("text", piece))
    return parts


def resolve(source, kind, root, where):
    """A medium (kind: image, video or frame) -> a path under the root, a Pillow image, or a list of these."""
    if isinstance(source, Part):
        file = resolve(source.video, kind, root, where)
        if os.path.isdir(file):
            raise DataError(f"{where}: 'start' and 'end' belong to a video file, {file} is a folder")
        return replace(source, video=file)
    if isinstance(source, PICTURE) and kind != "video":
        try:
            return as_image(source)
        except DECODER_ERRORS as e:
            raise DataError(f"{where}: {kind}: {e}") from e
    if isinstance(source, (list, tuple)) and kind == "video" and source:
        return [resolve(frame, "frame", root, where) for frame in source]
    if not isinstance(source, (str, os.PathLike)):
        or_else = "or a list of frames" if kind == "video" else "(or a Pillow image, array, bytes or file)"
        raise DataError(f"{where}: {kind} needs a path {or_else}, got {type(source).__name__}")
    name = os.fsdecode(source)
    if not name:
        raise DataError(f"{where}: {kind} is an empty path")
    path = os.path.join(root, name)
    if not os.path.isfile(path) and not (kind == "video" and os.path.isdir(path)):
        raise DataError(f"{where}: {kind} {quote(name)} does not exist under {os.fspath(root) or '.'!r}")
    return path


class Pairs:
    """The training pairs of one file, by byte offset: the file itself is never in memory.

    path: JSON lines, or one JSON array of the same objects; media: folder of the media, default: the file's.
    Every record is parsed once here, so that a bad one is found before training: an error, or with skip_bad a
    line in `self.bad`.  Arrays over the N good records: dataset (index into `names`), target (a hash).
    negatives: the most that a record has.
    """

    def __init__(self, path, media=None, skip_bad=False, progress=True):
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file; --data takes a JSONL of training pairs")
        self.path, self.media, self.bad = path, media or os.path.dirname(os.path.abspath(path)), []
        self.name = os.path.splitext(os.path.basename(path))[0]  # of a data set whose records have none
        spans, dataset, target, number = array("q"), array("i"), array("q"), array("q")
        names, digest, self.negatives = {}, hashlib.blake2b(digest_size=8), 0
        bar = tqdm(total=os.path.getsize(path), desc="reading pairs", unit="B", unit_scale=True, leave=False,
                   disable=not progress)
        with open(path, "rb") as f, bar:
            for n, (start, end, text) in enumerate(spans_of(f, path), 1):
                bar.update(end - start)
                try:
                    name, (_, pos, *negatives) = self.parse(text, n)
                except DataError as e:
                    if not skip_bad:
                        raise
                    self.bad.append(str(e))
                    continue
                spans.extend((start, end))
                number.append(n)
                digest.update(text)
                dataset.append(names.setdefault(name, len(names)))
                target.append(pos.hash())
                self.negatives = max(self.negatives, len(negatives))
        self.digest, self.names = digest.hexdigest(), list(names)
        self.dataset, self.target = np.array(dataset, np.int32), np.array(target, np.int64)
        self.spans, self.number = np.array(spans, np.int64).reshape(-1, 2), np.array(number, np.int64)
        if not len(self):
            why = f"; {len(self.bad)} bad records, the first: {self.bad[0]}" if self.bad else ""
            raise DataError(f"{path}: no training pair in this file{why}")

    def parse(self, text, n):
        """The bytes of record n -> name of its data set, (query, target and negatives, Side each)"""
        where = f"{self.path}: record {n}"
        raw = parse_json(text, where)
        only_keys(raw, RECORD_KEYS, where)
        for key in ("qry", "pos"):
            if key not in raw:
                raise DataError(f"{where}: no {key!r}; a record has {', '.join(RECORD_KEYS)}")
        name, negatives = raw.get("dataset_name", self.name), raw.get("neg", [])
        if not isinstance(name, str):
            raise DataError(f"{where}: 'dataset_name' must be a string")
        if not isinstance(negatives, list):
            raise DataError(f"{where}: 'neg' must be a list of sides, got {type(negatives).__name__}")
        sides = [("qry", raw["qry"]), ("pos", raw["pos"])]
        sides += [(f"neg {i}", negative) for i, negative in enumerate(negatives, 1)]
        return name, tuple(parse_side(side, self.media, f"{where}: {key}") for key, side in sides)

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        """-> (query Side, target Side, and the Sides of its hard negatives)"""
        start, end = self.spans[i].tolist()
        with open(self.path, "rb") as f:
            f.seek(start)
            _, sides = self.parse(f.read(end - start), self.number[i])
        return sides

    def texts(self):
        """Every text of the file, for training a tokenizer."""
        for side in itertools.chain.from_iterable(self[i] for i in range(len(self))):
            yield from (value for kind, value in side.parts if kind == "text")
            yield from (side.rationale, side.answer)


def parse_json(text, where):
    def no_key_twice(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = max(keys, key=keys.count)
            raise DataError(f"{where}: the key {quote(twice)} stands twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=no_key_twice)
    except DataError:
        raise
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON: {e}") from e


def spans_of(f, path):
    """(start, end, bytes) of every record in an open binary file: JSON lines, or the objects of a JSON array.

    A file that starts with [ is read whole.
    """
    blank = b"\xef\xbb\xbf \t\r\n"  # the first three: a byte order mark
    first = next((line.strip(blank) for line in f if line.strip(blank)), b"")
    f.seek(0)
    if first.startswith(b"["):
        yield from array_spans(f.read(), path)
        return
    start = 0
    for line in f:
        if text := line.strip(blank):
            yield start, start + len(line), text
        start += len(line)


def array_spans(raw, path):
    """The same for the bytes of one JSON array of objects."""
    broken = f"{path}: what starts with [ must be one JSON array of objects; it is not, behind byte"
    text = raw.decode("latin-1")  # a character is a byte, and what JSON is made of is ASCII
    decoder = json.JSONDecoder()
    begin = re.compile(r"[^[]*\[[ \t\r\n]*((?=\{)|\][ \t\r\n]*\Z)")  # up to the first object, or the end
    between = re.compile(r"[ \t\r\n]*(,[ \t\r\n]*(?=\{)|\][ \t\r\n]*\Z)")  # up to the next one, or the end
    end, gap = 0, begin.match(text)
    while gap and gap.end() < len(text):
        start = gap.end()
        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{broken} {start}: {e}") from e
        yield start, end, raw[start:end]
        gap = between.match(text, end)
    if not gap:
        raise DataError(f"{broken} {end}")


# --------------------------------------------------------------------------------------------------- prompt

QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>", "<|endoftext|>")
PLUME_TOKENS = ("<gen_emb>", "<disc_emb>", "<bot>", "<eot>", "<ct>")  # <ct>: the released code's, unused here
SPECIAL = QWEN_TOKENS + PLUME_TOKENS

# The chat template: everything that stands around an item.  A checkpoint carries its own.
TEMPLATE = dict(
    system="You are a helpful assistant.",
    turns="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{item}<|im_end|>\n"
          "<|im_start|>assistant\n<think><bot>",
    anchor="\n<disc_emb>\n{prompt}",  # ends the item, unless a record writes <disc_emb> itself
    closing="</think>\n",  # between <eot> and <gen_emb>, which end the thought and the whole
    answer="<answer>{answer}</answer>\n",  # behind the closing, as long as the curriculum writes it
)
# The prefix in Jinja, for transformers' `apply_chat_template`: one turn of the user
JINJA = """\
{%- set content = messages[0]['content'] -%}
{%- if content is string -%}
    {%- set content = [{'type': 'text', 'text': content}] -%}
{%- endif -%}
{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}
    {{- raise_exception('PLUME embeds one turn of the user, without a system text of its own') -}}
{%- endif -%}
{{- $before -}}
{%- if $white_image and not content | selectattr('type', 'in', ['image', 'video']) | list -%}
    {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- endif -%}
{%- for part in content -%}
    {%- if part['type'] == 'text' -%}
        {{- part['text'] -}}
    {%- elif part['type'] in ['image', 'video'] -%}
        {{- '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' -}}
    {%- else -%}
        {{- raise_exception('PLUME embeds text, image and video, not ' + part['type']) -}}
    {%- endif -%}
{%- endfor -%}
{{- $behind -}}
"""
TEMPLATES = {name: TEMPLATE for name in BACKBONES}  # what a model type starts from
TEMPLATES["qwen3_vl"] = TEMPLATE | dict(system="", turns=TEMPLATE["turns"].split("<|im_end|>\n", 1)[1])
NEEDED = dict(turns=("{item}", "<bot>"), anchor=("<disc_emb>",), answer=("{answer}",))  # once each


def fixed_strings(template):
    """What a template writes around every item, between special tokens and places that are filled in."""
    turns = template["turns"].replace("{system}", template["system"])
    text = "{}".join([turns, template["closing"], template["answer"]])
    return [piece for piece in re.split(r"<\|\w+\|>|<bot>|\{\w*\}", text) if piece.strip()]


def train_tokenizer(texts, whole=(), size=8192):
    """A byte-level BPE of at most `size` entries, split like Qwen2's; a string of `whole` is one token."""
    backend, qwen = tokenizers.Tokenizer(tokenizers.models.BPE()), Qwen2Tokenizer().backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    backend.decoder = qwen.decoder
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@dataclass
class Limits:
    """Pixel and token limits.  They belong to the checkpoint: embeddings compare only under the same ones."""

    min_pixels: int = 56 * 56  # a picture is scaled up to this area
    max_pixels: int = 28 * 28 * 1280  # and down to this one
    video_min_pixels: int = 56 * 56  # the same for each frame of a clip
    video_max_pixels: int = 28 * 28 * 32
    num_frames: int = 8  # frames sampled from a clip
    frame_rate: float = 2.0  # frames a second of a clip that is given as frames; Qwen2-VL does not ask
    max_len: int = 8192  # tokens in one sequence: prefix, suffix, in training also the latent steps

    def __post_init__(self):
        for name, value in vars(self).items():
            if name == "frame_rate":
                if type(value) is not float or not 0 < value < math.inf:
                    raise DataError(f"{name} {quote(value)}: needs a number above 0, as 2.0")
                continue
            least = QWEN2_VL.side**2 if name in ("max_pixels", "video_max_pixels") else 1
            if type(value) is not int or value < least:
                raise DataError(f"{name} {quote(value)}: needs a whole number of at least {least}")
        for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
            if vars(self)[low] > vars(self)[high]:
                raise DataError(f"{low} {vars(self)[low]} is above {high} {vars(self)[high]}")


class VisualTokens(NamedTuple):
    """Of a picture, or of a clip or frame pair, as they stand in the prompt."""

    id: int  # of <|image_pad|> or <|video_pad|>
    positions: np.ndarray  # (3, n) M-RoPE positions (time, row, column), from 0 on


def visual_tokens(id, times, h, w):
    """times: positions of the frame pairs, from 0 on; h, w: rows and columns of tokens."""
    time, row, column = np.indices((len(times), h, w)).reshape(3, -1)
    return VisualTokens(id, np.stack([np.array(times)[time], row, column]))


class Processor:
    """Tokenizer, prompt, limits and chat template: everything between an item and the model's ids."""

    def __init__(self, tokenizer, prompt, limits, white_image=False, template=TEMPLATE, backbone=QWEN2_VL):
        for name, needed in NEEDED.items():
            for piece in needed:
                if template[name].count(piece) != 1:
                    given = quote(template[name])
                    raise DataError(f"the template's {name!r} must have {piece!r} once, it is {given}")
        turns = template["turns"]
        if not turns.endswith("<bot>"):
            raise DataError("the template's 'turns' must end in '<bot>', where the thought begins: "
                            + quote(turns))
        self.tokenizer, self.prompt, self.limits = tokenizer, prompt, limits
        self.white_image, self.template, self.backbone = white_image, template, backbone
        before, behind = turns.split("{item}")
        self.before = before.replace("{system}", template["system"])
        self.behind = behind.replace("{system}", template["system"])
        tokenizer.chat_template = self.jinja()
        # a copy that reads special tokens in a user's text as plain characters; ours are added by id
        self.backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.encode_special_tokens = True
        self.known = {}  # texts encoded lately -> their ids
        self.id = {token: self.backend.token_to_id(token) for token in SPECIAL}
        missing = [token for token, i in self.id.items() if i is None]
        if missing:
            raise DataError(f"the tokenizer has no {' '.join(missing)}; PLUME needs {' '.join(SPECIAL)}")

    def __reduce__(self):  # the copy's setting does not survive pickling to a worker: make it anew there
        return Processor, (
            self.tokenizer, self.prompt, self.limits, self.white_image, self.template, self.backbone)

    def jinja(self):
        """What `sequence` does, as a Jinja template.  Special tokens in a text are tokens there."""
        anchor = self.template["anchor"].replace("{prompt}", self.prompt)
        values = dict(before=self.before, behind=anchor + self.behind, white_image=self.white_image)
        literals = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
        return string.Template(JINJA).substitute(literals)

    def render(self, side, stage=None, curriculum=None):
        """The one prompt of training, evaluation and `encode`: a Side -> prefix and suffix.

        ids (P,), positions (3, P), disc: place of <disc_emb> in ids, pixels and grids: one for each medium,
        suffix (T,), first: place in it of the first token that can be wrong, replaced: see `collate`.
        Without a stage the suffix is inference's: <eot>, the template's closing, <gen_emb>.  With one, it is
        the curriculum's text for that stage; a rationale too long for `max_len` loses its end (cut: how many
        tokens), and nothing else ever does.
        Raises DataError when question and media alone are too long, or a medium cannot be read.
        """
        try:
            prefix = self.prefix(self.sequence(side.parts))
        except DataError as e:
            raise DataError(f"{side.where}: {e}") from e
        used = len(prefix["ids"]) + (stage.latent_steps if stage else 0)
        suffix = self.suffix(side, stage, curriculum, used)
        return prefix | suffix | dict(replaced=self.replaced(side, stage, curriculum))

    def sequence(self, parts):
        """Parts -> the whole prompt as texts, ids of special tokens, and (kind, source) for the media."""
        kinds = [kind for kind, _ in parts]
        if self.white_image and "image" not in kinds and "video" not in kinds:  # the released text-only form
            size = self.backbone.side, self.backbone.side
            parts = [("image", Image.new("RGB", size, "white")), *parts]
        if "disc" not in kinds:
            end, prompt = self.template["anchor"].split("<disc_emb>")
            prompt = prompt.replace("{prompt}", self.prompt)
            parts = [*parts, ("text", end), ("disc", None), ("text", prompt)]
        sequence, last = self.pieces(self.before), None
        for kind, value in parts:
            if kind == "disc":
                sequence.append(self.id["<disc_emb>"])
            elif kind == "text" and last == "disc":  # the prompt; the released one names <gen_emb>
                sequence += self.pieces(value, ("<gen_emb>",))
            elif kind == "text":
                sequence.append(str(value))  # not numpy's kind of string
            else:
                sequence.append((kind, value))
            last = kind
        return sequence + self.pieces(self.behind)

    def pieces(self, text, tokens=SPECIAL):
        """A text of ours -> its special tokens as ids, and what is between them as strings."""
        found = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
        return [self.id[piece] if piece in tokens else piece for piece in found]

    def prefix(self, sequence):
        """What `sequence` gives -> ids (P,), M-RoPE positions (3, P), patches and grids of the media."""
        ids, positions, pixels, grids, pieces, at = [], [], [], [], [], 0
        for piece in sequence:
            if not isinstance(piece, tuple):
                pieces.append(piece)
                continue
            patches, grid, shown = self.media(*piece)
            pieces += shown
            pixels.append(patches)
            grids.append(grid)
        for kind, run in itertools.groupby(pieces, type):
            if kind is VisualTokens:
                for visual in run:
                    ids += [visual.id] * visual.positions.shape[1]
                    positions.append(visual.positions + at)
                    at += int(visual.positions.max()) + 1  # Qwen2-VL's own rule: the largest of any axis
                continue
            run = self.encode("".join(run)) if kind is str else list(run)  # neighbouring texts are one
            ids += run
            positions.append(np.tile(np.arange(at, at + len(run)), (3, 1)))
            at += len(run)
        disc = ids.index(self.id["<disc_emb>"])
        return dict(ids=ids, positions=np.concatenate(positions, 1), disc=disc, pixels=pixels, grids=grids)

    def encode(self, text):
        """Text -> token ids.  They are remembered a while: the prompt around every item is the same."""
        ids = self.known.get(text)
        if ids is None:
            ids = self.backend.encode(text, add_special_tokens=False).ids if text else []
            if len(self.known) >= 4096:
                self.known = {}
            self.known[text] = ids
        return ids

    def media(self, kind, source):
        """An image or video -> patches and grid, as `patchify`; and what stands for it in the prompt."""
        try:
            frames, seconds = self.frames(kind, source)
            size = self.size(kind, frames)
            patches, grid = patchify(frames, size, self.backbone.patch)
            return patches, grid, self.shown(kind, grid, seconds)
        except DataError as e:
            if isinstance(source, (str, os.PathLike, Part)) and str(source) not in str(e):
                raise DataError(f"{source}: {e}") from e
            raise

    def frames(self, kind, source):
        """-> the frames of a medium and their seconds, as `load_clip`."""
        if kind == "image":
            return [load_image(source)], [0.0, 0.0]
        return load_clip(source, self.limits.num_frames, self.limits.frame_rate)

    def size(self, kind, frames):
        """-> (width, height) in which they are shown."""
        limits, backbone = self.limits, self.backbone
        if kind == "image":
            return target_size(*frames[0].size, limits.min_pixels, limits.max_pixels, backbone)
        low, high, together = limits.video_min_pixels, limits.video_max_pixels, 0
        if backbone.time == "text":  # Qwen3-VL: as much in all as a clip with all its frames may have
            low, high, together = low * limits.num_frames, high * limits.num_frames, len(frames)
        return target_size(*frames[0].size, low, high, backbone, together)

    def shown(self, kind, grid, seconds):
        """-> the prompt of a medium: texts, ids, and VisualTokens.  seconds: as `load_clip` gives them."""
        t, h, w = grid[0], grid[1] // MERGE, grid[2] // MERGE
        names = f"<|{kind}_pad|>", "<|vision_start|>", "<|vision_end|>"
        pad, start, end = (self.id[name] for name in names)
        times, n = np.arange(t), len(seconds) - 1
        if kind == "video" and self.backbone.time == "text":
            pieces, begin = [], [*seconds[:n], seconds[n - 1]]  # an odd last frame is repeated
            for i in range(0, t * TEMPORAL, TEMPORAL):
                mean = (begin[i] + begin[i + TEMPORAL - 1]) / 2
                pieces += [f"<{mean:.1f} seconds>", start, visual_tokens(pad, [0], h, w), end]
            return pieces
        if kind == "video" and self.backbone.time == "seconds":
            every = np.float32(self.backbone.rate) * np.float32(TEMPORAL * seconds[n] / n)  # as transformers
            times = (times * every).astype(int)
        return [start, visual_tokens(pad, times, h, w), end]

    def suffix(self, side, stage, curriculum, used):
        """What stands behind `used` tokens of question, media and latent steps: suffix, cut, first."""
        rest, answer = curriculum.rewrite(side.rationale, side.answer, stage) if stage else ("", "")
        lead = closing = self.template["closing"]
        lead += self.template["answer"].split("{answer}")[0]
        if answer:
            closing += self.template["answer"].replace("{answer}", answer)
        rest, lead, closing = self.encode(rest), self.encode(lead), self.encode(closing)
        room = self.limits.max_len - used - len(closing) - 2  # <eot>, <gen_emb>
        if room < 0:
            raise DataError(
                f"{side.where}: {used} tokens of question, media and latent steps and {len(closing) + 2} "
                f"behind them exceed max_len {self.limits.max_len}; raise max_len, or lower max_pixels or "
                "num_frames")
        kept, eot = rest[:room], [self.id["<eot>"]]
        if curriculum and curriculum.rest_of_rationale == "after":
            thought = eot + kept
        else:
            thought = kept + eot
        first = None
        if side.rationale and kept:
            first = thought.index(kept[0])
        elif side.rationale:  # the answer, behind what every answer begins with
            first = 1 + len(os.path.commonprefix([lead, closing]))
        return dict(suffix=thought + closing + [self.id["<gen_emb>"]], cut=len(rest) - len(kept), first=first)

    def replaced(self, side, stage, curriculum):
        """(latent step, token): where a step stands for a part of the rationale, that part's first token.

        An adaptive curriculum has <eot> for every step behind the last part.
        """
        if not stage or not stage.latent_steps:
            return []
        parts = curriculum.parts(side.rationale)[: stage.index]
        tokens = [self.encode(part) for part in parts]
        if curriculum.adaptive:
            tokens = [ids or [self.id["<eot>"]] for ids in tokens]
        return [(i * curriculum.steps_per_segment, ids[0]) for i, ids in enumerate(tokens) if ids]


# -------------------------------------------------------------------------------------------------- batches


def padded(rows, value):
    """Arrays or lists (n, ...) -> one tensor (B, largest n, ...), filled up on the right."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)


def collate(samples, processor):
    """Rendered samples -> one batch of tensors, prefixes and suffixes padded on the right.

    ids (B, P), positions (3, B, P), lengths (B,), disc (B,), suffix (B, T), gen (B,) column of <gen_emb>;
    media (M,) flat places of the media tokens in (B, P), pixels (uint8) and grid of all media in that order
    or None;
    label_at (N,) flat places in (B, T), labels (N,), first (n,) rows of label_at: the first token that
    can be wrong: of the rationale that is left, or else of the answer, in rows that have a rationale;
    replaced (m, 3): row, latent step and token, where a step stands for a part of the rationale: its first.
    """
    pad = processor.id["<|endoftext|>"]
    ids = padded([s["ids"] for s in samples], pad)  # (B, P)
    positions = padded([s["positions"].T for s in samples], 0)  # (B, P, 3)
    positions = positions.permute(2, 0, 1).contiguous()  # (3, B, P)
    suffix = padded([s["suffix"] for s in samples], pad)  # (B, T)
    lengths = torch.tensor([len(s["ids"]) for s in samples])
    disc = torch.tensor([s["disc"] for s in samples])
    gen = torch.tensor([len(s["suffix"]) - 1 for s in samples])
    is_media = (ids == processor.id["<|image_pad|>"]) | (ids == processor.id["<|video_pad|>"])
    pixels = [torch.from_numpy(patches) for s in samples for patches in s["pixels"]]
    grid = [grid for s in samples for grid in s["grids"]]
    label_at, labels, first, replaced = [], [], [], []
    for b, s in enumerate(samples):
        if not s.get("labelled", True):
            continue
        if s["first"] is not None:
            first.append(len(labels) + s["first"])
        start = b * suffix.shape[1]
        label_at += range(start, start + len(s["suffix"]))
        labels += s["suffix"]
        replaced += [(b, step, token) for step, token in s["replaced"]]
    return dict(
        ids=ids, positions=positions, lengths=lengths, disc=disc, suffix=suffix, gen=gen,
        media=is_media.flatten().nonzero()[:, 0],
        pixels=torch.cat(pixels) if pixels else None,
        grid=torch.tensor(grid) if grid else None,
        label_at=torch.tensor(label_at, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        first=torch.tensor(first, dtype=torch.long),
        replaced=torch.tensor(replaced, dtype=torch.long).view(-1, 3))


class Schedule:
    """Which records make which step: a function of seed and step, so workers, ranks and resumed runs agree.

    Every global batch comes from one data set (its other rows are hard negatives).  A data set gets steps in
    proportion to its size, all over the run, and passes through all its records before it shows one again.
    dataset (pairs,): number of each record's data set, -1: held out.
    """

    def __init__(self, dataset, names, global_batch, steps, seed):
        self.rows = [np.flatnonzero(dataset == d) for d in range(len(names))]
        self.global_batch, self.steps, self.seed = global_batch, steps, seed
        share = np.array([len(r) for r in self.rows])
        share = share / share.sum() * steps
        self.counts = np.floor(share).astype(int)
        largest_remainders = np.argsort(self.counts - share, kind="stable")[: steps - self.counts.sum()]
        self.counts[largest_remainders] += 1
        which = np.repeat(np.arange(len(names)), self.counts)
        nth = np.concatenate([np.arange(c) for c in self.counts])
        at = (nth + np.random.default_rng([seed, 0]).random(steps)) / self.counts[which]
        order = np.argsort(at, kind="stable")
        self.which, self.nth = which[order], nth[order]
        self.lap = functools.lru_cache(2 * len(names))(self.lap)  # a batch may stand across two passes

    def lap(self, d, number):
        """The records of a data set in the order of one of its passes."""
        return np.random.default_rng([self.seed, 1, d, number]).permutation(self.rows[d])

    def __getitem__(self, step):
        """-> the record numbers of this step's global batch"""
        d, size = int(self.which[step]), self.global_batch
        places = np.arange(size) + self.nth[step] * size
        laps, places = np.divmod(places, len(self.rows[d]))
        return np.array([self.lap(d, lap)[place] for lap, place in zip(laps.tolist(), places.tolist())])


class StepSampler(torch.utils.data.Sampler):
    """(step, stage, indices of this rank) from `start` on.

    The stage travels with the indices: a worker that prefetches ahead writes the text of the right one.
    """

    def __init__(self, schedule, progress, start=0, rank=0, world=1):
        self.schedule, self.progress, self.start = schedule, progress, start
        rows = schedule.global_batch // world
        self.mine = slice(rank * rows, (rank + 1) * rows)

    def __iter__(self):
        for step in range(self.start, self.schedule.steps):
            yield step, self.progress.stage(step), self.schedule[step][self.mine]

    def __len__(self):
        return self.schedule.steps - self.start


class Batches(torch.utils.data.Dataset):
    """(step, stage, indices) -> a batch of B pairs, collated in micro-batches.

    micro: collated batches of up to `micro_batch` queries, followed by their targets and these by their hard
    negatives (0: all B in one);
    target (B, 1+M): hashes of target and hard negatives, M: the most that a record of the file has; valid
    (B, 1+M): which of them there are; negative_at (n,): flat places in (B, M) of those in `micro`;
    step, dataset (name), stage, cut (rationale tokens lost to max_len), and bad: with skip_bad a record whose
    media cannot be read is named there and left out of every loss.
    """

    def __init__(self, pairs, processor, curriculum, skip_bad=False, micro_batch=0):
        self.pairs, self.processor, self.curriculum = pairs, processor, curriculum
        self.skip_bad, self.micro_batch = skip_bad, micro_batch

    def __getitem__(self, job):
        step, stage, indices = job
        target = torch.zeros(len(indices), 1 + self.pairs.negatives, dtype=torch.long)
        valid, rows, bad = torch.zeros_like(target, dtype=torch.bool), [], []
        for row, i in enumerate(indices):
            sides = self.pairs[i]
            try:
                rows.append([self.processor.render(side, stage, self.curriculum) for side in sides])
                hashes = [self.pairs.target[i], *(side.hash() for side in sides[2:])]
                target[row, : len(hashes)] = torch.tensor(hashes)
                valid[row, : len(hashes)] = True
            except DataError as e:
                if not self.skip_bad:
                    raise
                bad.append(str(e))
                blank = self.processor.render(Side([("text", "")]), stage, self.curriculum)
                rows.append([dict(blank, labelled=False)] * 2)
        size, micro = self.micro_batch or len(rows), []
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            queries, targets = [row[0] for row in part], [row[1] for row in part]
            negatives = [negative for row in part for negative in row[2:]]
            micro.append(dict(collate(queries + targets + negatives, self.processor), pairs=len(part)))
        return dict(
            micro=micro, step=step, stage=stage, bad=bad,
            dataset=self.pairs.names[self.pairs.dataset[indices[0]]],
            target=target, valid=valid, negative_at=valid[:, 1:].flatten().nonzero()[:, 0],
            cut=sum(sample["cut"] for row in rows for sample in row))


def to_device(batch, device):
    """The grid stays on the CPU: the vision tower reads its numbers, and would wait for the device."""
    moved = {name: value.to(device, non_blocking=True)
             for name, value in batch.items() if torch.is_tensor(value) and name != "grid"}
    return batch | moved


# --------------------------------------------------------------------------------------------- command line


def parse_flags(config_class, argv, about, moved={}):
    """`--key value` and `--key=value` -> an instance of a dataclass with defaults, and the names given.

    `--flag` alone is true; a tuple takes all values up to the next flag.
    moved: {a flag of an earlier version: the command that does it now}.
    Unknown names and values of the wrong type end the program with the nearest right name.
    """
    kinds = {field.name: field.type for field in fields(config_class)}
    if "-h" in argv or "--help" in argv:
        print(about.strip(), "", "flags (--key value or --key=value):", *flag_help(config_class), sep="\n")
        raise SystemExit(0)
    values, rest = {}, list(argv)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name in moved:
            raise SystemExit(f"error: {flag} is a command of its own now: {moved[name]}")
        if not flag.startswith("--") or name not in kinds:
            raise SystemExit(f"error: unknown argument {flag!r}.{nearest(name, kinds)}")
        given = [text] if equals else []
        while rest and not rest[0].startswith("--") and (not given or kinds[name] is tuple):
            given.append(rest.pop(0))
        values[name] = flag_value(name, kinds[name], given)
    return config_class(**values), set(values)


def flag_value(name, kind, given):
    """The texts behind a flag -> its value."""
    needs = {bool: "true or false", tuple: "a value"}.get(kind, f"a value of type {kind.__name__}")
    try:
        if kind is bool:
            return {"true": True, "false": False}[given[0].lower()] if given else True
        if kind is tuple and given:
            return tuple(given)
        return kind(given[0])
    except (ValueError, LookupError):
        raise SystemExit(f"error: --{name} needs {needs}, got {given[0]!r}" if given
                         else f"error: --{name} needs {needs} behind it") from None


def flag_help(config_class):
    """The lines of the help, from the source of a config class and of those above it.

    A field is `name: type = default  # what it is`.  A comment line below it with at least 4 blanks behind
    the # goes on with what it is; every other comment line is the heading of a chapter.
    """
    entries = []  # [flag, what it is, default]
    for cls in reversed(config_class.__mro__[:-1]):
        for line in inspect.getsource(cls).splitlines():
            if field := re.match(r"    (\w+): (\w+) = (.*?)  # (.*)", line):
                name, kind, default, what = field.groups()
                entries.append([f"  --{name} {kind.upper()}", what, f" [{default}]"])
            elif more := re.match(r"    # {4,}(.*)", line):
                entries[-1][1] += " " + more[1]
            elif heading := re.match(r"    # (.*)", line):
                entries.append([f"\n {heading[1]}", "", ""])
    return [f"{flag:29} {what}{default}".rstrip() for flag, what, default in entries]


def command(main):
    """Runs main(argv) of a script; what a user did wrong ends it with one line instead of a traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (DataError, OSError) as e:
        sys.exit(f"error: {said(e)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    sys.exit("this file is read by the others; to look at data: python -m tools.look --show sheet.png")
