"""Plume: a Qwen-VL backbone, the transition adapter and a processor, in one module.

    model = Plume.from_pretrained("out/checkpoint")
    vectors = model.encode(["a red car", {"image": "car.jpg"}, {"text": "why?", "video": "clip.mp4"}])

transformers supplies configuration, weights, tokenizer and the vision tower; the decoder runs in latent.py.
How a checkpoint was trained is the `plume` block of its config.json, and nothing else has to be known to use
it.
"""

import contextlib
import copy
import itertools
import json
import math
import operator
import os
import re
import secrets
import shutil
import string
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.utils import logging as transformers_logging
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights, get_vision_position_ids, get_vision_window_index)

from adapter import MAX_STEPS, TransitionAdapter, from_released, to_released
from data import (
    BACKBONES, IMAGE_SUFFIXES, MERGE, PLUME_TOKENS, QWEN2_VL, TEMPLATE, TEMPLATES, TEMPORAL, VIDEO_SUFFIXES,
    DataError, Limits, Processor, Side, closest, collate, fixed_strings, nearest, normalised, only_keys,
    parse_item, parse_json, quote, reason, to_device, train_tokenizer, write_errors)
from latent import Prefix, at, at_least_float32, greedy, length_of, rollout, rotate, single_pass, until_done

RELEASED_PROMPT = (
    "Represent the above input text, images, videos, or any combination of the three as embeddings. First "
    "output the thinking process in <think> </think> tags and then summarize the entire input in a word or "
    "sentence. Finally, use the <gen_emb> tag to represent the entire input.")
RELEASED_ADAPTER, OUR_ADAPTER = "latent_moe_transition.", "adapter."  # their names in the safetensors
FORMAT = 2  # of a checkpoint.  In format 1 a line break stood behind pictures and clips: other vectors
MODES = ("latent", "single", "cot", "auto")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What transformers raises for a configuration that makes no sense
CONFIG_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError,
                 StrictDataclassError)
# What a checkpoint of ours consists of, and a model card
HUB = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "hub")
HUB_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "plume_st.py")
FILES = ("config.json", WEIGHTS, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "train_state.pt", *HUB_FILES)
CARD, OUR_CARD = "README.md", "<!-- written by PLUME; saving again replaces this file"
AHEAD = 1 << 27  # bytes of media that `encode` holds for a window, and about as many are read ahead
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPECIAL_IDS = ("image_pad", "video_pad", "vision_start", "vision_end")  # tokens that a configuration names

# What a checkpoint says about itself: `limits` is data.Limits, `template` data.TEMPLATE, `adapter`
# TransitionAdapter's keywords.
ADAPTER = dict(kind="moe", experts=4, top_k=2, shared_expert=True, anchor=True, step_embedding=True,
               router_bias=False)
DEFAULTS = dict(latent_steps=8, latent_positions="mrope", adaptive=False, prompt=RELEASED_PROMPT,
                white_image=False, template=TEMPLATE, adapter=ADAPTER, limits=asdict(Limits()))
# What the released layout implies and does not say; the pixels and tokens of its evaluation.
RELEASED = dict(DEFAULTS, latent_positions="cache", white_image=True,
                limits=asdict(Limits(min_pixels=784, max_pixels=2359296, max_len=11288)))


def rope(theta, *sections):
    return dict(rope_type="default", rope_theta=theta, mrope_section=list(sections))


# Shapes of models with new random weights; a Qwen2-VL where no other backbone stands.
SHAPES = {
    # 1.5 million parameters, plus 128 for each token; a laptop trains it.
    # Qwen2-VL's own 0.02 as the standard deviation of new weights is made for a width of 1536: here pictures
    # would not be read at all (docs/log.md).  With a rope_theta of 10000 and heads of 32, columns of a
    # picture would be all but indistinguishable.
    "tiny": dict(
        text=dict(
            hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=128**-0.5, max_position_embeddings=8192,
            rope_parameters=rope(100.0, 4, 6, 6)),
        vision=dict(
            depth=1, embed_dim=128, hidden_size=128, num_heads=4, mlp_ratio=2, initializer_range=128**-0.5),
        prompt="Think, then embed.",
        limits=dict(
            min_pixels=28 * 28, max_pixels=28 * 28 * 36, video_min_pixels=28 * 28,
            video_max_pixels=28 * 28 * 9, max_len=512, num_frames=16)),
    # The same as a Qwen3-VL: pictures of 32 pixels a token, features that enter behind the first layer, too.
    "tiny3": dict(
        backbone="qwen3_vl",
        text=dict(
            hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
            num_key_value_heads=2, initializer_range=128**-0.5, max_position_embeddings=8192,
            rope_parameters=rope(100.0, 6, 5, 5)),
        vision=dict(
            depth=1, hidden_size=128, intermediate_size=256, out_hidden_size=128, num_heads=4,
            num_position_embeddings=64, deepstack_visual_indexes=[0], initializer_range=128**-0.5),
        prompt="Think, then embed.",
        limits=dict(
            min_pixels=32 * 32, max_pixels=32 * 32 * 36, video_min_pixels=32 * 32,
            video_max_pixels=32 * 32 * 9, max_len=512, num_frames=16)),
    # What Qwen/Qwen2-VL-2B-Instruct's config.json says; for memory and speed, not to be trained from scratch
    "qwen2vl_2b": dict(
        text=dict(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768,
            rope_parameters=rope(1e6, 16, 24, 24)),
        vision=dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4),
        prompt=RELEASED_PROMPT, limits={}),
    # and Qwen/Qwen3-VL-2B-Instruct's
    "qwen3vl_2b": dict(
        backbone="qwen3_vl",
        text=dict(
            hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
            head_dim=128, num_key_value_heads=8, vocab_size=151936, max_position_embeddings=262144,
            rope_parameters=rope(5e6, 24, 20, 20)),
        vision=dict(
            depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2048, num_heads=16,
            deepstack_visual_indexes=[5, 11, 17]),
        prompt=RELEASED_PROMPT, limits={}),
    # For measuring speed on a CPU
    "mid": dict(
        text=dict(
            hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=8192, rope_parameters=rope(1e6, 8, 12, 12)),
        vision=dict(depth=8, embed_dim=320, hidden_size=512, num_heads=8, mlp_ratio=4),
        prompt="Think, then embed.", limits={}),
}
# The fixed strings around every item, one token each: in a tiny model they would be most of the work.
FRAME = [SHAPES["tiny"]["prompt"], *fixed_strings(TEMPLATE)]
SECONDS = " seconds>"  # stands in front of every frame pair of Qwen3-VL


class Spent(NamedTuple):
    """What the items of a batch took."""

    steps: torch.Tensor  # (B,) latent steps
    tokens: torch.Tensor  # (B,) tokens written


class Plume(nn.Module):
    """backbone: transformers' Qwen-VL; tokenizer: with PLUME's tokens; settings: see DEFAULTS."""

    def __init__(self, backbone, tokenizer, settings):
        super().__init__()
        self.settings = checked(settings, DEFAULTS, "settings (the plume block of config.json)")
        facts = facts_of(backbone.config)
        steps, rule = self.settings["latent_steps"], self.settings["latent_positions"]
        if not 0 <= steps <= MAX_STEPS or rule not in ("mrope", "cache"):
            raise DataError(f"latent_steps {steps}, latent_positions {quote(rule)}: needs 0..{MAX_STEPS}, "
                            "'mrope' or 'cache'")
        self.backbone = backbone
        try:
            self.adapter = TransitionAdapter(self.lm.config.hidden_size, **self.settings["adapter"])
        except (ValueError, RuntimeError) as e:
            raise DataError(f"settings: adapter: {reason(e)}") from e
        self.processor = Processor(
            tokenizer, self.settings["prompt"], Limits(**self.settings["limits"]),
            self.settings["white_image"], self.settings["template"], facts)
        self.checkpointing = False  # activation checkpointing around every decoder layer
        self.graphs = None  # latent.Graphs(): `encode` replays what comes behind the prefix as CUDA graphs

    @property
    def lm(self):
        return self.backbone.model.language_model

    @property
    def device(self):
        return self.lm.norm.weight.device

    # ------------------------------------------------------------------------------------------- computing

    def prefix(self, batch):
        """Token embeddings with the pictures' and clips' features in their places -> latent.Prefix."""
        x, deepstack = self.lm.embed_tokens(batch["ids"]), ()  # (B, P, D)
        if batch["pixels"] is not None:
            visual, media = self.backbone.model.visual, batch["media"]
            pixels = normalised(batch["pixels"], self.processor.backbone)
            features, later = see(visual, pixels.to(visual.patch_embed.proj.weight.dtype), batch["grid"])
            x = x.flatten(0, 1).index_copy(0, media, features.to(x.dtype)).view_as(x)
            deepstack = tuple((media, features) for features in later)
        return Prefix(x, batch["positions"], batch["lengths"], batch["disc"], deepstack)

    def forward(self, batch, steps):
        """One training pass over a collated batch (data.collate) with K = steps.

        -> dict(per_pair=, per_token=), two dicts of tensors.
        per_pair, a row for every query, then one for every target, then hard negatives: gen, disc (B, D) unit
        embeddings; router (B, K, E) probabilities.
        per_token, of any length: ce (N,) cross-entropy of every labelled token of the suffix; first (n,) that
        of the first token behind the latents; read (m,) that of the token each latent step replaced, read
        from the state that the step starts from.
        """
        head, rule = self.backbone.lm_head.weight, self.settings["latent_positions"]
        suffix = self.lm.embed_tokens(batch["suffix"])  # (B, T, D)
        r = rollout(self.lm, self.adapter, self.prefix(batch), steps, suffix, rule, self.checkpointing)
        states = torch.cat([r.start[:, None], r.latents], 1)  # (B, K+1, D) z_0 .. z_K
        before = torch.cat([states[:, -1:], r.suffix[:, :-1]], 1)  # (B, T, D) predicts the suffix
        ce = cross_entropy(before.flatten(0, 1)[batch["label_at"]], head, batch["labels"])
        rows, step, tokens = batch["replaced"].unbind(1)
        read = cross_entropy(states[rows, step], head, tokens)
        gen = unit(at(r.suffix, batch["gen"]))
        visual, has_media = self.backbone.model.visual, batch["pixels"] is not None
        for module, used in ((self.adapter, steps), (visual, has_media)):
            if not used:  # its gradient is 0, not missing: all ranks have gradients of the same parameters
                gen = gen + sum(0 * p.sum() for p in module.parameters() if p.requires_grad)
        per_pair = dict(gen=gen, disc=unit(r.anchor), router=r.router)
        per_token = dict(ce=ce, first=ce[batch["first"]], read=read)
        return dict(per_pair=per_pair, per_token=per_token)

    def embed(self, batch, mode="latent", steps=None, limit=512, done=0.5):
        """A collated batch on the model's device -> (B, D) unit float32, and Spent.  See `encode`.

        Gradients reach the weights, except in modes "cot" and "auto", unless the caller asks for none
        (torch.no_grad).
        """
        prefix, rule = self.prefix(batch), self.settings["latent_positions"]
        embed, head, ids = self.lm.embed_tokens, self.backbone.lm_head, self.processor.id
        none, end = torch.zeros_like(batch["lengths"]), ids["<gen_emb>"]
        if mode == "cot":
            h, tokens = greedy(self.lm, embed, head, prefix, end, limit, rule)
            return unit(h), Spent(none, length_of(tokens, end))
        if mode == "single":
            return unit(single_pass(self.lm, prefix)), Spent(none, none)
        K = self.settings["latent_steps"]
        steps = K if steps is None else steps
        suffix = embed(batch["suffix"])
        if mode == "auto" and not self.says_when_done:
            warnings.warn("this checkpoint does not say when it is done (those of train.py --adaptive do): "
                          "mode auto takes all latent steps, as mode latent")
        elif mode == "auto":
            h, *spent = until_done(
                self.lm, self.adapter, embed, head, prefix, steps, suffix, batch["gen"], ids["<eot>"], done,
                end, limit, rule)
            return unit(h), Spent(*spent)
        elif self.says_when_done and steps == K:
            warnings.warn("this checkpoint was trained for mode auto (train.py --adaptive): mode latent "
                          "leaves out what its latent steps do not hold")
        graphs = None if torch.is_grad_enabled() else self.graphs  # they carry no gradients
        r = rollout(self.lm, self.adapter, prefix, steps, suffix, rule, self.checkpointing, graphs)
        return unit(at(r.suffix, batch["gen"])), Spent(none + steps, none)

    @property
    def says_when_done(self):
        """Whether its states read <eot> when there is nothing more to say, which mode auto follows."""
        return self.settings["adaptive"] and self.adapter.kind != "parallel"

    def encode(self, items, mode="latent", steps=None, batch_size=16, progress=False, limit=512, took=None,
               workers=4, bad=None, dim=None, done=0.5, spent=None):
        """Embed items -> float32 array (N, D), unit rows, in the order in which `items` gives them.

        items: a list, or anything else that can be iterated, of strings, pictures or {"text"?, "image"?,
        "video"?}; see data.parse_item.  Kinds may be mixed: rows are batched by length.
        mode: "latent" (steps = 0..32, default the checkpoint's K), "single" (one pass), "cot" (greedy
        rationale, until <gen_emb> or `limit` tokens), "auto" (latent steps until the probability of <eot> is
        above `done`; what K steps do not hold is written as in cot).  progress: a bar, or its label.
        spent: a dict; what each item took is added to its lists "steps" and "tokens", a 0 for a bad one.
        took: a dict whose "seconds" (of the model alone) and "tokens" (decoded) are added to.
        workers: threads that decode and tokenize beside the model.
        dim: only so many first components, normalised again; made for checkpoints of --matryoshka.
        bad: a dict.  What cannot be read gets its reason there, by its number, and NaN in its row; without it
        the first such item raises DataError, which names it.  An embedding that is not finite is always a
        DataError.
        """
        none = np.empty((0, dim or self.lm.config.hidden_size), np.float32)
        windows = self.encoding(
            items, mode, steps, batch_size, progress, limit, took, workers, bad=bad, dim=dim, done=done,
            spent=spent)
        return np.concatenate([none, *windows])

    def encoding(self, items, mode="latent", steps=None, batch_size=16, progress=False, limit=512, took=None,
                 workers=4, sort=True, bad=None, dim=None, done=0.5, spent=None):
        """`encode` in windows: yields the embeddings of the next items as an array.

        A window is 8 batches, or less when their media take AHEAD bytes; about as much is read ahead.
        sort: the rows of a window are batched by length; False: batches are neighbours as given.
        """
        check_mode(mode, steps)
        if not 0 <= done <= 1:
            raise ValueError(f"done {done}: needs a probability, 0 .. 1")
        width = self.lm.config.hidden_size
        if dim is not None and not 1 <= dim <= width:
            raise ValueError(f"dim {dim}: this model has 1 to {width} components")
        if min(batch_size, limit, workers) < 1:
            raise ValueError(f"batch_size {batch_size}, limit {limit}, workers {workers}: need at least 1")
        label = progress if isinstance(progress, str) else f"encode ({mode})"
        bar = tqdm(total=length_hint(items), desc=label, unit="item", disable=not progress)
        items, size = told_of_file_names(iterate(items)), 8 * batch_size if sort else batch_size
        if spent is not None:
            for name in Spent._fields:
                spent.setdefault(name, [])
        was_training = self.training
        self.eval()
        try:
            for samples in self.windows(items, size, workers, bad, alone=took is not None):
                order = list(range(len(samples)))
                if sort:  # a batch of about equal lengths has little padding
                    order.sort(key=lambda i: len(samples[i]["ids"]) if samples[i] else 0)
                out = torch.full((len(samples), dim or width), torch.nan, device=self.device)
                costs = torch.zeros(len(samples), 2, dtype=torch.long, device=self.device)
                for begin in range(0, len(order), batch_size):
                    batch = order[begin : begin + batch_size]
                    bar.update(len(batch))
                    rows = [i for i in batch if samples[i]]
                    if rows:
                        self.embed_rows(out, rows, samples, mode, steps, limit, took, done, costs)
                out = out.cpu().numpy()
                for name, column in zip(Spent._fields, costs.T.tolist() if spent is not None else ()):
                    spent[name].extend(column)
                wrong = [s["where"] for s, row in zip(samples, out) if s and not np.isfinite(row).all()]
                if wrong:
                    self.not_finite(wrong)
                yield out
        finally:
            self.train(was_training)
            bar.close()

    def windows(self, items, size, workers, bad, alone):
        """Lists of at most `size` samples, of less when their media take AHEAD bytes; threads read ahead.

        alone: nothing is read while the caller is at work, so that its time can be taken.
        A window ends every `size` items, too: what is in a batch depends on nothing that came long before.
        """
        numbered, pending, left, number = enumerate(items), deque(), size, 0
        most = math.inf if alone else AHEAD
        room, pool = Room(2 * most), ThreadPoolExecutor(workers)

        def read(i, item):
            room.wait(i)
            sample = self.read(i, item, bad)
            room.take(media_bytes(sample))
            return sample

        try:
            while True:
                for i, item in itertools.islice(numbered, 2 * size - len(pending)):
                    pending.append(pool.submit(read, i, item))
                if not pending:
                    return
                samples, held = [], 0
                while pending and len(samples) < left and held < most:
                    room.need(number)
                    samples.append(pending.popleft().result())
                    held += media_bytes(samples[-1])
                    number += 1
                left = left - len(samples) or size
                if alone:
                    wait(pending)
                yield samples
                samples.clear()
                room.take(-held)
        finally:
            room.need(math.inf)  # nobody waits any more
            pool.shutdown(wait=False, cancel_futures=True)

    def read(self, i, item, bad):
        """Item i -> a sample for `collate`; or None, and the reason in the dict `bad`, if it is given."""
        try:
            side = item if isinstance(item, Side) else parse_item(item, where=f"item {i}")
            return dict(self.processor.render(side), where=side.where)
        except DataError as e:
            if bad is None:
                raise
            bad[i] = str(e)

    @torch.no_grad()
    def embed_rows(self, out, rows, samples, mode, steps, limit, took, done, costs):
        """One batch: out[rows] = embeddings of these samples, costs[rows] = their steps and tokens."""
        batch = to_device(collate([samples[i] for i in rows], self.processor), self.device)
        begun = time.perf_counter()
        vectors, spent = self.embed(batch, mode, steps, limit, done)
        if took is not None:
            took["tokens"] += int(spent.tokens.sum())  # waits for the device
            took["seconds"] += time.perf_counter() - begun
        if out.shape[1] < vectors.shape[1]:
            vectors = unit(vectors[:, : out.shape[1]])
        places = torch.tensor(rows, device=out.device)
        out[places], costs[places] = vectors.to(out.dtype), torch.stack(spent, 1)

    def not_finite(self, wrong):
        """Raises the error for items whose embeddings are not finite."""
        names = ", ".join(wrong[:10])
        if len(wrong) > 10:
            names += f" and {len(wrong) - 10} more"
        dtype = self.lm.norm.weight.dtype
        broken = [name for name, p in self.named_parameters() if not p.isfinite().all()]
        if broken:
            why = (f"the weights are not finite either ({len(broken)} tensors, the first {broken[0]}): the "
                   "checkpoint is broken")
        elif dtype == torch.float32:
            why = "the weights are finite, so it is something in these items"
        else:
            why = f"the weights are finite; it was computed in {dtype}, try float32"
        raise DataError(f"{names}: the embedding is not finite; {why}")

    # ------------------------------------------------------------------------------ making, loading, saving

    @classmethod
    def random(cls, texts, shape="tiny", seed=0, device="cpu", tied=True, **settings):
        """One of SHAPES with random weights and a BPE tokenizer trained on `texts` (an iterable of strings).

        device: where the weights are made; "meta" makes none, only their shapes.
        tied: the output embedding is the input embedding.
        """
        shape = SHAPES[shape]
        model_type = shape.get("backbone", "qwen2_vl")
        frame = [*FRAME, SECONDS] if BACKBONES[model_type].time == "text" else FRAME
        tokenizer = train_tokenizer(texts, frame)
        in_blocks_of_64 = -(-len(tokenizer) // 64) * 64
        text = dict(vocab_size=in_blocks_of_64, bos_token_id=None, eos_token_id=None) | shape["text"]
        special = {f"{name.replace('_pad', '')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
                   for name in SPECIAL_IDS}
        config = AutoConfig.for_model(
            model_type, text_config=text, vision_config=shape["vision"], tie_word_embeddings=tied, **special)
        settings = dict(template=TEMPLATES[model_type], prompt=shape["prompt"]) | settings
        settings["limits"] = limits_of(model_type) | shape["limits"] | settings.get("limits", {})
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            return cls(quietly(AutoModelForImageTextToText.from_config, config), tokenizer, settings)

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None, revision=None, token=None, **settings):
        """Load a checkpoint: a local folder, or the name of a repository on the Hugging Face hub.

        (a) ours, with a `plume` block in config.json; (b) the released layout, known by its
        `latent_moe_transition.*` weights, which does not describe itself; (c) a plain Qwen2-VL,
        Qwen2.5-VL or Qwen3-VL to start training from: the tokens are added, their rows start at the mean of
        the old ones, the adapter starts near the identity.
        device, dtype: default the best there is, printed with the reason.
        revision, token: on the hub, a branch, tag or commit, and the right to read it.
        settings: override the `plume` block.
        """
        path = local_folder(os.fspath(path), revision, token)
        device, dtype = pick_device(device, dtype)
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
            block = current_format(block, path)
        elif adapter:  # (b)
            if model_type != "qwen2_vl":
                raise DataError(f"{path}: the released layout, with a {model_type}: it is that of a "
                                "Qwen2-VL, and does not say how others are to be read")
            try:
                adapter, keywords = from_released(adapter)
            except (LookupError, ValueError, RuntimeError) as e:
                raise DataError(f"{path}: its adapter's tensors are incomplete or do not fit each other: "
                                f"{reason(e)}") from e
            block = dict(RELEASED, adapter=keywords, limits=stored_limits(path, RELEASED["limits"]))
        else:  # (c)
            limits = stored_limits(path, limits_of(model_type))
            adapter, block = None, dict(template=TEMPLATES[model_type], limits=limits)
            add_tokens(backbone, tokenizer)
        for key, value in settings.items():
            block[key] = block.get(key, {}) | value if isinstance(value, dict) else value
        try:
            model = cls(backbone, tokenizer, block)
        except DataError as e:
            raise DataError(f"{path}: {e}") from e
        if adapter is not None:
            try:
                model.adapter.load_state_dict(adapter)
            except RuntimeError as e:
                kind = model.settings["adapter"]
                raise DataError(f"{path}: its adapter does not fit {kind}: {str(e)[:400]}") from e
        model.adapter.to(dtype)
        return aligned(model.to(device))

    def save_pretrained(self, path, released=False):
        """Write a checkpoint folder: config.json, model.safetensors, tokenizer, preprocessor_config.json.

        It appears under its name only when it is complete, in place of the checkpoint that stood there.
        released: in the released layout, which cannot say how the model was trained; see (b) in
        `from_pretrained` for what it implies.
        """
        with replacing(path) as folder:
            self.write(folder, released)
            if not released:
                self.write_hub_files(folder)

    def write(self, folder, released=False, state=None):
        """The files of `save_pretrained`, into an empty folder; state: the whole one of a sharded model."""
        config, state = copy.deepcopy(self.backbone.config), state or self.state_dict()
        config.__dict__.pop("plume", None)  # a loaded model's
        if released:
            self.warn_of_lost_settings()
        else:
            config.plume = dict(format=FORMAT, **self.settings)
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
            name, adapter = RELEASED_ADAPTER, to_released(adapter, self.adapter.shared_expert)
        tensors |= {name + key: value for key, value in adapter.items()}
        file = os.path.join(folder, WEIGHTS)
        tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
        with write_errors(file):
            save_file(tensors, file, {"format": "pt"})
        shutil.copymode(os.path.join(folder, "config.json"), file)  # the library lets nobody else read it
        self.processor.tokenizer.save_pretrained(folder)
        limits, facts = self.processor.limits, self.processor.backbone
        media = dict(  # what other Qwen-VL software reads
            image_processor_type="Qwen2VLImageProcessor", min_pixels=limits.min_pixels,
            max_pixels=limits.max_pixels, patch_size=facts.patch, merge_size=MERGE,
            temporal_patch_size=TEMPORAL, image_mean=facts.mean, image_std=facts.std)
        with open(os.path.join(folder, "preprocessor_config.json"), "w") as f:
            json.dump(media, f, indent=1)

    def write_hub_files(self, folder, run="Nothing is known here about its training."):
        """What sentence-transformers reads, and a model card; run: how it was trained, in Markdown."""
        with open(os.path.join(HUB, "card.md"), encoding="utf-8") as f:
            card = string.Template(f.read())
        size = sum(p.numel() for p in self.parameters()) / 1e6
        text = card.substitute(
            backbone=self.backbone.config.model_type, dim=self.lm.config.hidden_size, size=f"{size:,.1f}",
            steps=self.settings["latent_steps"], run=run,
            settings=json.dumps(self.settings, indent=1, ensure_ascii=False),
            versions=f"torch {torch.__version__}, transformers {transformers.__version__}")
        file = os.path.join(folder, CARD)
        with write_errors(file), open(file, "w", encoding="utf-8") as f:
            f.write(text)
        for name in HUB_FILES:
            file = os.path.join(folder, name)
            with write_errors(file):
                shutil.copyfile(os.path.join(HUB, name), file)

    def warn_of_lost_settings(self):
        """Names the settings for which somebody who loads the released layout gets other values."""
        ours, adapter = self.settings, self.adapter
        if self.backbone.config.model_type != "qwen2_vl":
            raise DataError(f"the released layout is that of a Qwen2-VL, and this is a "
                            f"{self.backbone.config.model_type}")
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


# ------------------------------------------------------------------------------------------------- computing


def see(visual, pixels, grid):
    """The vision tower: patches -> features of the visual tokens (M, D), and those that the decoder's first
    layers add, one (M, D) each (Qwen3-VL alone has some).

    visual: transformers' module; pixels: (N, 6 patch^2) normalised patches of all frames, N = 4 M;
    grid: on the CPU, (t, h, w) in patches of each picture and clip.
    """
    if isinstance(visual, Qwen2VisionTransformerPretrainedModel):
        return see_as_qwen2(visual, pixels, grid), ()
    seen = visual(pixels, grid_thw=grid, **known_from(visual, grid, pixels.device))
    return seen.pooler_output, tuple(getattr(seen, "deepstack_features", ()))


def known_from(visual, grid, device):
    """What the tower would compute from the grid, where the device would have to be waited for."""
    known = dict(position_ids=get_vision_position_ids(grid, MERGE))
    if hasattr(visual, "pos_embed"):  # Qwen3-VL: a table of positions, interpolated
        known["interp_indices"], known["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners,
            MERGE)
    ends = {}
    if hasattr(visual, "window_size"):  # Qwen2.5-VL: most layers attend within windows
        known["window_index"], ends["cu_window_seqlens"] = get_vision_window_index(
            grid, MERGE, visual.window_size, visual.patch_size)
    return {name: value.to(device, non_blocking=True) for name, value in known.items()} | ends


def see_as_qwen2(visual, pixels, grid):
    """Qwen2-VL's tower, as `see`.

    Two things are faster than in the module: the patch embedding is one product and not a convolution, and
    frames of as many patches are attended together (docs/speed.md).
    """
    order, places, groups = frames_by_size(grid)
    order, places = (index.to(pixels.device, non_blocking=True) for index in (order, places))
    x = F.linear(pixels[order], visual.patch_embed.proj.weight.flatten(1))
    cos, sin = visual.rotary_pos_emb(x, places)
    sin[:, : sin.shape[1] // 2].neg_()  # the minus of `rotate`
    for layer in visual.blocks:
        x = x + attend_frames(layer.attn, layer.norm1(x), cos[:, None], sin[:, None], groups)
        x = x + layer.mlp(layer.norm2(x))
    merged = visual.merger(x)
    tokens = order[:: MERGE**2] // MERGE**2  # four patches, which stand side by side, are one token
    return torch.empty_like(merged).index_copy(0, tokens, merged)


def frames_by_size(grid):
    """How frames of as many patches come to stand together, small ones first; all on the CPU.

    -> order (N,): which patch stands n-th; places (N, 2): its row and column in its frame; groups: (frames,
    patches of each) of every size.
    """
    frames = grid.repeat_interleave(grid[:, 0], 0)[:, 1:]  # (h, w) of every frame
    sizes = frames.prod(1)
    order = sizes.repeat_interleave(sizes).argsort(stable=True)
    by_size = sizes.argsort(stable=True)
    places = patch_places(frames[by_size], sizes[by_size])
    each, count = sizes.unique(return_counts=True)
    return order, places, list(zip(count.tolist(), each.tolist()))


def patch_places(frames, sizes):
    """(h, w) and h * w of every frame -> row and column of every patch, (N, 2), four of a square together."""
    nth = torch.arange(sizes.sum()) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # in its frame
    square, inside = nth // MERGE**2, nth % MERGE**2
    squares_wide = frames[:, 1].repeat_interleave(sizes) // MERGE
    rows = square // squares_wide * MERGE + inside // MERGE
    columns = square % squares_wide * MERGE + inside % MERGE
    return torch.stack([rows, columns], 1)


def attend_frames(att, x, cos, sin, groups):
    """Every frame attends to itself: x (N, D), cos and sin (N, 1, d), groups of (frames, patches of each)."""
    q, k, v = att.qkv(x).view(len(x), 3, att.num_heads, -1).unbind(1)  # (N, H, d) each
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    seen, begin = [], 0
    for n, size in groups:
        end = begin + n * size
        group = [t[begin:end].unflatten(0, (n, size)).transpose(1, 2) for t in (q, k, v)]  # (n, H, size, d)
        seen.append(F.scaled_dot_product_attention(*group).transpose(1, 2).flatten(0, 1))
        begin = end
    return att.proj(torch.cat(seen).flatten(1))


def check_mode(mode, steps):
    """Raises ValueError for what `embed` does not know."""
    if mode not in MODES:
        raise ValueError(f"mode {quote(mode)}.{nearest(mode, MODES)}")
    if steps is not None and (mode != "latent" or not 0 <= steps <= MAX_STEPS):
        raise ValueError(f"steps {steps} in mode {mode!r}: steps are 0..{MAX_STEPS} and belong to mode "
                         "'latent'")


def unit(x):
    return F.normalize(at_least_float32(x), dim=-1)


def cross_entropy(h, weight, labels, elements=None):
    """h (N, D), output embedding (V, D), labels (N,) -> (N,) losses.

    Never more than about `elements` logits at a time: with a 151k vocabulary the rows go in chunks, whose
    logits are computed again in the backward pass.
    """
    elements = elements or (1 << 22 if h.device.type == "cpu" else 1 << 27)  # a CPU's chunk fits its cache
    rows = max(1, elements // len(weight))

    def losses(h, labels):
        return F.cross_entropy(at_least_float32(F.linear(h, weight)), labels, reduction="none")

    if len(h) <= rows:
        return losses(h, labels)
    chunks = zip(h.split(rows), labels.split(rows))
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])


def pick_device(device=None, dtype=None, say=print):
    """The best device there is (cuda > mps > cpu), bfloat16 where it is fast.

    Said with the reason, unless both are given.
    """
    given, dtype = (device is not None, dtype is not None), DTYPES.get(dtype, dtype)
    if dtype not in (None, *DTYPES.values()):
        raise DataError(f"dtype {quote(dtype)}: needs 'float32' or 'bfloat16'")
    why_device, why_dtype = "as asked", "as asked"
    if device is None:
        device, why_device = "cpu", "the best available"
        if torch.backends.mps.is_available():
            device = "mps"
        if torch.cuda.is_available():
            device = "cuda"
    try:
        device = torch.device(device)
    except RuntimeError as e:
        raise DataError(f"device {device!r}: needs cuda, mps or cpu") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"device {str(device)!r}: torch finds no CUDA device here; leave it out, or take cpu")
    if dtype is None:
        dtype, why_dtype = torch.float32, "bfloat16 is not known to be fast there"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            dtype, why_dtype = torch.bfloat16, "supported there"
    if not all(given):
        say(f"device {device} ({why_device}), {str(dtype).removeprefix('torch.')} ({why_dtype})")
    return device, dtype


# ------------------------------------------------------------------------------------------- items to embed


def iterate(items):
    """An iterator over the items of any container, in its own order; a single item is a TypeError."""
    try:
        if isinstance(items, (str, bytes, Mapping)) or isinstance(items, np.ndarray) and items.ndim == 3:
            raise TypeError
        iterator = iter(items)
    except TypeError:
        raise TypeError("items must be a list or another iterable of items, got "
                        f"{type(items).__name__}; put a single item into [ ]") from None
    if isinstance(items, Iterable):
        return iterator
    return itertools.islice(iterator, length_hint(items))  # of the older kind: [0], [1], ... as it says


class Room:
    """Bytes of media in memory: readers wait while there are `most`, but for the item that is needed next."""

    def __init__(self, most):
        self.most, self.taken, self.needed, self.changed = most, 0, 0, threading.Condition()

    def wait(self, i):
        with self.changed:
            self.changed.wait_for(lambda: self.taken < self.most or i <= self.needed)

    def take(self, n):
        with self.changed:
            self.taken += n
            self.changed.notify_all()

    def need(self, i):
        with self.changed:
            self.needed = i
            self.changed.notify_all()


def media_bytes(sample):
    return sum(patches.nbytes for patches in sample["pixels"]) if sample else 0


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
            warnings.warn("a string that is the name of a file is embedded as text; for the picture or clip "
                          f"itself give {{'image': ...}} or {{'video': ...}}.  The first is {quote(item)}")
        yield item


# -------------------------------------------------------------------------------------- reading a checkpoint


def checked(given, defaults, where, complete=False):
    """A dict (perhaps of dicts) filled up from `defaults`; unknown keys and other types are errors.

    complete: what is missing is an error, too.
    """
    if not isinstance(given, dict):
        raise DataError(f"{where}: needs an object, got {quote(given)}")
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
        if isinstance(default, dict):
            value = checked(value, default, f"{where}: {key}", complete)
        out[key] = value
    return out


def current_format(block, path):
    """The settings in a checkpoint's `plume` block, which must be complete and of this format."""
    there = block.get("format", 1) if isinstance(block, dict) else block
    if there != FORMAT:
        raise DataError(
            f"{path}: a checkpoint of format {quote(there)}, this version reads format {FORMAT}. The formats "
            "embed the same item differently (1 has a line break behind pictures and clips, and other "
            "positions behind clips), so its vectors would be wrong: train it again with this version, or "
            "use the version of PLUME that wrote it")
    settings = {key: value for key, value in block.items() if key != "format"}
    if isinstance(settings.get("limits"), dict):  # older ones are of Qwen2-VL, whose clips have no seconds
        settings["limits"] = dict(frame_rate=Limits.frame_rate) | settings["limits"]
    settings = dict(adaptive=False) | settings  # and none of the older ones says when it is done
    return checked(settings, DEFAULTS, f"{path}: config.json: plume", complete=True)


def facts_of(config):
    """data.Backbone of a configuration; DataError for one that computes something else than its family."""
    text, vision, facts = config.text_config, config.vision_config, BACKBONES[config.model_type]
    sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rope = text.rope_parameters or {}
    half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    axes = rope.get("mrope_section")
    three = isinstance(axes, list) and [type(n) for n in axes] == [int] * 3
    known = three and min(axes) >= 0 and sum(axes) == half and rope.get("rope_type") == "default"
    window = getattr(text, "use_sliding_window", False)
    if sizes != (facts.patch, MERGE, TEMPORAL) or not known or window:
        raise DataError(
            f"this backbone is not a plain {config.model_type}: needs patch size {facts.patch}, merge 2, "
            "temporal patch 2, default rotary embedding with an mrope_section of 3 numbers that sum to "
            f"{half}, no sliding window; has {sizes}, {quote(rope)}")
    return replace(facts, rate=getattr(vision, "tokens_per_second", 0))


def limits_of(model_type):
    """DEFAULTS' limits for a backbone: as many visual tokens, of its own size."""
    larger = BACKBONES[model_type].side**2, QWEN2_VL.side**2
    limits = DEFAULTS["limits"]
    return limits | {k: v * larger[0] // larger[1] for k, v in limits.items() if k.endswith("pixels")}


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


def local_folder(path, revision=None, token=None):
    """A checkpoint folder, or the name of one on the hub, which is downloaded -> the folder."""
    if os.path.isdir(path) and revision is not None:
        raise DataError(f"{path}: a folder here has no revision {quote(revision)}; leave it out, or give the "
                        "name of a repository on the hub")
    if not os.path.isdir(path):
        kinds = ["*.json", "*.safetensors", "*.txt"]
        try:
            path = huggingface_hub.snapshot_download(
                path, allow_patterns=kinds, revision=revision, token=token)
        except (OSError, ValueError) as e:  # no such name, or no network
            raise FileNotFoundError(f"{quote(path)}: no such checkpoint folder, and the Hugging Face hub "
                                    f"says: {reason(e)}") from e
    if not os.path.exists(os.path.join(path, "config.json")):
        raise FileNotFoundError(f"{path!r}: no config.json in this folder; a checkpoint has config.json, "
                                "*.safetensors and a tokenizer")
    return path


def build_backbone(path, tensors, dtype):
    """The model that config.json describes, with these weights; DataError when they do not fit it."""
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            meta = quietly(AutoModelForImageTextToText.from_config, config)
        described, held = sum(p.numel() for p in meta.parameters()), sum(t.numel() for t in tensors.values())
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
    """The files of a checkpoint's weights, as transformers finds them -> {file: its tensors, None: all}"""
    index = os.path.join(path, INDEX)
    if os.path.isfile(os.path.join(path, WEIGHTS)):
        return {os.path.join(path, WEIGHTS): None}
    if not os.path.isfile(index):
        raise FileNotFoundError(f"{path}: neither {WEIGHTS} nor {INDEX} in this folder; other weight formats "
                                "are not read")
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
        names = []
    if not names:
        raise DataError(f"{index}: its 'weight_map' must name a .safetensors file of this folder for each "
                        "weight")
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
            raise DataError(f"{file}: does not hold what {INDEX} says; one of them has {odd}, the other has "
                            "not")
        for name, tensor in found.items():
            if tensor.dtype not in floats:
                raise DataError(f"{file}: {name} is stored as {tensor.dtype}; weights are floating-point "
                                "numbers of 16 bits or more")
        tensors |= found
    return tensors


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

    Tensors that are read from a file lie anywhere.  A product then takes another path: slower, and with other
    last bits than the same weights have after training (oneMKL promises equal results for arrays that begin
    at multiples of 64).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


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


# -------------------------------------------------------------------------------------- writing a checkpoint


def checkpoint_files(folder):
    """The names of the files that make the checkpoint in a folder; what else is there is somebody else's."""
    names = {*FILES, INDEX}
    with contextlib.suppress(DataError, FileNotFoundError):
        names |= {os.path.basename(file) for file in weight_files(folder)}
    if is_our_card(os.path.join(folder, CARD)):
        names.add(CARD)
    return {name for name in names if os.path.isfile(os.path.join(folder, name))}


def is_our_card(file):
    """Whether this model card is of `write_hub_files`; somebody else's stays where it is."""
    if not os.path.isfile(file):
        return False
    with open(file, "rb") as f:
        return OUR_CARD.encode() in f.read(1000)


def remove_checkpoint(folder, names):
    """Removes these files, and the folder when nothing else is in it."""
    with contextlib.suppress(OSError):  # what cannot be removed stays, and so do somebody's own files
        for name in names:
            os.remove(os.path.join(folder, name))
        os.rmdir(folder)


def replaceable(path):
    """Raises FileExistsError for what is neither a checkpoint nor a folder of other files."""
    if not os.path.isdir(path):
        raise FileExistsError(f"{path}: exists and is not a folder; choose another name")
    if os.path.join(os.path.realpath("."), "").startswith(os.path.join(path, "")):
        raise FileExistsError(f"{path}: is the current folder, which cannot be replaced; start elsewhere, or "
                              "choose another name")
    if checkpoint_files(path):
        with contextlib.suppress(DataError, FileNotFoundError):
            config = read_json(os.path.join(path, "config.json"))
            if config.get("model_type") in BACKBONES and weight_files(path):
                return
        names = quote(sorted(os.listdir(path)))
        raise FileExistsError(f"{path}: holds {names}, which is no checkpoint of a Qwen-VL; choose another "
                              "name")


@contextlib.contextmanager
def replacing(path, keep=None):
    """A new folder that becomes `path` when the block ends well, in place of the checkpoint that stood there.

    keep: a free name under which that one stays.  Files in it that are not the checkpoint's (a model card, a
    licence) move to the new one.  Temporary names are this call's own, and nothing else is removed.  Dying
    between the two renames leaves the old one as `keep`, or `path.XXXXXXXX.old`.
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
        card = os.path.join(path, CARD)
        if os.path.lexists(card) and not is_our_card(card):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(temporary, CARD))
        new = set(os.listdir(temporary))
        clash = [name for name in sorted(new) if os.path.isdir(os.path.join(path, name))]
        if clash:
            raise FileExistsError(f"{path}: holds a folder {clash[0]!r}, the name of a checkpoint's file; "
                                  "move it away")
        if there:
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.exists(old) and not os.path.exists(path):
            os.rename(old, path)
        raise
    if there:
        mine = checkpoint_files(old) | new & set(os.listdir(old))
        stuck = move_files(old, path, set(os.listdir(old)) - mine)
        if stuck:  # the new checkpoint stands, nothing is lost
            warnings.warn(f"{path} is written, but these files that stood there could not be moved and are "
                          f"in {old}: {', '.join(stuck)}")
        if not keep:
            remove_checkpoint(old, mine)


def move_files(old, new, names):
    """Moves files from one folder to another -> those that could not be moved, each with the reason."""
    stuck = []
    for name in sorted(names):
        try:
            os.rename(os.path.join(old, name), os.path.join(new, name))
        except OSError as e:
            stuck.append(f"{name} ({reason(e)})")
    return stuck
