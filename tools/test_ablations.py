"""The command python -m tools.ablations."""

import json
import re
import shutil
import sys

import pytest

from tools import ablations
from data import DataError
from test_plume import Started


def test_ablations_by_one_command_that_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "ABLATIONS", {"full": ({}, 61.6), "K = 4, single MLP": (dict(segments=4, adapter="mlp"), 59.2)})

    def forked(command, stdout, stderr, env):  # instead of a Python started anew
        assert command[0] == sys.executable and env["OMP_NUM_THREADS"] == "1" and stdout is stderr
        return Started(*command[1:])

    monkeypatch.setattr(ablations.subprocess, "Popen", forked)
    folder = lambda r: f"{'full' if r['setting'] == 'full' else 'K_4_single_MLP'}_{r['seed']}"
    file, flags = tmp_path / "a.json", ["--families=image_cls", "--steps=3", "--global_batch=4", f"--out={tmp_path}"]
    command = ["--json", str(file), "--seeds=2", *flags]
    assert ablations.main(command) == 0
    printed, first = capsys.readouterr().out, json.loads(file.read_text())
    assert first["config"]["families"] == "image_cls" and first["config"]["steps"] == 3 and first["settings"]["K = 4, single MLP"] == dict(segments=4, adapter="mlp")
    assert re.search(r"single MLP +\d+\.\d% .*59\.2", printed) and "4 runs" in printed
    assert {(r["setting"], r["seed"]) for r in first["runs"]} == {(n, s) for n in ablations.ABLATIONS for s in (0, 1)}
    for r in first["runs"]:  # each setting did what it says, with its own seed
        settings = json.loads((tmp_path / "ablations" / folder(r) / "checkpoint" / "config.json").read_text())["plume"]
        assert (settings["adapter"]["kind"], settings["latent_steps"]) == (("moe", 8) if r["setting"] == "full" else ("mlp", 4))
        assert list(r["hits"]) == ["image_cls/turtle"] and r["mean"] == r["hits"]["image_cls/turtle"]
    # stopped before the last results were written: of one run the checkpoint is there, of the other nothing
    *kept, known, lost = first["runs"]
    file.write_text(json.dumps(first | dict(runs=kept)))
    shutil.rmtree(tmp_path / "ablations" / folder(lost))
    assert ablations.main(command) == 0
    timeless = lambda runs: sorted((r["setting"], r["seed"], r["mean"]) for r in runs)
    assert timeless(json.loads(file.read_text())["runs"]) == timeless(first["runs"])
    with pytest.raises(DataError, match="another file, or the same flags"):
        ablations.main([*command, "--lr=1e-3"])
    for text in ("{", "[]", '{"runs": []}'):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(DataError, match="odd.json: not a file that this command writes"):
            ablations.main([*command, "--json", str(tmp_path / "odd.json")])
    for extra, why in ((["--data=x.jsonl"], "leave out --data"), (["--seeds=0"], "--seeds 0"), (["--json", str(tmp_path / "no" / "a.json")], "folder that exists"), (["--families=image_clss"], "Did you mean 'image_cls'"), (["--workers=1"], "leave out --workers")):
        with pytest.raises(DataError, match=why):
            ablations.main([*command, *extra])
