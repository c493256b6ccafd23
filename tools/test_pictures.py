"""The commands that draw: tools.compare, tools.lengths, tools.look."""

import json
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageFont

from files.items import Side
from test_plume import QUICK
from tests.processes import call, run
from tests.samples import picture, record, turns, write_lines
from tools.compare import milliseconds
from tools.look import LINE_HEIGHT, lines_of, named, wrapped


def test_turtle_world_trains_evaluates_and_compares_without_any_data(tmp_path, few_queries):
    missing = run("eval.py", check=False, cwd=tmp_path)
    assert missing.returncode == 1 and "python train.py" in missing.stderr
    families = "--families=visdoc_ret,image_qa"
    run("train.py", "--out", tmp_path, "--steps", 6, *QUICK, "--segments=2", families)
    ckpt = ["--ckpt", tmp_path / "checkpoint"]
    printed = call("eval.py", *ckpt, "--task", "visdoc_ret", "--mode", "single").stdout
    assert re.search(r"visdoc_ret/turtle.*1\.6%\s+60\s+64", printed)

    pytest.importorskip("matplotlib")
    files = ["--png", tmp_path / "c.png", "--json", tmp_path / "c.json"]
    flags = ["--task", "image_qa", "--limit", 12, "--rounds", 2]
    printed = call("tools.compare", *ckpt, *flags, *files).stdout
    assert "hard candidates" in printed and re.search(r"chance +\d\.\d% +1\.6% +\d\.\d%", printed)
    assert Image.open(tmp_path / "c.png").size == (1000, 620)
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(r["mode"], r["steps"]) for r in rows] == [
        ("single", None), ("latent", 0), ("latent", 1), ("latent", 2), ("cot", None)]
    assert [r["tokens"] for r in rows[:4]] == [0, 0, 0, 0] and 0 < rows[4]["tokens"] <= 12
    assert all(r["ms"] > 0 for r in rows)

    call("tools.front_picture", "--json", tmp_path / "c.json", "--out", tmp_path / "front")
    for theme in ("light", "dark"):
        shapes = ElementTree.parse(tmp_path / f"front_{theme}.svg").getroot().iter()
        shown = " ".join(shape.text or "" for shape in shapes)
        assert "2 latent steps" in shown and re.search(r"chance \d\.\d%", shown) and "mean of 2" in shown
    (tmp_path / "other.json").write_text('{"rows": []}')
    failed = call("tools.front_picture", "--json", tmp_path / "other.json", check=False)
    assert failed.returncode == 1 and "no file of python -m tools.compare" in failed.stderr

    call("eval.py", *ckpt, "--task", "image_qa", "--steps", 1, "--json", tmp_path / "one.json")
    scores = json.loads((tmp_path / "one.json").read_text())["tasks"]
    assert {name: r["hit@1"] for name, r in scores.items()} == rows[2]["hits"]
    call("tools.one_space", *ckpt, "--task", "image_qa", *files)
    ways = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(r["queries"], r["index"]) for r in ways] == [
        ("latent", "latent"), ("latent", "single"), ("single", "latent"), ("single", "single")]
    assert all(r["query_ms"] > 0 and r["document_ms"] > 0 for r in ways)
    assert Image.open(tmp_path / "c.png").size == (900, 560)
    flags = ["--task", "image_qa", "--index", "single", "--json", tmp_path / "one.json"]
    call("eval.py", *ckpt, *flags)
    scores = json.loads((tmp_path / "one.json").read_text())["tasks"]
    assert ways[1]["hit"] == np.mean([r["hit@1"] for r in scores.values()])
    failed = call("tools.compare", *ckpt, *files, "--task=image_qa,vidoe_ret", check=False)
    assert failed.returncode == 1 and "Did you mean 'video_ret'" in failed.stderr


def test_times_are_medians_of_rounds_in_which_all_take_turns():
    ways, asked = [("single", None), ("latent", 0), ("latent", 4)], []
    own = {None: 1.0, 0: 1.1, 4: 1.5}  # seconds of a round
    busy = {4, 5, 9}  # turns in which another process has the machine

    def encode(queries, mode, steps, batch_size, limit, took):
        assert (queries, batch_size, limit) == (["a", "b"], 32, 512)
        took["seconds"] += own[steps] + 60 * (len(asked) in busy)
        asked.append((mode, steps))

    assert milliseconds(SimpleNamespace(encode=encode), ways, ["a", "b"], 5, 32, 512) == [500, 550, 750]
    assert asked == ways * 5


def test_lengths_are_told_apart_and_every_way_is_measured(tmp_path, few_queries):
    world = ["--families=image_ret", "--moves=2-4", "--segments=3", "--steps=4", *QUICK]
    run("train.py", "--out", tmp_path / "a", *world, "--adaptive")
    run("train.py", "--out", tmp_path / "p", *world, "--adapter=parallel")
    pytest.importorskip("matplotlib")
    files = ["--png", tmp_path / "l.png", "--json", tmp_path / "l.json"]
    ckpt = ["--ckpt", tmp_path / "a" / "checkpoint", tmp_path / "p" / "checkpoint"]
    printed = call("tools.lengths", *ckpt, "--moves=2-4", "--rounds=1", "--limit=5", *files).stdout
    rows = json.loads((tmp_path / "l.json").read_text())["rows"]
    assert list(rows) == ["a: single", "a: cot", "a: latent 3", "a: auto", "p: parallel 3"]
    assert all([row["length"] for row in way] == [2, 3, 4, "mixed"] for way in rows.values())
    assert all((row["steps"], row["tokens"]) == (3, 0) for row in rows["p: parallel 3"])
    assert all(0 < row["tokens"] <= 5 and row["steps"] == 0 for row in rows["a: cot"])
    assert all(row["ms"] > 0 for way in rows.values() for row in way)
    assert "hit@1" in printed and "140 queries of each length" in printed
    assert Image.open(tmp_path / "l.png").size == (1200, 560)

    # 7 families of 20 queries each; their mean is what eval.py says of the tasks
    call("eval.py", *ckpt[:2], "--moves=2-4", "--mode=single", "--json", tmp_path / "e.json")
    tasks = json.loads((tmp_path / "e.json").read_text())["tasks"]
    hits = [score["hit@1"] for name, score in tasks.items() if not name.endswith("_hard")]
    assert abs(np.mean(hits) - np.mean([row["hit"] for row in rows["a: single"][:-1]])) < 1e-9


def test_contact_sheet_by_command_line(world, tmp_path):
    call("tools.look", "--show", tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 900 and sheet.height > 700
    assert len(sheet.convert("RGB").getcolors(1 << 24)) > 20
    call("tools.look", "--show", tmp_path / "pairs.png", "--data", world / "train.jsonl")
    assert Image.open(tmp_path / "pairs.png").height < sheet.height
    pair = record(qry=dict(conversations=turns("a")), pos=dict(conversations=turns("b")))
    write_lines(tmp_path / "texts.jsonl", [pair])
    run("tools.look", "--show", tmp_path / "texts.png", "--data", tmp_path / "texts.jsonl")


def test_the_contact_sheet_has_whole_texts_in_lines_that_fit_and_names_both_sides():
    font = ImageFont.load_default(18)
    for text in ("one", "a b " * 300, "x" * 900, "the end " + "W" * 200 + " and on", "\u4e2d" * 100, ""):
        lines = wrapped(text, font, 300)
        assert all(font.getlength(line) <= 300 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert len(lines) <= 2 + font.getlength(text) / 140  # most of each line is used
    assert wrapped("two  words\nhere", font, 300) == ["two words here"]
    rationale = "".join(f"Step {n} of many. " for n in range(60))
    side = Side([("text", "what"), ("image", picture("red", "bar"))], rationale=rationale, answer="yes")
    lines = lines_of("query", side)
    assert [line.split(":")[0] for line in lines] == ["query", "query's rationale", "query's answer"]
    assert "Step 59 of many." in lines[1]
    shown = named("target", side, font)
    assert np.asarray(shown.convert("L"))[:LINE_HEIGHT].min() < 100  # its name stands above the picture
    assert shown.height > LINE_HEIGHT + 60 and named("target", Side([("text", "x")]), font).size == (0, 0)


def test_bench_counts_what_workers_make_ready(world):
    flags = ["--data", world / "train.jsonl", "--workers=1", "--count=30", "--max_pixels=7840"]
    head, *lines = run("tools.look", "--bench", *flags).stdout.splitlines()
    assert "1 workers" in head
    found = [re.fullmatch(r"(\w+) +([\d,.]+) a second +\((\d+) read\)", line).groups() for line in lines]
    assert {kind: int(count) for kind, _, count in found} == dict(pictures=12, clips=12, pairs=24)
    assert all(float(rate.replace(",", "")) > 1 for _, rate, _ in found)
