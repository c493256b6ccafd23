"""The command python -m tools.convert: rows as others write them become records that train."""

import base64
import os
import re

import pytest
from PIL import Image

from files.records import Pairs
from tests.processes import call
from tests.samples import ODD, odd_folder, picture, write_clip, write_lines
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


def converted(data, out, *flags):
    """-> the parts of every side of every record, as train.py reads them"""
    printed, pairs = call("tools.convert", "--data", data, "--out", out, *flags).stdout, Pairs(str(out))
    assert f"{len(pairs)} pairs with " in printed and pairs.names == [data.stem]
    return [[side.parts for side in pairs[i]] for i in range(len(pairs))]


def shown(records, folder):
    """Each side as a text, with <path relative to the folder> for a medium"""
    def of_parts(parts):
        return "".join(value if kind == "text" else f"<{os.path.relpath(value, folder)}>"
                       for kind, value in parts)

    return [list(map(of_parts, record)) for record in records]


def records_of(pictures, rows, *flags):
    """Rows in JSON lines beside the pictures -> their records, as `shown`"""
    write_lines(pictures / "in" / "rows.jsonl", rows)
    found = converted(pictures / "in" / "rows.jsonl", pictures / "out" / "p.jsonl", *flags)
    return shown(found, pictures / "in")


def test_triplets_messages_of_ms_swift_and_rows_of_vlm2vec(pictures):
    assert records_of(pictures, [row for row, _ in ROWS]) == [sides for _, sides in ROWS]


def test_a_column_whose_strings_all_name_media_is_media_unless_it_is_called_text(pictures):
    write_clip(pictures / "in" / "red.mp4", [picture("red", "bar")] * 3)
    picture("red", "bar").save(pictures / "in" / "suffixless", "png")
    rows = [dict(anchor="a", positive="red.png", negative=["red.mp4", "suffixless"]),
            dict(anchor="see red.png", positive=dict(text="b"), negative=str(pictures / "in" / "blue.png"))]
    expected = [["a", "<red.png>", "<red.mp4>", "<suffixless>"], ["see red.png", "b", "<blue.png>"]]
    assert records_of(pictures, rows) == expected
    texts = records_of(pictures, rows, "--text", "positive")
    assert texts == [["a", "red.png", *expected[0][2:]], expected[1]]
    write_lines(pictures / "in" / "gone.jsonl", [dict(anchor="a", positive=f"gone/{n}.jpg") for n in "ab"])
    gone = pictures / "in" / "gone.jsonl", pictures / "out" / "gone.jsonl"
    failed = call("tools.convert", "--data", gone[0], "--out", gone[1], check=False).stderr
    assert re.search("column 'positive': all its strings are names of pictures.* row 1's 'gone/a", failed)
    assert not gone[1].exists()
    assert converted(*gone, "--text", "positive")[1][1] == [("text", "gone/b.jpg")]


def test_several_columns_are_one_side_and_several_positives_a_pair_each(pictures):
    rows = [
        dict(query="q", query_image="red.png", pos=["a", "b"], neg=["c"]),
        dict(anchor_text="t", anchor_image=["red.png", "blue.png"], positive="a", positive_1=dict(text="b"))]
    assert records_of(pictures, rows) == [
        ["<red.png>q", "a", "c"], ["<red.png>q", "b", "c"],
        ["<red.png><blue.png>t", "a"], ["<red.png><blue.png>t", "b"]]
    flags = ("--columns", "anchor=picture+question,positive=title+body", "--drop", "id")
    rows = [dict(id=1, picture="red.png", question="what", title="A", body="b"),
            dict(id=2, picture="blue.png", question="<image>?", title="C", body=None)]
    assert records_of(pictures, rows, *flags) == [["<red.png>what", "A\nb"], ["<blue.png>?", "C"]]
    for flags, why in (
            (("--columns", "anchor=picture,positive=titel", "--drop", "id"), "'question' is in no side"),
            (("--columns", "anchor=picture"), "needs both anchor=... and positive=..."),
            (("--columns", "query=picture,positive=title"), "needs anchor, positive, negative"),
            (("--drop", "id,questoin"), "no anchor: no such column"),
            (("--columns", "anchor=picture,positive=title,negative=boddy", "--drop", "id,question,body"),
             "--columns boddy: no row of .*Did you mean 'body'")):
        failed = call("tools.convert", "--data", pictures / "in" / "rows.jsonl", "--out",
                      pictures / "out" / "q", *flags, check=False).stderr
        assert re.search(why, failed), failed


def test_a_system_turn_is_kept_in_front_of_the_text_or_dropped(pictures):
    system = [dict(role="system", content="Find it.")]
    rows = [dict(messages=[*system, *user("<image>what")], images=["red.png"],
                 positive_messages=[[*system, *user("a")], user("b")])]
    kept = [["<red.png>Find it.\nwhat", "Find it.\na"], ["<red.png>Find it.\nwhat", "b"]]
    assert records_of(pictures, rows, "--system", "keep") == kept
    dropped = [["<red.png>what", "a"], ["<red.png>what", "b"]]
    assert records_of(pictures, rows, "--system", "drop") == dropped


def data_uri(path, kind):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_data_uris_and_bytes_of_pictures_and_clips_become_files(pictures):
    red, mp4 = pictures / "in" / "red.png", pictures / "in" / "red.mp4"
    write_clip(mp4, [picture("red", "bar")] * 3)
    image, video = data_uri(red, "image/png"), data_uri(mp4, "video/mp4")
    rows = [dict(anchor=image, positive=video), dict(anchor=image, positive=dict(video=video, text="b"))]
    write_lines(pictures / "in" / "rows.jsonl", rows)
    found = converted(pictures / "in" / "rows.jsonl", pictures / "out" / "p.jsonl")
    ((kind, image), _), ((clip_kind, video), _) = found[0]
    assert (kind, clip_kind) == ("image", "video") and found[1][1] == [("video", video), ("text", "b")]
    assert red.read_bytes() == open(image, "rb").read() and mp4.read_bytes() == open(video, "rb").read()
    assert len(os.listdir(pictures / "out" / "p_media")) == 2  # each once


def test_a_folder_of_media_that_is_not_there_and_a_system_flag_that_is_not_known_are_refused(pictures):
    write_lines(pictures / "in" / "rows.jsonl", [dict(anchor="red.png", positive="b")])
    moved = pictures / "out" / "rows.jsonl"
    os.rename(pictures / "in" / "rows.jsonl", moved)
    given = moved, pictures / "out" / "p.jsonl"
    found = converted(*given, "--media", pictures / "in")
    assert shown(found, pictures / "in") == [["<red.png>", "b"]]
    for flags, why in ((("--media", pictures / "gone"), "gone': no such folder"),
                       (("--system", "yes"), "--system 'yes': needs keep or drop")):
        failed = call("tools.convert", "--data", given[0], "--out", given[1], *flags, check=False)
        assert why in failed.stderr


def written_by(kind, rows, path):
    """Rows in a file, or folder, of this kind -> its path"""
    pyarrow = pytest.importorskip("pyarrow")
    table, file = pyarrow.Table.from_pylist(rows), path / f"t.{kind}"
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, file)
    elif kind == "feather":
        pytest.importorskip("pyarrow.feather").write_feather(table, str(file))
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    else:
        datasets = pytest.importorskip("datasets")
        saved = datasets.Dataset.from_list(rows)
        saved.save_to_disk(path / "saved" / "train", num_shards=min(2, len(rows)))
        return path / "saved" / "train"
    return file


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow", "save_to_disk"])
def test_tables_with_pictures_as_bytes(pictures, kind):
    red, blue = ((pictures / "in" / f"{colour}.png").read_bytes() for colour in ("red", "blue"))
    rows = [dict(anchor="a", positive=red, negative=dict(bytes=blue, path=None)),
            dict(anchor="b", positive=blue, negative=None), dict(anchor="c", positive=red, negative=None)]
    found = converted(written_by(kind, rows, pictures / "in"), pictures / "out" / "p.jsonl")
    assert [record[0] for record in found] == [[("text", name)] for name in "abc"]
    contents = [[open(side[0][1], "rb").read() for side in record[1:]] for record in found]
    assert contents == [[red, blue], [blue], [red]]


def test_a_saved_folder_of_splits_names_them_and_another_folder_what_is_taken(pictures):
    rows = [dict(anchor="a", positive="b")]
    saved = written_by("save_to_disk", rows, pictures).parent
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for folder, why in ((saved, f"has the splits train, test; .*--data {saved}/train"),
                        (pictures / "in", "no state.json is in this folder")):
        failed = call("tools.convert", "--data", folder, "--out", pictures / "o", check=False).stderr
        assert re.search(why, failed)


def test_csv_and_tsv_with_quotes_empty_cells_and_paths(pictures):
    csv, tsv, out = pictures / "in" / "t.csv", pictures / "in" / "t.tsv", pictures / "out" / "p.jsonl"
    lines = ("\ufeffanchor,positive,negative", '"a, ""b""\nc",red.png,', "", "007,blue.png,é", "")
    csv.write_text("\r\n".join(lines), "utf-8")
    expected = [['a, "b"\nc', "<red.png>"], ["007", "<blue.png>", "é"]]
    assert shown(converted(csv, out), pictures / "in") == expected
    tsv.write_text("query\tpos\nx, y\tz\n")
    assert shown(converted(tsv, out), "") == [["x, y", "z"]]
    for text, why in (("anchor,positive\na\n", "line 2: 1 cells, the first line names 2 columns"),
                      ("anchor,positive\na,b,c\n", "line 2: 3 cells"), ("a,a\n1,2\n", "the same name"),
                      ("anchor;positive\na;b\n", "There are anchor;positive"), ("", "no row is in it"),
                      ('anchor,positive\n"a,b\n', "not readable as UTF-8"),
                      ("anchor,positive\n,b\n", "row 1: no anchor")):
        csv.write_text(text)
        failed = call("tools.convert", "--data", csv, "--out", out, check=False).stderr
        assert why in failed, failed
    csv.write_bytes(b"anchor,positive\n\xff,b\n")
    assert "not readable as UTF-8" in call("tools.convert", "--data", csv, "--out", out, check=False).stderr


def test_in_tsv_a_quote_is_a_character_and_what_csv_has_quoted_is_refused(pictures):
    tsv, out = pictures / "in" / "t.tsv", pictures / "out" / "p.jsonl"
    tsv.write_text('anchor\tpositive\n"Hello world\tb\nfoo"\t5" wide\n"Hi" he said\t"x"\n')
    expected = [['"Hello world', "b"], ['foo"', '5" wide'], ['"Hi" he said', '"x"']]
    assert shown(converted(tsv, out), "") == expected
    for cells, why in (('"a\tb"\tc', "line 3: 3 cells"), ('"a\nb"\tc', "line 3: 1 cells"),
                       ('a\t"say ""hi"""', "line 3: a cell in quotes as csv .*write the table as csv"),
                       ('""\tb', "line 3: a cell in quotes")):
        tsv.write_text(f"anchor\tpositive\na\tb\n{cells}\n")
        failed = call("tools.convert", "--data", tsv, "--out", out, check=False).stderr
        assert re.search(why, failed), failed


def test_names_with_blanks_around_them_are_files_and_such_a_name_is_taken_as_it_is_first(pictures):
    picture("red", "bar").save(pictures / "in" / " odd.png")
    rows = [dict(anchor="a", positive=name) for name in ("red.png ", " ./blue.png\n", " odd.png")]
    assert [record[1] for record in records_of(pictures, rows)] == ["<red.png>", "<blue.png>", "< odd.png>"]
    write_lines(pictures / "in" / "blank.jsonl", [dict(anchor="a", positive=dict(video=" "))])
    failed = call("tools.convert", "--data", pictures / "in" / "blank.jsonl", "--out", pictures / "out" / "b",
                  check=False).stderr
    assert "a medium needs a path or bytes, got ' '" in failed


def test_texts_that_look_like_names_of_media_are_counted(pictures):
    rows = [dict(anchor=f"{n}", positive=text, negative="b")
            for n, text in enumerate(["a cat", "images/x.png", "see y.MP4 ", "two\nlines.png", "A.PNG."])]
    write_lines(pictures / "in" / "rows.jsonl", rows)
    given = "tools.convert", "--data", pictures / "in" / "rows.jsonl", "--out", pictures / "out" / "p.jsonl"
    told = "column 'positive': 2 strings look like names of pictures or clips and are none: taken as text\n"
    assert call(*given).stdout.startswith(told)
    assert "look like" not in call(*given, "--text", "positive").stdout


MARKED = [  # a row whose texts have markers without media, and the columns that --text takes
    (dict(anchor="<image> what", positive="p"), "anchor"),
    (dict(anchor="q", positive=dict(text="<|image_1|> p")), "positive"),
    (dict(anchor_text="see <video>", anchor_image="red.png", positive="p"), "anchor_text"),
    (dict(qry="<|image_1|>\nwhat", qry_image_path="", pos_text="p", pos_image_path=""), "messages"),
    (dict(qry="q", qry_image_path="", pos_text=["<image>", "b"], pos_image_path=["", "red.png"]), "messages"),
    (dict(query="q", response="see <video>"), "messages"),
    (dict(messages=user("q"), positive_messages=[user("<image>")]), "messages")]


@pytest.mark.parametrize("row, columns", MARKED)
def test_a_marker_without_its_medium_is_refused_unless_it_is_called_text(pictures, row, columns):
    data, out = pictures / "in" / "d.jsonl", pictures / "out" / "p.jsonl"
    write_lines(data, [row])
    failed = call("tools.convert", "--data", data, "--out", out, check=False).stderr
    assert re.search(r"row 1: .*<\|?(image|video)", failed) and not out.exists(), failed
    found = shown(converted(data, out, "--text", columns), pictures / "in")
    assert re.search("<(image|video)>|<.image_1.>", "".join(found[0]))


ADDRESSES = ("http://example.org/my picture.png", " https://example.org/a ", "//cdn.example.org/b.png",
             "www.example.org/b", "www.example.org/my b", "s3://bucket/a", "//host/a b")
NO_ADDRESSES = ("// a comment", "//comment of a program", "see http://example.org/a", "http: what is it?",
                "http://example.org/a\nis an address", "Data: 3 apples, 4 pears", "iVBORw0KGgo begins a PNG")


def test_a_line_that_is_an_address_is_no_text_and_a_line_with_one_in_it_is(pictures):
    data, out = pictures / "in" / "d.jsonl", pictures / "out" / "p.jsonl"
    rows = [dict(anchor="a", positive=text) for text in NO_ADDRESSES]
    assert [record[1] for record in records_of(pictures, rows)] == list(NO_ADDRESSES)
    for column in ("positive", "positive_image"):
        for address in ADDRESSES:
            write_lines(data, [{"anchor": "a", column: address}])
            failed = call("tools.convert", "--data", data, "--out", out, check=False).stderr
            assert "no address is opened" in failed, address
    os.rename(pictures / "in" / "red.png", pictures / "in" / "www.red.png")
    assert records_of(pictures, [dict(anchor="a", positive="www.red.png")]) == [["a", "<www.red.png>"]]


def test_the_media_of_a_side_of_conversations_are_found_from_the_records(pictures):
    turns = [{"from": "human", "value": "<image> x"}]
    write_clip(pictures / "in" / "red.mp4", [picture("red", "bar")] * 3)
    clip = dict(conversations=[{"from": "human", "value": "<video>y"}], videos=["red.mp4"])
    rows = [dict(anchor=dict(conversations=turns, images=["red.png"]), positive=clip),
            dict(anchor=dict(conversations=turns, image="blue.png"), positive="p")]
    assert records_of(pictures, rows) == [["<red.png> x", "<red.mp4>y"], ["<blue.png> x", "p"]]


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
    (dict(a=1), "row 2: no anchor: no such column, or it is empty. There are a; --columns"),
    (dict(anchor="a", positive="b", score=0.5), "row 2: unknown column 'score': --drop score leaves it out"),
    (dict(anchor="a", positive=5), "row 2: column 'positive': needs a string, a picture or an item"),
    (dict(positive="a"), "row 2: no anchor: no such column, or it is empty. There are positive"),
    (dict(anchor="a", positive=None), "row 2: no positive"),
    (dict(anchor="a", positive=[]), "row 2: no positive"),
    (dict(anchor=["a", "b"], positive="c"), "row 2: 2 anchors; a record has one"),
    (dict(anchor="a", query="b", positive="c"), "row 2: both 'anchor' and 'query' are columns"),
    (dict(anchor="https://example.org/a.png", positive="c"), "row 2: column 'anchor': 'https://example.org"),
    (dict(anchor="a", positive=dict(image="http://example.org/a")), "row 2: 'http://example.org/a': no addr"),
    (dict(anchor="a", positive=dict(text="red.png")), "row 2: 'red.png' is a picture or clip, and stands"),
    (dict(anchor="a", positive="/9j/" + "4AAQ" * 99), "row 2: column 'positive': '/9j/4AAQ"),
    (dict(anchor="a", positive="data:image/png;base64,!!"), "row 2: column 'positive'"),
    (dict(anchor="a", positive="red.png"), "row 2: column 'positive': 'red.png' is a picture or clip, 'b' in "
                                           "row 1 is none"),
    (dict(query="a", response="red.png"), "row 2: 'red.png' is a picture or clip, and stands where text"),
    (dict(messages=[dict(role="system", content="Find it."), *user("a")], positive_messages=[user("b")]),
     "row 2: a system turn, 'Find it.': the checkpoint's template has one system text for all items"),
    (dict(anchor="a", positive=dict(image="gone.png")), "gone.png' does not exist"),
    (dict(messages=user("a"), positive_messages=[]), "row 2: no positive_messages"),
    (dict(messages=[*user("a"), *user("b")], positive_messages=[user("c")]), "needs one message of the user"),
    (dict(messages=user("<image>"), positive_messages=[user("c")]), "1 <image> in '<image>', 0 images given"),
    (dict(messages=user("a"), positive_messages=[user("c")], negative_messages=[user("d")],
          negative_images=[[], []]), "1 negative_messages, 2 lists of images"),
    (dict(query="a", response="b", images=["red.png"]), "1 images more than <image> markers"),
    (dict(anchor="a", positive="data:image/svg+xml;utf8,<svg/>"), "column 'positive': 'data:image/svg"),
    (dict(anchor="a", positive=dict(image="data:image/svg+xml;utf8,<svg/>")), "needs data:image/png;base64"),
    (dict(anchor="a", positive="iVBORw0KGgo" + "A" * 81), "row 2: column 'positive': 'iVBORw0KGgoAAAA"),
    (dict(anchor="a", positive="/9j/4AAQSkZJRgABAQAAAQABAAD/2wBD"), "/2wBD'...: a picture in base64"),
    (dict(anchor="a", positive="b", negative=["c", None, ""]), "row 2: column 'negative': an empty text"),
    (dict(anchor=" ", positive="b"), "row 2: column 'anchor': an empty text"),
    (dict(query="a", response="b", rejected_response=["c", ""]), "row 2: an empty text, and no picture"),
    (dict(qry="", qry_image_path="", pos_text="b", pos_image_path=""), "an empty text, and no picture or"),
    (dict(qry="a", pos_text="b", neg_text=["c", ""]), "row 2: 1 of 2 items have neither text nor path"),
    (dict(qry="a", pos="b"), "row 2: 'qry' and 'pos': these are training records already; train.py --data"),
    (dict(anchor=dict(conversations=[]), anchor_image="red.png", positive="b"),
     "row 2: column 'anchor': what has conversations is an item of its own"),
    (dict(messages=[dict(role="user", content=[dict(type="text", text="a")])], positive_messages=[user("b")]),
     "row 2: 'content' [{'type': 'text', 'text': 'a'}]: needs a string with <image>")])
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


HARMS = ("a pointer", "cut off", "damaged", "its end damaged", "empty")
SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".jsonl.gz")
HARMED = [(suffix, harm) for suffix in SUFFIXES for harm in HARMS]
HARMED.remove((".arrow", "damaged"))  # the format has no checksum: zeros in a text are a text


@pytest.mark.parametrize("suffix, harm", HARMED)
def test_a_file_that_cannot_be_read_is_named_and_not_the_one_that_is_written(tmp_path, suffix, harm):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data, out = tmp_path / f"in{suffix}", tmp_path / "out.jsonl"
    rows = pyarrow.Table.from_pylist([dict(anchor=f"row {n}", positive="b") for n in range(300)])
    if suffix == ".arrow":
        with pyarrow.ipc.new_file(str(data), rows.schema) as file:
            file.write_table(rows, max_chunksize=100)
    else:
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
