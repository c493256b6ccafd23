"""A checkpoint folder, ours, released or a plain Qwen-VL <-> backbone, tokenizer, settings, adapter."""

import copy
import json
import os
import shutil
import warnings
from dataclasses import asdict

import torch
from safetensors.torch import save_file

from backbones.families import BACKBONES, Limits, limits_of
from data import PLUME_TOKENS, TEMPLATES
from files.errors import closest, DataError, quote, reason
from files.writing import write_errors
from hub.card import chat_template
from hub.settings import ADAPTER, current_format, FORMAT, RELEASED
from hub.weights import (
    build_backbone, local_folder, quietly, read_json, read_tokenizer, read_weights, WEIGHTS)

# Released checkpoints keep each expert as two nn.Linear, which store the transpose of our stacked tensors.
LAYERS = (("fc1", "w1", "b1"), ("fc2", "w2", "b2"))
SAME_NAMES = ("ln.weight", "ln.bias", "step_embed.weight", "router.weight", "router.bias")


def expert_names(experts, shared_expert):
    """The released names of the experts, in the order in which our tensors stack them."""
    names = [f"experts.{i}" for i in range(experts)]
    return ["shared_expert", *names] if shared_expert else names


def to_released(state, shared_expert):
    """Our adapter's state dict -> the released names, without their `latent_moe_transition.` prefix.

    ValueError: a tensor that the released layout has no place for; nothing is left out silently.
    """
    rest = dict(state)
    out = {name: rest.pop(name) for name in SAME_NAMES if name in state}
    for fc, w, b in LAYERS:
        weights, biases = rest.pop(w, []), rest.pop(b, [])  # (n, ., .), (n, 1, .); kind "none" has neither
        experts = len(weights) - 1 if shared_expert else len(weights)
        for name, weight, bias in zip(expert_names(experts, shared_expert), weights, biases, strict=True):
            out[f"{name}.{fc}.weight"] = weight.T.contiguous()
            out[f"{name}.{fc}.bias"] = bias[0]
    refuse_rest(rest)
    return out


def from_released(state):
    """The released names (prefix removed) -> (our state dict, the constructor's keywords they imply).

    ValueError: a tensor of another name.  KeyError, RuntimeError: one is missing or does not fit the others.
    """
    experts = len({name.split(".")[1] for name in state if name.startswith("experts.")})
    shared = any(name.startswith("shared_expert.") for name in state)
    names, rest = expert_names(experts, shared), dict(state)
    out = {name: rest.pop(name) for name in SAME_NAMES if name in state}
    for fc, w, b in LAYERS:
        out[w] = torch.stack([rest.pop(f"{name}.{fc}.weight").T for name in names]).contiguous()
        out[b] = torch.stack([rest.pop(f"{name}.{fc}.bias")[None] for name in names])
    refuse_rest(rest)
    keywords = dict(kind="moe" if experts else "mlp", experts=experts, shared_expert=shared,
                    step_embedding="step_embed.weight" in state, router_bias="router.bias" in state)
    return out, keywords


def refuse_rest(rest):
    if rest:
        names = ", ".join(sorted(rest)[:5])
        raise ValueError(f"the released layout has no place for the adapter's {names}; use PLUME's own "
                         "layout, or say in adapter.py (to_released, from_released) what becomes of it")


RELEASED_ADAPTER, OUR_ADAPTER = "latent_moe_transition.", "adapter."  # their names in the safetensors


def add_tokens(backbone, tokenizer):
    """PLUME's tokens for a plain Qwen-VL; their rows start at the mean of the old ones, in and out."""
    old = len(tokenizer)
    new = [token for token in PLUME_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    spare = len(backbone.get_input_embeddings().weight) - len(tokenizer)  # Qwen-VL has some
    if spare < 0:
        quietly(backbone.resize_token_embeddings, len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    tables = [backbone.get_input_embeddings().weight]
    if backbone.lm_head.weight is not tables[0]:
        tables.append(backbone.lm_head.weight)
    with torch.no_grad():
        for table in tables:
            table[old : len(tokenizer)] = table[:old].float().mean(0).to(table.dtype)


def stored_limits(path, limits):
    """limits with the min_pixels and max_pixels of preprocessor_config.json, in either spelling."""
    file = os.path.join(path, "preprocessor_config.json")
    if not os.path.exists(file):
        return limits
    raw, found = read_json(file), {}
    size = raw.get("size") if isinstance(raw.get("size"), dict) else {}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        given = [value for value in (raw.get(name), size.get(edge), size.get(name)) if value is not None]
        if given:
            found[name] = given[0]
    try:
        return asdict(Limits(**limits | found))
    except DataError as e:
        raise DataError(f"{file}: {e}") from e


def write_checkpoint(model, folder, released=False, state=None):
    """The files of a checkpoint, into an empty folder; state: the whole one of a sharded model."""
    config, state = copy.deepcopy(model.backbone.config), state or model.state_dict()
    config.__dict__.pop("plume", None)  # a loaded model's
    if released:
        warn_of_lost_settings(model)
    else:
        config.plume = dict(format=FORMAT, **model.settings)
    config.save_pretrained(folder)
    tensors, adapter, tied = {}, {}, config.tie_word_embeddings
    for key, value in state.items():
        if key.startswith("adapter."):
            adapter[key.removeprefix("adapter.")] = value
        elif not (tied and key == "backbone.lm_head.weight"):
            key = key.removeprefix("backbone.")
            if config.model_type != "qwen3_vl":  # the older names, which every transformers version reads
                key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            tensors[key] = value
    name = OUR_ADAPTER
    if released:
        name, adapter = RELEASED_ADAPTER, to_released(adapter, model.adapter.shared_expert)
    tensors |= {name + key: value for key, value in adapter.items()}
    file = os.path.join(folder, WEIGHTS)
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    with write_errors(file):
        save_file(tensors, file, {"format": "pt"})
    shutil.copymode(os.path.join(folder, "config.json"), file)  # the library lets nobody else read it
    model.processor.tokenizer.chat_template = chat_template(model.processor)
    model.processor.tokenizer.save_pretrained(folder)
    limits, facts = model.processor.limits, model.processor.backbone
    media = dict(  # what other Qwen-VL software reads
        image_processor_type="Qwen2VLImageProcessor", min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels, patch_size=facts.patch, merge_size=facts.merge,
        temporal_patch_size=facts.temporal, image_mean=facts.mean, image_std=facts.std)
    with open(os.path.join(folder, "preprocessor_config.json"), "w") as f:
        json.dump(media, f, indent=1)


def warn_of_lost_settings(model):
    """Names the settings for which somebody who loads the released layout gets other values."""
    ours, adapter = model.settings, model.adapter
    if model.backbone.config.model_type != "qwen2_vl":
        raise DataError(f"the released layout is that of a Qwen2-VL, and this is a "
                        f"{model.backbone.config.model_type}")
    if adapter.kind in ("none", "parallel"):
        raise DataError("the released layout has no way to say that there is no adapter, or that there "
                        "are learnt tokens")
    _, keywords = from_released(to_released(adapter.state_dict(), adapter.shared_expert))
    lost = {k: v for k, v in ours.items() if k not in ("limits", "adapter") and v != RELEASED[k]}
    if adapter.kind == "moe":
        implied = ADAPTER | keywords
        lost |= {k: v for k, v in ours["adapter"].items() if v != implied[k]}
    stored, implied = ("min_pixels", "max_pixels"), RELEASED["limits"]
    lost |= {k: v for k, v in ours["limits"].items() if k not in stored and v != implied[k]}
    if lost:
        warnings.warn(f"the released layout implies other values than this model's {lost}; give these to "
                      "from_pretrained when you load it")


def read_checkpoint(path, dtype, revision=None, token=None):
    """A folder, or a name on the hub -> backbone, tokenizer, settings, the adapter's state or None.

    The three layouts are those of `Plume.from_pretrained`.
    """
    path = local_folder(os.fspath(path), revision, token)
    raw = read_json(os.path.join(path, "config.json"))
    model_type = raw.get("model_type")
    if model_type not in BACKBONES:
        raise DataError(f"{path}: config.json: model_type {quote(model_type)}; PLUME builds on "
                        f"{', '.join(BACKBONES)}.{closest(model_type, BACKBONES)}")
    tensors, block = read_weights(path), raw.get("plume")
    if block is None and any(name.startswith(OUR_ADAPTER) for name in tensors):
        raise DataError(f"{path}: config.json has no 'plume' block, which says how these weights were "
                        "trained; take config.json from the checkpoint that train.py or save_pretrained "
                        "wrote")
    prefix = RELEASED_ADAPTER if block is None else OUR_ADAPTER
    adapter = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    rest = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    backbone, tokenizer = build_backbone(path, rest, dtype), read_tokenizer(path)
    if block is not None:  # (a)
        return backbone, tokenizer, current_format(block, path), adapter
    if adapter:  # (b)
        if model_type != "qwen2_vl":
            raise DataError(f"{path}: the released layout, with a {model_type}: it is that of a "
                            "Qwen2-VL, and does not say how others are to be read")
        try:
            adapter, keywords = from_released(adapter)
        except (LookupError, ValueError, RuntimeError) as e:
            raise DataError(f"{path}: its adapter's tensors are incomplete or do not fit each other: "
                            f"{reason(e)}") from e
        limits = stored_limits(path, RELEASED["limits"])
        return backbone, tokenizer, dict(RELEASED, adapter=keywords, limits=limits), adapter
    limits = stored_limits(path, limits_of(model_type))  # (c)
    add_tokens(backbone, tokenizer)
    return backbone, tokenizer, dict(template=TEMPLATES[model_type], limits=limits), None
