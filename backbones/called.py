"""Which modules the forward calls, and which it only reads: an adapter around these would do nothing."""

import re

from files.errors import DataError

LM, VISUAL = r"backbone\.model\.language_model", r"backbone\.model\.visual"
LAYER = rf"{LM}\.layers\.\d+"
READ = [r"backbone\.lm_head", rf"{LM}\.norm", rf"{LAYER}\.(?:input|post_attention)_layernorm",
        rf"{LAYER}\.self_attn\.[qk]_norm", r"adapter\.(?:step_embed|tokens)"]
CALLED = [rf"{LM}\.embed_tokens", rf"{LAYER}\.self_attn\.[qkvo]_proj",
          rf"{LAYER}\.mlp\.(?:gate|up|down)_proj", r"adapter\.(?:ln|router)"]
# Qwen2-VL's tower is written out, too (backbones/vision.py)
READ_2 = [*READ, rf"{VISUAL}\.patch_embed\.proj"]
CALLED_2 = [*CALLED, rf"{VISUAL}\.blocks\.\d+\.(?:norm1|norm2|mlp|attn\.qkv|attn\.proj)",
            rf"{VISUAL}\.merger"]


def check_called(model):
    """DataError where a parameter of a Plume stands in a module around one that the forward only reads.

    Whatever wraps a module in the usual way (LoRA) has such parameters.  The names are looked at again when
    the modules are others than `model.checked`.
    """
    modules = [*model.backbone.modules(), *model.adapter.modules()]
    if modules == model.checked:
        return
    read, called = READ, [*CALLED, VISUAL]
    if model.backbone.config.model_type == "qwen2_vl":
        read, called = READ_2, CALLED_2
    own = r"(?:weight|bias|new_rows|parametrizations\..*)"
    # whoever changes the adapter may add parameters and layers
    adapter = r"adapter\.(?!step_embed\.|tokens\.|modules_to_save|original_module).*"
    known = re.compile(rf"(?:{'|'.join(read)})\.{own}|(?:{'|'.join(called)})\..*|{adapter}")
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name.startswith(("backbone.", "adapter.")) and not known.fullmatch(name):
            only_read = re.match(rf"(?:{'|'.join(read)})(?=\.)", name)
            if only_read:
                name = f"{only_read[0]}, a {type(model.get_submodule(only_read[0])).__name__}"
            raise DataError(
                f"{name}: PLUME's forward reads weights there and does not call the module, so that what is "
                "wrapped around it would have no effect and no gradient. Leave it out of the adapter's "
                "target_modules (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj and "
                "embed_tokens are called; with all-linear exclude_modules=['lm_head', "
                "'patch_embed.proj']) and modules_to_save, train its own weight, or merge it (peft: "
                "merge_and_unload)")
    model.checked = modules
