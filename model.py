"""Plume: a Qwen2-VL backbone, the transition adapter and a processor, in one module.

    model = Plume.from_pretrained("out/checkpoint")
    vectors = model.encode(["a red car", {"image": "car.jpg"}, {"text": "what happens here?", "video": "clip.mp4"}])

transformers supplies configuration, weights, tokenizer and the vision tower; the decoder runs in latent.py.
How a checkpoint was trained is the `plume` block of its config.json, and nothing else has to be known to use it.
"""

import contextlib
import copy
import itertools
import json
import operator
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict

import huggingface_hub
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.utils import logging as transformers_logging
from transformers.vision_utils import get_vision_position_ids

from adapter import MAX_STEPS, TransitionAdapter, from_released, to_released
from data import (
    IMAGE_SUFFIXES, MERGE, PATCH, PLUME_TOKENS, TEMPLATE, TEMPORAL, VIDEO_SUFFIXES, DataError, Limits, Processor, Side,
    collate, fixed_strings, nearest, only_keys, parse_item, parse_json, quote, reason, to_device, train_tokenizer,
    write_errors)
from latent import Prefix, at, at_least_float32, greedy, rollout, single_pass

RELEASED_PROMPT = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First output the "
    "thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. Finally, use "
    "the <gen_emb> tag to represent the entire input.")
RELEASED_ADAPTER, OUR_ADAPTER = "latent_moe_transition.", "adapter."  # their names in the safetensors
FORMAT = 2  # of a checkpoint.  In format 1 a line break stood behind pictures and clips: other vectors
MODES = ("latent", "single", "cot")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What transformers raises for a configuration that makes no sense
CONFIG_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError,
                 StrictDataclassError)
# What a checkpoint of ours consists of
FILES = ("config.json", WEIGHTS, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "train_state.pt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPECIAL_IDS = dict(image_token_id="image_pad", video_token_id="video_pad", vision_start_token_id="vision_start", vision_end_token_id="vision_end")

# What a checkpoint says about itself: `limits` is data.Limits, `template` data.TEMPLATE, `adapter` TransitionAdapter's
# keywords.
ADAPTER = dict(kind="moe", experts=4, top_k=2, shared_expert=True, anchor=True, step_embedding=True, router_bias=False)
DEFAULTS = dict(latent_steps=8, latent_positions="mrope", prompt=RELEASED_PROMPT, white_image=False,
                template=TEMPLATE, adapter=ADAPTER, limits=asdict(Limits()))
# What the released layout implies and does not say; the pixels and tokens of its evaluation.
RELEASED = dict(DEFAULTS, latent_positions="cache", white_image=True,
                limits=asdict(Limits(min_pixels=784, max_pixels=2359296, max_len=11288)))

# Shapes of models with new random weights.  tiny: 1.5 million parameters, plus 128 for each token; a laptop trains it.
# Qwen2-VL's own 0.02 as the standard deviation of new weights is made for a width of 1536: here pictures would not be read
# at all (docs/log.md).  rope_theta: with 10000 and heads of 32, columns of a picture would be all but indistinguishable.
# qwen2vl_2b: what Qwen/Qwen2-VL-2B-Instruct's config.json says; for memory and speed, not to be trained from scratch.
SHAPES = {
    "tiny": dict(
        text=dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=128**-0.5,
                  max_position_embeddings=8192, rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 6, 6])),
        vision=dict(depth=1, embed_dim=128, hidden_size=128, num_heads=4, mlp_ratio=2, initializer_range=128**-0.5),
        prompt="Think, then embed.",
        limits=dict(min_pixels=28 * 28, max_pixels=28 * 28 * 36, video_min_pixels=28 * 28, video_max_pixels=28 * 28 * 9, max_len=512, num_frames=16)),
    "qwen2vl_2b": dict(
        text=dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, vocab_size=151936,
                  max_position_embeddings=32768, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
        vision=dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4),
        prompt=RELEASED_PROMPT, limits={}),
    "mid": dict(  # for measuring speed on a CPU
        text=dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
                  max_position_embeddings=8192, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12])),
        vision=dict(depth=8, embed_dim=320, hidden_size=512, num_heads=8, mlp_ratio=4),
        prompt="Think, then embed.", limits={}),
}
# The fixed strings around every item, one token each: in a tiny model they would be most of the work.
FRAME = [SHAPES["tiny"]["prompt"], *fixed_strings(TEMPLATE)]


class Plume(nn.Module):
    """backbone: Qwen2VLForConditionalGeneration; tokenizer: with PLUME's tokens; settings: the `plume` block."""

    def __init__(self, backbone, tokenizer, settings):
        super().__init__()
        self.settings = checked(settings, DEFAULTS, "settings (the plume block of config.json)")
        text, vision = backbone.config.text_config, backbone.config.vision_config
        sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        rope, half = text.rope_parameters or {}, text.hidden_size // text.num_attention_heads // 2
        axes = rope.get("mrope_section")
        known = isinstance(axes, list) and [type(n) for n in axes] == [int] * 3 and min(axes) >= 0 and sum(axes) == half
        known = known and rope.get("rope_type") == "default" and not text.use_sliding_window
        if sizes != (PATCH, MERGE, TEMPORAL) or not known:
            raise DataError(
                "this backbone is not a plain Qwen2-VL: needs patch size 14, merge 2, temporal patch 2, default rotary "
                f"embedding with an mrope_section of 3 numbers that sum to {half}, no sliding window; has {sizes}, "
                f"{quote(rope)}")
        self.backbone = backbone
        if not 0 <= self.settings["latent_steps"] <= MAX_STEPS or self.settings["latent_positions"] not in ("mrope", "cache"):
            raise DataError(f"latent_steps {self.settings['latent_steps']}, latent_positions "
                            f"{quote(self.settings['latent_positions'])}: needs 0..{MAX_STEPS}, 'mrope' or 'cache'")
        limits = Limits(**self.settings["limits"])
        try:
            self.adapter = TransitionAdapter(text.hidden_size, **self.settings["adapter"])
        except (ValueError, RuntimeError) as e:
            raise DataError(f"settings: adapter: {reason(e)}") from e
        self.processor = Processor(tokenizer, self.settings["prompt"], limits, self.settings["white_image"],
                                   self.settings["template"])
        self.checkpointing = False  # activation checkpointing around every decoder layer
        self.graphs = None  # latent.Graphs(): what comes behind the prefix is replayed as CUDA graphs in `encode`

    @property
    def lm(self):
        return self.backbone.model.language_model

    @property
    def device(self):
        return self.lm.norm.weight.device

    # ------------------------------------------------------------------------------------------------------ computing

    def prefix(self, batch):
        """Token embeddings with the pictures' and clips' features in their places -> latent.Prefix."""
        x = self.lm.embed_tokens(batch["ids"])  # (B, P, D)
        if batch["pixels"] is not None:
            visual = self.backbone.model.visual
            places = get_vision_position_ids(batch["grid"], MERGE).to(x.device, non_blocking=True)
            features = visual(batch["pixels"].to(visual.dtype), grid_thw=batch["grid"], position_ids=places).pooler_output  # (M, D)
            x = x.flatten(0, 1).index_copy(0, batch["media"], features.to(x.dtype)).view_as(x)
        return Prefix(x, batch["positions"], batch["lengths"], batch["disc"])

    def forward(self, batch, steps):
        """One training pass over a collated batch (data.collate) with K = steps.

        -> dict(per_pair=, per_token=), two dicts of tensors.
        per_pair, a row for every query, then one for every target: gen, disc (B, D) unit embeddings; router
        (B, K, E) probabilities.
        per_token, of any length: ce (N,) cross-entropy of every labelled token of the suffix; first (n,) that
        of the first token behind the latents; read (m,) that of the token each latent step replaced, read
        from the state that the step starts from.
        """
        r = rollout(self.lm, self.adapter, self.prefix(batch), steps, self.lm.embed_tokens(batch["suffix"]),
                    self.settings["latent_positions"], self.checkpointing)
        before = torch.cat([r.latents[:, -1:] if steps else r.start[:, None], r.suffix[:, :-1]], 1)  # predicts the suffix
        ce = cross_entropy(before.flatten(0, 1)[batch["label_at"]], self.backbone.lm_head.weight, batch["labels"])
        rows, step, tokens = batch["replaced"].unbind(1)
        states = torch.cat([r.start[:, None], r.latents], 1)  # (B, K+1, D) z_0 .. z_K
        read = cross_entropy(states[rows, step], self.backbone.lm_head.weight, tokens)
        gen = unit(at(r.suffix, batch["gen"]))
        for module, used in ((self.adapter, steps), (self.backbone.model.visual, batch["pixels"] is not None)):
            if not used:  # its gradient is 0, not missing: all ranks have gradients of the same parameters
                gen = gen + sum(0 * p.sum() for p in module.parameters() if p.requires_grad)
        per_pair = dict(gen=gen, disc=unit(r.anchor), router=r.router)
        per_token = dict(ce=ce, first=ce[batch["first"]], read=read)
        return dict(per_pair=per_pair, per_token=per_token)

    @torch.no_grad()
    def embed(self, batch, mode="latent", steps=None, limit=512):
        """A collated batch on the model's device -> (B, D) unit embeddings in float32, (B,) tokens decoded.  See `encode`."""
        prefix, steps = self.prefix(batch), self.settings["latent_steps"] if steps is None else steps
        rule = self.settings["latent_positions"]
        if mode == "cot":
            gen = self.processor.id["<gen_emb>"]
            h, tokens = greedy(self.lm, self.lm.embed_tokens, self.backbone.lm_head, prefix, gen, limit, rule)
            return unit(h), (tokens != gen).sum(1) + 1
        none = torch.zeros_like(batch["lengths"])
        if mode == "single":
            return unit(single_pass(self.lm, prefix)), none
        r = rollout(self.lm, self.adapter, prefix, steps, self.lm.embed_tokens(batch["suffix"]), rule, graphs=self.graphs)
        return unit(at(r.suffix, batch["gen"])), none

    def encode(self, items, mode="latent", steps=None, batch_size=16, progress=False, limit=512, took=None,
               workers=4, bad=None):
        """Embed items -> float32 array (N, D), unit rows, in the order in which `items` gives them.

        items: a list, or anything else that can be iterated, of strings, pictures or {"text"?, "image"?, "video"?}; see
        data.parse_item.  Kinds may be mixed: rows are batched by length.
        mode: "latent" (steps = 0..32, default the checkpoint's K), "single" (one pass), "cot" (greedy rationale, until
        <gen_emb> or `limit` tokens).  progress: a bar, or its label.  took: a dict whose "seconds" (of the model alone) and
        "tokens" (decoded) are added to.  workers: threads that decode and tokenize beside the model.
        bad: a dict.  What cannot be read gets its reason there, by its number, and NaN in its row; without it the first
        such item raises DataError, which names it.  An embedding that is not finite is always a DataError.
        """
        none = np.empty((0, self.lm.config.hidden_size), np.float32)
        windows = self.encoding(items, mode, steps, batch_size, progress, limit, took, workers, bad=bad)
        return np.concatenate([none, *windows])

    def encoding(self, items, mode="latent", steps=None, batch_size=16, progress=False, limit=512, took=None,
                 workers=4, sort=True, bad=None):
        """`encode` in windows of 8 batches: yields the embeddings of the next items as an array.

        sort: the rows of a window are batched by length; False: batches are neighbours as given.
        """
        numbered, total = enumerate(told_of_file_names(iterate(items))), length_hint(items)
        if mode not in MODES:
            raise ValueError(f"mode {quote(mode)}.{nearest(mode, MODES)}")
        if steps is not None and (mode != "latent" or not 0 <= steps <= MAX_STEPS):
            raise ValueError(f"steps {steps} in mode {mode!r}: steps are 0..{MAX_STEPS} and belong to mode 'latent'")
        if min(batch_size, limit, workers) < 1:
            raise ValueError(f"batch_size {batch_size}, limit {limit}, workers {workers}: need at least 1")

        def read(i, item):
            try:
                side = item if isinstance(item, Side) else parse_item(item, where=f"item {i}")
                return dict(self.processor.render(side), where=side.where)
            except DataError as e:
                if bad is None:
                    raise
                bad[i] = str(e)

        def window():
            return [pool.submit(read, i, item) for i, item in itertools.islice(numbered, size)]

        # Items of a window: sorted by length, a batch has little padding.  The media of two windows are in memory.
        size = 8 * batch_size
        was_training, pool = self.training, ThreadPoolExecutor(workers)
        label = progress if isinstance(progress, str) else f"encode ({mode})"
        bar = tqdm(total=total, desc=label, unit="item", disable=not progress)
        self.eval()
        try:
            ahead = window()
            while ahead:  # the next window is read while the model is at work on this one
                samples, ahead = [sample.result() for sample in ahead], window()
                if took is not None:
                    wait(ahead)  # the model alone is timed
                order, numbers, done = list(range(len(samples))), [], []
                if sort:
                    order.sort(key=lambda i: len(samples[i]["ids"]) if samples[i] else 0)
                for a in range(0, len(order), batch_size):
                    rows = [i for i in order[a : a + batch_size] if samples[i]]
                    bar.update(len(order[a : a + batch_size]))
                    if not rows:
                        continue
                    batch = to_device(collate([samples[i] for i in rows], self.processor), self.device)
                    begun = time.perf_counter()
                    vectors, tokens = self.embed(batch, mode, steps, limit)
                    numbers += rows
                    done.append(vectors)
                    if took is not None:
                        took["tokens"] += int(tokens.sum())  # waits for the device
                        took["seconds"] += time.perf_counter() - begun
                out = np.full((len(samples), self.lm.config.hidden_size), np.nan, np.float32)
                if numbers:
                    out[numbers] = torch.cat(done).cpu().numpy()
                if wrong := [samples[i]["where"] for i in sorted(numbers) if not np.isfinite(out[i]).all()]:
                    self.not_finite(wrong)
                yield out
        finally:
            self.train(was_training)
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)

    def not_finite(self, wrong):
        """Raises the error for items whose embeddings are not finite."""
        names = ", ".join(wrong[:10])
        if len(wrong) > 10:
            names += f" and {len(wrong) - 10} more"
        dtype = self.lm.norm.weight.dtype
        broken = [name for name, p in self.named_parameters() if not p.isfinite().all()]
        if broken:
            why = f"the weights are not finite either ({len(broken)} tensors, the first {broken[0]}): the checkpoint is broken"
        elif dtype == torch.float32:
            why = "the weights are finite, so it is something in these items"
        else:
            why = f"the weights are finite; it was computed in {dtype}, try float32"
        raise DataError(f"{names}: the embedding is not finite; {why}")

    # ------------------------------------------------------------------------------------------------- making, loading

    @classmethod
    def random(cls, texts, shape="tiny", seed=0, device="cpu", **settings):
        """One of SHAPES with random weights and a BPE tokenizer trained on `texts` (an iterable of strings).

        device: where the weights are made; "meta" makes none, only their shapes.
        """
        shape, tokenizer = SHAPES[shape], train_tokenizer(texts, FRAME)
        text = {"vocab_size": -(-len(tokenizer) // 64) * 64, **shape["text"]}
        special = {k: tokenizer.convert_tokens_to_ids(f"<|{t}|>") for k, t in SPECIAL_IDS.items()}
        config = Qwen2VLConfig(text_config=dict(text, bos_token_id=None, eos_token_id=None), vision_config=shape["vision"],
                               tie_word_embeddings=True, **special)
        settings = {"prompt": shape["prompt"], **settings, "limits": {**shape["limits"], **settings.get("limits", {})}}
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            return cls(quietly(Qwen2VLForConditionalGeneration, config), tokenizer, settings)

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None, **settings):
        """Load a checkpoint: a local folder, or the name of a repository on the Hugging Face hub.

        (a) ours, with a `plume` block in config.json; (b) the released layout, known by its `latent_moe_transition.*`
        weights, which does not describe itself; (c) a plain Qwen2-VL to start training from: the tokens are added, their
        rows start at the mean of the old ones, the adapter starts near the identity.
        device, dtype: default the best there is, printed with the reason.  settings: override the `plume` block.
        """
        path = os.fspath(path)
        if not os.path.isdir(path):
            try:
                path = huggingface_hub.snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt"])
            except (OSError, ValueError) as e:  # no such name, or no network
                raise FileNotFoundError(
                    f"{quote(path)}: no such checkpoint folder, and the Hugging Face hub says: {reason(e)}") from e
        if not os.path.exists(os.path.join(path, "config.json")):
            raise FileNotFoundError(f"{path!r}: no config.json in this folder; a checkpoint has config.json, *.safetensors and a tokenizer")
        device, dtype = pick_device(device, dtype)
        raw = read_json(os.path.join(path, "config.json"))
        if raw.get("model_type") != "qwen2_vl":
            there = quote(raw.get("model_type"))
            raise DataError(f"{path}: config.json: model_type {there}; PLUME builds on 'qwen2_vl'")
        tensors, block = read_weights(path), raw.get("plume")
        if block is None and any(name.startswith(OUR_ADAPTER) for name in tensors):
            raise DataError(f"{path}: config.json has no 'plume' block, which says how these weights were trained; take "
                            "config.json from the checkpoint that train.py or save_pretrained wrote")
        prefix = RELEASED_ADAPTER if block is None else OUR_ADAPTER
        adapter = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        rest = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        try:
            config = Qwen2VLConfig.from_pretrained(path)
            fits_in_memory(config, rest)
            backbone, info = quietly(Qwen2VLForConditionalGeneration.from_pretrained, None, config=config, state_dict=rest,
                                     dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        except CONFIG_ERRORS as e:
            raise DataError(f"{path}: config.json describes no Qwen2-VL that can be built: {reason(e)}") from e
        wrong = [*info["missing_keys"], *info["unexpected_keys"]]
        for name, there, needed in info["mismatched_keys"]:
            wrong.append(f"{name}: {tuple(there)} in the file, {tuple(needed)} by config.json")
        if wrong:
            raise DataError(f"{path}: weights do not fit the configuration, {len(wrong)} names are missing, unknown or of another shape: {sorted(wrong)[:5]}")
        tokenizer, state = read_tokenizer(path), None
        if block is not None:  # (a)
            state, block = adapter, current_format(block, path)
        elif adapter:  # (b)
            try:
                state, keywords = from_released(adapter)
            except (LookupError, RuntimeError) as e:
                raise DataError(
                    f"{path}: its adapter's tensors are incomplete or do not fit each other: {reason(e)}") from e
            block = dict(RELEASED, adapter=keywords, limits=stored_limits(path, RELEASED["limits"]))
        else:  # (c)
            block = dict(limits=stored_limits(path, DEFAULTS["limits"]))
            add_tokens(backbone, tokenizer)
        for key, value in settings.items():
            block[key] = {**block.get(key, {}), **value} if isinstance(value, dict) else value
        try:
            model = cls(backbone, tokenizer, block)
        except DataError as e:
            raise DataError(f"{path}: {e}") from e
        if state is not None:
            try:
                model.adapter.load_state_dict(state)
            except RuntimeError as e:
                raise DataError(f"{path}: its adapter does not fit {model.settings['adapter']}: {str(e)[:400]}") from e
        model.adapter.to(dtype)
        return aligned(model.to(device))

    def save_pretrained(self, path, released=False):
        """Write a checkpoint folder: config.json, model.safetensors, tokenizer, preprocessor_config.json.

        It appears under its name only when it is complete, in place of the checkpoint that stood there.  released: in the
        released layout, which cannot say how the model was trained; see (b) in `from_pretrained` for what it implies.
        """
        with replacing(path) as folder:
            self.write(folder, released)

    def write(self, folder, released=False, state=None):
        """The files of `save_pretrained`, into an existing folder; state: of the whole model, when this one is sharded."""
        config, state, a = copy.deepcopy(self.backbone.config), state or self.state_dict(), self.adapter
        config.__dict__.pop("plume", None)  # a loaded model's
        if not released:
            config.plume = dict(format=FORMAT, **self.settings)
        elif a.kind == "none":
            raise DataError("the released layout has no way to say that there is no adapter")
        else:
            s, implied = self.settings, dict(RELEASED, adapter=dict(ADAPTER, **from_released(to_released(a.state_dict(), a.shared_expert))[1]))
            stored = ("min_pixels", "max_pixels")
            lost = {k: v for k, v in s.items() if k not in ("limits", "adapter") and v != implied[k]}
            lost |= {k: v for k, v in s["adapter"].items() if v != implied["adapter"][k]} if a.kind == "moe" else {}
            lost |= {k: v for k, v in s["limits"].items() if k not in stored and v != implied["limits"][k]}
            if lost:
                warnings.warn(f"the released layout implies other values than this model's {lost}; give these to from_pretrained when you load it")
        config.save_pretrained(folder)
        tensors = {}
        for key, value in state.items():
            if key.startswith("backbone.") and not (key == "backbone.lm_head.weight" and config.tie_word_embeddings):
                key = key[len("backbone.") :].replace("model.language_model.", "model.").replace("model.visual.", "visual.")
                tensors[key] = value  # the older key layout, which every transformers version reads
        own = {k[len("adapter.") :]: v for k, v in state.items() if k.startswith("adapter.")}
        own, name = (to_released(own, a.shared_expert), RELEASED_ADAPTER) if released else (own, OUR_ADAPTER)
        tensors |= {name + k: v for k, v in own.items()}
        file = os.path.join(folder, WEIGHTS)
        with open(file, "x"):
            mode = os.stat(file).st_mode  # as the umask wants it; the library would let nobody else read the file
        with write_errors(file):
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, file, {"format": "pt"})
        os.chmod(file, mode)
        self.processor.tokenizer.save_pretrained(folder)
        limits = self.processor.limits
        with open(os.path.join(folder, "preprocessor_config.json"), "w") as f:  # what other Qwen2-VL software reads
            json.dump(dict(image_processor_type="Qwen2VLImageProcessor", min_pixels=limits.min_pixels, max_pixels=limits.max_pixels,
                           patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL), f, indent=1)


# ----------------------------------------------------------------------------------------------------------- helpers


def unit(x):
    return F.normalize(at_least_float32(x), dim=-1)


def cross_entropy(h, weight, labels, elements=None):
    """h (N, D), output embedding (V, D), labels (N,) -> (N,) losses.  Never more than about `elements` logits at a time:
    with a 151k vocabulary the rows go in chunks, whose logits are computed again in the backward pass."""
    elements = elements or (1 << 22 if h.device.type == "cpu" else 1 << 27)  # a CPU's chunk fits its cache
    rows = max(1, elements // len(weight))

    def losses(h, labels):
        return F.cross_entropy(at_least_float32(F.linear(h, weight)), labels, reduction="none")

    chunks = zip(h.split(rows), labels.split(rows))
    return torch.cat([checkpoint(losses, *c, use_reentrant=False) if len(h) > rows else losses(*c) for c in chunks])


def pick_device(device=None, dtype=None, say=print):
    """The best device there is (cuda > mps > cpu), bfloat16 where it is fast; said with the reason unless both are given."""
    asked, dtype = (device is not None, dtype is not None), DTYPES.get(dtype, dtype)
    if dtype not in (None, *DTYPES.values()):
        raise DataError(f"dtype {quote(dtype)}: needs 'float32' or 'bfloat16'")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as e:
        raise DataError(f"device {device!r}: needs cuda, mps or cpu") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"device {str(device)!r}: torch finds no CUDA device here; leave it out, or take cpu")
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype is None:
        dtype = torch.bfloat16 if fast else torch.float32
    if not all(asked):
        why = "as asked" if asked[1] else "supported there" if fast else "bfloat16 is not known to be fast there"
        say(f"device {device} ({'as asked' if asked[0] else 'the best available'}), {str(dtype).removeprefix('torch.')} ({why})")
    return device, dtype


def quietly(make, *args, **kwargs):
    """Call a transformers constructor without its progress bars and reports; what they would say is checked here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return make(*args, **kwargs)
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def add_tokens(backbone, tokenizer):
    """PLUME's tokens for a plain Qwen2-VL; their rows start at the mean of the old ones, in and out."""
    old = len(tokenizer)
    tokenizer.add_tokens([t for t in PLUME_TOKENS if t not in tokenizer.get_vocab()], special_tokens=True)
    table = backbone.get_input_embeddings().weight
    if len(tokenizer) > len(table):  # Qwen2-VL keeps spare rows, usually enough
        quietly(backbone.resize_token_embeddings, len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for table in {id(w): w for w in (backbone.get_input_embeddings().weight, backbone.lm_head.weight)}.values():
            table[old : len(tokenizer)] = table[:old].float().mean(0).to(table.dtype)


def iterate(items):
    """An iterator over the items of any container, in its own order; a single item is a TypeError."""
    try:
        if isinstance(items, (str, bytes, Mapping)) or isinstance(items, np.ndarray) and items.ndim == 3:
            raise TypeError
        iterator = iter(items)
    except TypeError:
        raise TypeError(f"items must be a list or another iterable of items, got {type(items).__name__}; put a single "
                        "item into [ ]") from None
    if isinstance(items, Iterable):
        return iterator
    return itertools.islice(iterator, length_hint(items))  # of the older kind: [0], [1], ... as far as it says


def length_hint(items):
    """How many items there are, or None when nobody knows."""
    try:
        hint = operator.length_hint(items, -1)
    except NotImplementedError:
        return None
    return hint if hint >= 0 else None


def told_of_file_names(items):
    """The items as they come; the first string that is the name of a picture or clip gives a warning."""
    told, suffixes = False, IMAGE_SUFFIXES + VIDEO_SUFFIXES
    for item in items:
        if not told and isinstance(item, str) and item.lower().endswith(suffixes) and os.path.isfile(item):
            told = True
            warnings.warn("a string that is the name of a file is embedded as text; for the picture or clip itself "
                          f"give {{'image': ...}} or {{'video': ...}}.  The first is {quote(item)}")
        yield item


def checked(given, defaults, where, complete=False):
    """given, filled up from `defaults` (a dict, perhaps of dicts); unknown keys and values of another type are errors.

    complete: what is missing is an error, too.
    """
    if not isinstance(given, dict):
        raise DataError(f"{where}: needs an object, got {quote(given)}")
    only_keys(given, defaults, where)
    out = {}
    for key, default in defaults.items():
        if complete and key not in given:
            raise DataError(f"{where}: lacks {key!r}: how it was trained must be said, nothing is assumed; take "
                            "config.json from the checkpoint that train.py or save_pretrained wrote, or train it again")
        value = given.get(key, default)
        if type(value) is not type(default):
            raise DataError(f"{where}: {key!r} must be of type {type(default).__name__}, got {quote(value)}")
        if isinstance(default, dict):
            value = checked(value, default, f"{where}: {key}", complete)
        out[key] = value
    return out


def current_format(block, path):
    """The settings in a checkpoint's `plume` block, which must be complete and of this format."""
    there = block.get("format", 1) if isinstance(block, dict) else block
    if there != FORMAT:
        raise DataError(
            f"{path}: a checkpoint of format {quote(there)}, this version reads format {FORMAT}. The formats embed the "
            "same item differently (1 has a line break behind pictures and clips, and other positions behind clips), so "
            "its vectors would be wrong: train it again with this version, or use the version of PLUME that wrote it")
    settings = {key: value for key, value in block.items() if key != "format"}
    return checked(settings, DEFAULTS, f"{path}: config.json: plume", complete=True)


def read_json(file):
    """The object in a JSON file of a checkpoint."""
    with open(file, "rb") as f:
        raw = f.read()
    try:
        value = parse_json(raw, file)
    except DataError as e:
        raise DataError(f"{e}{pointer(file)}") from e
    if not isinstance(value, dict):
        raise DataError(f"{file}: needs an object, got {quote(value)}")
    return value


def pointer(file):
    """A hint when a file is not what it stands for but Git's pointer to it, otherwise ""."""
    with contextlib.suppress(OSError), open(file, "rb") as f:
        if f.read(24) == b"version https://git-lfs.":
            return "; this file is a Git LFS pointer, the contents were not downloaded: git lfs pull"
    return ""


def weight_files(path):
    """-> {file: names of its tensors, None for all}: the weights of a checkpoint, from the files that transformers reads."""
    index = os.path.join(path, INDEX)
    if os.path.isfile(os.path.join(path, WEIGHTS)):
        return {os.path.join(path, WEIGHTS): None}
    if not os.path.isfile(index):
        raise FileNotFoundError(f"{path}: neither {WEIGHTS} nor {INDEX} in this folder; other weight formats are not read")
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
        raise DataError(f"{index}: its 'weight_map' must name a .safetensors file of this folder for each weight")
    files = {}
    for tensor, name in places.items():
        files.setdefault(os.path.join(path, name), set()).add(tensor)
    for file in sorted(files):
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: {INDEX} names this file, and it is not there")
    return files


def read_weights(path):
    """-> {name: tensor} of all weights of a checkpoint folder."""
    tensors, floats = {}, (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for file, names in weight_files(path).items():
        try:
            with safe_open(file, "pt") as f:
                found = {name: f.get_tensor(name) for name in f.keys()}
        except (SafetensorError, OSError) as e:
            raise DataError(f"{file}: not a whole safetensors file: {reason(e)}{pointer(file)}") from e
        if names is not None and names != found.keys():
            odd = quote(min(names ^ found.keys()))
            raise DataError(f"{file}: does not hold what {INDEX} says; one of them has {odd}, the other has not")
        for name, tensor in found.items():
            if tensor.dtype not in floats:
                raise DataError(f"{file}: {name} is stored as {tensor.dtype}; weights are floating-point numbers of 16 "
                                "bits or more")
        tensors |= found
    return tensors


def fits_in_memory(config, tensors):
    """Raises ValueError for a configuration of a far larger model than the weights are: it would only fill the memory."""
    with torch.device("meta"):
        described = sum(p.numel() for p in quietly(Qwen2VLForConditionalGeneration, config).parameters())
    held = sum(t.numel() for t in tensors.values())
    if described > 2 * held + 10**6:
        raise ValueError(f"a model of {described:,} parameters, and the files hold {held:,}")


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


def aligned(model):
    """Copies every weight on a CPU that does not begin at a multiple of 64 bytes, as torch's own memory does.

    Tensors that are read from a file lie anywhere.  A product then takes another path: slower, and with other last bits
    than the same weights have after training (oneMKL promises equal results for arrays that begin at multiples of 64).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def stored_limits(path, limits):
    """limits with the min_pixels and max_pixels of a Qwen2-VL folder's preprocessor_config.json, in either spelling."""
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


def checkpoint_files(folder):
    """The names of the files that make the checkpoint in a folder; whatever else is there belongs to somebody else."""
    names = {*FILES, INDEX}
    with contextlib.suppress(DataError, FileNotFoundError):
        names |= {os.path.basename(file) for file in weight_files(folder)}
    return {name for name in names if os.path.isfile(os.path.join(folder, name))}


def remove_checkpoint(folder, names):
    """Removes these files, and the folder when nothing else is in it."""
    with contextlib.suppress(OSError):  # what cannot be removed stays, and so do somebody's own files
        for name in names:
            os.remove(os.path.join(folder, name))
        os.rmdir(folder)


def replaceable(path):
    """Raises FileExistsError for what is neither an empty name, nor a checkpoint, nor a folder of other files."""
    if not os.path.isdir(path):
        raise FileExistsError(f"{path}: exists and is not a folder; choose another name")
    if os.path.join(os.path.realpath("."), "").startswith(os.path.join(path, "")):
        raise FileExistsError(f"{path}: is the current folder, which cannot be replaced; start elsewhere, or choose "
                              "another name")
    if checkpoint_files(path):
        with contextlib.suppress(DataError, FileNotFoundError):
            config = read_json(os.path.join(path, "config.json"))
            if config.get("model_type") == "qwen2_vl" and weight_files(path):
                return
        names = quote(sorted(os.listdir(path)))
        raise FileExistsError(f"{path}: holds {names}, which is no checkpoint of a Qwen2-VL; choose another name")


@contextlib.contextmanager
def replacing(path, keep=None):
    """A new folder that becomes `path` when the block ends well, in place of the checkpoint that stood there.

    keep: a free name under which that one stays.  Files in it that are not the checkpoint's (a model card, a licence) move
    to the new one.  Temporary names are this call's own, and nothing else is removed.  Dying between the two renames
    leaves the old one as `keep`, or `path.XXXXXXXX.old`.
    """
    path, token = os.path.realpath(path), secrets.token_hex(4)
    temporary, old = f"{path}.{token}.writing", keep or f"{path}.{token}.old"
    there = os.path.exists(path)
    if there:
        replaceable(path)
    if os.path.exists(old):
        raise FileExistsError(f"{old}: exists; the checkpoint that is kept needs a free name")
    os.makedirs(temporary)
    try:
        if there:
            shutil.copymode(path, temporary)
        yield temporary
        new = set(os.listdir(temporary))
        if clash := [name for name in sorted(new) if os.path.isdir(os.path.join(path, name))]:
            raise FileExistsError(f"{path}: holds a folder {clash[0]!r}, the name of a checkpoint's file; move it away")
        if there:
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.exists(old) and not os.path.exists(path):
            os.rename(old, path)
        raise
    if there:
        mine, stuck = checkpoint_files(old) | new & set(os.listdir(old)), []
        for name in sorted(set(os.listdir(old)) - mine):
            try:
                os.rename(os.path.join(old, name), os.path.join(path, name))
            except OSError as e:  # the new checkpoint stands, nothing is lost
                stuck.append(f"{name} ({reason(e)})")
        if stuck:
            warnings.warn(f"{path} is written, but these files that stood there could not be moved and are in {old}: "
                          + ", ".join(stuck))
        if not keep:
            remove_checkpoint(old, mine)
