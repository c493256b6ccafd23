"""Training records from what people have: triplets, messages of ms-swift, rows of VLM2Vec's training sets.

    python -m tools.convert --data triplets.parquet --out pairs.jsonl
    python train.py --data pairs.jsonl ...

A row's keys say what it is:

    triplets    anchor (or query), positive, and perhaps negative, negative_1, ...: strings, pictures, items
    ms-swift    messages, positive_messages, negative_messages, each with its own images (and videos);
                or query, response, rejected_response, and the images of all in that order
    VLM2Vec     qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path

Rows come from JSON lines, one JSON array or, with the package pyarrow, a parquet file.  Pictures that stand
in it as bytes are written beside the records, into OUT_media/, each once.  Every record is checked as in
train.py; the first row that is not right ends the program, and nothing is written under the name --out.
"""

import engine.threads  # answers wrong flags at once

import hashlib
import io
import json
import os
import re
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from engine.flags import command, parse_flags
from files.errors import DataError, nearest, quote, reason
from files.items import listed, parse_side
from files.jsonl import parse_json, spans_of
from files.writing import writable, writing
from tasks.mmeb_rows import read_parquet


@dataclass
class Config:
    data: str = ""  # JSON lines, one JSON array or parquet
    out: str = ""  # JSONL to write
    media: str = ""  # folder that media paths in --data are relative to; default: the folder of --data
    name: str = ""  # dataset_name of all records; default: the name of --data


def rows_of(path):
    """-> yields (n, row as a dict), from 1"""
    if not path.endswith(".parquet"):
        with open(path, "rb") as f:
            for n, (_, _, text) in enumerate(spans_of(f, path), 1):
                yield n, parse_json(text, f"{path}: row {n}")
        return
    yield from enumerate(read_parquet(path), 1)


def triplet(row, media):
    """anchor, positive, negative, negative_1, ... -> query, target, negatives"""
    anchor = "anchor" if "anchor" in row else "query"
    negatives = [key for key in row if re.fullmatch(r"negative(_\d+)?", key)]
    only(row, (anchor, "positive", *negatives))
    given = [value for key in negatives for value in listed(row[key]) if value is not None]
    return side_of(row[anchor], media), side_of(row["positive"], media), [side_of(v, media) for v in given]


def side_of(value, media):
    """A string, a picture or an item -> an item with paths."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return dict(image=media(value))
    if isinstance(value, dict):
        return {key: media(part) if key in ("image", "video") else part
                for key, part in value.items() if part is not None}
    if not isinstance(value, str):
        raise DataError(f"needs a string, a picture or an item, got {quote(value)}")
    return value


def swift_messages(row, media):
    """messages, positive_messages, negative_messages and their images -> query, target, negatives"""
    kinds = ("", "positive_", "negative_")
    only(row, [f"{kind}{key}" for kind in kinds for key in ("messages", "images", "videos")])
    sides = [[spoken(row["messages"], row.get("images"), row.get("videos"), media)]]
    for kind in kinds[1:]:
        messages = row.get(f"{kind}messages") or []
        images, videos = ((row.get(f"{kind}{key}") or [None] * len(messages)) for key in ("images", "videos"))
        if not len(messages) == len(images) == len(videos):
            raise DataError(f"{len(messages)} {kind}messages, {len(images)} lists of images, {len(videos)} "
                            "lists of videos: each message needs its own")
        sides.append([spoken(*parts, media) for parts in zip(messages, images, videos)])
    (query,), targets, negatives = sides
    if len(targets) != 1:
        raise DataError(f"{len(targets)} positive_messages; a record has one target")
    return query, targets[0], negatives


def spoken(messages, images, videos, media):
    """The user's message, with its media, as a side."""
    roles = [turn.get("role") for turn in messages]
    if roles != ["user"]:
        raise DataError(f"needs one message of the user, got {roles}")
    return with_media(messages[0]["content"], images or [], videos or [], media)


def with_media(text, images, videos, media):
    """A text with markers, and what they stand for, as a side."""
    for kind, given in (("image", images), ("video", videos)):
        markers = text.count(f"<{kind}>")
        if markers != len(given):
            raise DataError(f"{markers} <{kind}> in {quote(text)}, {len(given)} {kind}s given")
    if not images and not videos:
        return text
    side = dict(conversations=[{"from": "human", "value": text}])
    if images:
        side["image"] = [media(image) for image in images]
    if len(videos) > 1:
        raise DataError(f"{len(videos)} videos in one text; a side has one")
    if videos:
        side["video"] = media(videos[0])
    return side


def swift_queries(row, media):
    """query, response, rejected_response; images in the order of the markers -> query, target, negatives"""
    only(row, ("query", "response", "rejected_response", "images"))
    texts = [row["query"], row["response"], *listed(row.get("rejected_response") or None)]
    images, sides = list(row.get("images") or []), []
    for text in texts:
        n = text.count("<image>")
        sides.append(with_media(text, images[:n], [], media))
        images = images[n:]
    if images:
        raise DataError(f"{len(images)} images more than <image> markers")
    return sides[0], sides[1], sides[2:]


def vlm2vec(row, media):
    """qry, pos_text, neg_text with paths of one picture each -> query, target, negatives"""
    only(row, ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"))
    query = marked(row["qry"], row.get("qry_image_path"), media)
    target = marked(row.get("pos_text"), row.get("pos_image_path"), media)
    texts = listed(row.get("neg_text") or "")
    paths = listed(row.get("neg_image_path") or [""] * len(texts))
    negatives = zip(texts, paths, strict=True)
    return query, target, [marked(*both, media) for both in negatives if any(both)]


def marked(text, path, media):
    """A text with <|image_1|> where the picture belongs -> an item."""
    text = (text or "").replace("<|image_1|>", "<image>")
    if not path:
        return text
    if "<image>" not in text:
        text = f"<image>{text}"
    return with_media(text, [path], [], media)


KINDS = {"qry": vlm2vec, "messages": swift_messages, "response": swift_queries, "positive": triplet}


def only(row, known):
    for key, value in row.items():
        if key not in known and value is not None:
            raise DataError(f"unknown key {quote(key)}.{nearest(key, known)}")


class Media:
    """What a row says of a picture or clip -> a path relative to `root`, the folder of the records."""

    def __init__(self, source, root, folder):
        self.source, self.root, self.folder = source, root, folder  # folder: for what comes as bytes

    def __call__(self, value):
        if isinstance(value, list):  # frames
            return [self(frame) for frame in value]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return os.path.relpath(self.write(value), self.root)
        if not isinstance(value, str) or not value:
            raise DataError(f"a medium needs a path or bytes, got {quote(value)}")
        return os.path.relpath(os.path.join(self.source, value), self.root)

    def write(self, raw):
        try:
            with Image.open(io.BytesIO(raw)) as image:
                suffix = image.format.lower()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise DataError(f"bytes that are no picture: {reason(e)}") from e
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, f"{hashlib.blake2b(raw, digest_size=16).hexdigest()}.{suffix}")
        if not os.path.exists(path):
            with writing(path, "wb") as f:
                f.write(raw)
        return path


def record_of(row, media):
    """-> {"qry", "pos", "neg"?} of a row of any kind"""
    kind = next((kind for key, kind in KINDS.items() if key in row), None)
    if kind is None:
        raise DataError(f"of no known kind: none of the keys {', '.join(KINDS)} is there; see --help")
    query, target, negatives = kind(row, media)
    return dict(qry=query, pos=target) | (dict(neg=negatives) if negatives else {})


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if not os.path.isfile(cfg.data):
        raise DataError(f"--data {cfg.data!r}: no such file; it takes JSON lines or parquet")
    if not cfg.out or not writable(cfg.out):
        raise DataError(f"--out {cfg.out!r}: name a file in a folder that exists")
    root, stem = os.path.dirname(os.path.abspath(cfg.out)), os.path.splitext(cfg.out)[0]
    source = cfg.media or os.path.dirname(os.path.abspath(cfg.data))
    media = Media(os.path.abspath(source), root, f"{os.path.abspath(stem)}_media")
    name = cfg.name or os.path.splitext(os.path.basename(cfg.data))[0]
    n = negatives = 0
    with writing(cfg.out) as f:
        for n, row in tqdm(rows_of(cfg.data), "rows", unit="row"):
            try:
                record = record_of(row, media)
                for side in (record["qry"], record["pos"], *record.get("neg", [])):
                    parse_side(side, root, quote(side))
            except DataError as e:
                raise DataError(f"{cfg.data}: row {n}: {e}") from e
            except (KeyError, TypeError, AttributeError, ValueError) as e:
                raise DataError(f"{cfg.data}: row {n}: not as --help describes it: {reason(e)}") from e
            f.write(json.dumps(dict(dataset_name=name, **record)) + "\n")
            negatives += len(record.get("neg", []))
        if n == 0:
            raise DataError(f"{cfg.data}: no row is in it")
    print(f"{n} pairs with {negatives} hard negatives in {cfg.out}")


if __name__ == "__main__":
    command(main)
