"""The command python -m tools.convert: rows as others write them become records that train."""

import os
import re

import pytest
from PIL import Image

from files.records import Pairs
from tests.processes import call
from tests.samples import ODD, odd_folder, picture, write_lines
from tests.test_checkpoints import LFS


def user(text):
    return [dict(role="user", content=text)]


ROWS = [  # and what each side of the record shows
    (dict(anchor="a", positive="b", negative="c"), ["a", "b", "c"]),
    (dict(anchor="a", positive="b", negative_1="c", negative_2=None, negative=["d", "e"]),
     ["a", "b", "c", "d", "e"]),
    (dict(query="q", positive=dict(text="see", image="red.png")), ["q", "<red.png>see"]),
    (dict(messages=user("a"), positive_messages=[user("b")]), ["a", "b"]),
    (dict(messages=user("<image>what"), images=["red.png"], positive_messages=[user("b")],
          negative_messages=[user("c"), user("<image>")], negative_images=[[], ["blue.png"]]),
     ["<red.png>what", "b", "c", "<blue.png>"]),
    (dict(query="<image>what", response="b", rejected_response=["c", "<image>d"],
          images=["red.png", "blue.png"]), ["<red.png>what", "b", "c", "<blue.png>d"]),
    (dict(qry="<|image_1|>\nwhat", qry_image_path="red.png", pos_text="b", pos_image_path="",
          neg_text="c", neg_image_path=""), ["<red.png>what", "b", "c"]),
    (dict(qry="find", qry_image_path="", pos_text="<|image_1|>\nsee", pos_image_path="red.png",
          neg_text=["", "e"], neg_image_path=["blue.png", None]),
     ["find", "<red.png>see", "<blue.png>", "e"]),
    (dict(qry="q", qry_image_path=None, pos_text="p", pos_image_path=None, neg_text="", neg_image_path=""),
     ["q", "p"])]


@pytest.fixture
def pictures(tmp_path):
    """Two files, in another folder than the records will be."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for colour in ("red", "blue"):
        picture(colour, "bar").save(tmp_path / "in" / f"{colour}.png")
    return tmp_path


def converted(data, out):
    """-> the parts of every side of every record, as train.py reads them"""
    printed, pairs = call("tools.convert", "--data", data, "--out", out).stdout, Pairs(str(out))
    assert f"{len(pairs)} pairs with " in printed and pairs.names == [data.stem]
    return [[side.parts for side in pairs[i]] for i in range(len(pairs))]


def test_triplets_messages_of_ms_swift_and_rows_of_vlm2vec(pictures):
    def shown(parts):
        names = {"text": str, "image": lambda path: f"<{os.path.relpath(path, pictures / 'in')}>"}
        return "".join(names[kind](value) for kind, value in parts)

    write_lines(pictures / "in" / "rows.jsonl", [row for row, _ in ROWS])
    records = converted(pictures / "in" / "rows.jsonl", pictures / "out" / "p.jsonl")
    assert [list(map(shown, record)) for record in records] == [sides for _, sides in ROWS]


def test_triplets_in_parquet_with_pictures_as_bytes(pictures):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    red, blue = ((pictures / "in" / f"{colour}.png").read_bytes() for colour in ("red", "blue"))
    rows = [
        dict(anchor=dict(bytes=red, path="x.png"), positive="red", negative_1="blue", negative_2=None),
        dict(anchor=dict(bytes=blue, path=None), positive="blue", negative_1="red", negative_2="black"),
        dict(anchor=dict(bytes=red, path=None), positive="red", negative_1=None, negative_2=None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), pictures / "in" / "t.parquet")
    found = converted(pictures / "in" / "t.parquet", pictures / "out" / "p.jsonl")
    assert [len(record) for record in found] == [3, 4, 2]
    files = [record[0][0][1] for record in found]
    assert files[0] == files[2] != files[1]  # equal bytes, one file
    assert sorted(path.name for path in (pictures / "out").iterdir()) == ["p.jsonl", "p_media"]
    assert Image.open(files[1]).tobytes() == picture("blue", "bar").tobytes()


@pytest.mark.parametrize("row, why", [
    (dict(a=1), "row 2: of no known kind"),
    (dict(anchor="a", positive="b", score=0.5), "row 2: unknown key 'score'"),
    (dict(anchor="a", positive=5), "row 2: needs a string, a picture or an item, got 5"),
    (dict(positive="a"), "row 2: not as --help describes it: KeyError: 'query'"),
    (dict(anchor="a", positive=dict(image="gone.png")), "gone.png' does not exist"),
    (dict(messages=user("a"), positive_messages=[]), "row 2: 0 positive_messages"),
    (dict(messages=[*user("a"), *user("b")], positive_messages=[user("c")]), "needs one message of the user"),
    (dict(messages=user("<image>"), positive_messages=[user("c")]), "1 <image> in '<image>', 0 images given"),
    (dict(messages=user("a"), positive_messages=[user("c")], negative_messages=[user("d")],
          negative_images=[[], []]), "1 negative_messages, 2 lists of images"),
    (dict(query="a", response="b", images=["red.png"]), "1 images more than <image> markers")])
def test_a_row_that_is_not_right_is_named_and_nothing_is_written(pictures, row, why):
    data, out = pictures / "in" / "d.jsonl", pictures / "out" / "p"
    write_lines(data, [dict(anchor="a", positive="b"), row])
    assert why in call("tools.convert", "--data", data, "--out", out, check=False).stderr
    assert not list((pictures / "out").iterdir())


def harmed(raw):
    """{what was done to a file: its bytes}, and what the error says"""
    second = raw.index(b"row 150")  # the first rows can be read
    return {
        "a pointer": (LFS.encode(), "Git LFS pointer.*git lfs pull"),
        "cut off": (raw[: len(raw) // 2], ""),
        "damaged": (raw[:second] + bytes(64) + raw[second + 64 :], ""),
        "its end damaged": (raw[:-60] + bytes(40) + raw[-20:], ""),
        "empty": (b"", ""),
    }


@pytest.mark.parametrize("harm", ["a pointer", "cut off", "damaged", "its end damaged", "empty"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".jsonl.gz"])
def test_a_file_that_cannot_be_read_is_named_and_not_the_one_that_is_written(tmp_path, suffix, harm):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data, out = tmp_path / f"in{suffix}", tmp_path / "out.jsonl"
    rows = pyarrow.Table.from_pylist([dict(anchor=f"row {n}", positive="b") for n in range(300)])
    parquet.write_table(rows, data, row_group_size=100, compression="none", use_dictionary=False)
    content, why = harmed(data.read_bytes())[harm]
    data.write_bytes(content)
    failed = call("tools.convert", "--data", data, "--out", out, check=False)
    assert re.search(f"^{re.escape(str(data))}.*{why}", failed.stderr) and "written" not in failed.stderr
    assert list(tmp_path.iterdir()) == [data]


def test_names_need_not_be_utf_8_and_a_file_without_rows_is_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = odd_folder(tmp_path)
    picture("red", "bar").save(tmp_path / "red.png")
    os.rename(tmp_path / "red.png", folder / ODD)
    write_lines(folder / "rows.jsonl", [dict(anchor=dict(image=ODD), positive="b")])
    ((image, _),) = converted(folder / "rows.jsonl", folder / f"{ODD}.jsonl")
    assert os.path.samefile(image[0][1], folder / ODD)
    rows = pyarrow.Table.from_pylist([dict(anchor="a", positive="b")])
    for table, name in ((rows, "one"), (rows.slice(0, 0), "none")):
        parquet.write_table(table, tmp_path / "rows")
        os.rename(tmp_path / "rows", folder / f"{name}.parquet")
    assert converted(folder / "one.parquet", tmp_path / "one.jsonl") == [[[("text", "a")], [("text", "b")]]]
    failed = call("tools.convert", "--data", folder / "none.parquet", "--out", tmp_path / "o", check=False)
    assert "none.parquet: no row is in it" in failed.stderr and not (tmp_path / "o").exists()
