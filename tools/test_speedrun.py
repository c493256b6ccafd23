"""The command python -m tools.speedrun."""

import io
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest

import train
from tests.processes import call
from tools import speedrun, speedrun_steps

FLAGS = ["--families=image_ret", "--segments=4", "--steps=5"]


class Measuring:
    """In place of tools/speedrun_steps.py: a step takes 1 s in stage 0 and as many more as its number.

    In the reference twice that; what is measured first, 99 s, shall not count.
    """

    def __init__(self, command, cwd, stdin, stdout, text, env):
        _, _, script, *flags = command
        assert "speedrun_steps" in script and env["OMP_NUM_THREADS"] == "1"
        assert flags == ([] if "first" in cwd else FLAGS)
        self.stdin, self.stdout, self.seen = self, self.answers(), []
        self.factor = 2 if "first" in cwd else 1

    def write(self, line):
        self.stage = int(line)
        self.seen.append(self.stage)

    def answers(self):
        while True:
            yield "something that is said at the start\n"
            seconds = self.factor * (1 + self.stage) if len(self.seen) > 3 else 99
            yield f"core seconds {seconds}\n"

    def flush(self):
        pass

    close = wait = flush


def write_log(folder, stages):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(dict(stage=stage)) + "\n" for stage in stages))


def test_a_row_is_the_cost_of_the_steps_in_its_log_by_turns_with_the_reference(tmp_path, monkeypatch):
    first, out, ran = tmp_path / "first", tmp_path / "run", []
    write_log(first / "out", [0, 1, 8, 8])

    def ran_well(command):
        name = os.path.basename(command[1])
        ran.append([name, *command[2:]])
        if name == "train.py":
            write_log(out, [0, 1, 2, 4, 4])
        else:
            tasks = {"a": {"hit@1": 0.998}, "b": {"hit@1": 0.991}}
            (out / "scores.json").write_text(json.dumps(dict(tasks=tasks)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(speedrun.subprocess, "run", ran_well)
    monkeypatch.setattr(speedrun.subprocess, "Popen", Measuring)
    row = call("tools.speedrun", *FLAGS, "--reference", first, "--out", out, "--turns=2").stdout
    assert ran == [
        ["train.py", *FLAGS, "--out", str(out)],
        ["eval.py", "--ckpt", f"{out}/checkpoint", "--json", f"{out}/scores.json"]]
    here, there = 1 + 2 + 3 + 5 + 5, 2 * (1 + 2 + 9 + 9)
    assert f"{here} core seconds; of the reference, {there}" in row
    cells = [cell.strip() for cell in row.splitlines()[-1].strip("|").split("|")]
    assert cells[:3] == ["5", f"{here / there:.2f}", "99.1%"]
    assert cells[3].strip("`").split() == FLAGS


def test_steps_of_the_stage_that_is_asked_for_are_measured(monkeypatch, capsys):
    trained, backward = [], train.backward

    def spied(model, batch, *given):
        trained.append((batch["step"], batch["stage"].latent_steps))
        return backward(model, batch, *given)

    monkeypatch.setattr(train, "backward", spied)
    monkeypatch.setattr(sys, "stdin", io.StringIO("0\n2\n"))
    speedrun_steps.main([*FLAGS, "--global_batch=4"])
    printed = re.findall(r"^core seconds ([\d.e-]+)$", capsys.readouterr().out, re.M)
    assert len(printed) == 2 and all(float(seconds) > 0 for seconds in printed)
    rounds = range(speedrun_steps.STEPS)
    assert trained == [(step, K) for K in (0, 2) for step in rounds]


@pytest.mark.parametrize("flags, why", [
    (["--out=x", "--data=x.jsonl"], "leave out --data"), ([], "give --out"),
    (["--out=x", "--turns=0"], "--turns 1"),
    (["--out=x", "--reference=nowhere"], "nowhere/out/log.jsonl: not the log of a run")])
def test_what_makes_no_row_is_refused_before_anything_runs(flags, why):
    failed = call("tools.speedrun", *flags, check=False)
    assert failed.returncode == 1 and why in failed.stderr, failed.stderr
