"""Search a folder of pictures, clips and pages by text, by a picture, or by both.

    python -m tools.search FOLDER                                    bring the folder's index up to date
    python -m tools.search FOLDER "two people at a fountain"         the same, then the first results
    python -m tools.search FOLDER --image query.jpg --count 20       what looks like this picture
    python -m tools.search FOLDER "the same car in red" --image query.jpg --html results.html
    python -m tools.search FOLDER "a goal" --every 10                clips also in windows of 10 seconds

The index is a folder: items.jsonl (path, content hash, and which seconds or page; a line for each row of the
vectors), vectors-XXXXXXXX.npy (float32, unit rows), bad.jsonl (what cannot be read, and why), and
embeddings/, where every item is kept as soon as it is encoded: a run that was stopped goes on there, and
`eval.py --scores INDEX` shares it.  A file of the same size and time is not read again, one of the same
content under another name or time not encoded again.  Another checkpoint, mode or version has an index of
its own beside it.  PDF pages are indexed where pypdfium2 is installed.
"""

import contextlib
import glob
import importlib.util
import itertools
import json
import math
import os
import secrets
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from engine.flags import command, parse_flags
from engine.kept import Embedder
from files.errors import closest, DataError, quote, reason
from files.items import parse_item
from files.records import parse_json
from files.writing import writable, writing
from tasks.find import load_model
from tools.search_files import printable, scan, sides_of
from tools.search_report import write_gallery


@dataclass
class Config:
    # query
    image: str = ""  # a picture that is the query, or a part of it
    count: int = 10  # results shown
    html: str = ""  # also write them as a gallery to this file
    # index
    index: str = ""  # its folder; default: FOLDER/.plume
    every: float = 0.0  # clips are indexed whole and in windows of so many seconds; 0: whole
    # how
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    mode: str = "latent"  # latent; single: one pass; auto: for a checkpoint of train.py --adaptive
    batch_size: int = 16  # items embedded together; does not change the result
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


# ---------------------------------------------------------------------------------------------- the index


class Index:
    """Of a folder's files: `items`, a dict for each row of `vectors`, and `bad` ones with their reasons."""

    def __init__(self, folder, embedder, every):
        self.folder, self.embedder, self.every = folder, embedder, every
        self.own = os.path.join(folder, embedder.run_hash)
        self.items, self.bad, self.vectors = [], [], np.empty((0, embedder.width), np.float32)
        os.makedirs(self.own, exist_ok=True)
        if os.path.exists(self.file("items.jsonl")):
            head, *self.items = read_lines(self.file("items.jsonl"))
            self.bad = read_lines(self.file("bad.jsonl"))
            self.vectors = np.load(self.file(head["vectors"]), mmap_mode="r")

    def file(self, name):
        return os.path.join(self.own, name)

    def write(self):
        """items.jsonl, which names its vectors, comes last: what is read always belongs together."""
        name = f"vectors-{secrets.token_hex(4)}.npy"
        with writing(self.file(name), "wb") as f:
            np.save(f, self.vectors)
        write_lines(self.file("bad.jsonl"), self.bad)
        write_lines(self.file("items.jsonl"), [dict(vectors=name), *self.items])
        for old in glob.glob(glob.escape(self.own) + "/vectors-*.npy"):
            if os.path.basename(old) != name:
                with contextlib.suppress(OSError):  # another run is reading it
                    os.remove(old)

    def update(self, folder, files, area):
        """Makes the index that of these files (see `scan`) -> a line on what was done."""
        begun, before = time.perf_counter(), self.embedder.encoded
        same = self.as_they_were(files)
        gone = [item for item in self.items if item["path"] not in same]
        new = {path: about for path, about in files.items() if path not in same}
        if gone or new or any(item["path"] not in same for item in self.bad):
            self.renew(folder, same, new, area)
        hashes = {item["hash"] for item in self.items}
        gone = [item for item in gone if item["path"] not in files]
        moved = {item["path"] for item in gone if item["hash"] in hashes}
        deleted = {item["path"] for item in gone} - moved
        took, encoded = time.perf_counter() - begun, self.embedder.encoded - before
        return (f"{len(same):,} files as they were, {len(new):,} new or changed, {len(moved):,} moved, "
                f"{len(deleted):,} deleted; {encoded:,} items encoded, {len(self.items):,} in the index; "
                f"{took:.1f} s")

    def as_they_were(self, files):
        """-> the paths of files that need not be looked at again"""
        same = {}
        for item in (*self.items, *self.bad):
            path = item["path"]
            now = path in files and files[path] == tuple(item[name] for name in ("kind", "size", "time"))
            every = self.every if item["kind"] == "video" else 0
            same[path] = same.get(path, True) and now and item["every"] == every
        return {path for path, as_it_was in same.items() if as_it_was}

    def renew(self, folder, same, new, area):
        """Keeps the files `same` alone and adds those of `new`; when it is stopped, what is done by then."""
        kept = [row for row, item in enumerate(self.items) if item["path"] in same]
        items, vectors = [self.items[row] for row in kept], [self.vectors[kept]]
        bad, whole = [item for item in self.bad if item["path"] in same], Counter()
        try:
            for chunk in self.chunks(folder, new, area, bad, whole):
                known = self.embedder.known
                unknown = [side for key, _, side in chunk if key not in known]
                if unknown:
                    self.embedder(unknown, "")
                for key, item, _ in chunk:
                    if key in self.embedder.bad:
                        bad.append(dict(item, why=self.embedder.bad[key]))
                    else:
                        items.append(item)
                        vectors.append(known[key][None])
        finally:
            done = Counter(item["path"] for item in (*items, *bad))
            complete = same | {path for path, count in whole.items() if done[path] == count}
            rows = [row for row, item in enumerate(items) if item["path"] in complete]
            self.items, self.vectors = [items[row] for row in rows], np.concatenate(vectors)[rows]
            self.bad = [item for item in bad if item["path"] in complete]
            self.write()

    def chunks(self, folder, files, area, bad, whole):
        """Yields lists of (key, item, Side), a few batches each; what cannot be opened is added to `bad`.

        whole: how many items and bad ones each file has, as soon as it is known.
        """
        chunk, size = [], 4 * self.embedder.batch_size
        for path, about in tqdm(files.items(), "index", unit="file", disable=not files):
            about = dict(zip(("kind", "size", "time"), about))
            item, count = dict(path=path, **about, every=0), 0
            if about["kind"] == "video":
                item["every"] = self.every
            try:
                for part, side in sides_of(folder, path, about["kind"], self.every, area):
                    count += 1
                    key = self.embedder.weigh(side).key
                    chunk.append((key, dict(item, hash=key.hex(), **part), side))
                    if len(chunk) == size:
                        yield chunk
                        chunk = []
            except DataError as e:
                count += 1
                bad.append(dict(item, why=str(e)))
            whole[path] = count
        if chunk:
            yield chunk

    def search(self, vector, count):
        """-> the nearest items as (score, item), best first"""
        scores = self.vectors @ vector
        best = np.argpartition(-scores, min(count, len(scores)) - 1)[:count] if len(scores) else []
        return sorted(((float(scores[row]), self.items[row]) for row in best), key=lambda found: -found[0])


def read_lines(file):
    with open(file, "rb") as f:
        return [parse_json(line, f"{file}: line {n}") for n, line in enumerate(f, 1)]


def write_lines(file, values):
    with writing(file) as f:
        for value in values:
            f.write(json.dumps(value) + "\n")  # in ASCII: names may be bytes that are no text


# ------------------------------------------------------------------------------------------------ command


def name_of(item):
    """What an item is, for people."""
    if "page" in item:
        return f"{printable(item['path'])} page {item['page']}"
    if "start" in item:
        return f"{printable(item['path'])} {item['start']:g} - {item['end']:g} s"
    return printable(item["path"])


def check_flags(cfg, folder, given):
    """Raises DataError for what makes no sense."""
    if not os.path.isdir(folder):
        above, name = os.path.split(os.path.abspath(folder))
        beside = [entry.name for entry in os.scandir(above) if entry.is_dir()] if os.path.isdir(above) else []
        raise DataError(f"{quote(folder)}: no such folder.{closest(name, beside)}")
    if cfg.mode not in ("latent", "single", "auto"):
        raise DataError(f"--mode {cfg.mode!r}: needs latent, single or auto")
    if cfg.count < 1 or cfg.batch_size < 1 or not 0 <= cfg.every < math.inf:
        raise DataError(f"--count {cfg.count} and --batch_size {cfg.batch_size} must be at least 1, --every "
                        f"{cfg.every} at least 0 seconds")
    if not writable(cfg.html) or cfg.html and not given:
        raise DataError(f"--html {cfg.html!r}: needs a query, and a file in a folder that exists")


def summary(index, others, left_out):
    """What the folder holds that is not searched, and why, in lines."""
    lines = []
    if left_out:
        lines.append(f"{left_out} PDF files are left out: pip install pypdfium2, and start again")
    if others:
        kinds = ", ".join(f"{kind} {count}" for kind, count in others.most_common(8))
        lines.append(f"{sum(others.values())} others are no pictures, clips or pages: {kinds}")
    if index.bad:
        lines.append(f"{len(index.bad)} cannot be read, see {printable(index.file('bad.jsonl'))}; the first:")
        lines += [f"  {printable(item['why'])}" for item in index.bad[:3]]
    return lines


def main(argv):
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    cfg, _ = parse_flags(Config, argv[len(words) :], __doc__)
    if not 1 <= len(words) <= 2:
        raise DataError("needs a folder and perhaps a text in quotes, in front of all flags; got "
                        f"{quote(words)}")
    folder, text = words[0], words[1] if len(words) > 1 else None
    query = None
    if text is not None or cfg.image:
        query = parse_item({"text": text, "image": cfg.image or None}, where="the query")
    check_flags(cfg, folder, query)
    model = load_model(cfg.ckpt, cfg.device, cfg.dtype)
    steps = model.settings["latent_steps"] if cfg.mode == "latent" else None
    place = cfg.index or os.path.join(folder, ".plume")
    try:
        os.makedirs(place, exist_ok=True)
    except OSError as e:
        raise DataError(f"{place}: the index cannot be there: {reason(e)}; name a folder with --index") from e
    embedder = Embedder(
        model, cfg.mode, steps, cfg.batch_size, skip_bad=True, folder=os.path.join(place, "embeddings"))
    index = Index(place, embedder, cfg.every)
    files, others = scan(folder, place)
    left_out = 0
    if not importlib.util.find_spec("pypdfium2"):
        readable = {path: about for path, about in files.items() if about[0] != "pdf"}
        files, left_out = readable, len(files) - len(readable)
    try:
        print(index.update(folder, files, model.processor.limits.max_pixels))
    except KeyboardInterrupt:
        raise DataError(f"interrupted: {len(index.items)} items are in the index, the same command goes on "
                        "with the rest") from None
    for line in summary(index, others, left_out):
        print(line)
    if query is None:
        return
    vector = model.encode([query], cfg.mode, steps)[0]
    begun = time.perf_counter()
    found = index.search(vector, cfg.count)
    print(f"{len(found)} of {len(index.items):,} items, ranked in {time.perf_counter() - begun:.2f} s")
    for number, (score, item) in enumerate(found, 1):
        print(f"{number:4}  {score:6.3f}  {name_of(item)}")
    if cfg.html:
        named = [(score, name_of(item), item) for score, item in found]
        print(write_gallery(cfg.html, folder, query, named))


if __name__ == "__main__":
    command(main)
