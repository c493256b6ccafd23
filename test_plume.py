"""What the method promises, as tests: read from top to bottom.

    python -m pytest -q test_plume.py                 this file: about a minute and a half on two cores
    python -m pytest -q -n 2 --dist worksteal         all tests, those of tests/, tasks/ and tools/ too

    adapter       the paper's formula, row by row
    rollout       transformers one by one, all families; neighbours; gradients; the released code's vectors
    curriculum    schedule, gate and replay; segments; the text of every stage
    prompt        the documented string; the text of users; records and items; what is too long
    losses        by hand
    checkpoints   saved and loaded, with a chat template of its own
    two ranks     the gradients of one big batch; the command line

Everything is made here: a tiny model below, pictures, clips and records by tests/samples.py.  Real files are
used too where there is a ../shared/data or ../shared/golden.  tests/processes.py starts scripts.  Other tests
take the model, the fixtures and these helpers from this file.
"""

import functools
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

import data
import train
from adapter import balance_loss, TransitionAdapter
from backbones.families import Limits
from backbones.reference import transformers_inputs
from backbones.shapes import SHAPES
from curriculum import Curriculum, Progress, segment, SENTENCE, Stage
from data import Batches, collate, Processor
from files.errors import DataError
from files.items import parse_item, parse_side, Side
from files.records import Pairs
from hub.layouts import from_released, to_released
from hub.settings import FORMAT, RELEASED_PROMPT
from latent import Cache, decoder, greedy, naive_rollout, Rollout, rollout, rotary
from model import Plume
from tasks.turtle import World
from tests.processes import run, run_ranks, torchrun
from tests.samples import make_world, NAMES, picture

HERE = Path(__file__).parent
SHARED, GOLDEN = HERE.parent / "shared" / "data", HERE.parent / "shared" / "golden"
FINAL = Stage(4, 8, True)  # the last stage of the default curriculum, while the answer is still written
FAMILIES = {  # shapes of tiny models
    "qwen2_vl": SHAPES["tiny"],
    "qwen2_5_vl": SHAPES["tiny"] | dict(backbone="qwen2_5_vl", vision=dict(  # windows of 2 x 2, then all
        depth=2, hidden_size=64, intermediate_size=96, out_hidden_size=128, num_heads=4, window_size=56,
        fullatt_block_indexes=[1], tokens_per_second=2, initializer_range=128**-0.5)),
    "qwen3_vl": SHAPES["tiny3"] | dict(vision=SHAPES["tiny3"]["vision"] | dict(  # features enter behind two
        depth=3, deepstack_visual_indexes=[0, 2])),
}


def assert_close(a, b, what, tol=1e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    assert worst <= tol, f"{what}: differs by {worst:.2e}, allowed {tol:.0e}"


def make_model(**settings):
    """The tiny preset in float64, with an adapter and step table that do something."""
    torch.manual_seed(0)
    questions = [f"The {name} is on the left of a picture. What colour is it?" for name in NAMES]
    m = Plume.random(questions * 20, **settings).double()
    for p in m.adapter.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return m


@pytest.fixture(scope="session")
def model():
    return make_model()


@functools.cache
def tiny_model(name):
    """One of each family, in which every parameter does something."""
    with mock.patch.dict(SHAPES, {name: FAMILIES[name]}):
        m = make_model(shape=name)
    for p in m.parameters():
        if p.ndim == 1:
            p.data += 0.05 * torch.randn_like(p)
    return m


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a checkpoint in float32."""
    path = tmp_path_factory.mktemp("small") / "small"
    make_model().float().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder of pictures and clips, train.jsonl over them, and the same as retrieval tasks."""
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture
def few_queries(monkeypatch):
    """Turtle world, in this process, has 60 queries of a family instead of 400."""
    few = [60 if value == 400 else value for value in World.__init__.__defaults__]
    monkeypatch.setattr(World.__init__, "__defaults__", tuple(few))


def mixed_items(world):
    """One item of every kind, as `encode` takes them; the last clip has too many frames to be in a square."""
    frames = [picture("blue", "bar", (64, 200), at) for at in range(13)]
    return [
        "red",
        {"text": "what colour is the square in this long question about a picture?"},
        {"image": str(world / "red bar.png")},
        {"text": "both", "image": [str(world / "blue bar.png"), picture("red", "circle", (140, 56))]},
        {"text": "a clip", "video": str(world / "green circle.mp4")},
        {"text": "<video> then <image>", "image": picture("red", "bar", (200, 120)), "video": frames},
    ]


def rendered(m, items, **kw):
    return [m.processor.render(parse_item(i), **kw) for i in items]


def whole(batches, job):
    """A batch of Batches, all rows in one group as they come, equal ones, too, as one dict."""
    as_they_come = dict(
        group_by_length=lambda lengths: [np.arange(len(lengths))],
        distinct=lambda samples: (samples, np.arange(len(samples))))
    with mock.patch.multiple(data, **as_they_come):
        batch = batches[job]
    ((group,),) = batch["micro"]
    return {k: v for k, v in batch.items() if k != "micro"} | group


def gradients(m):
    """Copies of those that there are."""
    return {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}


# ---- adapter
def plain_adapter(state, keywords, z, k, anchor):
    """The formula of the paper for one row, from the released names."""
    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def expert(name, x):
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", x)))

    n = F.layer_norm(z, z.shape, state["ln.weight"], state["ln.bias"])
    out = z
    if "shared_expert.fc1.weight" in state:
        out = out + expert("shared_expert", n)
    if "router.weight" in state:
        x = z + anchor if keywords.get("anchor", True) else z
        if "step_embed.weight" in state:
            x = torch.cat([x, state["step_embed.weight"][k]])
        r = linear("router", x).softmax(-1)
        for e in r.topk(keywords.get("top_k", 2)).indices.tolist():
            out = out + r[e] * expert(f"experts.{e}", n)  # not renormalised
    return out


@pytest.mark.parametrize("keywords", [
    {}, dict(top_k=1), dict(experts=3, top_k=3), dict(shared_expert=False), dict(anchor=False),
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
        plain = torch.stack([plain_adapter(state, keywords, z[i], k, anchor[i]) for i in range(5)])
        assert_close(ours, plain, "adapter", 1e-9)
        assert r.shape == (5, a.experts)
        if a.experts:
            assert_close(r.sum(-1), torch.ones_like(r[:, 0]), "sum of the router's probabilities")
    back, implied = from_released(state)
    assert back.keys() == a.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in a.state_dict().items())
    assert implied["shared_expert"] == a.shared_expert and implied["experts"] == a.experts


def test_kind_none_is_the_identity_a_new_adapter_is_near_it_and_wrong_settings_are_refused():
    z, anchor = torch.randn(2, 4, 128)
    assert torch.equal(TransitionAdapter(128, kind="none")(z, 0, anchor)[0], z)
    assert (TransitionAdapter(128)(z, 0, anchor)[0] - z).norm() < 0.05 * z.norm()
    for bad in (dict(kind="moo"), dict(top_k=5), dict(top_k=0)):
        with pytest.raises(ValueError):
            TransitionAdapter(8, **bad)


def test_balance_loss_by_hand():
    r = torch.tensor([[0.5, 0.5], [0.9, 0.1]])  # K = 2, E = 2
    assert_close(balance_loss(r), torch.tensor((0 + 0.16) / 2), "balance")
    assert balance_loss(torch.zeros(0, 4)) == 0


# ---- rollout
def naive(m, sample, K, rule=None, suffix=None, adapter=None):
    """A rendered sample through transformers' own modules and cache; suffix: other input embeddings."""
    batch = collate([sample], m.processor)
    suffix = m.lm.embed_tokens(batch["suffix"]) if suffix is None else suffix
    return naive_rollout(
        m.backbone.model, adapter or m.adapter, transformers_inputs(batch, m.processor), batch["positions"],
        sample["disc"], K, suffix, rule or m.settings["latent_positions"])


def naive_words(m, sample, K, limit):
    """What transformers writes greedily behind K steps -> the state of <gen_emb> (D,), the tokens."""
    tokens, end, r = [], m.processor.id["<gen_emb>"], naive(m, sample, K)
    z = torch.cat([r.start, r.latents[0]])[-1]
    while end not in tokens:
        tokens.append(end if len(tokens) == limit - 1 else int(m.backbone.lm_head(z).argmax(-1)))
        z = naive(m, sample, K, suffix=m.lm.embed_tokens(torch.tensor([tokens]))).suffix[0, -1]
    return z, tokens


def our_rollout(m, samples, K, rule="mrope", checkpointing=False):
    batch = collate(samples, m.processor)
    suffix = m.lm.embed_tokens(batch["suffix"])
    return rollout(m.lm, m.adapter, m.prefix(batch), K, suffix, rule, checkpointing)


def prefill_difference(m, items):
    """The largest one of a hidden state or a logit from what transformers has at the same positions."""
    batch = collate(rendered(m, items), m.processor)
    prefix, inputs = m.prefix(batch), transformers_inputs(batch, m.processor)
    cache, real = Cache(m.lm, prefix.lengths, prefix.x.shape[1]), inputs["attention_mask"].bool()
    rope = rotary(m.lm, prefix.positions, prefix.x)
    h = decoder(m.lm, prefix.x, rope, cache, deepstack=prefix.deepstack)
    theirs = m.backbone(**inputs, position_ids=batch["positions"], output_hidden_states=True)
    differences = h - theirs.hidden_states[-1], m.backbone.lm_head(h) - theirs.logits
    return max(d[real].abs().max().item() for d in differences)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_logits_equal_transformers_at_the_same_positions(world, name):
    # float64, but transformers' rotary tables are float32
    assert prefill_difference(tiny_model(name), mixed_items(world)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_mrope_positions_equal_transformers(world, name):
    """Up to the end of a clip, where transformers 5.x goes on earlier than 4.57; of Qwen3-VL all."""
    m, items = tiny_model(name), mixed_items(world)[2:]
    if name == "qwen2_5_vl":
        del items[2]  # of 8 frames a second: 4.57 and 5.x drop parts of a second
    for item, sample in zip(items, rendered(m, items)):
        batch = collate([sample], m.processor)
        inputs = dict(transformers_inputs(batch, m.processor), second_per_grid_ts=torch.ones(1))
        theirs, _ = m.backbone.model.get_rope_index(**inputs)
        clip, end = (inputs["mm_token_type_ids"][0] == 2).nonzero(), None
        if len(clip) and name != "qwen3_vl":
            end = int(clip[-1]) + 1
        assert torch.equal(batch["positions"][..., :end], theirs[..., :end]), item


# transformers 4.57.1, Qwen2VLModel.get_rope_index: three text tokens, a clip, four text tokens.
# (frames, grid): (position of the first token behind the clip, sum over all tokens of each axis)
ROPE_4_57 = {
    (8, (4, 4, 4)): (7, [109, 93, 93]),
    (8, (4, 4, 8)): (7, [181, 149, 181]),
    (8, (4, 8, 4)): (7, [181, 181, 149]),
    (8, (4, 8, 14)): (10, [553, 553, 721]),
    (16, (8, 4, 4)): (11, [261, 165, 165]),
    (16, (8, 4, 8)): (11, [469, 277, 341]),
    (16, (8, 8, 4)): (11, [469, 341, 277]),
    (16, (8, 8, 14)): (11, [1509, 1061, 1397]),
    (64, (32, 4, 4)): (35, [2517, 597, 597]),
    (64, (32, 4, 8)): (35, [4885, 1045, 1301]),
    (64, (32, 8, 4)): (35, [4885, 1301, 1045]),
    (64, (32, 8, 14)): (35, [16725, 4181, 5525]),
}


@pytest.mark.parametrize("frames, grid", ROPE_4_57)
def test_text_goes_on_behind_the_largest_position_of_a_clip(model, frames, grid):
    limits = replace(model.processor.limits, num_frames=64, video_max_pixels=28 * 28 * 32, max_len=8192)
    p = Processor(model.processor.tokenizer, "Think.", limits)
    t, h, w = grid
    frame = Image.new("RGB", (14 * w, 14 * h))
    s = p.render(parse_item({"text": "four", "video": [frame] * frames}))
    begin = s["ids"].index(p.id["<|vision_start|>"])
    here = s["positions"][:, begin - 2 : begin + 1 + t * h * w // 4 + 4] - (begin - 2)
    behind, sums = ROPE_4_57[frames, grid]
    assert s["grids"] == [grid] and here.sum(1).tolist() == sums
    assert here[:, -4:].tolist() == [[behind, behind + 1, behind + 2, behind + 3]] * 3
    assert behind == 3 + max(t, h // 2, w // 2)  # by hand: three tokens, and the longest of the three axes


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rule", ["mrope", "cache"])
def test_batched_rollout_equals_one_by_one_through_transformers_in_values_and_gradients(world, name, rule):
    m, K = tiny_model(name), 5
    samples = rendered(m, mixed_items(world))
    target = torch.randn(len(samples), 128, dtype=torch.float64)

    def gradients_of(r):
        """Those of one scalar over embeddings, anchors and latents, for all parameters."""
        embeddings = F.normalize(r.suffix[:, -1], dim=-1)
        m.zero_grad()
        ((embeddings * target).sum() + r.anchor.sin().sum() + r.latents.sin().sum()).backward()
        return gradients(m)

    one_by_one = Rollout(*map(torch.cat, zip(*[naive(m, sample, K, rule) for sample in samples])))
    theirs = gradients_of(one_by_one)
    assert any("deepstack" in parameter for parameter in theirs) == (name == "qwen3_vl")
    r = our_rollout(m, samples, K, rule)
    for field, a, b in zip(Rollout._fields, r, one_by_one):
        assert_close(a, b, field, 1e-5)
    ours = gradients_of(r)
    recomputed = gradients_of(our_rollout(m, samples, K, rule, checkpointing=True))
    assert ours.keys() == theirs.keys() == recomputed.keys()
    for parameter, g in theirs.items():
        size = max(1.0, g.abs().max().item())
        assert_close(ours[parameter], g, f"gradient of {parameter}", 1e-5 * size)
        assert_close(recomputed[parameter], ours[parameter], f"{parameter}, recomputed", 1e-10 * size)


def test_the_two_position_rules_agree_on_text_and_differ_behind_a_picture(model, world):
    text, image = rendered(model, ["some words", {"image": str(world / "red bar.png")}])
    for sample, same in ((text, True), (image, False)):
        mrope, cache = (our_rollout(model, [sample], 3, rule).suffix for rule in ("mrope", "cache"))
        assert torch.equal(mrope, cache) == same
    with pytest.raises(ValueError, match="'mrope' or 'cache'"):
        our_rollout(model, [text], 1, "rope")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["latent", "single", "cot"])
def test_embeddings_do_not_depend_on_neighbours_order_or_batch_size(world, name, mode):
    model, items = tiny_model(name), mixed_items(world) * 2
    extra = dict(limit=12) if mode == "cot" else {}
    alone = np.concatenate([model.encode([i], mode, **extra) for i in items])
    assert_close(np.linalg.norm(alone, axis=1), np.ones(len(items)), "unit length")
    for size in (1, 5, 16):
        assert_close(model.encode(items, mode, batch_size=size, **extra), alone, f"batches of {size}", 1e-6)
    order = np.random.default_rng(0).permutation(len(items))
    mixed = model.encode([items[i] for i in order], mode, batch_size=4, **extra)
    assert_close(mixed, alone[order], "another order", 1e-6)


def test_steps_change_the_embedding_and_zero_steps_are_the_suffix_alone(model):
    sample = rendered(model, ["a red square"])[0]
    none, one, eight = (model.encode(["a red square"], steps=k)[0] for k in (0, 1, 8))
    assert np.abs(none - one).max() > 1e-4 and np.abs(one - eight).max() > 1e-4
    h = model.lm(input_ids=torch.tensor([sample["ids"] + sample["suffix"]])).last_hidden_state[0, -1]
    assert_close(none, F.normalize(h, dim=-1).float().detach(), "steps 0 = prefix and suffix in one pass")
    for wrong in (dict(steps=33), dict(steps=-1), dict(mode="single", steps=2), dict(mode="laten")):
        with pytest.raises(ValueError):
            model.encode(["x"], **wrong)
    with pytest.raises(TypeError, match="list"):
        model.encode("x")
    with pytest.raises(ValueError, match="at least 1"):
        model.encode(["x"], batch_size=0)


def test_gradient_reaches_the_first_latent_step_and_equals_finite_differences(model):
    samples = rendered(model, ["a red square", "what colour is it?"])

    def loss():
        return our_rollout(model, samples, 4).suffix[:, -1].sin().sum()  # the embedding alone

    model.zero_grad()
    loss().backward()
    table = model.adapter.step_embed.weight
    assert (table.grad[:4].abs().amax(1) > 0).all() and (table.grad[4:] == 0).all()
    layer, adapter = model.lm.layers[0].self_attn, model.adapter
    for p in (table, adapter.w1, adapter.w2, layer.k_proj.weight, layer.v_proj.bias, model.lm.norm.weight):
        direction = p.grad / p.grad.norm()
        with torch.no_grad():
            p += 1e-5 * direction
            up = loss()
            p -= 2e-5 * direction
            down = loss()
            p += 1e-5 * direction
        slope = p.grad.norm()
        assert_close((up - down) / 2e-5, slope, "directional derivative", 1e-6 * max(1.0, slope.item()))


def test_greedy_rationale_equals_transformers_and_stops_at_gen_emb(model, world):
    gen, samples, limit = model.processor.id["<gen_emb>"], rendered(model, mixed_items(world)), 9
    lm, head = model.lm, model.backbone.lm_head

    def written(samples, end):
        return greedy(lm, lm.embed_tokens, head, model.prefix(collate(samples, model.processor)), end, limit)

    h, tokens = written(samples, gen)
    for i, sample in enumerate(samples):
        state, theirs = naive_words(model, sample, 0, limit)
        assert tokens[i].tolist() == theirs + [gen] * (limit - len(theirs))
        assert_close(h[i], state, f"row {i}", 1e-5)
    # a token as `end` that comes early in some rows: they stop there, and their neighbours go on
    early = int(tokens[0, 2])
    h2, t2 = written(samples, early)
    alone, _ = written(samples[:1], early)
    assert (t2[0, tokens[0].tolist().index(early) :] == early).all()
    assert_close(h2[0], alone[0], "a row that stopped early", 1e-6)


@pytest.mark.skipif(not GOLDEN.exists(), reason="no ../shared/golden")
@pytest.mark.parametrize("front", ["blank", "plain"])
def test_vectors_equal_those_of_the_released_code(front):
    """Text, a picture and a clip through the authors' evaluation.

    blank: with the white picture that it sets in front of text; plain: without.
    """
    print("using", GOLDEN)
    expected, items = np.load(GOLDEN / "golden.npz"), json.loads((GOLDEN / "items.json").read_text())
    m = Plume.from_pretrained(GOLDEN / "ckpt", "cpu", "float32", white_image=front == "blank")
    for item in items:
        side = {"text": item["text"]}
        for kind in ("image", "video"):
            if kind in item:
                side[kind] = [str(GOLDEN / path) for path in item[kind]]
        single = m.encode([side], "single")[0]
        for K in (0, 4, 8):
            what = f"{item['name']}/K{K}/{front}"
            assert_close(m.encode([side], steps=K)[0], expected[f"{what}/gen"], what, 1e-4)
            assert_close(single, expected[f"{what}/disc"], f"{what}, single pass", 1e-4)
            with torch.no_grad():
                latents = our_rollout(m, rendered(m, [side]), K, "cache").latents[0]
            assert_close(latents, expected[f"{what}/latents"], f"{what}, latent states", 1e-3)


# ---- curriculum
def test_stages_follow_the_schedule_of_the_paper():
    c = Curriculum()
    progress = Progress(c, 1000)
    seen = [progress.stage(i) for i in range(1000)]
    stages = [*(Stage(s, 2 * s, True) for s in range(5)), Stage(4, 8, False)]
    assert list(dict.fromkeys(seen)) == c.stages == stages
    assert [seen.index(stage) for stage in stages] == [0, 125, 250, 375, 500, 750]
    for step in range(1000):  # without a gate no loss is low enough
        progress.observe(step, 0.0)
    assert [progress.stage(i) for i in range(1000)] == seen
    assert c.latent_steps == 8 and len(c.table(1000).splitlines()) == 7
    # no curriculum: the final format from the start
    only = Progress(Curriculum(segments=1, steps_per_segment=8, last_stage=1.0), 100)
    assert {only.stage(p).latent_steps for p in range(100)} == {8}
    assert len(only.curriculum.table(100).splitlines()) == 3
    wrong = dict(rest_of_rationale="before", segments=0, last_stage=0.0, gate=-1, replay=1.0)
    for name, value in wrong.items():
        with pytest.raises(ValueError):
            Curriculum(**{name: value})


def follow(progress, steps, loss, ahead=0):
    """Ask for the stages `ahead` of the losses, as prefetching workers do -> the stage of each step."""
    seen = []
    for step in range(steps):
        while len(seen) <= min(step + ahead, steps - 1):
            seen.append(progress.stage(len(seen)))
        progress.observe(step, loss(step, seen[step]))
    return seen


def test_the_gate_enters_a_stage_when_the_loss_is_low_and_at_the_latest_by_the_schedule():
    c = Curriculum(segments=2, steps_per_segment=1, gate=0.1)
    wait, delay = Progress.WINDOW, Progress.DELAY
    assert wait == 20

    def entered(begin, only=None):
        """First steps of the stages, when the loss is low from a step on, in one stage alone."""
        def loss(step, stage):
            return 0.01 if step >= begin and only in (None, stage.index) else 1.0

        seen = follow(Progress(c, 1000), 1000, loss)
        return [seen.index(stage) for stage in c.stages]

    assert entered(1000) == c.schedule(1000) == [0, 250, 500, 750]
    assert entered(0) == [i * (wait + delay - 1) for i in range(4)]
    # a running mean of 20 steps under 0.1: after 19 low ones
    assert entered(60, only=0) == [0, 60 + 18 + delay, 500, 750]
    assert entered(245)[1] == 250  # too late to bring it forward
    # the latest times of more stages: 250 steps for stage 0, then 139, 84, 27
    assert Curriculum(gate=0.1).schedule(1000) == [0, 250, 389, 473, 500, 750]


def test_gate_and_replay_are_the_same_for_every_prefetch_and_after_a_resume():
    c = Curriculum(gate=0.1, replay=0.3)
    noise = np.random.default_rng(0).random(1000)

    def loss(step, stage):
        return float(noise[step] * (0.3 if step % 150 < 60 else 0.05))

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
    assert all(progress.replayed(step) <= progress.place(step) for step in range(1000))
    back = [progress.replayed(step) < progress.place(step) for step in range(1000)]
    assert 0.2 < np.mean(back[200:]) < 0.4
    late = {progress.replayed(step) for step in range(800, 1000) if back[step]}
    assert late >= {0, 1, 2, 3, 4}  # all earlier ones

    low = Progress(c, 1000, 5)
    for step in range(1000):  # the loss of a replayed stage says nothing about the present one
        low.observe(step, 0.0 if low.replayed(step) < low.place(step) else 1.0)
    assert low.entry == c.schedule(1000)


@pytest.mark.parametrize("text", [
    "",
    "word",
    "two words",
    "one two three four five six",
    "A. B! C? D; E. F.",
    "Two sentences only. But with many words in them all.",
    "3.14 is a number. It has a point. That is no end. So four!",
    "第一句。第二句！第三句？第四句；第五",
    "1. First of all.\n2. Second, too.\n\n3) Third.\n- Fourth. * Fifth; (6) sixth. 1.2. Last",
    " led by a blank  and ended by one \n",
])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_segments_join_to_the_rationale_and_never_cut_a_word(text, parts):
    cut = segment(text, parts)
    assert len(cut) == parts and "".join(cut) == text
    for end in np.cumsum([len(c) for c in cut]):
        if 0 < end < len(text):
            assert not text[end - 1 : end + 1].isalnum(), "a word is cut"
    if len(text.split()) >= parts:
        assert all(c.strip() for c in cut)
    if text == "A. B! C? D; E. F." and parts <= 6:  # it has six sentences
        assert all(c.strip()[-1] in ".!?;" for c in cut)


UNITS = {
    "It is round.\nIt is red.\nSo an apple.": ["It is round.", "\nIt is red.", "\nSo an apple."],
    "1. First.\n2. Second.": ["1. First.", "\n2. Second."],
    "1. 2. Two. 3) three. x": ["1. 2. Two.", " 3) three.", " x"],
    "(1) one. (2) Two.": ["(1) one.", " (2) Two."], "a. Red one. B. Blue.": ["a. Red one.", " B. Blue."],
    "1.2. Deep. **2.** IV. Four.": ["1.2. Deep.", " **2.** IV. Four."],
    "- It is. * So.": ["- It is.", " * So."], "A. B! C? D.": ["A.", " B!", " C?", " D."],
    "It is 3.5 m. Or 12. So.": ["It is 3.5 m.", " Or 12.", " So."], "... And so. \n": ["... And so. \n"],
    "1. 红色。2. 蓝色。": ["1. 红色。", "2. 蓝色。"], "“好。”然后": ["“好。", "”然后"],
}


def test_a_unit_says_something_and_is_read_as_the_first_token_that_does(model):
    for text, units in UNITS.items():
        assert SENTENCE.findall(text) == units, text
    p = model.processor
    said = {"\nIt is": "I", " It": "I", "1. it": " it", "\n(2) - it": " it", " 3.5 m": "3", '"it"': "i",
            "7.": "7", " ...": ".", "\n- -5": "-", "<b>so": "<", "\n\n": "\n",
            "第一": p.tokenizer.decode(p.encode("第一")[:1])}
    assert {part: p.tokenizer.decode([p.first_said(part)]) for part in said} == said
    side = Side([("text", "what?")], "Red.\n2. it.", "it")
    left = p.render(side, Stage(1, 1, True), Curriculum(2, 1))  # the gate looks at the same token of the rest
    assert p.tokenizer.decode([left["suffix"][left["gate_at"]]]) == " it"
    rng = np.random.default_rng(0)
    pieces = ["It", " is", "red", "1", " 2", ". ", "!", ";", "\n", " ", "- ", "a) ", "。", "3.5"]
    texts = ["".join(rng.choice(pieces, rng.integers(1, 20))) for _ in range(300)]
    for text in (*texts, "... " * 40 + "It is.", " " * 200 + "It. So", "- " * 100 + "It"):
        side = Side([("text", "what?")], text, "it")
        for c in (Curriculum(4, 1), Curriculum(4, 1, adaptive=True)):
            parts = c.parts(text)
            assert "".join(parts) == text
            for step, token in p.replaced(side, Stage(4, 4, True), c):
                assert p.tokenizer.decode([token]).strip() or not parts[step].strip(), text
        assert not {unit.strip() for unit in SENTENCE.findall(text)[:-1]} & {"", "1.", "2.", "-"}, text


def test_every_stage_and_placement_is_the_documented_text(model):
    decode = model.processor.tokenizer.decode
    sentences = ["First one.", " Second one.", " Third one.", " Fourth one."]
    side = Side([("text", "what?")], "".join(sentences), "it", "here")
    for s in range(5):
        left = "".join(sentences[s:])
        for answer in (True, False):
            stage = Stage(s, 2 * s, answer)
            end = "</think>\n<answer>it</answer>\n<gen_emb>" if answer else "</think>\n<gen_emb>"
            inside = model.processor.render(side, stage, Curriculum(rest_of_rationale="inside"))
            after = model.processor.render(side, stage, Curriculum(rest_of_rationale="after"))
            assert decode(inside["suffix"]) == f"{left}<eot>{end}"
            assert decode(after["suffix"]) == f"<eot>{left}{end}"
    inference = model.processor.render(side)
    for rest in ("inside", "after"):
        final = model.processor.render(side, Stage(4, 8, False), Curriculum(rest_of_rationale=rest))
        assert final["suffix"] == inference["suffix"] and final["ids"] == inference["ids"]
    bare = model.processor.render(Side([("text", "what?")], "", "it"), Stage(2, 4, True), Curriculum())
    assert decode(bare["suffix"]) == "<eot></think>\n<answer>it</answer>\n<gen_emb>"


# ---- prompt
def real_tokenizer():
    """Qwen2-VL's own, with PLUME's tokens."""
    if not SHARED.exists():
        pytest.skip("no ../shared/data")
    print("using", SHARED / "qwen2vl_tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2vl_tokenizer")
    tokenizer.add_tokens(list(data.PLUME_TOKENS), special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("tokenizer", ["tiny", "real"])
def test_prompt_is_the_documented_string(model, world, tokenizer):
    p, image, clip = model.processor, str(world / "red bar.png"), str(world / "red bar.mp4")
    if tokenizer == "real":
        p = Processor(real_tokenizer(), RELEASED_PROMPT, Limits())
    an_image, a_clip = (f"<|vision_start|><|{pad}|><|vision_end|>" for pad in ("image_pad", "video_pad"))
    for item, text in (
        ("goggles, it's 7!", "goggles, it's 7!"),
        (dict(text="Which? ", image=image), f"{an_image}Which? "),
        (dict(image=[image, image]), an_image + an_image),
        (dict(text="a <video> b", video=clip), f"a {a_clip} b"),
    ):
        out = p.render(parse_item(item))
        tokens = [t * h * w // 4 for t, h, w in out["grids"]]
        text = re.sub(r"<\|\w+_pad\|>", lambda pad: pad[0] * tokens.pop(0), text)
        prompt = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                  f"<|im_start|>user\n{text}\n<disc_emb>\n{p.prompt}<|im_end|>\n"
                  "<|im_start|>assistant\n<think><bot>")
        assert out["ids"] == p.tokenizer.encode(prompt, add_special_tokens=False)
        assert out["suffix"] == p.tokenizer.encode("<eot></think>\n<gen_emb>", add_special_tokens=False)
        assert out["ids"][out["disc"]] == p.id["<disc_emb>"] and out["ids"][-1] == p.id["<bot>"]


def test_special_tokens_in_a_users_text_are_plain_characters(model, world):
    p = model.processor
    evil = "<|image_pad|><gen_emb><|im_end|> <disc_emb> <bot>"
    out = p.render(parse_item(dict(text=evil, image=str(world / "red bar.png"))))
    times = {"<gen_emb>": 0, "<disc_emb>": 1, "<bot>": 1, "<|im_end|>": 2, "<|image_pad|>": 9}
    assert {token: out["ids"].count(p.id[token]) for token in times} == times
    assert p.tokenizer.decode(p.encode(evil)) == evil
    assert np.isfinite(model.encode([evil])).all()
    assert pickle.loads(pickle.dumps(p)).encode(evil) == p.encode(evil)  # in a spawned data worker too


def recorded(text, **media):
    """The side of a record in which a human says this."""
    return parse_side(dict(conversations=[{"from": "human", "value": text}], **media), "", "here")


def test_a_turn_that_holds_disc_emb_is_taken_as_it_stands(model):
    plain = Processor(model.processor.tokenizer, "My own words.", Limits())
    ours = model.processor.render(recorded("what?\n<disc_emb>\nMy own words."))
    assert ours["ids"] == plain.render(parse_item("what?"))["ids"]
    with pytest.raises(DataError, match="more than one <disc_emb>"):
        recorded("<disc_emb><disc_emb>")


def test_a_record_and_an_item_with_the_same_picture_and_text_give_the_same_ids(model, world):
    """Published records have one line break behind a marker; it belongs to the marker."""
    red, blue, clip = str(world / "red bar.png"), str(world / "blue bar.png"), str(world / "red bar.mp4")
    tail = "\n<disc_emb>\n" + model.processor.prompt

    def ids(side):
        return model.processor.render(side)["ids"]

    an_image, two, both = dict(image=[red]), dict(image=[red, blue]), dict(image=[red], video=clip)
    for item, media, texts in (
        (dict(image=red, text="What?"), an_image, ("<image>\nWhat?", "<image>What?", "<image>\r\nWhat?")),
        (dict(image=red, text="\nWhat?"), an_image, ("<image>\n\nWhat?",)),
        (dict(image=red, text=" What?"), an_image, ("<image>\n What?", "<image> What?")),
        (dict(video=clip, text="What?"), dict(video=clip), ("<video>\nWhat?",)),
        (dict(image=[red, blue], text="Same?"), two, ("<image>\n<image>\nSame?", "<image><image>\nSame?")),
        (dict(image=red), an_image, ("<image>", "<image>\n")),
        (dict(image=red, text="a\n<image>\nb"), an_image, ("a\n<image>\nb", "a\n<image>b")),
        (dict(image=red, video=clip, text="<video>\n<image>\nb"), both, ("<video>\n<image>\nb",)),
    ):
        expected = ids(parse_item(item))
        for text in texts:
            assert ids(recorded(text, **media)) == expected, (item, text)
            assert ids(recorded(text + tail, **media)) == expected, (item, text)
    one = model.processor.tokenizer.decode(ids(recorded("<image>\nWhat?", image=[red])))
    assert one.count("<|vision_end|>What?") == 1


def test_too_long_loses_rationale_only_and_otherwise_is_an_error(model, world):
    long = Processor(model.processor.tokenizer, "Think.", replace(model.processor.limits, max_len=4000))
    p = Processor(model.processor.tokenizer, "Think.", replace(model.processor.limits, max_len=90))
    side = Side([("text", "what is it?")], "word " * 200, "an answer", "here")
    full = long.render(side, Stage(1, 2, True), Curriculum())
    out = p.render(side, Stage(1, 2, True), Curriculum())
    assert out["ids"] == full["ids"] and len(out["ids"]) + 2 + len(out["suffix"]) == 90
    assert out["cut"] == len(full["suffix"]) - len(out["suffix"]) > 0 and full["cut"] == 0
    end = "<eot></think>\n<answer>an answer</answer>\n<gen_emb>"
    assert p.tokenizer.decode(out["suffix"]).endswith(end)
    with pytest.raises(DataError, match="here: .* exceed max_len 90; raise max_len"):
        p.render(Side([("text", "word " * 90)], where="here"))
    with pytest.raises(DataError, match="lower max_pixels"):
        p.render(parse_item(dict(image=[picture("red", "bar")] * 9)))


# ---- losses
def by_hand(query, candidates, names, scale, asked=None):
    """Symmetric InfoNCE from its definition; candidates and their names of every query, its target first.

    asked: the names of the queries; None: each is another.
    """
    total, asked = 0, asked or list(range(len(query)))
    pairs = {(name, called[0]) for name, called in zip(asked, names)}  # what is right anywhere
    for i, q in enumerate(query):
        target, name = candidates[i][0], names[i][0]
        others = [c for row, called in zip(candidates, names)
                  for c, n in zip(row, called) if (asked[i], n) not in pairs]
        queries = [other for other, what in zip(query, asked) if (what, name) not in pairs]
        for x, right, wrong in ((q, target, others), (target, q, queries)):
            logits = scale * torch.stack([right, *wrong]) @ x
            total = total + logits.logsumexp(0) - logits[0]
    return total / 2 / len(query)


def on_two_ranks(monkeypatch, query, candidates, asked, called, valid, scale):
    """InfoNCE of a batch whose halves are on two ranks: the mean of theirs."""
    halves = [x.unflatten(0, (2, -1)) for x in (query, candidates, asked, called, valid)]
    losses, (queries, targets, *hashes) = [], halves
    for rank in range(2):
        monkeypatch.setattr(train, "rank_and_world", lambda rank=rank: (rank, 2, rank))
        monkeypatch.setattr(
            train, "all_gather", lambda x: queries[:, :, None] if x.shape[1] == 1 else targets)
        losses.append(train.info_nce(queries[rank], targets[rank], *hashes, scale))
    monkeypatch.undo()
    return sum(losses) / 2


@pytest.mark.parametrize("seed", range(8))
def test_info_nce_by_hand_with_equal_queries_targets_and_hard_negatives_on_two_ranks(seed, monkeypatch):
    """No two that are a pair somewhere in the batch are negatives of each other."""
    rng, B, M = np.random.default_rng(seed), 8, 2
    vectors = F.normalize(torch.randn(2, 12, 6, dtype=torch.float64), dim=-1)
    asked, called = rng.integers(3 + seed, size=B), rng.integers(4 + seed, size=(B, 1 + M))
    valid = torch.tensor(rng.random((B, 1 + M)) < 0.7)
    valid[:, 0] = True
    called[~valid] = 0  # as Batches has it
    query, candidates = vectors[0][asked], vectors[1][called]
    rows = [[c for c, there in zip(row, known) if there] for row, known in zip(candidates, valid)]
    names = [row[known].tolist() for row, known in zip(called, valid.numpy())]
    expected = by_hand(query, rows, names, 7.0, asked.tolist())
    given = query, candidates, torch.tensor(asked), torch.tensor(called), valid
    one = train.info_nce(*given[:2], *(x[None] for x in given[2:]), 7.0)
    assert_close(one, expected, "InfoNCE", 1e-9)
    assert_close(on_two_ranks(monkeypatch, *given, 7.0), expected, "two ranks", 1e-9)


def test_a_perfect_model_has_no_loss_where_a_query_has_two_right_targets():
    query = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]]  # two pairs of the same query
    hashes, valid = torch.tensor([[[1, 2], [2, 1], [3, 1], [4, 2]]]), torch.ones(1, 4, 2, dtype=torch.bool)
    candidates = torch.stack([query, query[[0, 0, 0, 0]]], 1)
    loss = train.info_nce(query, candidates, torch.tensor([[7, 7, 8, 9]]), hashes, valid, 50.0)
    assert loss < 1e-9


def test_the_loss_is_the_weighted_sum_of_its_parts(model, world):
    pairs = Pairs(str(world / "train.jsonl"))
    rows = np.flatnonzero(pairs.dataset == 0)[:4]
    batch = whole(Batches(pairs, model.processor, Curriculum(last_stage=1.0)), (0, FINAL, rows))
    out = model([batch], 8)
    cfg = train.Config(w_ce=0.5, w_gen=2.0, w_disc=3.0, w_bal=0.7, w_read=0.3, scale=9.0)
    parts = train.losses(out, batch, cfg)
    for name in ("gen", "disc"):
        q, p = out["per_pair"][name].detach().chunk(2)
        assert_close(parts[name], by_hand(q, p[:, None], batch["target"].tolist(), 9.0), name, 1e-9)
    assert_close(parts["bal"], balance_loss(out["per_pair"]["router"].mean(0)), "balance", 1e-12)
    contrastive = 2 * parts["gen"] + 3 * parts["disc"]
    written = 0.5 * parts["ce"] + 0.3 * parts["read"]
    assert_close(parts["loss"], contrastive + written + 0.7 * parts["bal"], "sum", 1e-12)
    labels, gen = [], model.processor.id["<gen_emb>"]
    for suffix in batch["suffix"].tolist():
        labels += suffix[: suffix.index(gen) + 1]
    assert batch["labels"].tolist() == labels  # all of the suffix, both sides
    assert len(out["per_token"]["gate_loss"]) == 8


def first_said(p, part):
    """The first token of a sentence or word that is no blank."""
    return next(token for token in p.encode(part) if p.tokenizer.decode([token]).strip())


def test_every_latent_state_reads_the_token_it_replaced(model, world):
    pairs, rows, p = Pairs(str(world / "train.jsonl")), np.array([0, 2, 4]), model.processor

    def batch_at(stage):
        return whole(Batches(pairs, p, Curriculum()), (0, stage, rows))

    batch = batch_at(Stage(3, 6, True))
    out = model([batch], 6)
    r = rollout(model.lm, model.adapter, model.prefix(batch), 6, model.lm.embed_tokens(batch["suffix"]))
    states = torch.cat([r.start[:, None], r.latents], 1)  # (B, K+1, D)
    sides = [pairs[i][0] for i in rows] + [pairs[i][1] for i in rows]
    by_row, first = [], []
    for b, side in enumerate(sides):
        parts = segment(side.rationale, 4)
        tokens = [first_said(p, part) for part in parts]
        for part in range(3):  # the state in front of latent steps 0, 2, 4 predicts that of parts 0, 1, 2
            by_row.append(-model.backbone.lm_head(states[b, 2 * part]).log_softmax(-1)[tokens[part]])
        first.append(batch["suffix"][b].tolist().index(tokens[3]))  # of what is left
    assert_close(out["per_token"]["read"], torch.stack(by_row), "read", 1e-9)
    assert_close(train.losses(out, batch, train.Config())["read"], torch.stack(by_row).mean(), "mean", 1e-9)
    columns = batch["label_at"][batch["gate_at"]] % batch["suffix"].shape[1]
    assert columns.tolist() == first
    last = batch_at(FINAL)
    answers = [p.tokenizer.tokenize(side.answer)[0] for side in sides]
    assert p.tokenizer.convert_ids_to_tokens(last["labels"][last["gate_at"]]) == answers
    assert len(model([batch_at(Stage(0, 0, True))], 0)["per_token"]["read"]) == 0


# ---- checkpoints
def test_saved_and_loaded_again_embeds_the_same_and_needs_no_flags(world, tmp_path):
    limits, adapter = dict(num_frames=4, max_pixels=50176), dict(top_k=1, anchor=False)
    m = make_model(latent_steps=5, latent_positions="cache", limits=limits, adapter=adapter).float()
    m.save_pretrained(tmp_path / "ck")
    again, items = Plume.from_pretrained(tmp_path / "ck", "cpu"), mixed_items(world)
    assert again.settings == m.settings
    assert again.settings["latent_steps"] == 5 and again.settings["limits"]["num_frames"] == 4
    assert_close(again.encode(items), m.encode(items), "loaded")  # in joined products
    text = "Hello wörld\n\nit's 123 <|im_end|> fine"
    assert again.processor.encode(text) == m.processor.encode(text)
    again.save_pretrained(tmp_path / "ck")  # in place of the old one
    assert sorted(os.listdir(tmp_path)) == ["ck"]


def test_a_checkpoint_carries_its_chat_template(world, tmp_path):
    template = data.TEMPLATE | dict(
        system="You embed.", closing=" done", answer=" so: {answer}.", anchor=" -> <disc_emb> : {prompt}")
    m = make_model(template=template).float()
    m.save_pretrained(tmp_path / "ck")
    again = Plume.from_pretrained(tmp_path / "ck", "cpu")
    p = again.processor
    side = Side([("text", "what?")], "One. Two.", "it")
    sample = p.render(side, Stage(0, 0, True), Curriculum())
    expected = ("<|im_start|>system\nYou embed.<|im_end|>\n"
                f"<|im_start|>user\nwhat? -> <disc_emb> : {p.prompt}<|im_end|>\n"
                "<|im_start|>assistant\n<think><bot>")
    assert p.tokenizer.decode(sample["ids"]).replace(" ", "") == expected.replace(" ", "")
    assert p.tokenizer.decode(sample["suffix"]) == "One. Two.<eot> done so: it.<gen_emb>"
    assert p.tokenizer.decode(p.render(parse_item("x"))["suffix"]) == "<eot> done<gen_emb>"
    assert_close(again.encode(mixed_items(world)), m.encode(mixed_items(world)), "loaded")
    again.save_pretrained(tmp_path / "again")
    block = json.loads((tmp_path / "again" / "config.json").read_text())["plume"]
    assert block["template"] == template and block["format"] == FORMAT == 2
    assert pickle.loads(pickle.dumps(p)).render(parse_item("x"))["ids"] == p.render(parse_item("x"))["ids"]


# ---- two ranks
def eight_pairs(records, processor, rank=0, ranks=1, micro_tokens=0):
    """-> Batches and a rank's job in them: equal targets within and across ranks and micro-batches."""
    pairs, share = Pairs(str(records)), 8 // ranks
    rows = np.flatnonzero(pairs.dataset == 0)[[0, 1, 2, 3, 2, 5, 0, 7]]
    batches = Batches(pairs, processor, Curriculum(last_stage=1.0), micro_tokens=micro_tokens)
    return batches, (1, FINAL, rows[rank * share : (rank + 1) * share])


@pytest.mark.parametrize("file, ways", [
    ("train.jsonl", ["copies"]), ("hard.jsonl", ["one", "copies", "shards"])])
def test_two_ranks_and_all_micro_batches_have_the_gradients_of_one_big_batch(file, ways, world, tmp_path):
    """GradCache against the loss of the whole batch in one piece; with hard negatives, too."""
    records = world / file
    for way in ways:
        run_ranks(1 if way == "one" else 2, "tests/gradients.py", way, records, tmp_path / way)
    m = make_model()
    batches, job = eight_pairs(records, m.processor)
    batch, (groups,) = whole(batches, job), batches[job]["micro"]
    parts = train.losses(m([batch], 8), batch, train.Config(w_cross=0.3))
    parts["loss"].backward()
    expected = gradients(m)
    assert len(expected) > 40 and parts["bal"] > 0
    assert expected.keys() >= {"adapter.router.weight", "backbone.model.visual.patch_embed.proj.weight"}

    kept = {way: torch.load(tmp_path / way, weights_only=True) for way in ways}
    counts = {way: [grads.pop("micro-batches").tolist() for grads in kept[way].values()] for way in ways}
    assert any(one != other for one, other in counts["copies"])  # one rank waits for the other with blanks
    if "one" in ways:
        rows = sum(len(group["ids"]) for group in groups)  # equal ones once
        assert counts["one"][0] == [1] and counts["one"][-1] == [rows] and rows < len(batch["ids"])
        assert counts["copies"] == counts["shards"]
    for way in ways:
        for size, grads in kept[way].items():
            what = f"{way}, {size} columns at a time"
            assert_close(grads.pop("bal"), parts["bal"].detach(), f"{what}: balance loss", 1e-12)
            gen = grads.pop("gen")
            if way == "one":  # of two ranks each has its share
                assert_close(gen, parts["gen"].detach(), f"{what}: InfoNCE", 1e-12)
            assert grads.keys() == expected.keys()
            for name, g in expected.items():
                assert_close(grads[name], g, f"{what}: {name}", 1e-9 * g.abs().max().item())


QUICK = ["--global_batch", "4", "--workers", "1", "--log_every", "1", "--lr=2e-3"]
# the paper's fixed schedule
PAPER = ["--reset_moments", "--segments=4", "--steps_per_segment=2",
         "--gate=0", "--replay=0", "--last_stage=0.5", "--decay=1"]
# gated stages that come before their latest time
GATED = ["--segments=1", "--steps_per_segment=4", "--last_stage=0.1", "--gate=99", "--replay=0.2"]


def weights(out):
    return load_file(Path(out) / "checkpoint" / "model.safetensors")


def log(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """A short run through all stages by the command line, uninterrupted -> its folder, what it printed."""
    out = tmp_path_factory.mktemp("run")
    done = run("train.py", "--data", world / "train.jsonl", "--out", out, "--steps", 40, *QUICK, *PAPER)
    return out, done.stdout


def test_two_ranks_by_torchrun_train_the_weights_of_one(world, tmp_path):
    flags = ["--data", world / "train.jsonl", "--steps", 38, "--global_batch", 4, "--workers", 0, "--lr=1e-3",
             *GATED, "--last_stage=0.05"]
    run("train.py", "--out", tmp_path / "one", *flags)
    done = torchrun(2, "train.py", "--out", tmp_path / "two", *flags)
    assert "global contrastive batch 4 = 2 ranks x 2" in done.stdout
    warned = [line for line in done.stderr.splitlines() if "deprecated" in line]
    assert all("Enum" in line for line in warned), warned  # that one is torchao's, where it is installed
    run_ranks(2, "train.py", "--out", tmp_path / "shards", "--fsdp", "--micro_tokens=300", "--checkpointing",
              *flags)
    one, two, shards = (log(tmp_path / name) for name in ("one", "two", "shards"))
    assert [r["stage"] for r in one] == [r["stage"] for r in two] == [r["stage"] for r in shards]
    assert all(0 <= r["padding"] <= 0.05 for r in one + two + shards)
    latest = Progress(Curriculum(1, 4, last_stage=0.05, gate=99), 38).entry[1]
    assert [r["reached"] for r in one].index(1) == 35 < latest
    for rows in zip(one[:6], two[:6], shards[:6]):
        for name in ("ce", "gen", "disc", "bal", "norm", "gate_loss"):
            values, step = [r[name] for r in rows], rows[0]["step"]
            assert values == pytest.approx([values[0]] * 3, rel=2e-3, abs=1e-4), (step, name)
