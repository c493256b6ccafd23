"""A folder of vectors in parts, as tools/encode.py writes it and tools/search.py reads it.

    DIR/manifest.json              checkpoint (hash), mode, steps, dim, type, dtype, part_size; input (hash),
                                   how many items (records of the input) and parts
    DIR/part-000000/vectors.npy    (n, dim) of the manifest's type, in the order of the input
                    ids.json       the ids of these rows, a list of n strings
                    bad.json       [{"_id", "why"}], what could not be read
    DIR/part-000000.XXXXXXXX.writing   was being written when a run died

A part appears under its name when all of it is written.  Part p has the records from p * part_size on.

float16 and int8 are for inner products of rows made unit again, as `load_vectors` does.  int8: every row is
scaled by itself so that its largest component is 127 or -127, and rounded; no scale has to be kept.
"""

import os
import re
import shutil
import warnings

import numpy as np

from files.errors import DataError, reason
from files.jsonl import parse_json
from files.writing import temporary_name, write_json, writing

MANIFEST, PART = "manifest.json", re.compile(r"part-(\d{6,})")
FILES = ("vectors.npy", "ids.json", "bad.json")  # of a part
TYPES = ("float32", "float16", "int8")


def part_folder(folder, number):
    return os.path.join(folder, f"part-{number:06}")


def is_whole(part):
    return all(os.path.isfile(os.path.join(part, name)) for name in FILES)


def whole_parts(folder):
    """Numbers of the parts that are there, in order."""
    found = map(PART.fullmatch, os.listdir(folder))
    return sorted(int(name[1]) for name in found if name and is_whole(os.path.join(folder, name[0])))


def read_json(file):
    with open(file, "rb") as f:
        return parse_json(f.read(), file)


def read_manifest(folder):
    file = os.path.join(folder, MANIFEST)
    if not os.path.isfile(file):
        raise DataError(f"{folder}: no {MANIFEST} in it; needs a folder that python -m tools.encode made")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or not {"dim", "parts", "prompt"} <= manifest.keys():
        raise DataError(f"{file}: is none of python -m tools.encode")
    return manifest


def write_part(folder, number, ids, vectors, bad):
    """One part, whole or not at all."""
    part = part_folder(folder, number)
    new = temporary_name(part)
    try:
        os.mkdir(new)
        with writing(os.path.join(new, "vectors.npy"), "wb") as f:
            np.save(f, vectors)
        write_json(os.path.join(new, "ids.json"), ids)
        write_json(os.path.join(new, "bad.json"), bad)
        if not is_whole(part):
            shutil.rmtree(part, ignore_errors=True)  # somebody has deleted one of its files
        os.rename(new, part)
    except OSError:
        if not is_whole(part):  # another process was faster
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def narrowed(vectors, kind):
    """(n, D) unit rows of float32 -> the same as one of TYPES."""
    if kind == "int8":
        return np.rint(vectors * (127 / np.abs(vectors).max(axis=1, keepdims=True))).astype(np.int8)
    return vectors.astype(kind)


def read_part(folder, number):
    """-> ids, (n, D) unit rows of float32.  DataError for a part that somebody has damaged."""
    part = part_folder(folder, number)
    try:
        ids = read_json(os.path.join(part, "ids.json"))
        stored = np.load(os.path.join(part, "vectors.npy"))
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{part}: cannot be read ({reason(e)}); delete it, and encode again") from e
    if len(ids) != len(stored):
        raise DataError(f"{part}: {len(ids)} ids, {len(stored)} vectors; delete it, and encode again")
    vectors = stored.astype(np.float32)
    if stored.dtype != np.float32:
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ids, vectors


def load_vectors(folder):
    """-> list of all ids, (N, D) unit rows of float32, in the order of the input.

    Of parts that are not there yet it warns.
    """
    manifest, there = read_manifest(folder), whole_parts(folder)
    if len(there) < manifest["parts"]:
        warnings.warn(f"{folder}: {len(there)} of {manifest['parts']} parts are there; the rest is missing")
    ids, vectors = [], [np.empty((0, manifest["dim"]), np.float32)]
    for number in there:
        more, rows = read_part(folder, number)
        ids += more
        vectors.append(rows)
    return ids, np.concatenate(vectors)
