"""The command python -m tools.convert: rows as others write them become records that train."""

import json

import pytest
from PIL import Image

from files.records import Pairs
from tests.processes import call
from tests.samples import picture


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def converted(data, out):
    """-> the parts and negatives of every record, as train.py reads them"""
    printed = call("tools.convert", "--data", data, "--out", out).stdout
    pairs = Pairs(str(out))
    assert f"{len(pairs)} pairs with " in printed
    assert pairs.names == [data.stem]
    return [[side.parts for side in pairs[i]] for i in range(len(pairs))]


@pytest.fixture
def pictures(tmp_path):
    """Two files, in another folder than the records will be."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for colour in ("red", "blue"):
        picture(colour, "bar").save(tmp_path / "in" / f"{colour}.png")
    return tmp_path


def file_of(folder, colour):
    return ("image", str(folder / "out" / ".." / "in" / f"{colour}.png"))


def test_triplets_in_json_lines(pictures):
    rows = [
        dict(anchor="a", positive="b", negative="c"),
        dict(anchor="a", positive="b", negative_1="c", negative_2=None, negative=["d", "e"]),
        dict(query="q", positive=dict(text="see", image="red.png")),
    ]
    found = converted(lines(pictures / "in" / "triplets.jsonl", rows), pictures / "out" / "p.jsonl")
    texts = [[part for ((_, part),) in record] for record in found[:2]]
    assert texts == [["a", "b", "c"], ["a", "b", "c", "d", "e"]]
    assert found[2] == [[("text", "q")], [file_of(pictures, "red"), ("text", "see")]]


def test_triplets_in_parquet_with_pictures_as_bytes(pictures):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    red, blue = ((pictures / "in" / f"{colour}.png").read_bytes() for colour in ("red", "blue"))
    rows = [
        dict(anchor=dict(bytes=red, path="x.png"), positive="red", negative_1="blue", negative_2=None),
        dict(anchor=dict(bytes=blue, path=None), positive="blue", negative_1="red", negative_2="black"),
        dict(anchor=dict(bytes=red, path=None), positive="red", negative_1=None, negative_2=None),
    ]
    data = pictures / "in" / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    found = converted(data, pictures / "out" / "p.jsonl")
    assert [len(record) for record in found] == [3, 4, 2]
    files = [record[0][0][1] for record in found]
    assert files[0] == files[2] != files[1]  # equal bytes, one file
    assert sorted(path.name for path in (pictures / "out").iterdir()) == ["p.jsonl", "p_media"]
    assert Image.open(files[1]).tobytes() == picture("blue", "bar").tobytes()


def user(text):
    return [dict(role="user", content=text)]


def test_messages_of_ms_swift(pictures):
    rows = [
        dict(messages=user("a"), positive_messages=[user("b")]),
        dict(messages=user("<image>what"), images=["red.png"], positive_messages=[user("b")],
             negative_messages=[user("c"), user("<image>")], negative_images=[[], ["blue.png"]]),
        dict(query="<image>what", response="b", rejected_response=["c", "<image>d"],
             images=["red.png", "blue.png"]),
    ]
    plain, hard, older = converted(lines(pictures / "in" / "m.jsonl", rows), pictures / "out" / "p.jsonl")
    assert plain == [[("text", "a")], [("text", "b")]]
    assert hard == [[file_of(pictures, "red"), ("text", "what")], [("text", "b")],
                    [("text", "c")], [file_of(pictures, "blue")]]
    assert older == [*hard[:3], [file_of(pictures, "blue"), ("text", "d")]]


def test_rows_of_vlm2vec(pictures):
    rows = [
        dict(qry="<|image_1|>\nwhat", qry_image_path="red.png", pos_text="b", pos_image_path="",
             neg_text="c", neg_image_path=""),
        dict(qry="find", qry_image_path="", pos_text="<|image_1|>\nsee", pos_image_path="red.png",
             neg_text=["", "e"], neg_image_path=["blue.png", None]),
        dict(qry="q", qry_image_path=None, pos_text="p", pos_image_path=None, neg_text="", neg_image_path=""),
    ]
    found = converted(lines(pictures / "in" / "v.jsonl", rows), pictures / "out" / "p.jsonl")
    red, blue = file_of(pictures, "red"), file_of(pictures, "blue")
    assert found[0] == [[red, ("text", "what")], [("text", "b")], [("text", "c")]]
    assert found[1] == [[("text", "find")], [red, ("text", "see")], [blue], [("text", "e")]]
    assert found[2] == [[("text", "q")], [("text", "p")]]


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
    (dict(query="a", response="b", images=["red.png"]), "1 images more than <image> markers"),
])
def test_a_row_that_is_not_right_is_named_and_nothing_is_written(pictures, row, why):
    data, out = pictures / "in" / "d.jsonl", pictures / "out" / "p"
    lines(data, [dict(anchor="a", positive="b"), row])
    assert why in call("tools.convert", "--data", data, "--out", out, check=False).stderr
    assert not list((pictures / "out").iterdir())
