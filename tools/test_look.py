"""The command python -m tools.look."""

import json

from PIL import Image

from tests.processes import call, run
from tests.samples import record, turns


def test_contact_sheet_by_command_line(world, tmp_path):
    call("tools.look", "--show", tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 900 and sheet.height > 700
    assert len(sheet.convert("RGB").getcolors(1 << 24)) > 20
    call("tools.look", "--show", tmp_path / "pairs.png", "--data", world / "train.jsonl")
    assert Image.open(tmp_path / "pairs.png").height < sheet.height
    pair = record(qry=dict(conversations=turns("a")), pos=dict(conversations=turns("b")))
    (tmp_path / "texts.jsonl").write_text(json.dumps(pair))
    run("tools.look", "--show", tmp_path / "texts.png", "--data", tmp_path / "texts.jsonl")
    for flags, why in (
        ([], "--show sheet.png"),
        (["--shw", "x"], "Did you mean 'show'"),
        (["--show", tmp_path / "no" / "x.png"], "No such file"),
    ):
        failed = call("tools.look", *flags, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr


def test_bench_counts_what_workers_make_ready(world):
    flags = ["--data", world / "train.jsonl", "--workers=1", "--count=30", "--max_pixels=7840"]
    head, *lines = run("tools.look", "--bench", *flags).stdout.splitlines()
    assert "1 workers" in head
    counts = {}
    for line in lines:
        kind, rate, *_ = line.split()
        assert float(rate.replace(",", "")) > 1, line
        counts[kind] = int(line.split("(")[1].split()[0])
    assert counts == dict(pictures=12, clips=12, pairs=24)
    assert "at least 0 workers" in call("tools.look", "--bench", "--count=1", check=False).stderr
