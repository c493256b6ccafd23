"""The command python -m tools.lengths."""

import json

import numpy as np
import pytest
from PIL import Image

from tasks.turtle import World
from test_plume import QUICK
from tests.processes import call, run


def test_lengths_are_told_apart_and_every_way_is_measured(tmp_path, monkeypatch):
    few = [60 if value == 400 else value for value in World.__init__.__defaults__]
    monkeypatch.setattr(World.__init__, "__defaults__", tuple(few))  # queries of a family
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
