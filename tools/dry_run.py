"""What a training run would take: memory and time of the heaviest of 256 pairs, in every stage.

    python -m tools.dry_run --data pairs.jsonl --preset qwen2vl_2b --micro_batch 8  train.py's flags
    python -m tools.dry_run --preset qwen2vl_2b --device meta               shapes alone, anywhere
"""

import os
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import train
from engine import train_flags
from engine import log
from engine import ranks
from data import Batches, to_device
from engine.flags import command, parse_flags
from engine.ranks import pick_device
from files.errors import DataError

GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: `now` those still alive, `peak` the most at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(s) for s in storages((args, kwargs))}  # a view of these is no new memory
        out = function(*args, **(kwargs or {}))
        for s in storages(out):
            if id(s) not in given | self.known:
                self.known.add(id(s))
                self.now += s.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(s, self.free, id(s), s.nbytes())
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class CudaBytes:
    """The same as CUDA's allocator counts them."""

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error):
        pass

    @property
    def now(self):
        return torch.cuda.memory_allocated() - self.before

    @property
    def peak(self):
        return torch.cuda.max_memory_allocated() - self.before


class FusedAttention(torch.autograd.Function):
    """What a GPU's attention kernel keeps, and no arithmetic: on the device meta."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def fused_attention(q, k, v, **keywords):
    return FusedAttention.apply(q, k, v)


def heaviest(cfg, pairs, batches, stage):
    """The numbers of the pairs of a micro-batch: those with most tokens of 256 drawn at random."""
    size = cfg.micro_batch or cfg.global_batch
    drawn = np.random.default_rng(cfg.seed).permutation(len(pairs))[: max(256, size)]
    tokens = []
    for i in tqdm(drawn, desc="pairs drawn", unit="pair"):
        (part,) = batches[0, stage, [i]]["micro"]
        tokens.append(part["lengths"].sum().item())
    heavy = drawn[np.argsort(tokens, kind="stable")[::-1][:size]]
    print(f"one micro-batch of {len(heavy)} pairs, the heaviest of {len(drawn)} drawn: for each stage what "
          "stays for the backward pass, and the most")
    return heavy


def dry_run(cfg, model, pairs, curriculum, autocast, dtype):
    """What a rank needs: bytes of weights, gradients, moments, and what a micro-batch adds in every stage."""
    meta, cuda = model.device.type == "meta", model.device.type == "cuda"
    batches = Batches(pairs, model.processor, curriculum, cfg.skip_bad)
    every = ranks.size(model.parameters())
    trained = ranks.size([p for p in model.parameters() if p.requires_grad])
    print(f"weights {4 * every / GIB:,.3f} GiB, gradients {4 * trained / GIB:,.3f} GiB, AdamW's moments "
          f"{8 * trained / GIB:,.3f} GiB, all float32")
    heavy = heaviest(cfg, pairs, batches, curriculum.stages[0])
    if meta:
        model.to(dtype)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    print("stage  latent steps  tokens of a side  patches  kept, GiB  peak, GiB", "" if meta else "seconds")
    attention = nullcontext()
    if meta:
        attention = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)
    most = 0
    for stage in curriculum.stages:
        (part,) = batches[0, stage, heavy]["micro"]
        tokens = part["lengths"].max().item()
        patches = 0 if part["pixels"] is None else len(part["pixels"])
        part, begun = to_device(part, model.device), time.perf_counter()
        with attention, CudaBytes() if cuda else LiveBytes() as live:
            with autocast:
                out = model(part, stage.latent_steps)
            kept = live.now
            sum(x.sum() for x in tree_leaves(out)).backward()
            del out
        most = max(most, live.peak)
        took = "" if meta else f"{time.perf_counter() - begun:7.2f}"
        print(f"{stage.index:5d}  {stage.latent_steps:12d}  {tokens:16d}  {patches:7d}  {kept / GIB:9.3f}  "
              f"{live.peak / GIB:9.3f}", took)

    half = dtype == torch.bfloat16
    state = 4 * every + 12 * trained
    if meta and half:
        print("hidden states counted in bfloat16, as with --fsdp; without it float32, about twice as much")
    else:
        print(f"together {(state + most) / GIB:,.2f} GiB a rank")
    gathered = (2 if half else 4) * (every + trained)
    print("together with --fsdp on 8 ranks, which gather weights and gradients in a step: "
          f"{(state / 8 + gathered + most) / GIB:,.2f} GiB a rank")
    return 0


def main(argv):
    cfg, given = parse_flags(train.Config, argv, __doc__)
    cfg = train.with_preset(cfg, given)
    if "WORLD_SIZE" in os.environ:
        raise DataError("a dry run needs no torchrun: it runs one rank's micro-batch, of --micro_batch pairs")
    if cfg.resume:
        raise DataError("--resume: a dry run starts nothing; give the run's other flags")
    curriculum = train_flags.check_flags(replace(cfg, device="", fsdp=False), 1)
    torch.manual_seed(cfg.seed)
    device, dtype = pick_device(cfg.device or None, cfg.dtype or None)
    pairs = train.read_pairs(cfg)
    schedule, _ = train.plan(cfg, pairs)
    model = train.build_model(cfg, given, pairs, device)
    log.announce(cfg, pairs, schedule, model, curriculum)
    mixed = dtype != torch.float32 and not cfg.fsdp and device.type != "meta"
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    return dry_run(cfg, model, pairs, curriculum, autocast, dtype)


if __name__ == "__main__":
    command(main)
