"""What a training run would take: memory and time of the heaviest of 256 pairs, in every stage.

    python -m tools.dry_run --data pairs.jsonl --preset qwen2vl_2b --micro_tokens 32768  train.py's flags
    python -m tools.dry_run --preset qwen2vl_2b --device meta                    shapes alone, anywhere
"""

import engine.threads  # before torch

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import train
from data import Batches, to_device
from engine.flags import command, parse_flags
from engine.ranks import pick_device
from files.errors import DataError
from hub.weights import count_parameters
from tools.counts import bytes_counter
from engine import log, train_flags

GIB = 2**30


class Config(train.Config):
    """train.py's flags."""


def fused_attention(q, k, v, **more):
    """A kernel that keeps what a GPU's keeps; of itself torch takes one on "meta" that keeps all weights."""
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out


def heaviest(cfg, pairs, batches, stage):
    """The numbers of those of 256 pairs drawn at random that have most tokens: they fill a micro-batch."""
    drawn = np.random.default_rng(cfg.seed).permutation(len(pairs))[: max(256, cfg.global_batch)]
    columns = []
    for i in tqdm(drawn, desc="pairs drawn", unit="pair"):
        columns.append(batches[0, stage, [i]]["real"])
    order = np.argsort(columns, kind="stable")[::-1][: cfg.global_batch]
    if cfg.micro_tokens:
        order = order[: 1 + np.searchsorted(np.cumsum(np.sort(columns)[::-1]), cfg.micro_tokens)]
    print(f"the first micro-batch of the {len(order)} pairs that have most tokens of {len(drawn)} drawn: for "
          "each stage what stays for the backward pass, and the most")
    return drawn[order]


def size_of(groups, stage):
    """-> the columns of a micro-batch, and the share of them that is padding."""
    columns = real = 0
    for group in groups:
        rows, P = group["ids"].shape
        columns += rows * (P + stage.latent_steps + group["suffix"].shape[1])
        real += int((group["lengths"] + stage.latent_steps + group["gen"] + 1).sum())
    return columns, 1 - real / columns


def weight_bytes(cfg, model):
    """Of all weights: 4 each, but for frozen projections that --lora_bits rounds."""
    rounded = []
    for name, layer in model.lm.layers.named_modules():
        if cfg.lora_bits and isinstance(layer, torch.nn.Linear) and "lora_" not in name:
            rounded.append(layer)
    skip = {id(layer.weight) for layer in rounded}
    others = sum(p.numel() for p in model.parameters() if id(p) not in skip)
    elements = sum(layer.in_features * layer.out_features for layer in rounded)
    return 4 * others + cfg.lora_bits / 8 * elements


def as_on_a_gpu(device):
    """A context in which "meta" attends with `fused_attention`."""
    if device.type != "meta":
        return nullcontext()
    return mock.patch.object(F, "scaled_dot_product_attention", fused_attention)


def micro_batch_bytes(model, groups, steps, autocast=nullcontext()):
    """Forward and backward of a micro-batch behind another one -> bytes: kept for backward, and the most that
    there is at one time in the forward pass and in both, beside weights and gradients.
    """
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with as_on_a_gpu(model.device), bytes_counter(model.device) as live:
        with autocast:
            out = model(groups, steps)
        kept, forward = live.now, live.peak
        sum(x.sum() for x in tree_leaves(out)).backward()
        del out
    return kept, forward, live.peak


def bytes_of_a_rank(weights, model, dtype, forward, peak, ranks=8):
    """-> what a rank needs with weights of so many bytes: whole, and with --fsdp on so many ranks.

    The model is one unit of FSDP.  Forward: gathered weights, and the buffer in which they have come.
    Backward: gathered weights; the gradients, which wait for the last use of their weight, are in `peak`.  At
    the end: the gradients, and a copy in float32 that is summed over ranks.
    """
    trained, size = count_parameters(model, trained=True), dtype.itemsize
    every_cut, trained_cut = 0, 0
    for p in model.parameters():  # cut along the first dimension: 5 experts are filled up to 8
        cut = -(-len(p) // ranks) * ranks * p.numel() // len(p)
        every_cut += cut
        trained_cut += cut if p.requires_grad else 0
    shards = (4 * every_cut + 12 * trained_cut) / ranks
    most = max(2 * size * every_cut + forward, size * every_cut + peak, size * trained + 4 * trained_cut)
    return weights + 12 * trained + peak, shards + most


def dry_run(cfg, model, pairs, curriculum, autocast, dtype):
    """What a rank needs: bytes of weights, gradients, moments, and what a micro-batch adds in every stage."""
    meta = model.device.type == "meta"
    batches = Batches(pairs, model.processor, curriculum, cfg.skip_bad, cfg.micro_tokens)
    trained, weights = count_parameters(model, trained=True), weight_bytes(cfg, model)
    print(f"weights {weights / GIB:,.3f} GiB, gradients {4 * trained / GIB:,.3f} GiB, AdamW's moments "
          f"{8 * trained / GIB:,.3f} GiB, float32 but for --lora_bits")
    heavy = heaviest(cfg, pairs, batches, curriculum.stages[0])
    if meta:
        model.to(dtype)
    print("stage  latent steps  columns  padding  patches  kept, GiB  peak, GiB", "" if meta else "seconds")
    needed = []
    for stage in curriculum.stages:
        groups = batches[0, stage, heavy]["micro"][0]
        columns, padding = size_of(groups, stage)
        patches = sum(0 if group["pixels"] is None else len(group["pixels"]) for group in groups)
        groups, begun = [to_device(group, model.device) for group in groups], time.perf_counter()
        kept, forward, peak = micro_batch_bytes(model, groups, stage.latent_steps, autocast)
        needed.append(bytes_of_a_rank(weights, model, dtype, forward, peak))
        seconds = "" if meta else f"{time.perf_counter() - begun:7.2f}"
        print(f"{stage.index:5d}  {stage.latent_steps:12d}  {columns:7d}  {padding:7.1%}  {patches:7d}  "
              f"{kept / GIB:9.3f}  {peak / GIB:9.3f}", seconds)

    whole, sharded = (max(stage) / GIB for stage in zip(*needed))
    if meta and dtype == torch.bfloat16:
        print("hidden states counted in bfloat16, as with --fsdp; without it float32, about twice as much")
    else:
        print(f"together {whole:,.2f} GiB a rank")
    if not cfg.lora:
        print("together with --fsdp on 8 ranks, each of which gathers all weights in a step: "
              f"{sharded:,.2f} GiB a rank")


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    cfg = train.with_preset(cfg, given)
    if "WORLD_SIZE" in os.environ:
        raise DataError("a dry run needs no torchrun: it runs one rank's micro-batch")
    if cfg.resume:
        raise DataError("--resume: a dry run starts nothing; give the run's other flags")
    # weights of --init are not needed here: those of --preset have the same shapes
    flags = replace(cfg, device="", fsdp=False, init=cfg.init or cfg.preset)
    curriculum = train_flags.check_flags(flags, 1)
    torch.manual_seed(cfg.seed)
    device, dtype = pick_device(cfg.device or None, cfg.dtype or None)
    pairs = train.read_pairs(cfg)
    schedule, _ = train.make_schedule(cfg, pairs)
    model = train.build_model(cfg, given, pairs, device)
    log.announce(cfg, pairs, schedule, model, curriculum)
    mixed = dtype != torch.float32 and not cfg.fsdp and device.type != "meta"
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    dry_run(cfg, model, pairs, curriculum, autocast, dtype)


if __name__ == "__main__":
    command(main)
