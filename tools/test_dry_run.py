"""The command python -m tools.dry_run."""

import re

import numpy as np
import pytest
import torch

from tools import dry_run
from tools.dry_run import LiveBytes


def test_dry_run_tells_what_a_run_would_take_and_writes_nothing(world, tmp_path, capsys):
    flags = ["--data", world / "train.jsonl", "--out", tmp_path / "none", "--micro_batch=3", "--segments=2", "--latent_positions=mrope"]
    def dry(*more):
        dry_run.main([str(f) for f in (*flags, *more)])
        printed = capsys.readouterr().out
        cells = lambda line: [float(x.replace(",", "")) for x in line.split()]
        return printed, np.array([cells(line) for line in printed.splitlines() if re.match(r"^ +\d+ +\d+ +\d+ +\d+ +[\d,.]+ +[\d.]+", line)])

    printed, plain = dry("--device=cpu")
    _, recomputed = dry("--device=cpu", "--checkpointing")
    _, shapes = dry("--device=meta")
    assert plain[:, :2].tolist() == [[0, 0], [1, 1], [2, 2], [2, 2]] and not (tmp_path / "none").exists()
    assert (recomputed[:, 4] < 0.6 * plain[:, 4]).all() and (plain[:, 4] <= plain[:, 5]).all()
    assert shapes[:, :4].tolist() == plain[:, :4].tolist() and np.allclose(shapes[:, 4], plain[:, 4], rtol=0.05, atol=1.1e-3), (shapes, plain)  # GiB to three digits
    count = int(re.search(r"([\d,]+) parameters", printed)[1].replace(",", ""))
    assert float(re.search(r"weights ([\d.]+) GiB, gradients \1 GiB", printed)[1]) == pytest.approx(4 * count / 2**30, abs=6e-4)
    # the bytes counted are those of the tensors alive: by hand, w is known before and does not count
    w = torch.nn.Parameter(torch.randn(8, 8))
    with LiveBytes() as live:
        h = (torch.ones(4, 8) @ w).relu()
        assert (live.now, live.peak) == (2 * 128, 3 * 128)  # the ones, which w's gradient needs, and h; with the product in between
        h.view(-1).sum().backward()
        del h
    assert live.now == 256 and w.grad.numel() * 4 == 256  # what is left is the gradient
