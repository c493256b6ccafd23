"""What latent.py does for speed or memory changes no value, nor does the device.

Graphs (without a GPU a stand-in plays them), few rows on a CPU, a cache that is never copied, bfloat16.
"""

import functools
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.graphs
import latent
import train
from backbones.vision import qwen2_features
from curriculum import Curriculum
from data import Batches, collate, to_device
from files.items import parse_item
from files.records import Pairs
from hub.weights import side_by_side
from latent import decoder, prefill, rollout, rotary_behind
from model import Plume
from test_plume import (
    assert_close, FAMILIES, FINAL, gradients, make_model, mixed_items, our_rollout, rendered, tiny_model,
    whole)
from tests.processes import run
from tools.counts import LiveBytes

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


# ---- pictures
@pytest.mark.parametrize("grid", [
    [[1, 4, 4]],
    [[1, 2, 2], [1, 2, 12], [1, 12, 2]],  # one token; as many patches in another shape
    [[1, 4, 6], [3, 6, 4], [1, 8, 2], [2, 4, 4], [1, 4, 6]],  # clips between pictures
])
def test_the_vision_tower_equals_transformers_in_values_and_gradients(grid):
    m, grid = make_model(), torch.tensor(grid)
    visual = m.backbone.model.visual
    pixels = torch.randn(grid.prod(1).sum(), 1176, dtype=torch.double, requires_grad=True)
    found = []
    for features in (qwen2_features(visual, pixels, grid), visual(pixels, grid_thw=grid).pooler_output):
        pixels.grad = None
        visual.zero_grad()
        features.sin().sum().backward()
        found.append(dict(gradients(visual), features=features.detach(), pixels=pixels.grad))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert_close(ours[name], wanted, name)  # its rotation is in float32


# ---- graphs
def run_again(function, device):
    """As latent.record, without a graph: a replay runs the function on what its fixed places hold then."""
    outputs = function()

    def replay():
        for old, new in zip(outputs, function()):
            old.copy_(new)
    return replay, outputs


@torch.no_grad()
def embed_with_and_without(m, graphs, items, K=8):
    """Asserts that `graphs` gives what no graphs give -> how many shapes are recorded."""
    batch = to_device(collate(rendered(m, items), m.processor), m.device)
    plain = m.embed(batch, "latent", K)[0]
    tol = 0.05 if m.lm.norm.weight.dtype == torch.bfloat16 else 1e-6
    with mock.patch.object(m, "graphs", graphs):
        assert_close(m.embed(batch, "latent", K)[0], plain, f"{len(items)} items, K = {K}", tol)
    return len(graphs.recorded)


def a_shape_is_recorded_when_it_comes_again(m, graphs, items):
    short, long = [items[0], items[3]], [items[2], items[5]]
    for given, K, recorded in (
        (long, 8, 0),
        (long, 8, 1),
        (long[::-1], 8, 1),
        (short, 8, 1),
        (short, 8, 2),
        (long, 8, 2),
        (short, 8, 2),
        (items[:1], 8, 2),
        (items[:1], 8, 3),
        (long, 3, 3),  # no more than `keep`
        (long, 3, 3),
        (long, 0, 3),
        (long, 0, 3),
        (short, 8, 3),
    ):
        assert embed_with_and_without(m, graphs, given, K) == recorded, (given, K)


def weights_may_change_in_place_and_when_they_move_all_is_forgotten(m, graphs, items):
    with torch.no_grad():  # as an optimizer does: in place
        m.adapter.w2 *= 1.5
        m.lm.norm.weight *= 1.5
    assert embed_with_and_without(m, graphs, items) == 3
    for weight in (m.adapter.w2, m.lm.norm.weight):
        weight.data = weight.data * 2
        assert embed_with_and_without(m, graphs, items) == 0, "other weights, other memory"
        assert embed_with_and_without(m, graphs, items) == 1


def a_later_replay_does_not_reach_an_earlier_ones_results(m):
    graphs, kept = engine.graphs.Graphs(), []
    words = [rendered(m, ["red " * n]) for n in range(18, 0, -1)]  # prefixes of every length
    for samples in words[:1] + words + [2 * w for w in words]:
        batch = to_device(collate(samples, m.processor), m.device)
        with torch.no_grad():
            suffix = m.lm.embed_tokens(batch["suffix"])
            args = m.lm, m.adapter, m.prefix(batch), 2, suffix + torch.randn_like(suffix)
            kept.append((rollout(*args, graphs=graphs), rollout(*args)))
    assert 3 < len(graphs.recorded) < 8
    tol = 0.25 if m.lm.norm.weight.dtype == torch.bfloat16 else 1e-6
    for ours, plain in kept:
        for name, a, b in zip(ours._fields, ours, plain):
            assert not a.requires_grad
            assert_close(a, b, name, tol)


def replays_equal_the_plain_rollout(m, items):
    graphs, short, long = engine.graphs.Graphs(keep=3), [items[0], items[3]], [items[2], items[5]]
    a_shape_is_recorded_when_it_comes_again(m, graphs, items)
    weights_may_change_in_place_and_when_they_move_all_is_forgotten(m, graphs, short)
    with torch.autocast(m.device.type, torch.bfloat16):
        for _ in range(2):
            assert embed_with_and_without(m, graphs, long) == 1, "recorded under autocast"
    _, _, _, cache = next(iter(graphs.recorded.values()))
    for keys, values in cache.prefix:
        keys.fill_(float("nan"))
        values.fill_(float("nan"))
    embed_with_and_without(m, graphs, short)  # nothing of an earlier batch is left in hidden columns
    a_later_replay_does_not_reach_an_earlier_ones_results(m)


def test_graphs_copy_record_and_forget_in_the_right_places(world, monkeypatch):
    with pytest.raises(ValueError, match="CUDA"):
        engine.graphs.record(list, torch.device("cpu"))
    monkeypatch.setattr(engine.graphs, "record", run_again)
    replays_equal_the_plain_rollout(make_model(), mixed_items(world))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cuda_graphs_equal_the_plain_rollout(world, dtype):
    replays_equal_the_plain_rollout(make_model().to("cuda", dtype), mixed_items(world))


# ---- speed and memory
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_on_a_cpu_go_the_other_way_round_to_the_same_values_and_gradients(bias):
    layer = torch.nn.Linear(6, 10, bias=bias).double()
    for B, L in ((1, 1), (16, 1), (4, 12), (7, 7), (15, 1)):  # 1, 16, 48, 49 and 15 rows
        x, results = torch.randn(B, L, 6, dtype=torch.float64), []
        for product in (layer, functools.partial(latent.linear, layer)):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = product(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
        for a, b in zip(*results):
            assert_close(b, a, f"{B} x {L}", 1e-12)


def bytes_kept(m, samples, K):
    """How many autograd keeps for K steps."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        our_rollout(m, samples, K)
    return sum(storage.nbytes() for storage in kept.values())


def test_the_prefix_cache_is_never_copied(model):
    long = model.processor.render(parse_item("what colour? " * 60))
    P, per_token = len(long["ids"]), 3 * 2 * 64 * 8  # layers x (k and v) x G*d x float64
    grown = bytes_kept(model, [long] * 4, 9) - bytes_kept(model, [long] * 4, 1)
    assert grown / 8 < 0.7 * 4 * P * per_token, "a step keeps a copy of the prefix"

    prefix = model.prefix(collate(rendered(model, ["a red square", "what colour?"]), model.processor))
    for gradients_wanted in (True, False):
        with torch.set_grad_enabled(gradients_wanted):
            cache, *_ = prefill(model.lm, prefix)
            before = [k.data_ptr() for k, _ in cache.prefix]
            for k in range(3):
                rope = rotary_behind(model.lm, torch.full((2,), 50 + k), 1, prefix.x)
                decoder(model.lm, prefix.x[:, :1], rope, cache)
        assert [k.data_ptr() for k, _ in cache.prefix] == before
        if gradients_wanted:
            assert [k.shape[2] for k, _ in cache.slots] == [3, 3, 3]
        else:
            assert cache.n == prefix.x.shape[1] + 3 and not cache.slots


@pytest.mark.parametrize("name", FAMILIES)
def test_inference_in_one_block_and_with_weights_side_by_side_is_training_without_gradients(world, name):
    m = tiny_model(name)
    batch = collate(rendered(m, mixed_items(world)), m.processor)
    numbers = 0, 1, 8, 32  # 32: more than there is room for at first
    expected = [m.embed(batch, "latent", K)[0].detach() for K in numbers]
    with torch.no_grad():
        written, _ = m.embed(batch, "cot", limit=80)

    def look(what):
        with torch.no_grad():
            for K, vectors in zip(numbers, expected):
                assert_close(m.embed(batch, "latent", K)[0], vectors, f"{what}, K = {K}", 1e-6)
            assert_close(m.embed(batch, "cot", limit=80)[0], written, f"{what}, cot", 1e-6)

    att = m.lm.layers[0].self_attn
    weights = [att.q_proj.weight, att.k_proj.weight, att.v_proj.weight]
    assert latent.as_one(weights) is None
    look("each by itself")
    side_by_side(m)
    assert torch.equal(latent.as_one(weights), torch.cat(weights))
    look("side by side")
    weights[1].data = weights[1].data.clone()
    assert latent.as_one(weights) is None
    look("one that has moved")


class Casts(TorchDispatchMode):
    """Counts numbers that get another type."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.count += out.numel() if operator is torch.ops.aten._to_copy.default else 0
        return out


def test_autocast_casts_no_weight_twice_where_they_lie_side_by_side():
    m, counts = side_by_side(make_model().float()), []
    batch = collate(rendered(m, ["a"]), m.processor)
    for K in (4, 8):
        with torch.no_grad(), Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            m.embed(batch, "latent", K)
        counts.append(casts.count)
    assert counts[1] - counts[0] < m.lm.layers[0].self_attn.q_proj.weight.numel()


@pytest.mark.parametrize("rows", [1, 2])
def test_recomputation_keeps_what_goes_into_each_layer_its_keys_and_its_values(rows):
    """Neither the queries beside the keys nor the tensors that the cache has copied."""
    m = tiny_model("qwen3_vl").float()
    batch = collate(rendered(m, ["what colour? " * 50] * rows), m.processor)
    prefix = m.prefix(batch)
    with LiveBytes() as live:
        out = prefill(m.lm, prefix, checkpointing=True)
    layers, width, heads = len(m.lm.layers), prefix.x.shape[2], out[0].prefix[0][0][0, :, 0].numel()
    assert live.now < 1.15 * 4 * batch["ids"].numel() * layers * (width + 2 * heads)


def test_what_hangs_on_a_projection_is_called():
    m, called = side_by_side(make_model()), []
    batch = collate(rendered(m, ["a"]), m.processor)
    plain, _ = m.embed(batch, "latent", 2)

    def doubled(module, args, out):
        called.append(module)
        return 2 * out

    att, mlp = m.lm.layers[1].self_attn, m.lm.layers[1].mlp
    for one, other in ((att.k_proj, mlp.up_proj), (att.o_proj, mlp.down_proj)):
        called.clear()
        with one.register_forward_hook(doubled), other.register_forward_hook(doubled):
            changed, _ = m.embed(batch, "latent", 2)
            assert len(called) == 2 * 3  # prefix, a step, the last one with the suffix
            with torch.no_grad():
                assert_close(m.embed(batch, "latent", 2)[0], changed, "without gradients", 1e-6)
            assert len(called) == 4 * 3
        assert not torch.allclose(changed, plain)
    att.o_proj.forward = functools.partial(torch.mul, 0)  # as accelerate does
    assert (m.embed(batch, "latent", 2)[0] - plain).abs().max() > 0.01


# ---- numbers and devices
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "lora"])  # lora: on a Qwen2-VL
def test_the_hot_path_never_waits_for_a_gpu(world, family):
    """Neither for a value, nor for a copy, nor for an index that was left on the CPU."""
    if family == "lora":
        pytest.importorskip("peft", reason="needs peft: pip install peft")
    records = world / "train.jsonl"
    done = run("tests/fake_gpu.py", records, family, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_bfloat16_is_close_to_float32(world, tmp_path):
    m, items = make_model().float(), mixed_items(world)
    m.save_pretrained(tmp_path / "ck")
    half = Plume.from_pretrained(tmp_path / "ck", "cpu", "bfloat16")
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    for mode in ("latent", "single"):
        assert (m.encode(items, mode) * half.encode(items, mode)).sum(1).min() > 0.99

    # and the way of training: float32 weights, bfloat16 compute, recomputed activations
    losses, pairs = [], Pairs(str(world / "train.jsonl"))
    batch = whole(Batches(pairs, m.processor, Curriculum()), (0, FINAL, np.array([1, 3, 5])))
    for casts in (False, True):
        m.zero_grad()
        m.checkpointing = casts
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out = m([batch], 8)
        losses.append(train.losses(out, batch, train.Config())["loss"])
        losses[-1].backward()
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(m).values())
    assert_close(losses[1], losses[0], "loss under autocast", 0.05 * losses[0].item())


@needs_cuda
def test_cuda_equals_cpu(model, world):
    items, m = mixed_items(world), make_model()
    assert_close(m.to("cuda").encode(items), model.encode(items), "float64 on CUDA", 1e-5)
