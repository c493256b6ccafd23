"""One small batch through the method, in numbers: docs/reading.md explains what is printed.

    python -m tools.follow                            the tiny model with random weights
    python -m tools.follow --ckpt out/checkpoint      the same batch in a trained one
"""

import engine.threads  # before torch

import contextlib
import math
from dataclasses import dataclass

import torch

import train
from curriculum import Curriculum
from data import Batches
from engine.flags import command, parse_flags
from files.errors import DataError
from latent import rollout, unit
from model import Plume
from tasks.turtle import World

FAMILIES = "image_cls,image_ret"  # the program as a picture, the target as a word; and the other way round
PARTS = dict(adapter="adapter.", decoder="backbone.model.language_model.", vision="backbone.model.visual.")


@dataclass
class Config:
    ckpt: str = ""  # checkpoint folder or hub name; default: random weights
    stage: int = 3  # of the curriculum: so many words of the rationale are latent steps


def make(cfg):
    """-> turtle world, model, a curriculum of one step for each word of its rationales"""
    world = World("train", FAMILIES)
    if cfg.ckpt:
        model = Plume.from_pretrained(cfg.ckpt, "cpu", torch.float32)
        world.backbone = model.processor.backbone
    else:
        model = Plume.random(world.texts(), "tiny", seed=0, latent_steps=8)
    steps, kind = model.settings["latent_steps"], model.adapter.kind
    if not 1 <= cfg.stage <= steps or kind == "parallel":
        raise DataError(f"--stage {cfg.stage}, adapter {kind!r}: needs 1 to {steps}, the model's latent "
                        "steps, and an adapter that takes them one after another")
    return world, model, Curriculum(steps, 1)


def print_prefix(group, row, text_of):
    """The columns of a row: token id, position on three axes, text; those of a medium in one line."""
    ids, n = group["ids"][row].tolist(), int(group["lengths"][row])
    visual, at = set((group["media"] - row * len(ids)).tolist()), 0
    print("column        id   time   row   col  token")
    while at < n:
        end = at + 1
        while at in visual and end in visual:
            end += 1
        axes = [range(at, end), *group["positions"][:, row, at:end].tolist()]
        columns, *axes = [f"{axis[0]}" if axis[0] == axis[-1] else f"{axis[0]}-{axis[-1]}" for axis in axes]
        print(f"{columns:6}{ids[at]:10} {axes[0]:>6}{axes[1]:>6}{axes[2]:>6}  {text_of(ids[at])}")
        at = end


def summary(vector):
    return f"{vector.norm():9.2f}  " + " ".join(f"{x:5.2f}" for x in vector[:3].tolist()) + " .."


def print_rollout(model, group, row, K, text_of):
    """Of a row: anchor, states, and what each step makes of its state; the vector."""
    suffix = model.lm.embed_tokens(group["suffix"])
    r = rollout(model.lm, model.adapter, model.prefix(group), K, suffix)
    states = torch.cat([r.start[:, None], r.latents], 1)[row]  # (K+1, D) z_0 .. z_K
    probability = model.backbone.lm_head(states).softmax(-1)  # (K+1, V)
    replaced = {int(step): int(token) for b, step, token in group["replaced"] if b == row}
    print("state       norm  first components        router r                 |A(z)-z|  token read at z")
    print(f"anchor {summary(r.anchor[row])}")
    for k, token in replaced.items():
        x, router = model.adapter(states[k : k + 1], k, r.anchor[row : row + 1])  # (1, D), (1, E)
        shares = " ".join(f"{p:.3f}" for p in router[0].tolist())
        print(f"z_{k}    {summary(states[k])}   {shares} {(x[0] - states[k]).norm():9.3f}  "
              f"{text_of(token)}: {probability[k, token]:.4f}")
    h = r.suffix[row, group["gen"][row]]
    print(f"z_{K}    {summary(states[K])}\ngen_emb{summary(h)}\nvector {summary(unit(h))}")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    world, model, curriculum = make(cfg)
    stage = curriculum.stages[cfg.stage]
    batch = Batches(world, model.processor, curriculum)[0, stage, [0, len(world) // 2]]
    (groups,) = batch["micro"]
    rows = [(group, row) for group in groups for row in range(len(group["ids"]))]
    group, row = rows[batch["order"][0]]  # the first query
    shapes = " and ".join(str(tuple(g["ids"].shape)) for g in groups)
    print(f"stage {stage.index}: K = {stage.latent_steps}; rows and prefix columns (B, P): {shapes}; "
          f"{batch['columns'] - batch['real']} of {batch['columns']} columns are padding\n")

    def text_of(token):
        return repr(model.processor.backend.decode([token], skip_special_tokens=False))

    print_prefix(group, row, text_of)
    print("suffix", *map(text_of, group["suffix"][row, : group["gen"][row] + 1].tolist()), end="\n\n")
    with torch.no_grad():
        print_rollout(model, group, row, stage.latent_steps, text_of)

    settings = train.Config()
    parts = train.backward(model, batch, settings, contextlib.nullcontext())
    token, pair = math.log(model.lm.config.vocab_size), math.log(2)  # losses of who knows nothing
    print("\nloss     value   weight   a guess")
    for name, guess in dict(ce=token, gen=pair, disc=pair, read=token, bal=0).items():
        print(f"{name:6}{parts[name]:8.3f}{getattr(settings, f'w_{name}'):9.1f}{guess:10.3f}")
    print(f"{'loss':6}{parts['loss']:8.3f}")
    with_grad = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    for part, start in PARTS.items():
        grads = [grad.norm() for name, grad in with_grad if name.startswith(start)]
        print(f"gradient of {part:8}{torch.stack(grads).norm():8.3f}")


if __name__ == "__main__":
    command(main)
