"""train.backward of one global batch, in micro-batches of several sizes; started by test_plume.py.

    python tests/gradients.py WAY RECORDS OUT    saves of rank 0 the gradients and losses by --micro_tokens

WAY: one (process), copies or shards (on two ranks).
"""

import contextlib
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import train
from engine.ranks import all_gather, rank_and_world
from test_plume import eight_pairs, make_model

way, records, out = sys.argv[1:]
rank, ranks, _ = rank_and_world()
model = net = make_model()
if ranks > 1:
    dist.init_process_group("gloo")
if way == "copies":
    net = DistributedDataParallel(model)
elif way == "shards":
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))

kept = {}
for size in (0, 160, 1):  # 0: all at once; 1: row by row
    batches, job = eight_pairs(records, model.processor, rank, ranks, size)
    batch = batches[job]
    config = train.Config(micro_tokens=size, w_cross=0.3)
    parts = train.backward(net, batch, config, contextlib.nullcontext())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if way == "shards":
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    losses = {name: torch.as_tensor(parts[name]).detach() for name in ("bal", "gen")}
    counts = all_gather(torch.tensor(len(batch["micro"])))
    kept[str(size)] = grads | losses | {"micro-batches": counts}
    model.zero_grad()
if rank == 0:
    torch.save(kept, out)
