"""Qwen2.5-VL and Qwen3-VL as backbones: where they differ from Qwen2-VL.

That all three compute what transformers does stands in test_plume.py.
"""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

import data
import latent
import train
from backbones.families import BACKBONES, Limits
from backbones.vision import normalised
from data import patchify, Processor
from files.clips import load_clip, Part
from files.errors import DataError
from files.items import parse_item
from model import Plume
from tasks.turtle import World, world_tasks
from test_plume import assert_close, log, mixed_items, prefill_difference, real_tokenizer, tiny_model
from tests.processes import call, run, run_ranks
from tests.samples import edit_json, picture, write_clip

OTHERS = ("qwen2_5_vl", "qwen3_vl")


def in_blocks(angles, sections):
    return torch.cat([part[axis] for axis, part in enumerate(angles.split(sections, -1))], -1)


@pytest.mark.parametrize("name, other", [
    ("add_features", lambda x, places, features: x),
    ("interleaved", in_blocks),
    ("hasattr", lambda attention, name: False),  # a norm of queries and keys
], ids=["deepstack", "rotation", "norms"])
def test_each_difference_of_qwen3_shows(world, monkeypatch, name, other):
    monkeypatch.setattr(latent, name, other, raising=False)
    assert prefill_difference(tiny_model("qwen3_vl"), mixed_items(world)) > 1e-3


# By hand, as transformers 4.49 counts, with which the weights appeared, at 2 positions a second: three
# tokens, a clip of a grid of (4, 4, 4) that lasts so many seconds, then text.  -> the clip's temporal
# positions, and the text's first.  4.57.1 has the same for 4.0; in the others it drops fractions of a second.
ROPE_2_5 = {4.0: ([3, 5, 7, 9], 10), 1.5: ([3, 3, 4, 5], 6), 30.0: ([3, 18, 33, 48], 49)}


@pytest.mark.parametrize("duration", ROPE_2_5)
def test_positions_of_a_clip_count_its_seconds(duration):
    p = tiny_model("qwen2_5_vl").processor
    limits = replace(p.limits, frame_rate=8 / duration, video_max_pixels=56 * 56)
    p = Processor(p.tokenizer, "Think.", limits, backbone=p.backbone)
    sample = p.render(parse_item({"video": [Image.new("RGB", (56, 56))] * 8, "text": "four"}))
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


def test_positions_of_frame_pairs_are_those_of_pictures(monkeypatch):
    p = tiny_model("qwen3_vl").processor
    monkeypatch.setattr(p, "encode", lambda text: [7, 7])
    monkeypatch.setattr(p, "media", lambda *medium: (
        None, None, p.shown("video", (2, 4, 6), [0.0, 0.5, 1.0, 1.5, 2.0])))
    rendered = p.prefix([7, ("video", "clip"), p.id["<disc_emb>"]])
    assert rendered["positions"].tolist() == ROPE_3


def test_the_prompt_of_qwen3_with_a_real_tokenizer():
    limits = Limits(video_min_pixels=32 * 32, video_max_pixels=32 * 32)
    p = Processor(real_tokenizer(), "Think.", limits, template=data.TEMPLATES["qwen3_vl"],
                  backbone=BACKBONES["qwen3_vl"])
    clip = [Image.new("RGB", (32, 32))] * 8
    ids = p.render(parse_item({"text": "look: <video> what?", "video": clip}))["ids"]
    pairs = [f"<{s} seconds><|vision_start|><|video_pad|><|vision_end|>" for s in (0.2, 1.2, 2.2, 3.2)]
    text = (f"<|im_start|>user\nlook: {''.join(pairs)} what?\n<disc_emb>\nThink.<|im_end|>\n"
            "<|im_start|>assistant\n<think><bot>")
    assert p.tokenizer.decode(ids) == text
    assert ids == p.tokenizer(text)["input_ids"]


def test_a_clip_of_qwen3_is_pictures_behind_their_seconds(tmp_path, monkeypatch):
    p, path = tiny_model("qwen3_vl").processor, str(tmp_path / "clip.mp4")
    write_clip(path, [picture("red", "bar", (64, 64), at) for at in range(13)])  # 8 a second
    monkeypatch.setattr(p.limits, "num_frames", 4)
    part = Part(path, 0.5, 1.0)
    for video, seconds in (
        (path, ("0.2", "1.2")),  # frames 0, 4, 8, 12
        ([picture("red", "bar")] * 3, ("0.2", "1.0")),  # 2 a second; the last one twice
        (part, ("0.1", "0.3")),  # as a file of its own
    ):
        text = p.tokenizer.decode(p.render(parse_item({"video": video, "text": "what?"}))["ids"])
        pairs = "".join(f"<{s} seconds><|vision_start|><|vision_end|>" for s in seconds)
        assert text.replace("<|video_pad|>", "").startswith(f"<|im_start|>user\n{pairs}what?")  # no system
    assert load_clip(part, 4)[1] == [0, 0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("total, rate, fps, most", [
    (40, 8, 2.0, 16), (40, 8, 2.0, 8), (41, 8, 1.5, 100), (9, 24, 2.0, 8), (3, 24, 2.0, 8),
    (60, 29.97, 7.0, 90), (48, 24, 2.0, 90), (10, 10, 100.0, 90), (40, 8, 0.1, 8), (1, 25, 2.0, 8)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_a_second_are_those_of_qwen3s_own_rule(total, rate, fps, most, suffix, tmp_path):
    path, rule = str(tmp_path / f"clip.{suffix}"), Qwen3VLVideoProcessor(max_frames=most, fps=fps)
    rate = Fraction(rate).limit_denominator(1001)
    write_clip(path, [picture("red", "bar", (64, 64), at % 16) for at in range(total)], rate)
    expected = rule.sample_frames(VideoMetadata(total_num_frames=total, fps=float(rate))).tolist()
    for source, own in ((path, 0.0), (Part(path, fps=fps), 9.0)):  # an item's own wins
        frames, seconds = load_clip(source, most, 2.0, own or fps)
        assert [round(second * rate) for second in seconds[:-1]] == expected
        assert len(frames) == len(expected)
    frames, seconds = load_clip([Image.new("RGB", (9, 9))] * total, most, float(rate), fps)
    assert [round(second * rate) for second in seconds[:-1]] == expected
    half = Part(path, 0, total / 2 / rate)
    count = len(load_clip(half, most, 2.0, fps)[0])
    theirs = rule.sample_frames(VideoMetadata(total_num_frames=-(-total // 2), fps=float(rate)))
    assert count == len(theirs)


def test_a_checkpoint_keeps_its_frames_a_second_and_an_older_one_has_none(tmp_path):
    m = Plume.random(["red"], "tiny3", limits=dict(fps=1.5))
    m.save_pretrained(tmp_path / "ck")
    assert Plume.from_pretrained(tmp_path / "ck", "cpu").processor.limits.fps == 1.5
    config = json.loads((tmp_path / "ck" / "config.json").read_text())
    del config["plume"]["limits"]["fps"]
    (tmp_path / "ck" / "config.json").write_text(json.dumps(config))
    assert Plume.from_pretrained(tmp_path / "ck", "cpu").processor.limits.fps == 0
    for wrong in (-1.0, float("nan"), 2):
        with pytest.raises(DataError, match="fps .*: needs a number of at least 0"):
            Limits(fps=wrong)


@pytest.mark.parametrize("count, size, budget", [
    (8, (640, 360), 32), (7, (640, 360), 32), (2, (90, 400), 8), (5, (333, 77), 2), (3, (20, 30), 300),
    (1, (500, 500), 32)])
def test_the_size_of_a_clip_of_qwen3_is_that_of_transformers_rule(count, size, budget):
    p = tiny_model("qwen3_vl").processor
    limits = replace(p.limits, num_frames=8, video_max_pixels=budget * 1024)
    p = Processor(p.tokenizer, "Think.", limits, backbone=p.backbone)
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
        assert_close(normalised(torch.from_numpy(ours), facts), theirs["pixel_values"], name)


def read_by_transformers(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_is_read_by_transformers_and_a_plain_model_starts_a_training(world, name, tmp_path):
    """A plain model, as transformers writes it (new names) and as 4.x did (old ones), in shards."""
    m, items, folder = tiny_model(name), mixed_items(world), tmp_path / "own"
    m.save_pretrained(folder)
    loaded, backbone = Plume.from_pretrained(folder, "cpu", torch.float32), read_by_transformers(folder)
    assert loaded.settings == m.settings and loaded.processor.backbone == m.processor.backbone
    assert_close(loaded.encode(items), m.encode(items), "loaded", 1e-4)
    with pytest.raises(DataError, match="the released layout is that of a Qwen2-VL"):
        m.save_pretrained(tmp_path / "released", released=True)
    theirs, state = backbone.state_dict(), loaded.backbone.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in theirs.items())

    backbone.config.__dict__.pop("plume")
    for old in (False, True):
        folder = tmp_path / f"plain {old}"
        backbone.save_pretrained(folder, max_shard_size="400KB", save_original_format=old)
        m.processor.tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(
            dict(size=dict(shortest_edge=65536, longest_edge=16777216))))
        assert len(list(folder.glob("*.safetensors"))) > 1
        start = Plume.from_pretrained(folder, "cpu", torch.float32)
        limits, side = start.settings["limits"], start.processor.backbone.side
        assert limits["min_pixels"] == 65536 and limits["video_max_pixels"] == 32 * side**2
        assert start.settings["template"] == data.TEMPLATES[name]
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in start.backbone.state_dict().items())
    edit_json(folder / "config.json", model_type="qwen3_5")
    with pytest.raises(DataError, match="builds on qwen2_vl, qwen2_5_vl, qwen3_vl"):
        Plume.from_pretrained(folder, "cpu")
    edit_json(tmp_path / "own" / "config.json", plume=None)  # a released adapter needs a Qwen2-VL
    with pytest.raises(DataError, match="no 'plume' block"):
        Plume.from_pretrained(tmp_path / "own", "cpu")


def test_turtle_world_is_drawn_for_the_backbone():
    facts = BACKBONES["qwen3_vl"]
    tasks = world_tasks(facts)
    for task in tasks.values():
        for kind, value in (*task.queries[0].parts, *task.corpus[0].parts):
            if kind != "text":
                image = value if kind == "image" else value[0]
                assert image.width % 32 == image.height % 32 == 0
    board = tasks["image_ret/turtle"].corpus[5].parts[0][1]
    patches, _ = patchify([board], board.size, facts)
    assert normalised(torch.from_numpy(patches), facts).abs().median() < 0.01  # the ground is 0
    assert World().backbone.side == 28


def test_frozen_vision_still_trains_all_its_mergers():
    cfg = replace(train.Config(), freeze_vision="true", shape="tiny3")
    m = train.build_model(cfg, set(), World(), torch.device("cpu"))
    trained = {name for name, p in m.backbone.model.visual.named_parameters() if p.requires_grad}
    assert trained and all("merger" in name for name in trained)
    assert any("deepstack_merger_list" in name for name in trained)


def test_training_goes_through_the_command_line_and_shards_on_two_ranks_train_as_one_process(tmp_path):
    flags = ["--shape", "tiny3", "--steps", 4, "--segments", 2, "--global_batch", 8, "--workers", 0,
             "--gate", 0, "--last_stage", 0.5, "--checkpointing", "true"]
    run("train.py", *flags, "--out", tmp_path / "one", "--micro_tokens", 600)
    run_ranks(2, "train.py", *flags, "--fsdp", "--micro_tokens", 300, "--out", tmp_path / "two")
    one, two = (log(tmp_path / name) for name in ("one", "two"))
    assert max(row["K"] for row in one) == 2
    for name in ("ce", "gen", "disc", "read", "norm"):
        expected = pytest.approx([row[name] for row in one], rel=2e-3, abs=1e-4)
        assert [row[name] for row in two] == expected, name
    checkpoint = tmp_path / "one" / "checkpoint"
    printed = run("eval.py", "--ckpt", checkpoint, "--task", "video_ret").stdout
    assert "video_ret/turtle" in printed
    m = Plume.from_pretrained(checkpoint, "cpu")
    assert m.backbone.config.model_type == "qwen3_vl" and m.settings["limits"]["frame_rate"] == 2.0
    failed = call("train.py", "--shape", "tin3", "--out", tmp_path / "no", check=False)
    assert "--shape 'tin3' is not known. Did you mean 'tiny3'" in failed.stderr
