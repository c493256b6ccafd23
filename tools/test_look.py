"""The command python -m tools.look."""

import json

from PIL import Image

from test_plume import turns, record, run, call


def test_contact_sheet_by_command_line(world, tmp_path):
    call("tools.look", "--show", tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 900 and sheet.height > 700 and len(sheet.convert("RGB").getcolors(1 << 24)) > 20
    call("tools.look", "--show", tmp_path / "pairs.png", "--data", world / "train.jsonl")
    texts = [json.dumps(record(qry=dict(conversations=turns("a")), pos=dict(conversations=turns("b"))))]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    run("tools.look", "--show", tmp_path / "texts.png", "--data", tmp_path / "texts.jsonl")
    assert Image.open(tmp_path / "pairs.png").height < sheet.height
    for flags, why in (([], "--show sheet.png"), (["--shw", "x"], "Did you mean 'show'"), (["--show", tmp_path / "no" / "x.png"], "No such file")):
        failed = call("tools.look", *flags, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr


def test_bench_counts_what_workers_make_ready(world):
    lines = run("tools.look", "--bench", "--data", world / "train.jsonl", "--workers=1", "--count=30", "--max_pixels=7840").stdout.splitlines()
    read = {line.split()[0]: (float(line.split()[1].replace(",", "")), int(line.split("(")[1].split()[0])) for line in lines[1:]}
    assert read.keys() == {"pictures", "clips", "pairs"} and all(rate > 1 for rate, _ in read.values())
    assert [read[k][1] for k in ("pictures", "clips", "pairs")] == [12, 12, 24] and "1 workers" in lines[0]
    assert "at least 0 workers" in call("tools.look", "--bench", "--count=1", check=False).stderr
