"""What every Qwen-VL folder holds: configuration, weights, tokenizer.  Errors name the file."""

import os
import re

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open, SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from files.errors import DataError, lfs_hint, quote, reason
from files.jsonl import parse_json
from files.writing import require_utf8

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What transformers raises for a configuration that makes no sense
CONFIG_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError,
                 StrictDataclassError)


def local_folder(path, revision=None, token=None):
    """A checkpoint folder, or the name of one on the hub, which is downloaded -> the folder."""
    require_utf8(path)
    if os.path.isdir(path) and revision is not None:
        raise DataError(f"{path}: a folder here has no revision {quote(revision)}; leave it out, or give the "
                        "name of a repository on the hub")
    if not os.path.isdir(path):
        try:
            path = huggingface_hub.snapshot_download(
                path, revision=revision, token=token, allow_patterns=["*.json", "*.safetensors", "*.txt"])
        except (OSError, ValueError) as e:  # no such name, or no network
            raise FileNotFoundError(f"{quote(path)}: no such checkpoint folder, and the Hugging Face hub "
                                    f"says: {reason(e)}") from e
    if not os.path.exists(os.path.join(path, "config.json")):
        inside = os.path.join(path, "checkpoint")  # as train.py --out names it
        if os.path.exists(os.path.join(inside, "config.json")):
            raise FileNotFoundError(f"{quote(path)}: the folder of a run; its checkpoint is {inside}")
        raise FileNotFoundError(f"{path!r}: no config.json in this folder; a checkpoint has config.json, "
                                "*.safetensors and a tokenizer")
    return path


def read_weights(path):
    """-> {name: tensor} of all weights of a checkpoint folder."""
    tensors = {}
    for file, names in weight_files(path).items():
        try:
            with safe_open(file, "pt") as f:
                found = {name: f.get_tensor(name) for name in f.keys()}
        except (SafetensorError, OSError) as e:
            raise DataError(f"{file}: not a whole safetensors file: {reason(e)}{lfs_hint(file)}") from e
        if names is not None and names != found.keys():
            odd = quote(min(names ^ found.keys()))
            raise DataError(f"{file}: does not hold what {INDEX} says; one of them has {odd}, the other has "
                            "not")
        for name, tensor in found.items():
            if tensor.dtype not in FLOATS:
                raise DataError(f"{file}: {name} is stored as {tensor.dtype}; weights are floating-point "
                                "numbers of 16 bits or more")
        tensors |= found
    return tensors


def weight_files(path):
    """The files of a checkpoint's weights, as transformers finds them -> {file: its tensors, None: all}"""
    single, index = os.path.join(path, WEIGHTS), os.path.join(path, INDEX)
    if os.path.isfile(single):
        return {single: None}
    if not os.path.isfile(index):
        raise FileNotFoundError(f"{path}: neither {WEIGHTS} nor {INDEX} in this folder; other weight formats "
                                "are not read")
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    fine = [isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names]
    if not names or not all(fine):
        raise DataError(f"{index}: its 'weight_map' must name a .safetensors file of this folder for each "
                        "weight")
    files = {}
    for tensor, name in places.items():
        files.setdefault(os.path.join(path, name), set()).add(tensor)
    for file in sorted(files):
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: {INDEX} names this file, and it is not there")
    return files


def build_backbone(path, tensors, dtype):
    """The model that config.json describes, with these weights; DataError when they do not fit it."""
    try:
        config = AutoConfig.from_pretrained(path)
        meta = without_weights(config)
        described, held = count_parameters(meta), sum(t.numel() for t in tensors.values())
        if described > 2 * held + 10**6:  # it would only fill the memory
            raise ValueError(f"a model of {described:,} parameters, and the files hold {held:,}")
        backbone, info = quietly(
            type(meta).from_pretrained, None, config=config, state_dict=tensors,
            dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    except CONFIG_ERRORS as e:
        raise DataError(f"{path}: config.json describes no Qwen-VL that can be built: {reason(e)}") from e
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    for name, there, needed in info["mismatched_keys"]:
        wrong.append(f"{name}: {tuple(there)} in the file, {tuple(needed)} by config.json")
    if wrong:
        raise DataError(f"{path}: weights do not fit the configuration, {len(wrong)} names are missing, "
                        f"unknown or of another shape: {sorted(wrong)[:5]}")
    return backbone


def without_weights(config):
    """The backbone that a configuration describes, on the device "meta": names and shapes alone."""
    with torch.device("meta"):
        return quietly(AutoModelForImageTextToText.from_config, config)


def count_parameters(model, trained=False):
    """How many numbers there are in the weights; trained: in those that are trained."""
    return sum(count_numbers(p) for p in model.parameters() if p.requires_grad or not trained)


def count_numbers(p):
    packed = getattr(p, "quant_state", None)  # bitsandbytes: two numbers in a byte
    return p.numel() if packed is None else packed.shape.numel()


def align_weights(model):
    """Copies every weight on a CPU that does not begin at a multiple of 64 bytes, as torch's own memory does.

    Tensors that are read from a file lie anywhere.  A product then takes another path: slower, and with other
    last bits than the same weights have after training (oneMKL promises equal results for arrays that begin
    at multiples of 64).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return side_by_side(model)


@torch.no_grad()
def side_by_side(model):
    """Moves q, k, v and gate, up of each layer to one piece of memory, for one product of all of them.

    `.to` another device or type takes them apart again, and so does a deep copy: results stay, kernels are
    more.
    """
    for layer in model.lm.layers:
        att, mlp = layer.self_attn, layer.mlp
        for layers in ((att.q_proj, att.k_proj, att.v_proj), (mlp.gate_proj, mlp.up_proj)):
            for name in ("weight", "bias"):
                parts = [getattr(layer, name) for layer in layers]
                if parts[0] is not None:
                    for part, data in zip(parts, torch.cat(parts).split([len(p) for p in parts])):
                        part.data = data
    return model


def read_tokenizer(path):
    """The tokenizer of a checkpoint folder."""
    needed = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(needed) and not os.path.isfile(os.path.join(path, "vocab.json")):
        raise FileNotFoundError(f"{needed}: no such file; a checkpoint has its tokenizer beside it")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if os.path.isfile(os.path.join(path, name)):
            read_json(os.path.join(path, name))  # an error names the file
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as e:  # the tokenizers library raises nothing narrower
        raise DataError(f"{needed}: the tokenizer cannot be read: {reason(e)}") from e


def read_json(file, kind=dict):
    """The object, or another kind of value, in a JSON file of a checkpoint."""
    with open(file, "rb") as f:
        value = parse_json(f.read(), file)
    if not isinstance(value, kind):
        needs = "an object" if kind is dict else f"a {kind.__name__}"
        raise DataError(f"{file}: needs {needs}, got {quote(value)}")
    return value


def quietly(make, *args, **kwargs):
    """Call a transformers constructor without its bars and reports; what they would say is checked here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return make(*args, **kwargs)
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
