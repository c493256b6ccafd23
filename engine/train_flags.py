"""Flags of train.py that cannot work: refused before anything is loaded."""

import importlib.util
import math
import os
from dataclasses import asdict

from adapter import MAX_STEPS, TransitionAdapter
from backbones.shapes import SHAPES
from curriculum import Curriculum, Progress
from engine.flags import whole_numbers
from engine.ranks import say
from engine.trained import check_lora
from files.errors import DataError, nearest
from hub.folders import newest_checkpoint
from hub.prompts import check_template
from hub.settings import stored_settings
from hub.weights import read_json

AT_LEAST = dict(seed=0, global_batch=2, micro_tokens=0, steps=0, save_every=1, log_every=1, eval_every=0,
                keep=0, workers=0, until=0, warmup=0, decay=0, vision_lr=0, weight_decay=0, frame_rate=0,
                fps=0, w_cross=0, lora=0)
PROMPT_FLAGS = dict(query_prompt="query", document_prompt="document")  # -> names of a checkpoint's prompts


def check_flags(cfg, world):
    """-> the curriculum; raises DataError for what cannot work, on so many ranks."""
    for name, least in AT_LEAST.items():
        if not getattr(cfg, name) >= least:  # nan is not, either
            raise DataError(f"--{name} {getattr(cfg, name)}: needs at least {least}")
    if cfg.matryoshka:
        whole_numbers("matryoshka", cfg.matryoshka, ",", "numbers of components, as 64,256")
    wandb = importlib.util.find_spec("wandb") if cfg.wandb else None
    latent_steps, most_workers = cfg.segments * cfg.steps_per_segment, Progress.DELAY - 1
    needs = (  # a flag, whether its value is fine, what it needs
        ("epochs", cfg.steps or 0 < cfg.epochs < math.inf, "a number above 0 and finite, or --steps"),
        ("lr", cfg.lr > 0, "a number above 0"),
        ("scale", cfg.scale > 0, "a number above 0"),
        ("clip", cfg.clip > 0, "a number above 0; inf: no clipping"),
        ("warmup", cfg.warmup < 1, "a share of the run"),
        ("decay", cfg.decay <= 1, "a share of the run"),
        ("global_batch", cfg.global_batch % world == 0, f"a multiple of the {world} ranks"),
        ("fsdp", world > 1 or not cfg.fsdp, "ranks: torchrun --nproc_per_node=N train.py, or leave it out"),
        ("device", cfg.device != "meta", "numbers; with shapes alone runs python -m tools.dry_run"),
        ("freeze_vision", cfg.freeze_vision in ("auto", "true", "false"), "auto, true or false"),
        ("latent_positions", cfg.latent_positions in ("mrope", "cache"), "mrope or cache"),
        ("adaptive", not cfg.adaptive or cfg.replay > 0,
         "--replay above 0: else no vector behind fewer than all steps is trained at the end"),
        ("w_read", not cfg.adaptive or cfg.w_read > 0, "a number above 0: --adaptive learns <eot> by it"),
        ("adapter", not (cfg.adaptive and cfg.adapter == "parallel"),
         "--adaptive left out: learnt tokens in one pass do not stop earlier"),
        ("last_stage", cfg.last_stage < 1 or cfg.init or not cfg.freeze_backbone,
         "less than 1, or --init: --freeze_backbone would keep random weights"),
        ("tied", cfg.tied or not cfg.init, "random weights: leave out --init, whose weights say it"),
        ("until", not cfg.until or cfg.eval_every and 0 < cfg.until <= 1, "a share, and --eval_every"),
        ("segments", latent_steps <= MAX_STEPS, f"with --steps_per_segment at most {MAX_STEPS} latent steps"),
        ("workers", not cfg.gate or cfg.workers <= most_workers,
         f"at most {most_workers} with --gate: more would read for steps whose stage is not known yet"),
        ("families", not (cfg.data and cfg.families), "turtle world: leave it out, or --data"),
        ("moves", not cfg.data or cfg.moves == "8", "turtle world: leave it out, or --data"),
        ("rules", not (cfg.data and cfg.rules), "turtle world: leave it out, or --data"),
        ("codes", not (cfg.data and cfg.codes), "turtle world: leave it out, or --data"),
        ("wandb", not cfg.wandb or (wandb and wandb.origin),  # a folder wandb/ is found, too: without origin
         "its package: pip install wandb, or leave it out: log.jsonl has the same rows"),
        ("tensorboard", not cfg.tensorboard or importlib.util.find_spec("tensorboard"),
         "its package: pip install tensorboard, or leave it out: log.jsonl has the same rows"))
    for flag, fine, need in needs:
        if not fine:
            raise DataError(f"--{flag} {getattr(cfg, flag)}: needs {need}")
    for name in PROMPT_FLAGS:
        if template := getattr(cfg, name):
            check_template(template, f"--{name}")
    check_lora(cfg)
    if cfg.shape not in SHAPES:
        raise DataError(f"--shape {cfg.shape!r} is not known.{nearest(cfg.shape, SHAPES)}")
    try:
        TransitionAdapter(2, cfg.adapter, cfg.experts, cfg.top_k)
        return Curriculum(
            cfg.segments, cfg.steps_per_segment, cfg.rest_of_rationale, cfg.last_stage, cfg.gate, cfg.replay,
            cfg.adaptive)
    except ValueError as e:
        raise DataError(str(e)) from e


def settings_of(cfg, given):
    """The settings of a checkpoint for which there are flags; given: names of the flags.

    A run with --lora goes on from --init again, with the settings that it has begun with.
    """
    if cfg.resume and cfg.lora:
        file = os.path.join(newest_checkpoint(cfg.out), "config.json")
        return stored_settings(read_json(file).get("plume"), file)
    flags = asdict(cfg)
    limits = ("min_pixels", "max_pixels", "video_max_pixels", "num_frames", "frame_rate", "fps", "max_len")
    switches = ("experts", "top_k", "shared_expert", "anchor", "step_embedding")
    settings = {name: flags[name] for name in ("prompt", "latent_positions") if name in given}
    settings["prompts"] = {prompt: flags[name] for name, prompt in PROMPT_FLAGS.items() if name in given}
    settings["limits"] = {name: flags[name] for name in limits if flags[name]}
    settings["adapter"] = {name: flags[name] for name in switches if name in given}
    if "adapter" in given:
        settings["adapter"]["kind"] = cfg.adapter
    settings["latent_steps"] = cfg.segments * cfg.steps_per_segment
    settings["adaptive"] = cfg.adaptive
    return settings


def weights_of(cfg, pairs):
    """--weights "a=2,b=0.5" -> a number for each data set: the flag's, else the pairs' own, else 1"""
    given, names = {}, pairs.names
    for part in cfg.weights.split(",") if cfg.weights else ():
        name, _, text = part.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not name or name in given or not 0 < weight < math.inf:
            raise DataError(f"--weights {cfg.weights!r}: needs names of data sets, each once, with numbers "
                            "above 0, as a=2,b=0.5")
        given[name] = weight
    for name in given:
        if name not in names:
            raise DataError(f"--weights {name}: no such data set.{nearest(name, names)}")
    weights = pairs.weights | given
    return [weights.get(name, 1.0) for name in names]


def claim_one_space(cfg, settings):
    """A checkpoint says that its embeddings are one space while --w_cross trains that; its end is said, too.

    settings: the model's, whose `one_space` is set.
    """
    if settings["one_space"] and not cfg.w_cross:
        say(f"warning: {cfg.init or cfg.out} says that its latent and single-pass embeddings are one space. "
            "Without --w_cross that is not trained any more, so the checkpoints of this run do not say it")
    settings["one_space"] = cfg.w_cross > 0
