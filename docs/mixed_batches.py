r"""Every mode on 256 queries of mixed lengths, CPU milliseconds a query by turns.  In PLUME's folder:

    python train.py --adaptive --moves 2-12 --replay 0.4 --steps 500 --families image_ret --workers 0 \
      --out out/short                                       ended with Ctrl-C after 179 steps
    PYTHONPATH=$PWD python docs/mixed_batches.py out/short/checkpoint 2     fewest moves: 2, or 9
"""

import engine.threads  # before torch

import statistics
import sys
import time

import numpy as np
import torch

from engine import stream
from model import Plume
from tasks.turtle import World

torch.set_num_threads(1)
model, world = Plume.from_pretrained(sys.argv[1], "cpu"), World("test", "image_ret", moves="2-12")
long_enough = np.flatnonzero(world.lengths >= int(sys.argv[2]))
queries = [world.query(i) for i in np.random.default_rng(0).permutation(long_enough)[:256]]
WAYS = [  # mode, steps, batches of rows that wait until they are written together
    ("single", None, 2), ("cot", None, 2), ("latent", 8, 2), ("latent", 12, 2),
    ("auto", None, 0), ("auto", None, 2)]
times = {way: [] for way in WAYS}
for _ in range(9):
    for mode, steps, stream.WAITING in WAYS:
        begun = time.thread_time()
        model.encode(queries, mode, steps, batch_size=32, limit=64)
        times[mode, steps, stream.WAITING].append(time.thread_time() - begun)
for way, seconds in times.items():
    print(*way, f"{1e3 * statistics.median(seconds) / len(queries):.2f}")
