"""`encode` as a stream: any number of items -> their embeddings, window by window.

Threads read and decode the next window while the model embeds this one; a bounded buffer keeps the media of
the two in memory at about 2 * AHEAD bytes, however many items there are.
"""

import itertools
import math
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from adapter import MAX_STEPS
from data import collate, to_device
from engine.containers import iterate, length_hint
from engine.truncate import render_truncated, warn_of_cut
from files.errors import DataError, nearest, quote
from files.items import parse_item, Side
from files.named import warn_of_file_names
from hub.prompts import template_of, with_prompt
from latent import unit

MODES = ("latent", "single", "cot", "auto")
WAITING = 2  # times batch_size: so many rows wait, with their caches, until mode auto writes them together
AHEAD = 1 << 27  # bytes of media that `encode` holds for a window, and about as many are read ahead


class Spent(NamedTuple):
    """What the items of a batch took."""

    steps: torch.Tensor  # (B,) latent steps
    tokens: torch.Tensor  # (B,) tokens written


def encoding(model, items, mode="latent", steps=None, batch_size=16, progress=False, limit=512, took=None,
             workers=4, sort=True, bad=None, dim=None, done=0.5, spent=None, prompt=None, truncate=False,
             unfit=None):
    """`Plume.encode` in windows: yields the embeddings of the next items as an array.

    A window is 8 batches, or less when their media take AHEAD bytes; about as much is read ahead.  What mode
    auto has to write in it waits until it is worth a batch.
    truncate: as in `Plume.encode`; a dict gets {an item's number: tokens that it has lost}, too.
    unfit: a dict for items whose embeddings are not finite, see `check_embeddings`.
    sort: the rows of a window are batched by length; False: batches are neighbours as given.
    """
    check_mode(mode, steps)
    template = template_of(model.settings["prompts"], prompt)
    width = model.lm.config.hidden_size
    check_truncate(truncate)
    check_numbers(done, dim, width, batch_size=batch_size, limit=limit, workers=workers)
    label = progress if isinstance(progress, str) else f"encode ({mode})"
    bar = tqdm(total=length_hint(items), desc=label, unit="item", disable=not progress)
    cut, number = None if truncate is False else {}, 0
    items, size = warn_of_file_names(iterate(items)), 8 * batch_size if sort else batch_size
    if spent is not None:
        for name in Spent._fields:
            spent.setdefault(name, [])
    was_training = model.training
    model.eval()
    try:
        for samples in windows(model, items, size, workers, bad, cut, took is not None, template):
            order, number = list(range(len(samples))), number + len(samples)
            if sort:  # a batch of about equal lengths has little padding
                order.sort(key=lambda i: len(samples[i]["ids"]) if samples[i] else 0)
            out = torch.full((len(samples), dim or width), torch.nan, device=model.device)
            costs = torch.zeros(len(samples), 2, dtype=torch.long, device=model.device)
            unfinished = []
            for begin in range(0, len(order), batch_size):
                batch = order[begin : begin + batch_size]
                bar.update(len(batch))
                rows = [i for i in batch if samples[i]]
                if rows:
                    embed_rows(model, out, rows, samples, mode, steps, limit, took, done, costs, unfinished)
                if sum(len(left.rows) for left in unfinished) >= WAITING * batch_size:
                    write_rows(model, out, unfinished, limit, took, costs)
            write_rows(model, out, unfinished, limit, took, costs)
            out = out.cpu().numpy()
            if spent is not None:
                for name, column in zip(Spent._fields, costs.T.tolist()):
                    spent[name].extend(column)
            check_embeddings(model, samples, out, unfit, number - len(samples))
            yield out
        warn_of_cut(cut, number, model.processor.limits.max_len)
        if isinstance(truncate, dict):
            truncate.update(sorted(cut.items()))
    finally:
        model.train(was_training)
        bar.close()


def windows(model, items, size, workers, bad, cut, alone, template):
    """Lists of at most `size` samples, of less when their media take AHEAD bytes; threads read ahead.

    alone: nothing is read while the caller is at work, so that its time can be taken.
    A window ends every `size` items, too: what is in a batch depends on nothing that came long before.
    """
    numbered, pending, left, number = enumerate(items), deque(), size, 0
    most = math.inf if alone else AHEAD
    buffer, pool = BoundedBuffer(2 * most), ThreadPoolExecutor(workers)

    def read(i, item):
        buffer.wait(i)
        sample = read_item(model, i, item, bad, cut, template)
        buffer.add(media_bytes(sample))
        return sample

    try:
        while True:
            for i, item in itertools.islice(numbered, 2 * size - len(pending)):
                pending.append(pool.submit(read, i, item))
            if not pending:
                return
            samples, held = [], 0
            while pending and len(samples) < left and held < most:
                buffer.need(number)
                samples.append(pending.popleft().result())
                held += media_bytes(samples[-1])
                number += 1
            left = left - len(samples) or size
            if alone:
                wait(pending)
            yield samples
            samples.clear()
            buffer.add(-held)
    finally:
        buffer.need(math.inf)  # nobody waits any more
        pool.shutdown(wait=False, cancel_futures=True)


class BoundedBuffer:
    """How many bytes of media are in memory: whoever would read more waits while the buffer is full.

    The item that is needed next, and those before it, never wait: what would make space waits for them.
    """

    def __init__(self, capacity):
        self.capacity, self.held, self.needed, self.changed = capacity, 0, 0, threading.Condition()

    def wait(self, i):
        """Until item i may be read."""
        with self.changed:
            self.changed.wait_for(lambda: self.held < self.capacity or i <= self.needed)

    def add(self, size):
        """size: bytes that were read; below 0: that were given back."""
        with self.changed:
            self.held += size
            self.changed.notify_all()

    def need(self, i):
        """Item i is needed next."""
        with self.changed:
            self.needed = i
            self.changed.notify_all()


def media_bytes(sample):
    return sum(patches.nbytes for patches in sample["pixels"]) if sample else 0


def read_item(model, i, item, bad, cut=None, template="{}"):
    """Item i -> a sample for `collate`; or None, and the reason in the dict `bad`, if it is given.

    cut: a dict that gets how many tokens of a text that is too long are left out; None: that is an error.
    """
    try:
        side = item if isinstance(item, Side) else parse_item(item, where=f"item {i}")
        if cut is None:
            return dict(model.processor.render(with_prompt(side, template)), where=side.where)
        sample = render_truncated(model.processor, side, template)
        if sample["cut"]:
            cut[i] = sample["cut"]
        return dict(sample, where=side.where)
    except DataError as e:
        if bad is None:
            raise
        bad[i] = str(e)


@torch.no_grad()
def embed_rows(model, out, rows, samples, mode, steps, limit, took, done, costs, unfinished):
    """One batch: out[rows] = embeddings of these samples, costs[rows] = their steps and tokens.

    What mode auto has to write goes to the list `unfinished`, for `write_rows`.
    """
    batch = to_device(collate([samples[i] for i in rows], model.processor), model.device)
    begun, left = time.perf_counter(), []
    vectors, spent = model.embed(batch, mode, steps, limit, done, left)
    add_time(took, begun, spent)
    places = torch.tensor(rows, device=out.device)
    store(out, costs, places, vectors, spent)
    unfinished += [some._replace(rows=places[some.rows]) for some in left if len(some.rows)]


@torch.no_grad()
def write_rows(model, out, unfinished, limit, took, costs):
    """What mode auto has left to be written, in one batch: fills in `out` and `costs`, empties the list."""
    if not unfinished:
        return
    begun, places = time.perf_counter(), torch.cat([left.rows for left in unfinished])
    vectors, tokens = model.finish(unfinished, limit)
    unfinished.clear()
    spent = Spent(costs[places, 0], tokens)
    add_time(took, begun, spent)
    store(out, costs, places, vectors, spent)


def add_time(took, begun, spent):
    if took is not None:
        took["tokens"] += int(spent.tokens.sum())  # waits for the device
        took["seconds"] += time.perf_counter() - begun


def store(out, costs, places, vectors, spent):
    if out.shape[1] < vectors.shape[1]:
        vectors = unit(vectors[:, : out.shape[1]])
    out[places], costs[places] = vectors.to(out.dtype), torch.stack(spent, 1)


def check_embeddings(model, samples, vectors, unfit=None, first=0):
    """Raises DataError for items whose embeddings, rows of an array, are not finite.

    unfit: a dict that gets the reason instead, by the item's number, where the weights are finite; first: the
    number of the first sample.
    """
    wrong = [s["where"] for s, row in zip(samples, vectors) if s and not np.isfinite(row).all()]
    if not wrong:
        return
    names = ", ".join(wrong[:10])
    if len(wrong) > 10:
        names += f" and {len(wrong) - 10} more"
    dtype = model.lm.norm.weight.dtype
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        why = (f"the weights are not finite either ({len(broken)} tensors, the first {broken[0]}): the "
               "checkpoint is broken")
    elif dtype == torch.float32:
        why = "the weights are finite, so it is something in these items"
    else:
        why = f"the weights are finite; it was computed in {dtype}, try float32"
    if broken or unfit is None:
        raise DataError(f"{names}: the embedding is not finite; {why}")
    for i, sample in enumerate(samples):
        if sample and not np.isfinite(vectors[i]).all():
            unfit[first + i] = f"{sample['where']}: the embedding is not finite; {why}"


def check_mode(mode, steps):
    """Raises ValueError for what `embed` does not know."""
    if mode not in MODES:
        raise ValueError(f"mode {quote(mode)}.{nearest(mode, MODES)}")
    if steps is not None and (mode != "latent" or not 0 <= steps <= MAX_STEPS):
        raise ValueError(f"steps {steps} in mode {mode!r}: 0..{MAX_STEPS} steps belong to mode 'latent'")


def check_truncate(truncate):
    if not isinstance(truncate, (bool, dict)):
        raise ValueError(f"truncate {quote(truncate)}: needs True, False, or a dict for what is lost")


def check_numbers(done, dim, width, **at_least_1):
    """Raises ValueError for what `encode` cannot do; width: components of the model's embeddings."""
    if not 0 <= done <= 1:
        raise ValueError(f"done {done}: needs a probability, 0 .. 1")
    if dim is not None and not 1 <= dim <= width:
        raise ValueError(f"dim {dim}: this model has 1 to {width} components")
    if min(at_least_1.values()) < 1:
        raise ValueError(f"{', '.join(f'{k} {v}' for k, v in at_least_1.items())}: need at least 1")
