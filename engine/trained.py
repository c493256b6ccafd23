"""What of a model a run trains: all, all but vision tower or backbone, or LoRA around frozen weights.

LoRA (arXiv 2106.09685): a projection W of the decoder computes W x + 2 B A x, where only A (rank, in), random
at first, and B (out, rank), zero at first, are trained; peft puts them there.  The transition adapter is
trained whole, and so are PLUME's tokens' rows of the embedding, which all start at the same mean in a plain
Qwen-VL.  The rest is frozen, without gradients and moments, and with --lora_bits rounded (QLoRA, arXiv
2305.14314).  A checkpoint has the merged weights, as a plain one; the state of the run has what is trained,
and --resume puts it on the weights of --init again.
"""

import hashlib
import importlib.util
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import PLUME_TOKENS
from files.errors import DataError, nearest
from hub.folders import NEWEST

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BITS = {0: "peft", 8: "torchao", 4: "bitsandbytes"}  # of a frozen weight: the package that it takes
LM, HEAD = "backbone.model.language_model", "backbone.lm_head"


def check_lora(cfg):
    """Raises DataError for flags that do not go together with --lora, or without it."""
    unknown, bits = [target for target in targets_of(cfg) if target not in TARGETS], cfg.lora_bits
    if unknown:
        raise DataError(f"--lora_targets {cfg.lora_targets!r}: {unknown[0]!r} is none of "
                        f"{', '.join(TARGETS)}.{nearest(unknown[0], TARGETS)}")
    if bits not in BITS:
        raise DataError(f"--lora_bits {bits}: needs 8 or 4, or 0: frozen weights as they are")
    if not cfg.lora:
        if cfg.lora_targets or bits:
            raise DataError("--lora_targets and --lora_bits belong to --lora RANK")
        return
    if not cfg.init:
        raise DataError("--lora: needs --init, the checkpoint whose weights stay as they are")
    if cfg.fsdp:
        raise DataError("--lora: leave out --fsdp: frozen weights have no gradients and moments to shard; "
                        "they are on every rank, in fewer bits with --lora_bits")
    if cfg.freeze_backbone or cfg.freeze_vision == "false":
        raise DataError("--lora: backbone and vision tower are frozen; leave out --freeze_backbone and "
                        "--freeze_vision")
    if os.path.realpath(cfg.init) == os.path.realpath(os.path.join(cfg.out, NEWEST)):
        raise DataError(f"--lora: --resume will read --init {cfg.init} again, and a checkpoint of this run "
                        "would take its place; choose another --out")
    for package in {BITS[0], BITS[bits]}:
        if not importlib.util.find_spec(package):
            raise DataError(f"--lora with --lora_bits {bits}: needs a package: pip install {package}")


def targets_of(cfg):
    return cfg.lora_targets.split(",") if cfg.lora_targets else list(TARGETS)


def choose_trained(cfg, model, device=None):
    """Freezes what is not trained, and adds what --lora trains.  device: see `add_lora`."""
    if cfg.lora:
        add_lora(cfg, model, device)
        return
    if cfg.freeze_vision == "true" or (cfg.freeze_vision == "auto" and cfg.init):
        visual = model.backbone.model.visual.requires_grad_(False)
        for merger in (visual.merger, *getattr(visual, "deepstack_merger_list", ())):
            merger.requires_grad_(True)
    if cfg.freeze_backbone and cfg.init:
        model.backbone.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise DataError("--freeze_backbone: the checkpoint has no adapter, so nothing is left to learn")


# ---- LoRA
def add_lora(cfg, model, device=None):
    """device: where the model goes; weights that are rounded come there one by one, and rounded."""
    from peft import inject_adapter_in_model, LoraConfig  # an extra

    device = device or model.device
    model.requires_grad_(False)
    if cfg.lora_bits and device.type != "meta":
        quantize(model.lm.layers, cfg.lora_bits, device)
    model.to(device)
    config = LoraConfig(r=cfg.lora, lora_alpha=2 * cfg.lora, target_modules=targets_of(cfg))
    inject_adapter_in_model(config, model.lm)
    model.adapter.requires_grad_(True)

    embedding, head = model.lm.embed_tokens, model.backbone.lm_head
    tied = head.weight is embedding.weight
    tokens = torch.tensor([model.processor.id[token] for token in PLUME_TOKENS], device=head.weight.device)
    add_new_rows(embedding, tokens, replace_embeddings)
    add_new_rows(head, tokens, replace_logits, embedding.new_rows if tied else None)


def quantize(layers, bits, device=None):
    """Rounds the weights of the decoder's projections: 8 bits, a scale for each row, or 4, nf4."""
    if bits == 8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(layers, Int8WeightOnlyConfig(), device=device)
        return
    from bitsandbytes.nn import Linear4bit
    for parent in list(layers.modules()):
        for name, layer in parent.named_children():
            if name in TARGETS:
                bias, place = layer.bias is not None, device or layer.weight.device
                rounded = Linear4bit(layer.in_features, layer.out_features, bias, quant_type="nf4")
                rounded.load_state_dict(layer.state_dict())
                rounded.support_avx512bf16_for_cpu = False  # its layout, once used, bears no training
                setattr(parent, name, rounded.requires_grad_(False).to(place))


def add_new_rows(module, tokens, hook, rows=None):
    """Makes the rows `tokens` (n,) of a frozen (V, D) weight a parameter (n, D), which the hook puts in."""
    module.register_buffer("new_tokens", tokens, persistent=False)
    module.new_rows = nn.Parameter(module.weight[tokens].clone()) if rows is None else rows
    module.register_forward_hook(hook)


def replace_embeddings(embedding, args, x):
    """x (..., D) of the token ids in args: those of new tokens are the trained rows."""
    at = args[0][..., None] == embedding.new_tokens  # (..., n)
    rows = F.embedding(at.int().argmax(-1), embedding.new_rows)  # exact under autocast, too
    return torch.where(at.any(-1, keepdim=True), rows, x)


def replace_logits(head, args, logits):
    """logits (..., V) of the states in args: those of new tokens come from the trained rows."""
    new = F.linear(args[0], head.new_rows)
    return logits.index_copy(-1, head.new_tokens, new.to(logits.dtype))


# ---- what is written and read again
@torch.no_grad()
def merged_weights(model):
    """{name: tensor on the CPU} of the plain model that computes the same as one with LoRA."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    weights = {}
    for name, tensor in model.state_dict().items():
        projection = name.startswith(LM) and not set(TARGETS).isdisjoint(name.split("."))
        if not projection and not name.endswith(".new_rows"):
            weights[name] = tensor.cpu()
    for name, layer in model.lm.named_modules(prefix=LM):
        if name.rpartition(".")[2] not in TARGETS:
            continue
        base, change = layer, 0
        if isinstance(layer, LoraLayer):
            base, change = layer.get_base_layer(), layer.get_delta_weight("default")
        weights[f"{name}.weight"] = (dequantize_module_weight(base) + change).cpu()
        if base.bias is not None:
            weights[f"{name}.bias"] = base.bias.cpu()
    for name, module in ((f"{LM}.embed_tokens", model.lm.embed_tokens), (HEAD, model.backbone.lm_head)):
        weights[f"{name}.weight"] = module.weight.index_copy(0, module.new_tokens, module.new_rows).cpu()
    return weights


def size_of_merged(model, weights):
    """How many numbers there are in `merged_weights`, a tied embedding counted once."""
    twice = model.backbone.config.tie_word_embeddings
    return sum(tensor.numel() for name, tensor in weights.items() if not (twice and name == f"{HEAD}.weight"))


def trained_weights(model):
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(model, weights):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == weights.keys(), "other parameters"
    for name, p in trained.items():
        p.copy_(weights[name])


def hash_of_frozen(cfg, model):
    """{"frozen": hash of the backbone's weights as LoRA finds them}: a run goes on only from the same.

    Without the rows of new tokens: of a plain Qwen-VL they are a mean, which CPUs round differently.
    """
    if not cfg.lora:
        return {}
    h = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(merged_weights(model).items()):
        if name in (f"{LM}.embed_tokens.weight", f"{HEAD}.weight"):
            tensor = tensor.index_fill(0, model.lm.embed_tokens.new_tokens.cpu(), 0)
        if name.startswith("backbone."):
            h.update(name.encode())
            h.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return dict(frozen=h.hexdigest())
