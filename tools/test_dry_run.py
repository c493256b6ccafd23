"""The command python -m tools.dry_run."""

import re

import numpy as np
import pytest
import torch

from tests.processes import call
from tools.counts import LiveBytes

ROW = re.compile(r" +\d+ +\d+ +\d+ +\d+ +[\d,.]+ +[\d.]+")  # of the table


def table(printed):
    """stage, latent steps, tokens, patches, kept, peak (and seconds) of each row as numbers."""
    lines = [line.replace(",", "").split() for line in printed.splitlines() if ROW.match(line)]
    return np.array(lines, float)


def test_dry_run_tells_what_a_run_would_take_and_writes_nothing(world, tmp_path):
    flags = ["--data", world / "train.jsonl", "--out", tmp_path / "none", "--micro_batch=3", "--segments=2",
             "--latent_positions=mrope"]
    cpu, *others = [call("tools.dry_run", *flags, *more).stdout for more in (
        ["--device=cpu"], ["--device=cpu", "--checkpointing"], ["--device=meta"])]
    assert "24 pairs in 2 data sets: t2i 12 (" in cpu and "entered by step" in cpu  # as a run begins
    plain, recomputed, shapes = map(table, (cpu, *others))
    assert plain[:, :2].tolist() == [[0, 0], [1, 1], [2, 2], [2, 2]] and not (tmp_path / "none").exists()
    assert (recomputed[:, 4] < 0.6 * plain[:, 4]).all() and (plain[:, 4] <= plain[:, 5]).all()
    assert shapes[:, :4].tolist() == plain[:, :4].tolist()
    # GiB are printed to three digits
    assert np.allclose(shapes[:, 4], plain[:, 4], rtol=0.05, atol=1.1e-3), (shapes, plain)
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
