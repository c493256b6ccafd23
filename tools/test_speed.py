"""The command python -m tools.speed."""

import json

import pytest
import torch
from PIL import Image

from tools import speed
from data import collate
from test_plume import assert_close, mixed_items, rendered, call


def test_the_speed_benchmark_times_the_same_embeddings_and_counts_their_work(model, world, tmp_path, monkeypatch):
    samples = rendered(model, [item for item in mixed_items(world) if isinstance(item, str) or not {"image", "video"} <= item.keys()])  # benchmarked queries are of one kind
    ours, _ = model.embed(collate(samples, model.processor), "latent", 8)
    with torch.no_grad():
        theirs = torch.cat([speed.one_by_one(model, collate([s], model.processor), 8) for s in samples])
    assert_close(ours, theirs, "one by one through transformers", 1e-5)
    flags = ["tools.speed", "--device=cpu", "--batch_sizes=2", "--tokens=5", "--repeats=2", "--json", tmp_path / "s.json"]
    printed = call(*flags, "--prefix=40").stdout
    rows = {r["method"]: r for r in json.loads((tmp_path / "s.json").read_text())["rows"]}
    assert "2 equal queries a batch, prefix of 40 tokens, 0 patches" in printed and rows.keys() == {
        "single", "latent, K = 0", "latent, K = 4", "latent, K = 6", "latent, K = 8", "one by one, K = 8", "cot, 5 tokens", "cot, transformers", "training"}
    D, I, layers, G = 128, 384, 3, 64  # the tiny shape; by hand: two operations for each weight and column, and for each pair of columns and width
    column = layers * 2 * (2 * D * D + 2 * D * G + 3 * D * I)
    pairs = layers * 4 * D
    assert rows["single"]["gflop"] * 1e9 == pytest.approx(40 * column + 40 * 40 * pairs, rel=1e-3)
    extra = (rows["latent, K = 8"]["gflop"] - rows["latent, K = 4"]["gflop"]) * 1e9
    assert extra == pytest.approx(4 * (column + 50 * pairs + 2 * 5 * 4 * D * D + 2 * 2 * D * 4), rel=0.05)  # four steps more, each with the adapter
    for r in rows.values():
        assert r["method"] == "training" or (0 < r["low"] <= r["ms"] <= r["high"] and r["floor"] > 1 and r["peak_mib"] > 0)
    assert rows["one by one, K = 8"]["gbytes"] > 1.9 * rows["latent, K = 8"]["gbytes"] and rows["training"]["ours"] > 0
    for what, patches in ((["--image=56x84"], 24), (["--image=56x56", "--frames=2"], 16)):
        assert f" {patches} patches" in call(*flags, *what, "--training=false").stdout
    monkeypatch.setattr(speed, "GROWTH", dict(prefix=(64, 128), K=(0, 2), batch=(1, 2)))
    call(*[f for f in flags if not str(f).startswith(("--batch", "--tokens"))], f"--growth={tmp_path / 'g.png'}")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [(r["grows"], r["prefix"], r["K"], r["batch"]) for r in rows] == [
        ("prefix", 64, 8, 4), ("prefix", 128, 8, 4), ("K", 256, 0, 4), ("K", 256, 2, 4), ("batch", 256, 8, 1), ("batch", 256, 8, 2)]
    assert Image.open(tmp_path / "g.png").size == (1260, 420)
    for flag, why in (("--preset=midd", "one of tiny"), ("--prefix=3", "prompt alone has"), ("--prefix=a", "needs numbers"), ("--image=448", "as 448x448"), ("--batch_sizes=0", "needs numbers"), ("--mode=single", "unknown argument")):
        assert why in call(*flags, flag, check=False).stderr, flag
