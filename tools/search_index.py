"""The index of tools/search.py: pictures, clips and their windows, pages of PDF files, and their vectors."""

import contextlib
import glob
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import secrets
import stat
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from engine.kept import short_hash
from engine.lock import lock_file
from files.clips import is_clip_file, read_headers, VIDEO_OPTIONS, VIDEO_SUFFIXES
from files.errors import DataError, readable
from files.items import parse_item
from files.jsonl import parse_json
from files.pages import pages
from files.pictures import DECODER_ERRORS, IMAGE_SUFFIXES
from files.writing import write_text, writing
from hub.folders import LOCK
from hub.prompts import with_prompt

KINDS = dict.fromkeys(VIDEO_SUFFIXES, "video") | dict.fromkeys(IMAGE_SUFFIXES, "image")
if importlib.util.find_spec("pypdfium2"):  # an extra of this tool
    KINDS[".pdf"] = "pdf"
PAGE = 2_000_000  # pixels of a page in the gallery
NAMES = dict(image="image", video="video", pdf="page")  # kinds of items, as users say them
# The files of an index, or of tools/encode.py's vectors, from their folder: all else there is somebody's own
OWN = re.compile(r"((modes|manifest)\.json|embeddings/[0-9a-f]{16}/\S+\.bin|part-\d{6,}\S*/\w+\.(npy|json)|"
                 r"[0-9a-f]{16}/((items|bad)\.jsonl|vectors-\w+\.npy))(\.\w+\.writing)?")


class Index:
    """Of a folder's files: `items`, a dict for each row of `vectors`, and `bad` ones with their reasons.

    template: the prompt that files get.
    """

    def __init__(self, folder, embedder, template="{}"):
        self.embedder, self.template = embedder, template
        # how files become items is this file's, and the PDF reader's
        reader = importlib.metadata.version("pypdfium2") if ".pdf" in KINDS else ""
        source = Path(__file__).read_text(encoding="utf-8")
        self.own = os.path.join(folder, short_hash(embedder.run_hash, source, reader, template))
        os.makedirs(self.own, exist_ok=True)
        self.read()

    def file(self, name):
        return os.path.join(self.own, name)

    def read(self):
        """What the last run wrote; nothing where that is not whole: then the index is made anew."""
        self.named, self.items, self.bad = "", [], []
        self.vectors = np.empty((0, self.embedder.width), np.float32)
        for _ in range(3):  # another run may just put a new one in its place
            with contextlib.suppress(FileNotFoundError, ValueError, LookupError, TypeError, EOFError):
                head, *lines = read_lines(self.file("items.jsonl"))
                vectors = np.load(self.file(head["vectors"]), mmap_mode="r")
                items = [item for item in lines if "why" not in item]
                if vectors.shape == (len(items), self.embedder.width):
                    self.named, self.items, self.vectors = head["vectors"], items, vectors
                    self.bad = [item for item in lines if "why" in item]
                    return

    def write(self, alone):
        """items.jsonl, which names its vectors, comes last: what is read always belongs together.

        alone: no other run is at work, so that what no list names is what a killed one left behind.
        """
        name = f"vectors-{secrets.token_hex(4)}.npy"
        with writing(self.file(name), "wb") as f:
            np.save(f, self.vectors)
        write_lines(self.file("bad.jsonl"), self.bad)  # for people
        write_lines(self.file("items.jsonl"), [dict(vectors=name), *self.items, *self.bad])
        old, self.named = [self.named], name
        if alone:
            old = [other for other in os.listdir(self.own) if other.startswith("vectors-") and other != name]
            old += glob.glob("*.jsonl.*.writing", root_dir=self.own)
        for other in filter(None, old):
            with contextlib.suppress(OSError):  # another run is reading it
                os.remove(self.file(other))

    @contextlib.contextmanager
    def locked(self):
        """One run at a time brings the index up to date -> whether that is certain; others wait for it."""
        try:
            file = open(self.file(LOCK), "a+")
        except OSError:  # nothing can be written there, and nothing need be when all is as it was
            yield False
            return
        with file:
            yield lock_file(file, self.own, say_who_is_waited_for)

    def update(self, folder, files, area):
        """Makes the index that of these files (see `scan`) -> a line on what was done."""
        with self.locked() as alone:
            self.read()
            return self.renew(folder, files, area, alone)

    def renew(self, folder, files, area, alone):
        """`update`, of what is read and locked."""
        begun, before = time.perf_counter(), self.embedder.encoded
        known = [item for item in (*self.items, *self.bad) if is_of(item, files)]
        gone = [item for item in self.items if item["path"] not in files]
        same = {item["path"] for item in known}
        new = {path: about for path, about in files.items() if path not in same}
        if new or len(known) < len(self.items) + len(self.bad):
            self.encode(folder, files, new, area, alone)
        hashes = {item["hash"] for item in self.items}
        moved = {item["path"] for item in gone if item["hash"] in hashes}
        deleted = {item["path"] for item in gone} - moved
        took, encoded = time.perf_counter() - begun, self.embedder.encoded - before
        return (f"{len(same):,} files as they were, {len(new):,} new or changed, {len(moved):,} moved, "
                f"{len(deleted):,} deleted; {encoded:,} items encoded, {len(self.items):,} in the index; "
                f"{took:.1f} s")

    def encode(self, folder, files, new, area, alone):
        """Keeps what is of the files and adds those of `new`; when it is stopped, what is done by then."""
        kept = [row for row, item in enumerate(self.items) if is_of(item, files)]
        items, vectors = [self.items[row] for row in kept], [self.vectors[kept]]
        bad, whole = [item for item in self.bad if is_of(item, files)], Counter()
        same = {item["path"] for item in (*items, *bad)}
        parts = self.parts(folder, new, area, bad, whole)
        try:
            while chunk := list(itertools.islice(parts, 4 * self.embedder.batch_size)):
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
            self.write(alone)

    def parts(self, folder, files, area, bad, whole):
        """Yields (key, item, Side) of everything in these files.

        Adds what cannot be opened to `bad`, and to `whole` how many items and bad ones each file has.
        """
        for path, about in tqdm(files.items(), "index", unit="file", disable=not files):
            item, count = dict(path=path, **about), 0
            try:
                for part, side in sides_of(folder, path, about["kind"], about["every"], area):
                    count += 1
                    if isinstance(side, DataError):
                        bad.append(dict(item, **part, why=str(side)))
                        continue
                    side = with_prompt(side, self.template)
                    key = self.embedder.weigh(side).key
                    yield key, dict(item, hash=key.hex(), **part), side
            except DataError as e:
                count += 1
                bad.append(dict(item, why=str(e)))
            whole[path] = count

    def only(self, kinds):
        """What is searched from now on is of these kinds of NAMES alone."""
        rows = [row for row, item in enumerate(self.items) if NAMES[item["kind"]] in kinds]
        self.items, self.vectors = [self.items[row] for row in rows], self.vectors[rows]

    def search(self, vector, count):
        """-> the nearest items as (score, item), best first"""
        scores = self.vectors @ vector
        return [(float(scores[row]), self.items[row]) for row in np.argsort(-scores)[:count]]


def is_of(item, files):
    """Whether an item of the index is of one of these files as it is now."""
    about = files.get(item["path"])
    return about is not None and about.items() <= item.items()


def say_who_is_waited_for(who):
    print(f"another run is at work on this index ({who}): waiting until it is done", flush=True)


def read_lines(file):
    with open(file, "rb") as f:
        return [parse_json(line, f"{file}: line {n}") for n, line in enumerate(f, 1)]


def write_lines(file, values):
    write_text(file, "".join(f"{json.dumps(value)}\n" for value in values))  # ASCII: names may be no text


def scan(folder, index, every):
    """-> {path of a picture, clip or PDF file: what its items say of it}, {what else there is: how often}

    index: its folder, or that of vectors, whose own files are no others.
    every: clips are in the index also in windows of so many seconds.
    Hidden files and folders are passed over, and so are links to folders, which may lead around in a circle.
    """
    files, others, index = {}, Counter(), os.path.realpath(index)

    def unreadable(error):
        others[f"unreadable folder {printable(error.filename)}"] += 1

    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        from_index = os.path.relpath(os.path.realpath(root), index)
        for name in sorted(name for name in names if not name.startswith(".")):
            path, suffix = os.path.join(root, name), os.path.splitext(name)[1].lower()
            if OWN.fullmatch(os.path.normpath(os.path.join(from_index, name))):
                continue
            if suffix not in KINDS:
                others[printable(suffix) or "without a suffix"] += 1
                continue
            about, kind = None, KINDS[suffix]
            with contextlib.suppress(OSError):  # a link that leads nowhere; what was deleted just now
                about = os.stat(path)
            if about is None or not stat.S_ISREG(about.st_mode):
                others["no file behind the name"] += 1
                continue
            if kind == "video" and not is_clip_file(path):
                others[printable(suffix)] += 1
                continue
            time = max(about.st_mtime_ns, about.st_ctime_ns)  # the second one tells other rights, too
            files[os.path.relpath(path, folder)] = dict(
                kind=kind, size=about.st_size, time=time, file=about.st_ino,  # of two folders in one index
                every=every if kind == "video" else 0)
    return files, others


def sides_of(folder, path, kind, every, area):
    """A file -> its items as (what of it, Side), or a DataError for a page that cannot be drawn.

    DataError where the file cannot be opened.  area: of a page.
    """
    file = os.path.join(folder, path)
    if kind == "pdf":
        for number, image in enumerate(pages(file, area), 1):
            where = f"{path} page {number}"
            if isinstance(image, DataError):
                yield dict(page=number), DataError(f"{where}: {image}")
            else:
                yield dict(page=number), parse_item({"image": image}, where=where)
        return
    yield {}, parse_item({kind: file}, where=path)
    if every and (length := seconds(file)) > every:
        for start in np.arange(0, length - 0.05, every).tolist():
            part = dict(start=start, end=start + every)
            yield part, parse_item({"video": file, **part}, where=path)


def seconds(file):
    """How long a clip is; 0 where that is not known."""
    try:
        with av.open(file, options=VIDEO_OPTIONS) as container:
            track = read_headers(container, container.streams.best("video"), file)
    except (*DECODER_ERRORS, AttributeError):  # the whole clip's own item says why; the last one: no track
        return 0
    return 0 if track.start is None else (track.end - track.times[0]) * track.unit


def media_of_item(folder, item):
    """An item of the index as `encode` takes it."""
    file = os.path.join(folder, item["path"])
    if item["kind"] == "pdf":
        page = next(pages(file, PAGE, item["page"]))
        if isinstance(page, DataError):
            raise page
        return {"image": page}
    return {item["kind"]: file} | {name: item[name] for name in ("start", "end") if name in item}


def printable(path):
    """A path as text, with escapes for what cannot be shown."""
    text = readable(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_of(item):
    """What an item is, for people."""
    name = printable(item["path"])
    if "page" in item:
        name += f" page {item['page']}"
    if "start" in item:
        name += f" {item['start']:g} - {item['end']:g} s"
    return name
