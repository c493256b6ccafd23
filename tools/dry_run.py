"""What a training run would take: memory and time of the heaviest of 256 pairs, in every stage.

    python -m tools.dry_run --data pairs.jsonl --preset qwen2vl_2b --micro_batch 8       train.py's flags
    python -m tools.dry_run --preset qwen2vl_2b --device meta                            shapes alone, on any machine
"""

import os
import sys
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
from data import Batches, DataError, Pairs, parse_flags, said, to_device
from model import pick_device
from tasks.turtle import World


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: `now` those still alive, `peak` the most at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        storages = lambda tree: [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        given = {id(s) for s in storages((args, kwargs))}  # a view of these is no new memory
        out = f(*args, **(kwargs or {}))
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


def dry_run(cfg, model, pairs, curriculum, autocast, dtype):
    """What a rank needs: bytes of weights, gradients and moments, and in every stage bytes that one micro-batch adds, made of
    the heaviest of 256 pairs drawn at random.  On cuda as its allocator counts, else all tensors that are alive."""
    device, unit = model.device, 2**30
    meta, cuda = device.type == "meta", device.type == "cuda"
    size, batches = cfg.micro_batch or cfg.global_batch, Batches(pairs, model.processor, curriculum, cfg.skip_bad)
    tokens = lambda i: batches[0, curriculum.stages[0], [i]]["micro"][0]["lengths"].sum().item()
    drawn = np.random.default_rng(cfg.seed).permutation(len(pairs))[: max(256, size)]
    weight = [tokens(i) for i in tqdm(drawn, desc="pairs drawn", unit="pair")]
    heavy = drawn[np.argsort(weight, kind="stable")[::-1][:size]]
    every, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_) for all_ in (True, False))
    print(f"{every:,} parameters, {trained:,} trained")
    print(f"weights {4 * every / unit:,.3f} GiB, gradients {4 * trained / unit:,.3f} GiB, AdamW's moments {8 * trained / unit:,.3f} GiB, all float32")
    if meta:
        model.to(dtype)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    print(f"one micro-batch of {len(heavy)} pairs, the heaviest of {len(drawn)} drawn: for each stage what stays for the backward pass, and the most")
    print("stage  latent steps  tokens of a side  patches  kept, GiB  peak, GiB" + "  seconds" * (not meta))
    most = 0
    for stage in curriculum.stages:
        part, begun = to_device(batches[0, stage, heavy]["micro"][0], device), time.perf_counter()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        attention = mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **kw: FusedAttention.apply(q, k, v))
        with attention if meta else nullcontext(), nullcontext() if cuda else LiveBytes() as live:
            with autocast:
                out = model(part, stage.latent_steps)
            kept = torch.cuda.memory_allocated() - before if cuda else live.now
            (out["gen"].sum() + out["ce"].sum() + out["read"].sum() + out["router"].sum()).backward()
            del out
        peak = torch.cuda.max_memory_allocated() - before if cuda else live.peak
        most = max(most, peak)
        print(f"{stage.index:5d}  {stage.latent_steps:12d}  {part['lengths'].max() if not meta else part['ids'].shape[1]:16d}  "
              f"{0 if part['pixels'] is None else len(part['pixels']):7d}  {kept / unit:9.3f}  {peak / unit:9.3f}"
              + f"  {time.perf_counter() - begun:7.2f}" * (not meta))
    half = dtype == torch.bfloat16
    state, gathered = 4 * every + 12 * trained, (2 if half else 4) * (every + trained)
    if meta and half:
        print("hidden states counted in bfloat16, as with --fsdp; without it they are float32, about twice as many bytes")
    else:
        print(f"together {(state + most) / unit:,.2f} GiB a rank")
    print(f"together with --fsdp on 8 ranks, which gather weights and gradients in a step: {(state / 8 + gathered + most) / unit:,.2f} GiB a rank")
    return 0


def main(argv):
    cfg, given = parse_flags(train.Config, argv, __doc__)
    cfg = train.with_preset(cfg, given)
    if "WORLD_SIZE" in os.environ:
        raise DataError("a dry run needs no torchrun: it runs one rank's micro-batch; --micro_batch says how many pairs")
    if cfg.resume:
        raise DataError("--resume: a dry run starts nothing; give the run's other flags")
    curriculum = train.check(replace(cfg, device="", fsdp=False, out=os.curdir), 1)
    torch.manual_seed(cfg.seed)
    device, dtype = pick_device(cfg.device or None, cfg.dtype or None)
    pairs = Pairs(cfg.data, cfg.media or None, cfg.skip_bad) if cfg.data else World("train", cfg.families)
    for line in pairs.bad:
        print("left out:", line)
    model = train.build_model(cfg, given, pairs, device)
    mixed = dtype != torch.float32 and not cfg.fsdp and device.type != "meta"
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    return dry_run(cfg, model, pairs, curriculum, autocast, dtype)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (DataError, OSError) as e:
        sys.exit(f"error: {said(e)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
