"""What items may come in: anything that gives them in an order; for all else, what to give instead."""

import io
import itertools
import operator
import os
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from files.pictures import PICTURE

SINGLE = "put a single item into [ ]"


def iterate(items):
    """An iterator over the items of any container, in its own order; TypeError for what is none."""
    instead, iterator = what_instead(items), None
    if not instead:
        try:
            iterator = iter(items)
        except TypeError:
            instead = SINGLE
    if instead:
        raise TypeError("items must be a list or another iterable of items, got "
                        f"{type(items).__name__}; {instead}")
    if isinstance(items, Iterable):
        return iterator
    return itertools.islice(iterator, length_hint(items))  # of the older kind: [0], [1], ... as it says


def what_instead(items):
    """What to give in place of a single item, or of what goes through something else than items; or ""."""
    if isinstance(items, io.IOBase):
        return "for its lines give file.read().splitlines(), and put a picture into [ ]"
    if isinstance(items, np.ndarray):
        return SINGLE if items.ndim == 3 else ""
    if isinstance(items, (str, os.PathLike, Mapping, *PICTURE)):
        return SINGLE
    if hasattr(items, "columns"):  # of pandas, polars, pyarrow: going through it gives names or columns
        return ("give one of its columns: table['text'].tolist() (pandas), .to_list() (polars) or "
                ".to_pylist() (pyarrow)")
    if isinstance(items, torch.utils.data.DataLoader):
        return "it gives batches: take its data set"
    if isinstance(items, (set, frozenset)):
        return "it has no order, in which rows could be given back: take sorted(items)"
    return ""


def length_hint(items):
    """How many items there are, or None when nobody knows."""
    try:
        hint = operator.length_hint(items, -1)
    except NotImplementedError:
        return None
    return hint if hint >= 0 else None
