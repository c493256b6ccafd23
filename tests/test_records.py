"""Training records and items: every spelling that is in use, and an error for every other."""

import json
import os
import re

import numpy as np
import pytest

import data
from data import DataError, Pairs, parse_item
from test_plume import HERE, picture, turns, record


def test_all_spellings_of_a_record_mean_the_same(world, tmp_path):
    chat = ("role", "content", "user", "assistant")
    variants = [record(), record(qry=dict(conversations=turns("<image>\nwhat?", who=chat), images="red bar.png")),
                record(qry=[dict(conversations=turns("<image>\nwhat?", "<think>Because. So.</think><answer>yes</answer><gen_emb>"), image="red bar.png")]),
                record(pos=dict(conversations=turns("yes", "<think>\nBecause. So.\n</think>\n<answer>yes</answer>\n<gen_emb>"), image=[]))]
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\n\n".join(json.dumps(v) for v in variants) + "\n", encoding="utf-8")
    array.write_text(json.dumps([dict(v, dataset_name='a "quoted } brace { \\" é') for v in variants], indent=2, ensure_ascii=False), encoding="utf-8")
    for path in (lines, array):
        pairs = Pairs(str(path), str(world))
        assert len(pairs) == 4 and len(set(pairs.target)) == 1
        for i in range(4):
            q, p = pairs[i]
            assert (q.parts, q.rationale, q.answer) == (pairs[0][0].parts, "Because. So.", "yes") and p.parts == [("text", "yes")]
    video = lambda **kw: data.parse_side(dict(conversations=turns("<video>\nwhat?"), **kw), str(world), "here").parts[0]
    assert video(video="red bar.mp4") == video(videos=["red bar.mp4"]) == ("video", str(world / "red bar.mp4"))
    assert video(video=["red bar.png", "blue bar.png"]) == video(videos=[["red bar.png", "blue bar.png"]]) == ("video", [str(world / f"{c} bar.png") for c in ("red", "blue")])
    assert data.parse_target("just text", "here") == ("", "just text") and data.parse_target("", "here") == ("", "")


def test_byte_order_mark_line_ends_and_equal_targets(world, tmp_path):
    rows = [record(pos=dict(conversations=turns(text), **media)) for text, media in (("same", {}), ("same", {}), ("<image>", dict(image=["red bar.png"])), ("<image>", dict(image=["blue bar.png"])))]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in rows) + b"\r\n\r\n")
    target = Pairs(str(tmp_path / "a.jsonl"), str(world)).target
    assert len(target) == 4 and target[0] == target[1] and len(set(target)) == 3  # the media count, not the text alone


@pytest.mark.parametrize("text", ["[R, 7, R]", "[R R]", "[R,]", "[R", "[R] R", "[R][R]", "[[R]]", "[R, \"x\"]", "[}R]", "[1]\nR"])
def test_a_json_array_of_anything_else_is_an_error(world, tmp_path, text):
    (tmp_path / "a.json").write_text(" " * 5000 + text.replace("R", json.dumps(record())))
    with pytest.raises(DataError, match="a.json.*one JSON array of objects"):
        Pairs(str(tmp_path / "a.json"), str(world), skip_bad=True)


def test_a_json_array_larger_than_the_read_buffer_is_indexed_by_offset(world, tmp_path):
    rows = [record(dataset_name=f"d{i % 3}", pos=dict(conversations=turns(f'answer {i} \\" }} é ' + "x" * (i * 37 % 9000)))) for i in range(600)]
    (tmp_path / "big.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert os.path.getsize(tmp_path / "big.json") > 2 << 20
    pairs = Pairs(str(tmp_path / "big.json"), str(world))
    assert len(pairs) == 600 and pairs.names == ["d0", "d1", "d2"] and len(set(pairs.target)) == 600
    for i in (0, 123, 599):
        assert pairs[i][1].parts[0][1] == rows[i]["pos"]["conversations"][0]["value"]


BAD = [("{broken", "not JSON"), (json.dumps(dict(qry=1, pos=2)), "no 'dataset_name'"), (json.dumps(record(qry=dict(conversations=turns("<image> <image>"), image=["red bar.png"]))), "2 <image> in the text, 1 image given"),
       (json.dumps(record(qry=dict(conversations=turns("none"), image=["red bar.png"]))), "0 <image> in the text, 1 image given"), (json.dumps(record(qry=dict(conversations=turns("<image>"), image=["gone.png"]))), "'gone.png' does not exist under"),
       (json.dumps(record(qry=dict(conversations=turns("x"), imgae=["red bar.png"]))), "unknown key 'imgae'. Did you mean 'image'"), (json.dumps(record(pos=dict(conversations=[{"from": "robot", "value": "x"}]))), "'human' or 'gpt'"),
       (json.dumps(record(pos=dict(conversations=turns("x", "<think>open")))), "<think> is opened or closed only once"), (json.dumps(record(pos=dict(conversations=[]))), "must be a list of turns"), ("[1]", "needs an object"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image=[["red bar.png"]]))), "image needs a path"), (json.dumps(record(qry=dict(conversations=turns("<image>"), image=5))), "image needs a path"),
       (json.dumps(record(pos=dict(conversations=turns("x") + turns("y")))), "more than one 'human' turn"), (json.dumps(record(pos=dict(conversations=turns("x", "<answer>a</answer> and more")))), "text outside"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image=["red bar.png"], images=["red bar.png"]))), "both 'image' and 'images'"), (json.dumps(record(pos=dict(conversations=turns("\ud800")))), "not valid Unicode"),
       ("[" * 100000, "not JSON"), (json.dumps(record(dataset_name=3)), "must be a string"), (json.dumps(record(pos=None)), "needs an object with 'conversations'"),
       (json.dumps(record(neg=[])), "unknown key 'neg'. Known: dataset_name, qry, pos"), (json.dumps(record(wieght=2)), "unknown key 'wieght'"),
       (json.dumps(record()).replace('"qry"', '"query"'), "unknown key 'query'. Did you mean 'qry'?"),
       (json.dumps(record())[:-1] + ', "qry": {}}', "the key 'qry' stands twice"), (json.dumps(record()).replace('"from"', '"value": "x", "from"', 1), "the key 'value' stands twice"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image=[None]))), "image needs a path"), (json.dumps(record(qry=dict(conversations=turns("x"), image=[None]))), "0 <image> in the text, 1 image given"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image=[""]))), "image is an empty path"), (json.dumps(record(qry=dict(conversations=turns("<image>"), image=""))), "image is an empty path"),
       (json.dumps(record(qry=dict(conversations=turns("<video>"), video=""))), "video is an empty path"), (json.dumps(record(qry=dict(conversations=turns("x"), video=""))), "0 <video> in the text, 1 video given"),
       (json.dumps(record(qry=dict(conversations=turns("<video>"), video=[""]))), "frame is an empty path"), (json.dumps(record(qry=dict(conversations=turns("<video>"), videos=[None]))), "video needs a path"),
       (json.dumps(record(qry=dict(conversations=turns("<video>"), video=[None]))), "frame needs a path"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image={"path": "red bar.png"}))), "image needs a path"), (json.dumps(record(qry=dict(conversations=turns("<image>"), image=0))), "image needs a path"),
       (json.dumps(record(pos=dict(conversations=[{"from": "human", "value": "x", "valeu": "y"}]))), "a turn: unknown key 'valeu'. Did you mean 'value'?"),
       (json.dumps(record(pos=dict(conversations=[{"from": "human", "role": "user", "value": "x"}]))), "a turn needs 'from'"),
       (json.dumps(record(pos=dict(conversations=[{"from": "human", "value": "x" * 9999, "content": "y"}]))), "a turn needs 'from'")]


@pytest.mark.parametrize("line, why", BAD, ids=[w for _, w in BAD])
def test_a_bad_record_is_an_error_with_file_number_and_reason_or_counted(world, tmp_path, line, why):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record()) + "\n" + line + "\n" + json.dumps(record()) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl: record 2.*" + re.escape(why)):
        Pairs(str(path), str(world))
    pairs = Pairs(str(path), str(world), skip_bad=True)
    assert len(pairs) == 2 and len(pairs.bad) == 1 and why in pairs.bad[0] and pairs[1][1].answer == "yes"
    assert len(pairs.bad[0]) < 500 + len(str(path)) + len(str(world))


def test_what_users_give_is_quoted_with_200_characters_at_most(model, tmp_path):
    long, many = "x" * 100_000, {f"key {i}": i for i in range(10_000)}
    assert len(data.quote(long)) <= 200 and len(data.quote(many)) <= 200 and data.quote("a\n") == "'a\\n'" and len(data.quote(b"y" * 100_000)) <= 200
    for item in ({long: 1}, [long], many, {"text": 3, long: 1}, {"image": long}, {"video": [long]}, 10**300, {"image": {long}}):
        with pytest.raises(DataError, match="item 0") as error:
            model.encode([item])
        assert len(str(error.value)) < 400
    for kind in ("qry", "pos", "dataset_name", "conversations"):
        line = json.dumps(record()).replace(f'"{kind}"', json.dumps(long), 1)
        (tmp_path / "t.jsonl").write_text(line)
        with pytest.raises(DataError, match="record 1") as error:
            Pairs(str(tmp_path / "t.jsonl"))
        assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_items_are_checked():
    for item, why in (({"text": "<image><image>", "image": str(HERE / "model.py")}, "2 <image> in the text, 1 image given"), ({"video": picture("red", "bar")}, "list of frames"), ({"text": None}, "needs a string"),
                      ({"txt": "a"}, "Did you mean 'text'"), ({}, "needs a string"), (3, "needs a string"), ({"image": "gone.png"}, "'gone.png' does not exist"),
                      ({"image": []}, "empty list"), ({"text": 3}, "must be a string"), ({"image": 7}, "needs a path"),
                      ({"video": ""}, "video is an empty path"), ({"image": ""}, "image is an empty path"), ({"image": [None]}, "needs a path"), ({"video": []}, "needs a path"),
                      ({"video": b"bytes"}, "list of frames"), ({"video": np.zeros((2, 9, 9, 3), np.uint8)}, "list of frames"), (b"bytes", "needs a string")):
        with pytest.raises(DataError, match=f"item.*{why}"):
            parse_item(item)
