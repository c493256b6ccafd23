"""Training records from what people have: triplets, messages of ms-swift, rows of VLM2Vec's training sets.

    python -m tools.convert --data triplets.parquet --out pairs.jsonl
    python -m tools.convert --data qa.csv --out pairs.jsonl --columns anchor=question+image,positive=answer
    python train.py --data pairs.jsonl ...

A row's keys say what it is:

    triplets    anchor (or query), positive (pos), and perhaps negative (neg), negative_1, ...: strings, bytes
                or paths of pictures and clips, items; several positives are a pair each.  Of one side, too:
                anchor_text, anchor_image, anchor_video, positive_image, ...
    ms-swift    messages, positive_messages, negative_messages, each with its own images (and videos);
                or query, response, rejected_response, and the images of all in that order
    VLM2Vec     qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path

Rows come from JSON lines, a JSON array, csv, tsv; with the package pyarrow from parquet, arrow and what
datasets' save_to_disk wrote.  A string that names a picture or clip is that medium if all strings of its
column are; media that stand in the file as bytes or data: URIs are written beside the records, into
OUT_media/, each once.  Every record is checked as in train.py; the first row that is not right ends the
program, and nothing is written under the name --out.
"""

import engine.threads  # answers wrong flags at once

import json
import os
from dataclasses import dataclass

from tqdm import tqdm

from engine.flags import command, parse_flags
from files.errors import DataError, nearest, quote, reason
from files.items import parse_side
from files.writing import writable, writing
from tools.convert_input import rows_of, TAKES
from tools.convert_messages import swift_messages, swift_queries, vlm2vec
from tools.convert_triplets import parse_columns, triplet
from tools.convert_values import Values


@dataclass
class Config:
    data: str = ""  # JSON lines or array, csv, tsv, parquet, arrow, or a folder of datasets' save_to_disk
    out: str = ""  # JSONL to write
    media: str = ""  # folder that media paths in --data are relative to; default: the folder of --data
    name: str = ""  # dataset_name of all records; default: the name of --data
    columns: str = ""  # what is what in triplets: anchor=question+image,positive=answer
    #     (+: together they are one side)
    drop: str = ""  # columns that are left out, with commas between
    text: str = ""  # columns whose strings are text, even where they name files or addresses;
    #     "messages": the texts of messages and of VLM2Vec's rows
    system: str = ""  # system turns of messages: keep (in front of the user's text) or drop


# The first key that a row has says its kind
KINDS = ("qry", "messages", "response")


def records_of(row, values, columns, system):
    """A row of any kind -> its records, {"qry", "pos", "neg"?} each: as many as it has targets"""
    kind = next((key for key in KINDS if key in row), None)
    if columns or kind is None:
        query, targets, negatives = triplet(row, values, columns)
    elif kind == "messages":
        query, targets, negatives = swift_messages(row, values, system)
    else:
        query, targets, negatives = {"qry": vlm2vec, "response": swift_queries}[kind](row, values)
    for target in targets:
        yield dict(qry=query, pos=target) | (dict(neg=negatives) if negatives else {})


def records_in(cfg, values, root):
    """All records of --data, each checked as in train.py."""
    columns, drop, seen = parse_columns(cfg.columns), split_names(cfg.drop), set()
    for n, row in tqdm(rows_of(cfg.data), "rows", unit="row"):
        values.row = n
        seen.update(row)
        row = {key: value for key, value in row.items() if key not in drop}
        try:
            for record in records_of(row, values, columns, cfg.system):
                for side in (record["qry"], record["pos"], *record.get("neg", [])):
                    parse_side(side, root, quote(side))
                yield record
        except DataError as e:
            raise DataError(f"{cfg.data}: row {n}: {e}") from e
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise DataError(f"{cfg.data}: row {n}: not as --help describes it: {reason(e)}") from e
    if not values.row:
        raise DataError(f"{cfg.data}: no row is in it")
    for flag, names in (("columns", sum(columns.values(), [])), ("drop", drop)):
        for name in names:
            if name not in seen:
                raise DataError(f"--{flag} {name}: no row of {cfg.data} has it.{nearest(name, seen)}")
    try:
        values.check_names()
    except DataError as e:
        raise DataError(f"{cfg.data}: {e}") from e


def split_names(text):
    return text.split(",") if text else []


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if not os.path.exists(cfg.data):
        raise DataError(f"--data {cfg.data!r}: no such file; it takes {TAKES}")
    if not cfg.out or not writable(cfg.out):
        raise DataError(f"--out {cfg.out!r}: name a file in a folder that exists")
    if cfg.media and not os.path.isdir(cfg.media):
        raise DataError(f"--media {cfg.media!r}: no such folder")
    if cfg.system not in ("", "keep", "drop"):
        raise DataError(f"--system {cfg.system!r}: needs keep or drop")
    data = os.path.abspath(cfg.data)
    root, stem = os.path.dirname(os.path.abspath(cfg.out)), os.path.splitext(cfg.out)[0]
    source = os.path.abspath(cfg.media or (data if os.path.isdir(data) else os.path.dirname(data)))
    values = Values(source, root, f"{os.path.abspath(stem)}_media", split_names(cfg.text))
    name = cfg.name or os.path.splitext(os.path.basename(data))[0]
    pairs = negatives = 0
    with writing(cfg.out) as f:
        for record in records_in(cfg, values, root):
            f.write(json.dumps(dict(dataset_name=name, **record)) + "\n")
            pairs += 1
            negatives += len(record.get("neg", []))
    for column, count in values.media.items():
        print(f"column {column!r}: {count} strings are pictures or clips")
    for column, count in values.not_there.items():
        print(f"column {column!r}: {count} strings look like names of pictures or clips and are none: taken "
              "as text")
    print(f"{pairs} pairs with {negatives} hard negatives in {cfg.out}")


if __name__ == "__main__":
    command(main)
