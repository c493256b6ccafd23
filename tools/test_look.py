"""The command python -m tools.look."""

import re

from PIL import Image

from tests.processes import call, run
from tests.samples import record, turns, write_lines


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


def test_bench_counts_what_workers_make_ready(world):
    flags = ["--data", world / "train.jsonl", "--workers=1", "--count=30", "--max_pixels=7840"]
    head, *lines = run("tools.look", "--bench", *flags).stdout.splitlines()
    assert "1 workers" in head
    found = [re.fullmatch(r"(\w+) +([\d,.]+) a second +\((\d+) read\)", line).groups() for line in lines]
    assert {kind: int(count) for kind, _, count in found} == dict(pictures=12, clips=12, pairs=24)
    assert all(float(rate.replace(",", "")) > 1 for _, rate, _ in found)
