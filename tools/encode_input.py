"""What tools/encode.py reads, record by record: JSON lines, Parquet, a folder of pictures, clips and pages.

A source has
    digest()        hash of what it is, to know it again
    ids()           the ids of all records
    items(wanted, area)   yields (number of the record, id, Side), in place of a Side that cannot be had the
                    DataError that says why; of records, counted from 0, for which wanted(number)
No file is read whole, but for one JSON array of objects; of a folder the list of its files is in memory.
"""

import hashlib
import json
import os

import numpy as np

from engine.kept import as_bytes
from files.errors import closest, DataError, quote, reason
from files.items import hash_of, ITEM_KEYS, parse_item
from files.jsonl import parse_json, spans_of
from files.named import FileNameWarning
from tasks.beir import with_title
from tools.search import print_others
from tools.search_index import scan, sides_of

NOT_OF_THE_ITEM = ("_id", "title", "metadata", "candidates")  # keys of BEIR's files


def open_source(path, media, out):
    """media: folder of the media, "": the file's own; out: a folder that is no part of the source."""
    if os.path.isdir(path):
        if media:
            raise DataError(f"--media {media!r}: the files of a folder are the media themselves")
        return Folder(path, out)
    if not os.path.isfile(path):
        above, name = os.path.split(os.path.abspath(path))
        beside = os.listdir(above) if os.path.isdir(above) else []
        raise DataError(f"{quote(path)}: no such file or folder.{closest(name, beside)}")
    if media and not os.path.isdir(media):
        raise DataError(f"--media {media!r}: no such folder")
    kind = Parquet if path.lower().endswith(".parquet") else JsonLines
    return kind(path, media or os.path.dirname(os.path.abspath(path)))


def count_records(source):
    """-> how many there are.  DataError for an id that stands there twice.

    The ids are compared by hashes of 8 bytes, and only those that are equal by themselves.
    """
    hashes = np.fromiter((hash_of(as_bytes(name)) for name in source.ids()), np.int64)
    count = len(hashes)
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    first = {}
    for n, name in enumerate(source.ids() if twice else (), 1):
        if name in first:
            raise DataError(f"{source.path}: the id {quote(name)} stands in records {first[name]} and {n}; "
                            "a record without '_id' has its number")
        if hash_of(as_bytes(name)) in twice:
            first[name] = n
    return count


class Records:
    """Of a file that holds records: items as `Plume.encode` takes them, with "_id" or without.

    As in BEIR's files a title stands in front of the text.
    """

    def __init__(self, path, media):
        self.path, self.media, self.warning = path, media, FileNameWarning(media)

    def digest(self):
        h = hashlib.blake2b(digest_size=8)
        with open(self.path, "rb") as f:
            while chunk := f.read(1 << 20):
                h.update(chunk)
        return h.hexdigest()

    def ids(self):
        return (self.id_of(number, raw) for number, raw in self.records(lambda number: True, ids_only=True))

    def items(self, wanted, area):
        for number, raw in self.records(wanted):
            try:
                side = self.side(raw, f"{self.path}: record {number + 1}")
            except DataError as e:
                side = e
            yield number, self.id_of(number, raw), side

    def id_of(self, number, raw):
        name = raw.get("_id") if isinstance(raw, dict) else None
        return str(number + 1 if name is None else name)

    def side(self, raw, where):
        if isinstance(raw, DataError):
            raise raw
        if isinstance(raw, dict):
            item = {key: value for key, value in raw.items() if key not in NOT_OF_THE_ITEM}
            if raw.get("title"):
                item["text"] = with_title(raw, where)
            raw = item
        side = parse_item(raw, self.media, where)
        self.warning.look_at_side(side)
        return side


class JsonLines(Records):
    """A record a line; or one JSON array of records."""

    def records(self, wanted, ids_only=False):
        """-> (number, value), a DataError where a line is not JSON"""
        with open(self.path, "rb") as f:
            for number, (_, _, text) in enumerate(spans_of(f, self.path)):
                if wanted(number):
                    try:
                        yield number, parse_json(text, f"{self.path}: record {number + 1}")
                    except DataError as e:
                        yield number, e


class Parquet(Records):
    """A record a row, its keys are the columns; a picture may be {"bytes", "path"}."""

    def __init__(self, path, media):
        super().__init__(path, media)
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise DataError(f"{path}: needs pyarrow: pip install pyarrow") from e
        self.errors = pyarrow.ArrowException, OSError
        try:
            self.file = pyarrow.parquet.ParquetFile(path)
        except self.errors as e:
            raise DataError(f"{path}: cannot be used as a Parquet file: {reason(e)}") from e
        names = self.file.schema_arrow.names
        self.columns = [name for name in names if name in ("_id", "title", *ITEM_KEYS)]
        if not {"text", "image", "video"} & {*names}:
            raise DataError(f"{path}: none of its columns is text, image or video: {quote(names)}")
        if unused := [name for name in names if name not in self.columns]:
            print(f"{path}: columns that are not used: {', '.join(unused)}")

    def records(self, wanted, ids_only=False):
        """-> (number, dict); groups of rows in which none is wanted are not read"""
        columns = [name for name in self.columns if name == "_id" or not ids_only]
        end = 0
        for group in range(self.file.num_row_groups):
            begin, end = end, end + self.file.metadata.row_group(group).num_rows
            if any(map(wanted, range(begin, end))):
                for number, raw in enumerate(self.rows(group, columns), begin):
                    if wanted(number):
                        yield number, raw

    def rows(self, group, columns):
        try:
            for batch in self.file.iter_batches(64, [group], columns):
                yield from batch.to_pylist()
        except self.errors as e:
            raise DataError(f"{self.path}: cannot be read: {reason(e)}") from e


class Folder:
    """A record a file: a picture, a clip, or a PDF file, whose pages are an item each.  An id is a path."""

    def __init__(self, path, out):
        self.path = path
        found, others = scan(path, out, 0)
        print_others(others)
        self.files = list(found.items())

    def digest(self):
        h = hashlib.blake2b(digest_size=8)
        for path, about in self.files:
            changed = os.stat(os.path.join(self.path, path)).st_mtime_ns
            h.update(as_bytes(json.dumps([path, about["size"], changed])))
        return h.hexdigest()

    def ids(self):
        return (path for path, _ in self.files)

    def items(self, wanted, area):
        """area: pixels of a page"""
        for number, (path, about) in enumerate(self.files):
            if wanted(number):
                try:
                    for part, side in sides_of(self.path, path, about["kind"], 0, area):
                        yield number, f"{path} page {part['page']}" if part else path, side
                except DataError as e:
                    yield number, path, e
