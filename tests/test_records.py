"""Training records and items: every spelling that is in use, and an error for every other."""

import json
import os
import re

import numpy as np
import pytest

from files import errors
from files import records
from files.errors import DataError
from files.items import parse_item
from files.records import Pairs
from test_plume import HERE
from tests.samples import picture, record, turns


def side(text, reply=None, **media):
    """One side of a record.  media: image=, images=, video= or videos=, as the record has it."""
    conversations = turns(text) if reply is None else turns(text, reply)
    return dict(conversations=conversations, **media)


def query(text, **media):
    """A record with this query."""
    return record(qry=side(text, **media))


def target(*conversations):
    """A record whose target has these turns."""
    return record(pos=dict(conversations=list(conversations)))


def turn(text="x", who="human", **more):
    return {"from": who, "value": text, **more}


def test_all_spellings_of_a_record_mean_the_same(world, tmp_path):
    chat = turns("<image>\nwhat?", who=("role", "content", "user", "assistant"))
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


def test_a_video_is_a_file_or_a_list_of_frames(world):
    def video(**media):
        return records.parse_side(side("<video>\nwhat?", **media), str(world), "here").parts[0]

    clip = ("video", str(world / "red bar.mp4"))
    assert video(video="red bar.mp4") == video(videos=["red bar.mp4"]) == clip
    names = ["red bar.png", "blue bar.png"]
    frames = ("video", [str(world / name) for name in names])
    assert video(video=names) == video(videos=[names]) == frames


def test_a_target_without_tags_is_the_answer():
    assert records.parse_target("just text", "here") == ("", "just text")
    assert records.parse_target("", "here") == ("", "")


def test_byte_order_mark_line_ends_and_equal_targets(world, tmp_path):
    targets = [side("same"), side("same"), side("<image>", image=["red bar.png"]),
               side("<image>", image=["blue bar.png"])]
    lines = [json.dumps(record(pos=pos)).encode() for pos in targets]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n\r\n")
    hashes = Pairs(str(tmp_path / "a.jsonl"), str(world)).target
    assert len(hashes) == 4 and hashes[0] == hashes[1]
    assert len(set(hashes)) == 3  # the media count, not the text alone


@pytest.mark.parametrize("text", [
    "[R, 7, R]", "[R R]", "[R,]", "[R", "[R] R", "[R][R]", "[[R]]", '[R, "x"]', "[}R]", "[1]\nR", "[,R]",
    "[R,,R]", '[R, {"a": }]'])
def test_a_json_array_of_anything_else_is_an_error(world, tmp_path, text):
    (tmp_path / "a.json").write_text(" " * 5000 + text.replace("R", json.dumps(record())))
    with pytest.raises(DataError, match="a.json.*one JSON array of objects"):
        Pairs(str(tmp_path / "a.json"), str(world), skip_bad=True)


def test_a_large_json_array_is_indexed_by_offset(world, tmp_path):
    answers = [f'answer {i} \\" }} é ' + "x" * (i * 37 % 9000) for i in range(600)]
    rows = [record(dataset_name=f"d{i % 3}", pos=side(text)) for i, text in enumerate(answers)]
    path = tmp_path / "big.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert os.path.getsize(path) > 2 << 20
    pairs = Pairs(str(path), str(world))
    assert len(pairs) == 600 and len(set(pairs.target)) == 600
    assert pairs.names == ["d0", "d1", "d2"]
    for i in (0, 123, 599):
        assert pairs[i][1].parts[0][1] == answers[i]


GOOD = json.dumps(record())
PATH = dict(path="red bar.png")
BAD = [  # a record, or its text, and what the error says
    # the object
    ("{broken", "not JSON"),
    ("[" * 100000, "not JSON"),
    ("[1]", "needs an object"),
    (dict(qry="a question"), "no 'pos'; a record has dataset_name, qry, pos, neg"),
    (record(dataset_name=3), "must be a string"),
    (record(pos=None), "needs an object with 'conversations'"),
    (record(pos={}), "must be a list of turns"),
    (record(pos=dict(text=5)), "'text' must be a string"),
    (record(pos=dict(text="x", conversations=turn("x"))), "unknown key 'text'"),
    (record(neg="x"), "'neg' must be a list of sides, got str"),
    (record(neg=["x", 5]), "neg 2: needs an object with 'conversations'"),
    (record(neg=[dict(image="gone.png")]), "neg 1: image 'gone.png' does not exist under"),
    # keys
    (record(ngs=[]), "unknown key 'ngs'. Did you mean 'neg'?"),
    (record(wieght=2), "unknown key 'wieght'"),
    (GOOD.replace('"qry"', '"query"'), "unknown key 'query'. Did you mean 'qry'?"),
    (query("x", imgae=["red bar.png"]), "unknown key 'imgae'. Did you mean 'image'"),
    (GOOD[:-1] + ', "qry": {}}', "the key 'qry' stands twice"),
    (GOOD.replace('"from"', '"value": "x", "from"', 1), "the key 'value' stands twice"),
    # turns
    (target(), "must be a list of turns"),
    (target("x"), "a turn: needs an object with 'from', got str"),
    (target(turn(who="gpt")), "no 'human' turn"),
    (target(turn(who="robot")), "'human' or 'gpt'"),
    (target(turn(), turn("y")), "more than one 'human' turn"),
    (target(turn(valeu="y")), "a turn: unknown key 'valeu'. Did you mean 'value'?"),
    (target(turn(role="user")), "a turn needs 'from'"),
    (target(turn("x" * 9999, content="y")), "a turn needs 'from'"),
    (target(turn("\ud800")), "not valid Unicode"),
    (record(pos=side("x", "<think>open")), "<think> is opened or closed only once"),
    (record(pos=side("x", "<answer>a</answer> and more")), "text outside"),
    # as many media as markers
    (query("<image> <image>", image=["red bar.png"]), "2 <image> in the text, 1 image given"),
    (query("none", image=["red bar.png"]), "0 <image> in the text, 1 image given"),
    (query("x", image=[None]), "0 <image> in the text, 1 image given"),
    (query("x", video=""), "0 <video> in the text, 1 video given"),
    (query("<image>", image=["red bar.png"], images=["red bar.png"]), "both 'image' and 'images'"),
    # what a medium may be
    (query("<image>", image=["gone.png"]), "'gone.png' does not exist under"),
    (query("<image>", image=[["red bar.png"]]), "image needs a path"),
    (query("<image>", image=5), "image needs a path"),
    (query("<image>", image=0), "image needs a path"),
    (query("<image>", image=PATH), "image needs a path"),
    (query("<image>", image=[None]), "image needs a path"),
    (query("<image>", image=[""]), "image is an empty path"),
    (query("<image>", image=""), "image is an empty path"),
    (query("<video>", video=""), "video is an empty path"),
    (query("<video>", video=[""]), "frame is an empty path"),
    (query("<video>", video=[None]), "frame needs a path"),
    (query("<video>", videos=[None]), "video needs a path"),
]


@pytest.mark.parametrize("bad, why", BAD, ids=[why for _, why in BAD])
def test_a_bad_record_is_an_error_with_file_number_and_reason_or_counted(world, tmp_path, bad, why):
    path = tmp_path / "bad.jsonl"
    line = bad if isinstance(bad, str) else json.dumps(bad)
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=r"bad.jsonl: record 2.*" + re.escape(why)):
        Pairs(str(path), str(world))
    pairs = Pairs(str(path), str(world), skip_bad=True)
    assert len(pairs) == 2 and pairs[1][1].answer == "yes"
    assert len(pairs.bad) == 1 and why in pairs.bad[0]
    assert len(pairs.bad[0]) < 500 + len(str(path)) + len(str(world))


def test_what_users_give_is_quoted_with_200_characters_at_most(model, tmp_path):
    long = "x" * 100_000
    many = {f"key {i}": i for i in range(10_000)}
    assert errors.quote("a\n") == "'a\\n'"
    assert all(len(errors.quote(value)) <= 200 for value in (long, many, b"y" * 100_000))
    items = ({long: 1}, [long], many, {"text": 3, long: 1}, {"image": long}, {"video": [long]}, 10**300,
             {"image": {long}})
    for item in items:
        with pytest.raises(DataError, match="item 0") as error:
            model.encode([item])
        assert len(str(error.value)) < 400
    path = tmp_path / "t.jsonl"
    for key in ("qry", "pos", "dataset_name", "conversations"):
        path.write_text(GOOD.replace(f'"{key}"', json.dumps(long), 1))
        with pytest.raises(DataError, match="record 1") as error:
            Pairs(str(path))
        assert len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("item, why", [
    (3, "needs a string"),
    ({}, "needs a string"),
    (b"bytes", "needs a string"),
    ({"text": None}, "needs a string"),
    ({"text": 3}, "must be a string"),
    ({"txt": "a"}, "Did you mean 'text'"),
    ({"text": "<image><image>", "image": str(HERE / "model.py")}, "2 <image> in the text, 1 image given"),
    ({"image": "gone.png"}, "'gone.png' does not exist"),
    ({"image": ""}, "image is an empty path"),
    ({"image": []}, "empty list"),
    ({"image": 7}, "needs a path"),
    ({"image": [None]}, "needs a path"),
    ({"video": ""}, "video is an empty path"),
    ({"video": []}, "needs a path"),
    ({"video": picture("red", "bar")}, "list of frames"),
    ({"video": b"bytes"}, "list of frames"),
    ({"video": np.zeros((2, 9, 9, 3), np.uint8)}, "list of frames"),
])
def test_items_are_checked(item, why):
    with pytest.raises(DataError, match=f"item.*{why}"):
        parse_item(item)
