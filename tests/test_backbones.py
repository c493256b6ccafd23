"""Qwen2.5-VL and Qwen3-VL as backbones: equal to transformers, one by one.

Qwen2-VL has the same tests, and more, in test_plume.py.
"""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import latent
import train
from backbones import families
from backbones.families import BACKBONES
from backbones.shapes import SHAPES
from backbones.vision import normalised
from data import collate, patchify, Processor
from files.clips import load_clip, Part
from files.errors import DataError
from files.items import parse_item
from latent import Cache, decoder
from model import Plume
from tasks.turtle import World, world_tasks
from test_plume import (
    assert_close, gradients, log, mixed_items, our_rollout, reference_step, rendered, SHARED)
from tests.processes import call, run, run_ranks
from tests.samples import COLOURS, edit_json, picture, write_clip

# A Qwen2.5-VL of the tiny preset's size, with windows of 2 x 2 tokens in the first of its two layers
SHAPE_2_5 = SHAPES["tiny"] | dict(
    backbone="qwen2_5_vl",
    vision=dict(
        depth=2, hidden_size=64, intermediate_size=96, out_hidden_size=128, num_heads=4, window_size=56,
        fullatt_block_indexes=[1], tokens_per_second=2, initializer_range=128**-0.5))
# A Qwen3-VL whose features enter behind two layers
SHAPE_3 = SHAPES["tiny3"] | dict(vision=SHAPES["tiny3"]["vision"] | dict(
    depth=3, deepstack_visual_indexes=[0, 2]))
TYPES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def models():
    """{model type: a tiny model in float64, in which every parameter does something}"""
    made = {}
    for name, shape in zip(TYPES, (SHAPE_2_5, SHAPE_3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SHAPES, name, shape)
            torch.manual_seed(0)
            m = Plume.random([f"The {colour} square" for colour in COLOURS] * 20, name).double().eval()
        for parameter_name, p in m.named_parameters():
            if p.ndim == 1 or parameter_name.startswith("adapter"):
                p.data += 0.05 * torch.randn_like(p)
        made[name] = m
    return made


def items_of(world):
    """Of every kind; clips of 8 and 7 frames, and of 14, more than there are pixels for in a square."""
    frames = [picture("blue", "bar", (64, 200), at) for at in range(14)]
    return [*mixed_items(world), {"text": "long <video> and <image>", "video": frames,
                                  "image": picture("red", "bar", (200, 120))}]


def seconds_per_grid(m, item):
    """As transformers counts them: temporal patch / (frames / all frames x frame rate)."""
    return [2 / (len(frames) / (seconds[-1])) for frames, seconds in clips_of(m, item)]


def clips_of(m, item):
    limits = m.processor.limits
    for kind, value in parse_item(item).parts:
        if kind == "video":
            yield load_clip(value, limits.num_frames, limits.frame_rate)


def reference_inputs(m, item):
    """An item as transformers' own inputs."""
    sample, kind = rendered(m, [item])[0], m.backbone.config.model_type
    ids = torch.tensor([sample["ids"]])
    image, video = (ids == m.processor.id[f"<|{medium}_pad|>"] for medium in ("image", "video"))
    kinds = image.int() + 2 * video.int()
    runs, order = [k for k, _ in itertools.groupby(kinds[0].tolist()) if k], []
    for t, _, _ in sample["grids"]:  # a clip of Qwen3-VL stands in t runs
        order.append(runs[0])
        runs = runs[t if kind == "qwen3_vl" and runs[0] == 2 else 1 :]
    assert not runs
    inputs = dict(input_ids=ids)
    for code, name in ((1, "image"), (2, "video")):
        mine = [i for i, k in enumerate(order) if k == code]
        if mine:
            patches = torch.cat([torch.from_numpy(sample["pixels"][i]) for i in mine])
            pixels = normalised(patches, m.processor.backbone).double()
            inputs["pixel_values" if code == 1 else "pixel_values_videos"] = pixels
            inputs[f"{name}_grid_thw"] = torch.tensor([sample["grids"][i] for i in mine])
    if order:
        inputs["mm_token_type_ids"] = kinds
    return sample, inputs


def reference_prefill(m, item):
    sample, inputs = reference_inputs(m, item)
    positions = torch.from_numpy(sample["positions"])[:, None]
    cache = transformers.DynamicCache(config=m.lm.config)
    out = m.backbone.model(**inputs, position_ids=positions, use_cache=True, past_key_values=cache)
    return sample, out.last_hidden_state[0], out.past_key_values


def reference_rollout(m, item, K):
    sample, h, cache = reference_prefill(m, item)
    anchor, z, latents = h[sample["disc"]][None], h[-1][None], []
    position = int(sample["positions"].max()) + 1
    for k in range(K):
        x, _ = m.adapter(z, k, anchor)
        z = reference_step(m, x[:, None], position + k, cache)[:, 0]
        latents.append(z)
    suffix = m.lm.embed_tokens(torch.tensor([sample["suffix"]]))
    return anchor[0], torch.cat(latents), reference_step(m, suffix, position + K, cache)[0]


def differences(m, items):
    """The largest difference of a hidden state of the prefill."""
    batch = collate(rendered(m, items), m.processor)
    prefix = m.prefix(batch)
    cache = Cache(prefix.lengths, prefix.x.shape[1])
    h = decoder(m.lm, prefix.x, prefix.positions, cache, deepstack=prefix.deepstack)
    worst = 0.0
    for row, item in zip(h, items):
        _, theirs, _ = reference_prefill(m, item)
        worst = max(worst, (row[: len(theirs)] - theirs).abs().max().item())
    return worst


@pytest.mark.parametrize("name", TYPES)
def test_prefill_equals_transformers_and_each_difference_shows(models, world, name, monkeypatch):
    m, items = models[name], items_of(world)
    with torch.no_grad():
        assert differences(m, items) < 1e-5
        if name == "qwen2_5_vl":
            return
        monkeypatch.setattr(latent, "add_features", lambda x, places, features: x)
        assert differences(m, items) > 1e-3  # without deepstack
        monkeypatch.undo()
        monkeypatch.setattr(latent, "interleaved", lambda angles, sections: torch.cat(
            [part[axis] for axis, part in enumerate(angles.split(sections, -1))], -1))
        assert differences(m, items) > 1e-3  # with sections in blocks
        monkeypatch.undo()
        for layer in m.lm.layers:
            monkeypatch.delitem(layer.self_attn._modules, "q_norm")
        with pytest.raises(AttributeError):
            differences(m, ["red"])  # transformers misses it, too
        monkeypatch.undo()


def test_queries_and_keys_of_qwen3_are_normalised(models, monkeypatch):
    m = models["qwen3_vl"]
    alone = m.encode(["red"])
    for layer in m.lm.layers:
        monkeypatch.delitem(layer.self_attn._modules, "q_norm")
    assert np.abs(m.encode(["red"]) - alone).max() > 1e-3


@pytest.mark.parametrize("name", TYPES)
def test_batched_rollout_equals_one_by_one_in_values_and_gradients(models, world, name):
    m, items, K = models[name], items_of(world), 3
    samples = rendered(m, items)
    target = torch.randn(len(items), 128, dtype=torch.float64)

    def gradients_of(anchors, latents, suffixes):
        last = [h[len(s["suffix"]) - 1] for h, s in zip(suffixes, samples)]
        loss = (F.normalize(torch.stack(last), dim=-1) * target).sum()
        for anchor, z in zip(anchors, latents):
            loss = loss + anchor.sin().sum() + z.sin().sum()
        m.zero_grad()
        loss.backward()
        return gradients(m)

    naive = [reference_rollout(m, item, K) for item in items]
    theirs = gradients_of(*zip(*naive))
    for checkpointing in (False, True):
        r = our_rollout(m, samples, K, checkpointing=checkpointing)
        ours = gradients_of(r.anchor, r.latents, r.suffix)
        for i, (anchor, latents, suffix) in enumerate(naive):
            assert_close(r.anchor[i], anchor, f"anchor of row {i}")
            assert_close(r.latents[i], latents, f"latents of row {i}")
            assert_close(r.suffix[i, : len(suffix)], suffix, f"suffix of row {i}")
        assert ours.keys() == theirs.keys()
        for parameter, g in theirs.items():
            allowed = 1e-5 * max(1.0, g.abs().max().item())
            assert_close(ours[parameter], g, f"gradient of {parameter}", allowed)
    assert any("deepstack" in parameter for parameter in ours) == (name == "qwen3_vl")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("mode", ["latent", "single", "cot"])
def test_embeddings_do_not_depend_on_neighbours(models, world, name, mode):
    m, items, extra = models[name], items_of(world), dict(limit=6) if mode == "cot" else {}
    alone = np.concatenate([m.encode([item], mode, **extra) for item in items])
    assert_close(m.encode(items, mode, batch_size=4, **extra), alone, "in a batch", 1e-6)
    assert_close(m.encode(items[::-1], mode, **extra)[::-1].copy(), alone, "in another order", 1e-6)


def test_positions_equal_transformers(models, world):
    """Of Qwen3-VL all.  Of Qwen2.5-VL up to the end of a clip, where 5.x goes on earlier, and of clips with
    whole seconds between frame pairs: 4.57 and 5.17 drop fractions.
    """
    for name, m in models.items():
        for item in items_of(world):
            sample, inputs = reference_inputs(m, item)
            if "mm_token_type_ids" not in inputs:
                continue
            grids = {key: inputs.get(key) for key in ("image_grid_thw", "video_grid_thw")}
            if name == "qwen2_5_vl":
                every = seconds_per_grid(m, item)
                if any(seconds != int(seconds) for seconds in every):
                    continue
                grids["second_per_grid_ts"] = torch.tensor(every)
            ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
            theirs, _ = m.backbone.model.get_rope_index(ids, kinds, **grids)
            end = ids.shape[1]
            if name == "qwen2_5_vl" and (kinds == 2).any():
                end = int((kinds[0] == 2).nonzero()[-1]) + 1
            assert np.array_equal(sample["positions"][:, :end], theirs[:, 0, :end].numpy()), (name, item)


# By hand, as transformers 4.49 counts, with which the weights appeared, at 2 positions a second: three
# tokens, a clip of a grid of (4, 4, 4) that lasts so many seconds, then text.  -> the clip's temporal
# positions, and the text's first.  4.57.1 has the same for 4.0; in the others it drops fractions of a second.
ROPE_2_5 = {4.0: ([3, 5, 7, 9], 10), 1.5: ([3, 3, 4, 5], 6), 30.0: ([3, 18, 33, 48], 49)}


@pytest.mark.parametrize("duration", ROPE_2_5)
def test_positions_of_a_clip_count_its_seconds(models, duration, monkeypatch):
    p = models["qwen2_5_vl"].processor
    frame = Image.new("RGB", (56, 56))
    limits = replace(p.limits, frame_rate=8 / duration, video_max_pixels=56 * 56)
    p = Processor(p.tokenizer, "Think.", limits, backbone=p.backbone)
    sample = p.render(parse_item({"video": [frame] * 8, "text": "four"}))
    begin = sample["ids"].index(p.id["<|video_pad|>"])
    times = sample["positions"][:, begin : begin + 17] - sample["positions"][0, begin] + 3
    expected, behind = ROPE_2_5[duration]
    assert times[0, :16:4].tolist() == expected and times[:, 16].tolist() == [behind] * 3


# transformers 4.57.1, get_rope_index of Qwen3-VL: three tokens, <|vision_start|>, 2 x 3 tokens of a frame
# pair, <|vision_end|>, two tokens, the same again, and one token behind
ROPE_3 = [
    [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8, 9, 10, 11, 11, 11, 11, 11, 11, 14, 15],
    [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9, 10, 11, 11, 11, 12, 12, 12, 14, 15],
    [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 11, 12, 13, 14, 15]]


def test_positions_of_frame_pairs_are_those_of_pictures(models, monkeypatch):
    p = models["qwen3_vl"].processor
    monkeypatch.setattr(p, "encode", lambda text: [7, 7])
    monkeypatch.setattr(p, "media", lambda *medium: (
        None, None, p.shown("video", (2, 4, 6), [0.0, 0.5, 1.0, 1.5, 2.0])))
    rendered = p.prefix([7, ("video", "clip"), p.id["<disc_emb>"]])
    assert rendered["positions"].tolist() == ROPE_3


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_the_prompt_of_qwen3_with_a_real_tokenizer():
    print("using", SHARED / "qwen2vl_tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "qwen2vl_tokenizer")
    tokenizer.add_tokens(list(data.PLUME_TOKENS), special_tokens=True)
    facts, template = BACKBONES["qwen3_vl"], data.TEMPLATES["qwen3_vl"]
    limits = families.Limits(video_min_pixels=32 * 32, video_max_pixels=32 * 32)
    p = Processor(tokenizer, "Think.", limits, template=template, backbone=facts)
    clip = [Image.new("RGB", (32, 32))] * 8
    ids = p.render(parse_item({"text": "look: <video> what?", "video": clip}))["ids"]
    pairs = [f"<{s} seconds><|vision_start|><|video_pad|><|vision_end|>" for s in (0.2, 1.2, 2.2, 3.2)]
    text = (f"<|im_start|>user\nlook: {''.join(pairs)} what?\n<disc_emb>\nThink.<|im_end|>\n"
            "<|im_start|>assistant\n<think><bot>")
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text)["input_ids"]


def test_a_clip_of_qwen3_is_pictures_behind_their_seconds(models, tmp_path):
    m = models["qwen3_vl"]
    path = str(tmp_path / "clip.mp4")
    write_clip(path, [picture("red", "bar", (64, 64), at) for at in range(13)])  # 8 a second
    decode = m.processor.tokenizer.decode

    def prompt(video):
        text = decode(m.processor.render(parse_item({"video": video, "text": "what?"}))["ids"])
        return text.replace("<|video_pad|>", "").split("<|im_start|>user\n")[1].split("what?")[0]

    def expected(*seconds):
        return "".join(f"<{s} seconds><|vision_start|><|vision_end|>" for s in seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m.processor.limits, "num_frames", 4)
        assert prompt(path) == expected("0.2", "1.2")  # frames 0, 4, 8, 12
        assert prompt([picture("red", "bar")] * 3) == expected("0.2", "1.0")  # 2 a second; the last one twice
        part = Part(path, 0.5, 1.0)
        assert prompt(part) == expected("0.1", "0.3")  # as a file of its own
        assert load_clip(part, 4)[1] == [0, 0.125, 0.25, 0.375, 0.5]
    assert not decode(m.processor.render(parse_item("x"))["ids"]).count("system")  # no system prompt


@pytest.mark.parametrize("count, size, budget", [
    (8, (640, 360), 32), (7, (640, 360), 32), (2, (90, 400), 8), (5, (333, 77), 2), (3, (20, 30), 300),
    (1, (500, 500), 32)])
def test_the_size_of_a_clip_of_qwen3_is_that_of_transformers_rule(models, count, size, budget):
    m = models["qwen3_vl"]
    limits = replace(m.processor.limits, num_frames=8, video_max_pixels=budget * 1024)
    p = Processor(m.processor.tokenizer, "Think.", limits, backbone=m.processor.backbone)
    width, height = p.size("video", [Image.new("RGB", size)] * count)
    most, least = 8 * budget * 1024, 8 * limits.video_min_pixels
    theirs = data.resize_clip(max(count, 2), *size[::-1], 2, 32, least, most)
    assert (height, width) == theirs
    assert width * height * max(count, 2) <= most or count % 2


def test_pixels_equal_the_family_s_own_processor():
    image = picture("red", "circle", (150, 90))
    for name, facts in BACKBONES.items():
        low, high = facts.side**2, 20 * facts.side**2
        theirs = Qwen2VLImageProcessorPil(
            min_pixels=low, max_pixels=high, patch_size=facts.patch, image_mean=facts.mean,
            image_std=facts.std)(image, return_tensors="pt")
        ours, grid = patchify([image], data.target_size(*image.size, low, high, facts), facts)
        assert grid == tuple(theirs["image_grid_thw"][0].tolist())
        assert_close(normalised(torch.from_numpy(ours), facts), theirs["pixel_values"], name, 1e-6)


@pytest.mark.parametrize("name", TYPES)
def test_saved_and_loaded_it_is_the_same_and_transformers_reads_it(models, world, name, tmp_path):
    m, items = models[name], items_of(world)
    m.save_pretrained(tmp_path / "own")
    loaded = Plume.from_pretrained(tmp_path / "own", "cpu", torch.float32)
    assert loaded.settings == m.settings and loaded.processor.backbone == m.processor.backbone
    assert_close(loaded.encode(items), m.encode(items), "loaded", 1e-4)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "own", dtype=torch.float32)
    state = loaded.backbone.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in theirs.state_dict().items())
    with pytest.raises(DataError, match="the released layout is that of a Qwen2-VL"):
        m.save_pretrained(tmp_path / "released", released=True)


@pytest.mark.parametrize("name", TYPES)
def test_the_published_layouts_start_a_training(models, world, name, tmp_path):
    """A plain model, as transformers writes it (new names) and as 4.x did (old ones), in shards."""
    m = models[name]
    for old in (False, True):
        folder = tmp_path / f"plain {old}"
        m.save_pretrained(tmp_path / "own")
        backbone = transformers.AutoModelForImageTextToText.from_pretrained(
            tmp_path / "own", dtype=torch.float32)
        backbone.config.__dict__.pop("plume")
        backbone.save_pretrained(folder, max_shard_size="400KB", save_original_format=old)
        m.processor.tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(
            dict(size=dict(shortest_edge=65536, longest_edge=16777216))))
        assert len(list(folder.glob("*.safetensors"))) > 1
        start = Plume.from_pretrained(folder, "cpu", torch.float32)
        limits, side = start.settings["limits"], start.processor.backbone.side
        assert limits["min_pixels"] == 65536 and limits["video_max_pixels"] == 32 * side**2
        assert start.settings["template"] == data.TEMPLATES[name]
        for key, tensor in start.backbone.state_dict().items():
            assert torch.equal(tensor, backbone.state_dict()[key]), key
    edit_json(folder / "config.json", model_type="qwen3_5")
    with pytest.raises(DataError, match="builds on qwen2_vl, qwen2_5_vl, qwen3_vl"):
        Plume.from_pretrained(folder, "cpu")


def test_a_released_adapter_on_another_backbone_is_refused(models, tmp_path):
    folder = tmp_path / "mixed"
    models["qwen3_vl"].save_pretrained(folder)
    edit_json(folder / "config.json", plume=None)
    with pytest.raises(DataError, match="no 'plume' block"):
        Plume.from_pretrained(folder, "cpu")


def test_turtle_world_is_drawn_for_the_backbone():
    facts = BACKBONES["qwen3_vl"]
    for task in world_tasks(facts).values():
        for kind, value in (*task.queries[0].parts, *task.corpus[0].parts):
            if kind != "text":
                image = value if kind == "image" else value[0]
                assert image.width % 32 == image.height % 32 == 0
    board = world_tasks(facts)["image_ret/turtle"].corpus[5].parts[0][1]
    patches, _ = patchify([board], board.size, families.BACKBONES["qwen3_vl"])
    assert normalised(torch.from_numpy(patches), facts).abs().median() < 0.01  # the ground is 0
    assert World().backbone.side == 28


def test_training_goes_through_the_command_line(tmp_path):
    run("train.py", "--shape", "tiny3", "--steps", 3, "--segments", 2, "--global_batch", 8,
        "--micro_batch", 4, "--checkpointing", "true", "--out", tmp_path / "out", "--workers", 0)
    printed = run("eval.py", "--ckpt", tmp_path / "out" / "checkpoint", "--task", "video_ret").stdout
    assert "video_ret/turtle" in printed
    m = Plume.from_pretrained(tmp_path / "out" / "checkpoint", "cpu")
    assert m.backbone.config.model_type == "qwen3_vl" and m.settings["limits"]["frame_rate"] == 2.0
    failed = call("train.py", "--shape", "tin3", "--out", tmp_path / "no", check=False)
    assert "--shape 'tin3' is not known. Did you mean 'tiny3'" in failed.stderr


def test_frozen_vision_still_trains_all_its_mergers():
    cfg = replace(train.Config(), freeze_vision="true", shape="tiny3")
    m = train.build_model(cfg, set(), World(), torch.device("cpu"))
    trained = {name for name, p in m.backbone.model.visual.named_parameters() if p.requires_grad}
    assert trained and all("merger" in name for name in trained)
    assert any("deepstack_merger_list" in name for name in trained)


def test_shards_on_two_ranks_train_as_one_process(tmp_path):
    flags = ["--shape", "tiny3", "--steps", 4, "--segments", 2, "--global_batch", 8, "--workers", 0,
             "--gate", 0, "--checkpointing"]
    run("train.py", *flags, "--out", tmp_path / "one")
    run_ranks(2, "train.py", *flags, "--fsdp", "--micro_batch", 2, "--out", tmp_path / "two")
    one, two = (log(tmp_path / name) for name in ("one", "two"))
    assert max(row["K"] for row in one) == 2
    for name in ("ce", "gen", "disc", "read", "norm"):
        expected = pytest.approx([row[name] for row in one], rel=2e-3, abs=1e-4)
        assert [row[name] for row in two] == expected, name
