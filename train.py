"""Train PLUME through its curriculum, from explicit rationales to latent steps.

    python train.py                                                turtle world, tiny preset, a laptop
    python train.py --data pairs.jsonl                             your pairs, tiny preset, from scratch
    torchrun --nproc_per_node=8 train.py --data pairs.jsonl --preset qwen2vl_2b --micro_batch 8

Writes OUT/checkpoint (for Plume.from_pretrained, eval.py --ckpt and --resume) and OUT/log.jsonl, one object a step.
Ctrl-C finishes the step, writes a checkpoint and stops.
"""

import importlib
import importlib.util
import json
import math
import os
import pickle
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data workers are the parallelism

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from adapter import MAX_STEPS, TransitionAdapter, balance_loss
from curriculum import Curriculum, Progress
from data import (
    Batches, DataError, Pairs, Schedule, StepSampler, nearest, parse_flags, quote, reason, said, to_device,
    write_errors, writing)
from model import Plume, checkpoint_files, pick_device, pointer, remove_checkpoint, replacing
from tasks.turtle import World

# -------------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    # data
    data: str = ""  # JSONL (or JSON array) of training pairs; default: turtle world
    families: str = ""  # families of turtle world, with commas between; default: all
    media: str = ""  # folder that media paths are relative to; default: the folder of --data
    skip_bad: bool = False  # leave out records that cannot be read, count and list them; default: stop at the first
    workers: int = 1  # processes that decode and tokenize ahead (with a gate up to 15); raise while the log's `wait` is not near 0
    # model
    init: str = ""  # checkpoint folder or hub name to start from; empty: random weights, tiny, or with --preset in its shape
    prompt: str = ""  # text behind <disc_emb>; default: the checkpoint's own
    min_pixels: int = 0  # a picture is scaled up to this area; 0: the checkpoint's own
    max_pixels: int = 0  # and down to this one: the number of tokens of a picture; 0: the checkpoint's own
    video_max_pixels: int = 0  # the same for each frame of a clip; 0: the checkpoint's own
    num_frames: int = 0  # frames sampled from a clip; 0: the checkpoint's own
    max_len: int = 0  # tokens in a sequence; a longer rationale loses its end; 0: the checkpoint's own
    latent_positions: str = "mrope"  # positions of latent steps: mrope goes on counting, cache as released; with --init as there
    freeze_vision: str = "auto"  # true, false, or auto: frozen (but for its merger) when --init is given
    # adapter: the paper's ablations; with --init of a PLUME checkpoint, its own unless given here
    adapter: str = "moe"  # moe (the paper), mlp (the shared expert alone), none (hidden states fed back as they are)
    experts: int = 4  # E, specialised experts
    top_k: int = 2  # experts that count for a row
    shared_expert: bool = True  # an expert that always counts
    anchor: bool = True  # the router sees the anchor
    step_embedding: bool = True  # the router sees the number of the step
    # curriculum
    segments: int = 8  # S, parts a rationale is cut into; 1 stage each
    steps_per_segment: int = 1  # c, latent steps a part turns into; K = S * c
    rest_of_rationale: str = "inside"  # where the text that is left goes: inside the thought, or after it as released
    last_stage: float = 0.3  # share of the run in the last stage (paper: 0.5); its second half drops the answer too
    gate: float = 0.3  # enter a stage when the mean of `first` is under this, at the latest by the schedule; 0: by it alone, as the paper
    replay: float = 0.15  # share of the steps that go back: half of them to stage 0, half to a random earlier one
    reset_moments: bool = False  # forget AdamW's moments when the stage changes
    # optimization
    global_batch: int = 32  # pairs in one contrastive batch, over all ranks; part of the recipe
    micro_batch: int = 0  # pairs that a rank runs through the model at a time: memory, not recipe; 0: its whole share of the global batch
    epochs: float = 2.0  # passes over the data; ignored when --steps is given
    steps: int = 0  # optimizer steps; 0: from --epochs
    lr: float = 2e-3  # peak learning rate for the tiny preset in turtle world; 1e-3 on real pictures, 1e-5 for a pretrained backbone
    warmup: float = 0.03  # share of the run with a rising learning rate
    decay: float = 0.6  # share of the run, at its end, with a falling one: a cosine down to a tenth; 1: all of it, as the paper
    vision_lr: float = 0.5  # learning rate of the vision tower, as a share of lr
    weight_decay: float = 0.1  # of matrices; vectors and the step table have none
    clip: float = 1.0  # largest gradient norm
    scale: float = 10.0  # 1 / temperature of the contrastive losses
    w_ce: float = 1.0  # weight of the cross-entropy on the text of both sides
    w_gen: float = 1.0  # weight of InfoNCE on <gen_emb>
    w_disc: float = 0.1  # weight of InfoNCE on <disc_emb>
    w_read: float = 1.0  # weight of the cross-entropy that reads from each latent state the token it replaced (not in the paper: 0)
    w_balance: float = 0.1  # weight of the router's balance loss
    # run
    preset: str = ""  # qwen2vl_2b: the paper's settings; other flags win over it
    eval_every: int = 0  # steps between hit@1 on 256 pairs (a tenth at most) that are held out of training; 0: never, none held out
    out: str = "out"  # folder for checkpoint and log
    resume: bool = False  # continue the run in --out
    save_every: int = 500  # steps between checkpoints; there is also one at the end of each stage, at the end, on Ctrl-C
    keep: int = 0  # earlier checkpoints that stay, as OUT/checkpoint-STEP
    log_every: int = 10  # steps between printed lines; log.jsonl has every step
    wandb: str = ""  # project of Weights & Biases that gets the rows of log.jsonl too; a resumed run is a new one in the group --out
    seed: int = 0  # of weights and of the order of the data
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # compute type, float32 or bfloat16 (weights stay float32); default: bfloat16 where it is fast
    fsdp: bool = False  # shard weights, gradients and AdamW's moments over the ranks (FSDP2); with bfloat16 hidden states are bfloat16 too
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about a third slower


# The paper's settings; batch size and number of epochs, which we did not find there, are our choice.
PRESETS = {"qwen2vl_2b": dict(init="Qwen/Qwen2-VL-2B-Instruct", freeze_vision="true", max_pixels=2359296, video_max_pixels=32 * 28 * 28,
                              segments=4, steps_per_segment=2, last_stage=0.5, gate=0.0, replay=0.0, global_batch=1024, epochs=1.0, lr=1e-5, decay=1.0, vision_lr=1.0, scale=50.0,
                              w_disc=1.0, w_read=0.0, dtype="bfloat16", checkpointing=True)}

# Names in --out: the checkpoint, what --keep keeps of earlier ones, and what a run that is killed between two renames leaves
CHECKPOINT = re.compile(r"checkpoint(-\d+(\.[0-9a-f]{8})?|\.[0-9a-f]{8}\.old)?")
ROW = re.compile(rb'\{"step": (\d+), "reached": ')  # of log.jsonl
LEFT_OVER = re.compile(r"checkpoint\.[0-9a-f]{8}\.(old|writing)|log\.jsonl\.[0-9a-f]{8}\.writing")

STATE = {"step", "ranks", "optimizer", "progress", "config", "kept"}  # of train_state.pt

MOVED = dict(ablations="python -m tools.ablations --json FILE", seeds="python -m tools.ablations --seeds N",
             dry_run="python -m tools.dry_run")  # with the other flags as here

# do not change the result, but for rounding
FREE_ON_RESUME = ("resume", "out", "media", "workers", "save_every", "keep", "log_every", "wandb", "device", "checkpointing", "micro_batch",
                  "fsdp")


# ---------------------------------------------------------------------------------------------------------- losses


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


def gather(x):
    """(ranks, *x.shape), differentiable; without a process group there is one rank."""
    return Gather.apply(x) if dist.is_initialized() else x[None]


def global_mean(x):
    """x (n,), another n on every rank -> its part of the mean over all ranks: the mean of the parts is the mean of all."""
    count = gather(torch.tensor(float(len(x)), device=x.device))
    return x.sum() * len(count) / count.sum().clamp(min=1)


def info_nce(query, target, same, valid, scale):
    """Symmetric InfoNCE of this rank's B pairs against the pairs of all ranks.

    query, target (B, D) unit rows; same (ranks, B) hashes of the targets: two rows with an equal target are not
    negatives of each other; valid (ranks, B): rows that count.  The mean over ranks is the loss of the global batch.
    """
    rank, (W, B) = dist.get_rank() if dist.is_initialized() else 0, same.shape
    label = torch.arange(B, device=query.device) + rank * B
    hidden = (same[rank][:, None] == same.flatten()) | ~valid.flatten()  # (B, W*B)
    hidden[torch.arange(B, device=query.device), label] = False
    both = 0
    for a, b in ((query, target), (target, query)):
        logits = scale * a @ gather(b).flatten(0, 1).T
        both = both + F.cross_entropy(logits.masked_fill(hidden, float("-inf")), label, reduction="none")
    return (both / 2 * valid[rank]).sum() * W / valid.sum().clamp(min=1)


def losses(out, batch, cfg):
    """The paper's objective -> dict of scalar tensors; `loss` is the weighted sum.  Each is normalised over all ranks."""
    same, valid = gather(batch["target"]), gather(batch["valid"])
    real = batch["valid"].repeat(2)[:, None, None]  # queries, then targets
    router = gather((out["router"] * real).sum(0)).sum(0) / (2 * valid.sum()).clamp(min=1)  # (K, E) over all rows
    parts = dict(ce=global_mean(out["ce"]), gen=info_nce(*out["gen"].chunk(2), same, valid, cfg.scale),
                 disc=info_nce(*out["disc"].chunk(2), same, valid, cfg.scale), read=global_mean(out["read"]), bal=balance_loss(router) * valid.any())
    parts["loss"] = cfg.w_ce * parts["ce"] + cfg.w_gen * parts["gen"] + cfg.w_disc * parts["disc"] + cfg.w_read * parts["read"] + cfg.w_balance * parts["bal"]
    return parts | dict(first=global_mean(out["first"].detach()))


def backward(model, batch, cfg, autocast):
    """Gradients of the global batch's loss from micro-batches that fit in memory -> `losses` (GradCache, arXiv 2101.06983).

    Each micro-batch runs without a graph; the loss is taken on the outputs of all of them and of all ranks; then each runs
    again with a graph, in the same random state, and back-propagates the loss's gradient with respect to its outputs.
    """
    micro, device = batch["micro"], next(model.parameters()).device
    several = len(micro) > 1

    def run(part):
        with autocast:
            return model(to_device(part, device), batch["stage"].latent_steps)

    with torch.random.fork_rng([device] * (device.type == "cuda"), enabled=several), torch.set_grad_enabled(not several):
        outs = [run(part) for part in micro]
    leaves = [{k: v.detach().requires_grad_() for k, v in out.items()} for out in outs]
    rows = lambda k: torch.cat([leaf[k].chunk(2)[side] for side in (0, 1) for leaf in leaves])  # all queries, then all targets
    joined = {k: rows(k) if k in ("gen", "disc", "router") else torch.cat([leaf[k] for leaf in leaves]) for k in leaves[0]}
    parts = losses(joined, to_device({k: batch[k] for k in ("target", "valid")}, device), cfg)
    parts["loss"].backward()
    for i, (part, leaf) in enumerate(zip(micro, leaves)):
        # with copies (DDP) ranks average their gradients once a step, with shards each micro-batch's at once: less memory
        with model.no_sync() if isinstance(model, DistributedDataParallel) and i + 1 < len(micro) else nullcontext():
            out = run(part) if several else outs[i]
            used = [k for k in out if leaf[k].grad is not None and out[k].requires_grad]
            torch.autograd.backward([out[k] for k in used], [leaf[k].grad for k in used])
    return parts


# ------------------------------------------------------------------------------------------------------------ training


def build_model(cfg, given, pairs, device):
    """Plume in float32 on the device: --resume's, --init's, or random weights with a tokenizer of the pairs' texts.

    What the checkpoint of --init says about itself stays, unless a flag for it was given.
    """
    flags = asdict(cfg)
    settings = {k: flags[k] for k in ("prompt", "latent_positions") if k in given}
    settings["limits"] = {k: flags[k] for k in ("min_pixels", "max_pixels", "video_max_pixels", "num_frames", "max_len") if flags[k]}
    settings["adapter"] = {k: flags[k] for k in ("experts", "top_k", "shared_expert", "anchor", "step_embedding") if k in given}
    settings["adapter"] |= {"kind": cfg.adapter} if "adapter" in given else {}
    settings["latent_steps"] = cfg.segments * cfg.steps_per_segment
    if cfg.resume:
        model = Plume.from_pretrained(checkpoint_in(cfg.out), device, torch.float32)
    elif cfg.init:
        model = Plume.from_pretrained(cfg.init, device, torch.float32, **settings)
    else:
        where = "meta" if device.type == "meta" else "cpu"
        model = Plume.random(pairs.texts(), cfg.preset or "tiny", cfg.seed, where, **settings).to(device)
    if cfg.freeze_vision == "true" or (cfg.freeze_vision == "auto" and cfg.init):
        model.backbone.model.visual.requires_grad_(False).merger.requires_grad_(True)
    model.checkpointing = cfg.checkpointing
    return model


def checkpoints_in(out):
    """The run's checkpoints, the newest first.  Usually that is `checkpoint`; if the run died between two renames it is the
    one that stood there before, under the name it had just got."""
    if not os.path.isdir(out):
        return []
    age = {}  # the last one written is the youngest, and `checkpoint` goes before all others
    for name in os.listdir(out):
        state = os.path.join(out, name, "train_state.pt")
        if CHECKPOINT.fullmatch(name) and os.path.exists(state):
            age[os.path.join(out, name)] = (name != "checkpoint", -os.stat(state).st_mtime)
    return sorted(age, key=age.get)


def checkpoint_in(out):
    if not (found := checkpoints_in(out)):
        raise DataError(f"--resume: no checkpoint of a run in {out!r}")
    return found[0]


def save(cfg, model, weights, state, saved, kept):
    """Writes OUT/checkpoint -> the names of the earlier ones that --keep has kept.

    saved: the step of the one that stands there now.  Only what this run has kept is ever removed.
    """
    path, keep, gone = os.path.join(cfg.out, "checkpoint"), None, []
    if cfg.keep and os.path.exists(path):
        keep = f"{path}-{saved}"
        if os.path.exists(keep):  # somebody's copy
            keep += f".{secrets.token_hex(4)}"
        kept = [*kept, os.path.basename(keep)]
        kept, gone = kept[-cfg.keep :], kept[: -cfg.keep]
    try:
        with replacing(path, keep) as folder:
            model.write(folder, state=weights)
            file = os.path.join(folder, "train_state.pt")
            with write_errors(file):
                torch.save(dict(state, kept=kept), file)
    except OSError as e:
        there = f"the checkpoint of step {saved} is still there" if os.path.exists(path) else "there is none yet"
        raise OSError(f"{path}: the checkpoint of step {state['step']} could not be written, {there}: {e}") from e
    for name in gone:
        folder = os.path.join(cfg.out, name)
        if os.path.isdir(folder):  # some tokenizers have a chat template of their own
            remove_checkpoint(folder, checkpoint_files(folder) | {"chat_template.jinja"} & set(os.listdir(folder)))
    return kept


def read_state(folder):
    """train_state.pt of a checkpoint folder, its tensors mapped from the file."""
    file = os.path.join(folder, "train_state.pt")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as e:
        raise DataError(f"{file}: not the whole state of a training run: {reason(e)}{pointer(file)}") from e
    lacking = STATE - state.keys() if isinstance(state, dict) else STATE
    if lacking:
        raise DataError(f"{file}: not the state of a training run: it has no {', '.join(sorted(lacking))}")
    return state


def readable(pairs, rows, processor, skip_bad, say):
    """Those of the held-out rows whose media can be read; the first bad one is an error without --skip_bad."""
    good = []
    for i in rows:
        try:
            for side in pairs[i]:
                processor.render(side)
            good.append(i)
        except DataError as e:
            if not skip_bad:
                raise
            say("left out:", e)
    return np.array(good, int)


def held_out_hit(model, pairs, rows, autocast):
    """hit@1 of the rows' queries against their targets, with all latent steps: what the run is watched by."""
    sides = [pairs[i] for i in rows]
    _, first, gold = np.unique([target.key() for _, target in sides], return_index=True, return_inverse=True)
    with autocast:
        queries, targets = model.encode([query for query, _ in sides]), model.encode([sides[i][1] for i in first])
    return float(((queries @ targets.T).argmax(1) == gold).mean())


def full(x):
    """A tensor, or the whole of a sharded one (all ranks have to ask)."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gathered(tensors, keep):
    """{name: tensor} with sharded ones made whole, on the CPU; {} on ranks that only lend their shards."""
    out = {}
    for name, tensor in tensors.items():
        tensor = full(tensor)
        out |= {name: tensor.cpu()} if keep else {}
    return out


def optimizer_state(optimizer, keep):
    """The optimizer's state dict with whole tensors: the same for one rank, for copies and for shards."""
    state = optimizer.state_dict()
    return dict(state, state={i: gathered(moments, keep) for i, moments in state["state"].items()})


def load_optimizer_state(optimizer, state):
    """Of whole tensors, perhaps in a mapped file; a rank keeps its shards of them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    def shard(v, p):
        whole = not isinstance(p, DTensor) or v.shape != p.shape
        return v.clone() if whole else distribute_tensor(v.to(p.device), p.device_mesh, p.placements)

    moments = {i: {k: shard(v, parameters[i]) for k, v in of_one.items()} for i, of_one in state["state"].items()}
    optimizer.load_state_dict(dict(state, state=moments))


def parameter_groups(model, weight_decay, vision_lr):
    """Matrices with weight decay; vectors, the step table and the experts' stacked biases without."""
    plain = lambda name, p: p.ndim < 2 or name.startswith(("adapter.b", "adapter.step_embed"))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for n, p in named if ("visual" in n) == vision and plain(n, p) == vector], weight_decay=0.0 if vector else weight_decay,
                   share=vision_lr if vision else 1.0) for vision in (False, True) for vector in (False, True)]
    return [g for g in groups if g["params"]]


def learning_rate(cfg, step, steps):
    """Linear warm-up, lr, and at the end of the run a cosine from lr to a tenth of it."""
    warm = max(1, round(cfg.warmup * steps))
    fall = max(warm, round((1 - cfg.decay) * steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * max(0, step - fall) / max(1, steps - fall))))


def check(cfg, world):
    """What can be known to be wrong before anything is loaded -> the curriculum."""
    parent = os.path.abspath(cfg.out)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    needs = [(os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK),
              f"--out {quote(cfg.out)}: nothing can be written in {quote(parent)}; choose another folder"),
             (cfg.seed >= 0, f"--seed {cfg.seed}: at least 0"),
             (cfg.global_batch >= 2 and cfg.global_batch % world == 0,
              f"--global_batch {cfg.global_batch} must be at least 2 and divisible by the {world} ranks"),
             (cfg.micro_batch >= 0, f"--micro_batch {cfg.micro_batch}: at least 1 pair, or 0 for a rank's whole share of the global batch"),
             (cfg.device != "meta", "--device meta has shapes and no numbers: it is for python -m tools.dry_run"),
             (world > 1 or not cfg.fsdp, "--fsdp needs several ranks: start with torchrun --nproc_per_node=N train.py, or leave it out"),
             (cfg.freeze_vision in ("auto", "true", "false"), f"--freeze_vision {cfg.freeze_vision!r}: needs auto, true or false"),
             (cfg.latent_positions in ("mrope", "cache"), f"--latent_positions {cfg.latent_positions!r}: needs mrope or cache"),
             (cfg.segments * cfg.steps_per_segment <= MAX_STEPS,
              f"--segments {cfg.segments} x --steps_per_segment {cfg.steps_per_segment}: at most {MAX_STEPS} latent steps"),
             (cfg.steps > 0 or cfg.steps == 0 < cfg.epochs < math.inf,
              f"--steps {cfg.steps}, --epochs {cfg.epochs}: one of them must be above 0 and finite"),
             (min(cfg.save_every, cfg.log_every) >= 1 and min(cfg.workers, cfg.eval_every, cfg.keep) >= 0,
              "--save_every and --log_every must be at least 1, --workers, --eval_every and --keep at least 0"),
             (not cfg.wandb or ((spec := importlib.util.find_spec("wandb")) and spec.origin),
              "--wandb needs its package: pip install wandb, or leave it out: log.jsonl has the same rows"),
             (not cfg.gate or cfg.workers < Progress.DELAY,
              f"--workers {cfg.workers} with --gate: at most {Progress.DELAY - 1}, more would write batches for steps whose stage is not known yet"),
             (min(cfg.lr, cfg.scale, cfg.clip) > 0, f"--lr {cfg.lr}, --scale {cfg.scale}, --clip {cfg.clip}: must be above 0 (--clip inf: no clipping)"),
             (0 <= cfg.warmup < 1 and 0 <= cfg.decay <= 1 and cfg.vision_lr >= 0,
              f"--warmup {cfg.warmup}, --decay {cfg.decay}, --vision_lr {cfg.vision_lr}: needs shares of the run, and a share of --lr"),
             (not (cfg.data and cfg.families), "--families belongs to turtle world: leave it out, or --data")]
    for fine, problem in needs:
        if not fine:
            raise DataError(problem)
    try:
        TransitionAdapter(2, cfg.adapter, cfg.experts, cfg.top_k)
        return Curriculum(cfg.segments, cfg.steps_per_segment, cfg.rest_of_rationale, cfg.last_stage, cfg.gate, cfg.replay)
    except ValueError as e:
        raise DataError(str(e)) from e


@contextmanager
def only_run(cfg, say):
    """Makes --out and takes it for this run alone.  The lock goes with the process, however that ends."""
    made, path = not os.path.isdir(cfg.out), os.path.join(cfg.out, ".plume.lock")
    try:
        os.makedirs(cfg.out, exist_ok=True)
        file = open(path, "a+")
    except OSError as e:
        raise DataError(
            f"--out {quote(cfg.out)}: nothing can be written there: {reason(e)}; choose another folder") from e
    with file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            file.seek(0)
            who = file.read().strip()[:200]
            raise DataError(f"--out {quote(cfg.out)}: another run is at work there ({who}); wait for it, or choose "
                            "another --out") from e
        except OSError as e:
            say(f"warning: {cfg.out} cannot be locked ({reason(e)}); see to it that no other run writes there")
        with write_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        try:
            untouched(cfg, say)
            yield
        finally:
            if made and os.listdir(cfg.out) == [".plume.lock"]:  # nothing was written
                with suppress(OSError):
                    os.remove(path)
                    os.rmdir(cfg.out)


def untouched(cfg, say):
    """Raises DataError for an --out with something in it that this run would write over; names what a killed one left."""
    names = sorted(os.listdir(cfg.out))
    if left := [name for name in names if LEFT_OVER.fullmatch(name)]:
        say(f"{cfg.out} holds what a killed run left behind, and you may delete it when nobody needs it:", *left)
    if cfg.resume:
        return
    if there := [name for name in names if CHECKPOINT.fullmatch(name)]:
        raise DataError(f"{cfg.out} holds {', '.join(there)}: continue with --resume, or choose another --out, or "
                        "delete it")
    if "log.jsonl" in names:
        with open(os.path.join(cfg.out, "log.jsonl"), "rb") as f:
            line = f.readline()
        if line and not ROW.match(line):
            raise DataError(f"{cfg.out}/log.jsonl: not the log of a training run, and it would be written over; choose "
                            "another --out")


def room(cfg, model, trained):
    """Raises DataError when a checkpoint would not fit on the disk of --out."""
    weights, moments = 4 * sum(p.numel() for p in model.parameters()), 8 * sum(p.numel() for p in trained)
    needed, free = weights + moments, shutil.disk_usage(cfg.out).free
    if needed > free:
        raise DataError(
            f"--out {quote(cfg.out)}: a checkpoint takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; a new one "
            "is complete before the one in its place is removed. Make room, or choose another --out")


def check_resume(then, now):
    """Raises DataError that lists what differs between the run's configuration and this one."""
    then = asdict(Config()) | then  # a field that is newer than the run had its default
    if changed := [f"{k}: {then.get(k)!r} then, {v!r} now" for k, v in now.items() if k not in FREE_ON_RESUME and then.get(k) != v]:
        raise DataError("--resume with another configuration: " + "; ".join(changed))


def with_preset(cfg, given):
    """The configuration with the values of --preset where no flag was given."""
    if not cfg.preset:
        return cfg
    if cfg.preset not in PRESETS:
        raise DataError(f"--preset {cfg.preset!r}: there is {', '.join(PRESETS)}.{nearest(cfg.preset, PRESETS)}")
    return replace(cfg, **{k: v for k, v in PRESETS[cfg.preset].items() if k not in given})


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__, MOVED)
    cfg = with_preset(cfg, given)
    # ranks
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    say = print if rank == 0 else lambda *a, **k: None
    device, dtype = pick_device(cfg.device or None, cfg.dtype or None, say)
    if device.type == "cuda":
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.all_gather_object(restarts := [None] * world, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        if max(restarts) and checkpoints_in(cfg.out):
            cfg.resume = True  # torchrun --max-restarts has started the ranks again
    curriculum = check(cfg, world)
    if cfg.resume:
        checkpoint_in(cfg.out)
    with only_run(cfg, say) if rank == 0 else nullcontext():
        return train(cfg, given, argv, curriculum, device, dtype, world, rank, say)


def train(cfg, given, argv, curriculum, device, dtype, world, rank, say):
    torch.manual_seed(cfg.seed)

    # data and curriculum
    pairs = Pairs(cfg.data, cfg.media or None, cfg.skip_bad, progress=rank == 0) if cfg.data else World("train", cfg.families)
    for line in pairs.bad:
        say("left out:", line)
    held = np.random.default_rng([cfg.seed, 2]).permutation(len(pairs))[: min(256, len(pairs) // 10) if cfg.eval_every else 0]
    steps = cfg.steps or max(1, round(cfg.epochs * (len(pairs) - len(held)) / cfg.global_batch))
    dataset = pairs.dataset.copy()
    dataset[held] = -1
    schedule = Schedule(dataset, pairs.names, cfg.global_batch, steps, cfg.seed)
    if world > 1:
        dist.all_gather_object(seen := [None] * world, (len(pairs), pairs.digest))
        if different := [f"rank {r}: {n} pairs, {h}" for r, (n, h) in enumerate(seen) if (n, h) != seen[0]]:
            raise DataError(f"--data {cfg.data!r} is not the same file everywhere: rank 0: {seen[0][0]} pairs, {seen[0][1]}; {'; '.join(different[:4])}")

    # model and optimizer
    model = build_model(cfg, given, pairs, device)
    if cfg.fsdp:
        policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32)
        fully_shard(model, mesh=init_device_mesh(device.type, (world,)), mp_policy=policy)
        register_fsdp_forward_method(model, "embed")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay, cfg.vision_lr), lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    config = dict(asdict(cfg), pairs=pairs.digest)
    start, kept, progress = 0, [], Progress(curriculum, steps, cfg.seed)
    if rank == 0:
        room(cfg, model, trained)
    if cfg.resume:
        state = read_state(checkpoint_in(cfg.out))
        check_resume(state["config"], config)
        load_optimizer_state(optimizer, state["optimizer"])
        if state["ranks"] != world:
            say(f"the run began on {state['ranks']} ranks and goes on with {world}: the same but for rounding")
        start, kept = state["step"], state["kept"]
        progress.load(state["progress"])
        del state  # closes the file
    parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 and not cfg.fsdp else model
    mixed = dtype != torch.float32 and not cfg.fsdp 
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    loader = torch.utils.data.DataLoader(Batches(pairs, model.processor, curriculum, cfg.skip_bad, cfg.micro_batch), batch_size=None,
                                         sampler=StepSampler(schedule, progress, start, rank, world), num_workers=cfg.workers,
                                         prefetch_factor=min(4, (Progress.DELAY - 1) // cfg.workers or 1) if cfg.workers else None,
                                         pin_memory=device.type == "cuda", worker_init_fn=ignore_interrupts)

    # what is about to happen
    say("\n".join(f"  {k} = {v!r}" for k, v in asdict(cfg).items()))
    sets = ", ".join(f"{n} {len(r)} ({c} steps)" for n, r, c in zip(pairs.names, schedule.rows, schedule.counts))
    say(f"{len(pairs)} pairs in {len(pairs.names)} data sets: {sets}")
    size = lambda parameters: f"{sum(p.numel() for p in parameters):,}"
    say(f"{size(model.parameters())} parameters, {size(trained)} trained, {size(model.adapter.parameters())} in the adapter")
    if idle := [n for n, c in zip(pairs.names, schedule.counts) if c == 0]:
        say(f"warning: with {steps} steps these data sets get none: {', '.join(idle)}; raise --steps")
    say(f"{steps} steps; global contrastive batch {cfg.global_batch} = {world} ranks x {cfg.global_batch // world}; "
        f"InfoNCE at chance {math.log(cfg.global_batch):.2f}")
    say(curriculum.table(steps))
    if cfg.eval_every:
        held = readable(pairs, held, model.processor, cfg.skip_bad, say)
        if not len(held):
            raise DataError(f"--eval_every {cfg.eval_every}: a tenth of {len(pairs)} pairs leaves none to hold out that can be read; leave it out")
        say(f"{len(held)} pairs are held out; hit@1 by chance {1 / len({pairs[i][1].key() for i in held}):.1%}")

    # the loop
    stop, log = stop_on_signal(), open_log(cfg, start) if rank == 0 else None
    mirror = importlib.import_module("wandb").init(project=cfg.wandb, group=cfg.out, config=config) if cfg.wandb and log else None
    cut, lost, pace, saved, clock = 0, 0, None, start, time.perf_counter()
    for batch in loader:
        step, stage = batch["step"], batch["stage"]
        wait = time.perf_counter() - clock
        changes = step > 0 and progress.place(step) != progress.place(step - 1)
        if changes and cfg.reset_moments:
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, steps) * group["share"]

        parts = backward(parallel, batch, cfg, autocast)
        norm = full(torch.nn.utils.clip_grad_norm_(trained, cfg.clip))
        counts = dict(firsts=sum(len(part["first"]) for part in batch["micro"]), media=sum(part["pixels"] is not None for part in batch["micro"]),
                      cut=batch["cut"], bad=len(batch["bad"]), stop=stop.asked > 0)
        metrics = reduce_mean(dict(parts, norm=norm, **{k: world * float(n) for k, n in counts.items()}), device)
        if not math.isfinite(metrics["loss"] + metrics["norm"]):
            raise DataError(f"step {step}, data set {quote(batch['dataset'])}: loss {metrics['loss']}, gradient norm {metrics['norm']}. Nothing was "
                            f"written since {f'step {saved}' if saved else 'the start'}; lower --lr, or look at this data set's records")
        if metrics.pop("firsts"):
            progress.observe(step, metrics["first"])
        for module, used in ((model.adapter, stage.latent_steps), (model.backbone.model.visual, metrics.pop("media"))):
            if not used:  # on no rank: its gradient is 0, and it shall not be moved by old moments either
                module.zero_grad(set_to_none=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        for line in batch["bad"]:
            print("left out:", line, flush=True)
        cut, lost = cut + int(metrics["cut"]), lost + int(metrics["bad"])
        took, clock = time.perf_counter() - clock, time.perf_counter()
        pace = took if pace is None else 0.95 * pace + 0.05 * took
        last = step + 1 == steps or metrics["stop"] > 0
        if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == steps):
            metrics["hit"] = held_out_hit(model, pairs, held, autocast)
            say(f"after step {step}: hit@1 {metrics['hit']:.1%} on {len(held)} held-out pairs")
            clock = time.perf_counter()
        if log:
            row = dict(step=step, reached=progress.stages[progress.place(step)].index, stage=stage.index, K=stage.latent_steps,
                       answer=stage.answer, dataset=batch["dataset"], lr=learning_rate(cfg, step, steps), **{k: v for k, v in metrics.items() if k != "stop"},
                       ms=took * 1e3, wait=wait / took, pairs_per_s=cfg.global_batch / took)
            with write_errors(log.name):
                log.write(json.dumps(row) + "\n")
                log.flush()
            if mirror:
                mirror.log(row, step=step)
            if step % cfg.log_every == 0 or last or changes:
                eta = pace * (steps - step - 1)
                print(f"step {step}/{steps} | stage {stage.index} | K {stage.latent_steps} | ce {metrics['ce']:.3f} | gen {metrics['gen']:.3f} | "
                      f"disc {metrics['disc']:.3f} | bal {metrics['bal']:.4f} | read {metrics['read']:.2f} | first {metrics['first']:.2f} | lr {row['lr']:.1e} | "
                      f"{row['ms']:.0f} ms | {row['pairs_per_s']:.0f} pairs/s | wait {row['wait']:.0%} | ETA {int(eta // 60)}:{int(eta % 60):02d} | "
                      f"{batch['dataset']}", flush=True)
        if last or (step + 1) % cfg.save_every == 0 or progress.place(step + 1) != progress.place(step):
            weights, moments = gathered(model.state_dict(), rank == 0), optimizer_state(optimizer, rank == 0)
            if rank == 0:
                state = dict(step=step + 1, ranks=world, optimizer=moments, progress=progress.state(), config=config)
                kept = save(cfg, model, weights, state, saved, kept)
            del weights, moments
            saved, clock = step + 1, time.perf_counter()
        if last:
            break
    if mirror:
        mirror.finish()
    if cut:
        say(f"{cut} rationale tokens were cut off by max_len {model.processor.limits.max_len}")
    if cfg.skip_bad:
        say(f"{len(pairs.bad)} records left out at the start, {lost} while training (named above)")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    done = start if start >= steps else step + 1
    again = shlex.join(["train.py", *(a for a in argv if a != "--resume"), "--resume"])
    say(f"{done} of {steps} steps done; checkpoint in {cfg.out}/checkpoint" + ("" if done == steps else f"; go on with: {again}"))
    return 0 if done == steps else 130


def reduce_mean(metrics, device):
    """Scalars of this rank -> floats averaged over ranks: the one place in a step where the host waits for the device."""
    values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device).detach() for v in metrics.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(metrics, values.tolist()))


def open_log(cfg, start):
    """log.jsonl, without rows of steps that a resumed run does again."""
    path, rows = os.path.join(cfg.out, "log.jsonl"), []
    if cfg.resume and os.path.exists(path):
        with open(path, "rb") as f:
            for line in f:
                row = ROW.match(line)
                again = row is not None and int(row[1]) >= start
                if line.endswith(b"\n") and not again:
                    rows.append(line)
    with writing(path, "wb") as f:
        f.writelines(rows)
    return open(path, "a")


class stop_on_signal:
    """Ctrl-C (or SIGTERM) asks for a stop after the running step; another one, 3 seconds later or more, stops at once.

    torchrun passes on what the terminal has already sent to everybody: two signals, one wish.
    """

    def __init__(self):
        self.asked = 0.0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, number, frame):
        if self.asked and time.monotonic() > self.asked + 3:
            raise KeyboardInterrupt
        self.asked = self.asked or time.monotonic()
        os.write(2, b"stopping after this step; once more to stop at once\n")


def ignore_interrupts(worker):
    """Data workers leave with their parent, not before it has written its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (DataError, OSError) as e:
        sys.exit(f"error: {said(e)}")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: out of memory: {str(e).splitlines()[0]} Lower --micro_batch; then try --checkpointing, --fsdp on several ranks, a lower "
                 "--max_pixels; python -m tools.dry_run tells what is needed")
