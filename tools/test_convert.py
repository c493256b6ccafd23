"""The command python -m tools.convert: rows as others write them become records that train."""

import os

import pytest
from PIL import Image

from files.records import Pairs
from tests.processes import call
from tests.samples import picture, write_lines


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
