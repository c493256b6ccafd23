"""What tools/speed.py times: queries, the ways to embed a batch of them, and what each way has to read."""

import math
from functools import partial
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from backbones.reference import transformers_inputs
from data import collate, to_device
from files.errors import DataError
from files.items import Side
from hub.weights import count_parameters
from engine.graphs import Graphs
from latent import greedy, naive_rollout, select_column, unit

FORWARD, GRAPH, GENERATED = "single, transformers", "latent graph, K = 8", "cot, transformers"  # methods


def query_side(processor, media, prefix):
    """Text that makes `prefix` tokens with the prompt, or noise: media (width, height, frames or 0)."""
    if media:
        width, height, frames = media
        noise = np.random.default_rng(0).integers(0, 256, (max(frames, 1), height, width, 3), np.uint8)
        pictures = [Image.fromarray(frame) for frame in noise]
        return Side([("video", pictures) if frames else ("image", pictures[0]), ("text", " forward")])
    prompt = len(processor.render(Side([("text", "")]))["ids"])
    if prefix <= prompt:
        raise DataError(f"--prefix {prefix}: the model's prompt alone has {prompt} tokens; ask for more")
    return Side([("text", " forward" * (prefix - prompt))])


def speed_batch(model, media, prefix, size):
    """`size` queries on the model's device, "samples" one by one; prefix: least and most tokens of a text."""
    low, high = prefix
    lengths = np.random.default_rng(0).integers(low, high + 1, size).tolist()
    rendered = {n: model.processor.render(query_side(model.processor, media, n)) for n in set(lengths)}
    samples = [rendered[n] for n in lengths]
    return dict(to_device(collate(samples, model.processor), model.device), samples=samples)


def batches_of_one(model, samples):
    return [to_device(collate([sample], model.processor), model.device) for sample in samples]


class Method(NamedTuple):
    """A way to embed a batch, and what it has to read."""

    embed: Callable  # embeds the batch
    passes: int  # of the decoder, behind the prefill
    steps: int = 0  # of these with the adapter
    alone: bool = False  # each query by itself: every one of them reads all weights
    writes: bool = False  # tokens: every pass also reads the vocabulary's matrix


def speed_methods(model, batch, tokens):
    """-> {name: Method}; tokens: of a written rationale"""
    methods = {
        "single": Method(partial(model.embed, batch, "single"), passes=0),
        FORWARD: Method(partial(transformers_forward, model, batch), passes=0)}
    for k in (0, 4, 6, 8):  # the last step shares its pass with the suffix
        methods[f"latent, K = {k}"] = Method(partial(model.embed, batch, "latent", k), max(1, k), k)
    if model.device.type == "cuda":
        methods[GRAPH] = Method(partial(replayed, model, batch, Graphs()), passes=8, steps=8)
    alone = partial(one_by_one, model, batches_of_one(model, batch["samples"]), 8)
    methods["one by one, K = 8"] = Method(alone, passes=9, steps=8, alone=True)
    write = partial(write_rationale, model, batch, tokens)
    methods[f"cot, {tokens} tokens"] = Method(write, passes=tokens, writes=True)
    generate = partial(model.backbone.generate, **padded_left(batch, model.processor), do_sample=False,
                       min_new_tokens=tokens, max_new_tokens=tokens)
    methods[GENERATED] = Method(generate, passes=tokens - 1, writes=True)
    return methods


def replayed(model, batch, graphs):
    """The latent embedding with K = 8, what comes behind the prefix as one graph."""
    with mock.patch.object(model, "graphs", graphs):
        return model.embed(batch, "latent", 8)


def write_rationale(model, batch, tokens):
    """The embedding behind a rationale of exactly `tokens` tokens."""
    gen = model.processor.id["<gen_emb>"]
    end = torch.tensor([gen], device=model.device)

    def logits(h):  # never those of <gen_emb>: no row ends early
        return model.backbone.lm_head(h).index_fill(-1, end, -math.inf)

    return greedy(model.lm, model.lm.embed_tokens, logits, model.prefix(batch), gen, tokens)


def padded_left(batch, processor):
    """A batch as inputs of transformers' own model, as its `generate` wants them."""
    inputs = transformers_inputs(batch, processor)
    rows = zip(batch["ids"], batch["lengths"].tolist())
    inputs["input_ids"] = torch.stack([row.roll(len(row) - n) for row, n in rows])
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


@torch.no_grad()
def transformers_forward(model, batch):
    """One pass through transformers' own model -> (B, D) unit, as `Plume.embed` in mode single."""
    model.backbone.model.rope_deltas = None  # transformers keeps those of the last call
    inputs = dict(transformers_inputs(batch, model.processor), position_ids=batch["positions"])
    h = model.backbone.model(**inputs, use_cache=False).last_hidden_state  # (B, P, D)
    return unit(select_column(h, batch["disc"]))


def one_by_one(model, rows, steps):
    """The latent embeddings of batches of one query without latent.py's decoder -> (B, D) unit."""
    vectors = []
    for row in rows:
        r = naive_rollout(
            model.backbone.model, model.adapter, transformers_inputs(row, model.processor), row["positions"],
            row["disc"].item(), steps, model.lm.embed_tokens(row["suffix"]),
            model.settings["latent_positions"])
        vectors.append(unit(select_column(r.suffix, row["gen"])))
    return torch.cat(vectors)


def bytes_to_read(model, batch, method):
    """-> bytes that a method has to read: (in the prefill, behind it)."""
    lm, size, number = model.lm, len(batch["ids"]), model.lm.norm.weight.element_size()
    weights = count_parameters(lm.layers)
    vision = 0 if batch["pixels"] is None else count_parameters(model.backbone.model.visual)
    times = size if method.alone else 1
    # keys and values of one token; half of the passes' columns are there on average
    column = 2 * len(lm.layers) * lm.layers[0].self_attn.k_proj.out_features
    cached = column * (batch["ids"].numel() + size * method.passes / 2) / times
    vocabulary = count_parameters(lm.embed_tokens) if method.writes else 0
    behind = (weights + cached + vocabulary) * method.passes + count_parameters(model.adapter) * method.steps
    return (weights + vision) * times * number, behind * times * number
