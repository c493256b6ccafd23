"""What a training run says: its plan, a row of log.jsonl a step, a line now and then."""

import json
import math
import os
import re
import secrets
from dataclasses import asdict
from pathlib import Path

from engine.ranks import rank_and_world, say
from engine.train_flags import weights_of
from files.writing import write_errors, write_text, writing
from hub.folders import LOG, WANDB_ID
from hub.weights import count_parameters

ROW = re.compile(rb'\{"step": (\d+), "reached": ')  # of log.jsonl


def announce(cfg, pairs, schedule, model, curriculum):
    """What is about to happen."""
    for name, value in asdict(cfg).items():
        say(f"  {name} = {value!r}")
    sets = list(zip(pairs.names, schedule.rows, schedule.counts))
    told = ", ".join(f"{name} {len(rows)} ({count} steps)" for name, rows, count in sets)
    weights = [f"{name}={w:g}" for name, w in zip(pairs.names, weights_of(cfg, pairs)) if w != 1]
    if weights:
        told += f"; weights {', '.join(weights)}" + ", others 1" * (len(weights) < len(sets))
    say(f"{len(pairs)} pairs in {len(sets)} data sets: {told}")
    if pairs.negatives:
        say(f"hard negatives: up to {pairs.negatives} a pair")
    idle = [name for name, _, count in sets if count == 0]
    if idle:
        say(f"warning: with {schedule.steps} steps these get none: {', '.join(idle)}; raise --steps")
    say(f"{count_parameters(model):,} parameters, {count_parameters(model, trained=True):,} trained, "
        f"{count_parameters(model.adapter):,} in the adapter")
    batch, world = cfg.global_batch, rank_and_world()[1]
    say(f"{schedule.steps} steps; global contrastive batch {batch} = {world} ranks x {batch // world}; "
        f"InfoNCE at chance {math.log(batch):.2f}")
    say(curriculum.table(schedule.steps))


class Log:
    """What rank 0 writes of a step: a row of OUT/log.jsonl (and elsewhere, when asked), sometimes a line."""

    def __init__(self, cfg, config, start, steps):
        self.cfg, self.steps, self.pace, self.cut, self.bad = cfg, steps, None, 0, 0
        self.file = open_log(cfg, start) if rank_and_world()[0] == 0 else None
        self.wandb = self.events = None
        if self.file and cfg.wandb:
            import wandb
            self.wandb = wandb.init(
                project=cfg.wandb, group=cfg.out, config=config, id=wandb_id(cfg), resume="allow")
        if self.file and cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.events = SummaryWriter(cfg.out, purge_step=start)

    def write(self, row, bad, parts, shown):
        """bad: records that this rank left out; parts: the losses of a line; shown: whether there is one."""
        for line in bad:
            print("left out:", line, flush=True)
        if not self.file:
            return
        step, ms = row["step"], row["ms"]
        self.cut, self.bad = self.cut + int(row["cut"]), self.bad + int(row["bad"])
        self.pace = ms if self.pace is None else 0.95 * self.pace + 0.05 * ms
        with write_errors(self.file.name):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=step)
        if self.events:
            for name, value in row.items():
                if not isinstance(value, str):
                    self.events.add_scalar(name, value, step)
        if "hit" in row:
            say(f"after step {step}: hit@1 {row['hit']:.1%} on held-out pairs")
        if shown:
            minutes, seconds = divmod(int(self.pace * (self.steps - step - 1) / 1e3), 60)
            cells = [f"step {step}/{self.steps}", f"stage {row['stage']}", f"K {row['K']}"]
            cells += [f"{name} {row[name]:.3g}" for name in parts if name != "loss"]
            cells += [f"lr {row['lr']:.1e}", f"{ms:.0f} ms", f"{row['pairs_per_s']:.0f} pairs/s"]
            cells += [f"wait {row['wait']:.0%}", f"ETA {minutes}:{seconds:02d}", row["dataset"]]
            say(" | ".join(cells))

    def close(self, pairs, processor):
        if self.wandb:
            self.wandb.finish()
        if self.events:
            self.events.close()
        if self.cut:
            say(f"{self.cut} rationale tokens were cut off by max_len {processor.limits.max_len}")
        if self.cfg.skip_bad:
            say(f"{len(pairs.bad)} records left out at the start, {self.bad} while training (named above)")


def open_log(cfg, start):
    """log.jsonl, without rows of steps that a resumed run does again."""
    path, rows = os.path.join(cfg.out, LOG), []
    if cfg.resume and os.path.exists(path):
        with open(path, "rb") as f:
            for line in f:
                row = ROW.match(line)
                if line.endswith(b"\n") and not (row and int(row[1]) >= start):
                    rows.append(line)
    with writing(path, "wb") as f:
        f.writelines(rows)
    return open(path, "a")


def wandb_id(cfg):
    """The name of this run at Weights & Biases, under which --resume goes on there."""
    path = Path(cfg.out, WANDB_ID)
    if not (cfg.resume and path.exists()):
        write_text(path, secrets.token_hex(4))
    return path.read_text()


def batch_counts(batch):
    """On this rank: tokens that `gate_loss` counts, groups with media, tokens cut, bad records, columns."""
    groups = [group for part in batch["micro"] for group in part]
    gated = sum(len(group["gate_at"]) for group in groups)
    media = [group for group in groups if group["pixels"] is not None]
    return dict(gated=gated, media=len(media), cut=batch["cut"], bad=len(batch["bad"]),
                columns=batch["columns"], real=batch["real"])
