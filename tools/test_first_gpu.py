"""What is said about a GPU without one: tools.check_memory, tools.first_gpu."""

import json
import re
import sys

import pytest
import torch

from latent import joined_weights
from test_plume import make_model
from tests.processes import call
from tests.test_latent import run_again
from tools import first_gpu, first_gpu_parts, speed_methods
from tools.first_gpu_parts import graphs_equal

TINY = ("--device=cpu", "--shape=tiny")


def test_the_dry_run_agrees_with_torchs_trackers():
    pytest.importorskip("peft", reason="needs peft: pip install peft")
    printed = call("tools.check_memory", "--families=image_qa", "--global_batch=2", "--segments=1",
                   "--steps_per_segment=2").stdout
    rows = re.findall(r"\| (\w+) \| [\d.]+ \| [\d.]+ \| ([+-][\d.]+)% \|", printed)
    assert [name for name, _ in rows] == ["whole", "fsdp", "lora"]
    assert all(abs(float(percent)) < 1 for _, percent in rows), printed


def test_what_needs_no_cuda_runs_here_and_the_rest_is_said(tmp_path):
    out = tmp_path / "first.json"
    printed = call("tools.first_gpu", *TINY, "--tokens=2", "--batch_sizes=1", "--pairs=2", "--out", out)
    found = json.loads(out.read_text())
    parts = found["parts"]
    assert printed.returncode == 0 and found["device"] == "cpu" and found["cuda"] is None
    assert {name for name, part in parts.items() if part["result"] == "not run: no CUDA"} == {
        "tests", "ranks", "graphs"}
    assert parts["equality"]["float32"] == dict.fromkeys(("single", "latent", "cot", "auto"), 0)
    assert 0.99 < parts["equality"]["bfloat16"]["latent"] < 1
    training = parts["training"]
    assert training["predicted"] == pytest.approx(training["measured"]["float32"], rel=0.05)
    assert training["flop"] > 6 * 1.2e6 * training["columns"]  # of the weights of the decoder alone
    assert {row["method"] for row in parts["latency"]["rows"]} > {"single", "latent, K = 8", "cot, 2 tokens"}
    for name in parts:
        assert f"| {name} | {parts[name]['result']} |" in printed.stdout and f"s  {name}: " in printed.stdout


def wrong(*given):
    raise RuntimeError("out of | memory\nat line 3")


def off(*given):
    return dict(float32=1.0, result="differs by 1.0", error="more than 1e-4")


def interrupted(*given):
    raise KeyboardInterrupt


def test_a_part_that_fails_is_recorded_and_an_interruption_keeps_what_there_is(tmp_path, monkeypatch):
    out = tmp_path / "first.json"
    monkeypatch.setattr(first_gpu, "random_or_loaded", lambda *given: make_model())
    for name, part in dict(equality=off, training=wrong, latency=off).items():
        monkeypatch.setattr(first_gpu, name, part)
    printed = call("tools.first_gpu", *TINY, "--out", out)
    parts = json.loads(out.read_text())["parts"]
    assert printed.returncode == 1 and list(parts) == [
        "tests", "ranks", "equality", "graphs", "training", "latency"]
    assert parts["training"]["error"] == "RuntimeError: out of | memory\nat line 3"
    assert "| training | FAILED: RuntimeError: out of / memory  |" in printed.stdout
    assert "| equality | FAILED: more than 1e-4 differs by 1.0 |" in printed.stdout
    monkeypatch.setattr(first_gpu, "training", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("tools.first_gpu", *TINY, "--out", out)
    assert list(json.loads(out.read_text())["parts"]) == ["tests", "ranks", "equality", "graphs"]
    assert [file.name for file in tmp_path.iterdir()] == ["first.json"]


def test_the_part_about_graphs_sees_another_embedding(monkeypatch):
    where = sys.modules[speed_methods.Graphs.__module__]  # whose `record` a stand-in plays
    monkeypatch.setattr(where, "record", run_again)
    found = graphs_equal(make_model().float())
    assert found["recorded"] == 1 and found["difference"] < 1e-5 and "error" not in found

    def stale(function, device):
        return print, [output.zero_() for output in function()]

    monkeypatch.setattr(where, "record", stale)
    assert "another embedding" in graphs_equal(make_model().float())["error"]


def test_latency_is_measured_with_weights_side_by_side(monkeypatch):
    m = make_model()
    monkeypatch.setattr(first_gpu_parts, "peak_rates", lambda *given: (1.0, 1.0))
    first_gpu_parts.latency(m, torch.float32, [], 2)
    assert all(None not in joined_weights(layer) for layer in m.lm.layers)


def test_a_checkpoint_that_is_none_is_told_before_anything_runs(tmp_path):
    out = tmp_path / "first.json"
    done = call("tools.first_gpu", "--device=cpu", "--ckpt", tmp_path, "--out", out, check=False)
    assert "no config.json" in done.stderr and not out.exists()


@pytest.mark.parametrize("flags, why", [
    (["--shape=tinny"], "Did you mean 'tiny'"), (["--ckpt=x", "--shape=tiny"], "without --ckpt"),
    (["--out=nowhere/x.json"], "name a file"), (["--pairs=1"], "need at least 2"),
    (["--batch_sizes=1,x"], "as 1,32")])
def test_flags_that_cannot_work_are_refused(flags, why):
    assert why in call("tools.first_gpu", *flags, check=False).stderr
