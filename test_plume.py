"""What PLUME promises, as tests.  Read top to bottom: adapter, rollout, checkpoints, curriculum, prompt, media, records,
batches, losses, ranking, command lines.

    python -m pytest -q test_plume.py

Everything is made here: pictures, clips, records, a tiny model.  When ../shared/data is there, real files are used too.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing.forkserver
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import eval as evaluation
import latent
import model as plume_model
import train
from adapter import TransitionAdapter, balance_loss, from_released, to_released
from curriculum import Curriculum, Progress, Stage, segment
from data import (Batches, DataError, Pairs, Processor, Schedule, Side, StepSampler, collate, load_frames, load_image, parse_item, patchify,
                  to_device)
from latent import Cache, Prefix, decoder, greedy, next_positions, rollout
from model import Plume

HERE = Path(__file__).parent
SHARED, GOLDEN = HERE.parent / "shared" / "data", HERE.parent / "shared" / "golden"
COLOURS = dict(red=(220, 30, 30), green=(20, 160, 40), blue=(40, 60, 220), black=(0, 0, 0))
SHAPES = ("square", "circle", "bar")
FINAL = Stage(4, 8, True)  # the last stage of the default curriculum, while the answer is still written


def assert_close(a, b, what, tol=1e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    assert worst <= tol, f"{what}: differs by {worst:.2e}, allowed {tol:.0e}"


def whole(batch):
    """A batch of Batches that is all in one micro-batch, as one dict."""
    (micro,) = batch["micro"]
    return {k: v for k, v in batch.items() if k != "micro"} | micro


def picture(colour, shape, size=(84, 84), at=0):
    image = Image.new("RGB", size, "white")
    w, h = size
    box = (w // 4 + at, h // 4, 3 * w // 4 + at, 3 * h // 4)
    draw = ImageDraw.Draw(image)
    {"square": draw.rectangle, "circle": draw.ellipse, "bar": lambda b, fill: draw.rectangle((b[0], b[1], b[2], b[1] + h // 8), fill)}[shape](box, fill=COLOURS[colour])
    return image


def write_clip(path, frames, rate=8, codec="mpeg4", stamps=None):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_image(frame)
            frame.pts, frame.time_base = (stamps[i] if stamps else i), Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder of pictures and clips, train.jsonl over them, and the same as retrieval tasks."""
    root = tmp_path_factory.mktemp("world")
    pairs, names = [], [f"{c} {s}" for c in COLOURS for s in SHAPES]
    for name in names:
        colour, shape = name.split()
        picture(colour, shape).save(root / f"{name}.png")
        write_clip(root / f"{name}.mp4", [picture(colour, shape, (64, 64), at) for at in range(-4, 4)])
        think = lambda what: f"<think>The {what} shows one thing. Its colour is {colour}. Its shape is {shape}. So it is a {name}.</think><answer>{name}</answer>"
        side = lambda text, what, **media: dict(conversations=[{"from": "human", "value": text}, {"from": "gpt", "value": think(what)}], **media)
        pairs.append(dict(dataset_name="t2i", qry=side(f"Find the picture: {name}", "text"), pos=side("<image>\nRepresent.", "picture", image=[f"{name}.png"])))
        pairs.append(dict(dataset_name="v2t", qry=side("<video>\nName the clip.", "clip", video=f"{name}.mp4"), pos=side(name, "text")))
    (root / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    for task, query, document in (("image_ret/t2i", lambda n: dict(text=f"Find the picture: {n}"), lambda n: dict(text="Represent.", image=f"{n}.png")),
                                  ("video_cls/v2t", lambda n: dict(text="Name the clip.", video=f"{n}.mp4"), lambda n: dict(text=n))):
        folder = root / "tasks" / task
        folder.mkdir(parents=True)
        fix = lambda item: {k: (f"../{v}" if k != "text" else v) for k, v in item.items()}
        (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{i}", **fix(query(n))}) + "\n" for i, n in enumerate(names)))
        (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": n, **fix(document(n))}) + "\n" for n in names))
        (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t{n}\t1\n" for i, n in enumerate(names)))
    return root


def make_model(**settings):
    """The tiny preset in float64, with an adapter and step table that do something."""
    torch.manual_seed(0)
    m = Plume.random([f"The {c} {s} is on the left of a picture. What colour is it?" for c in COLOURS for s in SHAPES] * 20, **settings).double()
    for p in m.adapter.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return m


@pytest.fixture(scope="session")
def model():
    return make_model()


def mixed_items(world):
    return ["red", {"text": "what colour is the square in this long question about a picture?"}, {"image": str(world / "red bar.png")},
            {"text": "both", "image": [str(world / "blue bar.png"), picture("red", "circle", (140, 56))]},
            {"text": "a clip", "video": str(world / "green circle.mp4")}, {"text": "<video> then <image>", "image": picture("red", "bar"), "video": [picture("red", "bar")] * 3}]


def rendered(m, items, **kw):
    return [m.processor.render(parse_item(i), **kw) for i in items]


# ------------------------------------------------------------------------------------------------------------- adapter


def plain_adapter(state, keywords, z, k, anchor):
    """The formula of the paper for one row, from the released names."""
    linear = lambda name, x: F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))
    expert = lambda name, x: linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", x)))
    n = F.layer_norm(z, z.shape, state["ln.weight"], state["ln.bias"])
    out = z + (expert("shared_expert", n) if "shared_expert.fc1.weight" in state else 0)
    if "router.weight" in state:
        x = z + anchor if keywords.get("anchor", True) else z
        x = torch.cat([x, state["step_embed.weight"][k]]) if "step_embed.weight" in state else x
        r = linear("router", x).softmax(-1)
        for e in r.argsort(descending=True)[: keywords.get("top_k", 2)].tolist():
            out = out + r[e] * expert(f"experts.{e}", n)  # not renormalised
    return out


@pytest.mark.parametrize("keywords", [{}, dict(top_k=1), dict(experts=3, top_k=3), dict(shared_expert=False), dict(anchor=False),
                                      dict(step_embedding=False), dict(kind="mlp"), dict(router_bias=True)], ids=str)
def test_adapter_equals_the_formula_row_by_row_under_every_switch(keywords):
    torch.manual_seed(0)
    a = TransitionAdapter(16, **keywords).double()
    for p in a.parameters():
        p.data = torch.randn_like(p) * 0.3
    z, anchor = torch.randn(2, 5, 16, dtype=torch.float64)
    state = to_released(a.state_dict(), a.shared_expert)
    for k in (0, 7):
        ours, r = a(z, k, anchor)
        assert_close(ours, torch.stack([plain_adapter(state, keywords, *row) for row in zip(z, [k] * 5, anchor)]), "adapter", 1e-9)
        assert r.shape == (5, a.experts) and (not a.experts or torch.allclose(r.sum(-1), torch.ones_like(r[:, 0])))
    back, implied = from_released(state)
    assert all(torch.equal(back[n], v) for n, v in a.state_dict().items()) and len(back) == len(a.state_dict())
    assert implied["shared_expert"] == a.shared_expert and implied["experts"] == a.experts


def test_adapter_kind_none_is_the_identity_and_wrong_settings_are_refused():
    z = torch.randn(3, 8)
    assert torch.equal(TransitionAdapter(8, kind="none")(z, 0, z)[0], z)
    for bad in (dict(kind="moo"), dict(top_k=5), dict(top_k=0)):
        with pytest.raises(ValueError):
            TransitionAdapter(8, **bad)


def test_a_new_adapter_is_near_the_identity():
    z, anchor = torch.randn(2, 4, 128)
    assert (TransitionAdapter(128)(z, 0, anchor)[0] - z).norm() < 0.05 * z.norm()


def test_balance_loss_by_hand():
    r = torch.tensor([[0.5, 0.5], [0.9, 0.1]])  # K = 2, E = 2
    assert_close(balance_loss(r), torch.tensor((0 + 0.16) / 2), "balance")
    assert balance_loss(torch.zeros(0, 4)) == 0


# ------------------------------------------------------------------------------------------------------------- rollout


def reference_inputs(m, sample):
    """One rendered sample as transformers' own inputs."""
    ids = torch.tensor([sample["ids"]])
    kinds = (ids == m.processor.id["<|image_pad|>"]).int() + 2 * (ids == m.processor.id["<|video_pad|>"]).int()
    order = [k for k, before in zip(kinds[0].tolist(), [0, *kinds[0].tolist()]) if k and k != before]  # kind of each medium
    inputs = dict(input_ids=ids)
    for kind, pixels, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        mine = [i for i, k in enumerate(order) if k == kind]
        if mine:
            inputs[pixels] = torch.cat([torch.from_numpy(sample["pixels"][i]) for i in mine]).double()
            inputs[grid] = torch.tensor([sample["grids"][i] for i in mine])
    return inputs | (dict(mm_token_type_ids=kinds) if order else {})


def reference_prefill(m, sample):
    full, positions = m.backbone.model, torch.from_numpy(sample["positions"])[:, None]
    cache = DynamicCache(config=full.config.text_config)
    out = full(**reference_inputs(m, sample), position_ids=positions, use_cache=True, past_key_values=cache)
    return out.last_hidden_state[0], out.past_key_values


def reference_rollout(m, sample, K, rule):
    """One row, one step at a time, through transformers' modules and cache."""
    lm = m.lm
    h, cache = reference_prefill(m, sample)
    anchor, z, latents = h[sample["disc"]][None], h[-1][None], []
    pos = int(sample["positions"].max()) + 1 if rule == "mrope" else len(sample["ids"])
    for k in range(K):
        x, _ = m.adapter(z, k, anchor)
        z = lm(inputs_embeds=x[:, None], position_ids=torch.full((3, 1, 1), pos + k), past_key_values=cache, use_cache=True).last_hidden_state[:, 0]
        latents.append(z)
    T = len(sample["suffix"])
    positions = (torch.arange(T) + pos + K).expand(3, 1, T)
    h = lm(inputs_embeds=lm.embed_tokens(torch.tensor([sample["suffix"]])), position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
    return anchor[0], torch.cat(latents) if K else anchor[:0], h[0]


def our_rollout(m, samples, K, rule="mrope", checkpointing=False):
    batch = collate(samples, m.processor)
    return rollout(m.lm, m.adapter, m.prefix(batch), K, m.lm.embed_tokens(batch["suffix"]), rule, checkpointing)


def test_prefill_and_logits_equal_transformers_at_the_same_positions(model, world):
    # float64, but transformers' rotary tables are float32: equal to 1e-5
    samples = rendered(model, mixed_items(world))
    batch = collate(samples, model.processor)
    prefix = model.prefix(batch)
    h = decoder(model.lm, prefix.x, prefix.positions, Cache(prefix.lengths, prefix.x.shape[1]))
    for i, s in enumerate(samples):
        n, inputs = len(s["ids"]), reference_inputs(model, s)
        theirs = model.backbone(**inputs, position_ids=torch.from_numpy(s["positions"])[:, None])
        assert_close(model.backbone.lm_head(h[i, -n:]), theirs.logits[0], f"logits of item {i}", 1e-5)
        assert_close(h[i, -n:], reference_prefill(model, s)[0], f"hidden states of item {i}", 1e-5)


def test_mrope_positions_equal_transformers_for_pictures(model, world):
    clips_too = [item for item in mixed_items(world) if isinstance(item, dict) and "video" not in item]
    for s in rendered(model, clips_too):
        inputs = reference_inputs(model, s)
        if "mm_token_type_ids" in inputs:
            theirs, _ = model.backbone.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"])
            assert np.array_equal(s["positions"], theirs[:, 0].numpy())


# transformers 4.57.1, Qwen2VLModel.get_rope_index: three text tokens (the last <|vision_start|>), a clip, four text tokens
# (frames, grid) -> position of the first token behind the clip, sums over all tokens of the three axes
ROPE_4_57 = {
    (8, (4, 4, 4)): (7, [109, 93, 93]), (8, (4, 4, 8)): (7, [181, 149, 181]), (8, (4, 8, 4)): (7, [181, 181, 149]),
    (8, (4, 8, 14)): (10, [553, 553, 721]), (16, (8, 4, 4)): (11, [261, 165, 165]), (16, (8, 4, 8)): (11, [469, 277, 341]),
    (16, (8, 8, 4)): (11, [469, 341, 277]), (16, (8, 8, 14)): (11, [1509, 1061, 1397]), (64, (32, 4, 4)): (35, [2517, 597, 597]),
    (64, (32, 4, 8)): (35, [4885, 1045, 1301]), (64, (32, 8, 4)): (35, [4885, 1301, 1045]), (64, (32, 8, 14)): (35, [16725, 4181, 5525]),
}


@pytest.mark.parametrize("frames, grid", ROPE_4_57)
def test_text_goes_on_behind_the_largest_position_of_a_clip(model, frames, grid):
    limits = replace(model.processor.limits, num_frames=64, video_max_pixels=28 * 28 * 32, max_len=8192)
    p = Processor(model.processor.tokenizer, "Think.", limits)
    t, h, w = grid
    clip = [Image.new("RGB", (14 * w, 14 * h))] * frames
    s = p.render(parse_item({"text": "four", "video": clip}))
    begin = s["ids"].index(p.id["<|vision_start|>"])
    here = s["positions"][:, begin - 2 : begin + 1 + t * h * w // 4 + 4] - (begin - 2)
    behind, sums = ROPE_4_57[frames, grid]
    assert s["grids"] == [grid] and here[:, -4:].tolist() == [[behind + k for k in range(4)]] * 3 and here.sum(1).tolist() == sums
    assert behind == 3 + max(t, h // 2, w // 2)  # by hand: three tokens, and the longest of the three axes
    picture_ = p.render(parse_item({"text": "four", "image": clip[0]}))
    assert picture_["positions"][0, begin + 1 + h * w // 4] == begin + 1 + max(h // 2, w // 2)


@pytest.mark.parametrize("rule", ["mrope", "cache"])
def test_batched_rollout_equals_one_by_one_through_transformers_in_values_and_gradients(model, world, rule):
    samples = rendered(model, mixed_items(world))
    target, K = torch.randn(len(samples), 128, dtype=torch.float64), 5

    def gradients(anchors, latents, suffixes):
        """of one scalar over embeddings, anchors and latents, for all parameters"""
        gen = F.normalize(torch.stack([h[len(s["suffix"]) - 1] for h, s in zip(suffixes, samples)]), dim=-1)
        loss = (gen * target).sum() + sum(a.sin().sum() + z.sin().sum() for a, z in zip(anchors, latents))
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    r = our_rollout(model, samples, K, rule)
    ours = gradients(r.anchor, r.latents, r.suffix)
    naive = [reference_rollout(model, s, K, rule) for s in samples]
    theirs = gradients(*zip(*naive))
    for i, (anchor, latents, suffix) in enumerate(naive):
        assert_close(r.anchor[i], anchor, f"anchor of row {i}", 1e-5)
        assert_close(r.latents[i], latents, f"latents of row {i}", 1e-5)
        assert_close(r.suffix[i, : len(suffix)], suffix, f"suffix of row {i}", 1e-5)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], f"gradient of {name}", 1e-5 * max(1.0, theirs[name].abs().max().item()))


def test_the_two_position_rules_agree_on_text_and_differ_behind_a_picture(model, world):
    text, image = rendered(model, ["some words", {"image": str(world / "red bar.png")}])
    for sample, same in ((text, True), (image, False)):
        a, b = (our_rollout(model, [sample], 3, rule).suffix for rule in ("mrope", "cache"))
        assert torch.equal(a, b) == same
    with pytest.raises(ValueError, match="'mrope' or 'cache'"):
        our_rollout(model, [text], 1, "rope")


@pytest.mark.parametrize("mode", ["latent", "single", "cot"])
def test_embeddings_do_not_depend_on_neighbours_order_or_batch_size(model, world, mode):
    items, extra = mixed_items(world) * 2, dict(limit=12) if mode == "cot" else {}
    alone = np.concatenate([model.encode([i], mode, **extra) for i in items])
    assert_close(np.linalg.norm(alone, axis=1), np.ones(len(items)), "unit length")
    for size in (1, 5, 16):
        assert_close(model.encode(items, mode, batch_size=size, **extra), alone, f"batches of {size}", 1e-6)
    order = np.random.default_rng(0).permutation(len(items))
    assert_close(model.encode([items[i] for i in order], mode, batch_size=4, **extra), alone[order], "another order", 1e-6)


def test_windows_of_encode_keep_the_order_and_the_name_of_a_bad_item(model, world):
    """A window of 8 batches is read while the one before is embedded, by several threads, which may share a picture."""
    shared = Image.open(world / "red bar.png")
    items = [{"image": shared, "text": "word " * (i % 7)} if i % 3 else "word " * (i + 1) for i in range(40)]
    together = model.encode(items, batch_size=2, workers=3)
    assert_close(together, model.encode(items, batch_size=40, workers=1), "windows", 1e-6)
    with pytest.raises(DataError, match="item 33: .*gone.png"):
        model.encode([*items[:33], {"image": str(world / "gone.png")}, *items], batch_size=2)
    assert model.encode([]).shape == (0, 128)


class Labelled:
    """As a filtered column of a table: what [3] gives is not what comes third."""

    def __init__(self, values):
        self.values = dict(zip((7, 3, 0, 1, 2), values))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[label]

    def __iter__(self):
        return iter(self.values.values())


class Indexed:
    """An object of the older kind: only [0], [1], ... until IndexError."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, i):
        return self.values[i]


def test_items_are_taken_in_the_order_in_which_any_container_gives_them(model, capsys):
    items = ["red", "a blue square", "green", "what colour?", "black bar"]
    expected = model.encode(items)
    for container in (tuple(items), Labelled(items), Indexed(items), dict(zip("edcba", items)).values(), iter(items), (item for item in items),
                      np.array(items), np.array(items, object), map(str, items), dict.fromkeys(items).keys(), torch.utils.data.Subset(items, range(5))):
        for progress in (False, "some items"):
            assert_close(model.encode(container if not hasattr(container, "__next__") or not progress else iter(items), progress=progress, batch_size=2),
                         expected, f"{type(container).__name__}", 1e-6)
    assert "some items" in capsys.readouterr().err
    many = (f"word {i}" for i in range(50))
    assert_close(model.encode(many, batch_size=3), model.encode([f"word {i}" for i in range(50)], batch_size=3), "a long generator", 1e-6)
    class Vague:
        """A length that is only an estimate, or none at all."""

        def __init__(self, length):
            self.length = length

        def __len__(self):
            if isinstance(self.length, type):
                raise self.length
            return self.length

        def __iter__(self):
            return iter(items)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(items)

    for vague in (*map(Vague, (2, 99, TypeError, NotImplementedError)), tqdm(iter(items), disable=True), tqdm(iter(items), total=2, disable=True),
                  torch.utils.data.ChainDataset([Stream()]), torch.utils.data.DataLoader(Stream(), batch_size=None)):
        assert_close(model.encode(vague, progress=True), expected, "an estimated length", 1e-6)

    class Endless(Indexed):
        """A map-style data set that never raises IndexError: its length is the end."""

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return self.values[i % 5]

    assert_close(model.encode(Endless(items)), expected, "by index", 1e-6)
    for single in ("x", b"x", {"text": "x"}, {"a": "x", "b": "y"}, Path("x.png"), Image.new("RGB", (9, 9)), np.zeros((9, 9, 3), np.uint8), 3, None):
        with pytest.raises(TypeError, match=r"list.*put a single item into \[ \]"):
            model.encode(single)
    assert model.encode(iter([])).shape == (0, 128)


def test_what_cannot_be_read_is_a_row_of_nan_with_its_reason_and_the_others_stay(model, world):
    red = str(world / "red bar.png")
    items = ["red", {"image": "gone.png"}, {"image": red}, {"txt": "x"}, None, "blue", {"image": str(HERE / "model.py")}] * 5
    bad = {}
    out = model.encode(items, batch_size=2, bad=bad)
    good = [i for i in range(len(items)) if i % 7 in (0, 2, 5)]
    assert sorted(bad) == [i for i in range(len(items)) if i not in good] and np.isnan(out[sorted(bad)]).all()
    assert_close(out[good], model.encode([items[i] for i in good]), "the others", 1e-6)
    assert "gone.png" in bad[1] and "Did you mean 'text'" in bad[3] and "item 4: needs" in bad[4] and "model.py" in bad[6]
    with pytest.raises(DataError, match="item 1: .*gone.png"):
        model.encode(items)
    bad = {}
    assert np.isnan(model.encode([None, None], bad=bad)).all() and list(bad) == [0, 1]  # nothing is left
    assert np.isfinite(model.encode(["x"], bad=bad)).all() and list(bad) == [0, 1]


def test_an_embedding_that_is_not_finite_is_never_returned(world):
    m = make_model().float()
    m.lm.layers[1].mlp.down_proj.weight.data[3, 4] = math.nan
    for given in ({}, dict(bad={})):
        for mode in ("latent", "single", "cot"):
            with pytest.raises(DataError, match=r"item 0, item 1: .*not finite.*weights are not finite either \(1 tensors.*layers.1.mlp.down_proj"):
                m.encode(["red", "blue"], mode, **(dict(limit=4) if mode == "cot" else {}), **given)
    m = make_model().float()
    word, embed = m.processor.encode("Q")[0], m.embed

    def overflows(batch, *rest):  # on one word, as half precision may
        vectors, tokens = embed(batch, *rest)
        return torch.where((batch["ids"] == word).any(1)[:, None], math.inf, vectors), tokens

    m.embed = overflows
    with pytest.raises(DataError, match="^item 2: the embedding is not finite; the weights are finite, so it is something in these items"):
        m.encode(["red", "blue", "Q", "green"], bad={})
    with pytest.raises(DataError, match="^item 0: .*computed in torch.bfloat16, try float32"):
        m.bfloat16().encode(["Q"])
    m.float()
    with pytest.raises(DataError, match="item 0, .*item 9 and 30 more: "):
        m.encode(["Q"] * 40, batch_size=8)


def test_a_string_that_names_a_picture_file_is_embedded_as_text_with_one_warning(model, world, monkeypatch):
    monkeypatch.chdir(world)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = model.encode(["red", "red bar.png", "blue bar.png", "red bar.mp4", "gone.png"])
    said = [str(w.message) for w in seen if "name of a file" in str(w.message)]
    assert len(said) == 1 and "red bar.png" in said[0] and "{'image': ...}" in said[0]
    assert_close(out[1], model.encode([{"text": "red bar.png"}])[0], "as text", 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["gone.png", "a picture.png of a cat", {"text": "red bar.png"}, "model.py"])


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_on_a_cpu_go_the_other_way_round_to_the_same_values_and_gradients(bias):
    layer = torch.nn.Linear(6, 10, bias=bias).double()
    for B, L in ((1, 1), (16, 1), (4, 12), (7, 7), (15, 1)):  # 1, 16, 48, 49 and 15 rows
        x, results = torch.randn(B, L, 6, dtype=torch.float64), []
        for f in (layer, lambda x: latent.linear(layer, x)):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = f(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
        for a, b in zip(*results):
            assert_close(b, a, f"{B} x {L}", 1e-12)


def test_steps_change_the_embedding_and_zero_steps_are_the_suffix_alone(model):
    sample = rendered(model, ["a red square"])[0]
    by_steps = [model.encode(["a red square"], steps=k)[0] for k in (0, 1, 8)]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(by_steps, by_steps[1:]))
    h = model.lm(input_ids=torch.tensor([sample["ids"] + sample["suffix"]])).last_hidden_state[0, -1]
    assert_close(by_steps[0], F.normalize(h, dim=-1).float().detach(), "steps 0 = prefix and suffix in one pass")
    for wrong in (dict(steps=33), dict(steps=-1), dict(mode="single", steps=2), dict(mode="laten")):
        with pytest.raises(ValueError):
            model.encode(["x"], **wrong)
    with pytest.raises(TypeError, match="list"):
        model.encode("x")
    with pytest.raises(ValueError, match="at least 1"):
        model.encode(["x"], batch_size=0)


def test_checkpointing_changes_nothing(model, world):
    samples, grads = rendered(model, mixed_items(world)[:4]), []
    for checkpointing in (False, True):
        model.zero_grad()
        our_rollout(model, samples, 3, checkpointing=checkpointing).suffix.sin().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        assert_close(g, grads[1][name], name, 1e-10 * max(1.0, g.abs().max().item()))


def test_gradient_reaches_the_first_latent_step_and_equals_finite_differences(model):
    samples = rendered(model, ["a red square", "what colour is it?"])

    def loss():
        return our_rollout(model, samples, 4).suffix[:, -1].sin().sum()  # the embedding alone

    model.zero_grad()
    loss().backward()
    table = model.adapter.step_embed.weight
    assert (table.grad[:4].abs().amax(1) > 0).all() and (table.grad[4:] == 0).all()
    layer = model.lm.layers[0].self_attn
    for p in (table, model.adapter.w1, model.adapter.w2, layer.k_proj.weight, layer.v_proj.bias, model.lm.norm.weight):
        direction = p.grad / p.grad.norm()
        with torch.no_grad():
            p += 1e-4 * direction
            up = loss()
            p -= 2e-4 * direction
            down = loss()
            p += 1e-4 * direction
        assert_close((up - down) / 2e-4, p.grad.norm(), "directional derivative", 1e-6 * max(1.0, p.grad.norm().item()))


def test_rollout_never_asks_the_device_a_question(model):
    """On the meta device there are no values: anything that looks at one raises."""
    with torch.device("meta"):
        lm = type(model.lm)(model.lm.config)
        adapter = TransitionAdapter(128)
        prefix = Prefix(torch.randn(3, 10, 128), torch.zeros(3, 3, 10, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
        for rule in ("mrope", "cache"):
            r = rollout(lm, adapter, prefix, 4, torch.randn(3, 5, 128), rule)
    assert (r.anchor.shape, r.start.shape, r.latents.shape, r.suffix.shape, r.router.shape) == ((3, 128), (3, 128), (3, 4, 128), (3, 5, 128), (3, 4, 4))


def run_again(function, device):
    """What latent.record does, without a graph: every replay runs the function on what is in its fixed places then."""
    outputs = function()

    def replay():
        for old, new in zip(outputs, function()):
            old.copy_(new)
    return replay, outputs


def embed_with_and_without(m, graphs, items, K=8):
    """Asserts that `graphs` gives what no graphs give -> how many shapes are recorded."""
    batch = to_device(collate(rendered(m, items), m.processor), m.device)
    plain = m.embed(batch, "latent", K)[0]
    m.graphs = graphs
    try:
        assert_close(m.embed(batch, "latent", K)[0], plain, f"{len(items)} items, K = {K}", 0.05 if m.lm.norm.weight.dtype == torch.bfloat16 else 1e-6)
    finally:
        m.graphs = None
    return len(graphs.recorded)


def replays_equal_the_plain_rollout(m, items):
    graphs, short, long = latent.Graphs(keep=3), [items[0], items[3]], [items[2], items[5]]
    recorded = [embed_with_and_without(m, graphs, *given) for given in (
        (long,), (long,), (long[::-1],), (short,), (short,), (long,), (short,), (items[:1],), (items[:1],), (long, 3), (long, 3), (long, 0), (long, 0), (short,))]
    assert recorded == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    with torch.no_grad():  # as an optimizer does: in place
        m.adapter.w2 *= 1.5
        m.lm.norm.weight *= 1.5
    assert embed_with_and_without(m, graphs, short) == 3, "the same weights, changed"
    for weight in (m.adapter.w2, m.lm.norm.weight):
        weight.data = weight.data * 2
        assert embed_with_and_without(m, graphs, short) == 0, "other weights, other memory"
        assert embed_with_and_without(m, graphs, short) == 1
    with torch.autocast(m.device.type, torch.bfloat16):
        for _ in range(2):
            assert embed_with_and_without(m, graphs, long) == 1, "recorded under autocast"
    cache = next(iter(graphs.recorded.values()))[-1]
    for tensor in (t for kv in cache.prefix for t in kv):
        tensor.fill_(float("nan"))
    embed_with_and_without(m, graphs, short)  # nothing of an earlier batch is left in hidden columns
    graphs, words, kept = latent.Graphs(), [rendered(m, ["red " * n]) for n in range(18, 0, -1)], []  # prefixes of every length
    for samples in words[:1] + words + [2 * w for w in words]:
        batch = to_device(collate(samples, m.processor), m.device)
        with torch.no_grad():
            suffix = m.lm.embed_tokens(batch["suffix"])
            args = m.lm, m.adapter, m.prefix(batch), 2, suffix + torch.randn_like(suffix)
            kept.append((rollout(*args, graphs=graphs), rollout(*args)))
    assert 3 < len(graphs.recorded) < 8
    for ours, plain in kept:  # a later replay does not reach an earlier one's results
        for name, a, b in zip(ours._fields, ours, plain):
            assert not a.requires_grad
            assert_close(a, b, name, 0.25 if suffix.dtype == torch.bfloat16 else 1e-6)


def test_graphs_copy_record_and_forget_in_the_right_places(world, monkeypatch):
    with pytest.raises(ValueError, match="CUDA"):
        latent.record(list, torch.device("cpu"))
    monkeypatch.setattr(latent, "record", run_again)
    replays_equal_the_plain_rollout(make_model(), mixed_items(world))


def test_the_prefix_cache_is_never_copied(model):
    samples = rendered(model, ["a red square", "what colour?"])
    batch = collate(samples, model.processor)
    prefix = model.prefix(batch)
    cache = Cache(prefix.lengths, prefix.x.shape[1])
    decoder(model.lm, prefix.x, prefix.positions, cache)
    def saved(K):  # bytes that autograd keeps for K steps
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t):
            our_rollout(model, samples, K)
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    long = model.processor.render(parse_item("what colour? " * 60))
    samples = [long] * 4
    P, per_token = len(long["ids"]), 3 * 2 * 64 * 8  # layers x (k and v) x G*d x float64
    assert (saved(9) - saved(1)) / 8 < 0.7 * 4 * P * per_token, "a step keeps a copy of the prefix"
    before = [k.data_ptr() for k, _ in cache.prefix]
    for k in range(3):
        decoder(model.lm, prefix.x[:, :1], torch.full((2, 1), 50 + k), cache)
    assert before == [k.data_ptr() for k, _ in cache.prefix] and [k.shape[2] for k, _ in cache.slots] == [3, 3, 3]


def test_greedy_rationale_equals_transformers_and_stops_at_gen_emb(model, world):
    gen, samples, limit = model.processor.id["<gen_emb>"], rendered(model, mixed_items(world)), 9
    expected = []
    for s in samples:  # one by one, every token through transformers' cache
        h, cache = reference_prefill(model, s)
        tokens, pos, h = [], int(s["positions"].max()) + 1, h[-1:]
        while not tokens or tokens[-1] != gen:
            tokens.append(gen if len(tokens) == limit - 1 else int(model.backbone.lm_head(h).argmax(-1)))
            h = model.lm(inputs_embeds=model.lm.embed_tokens(torch.tensor([[tokens[-1]]])), position_ids=torch.full((3, 1, 1), pos + len(tokens) - 1),
                         past_key_values=cache, use_cache=True).last_hidden_state[0]
        expected.append((tokens, h[0]))
    batch = collate(samples, model.processor)
    h, tokens = greedy(model.lm, model.lm.embed_tokens, model.backbone.lm_head, model.prefix(batch), gen, limit)
    for i, (theirs, state) in enumerate(expected):
        assert tokens[i].tolist() == theirs + [gen] * (limit - len(theirs))
        assert_close(h[i], state, f"row {i}", 1e-5)
    # a token as `end` that comes early in some rows: they stop there, and their neighbours go on
    early = int(tokens[0, 2])
    h2, t2 = greedy(model.lm, model.lm.embed_tokens, model.backbone.lm_head, model.prefix(batch), early, limit)
    alone, _ = greedy(model.lm, model.lm.embed_tokens, model.backbone.lm_head, model.prefix(collate(samples[:1], model.processor)), early, limit)
    assert (t2[0, tokens[0].tolist().index(early) :] == early).all()
    assert_close(h2[0], alone[0], "a row that stopped early", 1e-6)


def test_chunked_cross_entropy_equals_the_plain_one():
    h, w, y = torch.randn(50, 8, dtype=torch.float64, requires_grad=True), torch.randn(30, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 30, (50,))
    scale, grads = torch.rand(50, dtype=torch.float64), []
    for f in (lambda: F.cross_entropy(h @ w.T, y, reduction="none"), lambda: plume_model.cross_entropy(h, w, y, elements=30 * 7)):
        h.grad = w.grad = None
        (f() * scale).sum().backward()
        grads.append((h.grad, w.grad))
    assert_close(grads[0][0], grads[1][0], "dh", 1e-6)
    assert_close(grads[0][1], grads[1][1], "dW", 1e-6)
    assert plume_model.cross_entropy(h[:0], w, y[:0]).shape == (0,)


def test_bfloat16_is_close_to_float32(world, tmp_path):
    m, items = make_model().float(), mixed_items(world)
    m.save_pretrained(tmp_path / "ck")
    half = Plume.from_pretrained(tmp_path / "ck", "cpu", "bfloat16")
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    for mode in ("latent", "single"):
        assert (m.encode(items, mode) * half.encode(items, mode)).sum(1).min() > 0.99
    losses = []  # and the way of training: float32 weights, bfloat16 compute, recomputed activations
    batch = whole(Batches(Pairs(str(world / "train.jsonl")), m.processor, Curriculum())[0, FINAL, np.array([1, 3, 5])])
    for dtype in (torch.float32, torch.bfloat16):
        m.zero_grad()
        m.checkpointing = dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=m.checkpointing):
            out = m(batch, 8)
        losses.append(train.losses(out, batch, train.Config())["loss"])
        losses[-1].backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in m.parameters() if p.grad is not None)
    assert_close(losses[1], losses[0], "loss under autocast", 0.05 * losses[0].item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu(model, world):
    items, m = mixed_items(world), make_model()
    assert_close(m.to("cuda").encode(items), model.encode(items), "float64 on CUDA", 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cuda_graphs_equal_the_plain_rollout(world, dtype):
    replays_equal_the_plain_rollout(make_model().to("cuda", dtype), mixed_items(world))


@pytest.mark.skipif(not GOLDEN.exists(), reason="no ../shared/golden")
@pytest.mark.parametrize("front", ["blank", "plain"])
def test_vectors_equal_those_of_the_released_code(front):
    """Text, a picture and a clip through the authors' evaluation, with and without the white picture in front of text."""
    print("using", GOLDEN)
    expected, items = np.load(GOLDEN / "golden.npz"), json.loads((GOLDEN / "items.json").read_text())
    m = Plume.from_pretrained(GOLDEN / "ckpt", "cpu", "float32", white_image=front == "blank")
    for item in items:
        media = {kind: [str(GOLDEN / path) for path in item[kind]] for kind in ("image", "video") if kind in item}
        side = {"text": item["text"]} | media
        single = m.encode([side], "single")[0]
        for K in (0, 4, 8):
            there = {what: expected[f"{item['name']}/K{K}/{front}/{what}"] for what in ("gen", "disc", "latents")}
            assert_close(m.encode([side], steps=K)[0], there["gen"], f"{item['name']}, K = {K}", 1e-4)
            assert_close(single, there["disc"], f"{item['name']}, single pass", 1e-4)
            with torch.no_grad():
                latents = our_rollout(m, rendered(m, [side]), K, "cache").latents[0]
            assert_close(latents, there["latents"], f"{item['name']}, latent states", 1e-3)


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_saved_and_loaded_again_embeds_bit_equally_and_needs_no_flags(world, tmp_path):
    m = make_model(latent_steps=5, latent_positions="cache", limits=dict(num_frames=4, max_pixels=50176), adapter=dict(top_k=1, anchor=False)).float()
    m.save_pretrained(tmp_path / "ck")
    again, items = Plume.from_pretrained(tmp_path / "ck", "cpu"), mixed_items(world)
    assert again.settings == m.settings and again.settings["latent_steps"] == 5 and again.settings["limits"]["num_frames"] == 4
    assert np.array_equal(again.encode(items), m.encode(items))
    text = "Hello wörld\n\nit's 123 <|im_end|> fine"
    assert again.processor.encode(text) == m.processor.encode(text)
    again.save_pretrained(tmp_path / "ck")  # in place of the old one
    assert sorted(os.listdir(tmp_path)) == ["ck"]


def test_sharded_weights_with_an_index_load_the_same(model, tmp_path):
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    shard(tmp_path / "ck")
    assert np.array_equal(Plume.from_pretrained(tmp_path / "ck", "cpu").encode(["a"]), m.encode(["a"]))
    # what transformers does not read is not read here either, whatever it is called
    stray = {f"adapter.{k}": torch.full_like(v, 7.0) for k, v in m.adapter.state_dict().items()}
    for name in ("zz.safetensors", "adapter_model.safetensors", "model-00004-of-00003.safetensors"):
        save_file(stray, tmp_path / "ck" / name)
    assert np.array_equal(Plume.from_pretrained(tmp_path / "ck", "cpu").encode(["a"]), m.encode(["a"]))
    m.save_pretrained(tmp_path / "ck")  # one file again; the shards were this checkpoint's, the others were not
    left = {name for name in os.listdir(tmp_path / "ck") if name.endswith(("safetensors", "index.json"))}
    assert left == {"model.safetensors", "zz.safetensors", "adapter_model.safetensors", "model-00004-of-00003.safetensors"}
    assert np.array_equal(Plume.from_pretrained(tmp_path / "ck", "cpu").encode(["a"]), m.encode(["a"]))


@pytest.mark.parametrize("kind", ["none", "mlp", "untied"])
def test_every_kind_of_model_saves_and_loads(tmp_path, kind):
    m = make_model(**({} if kind == "untied" else dict(adapter=dict(kind=kind)))).float()
    if kind == "untied":  # as Qwen2-VL-7B: an output embedding of its own
        config = type(m.backbone.config).from_dict({**m.backbone.config.to_dict(), "tie_word_embeddings": False})
        m = Plume(type(m.backbone)(config), m.processor.tokenizer, m.settings)
        torch.nn.init.normal_(m.backbone.lm_head.weight)
    m.save_pretrained(tmp_path / "ck")
    again = Plume.from_pretrained(tmp_path / "ck", "cpu")
    ours, theirs = m.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert np.array_equal(again.encode(["a"], "cot", limit=5), m.encode(["a"], "cot", limit=5))


def test_released_layout_round_trip(world, tmp_path):
    m = make_model(latent_positions="cache", white_image=True).float()
    m.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="implies other values.*prompt"):
        Plume.from_pretrained(tmp_path / "ours", "cpu").save_pretrained(tmp_path / "ck", released=True)  # of a loaded one
    names = set(load_file(tmp_path / "ck" / "model.safetensors"))
    E = [f"latent_moe_transition.{e}.{fc}.{p}" for e in ("shared_expert", *(f"experts.{i}" for i in range(4))) for fc in ("fc1", "fc2") for p in ("weight", "bias")]
    assert {n for n in names if n.startswith("latent_moe")} == {*E, *(f"latent_moe_transition.{n}" for n in ("ln.weight", "ln.bias", "router.weight", "step_embed.weight"))}
    assert {"model.layers.0.self_attn.q_proj.weight", "visual.merger.mlp.0.weight", "model.norm.weight"} <= names and "lm_head.weight" not in names
    config = json.loads((tmp_path / "ck" / "config.json").read_text())
    assert "plume" not in config
    again = Plume.from_pretrained(tmp_path / "ck", "cpu")  # recognised by its weights
    assert (again.settings["latent_positions"], again.settings["white_image"], again.settings["latent_steps"], again.settings["prompt"]) == ("cache", True, 8, plume_model.RELEASED_PROMPT)
    assert again.settings["limits"]["max_pixels"] == m.settings["limits"]["max_pixels"]  # from preprocessor_config.json
    again = Plume.from_pretrained(tmp_path / "ck", "cpu", prompt=m.settings["prompt"], limits=m.settings["limits"])
    assert np.array_equal(again.encode(mixed_items(world)), m.encode(mixed_items(world)))
    assert len(rendered(again, ["words"])[0]["pixels"]) == 1  # the white picture in front of text
    again.settings["adapter"]["top_k"] = 1
    with pytest.warns(UserWarning, match="'top_k': 1"):
        again.save_pretrained(tmp_path / "other", released=True)
    with pytest.raises(DataError, match="no adapter"):
        make_model(adapter=dict(kind="none")).save_pretrained(tmp_path / "other", released=True)


def test_a_plain_qwen2_vl_gets_the_tokens_at_the_mean_and_a_near_identity_adapter(tmp_path):
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    folder = tmp_path / "ck"
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("adapter.")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    flat = {**config.pop("text_config"), **config}  # the hub's flat spelling
    rope = flat.pop("rope_parameters")
    flat |= dict(rope_theta=rope["rope_theta"], rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]), model_type="qwen2_vl")
    del flat["plume"]
    (folder / "config.json").write_text(json.dumps(flat))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in data.PLUME_TOKENS]
    for t in data.PLUME_TOKENS:
        tokenizer["model"]["vocab"][f"unused{t}"] = tokenizer["model"]["vocab"].pop(t)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    plain = Plume.from_pretrained(folder, "cpu")
    old = tensors["model.embed_tokens.weight"]
    size = len({*tokenizer["model"]["vocab"], *(t["content"] for t in tokenizer["added_tokens"])})
    ids = [plain.processor.id[t] for t in data.PLUME_TOKENS]
    assert ids == list(range(size, size + 5)) and plain.settings["latent_positions"] == "mrope" and not plain.settings["white_image"]
    for i in ids:
        assert_close(plain.lm.embed_tokens.weight[i].detach(), old[:size].mean(0), "new row", 1e-6)
    assert plain.backbone.lm_head.weight is plain.lm.embed_tokens.weight or torch.equal(plain.backbone.lm_head.weight, plain.lm.embed_tokens.weight)
    plain.save_pretrained(tmp_path / "start")
    assert np.array_equal(Plume.from_pretrained(tmp_path / "start", "cpu").encode(["a", "b"]), plain.encode(["a", "b"]))


def edit_json(path, **changes):
    """Changes keys of a JSON file; a value of None takes the key away."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def test_a_checkpoint_carries_its_chat_template_and_another_format_is_refused(world, tmp_path):
    other = data.TEMPLATE | dict(system="You embed.", closing=" done", answer=" so: {answer}.", anchor=" -> <disc_emb> : {prompt}")
    m = make_model(template=other).float()
    m.save_pretrained(tmp_path / "ck")
    again = Plume.from_pretrained(tmp_path / "ck", "cpu")
    sample = again.processor.render(Side([("text", "what?")], "One. Two.", "it"), Stage(0, 0, True), Curriculum())
    p = again.processor
    assert p.tokenizer.decode(sample["ids"]).replace(" ", "") == (
        f"<|im_start|>system\nYou embed.<|im_end|>\n<|im_start|>user\nwhat? -> <disc_emb> : {p.prompt}<|im_end|>\n"
        "<|im_start|>assistant\n<think><bot>").replace(" ", "")
    assert p.tokenizer.decode(sample["suffix"]) == "One. Two.<eot> done so: it.<gen_emb>"
    assert p.tokenizer.decode(p.render(parse_item("x"))["suffix"]) == "<eot> done<gen_emb>"
    assert np.array_equal(again.encode(mixed_items(world)), m.encode(mixed_items(world)))
    again.save_pretrained(tmp_path / "again")
    block = json.loads((tmp_path / "again" / "config.json").read_text())["plume"]
    assert block["template"] == other and block["format"] == plume_model.FORMAT == 2
    assert pickle.loads(pickle.dumps(p)).render(parse_item("x"))["ids"] == p.render(parse_item("x"))["ids"]

    config = tmp_path / "ck" / "config.json"
    for wrong, why in (({k: v for k, v in block.items() if k not in ("format", "template")}, "format 1, this version reads format 2.*train it again"),
                       (block | dict(format=3), "format 3, .*use the version of PLUME that wrote it"), (block | dict(format="2"), "format '2'"),
                       ({k: v for k, v in block.items() if k != "template"}, "lacks 'template'"),
                       (block | dict(template={k: v for k, v in other.items() if k != "closing"}), "template: lacks 'closing'"),
                       (block | dict(template=other | dict(turns="no place for it <bot>")), "'turns' must have '{item}' once"),
                       (block | dict(template=other | dict(anchor="")), "'anchor' must have '<disc_emb>' once"),
                       (block | dict(template=other | dict(turns="<bot>{item}")), "must end in '<bot>'"),
                       (block | dict(template=other | dict(turns="{item}{item}<bot>")), "must have '{item}' once"),
                       (block | dict(latent_steps="8"), "'latent_steps' must be of type int"), (block | dict(adapter=[]), "'adapter' must be of type dict"),
                       (block | dict(limits=block["limits"] | dict(num_frames=0)), "num_frames 0: needs a whole number of at least 1"),
                       ([], "format"), ("x" * 1000, "format 'x{190,200}")):
        edit_json(config, plume=wrong)
        with pytest.raises(DataError, match=f"ck: .*{why}") as error:
            Plume.from_pretrained(tmp_path / "ck", "cpu")
        assert len(str(error.value)) < 900


def test_a_released_folder_without_pixel_limits_gets_the_released_ones(tmp_path):
    make_model(latent_positions="cache", white_image=True).float().save_pretrained(tmp_path / "ck", released=True)
    (tmp_path / "ck" / "preprocessor_config.json").unlink()
    m = Plume.from_pretrained(tmp_path / "ck", "cpu")
    limits = m.settings["limits"]
    assert (limits["min_pixels"], limits["max_pixels"], limits["max_len"]) == (784, 2359296, 11288)
    page, tiny = rendered(m, [{"image": Image.new("RGB", (1000, 1400))}, {"image": Image.new("RGB", (28, 28))}])
    pads = [sample["ids"].count(m.processor.id["<|image_pad|>"]) for sample in (page, tiny)]
    assert pads == [1800, 1]  # 36 x 50 tokens of 28 x 28 pixels, and not the 1,280 of a plain Qwen2-VL
    (tmp_path / "ck" / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pix')
    with pytest.raises(DataError, match="preprocessor_config.json: not JSON"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")
    for wrong in ('{"min_pixels": "x"}', '{"max_pixels": 0}', '{"max_pixels": 2359296.0}', '{"size": {"longest_edge": -1}}', '{"min_pixels": 9999999}'):
        (tmp_path / "ck" / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(DataError, match="preprocessor_config.json: m[ia][nx]_pixels"):
            Plume.from_pretrained(tmp_path / "ck", "cpu")
    (tmp_path / "ck" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 3136}}')
    limits = Plume.from_pretrained(tmp_path / "ck", "cpu").settings["limits"]
    assert (limits["min_pixels"], limits["max_pixels"]) == (3136, 2359296)


@pytest.mark.parametrize("layout", ["ours", "released", "sharded", "shifted"])
def test_every_loaded_weight_begins_at_a_multiple_of_64_bytes(tmp_path, layout):
    """Where a weight lies decides which path a product takes, and so its last bits: loaded ones lie as trained ones do."""
    m = make_model(**(dict(latent_positions="cache", white_image=True) if layout == "released" else {})).float()
    m.save_pretrained(tmp_path / "ck", released=layout == "released")
    if layout == "sharded":
        shard(tmp_path / "ck")
    if layout == "shifted":  # the header is padded: data begin elsewhere in the file
        path = tmp_path / "ck" / "model.safetensors"
        save_file(load_file(path), path, {"format": "pt", "note": "x" * 13})
    again = Plume.from_pretrained(tmp_path / "ck", "cpu")
    assert [name for name, t in [*again.named_parameters(), *again.named_buffers()] if t.data_ptr() % 64] == []
    assert again.backbone.lm_head.weight is again.lm.embed_tokens.weight
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in m.state_dict().items())


def shard(folder):
    """The weights of a checkpoint in three files and an index."""
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    where = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return where


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        Plume.from_pretrained(tmp_path / "nothing")
    with pytest.raises(DataError, match="float32"):
        plume_model.pick_device("cpu", "float23")
    with pytest.raises(DataError, match="latent_steps 33"):
        make_model(latent_steps=33)
    with pytest.raises(DataError, match="Did you mean 'max_pixels'"):
        make_model(limits=dict(max_pixel=3))
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    path = tmp_path / "ck" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")
    save_file(tensors | dict(stray=torch.zeros(1)), path, {"format": "pt"})
    with pytest.raises(ValueError, match="stray"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((tmp_path / "ck" / "config.json").read_text())
    config["plume"]["latent_step"] = 3
    (tmp_path / "ck" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Did you mean 'latent_steps'"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")
    for dtype in (torch.float16, "float16", torch.float64, torch.int8, 3):
        with pytest.raises(DataError, match="needs 'float32' or 'bfloat16'"):
            Plume.from_pretrained(tmp_path / "ck", "cpu", dtype)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4400000000\n"


def half_of(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 128)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def as_type(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.to(dtype) if "up_proj" in name else t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit_inside(folder, key, **changes):
    """Changes keys of an object in config.json."""
    edit_json(folder / "config.json", **{key: json.loads((folder / "config.json").read_text())[key] | changes})


BROKEN = {  # what was done to a checkpoint folder -> the file and the reason that the error names
    "weights cut off": (lambda f: half_of(f / "model.safetensors"), "model.safetensors: not a whole safetensors file"),
    "weights are a pointer": (lambda f: (f / "model.safetensors").write_bytes(LFS), "model.safetensors: .*a Git LFS pointer.*git lfs pull"),
    "weights are empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: not a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index.json"),
    "a shard is gone": (lambda f: (f / max(shard(f).values())).unlink(), "model-00003-of-00003.safetensors: .* is not there"),
    "a shard is cut off": (lambda f: half_of(f / max(shard(f).values())), "model-00003-of-00003.safetensors: not a whole"),
    "the index is cut off": (lambda f: (shard(f), half_of(f / "model.safetensors.index.json")), "model.safetensors.index.json: not JSON"),
    "the index names other tensors": (lambda f: edit_json(f / "model.safetensors.index.json", weight_map={
        name: "model-00001-of-00003.safetensors" for name in shard(f)}), "model-00001-of-00003.safetensors: does not hold what model.safetensors.index.json says"),
    "whole numbers": (lambda f: as_type(f, torch.int8), "model.safetensors: .*is stored as torch.int8"),
    "numbers of 8 bits": (lambda f: as_type(f, torch.float8_e4m3fn), "is stored as torch.float8_e4m3fn"),
    "the index leads elsewhere": (lambda f: (shard(f), edit_json(f / "model.safetensors.index.json", weight_map=dict(a="../x"))), "'weight_map' must name"),
    "another shape": (other_shape, r"up_proj.weight: \(3, 128\) in the file, \(384, 128\) by config.json"),
    "config cut off": (lambda f: half_of(f / "config.json"), "config.json: not JSON"),
    "config is a pointer": (lambda f: (f / "config.json").write_bytes(LFS), "config.json: not JSON.*Git LFS pointer"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: needs an object"),
    "another model": (lambda f: edit_json(f / "config.json", model_type="qwen2_5_vl"), "model_type 'qwen2_5_vl'; PLUME builds on 'qwen2_vl'"),
    "no model type": (lambda f: edit_json(f / "config.json", model_type=None), "model_type None"),
    "no text model": (lambda f: edit_json(f / "config.json", text_config=None), "describes no Qwen2-VL that can be built: .*parameters, and the files hold"),
    "no heads": (lambda f: edit_inside(f, "text_config", num_attention_heads=0), "describes no Qwen2-VL"),
    "no axes": (lambda f: edit_inside(f, "text_config", rope_parameters=dict(rope_type="default", rope_theta=100.0)), "an mrope_section of 3 numbers that sum to 16"),
    "axes of another width": (lambda f: edit_inside(f, "text_config", rope_parameters=dict(rope_type="default", rope_theta=1e2, mrope_section=[4, 6, 7])), "mrope_section"),
    "a million experts": (lambda f: edit_inside(f, "plume", adapter=dict(plume_model.ADAPTER, experts=10**9)), "settings: adapter"),
    "no plume block": (lambda f: edit_json(f / "config.json", plume=None), "config.json has no 'plume' block.*take config.json"),
    "a width in words": (lambda f: edit_json(f / "config.json", text_config=dict(hidden_size="wide")), "no Qwen2-VL that can be built"),
    "an unknown activation": (lambda f: edit_json(f / "config.json", text_config=dict(hidden_act="relu9")), "no Qwen2-VL that can be built"),
    "tokenizer cut off": (lambda f: half_of(f / "tokenizer.json"), "tokenizer.json: not JSON"),
    "tokenizer is a pointer": (lambda f: (f / "tokenizer.json").write_bytes(LFS), "tokenizer.json: not JSON.*Git LFS pointer"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "tokenizer's settings cut off": (lambda f: half_of(f / "tokenizer_config.json"), "tokenizer_config.json: not JSON"),
    "tokenizer of nobody": (lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'), "the tokenizer"),
    "adapter of another width": (lambda f: edit_inside(f, "plume", adapter=dict(plume_model.ADAPTER, experts=7)), "its adapter does not fit"),
    "an adapter of no kind": (lambda f: edit_inside(f, "plume", adapter=dict(plume_model.ADAPTER, kind="x" * 9999)), "adapter kind 'x{40}'"),
    "positions of no rule": (lambda f: edit_inside(f, "plume", latent_positions="y" * 9999), "latent_positions 'y{190,200}.*'mrope' or 'cache'"),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_checkpoint_is_one_error_that_names_file_and_reason(tmp_path, harm, capsys):
    make_model().float().save_pretrained(tmp_path / "ck")
    do, why = BROKEN[harm]
    do(tmp_path / "ck")
    with pytest.raises((DataError, FileNotFoundError), match=rf"(?s){tmp_path / 'ck'}.*{why}") as error:
        Plume.from_pretrained(tmp_path / "ck", "cpu", "float32")
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 1200 and "\n\n" not in str(error.value)
    failed = call("eval.py", "--ckpt", tmp_path / "ck", "--task", "image_cls", "--device=cpu", check=False)  # what `call` lets through is a traceback
    assert failed.returncode == 1 and re.search(why, failed.stderr, re.S)
    with pytest.raises((DataError, OSError), match=f"(?s){why}"):
        train.main(["--init", str(tmp_path / "ck"), "--out", str(tmp_path / "out"), "--device=cpu", "--families=image_cls", "--steps=1"])


def test_an_incomplete_released_adapter_is_an_error(tmp_path):
    make_model(latent_positions="cache", white_image=True).float().save_pretrained(tmp_path / "ck", released=True)
    path = tmp_path / "ck" / "model.safetensors"
    tensors = load_file(path)
    for gone in ("latent_moe_transition.experts.1.fc1.bias", "latent_moe_transition.router.weight"):
        save_file({k: v for k, v in tensors.items() if k != gone}, path, {"format": "pt"})
        with pytest.raises(DataError, match="ck: its adapter"):
            Plume.from_pretrained(tmp_path / "ck", "cpu")
    odd = tensors | {"latent_moe_transition.experts.1.fc1.weight": torch.zeros(5, 128)}
    save_file(odd, path, {"format": "pt"})
    with pytest.raises(DataError, match="ck: its adapter's tensors are incomplete or do not fit"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")


def test_an_interrupted_write_keeps_the_old_checkpoint_and_a_foreign_folder_is_not_overwritten(tmp_path):
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    before = (tmp_path / "ck" / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError), plume_model.replacing(tmp_path / "ck") as folder:
        (Path(folder) / "config.json").write_text("{")
        raise RuntimeError("killed")
    assert (tmp_path / "ck" / "model.safetensors").read_bytes() == before and os.listdir(tmp_path) == ["ck"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        m.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists() and (tmp_path / "mine" / "config.json").read_text() == "{}"
    (tmp_path / "link").symlink_to(tmp_path / "ck")
    m.save_pretrained(tmp_path / "link"), m.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["ck", "link", "mine"]


def test_saving_removes_nothing_but_the_checkpoint_that_it_replaces(tmp_path, monkeypatch):
    m = make_model().float()
    for name in ("best.old", "best.writing", "best.writing.old", "best-1", ".best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("somebody's")
        (tmp_path / name / "model.safetensors").write_text("somebody's")
    (tmp_path / "best").mkdir()  # as a cloned repository without a model
    notes = {"README.md": "card", "LICENSE": "MIT", ".gitattributes": "lfs", "runs/1/events": "log", "lora.safetensors": "theirs", "train_state.txt": "x",
             "vocab.json": "{}", "merges.txt": "", "generation_config.json": "{}", "chat_template.jinja": "for other software"}
    for name, text in notes.items():
        (tmp_path / "best" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "best" / name).write_text(text)
    (tmp_path / "best" / "latest").symlink_to("README.md")
    (tmp_path / "best" / "train_state").mkdir()
    (tmp_path / "best").chmod(0o750)
    inode = (tmp_path / "best" / "README.md").stat().st_ino
    for _ in range(2):
        m.save_pretrained(tmp_path / "best")
    assert {name: (tmp_path / "best" / name).read_text() for name in notes} == notes
    assert (tmp_path / "best").stat().st_mode & 0o777 == 0o750 and (tmp_path / "best" / "train_state").is_dir()
    assert (tmp_path / "best" / "README.md").stat().st_ino == inode and os.readlink(tmp_path / "best" / "latest") == "README.md"
    assert sorted(os.listdir(tmp_path)) == [".best", "best", "best-1", "best.old", "best.writing", "best.writing.old"]
    assert all((tmp_path / name / "config.json").read_text() == "somebody's" for name in os.listdir(tmp_path) if name != "best")
    Plume.from_pretrained(tmp_path / "best", "cpu")
    # the second rename fails: what stood there stands there again
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if not str(a).endswith(".writing") else (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        m.save_pretrained(tmp_path / "best")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [".best", "best", "best-1", "best.old", "best.writing", "best.writing.old"]
    assert {name: (tmp_path / "best" / name).read_text() for name in notes} == notes
    # a folder of theirs has the name of a file of ours: an error in front of everything
    (tmp_path / "best" / "preprocessor_config.json").unlink()
    (tmp_path / "best" / "preprocessor_config.json").mkdir()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="holds a folder 'preprocessor_config.json'"):
        m.save_pretrained(tmp_path / "best")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    (tmp_path / "best" / "preprocessor_config.json").rmdir()
    # what cannot be moved along is left where it is, with a warning: the new checkpoint stands
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if not str(a).endswith("LICENSE") else (_ for _ in ()).throw(OSError("no")))
    with pytest.warns(UserWarning, match=r"best is written, but .* are in .*best\.[0-9a-f]{8}\.old: LICENSE"):
        m.save_pretrained(tmp_path / "best")
    monkeypatch.undo()
    Plume.from_pretrained(tmp_path / "best", "cpu")
    (left,) = [name for name in os.listdir(tmp_path) if name.endswith(".old") and name.count(".") == 2 and not name.startswith("best.w")]
    assert (tmp_path / left / "LICENSE").read_text() == "MIT"
    (tmp_path / "bert").mkdir()  # a checkpoint, but of something else
    m.save_pretrained(tmp_path / "bert")
    edit_json(tmp_path / "bert" / "config.json", model_type="bert")
    with pytest.raises(FileExistsError, match="no checkpoint of a Qwen2-VL"):
        m.save_pretrained(tmp_path / "bert")
    monkeypatch.chdir(tmp_path / "best")
    m.save_pretrained("../best2"), m.save_pretrained("../best2/")
    with pytest.raises(FileExistsError, match="current folder"):
        m.save_pretrained(".")
    with pytest.raises(FileExistsError, match="not a folder"):
        m.save_pretrained(tmp_path / "best" / "README.md")


@pytest.mark.parametrize("mask, file, folder", [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770), (0o077, 0o600, 0o700)])
def test_what_is_written_may_be_read_by_whom_the_umask_lets(small, mmeb, counts, tmp_path, mask, file, folder):
    old = os.umask(mask)
    try:
        make_model().float().save_pretrained(tmp_path / "ck")
        flags = ["--data", mmeb.root, "--task", "MSVD", "--ckpt", small, "--scores", tmp_path / "scores", "--json", tmp_path / "a.json"]
        call("eval.py", *flags)
    finally:
        os.umask(old)
    written = [p for p in tmp_path.rglob("*") if not p.is_symlink()]
    assert len([p for p in written if p.suffix in (".safetensors", ".bin", ".json")]) > 5
    assert {str(p): oct(p.stat().st_mode & 0o777) for p in written if p.stat().st_mode & 0o777 != (folder if p.is_dir() else file)} == {}


# ---------------------------------------------------------------------------------------------------------- curriculum


def test_stages_follow_the_schedule_of_the_paper():
    c = Curriculum()
    progress = Progress(c, 1000)
    seen = [progress.stage(i) for i in range(1000)]
    assert [seen.index(s) for s in dict.fromkeys(seen)] == [0, 125, 250, 375, 500, 750]
    assert list(dict.fromkeys(seen)) == c.stages == [Stage(0, 0, True), Stage(1, 2, True), Stage(2, 4, True), Stage(3, 6, True), Stage(4, 8, True), Stage(4, 8, False)]
    for step in range(1000):  # without a gate no loss is low enough
        progress.observe(step, 0.0)
    assert [progress.stage(i) for i in range(1000)] == seen
    assert c.latent_steps == 8 and len(c.table(1000).splitlines()) == 7
    only = Progress(Curriculum(segments=1, steps_per_segment=8, last_stage=1.0), 100)  # no curriculum: the final format from the start
    assert {only.stage(p).latent_steps for p in range(100)} == {8} and len(only.curriculum.table(100).splitlines()) == 3
    for bad in (dict(rest_of_rationale="before"), dict(segments=0), dict(last_stage=0.0), dict(gate=-1), dict(replay=1.0)):
        with pytest.raises(ValueError):
            Curriculum(**bad)


def follow(progress, steps, loss, ahead=0):
    """Ask for the stages `ahead` of the losses, as prefetching workers do -> the stage of each step."""
    seen, asked = [], 0
    for step in range(steps):
        while asked <= min(step + ahead, steps - 1):
            seen.append(progress.stage(asked))
            asked += 1
        progress.observe(step, loss(step, seen[step]))
    return seen


def test_the_gate_enters_a_stage_when_the_loss_is_low_and_at_the_latest_by_the_schedule():
    c = Curriculum(segments=2, steps_per_segment=1, gate=0.1)
    wait, delay = Progress.WINDOW, Progress.DELAY
    entered = lambda loss: [follow(Progress(c, 1000), 1000, loss).index(s) for s in c.stages]
    assert entered(lambda step, stage: 1.0) == c.schedule(1000) == [0, 250, 500, 750]
    assert entered(lambda step, stage: 0.01) == [i * (wait + delay - 1) for i in range(4)]
    once = lambda step, stage: 0.01 if step >= 60 and stage.index == 0 else 1.0  # a running mean of 20 steps under 0.1: after 19 low ones
    assert entered(once) == [0, 60 + 18 + delay, 500, 750] and wait == 20
    late = lambda step, stage: 0.01 if step >= 245 else 1.0  # too late to bring it forward
    assert entered(late)[1] == 250


def test_gate_and_replay_are_the_same_for_every_prefetch_and_after_a_resume():
    c = Curriculum(gate=0.1, replay=0.3)
    noise = np.random.default_rng(0).random(1000)
    loss = lambda step, stage: float(noise[step] * (0.3 if step % 150 < 60 else 0.05))
    plain = follow(Progress(c, 1000, 5), 1000, loss)
    for ahead in (1, 7, Progress.DELAY - 1):
        assert follow(Progress(c, 1000, 5), 1000, loss, ahead) == plain
    for stop in (33, 250, 401):
        first, second = Progress(c, 1000, 5), Progress(c, 1000, 5)
        follow(first, stop, loss)
        second.load(json.loads(json.dumps(first.state())))
        for step in range(stop, 1000):
            assert second.stage(step) == plain[step]
            second.observe(step, loss(step, plain[step]))
    progress = Progress(c, 1000, 5)
    follow(progress, 1000, loss)
    back = [progress.replayed(step) < progress.place(step) for step in range(1000)]
    assert all(progress.replayed(step) <= progress.place(step) for step in range(1000)) and 0.2 < np.mean(back[200:]) < 0.4
    assert {progress.replayed(step) for step in range(800, 1000) if back[step]} >= {0, 1, 2, 3, 4}  # all earlier ones
    low = Progress(c, 1000, 5)
    for step in range(1000):  # the loss of a replayed stage says nothing about the present one
        low.observe(step, 0.0 if low.replayed(step) < low.place(step) else 1.0)
    assert low.entry == c.schedule(1000)


@pytest.mark.parametrize("text", ["", "word", "two words", "one two three four five six", "A. B! C? D; E. F.", "Two sentences only. But with many words in them all.",
                                  "3.14 is a number. It has a point. That is no end. So four!", " led by a blank  and ended by one \n"])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_segments_join_to_the_rationale_and_never_cut_a_word(text, parts):
    cut = segment(text, parts)
    assert len(cut) == parts and "".join(cut) == text
    ends = np.cumsum([len(c) for c in cut])[:-1]
    assert all(not (text[e - 1 : e + 1].isalnum() and 0 < e < len(text) and text[e - 1 : e + 1].strip() == text[e - 1 : e + 1]) for e in ends)
    if len(text.split()) >= parts:
        assert all(c.strip() for c in cut)
    sentences = re.findall(r"[^.!?;]+[.!?;]", text)
    if text == "A. B! C? D; E. F." and parts <= len(sentences):
        assert all(c.strip()[-1] in ".!?;" for c in cut)


def test_every_stage_and_placement_is_the_documented_text(model):
    side = Side([("text", "what?")], "First one. Second one. Third one. Fourth one.", "it", "here")
    decode = lambda ids: model.processor.tokenizer.decode(ids)
    for rest in ("inside", "after"):
        c = Curriculum(rest_of_rationale=rest)
        for s in range(5):
            for answer in (True, False):
                out = model.processor.render(side, Stage(s, 2 * s, answer), c)
                left = "".join([" First one.", " Second one.", " Third one.", " Fourth one."][s:]).strip() if s == 0 else "".join([" First one.", " Second one.", " Third one.", " Fourth one."][s:])
                end = "</think>\n" + ("<answer>it</answer>\n" if answer else "") + "<gen_emb>"
                assert decode(out["suffix"]) == (f"{left}<eot>{end}" if rest == "inside" else f"<eot>{left}{end}")
        final = model.processor.render(side, Stage(4, 8, False), c)
        assert final["suffix"] == model.processor.render(side)["suffix"] and final["ids"] == model.processor.render(side)["ids"]  # ends as inference
    bare = model.processor.render(Side([("text", "what?")], "", "it"), Stage(2, 4, True), Curriculum())
    assert decode(bare["suffix"]) == "<eot></think>\n<answer>it</answer>\n<gen_emb>"


# -------------------------------------------------------------------------------------------------------------- prompt


def whole_prompt(text, prompt):
    return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + text + "\n<disc_emb>\n" + prompt +
            "<|im_end|>\n<|im_start|>assistant\n<think><bot>")


def check_prompt(processor, world):
    tokenizer, pad = processor.tokenizer, "<|vision_start|><|{}_pad|><|vision_end|>"
    expand = lambda ids, counts: [i for t in ids for i in ([t] * next(counts) if t in (processor.id["<|image_pad|>"], processor.id["<|video_pad|>"]) else [t])]
    image, clip = str(world / "red bar.png"), str(world / "red bar.mp4")
    for item, text in (("goggles, it's 7!", "goggles, it's 7!"), (dict(text="Which? ", image=image), pad.format("image") + "Which? "),
                       (dict(image=[image, image]), pad.format("image") * 2), (dict(text="a <video> b", video=clip), "a " + pad.format("video") + " b")):
        out = processor.render(parse_item(item))
        counts = iter([t * h * w // 4 for t, h, w in out["grids"]])
        assert out["ids"] == expand(tokenizer.encode(whole_prompt(text, processor.prompt), add_special_tokens=False), counts)
        assert out["suffix"] == tokenizer.encode("<eot></think>\n<gen_emb>", add_special_tokens=False)
        assert out["ids"][out["disc"]] == processor.id["<disc_emb>"] and out["ids"][-1] == processor.id["<bot>"]


def test_prompt_is_the_documented_string(model, world):
    check_prompt(model.processor, world)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_prompt_with_the_real_qwen2_vl_tokenizer(world):
    print("using", SHARED / "qwen2vl_tokenizer")
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2vl_tokenizer")
    tokenizer.add_tokens(list(data.PLUME_TOKENS), special_tokens=True)
    check_prompt(Processor(tokenizer, plume_model.RELEASED_PROMPT, data.Limits()), world)


def test_special_tokens_in_a_users_text_are_plain_characters(model, world):
    p = model.processor
    evil = "<|image_pad|><gen_emb><|im_end|> <disc_emb> <bot>"
    out = p.render(parse_item(dict(text=evil, image=str(world / "red bar.png"))))
    assert [out["ids"].count(p.id[t]) for t in ("<gen_emb>", "<disc_emb>", "<bot>", "<|im_end|>")] == [0, 1, 1, 2]
    assert out["ids"].count(p.id["<|image_pad|>"]) == 9 and p.tokenizer.decode(p.encode(evil)) == evil
    assert np.isfinite(model.encode([evil])).all()
    assert pickle.loads(pickle.dumps(p)).encode(evil) == p.encode(evil)  # in a spawned data worker too


def test_a_turn_that_holds_disc_emb_is_taken_as_it_stands(model):
    turn = lambda v: dict(conversations=[{"from": "human", "value": v}])
    side = data.parse_side(turn("what?\n<disc_emb>\nMy own words."), "", "here")
    plain = Processor(model.processor.tokenizer, "My own words.", data.Limits())
    assert model.processor.render(side)["ids"] == plain.render(parse_item("what?"))["ids"]
    with pytest.raises(DataError, match="more than one <disc_emb>"):
        data.parse_side(turn("<disc_emb><disc_emb>"), "", "here")


def test_a_record_and_an_item_with_the_same_picture_and_text_give_the_same_ids(model, world):
    """Published records have one line break behind a marker; it belongs to the marker."""
    image, other, clip = str(world / "red bar.png"), str(world / "blue bar.png"), str(world / "red bar.mp4")
    tail = "\n<disc_emb>\n" + model.processor.prompt
    ids = lambda side: model.processor.render(side)["ids"]

    def of_record(text, **media):
        return ids(data.parse_side(dict(conversations=[{"from": "human", "value": text}], **media), "", "here"))

    for item, media, texts in (
            ({"image": image, "text": "What?"}, dict(image=[image]), ("<image>\nWhat?", "<image>What?", "<image>\r\nWhat?")),
            ({"image": image, "text": "\nWhat?"}, dict(image=[image]), ("<image>\n\nWhat?",)),
            ({"image": image, "text": " What?"}, dict(image=[image]), ("<image>\n What?", "<image> What?")),
            ({"video": clip, "text": "What?"}, dict(video=clip), ("<video>\nWhat?",)),
            ({"image": [image, other], "text": "Same?"}, dict(image=[image, other]), ("<image>\n<image>\nSame?", "<image><image>\nSame?")),
            ({"image": image}, dict(image=[image]), ("<image>", "<image>\n")),
            ({"image": image, "text": "a\n<image>\nb"}, dict(image=[image]), ("a\n<image>\nb", "a\n<image>b")),
            ({"image": image, "video": clip, "text": "<video>\n<image>\nb"}, dict(image=[image], video=clip), ("<video>\n<image>\nb",))):
        for text in texts:
            assert of_record(text, **media) == of_record(text + tail, **media) == ids(parse_item(item)), (item, text)
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    assert model.processor.tokenizer.decode(of_record("<image>\nWhat?", image=[image])).count(pad.split("|")[-2] + "|>What?") == 1


def test_too_long_loses_rationale_only_and_otherwise_is_an_error(model, world):
    p = Processor(model.processor.tokenizer, "Think.", replace(model.processor.limits, max_len=90))
    side = Side([("text", "what is it?")], "word " * 200, "an answer", "here")
    full = Processor(p.tokenizer, "Think.", replace(p.limits, max_len=4000)).render(side, Stage(1, 2, True), Curriculum())
    out = p.render(side, Stage(1, 2, True), Curriculum())
    assert out["ids"] == full["ids"] and len(out["ids"]) + 2 + len(out["suffix"]) == 90
    assert out["cut"] == len(full["suffix"]) - len(out["suffix"]) > 0 and full["cut"] == 0
    assert p.tokenizer.decode(out["suffix"]).endswith("<eot></think>\n<answer>an answer</answer>\n<gen_emb>")
    with pytest.raises(DataError, match="here: .* exceed max_len 90; raise max_len"):
        p.render(Side([("text", "word " * 90)], where="here"))
    with pytest.raises(DataError, match="lower max_pixels"):
        p.render(parse_item(dict(image=[picture("red", "bar")] * 9)))


# --------------------------------------------------------------------------------------------------- media and pixels


@pytest.mark.parametrize("size", [(112, 112), (97, 65), (28, 28), (1, 1), (13, 2000), (640, 480), (300, 31), (56, 84)])
def test_pixels_equal_transformers_pil_processor(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for low, high in ((56 * 56, 28 * 28 * 1280), (28 * 28, 28 * 28 * 16), (28 * 28 * 20, 28 * 28 * 40)):
        theirs = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)(image, return_tensors="pt")
        ours, grid = patchify([image], low, high)
        assert tuple(theirs["image_grid_thw"][0].tolist()) == grid
        assert_close(ours, theirs["pixel_values"], "pixels", 1e-6)


def test_video_patches_are_pairs_of_frames_in_the_layout_of_pictures():
    frames = [picture(c, s, (64, 64)) for c, s in zip(COLOURS, SHAPES)]  # 3: the last one is repeated
    ours, grid = patchify(frames, 28 * 28, 28 * 28 * 9)
    assert grid == (2, 4, 4)
    single = [patchify([f], 28 * 28, 28 * 28 * 9)[0].reshape(16, 3, 2, 14, 14) for f in frames]
    ours = ours.reshape(2, 16, 3, 2, 14, 14)
    for t, (a, b) in enumerate(((0, 1), (2, 2))):
        assert_close(ours[t, :, :, 0], single[a][:, :, 0], "first of the pair")
        assert_close(ours[t, :, :, 1], single[b][:, :, 1], "second of the pair")
    mixed, grid = patchify([frames[0], picture("red", "bar", (200, 90))], 28 * 28, 28 * 28 * 9)
    assert grid == (1, 4, 4)  # another size takes the first frame's


def test_frames_are_chosen_by_time_from_first_to_last(tmp_path):
    shades = [Image.new("RGB", (64, 64), (i * 4,) * 3) for i in range(60)]
    write_clip(tmp_path / "a.mp4", shades)
    write_clip(tmp_path / "b.mkv", shades[:12], stamps=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 80])  # then a long still
    at = lambda frames: [round(np.asarray(f).mean() / 4) for f in frames]
    assert at(load_frames(str(tmp_path / "a.mp4"), 8)) == pytest.approx(np.linspace(0, 59, 8), abs=1.6)
    assert at(load_frames(str(tmp_path / "a.mp4"), 100)) == pytest.approx(range(60), abs=1.2)
    assert at(load_frames(str(tmp_path / "b.mkv"), 5)) == pytest.approx([0, 10, 10, 11, 11], abs=1.2)  # by time: 0, 20, 40, 60, 80
    assert at(load_frames(shades, 4)) == [0, 20, 39, 59] and len(load_frames(shades[:1], 4)) == 1
    (tmp_path / "frames").mkdir()
    for i in (10, 9, 2, 1):
        shades[i].save(tmp_path / "frames" / f"f{i}.png")
    assert at(load_frames(str(tmp_path / "frames"), 8)) == [1, 2, 9, 10]  # natural order


def test_unusual_pictures_become_plain_rgb(tmp_path):
    rgb = picture("red", "circle", (120, 80))
    reference = np.asarray(rgb).astype(int)

    def same(name, tolerance, **kw):
        got = np.asarray(load_image(str(tmp_path / name))).astype(int)
        assert got.shape == reference.shape and np.abs(got - reference).mean() < tolerance, name

    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95), same("cmyk.jpg", 6)
    exif = Image.Exif()
    exif[274] = 6
    rgb.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95), same("turned.jpg", 6)
    rgb.save(tmp_path / "png_as.jpg", "PNG"), same("png_as.jpg", 0.1)
    rgb.save(tmp_path / "photo.webp", lossless=True), same("photo.webp", 0.1)
    rgb.convert("P").save(tmp_path / "palette.png"), same("palette.png", 12)
    alpha = Image.fromarray(np.where(reference.min(2, keepdims=True) < 200, reference, 7).astype(np.uint8)).convert("RGBA")  # white turned dark ..
    alpha.putalpha(Image.fromarray((reference.min(2) < 200).astype(np.uint8) * 255))  # .. and transparent
    alpha.save(tmp_path / "alpha.png"), same("alpha.png", 1)
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[picture("blue", "bar", (120, 80), at) for at in (0, 5, 9)], duration=100), same("moving.gif", 12)
    assert len(load_frames(str(tmp_path / "moving.gif"), 8)) == 4
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(load_image(str(tmp_path / "clear.png"))) == 255).all()
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256).repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    assert_close(np.asarray(load_image(str(tmp_path / "grey16.png")))[0, :, 0].astype(int), np.arange(256), "16-bit ramp", 1)
    for mode in ("1", "L", "LA"):
        rgb.convert(mode).save(tmp_path / "mode.png")
        assert_close(np.asarray(load_image(str(tmp_path / "mode.png"))), np.asarray(rgb.convert(mode.strip("A")).convert("RGB")), mode)


def test_arrays_bytes_and_open_files_are_pictures_like_files(model, world, tmp_path):
    path = world / "red bar.png"
    array, expected = np.asarray(Image.open(path).convert("RGB")), model.encode([{"image": str(path)}])
    clear = np.dstack([np.zeros_like(array), np.zeros(array.shape[:2], np.uint8)])
    with open(path, "rb") as file:
        twice = bytes(byte for byte in path.read_bytes() for _ in range(2))
        given = [array, array[:, ::-1][:, ::-1], np.asfortranarray(array), path.read_bytes(), bytearray(path.read_bytes()), memoryview(twice)[::2],
                 io.BytesIO(path.read_bytes()), file, file, Image.open(path), path]
        for many in ([{"image": source} for source in given], [source for source in given if isinstance(source, (np.ndarray, Image.Image, Path))]):
            assert_close(model.encode(many, batch_size=4), np.repeat(expected, len(many), 0), "pictures", 1e-6)
        frames = [np.asarray(f) for f in load_frames(str(world / "red bar.mp4"), 16)]
        assert_close(model.encode([{"video": frames}]), model.encode([{"video": str(world / "red bar.mp4")}]), "frames as arrays", 1e-6)
    assert (np.asarray(load_image(clear)) == 255).all() and np.array_equal(np.asarray(load_image(path.read_bytes())), array)
    closed = open(path, "rb")
    closed.close()
    text = open(HERE / "model.py")
    for source, why in ((np.zeros((9, 9), np.uint8), "shape"), (np.zeros((9, 9, 2), np.uint8), "shape"), (np.zeros((2, 9, 9, 3), np.uint8), "shape"),
                        (np.zeros((9, 9, 3), np.float32), "float32"), (np.zeros((0, 9, 3), np.uint8), "shape"), (np.zeros((9, 9, 5), np.uint8), "shape"),
                        (b"", "0 bytes"), (b"<html>" * 99, "no picture.*<html>"), (io.BytesIO(b"x"), "1 bytes"), (text, "mode 'rb'"), (closed, "closed"),
                        (torch.zeros(9, 9, 3), "got Tensor"), (7, "got int"), ([], "got list"), ("", "empty path"), (Path(""), "does not exist")):
        with pytest.raises(DataError, match=f"item 0: image.*{why}") as error:
            model.encode([{"image": source}] if not isinstance(source, list) else [{"image": [source]}])
        assert len(str(error.value)) < 400
    text.close()


COLOUR_KEYS = {  # colour type and bits of a PNG -> the transparent colour and the dark one as stored, the key, bytes of 4 pixels
    "one colour of 8 bits": (2, 8, b"\x5a" * 12, b"\x28" * 12, b"\0\x5a" * 3), "one colour of 16 bits": (2, 16, b"\x5a\x11" * 12, b"\x28\x28" * 12, b"\x5a\x11" * 3),
    "one grey of 16 bits": (0, 16, b"\x5a\x5a" * 4, b"\x28\x28" * 4, b"\x5a\x5a"), "one grey of 8 bits": (0, 8, b"\x5a" * 4, b"\x28" * 4, b"\0\x5a"),
    "one grey of 4 bits": (0, 4, b"\xaa\xaa", b"\x22\x22", b"\0\x0a"), "one grey of 2 bits": (0, 2, b"\x55", b"\x00", b"\0\x01"),
}


@pytest.mark.parametrize("how", ["RGBA", "RGBa", "LA", "La", "PA", "palette in memory", "palette in a PNG", *COLOUR_KEYS, "GIF", "WEBP", "TIFF"])
def test_what_is_transparent_is_white_in_every_encoding(how, tmp_path):
    image = Image.new("RGBA", (8, 8), (40, 40, 40, 255))
    image.paste((90, 90, 90, 0), (0, 0, 4, 8))  # the left half is clear, over a grey that must not show
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    if how in ("RGBa", "LA"):
        shown = image.convert(how)
    elif how == "La":
        shown = image.convert("LA").convert("La")
    elif how == "PA":
        shown = Image.new("PA", (8, 8))
        shown.putpalette([90] * 3 + [40] * 3)
        for x, y in np.ndindex(8, 8):
            shown.putpixel((x, y), (0, 0) if x < 4 else (1, 255))
    elif how.startswith("palette"):
        shown = image.quantize(4)
        if how.endswith("PNG"):
            shown.save(tmp_path / "p.png")
            shown = str(tmp_path / "p.png")
    elif how in COLOUR_KEYS:
        kind, bits, clear, dark, key = COLOUR_KEYS[how]
        rows = (b"\0" + clear + dark) * 8
        header = (8).to_bytes(4, "big") * 2 + bytes([bits, kind, 0, 0, 0])
        shown = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    elif how in ("GIF", "WEBP", "TIFF"):
        image.save(tmp_path / "x", how, **(dict(lossless=True) if how == "WEBP" else {}))
        shown = str(tmp_path / "x")
    else:
        shown = image
    got = np.asarray(load_image(shown)).astype(int)
    assert (got[:, :4] == 255).all() and np.abs(got[:, 4:] - {"one grey of 4 bits": 34, "one grey of 2 bits": 0}.get(how, 40)).max() <= 2


def test_sizes_and_limits_of_nothing_are_clear_errors(model):
    for limits, why in ((dict(max_pixels=0), "max_pixels 0: needs a whole number of at least 784"), (dict(num_frames=0), "num_frames 0"),
                        (dict(video_max_pixels=100), "video_max_pixels 100"), (dict(max_len=0), "max_len 0"), (dict(min_pixels=-1), "min_pixels -1"),
                        (dict(max_pixels=1e6), "max_pixels 1000000.0"), (dict(max_pixels="big"), "max_pixels 'big'"), (dict(num_frames=True), "num_frames True"),
                        (dict(min_pixels=9999, max_pixels=2000), "min_pixels 9999 is above max_pixels 2000")):
        with pytest.raises(DataError, match=why):
            data.Limits(**limits)
        if all(type(v) is int for v in limits.values()):
            with pytest.raises(DataError, match=why):
                make_model(limits=limits)
    for size in ((0, 10), (10, 0), (0, 0)):
        with pytest.raises(DataError, match=f"item 0: .*{size[0]}x{size[1]} pixels"):
            model.encode([{"image": Image.new("RGB", size)}])
        with pytest.raises(DataError, match="at least 1x1"):
            data.target_size(*size, 784, 7840)
    for most in (0, -5, 783):
        with pytest.raises(DataError, match=f"max_pixels {most}: needs at least 784"):
            data.target_size(30, 30, 784, most)
    with pytest.raises(DataError, match="num_frames 0"):
        load_frames([picture("red", "bar")], 0)


def encode_clip(path, shades, size=(64, 64), aspect=None, codec="libx264", **options):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options=options)
        (stream.width, stream.height), stream.pix_fmt, stream.codec_context.gop_size = size, "yuv420p", 12
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, shade in enumerate(shades):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (shade,) * 3))
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_have_the_shape_in_which_a_player_shows_them(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    for aspect, shape in ((None, (64, 48)), (Fraction(2), (128, 48)), (Fraction(1, 2), (64, 96)), (Fraction(64, 45), (91, 48)), (Fraction(1), (64, 48))):
        encode_clip(path, range(0, 200, 20), (64, 48), aspect)
        frames = load_frames(str(path), 3)
        assert [f.size for f in frames] == [shape] * 3
        assert [round(np.asarray(f).mean()) for f in frames] == pytest.approx([0, 90, 180], abs=12)
    assert data.display_size(720, 576, Fraction(16, 15)) == (768, 576) and data.display_size(720, 480, Fraction(8, 9)) == (720, 540)
    for aspect in (Fraction(1, 100_000), Fraction(100_000)):
        with pytest.raises(DataError, match="too large when shown"):
            data.display_size(64, 48, aspect)


@pytest.mark.parametrize("codec, options, suffix", [("libx264", {}, "mkv"), ("libx264", {}, "mp4"), ("libx264", {}, "ts"), ("mpeg2video", dict(bf="2"), "mpg"),
                                                    ("mpeg2video", dict(bf="2"), "mkv"), ("mpeg4", dict(bf="2"), "avi")])
def test_frames_in_front_of_the_first_key_frame_do_not_count(tmp_path, codec, options, suffix):
    """A recording that begins in the middle: what hangs on frames that are not there is not in the clip, and no error."""
    encode_clip(tmp_path / "whole.mkv", range(0, 240, 6), codec=codec, **options)
    with av.open(str(tmp_path / "whole.mkv")) as source, av.open(str(tmp_path / f"cut.{suffix}"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(source.streams.video[0]) if p.size][5:]
        key = next(p for p in packets if p.is_keyframe)
        first = round(float(key.pts * key.time_base) * 10)
        for packet in packets:
            packet.stream = stream
            out.mux(packet)
    at = lambda count: [round(np.asarray(f).mean() / 6) for f in load_frames(str(tmp_path / f"cut.{suffix}"), count)]
    assert 0 < first < 20 and at(100) == pytest.approx(range(first, 40), abs=1.1)
    assert at(5) == pytest.approx(np.linspace(first, 39, 5), abs=1.2)


def test_a_folder_of_frames_takes_every_suffix_that_a_picture_may_have(tmp_path):
    formats = {"a.jpeg": "JPEG", "b.JFIF": "JPEG", "c.jpe": "JPEG", "d.avif": "AVIF", "e.ppm": "PPM", "f.pgm": "PPM", "g.PNG": "PNG", "h.tif": "TIFF", "i.webp": "WEBP"}
    formats = {name: kind for name, kind in formats.items() if kind in data.IMAGE_FORMATS}
    for i, (name, kind) in enumerate(formats.items()):
        Image.new("L" if name == "f.pgm" else "RGB", (32, 32), 20 * i if name == "f.pgm" else (20 * i,) * 3).save(tmp_path / name, kind)
    for name in ("notes.txt", "._a.jpeg", "program.eps"):
        (tmp_path / name).write_text("no frame")
    assert [round(np.asarray(f).mean() / 20) for f in load_frames(str(tmp_path), 99)] == list(range(len(formats)))


def test_broken_media_are_errors_that_name_the_file(world, tmp_path):
    rgb = picture("red", "circle", (320, 200))
    rgb.save(tmp_path / "whole.jpg")
    bytes_ = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(bytes_[: len(bytes_) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = chunk(b"IHDR", (12000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{world / 'red bar.mp4'}'\n")
    Image.new("1", (9500, 9500)).save(tmp_path / "huge.png")  # valid, and few bytes
    for name, why in (("cut.jpg", "truncated"), ("empty.png", "cannot"), ("page.jpg", "cannot"), ("float.tiff", "32-bit"), ("bomb.png", "12000x12000 pixels, the limit"), ("huge.png", "9500x9500 pixels, the limit"),
                      ("program.eps", "cannot"), ("nothing.jpg", "No such")):
        with pytest.raises(DataError, match=f"{name}.*({why})"):
            load_image(str(tmp_path / name))
    for lazy in ("cut.jpg", "huge.png"):
        with Image.open(tmp_path / lazy) as image, pytest.raises(DataError):
            load_image(image)
    clip = (world / "red bar.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "zeros.mp4").write_bytes(clip.replace(clip[100 : len(clip) // 2], b"\0" * (len(clip) // 2 - 100)))
    (tmp_path / "dir").mkdir()
    for name in ("cut.mp4", "empty.mp4", "zeros.mp4", "dir", "nothing.mp4", "list.ffconcat"):
        with pytest.raises(DataError, match=name):
            load_frames(str(tmp_path / name), 8)
    with pytest.raises(DataError, match="200 to 1"):
        patchify([Image.new("RGB", (4000, 10))], 3136, 50176)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_all_nasty_files_do_what_a_good_loader_does(model):
    folder = SHARED / "nasty"
    print("using", folder)
    errors = {"truncated.jpg", "header_only.jpg", "zero_byte.png", "text_as.jpg", "bomb_60000x60000.png", "bomb_12000x12000.png", "float32.tiff", "extreme_10x4000.png",
              "extreme_4000x10.jpg", "truncated.mp4", "bitrot.mp4", "undecodable.mp4", "zero_byte.mp4", "zero_frames.mkv", "audio_only.mp4", "frames_empty_dir", "does_not_exist.jpg"}
    frames = {"plain.mp4": 16, "one_frame.mp4": 1, "three_frames.mp4": 3, "vfr.mkv": 16, "vp9.webm": 16, "av1.webm": 16, "h264.mkv": 16, "mpeg4.avi": 16, "odd_size_97x65.mkv": 8,
              "tenbit.mkv": 16, "gray.mkv": 8, "long_600_frames.mp4": 600, "vertical_rotated.mp4": 16, "frames_mixed": 4, "truncated.mkv": 9}
    reference = np.asarray(load_image(str(folder / "rgb_reference.png"))).astype(int)
    cases = json.loads((folder / "nasty.json").read_text())
    assert len(cases) == 48
    for case in cases:
        path, kind = str(folder / case["file"]), case["kind"]
        load = lambda: model.processor.media("image" if kind == "image" else "video", path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if case["file"] in errors:
                with pytest.raises(DataError) as error:
                    load()
                assert case["file"] in str(error.value), case["file"]
                continue
            pixels, (t, h, w) = load()
        assert np.isfinite(pixels).all() and len(pixels) == t * h * w > 0, case["file"]
        assert not said or case["file"] == "truncated.mkv", (case["file"], [str(s.message) for s in said])
        if case["file"] in frames:
            assert len(load_frames(path, 1000)) == frames[case["file"]] and len(load_frames(path, 8)) == min(8, frames[case["file"]]), case["file"]
    for name, tolerance in (("cmyk.jpg", 12), ("exif_rot6.jpg", 12), ("exif_bad.jpg", 12), ("photo.webp", 12), ("progressive.jpg", 12)):
        got = np.asarray(load_image(str(folder / name))).astype(int)
        assert got.shape == reference.shape and np.abs(got - reference).mean() < tolerance, name
    assert load_frames(str(folder / "vertical_rotated.mp4"), 8)[0].size == (64, 96)
    assert len(load_frames(str(folder / "animated.gif"), 8)) == 6
    assert (np.asarray(load_image(str(folder / "all_transparent.png"))) == 255).all()
    ramp = np.asarray(load_image(str(folder / "gray16.png")))
    assert ramp.min() < 10 and ramp.max() > 245 and len(np.unique(ramp)) > 50


# ------------------------------------------------------------------------------------------------------------- records


def turns(text, reply="<think>Because. So.</think><answer>yes</answer>", who=("from", "value", "human", "gpt")):
    return [{who[0]: who[2], who[1]: text}, {who[0]: who[3], who[1]: reply}]


def record(**kw):
    return dict(dataset_name="d", qry=dict(conversations=turns("<image>\nwhat?"), image=["red bar.png"]), pos=dict(conversations=turns("yes"))) | kw


def test_all_spellings_of_a_record_mean_the_same(world, tmp_path):
    chat = ("role", "content", "user", "assistant")
    variants = [record(), record(qry=dict(conversations=turns("<image>\nwhat?", who=chat), images="red bar.png")),
                record(qry=[dict(conversations=turns("<image>\nwhat?", "<think>Because. So.</think><answer>yes</answer><gen_emb>"), image="red bar.png")]),
                record(pos=dict(conversations=turns("yes", "<think>\nBecause. So.\n</think>\n<answer>yes</answer>\n<gen_emb>"), image=[]))]
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\n\n".join(json.dumps(v) for v in variants) + "\n", encoding="utf-8")
    array.write_text(json.dumps([dict(v, dataset_name='a "quoted } brace { \\" é') for v in variants], indent=2, ensure_ascii=False), encoding="utf-8")
    for path in (lines, array):
        pairs = Pairs(str(path), str(world))
        assert len(pairs) == 4 and len(set(pairs.target)) == 1
        for i in range(4):
            q, p = pairs[i]
            assert (q.parts, q.rationale, q.answer) == (pairs[0][0].parts, "Because. So.", "yes") and p.parts == [("text", "yes")]
    video = lambda **kw: data.parse_side(dict(conversations=turns("<video>\nwhat?"), **kw), str(world), "here").parts[0]
    assert video(video="red bar.mp4") == video(videos=["red bar.mp4"]) == ("video", str(world / "red bar.mp4"))
    assert video(video=["red bar.png", "blue bar.png"]) == video(videos=[["red bar.png", "blue bar.png"]]) == ("video", [str(world / f"{c} bar.png") for c in ("red", "blue")])
    assert data.parse_target("just text", "here") == ("", "just text") and data.parse_target("", "here") == ("", "")


def test_byte_order_mark_line_ends_and_equal_targets(world, tmp_path):
    rows = [record(pos=dict(conversations=turns(text), **media)) for text, media in (("same", {}), ("same", {}), ("<image>", dict(image=["red bar.png"])), ("<image>", dict(image=["blue bar.png"])))]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in rows) + b"\r\n\r\n")
    target = Pairs(str(tmp_path / "a.jsonl"), str(world)).target
    assert len(target) == 4 and target[0] == target[1] and len(set(target)) == 3  # the media count, not the text alone


@pytest.mark.parametrize("text", ["[R, 7, R]", "[R R]", "[R,]", "[R", "[R] R", "[R][R]", "[[R]]", "[R, \"x\"]", "[}R]", "[1]\nR"])
def test_a_json_array_of_anything_else_is_an_error(world, tmp_path, text):
    (tmp_path / "a.json").write_text(" " * 5000 + text.replace("R", json.dumps(record())))
    with pytest.raises(DataError, match="a.json.*one JSON array of objects"):
        Pairs(str(tmp_path / "a.json"), str(world), skip_bad=True)


def test_a_json_array_larger_than_the_read_buffer_is_indexed_by_offset(world, tmp_path):
    rows = [record(dataset_name=f"d{i % 3}", pos=dict(conversations=turns(f'answer {i} \\" }} é ' + "x" * (i * 37 % 9000)))) for i in range(600)]
    (tmp_path / "big.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert os.path.getsize(tmp_path / "big.json") > 2 << 20
    pairs = Pairs(str(tmp_path / "big.json"), str(world))
    assert len(pairs) == 600 and pairs.names == ["d0", "d1", "d2"] and len(set(pairs.target)) == 600
    for i in (0, 123, 599):
        assert pairs[i][1].parts[0][1] == rows[i]["pos"]["conversations"][0]["value"]


BAD = [("{broken", "not JSON"), (json.dumps(dict(qry=1, pos=2)), "no 'dataset_name'"), (json.dumps(record(qry=dict(conversations=turns("<image> <image>"), image=["red bar.png"]))), "2 <image> in the text, 1 image given"),
       (json.dumps(record(qry=dict(conversations=turns("none"), image=["red bar.png"]))), "0 <image> in the text, 1 image given"), (json.dumps(record(qry=dict(conversations=turns("<image>"), image=["gone.png"]))), "'gone.png' does not exist under"),
       (json.dumps(record(qry=dict(conversations=turns("x"), imgae=["red bar.png"]))), "unknown key 'imgae'. Did you mean 'image'"), (json.dumps(record(pos=dict(conversations=[{"from": "robot", "value": "x"}]))), "'human' or 'gpt'"),
       (json.dumps(record(pos=dict(conversations=turns("x", "<think>open")))), "<think> is opened or closed only once"), (json.dumps(record(pos=dict(conversations=[]))), "must be a list of turns"), ("[1]", "needs an object"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image=[["red bar.png"]]))), "image needs a path"), (json.dumps(record(qry=dict(conversations=turns("<image>"), image=5))), "image needs a path"),
       (json.dumps(record(pos=dict(conversations=turns("x") + turns("y")))), "more than one 'human' turn"), (json.dumps(record(pos=dict(conversations=turns("x", "<answer>a</answer> and more")))), "text outside"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image=["red bar.png"], images=["red bar.png"]))), "both 'image' and 'images'"), (json.dumps(record(pos=dict(conversations=turns("\ud800")))), "not valid Unicode"),
       ("[" * 100000, "not JSON"), (json.dumps(record(dataset_name=3)), "must be a string"), (json.dumps(record(pos=None)), "needs an object with 'conversations'"),
       (json.dumps(record(neg=[])), "unknown key 'neg'. Known: dataset_name, qry, pos"), (json.dumps(record(wieght=2)), "unknown key 'wieght'"),
       (json.dumps(record()).replace('"qry"', '"query"'), "unknown key 'query'. Did you mean 'qry'?"),
       (json.dumps(record())[:-1] + ', "qry": {}}', "the key 'qry' stands twice"), (json.dumps(record()).replace('"from"', '"value": "x", "from"', 1), "the key 'value' stands twice"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image=[None]))), "image needs a path"), (json.dumps(record(qry=dict(conversations=turns("x"), image=[None]))), "0 <image> in the text, 1 image given"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image=[""]))), "image is an empty path"), (json.dumps(record(qry=dict(conversations=turns("<image>"), image=""))), "image is an empty path"),
       (json.dumps(record(qry=dict(conversations=turns("<video>"), video=""))), "video is an empty path"), (json.dumps(record(qry=dict(conversations=turns("x"), video=""))), "0 <video> in the text, 1 video given"),
       (json.dumps(record(qry=dict(conversations=turns("<video>"), video=[""]))), "frame is an empty path"), (json.dumps(record(qry=dict(conversations=turns("<video>"), videos=[None]))), "video needs a path"),
       (json.dumps(record(qry=dict(conversations=turns("<video>"), video=[None]))), "frame needs a path"),
       (json.dumps(record(qry=dict(conversations=turns("<image>"), image={"path": "red bar.png"}))), "image needs a path"), (json.dumps(record(qry=dict(conversations=turns("<image>"), image=0))), "image needs a path"),
       (json.dumps(record(pos=dict(conversations=[{"from": "human", "value": "x", "valeu": "y"}]))), "a turn: unknown key 'valeu'. Did you mean 'value'?"),
       (json.dumps(record(pos=dict(conversations=[{"from": "human", "role": "user", "value": "x"}]))), "a turn needs 'from'"),
       (json.dumps(record(pos=dict(conversations=[{"from": "human", "value": "x" * 9999, "content": "y"}]))), "a turn needs 'from'")]


@pytest.mark.parametrize("line, why", BAD, ids=[w for _, w in BAD])
def test_a_bad_record_is_an_error_with_file_number_and_reason_or_counted(world, tmp_path, line, why):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record()) + "\n" + line + "\n" + json.dumps(record()) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl: record 2.*" + re.escape(why)):
        Pairs(str(path), str(world))
    pairs = Pairs(str(path), str(world), skip_bad=True)
    assert len(pairs) == 2 and len(pairs.bad) == 1 and why in pairs.bad[0] and pairs[1][1].answer == "yes"
    assert len(pairs.bad[0]) < 500 + len(str(path)) + len(str(world))


def test_what_users_give_is_quoted_with_200_characters_at_most(model, tmp_path):
    long, many = "x" * 100_000, {f"key {i}": i for i in range(10_000)}
    assert len(data.quote(long)) <= 200 and len(data.quote(many)) <= 200 and data.quote("a\n") == "'a\\n'" and len(data.quote(b"y" * 100_000)) <= 200
    for item in ({long: 1}, [long], many, {"text": 3, long: 1}, {"image": long}, {"video": [long]}, 10**300, {"image": {long}}):
        with pytest.raises(DataError, match="item 0") as error:
            model.encode([item])
        assert len(str(error.value)) < 400
    for kind in ("qry", "pos", "dataset_name", "conversations"):
        line = json.dumps(record()).replace(f'"{kind}"', json.dumps(long), 1)
        (tmp_path / "t.jsonl").write_text(line)
        with pytest.raises(DataError, match="record 1") as error:
            Pairs(str(tmp_path / "t.jsonl"))
        assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_items_are_checked():
    for item, why in (({"text": "<image><image>", "image": str(HERE / "model.py")}, "2 <image> in the text, 1 image given"), ({"video": picture("red", "bar")}, "list of frames"), ({"text": None}, "needs a string"),
                      ({"txt": "a"}, "Did you mean 'text'"), ({}, "needs a string"), (3, "needs a string"), ({"image": "gone.png"}, "'gone.png' does not exist"),
                      ({"image": []}, "empty list"), ({"text": 3}, "must be a string"), ({"image": 7}, "needs a path"),
                      ({"video": ""}, "video is an empty path"), ({"image": ""}, "image is an empty path"), ({"image": [None]}, "needs a path"), ({"video": []}, "needs a path"),
                      ({"video": b"bytes"}, "list of frames"), ({"video": np.zeros((2, 9, 9, 3), np.uint8)}, "list of frames"), (b"bytes", "needs a string")):
        with pytest.raises(DataError, match=f"item.*{why}"):
            parse_item(item)


# ------------------------------------------------------------------------------------------------------------- batches


def test_schedule_gives_every_data_set_its_share_all_over_the_run():
    dataset = np.repeat([0, 1, 2], [500, 90, 10])
    s = Schedule(dataset, list("abc"), 8, 600, seed=1)
    batches = [s[i] for i in range(600)]
    assert all(len(set(dataset[b])) == 1 for b in batches) and s.counts.tolist() == [500, 90, 10]
    for d, share in enumerate(s.counts / 600):
        for part in np.array_split(np.array([dataset[b[0]] == d for b in batches]), 6):
            assert abs(part.mean() - share) < 0.03
    rows = np.concatenate([b for b in batches if dataset[b[0]] == 1])
    assert all(sorted(rows[i : i + 90]) == list(range(500, 590)) for i in range(0, len(rows) - 89, 90))  # whole passes
    again = Schedule(dataset, list("abc"), 8, 600, seed=1)
    assert all(np.array_equal(again[i], batches[i]) for i in (599, 3)) and not np.array_equal(Schedule(dataset, list("abc"), 8, 600, seed=2)[0], batches[0])


def test_a_data_set_smaller_than_the_batch_is_repeated_in_a_new_order():
    s = Schedule(np.repeat([0, 1], [3, 40]), ["small", "large"], 8, 43, seed=0)
    rows = np.concatenate([s[i] for i in range(43) if s.which[i] == 0])
    laps = rows.reshape(-1, 3)
    assert len(laps) == 8 and all(sorted(lap) == [0, 1, 2] for lap in laps) and len({tuple(lap) for lap in laps}) > 1


def test_ranks_split_the_global_batch_and_resuming_skips_nothing():
    s = Schedule(np.zeros(50, int), ["a"], 12, 20, seed=0)
    progress = Progress(Curriculum(replay=0.4), 20)
    one, two = list(StepSampler(s, progress)), [list(StepSampler(s, progress, rank=r, world=2)) for r in (0, 1)]
    for (step, stage, rows), (_, stage_a, a), (_, stage_b, b) in zip(one, *two):
        assert np.array_equal(rows, np.concatenate([a, b])) and stage == stage_a == stage_b
    assert [(i, st, r.tolist()) for i, st, r in StepSampler(s, progress, start=7)] == [(i, st, r.tolist()) for i, st, r in one[7:]]


def test_workers_write_the_text_of_the_step_they_prefetch_for(model, world):
    pairs = Pairs(str(world / "train.jsonl"))
    batches, progress = Batches(pairs, model.processor, Curriculum()), Progress(Curriculum(replay=0.3), 12)
    sampler = StepSampler(Schedule(pairs.dataset, pairs.names, 4, 12, 0), progress)
    load = lambda workers: map(whole, torch.utils.data.DataLoader(batches, batch_size=None, sampler=sampler, num_workers=workers, prefetch_factor=6 if workers else None))
    for a, b in zip(load(0), load(2)):
        assert a["step"] == b["step"] and a["stage"] == b["stage"] == progress.stage(a["step"])
        assert all(torch.equal(v, b[k]) for k, v in a.items() if torch.is_tensor(v))
        assert a["dataset"] == pairs.names[pairs.dataset[sampler.schedule[a["step"]][0]]] and len(a["target"]) == 4 and len(a["ids"]) == 8


def test_a_medium_that_breaks_while_training_is_named_and_in_no_loss(model, world, tmp_path):
    (tmp_path / "torn.png").write_bytes((world / "red bar.png").read_bytes()[:-60])
    rows = [record(pos=dict(conversations=turns(f"answer {i}"))) for i in range(4)]
    rows[2]["qry"]["image"] = [str(tmp_path / "torn.png")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, job, m = Pairs(str(tmp_path / "t.jsonl"), str(world)), (0, FINAL, np.arange(4)), make_model()
    with pytest.raises(DataError, match="record 3: qry: .*torn.png"):
        Batches(pairs, m.processor, Curriculum())[job]
    cfg, curriculum = train.Config(), Curriculum()
    batch = whole(Batches(pairs, m.processor, curriculum, skip_bad=True)[job])
    assert len(batch["bad"]) == 1 and "record 3" in batch["bad"][0] and batch["valid"].tolist() == [True, True, False, True]
    parts = train.losses(m(batch, 8), batch, cfg)
    good = whole(Batches(pairs, m.processor, curriculum)[0, FINAL, np.array([0, 1, 3])])
    for name, value in train.losses(m(good, 8), good, cfg).items():
        assert_close(parts[name], value, name, 1e-6)


# -------------------------------------------------------------------------------------------------------------- losses


def by_hand(q, p, targets, scale):
    """InfoNCE from its definition, one row and one direction at a time."""
    total = 0.0
    for a, b in ((q, p), (p, q)):
        for i in range(len(a)):
            scores = {j: math.exp(scale * float(a[i] @ b[j])) for j in range(len(b)) if j == i or targets[j] != targets[i]}
            total -= math.log(scores[i] / sum(scores.values())) / (2 * len(a))
    return total


@pytest.mark.parametrize("targets", [[1, 2, 3, 4], [1, 2, 1, 1], [5, 5, 5, 5]])
def test_info_nce_by_hand_with_equal_targets(targets):
    q, p = F.normalize(torch.randn(2, 4, 6, dtype=torch.float64), dim=-1)
    ours = train.info_nce(q, p, torch.tensor([targets]), torch.ones(1, 4, dtype=torch.bool), 7.0)
    assert_close(ours, torch.tensor(by_hand(q, p, targets, 7.0), dtype=torch.float64), "InfoNCE", 1e-9)


def test_the_loss_is_the_weighted_sum_of_its_parts(model, world):
    pairs = Pairs(str(world / "train.jsonl"))
    batch = whole(Batches(pairs, model.processor, Curriculum(last_stage=1.0))[0, FINAL, np.flatnonzero(pairs.dataset == 0)[:4]])
    out = model(batch, 8)
    parts = train.losses(out, batch, train.Config(w_ce=0.5, w_gen=2.0, w_disc=3.0, w_balance=0.7, w_read=0.3, scale=9.0))
    q, p = out["gen"].detach().chunk(2)
    assert_close(parts["gen"], torch.tensor(by_hand(q, p, batch["target"].tolist(), 9.0), dtype=torch.float64), "gen", 1e-9)
    assert_close(parts["disc"], torch.tensor(by_hand(*out["disc"].detach().chunk(2), batch["target"].tolist(), 9.0), dtype=torch.float64), "disc", 1e-9)
    assert_close(parts["bal"], balance_loss(out["router"].mean(0)), "balance", 1e-12)
    assert_close(parts["loss"], 0.5 * parts["ce"] + 2 * parts["gen"] + 3 * parts["disc"] + 0.3 * parts["read"] + 0.7 * parts["bal"], "sum", 1e-12)
    labels = [t for s in batch["suffix"].tolist() for t in s[: s.index(model.processor.id["<gen_emb>"]) + 1]]
    assert batch["labels"].tolist() == labels and len(out["first"]) == 8  # all of the suffix, both sides


def test_every_latent_state_reads_the_token_it_replaced(model, world):
    pairs, rows = Pairs(str(world / "train.jsonl")), np.array([0, 2, 4])
    batch = whole(Batches(pairs, model.processor, Curriculum())[0, Stage(3, 6, True), rows])
    out, (_, states, _, _) = model(batch, 6), rollout_of(model, batch, 6)
    sides, by_row = [pairs[i][0] for i in rows] + [pairs[i][1] for i in rows], []
    for b, side in enumerate(sides):
        for part in range(3):  # the state in front of latent steps 0, 2, 4 predicts the first token of parts 0, 1, 2
            token = model.processor.encode(segment(side.rationale, 4)[part])[0]
            by_row.append(-model.backbone.lm_head(states[b, 2 * part]).log_softmax(-1)[token])
    assert_close(out["read"], torch.stack(by_row), "read", 1e-9)
    assert_close(train.losses(out, batch, train.Config())["read"], torch.stack(by_row).mean(), "mean", 1e-9)
    first = [s.index(model.processor.encode(segment(side.rationale, 4)[3])[0]) for s, side in zip(batch["suffix"].tolist(), sides)]
    assert [int(p) % batch["suffix"].shape[1] for p in batch["label_at"][batch["first"]]] == first == [0] * 6  # what is left begins behind the latents
    last = whole(Batches(pairs, model.processor, Curriculum())[0, FINAL, rows])
    assert model.processor.tokenizer.convert_ids_to_tokens(last["labels"][last["first"]]) == [model.processor.tokenizer.tokenize(side.answer)[0] for side in sides]
    assert len(model(whole(Batches(pairs, model.processor, Curriculum())[0, Stage(0, 0, True), rows]), 0)["read"]) == 0


def rollout_of(model, batch, steps):
    r = rollout(model.lm, model.adapter, model.prefix(batch), steps, model.lm.embed_tokens(batch["suffix"]))
    return r.anchor, torch.cat([r.start[:, None], r.latents], 1), r.suffix, r.router


def test_learning_rate_weight_decay_and_frozen_vision(world, tmp_path):
    for decay, flat in ((1.0, 10), (0.2, 80)):
        cfg = train.Config(lr=2.0, warmup=0.1, decay=decay)
        rates = [train.learning_rate(cfg, s, 100) for s in range(100)]
        assert rates[0] == pytest.approx(0.2) and rates[9] == rates[flat] == 2.0 and rates[(flat + 100) // 2] == pytest.approx(1.1) and rates[99] == pytest.approx(0.2, abs=0.02)
    make_model(adapter=dict(top_k=1, anchor=False), latent_positions="cache").float().save_pretrained(tmp_path / "ck")
    pairs = Pairs(str(world / "train.jsonl"))
    m = train.build_model(train.Config(init=str(tmp_path / "ck"), segments=2, steps_per_segment=2, max_pixels=28 * 28 * 5), {"init"}, pairs, "cpu")
    assert (m.settings["adapter"]["top_k"], m.settings["adapter"]["anchor"], m.settings["latent_positions"], m.settings["latent_steps"]) == (1, False, "cache", 4)  # its own
    assert m.settings["limits"]["max_pixels"] == 28 * 28 * 5
    frozen = {n for n, p in m.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in m.named_parameters() if "model.visual" in n and "merger" not in n}
    groups, where = train.parameter_groups(m, 0.3, 0.5), {}
    for n, p in m.named_parameters():
        where[n] = [(g["weight_decay"], g["share"]) for g in groups if any(p is x for x in g["params"])]
    for n, p in m.named_parameters():  # each in one group, the frozen in none
        plain = p.ndim < 2 or n.split(".")[1] in ("b1", "b2", "step_embed")
        assert where[n] == ([] if n in frozen else [(0.0 if plain else 0.3, 0.5 if "model.visual" in n else 1.0)]), n
    m = train.build_model(train.Config(init=str(tmp_path / "ck"), top_k=3, anchor=True), {"init", "top_k", "anchor"}, pairs, "cpu")
    assert m.settings["adapter"]["top_k"] == 3 and m.settings["adapter"]["anchor"]
    with pytest.raises(DataError, match="adapter does not fit"):
        train.build_model(train.Config(init=str(tmp_path / "ck"), experts=7), {"init", "experts"}, pairs, "cpu")


GRADIENTS = """
import sys, contextlib, numpy as np, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import test_plume as t, train
from torch.nn.parallel import DistributedDataParallel
world = int(sys.argv[1])
if world > 1: dist.init_process_group("gloo")
rank = dist.get_rank() if world > 1 else 0
m, kept = t.make_model(), {{}}
pairs = t.Pairs({path!r})
rows = np.flatnonzero(pairs.dataset == 0)[[0, 1, 2, 3, 2, 5, 0, 7]]  # equal targets within and across ranks and micro-batches
net = DistributedDataParallel(m) if world > 1 else m
for micro in range(8 // world + 1):
    batch = t.Batches(pairs, m.processor, t.Curriculum(last_stage=1.0), micro_batch=micro)[1, t.FINAL, rows[rank * (8 // world):(rank + 1) * (8 // world)]]
    parts = train.backward(net, batch, train.Config(), contextlib.nullcontext())
    kept[str(micro)] = dict({{n: p.grad for n, p in m.named_parameters() if p.grad is not None}}, **{{k: torch.as_tensor(v).detach() for k, v in parts.items() if k in ("bal", "gen", "disc")}})
    m.zero_grad()
if rank == 0: torch.save(kept, {out!r} + sys.argv[1])
"""


@functools.cache
def server():
    """A process that has imported everything and is forked for each script: to start Python anew takes 4 seconds each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_plume"])
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore", PYTHONPATH=str(HERE)):
        multiprocessing.forkserver.ensure_running()
    return context


def run_as_main(script, argv, cwd, environment, out):
    os.setsid()
    os.chdir(cwd)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the usual one, for data workers
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    warnings.simplefilter("ignore")
    sys.argv, sys.path[0] = [script, *argv], os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


class Started:
    """A script that runs in a process and a session of its own, with what it has printed so far."""

    def __init__(self, script, *argv, cwd=HERE, out=None, **environment):
        self.out = out or os.path.join(tempfile.mkdtemp(), "printed")
        script = os.path.join(HERE, script)
        self.process = server().Process(target=run_as_main, args=(script, list(map(str, argv)), str(cwd), environment, self.out))
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout=600):
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f"{self.process} is still running after {timeout} s: {self.stdout[-3000:]} {self.stderr[-3000:]}")
        return self.process.exitcode

    returncode = property(lambda self: self.wait())
    stdout = property(lambda self: Path(f"{self.out}.out").read_text())
    stderr = property(lambda self: Path(f"{self.out}.err").read_text())

    def terminate(self):
        self.process.terminate()

    def wait_for(self, line):
        """Until it has printed a line that begins so."""
        while not re.search(f"^{line}", self.stdout if os.path.exists(f"{self.out}.out") else "", re.M):
            assert self.process.exitcode is None, self.stdout + self.stderr
            time.sleep(0.02)


def done(started, check):
    code = started.wait()
    assert not check or code == 0, started.stdout[-3000:] + started.stderr[-9000:]
    return started


def run(script, *argv, check=True, **kw):
    return done(Started(script, *argv, **kw), check)


def run_ranks(number, script, *argv, check=True, **kw):
    """As torchrun starts them: when one fails, the others are killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = os.path.join(tempfile.mkdtemp(), "printed")
    about = dict(WORLD_SIZE=str(number), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    started = [Started(script, *argv, out=out, RANK=str(r), LOCAL_RANK=str(r), **about, **kw) for r in range(number)]
    while any(s.process.exitcode is None for s in started) and not any(s.process.exitcode for s in started):
        time.sleep(0.05)
    for s in started:
        if s.process.exitcode is None:
            os.killpg(s.pid, signal.SIGKILL)
        s.wait()
    failed = [s for s in started if s.process.exitcode]
    return done((failed or started)[0], check)


def torchrun(number, script, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", script, *map(str, argv)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=dict(os.environ, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-9000:]
    return finished


def call(script, *argv, check=True):
    """As `run`, but in this process: starting Python takes longer than what it is asked."""
    done = subprocess.CompletedProcess(script, 0, io.StringIO(), "")
    try:
        with contextlib.redirect_stdout(done.stdout):
            done.returncode = {"eval.py": evaluation, "data.py": data, "train.py": train}[script].main([str(a) for a in argv]) or 0
    except (DataError, OSError, SystemExit) as e:
        assert not check, e
        done.returncode, done.stderr = 1, str(e)
    done.stdout = done.stdout.getvalue()
    return done


def test_two_ranks_and_all_micro_batches_have_the_gradients_of_one_big_batch(world, tmp_path):
    """GradCache against the loss of the whole batch, differentiated in one piece."""
    script, out = tmp_path / "gradients.py", str(tmp_path / "grads")
    script.write_text(GRADIENTS.format(here=str(HERE), path=str(world / "train.jsonl"), out=out))
    run(script, 1), run_ranks(2, script, 2)
    m, pairs = make_model(), Pairs(str(world / "train.jsonl"))
    batch = whole(Batches(pairs, m.processor, Curriculum(last_stage=1.0))[1, FINAL, np.flatnonzero(pairs.dataset == 0)[[0, 1, 2, 3, 2, 5, 0, 7]]])
    parts = train.losses(m(batch, 8), batch, train.Config())
    parts["loss"].backward()
    expected = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    assert len(expected) > 40 and parts["bal"] > 0 and {"adapter.router.weight", "backbone.model.visual.patch_embed.proj.weight"} <= expected.keys()
    for ranks, sizes in ((1, range(9)), (2, range(5))):
        kept = torch.load(f"{out}{ranks}", weights_only=True)
        for size in sizes:
            grads = kept[f"{size}"]
            assert_close(grads.pop("bal"), parts["bal"].detach(), "balance loss", 1e-12)
            if ranks == 1:  # with more, a rank's InfoNCE is its share
                assert_close(grads["gen"], parts["gen"].detach(), "InfoNCE", 1e-12)
            assert {n for n in grads if "." in n} == expected.keys()
            for name, g in expected.items():
                assert_close(grads[name], g, f"{ranks} ranks, micro-batches of {size}: {name}", 1e-9 * g.abs().max().item())


def test_micro_batches_replay_their_random_state(world):
    m, pairs = make_model(), Pairs(str(world / "train.jsonl"))
    m.adapter.ln.register_forward_hook(lambda module, args, out: F.dropout(out, 0.2))
    batch, grads = Batches(pairs, m.processor, Curriculum(), micro_batch=2)[1, FINAL, np.arange(5)], []
    assert [len(part["ids"]) for part in batch["micro"]] == [4, 4, 2]
    for one_graph in (False, True):
        m.zero_grad()
        torch.manual_seed(0)
        if one_graph:
            outs = [m(part, 8) for part in batch["micro"]]
            both = {k: torch.cat([o[k].chunk(2)[side] for side in (0, 1) for o in outs]) for k in ("gen", "disc", "router")}
            train.losses(both | {k: torch.cat([o[k] for o in outs]) for k in ("ce", "read", "first")}, batch, train.Config())["loss"].backward()
        else:
            train.backward(m, batch, train.Config(), contextlib.nullcontext())
        grads.append({n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
    for name, g in grads[1].items():
        assert_close(grads[0][name], g, name, 1e-9 * g.abs().max().item())


# ------------------------------------------------------------------------------------------------------------- ranking


def worst_ranks(scores, gains):
    """Sort with every tie broken against the model."""
    order = sorted(range(len(scores)), key=lambda j: (-round(float(scores[j]), 5), gains.get(j, 0)))
    return sorted((gains[j], order.index(j) + 1) for j in gains)


@pytest.mark.parametrize("block", [(1024, 16384), (3, 4)])
def test_ranks_equal_brute_force_with_ties_candidates_and_grades(block):
    rng = np.random.default_rng(0)
    corpus = F.normalize(torch.tensor(rng.integers(-1, 2, (40, 4)) + 1e-3, dtype=torch.float32), dim=-1)  # many equal rows
    queries = F.normalize(torch.tensor(rng.standard_normal((25, 4)), dtype=torch.float32), dim=-1)
    relevant = [{int(j): int(rng.integers(1, 4)) for j in rng.choice(40, rng.integers(1, 5), replace=False)} for _ in queries]
    candidates = [None if i % 3 else list(dict.fromkeys([*relevant[i], *range(0, 40, 3)])) for i in range(25)]
    ranks = evaluation.rank(queries, corpus, relevant, candidates, block)
    for i, gains in enumerate(relevant):
        rows = candidates[i] or list(range(40))
        expected = worst_ranks([queries[i] @ corpus[j] for j in rows], {rows.index(j): g for j, g in gains.items()})
        assert sorted(ranks[i]) == expected, f"query {i}"


def test_a_tie_between_relevant_documents_puts_the_lesser_first():
    q, same = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]).repeat(3, 1)
    same[1] += 1e-8  # rounding is no difference
    for candidates in (None, [0, 1, 2]):
        assert sorted(evaluation.rank(q, same, [{0: 1, 1: 3}], [candidates])[0]) == [(1, 2), (3, 3)]


def test_scores_with_candidates_are_against_the_candidates_only():
    corpus, query = torch.eye(6), F.normalize(torch.tensor([[3.0, 2, 1, 0, 0, 0]]), dim=-1)
    task = data.Task("x/y", [], list("abcdef"), [{1: 1, 5: 2}], [[1, 2, 3, 4]], ["q"])
    scores = evaluation.evaluate(task, (query, corpus))
    assert scores["hit@1"] == 1 and scores["chance"] == 0.25 and scores["candidates"] == 4 and scores["ndcg@5"] == 1  # 5 is no candidate
    assert evaluation.ndcg([(1, r) for r in range(1, 8)], 5, [1] * 7) == pytest.approx(1)  # the best order is cut at 5 too
    with pytest.raises(DataError, match="x/y: .* not finite"):
        evaluation.evaluate(task, (query * math.nan, corpus))
    luck = data.Task("x/y", [], list("ab"), [{0: 1}] * 20, [None] * 20, [str(i) for i in range(20)])
    half = torch.eye(2)[[0] * 12 + [1] * 8]
    assert evaluation.evaluate(luck, (half, torch.eye(2)))["at_chance"]  # 12 of 20 at chance 1/2 is nothing


def test_ndcg_and_hits_by_hand():
    ranks = [(1, 1), (3, 4)]  # gain 1 at rank 1, gain 3 at rank 4
    assert evaluation.ndcg(ranks, 5, [1, 3]) == pytest.approx((1 + 3 / math.log2(5)) / (3 + 1 / math.log2(3)))
    assert evaluation.ndcg([(2, 6)], 5, [2]) == 0 and evaluation.hit(ranks, 1) and not evaluation.hit([(2, 6)], 5)


def test_a_constant_embedding_scores_zero_and_is_reported_at_chance():
    same = torch.ones(4, 8) / 8**0.5
    task = data.Task("x/y", [], list("abcd"), [{i: 1} for i in range(4)], [None] * 4, list("abcd"))
    scores = evaluation.evaluate(task, (same, same))
    assert scores["hit@1"] == 0 and scores["chance"] == 0.25 and scores["at_chance"] and "at chance" in evaluation.table({"x/y": scores})
    perfect = evaluation.evaluate(task, (torch.eye(4), torch.eye(4)))
    assert perfect["hit@1"] == perfect["ndcg@5"] == 1 and not perfect["at_chance"] and perfect["ranks"] == dict.fromkeys("abcd", 1)


def test_tasks_say_what_is_wrong(world, tmp_path):
    def broken(file, change, why):
        shutil.rmtree(tmp_path / "tasks", ignore_errors=True)
        shutil.copytree(world / "tasks", tmp_path / "tasks")
        for f in world.glob("*.*"):
            shutil.copy(f, tmp_path)
        path = tmp_path / "tasks" / "image_ret" / "t2i" / file
        path.write_text(change(path.read_text()))
        with pytest.raises(DataError, match=why):
            data.read_task(str(tmp_path / "tasks"), "image_ret/t2i")

    broken("qrels.tsv", lambda s: s.replace("q0\tred square\t1\n", ""), "query 'q0' has no relevant document in qrels")
    broken("qrels.tsv", lambda s: s.split("\n", 1)[1], "line 1 must be a header")
    broken("qrels.tsv", lambda s: s + "q0\tred square\t2\n", "line 14: .* was judged 1 before")
    broken("queries.jsonl", lambda s: "", "queries.jsonl: no record")
    broken("queries.jsonl", lambda s: s.replace('"q0"', '"q0", "candidates": 5'), "must be a list of ids")
    broken("qrels.tsv", lambda s: s + "q0\tno such\t1\n", "line 14: needs a known query id")
    broken("corpus.jsonl", lambda s: s + s.splitlines()[0], "record 13: the id 'red square' stands there twice")
    broken("corpus.jsonl", lambda s: s.replace("../red bar.png", "../gone.png"), "gone.png' does not exist")
    broken("queries.jsonl", lambda s: s.replace('"q0"', '"q0", "candidates": ["blue bar"]'), "no relevant document among its candidates")
    broken("queries.jsonl", lambda s: s.replace('"q0"', '"q0", "candidate": ["blue bar"]'), "unknown key 'candidate'")
    broken("qrels.tsv", lambda s: s.replace("query-id\tcorpus-id\tscore", "query-id\tdoc\tscore"), "line 1 must be a header with the columns query-id, corpus-id, score")
    broken("qrels.tsv", lambda s: s.replace("query-id\tcorpus-id\tscore", "query-id\tcorpus-id\tscore\tnote"), "line 1 must be a header")
    broken("qrels.tsv", lambda s: s + "q0\tred square\t1\t1\n", "line 14: needs")
    broken("corpus.jsonl", lambda s: s.replace('"image"', '"video": "", "image"', 1), "corpus.jsonl: record 1: video is an empty path")
    broken("corpus.jsonl", lambda s: s.replace('"text"', '"text": "a", "text"', 1), "record 1: the key 'text' stands twice")
    broken("corpus.jsonl", lambda s: s.replace('"text"', '"title": 3, "text"', 1), "record 1: 'title' and 'text' must be strings")
    with pytest.raises(DataError, match="Did you mean 'image_ret'"):
        evaluation.select(data.list_tasks(str(world / "tasks")), "image_rett", "root")


def test_qrels_are_read_by_the_names_of_their_columns(world, tmp_path):
    expected = data.read_task(str(world / "tasks"), "image_ret/t2i")
    rows = [line.split("\t") for line in (world / "tasks/image_ret/t2i/qrels.tsv").read_text().splitlines()]
    for f in world.glob("*.*"):
        shutil.copy(f, tmp_path)
    shutil.copytree(world / "tasks", tmp_path / "tasks")
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        for spell in (str, lambda name: name.upper().replace("-", "_")):
            lines = [[row[i] for i in order] for row in [list(map(spell, rows[0])), *rows[1:]]]
            (tmp_path / "tasks/image_ret/t2i/qrels.tsv").write_text("".join("\t".join(line) + "\r\n" for line in lines))
            assert data.read_task(str(tmp_path / "tasks"), "image_ret/t2i").relevant == expected.relevant


def test_beir_s_own_files_are_read_as_its_loader_reads_them(small, tmp_path):
    """Title and text with a blank between, stripped; only the queries that qrels/test.tsv judges."""
    folder = tmp_path / "text_ret" / "scifact"
    (folder / "qrels").mkdir(parents=True)
    corpus = [("4983", "Microstructural development", "of human newborn"), ("5836", "", "no title "), ("7912", "only a title", "")]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "title": title, "text": text, "metadata": {"url": "x"}}) + "\n" for i, title, text in corpus))
    queries = [("0", "0-dimensional biomaterials"), ("2", "of the training set"), ("3", "an only title")]
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": i, "text": text, "metadata": {}}) + "\n" for i, text in queries))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n2\t4983\t1\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t4983\t1\n3\t7912\t1\n3\t5836\t0\n")
    task = data.read_task(str(tmp_path), *data.list_tasks(str(tmp_path)))
    assert [s.parts for s in task.corpus] == [[("text", t)] for t in ("Microstructural development of human newborn", "no title", "only a title")]
    assert task.query_ids == ["0", "3"] and task.relevant == [{0: 1}, {2: 1}] and task.about == dict(not_judged=1)
    assert "1 queries are not judged" in call("eval.py", "--data", tmp_path, "--ckpt", small, "--task=all").stdout
    (folder / "queries.jsonl").write_text((folder / "queries.jsonl").read_text().replace('"text"', '"title": "T", "text"', 1))
    with pytest.raises(DataError, match="queries.jsonl: record 1: unknown key 'title'"):  # its loader does not read one there
        data.read_task(str(tmp_path), "text_ret/scifact")
    (folder / "queries.jsonl").write_text((folder / "queries.jsonl").read_text().replace('"title": "T", ', ""))
    (folder / "qrels.tsv").write_text((folder / "qrels" / "test.tsv").read_text())  # our own layout: every query counts
    with pytest.raises(DataError, match="query '2' has no relevant document in qrels.tsv"):
        data.read_task(str(tmp_path), "text_ret/scifact")


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_the_real_development_set_reads_completely():
    print("using", SHARED / "real_dev")
    pairs = Pairs(str(SHARED / "real_dev" / "train.jsonl"))
    assert len(pairs) == 5996 and len(pairs.names) == 11 and len(data.list_tasks(str(SHARED / "real_dev"))) == 13
    assert len(data.read_task(str(SHARED / "real_dev"), "video_ret/fluent_t2v").queries) == 108


# ------------------------------------------------------------------------------------------------------- command lines

QUICK = ["--global_batch", "4", "--workers", "1", "--log_every", "1", "--lr=2e-3"]
PAPER = ["--reset_moments", "--segments=4", "--steps_per_segment=2", "--gate=0", "--replay=0", "--last_stage=0.5", "--decay=1"]  # its fixed schedule


GATED = ["--segments=1", "--steps_per_segment=4", "--last_stage=0.1", "--gate=99", "--replay=0.2"]  # gated stages that come before their latest time


def weights(out):
    return load_file(Path(out) / "checkpoint" / "model.safetensors")


def log(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """A short run through all stages by the command line, uninterrupted."""
    out = tmp_path_factory.mktemp("run")
    done = run("train.py", "--data", world / "train.jsonl", "--out", out, "--steps", 40, *QUICK, *PAPER)
    return out, done.stdout


def test_turtle_world_is_learnt_step_by_step(tmp_path):
    """The claim in small: one family, from explicit to latent in a minute, unseen programs, 64 candidates; chance is 1.6%.

    Another CPU rounds differently and learns as another seed does: with 400 steps five seeds had 30 - 82% in latent mode.
    """
    run("train.py", "--out", tmp_path, "--families=image_ret", "--global_batch=32", "--steps=420")
    hits = {}
    for name, *flags in (("latent",), ("cot", "--mode=cot"), ("single", "--mode=single"), ("no step", "--steps=0")):
        call("eval.py", "--ckpt", tmp_path / "checkpoint", "--task=image_ret", "--json", tmp_path / "s.json", *flags)
        hits[name] = json.loads((tmp_path / "s.json").read_text())["tasks"]["image_ret/turtle"]["hit@1"]
    print(hits)
    least = max(hits["single"], hits["no step"])
    assert min(hits["latent"], hits["cot"]) > max(0.15, 3 * least) and least < 0.12, hits


def test_training_goes_through_all_stages_and_the_loss_falls(trained):
    out, printed = trained
    rows = log(out)
    assert [r["step"] for r in rows] == list(range(40)) and [r["K"] for r in rows] == [0] * 5 + [2] * 5 + [4] * 5 + [6] * 5 + [8] * 20
    assert [r["answer"] for r in rows] == [True] * 30 + [False] * 10
    for name, share in (("ce", 0.5), ("disc", 0.95)):
        assert np.mean([r[name] for r in rows[-5:]]) < share * np.mean([r[name] for r in rows[:5]]), name
    assert np.mean([r["gen"] for r in rows[20:30]]) < 0.8 * np.mean([r["gen"] for r in rows[:5]])
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float)) and rows[-1]["bal"] > 0
    for text in ("global contrastive batch 4 = 1 ranks x 4", "latent steps", "24 pairs in 2 data sets: t2i 12 (20 steps), v2t 12 (20 steps)", "pairs/s", "ETA", "40 of 40 steps done"):
        assert text in printed, text


def test_evaluation_by_command_line_in_all_modes(trained, world, tmp_path):
    out, _ = trained
    base = ["eval.py", "--data", world / "tasks", "--ckpt", out / "checkpoint"]
    done = run(*base, "--task=all", "--json", tmp_path / "scores.json", "--batch_size", "5")
    assert "image_ret/t2i" in done.stdout and "mean" in done.stdout and "chance" in done.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    m = Plume.from_pretrained(out / "checkpoint", "cpu")
    task = data.read_task(str(world / "tasks"), "image_ret/t2i")
    similarity = m.encode(task.queries) @ m.encode(task.corpus).T  # independent of eval.py's ranking
    assert scores["tasks"]["image_ret/t2i"]["hit@1"] == np.mean(similarity.argmax(1) == np.arange(12))
    assert scores["tasks"]["image_ret/t2i"]["chance"] == pytest.approx(1 / 12) and scores["steps"] == 8
    assert "mode cot" in call(*base, "--task", "video_cls", "--mode", "cot", "--limit", 20).stdout
    assert "image_ret" not in call(*base, "--task", "video_cls/v2t", "--mode", "single").stdout
    for flags, why in ((["--taks", "x"], "Did you mean 'task'"), (["--mode", "lattent"], "mode is one of"), (["--steps", "few"], "--steps needs a value of type int"), (["--ckpt", tmp_path / "no"], "no such checkpoint"),
                       (["--dtype", "float31"], "needs 'float32' or 'bfloat16'"), (["--json", tmp_path / "no" / "x.json"], "in folders that exist"), (["--json"], "--json needs a value")):
        failed = call(*base, *flags, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr
    assert "only with --task speed" in call(*base, "--growth=x.png", check=False).stderr
    failed = run(*base, "--mode=lattent", check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: --mode 'lattent'") and "Traceback" not in failed.stderr


def test_the_speed_benchmark_times_the_same_embeddings_and_counts_their_work(model, world, tmp_path, monkeypatch):
    samples = rendered(model, [item for item in mixed_items(world) if isinstance(item, str) or not {"image", "video"} <= item.keys()])  # benchmarked queries are of one kind
    ours, _ = model.embed(collate(samples, model.processor), "latent", 8)
    with torch.no_grad():
        theirs = torch.cat([evaluation.one_by_one(model, collate([s], model.processor), 8) for s in samples])
    assert_close(ours, theirs, "one by one through transformers", 1e-5)
    flags = ["eval.py", "--task=speed", "--device=cpu", "--batch_sizes=2", "--tokens=5", "--repeats=2", "--json", tmp_path / "s.json"]
    printed = call(*flags, "--prefix=40").stdout
    rows = {r["method"]: r for r in json.loads((tmp_path / "s.json").read_text())["rows"]}
    assert "2 equal queries a batch, prefix of 40 tokens, 0 patches" in printed and rows.keys() == {
        "single", "latent, K = 0", "latent, K = 4", "latent, K = 6", "latent, K = 8", "one by one, K = 8", "cot, 5 tokens", "cot, transformers", "training"}
    D, I, layers, G = 128, 384, 3, 64  # the tiny shape; by hand: two operations for each weight and column, and for each pair of columns and width
    column = layers * 2 * (2 * D * D + 2 * D * G + 3 * D * I)
    pairs = layers * 4 * D
    assert rows["single"]["gflop"] * 1e9 == pytest.approx(40 * column + 40 * 40 * pairs, rel=1e-3)
    extra = (rows["latent, K = 8"]["gflop"] - rows["latent, K = 4"]["gflop"]) * 1e9
    assert extra == pytest.approx(4 * (column + 50 * pairs + 2 * 5 * 4 * D * D + 2 * 2 * D * 4), rel=0.05)  # four steps more, each with the adapter
    for r in rows.values():
        assert r["method"] == "training" or (0 < r["low"] <= r["ms"] <= r["high"] and r["floor"] > 1 and r["peak_mib"] > 0)
    assert rows["one by one, K = 8"]["gbytes"] > 1.9 * rows["latent, K = 8"]["gbytes"] and rows["training"]["ours"] > 0
    for what, patches in ((["--image=56x84"], 24), (["--image=56x56", "--frames=2"], 16)):
        assert f" {patches} patches" in call(*flags, *what, "--training=false").stdout
    monkeypatch.setattr(evaluation, "GROWTH", dict(prefix=(64, 128), K=(0, 2), batch=(1, 2)))
    call(*[f for f in flags if not str(f).startswith(("--batch", "--tokens"))], f"--growth={tmp_path / 'g.png'}")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [(r["grows"], r["prefix"], r["K"], r["batch"]) for r in rows] == [
        ("prefix", 64, 8, 4), ("prefix", 128, 8, 4), ("K", 256, 0, 4), ("K", 256, 2, 4), ("batch", 256, 8, 1), ("batch", 256, 8, 2)]
    assert Image.open(tmp_path / "g.png").size == (1260, 420)
    for flag, why in (("--preset=midd", "one of tiny"), ("--prefix=3", "prompt alone has"), ("--prefix=a", "needs numbers"), ("--image=448", "as 448x448"), ("--batch_sizes=0", "needs numbers"), ("--mode=single", "not with --task speed")):
        assert why in call(*flags, flag, check=False).stderr, flag


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(world, tmp_path):
    command = ["train.py", "--data", world / "train.jsonl", "--steps", "50", *QUICK, *GATED, "--save_every=1000", "--out"]
    run(*command, tmp_path / "whole")
    command.append(tmp_path / "parts")
    running = Started(*command)
    running.wait_for("step 22/")  # the gate has decided, and the stage has not changed yet
    os.killpg(running.pid, signal.SIGTERM)  # as a batch system does: the workers get it too
    assert running.wait(60) == 130 and "--resume" in running.stdout
    stopped = log(tmp_path / "parts")[-1]["step"]
    assert 22 <= stopped < 34
    state = torch.load(tmp_path / "parts" / "checkpoint" / "train_state.pt", weights_only=True)
    assert state["step"] == stopped + 1 and state["progress"]["entry"][1] in range(35, 40) and 45 == Progress(Curriculum(1, 4, last_stage=0.1, gate=99), 50).entry[1]
    refused = run(*command, check=False)
    assert refused.returncode == 1 and "--resume" in refused.stderr
    changed = run(*command, "--lr=1e-3", "--resume", check=False)
    assert changed.returncode == 1 and "lr: 0.002 then, 0.001 now" in changed.stderr
    run(*command, "--resume")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    timeless = lambda rows: [{k: v for k, v in r.items() if k not in ("ms", "wait", "pairs_per_s")} for r in rows]
    assert timeless(log(tmp_path / "whole")) == timeless(log(tmp_path / "parts"))
    assert [(r["stage"], r["answer"]) for r in log(tmp_path / "parts")][-1] == (1, False) and any(r["stage"] < r["reached"] for r in log(tmp_path / "parts"))


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import train
die, at = sys.argv.pop(1), int(sys.argv.pop(1))
save, rename = train.torch.save, os.rename
def half(state, path):
    save(state, path)
    if state["step"] == at:
        if die == "writing": os.truncate(path, os.path.getsize(path) // 2)
        if die != "renaming": os.kill(os.getpid(), signal.SIGKILL)
        os.rename = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if a.endswith(".writing") else rename(a, b)
train.torch.save = half
sys.exit(train.main(sys.argv[1:]))
"""


def test_killed_while_a_checkpoint_is_written_costs_the_steps_since_the_last_one(trained, world, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--out", out, "--steps", 40, *QUICK, *PAPER]
    assert run(tmp_path / "killed.py", "writing", 15, *flags, check=False).returncode == -signal.SIGKILL  # half a file
    names = lambda: sorted(re.sub(r"\.[0-9a-f]{8}", ".X", name) for name in os.listdir(out) if name != ".plume.lock")
    assert names() == ["checkpoint", "checkpoint.X.writing", "log.jsonl"]
    assert run(tmp_path / "killed.py", "renaming", 30, *flags, "--resume", "--keep=2", check=False).returncode == -signal.SIGKILL
    assert names() == ["checkpoint-10", "checkpoint-15", "checkpoint-20", "checkpoint.X.writing", "checkpoint.X.writing", "log.jsonl"]  # between two renames
    printed = run("train.py", *flags, "--resume", "--keep=2").stdout
    assert "what a killed run left behind" in printed and printed.count(".writing") == 2
    # of checkpoint-20 nobody can tell any more that it is not somebody's copy: it stays
    kept = ["checkpoint", "checkpoint-15", "checkpoint-20", "checkpoint-30"]
    assert names() == [*kept, "checkpoint.X.writing", "checkpoint.X.writing", "log.jsonl"]
    whole, mine = weights(trained[0]), weights(out)
    assert whole.keys() == mine.keys() and all(torch.equal(v, mine[k]) for k, v in whole.items())
    assert [r["step"] for r in log(out)] == list(range(40))
    assert torch.load(out / "checkpoint-30" / "train_state.pt", weights_only=True)["step"] == 30
    with plume_model.replacing(out / "checkpoint", keep=str(out / "checkpoint-40")) as folder:
        shutil.copytree(out / "checkpoint-30", folder, dirs_exist_ok=True)
    assert [os.path.basename(p) for p in train.checkpoints_in(out)] [:3] == ["checkpoint", "checkpoint-40", "checkpoint-30"]
    (out / "checkpoint").rename(tmp_path / "elsewhere")
    refused = run("train.py", *flags, check=False)
    assert refused.returncode == 1 and "holds checkpoint-" in refused.stderr  # what is kept is not written over


def test_a_second_run_is_refused_by_a_lock_that_a_killed_run_does_not_leave(world, tmp_path):
    out = tmp_path / "out"
    flags = ["train.py", "--data", world / "train.jsonl", "--out", out, "--steps", 400, *QUICK, *PAPER, "--save_every=5", "--keep=1"]
    first = Started(*flags)
    first.wait_for("step 12/")
    for more in (["--resume"], ["--resume", "--workers=0"]):
        before = (out / "log.jsonl").read_text()
        second = run(*flags, *more, check=False)
        assert second.returncode == 1 and f"another run is at work there (process {first.pid} on " in second.stderr
        assert "Traceback" not in second.stderr and (out / "log.jsonl").read_text().startswith(before)
    assert first.process.exitcode is None  # the first one does not notice
    for name in ("checkpoint.old", "checkpoint.writing", "checkpoint-notes", "checkpoint-1"):  # somebody's copies, in every shape
        shutil.copytree(out / "checkpoint", out / name)
    (out / "checkpoint" / "README.md").write_text("card")
    os.kill(first.pid, signal.SIGKILL)  # its data worker lives on for a moment
    first.wait()
    step = len(log(out))
    with open(out / "log.jsonl", "ab") as f:
        f.write(b"here the power failed \xff\n")
    printed = run(*[f if f != 400 else step + 8 for f in flags], "--resume", check=False)
    assert "--resume with another configuration" in printed.stderr  # no lock is left, and steps are part of the recipe
    again = Started(*flags, "--resume")
    again.wait_for(f"step {step + 12}/")
    again.terminate()
    assert again.wait() == 130, again.stderr
    assert {"checkpoint.old", "checkpoint.writing", "checkpoint-notes", "checkpoint-1"} < set(os.listdir(out))
    assert b"here the power failed \xff\n" in (out / "log.jsonl").read_bytes()
    assert (out / "checkpoint" / "README.md").read_text() == "card" and len([n for n in os.listdir(out) if re.fullmatch(r"checkpoint-\d+", n)]) >= 2
    state = torch.load(out / "checkpoint" / "train_state.pt", weights_only=True)
    assert len(state["kept"]) == 1 and (out / state["kept"][0] / "train_state.pt").exists() and state["kept"] != ["checkpoint-1"]


SLOW = """
import sys, time
sys.path.insert(0, {here!r})
import train
def slow(*a, **k):
    print("reading", flush=True)
    time.sleep(60)
train.Pairs = slow
sys.exit(train.main(sys.argv[1:]))
"""


def test_the_lock_is_taken_before_the_data_are_read_and_a_failed_start_leaves_nothing(world, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--out", tmp_path / "out", "--steps=2", *QUICK]
    first = Started(tmp_path / "slow.py", *flags)
    first.wait_for("reading")
    second = run("train.py", *flags, check=False)
    assert second.returncode == 1 and "another run is at work there" in second.stderr and os.listdir(tmp_path / "out") == [".plume.lock"]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    failed = run("train.py", "--data", tmp_path / "gone.jsonl", *flags[2:3], tmp_path / "never", *flags[4:], check=False)
    assert "no such file" in failed.stderr and not (tmp_path / "never").exists()
    run("train.py", *flags)
    # under the lock it is looked at again: here a run has come and gone since the flags were read
    failed = run("train.py", *flags, check=False)
    assert "out holds checkpoint: continue with --resume" in failed.stderr and len(log(tmp_path / "out")) == 2


@pytest.mark.parametrize("harm", ["cut off", "empty", "pointer", "no step", "a list", "pickle"])
def test_a_damaged_training_state_is_an_error_that_names_it(trained, world, tmp_path, harm):
    out = tmp_path / "out"
    shutil.copytree(trained[0] / "checkpoint", out / "checkpoint")
    file = out / "checkpoint" / "train_state.pt"
    if harm == "cut off":
        half_of(file)
    elif harm in ("empty", "pointer"):
        file.write_bytes(LFS if harm == "pointer" else b"")
    elif harm == "pickle":
        torch.save(dict(step=Fraction(1, 2)), file)
    else:
        state = torch.load(file, weights_only=True)
        torch.save([1, 2] if harm == "a list" else {k: v for k, v in state.items() if k != "step"}, file)
    failed = call("train.py", "--data", world / "train.jsonl", "--out", out, "--steps=40", "--resume", "--device=cpu", *QUICK, *PAPER, check=False)
    assert failed.returncode == 1 and f"{file}: not the" in failed.stderr
    assert ("Git LFS pointer" in failed.stderr) == (harm == "pointer") and ("has no step" in failed.stderr) == (harm == "no step")


FULL = """
import resource, sys
sys.path.insert(0, {here!r})
import train
size, write = int(sys.argv.pop(1)), train.Plume.write
def limited(*a, **k):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # no file may be longer: what a full disk does
    return write(*a, **k)
at = int(sys.argv.pop(1))
save = train.save
def late(cfg, model, weights, state, saved, kept):
    if state["step"] == at: train.Plume.write = limited
    return save(cfg, model, weights, state, saved, kept)
train.save = late
try:
    sys.exit(train.main(sys.argv[1:]))
except (train.DataError, OSError) as e:
    sys.exit(f"error: {{train.said(e)}}")
"""


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(world, tmp_path, monkeypatch):
    (tmp_path / "full.py").write_text(FULL.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--steps", 12, "--save_every=4", *QUICK, *GATED, "--gate=0"]
    for size, file in ((100_000, "model.safetensors"), (8 << 20, "train_state.pt")):
        out = tmp_path / f"out {size}"
        failed = run(tmp_path / "full.py", size, 8, *flags, "--out", out, check=False)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
        last = failed.stderr.strip().splitlines()[-1]
        assert re.search(rf"error: .*{out}/checkpoint: the checkpoint of step 8 could not be written, the checkpoint of step 4 is still there: .*{file}: cannot", last)
        assert sorted(os.listdir(out)) == [".plume.lock", "checkpoint", "log.jsonl"]
        assert torch.load(out / "checkpoint" / "train_state.pt", weights_only=True)["step"] == 4
        Plume.from_pretrained(out / "checkpoint", "cpu")
    run("train.py", *flags, "--out", out, "--resume")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(DataError, match=r"a checkpoint takes 0.0\d GB, and 0.01 GB are free"):
        train.main([*map(str, flags), "--out", str(tmp_path / "little"), "--device=cpu"])


def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_loaded(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(train, "build_model", None)
    for out, why in ((tmp_path / "file", "nothing can be written in .*file"), (tmp_path / "file" / "deeper" / "x", "nothing can be written in .*file"),
                     ("/proc/plume", "nothing can be written"), ("/dev/null/x", "nothing can be written in '/dev/null'")):
        failed = call("train.py", "--data", world / "train.jsonl", "--out", out, "--steps=2", check=False)
        assert failed.returncode == 1 and re.search(why, failed.stderr), failed.stderr
    (tmp_path / "theirs").mkdir()
    for line in ('{"level": "info"}', '{"loss": 2.3, "epoch": 0.1, "step": 10}', '{"step": 10, "loss": 2.3}', "a note", '"step":'):
        (tmp_path / "theirs" / "log.jsonl").write_text(line + "\n")
        failed = call("train.py", "--data", world / "train.jsonl", "--out", tmp_path / "theirs", "--steps=2", "--device=cpu", check=False)
        assert "log.jsonl: not the log of a training run" in failed.stderr and (tmp_path / "theirs" / "log.jsonl").read_text() == line + "\n"
    assert (tmp_path / "file").read_text() == "mine"


def test_moments_are_forgotten_when_a_stage_is_entered(trained):
    state = torch.load(trained[0] / "checkpoint" / "train_state.pt", weights_only=True)
    assert state["step"] == 40 and {int(s["step"]) for s in state["optimizer"]["state"].values()} == {10}  # since the answer was dropped


def test_two_ranks_by_torchrun_train_the_weights_of_one(world, tmp_path, monkeypatch):
    flags = ["--data", world / "train.jsonl", "--steps", 38, "--global_batch", 4, "--workers", 0, "--lr=1e-3", "--checkpointing", *GATED, "--last_stage=0.05"]
    run("train.py", "--out", tmp_path / "one", *flags)
    printed = torchrun(2, "train.py", "--out", tmp_path / "two", *flags).stdout
    assert "global contrastive batch 4 = 2 ranks x 2" in printed
    run_ranks(2, "train.py", "--out", tmp_path / "shards", "--fsdp", "--micro_batch", 1, *flags)
    one, two, shards = (log(tmp_path / name) for name in ("one", "two", "shards"))
    assert [r["stage"] for r in one] == [r["stage"] for r in two] == [r["stage"] for r in shards]
    assert [r["reached"] for r in one].index(1) == 35 < Progress(Curriculum(1, 4, last_stage=0.05, gate=99), 38).entry[1]
    for rows in zip(one[:6], two[:6], shards[:6]):
        for name in ("ce", "gen", "disc", "bal", "norm", "first"):
            assert [r[name] for r in rows] == pytest.approx([rows[0][name]] * 3, rel=2e-3, abs=1e-4), (rows[0]["step"], name)
    flags = [*flags, "--steps=2", "--last_stage=1", "--dtype=bfloat16", "--out"]
    run_ranks(2, "train.py", "--fsdp", *flags, tmp_path / "half shards")
    monkeypatch.setattr(train.signal, "signal", lambda *a: None)
    train.main([*map(str, flags), str(tmp_path / "half")])
    mine, theirs = log(tmp_path / "half"), log(tmp_path / "half shards")
    for name in ("ce", "gen", "disc", "read"):  # the same but for rounding, and weights stay float32
        assert [r[name] for r in mine] == pytest.approx([r[name] for r in theirs], rel=3e-2), name
    assert mine[0]["K"] == 4 and {v.dtype for v in weights(tmp_path / "half shards").values()} == {torch.float32}


DIES = """
import os, signal, sys
sys.path.insert(0, {here!r})
import train
backward = train.backward
def dying(model, batch, *rest):
    if batch["step"] == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(model, batch, *rest)
train.backward = dying
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_killed_rank_costs_nothing_and_shards_go_on_as_copies(world, tmp_path):
    (tmp_path / "dies.py").write_text(DIES.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--steps", 12, "--save_every", 4, "--fsdp", "--micro_batch", 2, "--checkpointing", *QUICK, "--global_batch=8", "--out"]
    run_ranks(2, "train.py", *flags, tmp_path / "whole")
    assert run_ranks(2, tmp_path / "dies.py", *flags, tmp_path / "killed", check=False).returncode
    state = torch.load(tmp_path / "killed" / "checkpoint" / "train_state.pt", weights_only=True)
    assert 4 <= state["step"] <= 6 and state["ranks"] == 2
    shutil.copytree(tmp_path / "killed", tmp_path / "copies")
    run_ranks(2, "train.py", *flags, tmp_path / "killed", "--resume")
    printed = run("train.py", *(f for f in flags if f != "--fsdp"), tmp_path / "copies", "--resume").stdout  # shards to one whole model
    assert "began on 2 ranks and goes on with 1" in printed
    whole, killed, copies = (weights(tmp_path / name) for name in ("whole", "killed", "copies"))
    assert all(torch.equal(killed[k], v) for k, v in whole.items()) and killed.keys() == whole.keys() == copies.keys()
    for k, v in whole.items():
        assert_close(copies[k], v, k, 2e-3)
    assert [r["step"] for r in log(tmp_path / "killed")] == list(range(12))
    lines = (world / "train.jsonl").read_text().splitlines(True)
    for rank, text in enumerate((lines, lines[:-2])):
        (tmp_path / f"{rank}.jsonl").write_text("".join(text))
    (tmp_path / "other.jsonl").write_text("".join(lines).replace("shows one thing", "shows 1 thing"))
    assert len({Pairs(str(tmp_path / f), str(world)).digest for f in ("0.jsonl", "1.jsonl", "other.jsonl")}) == 3
    (tmp_path / "differ.py").write_text(f"import os, sys; sys.path.insert(0, {str(HERE)!r}); import train\ntrain.main([*sys.argv[1:], '--data', os.environ['RANK'] + '.jsonl'])")
    refused = run_ranks(2, tmp_path / "differ.py", "--media", world, "--out", tmp_path / "none", check=False, cwd=tmp_path)
    assert refused.returncode and "rank 1: 22 pairs" in refused.stderr and not (tmp_path / "none").exists()


def test_what_no_rank_uses_is_not_moved(tmp_path):
    """Text alone and no latent step: the vision tower and the adapter keep their weights, whatever the weight decay."""
    rows = [record(qry=dict(conversations=turns(f"question {i}")), pos=dict(conversations=turns(f"answer {i}"))) for i in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data", tmp_path / "t.jsonl", "--steps=3", "--segments=1", "--last_stage=0.3", "--gate=0", "--micro_batch=2", "--weight_decay=9", *QUICK, "--global_batch=8"]
    run_ranks(2, "train.py", *flags, "--out", tmp_path / "out")
    run_ranks(2, "train.py", *flags, "--out", tmp_path / "shards", "--fsdp")
    assert [r["K"] for r in log(tmp_path / "out")] == [0] * 3
    Plume.random(Pairs(str(tmp_path / "t.jsonl")).texts()).save_pretrained(tmp_path / "before" / "checkpoint")
    before = weights(tmp_path / "before")
    for after in (weights(tmp_path / "out"), weights(tmp_path / "shards")):
        kept = {k for k, v in before.items() if torch.equal(v, after[k])}
        idle = {k for k in before if k.startswith(("visual.", "adapter."))}
        assert len(idle) > 20 and idle <= kept and kept - idle == set(), sorted(idle ^ kept)[:4]


def test_the_paper_s_preset_and_hit_at_1_on_held_out_pairs(world, tmp_path):
    make_model().float().save_pretrained(tmp_path / "ck")
    lines = (world / "train.jsonl").read_text().splitlines()
    (tmp_path / "t.jsonl").write_text("\n".join(lines + lines))  # 48 pairs: 4 are held out
    flags = ["--preset=qwen2vl_2b", "--init", tmp_path / "ck", "--data", tmp_path / "t.jsonl", "--media", world, "--dtype=float32", "--steps=4", *QUICK, "--global_batch=8", "--eval_every=2"]
    printed = run("train.py", *flags, "--out", tmp_path / "one", "--micro_batch=3").stdout
    config = torch.load(tmp_path / "one" / "checkpoint" / "train_state.pt", weights_only=True)["config"]
    given = dict(init=str(tmp_path / "ck"), dtype="float32", global_batch=8, lr=2e-3)
    assert {k: config[k] for k in train.PRESETS["qwen2vl_2b"]} == train.PRESETS["qwen2vl_2b"] | given
    rows = log(tmp_path / "one")
    assert [("hit" in r) for r in rows] == [False, True, False, True] and "4 pairs are held out" in printed and "48 pairs in 2 data sets" in printed
    m, pairs = Plume.from_pretrained(tmp_path / "one" / "checkpoint", "cpu"), Pairs(str(tmp_path / "t.jsonl"), str(world))
    held = np.random.default_rng([0, 2]).permutation(48)[:4]
    q, t = (m.encode([pairs[i][side] for i in held]) for side in (0, 1))
    mine = [pairs.target[held][j] == pairs.target[i] for i, j in zip(held, (q @ t.T).argmax(1))]
    assert rows[-1]["hit"] == np.mean(mine)
    schedule = Schedule(np.where(np.isin(np.arange(48), held), -1, pairs.dataset), pairs.names, 8, 40, 0)
    assert not {int(i) for step in range(40) for i in schedule[step]} & set(held.tolist())
    run_ranks(2, "train.py", *flags, "--out", tmp_path / "two", "--fsdp")
    assert [r.get("hit") for r in log(tmp_path / "two")] == [r.get("hit") for r in rows]
    with pytest.raises(DataError, match="Did you mean 'qwen2vl_2b'"):
        train.main(["--preset", "qwen2vl_2"])
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:8]))
    few = run("train.py", "--data", tmp_path / "few.jsonl", "--media", world, "--steps=2", *QUICK, "--eval_every=1", "--out", tmp_path / "few", check=False)
    assert few.returncode == 1 and "leaves none to hold out" in few.stderr


def test_dry_run_tells_what_a_run_would_take_and_writes_nothing(world, tmp_path, capsys):
    flags = ["--data", world / "train.jsonl", "--out", tmp_path / "none", "--dry_run", "--micro_batch=3", "--segments=2", "--latent_positions=mrope"]
    def dry(*more):
        train.main([str(f) for f in (*flags, *more)])
        printed = capsys.readouterr().out
        cells = lambda line: [float(x.replace(",", "")) for x in line.split()]
        return printed, np.array([cells(line) for line in printed.splitlines() if re.match(r"^ +\d+ +\d+ +\d+ +\d+ +[\d,.]+ +[\d.]+", line)])

    printed, plain = dry("--device=cpu")
    _, recomputed = dry("--device=cpu", "--checkpointing")
    _, shapes = dry("--device=meta")
    assert plain[:, :2].tolist() == [[0, 0], [1, 1], [2, 2], [2, 2]] and not (tmp_path / "none").exists()
    assert (recomputed[:, 4] < 0.6 * plain[:, 4]).all() and (plain[:, 4] <= plain[:, 5]).all()
    assert shapes[:, :4].tolist() == plain[:, :4].tolist() and np.allclose(shapes[:, 4], plain[:, 4], rtol=0.05, atol=1.1e-3), (shapes, plain)  # GiB to three digits
    count = int(re.search(r"([\d,]+) parameters", printed)[1].replace(",", ""))
    assert float(re.search(r"weights ([\d.]+) GiB, gradients \1 GiB", printed)[1]) == pytest.approx(4 * count / 2**30, abs=6e-4)
    # the bytes counted are those of the tensors alive: by hand, w is known before and does not count
    w = torch.nn.Parameter(torch.randn(8, 8))
    with plume_model.LiveBytes() as live:
        h = (torch.ones(4, 8) @ w).relu()
        assert (live.now, live.peak) == (2 * 128, 3 * 128)  # the ones, which w's gradient needs, and h; with the product in between
        h.view(-1).sum().backward()
        del h
    assert live.now == 256 and w.grad.numel() * 4 == 256  # what is left is the gradient


def test_training_refuses_what_cannot_work(world, tmp_path, capsys):
    flags = ["--data", world / "train.jsonl", "--out", tmp_path]
    for extra, why in ((["--global_bach", "1"], "Did you mean"), (["--lr", "fast"], "--lr needs a value of type float"), (["--reset_moments", "maybe"], "true or false"),
                       (["--global_batch", "1"], "at least 2"), (["--data", tmp_path / "no.jsonl"], "no such file"), (["--rest_of_rationale", "before"], "'inside' or 'after'"),
                       (["--segments=8", "--steps_per_segment=5"], "at most 32"), (["--latent_positions", "rope"], "mrope or cache"), (["--adapter", "moo"], "'moe', 'mlp' or 'none'"), (["--save_every", "0"], "at least 1"), (["--steps=-5"], "above 0"),
                       (["--decay=-1"], "needs shares of the run"), (["--scale=0"], "must be above 0"), (["--workers=16"], "at most 15"), (["--micro_batch=-1"], "at least 1 pair"), (["--fsdp"], "torchrun"), (["--families=image_ret"], "leave it out"),
                       (["--seed=-1"], "--seed -1: at least 0"), (["--epochs=inf"], "above 0 and finite"), *([] if torch.cuda.is_available() else [(["--device=cuda"], "no CUDA device")]),
                       (["--device=meta"], "--dry_run"), (["--wandb=mine"], "pip install wandb"), (["--keep=-1"], "at least 0"),
                       (["--dtype", "bf16"], "needs 'float32'"), (["--init", tmp_path / "nowhere"], "no such checkpoint"), (["--resume"], "no checkpoint of a run")):
        with pytest.raises((SystemExit, DataError, FileNotFoundError), match=re.escape(why)):
            train.main(list(map(str, [*flags, *extra])))
    failed = run("train.py", *flags, "--lr", "fast", check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    burst = run("train.py", *flags, "--steps", 6, "--lr", "1e30", "--clip", "1e30", *QUICK[:4], check=False)
    assert burst.returncode == 1 and re.search(r"error: step \d, data set '(t2i|v2t)': loss nan", burst.stderr) and "Traceback" not in burst.stderr, burst.stderr[-500:]
    with pytest.raises(SystemExit):
        train.main(["--help"])
    help_ = capsys.readouterr().out
    assert all(f"--{name} " in help_ for name in vars(train.Config())) and "torchrun" in help_


def test_checkpoints_come_at_stage_ends_every_save_every_and_at_the_end(world, tmp_path, monkeypatch):
    saved, clips, recomputed = [], [], []
    write, clip, recompute = train.torch.save, torch.nn.utils.clip_grad_norm_, latent.checkpoint
    monkeypatch.setattr(train.signal, "signal", lambda *a: None)  # leave this process's own alone
    monkeypatch.setattr(train.torch, "save", lambda state, file: (saved.append(state["step"]), write(state, file)))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: (clips.append(norm), clip(p, norm))[1])
    monkeypatch.setattr(latent, "checkpoint", lambda *a, **k: (recomputed.append(1), recompute(*a, **k))[1])
    train.main(["--data", str(world / "train.jsonl"), "--out", str(tmp_path), "--steps=9", "--save_every=8", "--workers=0",
                "--global_batch=4", "--clip=0.5", "--checkpointing", "--device=cpu", *PAPER])
    assert saved == [2, 3, 4, 5, 7, 8, 9] and clips == [0.5] * 9 and len(recomputed) == 9 * 2 * 3  # steps x (prefill, suffix) x layers


def test_wandb_gets_the_rows_of_the_log_and_too_little_memory_is_an_error_that_says_what_helps(world, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("from types import SimpleNamespace\nrows = []\n"
                                       "def init(**kw):\n    rows.append(kw)\n    return SimpleNamespace(log=lambda row, step: rows.append((row, step)), finish=lambda: rows.append('end'))")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *a: None)
    flags = ["--data", str(world / "train.jsonl"), "--steps=2", "--workers=0", "--global_batch=4", "--device=cpu", "--wandb=mine", "--out"]
    train.main([*flags, str(tmp_path / "out")])
    first, *rows, end = sys.modules.pop("wandb").rows
    assert first["project"] == "mine" and first["config"]["steps"] == 2 and rows == [(r, r["step"]) for r in log(tmp_path / "out")] and end == "end"

    def too_much(*a):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(torch.optim.AdamW, "step", too_much)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags[:-3], "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="out of memory.*Lower --micro_batch.*--dry_run"):
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")


def test_skip_bad_trains_on_the_rest_and_prints_the_count(world, tmp_path):
    lines = (world / "train.jsonl").read_text().splitlines()
    for name in ("red bar", "blue bar"):  # one that cannot be read, one that is gone
        (tmp_path / f"{name}.png").write_bytes(b"not a picture")
    lines[3] = "{not json"
    lines[0] = lines[0].replace("red square.png", str(tmp_path / "red bar.png"))
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    flags = ["--data", tmp_path / "bad.jsonl", "--media", world, "--out", tmp_path / "out", "--steps", 6, *QUICK]
    printed = run("train.py", *flags, "--skip_bad", "--save_every", 2).stdout
    assert re.search(r"1 records left out at the start, [123] while training", printed)
    assert "record 4: not JSON" in printed and re.search(r"left out: .*record 1: pos: .*red bar.png: cannot be used as a picture", printed)
    failed = run("train.py", *flags[:5], tmp_path / "other", *flags[6:], check=False)
    assert failed.returncode == 1 and "record 4: not JSON" in failed.stderr and "Traceback" not in failed.stderr


# ------------------------------------------------------------------------------------------------------------- MMEB-V2

# Every test runs on a miniature of the published files, four queries a task, in the layouts of the hub.

INST, PAGE_QUERY, PAGE_TARGET = "Represent the given image", "Find a document image that matches the given query:", "Understand the content of the provided document image."
CHOOSE = "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact text of your chosen answer. Question: "
CLIP_QUERIES = {
    "K700": "Recognize the category of the video content.", "HMDB51": "What actions or objects interactions are the person in the video doing?",
    "UCF101": "What activities or sports are being performed by the person in the video?",
    "Breakfast": "Recognize the breakfast type that the person is cooking in the video.",
    "SmthSmthV2": "What actions or object interactions are being performed by the person in the video?",
    "DiDeMo": "Find a video that includes the following described scenes:", "MSR-VTT": "Find a video that contains the following visual content:",
    "MSVD": "Find the video snippet that corresponds to the given summary:", "VATEX": "Select a video that fits the description provided:",
    "YouCook2": "Find a video that demonstrates the following action while making a recipe:"}
SSV2_SPELLING = {"SmthSmthV2": "SSv2", "Charades-STA": "Charades_STA"}


class Miniature:
    """All 78 tasks under `root`, and what each must be: expected[name] = (queries, candidates of each, gains of each) as items for `encode`.

    other: the other spelling of the same data that is in use.
    """

    def __init__(self, root, only=None, other=False):
        pytest.importorskip("pyarrow", reason="the published rows are .parquet files")
        self.root, self.other, self.expected, self.frames = Path(root), other, {}, {}
        self.names = [f"{c} {s}" for c in COLOURS for s in SHAPES]
        for name, task in data.MMEB.items():
            if only is None or name in only or task.meta in only:
                kind = "pages" if task.is_document else "image" if task.meta.startswith("image") else "video"
                self.expected[name] = getattr(self, kind)(name, task)

    def picture(self, path, name, shift=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            picture(*name.split(), (56, 56), shift).save(path)
        return str(path)

    def rows(self, hub, config, split, rows, style=""):
        """A part of a hub repository: <config>/<split>-00000-of-00001.parquet, or JSON lines."""
        folder = (self.root / "visdoc-tasks/data" / hub.split("/")[1] if self.other and config in ("queries", "corpus", "qrels") else self.root / "rows" / hub) / config
        folder.mkdir(parents=True, exist_ok=True)
        if style == "json":
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            import pyarrow.parquet

            half = len(rows) // 2  # two shards
            for n, part in enumerate((rows[:half], rows[half:])):
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{split}-0000{n}-of-00002.parquet")

    def image(self, name, task):
        queries, candidates, rows = [], [], []
        t2i = name in ("VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA", "Wiki-SS-NQ", "EDIS")
        i2i = name in ("CIRR", "NIGHTS", "FashionIQ", "OVEN", "MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing")
        captioned = name in ("WebQA", "EDIS", "OVEN", "RefCOCO-Matching")
        base = self.root / "image-tasks" / ("MMEB" if self.other else "")
        for i in range(4):
            mine = [self.names[(i + 3 * k) % 12] for k in range(4)]  # the first is right
            path = lambda n: f"{name}/Test/{n}.jpg"
            row = dict(qry_inst=f"<|image_1|>\n{INST} for {name}.", qry_text=f"what is this, {i}?" if task.meta == "image_qa" else "", qry_img_path=path(self.names[i]),
                       tgt_text=mine, tgt_inst="", tgt_img_path=[""] * 4)
            query = dict(text=f"{INST} for {name}." + (f" what is this, {i}?" if task.meta == "image_qa" else ""), image=self.picture(base / path(self.names[i]), self.names[i]))
            found = [dict(text=n) for n in mine]
            if t2i or i2i:
                texts = [f'"a {n}"' if i2i else f"a {n}" for n in mine] if captioned else [""] * 4
                row |= dict(tgt_inst="<|image_1|>\nRepresent it.", tgt_text=texts, tgt_img_path=[path(n) for n in mine])
                found = [dict(text=f"Represent it. {t}".strip(), image=self.picture(base / path(n), n)) for t, n in zip(texts, mine)]
            if name == "RefCOCO-Matching":  # one picture, four captions
                row["tgt_img_path"] = [path(mine[0])] * 4
                found = [dict(f, image=str(base / path(mine[0]))) for f in found]
            if t2i:
                row |= dict(qry_text=f"the {mine[0]} \nof {i}\n", qry_img_path="")  # with a line break at the end, as VisDial's
                query = dict(text=f"{INST} for {name}. the {mine[0]} \nof {i}")
            queries.append(query)
            candidates.append(found)
            rows.append(row)
        self.rows("ziyjiang/MMEB_Test_Instruct", name, "test", rows)
        return queries, candidates, [{0: 1}] * 4

    def clip(self, meta, name, clip, concept, count=10):
        """A folder of frames -> the paths of the (at most) 8 of them that are used."""
        group = self.root / "video-tasks" / ("" if self.other else "frames") / meta / (name if self.other else SSV2_SPELLING.get(name, name))
        if self.other and meta == "video_ret":  # as the archive holds them
            group = self.root / "video-tasks/frames/video_ret/data/ziyan/video_retrieval" / name
        folder = group / ("frames" if self.other else "") / clip
        if name == "SmthSmthV2":
            folder = group.with_name("SSv2") / ("frames" if self.other else "") / clip
        paths = [self.picture(folder / f"frame_{k + 1}.jpg", concept, k - 5) for k in range(count)]  # 10 stands behind 9
        return [paths[int(k * (count - 1) / 7)] for k in range(8)] if count > 8 else paths

    def video(self, name, task):
        concepts, queries, candidates, rows = self.names[:4], [], [], []
        clip = lambda i, **kw: self.clip(task.meta, name, f"v{i}", concepts[i], **kw)
        watch = "Understand the content of the provided video."
        if task.meta == "video_ret":
            for i, n in enumerate(concepts):
                rows.append({"DiDeMo": dict(video=f"videos/v{i}.mp4", caption=n), "MSR-VTT": dict(video_id=f"v{i}", video=f"v{i}.mp4", caption=n),
                             "MSVD": dict(video_id=f"v{i}", video="x.avi", caption=[n, "no"]), "VATEX": dict(videoID=f"v{i}", enCap=[n, "no"]),
                             "YouCook2": dict(id=f"v{i}", video_path=f"x/v{i}.mp4", sentence=n)}[name])
                queries.append(dict(text=f"{CLIP_QUERIES[name]} {n}"))
            found = [dict(text=watch, video=clip(i, count=10 if i else 3)) for i in range(4)]
            candidates, gains = [found] * 4, [{i: 1} for i in range(4)]
        elif name in ("K700", "HMDB51", "UCF101", "Breakfast"):
            for i, n in enumerate(concepts):
                rows.append(dict(video_id=f"v{i}", pos_text=n))
                queries.append(dict(text=CLIP_QUERIES[name], video=clip(i)))
            (self.root / "classes").mkdir(exist_ok=True)
            (self.root / "classes" / f"{name}.txt").write_text("\n".join(self.names) + "\n")
            candidates, gains = [[dict(text=n) for n in self.names]] * 4, [{i: 1} for i in range(4)]
        elif name == "SmthSmthV2":
            for i, n in enumerate(concepts):
                rows.append(dict(video_id=f"v{i}", pos_text=n, neg_text=self.names[:5]))
                queries.append(dict(text=CLIP_QUERIES[name], video=clip(i)))
            candidates, gains = [[dict(text=n) for n in self.names[:5]]] * 4, [{i: 1} for i in range(4)]
        elif task.meta == "video_qa":
            gains = []
            for i, n in enumerate(concepts):
                texts = ["yes", "no"] if name == "ActivityNetQA" else self.names[i : i + 5] if name in ("NExTQA", "EgoSchema") else self.names[i : i + 4]
                right = i % len(texts)
                marked, letters = [f"({'ABCDE'[k]}) {t}" for k, t in enumerate(texts)], [f"{'ABCDE'[k]}. {t}." for k, t in enumerate(texts)]
                row, q, named, where = {
                    "MVBench": lambda: (dict(question="Q?", video=f"v{i}.mp4", candidates=texts, answer=texts[right]), "Q?\nOptions:\n" + "\n".join(marked), marked, f"{{}}/v{i}.mp4"),
                    "Video-MME": lambda: (dict(question="Q?", videoID=f"v{i}", options=letters, answer="ABCD"[right]), "Q?\n" + "\n".join(letters), texts, f"v{i}"),
                    "NExTQA": lambda: (dict({f"a{k}": t for k, t in enumerate(texts)}, question="Q", video=i, answer=right), "Q\nOptions:\n" + "\n".join(marked), texts, f"{i}"),
                    "EgoSchema": lambda: (dict(question="Q?", video_idx=f"v{i}", option=letters, answer=str(right)), "Q?" + " ".join(letters), texts, f"v{i}"),
                    "ActivityNetQA": lambda: (dict(question="is it", video_name=f"x{i}", answer=texts[right]), "is it? (A) yes; (B) no.", texts, f"v_x{i}")}[name]()
                subsets = data.MVBENCH if name == "MVBench" and i == 0 else ["action_count"] if name == "MVBench" else [""]
                for subset in subsets:  # MVBench: the first row stands in all 20, three more in one
                    rows.append((subset, row) if subset else row)
                    queries.append(dict(text=f"{CHOOSE} {q}", video=self.clip(task.meta, name, where.format(subset), n)))
                    candidates.append([dict(text=t) for t in named])
                    gains.append({right: 1})
        elif name == "MomentSeeker":
            gains, target = [], "Understand the content of the provided video clip."
            for i, n in enumerate(concepts):
                given = ["", f"p{i}.jpg", f"long/v{i}.mp4", f"long/v{i}.mp4"][i]
                ask = ["Find the clip that corresponds to the given text:", "Select the video clip that aligns with the given text and image:"][i] if i < 2 else \
                    "Find the clip that corresponds to the given sentence and video segment:"
                entry = lambda k: dict(output_path=f"clips/{i}_{k}.mp4")
                rows.append(dict(query=n, input_frames=given, positive_frames=[entry(0), entry(1)], negative_frames=[entry(2), entry(3)]))
                shown = {} if not i else dict(image=self.picture(self.root / "video-tasks" / ("" if self.other else "frames") / task.meta / name / f"query_{given}", n)) if i == 1 else \
                    dict(video=self.clip(task.meta, name, f"video_frames/long_v{i}", n))
                queries.append(dict(text=f"{ask} {n}", **shown))
                candidates.append([dict(text=target, video=self.clip(task.meta, name, f"video_frames/clips_{i}_{k}", self.names[i + k], 9)) for k in range(4)])
                gains.append({0: 1, 1: 1})
        else:  # QVHighlight, Charades-STA
            gains = []
            for i, n in enumerate(concepts):
                rows.append(dict(query=n, video_path=f"videos/v{i}.mp4"))
                ask = "Find the clip that corresponds to the described scene in the given video:"
                queries.append(dict(text=f"{ask} {n}", video=self.clip(task.meta, name, f"v{i}/query", n)))
                candidates.append([dict(text=watch, video=self.clip(task.meta, name, f"v{i}/{c}", self.names[i + k], 8)) for k, c in enumerate(("negative_0", "negative_1", "positive_0"))])
                gains.append({2: 1})
        if name == "MVBench":
            order = sorted(range(len(rows)), key=lambda k: data.MVBENCH.index(rows[k][0]))
            folder = self.root / "rows/VLM2Vec/MVBench/json"
            folder.mkdir(parents=True)
            for subset in data.MVBENCH:  # one JSON array each
                (folder / f"{subset}.json").write_text(json.dumps([row for s, row in rows if s == subset]))
            queries, candidates, gains = ([values[k] for k in order] for values in (queries, candidates, gains))
        elif self.other and name in ("Charades-STA", "MomentSeeker", "ActivityNetQA"):
            (self.root / "video-tasks" / "data").mkdir(parents=True, exist_ok=True)
            stem = "momentseeker_1k6" if name == "MomentSeeker" else name.lower().replace("-", "_")
            (self.root / "video-tasks" / "data" / f"{stem}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        else:
            self.rows(task.hub, task.subset, task.split, rows, "json" if name in ("Breakfast", "MomentSeeker") else "")
        return queries, candidates, gains

    def pages(self, name, task):
        corpus, rows = [], []
        for k, n in enumerate(self.names[:6]):
            page = f"page {k} " + "of a long name " * 6 + ".png" if task.meta == "visrag" else k if name == "ViDoRe_tatdqa" else f"doc/{k}"
            buffer = io.BytesIO()
            picture(*n.split(), (56, 84)).save(buffer, "PNG")
            corpus.append(dict(text=PAGE_TARGET, image=Image.open(buffer)))
            rows.append({"corpus-id": page, "image": dict(bytes=None if self.other else buffer.getvalue(), path=None)})
            if self.other:  # the pages lie beside the rows, as an archive holds them
                stored = page_file(task, str(page))
                folder = self.root / "visdoc-tasks" / ("images" if task.meta == "visrag" else "visdoc-tasks") / name.removeprefix("ViDoRe_" if name.endswith(("_v2", "_multilingual")) else "")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / stored).write_bytes(buffer.getvalue())
        ids = [row["corpus-id"] for row in rows]
        judged = [(0, 0, 1), (0, 3, 2), (1, 1, 1), (1, 2, 0), (2, 2, 1), (2, 2, 2), (3, 3, 1)]
        if not any((self.root / at).exists() for at in (f"rows/{task.hub}", f"visdoc-tasks/data/{task.hub.split('/')[1]}")):
            self.rows(task.hub, "corpus", task.split, rows)
            self.rows(task.hub, "queries", task.split, [{"query-id": q, "query": f"a {self.names[q]}", "language": "english"} for q in range(4)])
            self.rows(task.hub, "qrels", task.split, [{"query-id": q, "corpus-id": ids[c], "score": s} for q, c, s in judged])
        return [dict(text=f"{PAGE_QUERY} a {self.names[q]}") for q in range(4)], [corpus] * 4, [{0: 1, 3: 2}, {1: 1}, {2: 2}, {3: 1}]


def page_file(task, page):
    """The name of a page's picture in the published archive."""
    if task.meta != "visrag":
        return page.replace("/", "_") + ".png"
    stem, dot, suffix = page.rpartition(".")
    return stem[:50] + "_" + hashlib.md5(page.encode()).hexdigest()[:8] + dot + suffix


@pytest.fixture(scope="session")
def mmeb(tmp_path_factory):
    return Miniature(tmp_path_factory.mktemp("mmeb"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A checkpoint for it, in float32."""
    path = tmp_path_factory.mktemp("small") / "small"
    make_model().float().save_pretrained(path)
    return path


@pytest.fixture
def counts(mmeb, monkeypatch):
    """As if the miniature's counts were the published ones."""
    for name, (queries, candidates, _) in mmeb.expected.items():
        task = data.MMEB[name]
        versions = task.versions and {hub: (version, len(queries) + 9 * (version == "original")) for hub, (version, _) in task.versions.items()}
        monkeypatch.setitem(data.MMEB, name, replace(task, queries=len(queries), corpus=len(candidates[0]) if task.corpus else 0, versions=versions))


def test_the_78_tasks_and_their_weight_are_the_benchmarks():
    metas = [t.meta for t in data.MMEB.values()]
    assert [metas.count(m) for m in data.META] == [10, 10, 12, 4, 5, 5, 5, 3, 10, 4, 6, 4] and list(dict.fromkeys(metas)) == list(data.META)
    assert sum(t.queries for t in data.MMEB.values() if t.meta.startswith("image")) == 36_000 and data.MMEB["VATEX"].queries == 4478
    assert {t.name for t in data.MMEB.values() if t.versions} == {"MomentSeeker", "ViDoSeek-page", "MMLongBench-page"}
    assert data.MMEB["ViDoRe_tatdqa"].hub == "vidore/tatdqa_test_beir" and data.MMEB["ViDoRe_docvqa"].hub == "vidore/docvqa_test_subsampled_beir"
    means = dict(image=0.663, video=0.441, visdoc=0.675)
    results = {t.full_name: {"metric": "x", "x": means[data.modality(t.meta)], "partial": False} for t in data.MMEB.values()}
    (header, ours, paper, *_), missing = evaluation.paper_rows(results, "ours")
    assert not missing and header == ["model", "CLS", "QA", "RET", "GD", "image", "CLS", "QA", "RET", "MRET", "video", "VDRv1", "VDRv2", "VR", "OOD", "visdoc", "all"]
    assert abs(float(ours[-1]) - float(paper[-1])) < 0.11 and ours[5] == paper[5] == "66.3"  # the plain mean over 78; that of the three means is 59.3
    results.popitem()
    (_, ours, *_), missing = evaluation.paper_rows(results, "ours")
    assert missing and ours[-1].endswith("*") and ours[-2].endswith("*") and not ours[5].endswith("*")


def score_by_hand(model, queries, candidates, gains, metric):
    """The mean metric, from `encode` and a sort."""
    scores, vectors = [], iter(torch.from_numpy(model.encode([*queries, *sum(candidates, [])], batch_size=32)).double().split([len(queries), *map(len, candidates)]))
    for q, c, g in zip(next(vectors)[:, None], vectors, gains):
        order = sorted(range(len(c)), key=lambda i: (-round(float(c[i] @ q[0]), 6), i in g))  # ties against the model
        if metric == "hit@1":
            scores.append(float(order[0] in g))
        else:
            best = sum(gain / math.log2(i + 2) for i, gain in enumerate(sorted(g.values(), reverse=True)[:5]))
            scores.append(sum(g.get(i, 0) / math.log2(place + 2) for place, i in enumerate(order[:5])) / best)
    return sum(scores) / len(scores)


def test_all_78_tasks_from_their_files_score_what_an_independent_computation_does(mmeb, small, counts, tmp_path, capsys):
    done = call("eval.py", "--data", mmeb.root, "--check")
    assert "78 of 78 tasks are there without a problem" in done.stdout
    line = {row.split()[0]: row.split()[1:] for row in done.stdout.splitlines() if "/" in row}
    assert line["video_ret/MSVD"] == "4 / 4 4 4 / 4".split() and line["image_gd/RefCOCO"][:3] == ["4", "/", "4"] and line["visdoc_ood/ViDoSeek-page"][-1] == "fixed"
    flags = ["--data", mmeb.root, "--ckpt", small, "--scores", tmp_path / "scores", "--json", tmp_path / "a.json"]
    done = call("eval.py", *flags)
    results, model = json.loads((tmp_path / "a.json").read_text())["tasks"], Plume.from_pretrained(small)
    assert len(results) == 78 and len(mmeb.expected) == 78
    for name, (queries, candidates, gains) in mmeb.expected.items():
        task = data.MMEB[name]
        r = results[task.full_name]
        assert r["metric"] == ("ndcg@5" if task.is_document else "hit@1") and r["queries"] == len(queries) and not r["partial"], name
        assert abs(r[r["metric"]] - score_by_hand(model, queries, candidates, gains, r["metric"])) < 1e-9, name
        assert r["interval"][0] <= r[r["metric"]] <= r["interval"][1]
    assert {results[n]["version"] for n in ("video_mret/MomentSeeker", "visdoc_ood/ViDoSeek-page", "visdoc_ood/MMLongBench-page")} == {"fixed"}
    asked, encoded, known, shared = map(int, re.search(r"(\d+) items, (\d+) encoded, (\d+) known from before, (\d+) shared", done.stdout).groups())
    assert encoded + shared == asked and shared > 100 and not known  # labels and pages that several tasks have
    (folder,) = (tmp_path / "scores").glob("small?-small-latent8-??????")
    one = json.loads((folder / "video_ret" / "MSVD_score.json").read_text())
    assert one == results["video_ret/MSVD"] and one["queries_per_s"] > 0 and one["steps"] == 8 and one["mode"] == "latent" and one["checkpoint_hash"] and one["prompt_hash"]
    board = json.loads((folder / "leaderboard.json").read_text())
    assert {part: len(found) for part, found in board["metrics"].items()} == dict(image=36, video=18, visdoc=24) and board["metadata"]["incomplete"] == []
    assert {"ViDoSeek-page-fixed", "MMLongBench-page-fixed", "ViDoSeek-doc"} <= board["metrics"]["visdoc"].keys() and "MomentSeeker" in board["metrics"]["video"]
    assert board["metrics"]["visdoc"]["VisRAG_PlotQA"]["ndcg_linear@5"] == results["visrag/VisRAG_PlotQA"]["ndcg@5"]
    rows = [line.split("|") for line in (folder / "table.md").read_text().splitlines()]
    assert rows[3][1].strip() == "PLUME, paper" and rows[3][-2].strip() == "61.6"
    assert abs(float(rows[2][-2]) - 100 * np.mean([r[r["metric"]] for r in results.values()])) < 0.051
    again = call("eval.py", *flags)  # everything is known
    assert f"{asked} items, 0 encoded, {encoded} known from before, {shared} shared" in again.stdout
    assert json.loads((tmp_path / "a.json").read_text())["tasks"] == results  # its times are still those of the run that did the work
    call("eval.py", *flags[:-1], tmp_path / "b.json", "--mode", "single", "--task", "image_gd,MSVD,visdoc")
    done = call("eval.py", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    b = json.loads((tmp_path / "b.json").read_text())["tasks"]
    assert len(b) == 4 + 1 + 24 and all(r["run_hash"] != results[n]["run_hash"] for n, r in b.items()) and (folder / "table.md").exists()
    sizes = [abs(float(line.split()[-1])) for line in done.stdout.splitlines()[1 : 1 + len(b)]]
    assert sizes == sorted(sizes, reverse=True) and "only in a" in done.stdout and "only in b" not in done.stdout
    assert "visdoc/ViDoSeek-doc" in done.stdout
    done = call("eval.py", "--compare", folder / "leaderboard.json", folder / "leaderboard.json")
    assert "image/ImageNet-1K" in done.stdout and "+0.0" in done.stdout
    done = call("eval.py", "--compare", folder / "leaderboard.json", tmp_path / "a.json")
    assert len(done.stdout.splitlines()) == 80 and "only in" not in done.stdout and not re.search(r"[1-9]\n", done.stdout)  # the same scores in two formats
    turtle = dict(metric="hit@1")  # several meta-tasks may have a data set of one name
    for name, value in (("x", 0.1), ("y", 0.9)):
        (tmp_path / name).write_text(json.dumps(dict(tasks={"image_cls/turtle": turtle | {"hit@1": value}, "image_qa/turtle": turtle | {"hit@1": 0.5}})))
    done = call("eval.py", "--compare", tmp_path / "x", tmp_path / "y")
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:]] == ["+80.0", "+0.0", "+40.0"]
    for wrong, said in ((["a.json"], "must end in .png"), (["a.json", "b.png"], "one PNG to draw, or two JSON files"), (["a.json", "c.json"], "No such file"), ([folder / "table.md", folder / "table.md"], "neither a file that")):
        assert said in call("eval.py", "--compare", *(tmp_path / w for w in wrong), check=False).stderr
    assert (tmp_path / "a.json").read_text().startswith("{")


def stored(folder):
    """All embeddings that a run kept, by their key."""
    size = 16 + 4 * 128
    raws = [path.read_bytes() for path in sorted(Path(folder).glob("embeddings/*/*.bin"))]
    return {raw[a : a + 16]: raw[a + 16 : a + size] for raw in raws for a in range(0, len(raw) - size + 1, size)}


def test_a_stopped_run_goes_on_and_two_ranks_equal_one_bit_for_bit(mmeb, small, tmp_path, monkeypatch):
    flags = ["--data", mmeb.root, "--ckpt", small, "--task", "MomentSeeker,QVHighlight,image_gd,vidore_v2", "--skip_bad", "--batch_size", "3"]
    run("eval.py", *flags, "--scores", tmp_path / "one", "--json", tmp_path / "one.json")
    run_ranks(2, "eval.py", *flags, "--scores", tmp_path / "two", "--json", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["tasks"] for n in ("one", "two"))
    timeless = lambda tasks: {t: {k: v for k, v in r.items() if k not in ("seconds", "queries_per_s", "items_encoded")} for t, r in tasks.items()}
    assert timeless(one) == timeless(two) and stored(tmp_path / "one") == stored(tmp_path / "two") and len(stored(tmp_path / "one")) > 60
    assert {path.name[0] for path in (tmp_path / "two").glob("embeddings/*/*.bin")} == {"0", "1"}

    encoding, windows = Plume.encoding, []

    def stopping(self, *args, **kw):
        for window in encoding(self, *args, **kw):
            windows.append(window)
            yield window
            if len(windows) == 6:
                raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Plume, "encoding", stopping)
        done = call("eval.py", *flags, "--scores", tmp_path / "stopped", check=False)
    assert "interrupted after" in done.stderr and "the same command goes on" in done.stderr
    (path,) = (tmp_path / "stopped").glob("embeddings/*/*.bin")
    with open(path, "ab") as f:
        f.write(b"half a record")
    kept = len(stored(tmp_path / "stopped"))
    done = call("eval.py", *flags, "--scores", tmp_path / "stopped", "--json", tmp_path / "stopped.json")
    assert f"{kept} known from before" in done.stdout and kept > 10
    here = timeless(json.loads((tmp_path / "stopped.json").read_text())["tasks"])
    assert {t: r["ranks"] for t, r in here.items()} == {t: r["ranks"] for t, r in one.items()}
    call("eval.py", *flags, "--scores", tmp_path / "whole", "--json", tmp_path / "whole.json")
    assert here == timeless(json.loads((tmp_path / "whole.json").read_text())["tasks"]) and stored(tmp_path / "stopped") == stored(tmp_path / "whole")


def test_embeddings_of_another_checkpoint_mode_or_setting_are_never_used(small, world, tmp_path, monkeypatch):
    model = Plume.from_pretrained(small)
    cfg = evaluation.Config()
    run_hash = lambda m, c=cfg, mode="latent", steps=8: evaluation.Embedder(m, c, mode, steps).run_hash
    runs = [run_hash(model), run_hash(model, steps=4), run_hash(model, cfg, "single", None), run_hash(model, evaluation.Config(protocol="released"))]
    with torch.no_grad():
        model.adapter.state_dict()["ln.bias"][3] += 1e-6
    runs.append(run_hash(model))
    runs.append(run_hash(Plume.from_pretrained(small, limits=dict(max_pixels=784))))
    runs.append(run_hash(Plume.from_pretrained(small, dtype="bfloat16")))
    for key, value in (("rope_theta", 1e6), ("rms_norm_eps", 0.01)):  # what is in no weight
        shutil.copytree(small, tmp_path / key)
        config = json.loads((small / "config.json").read_text())
        text = config["text_config"]
        (text["rope_parameters"] if key == "rope_theta" else text)[key] = value
        (tmp_path / key / "config.json").write_text(json.dumps(config))
        runs.append(run_hash(Plume.from_pretrained(tmp_path / key)))
    with monkeypatch.context() as m:
        m.setattr(evaluation.inspect, "getsource", lambda module: "another source")
        runs.append(run_hash(Plume.from_pretrained(small)))
    assert len(set(runs)) == len(runs) and run_hash(Plume.from_pretrained(small)) == runs[0]
    weigh = evaluation.Embedder(model, cfg, "latent", 8).weigh
    items = mixed_items(world) + ["red ", dict(image=str(world / "red bar.png"), text="x"), dict(video=[str(world / "red bar.png")])]
    keys = [weigh(parse_item(i))[0] for i in items]
    assert len(set(keys)) == len(keys)
    shutil.copy(world / "red bar.png", world / "again.png")
    assert weigh(parse_item(dict(image=str(world / "again.png"))))[0] == weigh(parse_item(dict(image=str(world / "red bar.png"))))[0]
    tokens = [len(model.processor.render(parse_item(i))["ids"]) - weigh(parse_item(i))[1] for i in items]
    tokens.pop(4)  # a video file: only decoding would tell
    assert max(tokens) - min(tokens) < 8  # all but the prompt around an item


def test_ranks_get_equal_cost_and_batches_do_not_depend_on_them(small, world):
    embedder = evaluation.Embedder(Plume.from_pretrained(small), evaluation.Config(batch_size=2), "latent", 8)
    sides = [parse_item("red " * n) for n in range(1, 40)] + [parse_item(dict(image=str(world / "red bar.png"), text=str(n))) for n in range(10)]
    weights = [embedder.weigh(s) for s in sides]
    (alone,) = embedder.plan(sides, weights)
    embedder.planned, embedder.world = set(), 3
    shares = embedder.plan(sides, weights)
    pairs = lambda share: {frozenset(k for k, _ in share[a : a + 2]) for a in range(0, len(share), 2)}
    assert pairs(alone) == set().union(*map(pairs, shares)) and sum(map(len, shares)) == len(alone) == len(sides)
    size = lambda module: sum(p.numel() for p in module.parameters())
    patch = size(embedder.model.backbone.model.visual) / size(embedder.model.lm.layers)
    cost = {key: (tokens, patch * patches) for key, tokens, patches in weights}
    loads = [sum(2 * cost[share[a][0]][0] for a in range(0, len(share), 2)) + sum(cost[k][1] for k, _ in share) for share in shares]
    assert max(loads) < 1.1 * min(loads) and len({len(share) for share in shares}) > 1  # equal cost, not equal rows


def test_both_spellings_of_the_published_folders_are_read(mmeb, counts, tmp_path):
    metas = ["image_cls", "image_gd", "video_cls", "video_ret", "video_mret", "ActivityNetQA", "vidore_v2", "visrag", "visdoc_ood"]
    other = Miniature(tmp_path, metas, other=True)
    content = lambda sides: [[(k, [Path(f).read_bytes() for f in ([v] if isinstance(v, str) else v)] if k in ("image", "video") else v) for k, v in s.parts] for s in sides]
    for name in other.expected:
        a, b = (data.read_published(str(m.root), name) for m in (mmeb, other))
        assert content(a.queries) == content(b.queries) and content(a.corpus) == content(b.corpus), name
        assert (a.relevant, a.candidates, a.query_ids) == (b.relevant, b.candidates, b.query_ids), name
    assert not (tmp_path / "visdoc-tasks" / "extracted").exists() and (mmeb.root / "visdoc-tasks" / "extracted").exists()


def test_versions_are_told_apart_and_another_count_is_an_error(mmeb, counts, tmp_path, monkeypatch):
    Miniature(tmp_path, ["ViDoSeek-page", "MomentSeeker"])
    assert data.read_published(str(tmp_path), "ViDoSeek-page").about["version"] == "fixed"
    (tmp_path / "rows/VLM2Vec/ViDoSeek-page-fixed").rename(tmp_path / "rows/VLM2Vec/ViDoSeek-page")
    monkeypatch.setitem(data.MMEB, "ViDoSeek-page", replace(data.MMEB["ViDoSeek-page"], versions={"VLM2Vec/ViDoSeek-page-fixed": ("fixed", 4), "VLM2Vec/ViDoSeek-page": ("original", 4)}))
    assert data.read_published(str(tmp_path), "ViDoSeek-page").about["version"] == "original"
    assert "\nhf download VLM2Vec/ViDoSeek-page-fixed --repo-type dataset" in call("eval.py", "--data", tmp_path, "--check", "--task", "ViDoSeek-page").stdout
    for count, version in ((13, "original"), (4, "fixed"), (5, "unknown")):
        path = tmp_path / "rows/VLM2Vec/MomentSeeker/test.jsonl"
        rows = (mmeb.root / "rows/VLM2Vec/MomentSeeker/test.jsonl").read_text().splitlines()
        for clips in (mmeb.root / "video-tasks/frames/video_mret/MomentSeeker").iterdir():
            shutil.copytree(clips, tmp_path / "video-tasks/frames/video_mret/MomentSeeker" / clips.name, dirs_exist_ok=True) if clips.is_dir() else None
        path.write_text("\n".join((rows * 4)[:count]) + "\n")
        if version == "unknown":
            with pytest.raises(DataError, match="5 queries, 4 are published: an unknown version"):
                data.read_published(str(tmp_path), "MomentSeeker")
        task = data.read_published(str(tmp_path), "MomentSeeker", skip_bad=True)
        assert task.about["version"] == version and len(task.bad) == (version == "unknown") and len(task.queries) == count


def test_what_is_missing_or_broken_is_named_and_with_skip_bad_marks_the_score_as_partial(small, counts, tmp_path):
    mini = Miniature(tmp_path / "mmeb", ["ImageNet-1K", "MSCOCO_t2i", "MSVD", "ViDoRe_docvqa", "K700"])
    root = mini.root
    check = lambda *flags: call("eval.py", "--data", root, "--check", *flags, check=False)
    done = check("--task", ",".join(mini.expected))
    assert "5 of 5 tasks" in done.stdout and not done.returncode and not (root / "visdoc-tasks").exists()  # nothing is taken out of the rows
    for change, task, said in (
            (lambda: (root / "image-tasks/ImageNet-1K/Test/red circle.jpg").unlink(), "ImageNet-1K", ["test-00000-of-00002.parquet: row 2", "red circle.jpg"]),
            (lambda: shutil.rmtree(root / "video-tasks/frames/video_ret/MSVD/v2"), "MSVD", ["test-00001-of-00002.parquet: row 1", "'v2' is not in"]),
            (lambda: (root / "classes/K700.txt").unlink(), "K700", ["classes/K700.txt", "video_classification_utils.py"]),
            (lambda: mini.rows("vidore/docvqa_test_subsampled_beir", "qrels", "test", [{"query-id": 0, "corpus-id": f"doc/{q}", "score": 1} for q in range(3)]),
             "ViDoRe_docvqa", ["queries", "row 2", "no right candidate"]),
            (lambda: shutil.rmtree(root / "rows/vidore"), "ViDoRe_docvqa", ["hf download vidore/docvqa_test_subsampled_beir --repo-type dataset --include"])):
        change()
        done = check("--task", task)
        assert done.returncode == 1 and "0 of 1 tasks" in done.stdout and all(s in done.stdout for s in (task, *said)), done.stdout
        done = call("eval.py", "--data", root, "--task", task, "--ckpt", small, check=False)
        assert done.returncode and "1 of 1 tasks have problems" in done.stderr and said[-1] in done.stderr
        with pytest.raises(DataError, match=re.escape(said[-1])):
            data.read_published(str(root), task)
    # a picture of which only the beginning is there is found when it is decoded
    path = root / "image-tasks/MSCOCO_t2i/Test/red square.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    flags = ["--data", root, "--ckpt", small, "--scores", tmp_path / "scores", "--task"]
    done = call("eval.py", *flags, "MSCOCO_t2i", check=False)
    assert "red square.jpg" in done.stderr and "image_ret/MSCOCO_t2i" not in done.stdout
    done = call("eval.py", *flags, "MSCOCO_t2i,ImageNet-1K,MSVD", "--skip_bad")
    (folder,) = (tmp_path / "scores").glob("*-latent8-*")
    scores = {n: json.loads((folder / f"{n}_score.json").read_text()) for n in ("image_ret/MSCOCO_t2i", "image_cls/ImageNet-1K", "video_ret/MSVD")}
    assert all(s["partial"] for s in scores.values()) and "partial: " in done.stdout and "*" in done.stdout
    assert [s["queries"] for s in scores.values()] == [3, 3, 3]  # its right candidate is broken, its picture, its clip missing
    assert [len(s["bad"]) for s in scores.values()] == [2, 1, 2] and "red square.jpg" in scores["image_ret/MSCOCO_t2i"]["bad"][0]
    assert scores["video_ret/MSVD"]["candidates"] == 3
    # a task of which nothing is there does not take the others with it, and what was scored before stays in the table
    done = call("eval.py", *flags, "K700,ViDoRe_docvqa,MSVD", "--skip_bad", "--json", tmp_path / "rest.json")
    rest = json.loads((tmp_path / "rest.json").read_text())
    assert [*rest["tasks"]] == ["video_ret/MSVD"] and [*rest["left_out"]] == ["video_cls/K700", "vidore_v1/ViDoRe_docvqa"] and "left out: " in done.stdout
    assert "1 tasks of this command and 2 that were scored before" in done.stdout
    board = json.loads((folder / "leaderboard.json").read_text())
    assert [*board["metrics"]["image"]] == ["ImageNet-1K", "MSCOCO_t2i"] and len(board["metadata"]["incomplete"]) == 78
    for broken in ("MSCOCO_t2i/Test/red bar", "MSCOCO_t2i/Test/black square"):  # the first query is left with its right candidate alone
        (root / f"image-tasks/{broken}.jpg").write_bytes(b"")
    (root / "image-tasks/MSCOCO_t2i/Test/red square.jpg").write_bytes((root / "image-tasks/MSCOCO_t2i/Test/red circle.jpg").read_bytes())
    lonely = [n for n in (mini.names[3 * k % 12] for k in range(4)) if n not in ("red square", "red bar", "black square")]
    for n in lonely:
        (root / f"image-tasks/MSCOCO_t2i/Test/{n}.jpg").write_bytes(b"")
    call("eval.py", *flags, "MSCOCO_t2i", "--skip_bad")
    score = json.loads((folder / "image_ret/MSCOCO_t2i_score.json").read_text())
    assert any("only the right candidate is left" in why for why in score["bad"]) and all(f"{n}.jpg" in str(score["bad"]) for n in lonely)
    (root / "rows" / ROWS / "MSCOCO_t2i/test-00000-of-00002.parquet").write_bytes(b"PAR1 no PAR1")
    done = check("--task", "MSCOCO_t2i,MSVD")
    assert "test-00000-of-00002.parquet: not a readable .parquet" in done.stdout and "video_ret/MSVD" in done.stdout
    done = call("eval.py", *flags, "K700", "--skip_bad", check=False)
    assert "no task is left" in done.stderr and "classes/K700.txt" in done.stderr


def edit(mini, hub, config, split, change):
    """Rewrite the rows of a part of a hub repository."""
    old = [dict(row) for row in data.rows_of(str(mini.root / "rows" / hub), config, split)]
    mini.rows(hub, config, split, change(old))


DOCS, ROWS = ("ViDoRe_docvqa", "vidore/docvqa_test_subsampled_beir"), "ziyjiang/MMEB_Test_Instruct"
first = lambda **kw: lambda rows: [dict(rows[0], **kw), *rows[1:]]


@pytest.mark.parametrize("name, hub, config, change, said", [
    (*DOCS, "corpus", lambda rows: [dict(r, **{"corpus-id": "doc/0"}) for r in rows], ["'doc/0' stands there twice", "row 2"]),
    (*DOCS, "corpus", lambda rows: [dict(r, image="x.png") for r in rows], ["doc_0.png' is not in", "row 1"]),
    (*DOCS, "corpus", first(**{"corpus-id": "doc_1"}), ["'doc_1' and 'doc/1' have one file name", "row "]),
    (*DOCS, "queries", lambda rows: [dict(r, **{"query-id": 0}) for r in rows], ["'0' stands there twice", "row 2"]),
    (*DOCS, "queries", lambda rows: [dict(querry="x", **{"query-id": r["query-id"]}) for r in rows], ["no column 'query'. Did you mean 'querry'?", "row 1"]),
    (*DOCS, "queries", first(query=None), ["needs a text, got None", "row 1"]),
    (*DOCS, "qrels", lambda rows: [{k: v for k, v in r.items() if k != "score"} for r in rows], ["no column 'score'", "row 1"]),
    (*DOCS, "qrels", lambda rows: [dict(r, score=str(r["score"])) for r in rows], ["'score' must be a number", "row 1"]),
    (*DOCS, "qrels", lambda rows: [*rows, {"query-id": 1, "corpus-id": "doc/77", "score": 1}], ["'doc/77' is none of the candidates", "row 2"]),
    ("ImageNet-1K", ROWS, "ImageNet-1K", first(qry_img_path=""), ["'' is not in", "row 1"]),
    ("ImageNet-1K", ROWS, "ImageNet-1K", lambda rows: [dict(r, tgt_text=r["tgt_text"][0]) for r in rows], ["'tgt_text' must be a list of texts", "row 1"]),
    ("ImageNet-1K", ROWS, "ImageNet-1K", first(tgt_text=["red bar"]), ["a query with one candidate", "row 1"]),
    ("MSCOCO", ROWS, "MSCOCO", first(tgt_img_path=["MSCOCO/Test/red bar.jpg"] * 3, tgt_text=["x"] * 4), ["ValueError", "row 1"]),
    ("SmthSmthV2", "VLM2Vec/SmthSmthV2", "", first(pos_text="blue bar"), ["'blue bar' is none of the candidates", "row 1"]),
    ("Video-MME", "VLM2Vec/Video-MME", "", first(answer="E"), ["ValueError", "row 1"])])
def test_a_row_that_cannot_be_right_is_named(counts, tmp_path, name, hub, config, change, said):
    mini = Miniature(tmp_path, [name])
    edit(mini, hub, config, "test", change)
    with pytest.raises(DataError) as error:
        data.read_published(str(tmp_path), name)
    assert all(s in str(error.value) for s in said) and str(tmp_path) in str(error.value) and str(error.value).count(": row ") == 1, error.value


def test_oddities_of_rows_that_are_right(counts, tmp_path):
    mini = Miniature(tmp_path / ".hidden", ["ImageNet-1K", "MomentSeeker", "Video-MME", "ViDoSeek-page"])
    root = mini.root
    edit(mini, ROWS, "ImageNet-1K", "test", first(qry_text=None))
    task = data.read_published(str(root), "ImageNet-1K")
    assert task.queries[0].parts[-1] == ("text", f"{INST} for ImageNet-1K.") == task.queries[1].parts[-1]
    clips = [f"video_frames/clips_0_{k}" for k in range(4)]  # the newer layout names the folder of frames
    entries = lambda paths: [dict(output_path="gone.mp4", frame_path=p) for p in paths]
    rows = [json.loads(line) for line in (root / "rows/VLM2Vec/MomentSeeker/test.jsonl").read_text().splitlines()]
    rows[0] |= dict(positive_frames=entries(clips[:2]), negative_frames=entries(clips[2:]))
    before = data.read_published(str(root), "MomentSeeker")
    mini.rows("VLM2Vec/MomentSeeker", "", "test", rows, "json")
    assert [s.parts for s in data.read_published(str(root), "MomentSeeker").corpus] == [s.parts for s in before.corpus]
    edit(mini, "VLM2Vec/Video-MME", "", "test", first(options=["A.cats", "B.dogs", "C. a pet.", "D. a pet"]))  # no blank behind the dot; equal texts
    task = data.read_published(str(root), "Video-MME")
    assert [task.corpus[row].parts for row in task.candidates[0]] == [[("text", text)] for text in ("s", "s", "a pet", "a pet")]  # as VLM2Vec cuts them
    (root / "visdoc-tasks/images/ViDoSeek-page").mkdir(parents=True)  # of an archive of who knows which version
    picture("red", "bar").save(root / "visdoc-tasks/images/ViDoSeek-page/doc_1.png")
    assert "extracted" in data.read_published(str(root), "ViDoSeek-page").corpus[1].parts[0][1]
    frames = root / "video-tasks/frames/video_mret/MomentSeeker/video_frames/clips_0_0"
    (frames / "._frame_1.jpg").write_bytes(b"what a Mac puts into archives")
    (root / "video-tasks/video_mret/MomentSeeker/frames/video_frames").mkdir(parents=True)
    frames.rename(root / "video-tasks/video_mret/MomentSeeker/frames/video_frames/clips_0_0")
    frames.mkdir()  # an empty folder does not hide the full one
    assert len(data.read_published(str(root), "MomentSeeker").corpus[0].parts[0][1]) == 8
    (root / "rows/VLM2Vec/ViDoSeek-page-fixed/.cache/huggingface/download").mkdir(parents=True)  # as `hf download` leaves it
    (root / "rows/VLM2Vec/ViDoSeek-page-fixed/.cache/huggingface/download/x.metadata").write_text("0123abcd\netag\n1.0\n")
    task = data.read_published(str(root), "ViDoSeek-page")
    assert task.about["revision"] == "0123abcd" and "ViDoSeek-page-fixed/0123abcd/" in task.corpus[1].parts[0][1]
    parts = root / "rows/VLM2Vec/ViDoSeek-page-fixed/qrels"
    judged = [dict(row) for row in data.rows_of(str(parts.parent), "qrels", "test")]
    shutil.rmtree(parts)
    parts.mkdir()
    (parts / "eval-qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join("\t".join(map(str, row.values())) + "\n" for row in judged))
    assert data.read_published(str(root), "ViDoSeek-page").relevant == task.relevant


def test_rows_are_read_as_vlm2vec_reads_them(counts, tmp_path):
    """Each case is what VLM2Vec's own reader makes of the row, less the visual token and what stands at both ends."""
    mini = Miniature(tmp_path, ["DocVQA", "CIRR", "RefCOCO", "VisDial", "WebQA", "MSVD", "MVBench", "Video-MME", "EgoSchema", "ViDoRe_docvqa"])
    read = lambda name, **kw: data.read_published(str(tmp_path), name, **kw)
    words = lambda side: side.parts[-1][1]
    # (a) blanks in front of a line break go beside a picture only; (b) the instruction is stripped before it is joined
    for name in ("DocVQA", "CIRR"):
        edit(mini, ROWS, name, "test", first(qry_inst="<|image_1|>\n Look \n", qry_text="what \nis it \n here?"))
        assert words(read(name).queries[0]) == "Look what\nis it\n here?"
    edit(mini, ROWS, "VisDial", "test", first(qry_inst=" Find it: ", qry_text="Q \nA \nQ", tgt_inst="<|image_1|>\nRepresent \nit."))
    task = read("VisDial")
    assert words(task.queries[0]) == "Find it: Q \nA \nQ" and words(task.corpus[0]) == "Represent\nit."
    edit(mini, ROWS, "WebQA", "test", first(tgt_inst="<|image_1|>\nWith: ", tgt_text=["a \nb", "", "c", "d"]))
    assert [words(side) for side in read("WebQA").corpus[:4]] == ["With:  a\nb", "With:", "With:  c", "With:  d"]
    edit(mini, "VLM2Vec/MSVD", "", "test", first(caption=["a man \nruns", "no"]))
    assert words(read("MSVD").queries[0]) == f"{CLIP_QUERIES['MSVD']} a man \nruns"
    edit(mini, "VLM2Vec/Video-MME", "", "test", first(question=" When? \nNow", options=["A. x y. ", "B", "C: no", "D. z. w."]))
    task = read("Video-MME")
    assert words(task.queries[0]) == f"{CHOOSE}  When? \nNow\nA. x y. \nB\nC: no\nD. z. w."
    # (c) of an option without ". " only the last character is left
    assert [words(task.corpus[row]) for row in task.candidates[0]] == ["x y", "B", "o", "z. w"]
    edit(mini, "VLM2Vec/EgoSchema", "Subset", "test", first(option=["A.one", "B. two", "C) three.", "", "E. . five .."]))
    assert [words(side) for side in (lambda t: [t.corpus[row] for row in t.candidates[0]])(read("EgoSchema"))] == ["e", "two", "", "", "five"]
    # (d) pairs are named by path and caption, whether or not the first caption is blank
    path = "RefCOCO/Test/red square.jpg"
    edit(mini, ROWS, "RefCOCO", "test", first(tgt_img_path=[path] * 4, tgt_text=["", "left", '"left"', " "], tgt_inst="<|image_1|>\nIt."))
    task = read("RefCOCO")
    assert len(set(task.candidates[0])) == 3 and {words(task.corpus[row]) for row in task.candidates[0]} == {"It."}
    # (e) of equal options the last is right
    folder = tmp_path / "rows/VLM2Vec/MVBench/json/action_sequence.json"
    (row,) = json.loads(folder.read_text())
    folder.write_text(json.dumps([row | dict(candidates=["cat", "dog", "cat", "cow"], answer="cat")]))
    task = read("MVBench")
    i = next(i for i, side in enumerate(task.queries) if "(C) cat" in words(side))
    assert [words(task.corpus[row]) for row in task.relevant[i]] == ["(C) cat"]
    folder.write_text(json.dumps([row | dict(candidates=["cat", "dog"], answer="cow")]))
    with pytest.raises(DataError, match="the answer 'cow' is none of the candidates"):
        read("MVBench")
    # (f) ids in a .tsv are texts; what is a number and nothing else stays one
    judged = tmp_path / "rows/vidore/docvqa_test_subsampled_beir/qrels"
    shutil.rmtree(judged)
    judged.mkdir()
    (judged / "test.tsv").write_text("query-id\tcorpus-id\tscore\n007\t0010\t1\n7\t-3\t0\n1e3\t+5\t2\n")
    rows = [dict(row) for row in data.rows_of(str(judged.parent), "qrels", "test")]
    assert [(r["query-id"], r["corpus-id"], r["score"]) for r in rows] == [("007", "0010", 1), (7, -3, 0), ("1e3", "+5", 2)]
    # the released collator strips what it is given
    edit(mini, ROWS, "DocVQA", "test", first(tgt_text=[" a ", "b", "c", "d"]))
    texts = [[words(t.corpus[row]) for row in t.candidates[0]] for t in (read("DocVQA"), read("DocVQA", released=True))]
    assert texts == [[" a ", "b", "c", "d"], ["a", "b", "c", "d"]]


def test_only_the_first_1000_rows_of_ssv2_count_and_parquet_without_pyarrow_says_what_to_install(counts, tmp_path, monkeypatch):
    mini = Miniature(tmp_path, ["SmthSmthV2"])
    monkeypatch.setitem(data.MMEB, "SmthSmthV2", replace(data.MMEB["SmthSmthV2"], queries=1000))
    edit(mini, "VLM2Vec/SmthSmthV2", "", "test", lambda rows: rows * 300)
    assert len(data.read_published(str(tmp_path), "SmthSmthV2").queries) == 1000
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.delattr(sys.modules["pyarrow"], "parquet", raising=False)
    with pytest.raises(DataError, match="pip install pyarrow"):
        data.read_published(str(tmp_path), "SmthSmthV2")


def test_files_of_a_subset_and_split_are_found_as_the_hub_names_them(tmp_path):
    def names(files, subset, split, readme=""):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        for f in files:
            (tmp_path / "d" / f).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / f).write_text("{}")
        (tmp_path / "d/README.md").write_text(readme)
        return data.row_files(str(tmp_path / "d"), subset, split)

    assert names(["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], "", "test") == ["data/test-00000-of-00001.parquet"]
    assert names(["MC/test-00000-of-00001.parquet", "OE/test-00000-of-00001.parquet"], "MC", "test") == ["MC/test-00000-of-00001.parquet"]
    assert names(["queries/test.jsonl", "corpus/test.jsonl", ".cache/x/test.jsonl"], "queries", "test") == ["queries/test.jsonl"]
    assert names(["json/action_count.json", "json/moving_count.json"], "action_count", "train") == ["json/action_count.json"]
    assert names(["latest.parquet"], "", "test") == ["latest.parquet"] and names(["train.jsonl"], "", "test") == []
    assert names(["data/validation-0.parquet"], "", "val") == ["data/validation-0.parquet"]
    card = "---\nconfigs:\n- config_name: test_1k\n  data_files:\n  - split: test\n    path: x/1k*.json\n- config_name: test_3k\n  data_files: x/3k.json\n---\n"
    assert names(["x/1k_a.json", "x/3k.json"], "test_1k", "test", card) == ["x/1k_a.json"] and names(["x/1k_a.json", "x/3k.json"], "test_3k", "test", card) == ["x/3k.json"]
    assert names(["RefCOCO.parquet", "RefCOCO-Matching.parquet"], "RefCOCO", "test") == ["RefCOCO.parquet"]
    assert names(["test-00000-of-00001-0a1b.parquet", "x.json"], "", "test") == ["test-00000-of-00001-0a1b.parquet"]
    assert names(["rows/a.json"], "", "test", "---\nconfigs:\n- config_name: default\n  data_files: ./rows\n---\n") == ["rows/a.json"]
    assert names(["a.json"], "", "test", "---\nconfigs:\n- config_name: default\n  data_files:\n    path: a.json\n---\n") == ["a.json"]
    with pytest.raises(DataError, match="no .parquet, .jsonl, .json or .tsv file of subset 'q', split 'test'"):
        list(data.rows_of(str(tmp_path / "d"), "q", "test"))
    with pytest.raises(DataError, match="test-...-of-00003.parquet: 2 of 3 files are there"):
        names([f"test-0000{n}-of-00003.parquet" for n in (0, 2)], "", "test")
    for broken in ("---\nconfigs: [\n---\n", "---\nconfigs: 7\n---\n"):
        with pytest.raises(DataError, match="README.md: its 'configs' cannot be read"):
            names(["a.json"], "", "test", broken)


def test_the_released_protocol_is_the_released_evaluation_s_input(mmeb, counts, small, tmp_path):
    clean, released = (data.read_published(str(mmeb.root), "ViDoRe_docvqa", r) for r in (False, True))
    assert [s.parts for s in released.queries] == [[("text", f"a {n}")] for n in mmeb.names[:4]] and released.corpus[0].parts[-1] == ("text", "")
    assert clean.corpus[0].parts[-1] == ("text", PAGE_TARGET)
    kept = data.read_published(str(mmeb.root), "VisRAG_PlotQA", True)
    assert kept.corpus[0].parts[-1] == ("text", PAGE_TARGET)  # not of VisRAG's
    clips = [len(data.read_published(str(mmeb.root), "MomentSeeker", r).corpus[0].parts[0][1]) for r in (False, True)]
    assert clips == [8, 9]
    call("eval.py", "--data", mmeb.root, "--ckpt", small, "--task", "MSVD", "--protocol", "released", "--scores", tmp_path, "--json", tmp_path / "r.json")
    r = json.loads((tmp_path / "r.json").read_text())["tasks"]["video_ret/MSVD"]
    assert r["protocol"] == "released" and len([*tmp_path.glob("*-latent8-released-*/video_ret/MSVD_score.json")]) == 1
    model = Plume.from_pretrained(small, latent_positions="cache", white_image=True, prompt=plume_model.RELEASED_PROMPT,
                                  limits=dict(min_pixels=784, max_pixels=2359296, max_len=11288, num_frames=64))
    assert abs(r["hit@1"] - score_by_hand(model, *mmeb.expected["MSVD"], "hit@1")) < 1e-9


def test_task_names_of_every_kind():
    names = [t.full_name for t in data.MMEB.values()]
    pick = lambda wanted: [n.split("/")[1] for n in evaluation.select(names, wanted, "x")]
    assert len(pick("image")) == 36 and len(pick("visdoc")) == 24 and len(pick("video,visdoc")) == 42 and len(pick("all")) == 78
    assert pick("video_mret") == ["QVHighlight", "Charades-STA", "MomentSeeker"] and pick("MSVD") == ["MSVD"] == pick("video_ret/MSVD")
    with pytest.raises(DataError, match="Did you mean 'MSR-VTT'"):
        pick("MSRVTT")


def test_graded_ndcg_by_hand():
    """Two documents of gain 2 and 1 at ranks 3 and 1, the best order first: (1 + 2 / 2) / (2 + 1 / log2(3))."""
    assert abs(evaluation.ndcg([(2, 3), (1, 1)], 5, [2, 1]) - 2 / (2 + 1 / math.log2(3))) < 1e-12
    q, c = torch.eye(3)[:1], torch.tensor([[0.6, 0.8, 0], [0.6, 0, 0.8], [0.6, -0.8, 0], [0, 1, 0.0]])  # the first three tie
    task = data.Task("t", ["q"], list("abcd"), [{0: 2, 2: 1}], [None], ["q"], "ndcg@5")
    tie = evaluation.evaluate(task, (q, c))  # the wrong one goes first, then the lesser of the right ones
    assert abs(tie["ndcg@5"] - (1 / math.log2(3) + 2 / 2) / (2 + 1 / math.log2(3))) < 1e-12 and tie["hit@1"] == 0


def test_the_interval_is_that_of_the_task_s_own_metric_over_its_queries():
    """40 hits of 100: by the normal approximation 0.4 +- 1.96 sqrt(0.4 * 0.6 / 100)."""
    relevant = [{0: 1} if i < 40 else {1: 1} for i in range(100)]
    task = data.Task("t", ["q"] * 100, ["a", "b"], relevant, [None] * 100, [str(i) for i in range(100)])
    result = evaluation.evaluate(task, (torch.eye(2)[:1].expand(100, 2), torch.eye(2)))
    assert result["hit@1"] == 0.4 and all(abs(got - want) < 0.015 for got, want in zip(result["interval"], (0.304, 0.496)))
    graded = evaluation.evaluate(replace(task, metric="ndcg@5"), (torch.eye(2)[:1].expand(100, 2), torch.eye(2)))
    assert abs(np.mean(graded["interval"]) - graded["ndcg@5"]) < 0.01 and graded["interval"][0] > result["interval"][1]


# ---------------------------------------------------------------------------------------------------------- turtle world


def test_turtle_world_moves_as_a_second_implementation_and_keeps_its_test_programs_apart():
    train_world, test_world = data.World(), data.World("test")
    assert not set(train_world.programs) & set(test_world.programs) and len(set(test_world.programs)) == 400
    assert set(train_world.target) == set(range(64)) and len(train_world) == 7 * (3**8 - 400)
    for i in (0, 7000, 30000):
        query, target = train_world[i]
        begin, turns_ = data.STATES[train_world.starts[i]], data.moves(train_world.programs[i])
        place, heading, passed = complex(begin[0], begin[1]), -1j * 1j ** begin[2], []  # complex numbers: up is -i
        for turn in turns_:
            heading *= {"left": -1j, "right": 1j, "forward": 1}[turn]
            place += heading if turn == "forward" else 0
            place = complex(place.real % 4, place.imag % 4)
            passed.append(f" {'abcd'[int(place.real)]}{'wxyz'[int(place.imag)]}{'NESW'[[-1j, 1, 1j, -1].index(heading)]}")
        assert query.rationale == "".join(passed) and query.answer == target.answer == passed[-1]
    other = data.World("train", "video_ret,image_qa")
    assert other.names == ["video_ret", "image_qa"] and len(other) == 2 * (3**8 - 400)
    with pytest.raises(DataError, match="Did you mean 'image_qa'"):
        data.World("train", "image_q")


def test_turtle_world_is_the_same_for_every_number_of_workers_and_another_for_every_seed():
    def draw(workers, seed):
        pairs, curriculum = data.World(), Curriculum(8, 1, replay=0.3)
        processor = Plume.random(pairs.texts()).processor  # a tokenizer of its own for each run, as training has
        sampler = StepSampler(Schedule(pairs.dataset, pairs.names, 4, 30, seed), Progress(curriculum, 30, seed))
        loader = torch.utils.data.DataLoader(Batches(pairs, processor, curriculum), batch_size=None, sampler=sampler, num_workers=workers)
        return list(map(whole, loader))

    alone, same = draw(0, 5), lambda a, b: all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())
    assert len({b["dataset"] for b in alone}) == 7 and len({b["stage"] for b in alone}) > 5
    for workers in (1, 3):
        assert all(same(a, b) for a, b in zip(alone, draw(workers, 5), strict=True)), workers
    assert not any(same(a, b) for a, b in zip(alone, draw(0, 6), strict=True) if a["dataset"] == b["dataset"])


def test_every_family_of_turtle_world_shows_what_it_names():
    world_ = data.World()
    for d, (name, (program, start, shown)) in enumerate(data.FAMILIES.items()):
        query, target = world_[int(np.flatnonzero(world_.dataset == d)[5])]
        kinds = [k for k, _ in query.parts]
        assert ("video" in kinds) == (program == "frames") and kinds.count("image") == (program in ("tiles", "page")) + (start == "board")
        assert [k for k, _ in target.parts] == [{"text": "text", "board": "image", "clip": "video"}[shown]]
        said = "".join(v for k, v in query.parts if k == "text").split()
        assert len(said) == 8 * (program == "words") + (start == "words")
    boards = {data.draw_board(s).tobytes() for s in data.STATES}
    assert len(boards) == 64 and len({data.draw_tile(m).tobytes() for m in data.MOVES}) == len({data.draw_line(m).tobytes() for m in data.MOVES}) == 3
    tokenizer = data.train_tokenizer(world_.texts())
    assert all(len(tokenizer.tokenize(w)) == 1 for w in [*map(data.state_word, data.STATES), *(f" {m}" for m in data.MOVES)])


def test_hard_candidates_are_where_one_wrong_move_leads():
    tasks = data.world_tasks()
    assert len(tasks) == 9 and all(len(t.queries) == 400 and len(t.corpus) == 64 for t in tasks.values())
    hard, test_world = tasks["image_qa/turtle_hard"], data.World("test")
    first = 400 * test_world.names.index("image_qa")
    for i in (0, 399):
        words = data.moves(test_world.programs[first + i])
        ends = set()
        for k in range(8):
            for wrong in data.MOVES:
                number = sum(3**j * data.MOVES.index(w) for j, w in enumerate((*words[:k], wrong, *words[k + 1 :])))
                ends.add(data.STATES.index(data.walk(test_world.starts[first + i], number)[-1]))
        assert hard.candidates[i] == sorted(ends) and set(hard.relevant[i]) < ends  # the right program is among them


def test_contact_sheet_by_command_line(world, tmp_path):
    call("data.py", "--show", tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 900 and sheet.height > 700 and len(sheet.convert("RGB").getcolors(1 << 24)) > 20
    call("data.py", "--show", tmp_path / "pairs.png", "--data", world / "train.jsonl")
    texts = [json.dumps(record(qry=dict(conversations=turns("a")), pos=dict(conversations=turns("b"))))]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    run("data.py", "--show", tmp_path / "texts.png", "--data", tmp_path / "texts.jsonl")
    assert Image.open(tmp_path / "pairs.png").height < sheet.height
    for flags, why in (([], "--show sheet.png"), (["--shw", "x"], "Did you mean 'show'"), (["--show", tmp_path / "no" / "x.png"], "No such file")):
        failed = call("data.py", *flags, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr


def test_bench_counts_what_workers_make_ready(world):
    lines = run("data.py", "--bench", "--data", world / "train.jsonl", "--workers=1", "--count=30", "--max_pixels=7840").stdout.splitlines()
    read = {line.split()[0]: (float(line.split()[1].replace(",", "")), int(line.split("(")[1].split()[0])) for line in lines[1:]}
    assert read.keys() == {"pictures", "clips", "pairs"} and all(rate > 1 for rate, _ in read.values())
    assert [read[k][1] for k in ("pictures", "clips", "pairs")] == [12, 12, 24] and "1 workers" in lines[0]
    assert "at least 0 workers" in call("data.py", "--bench", "--count=1", check=False).stderr


def test_turtle_world_trains_evaluates_and_compares_without_any_data(tmp_path):
    missing = run("eval.py", check=False, cwd=tmp_path)
    assert missing.returncode == 1 and "python train.py" in missing.stderr
    run("train.py", "--out", tmp_path, "--steps", 6, *QUICK, "--segments=2", "--families=visdoc_ret,image_qa")
    base = ["eval.py", "--ckpt", tmp_path / "checkpoint"]
    assert re.search(r"visdoc_ret/turtle.*1\.6%\s+400\s+64", call(*base, "--task", "visdoc_ret", "--mode", "single").stdout)
    printed = call(*base, "--task", "image_qa", "--compare", tmp_path / "c.png", "--json", tmp_path / "c.json", "--limit", 12).stdout
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(r["mode"], r["steps"]) for r in rows] == [("single", None), ("latent", 0), ("latent", 1), ("latent", 2), ("cot", None)]
    assert [r["tokens"] for r in rows[:4]] == [0] * 4 and 0 < rows[4]["tokens"] <= 12 and all(r["ms"] > 0 for r in rows)
    assert "hard candidates" in printed and Image.open(tmp_path / "c.png").size == (1000, 620)
    call(*base, "--task", "image_qa", "--steps", 1, "--json", tmp_path / "one.json")
    scores = json.loads((tmp_path / "one.json").read_text())["tasks"]
    assert {t: r["hit@1"] for t, r in scores.items()} == rows[2]["hits"]
    for flags, why in ((["--compare", tmp_path / "c.png", "--steps", 2], "leave out"), (["--task", "image_qa,vidoe_ret"], "Did you mean 'video_ret'")):
        failed = call(*base, *flags, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr


def test_ablations_by_one_command_that_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "ABLATIONS", {"full": ({}, 61.6), "K = 4, single MLP": (dict(segments=4, adapter="mlp"), 59.2)})

    def forked(command, stdout, stderr, env):  # instead of a Python started anew
        assert command[0] == sys.executable and env["OMP_NUM_THREADS"] == "1" and stdout is stderr
        return Started(*command[1:])

    monkeypatch.setattr(train.subprocess, "Popen", forked)
    folder = lambda r: f"{'full' if r['setting'] == 'full' else 'K_4_single_MLP'}_{r['seed']}"
    file, flags = tmp_path / "a.json", ["--families=image_cls", "--steps=3", "--global_batch=4", f"--out={tmp_path}"]
    command = ["--ablations", str(file), "--seeds=2", *flags]
    assert train.main(command) == 0
    printed, first = capsys.readouterr().out, json.loads(file.read_text())
    assert first["config"]["families"] == "image_cls" and first["config"]["steps"] == 3 and first["settings"]["K = 4, single MLP"] == dict(segments=4, adapter="mlp")
    assert re.search(r"single MLP +\d+\.\d% .*59\.2", printed) and "4 runs" in printed
    assert {(r["setting"], r["seed"]) for r in first["runs"]} == {(n, s) for n in train.ABLATIONS for s in (0, 1)}
    for r in first["runs"]:  # each setting did what it says, with its own seed
        settings = json.loads((tmp_path / "ablations" / folder(r) / "checkpoint" / "config.json").read_text())["plume"]
        assert (settings["adapter"]["kind"], settings["latent_steps"]) == (("moe", 8) if r["setting"] == "full" else ("mlp", 4))
        assert list(r["hits"]) == ["image_cls/turtle"] and r["mean"] == r["hits"]["image_cls/turtle"]
    # stopped before the last results were written: of one run the checkpoint is there, of the other nothing
    *kept, known, lost = first["runs"]
    file.write_text(json.dumps(first | dict(runs=kept)))
    shutil.rmtree(tmp_path / "ablations" / folder(lost))
    assert train.main(command) == 0
    timeless = lambda runs: sorted((r["setting"], r["seed"], r["mean"]) for r in runs)
    assert timeless(json.loads(file.read_text())["runs"]) == timeless(first["runs"])
    with pytest.raises(DataError, match="another file, or the same flags"):
        train.main([*command, "--lr=1e-3"])
    for text in ("{", "[]", '{"runs": []}'):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(DataError, match="odd.json: not a file that --ablations writes"):
            train.main([*command, "--ablations", str(tmp_path / "odd.json")])
    for extra, why in ((["--data=x.jsonl"], "leave out --data"), (["--seeds=0"], "--seeds 0"), (["--ablations", str(tmp_path / "no" / "a.json")], "folder that exists"), (["--families=image_clss"], "Did you mean 'image_cls'"), (["--dry_run"], "leave out --dry_run")):
        with pytest.raises(DataError, match=why):
            train.main([*command, *extra])
