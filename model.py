"""Plume: a Qwen-VL backbone, the transition adapter and a processor, in one module.

    model = Plume.from_pretrained("out/checkpoint")
    vectors = model.encode(["a red car", {"image": "car.jpg"}, {"text": "why?", "video": "clip.mp4"}])

transformers supplies configuration, weights, tokenizer and the vision tower; the decoder runs in latent.py.
How a checkpoint was trained is the `plume` block of its config.json, and nothing else has to be known to use
it.
"""

import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText

from adapter import MAX_STEPS, TransitionAdapter
from backbones.called import check_called
from backbones.families import BACKBONES, facts_of, Limits, limits_of
from backbones.shapes import config_of, SHAPES
from backbones.tokens import train_tokenizer
from backbones.vision import normalised, vision_features
from data import fixed_strings, Processor, SPECIAL, TEMPLATE, TEMPLATES
from engine.ranks import pick_device, say
from engine.stream import encoding, Spent
from files.errors import DataError, quote, reason
from hub.card import write_hub_files
from hub.folders import replacing
from hub.layouts import read_checkpoint, write_checkpoint
from hub.settings import DEFAULTS, fill_settings, RELEASED_PROMPT
from hub.weights import align_weights, quietly
from latent import (
    at_least_float32, Cache, greedy, length_of, Prefix, rollout, rollout_of_groups, select_column,
    single_pass, unit, until_done, write)

# The fixed strings around every item, one token each: in a tiny model they would be most of the work.
FIXED_STRINGS = [SHAPES["tiny"]["prompt"], *fixed_strings(TEMPLATE)]
SECONDS = " seconds>"  # stands in front of every frame pair of Qwen3-VL


class Plume(nn.Module):
    """backbone: transformers' Qwen-VL; tokenizer: with PLUME's tokens; settings: see DEFAULTS."""

    def __init__(self, backbone, tokenizer, settings):
        super().__init__()
        self.settings = fill_settings(settings, DEFAULTS, "settings (the plume block of config.json)")
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
        self.checked = None  # the modules that `check_called` has seen
        self.graphs = None  # engine.graphs.Graphs(): what follows the prefix is replayed as CUDA graphs

    @property
    def lm(self):
        return self.backbone.model.language_model

    @property
    def device(self):
        return self.lm.norm.weight.device

    # ---- computing
    def prefix(self, batch):
        """Token embeddings with the pictures' and clips' features in their places -> latent.Prefix."""
        check_called(self)
        x, deepstack = self.lm.embed_tokens(batch["ids"]), ()  # (B, P, D)
        if batch["pixels"] is not None:
            visual, media = self.backbone.model.visual, batch["media"]
            pixels = normalised(batch["pixels"], self.processor.backbone)
            pixels = pixels.to(visual.patch_embed.proj.weight.dtype)
            features, later = vision_features(visual, pixels, batch["grid"])
            x = x.flatten(0, 1).index_copy(0, media, features.to(x.dtype)).view_as(x)
            deepstack = tuple((media, features) for features in later)
        return Prefix(x, batch["positions"], batch["lengths"], batch["disc"], deepstack)

    def forward(self, groups, steps):
        """One training pass over a micro-batch: groups of rows, each a batch of data.collate; K = steps.

        -> dict(per_pair=, per_token=), two dicts of tensors, in the order of the groups and their rows.
        per_pair, a row for every query, target and hard negative: gen, disc (B, D) unit embeddings; router
        (B, K, E) probabilities.
        per_token, of any length: ce (N,) cross-entropy of every labelled token of the suffix; gate_loss (n,)
        that of the first token that can be wrong; read (m,) that of the token each latent step replaced,
        read from the state that the step starts from.
        """
        rule, embed = self.settings["latent_positions"], self.lm.embed_tokens
        inputs = [(self.prefix(batch), embed(batch["suffix"])) for batch in groups]  # suffix (B, T, D)
        rollouts = rollout_of_groups(self.lm, self.adapter, inputs, steps, rule, self.checkpointing)
        outs = [self.outputs(batch, r) for batch, r in zip(groups, rollouts)]
        out = tree_map(lambda *parts: torch.cat(parts), *outs)
        has_media = any(batch["pixels"] is not None for batch in groups)
        for module, used in ((self.adapter, steps), (self.backbone.model.visual, has_media)):
            if not used:  # its gradient is 0, not missing: all ranks have gradients of the same parameters
                unused = sum(0 * p.sum() for p in module.parameters() if p.requires_grad)
                out["per_pair"]["gen"] = out["per_pair"]["gen"] + unused
        return out

    def outputs(self, batch, r):
        """What `forward` gives, of one group and its Rollout."""
        head = self.backbone.lm_head
        states = torch.cat([r.start[:, None], r.latents], 1)  # (B, K+1, D) z_0 .. z_K
        before = torch.cat([states[:, -1:], r.suffix[:, :-1]], 1)  # (B, T, D) predicts the suffix
        ce = cross_entropy(before.flatten(0, 1)[batch["label_at"]], head, batch["labels"])
        rows, step, tokens = batch["replaced"].unbind(1)
        read = cross_entropy(states[rows, step], head, tokens)
        gen = unit(select_column(r.suffix, batch["gen"]))
        per_pair = dict(gen=gen, disc=unit(r.anchor), router=r.router)
        return dict(per_pair=per_pair, per_token=dict(ce=ce, gate_loss=ce[batch["gate_at"]], read=read))

    def embed(self, batch, mode="latent", steps=None, limit=512, done=0.5, unfinished=None):
        """A collated batch on the model's device -> (B, D) unit float32, and Spent.  See `encode`.

        Gradients reach the weights, except in modes "cot" and "auto", unless the caller asks for none
        (torch.no_grad).
        unfinished: a list that gets what mode auto leaves to be written, a latent.Unfinished, for `finish`.
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
            h, taken, left = until_done(
                self.lm, self.adapter, head, prefix, steps, suffix, batch["gen"], ids["<eot>"], done, rule)
            vectors, written = unit(h), torch.zeros_like(taken)
            if unfinished is not None:
                unfinished.append(left)
            elif len(left.rows):
                vectors[left.rows], written[left.rows] = self.finish([left], limit)
            return vectors, Spent(taken, written)
        elif self.says_when_done and steps == K:
            warnings.warn("this checkpoint was trained for mode auto (train.py --adaptive): mode latent "
                          "leaves out what its latent steps do not hold")
        graphs = None if torch.is_grad_enabled() else self.graphs  # they carry no gradients
        r = rollout(self.lm, self.adapter, prefix, steps, suffix, rule, self.checkpointing, graphs)
        return unit(select_column(r.suffix, batch["gen"])), Spent(none + steps, none)

    @torch.no_grad()
    def finish(self, unfinished, limit):
        """Write the rows of all in the list, and empty their caches -> (n, D) unit float32, (n,) tokens."""
        _, h, pos, caches = zip(*unfinished)
        embed, head, end = self.lm.embed_tokens, self.backbone.lm_head, self.processor.id["<gen_emb>"]
        h, tokens = write(self.lm, embed, head, torch.cat(h), torch.cat(pos), Cache.join(caches), end, limit)
        return unit(h), length_of(tokens, end)

    @property
    def says_when_done(self):
        """Whether its states read <eot> when there is nothing more to say, which mode auto follows."""
        return self.settings["adaptive"] and self.adapter.kind != "parallel"

    def encode(self, items, mode="latent", steps=None, batch_size=16, progress=False, limit=512, took=None,
               workers=4, bad=None, dim=None, done=0.5, spent=None, prompt=None, truncate=False):
        """Embed items -> float32 array (N, D), unit rows, in the order in which `items` gives them.

        items: a list, or anything else that can be iterated, of strings, pictures or {"text"?, "image"?,
        "video"?}; see files.items.parse_item.  Kinds may be mixed: rows are batched by length.
        prompt: the name of one of the checkpoint's, as "query", put around each item; see hub/prompts.py.
        mode: "latent" (steps = 0..32, default the checkpoint's K), "single" (one pass), "cot" (greedy
        rationale, until <gen_emb> or `limit` tokens), "auto" (latent steps until the probability of <eot> is
        above `done`; what K steps do not hold is written as in cot).  progress: a bar, or its label.
        spent: a dict; what each item took is added to its lists "steps" and "tokens", a 0 for a bad one.
        took: a dict whose "seconds" (of the model alone) and "tokens" (decoded) are added to.
        workers: threads that decode and tokenize beside the model.
        dim: only so many first components, normalised again; made for checkpoints of --matryoshka.
        truncate: True cuts a text that is longer than max_len at its end, and warns; else it is an error.
        bad: a dict.  What cannot be read gets its reason there, by its number, and NaN in its row; without it
        the first such item raises DataError, which names it.  An embedding that is not finite is always a
        DataError.
        """
        none = np.empty((0, dim or self.lm.config.hidden_size), np.float32)
        windows = encoding(
            self, items, mode, steps, batch_size, progress, limit, took, workers, bad=bad, dim=dim, done=done,
            spent=spent, prompt=prompt, truncate=truncate)
        return np.concatenate([none, *windows])

    def encode_query(self, items, prompt="query", **how):
        """`encode` with the checkpoint's prompt for what asks."""
        return self.encode(items, prompt=prompt, **how)

    def encode_document(self, items, prompt="document", **how):
        """`encode` with the one for what is found; where the checkpoint says one space, in a single pass."""
        if self.settings["one_space"] and not {"mode", "steps"} & how.keys():
            how["mode"] = "single"
        return self.encode(items, prompt=prompt, **how)

    # ---- making, loading, saving
    @classmethod
    def random(cls, texts, shape="tiny", seed=0, device="cpu", tied=True, **settings):
        """One of SHAPES with random weights and a BPE tokenizer trained on `texts` (an iterable of strings).

        device: where the weights are made; "meta" makes none, only their shapes.
        tied: the output embedding is the input embedding.
        """
        shape = SHAPES[shape]
        model_type = shape.get("backbone", "qwen2_vl")
        fixed = [*FIXED_STRINGS, SECONDS] if BACKBONES[model_type].time == "text" else FIXED_STRINGS
        tokenizer = train_tokenizer(texts, SPECIAL, fixed)
        config = config_of(shape, model_type, tokenizer, tied)
        prompt = shape.get("prompt", RELEASED_PROMPT)
        settings = dict(template=TEMPLATES[model_type], prompt=prompt) | settings
        settings["limits"] = limits_of(model_type, **shape["limits"]) | settings.get("limits", {})
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
        device, dtype = pick_device(device, dtype)
        backbone, tokenizer, block, adapter, limits = read_checkpoint(path, dtype, revision, token)
        if limits:
            say(f"limits of pictures and clips: {limits}")
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
        return align_weights(model.to(device))

    def save_pretrained(self, path, released=False):
        """Write a checkpoint folder; hub/folders.py has the names of all that is in it.

        Configuration, weights, tokenizer and chat template come from hub/layouts.py, model card and what
        sentence-transformers reads from hub/card.py.

        It appears under its name only when it is complete, in place of the checkpoint that stood there.
        released: in the released layout, which cannot say how the model was trained; see (b) in
        `from_pretrained` for what it implies.
        """
        with replacing(path) as folder:
            write_checkpoint(self, folder, released)
            if not released:
                write_hub_files(self, folder)


def cross_entropy(h, head, labels, elements=None):
    """h (N, D), head: states -> logits (N, V), labels (N,) -> (N,) losses.

    Never more than about `elements` logits at a time: with a 151k vocabulary the rows go in chunks, whose
    logits are computed again in the backward pass.
    """
    elements = elements or (1 << 22 if h.device.type == "cpu" else 1 << 27)  # a CPU's chunk fits its cache
    rows = max(1, elements // len(head.weight))

    def losses(h, labels):
        return F.cross_entropy(at_least_float32(head(h)), labels, reduction="none")

    if len(h) <= rows:
        return losses(h, labels)
    chunks = zip(h.split(rows), labels.split(rows))
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])
