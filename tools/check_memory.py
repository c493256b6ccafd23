"""The bytes of a training step that tools.dry_run counts, beside those of torch's own trackers.

    python -m tools.check_memory --preset qwen3vl_2b --init= --micro_tokens 8192      train.py's flags

Shapes alone, on the device "meta": the heaviest micro-batch in the last stage with everything that a rank
holds, as MemTracker and FSDPMemTracker of torch.distributed._tools see it in a step.

    whole    all on one rank, hidden states in float32
    fsdp     --fsdp on 8 ranks, in bfloat16: torch's shards, its collectives without the other ranks
    lora     --lora 16, in float32
"""

import engine.threads  # before torch

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

import train
from data import Batches, to_device
from engine import train_flags
from engine.flags import command, parse_flags
from files.errors import DataError
from tools.dry_run import (
    as_on_a_gpu, bytes_of_a_rank, GIB, heaviest, micro_batch_bytes, size_of, weight_bytes)

META, RANKS = torch.device("meta"), 8


class Config(train.Config):
    """train.py's flags."""


@contextmanager
def shards_without_values():
    """Ranks that are not there, and FSDP on tensors that have no values, which it refuses."""
    fsdp = "torch.distributed.fsdp._fully_shard._fully_shard"
    with (mock.patch.object(torch, "meta", torch.cpu, create=True),  # its streams do nothing
          mock.patch(f"{fsdp}._get_device_from_mesh", return_value=META),
          mock.patch.object(FSDPParamGroup, "_validate_no_meta_params")):
        dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def tracked_bytes(model, groups, steps, sharded):
    """The most bytes that torch sees in a step which is neither a run's first one nor has one micro-batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)  # in training it is fused, which "meta" has not:
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # so this, which makes the moments, is not counted
    if sharded:
        tracker = FSDPMemTracker(model, optimizer)
    else:
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        tracker._mod_tracker.register_user_hooks = mock.Mock()  # slow, and not for frozen weights
    with as_on_a_gpu(META), tracker:
        out = model(groups, steps)
        sum(x.sum() for x in tree_leaves(out)).backward()
        del out
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
    return tracker.get_tracker_snapshot("peak")[META]["Total"]


def check(cfg, given, pairs, groups, steps):
    """-> the bytes of a rank by tools.dry_run, and by torch"""
    dtype = torch.bfloat16 if cfg.fsdp else torch.float32
    model = train.build_model(cfg, given, pairs, META)
    weights = weight_bytes(cfg, model)
    model.to(dtype)
    _, forward, peak = micro_batch_bytes(model, groups, steps)
    whole, sharded = bytes_of_a_rank(weights, model, dtype, forward, peak, RANKS)
    model = train.build_model(cfg, given, pairs, META)
    if not cfg.fsdp:
        return whole, tracked_bytes(model, groups, steps, False)
    with shards_without_values():
        train.shard(model, torch.device("cpu"), dtype, RANKS)
        return sharded, tracked_bytes(model, groups, steps, True)


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    cfg = train.with_preset(cfg, given)
    if wrong := given & {"fsdp", "device", "dtype", "lora_bits", "resume"}:
        raise DataError(f"--{' --'.join(sorted(wrong))}: not here, where each way has its own; leave it out")
    whole = replace(cfg, lora=0)
    ways = dict(whole=whole, fsdp=replace(whole, fsdp=True), lora=replace(cfg, lora=cfg.lora or 16))
    for way in ways.values():  # weights of --init are not needed, but --lora asks for some
        flags = replace(way, device="", fsdp=False, init=cfg.init or "none")
        curriculum = train_flags.check_flags(flags, 1)
    pairs, stage = train.read_pairs(cfg), curriculum.stages[-1]
    model = train.build_model(whole, given, pairs, META)
    batches = Batches(pairs, model.processor, curriculum, cfg.skip_bad, cfg.micro_tokens)
    heavy = heaviest(cfg, pairs, batches, curriculum.stages[0])
    groups = batches[0, stage, heavy]["micro"][0]
    columns, _ = size_of(groups, stage)
    groups = [to_device(group, META) for group in groups]
    print(f"{columns} columns, {stage.latent_steps} latent steps\n\n"
          "| GiB a rank | tools.dry_run | torch | difference |\n| --- | --- | --- | --- |", flush=True)
    for name, way in ways.items():
        ours, theirs = check(way, given, pairs, groups, stage.latent_steps)
        print(f"| {name} | {ours / GIB:.2f} | {theirs / GIB:.2f} | {ours / theirs - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    command(main)
