"""The command python -m tools.ablations."""

import itertools
import json
import re
import shutil
import sys

import pytest

from tools import ablations
from data import DataError
from test_plume import Started

TWO = {"full": ({}, 61.6), "K = 4, single MLP": (dict(segments=4, adapter="mlp"), 59.2)}
FOLDER = {"full": "full", "K = 4, single MLP": "K_4_single_MLP"}
ADAPTER_AND_STEPS = {"full": ("moe", 8), "K = 4, single MLP": ("mlp", 4)}


def forked(command, stdout, stderr, env):
    """Instead of a Python started anew."""
    assert command[0] == sys.executable and env["OMP_NUM_THREADS"] == "1" and stdout is stderr
    return Started(*command[1:])


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ABLATIONS", TWO)
    monkeypatch.setattr(ablations.subprocess, "Popen", forked)
    return ["--json", str(tmp_path / "a.json"), "--seeds=2", "--families=image_cls", "--steps=3",
            "--global_batch=4", f"--out={tmp_path}"]


def timeless(runs):
    return sorted((r["setting"], r["seed"], r["mean"]) for r in runs)


def test_ablations_by_one_command_that_goes_on_where_it_stopped(command, tmp_path, capsys):
    file = tmp_path / "a.json"
    assert ablations.main(command) == 0
    printed, first = capsys.readouterr().out, json.loads(file.read_text())
    assert first["config"]["families"] == "image_cls" and first["config"]["steps"] == 3
    assert first["settings"]["K = 4, single MLP"] == dict(segments=4, adapter="mlp")
    assert re.search(r"single MLP +\d+\.\d% .*59\.2", printed) and "4 runs" in printed
    assert sorted((r["setting"], r["seed"]) for r in first["runs"]) == sorted(itertools.product(TWO, (0, 1)))

    def folder(run):
        return tmp_path / "ablations" / f"{FOLDER[run['setting']]}_{run['seed']}"

    for run in first["runs"]:  # each setting did what it says, with its own seed
        settings = json.loads((folder(run) / "checkpoint" / "config.json").read_text())["plume"]
        assert (settings["adapter"]["kind"], settings["latent_steps"]) == ADAPTER_AND_STEPS[run["setting"]]
        assert list(run["hits"]) == ["image_cls/turtle"] and run["mean"] == run["hits"]["image_cls/turtle"]

    # stopped before the last results were written: of one run the checkpoint is there, of the other nothing
    *kept, known, lost = first["runs"]
    file.write_text(json.dumps(first | dict(runs=kept)))
    shutil.rmtree(folder(lost))
    assert ablations.main(command) == 0
    assert timeless(json.loads(file.read_text())["runs"]) == timeless(first["runs"])
    with pytest.raises(DataError, match="another file, or the same flags"):
        ablations.main([*command, "--lr=1e-3"])


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": []}'])
def test_a_file_of_somebody_else_is_refused(command, tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(DataError, match="odd.json: not a file that this command writes"):
        ablations.main([*command, "--json", str(tmp_path / "odd.json")])


@pytest.mark.parametrize("flag, why", [
    ("--data=x.jsonl", "leave out --data"),
    ("--workers=1", "leave out --workers"),
    ("--seeds=0", "--seeds 0"),
    ("--json=no/a.json", "folder that exists"),
    ("--families=image_clss", "Did you mean 'image_cls'"),
])
def test_flags_that_cannot_work_are_refused(command, tmp_path, monkeypatch, flag, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=why):
        ablations.main([*command, flag])
