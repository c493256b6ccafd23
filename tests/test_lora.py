"""train.py --lora: what is trained, and that a merged checkpoint and a resumed run are the same model."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from data import PLUME_TOKENS
from engine import trained
from engine.train_flags import settings_of
from engine.trained import (
    add_lora, choose_trained, load_trained, merged_weights, size_of_merged, trained_weights)
from files.errors import DataError
from hub.layouts import write_checkpoint
from hub.weights import count_parameters
from model import Plume
from test_plume import assert_close, eight_pairs, gradients, log, make_model, QUICK, weights, whole
from tests.processes import call, run, run_ranks, Started
from tests.test_runs import assert_equal_weights, refused, state_of, timeless

peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
CONFIG = train.Config(lora=4, init="x")


def with_lora(cfg=CONFIG, **settings):
    """A model with LoRA in which everything that is trained does something."""
    model = make_model(**settings)
    torch.manual_seed(1)
    add_lora(cfg, model)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return model


def merged(model, folder):
    folder.mkdir()
    write_checkpoint(model, folder, state=merged_weights(model))
    return Plume.from_pretrained(folder, "cpu", torch.float32)


@pytest.mark.parametrize("settings", [{}, dict(shape="tiny3", tied=False)], ids=["tied", "qwen3_vl, untied"])
def test_the_merged_model_computes_the_same(settings, world, tmp_path):
    model = with_lora(**settings)
    plain = merged(model, tmp_path / "merged")
    items = ["red", {"image": str(world / "red bar.png")}, "a <gen_emb> that is text", "blue " * 20]
    for mode in ("latent", "single", "cot"):
        assert_close(plain.encode(items, mode, limit=9), model.encode(items, mode, limit=9), mode, 1e-5)
    batch = whole(*eight_pairs(world / "train.jsonl", model.processor))
    losses = [train.losses(m([batch], 8), batch, CONFIG)["loss"].item() for m in (model, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert size_of_merged(model, merged_weights(model)) == count_parameters(plain)
    with pytest.raises(DataError, match="nothing is saved.*merge adapters first"):
        model.save_pretrained(tmp_path / "unmerged")
    assert np.abs(plain.encode(items) - make_model(**settings).encode(items)).max() > 1e-3


def test_what_is_trained_has_the_gradients_of_the_whole_model(world):
    """At B = 0 the gradients of new rows and adapter are the whole model's; of B they are 2 dW A^T."""
    model, other = make_model(tied=False), make_model(tied=False)
    torch.manual_seed(1)
    choose_trained(CONFIG, other)
    batch = whole(*eight_pairs(world / "train.jsonl", model.processor))
    for m in (model, other):
        train.losses(m([batch], 8), batch, CONFIG)["loss"].backward()
    expected, tokens = gradients(model), [model.processor.id[token] for token in PLUME_TOKENS]
    found = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    assert {name for name in expected if name.startswith("adapter.")} < found.keys()
    for name, g in found.items():
        if name.endswith("new_rows"):
            right = expected[name.replace("new_rows", "weight")][tokens]
        elif "lora_B" in name:
            a = other.get_parameter(name.replace("lora_B", "lora_A"))
            right = 2 * expected[name.replace("lora_B.default.", "")] @ a.T
        elif "lora_A" in name:
            right = torch.zeros_like(g)
        else:
            right = expected[name]
        assert_close(g, right, name, 1e-9)
    assert sum("lora_B" in name for name in found) == 7 * len(model.lm.layers)
    frozen = [p for p in other.parameters() if not p.requires_grad]
    assert len(frozen) > 30 and all(p.grad is None for p in frozen)


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    run("train.py", "--data", world / "train.jsonl", "--out", out, "--steps=3", *QUICK, "--gate=0")
    return ["train.py", "--data", world / "train.jsonl", "--init", out / "checkpoint", *QUICK, "--lora=4",
            "--segments=1", "--steps_per_segment=2", "--gate=0", "--replay=0"]


def test_interrupted_and_resumed_equals_uninterrupted_and_the_checkpoint_is_plain(base, tmp_path):
    whole, parts, command = tmp_path / "whole", tmp_path / "parts", [*base, "--steps=8"]
    run(*command, "--out", whole)
    running = Started(*command, "--out", parts)
    running.wait_for("step 3/")
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(60) == 130 and log(parts)[-1]["step"] < 7
    refused("another configuration: lora: 4 then, 2 now", *command, "--lora=2", "--out", parts, "--resume")
    run(*command, "--out", parts, "--resume")
    assert_equal_weights(whole, parts)
    assert timeless(whole) == timeless(parts)

    before, after = load_file(f"{base[4]}/model.safetensors"), weights(whole)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and not any("visual" in name or "norm" in name for name in changed)
    assert sum("_proj" in name for name in changed) == 7 * 3
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1)
    tokens = Plume.from_pretrained(whole / "checkpoint", "cpu").processor.id
    assert rows.sum() and set(rows.nonzero()[:, 0].tolist()) <= {tokens[token] for token in PLUME_TOKENS}
    state = state_of(whole / "checkpoint")
    assert state["optimizer"]["state"].keys() == state["trained"].keys()
    assert not any("layers" in name and "lora_" not in name for name in state["trained"])


@pytest.mark.parametrize("bits, package", [(8, "torchao"), (4, "bitsandbytes")])
def test_a_run_with_rounded_weights_goes_on_bit_for_bit(bits, package, base, tmp_path, monkeypatch):
    pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    backward, command = train.backward, [*base, "--steps=4", "--save_every=2", "--workers=0", "--device=cpu"]
    command.append(f"--lora_bits={bits}")
    call(*command, "--out", tmp_path / "whole")

    def die(model, batch, *rest):
        assert batch["step"] < 3
        return backward(model, batch, *rest)

    with monkeypatch.context() as patched, pytest.raises(AssertionError):
        patched.setattr(train, "backward", die)
        call(*command, "--out", tmp_path / "parts")
    assert state_of(tmp_path / "parts" / "checkpoint")["step"] in (2, 3)
    call(*command, "--out", tmp_path / "parts", "--resume")
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    assert log(tmp_path / "whole")[-1]["step"] == 3


def test_a_run_goes_on_from_the_same_frozen_weights_alone(base, tmp_path):
    command = [*base, "--steps=2", "--out", tmp_path / "out"]
    run(*command)
    Plume.random(["red"], seed=1).save_pretrained(tmp_path / "other")
    command[4] = tmp_path / "other"
    refused("frozen: '[0-9a-f]{16}' then, '[0-9a-f]{16}' now", *command, "--resume")


def test_a_run_goes_on_with_the_settings_that_it_has_begun_with(tmp_path):
    """Also where a flag has set the default, which does not show among the flags."""
    Plume.random(["red"], latent_positions="cache").save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "train_state.pt").touch()
    settings = settings_of(replace(CONFIG, resume=True, out=str(tmp_path)), set())
    assert settings["latent_positions"] == "cache" and settings["latent_steps"] == 8


def test_two_ranks_with_rounded_weights_train_the_same(base, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    flags = [*base, "--steps=2", "--lora_bits=8"]
    run(*flags, "--out", tmp_path / "one")
    run_ranks(2, *flags, "--out", tmp_path / "two")
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two")):
        assert a["ce"] == pytest.approx(b["ce"], 2e-3) and a["norm"] == pytest.approx(b["norm"], 2e-3)


def test_two_ranks_micro_batches_and_recomputing_train_the_same(base, tmp_path):
    flags = [*base, "--steps=6", "--last_stage=0.5"]
    run(*flags, "--out", tmp_path / "one")
    run_ranks(2, *flags, "--micro_tokens=150", "--checkpointing", "--out", tmp_path / "two")
    one, two = (state_of(tmp_path / name / "checkpoint")["trained"] for name in ("one", "two"))
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two")):
        for name in ("ce", "gen", "bal", "norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-4), (a["step"], name)
    assert one.keys() == two.keys() and any("lora_B" in name and one[name].any() for name in one)


@pytest.mark.parametrize("bits, package, least", [(8, "torchao", 0.995), (4, "bitsandbytes", 0.8)])
def test_rounded_frozen_weights_embed_nearly_the_same_and_are_merged(bits, package, least, world, tmp_path):
    pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    items = ["red", {"image": str(world / "red bar.png")}, "a longer text about a blue bar"]
    exact, rounded = make_model().float(), make_model().float()
    add_lora(replace(CONFIG, lora_bits=bits), rounded)
    assert count_parameters(rounded) == count_parameters(with_lora())
    vectors = rounded.encode(items)
    cosine = (rounded.encode(items, "single") * exact.encode(items, "single")).sum(1)
    assert least <= cosine.min() and cosine.max() < 1 - 1e-7
    batch = whole(*eight_pairs(world / "train.jsonl", rounded.processor))
    train.losses(rounded([batch], 8), batch, CONFIG)["loss"].backward()
    assert all(g.isfinite().all() for g in gradients(rounded).values())
    assert_close(merged(rounded, tmp_path / "merged").encode(items), vectors, "merged", 1e-5)


def test_a_weight_is_rounded_on_its_way_to_the_device():
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    layers = make_model().float().lm.layers
    trained.quantize(layers, 8, torch.device("meta"))
    there = {name for name, p in layers.named_parameters() if p.device.type == "meta"}
    assert there >= {name for name, _ in layers.named_parameters() if "_proj" in name}


def test_the_state_has_all_that_is_trained():
    model, other = with_lora(), with_lora()
    for p in other.parameters():
        if p.requires_grad:
            p.data.zero_()
    load_trained(other, trained_weights(model))
    assert (other.encode(["red"]) == model.encode(["red"])).all()


@pytest.mark.parametrize("flags, why", [
    (dict(lora_targets="q_proj,lm_head"), "--lora_targets 'q_proj,lm_head': 'lm_head' is none of q_proj, "),
    (dict(lora_targets="qproj"), "'qproj' is none of .*Did you mean 'q_proj'"),
    (dict(init=""), "--lora: needs --init"),
    (dict(fsdp=True), "--lora: leave out --fsdp"),
    (dict(freeze_backbone=True), "leave out --freeze_backbone"),
    (dict(freeze_vision="false"), "leave out --freeze_backbone and --freeze_vision"),
    (dict(lora_bits=3), "--lora_bits 3: needs 8 or 4"),
    (dict(lora=0, lora_bits=8), "--lora_targets and --lora_bits belong to --lora")])
def test_what_does_not_go_together_is_refused(flags, why):
    with pytest.raises(DataError, match=why):
        trained.check_lora(replace(CONFIG, **flags))


def test_a_missing_package_is_named_and_the_run_must_not_replace_its_own_start(monkeypatch, trained_run):
    with pytest.raises(DataError, match="a checkpoint of this run would take its place"):
        trained.check_lora(replace(CONFIG, init=str(trained_run / "checkpoint"), out=str(trained_run)))
    monkeypatch.setattr(trained.importlib.util, "find_spec", {"peft": None}.get)
    with pytest.raises(DataError, match="pip install peft"):
        trained.check_lora(CONFIG)


@pytest.fixture
def trained_run(base):
    return base[4].parent
