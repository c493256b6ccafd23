"""What a checkpoint says about itself: the `plume` block of config.json, its defaults and checks.

`limits` is backbones.families.Limits, `template` data.TEMPLATE, `adapter` TransitionAdapter's keywords.
`prompts`: hub/prompts.py.
`adaptive`: trained for mode auto; `one_space`: latent and single-pass embeddings are trained to compare.
"""

import warnings
from dataclasses import asdict

from backbones.families import Limits
from data import TEMPLATE
from files.errors import DataError, quote
from files.jsonl import only_keys
from hub.prompts import fill_prompts, PROMPTS

FORMAT = 2  # of a checkpoint.  In format 1 a line break stood behind pictures and clips: other vectors
RELEASED_PROMPT = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First "
    "output the thinking process in <think> </think> tags and then summarize the entire input in a word or "
    "sentence. Finally, use the <gen_emb> tag to represent the entire input.")
ADAPTER = dict(kind="moe", experts=4, top_k=2, shared_expert=True, anchor=True, step_embedding=True,
               router_bias=False)
DEFAULTS = dict(latent_steps=8, latent_positions="mrope", adaptive=False, prompt=RELEASED_PROMPT,
                one_space=False, white_image=False, template=TEMPLATE, adapter=ADAPTER,
                limits=asdict(Limits()), prompts=PROMPTS)
# What the released layout implies and does not say; the pixels and tokens of its evaluation.
RELEASED = dict(DEFAULTS, latent_positions="cache", white_image=True,
                limits=asdict(Limits(min_pixels=784, max_pixels=2359296, max_len=11288)))


def stored_settings(block, path):
    """The settings in a checkpoint's `plume` block, which must be complete and of this format."""
    there = block.get("format", 1) if isinstance(block, dict) else block
    if not isinstance(block, dict) or there != FORMAT:
        raise DataError(
            f"{path}: a checkpoint of format {quote(there)}, this version reads format {FORMAT}. The formats "
            "embed the same item differently (1 has a line break behind pictures and clips, and other "
            "positions behind clips), so its vectors would be wrong: train it again with this version, or "
            "use the version of PLUME that wrote it")
    settings = dict(adaptive=False, one_space=False, prompts={}) | block  # older ones know none of these
    del settings["format"]
    if isinstance(settings.get("limits"), dict):  # older ones are of Qwen2-VL, whose clips have no seconds
        settings["limits"] = dict(frame_rate=Limits.frame_rate, fps=Limits.fps) | settings["limits"]
    return fill_settings(settings, DEFAULTS, f"{path}: config.json: plume", complete=True)


def fill_settings(given, defaults, where, complete=False):
    """A dict (perhaps of dicts) filled up from `defaults`; unknown keys and other types are errors.

    complete: what is missing is an error, too.
    """
    only_keys(given, defaults, where)
    out = {}
    for key, default in defaults.items():
        if complete and key not in given:
            raise DataError(f"{where}: lacks {key!r}: how it was trained must be said, nothing is assumed; "
                            "take config.json from the checkpoint that train.py or save_pretrained wrote, or "
                            "train it again")
        value = given.get(key, default)
        if type(value) is not type(default):
            kind = type(default).__name__
            raise DataError(f"{where}: {key!r} must be of type {kind}, got {quote(value)}")
        if key == "prompts":
            value = fill_prompts(value, where)
        elif isinstance(default, dict):
            value = fill_settings(value, default, f"{where}: {key}", complete)
        out[key] = value
    return out


def warn_of_two_spaces(settings, mode, index):
    """mode, index: of queries, and of what they look for."""
    if mode != index and not settings["one_space"]:
        warnings.warn("this checkpoint does not say that its latent and single-pass embeddings are one space "
                      f"(those of train.py --w_cross do): queries in mode {mode} hardly find what is "
                      f"embedded in mode {index}")
