"""Tables in the usual files -> their rows as dicts.

    .jsonl, .json     an object a line, or one array of objects; any other suffix, too
    .csv, .tsv        the first line has the names; an empty cell is a missing value; in tsv " is a character
                      as others, and a cell has neither tab nor line break
    .parquet, .arrow  (.feather, .ipc) with the package pyarrow
    a folder          what save_to_disk of the datasets library wrote, with pyarrow
"""

import csv
import os

from files.errors import DataError, lfs_hint, quote, reason
from files.jsonl import parse_json
from tasks.mmeb_rows import read_json, read_parquet

TAKES = "JSON lines, one JSON array, csv, tsv, parquet, arrow, or a folder that datasets' save_to_disk wrote"
LONGEST_CELL = 1 << 28  # characters; the csv module's own limit would refuse a picture as base64
ROWS = 64  # of an arrow file that are Python objects at a time


def rows_of(path):
    """-> yields (number from 1, row as a dict).  DataError names the file and what is wrong with it."""
    if os.path.isdir(path):
        yield from enumerate(read_saved(path), 1)
        return
    suffix = os.path.splitext(path)[1].lower()
    yield from enumerate(READERS.get(suffix, read_json_rows)(path), 1)


def read_json_rows(path):
    return read_json(path, None)


def read_csv(path):
    csv.field_size_limit(LONGEST_CELL)
    is_tsv = path.lower().endswith(".tsv")
    delimiter, quoting = ("\t", csv.QUOTE_NONE) if is_tsv else (",", csv.QUOTE_MINIMAL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            names = next(lines, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns have the same name: {quote(names)}")
            for cells in lines:
                if not cells:  # a blank line
                    continue
                if len(cells) != len(names):
                    raise DataError(f"{path}: line {lines.line_num}: {len(cells)} cells, the first line "
                                    f"names {len(names)} columns: {quote(names)}{lfs_hint(path)}")
                if is_tsv and any(map(is_quoted, cells)):
                    raise DataError(f"{path}: line {lines.line_num}: a cell in quotes as csv has them, "
                                    f"{quote(next(filter(is_quoted, cells)))}; in tsv a quote is a "
                                    "character: write the table as csv")
                yield {name: cell or None for name, cell in zip(names, cells)}
    except (csv.Error, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not readable as UTF-8 with {delimiter!r} between the cells of a line: "
                        f"{reason(e)}{lfs_hint(path)}") from e


def is_quoted(cell):
    """Whether a cell of a tsv is "..." with each quote in it doubled, as a writer of csv has it."""
    within = cell[1:-1]
    return (cell[:1] == cell[-1:] == '"' and '"' not in within.replace('""', "")
            and ('""' in within or cell == '""'))


def read_arrow(path):
    """Rows of a file in Arrow's file or stream format."""
    try:
        import pyarrow.ipc  # only here: who has no such file does not need it
    except ImportError as e:
        raise DataError(f"{path}: reading arrow files needs pyarrow: pip install pyarrow") from e
    try:
        # as bytes: of a name as text pyarrow takes UTF-8 alone
        with pyarrow.OSFile(os.fsencode(path)) as raw:
            in_file_format = raw.read(6) == b"ARROW1"
            raw.seek(0)
            if in_file_format:
                reader = pyarrow.ipc.open_file(raw)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = pyarrow.ipc.open_stream(raw)
            for batch in batches:
                batch.validate(full=True)
                for start in range(0, batch.num_rows, ROWS):
                    yield from batch.slice(start, ROWS).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
        raise DataError(f"{path}: not a readable arrow file: {reason(e)}{lfs_hint(path)}") from e


def read_settings(file):
    """The object in a JSON file of the datasets library."""
    with open(file, "rb") as f:
        value = parse_json(f.read(), file)
    if not isinstance(value, dict):
        raise DataError(f"{file}: needs an object, got {quote(value)}")
    return value


def read_saved(folder):
    """Rows of a folder that save_to_disk wrote: of the arrow files that its state.json names."""
    splits, state = (os.path.join(folder, name) for name in ("dataset_dict.json", "state.json"))
    if os.path.isfile(splits):
        names = read_settings(splits).get("splits", [])
        raise DataError(f"{folder}: has the splits {', '.join(names)}; convert one after the other: --data "
                        + os.path.join(folder, *names[:1]))
    if not os.path.isfile(state):
        raise DataError(f"{folder}: no state.json is in this folder: save_to_disk did not write it; --data "
                        f"takes {TAKES}")
    files = read_settings(state).get("_data_files") or []
    for file in files:
        yield from read_arrow(os.path.join(folder, os.path.basename(file["filename"])))


READERS = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet, ".arrow": read_arrow,
           ".feather": read_arrow, ".ipc": read_arrow}
