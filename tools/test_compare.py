"""The command python -m tools.compare."""

import json
import re

from PIL import Image

from test_plume import run, call, QUICK


def test_turtle_world_trains_evaluates_and_compares_without_any_data(tmp_path):
    missing = run("eval.py", check=False, cwd=tmp_path)
    assert missing.returncode == 1 and "python train.py" in missing.stderr
    run("train.py", "--out", tmp_path, "--steps", 6, *QUICK, "--segments=2", "--families=visdoc_ret,image_qa")
    base = ["eval.py", "--ckpt", tmp_path / "checkpoint"]
    assert re.search(r"visdoc_ret/turtle.*1\.6%\s+400\s+64", call(*base, "--task", "visdoc_ret", "--mode", "single").stdout)
    printed = call("tools.compare", *base[1:], "--task", "image_qa", "--png", tmp_path / "c.png", "--json", tmp_path / "c.json", "--limit", 12).stdout
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(r["mode"], r["steps"]) for r in rows] == [("single", None), ("latent", 0), ("latent", 1), ("latent", 2), ("cot", None)]
    assert [r["tokens"] for r in rows[:4]] == [0] * 4 and 0 < rows[4]["tokens"] <= 12 and all(r["ms"] > 0 for r in rows)
    assert "hard candidates" in printed and Image.open(tmp_path / "c.png").size == (1000, 620)
    call(*base, "--task", "image_qa", "--steps", 1, "--json", tmp_path / "one.json")
    scores = json.loads((tmp_path / "one.json").read_text())["tasks"]
    assert {t: r["hit@1"] for t, r in scores.items()} == rows[2]["hits"]
    for flags, why in ((["--png", tmp_path / "c.jpg"], "must end in .png"), (["--batch_size=0"], "at least 1"), (["--task", "image_qa,vidoe_ret"], "Did you mean 'video_ret'")):
        failed = call("tools.compare", *base[1:], *flags, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr
