"""Rows of a hub data set from its local copy: which files hold a subset and split, and what is in them."""

import csv
import fnmatch
import glob
import os
import re
from collections import Counter

import yaml
from huggingface_hub import metadata_load

from files.errors import closest, DataError, lfs_hint, quote, reason
from files.jsonl import parse_json, spans_of


class Row(dict):
    """A row of a data set that knows where it stands."""

    def __init__(self, row, where):
        super().__init__(row)
        self.where = where

    def __missing__(self, key):
        there = quote(list(self))
        raise DataError(f"{self.where}: no column {key!r}.{closest(key, self)} There are {there}.")

    def texts(self, key):
        """A column that must be a list of texts."""
        if not isinstance(self[key], list) or not all(isinstance(text, str) for text in self[key]):
            raise DataError(f"{self.where}: {key!r} must be a list of texts, got {quote(self[key])}")
        return self[key]


def rows_of(folder, subset, split, columns=None):
    """The Rows of the copy of a hub data set, one by one; of .parquet files only the columns asked for.

    Raises DataError naming file and row for what is not there or cannot be read.
    """
    files = row_files(folder, subset, split)
    if not files:
        of_subset = f"subset {subset!r}, " if subset else ""
        raise DataError(f"{folder}: no .parquet, .jsonl, .json or .tsv file of {of_subset}split {split!r}")
    for file in files:
        path = os.path.join(folder, file)
        if hint := lfs_hint(path):
            raise DataError(f"{path}: no rows are in it{hint}")
        read = {".parquet": read_parquet, ".tsv": read_tsv}.get(os.path.splitext(file)[1], read_json)
        for n, row in enumerate(read(path, columns), 1):
            yield Row(row, f"{path}: row {n}")


def read_parquet(path, columns=None):
    """Its rows as dicts, one by one; columns: those that are read, None: all."""
    try:
        import pyarrow.parquet  # only here: who has no such file does not need it
    except ImportError as e:
        raise DataError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from e
    try:
        # as bytes: of a name as text pyarrow takes UTF-8 alone
        with pyarrow.OSFile(os.fsencode(path)) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            wanted = [c for c in file.schema_arrow.names if not columns or c in columns]
            for batch in file.iter_batches(64, columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
        raise DataError(f"{path}: not a readable .parquet file: {reason(e)}{lfs_hint(path)}") from e


def read_tsv(path, columns):
    number = re.compile(r"0|-?[1-9]\d*")  # 007 is a name
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                yield {k: int(v) if number.fullmatch(v or "") else v for k, v in row.items()}
    except (csv.Error, ValueError, TypeError) as e:  # the last one: more cells than columns
        raise DataError(f"{path}: not a readable .tsv file: {reason(e)}") from e


def read_json(path, columns):
    with open(path, "rb") as file:
        for n, (_, _, text) in enumerate(spans_of(file, path), 1):
            row = parse_json(text, f"{path}: row {n}")
            if not isinstance(row, dict):
                raise DataError(f"{path}: row {n}: needs an object, got {type(row).__name__}")
            yield row


def row_files(folder, subset, split):
    """The files of one subset ("": the only one) and split ("": any) in the copy of a hub data set.

    -> their paths below folder, sorted: by the `configs` of its README.md, otherwise by their names.
    Raises DataError for a README.md that cannot be read and when not all parts of a file are there.
    """
    files = data_files(folder)
    right = files_by_readme(folder, files, subset, split) or files_by_name(files, subset, split)
    shards = Counter()
    for file in right:
        if m := re.fullmatch(r"(.*)-\d+-of-(\d+)(?:-\w+)?(\.\w+)", file):
            shards[m[1], int(m[2]), m[3]] += 1
    for (stem, count, suffix), there in shards.items():
        if there != count:
            whole = f"{os.path.join(folder, stem)}-...-of-{count:05d}{suffix}"
            raise DataError(f"{whole}: {there} of {count} files are there; get the others as well")
    return right


def data_files(folder):
    """The files of rows below a folder, sorted; what a download left in hidden folders is none."""
    names = glob.glob("**/*", root_dir=folder, recursive=True)
    suffixes = (".parquet", ".jsonl", ".json", ".tsv")
    return sorted(n for n in names if n.endswith(suffixes) and os.path.basename(n) != "dataset_infos.json")


def files_by_name(files, subset, split):
    """Those of a subset, which is a folder or how a name begins, and a split, which is a word of the path."""
    begins = re.compile(rf"{re.escape(subset)}(-\d|\.)")
    if subset:
        files = [f for f in files if subset in f.split(os.sep) or begins.match(os.path.basename(f))]
    if not split:
        return files
    wanted = {"val", "validation"} if split == "val" else {split}
    splits = re.compile(r"(?<![a-z])(train|test|val|validation|dev)(?![a-z])")
    named = {f: set(splits.findall(f.lower())) for f in files}
    right = [f for f in files if named[f] & wanted]
    if right or any(named.values()):
        return right
    return files  # no name says a split: there is only one


def files_by_readme(folder, files, subset, split):
    """Those that README.md's `configs` name for a subset and split; [] when it names none."""
    readme = os.path.join(folder, "README.md")
    if not os.path.isfile(readme):
        return []
    right = []
    try:
        configs = (metadata_load(readme) or {}).get("configs") or []
        for config in configs:
            named = config.get("config_name") == (subset or "default")
            if named or (len(configs) == 1 and not subset):
                right = files_of_config(config, split, files) or right
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise DataError(f"{readme}: its 'configs' cannot be read: {str(e).splitlines()[0]}") from e
    return right


def files_of_config(config, split, files):
    """Those that a config of a README.md names for a split; a folder stands for the files in it."""
    given, found = config.get("data_files") or [], set()
    for entry in given if isinstance(given, list) else [given]:
        if isinstance(entry, dict):
            if entry.get("split", split) != split:
                continue
            entry = entry["path"]
        for path in [entry] if isinstance(entry, str) else entry:
            for pattern in (path, os.path.join(path, "*")):
                found.update(fnmatch.filter(files, os.path.normpath(pattern)))
    return sorted(found)
