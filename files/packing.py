"""Which rows of a batch are equal, which are padded together, and which go through the model at a time.

A worker's hand-over costs 0.3 ms a tensor: `pack` makes one of a whole batch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only


def distinct(samples):
    """Rendered samples -> those that differ, and the place of each sample among them.

    Equal ones, as targets of a classification are, are computed once.  `times`: how often the losses of text
    count a row; without it once, 0 for hard negatives.
    """
    places, found = [], {}
    for s in samples:
        arrays = [hash(array.tobytes()) for array in (s["positions"], *s["pixels"])]
        key = repr([s["ids"], s["suffix"], s["gate_at"], s["replaced"], s["grids"], arrays])
        place, first = found.setdefault(key, (len(found), dict(s, times=0)))
        first["times"] += s.get("times", 1)
        places.append(place)
    return [first for _, first in found.values()], np.array(places)


def columns_of(lengths):
    """Columns of a group of rows, padding included.  lengths (n, 2): of each prefix, and of what follows."""
    return len(lengths) * int(lengths.max(0).sum())


def group_by_length(lengths, padding=0.05):
    """Rows in groups of about equal lengths: at most a share `padding` of their columns is padding.

    lengths: see `columns_of`.  One group is cut in two again and again, where it saves most; more groups
    than needed would cost more than the padding.  -> arrays of row numbers, those of the longest rows first.
    """
    groups = [np.arange(len(lengths))]
    cuts = [best_cut(lengths)]
    while sum(columns_of(lengths[group]) for group in groups) * (1 - padding) > lengths.sum():
        at = max(range(len(cuts)), key=lambda i: cuts[i][0])
        group, (_, *halves) = groups.pop(at), cuts.pop(at)
        groups += [group[half] for half in halves]
        cuts += [best_cut(lengths[group[half]]) for half in halves]
    return sorted(groups, key=lambda group: -lengths[group].sum(1).max())


def best_cut(lengths):
    """-> columns saved, and the rows of two parts: shorter and longer prefixes, or so by what follows."""
    saved, parts, rows = 0, None, np.arange(1, len(lengths))
    for column in lengths.T:
        order = np.argsort(column, kind="stable")
        ahead = np.maximum.accumulate(lengths[order]).sum(1)[:-1] * rows
        behind = np.maximum.accumulate(lengths[order[::-1]]).sum(1)[-2::-1] * rows[::-1]
        gain = columns_of(lengths) - ahead - behind
        if len(gain) and gain.max() > saved:
            cut = 1 + gain.argmax()
            saved, parts = gain.max(), (order[:cut], order[cut:])
    return saved, *(parts or ())


def fill_micro_batches(groups, lengths, visual, most):
    """Groups of rows -> lists of groups of at most `most` columns and visual tokens (n,); 0: one list.

    A group that does not fit is cut; a row that has more is alone.
    """
    if not most:
        return [groups]
    micro, left = [[]], most
    for group in groups:
        each = lengths[group].max(0).sum() + visual[group].max()
        while len(group):
            if left < each and micro[-1]:
                micro.append([])
                left = most
            part, group = np.split(group, [max(1, left // each)])
            micro[-1].append(part)
            left -= len(part) * each
    return micro


@dataclass
class Place:  # of a tensor among the bytes
    dtype: torch.dtype
    shape: tuple
    start: int


class Packed(NamedTuple):
    data: torch.Tensor  # (bytes,) uint8
    batch: object  # its lists and dicts, with a Place for each tensor


def pack(batch):
    """Lists and dicts with tensors in them -> Packed: one tensor of all their bytes."""
    parts = []

    def place(x):
        data, start = x.contiguous().view(-1).view(torch.uint8), sum(map(len, parts))
        parts.append(F.pad(data, (0, -len(data) % 8)))  # the next one starts at a multiple of 8, for `view`
        return Place(x.dtype, x.shape, start)

    places = tree_map_only(torch.Tensor, place, batch)
    return Packed(torch.cat(parts), places)


def unpack(packed):
    """The batch again, its tensors over the same bytes."""
    def tensor(place):
        end = place.start + place.dtype.itemsize * math.prod(place.shape)
        return packed.data[place.start : end].view(place.dtype).view(place.shape)

    return tree_map_only(Place, tensor, packed.batch)
