"""Train PLUME through its curriculum, from explicit rationales to latent steps.

    python train.py                                                turtle world, tiny preset, a laptop
    python train.py --data pairs.jsonl                             your pairs, tiny preset, from scratch
    torchrun --nproc_per_node=8 train.py --data pairs.jsonl --preset qwen2vl_2b --micro_tokens 32768

Writes OUT/checkpoint (for Plume.from_pretrained, eval.py --ckpt and --resume) and OUT/log.jsonl, one object a
step.  Ctrl-C finishes the step, writes a checkpoint and stops.
"""

import engine.threads  # before torch

import gc
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from adapter import balance_loss
from curriculum import Progress
from data import Batches, Schedule, StepSampler, to_device
from engine.flags import command, command_with, parse_flags
from engine.held_out import hit_at_1, readable_pairs
from engine.instructions import propose_prompts
from engine.lock import check_disk_space, exclusive_lock
from engine.log import announce, batch_counts, Log
from engine.ranks import (
    all_gather, all_gather_objects, all_reduce_sums, ddp, global_mean, peer_errors, pick_device,
    rank_and_world, say)
from engine.resume import resume, save
from engine.stop import bind_to_parent, check_finite, end_workers, ending_workers, StopOnSignal
from engine.train_flags import check_flags, claim_one_space, settings_of, weights_of
from engine.trained import choose_trained, hash_of_frozen
from files.errors import DataError, nearest
from files.packing import pack, unpack
from files.records import hold_out, Pairs
from hub.card import about_run
from hub.folders import checkpoints_in, newest_checkpoint
from latent import unit
from model import Plume
from tasks.turtle import moves_lost, World


@dataclass
class Config:  # --help prints the comments
    # data
    data: str = ""  # JSONL (or JSON array) of training pairs; default: turtle world
    families: str = ""  # families of turtle world, with commas between; default: all
    moves: str = "8"  # of turtle world's programs; 2-12: as many of each length
    rules: bool = False  # turtle world's moves mean what a rule book says, a word or picture at the start
    codes: bool = False  # turtle world is pages with a code word that belongs to the answer
    media: str = ""  # folder that media paths are relative to; default: the folder of --data
    weights: str = ""  # of data sets, as a=2,b=0.5: a gets twice the steps that its size gives it; default:
    #     1, and 0.5 for the two of turtle world whose queries are words alone
    skip_bad: bool = False  # leave out records that cannot be read and name them; default: stop at the first
    workers: int = 1  # processes that decode and tokenize ahead; raise while the log's `wait` is not near 0;
    #     with a gate up to 15
    # model
    init: str = ""  # checkpoint folder or hub name; empty: random weights in the shape of --shape or --preset
    shape: str = "tiny"  # of random weights: tiny is a small Qwen2-VL, tiny3 a small Qwen3-VL
    prompt: str = ""  # text behind <disc_emb>; default: the checkpoint's own
    query_prompt: str = ""  # what the queries of --data already begin with, as 'Find the picture: {}'; kept
    #     in the checkpoint for encode_query, search, ..; records stay as they are; default: the checkpoint's
    document_prompt: str = ""  # the same for their targets, as 'Represent this picture.{}'
    min_pixels: int = 0  # a picture is scaled up to this area; 0: the checkpoint's own
    max_pixels: int = 0  # and down to this one: the number of tokens of a picture; 0: the checkpoint's own
    video_max_pixels: int = 0  # the same for each frame of a clip; 0: the checkpoint's own
    num_frames: int = 0  # frames sampled from a clip, with --fps at most; 0: the checkpoint's own
    fps: float = 0.0  # frames sampled from a second of a clip; 0: the checkpoint's own, if it has any
    frame_rate: float = 0.0  # frames a second of clips given as frames; 0: the checkpoint's own
    max_len: int = 0  # tokens in a sequence; a longer rationale loses its end; 0: the checkpoint's own
    latent_positions: str = "mrope"  # of latent steps: mrope goes on counting, cache as released
    tied: bool = True  # random weights have one embedding for input and output
    freeze_backbone: bool = False  # after stage 0 (with --init from the first step) only the adapter learns
    freeze_vision: str = "auto"  # true, false, or auto: frozen (but for its merger) when --init is given
    lora: int = 0  # rank of LoRA, trained instead of the backbone of --init: see docs/training.md; 0: none
    lora_targets: str = ""  # projections it is put around, as q_proj,v_proj; default: all seven of a layer
    lora_bits: int = 0  # 8 or 4: the frozen weights of these are rounded; 0: they stay as they are
    # adapter: the paper's ablations; with --init they are the checkpoint's unless given, and so are positions
    adapter: str = "moe"  # moe (the paper), mlp (the shared expert alone), none (hidden states as they are),
    #     or parallel: no recurrence, K learnt tokens in one pass
    experts: int = 4  # E, specialised experts
    top_k: int = 2  # experts that count for a row
    shared_expert: bool = True  # an expert that always counts
    anchor: bool = True  # the router sees the anchor
    step_embedding: bool = True  # the router sees the number of the step
    # curriculum
    segments: int = 8  # S, parts a rationale is cut into; 1 stage each
    steps_per_segment: int = 1  # c, latent steps a part turns into; K = S * c
    rest_of_rationale: str = "inside"  # the text that is left: inside the thought, or after it as released
    last_stage: float = 0.2  # share of the run in the last stage (paper: 0.5), half of it without the answer
    gate: float = 0.6  # enter a stage when the mean of `gate_loss` is under this, at the latest by the
    #     schedule; 0: by the schedule alone, as the paper
    replay: float = 0.15  # share of the steps that go back: half to stage 0, half to a random earlier one
    adaptive: bool = False  # a latent step for each sentence of the rationale, or word of a single one; steps
    #     behind the last read <eot>, a longer one's end stays written: for mode auto, see docs/adaptive.md
    reset_moments: bool = False  # forget AdamW's moments when the stage changes
    # optimization
    global_batch: int = 32  # pairs in one contrastive batch, over all ranks; part of the recipe
    micro_tokens: int = 0  # columns that a rank runs through the model at a time, a visual token counts
    #     twice: memory, not recipe; 0: its whole share of the global batch
    epochs: float = 1.0  # passes over the data; ignored when --steps is given
    steps: int = 0  # optimizer steps; 0: from --epochs
    lr: float = 2e-3  # peak; for the tiny preset in turtle world, 1e-3 on real pictures, 1e-5 if pretrained
    warmup: float = 0.03  # share of the run with a rising learning rate
    decay: float = 0.6  # share of the run, at its end, with a cosine down to a tenth; 1: all, as the paper
    vision_lr: float = 0.5  # learning rate of the vision tower, as a share of lr
    weight_decay: float = 0.1  # of matrices; vectors and the step table have none
    clip: float = 1.0  # largest gradient norm
    scale: float = 10.0  # 1 / temperature of the contrastive losses
    # losses: w_NAME is the weight of NAME in `losses`
    w_ce: float = 1.0  # cross-entropy on the text of both sides
    w_gen: float = 1.0  # InfoNCE on <gen_emb>
    w_disc: float = 0.1  # InfoNCE on <disc_emb>
    matryoshka: str = ""  # sizes, as 64,256: embeddings are trained to be cut to so many components, too
    w_matryoshka: float = 1.0  # InfoNCE on <gen_emb> cut to each of these sizes, the mean over them
    w_cross: float = 0.0  # InfoNCE of queries' <gen_emb> against candidates' <disc_emb>, cut to these sizes,
    #     too: latent queries then find what is indexed in one pass, see docs/one_space.md
    w_read: float = 1.0  # cross-entropy of the token each latent state replaced, read from it; paper: 0
    w_bal: float = 0.1  # the router's balance loss
    # run
    preset: str = ""  # qwen2vl_2b: the paper's settings, qwen3vl_2b: for that backbone; other flags win
    eval_every: int = 0  # steps between hit@1 on 256 pairs (a tenth at most) held out of training; 0: never
    until: float = 0.0  # with --eval_every: the run ends when that hit@1 has come to this share
    out: str = "out"  # folder for checkpoint and log
    resume: bool = False  # continue the run in --out
    save_every: int = 500  # steps between checkpoints, beside those at a stage's end, at the end, on Ctrl-C
    keep: int = 0  # earlier checkpoints that stay, as OUT/checkpoint-STEP
    log_every: int = 10  # steps between printed lines; log.jsonl has every step
    wandb: str = ""  # project of Weights & Biases that gets the rows of log.jsonl too
    tensorboard: bool = False  # also write them as TensorBoard's event files into --out
    seed: int = 0  # of weights and of the order of the data
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # compute type, float32 or bfloat16 (weights: float32); default: bfloat16 where fast
    fsdp: bool = False  # shard weights, gradients and AdamW's moments over the ranks (FSDP2);
    #     with bfloat16 hidden states are bfloat16 too
    checkpointing: bool = False  # recompute activations going backward: less memory, about a third slower


# The paper's settings; batch size and number of epochs, which we did not find there, are our choice.
PAPER = dict(
    init="Qwen/Qwen2-VL-2B-Instruct", freeze_vision="true", max_pixels=2359296, video_max_pixels=32 * 28 * 28,
    segments=4, steps_per_segment=2, last_stage=0.5, gate=0.0, replay=0.0,
    global_batch=1024, epochs=1.0, lr=1e-5, decay=1.0, vision_lr=1.0,
    scale=50.0, w_disc=1.0, w_read=0.0, dtype="bfloat16", checkpointing=True)
QWEN3 = dict(  # as many visual tokens, of 32 pixels instead of 28
    init="Qwen/Qwen3-VL-2B-Instruct", max_pixels=3009 * 32 * 32, video_max_pixels=32 * 32 * 32)
PRESETS = {"qwen2vl_2b": PAPER, "qwen3vl_2b": PAPER | QWEN3}


def with_preset(cfg, given):
    """The configuration with the values of --preset where no flag was given."""
    if not cfg.preset:
        return cfg
    if cfg.preset not in PRESETS:
        raise DataError(f"--preset {cfg.preset!r} is not known.{nearest(cfg.preset, PRESETS)}")
    return replace(cfg, **{name: value for name, value in PRESETS[cfg.preset].items() if name not in given})


def main(argv):
    # config
    cfg, given = parse_flags(Config, argv, __doc__)
    cfg = with_preset(cfg, given)

    # ranks: torchrun starts a process for each, and tells it which one it is
    rank, world, local = rank_and_world()
    device, dtype = pick_device(cfg.device or None, cfg.dtype or None, say)
    if device.type == "cuda":
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        restarts = all_gather_objects(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        if max(restarts) and checkpoints_in(cfg.out):
            cfg.resume = True  # torchrun --max-restarts has started the ranks again

    curriculum = check_flags(cfg, world)
    if cfg.resume:
        newest_checkpoint(cfg.out)  # raises before --out is made
    with peer_errors(), exclusive_lock(cfg) if rank == 0 else nullcontext(), ending_workers():
        done, steps = train(cfg, given, curriculum, device, dtype)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()

    # end
    message = f"{done} of {steps} steps done; checkpoint in {cfg.out}/checkpoint"
    if done < steps:
        message += f"; go on with: {command_with('--resume', argv)}"
    say(message)
    return 0 if done == steps else 130


def train(cfg, given, curriculum, device, dtype):
    """-> (steps done, steps of the whole run)"""
    rank, world, _ = rank_and_world()
    torch.manual_seed(cfg.seed)

    # data
    pairs = read_pairs(cfg)
    schedule, held = make_schedule(cfg, pairs)
    steps = schedule.steps

    # model
    model = build_model(cfg, given, pairs, device)
    mixed = dtype != torch.float32 and not cfg.fsdp
    autocast = torch.autocast(device.type, dtype) if mixed else nullcontext()
    if cfg.fsdp:
        shard(model, device, dtype, world)

    # optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(model, cfg.weight_decay, cfg.vision_lr)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    if rank == 0:
        check_disk_space(cfg, model)

    # resume
    progress = Progress(curriculum, steps, cfg.seed)
    config = dict(asdict(cfg), pairs=pairs.digest, **hash_of_frozen(cfg, model))
    start, kept = resume(cfg, config, model, optimizer, progress) if cfg.resume else (0, [])

    # loop
    announce(cfg, pairs, schedule, model, curriculum)
    held = readable_pairs(cfg, pairs, held, model.processor)
    parallel = model
    if world > 1 and not cfg.fsdp:
        parallel = ddp(model)
    batches = Batches(pairs, model.processor, curriculum, cfg.skip_bad, cfg.micro_tokens)
    sampler = StepSampler(schedule, progress, start, rank, world)
    ahead = iter(data_loader(batches, sampler, cfg.workers, device))  # held until `end_workers`
    log, stop = Log(cfg, config, start, steps), StopOnSignal()
    saved, scored, clock = start, "", time.perf_counter()
    for batch in map(unpack, ahead):
        step, stage, wait = batch["step"], batch["stage"], time.perf_counter() - clock
        entered = step > 0 and progress.place(step) != progress.place(step - 1)
        if entered and cfg.reset_moments:
            optimizer.state.clear()

        # the step: losses of the global batch, their gradients, clipping, AdamW
        rate = learning_rate(cfg, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        parts = backward(parallel, batch, cfg, autocast)
        if cfg.freeze_backbone and progress.place(step) > 0:
            model.backbone.zero_grad(set_to_none=True)
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = all_reduce_sums(dict(parts, norm=norm, stop=stop.asked, **batch_counts(batch)), device)
        metrics = {name: total[name] / world for name in (*parts, "norm")}
        check_finite(metrics, batch, saved)
        visual = model.backbone.model.visual
        for module, used in ((model.adapter, stage.latent_steps), (visual, total["media"])):
            if not used:  # on no rank: its gradient is 0, and it shall not be moved by old moments either
                module.zero_grad(set_to_none=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if total["gated"]:
            progress.observe(step, metrics["gate_loss"])

        took, clock = time.perf_counter() - clock, time.perf_counter()
        if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == steps):
            metrics["hit"] = hit_at_1(model, pairs, held, autocast)
            if cfg.until and metrics["hit"] >= cfg.until:
                steps = step + 1
            scored = f"{metrics['hit']:.1%} on {len(held)} held-out pairs after {step + 1} steps"
            clock = time.perf_counter()
        last = step + 1 == steps or total["stop"] > 0
        reached = progress.stages[progress.place(step)].index
        row = dict(step=step, reached=reached, stage=stage.index, K=stage.latent_steps, answer=stage.answer,
                   dataset=batch["dataset"], lr=rate, **metrics, cut=total["cut"], bad=total["bad"],
                   padding=1 - total["real"] / total["columns"],
                   ms=took * 1e3, wait=wait / took, pairs_per_s=cfg.global_batch / took)
        log.write(row, batch["bad"], parts, shown=entered or last or step % cfg.log_every == 0)
        if last or (step + 1) % cfg.save_every == 0 or progress.place(step + 1) != progress.place(step):
            state = dict(step=step + 1, ranks=world, progress=progress.state(), config=config)
            kept = save(cfg, model, optimizer, state, saved, kept, about_run(cfg, step + 1, steps, scored))
            saved, clock = step + 1, time.perf_counter()
        if last:
            break
    end_workers()
    log.close(pairs, model.processor)
    return saved, steps


# ---- losses
def losses(out, batch, cfg):
    """The paper's ce, gen, disc, bal, our read, matryoshka, cross -> dict of scalars, over all ranks.

    A new loss is an entry of `parts` and its weight w_NAME in Config.  `gate_loss` only opens the gate.
    """
    pairs, tokens = out["per_pair"], out["per_token"]
    gen, disc = pairs["gen"], pairs["disc"]
    hashes = all_gather(batch["query"]), all_gather(batch["target"])  # (ranks, B), (ranks, B, 1+M)
    valid = all_gather(batch["valid"])  # (ranks, B, 1+M)
    negatives = torch.ones_like(batch["negative_at"], dtype=torch.bool)  # there are none in bad records
    real = torch.cat([batch["valid"][:, 0].repeat(2), negatives])
    router = (pairs["router"] * real[:, None, None]).sum(0)
    router = all_gather(router).sum(0)  # (K, E) over the rows of all ranks
    router = router / all_gather(real.sum()).sum().clamp(min=1)

    def contrast(x, y):
        """InfoNCE of the queries' x against the candidates' y."""
        (query, _), (_, candidates) = candidates_by_query(x, batch), candidates_by_query(y, batch)
        return info_nce(query, candidates, *hashes, valid, cfg.scale)

    parts = dict(
        ce=global_mean(tokens["ce"]),
        gen=contrast(gen, gen),
        disc=contrast(disc, disc),
        read=global_mean(tokens["read"]),
        bal=balance_loss(router) * valid.any())
    cut = []
    if cfg.matryoshka:
        cut = [(unit(gen[:, :size]), unit(disc[:, :size])) for size in map(int, cfg.matryoshka.split(","))]
        parts["matryoshka"] = sum(contrast(g, g) for g, _ in cut) / len(cut)
    if cfg.w_cross:
        parts["cross"] = contrast(gen, disc) + sum(contrast(g, d) for g, d in cut) / max(1, len(cut))
    weight = {name: getattr(cfg, f"w_{name}") for name in parts}
    loss = sum(weight[name] * value for name, value in parts.items())
    return dict(parts, gate_loss=global_mean(tokens["gate_loss"].detach()), loss=loss)


def candidates_by_query(x, batch):
    """x (2B + n, D): queries, targets, hard negatives -> queries (B, D), candidates of each (B, 1+M, D)."""
    B, M = len(batch["valid"]), batch["valid"].shape[1] - 1
    query, target, negative = x.split([B, B, len(x) - 2 * B])
    negative = x.new_zeros(B * M, x.shape[1]).index_copy(0, batch["negative_at"], negative)
    return query, torch.cat([target[:, None], negative.view(B, M, x.shape[1])], 1)


def info_nce(query, candidates, query_hash, hashes, valid, scale):
    """Symmetric InfoNCE of this rank's B pairs against the pairs and hard negatives of all ranks.

    query (B, D), candidates (B, 1+M, D) unit rows: the target, then its hard negatives; query_hash (ranks, B)
    and hashes (ranks, B, 1+M) of the candidates: equal ones are the same; valid (ranks, B, 1+M): which there
    are.  A query and a candidate that are a pair anywhere in the global batch are never negatives of each
    other: with pairs (q, a) and (q, b), b and every hard negative equal to a or b are none of q's, and q is
    none of a's or b's.  The mean over ranks is the global batch's.
    """
    rank, counts = rank_and_world()[0], valid[..., 0]
    asked, targets, each = query_hash.flatten(), hashes[..., 0].flatten(), hashes.flatten()
    same_query = (query_hash[rank][:, None] == asked) & counts.flatten()  # (B, ranks * B)
    same_target = (hashes[rank][:, :1] == targets) & counts.flatten()
    right = same_query.float() @ (targets[:, None] == each).float() > 0  # (B, ranks * B * (1+M))
    asks_it = same_target.float() @ (asked[:, None] == asked).float() > 0  # (B, ranks * B)
    to_candidates = contrastive_cross_entropy(query, candidates, right | ~valid.flatten(), scale)
    to_queries = contrastive_cross_entropy(
        candidates[:, 0], query[:, None], asks_it | ~counts.flatten(), scale)
    return ((to_candidates + to_queries) / 2 * counts[rank]).sum() * len(counts) / counts.sum().clamp(min=1)


def contrastive_cross_entropy(x, candidates, hidden, scale):
    """Cross-entropy (B,) of each row's own first candidate among the candidates of all ranks.

    x (B, D), candidates (B, C, D), hidden (B, ranks * B * C): those that do not count.
    """
    rank, (B, C) = rank_and_world()[0], candidates.shape[:2]
    row = torch.arange(B, device=x.device)
    label = (rank * B + row) * C
    hidden[row, label] = False
    logits = scale * x @ all_gather(candidates).flatten(0, 2).T
    return F.cross_entropy(logits.masked_fill(hidden, float("-inf")), label, reduction="none")


# ---- GradCache
def backward(model, batch, cfg, autocast):
    """Gradients of the global batch's loss from micro-batches that fit in memory -> what `losses` gives.

    GradCache (arXiv 2101.06983): each micro-batch runs without a graph; the loss is taken on the outputs of
    all of them and of all ranks; then each runs again with a graph, in the same random state, and
    back-propagates the loss's gradient with respect to its outputs.
    """
    micro, device = batch["micro"], next(model.parameters()).device
    if cfg.micro_tokens and dist.is_initialized():
        # in its passes the model waits for other ranks: as many on each
        micro = micro + [batch["blank"]] * (max(all_gather_objects(len(micro))) - len(micro))
    several = len(micro) > 1

    def forward(groups):
        with autocast:
            return model([to_device(group, device) for group in groups], batch["stage"].latent_steps)

    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus, enabled=several), torch.set_grad_enabled(not several):
        outs = [forward(groups) for groups in micro]
    leaves = tree_map(lambda x: x.detach().requires_grad_(), outs)
    names = ("query", "target", "valid", "negative_at", "order")
    whole = to_device({name: batch[name] for name in names}, device)
    parts = losses(join_micro_batches(leaves, whole["order"]), whole, cfg)
    parts["loss"].backward()
    for i, groups in enumerate(micro):
        # copies (DDP) average gradients once a step; shards each micro-batch's at once: less memory
        later = isinstance(model, DistributedDataParallel) and i + 1 < len(micro)
        with model.no_sync() if later else nullcontext():
            out = forward(groups) if several else outs[i]
            both = zip(tree_leaves(out), tree_leaves(leaves[i]))
            used = [(x, leaf.grad) for x, leaf in both if x.requires_grad and leaf.grad is not None]
            torch.autograd.backward(*zip(*used))
    return parts


def join_micro_batches(outs, order):
    """Outputs of micro-batches as those of one batch: all queries, all targets, all hard negatives.

    order: their places among the rows of all micro-batches.  What is counted by token stays as it comes.
    """
    out = tree_map(lambda *parts: torch.cat(parts), *outs)
    return dict(out, per_pair={name: rows[order] for name, rows in out["per_pair"].items()})


# ---- data
def read_pairs(cfg):
    """Training pairs; raises DataError when ranks read different ones."""
    if not cfg.data:
        return World("train", cfg.families, moves=cfg.moves, rules=cfg.rules, codes=cfg.codes)
    rank, world, _ = rank_and_world()
    pairs = Pairs(cfg.data, cfg.media or None, cfg.skip_bad, progress=rank == 0)
    for line in pairs.bad:
        say("left out:", line)
    seen = all_gather_objects(f"{len(pairs)} pairs, {pairs.digest}") if world > 1 else []
    other = [f"rank {r}: {what}" for r, what in enumerate(seen) if what != seen[0]]
    if other:
        raise DataError(f"--data {cfg.data!r} is not the same file everywhere: rank 0: {seen[0]}; "
                        + "; ".join(other[:4]))
    return pairs


def make_schedule(cfg, pairs):
    """-> Schedule of the whole run, numbers of the pairs that are held out of it"""
    held, dataset = [], pairs.dataset.copy()
    if cfg.eval_every:
        held, out = hold_out(pairs, cfg.seed)
        dataset[out] = -1  # in no batch
        if len(out) > len(held):
            say(f"{len(out) - len(held)} pairs with the queries of held-out ones are left out of training")
    steps = cfg.steps or max(1, round(cfg.epochs * (dataset >= 0).sum() / cfg.global_batch))
    return Schedule(dataset, pairs.names, cfg.global_batch, steps, cfg.seed, weights_of(cfg, pairs)), held


def data_loader(batches, sampler, workers, device):
    """Packed batches from data workers, none of which runs ahead of the step whose stage is known."""
    ahead = min(4, max(1, (Progress.DELAY - 1) // workers)) if workers else None
    gc.collect()  # whatever waits for its threads when it is freed: a worker does not have them
    return torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=sampler, num_workers=workers, prefetch_factor=ahead,
        collate_fn=pack, pin_memory=device.type == "cuda", worker_init_fn=bind_to_parent)


# ---- model and optimizer
def build_model(cfg, given, pairs, device):
    """Plume in float32: --resume's, --init's, or random weights with a tokenizer of the pairs' texts.

    What the checkpoint of --init says about itself stays, unless a flag for it was given.
    """
    settings = settings_of(cfg, given)
    if not (cfg.data or cfg.init or cfg.num_frames):
        settings["limits"]["num_frames"] = max(16, 2 * pairs.longest)  # all of turtle world's clips
    if cfg.resume and not cfg.lora:
        model = Plume.from_pretrained(newest_checkpoint(cfg.out), device, torch.float32)
    elif cfg.init:
        model = Plume.from_pretrained(cfg.init, "cpu" if cfg.lora_bits else device, torch.float32, **settings)
    else:
        where = "meta" if device.type == "meta" else "cpu"
        shape = cfg.preset or cfg.shape
        model = Plume.random(pairs.texts(), shape, cfg.seed, where, cfg.tied, **settings).to(device)
    claim_one_space(cfg, model.settings)
    propose_prompts(cfg, given, pairs, model.settings["prompts"])
    choose_trained(cfg, model, device)
    if not cfg.data:
        pairs.backbone = model.processor.backbone  # turtle world's pictures are drawn for it
        if lost := moves_lost(model.processor, cfg.moves):
            say(f"warning: {lost}; --num_frames")
    width = model.lm.config.hidden_size
    if cfg.matryoshka and max(map(int, cfg.matryoshka.split(","))) >= width:
        raise DataError(f"--matryoshka {cfg.matryoshka!r}: the model has {width} components; name fewer")
    model.checkpointing = cfg.checkpointing
    return model


def shard(model, device, dtype, world):
    """FSDP2 with the whole model as one unit: everything happens inside its `forward` or `embed`."""
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32)
    fully_shard(model, mesh=init_device_mesh(device.type, (world,)), mp_policy=policy)
    register_fsdp_forward_method(model, "embed")


WITHOUT_DECAY = ("adapter.b1", "adapter.b2", "adapter.step_embed", "adapter.tokens")


def parameter_groups(model, weight_decay, vision_lr):
    """Matrices with weight decay; vectors, the step table and the experts' stacked biases without."""
    groups = {}
    for name, p in model.named_parameters():
        share = vision_lr if "visual" in name else 1.0
        plain = p.ndim < 2 or name.startswith(WITHOUT_DECAY)
        decay = 0.0 if plain else weight_decay
        if p.requires_grad:
            groups.setdefault((share, decay), []).append(p)
    return [dict(params=params, weight_decay=decay, share=share) for (share, decay), params in groups.items()]


def learning_rate(cfg, step, steps):
    """Linear warm-up, lr, and at the end of the run a cosine from lr to a tenth of it."""
    warm = max(1, round(cfg.warmup * steps))
    fall = max(warm, round((1 - cfg.decay) * steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * max(0, step - fall) / max(1, steps - fall))))


if __name__ == "__main__":
    try:
        command(main)
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: out of memory: {str(e).splitlines()[0]} Lower --micro_tokens; then "
                 "--checkpointing, --fsdp on several ranks, a lower --max_pixels; "
                 "python -m tools.dry_run tells what it takes")
