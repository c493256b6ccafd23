"""A row with the columns anchor, positive, negative, ... -> query, targets, negatives."""

import re

from files.errors import closest, DataError, quote
from files.items import is_stored, listed, MEDIA_KEYS

COLUMN = re.compile(r"(anchor|query|positives?|pos|negatives?|neg)(_\d+)?(_(?:text|images?|videos?))?")
SIDES = dict(query="anchor", pos="positive", positives="positive", neg="negative", negatives="negative")
TARGET = re.compile(r"anchor|(positive|negative)(_\d+)?")  # of --columns


def parse_columns(text):
    """"anchor=question+image,positive=answer" -> {"anchor": ["question", "image"], "positive": ["answer"]}"""
    sides = {}
    for part in text.split(",") if text else ():
        side, equals, names = part.partition("=")
        if not equals or not TARGET.fullmatch(side) or side in sides or not all(names.split("+")):
            raise DataError(f"--columns {quote(text)}: needs anchor, positive, negative or negative_1, ..., "
                            "each once, as anchor=question+image,positive=answer")
        sides[side] = names.split("+")
    if sides and not {"anchor", "positive"} <= sides.keys():
        raise DataError(f"--columns {quote(text)}: needs both anchor=... and positive=...")
    return sides


def sides_named(row):
    """The columns of a row by their names -> as `parse_columns`"""
    sides, base_of, unknown = {}, {}, []
    for key in row:
        found = COLUMN.fullmatch(key)
        if not found:
            if row[key] is not None:
                unknown.append(key)
            continue
        base, number, _ = found.groups("")
        side = SIDES.get(base, base) + number
        if base_of.setdefault(side, base) != base:
            raise DataError(f"both {base_of[side]!r} and {base!r} are columns; --drop one of them")
        sides.setdefault(side, []).append(key)
    if unknown and "anchor" in sides and "positive" in sides:
        raise DataError(f"unknown column {unknown[0]!r}: --drop {unknown[0]} leaves it out, --columns says "
                        "what it is; known are anchor, query, positive, negative, negative_1, ...")
    return sides


def triplet(row, values, columns):
    """anchor, positive, negative, negative_1, ... -> query, targets, negatives"""
    sides = columns or sides_named(row)
    if columns:
        used = sum(columns.values(), [])
        for key in row:
            if key not in used and row[key] is not None:
                raise DataError(f"column {key!r} is in no side of --columns.{closest(key, used)} "
                                f"--drop {key} leaves it out")
    found = {"anchor": [], "positive": [], "negative": []}
    for side, names in sides.items():
        found[side.split("_")[0]] += sides_of(row, names, values)
    for side in ("anchor", "positive"):
        if not found[side]:
            there = ", ".join(row)
            raise DataError(f"no {side}: no such column, or it is empty. There are {there}; --columns "
                            "anchor=NAME,positive=NAME says what is what")
    if len(found["anchor"]) > 1:
        raise DataError(f"{len(found['anchor'])} anchors; a record has one. Several pictures of one item are "
                        "{'image': [...]}")
    return found["anchor"][0], found["positive"], found["negative"]


def sides_of(row, names, values):
    """One column: a side for each of its values.  Several, or a column of media: all are one side."""
    if len(names) == 1 and not is_media_column(names[0]):
        sides = [side_of(value, names[0], values) for value in listed(row.get(names[0])) if value is not None]
        for side in sides:
            check_side(side, names[0], values)
        return sides
    texts, media = [], {"image": [], "video": []}
    for name in names:
        for value in listed(row.get(name)):
            if value is None or value == "":
                continue
            if isinstance(value, str) and is_media_column(name):
                kind = values.kind_of(value) or ("video" if "video" in name else "image")
                part = {kind: values.path(value)}
            else:
                part = side_of(value, name, values)
            part = dict(text=part) if isinstance(part, str) else part
            more = ", ".join(part.keys() - {"text", "image", "video"})
            if more:
                raise DataError(f"column {name!r}: what has {more} is an item of its own, in one column; "
                                f"{', '.join(names)} are one side")
            texts += [(text, name) for text in listed(part.get("text"))]
            for kind, found in media.items():
                found += listed(part.get(kind))
    if len(media["video"]) > 1:
        raise DataError(f"{len(media['video'])} clips in one side; it has one")
    for text, name in texts:
        values.check_markers(text, [kind for kind, found in media.items() if found], name)
    side = dict(text="\n".join(text for text, _ in texts)) if texts else {}
    if media["image"]:
        side["image"] = media["image"]
    if media["video"]:
        side["video"] = media["video"][0]
    return [side] if side else []


def is_media_column(name):
    """Whether its strings are paths by its name."""
    return re.fullmatch(r"(.*_)?(image|images|video|videos)(_paths?)?", name) is not None


def check_side(side, column, values):
    """DataError where a side is an empty text, or its text has a marker of a medium that it has not."""
    item = dict(text=side) if isinstance(side, str) else side
    text = item.get("text")
    if isinstance(text, str):
        values.check_markers(text, item, column)
        if not text.strip() and item.keys() == {"text"}:
            raise DataError(f"column {column!r}: an empty text; null stands for a value that is missing")


def side_of(value, column, values):
    """A string, a picture or an item -> an item with paths."""
    if isinstance(value, bytes) or is_stored(value):
        return dict([values.stored(value)])
    if isinstance(value, dict):
        side = {key: values.path(part) if key in MEDIA_KEYS else part
                for key, part in value.items() if part is not None}
        if isinstance(side.get("text"), str):
            values.explicit(side["text"], column)
        return side
    if not isinstance(value, str):
        raise DataError(f"column {column!r}: needs a string, a picture or an item, got {quote(value)}")
    kind, given = values.string(value, column)
    return given if kind == "text" else {kind: given}
