"""A checkpoint folder in one of three layouts <-> backbone, tokenizer, settings, the adapter's weights.

    ours        config.json has a `plume` block; the adapter's weights are adapter.*
    released    does not describe itself; known by its latent_moe_transition.* weights
    plain       a Qwen-VL without an adapter, to start training from

Released checkpoints keep each expert as two nn.Linear, which store the transpose of our stacked tensors.
"""

import copy
import os
import shutil
import warnings

import torch
from safetensors.torch import save_file

from adapter import TransitionAdapter
from backbones.families import BACKBONES, limits_of
from backbones.tokens import read_whole
from data import PLUME_TOKENS, TEMPLATES
from files.errors import closest, DataError, quote, reason
from files.writing import write_errors
from hub.card import chat_template
from hub.limits import stored_limits, write_limits
from hub.settings import ADAPTER, FORMAT, RELEASED, stored_settings
from hub.weights import (
    build_backbone, FLOATS, local_folder, quietly, read_json, read_tokenizer, read_weights, WEIGHTS,
    without_weights)

OUR_ADAPTER, RELEASED_ADAPTER = "adapter.", "latent_moe_transition."  # in front of its weights' names
SAME_NAMES = ("ln.weight", "ln.bias", "step_embed.weight", "router.weight", "router.bias")
LAYERS = (("fc1", "w1", "b1"), ("fc2", "w2", "b2"))  # of an expert: released name, our weights, our biases


def read_checkpoint(path, dtype, revision=None, token=None):
    """A folder, or a name on the hub -> backbone, tokenizer, settings, the adapter's state or None, and what
    to tell the user of limits that are of others' files.
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
    adapter = split_adapter(tensors, RELEASED_ADAPTER if block is None else OUR_ADAPTER)
    backbone, tokenizer = build_backbone(path, tensors, dtype), read_tokenizer(path)
    if block is not None:  # ours
        return backbone, tokenizer, stored_settings(block, path), adapter, ""
    if not adapter:  # plain
        add_tokens(backbone, tokenizer)
        limits, said = stored_limits(path, limits_of(model_type), model_type)
        return backbone, tokenizer, dict(template=TEMPLATES[model_type], limits=limits), None, said
    if model_type != "qwen2_vl":  # released
        raise DataError(f"{path}: the released layout, with a {model_type}: it is that of a Qwen2-VL, and "
                        "does not say how others are to be read")
    try:
        adapter, keywords = from_released(adapter)
    except (LookupError, ValueError, RuntimeError) as e:
        raise DataError(f"{path}: its adapter's tensors are incomplete or do not fit each other: "
                        f"{reason(e)}") from e
    # clips have the limits of the released evaluation
    limits, said = stored_limits(path, RELEASED["limits"], model_type, ("image",))
    return backbone, tokenizer, dict(RELEASED, adapter=keywords, limits=limits), adapter, said


def write_checkpoint(model, folder, released=False, state=None):
    """The files of a checkpoint, into a folder; state: the whole one of a sharded model."""
    config = copy.deepcopy(model.backbone.config)
    config.__dict__.pop("plume", None)  # a loaded model's
    if released:
        warn_of_lost_settings(model)
    else:
        config.plume = dict(format=FORMAT, **model.settings)
    file, tensors = os.path.join(folder, WEIGHTS), stored_tensors(model, released, state)
    config.save_pretrained(folder)
    with write_errors(file):
        save_file(tensors, file, {"format": "pt"})
    shutil.copymode(os.path.join(folder, "config.json"), file)  # the library lets nobody else read it
    tokenizer = model.processor.tokenizer
    read_whole(tokenizer)  # a call of the tokenizer may have switched it on again
    tokenizer.chat_template = chat_template(model.processor)
    tokenizer.save_pretrained(folder)
    write_limits(folder, model.processor.limits, model.processor.backbone)


def split_adapter(tensors, prefix):
    """Takes the adapter's tensors out of a dict of all -> its state dict."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def stored_tensors(model, released, state=None):
    """{name in the safetensors: tensor} of a model."""
    config, tensors, state = model.backbone.config, {}, state or model.state_dict()
    check_tensors(model, state)
    for key, value in state.items():
        if not (config.tie_word_embeddings and key == "backbone.lm_head.weight"):
            key = key.removeprefix("backbone.")
            if config.model_type != "qwen3_vl":  # the older names, which every transformers version reads
                key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            tensors[key] = value
    if released:
        adapter = to_released(split_adapter(tensors, OUR_ADAPTER), model.adapter.shared_expert)
        tensors |= {RELEASED_ADAPTER + key: value for key, value in adapter.items()}
    return {key: value.cpu().contiguous() for key, value in tensors.items()}


def check_tensors(model, state):
    """DataError unless `state` has what a plain model of this configuration has: no other can be loaded."""
    config = model.backbone.config
    with torch.device("meta"):
        adapter = TransitionAdapter(config.text_config.hidden_size, **model.settings["adapter"])
    needed = {}
    for prefix, part in (("backbone.", without_weights(config)), (OUR_ADAPTER, adapter)):
        needed |= {prefix + name: tensor.shape for name, tensor in part.state_dict().items()}
    wrong = [f"{name} is missing" for name in needed if name not in state]
    for name, tensor in state.items():
        if name not in needed:
            wrong.append(f"{name} is unknown")
        elif tensor.shape != needed[name] or tensor.dtype not in FLOATS:
            wrong.append(f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, not of {tuple(needed[name])}")
    head, embed = "backbone.lm_head.weight", "backbone.model.language_model.embed_tokens.weight"
    if not wrong and config.tie_word_embeddings:
        head, embed = state[head], state[embed]
        if head.data_ptr() != embed.data_ptr() and not torch.equal(head, embed):
            wrong.append("lm_head is not the input embedding any more, as tie_word_embeddings says")
    if wrong:
        raise DataError(
            f"nothing is saved: {len(wrong)} tensors are not those of a plain {config.model_type} with "
            f"PLUME's adapter, and a checkpoint of them could not be loaded: {'; '.join(sorted(wrong)[:4])}. "
            "Save the model itself: merge adapters first (peft: merge_and_unload), take off what wraps it "
            "(torch.compile, DDP, quantisation), remove what was added")


def warn_of_lost_settings(model):
    """Names the settings for which somebody who loads the released layout gets other values."""
    ours, adapter, model_type = model.settings, model.adapter, model.backbone.config.model_type
    if model_type != "qwen2_vl":
        raise DataError(f"the released layout is that of a Qwen2-VL, and this is a {model_type}")
    if adapter.kind in ("none", "parallel"):
        raise DataError("the released layout has no way to say that there is no adapter, or that there "
                        "are learnt tokens")
    said, implied = ours | ours["limits"], RELEASED | RELEASED["limits"]
    _, keywords = from_released(to_released(adapter.state_dict(), adapter.shared_expert))
    if adapter.kind == "moe":
        said, implied = said | ours["adapter"], implied | ADAPTER | keywords
    stored = ("limits", "adapter", "min_pixels", "max_pixels")
    lost = {k: v for k, v in said.items() if k not in stored and v != implied[k]}
    if lost:
        warnings.warn(f"the released layout implies other values than this model's {lost}; give these to "
                      "from_pretrained when you load it")


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


def expert_names(experts, shared_expert):
    """The released names of the experts, in the order in which our tensors stack them."""
    names = [f"experts.{i}" for i in range(experts)]
    return ["shared_expert", *names] if shared_expert else names


def refuse_rest(rest):
    if rest:
        names = ", ".join(sorted(rest)[:5])
        raise ValueError(f"the released layout has no place for the adapter's {names}; use PLUME's own "
                         "layout, or say in hub/layouts.py (to_released, from_released) what becomes of it")


def add_tokens(backbone, tokenizer):
    """PLUME's tokens for a plain Qwen-VL; their rows start at the mean of the old ones, in and out."""
    old = len(tokenizer)
    new = [token for token in PLUME_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    if len(tokenizer) > len(backbone.get_input_embeddings().weight):  # Qwen-VL has spare rows
        quietly(backbone.resize_token_embeddings, len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for table in (backbone.get_input_embeddings().weight, backbone.lm_head.weight):  # often the same
            table[old : len(tokenizer)] = table[:old].float().mean(0).to(table.dtype)
