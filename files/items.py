"""An item to embed, or a side of a training record, in any spelling -> Side: each text and medium checked."""

import hashlib
import math
import os
import re
from dataclasses import dataclass, replace

from files.clips import Part
from files.errors import DataError, quote
from files.jsonl import only_keys
from files.pictures import as_image, DECODER_ERRORS, PICTURE

ITEM_KEYS = ("text", "image", "video", "start", "end", "fps")
STORED = ("bytes", "path")  # a medium as a column of the datasets library has it; the bytes go first
# of a training record, in every spelling that published files have
MEDIA_KEYS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
SIDE_KEYS = ("conversations", *MEDIA_KEYS, "fps")
TURN_KEYS = ("from", "value", "role", "content")
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass
class Side:
    """One side of a pair, or one item to embed, and the target of its training."""

    parts: list  # of ("text" | "image" | "video" | "disc", value)
    rationale: str = ""
    answer: str = ""
    where: str = "item"  # file and record, for errors

    def key(self):
        """Equal for sides with the same text and media: what makes two targets the same target.

        A file is known by its path, however that is spelled; of a picture in memory only itself is the same.
        """
        return repr([(kind, v if kind in ("text", "disc") else one_name(v)) for kind, v in self.parts])

    def hash(self):
        return hash_of(self.key().encode())


def hash_of(text):
    """Bytes -> a signed number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def one_name(medium):
    """What stands for a medium in `Side.key`."""
    if isinstance(medium, list):
        return [one_name(frame) for frame in medium]
    if isinstance(medium, Part):
        return replace(medium, video=os.path.abspath(medium.video))
    return os.path.abspath(medium) if isinstance(medium, str) else id(medium)


def parse_item(item, root="", where="item"):
    """An item to embed -> Side.  item: a string, a picture, or {"text"?, "image"?, "video"?}.

    image: what `as_image` takes, or a list of these; video: a path, a folder of frames, or a list of frames.
    Beside the path of a video file "start" and "end" may say in seconds which part of it is meant, and "fps"
    how many frames a second are taken, up to the checkpoint's num_frames; 0: num_frames.
    A bare Pillow image, Path, array, open file, bytes or STORED object is a picture.  Media stand in front of
    the text, unless it has one <image> (<video>) for each.
    """
    if isinstance(item, (bytes, bytearray, memoryview)):
        try:
            item = as_image(item)
        except DECODER_ERRORS as e:
            raise DataError(f"{where}: needs a string or a picture, got {e}") from e
    if isinstance(item, (os.PathLike, *PICTURE)) or is_stored(item):
        item = {"image": item}
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict) or all(value is None for value in item.values()):
        needs = f"a string, a picture or an object with some of {ITEM_KEYS[:3]}"
        raise DataError(f"{where}: needs {needs}, got {quote(item)}")
    only_keys(item, ITEM_KEYS, where)
    text, image, video, start, end, fps = (item.get(key) for key in ITEM_KEYS)
    if (start, end, fps) != (None, None, None):
        video = part_of(video, start, end, fps, where)
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
    return Side(front + expand_markers(text, marked, root, where), where=where)


def parse_side(raw, root, where):
    """A side of a training record -> Side.  root: folder of the media; where: for errors.

    raw: {"conversations": turns, "image"?, "video"?, "fps"?}, or an item to embed, which has no rationale and
    no answer.
    """
    if isinstance(raw, list) and len(raw) == 1:  # seen in the wild
        raw = raw[0]
    of_item = isinstance(raw, dict) and raw and raw.keys() <= set(ITEM_KEYS)
    if isinstance(raw, str) or is_stored(raw) or of_item:
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
    if raw.get("fps") is not None:
        media["video"] = [part_of(video, None, None, raw["fps"], where) for video in media["video"] or [None]]
    parts = expand_markers(spoken["human"], media, root, where, disc=True)
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


def expand_markers(text, media, root, where, disc=False):
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
    if is_stored(source):
        content = source["bytes"]
        if isinstance(content, str):
            raise DataError(f"{where}: {kind}: 'bytes' must be the bytes of a file, got {quote(content)}")
        source = source["path"] if content is None else content
    if isinstance(source, Part):
        file = resolve(source.video, kind, root, where)
        if os.path.isdir(file):
            raise DataError(f"{where}: 'start', 'end' and 'fps' belong to a video file, {file} is a folder")
        return replace(source, video=file)
    if isinstance(source, PICTURE) and kind != "video":
        try:
            return as_image(source)
        except DECODER_ERRORS as e:
            raise DataError(f"{where}: {kind}: {e}") from e
    if isinstance(source, (list, tuple)) and kind == "video" and source:
        return [resolve(frame, "frame", root, where) for frame in source]
    if not isinstance(source, (str, os.PathLike)):
        or_else = "(or a Pillow image, array, bytes or file)"
        if kind == "video":  # FFmpeg reads it by its name
            or_else = "(write its bytes to a file) or a list of frames"
        raise DataError(f"{where}: {kind} needs a path {or_else}, got {type(source).__name__}")
    name = os.fsdecode(source)
    if not name:
        raise DataError(f"{where}: {kind} is an empty path")
    path = os.path.join(root, name)
    if not os.path.isfile(path) and not (kind == "video" and os.path.isdir(path)):
        raise DataError(f"{where}: {kind} {quote(name)} does not exist under {os.fspath(root) or '.'!r}")
    return path


def is_stored(source):
    return isinstance(source, dict) and source.keys() == set(STORED)


def part_of(video, start, end, fps, where):
    """The item's values of these keys -> Part."""
    if not isinstance(video, (str, os.PathLike)):
        raise DataError(f"{where}: 'start', 'end' and 'fps' belong to a 'video' that is a file, not "
                        + quote(video))
    start, end = 0 if start is None else start, math.inf if end is None else end
    for seconds in (start, end):
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise DataError(f"{where}: 'start' and 'end' are seconds, got {quote(seconds)}")
    if not 0 <= start < end or start == math.inf:
        raise DataError(f"{where}: 'start' {start}, 'end' {end}: need 0 <= start < end, in seconds")
    is_number = isinstance(fps, (int, float)) and not isinstance(fps, bool)
    if fps is not None and not (is_number and 0 <= fps < math.inf):
        raise DataError(f"{where}: 'fps' is frames a second, or 0 for num_frames of them, got {quote(fps)}")
    return Part(os.fsdecode(video), float(start), float(end), fps if fps is None else float(fps))


def listed(value):
    """None, one or several -> a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def printable(text, where):
    """The text; DataError where it is not valid Unicode: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where}: the text is not valid Unicode: {e}") from e
    return text
