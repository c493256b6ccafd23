"""Embeds every item once, on all ranks, and keeps the embeddings under the hash of what they depend on."""

import glob
import hashlib
import json
import math
import os
import re
import secrets
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import PIL
import av
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import transformers
from PIL import ExifTags, Image
from tqdm import tqdm

from data import target_size
from engine.ranks import peer_errors, rank_and_world
from engine.stream import encoding
from files.clips import Part
from files.errors import DataError, readable
from files.pictures import DECODER_ERRORS, frame_files
from files.writing import open_target
from hub.isolated import HOME
from hub.weights import count_parameters

# An embedding comes from what these modules import, directly or not: it is used again while that is the same
COMPUTING = "model", "tasks.find"


def code_files():
    """Our files on which an embedding can depend."""
    found, names = set(), list(COMPUTING)
    while names:
        path = HOME / f"{names.pop().replace('.', '/')}.py"
        if path not in found and path.is_file():
            found.add(path)
            names += re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.M)
    return sorted(found)


def short_hash(*texts):
    return hashlib.blake2b(as_bytes("\0".join(texts)), digest_size=8).hexdigest()


def as_bytes(text):
    """For a hash: names of files may be no UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def fingerprint(model):
    """Hash of everything a checkpoint is: weights as they were loaded, configuration, settings, tokenizer."""
    config, settings = model.backbone.config.to_dict(), dict(model.settings)
    settings.pop("prompts")  # an item has its own in its text
    for name in ("plume", "transformers_version", "_name_or_path"):
        config.pop(name, None)
    h = hashlib.blake2b(digest_size=8)
    h.update(json.dumps([config, settings], sort_keys=True, default=str).encode())
    h.update(model.processor.backend.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        h.update(name.encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


Weight = namedtuple("Weight", "key tokens patches")  # of an item: its hash, and what it costs to encode


class Embedder:
    """Embeds every item once, on all ranks; what a run before embedded comes from its files.

    An item is known by the hash of its texts and of the bytes of its media.  Batches are shared out by cost.
    What a batch holds depends on neither the number of ranks nor on what is known already, so neither changes
    a bit of the result, where a product has as many threads.
    mode, steps, batch_size, limit, done: as `Plume.encode`; protocol: of the benchmark, see eval.py.
    skip_bad: what cannot be read has its reason instead of an error.
    folder: one file a process of records (16 bytes of hash, D float32), in a folder named after the hash of
    everything else an embedding depends on; "": nothing is kept.
    """

    def __init__(self, model, mode, steps, batch_size=32, limit=512, done=0.5, protocol="clean",
                 skip_bad=False, folder="", checkpoint_hash=None):
        self.model, self.mode, self.steps = model, mode, steps
        self.batch_size, self.limit, self.done, self.skip_bad = batch_size, limit, done, skip_bad
        self.rank, self.world, _ = rank_and_world() if dist.is_initialized() else (0, 1, 0)
        self.width = model.lm.config.hidden_size
        self.record = np.dtype([("key", "V16"), ("vector", "<f4", (self.width,))])
        code = [path.read_text(encoding="utf-8") for path in code_files()]
        self.about = dict(
            checkpoint_hash=checkpoint_hash or fingerprint(model), code_hash=short_hash(*code), mode=mode,
            steps=steps, limit=limit if mode in ("cot", "auto") else None,
            done=done if mode == "auto" else None, protocol=protocol,
            dtype=str(model.lm.norm.weight.dtype), device=model.device.type, torch=torch.__version__,
            transformers=transformers.__version__, tokenizers=tokenizers.__version__,
            numpy=np.__version__, pillow=PIL.__version__, av=av.__version__)
        self.run_hash = short_hash(json.dumps(self.about, sort_keys=True))
        self.known, self.bad = {}, {}  # key -> vector, reason
        self.planned, self.hashed = set(), {}  # keys that were asked for; file -> what `hash` gives
        self.asked = self.encoded = 0
        self.index = self  # what embeds corpora
        self.folder, self.file = "", None
        if folder:
            self.folder = os.path.join(folder, self.run_hash)
            os.makedirs(self.folder, exist_ok=True)
            if self.rank == 0:
                self.read_kept()

    def index_with(self, other):
        """Corpora are embedded by another Embedder: in another mode, and in a folder of its own."""
        self.index = other
        self.run_hash = short_hash(self.run_hash, other.run_hash)  # of scores: they depend on both

    def read_kept(self):
        """What earlier runs have written.  A record that was cut off or damaged is none."""
        for path in sorted(glob.glob(os.path.join(glob.escape(self.folder), "*.bin"))):
            records = np.fromfile(path, self.record, os.path.getsize(path) // self.record.itemsize)
            whole = np.abs(np.linalg.norm(records["vector"], axis=1) - 1) < 1e-3
            for key, vector in records[whole]:
                self.known[key.tobytes()] = vector

    def keep(self, keys, vectors):
        """Appends records to this process's own file."""
        if not self.folder or not keys:
            return
        if self.file is None:  # with a name of its own, so that no other run's is written over
            path = os.path.join(self.folder, f"{self.rank}-{secrets.token_hex(4)}.bin")
            self.file = open_target(path, path, "x", "wb")
        records = np.empty(len(keys), self.record)
        records["key"], records["vector"] = np.frombuffer(b"".join(keys), "V16"), vectors
        self.file.write(records.tobytes())
        self.file.flush()

    def weigh(self, side):
        """-> Weight of a Side.  Reads all bytes of its media once, decodes none."""
        h, tokens, patches = hashlib.blake2b(digest_size=16), 0, 0
        for kind, value in side.parts:
            several = len(value) if isinstance(value, (list, tuple)) else ""
            h.update(f"{kind}\0{several}\0".encode())
            if kind in ("image", "video"):
                patches += self.weigh_medium(kind, value, h)
            else:
                text = value or ""
                tokens += len(self.model.processor.encode(text))
                h.update(f"{len(text)}\0{value}".encode())
        return Weight(h.digest(), tokens + patches // self.model.processor.backbone.merge**2, patches)

    def weigh_medium(self, kind, value, h):
        """Adds the bytes of a picture or clip to the hash h -> its number of patches, about."""
        limits, facts = self.model.processor.limits, self.model.processor.backbone
        low, high = limits.video_min_pixels, limits.video_max_pixels
        if kind == "image":
            low, high = limits.min_pixels, limits.max_pixels
        sources = value if isinstance(value, (list, tuple)) else [value]
        if kind == "video" and isinstance(value, str) and os.path.isdir(value):
            sources = frame_files(value)
            h.update(b"frames")  # a file that has a picture's bytes, or many, is another clip
        area, count = high, limits.num_frames  # of a video file: only decoding would tell
        if isinstance(value, Part):
            sources = [value.video]
            h.update(f"{value.start} {value.end} {value.fps}".encode())
        for source in sources:
            digest, size = self.hash(source)
            h.update(digest)
            if size:
                count = min(len(sources), limits.num_frames)
                with suppress(DataError):  # a picture that cannot be used: the error comes when it is read
                    area = math.prod(target_size(*size, low, high, facts))
            elif kind == "image":
                h.update(as_bytes(str(source)))  # broken ones of equal bytes are told apart by their names
        return area // facts.patch**2 * -(-count // facts.temporal)

    def hash(self, source):
        """-> hash of a picture's or video's bytes, and the size of a picture."""
        if isinstance(source, Image.Image):
            about = [source.mode, source.size, source.getpalette(), source.info.get("transparency")]
            with suppress(*DECODER_ERRORS):  # a broken EXIF block says nothing
                about.append(source.getexif().get(ExifTags.Base.Orientation))
            h = hashlib.blake2b(repr(about).encode(), digest_size=16)
            h.update(source.tobytes())
            return h.digest(), source.size
        file = source
        with suppress(OSError):  # one that was changed since is read again
            now = os.stat(source)
            file = source, now.st_size, now.st_mtime_ns, now.st_ino
        if file not in self.hashed:
            h, size = hashlib.blake2b(digest_size=16), None
            # of a video, or of what cannot be read, which is an error when it is decoded
            with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                with open(source, "rb") as f:
                    while chunk := f.read(1 << 20):
                        h.update(chunk)
                with Image.open(source) as image:
                    size = image.size
            self.hashed[file] = h.digest(), size
        return self.hashed[file]

    def plan(self, sides, weights):
        """-> for each rank its (key, Side)s, batch behind batch, the longest items first; of equal cost."""
        new = {}
        for weight, side in zip(weights, sides):
            if weight.key not in self.planned:
                new.setdefault(weight.key, (weight, side))
        self.planned |= new.keys()
        items, size = sorted(new.values(), key=lambda item: -item[0].tokens), self.batch_size
        batches = [items[a : a + size] for a in range(0, len(items), size)]
        batches = [batch for batch in batches if any(w.key not in self.known for w, _ in batch)]
        visual, decoder = self.model.backbone.model.visual, self.model.lm.layers
        patch = count_parameters(visual) / count_parameters(decoder)  # in tokens of the decoder
        cost = [len(b) * b[0][0].tokens + patch * sum(w.patches for w, _ in b) for b in batches]
        load, rank_of = [0.0] * self.world, [0] * len(batches)
        for n in np.argsort(cost)[::-1]:  # the dearest first, each to the rank with the least to do
            rank = rank_of[n] = load.index(min(load))
            load[rank] += cost[n]
        shares = [[] for _ in range(self.world)]
        for batch, rank in zip(batches, rank_of):
            shares[rank] += [(weight.key, side) for weight, side in batch]
        return shares

    def work(self, items, label=False, took=None):
        """This rank's (key, Side)s -> embeddings (n, D), NaN where one cannot be read, and {number: why}."""
        sides, bad = [side for _, side in items], {}
        windows = encoding(
            self.model, sides, self.mode, self.steps, self.batch_size, label, self.limit, took, sort=False,
            bad=bad if self.skip_bad else None, done=self.done)
        out, begin = np.empty((len(items), self.width), np.float32), 0
        with closing(windows):  # its threads leave whatever happens here
            for vectors in windows:
                end = begin + len(vectors)
                out[begin:end] = vectors
                rows = [i for i in range(begin, end) if i not in bad]
                self.keep([items[i][0] for i in rows], out[rows])
                begin = end
        return out, bad

    def serve(self):
        """What the other ranks do: encode what rank 0 gives out, until there is nothing more."""
        while (given := self.give(None)) is not None:
            mode, items = given
            mine = (self if mode == self.mode else self.index).work(items)
            with peer_errors():
                dist.gather_object(mine, None, 0)

    def give(self, shares):
        """Rank 0's (mode, share)s, one for each rank -> this rank's.  None, given by rank 0, ends `serve`."""
        mine = [None]
        with peer_errors():
            dist.scatter_object_list(mine, shares or [None] * self.world if self.rank == 0 else None, 0)
        return mine[0]

    def share_out(self, shares, label, took):
        """shares of all ranks -> what `work` makes of each."""
        if self.world == 1:
            return [self.work(shares[0], label, took)]
        _, items = self.give([(self.mode, share) for share in shares])
        mine = self.work(items, f"{label}, rank 0 of {self.world}", took)
        found = [None] * self.world
        with peer_errors():
            dist.gather_object(mine, found, 0)
        return found

    def counts(self):
        """What became of the items that were asked for, in words."""
        words = (f"{self.asked} items, {self.encoded} encoded, {len(self.planned) - self.encoded} known from "
                 f"before, {self.asked - len(self.planned)} shared")
        return words if self.index is self else f"queries: {words}; corpora: {self.index.counts()}"

    def __call__(self, sides, label, took=None):
        """Sides -> (N, D) unit embeddings on the CPU, NaN where one cannot be read; the reasons, or None."""
        pool = ThreadPoolExecutor(8)
        try:
            weights = list(tqdm(
                pool.map(self.weigh, sides), f"{label}: hashing", len(sides), unit="item", leave=False,
                disable=not label))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        shares = self.plan(sides, weights)
        encoded = sum(map(len, shares))
        self.asked, self.encoded = self.asked + len(sides), self.encoded + encoded
        if took is not None:
            took["queries"] += encoded
        if encoded:
            for share, (vectors, bad) in zip(shares, self.share_out(shares, label, took)):
                for (key, _), vector in zip(share, vectors):
                    self.known[key] = vector
                for i, why in bad.items():
                    self.bad[share[i][0]] = why
        reasons = []
        for weight, side in zip(weights, sides):
            why = self.bad.get(weight.key)
            if why and not why.startswith(readable(side.where)):
                why = f"{side.where}: the same as {why}"
            reasons.append(why)
        return torch.from_numpy(np.stack([self.known[weight.key] for weight in weights])), reasons
