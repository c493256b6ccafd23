"""The command python -m tools.speed."""

import copy
import json

import pytest
import torch
from PIL import Image

from data import collate, to_device
from test_plume import assert_close, mixed_items, rendered
from tests.processes import call
from tools import speed

METHODS = {
    "single",
    "single, transformers",
    "latent, K = 0",
    "latent, K = 4",
    "latent, K = 6",
    "latent, K = 8",
    "one by one, K = 8",
    "cot, 5 tokens",
    "cot, transformers",
    "a latent step",
    "training",
}
GROWN = [  # what grows, prefix, K, batch
    ("prefix", 64, 8, 4),
    ("prefix", 128, 8, 4),
    ("K", 256, 0, 4),
    ("K", 256, 2, 4),
    ("batch", 256, 8, 1),
    ("batch", 256, 8, 2),
]


def of_one_kind(item):
    """As benchmarked queries are: no picture beside a clip."""
    return isinstance(item, str) or not {"image", "video"} <= item.keys()


def rows_in(path):
    return json.loads(path.read_text())["rows"]


def test_the_speed_benchmark_times_the_same_embeddings_and_counts_their_work(
        model, world, tmp_path, monkeypatch):
    items = list(filter(of_one_kind, mixed_items(world)))
    samples = rendered(model, items)
    ours, _ = model.embed(collate(samples, model.processor), "latent", 8)
    with torch.no_grad():
        theirs = [speed.one_by_one(model, collate([s], model.processor), 8) for s in samples]
    assert_close(ours, torch.cat(theirs), "one by one through transformers", 1e-5)
    without_clips = [item for item in items if "video" not in item]
    batch = collate(rendered(model, without_clips), model.processor)
    ours, _ = model.embed(batch, "single")
    assert_close(ours, speed.transformers_forward(model, batch), "one pass of transformers", 1e-5)

    base = ["tools.speed", "--device=cpu", "--repeats=2", "--json", tmp_path / "s.json"]
    one_table = [*base, "--batch_sizes=2", "--tokens=5"]
    printed = call(*one_table, "--prefix=40").stdout
    assert "2 queries a batch, prefix of 40 tokens, 0 patches" in printed
    rows = {r["method"]: r for r in rows_in(tmp_path / "s.json")}
    assert rows.keys() == METHODS
    # the tiny shape by hand: two operations for each weight and column, for each pair of columns and width
    D, I, layers, G = 128, 384, 3, 64
    column = layers * 2 * (2 * D * D + 2 * D * G + 3 * D * I)
    pairs = layers * 4 * D
    single = rows["single"]["gflop"] * 1e9
    assert single == pytest.approx(40 * column + 40 * 40 * pairs, rel=1e-3)
    # four steps more, each with the adapter
    extra = (rows["latent, K = 8"]["gflop"] - rows["latent, K = 4"]["gflop"]) * 1e9
    adapter = 2 * 5 * 4 * D * D + 2 * 2 * D * 4
    assert extra == pytest.approx(4 * (column + 50 * pairs + adapter), rel=0.05)
    assert rows["one by one, K = 8"]["gbytes"] > 1.9 * rows["latent, K = 8"]["gbytes"]
    assert rows["training"]["ours"] > 0
    for method in METHODS - {"training", "a latent step"}:
        row = rows[method]
        assert 0 < row["low"] <= row["ms"] <= row["high"], method
        assert row["floor"] > 1 and row["peak_mib"] > 0, method

    printed = call(*one_table, "--prefix=30-60", "--training=false").stdout
    assert "one pass takes " in printed and "prefix of 49 to 56 tokens" in printed  # drawn with seed 0
    printed = call(*one_table, "--image=56x84", "--training=false").stdout
    assert " 24 patches" in printed
    printed = call(*one_table, "--image=56x56", "--frames=2", "--training=false").stdout
    assert " 16 patches" in printed

    monkeypatch.setattr(speed, "GROWTH", dict(prefix=(64, 128), K=(0, 2), batch=(1, 2)))
    call(*base, f"--growth={tmp_path / 'g.png'}")
    rows = rows_in(tmp_path / "s.json")
    assert [(r["grows"], r["prefix"], r["K"], r["batch"]) for r in rows] == GROWN
    assert Image.open(tmp_path / "g.png").size == (1260, 420)

    for flag, why in (
        ("--preset=midd", "one of tiny"),
        ("--prefix=3", "prompt alone has"),
        ("--prefix=a", "needs numbers"),
        ("--prefix=9-", "needs numbers"),
        ("--prefix=60-40", "the smaller number goes first"),
        ("--image=448", "as 448x448"),
        ("--batch_sizes=0", "needs numbers"),
        ("--mode=single", "unknown argument"),
    ):
        assert why in call(*one_table, flag, check=False).stderr, flag


def test_a_latent_step_starts_no_more_kernels_than_it_did(model):
    """On "meta" nothing is computed; an RMSNorm counts six there, and on CUDA one."""
    layers = len(model.lm.layers)
    for texts in (["a"], ["a red turtle", "b"] * 8):
        batch = to_device(collate(rendered(model, texts), model.processor), "meta")
        kernels = speed.kernels_of_a_step(copy.deepcopy(model).to("meta"), batch)
        assert kernels <= 24 + 46 * layers, texts
