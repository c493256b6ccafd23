"""From an item to a batch: pixels, the prompt, the tokenizer, collation, the batch schedule.

    pixels     target_size, patchify       the backbone's resize rule and patch layout
    prompt     Processor.render            the one place where text, media and special tokens become ids
    batches    collate, Schedule, Batches  padded tensors; which records make which step

What reads pictures, clips and records stands in files/.  Nothing is skipped, replaced or cut silently: what
cannot be used raises DataError, which names the file, the record and the reason.
"""

import functools
import itertools
import os
import re
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.models.glm4v.video_processing_glm4v import smart_resize as resize_clip
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from backbones.families import BACKBONES, QWEN2_VL
from backbones.tokens import text_reader
from curriculum import LEAD_OR_BLANKS
from files.clips import load_clip, Part
from files.errors import DataError, quote, readable
from files.items import Side
from files.packing import columns_of, distinct, fill_micro_batches, group_by_length
from files.pictures import load_image


# ---- pixels
def target_size(width, height, min_pixels, max_pixels, backbone=QWEN2_VL, together=0):
    """The backbone's resize rule -> (width, height): whole tokens, area between the limits, shape kept.

    together: frames whose areas are limited as a sum (Qwen3-VL's rule for clips); 0: a picture, or one frame.
    """
    if min(width, height) < 1:
        raise DataError(f"a picture of {width}x{height} pixels: needs at least 1x1")
    if max_pixels < backbone.side**2:
        raise DataError(f"max_pixels {max_pixels}: needs at least {backbone.side**2}, one token")
    if max(width, height) > 200 * min(width, height):
        raise DataError(f"a picture of {width}x{height} pixels: sides differ by more than 200 to 1, crop it")
    if together:
        together = max(together, backbone.temporal)  # a single frame is shown twice
        size = resize_clip(
            together, height, width, backbone.temporal, backbone.side, min_pixels, max_pixels)
    else:
        size = smart_resize(height, width, backbone.side, min_pixels, max_pixels)
    height, width = size
    return width, height


def patchify(frames, size, backbone=QWEN2_VL):
    """RGB images of a picture (1) or clip (any number) -> patches (t*h*w, 6 patch^2) uint8, grid (t, h, w).

    size: (width, height), whole visual tokens.  The order is Qwen-VL's: the four patches of a token stand
    together; a patch is (3, 2 frames, rows, columns).  An odd last frame is repeated.
    """
    patch, merge, temporal = backbone.patch, backbone.merge, backbone.temporal
    arrays = [np.asarray(f if f.size == size else f.resize(size, Image.BICUBIC)) for f in frames]
    arrays += arrays[-1:] * (-len(arrays) % temporal)
    t, h, w = len(arrays) // temporal, size[1] // patch, size[0] // patch
    x = np.stack(arrays).reshape(t, temporal, h // merge, merge, patch, w // merge, merge, patch, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/2, w/2, 2, 2, 3, 2, patch, patch)
    return x.reshape(t * h * w, -1), (t, h, w)


# ---- the prompt
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>", "<|endoftext|>")
PLUME_TOKENS = ("<gen_emb>", "<disc_emb>", "<bot>", "<eot>", "<ct>")  # <ct>: the released code's, unused here
SPECIAL = QWEN_TOKENS + PLUME_TOKENS
# The chat template: everything that stands around an item.  A checkpoint carries its own.
TEMPLATE = dict(
    system="You are a helpful assistant.",
    turns="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{item}<|im_end|>\n"
          "<|im_start|>assistant\n<think><bot>",
    anchor="\n<disc_emb>\n{prompt}",  # ends the item, unless a record writes <disc_emb> itself
    closing="</think>\n",  # between <eot> and <gen_emb>, which end the thought and the whole
    answer="<answer>{answer}</answer>\n",  # behind the closing, as long as the curriculum writes it
)
TEMPLATES = {name: TEMPLATE for name in BACKBONES}  # what a model type starts from
TEMPLATES["qwen3_vl"] = TEMPLATE | dict(system="", turns=TEMPLATE["turns"].split("<|im_end|>\n", 1)[1])
NEEDED = dict(turns=("{item}", "<bot>"), anchor=("<disc_emb>",), answer=("{answer}",))  # once each


def fixed_strings(template):
    """What a template writes around every item, between special tokens and places that are filled in."""
    turns = template["turns"].replace("{system}", template["system"])
    text = "{}".join([turns, template["closing"], template["answer"]])
    return [piece for piece in re.split(r"<\|\w+\|>|<bot>|\{\w*\}", text) if piece.strip()]


class VisualTokens(NamedTuple):
    """Of a picture, or of a clip or frame pair, as they stand in the prompt."""

    id: int  # of <|image_pad|> or <|video_pad|>
    positions: np.ndarray  # (3, n) M-RoPE positions (time, row, column), from 0 on


def visual_tokens(id, times, h, w):
    """times: positions of the frame pairs, from 0 on; h, w: rows and columns of tokens."""
    time, row, column = np.indices((len(times), h, w)).reshape(3, -1)
    return VisualTokens(id, np.stack([np.array(times)[time], row, column]))


@functools.cache
def one_of(tokens):
    return re.compile(f"({'|'.join(map(re.escape, tokens))})")


class Processor:
    """Tokenizer, prompt, limits and chat template: everything between an item and the model's ids."""

    def __init__(self, tokenizer, prompt, limits, white_image=False, template=TEMPLATE, backbone=QWEN2_VL):
        for name, needed in NEEDED.items():
            for piece in needed:
                if template[name].count(piece) != 1:
                    given = quote(template[name])
                    raise DataError(f"the template's {name!r} must have {piece!r} once, it is {given}")
        turns = template["turns"]
        if not turns.endswith("<bot>"):
            raise DataError("the template's 'turns' must end in '<bot>', where the thought begins: "
                            + quote(turns))
        limits.check(backbone)
        self.tokenizer, self.prompt, self.limits = tokenizer, prompt, limits
        self.white_image, self.template, self.backbone = white_image, template, backbone
        before, behind = turns.split("{item}")
        self.before = before.replace("{system}", template["system"])
        self.behind = behind.replace("{system}", template["system"])
        self.backend = text_reader(tokenizer, SPECIAL)  # a copy; special tokens are added by id
        self.known, self.room = {}, 0  # texts encoded lately -> their ids; how many characters and ids more
        self.place_of_said = functools.lru_cache(1 << 12)(self.place_of_said)
        self.id = {token: self.backend.token_to_id(token) for token in SPECIAL}
        missing = [token for token, i in self.id.items() if i is None]
        if missing:
            raise DataError(f"the tokenizer has no {' '.join(missing)}; PLUME needs {' '.join(SPECIAL)}")

    def __reduce__(self):  # the copy's setting does not survive pickling to a worker: make it anew there
        return Processor, (
            self.tokenizer, self.prompt, self.limits, self.white_image, self.template, self.backbone)

    def render(self, side, stage=None, curriculum=None):
        """The one prompt of training, evaluation and `encode`: a Side -> prefix and suffix.

        ids (P,), positions (3, P), disc: place of <disc_emb> in ids, pixels and grids: one for each medium,
        suffix (T,), gate_at: place in it of the first token that can be wrong, replaced: see `collate`.
        Without a stage the suffix is inference's: <eot>, the template's closing, <gen_emb>.  With one, it is
        the curriculum's text for that stage; a rationale too long for `max_len` loses its end (cut: how many
        tokens), and nothing else ever does.
        Raises DataError when question and media alone are too long, or a medium cannot be read.
        """
        try:
            prefix = self.prefix(self.sequence(side.parts))
        except DataError as e:
            raise DataError(f"{side.where}: {e}") from e
        used = len(prefix["ids"]) + (stage.latent_steps if stage else 0)
        suffix = self.suffix(side, stage, curriculum, used)
        return prefix | suffix | dict(replaced=self.replaced(side, stage, curriculum))

    def sequence(self, parts):
        """Parts -> the whole prompt as texts, ids of special tokens, and (kind, source) for the media."""
        kinds = [kind for kind, _ in parts]
        if self.white_image and "image" not in kinds and "video" not in kinds:  # the released text-only form
            size = self.backbone.side, self.backbone.side
            parts = [("image", Image.new("RGB", size, "white")), *parts]
        if "disc" not in kinds:
            end, prompt = self.template["anchor"].split("<disc_emb>")
            prompt = prompt.replace("{prompt}", self.prompt)
            parts = [*parts, ("text", end), ("disc", None), ("text", prompt)]
        sequence, last = self.pieces(self.before), None
        for kind, value in parts:
            if kind == "disc":
                sequence.append(self.id["<disc_emb>"])
            elif kind == "text" and last == "disc":  # the prompt; the released one names <gen_emb>
                sequence += self.pieces(value, ("<gen_emb>",))
            elif kind == "text":
                sequence.append(str(value))  # not numpy's kind of string
            else:
                sequence.append((kind, value))
            last = kind
        return sequence + self.pieces(self.behind)

    def pieces(self, text, tokens=SPECIAL):
        """A text of ours -> its special tokens as ids, and what is between them as strings."""
        found = one_of(tokens).split(text)
        return [self.id[piece] if piece in tokens else piece for piece in found]

    def prefix(self, sequence):
        """What `sequence` gives -> ids (P,), M-RoPE positions (3, P), patches and grids of the media."""
        ids, positions, pixels, grids, pieces, at = [], [], [], [], [], 0
        for piece in sequence:
            if not isinstance(piece, tuple):
                pieces.append(piece)
                continue
            patches, grid, shown = self.media(*piece)
            pieces += shown
            pixels.append(patches)
            grids.append(grid)
        for kind, run in itertools.groupby(pieces, type):  # of texts, ids, VisualTokens
            if kind is VisualTokens:
                for visual in run:
                    ids += [visual.id] * visual.positions.shape[1]
                    positions.append(visual.positions + at)
                    at += int(visual.positions.max()) + 1  # Qwen2-VL's own rule: the largest of any axis
                continue
            run = self.encode("".join(run)) if kind is str else list(run)  # neighbouring texts are one
            ids += run
            positions.append(np.arange(at, at + len(run))[None].repeat(3, 0))
            at += len(run)
        disc = ids.index(self.id["<disc_emb>"])
        return dict(ids=ids, positions=np.concatenate(positions, 1), disc=disc, pixels=pixels, grids=grids)

    def encode(self, text):
        """Text -> token ids.  They are remembered a while: the prompt around every item is the same."""
        ids = self.known.get(text)
        if ids is None:
            ids = self.backend.encode(text, add_special_tokens=False).ids if text else []
            if self.room < 0:
                self.known, self.room = {}, 1 << 18  # about 10 MB
            self.known[text] = ids
            self.room -= len(text) + len(ids)
        return ids

    def media(self, kind, source):
        """An image or video -> patches and grid, as `patchify`; and what stands for it in the prompt."""
        try:
            frames, seconds = self.frames(kind, source)
            size = self.size(kind, frames)
            patches, grid = patchify(frames, size, self.backbone)
            return patches, grid, self.shown(kind, grid, seconds)
        except DataError as e:
            if isinstance(source, (str, os.PathLike, Part)) and readable(str(source)) not in str(e):
                raise DataError(f"{source}: {e}") from e
            raise

    def frames(self, kind, source):
        """-> the frames of a medium and their seconds, as `load_clip`."""
        if kind == "image":
            return [load_image(source)], [0.0, 0.0]
        return load_clip(source, self.limits.num_frames, self.limits.frame_rate, self.limits.fps)

    def size(self, kind, frames):
        """-> (width, height) in which they are shown."""
        limits, backbone = self.limits, self.backbone
        if kind == "image":
            return target_size(*frames[0].size, limits.min_pixels, limits.max_pixels, backbone)
        low, high, together = limits.video_min_pixels, limits.video_max_pixels, 0
        if backbone.time == "text":  # Qwen3-VL: as much in all as a clip with all its frames may have
            low, high, together = low * limits.num_frames, high * limits.num_frames, len(frames)
        return target_size(*frames[0].size, low, high, backbone, together)

    def shown(self, kind, grid, seconds):
        """-> the prompt of a medium: texts, ids, and VisualTokens.  seconds: as `load_clip` gives them."""
        merge, pair = self.backbone.merge, self.backbone.temporal
        t, h, w = grid[0], grid[1] // merge, grid[2] // merge
        names = f"<|{kind}_pad|>", "<|vision_start|>", "<|vision_end|>"
        pad, start, end = (self.id[name] for name in names)
        times, n = np.arange(t), len(seconds) - 1
        if kind == "video" and self.backbone.time == "text":
            pieces, begin = [], [*seconds[:n], seconds[n - 1]]  # an odd last frame is repeated
            for i in range(0, t * pair, pair):
                mean = (begin[i] + begin[i + pair - 1]) / 2
                pieces += [f"<{mean:.1f} seconds>", start, visual_tokens(pad, [0], h, w), end]
            return pieces
        if kind == "video" and self.backbone.time == "seconds":
            every = np.float32(self.backbone.rate) * np.float32(pair * seconds[n] / n)  # as transformers
            times = (times * every).astype(int)
        return [start, visual_tokens(pad, times, h, w), end]

    def suffix(self, side, stage, curriculum, used):
        """What stands behind `used` tokens of question, media and latent steps: suffix, cut, gate_at."""
        rest, answer = curriculum.rewrite(side.rationale, side.answer, stage) if stage else ("", "")
        lead = closing = self.template["closing"]
        lead += self.template["answer"].split("{answer}")[0]
        if answer:
            closing += self.template["answer"].replace("{answer}", answer)
        tokens, lead, closing = self.encode(rest), self.encode(lead), self.encode(closing)
        room = self.limits.max_len - used - len(closing) - 2  # <eot>, <gen_emb>
        if room < 0:
            raise DataError(
                f"{side.where}: {used} tokens of question, media and latent steps and {len(closing) + 2} "
                f"behind them exceed max_len {self.limits.max_len}; raise max_len, or lower max_pixels, "
                "video_max_pixels or num_frames", over=-room)
        kept, eot = tokens[:room], [self.id["<eot>"]]
        if curriculum and curriculum.rest_of_rationale == "after":
            thought = eot + kept
        else:
            thought = kept + eot
        gate_at = None
        if side.rationale and kept:
            gate_at = thought.index(kept[0]) + min(self.place_of_said(rest), len(kept) - 1)
        elif side.rationale:  # the answer, behind what every answer begins with
            gate_at = 1 + len(os.path.commonprefix([lead, closing]))
        suffix = thought + closing + [self.id["<gen_emb>"]]
        return dict(suffix=suffix, cut=len(tokens) - len(kept), gate_at=gate_at)

    def replaced(self, side, stage, curriculum):
        """(latent step, token): where a step stands for a part of the rationale, that part's `first_said`.

        An adaptive curriculum has <eot> for every step behind the last part.
        """
        if not stage or not stage.latent_steps:
            return []
        parts = curriculum.parts(side.rationale)[: stage.index]
        return [(i * curriculum.steps_per_segment, self.first_said(part)) for i, part in enumerate(parts)
                if part or curriculum.adaptive]

    def first_said(self, part):
        """The first token that says something; of an empty part <eot>."""
        return self.encode(part)[self.place_of_said(part)] if part else self.id["<eot>"]

    def place_of_said(self, part):
        """Of the first token that is no blank, mark or number of a list; 0 where there is nothing else."""
        tokens, lead = self.backend.encode(part, add_special_tokens=False), LEAD_OR_BLANKS.match(part).end()
        return next((i for i, (_, end) in enumerate(tokens.offsets) if end > lead), 0)


# ---- batches
def padded(rows, value):
    """Arrays or lists (n, ...) -> one tensor (B, largest n, ...), filled up on the right."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)


def collate(samples, processor):
    """Rendered samples -> one batch of tensors, prefixes and suffixes padded on the right.

    ids (B, P), positions (3, B, P), lengths (B,), disc (B,), suffix (B, T), gen (B,) column of <gen_emb>;
    media (M,) flat places of the media tokens in (B, P), pixels (uint8) and grid of all media in that order
    or None;
    label_at (N,) flat places in (B, T), labels (N,), gate_at (n,) rows of label_at: the first token that
    can be wrong: of the rationale that is left, or else of the answer, in rows that have a rationale;
    replaced (m, 3): row, latent step and token, where a step stands for a part of the rationale: its first.
    """
    pad = processor.id["<|endoftext|>"]
    ids = padded([s["ids"] for s in samples], pad)  # (B, P)
    positions = padded([s["positions"].T for s in samples], 0)  # (B, P, 3)
    positions = positions.permute(2, 0, 1).contiguous()  # (3, B, P)
    suffix = padded([s["suffix"] for s in samples], pad)  # (B, T)
    lengths = torch.tensor([len(s["ids"]) for s in samples])
    disc = torch.tensor([s["disc"] for s in samples])
    gen = torch.tensor([len(s["suffix"]) - 1 for s in samples])
    is_media = (ids == processor.id["<|image_pad|>"]) | (ids == processor.id["<|video_pad|>"])
    pixels = [torch.from_numpy(patches) for s in samples for patches in s["pixels"]]
    grid = [grid for s in samples for grid in s["grids"]]
    label_at, labels, gate_at, replaced = [], [], [], []
    counted = [b for b, s in enumerate(samples) for _ in range(s.get("times", 1))]
    for b in counted:
        s = samples[b]
        if s["gate_at"] is not None:
            gate_at.append(len(labels) + s["gate_at"])
        start = b * suffix.shape[1]
        label_at += range(start, start + len(s["suffix"]))
        labels += s["suffix"]
        replaced += [(b, step, token) for step, token in s["replaced"]]
    return dict(
        ids=ids, positions=positions, lengths=lengths, disc=disc, suffix=suffix, gen=gen,
        media=is_media.flatten().nonzero()[:, 0],
        pixels=torch.cat(pixels) if pixels else None,
        grid=torch.tensor(grid) if grid else None,
        label_at=torch.tensor(label_at, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        gate_at=torch.tensor(gate_at, dtype=torch.long),
        replaced=torch.tensor(replaced, dtype=torch.long).view(-1, 3))


class Schedule:
    """Which records make which step: a function of seed and step, so workers, ranks and resumed runs agree.

    Every global batch comes from one data set (its other rows are hard negatives).  A data set gets steps in
    proportion to its size, all over the run, and passes through all its records before it shows one again.
    dataset (pairs,): number of each record's data set, -1: held out; weights: of each, times its size.
    """

    def __init__(self, dataset, names, global_batch, steps, seed, weights=1.0):
        self.rows = [np.flatnonzero(dataset == d) for d in range(len(names))]
        self.global_batch, self.steps, self.seed = global_batch, steps, seed
        share = np.array([len(r) for r in self.rows]) * weights
        share = share / share.sum() * steps
        self.counts = np.floor(share).astype(int)
        largest_remainders = np.argsort(self.counts - share, kind="stable")[: steps - self.counts.sum()]
        self.counts[largest_remainders] += 1
        which = np.repeat(np.arange(len(names)), self.counts)
        nth = np.concatenate([np.arange(c) for c in self.counts])
        at = (nth + np.random.default_rng([seed, 0]).random(steps)) / self.counts[which]
        order = np.argsort(at, kind="stable")
        self.which, self.nth = which[order], nth[order]
        # a cache of this object's own
        self.lap = functools.lru_cache(2 * len(names))(self.lap)  # a batch may stand across two passes

    def lap(self, d, number):
        """The records of a data set in the order of one of its passes."""
        return np.random.default_rng([self.seed, 1, d, number]).permutation(self.rows[d])

    def __getitem__(self, step):
        """-> the record numbers of this step's global batch"""
        d, size = int(self.which[step]), self.global_batch
        places = np.arange(size) + self.nth[step] * size
        laps, places = np.divmod(places, len(self.rows[d]))
        return np.array([self.lap(d, lap)[place] for lap, place in zip(laps.tolist(), places.tolist())])


class StepSampler(torch.utils.data.Sampler):
    """(step, stage, indices of this rank) from `start` on.

    The stage travels with the indices: a worker that prefetches ahead writes the text of the right one.
    """

    def __init__(self, schedule, progress, start=0, rank=0, world=1):
        self.schedule, self.progress, self.start = schedule, progress, start
        rows = schedule.global_batch // world
        self.mine = slice(rank * rows, (rank + 1) * rows)

    def __iter__(self):
        for step in range(self.start, self.schedule.steps):
            yield step, self.progress.stage(step), self.schedule[step][self.mine]

    def __len__(self):
        return self.schedule.steps - self.start


class Batches(torch.utils.data.Dataset):
    """(step, stage, indices) -> a batch of B pairs: queries, targets and hard negatives by their lengths.

    micro: micro-batches, each a list of groups of rows, each a batch of `collate`: of about equal lengths, so
    that there is little padding; all in one micro-batch, or with micro_tokens several of at most so many
    columns, latent steps and suffix included, in which a visual token counts twice: the vision tower sees it,
    too (a row that has more is alone);
    order (2B + n,): the places of all queries, then targets, then hard negatives among the rows of `micro`,
    where equal ones are one row;
    blank: a micro-batch of one row of no text, for a rank that has fewer of them; without micro_tokens None;
    columns: how many are computed; real: how many of them are no padding;
    query (B,): hashes of the queries; target (B, 1+M): of target and hard negatives, M: the most that a
    record of the file has; valid (B, 1+M): which of them there are; negative_at (n,): flat places in (B, M)
    of those in `micro`, whose text is in no loss;
    step, dataset (name), stage, cut (rationale tokens lost to max_len), and bad: with skip_bad a record whose
    media cannot be read is named there and left out of every loss.
    """

    def __init__(self, pairs, processor, curriculum, skip_bad=False, micro_tokens=0):
        self.pairs, self.processor, self.curriculum = pairs, processor, curriculum
        self.skip_bad, self.micro_tokens = skip_bad, micro_tokens

    def __getitem__(self, job):
        step, stage, indices = job
        target = torch.zeros(len(indices), 1 + self.pairs.negatives, dtype=torch.long)
        valid, rows, bad = torch.zeros_like(target, dtype=torch.bool), [], []
        blank = self.processor.render(Side([("text", "")]), stage, self.curriculum) | dict(times=0)
        for row, i in enumerate(indices):
            sides = self.pairs[i]
            try:
                rows.append([self.processor.render(side, stage, self.curriculum) for side in sides])
                hashes = [self.pairs.target[i], *(side.hash() for side in sides[2:])]
                target[row, : len(hashes)] = torch.tensor(hashes)
                valid[row, : len(hashes)] = True
            except DataError as e:
                if not self.skip_bad:
                    raise
                bad.append(str(e))
                rows.append([blank] * 2)
        queries, targets = [row[0] for row in rows], [row[1] for row in rows]
        negatives = [dict(negative, times=0) for row in rows for negative in row[2:]]
        samples, places = distinct(queries + targets + negatives)
        lengths = np.array([(len(s["ids"]), stage.latent_steps + len(s["suffix"])) for s in samples])
        visual = np.array([sum(map(len, s["pixels"])) for s in samples]) // self.processor.backbone.merge**2
        micro = fill_micro_batches(group_by_length(lengths), lengths, visual, self.micro_tokens)
        groups = [group for part in micro for group in part]

        def batch_of(group):
            return collate([samples[i] for i in group], self.processor)

        return dict(
            micro=[[batch_of(group) for group in part] for part in micro],
            blank=[collate([blank], self.processor)] if self.micro_tokens else None,
            order=torch.from_numpy(np.concatenate(groups).argsort()[places]),
            columns=sum(columns_of(lengths[group]) for group in groups), real=int(lengths.sum()),
            step=step, stage=stage, bad=bad, dataset=self.pairs.names[self.pairs.dataset[indices[0]]],
            query=torch.from_numpy(self.pairs.query_hash[indices]), target=target, valid=valid,
            negative_at=valid[:, 1:].flatten().nonzero()[:, 0],
            cut=sum(sample["cut"] for row in rows for sample in row))


def to_device(batch, device):
    """The grid stays on the CPU: the vision tower reads its numbers, and would wait for the device."""
    moved = {name: value.to(device, non_blocking=True)
             for name, value in batch.items() if torch.is_tensor(value) and name != "grid"}
    return batch | moved
