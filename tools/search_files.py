"""What tools/search.py finds in a folder: pictures, clips and their windows, pages of PDF files."""

import contextlib
import math
import os
import stat
from collections import Counter

import av
import numpy as np

from files.clips import read_headers, VIDEO_OPTIONS, VIDEO_SUFFIXES
from files.errors import DataError, reason
from files.items import parse_item
from files.pictures import DECODER_ERRORS, IMAGE_SUFFIXES

KINDS = dict.fromkeys(VIDEO_SUFFIXES, "video") | dict.fromkeys(IMAGE_SUFFIXES, "image") | {".pdf": "pdf"}
PAGE = 2_000_000  # pixels of a page in the gallery


def scan(folder, index):
    """-> {path in the folder: (kind, size, time)} of pictures, clips and PDF files; {what else: how often}

    Hidden files and folders are passed over, and so are links to folders, which may lead around in a circle.
    """
    files, others, index = {}, Counter(), os.path.realpath(index)

    def unreadable(error):
        others[f"unreadable folder {printable(error.filename)}"] += 1

    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and os.path.realpath(os.path.join(root, name)) != index)
        for name in sorted(names):
            path, suffix = os.path.join(root, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix not in KINDS:
                others[printable(suffix) or "without a suffix"] += 1
                continue
            about = None
            with contextlib.suppress(OSError):  # a link that leads nowhere; what was deleted just now
                about = os.stat(path)
            if about is None or not stat.S_ISREG(about.st_mode):
                others["no file behind the name"] += 1
                continue
            time = max(about.st_mtime_ns, about.st_ctime_ns)  # the second one tells other rights, too
            files[os.path.relpath(path, folder)] = KINDS[suffix], about.st_size, time
    return files, others


def sides_of(folder, path, kind, every, area):
    """A file -> its items as (what of it: a dict, Side); DataError where it cannot be opened.

    every: clips also in windows of so many seconds; area: pixels of a page.
    """
    file = os.path.join(folder, path)
    if kind == "pdf":
        for number, image in enumerate(pages(file, area), 1):
            yield dict(page=number), parse_item({"image": image}, where=f"{path}: page {number}")
        return
    yield {}, parse_item({kind: file}, where=path)
    if kind == "video" and every:
        length = seconds(file)
        if length > every:
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


def pages(file, area, first=1):
    """The pages of a PDF file as pictures of about `area` pixels, each drawn when it is asked for."""
    import pypdfium2

    try:
        with contextlib.closing(pypdfium2.PdfDocument(file)) as document:
            for number in range(first - 1, len(document)):
                page = document[number]
                width, height = page.get_size()  # in points; a scale of 4 is 288 dots an inch
                yield page.render(scale=min(4, math.sqrt(area / max(1, width * height)))).to_pil()
    except (pypdfium2.PdfiumError, *DECODER_ERRORS) as e:
        raise DataError(f"{file}: cannot be used as a PDF file: {reason(e)}") from e


def media_of_item(folder, item):
    """An item of the index as `encode` takes it."""
    file = os.path.join(folder, item["path"])
    if item["kind"] == "pdf":
        return {"image": next(pages(file, PAGE, item["page"]))}
    return {item["kind"]: file} | {name: item[name] for name in ("start", "end") if name in item}


def printable(path):
    """A path as text, with escapes for what cannot be shown."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
