"""What computations take: tools.speed, tools.dry_run, tools.counts."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.shapes import SHAPES
from data import collate
from hub.weights import align_weights
from test_plume import assert_close, mixed_items, rendered
from tests.processes import call
from tools.counts import LiveBytes
from tools import counts, speed, speed_methods


METHODS = {
    "single", "single, transformers", "latent, K = 0", "latent, K = 4", "latent, K = 6", "latent, K = 8",
    "one by one, K = 8", "cot, 5 tokens", "cot, transformers"}
ONE_TABLE = ("--batch_sizes=2", "--tokens=5")


def measured(tmp_path, *flags):
    """-> what the command prints, and its rows"""
    flags = ["--device=cpu", "--repeats=1", "--json", tmp_path / "s.json", *flags]
    return call("tools.speed", *flags).stdout, json.loads((tmp_path / "s.json").read_text())["rows"]


def test_the_benchmark_times_the_same_embeddings(model, world):
    items = [item for item in mixed_items(world)  # as benchmarked queries are: no picture beside a clip
             if isinstance(item, str) or not {"image", "video"} <= item.keys()]
    samples = rendered(model, items)
    ours, _ = model.embed(collate(samples, model.processor), "latent", 8)
    with torch.no_grad():
        theirs = speed_methods.one_by_one(model, [collate([s], model.processor) for s in samples], 8)
    assert_close(ours, theirs, "one by one through transformers", 1e-5)
    batch = collate(rendered(model, [item for item in items if "video" not in item]), model.processor)
    ours, _ = model.embed(batch, "single")
    assert_close(ours, speed_methods.transformers_forward(model, batch), "one pass of transformers", 1e-5)


def test_work_is_counted(tmp_path):
    printed, rows = measured(tmp_path, *ONE_TABLE, "--prefix=40")
    assert "2 queries a batch, prefix of 40 tokens, 0 patches" in printed
    rows = {r["method"]: r for r in rows}
    assert rows.keys() == METHODS | {"a latent step", "training"}
    # the tiny shape by hand: two operations for each weight and column, for each pair of columns and width
    D, I, layers, G = 128, 384, 3, 64
    column = layers * 2 * (2 * D * D + 2 * D * G + 3 * D * I)
    pairs = layers * 4 * D
    unread = 38 * 2 * (D * D + 3 * D * I)  # behind the attention of the last layer
    assert rows["single"]["gflop"] * 1e9 == pytest.approx(40 * column + 40 * 40 * pairs - unread, rel=1e-3)
    # four steps more, each with the adapter
    extra = (rows["latent, K = 8"]["gflop"] - rows["latent, K = 4"]["gflop"]) * 1e9
    adapter = 2 * 5 * 4 * D * D + 2 * 2 * D * 4
    assert extra == pytest.approx(4 * (column + 50 * pairs + adapter), rel=0.05)
    assert rows["one by one, K = 8"]["gbytes"] > 1.9 * rows["latent, K = 8"]["gbytes"]
    assert rows["training"]["ours"] > 0
    for row in map(rows.get, METHODS):
        assert 0 < row["low"] <= row["ms"] <= row["high"] and row["floor"] > 1 and row["peak_mib"] > 0, row


@pytest.mark.parametrize("flags, what", [
    (["--prefix=30-60"], "prefix of 49 to 56 tokens"),  # drawn with seed 0
    (["--image=56x84"], " 24 patches"),
    (["--image=56x56", "--frames=2"], " 16 patches")])
def test_queries_of_mixed_lengths_pictures_and_clips(tmp_path, flags, what):
    printed, _ = measured(tmp_path, *ONE_TABLE, *flags, "--training=false")
    assert "one pass takes " in printed and what in printed


def test_growth_is_measured_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(speed, "GROWTH", dict(prefix=(64, 128), K=(0, 2), batch=(1, 2)))
    _, rows = measured(tmp_path, "--growth", tmp_path / "g.png")
    assert [(r["grows"], r["prefix"], r["K"], r["batch"]) for r in rows] == [
        ("prefix", 64, 8, 4), ("prefix", 128, 8, 4), ("K", 256, 0, 4), ("K", 256, 2, 4),
        ("batch", 256, 8, 1), ("batch", 256, 8, 2)]
    assert Image.open(tmp_path / "g.png").size == (1260, 420)


def test_every_preset_has_a_prompt():
    for preset in SHAPES:
        assert speed.load_model(speed.Config(preset=preset, device="meta"), 1).device.type == "meta"


def test_a_latent_step_starts_no_more_kernels_than_it_did(model):
    """A CPU, whose products of 16 rows stand on their side, makes one copy more in each layer."""
    layers, model = len(model.lm.layers), align_weights(copy.deepcopy(model))
    for texts, more in ((["a"], 0), (["a red turtle", "b"] * 8, 1)):
        batch = collate(rendered(model, texts), model.processor)
        assert counts.kernels_of_a_step(model, batch) == 15 + (15 + more) * layers, texts


ROW = re.compile(r" +\d+ +\d+ +\d+ +[\d.]+% +\d+ +[\d,.]+ +[\d.]+")  # of the table


def table(printed):
    """stage, latent steps, columns, padding, patches, kept, peak (and seconds) of each row as numbers."""
    lines = [re.sub("[,%]", "", line).split() for line in printed.splitlines() if ROW.match(line)]
    return np.array(lines, float)


def test_dry_run_tells_what_a_run_would_take_and_writes_nothing(world, tmp_path):
    flags = ["--data", world / "train.jsonl", "--out", tmp_path / "none", "--micro_tokens=400",
             "--segments=2", "--latent_positions=mrope"]
    cpu, *others = [call("tools.dry_run", *flags, *more).stdout for more in (
        ["--device=cpu"], ["--device=cpu", "--checkpointing"], ["--device=meta"])]
    assert "24 pairs in 2 data sets: t2i 12 (" in cpu and "entered by step" in cpu  # as a run begins
    plain, recomputed, shapes = map(table, (cpu, *others))
    assert plain[:, :2].tolist() == [[0, 0], [1, 1], [2, 2], [2, 2]] and not (tmp_path / "none").exists()
    assert (recomputed[:, 5] < 0.6 * plain[:, 5]).all() and (plain[:, 5] <= plain[:, 6]).all()
    assert shapes[:, :5].tolist() == plain[:, :5].tolist()
    # GiB are printed to three digits
    assert np.allclose(shapes[:, 5], plain[:, 5], rtol=0.05, atol=1.1e-3), (shapes, plain)
    count = int(re.search(r"([\d,]+) parameters", cpu)[1].replace(",", ""))
    size = float(re.search(r"weights ([\d.]+) GiB, gradients \1 GiB", cpu)[1])
    assert size == pytest.approx(4 * count / 2**30, abs=6e-4)


def test_the_bytes_counted_are_those_of_the_tensors_that_are_alive():
    w = torch.nn.Parameter(torch.randn(8, 8))  # is there before and does not count
    with LiveBytes() as live:
        h = (torch.ones(4, 8) @ w).relu()
        assert live.now == 2 * 128  # the ones, which w's gradient needs, and h
        assert live.peak == 3 * 128  # with the product in between
        h.view(-1).sum().backward()
        del h
    assert live.now == 256 == w.grad.numel() * 4  # what is left is the gradient
