"""train.backward of one global batch, in micro-batches of every size; started and compared by test_plume.py.

    python tests/gradients.py RANKS RECORDS OUT       saves for every size the gradients and losses of rank 0
"""

import contextlib
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train
from test_plume import batch_of_eight, make_model

ranks, records, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
model, rank = make_model(), 0
net = model
if ranks > 1:
    dist.init_process_group("gloo")
    rank, net = dist.get_rank(), DistributedDataParallel(model)

kept = {}
for size in range(8 // ranks + 1):  # 0: not cut
    batch = batch_of_eight(records, model.processor, rank, ranks, size)
    parts = train.backward(net, batch, train.Config(w_cross=0.3), contextlib.nullcontext())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    losses = {name: torch.as_tensor(parts[name]).detach() for name in ("bal", "gen")}
    kept[str(size)] = grads | losses
    model.zero_grad()
if rank == 0:
    torch.save(kept, out)
