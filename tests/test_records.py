"""Training records and items: every spelling that is in use, and an error for every other."""

import errno
import json
import os
import re
import shutil
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import train
from engine.lock import exclusive_lock
from files.clips import Part
from files.errors import DataError, last_line, quote, readable
from files.items import parse_item, parse_side, parse_target, Side
from files.records import hold_out, Pairs
from files.writing import write_errors, write_text
from model import Plume
from tasks.beir import read_items
from tests.samples import ODD, odd_folder, picture, record, REPLY, turns, write_lines
from tests.test_checkpoints import LFS


def side(text, reply=REPLY, **media):
    """One side of a record.  media: image=, images=, video= or videos=, as the record has it."""
    return dict(conversations=turns(text, reply), **media)


def query(text, **media):
    """A record with this query."""
    return record(qry=side(text, **media))


def target(*conversations):
    """A record whose target has these turns."""
    return record(pos=dict(conversations=list(conversations)))


def turn(text="x", who="human", **more):
    return {"from": who, "value": text, **more}


def test_all_spellings_of_a_record_mean_the_same(world, tmp_path):
    chat = [dict(role="user", content="<image>\nwhat?"), dict(role="assistant", content=REPLY)]
    reply = "<think>Because. So.</think><answer>yes</answer><gen_emb>"
    spaced = "<think>\nBecause. So.\n</think>\n<answer>yes</answer>\n<gen_emb>"
    variants = [
        record(),
        record(qry=dict(conversations=chat, images="red bar.png")),
        record(qry=[side("<image>\nwhat?", reply, image="red bar.png")]),
        record(pos=side("yes", spaced, image=[])),
    ]
    odd = 'a "quoted } brace { \\" é'
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, variants)) + "\n", encoding="utf-8")
    array = [dict(variant, dataset_name=odd) for variant in variants]
    (tmp_path / "a.json").write_text(json.dumps(array, indent=2, ensure_ascii=False), encoding="utf-8")
    for path in (tmp_path / "a.jsonl", tmp_path / "a.json"):
        pairs = Pairs(str(path), str(world))
        assert len(pairs) == 4 and len(set(pairs.target)) == 1
        for q, p in (pairs[i] for i in range(4)):
            assert (q.parts, q.rationale, q.answer) == (pairs[0][0].parts, "Because. So.", "yes")
            assert p.parts == [("text", "yes")]
    assert parse_target("just text", "here") == ("", "just text")  # without tags: the answer


def test_texts_that_name_pictures_stay_text_in_records_and_tasks_with_one_warning(world, tmp_path):
    rows = [record(qry="a red bar", pos="red bar.png"), record(qry=side("blue bar.png"), pos="gone.png")]
    write_lines(tmp_path / "r.jsonl", rows)
    documents = [{"_id": n, "text": f"{n} bar.png"} for n in ("red", "blue", "no")]
    write_lines(tmp_path / "corpus.jsonl", documents)
    reads = (Pairs, "r.jsonl", (), "record 1: pos"), (read_items, "corpus.jsonl", ("title",), "record 1")
    for read, name, more, where in reads:
        with pytest.warns(UserWarning) as seen:
            read(str(tmp_path / name), str(world), *more)
        (told,) = [str(warning.message) for warning in seen]
        assert "embedded as text" in told and where in told and told.endswith("'red bar.png'")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = Pairs(str(tmp_path / "r.jsonl"))  # there is no such file below its own folder
    assert pairs[0][1].parts == [("text", "red bar.png")]


def test_a_video_is_a_file_or_a_list_of_frames(world):
    def video(**media):
        return parse_side(side("<video>\nwhat?", **media), str(world), "here").parts[0]

    clip = ("video", str(world / "red bar.mp4"))
    assert video(video="red bar.mp4") == video(videos=["red bar.mp4"]) == clip
    assert video(video="red bar.mp4", fps=2) == ("video", Part(clip[1], fps=2.0))
    with pytest.raises(DataError, match="here: 'start', 'end' and 'fps' belong to a 'video' that is a file"):
        parse_side(side("what?", fps=2), str(world), "here")
    names = ["red bar.png", "blue bar.png"]
    frames = ("video", [str(world / name) for name in names])
    assert video(video=names) == video(videos=[names]) == frames


def test_byte_order_mark_line_ends_and_equal_targets(world, tmp_path):
    pictures = [side("<image>", image=[name]) for name in ("red bar.png", "blue bar.png")]
    targets = [side("same"), side("same"), *pictures]
    lines = [json.dumps(record(pos=pos)).encode() for pos in targets]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n\r\n")
    hashes = Pairs(str(tmp_path / "a.jsonl"), str(world)).target
    assert len(hashes) == 4 and hashes[0] == hashes[1] and len(set(hashes)) == 3  # the media count, too


@pytest.mark.parametrize("array", [False, True])
def test_a_record_that_is_no_longer_the_one_of_the_start_is_an_error(world, tmp_path, array):
    def write(path, *questions):
        rows = [json.dumps(record(qry=question, pos="x")) for question in questions]
        path.write_text(f"[{', '.join(rows)}]" if array else "\ufeff" + " \n\n".join(rows), encoding="utf-8")

    file, new = tmp_path / "a.json", tmp_path / "new.json"
    write(file, "one", "two")
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    pairs = Pairs(str(file), str(world))
    assert [pairs[i][0].parts[0][1] for i in range(2)] == ["one", "two"]
    for questions in (("one", "six"), ("three", "four"), ("one",), ("one", "two", "three")):
        write(new, *questions)
        new.replace(file)
        os.utime(file, ns=times)  # neither name nor time tells
        if questions[1:2] == ("two",):  # what was read is still there
            assert len(list(pairs.texts())) == 12
        else:
            with pytest.raises(DataError, match="a.json: was changed .* record 2 is another; put it back"):
                pairs[1]
    write(file, "six", "ten")
    with pytest.raises(DataError, match="was changed"):
        next(iter(torch.utils.data.DataLoader(pairs, batch_size=None, num_workers=1)))
    file.unlink()
    with pytest.raises(DataError, match="a.json: was removed"):
        pairs[0]


def test_what_is_equal_is_equal_in_every_spelling(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    names = "red bar.png", "./red bar.png", f"../{world.name}/red bar.png", str(world / "red bar.png")
    spelled = [[query("<image>", image=name), query("<video>", video=[name])] for name in names]
    clips = [dict(video=name.replace("png", "mp4"), start=0, end=1) for name in names]
    kinds = [*zip(*spelled), [record(qry=clip) for clip in clips],
             [record(qry=side("what <disc_emb>")), dict(pos="yes", qry=side("what <disc_emb>", "another"))]]
    hashes = []
    for rows in kinds:
        lines = [json.dumps(row, indent=indent).replace("\n", "") for row in rows for indent in (None, 8)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        for media in (str(world), "."):
            hashes.append({int(h) for h in Pairs(str(tmp_path / "a.jsonl"), media).query_hash})
    assert all(len(found) == 1 for found in hashes) and len(set.union(*hashes)) == len(kinds)
    assert str(id(None)) not in Side([("disc", None)]).key()  # another number in every process


def held_out(tmp_path, rows):
    """-> sets of the keys of held-out queries and of those in batches, how many pairs there are of each"""
    write_lines(tmp_path / "t.jsonl", rows)
    pairs = Pairs(str(tmp_path / "t.jsonl"))
    schedule, held = train.make_schedule(train.Config(data="t.jsonl", eval_every=1, steps=3), pairs)
    trained = np.concatenate(schedule.rows)
    return {pairs[i][0].key() for i in held}, {pairs[i][0].key() for i in trained}, len(held), len(trained)


def test_a_held_out_query_is_in_no_batch_with_any_target(tmp_path, capsys):
    thrice = [record(qry=f"query {i}", pos=f"target {i}") for i in range(100)] * 3
    held, trained, count, rest = held_out(tmp_path, thrice)
    assert (count, len(held), rest) == (30, 10, 270) and not held & trained
    several = [record(qry=f"query {i % 60}", pos=f"target {i % 7}", dataset_name=str(i % 2))
               for i in range(300)]
    held, trained, count, rest = held_out(tmp_path, several)
    assert (count, len(held), rest) == (30, 6, 270) and not held & trained
    one = [record(qry="the same", pos=f"target {i}") for i in range(150)]
    held, trained, count, rest = held_out(tmp_path, one + thrice[:150])  # 150 of the 300 cannot be held out
    assert (count, rest) == (30, 270) and not held & trained
    assert held_out(tmp_path, one)[2:] == (0, 150)
    assert "left out" not in capsys.readouterr().out
    many = [record(qry=f"query {i % 900}", pos="x") for i in range(3600)]
    held, trained, count, rest = held_out(tmp_path, many)
    assert (count, rest) == (256, 3240) and not held & trained
    assert "104 pairs with the queries of held-out ones are left out" in capsys.readouterr().out
    plain = Pairs(str(tmp_path / "t.jsonl"))
    plain.query_hash = np.arange(3600)
    assert np.array_equal(hold_out(plain, 5)[0], np.random.default_rng([5, 2]).permutation(3600)[:256])


@pytest.mark.parametrize("text", [
    "[R, 7, R]", "[R R]", "[R,]", "[R", "[R] R", "[[R]]", "[}R]", "[1]\nR", "[,R]", '[R, {"a": }]'])
def test_a_json_array_of_anything_else_is_an_error(world, tmp_path, text):
    (tmp_path / "a.json").write_text(" " * 5000 + text.replace("R", json.dumps(record())))
    with pytest.raises(DataError, match="a.json.*one JSON array of objects"):
        Pairs(str(tmp_path / "a.json"), str(world), skip_bad=True)


GOOD, RED = json.dumps(record()), ["red bar.png"]
BAD = {  # what the error says: records, or their texts
    "not JSON": ["{broken", "[" * 100000], "needs an object": ["[1]"],
    "no 'pos'; a record has dataset_name, qry, pos, neg": [dict(qry="a question")],
    "'dataset_name' must be a string": [record(dataset_name=3)],
    "needs an object with 'conversations'": [record(pos=None)],
    "'neg' must be a list of sides, got str": [record(neg="x")],
    "neg 2: image 'gone.png' does not exist under": [record(neg=["x", dict(image="gone.png")])],
    "unknown key 'text'": [record(pos=dict(text="x", conversations=turn("x")))],
    "unknown key 'ngs'. Did you mean 'neg'?": [record(ngs=[])],
    "the key 'value' stands twice": [GOOD.replace('"from"', '"value": "x", "from"', 1)],
    "must be a list of turns": [target(), record(pos={})],
    "no 'human' turn": [target(turn(who="gpt"))], "'human' or 'gpt'": [target(turn(who="robot"))],
    "more than one 'human' turn": [target(turn(), turn("y"))],
    "a turn: needs an object with 'from', got str": [target("x")],
    "a turn: unknown key 'valeu'. Did you mean 'value'?": [target(turn(valeu="y"))],
    "a turn needs 'from'": [target(turn(role="user")), target(turn("x" * 9999, content="y"))],
    "not valid Unicode": [target(turn("\ud800"))],
    "<think> is opened or closed only once": [record(pos=side("x", "<think>open"))],
    "text outside": [record(pos=side("x", "<answer>a</answer> and more"))],
    "2 <image> in the text, 1 image given": [query("<image> <image>", image=RED)],
    "0 <image> in the text, 1 image given": [query("none", image=RED), query("x", image=[None])],
    "both 'image' and 'images'": [query("<image>", image=RED, images=RED)],
    "image needs a path": [query("<image>", image=bad) for bad in ([RED], 5, 0, dict(path=RED[0]), [None])],
    "image is an empty path": [query("<image>", image=bad) for bad in ("", [""])],
    "video is an empty path": [query("<video>", video="")],
    "frame is an empty path": [query("<video>", video=[""])],
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_record_is_an_error_with_file_number_and_reason_or_counted(world, tmp_path, why):
    path = tmp_path / "bad.jsonl"
    for bad in BAD[why]:
        path.write_text("\n".join([GOOD, bad if isinstance(bad, str) else json.dumps(bad), GOOD]))
        with pytest.raises(DataError, match=r"bad.jsonl: record 2.*" + re.escape(why)):
            Pairs(str(path), str(world))
        pairs = Pairs(str(path), str(world), skip_bad=True)
        assert len(pairs) == 2 and pairs[1][1].answer == "yes"
        assert len(pairs.bad) == 1 and why in pairs.bad[0]
        assert len(pairs.bad[0]) < 500 + len(str(path)) + len(str(world))


def test_what_users_give_is_quoted_with_200_characters_at_most(model):
    long, many = "x" * 100_000, {f"key {i}": i for i in range(10_000)}
    assert quote("a\n") == "'a\\n'"
    assert all(len(quote(value)) <= 200 for value in (long, many, b"y" * 100_000))
    for item in ({long: 1}, [long], many, {"text": 3, long: 1}, {"image": long}, {"video": [long]}, 10**300,
                 {"image": {long}}):
        with pytest.raises(DataError, match="item 0") as error:
            model.encode([item])
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("why, items", {
    "needs a string": [3, {}, b"bytes", {"text": None}],
    "must be a string": [{"text": 3}], "Did you mean 'text'": [{"txt": "a"}],
    "'gone.png' does not exist": [{"image": "gone.png"}], "image is an empty path": [{"image": ""}],
    "needs a path": [{"image": 7}, {"image": [None]}, {"video": []}], "empty list": [{"image": []}],
    "list of frames": [{"video": v} for v in (picture("red", "bar"), b"bytes", np.zeros((2, 9, 9, 3), "u1"))],
}.items())
def test_items_are_checked(why, items):
    for item in items:
        with pytest.raises(DataError, match=f"item.*{why}"):
            parse_item(item)


def test_names_need_not_be_utf_8_and_every_message_can_be_printed(world, model, tmp_path):
    folder = odd_folder(tmp_path)
    odd = folder / f"{ODD}.png"
    shutil.copy(world / "red bar.png", odd)
    write_lines(folder / f"{ODD}.jsonl", [query("<image>", image=[odd.name]), record(qry=dict(image=ODD))])
    pairs = Pairs(str(folder / f"{ODD}.jsonl"), skip_bad=True)
    assert len(pairs) == 1 and pairs.names == ["d"] and pairs[0][0].hash()
    model.processor.render(pairs[0][0])
    odd.write_bytes(b"no picture")
    why = {}
    model.encode([dict(image=odd)], bad=why)
    for text in (why[0], *pairs.bad):
        assert r"\xff" in text and text.encode()  # UTF-8, or an error
    write_text(folder / "page.html", ODD)
    assert (folder / "page.html").read_text(encoding="utf-8") == r"\udcff"
    for refused in (model.save_pretrained, Plume.from_pretrained):
        with pytest.raises(DataError, match=r"\\xff.*: a checkpoint cannot be there"):
            refused(folder)
    with pytest.raises(DataError, match="cannot be there"), exclusive_lock(SimpleNamespace(out=str(folder))):
        pass


@pytest.mark.parametrize("item", [
    dict(image="a.png"), dict(video="a.mp4"), dict(video="a.mp4", start=1), dict(video=["a.png"])])
def test_a_medium_that_is_a_pointer_of_git_lfs_is_called_so(model, tmp_path, monkeypatch, item):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.mp4"):
        (tmp_path / name).write_text(LFS)
    with pytest.raises(DataError, match=r"a\.\w+.*: cannot be used as .*Git LFS pointer.*git lfs pull"):
        model.encode([item])


def broken(rows):
    raise DataError(f"record {rows[0]}: files.errors.DataError: bad")


def test_the_error_of_a_data_worker_is_its_message_alone():
    with pytest.raises(DataError, match="Traceback") as error:
        next(iter(torch.utils.data.DataLoader([7], num_workers=1, collate_fn=broken)))
    assert last_line(error.value) == "record 7: files.errors.DataError: bad"
    assert last_line(OSError("disk\nfull")) == "disk\nfull"


def test_a_lock_needs_no_room_and_errors_of_data_workers_are_not_the_file_s(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    cfg = SimpleNamespace(out=str(tmp_path), resume=True)
    with mock.patch("os.write", side_effect=full), exclusive_lock(cfg):
        pass
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="^DataLoader worker"), write_errors(str(tmp_path / "file")):
        raise killed
    assert quote("a\udcff.png") == r"'a\udcff.png'" and readable(quote("a\udcff.png")) == r"'a\xff.png'"


def test_a_folder_in_place_of_a_file_of_pairs_is_said_to_be_one_with_what_is_in_it(tmp_path):
    with pytest.raises(DataError, match="a folder; .* one file, JSON lines; python -m tools.convert"):
        Pairs(str(tmp_path))
    for name in ("b.jsonl", "a.json", "c.jsonl", "d.jsonl", "x.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as refused:
        Pairs(str(tmp_path))
    here = [f"{tmp_path}/{name}" for name in ("a.json", "b.jsonl", "c.jsonl")]
    assert f"one file; here are {', '.join(here)} and 1 more. A folder of tasks" in str(refused.value)
