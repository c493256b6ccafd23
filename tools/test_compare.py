"""The command python -m tools.compare."""

import json
import re

import pytest
from PIL import Image

from test_plume import QUICK
from tests.processes import call, run


def test_turtle_world_trains_evaluates_and_compares_without_any_data(tmp_path):
    missing = run("eval.py", check=False, cwd=tmp_path)
    assert missing.returncode == 1 and "python train.py" in missing.stderr
    families = "--families=visdoc_ret,image_qa"
    run("train.py", "--out", tmp_path, "--steps", 6, *QUICK, "--segments=2", families)
    ckpt = ["--ckpt", tmp_path / "checkpoint"]
    printed = call("eval.py", *ckpt, "--task", "visdoc_ret", "--mode", "single").stdout
    assert re.search(r"visdoc_ret/turtle.*1\.6%\s+400\s+64", printed)

    pytest.importorskip("matplotlib")
    files = ["--png", tmp_path / "c.png", "--json", tmp_path / "c.json"]
    printed = call("tools.compare", *ckpt, "--task", "image_qa", *files, "--limit", 12).stdout
    assert "hard candidates" in printed and re.search(r"chance +5\.3% +1\.6% +9\.1%", printed)
    assert Image.open(tmp_path / "c.png").size == (1000, 620)
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(r["mode"], r["steps"]) for r in rows] == [
        ("single", None), ("latent", 0), ("latent", 1), ("latent", 2), ("cot", None)]
    assert [r["tokens"] for r in rows[:4]] == [0, 0, 0, 0] and 0 < rows[4]["tokens"] <= 12
    assert all(r["ms"] > 0 for r in rows)

    call("eval.py", *ckpt, "--task", "image_qa", "--steps", 1, "--json", tmp_path / "one.json")
    scores = json.loads((tmp_path / "one.json").read_text())["tasks"]
    assert {name: r["hit@1"] for name, r in scores.items()} == rows[2]["hits"]
    failed = call("tools.compare", *ckpt, *files, "--task=image_qa,vidoe_ret", check=False)
    assert failed.returncode == 1 and "Did you mean 'video_ret'" in failed.stderr
