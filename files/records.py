"""The training file -> pairs of Sides, by byte offset: the file itself is never in memory."""

import hashlib
import itertools
import os
from array import array

import numpy as np
from tqdm import tqdm

from files.errors import DataError
from files.items import hash_of, parse_side
from files.jsonl import only_keys, parse_json, spans_of
from files.named import FileNameWarning

RECORD_KEYS = ("dataset_name", "qry", "pos", "neg")
START_AGAIN = "; put it back, and go on from the last checkpoint with --resume, or start again"


def hold_out(pairs, seed, most=256):
    """Numbers of the pairs to hold out, and of all that have the same query as one of these: a tenth at most.

    In a random order a pair is held out when it still fits into that tenth with all that have its query.
    """
    _, group, size = np.unique(pairs.query_hash, return_inverse=True, return_counts=True)
    room, held, taken = len(pairs) // 10, [], np.zeros(len(size), bool)
    for i in np.random.default_rng([seed, 2]).permutation(len(pairs)):
        g = group[i]
        if not taken[g] and size[g] <= room:
            taken[g] = True
            room -= size[g]
        if taken[g]:
            held.append(i)
        if len(held) == most:
            break
    return np.array(held, np.int64), np.flatnonzero(taken[group])


def files_of_pairs(folder):
    """What an error says of a folder that was given in place of one of these."""
    found = sorted(name for name in os.listdir(folder) if name.endswith((".jsonl", ".json")))
    if not found:
        return ", JSON lines; python -m tools.convert makes one of other formats"
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"; here are {', '.join(os.path.join(folder, name) for name in found[:3])}{more}"


class Pairs:
    """The training pairs of one file: pairs[i] is (query, target, and hard negatives), a Side each.

    path: JSON lines, or one JSON array of the same objects; media: folder of the media, default: the file's.
    Every record is parsed once here, so that a bad one is found before training: an error, or with skip_bad a
    line in `self.bad`.  Arrays over the N good records: dataset (index into `names`), query_hash and target
    (a hash, too).  negatives: the most that a record has.
    """

    weights = {}  # of data sets: those that are not 1 without --weights

    def __init__(self, path, media=None, skip_bad=False, progress=True):
        if os.path.isdir(path):
            raise DataError(f"{path}: a folder; training pairs are one file{files_of_pairs(path)}. A folder "
                            "of tasks is for eval.py --data")
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file; --data takes a JSONL of training pairs")
        self.path, self.media, self.bad = path, media or os.path.dirname(os.path.abspath(path)), []
        self.name = os.path.splitext(os.path.basename(path))[0]  # of a data set whose records have none
        spans, dataset, query_hash, target = array("q"), array("i"), array("q"), array("q")
        names, digest, self.negatives = {}, hashlib.blake2b(digest_size=8), 0
        warning = FileNameWarning(self.media)
        bar = tqdm(total=os.path.getsize(path), desc="reading pairs", unit="B", unit_scale=True, leave=False,
                   disable=not progress)
        with open(path, "rb") as f, bar:
            for n, (start, end, text) in enumerate(spans_of(f, path), 1):
                bar.update(end - bar.n)
                try:
                    name, (query, pos, *negatives) = self.parse(text, n)
                except DataError as e:
                    if not skip_bad:
                        raise
                    self.bad.append(str(e))
                    continue
                for side in (query, pos, *negatives):
                    warning.look_at_side(side)
                spans.extend((start, end, n, hash_of(text)))
                digest.update(text)
                dataset.append(names.setdefault(name, len(names)))
                query_hash.append(query.hash())
                target.append(pos.hash())
                self.negatives = max(self.negatives, len(negatives))
        self.digest, self.names = digest.hexdigest(), list(names)
        self.dataset, self.target = np.array(dataset, np.int32), np.array(target, np.int64)
        self.query_hash = np.array(query_hash, np.int64)
        self.spans = np.array(spans, np.int64).reshape(-1, 4)  # start, end, number of a record; hash of it
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
        """-> (query Side, target Side, and the Sides of its hard negatives)

        DataError where the file no longer has the record that was read at the start.
        """
        start, end, n, known = self.spans[i].tolist()
        try:
            with open(self.path, "rb") as f:
                f.seek(start)
                text = f.read(end - start)
        except FileNotFoundError as e:
            raise DataError(f"{self.path}: was removed while it was in use{START_AGAIN}") from e
        if hash_of(text) != known:
            raise DataError(f"{self.path}: was changed while it was in use: record {n} is another"
                            + START_AGAIN)
        _, sides = self.parse(text, n)
        return sides

    def texts(self):
        """Every text of the file, for training a tokenizer."""
        for side in itertools.chain.from_iterable(self[i] for i in range(len(self))):
            yield from (value for kind, value in side.parts if kind == "text")
            yield from (side.rationale, side.answer)
