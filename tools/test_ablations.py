"""The command python -m tools.ablations."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

import train
from engine import lock
from files.errors import DataError
from test_plume import log
from tests.processes import server, Started
from tools import ablations

TWO = {"full": ({}, 61.6), "K = 1, single MLP": (dict(segments=1, adapter="mlp"), 59.2)}
ADAPTER_AND_STEPS = {"full": ("moe", 2), "K = 1, single MLP": ("mlp", 1)}


def forked(command, stdout, stderr, env):
    """Instead of a Python started anew."""
    assert command[0] == sys.executable and env["OMP_NUM_THREADS"] == "1" and stdout is stderr
    return Started(*command[1:])


@pytest.fixture
def command(tmp_path, monkeypatch):
    server()  # changes the environment for a moment: before threads read it
    monkeypatch.setattr(ablations, "ABLATIONS", TWO)
    monkeypatch.setattr(ablations.subprocess, "Popen", forked)
    return ["--json", str(tmp_path / "a.json"), "--seeds=1", "--families=image_cls", "--steps=6",
            "--segments=2", "--global_batch=4", "--until=0.001", "--eval_every=2", f"--out={tmp_path}"]


def folder_of(run, out):
    runs = ablations.Runs(train.Config(out=str(out)), [])
    return Path(runs.config(run["setting"], run["world"], 0).out)


def timeless(runs):
    return sorted((r["setting"], r["world"], r["steps"] or 0, r["hit"]) for r in runs)


def test_ablations_by_one_command_that_goes_on_where_it_stopped(command, tmp_path, capsys):
    file = tmp_path / "a.json"
    assert ablations.main(command) == 0
    printed, first = capsys.readouterr().out, json.loads(file.read_text())
    assert first["config"]["families"] == "image_cls" and first["config"]["until"] == 0.001
    assert first["settings"]["K = 1, single MLP"] == dict(segments=1, adapter="mlp")
    assert "4 runs" in printed and "59.2" in printed
    jobs = {(setting, world) for setting in TWO for world in ablations.WORLDS}
    assert {(run["setting"], run["world"]) for run in first["runs"]} == jobs
    for run in first["runs"]:  # each did what it says, and ended when it had come so far
        folder = folder_of(run, tmp_path)
        settings, rows = json.loads((folder / "checkpoint" / "config.json").read_text())["plume"], log(folder)
        assert (settings["adapter"]["kind"], settings["latent_steps"]) == ADAPTER_AND_STEPS[run["setting"]]
        hits = {row["step"] + 1: row["hit"] for row in rows if "hit" in row}
        there = next((step for step, hit in hits.items() if hit >= 0.001), None)
        assert run["hit"] == hits[len(rows)] and run["steps"] == there and len(rows) == (there or 6)
        words = json.loads((folder / "checkpoint" / "tokenizer.json").read_text())["model"]["vocab"]
        assert ("Ġcompass" in words) == (run["world"] == "rule books")

    # stopped before the last results were written: of one run the checkpoint is there, of the other nothing
    *kept, known, lost = first["runs"]
    file.write_text(json.dumps(first | dict(runs=kept)))
    shutil.rmtree(folder_of(lost, tmp_path))
    assert ablations.main(command) == 0
    assert timeless(json.loads(file.read_text())["runs"]) == timeless(first["runs"])
    with pytest.raises(DataError, match="another file, or the same flags"):
        ablations.main([*command, "--lr=1e-3"])
    with pytest.raises(DataError, match="holds a run of other flags .lr: 0.002 then, 0.001 now.: choose"):
        ablations.main([*command, "--lr=1e-3", f"--json={tmp_path}/b.json"])
    for text in ("odd\n", ""):
        (folder_of(known, tmp_path) / "log.jsonl").write_text(text)
        with pytest.raises(DataError, match="log.jsonl: not the whole log of this run.*; remove"):
            ablations.main([*command, f"--json={tmp_path}/b.json"])


def test_after_a_run_that_does_not_end_well_no_other_begins(command, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations.os, "cpu_count", lambda: 1)
    (tmp_path / "ablations" / "full_plain_0").mkdir(parents=True)
    (tmp_path / "ablations" / "full_plain_0" / "checkpoint").write_text("a file where a folder should be")
    with pytest.raises(DataError, match="full_plain_0: this run did not end well"):
        ablations.main(command)
    assert not list(tmp_path.glob("ablations/*/log.jsonl"))


def test_one_command_at_a_time(command, tmp_path):
    with lock.exclusive_lock(train.Config(out=str(tmp_path / "ablations"), resume=True)):
        second = Started("tools.ablations", *command)
        assert second.wait() and "another run is at work there" in second.stdout + second.stderr
    assert not (tmp_path / "a.json").exists()


def test_a_setting_that_stays_below_with_three_seeds_gets_no_more(command, tmp_path, capsys, monkeypatch):
    def logged(runs, out, done=0):
        return [dict(hit=0.5, ms=1)] * 6, None if "K_1" in out and "plain" in out else 4

    monkeypatch.setattr(ablations.Runs, "start", lambda *given: None)
    monkeypatch.setattr(ablations.Runs, "logged", logged)
    monkeypatch.setattr(ablations.os, "cpu_count", lambda: 1)
    assert ablations.main([*command, "--seeds=5"]) == 0
    seeds = Counter((r["setting"], r["world"]) for r in json.loads((tmp_path / "a.json").read_text())["runs"])
    assert seeds.pop(("K = 1, single MLP", "plain")) == 3 and set(seeds.values()) == {5}
    assert "18 runs" in capsys.readouterr().out


def runs_of(setting, *steps, hits=()):
    """A run for each number of steps, and one that does not come so far for each hit@1."""
    ends = [(n, 0.9) for n in steps] + [(None, hit) for hit in hits]
    return [dict(setting=setting, world="plain", steps=n, hit=hit) for n, hit in ends]


def test_a_setting_shows_when_all_its_seeds_lie_apart_by_steps_or_else_by_their_last_hit():
    runs = [*runs_of("full", 500, 400, 600), *runs_of("a", 650, 700, hits=[0.8])]
    runs += [*runs_of("b", 450, 900, 950), *runs_of("c", 100, 350, 399)]
    full, a, b, c = (ablations.outcomes_of(runs, name, "plain") for name in ("full", *"abc"))
    assert [steps for steps, _ in full] == [400, 500, 600]
    assert ablations.outcomes_of(runs, "full", "rule books") == []
    texts = [ablations.as_text(outcomes, 1000) for outcomes in (full, [], a, a[2:] * 3)]
    assert texts == ["500 (400 .. 600)", "-", "700 (650 .. > 1000)", "> 1000"]
    assert [ablations.verdict(mine, full) for mine in (full, a, b, c, [])] == ["", "worse", "", "better", ""]
    assert ablations.verdict(a[1:], full) == ablations.verdict(a, full[:2]) == ""  # too few
    runs = [*runs_of("full", 500, 400, hits=[0.4]), *runs_of("a", hits=[0.39, 0.1, 0.2])]
    runs += runs_of("b", hits=[0.41, 0.1, 0.2])
    full, a, b = (ablations.outcomes_of(runs, name, "plain") for name in ("full", *"ab"))
    assert ablations.hopeless(a) and not ablations.hopeless(full)
    assert [ablations.verdict(mine, full) for mine in (a, b)] == ["worse", ""]


def test_a_setting_is_compared_with_the_one_that_it_leaves_something_out_of():
    wholes = {ablations.whole_of(name) for name in ablations.ABLATIONS}
    assert wholes == {"full", "frozen backbone", "untied embeddings"} <= ablations.ABLATIONS.keys()
    for name, (flags, _) in ablations.ABLATIONS.items():
        assert flags.items() >= ablations.ABLATIONS[ablations.whole_of(name)][0].items(), name


@pytest.mark.parametrize("text", [
    "{", "[]", '{"runs": []}', '{"config": {}, "settings": {}, "runs": {}}',
    '{"config": {}, "settings": {}, "runs": [{}]}', '{"config": {}, "settings": {}, "runs": [3]}'])
def test_a_file_of_somebody_else_is_refused(command, tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(DataError, match="odd.json: not a file that this command writes"):
        ablations.main([*command, "--json", str(tmp_path / "odd.json")])
