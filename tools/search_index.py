"""The index of tools/search.py: pictures, clips and their windows, pages of PDF files, and their vectors."""

import contextlib
import glob
import importlib.util
import itertools
import json
import os
import secrets
import stat
import time
from collections import Counter

import av
import numpy as np
from tqdm import tqdm

from files.clips import is_clip_file, read_headers, VIDEO_OPTIONS, VIDEO_SUFFIXES
from files.errors import DataError
from files.items import parse_item
from files.jsonl import parse_json
from files.pages import pages
from files.pictures import DECODER_ERRORS, IMAGE_SUFFIXES
from files.writing import write_text, writing

KINDS = dict.fromkeys(VIDEO_SUFFIXES, "video") | dict.fromkeys(IMAGE_SUFFIXES, "image")
if importlib.util.find_spec("pypdfium2"):  # an extra of this tool
    KINDS[".pdf"] = "pdf"
PAGE = 2_000_000  # pixels of a page in the gallery


class Index:
    """Of a folder's files: `items`, a dict for each row of `vectors`, and `bad` ones with their reasons."""

    def __init__(self, folder, embedder):
        self.embedder = embedder
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
        known, gone = (*self.items, *self.bad), [item for item in self.items if item["path"] not in files]
        same = {item["path"] for item in known
                if (about := files.get(item["path"])) and about.items() <= item.items()}
        new = {path: about for path, about in files.items() if path not in same}
        if new or any(item["path"] not in same for item in known):
            self.renew(folder, same, new, area)
        hashes = {item["hash"] for item in self.items}
        moved = {item["path"] for item in gone if item["hash"] in hashes}
        deleted = {item["path"] for item in gone} - moved
        took, encoded = time.perf_counter() - begun, self.embedder.encoded - before
        return (f"{len(same):,} files as they were, {len(new):,} new or changed, {len(moved):,} moved, "
                f"{len(deleted):,} deleted; {encoded:,} items encoded, {len(self.items):,} in the index; "
                f"{took:.1f} s")

    def renew(self, folder, same, new, area):
        """Keeps the files `same` alone and adds those of `new`; when it is stopped, what is done by then."""
        kept = [row for row, item in enumerate(self.items) if item["path"] in same]
        items, vectors = [self.items[row] for row in kept], [self.vectors[kept]]
        bad, whole = [item for item in self.bad if item["path"] in same], Counter()
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
            self.write()

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
                    key = self.embedder.weigh(side).key
                    yield key, dict(item, hash=key.hex(), **part), side
            except DataError as e:
                count += 1
                bad.append(dict(item, why=str(e)))
            whole[path] = count

    def search(self, vector, count):
        """-> the nearest items as (score, item), best first"""
        scores = self.vectors @ vector
        return [(float(scores[row]), self.items[row]) for row in np.argsort(-scores)[:count]]


def read_lines(file):
    with open(file, "rb") as f:
        return [parse_json(line, f"{file}: line {n}") for n, line in enumerate(f, 1)]


def write_lines(file, values):
    write_text(file, "".join(f"{json.dumps(value)}\n" for value in values))  # ASCII: names may be no text


def scan(folder, index, every):
    """-> {path of a picture, clip or PDF file: what its items say of it}, {what else there is: how often}

    every: clips are in the index also in windows of so many seconds.
    Hidden files and folders are passed over, and so are links to folders, which may lead around in a circle.
    """
    files, others, index = {}, Counter(), os.path.realpath(index)

    def unreadable(error):
        others[f"unreadable folder {printable(error.filename)}"] += 1

    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and os.path.realpath(os.path.join(root, name)) != index)
        for name in sorted(name for name in names if not name.startswith(".")):
            path, suffix = os.path.join(root, name), os.path.splitext(name)[1].lower()
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
                kind=kind, size=about.st_size, time=time, every=every if kind == "video" else 0)
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
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_of(item):
    """What an item is, for people."""
    name = printable(item["path"])
    if "page" in item:
        name += f" page {item['page']}"
    if "start" in item:
        name += f" {item['start']:g} - {item['end']:g} s"
    return name
