"""The training file: JSON lines or one array, indexed by byte offset -> pairs of Sides."""

import hashlib
import itertools
import json
import os
import re
from array import array

import numpy as np
from tqdm import tqdm

from files.errors import DataError, quote
from files.items import expand_markers, ITEM_KEYS, listed, only_keys, parse_item, printable, Side

RECORD_KEYS = ("dataset_name", "qry", "pos", "neg")
MEDIA_KEYS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
SIDE_KEYS = ("conversations", *MEDIA_KEYS)
TURN_KEYS = ("from", "value", "role", "content")
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


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
