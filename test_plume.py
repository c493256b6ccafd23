"""What the method promises, as tests.  Read top to bottom: adapter, rollout, checkpoints, curriculum, prompt, losses, ranks,
one run by the command line.

    python -m pytest -q test_plume.py       python -m pytest runs those of tests/, tasks/ and tools/, too

Everything is made here: pictures, clips, records, a tiny model.  When ../shared/data is there, real files are used too.
"""

import contextlib
import functools
import importlib
import io
import json
import math
import multiprocessing.forkserver
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
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
from transformers import DynamicCache

import data
import latent
import model as plume_model
import train
from adapter import TransitionAdapter, balance_loss, from_released, to_released
from curriculum import Curriculum, Progress, Stage, segment
from data import Batches, DataError, Pairs, Processor, Side, collate, parse_item, to_device
from latent import Cache, Prefix, decoder, greedy, rollout
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


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a checkpoint in float32."""
    path = tmp_path_factory.mktemp("small") / "small"
    make_model().float().save_pretrained(path)
    return path


def mixed_items(world):
    return ["red", {"text": "what colour is the square in this long question about a picture?"}, {"image": str(world / "red bar.png")},
            {"text": "both", "image": [str(world / "blue bar.png"), picture("red", "circle", (140, 56))]},
            {"text": "a clip", "video": str(world / "green circle.mp4")}, {"text": "<video> then <image>", "image": picture("red", "bar"), "video": [picture("red", "bar")] * 3}]


def rendered(m, items, **kw):
    return [m.processor.render(parse_item(i), **kw) for i in items]

# --------------------------------------------------------------------------------------------------------------- adapter


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

# --------------------------------------------------------------------------------------------------------------- rollout


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

# ----------------------------------------------------------------------------------------------------------- checkpoints


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


def shard(folder):
    """The weights of a checkpoint in three files and an index."""
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    where = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return where


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

# ------------------------------------------------------------------------------------------------------------ curriculum


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

# ---------------------------------------------------------------------------------------------------------------- prompt


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

# --------------------------------------------------------------------------------------------------------------- records


def turns(text, reply="<think>Because. So.</think><answer>yes</answer>", who=("from", "value", "human", "gpt")):
    return [{who[0]: who[2], who[1]: text}, {who[0]: who[3], who[1]: reply}]


def record(**kw):
    return dict(dataset_name="d", qry=dict(conversations=turns("<image>\nwhat?"), image=["red bar.png"]), pos=dict(conversations=turns("yes"))) | kw

# ---------------------------------------------------------------------------------------------------------------- losses


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
    sys.argv, sys.path[0] = [script, *argv], str(HERE)
    if script.endswith(".py"):
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
    else:  # python -m
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Started:
    """A script that runs in a process and a session of its own, with what it has printed so far."""

    def __init__(self, script, *argv, cwd=HERE, out=None, **environment):
        self.out = out or os.path.join(tempfile.mkdtemp(), "printed")
        if str(script).endswith(".py"):  # otherwise the name of a module
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
            module = importlib.import_module(script.removesuffix(".py"))
            done.returncode = module.main([str(a) for a in argv]) or 0
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

# --------------------------------------------------------------------------------------------------------- command lines

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
