"""Plume: a Qwen2-VL backbone, the transition adapter and a processor, in one module.

    model = Plume.from_pretrained("out/checkpoint")
    vectors = model.encode(["a red car", {"image": "car.jpg"}, {"text": "what happens here?", "video": "clip.mp4"}])

transformers supplies configuration, weights, tokenizer and the vision tower; the decoder runs in latent.py.
How a checkpoint was trained is the `plume` block of its config.json, and nothing else has to be known to use it.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict

import huggingface_hub
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.utils import logging as transformers_logging
from transformers.vision_utils import get_vision_position_ids

from adapter import MAX_STEPS, TransitionAdapter, from_released, to_released
from data import (CLOSING, MERGE, PATCH, PLUME_TOKENS, SYSTEM, TEMPORAL, DataError, Limits, Processor, Side, collate, nearest, parse_item,
                  to_device, train_tokenizer)
from latent import Prefix, at, at_least_float32, greedy, rollout, single_pass

RELEASED_PROMPT = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First output the "
    "thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. Finally, use "
    "the <gen_emb> tag to represent the entire input.")
RELEASED_ADAPTER, OUR_ADAPTER = "latent_moe_transition.", "adapter."  # their names in the safetensors
MODES = ("latent", "single", "cot")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPECIAL_IDS = dict(image_token_id="image_pad", video_token_id="video_pad", vision_start_token_id="vision_start", vision_end_token_id="vision_end")

# What a checkpoint says about itself; `limits` is data.Limits, `adapter` TransitionAdapter's keywords.
ADAPTER = dict(kind="moe", experts=4, top_k=2, shared_expert=True, anchor=True, step_embedding=True, router_bias=False)
DEFAULTS = dict(latent_steps=8, latent_positions="mrope", prompt=RELEASED_PROMPT, white_image=False, adapter=ADAPTER, limits=asdict(Limits()))
RELEASED = dict(DEFAULTS, latent_positions="cache", white_image=True)  # what the released layout implies and does not say

# Shapes of models with new random weights.  tiny: 1.5 million parameters, plus 128 for each token; a laptop trains it.
# Qwen2-VL's own 0.02 as the standard deviation of new weights is made for a width of 1536: here pictures would not be read
# at all (see README).  rope_theta: with 10000 and heads of 32, columns of a picture would be all but indistinguishable.
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
FRAME = (f"system\n{SYSTEM}", "user\n", SHAPES["tiny"]["prompt"], "assistant\n<think>", CLOSING, "<answer>", "</answer>\n")


class Plume(nn.Module):
    """backbone: Qwen2VLForConditionalGeneration; tokenizer: with PLUME's tokens; settings: the `plume` block."""

    def __init__(self, backbone, tokenizer, settings):
        super().__init__()
        for given, known in ((settings, DEFAULTS), (settings.get("adapter", {}), ADAPTER), (settings.get("limits", {}), DEFAULTS["limits"])):
            for key in given:
                if key not in known:
                    raise DataError(f"settings (the plume block of config.json): unknown key {key!r}.{nearest(key, known)}")
        text, vision = backbone.config.text_config, backbone.config.vision_config
        sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        if sizes != (PATCH, MERGE, TEMPORAL) or text.rope_parameters["rope_type"] != "default" or text.use_sliding_window:
            raise DataError("this backbone is not a plain Qwen2-VL: needs patch size 14, merge 2, temporal patch 2, "
                             f"default rotary embedding, no sliding window; has {sizes}, {text.rope_parameters}")
        self.backbone = backbone
        self.settings = {k: {**v, **settings.get(k, {})} if isinstance(v, dict) else settings.get(k, v) for k, v in DEFAULTS.items()}
        if not 0 <= self.settings["latent_steps"] <= MAX_STEPS or self.settings["latent_positions"] not in ("mrope", "cache"):
            raise DataError(f"latent_steps {self.settings['latent_steps']}, latent_positions {self.settings['latent_positions']!r}: "
                            f"needs 0..{MAX_STEPS}, 'mrope' or 'cache'")
        limits = Limits(**self.settings["limits"])
        self.adapter = TransitionAdapter(text.hidden_size, **self.settings["adapter"])
        self.processor = Processor(tokenizer, self.settings["prompt"], limits, self.settings["white_image"])
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

        -> dict: gen, disc (B, D) unit embeddings; ce (N,) cross-entropy of every labelled token of the suffix; first
        (n,) that of the first token behind the latents; read (m,) that of the token each latent step replaced, read from the
        state that the step starts from; router (B, K, E) probabilities.
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
        return dict(gen=gen, disc=unit(r.anchor), ce=ce, first=ce[batch["first"]], read=read,
                    router=r.router)

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

    def encode(self, items, mode="latent", steps=None, batch_size=16, progress=False, limit=512, took=None, workers=4):
        """Embed items -> float32 array (N, D), unit rows, in the given order.

        items: strings or {"text"?, "image"?, "video"?}; image = path, Pillow image or a list of them; video = path,
        folder of frames, or list of frame paths / Pillow images.  Kinds may be mixed: rows are batched by length.
        mode: "latent" (steps = 0..32, default the checkpoint's K), "single" (one pass), "cot" (greedy rationale, until
        <gen_emb> or `limit` tokens).  progress: a bar, or its label.  took: a dict whose "seconds" (of the model alone) and
        "tokens" (decoded) are added to.  workers: threads that decode and tokenize beside the model.  Raises DataError naming
        the item for anything that cannot be read.
        """
        if isinstance(items, (str, dict)):
            raise TypeError("items must be a list; put a single item into [ ]")
        out = np.empty((len(items), self.lm.config.hidden_size), np.float32)
        for rows, vectors in self.encoding(items, mode, steps, batch_size, progress, limit, took, workers):
            out[rows] = vectors
        return out

    def encoding(self, items, mode="latent", steps=None, batch_size=16, progress=False, limit=512, took=None, workers=4, sort=True, bad=None):
        """`encode` in windows of 8 batches: yields (numbers of the items, their embeddings as an array).

        sort: the rows of a window are batched by length; False: batches are neighbours as given.  bad: a dict; what cannot be read is
        left out and gets its error there.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}.{nearest(mode, MODES)}")
        if steps is not None and (mode != "latent" or not 0 <= steps <= MAX_STEPS):
            raise ValueError(f"steps {steps} in mode {mode!r}: steps are 0..{MAX_STEPS} and belong to mode 'latent'")
        if min(batch_size, limit, workers) < 1:
            raise ValueError(f"batch_size {batch_size}, limit {limit}, workers {workers}: need at least 1")

        def read(i):
            try:
                return self.processor.render(items[i] if isinstance(items[i], Side) else parse_item(items[i], where=f"item {i}"))
            except DataError as e:
                if bad is None:
                    raise
                bad[i] = str(e)

        was_training, pool = self.training, ThreadPoolExecutor(workers)
        bar = tqdm(total=len(items), desc=progress if isinstance(progress, str) else f"encode ({mode})", unit="item", disable=not progress)
        size = 8 * batch_size  # items of a window: sorted by length, a batch has little padding; the media of two windows are in memory
        window = lambda start: [pool.submit(read, i) for i in range(start, min(start + size, len(items)))]
        self.eval()
        try:
            ahead = window(0)
            for start in range(0, len(items), size):  # the next window is read while the model is at work on this one
                samples, ahead = [sample.result() for sample in ahead], window(start + size)
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
                    numbers += [start + i for i in rows]
                    done.append(vectors)
                    if took is not None:
                        took["tokens"] += int(tokens.sum())  # waits for the device
                        took["seconds"] += time.perf_counter() - begun
                if numbers:
                    yield numbers, torch.cat(done).cpu().numpy()
        finally:
            self.train(was_training)
            bar.close()
            pool.shutdown(wait=False, cancel_futures=True)

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
                raise FileNotFoundError(f"{path!r}: no such checkpoint folder, and the Hugging Face hub says: {str(e).splitlines()[0]}") from e
        if not os.path.exists(os.path.join(path, "config.json")):
            raise FileNotFoundError(f"{path!r}: no config.json in this folder; a checkpoint has config.json, *.safetensors and a tokenizer")
        device, dtype = pick_device(device, dtype)
        config = Qwen2VLConfig.from_pretrained(path)
        if config.model_type != "qwen2_vl":
            raise DataError(f"{path}: model_type {config.model_type!r}; PLUME builds on 'qwen2_vl'")
        tensors = adapter_tensors(path)
        backbone, info = quietly(Qwen2VLForConditionalGeneration.from_pretrained, path, dtype=dtype, output_loading_info=True)
        wrong = [*info["missing_keys"], *map(str, info["mismatched_keys"]), *(k for k in info["unexpected_keys"] if k not in tensors)]
        if wrong:
            raise DataError(f"{path}: weights do not fit the configuration, {len(wrong)} names are missing, unknown or of another shape: {sorted(wrong)[:5]}")
        tokenizer, block, state = AutoTokenizer.from_pretrained(path), config.to_dict().get("plume"), None
        if block is not None:  # (a)
            state = {k.removeprefix(OUR_ADAPTER): v for k, v in tensors.items()}
        elif tensors:  # (b)
            state, keywords = from_released({k.removeprefix(RELEASED_ADAPTER): v for k, v in tensors.items()})
            block = dict(RELEASED, adapter=keywords, limits=stored_limits(path))
        else:  # (c)
            block = dict(limits=stored_limits(path))
            add_tokens(backbone, tokenizer)
        for key, value in settings.items():
            block[key] = {**block.get(key, {}), **value} if isinstance(value, dict) else value
        model = cls(backbone, tokenizer, block)
        if state is not None:
            try:
                model.adapter.load_state_dict(state)
            except RuntimeError as e:
                raise DataError(f"{path}: its adapter does not fit {model.settings['adapter']}: {e}") from e
        model.adapter.to(dtype)
        return model.to(device)

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
            config.plume = self.settings
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
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, os.path.join(folder, "model.safetensors"), {"format": "pt"})
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
    if not isinstance(dtype, (torch.dtype, type(None))):
        raise DataError(f"dtype {dtype!r}: needs 'float32' or 'bfloat16'")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as e:
        raise DataError(f"device {device!r}: needs cuda, mps or cpu") from e
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


def adapter_tensors(path):
    """The adapter's tensors in a checkpoint folder's safetensors files, under our names or the released ones."""
    out, files = {}, sorted(f for f in os.listdir(path) if f.endswith(".safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: no *.safetensors in this folder; other weight formats are not read")
    for file in files:
        with safe_open(os.path.join(path, file), "pt") as f:
            out.update({k: f.get_tensor(k) for k in f.keys() if k.startswith((OUR_ADAPTER, RELEASED_ADAPTER))})
    return out


def stored_limits(path):
    """min_pixels and max_pixels of a Qwen2-VL folder's preprocessor_config.json, in either spelling."""
    file = os.path.join(path, "preprocessor_config.json")
    if not os.path.exists(file):
        return {}
    with open(file) as f:
        raw = json.load(f)
    size = raw.get("size") or {}
    found = dict(min_pixels=raw.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
                 max_pixels=raw.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"))
    return {k: v for k, v in found.items() if v}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: `now` those still alive, `peak` the most at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        storages = lambda tree: [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        given = {id(s) for s in storages((args, kwargs))}  # a view of these is no new memory
        out = f(*args, **(kwargs or {}))
        for s in storages(out):
            if id(s) not in given | self.known:
                self.known.add(id(s))
                self.now += s.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(s, self.free, id(s), s.nbytes())
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


CHECKPOINT_FILES = re.compile(r"(generation_|tokenizer_|preprocessor_)?config\.json|.*\.safetensors(\.index\.json)?|tokenizer\.json|vocab\.json|merges\.txt|"
                              r"(added|special)_tokens(_map)?\.json|chat_template\..*|train_state\.pt")


@contextlib.contextmanager
def replacing(path, keep=None):
    """A temporary folder that becomes `path` when the block ends well, in place of the checkpoint that stood there.

    keep: the name under which that one stays.  A folder with anything else in it is not replaced.  Dying between the two
    renames leaves the old one as `keep`, or `path.old`.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise FileExistsError(f"{path}: exists and is not a folder; choose another name")
    temporary, old = f"{path}.writing", keep or f"{path}.old"
    for folder in (path, old):
        if foreign := [f for f in (os.listdir(folder) if os.path.exists(folder) else ()) if not CHECKPOINT_FILES.fullmatch(f)]:
            raise FileExistsError(f"{folder}: holds {foreign[0]!r}, which is not part of a checkpoint; choose another name")
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        yield temporary
        if os.path.exists(path):
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(f"{path}.old", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
