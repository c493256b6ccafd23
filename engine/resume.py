"""Saves and resumes a training run: weights, AdamW's moments, progress, configuration."""

import os
import pickle
from dataclasses import asdict

import torch
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict, StateDictOptions)

from engine.ranks import rank_and_world, say
from engine.trained import load_trained, merged_weights, size_of_merged, trained_weights
from files.errors import DataError, lfs_hint, reason
from files.writing import write_errors
from hub.card import write_hub_files
from hub.folders import (
    checkpoint_files, kept_name, NEWEST, newest_checkpoint, remove_checkpoint, replacing, RUN_STATE)
from hub.layouts import write_checkpoint
from hub.weights import count_parameters

STATE = {"step", "ranks", "optimizer", "progress", "config", "kept"}  # the keys of RUN_STATE
# May differ when a run goes on: they do not change the result, but for rounding
FREE_ON_RESUME = (
    "resume", "out", "media", "workers", "save_every", "until", "keep", "log_every", "wandb", "tensorboard",
    "device", "checkpointing", "micro_tokens", "fsdp")


def save(cfg, model, optimizer, state, saved, kept, card):
    """Writes OUT/checkpoint on rank 0 -> the names of the earlier ones that --keep has kept.

    saved: the step of the one that stands there now; card: what the model card tells of the run.  Only what
    this run has kept is ever removed.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathers shards: all ranks have to ask
    weights = None if cfg.lora else get_model_state_dict(model, options=whole)
    state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=whole)
    if rank_and_world()[0] > 0:
        return kept
    size = count_parameters(model)
    if cfg.lora:
        weights, state["trained"] = merged_weights(model), trained_weights(model)
        size = size_of_merged(model, weights)
    path, keep, gone, there = os.path.join(cfg.out, NEWEST), None, [], "there is none yet"
    if os.path.exists(path):
        there = f"the checkpoint of step {saved} is still there"
        if cfg.keep:
            keep = kept_name(path, saved)
            kept = [*kept, os.path.basename(keep)]
            kept, gone = kept[-cfg.keep :], kept[: -cfg.keep]
    try:
        with replacing(path, keep) as folder:
            write_checkpoint(model, folder, state=weights)
            write_hub_files(model, folder, card, size)
            file = os.path.join(folder, RUN_STATE)
            with write_errors(file):
                torch.save(dict(state, kept=kept), file)
    except OSError as e:
        what = f"{path}: the checkpoint of step {state['step']} could not be written, {there}"
        raise OSError(f"{what}: {e}") from e
    for name in gone:
        folder = os.path.join(cfg.out, name)
        remove_checkpoint(folder, checkpoint_files(folder))
    return kept


def resume(cfg, config, model, optimizer, progress):
    """The newest checkpoint of --out -> (its step, names of the earlier ones that --keep has kept)."""
    state, world = read_state(newest_checkpoint(cfg.out)), rank_and_world()[1]
    then = state["config"]
    for name in sorted(config.keys() - then.keys()):
        say(f"new since the run began: {name} = {config[name]!r}")
    if changed := changes(then, config, dict(asdict(type(cfg)()), frozen="")):
        raise DataError(f"--resume with another configuration: {changed}")
    if state["ranks"] != world:
        say(f"the run began on {state['ranks']} ranks and goes on with {world}: the same but for rounding")
    if cfg.lora:
        load_trained(model, state["trained"])
    load_moments(model, optimizer, state["optimizer"])
    progress.load(state["progress"])
    return state["step"], state["kept"]


def read_state(checkpoint):
    """The state of the run in a checkpoint's folder, its tensors mapped from the file."""
    file = os.path.join(checkpoint, RUN_STATE)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as e:
        raise DataError(f"{file}: not the whole state of a training run: {reason(e)}{lfs_hint(file)}") from e
    lacking = STATE - state.keys() if isinstance(state, dict) else STATE
    if lacking:
        raise DataError(f"{file}: not the state of a training run: it has no {', '.join(sorted(lacking))}")
    if not all(isinstance(name, str) for name in state["optimizer"]["state"]):
        raise DataError(f"{file}: its moments are not stored by the names of weights, as this version does; "
                        "start another run from these weights with --init")
    return state


def changes(then, now, defaults):
    """What differs between the configurations of a run and of its continuation, and must not.

    defaults: of all flags, for those that are newer than the run.
    """
    then = defaults | then
    return "; ".join(f"{name}: {then[name]!r} then, {value!r} now" for name, value in now.items()
                     if name not in FREE_ON_RESUME and then[name] != value)


def load_moments(model, optimizer, state):
    """AdamW's state by the names of parameters, in whole tensors; a rank keeps its shards of them."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set().union(*[group["params"] for group in state["param_groups"]]), "other parameters"
    whole = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, optimizer, state, options=whole)
    for name in trained - state["state"].keys():
        # never had a gradient: torch makes moments for it, and counts a step that was none
        optimizer.state.pop(model.get_parameter(name), None)
    for moments in optimizer.state.values():
        for key, x in moments.items():
            moments[key] = x.clone()  # no longer the mapped file's memory
