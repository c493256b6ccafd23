"""Where it runs: device, dtype, ranks; and what goes between the ranks' processes."""

import inspect
import datetime
import os
import sys
import threading
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.threads import describe_threads
from files.errors import DataError, quote, reason

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device=None, dtype=None, say=print):
    """The best device there is (cuda > mps > cpu), bfloat16 where it is fast.

    Said with the reason, unless both are given.
    """
    given, dtype = (device is not None, dtype is not None), DTYPES.get(dtype, dtype)
    if dtype not in (None, *DTYPES.values()):
        raise DataError(f"dtype {quote(dtype)}: needs 'float32' or 'bfloat16'")
    why_device, why_dtype = "as asked", "as asked"
    if device is None:
        device, why_device = "cpu", "the best available"
        if torch.backends.mps.is_available():
            device = "mps"
        if torch.cuda.is_available():
            device = "cuda"
    try:
        device = torch.device(device)
    except RuntimeError as e:
        raise DataError(f"device {device!r}: needs cuda, mps or cpu") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"device {str(device)!r}: torch finds no CUDA device here; leave it out, or take cpu")
    if dtype is None:
        dtype, why_dtype = torch.float32, "bfloat16 is not known to be fast there"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            dtype, why_dtype = torch.bfloat16, "supported there"
    if not all(given):
        threads = ""
        if device.type == "cpu":
            threads = f", {describe_threads(torch.get_num_threads())}"
        say(f"device {device} ({why_device}), {str(dtype).removeprefix('torch.')} ({why_dtype}){threads}")
    return device, dtype


def rank_and_world():
    """-> rank of this process, number of ranks, rank on this machine"""
    return tuple(int(os.environ.get(k, n)) for k, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def say(*words):
    """Prints on rank 0."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


@contextmanager
def peer_errors():
    """A rank whose peer has ended stops, too, with one line: the peer has said why.

    torch.distributed has its own errors for NCCL; what Gloo raises can be told by its words alone.
    """
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "/gloo/" not in str(e):
            raise
        raise SystemExit(f"rank {rank_and_world()[0]} stops: another rank has ended: {reason(e)}") from e


def watch_peers(seconds=3):
    """Ends this process soon after another rank's end, whatever it is doing -> to be called when all is done.

    Each rank waits in a thread for a word of the next one; where that comes to an end without it, the wait
    fails.  seconds: time for this rank to end in its own way, by the same Ctrl-C.
    """
    rank, world, _ = rank_and_world()
    if world == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))

    def watch():
        try:
            dist.recv(torch.zeros(1), (rank + 1) % world, group)
        except RuntimeError:
            time.sleep(seconds)
            print(f"\nrank {rank} stops: another rank has ended", file=sys.stderr, flush=True)
            os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def done():
        dist.send(torch.zeros(1), (rank - 1) % world, group)
        thread.join()

    return done


def all_gather_objects(x):
    """A list of every rank's x."""
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, x)
    return out


def all_reduce_sums(scalars, device):
    """Scalars -> floats summed over ranks: the one place in a step where the host waits for the device."""
    values = torch.stack([torch.as_tensor(x).detach().to(device, torch.float32) for x in scalars.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
    return dict(zip(scalars, values.tolist()))


def global_mean(x):
    """x (n,), another n on every rank -> its part of the mean: the mean of the parts is that of all."""
    count = all_gather(x.new_full((), len(x)))  # no copy to the device, which would be waited for
    return x.sum() * len(count) / count.sum().clamp(min=1)


def ddp(model):
    """The model, its gradients averaged over ranks; buffers and what is frozen are the same and stay so."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen  # rounded weights could not be sent
    names = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"  # torch warns of the old one where the new one is
    sent = {new if new in names else old: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **sent)


def all_gather(x):
    """(ranks, *x.shape), differentiable; without a process group there is one rank."""
    return Gather.apply(x) if dist.is_initialized() else x[None]


class Gather(torch.autograd.Function):
    """x (B, ...) of every rank -> (ranks, B, ...); backward sums what all ranks ask of this rank's x."""

    @staticmethod
    def forward(ctx, x):
        out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(out, x.contiguous())
        return torch.stack(out)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]
