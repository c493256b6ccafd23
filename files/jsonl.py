"""JSON that users write: where the objects stand in a file; parsed with no key twice and none unknown."""

import json
import re
from collections import Counter

from files.errors import DataError, LFS_HINT, LFS_POINTER, nearest, quote


def parse_json(text, where):
    """JSON as bytes -> its value; where: for errors."""
    def no_key_twice(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            (twice, _), = Counter(key for key, _ in pairs).most_common(1)
            raise DataError(f"{where}: the key {quote(twice)} stands twice in one object")
        return value

    try:
        return json.loads(text, object_pairs_hook=no_key_twice)
    except DataError:
        raise
    except (ValueError, RecursionError) as e:
        hint = LFS_HINT if text.startswith(LFS_POINTER) else ""
        raise DataError(f"{where}: not JSON: {e}{hint}") from e


def only_keys(raw, known, where):
    """DataError unless raw is an object all of whose keys are known."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: needs an object with {next(iter(known))!r}, got {type(raw).__name__}")
    for key in raw:
        if key not in known:
            raise DataError(f"{where}: unknown key {quote(key)}.{nearest(key, known)}")


def spans_of(f, path):
    """(start, end, bytes) of every object in an open binary file: JSON lines, or one JSON array of objects.

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
            begin = start + line.index(text)
            yield begin, begin + len(text), text
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
