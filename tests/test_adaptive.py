"""Mode auto, the adaptive curriculum, learnt tokens in parallel, a frozen backbone, untied embeddings."""

import contextlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from curriculum import Curriculum, Progress, Stage
from data import collate
from files.errors import DataError
from files.items import Side
from latent import rollout
from model import Plume
from test_plume import (
    assert_close, GOLDEN, log, make_model, mixed_items, QUICK, reference_prefill, reference_step, rendered)
from tests.processes import call, run
from engine import train_flags
from tests import test_backbones as backbones

K, LIMIT = 4, 6


@pytest.fixture(scope="module", params=[
    {}, dict(shape="tiny3"), dict(latent_positions="cache", adapter=dict(kind="mlp"))],
    ids=["", "qwen3-vl", "positions of the cache"])
def adaptive(request):
    return make_model(adaptive=True, latent_steps=K, **request.param)


def by_hand(m, item, done, limit=LIMIT):
    """One item in mode auto, through transformers' modules and cache -> embedding, steps, tokens written."""
    sample, h, cache = backbones.reference_prefill(m, item)
    anchor, z, position = h[sample["disc"]][None], h[-1][None], int(sample["positions"].max()) + 1
    if m.settings["latent_positions"] == "cache":
        position = len(sample["ids"])
    eot, end = m.processor.id["<eot>"], m.processor.id["<gen_emb>"]
    for k in range(K + 1):
        if m.backbone.lm_head(z).softmax(-1)[0, eot] > done:
            suffix = m.lm.embed_tokens(torch.tensor([sample["suffix"]]))
            h = reference_step(m, suffix, position, cache)[0, -1]
            return F.normalize(h, dim=-1), k, 0
        if k < K:
            x, _ = m.adapter(z, k, anchor)
            z, position = reference_step(m, x[:, None], position, cache)[:, 0], position + 1
    written = []
    while end not in written:
        written.append(end if len(written) == limit - 1 else int(m.backbone.lm_head(z).argmax(-1)))
        x = m.lm.embed_tokens(torch.tensor([written[-1:]]))
        z, position = reference_step(m, x, position, cache)[0], position + 1
    return F.normalize(z[0], dim=-1), K, len(written)


@torch.no_grad()
def readings(m, items):
    """(N, K+1): the probability of <eot> that the state behind 0 .. K steps gives."""
    batch = collate(rendered(m, items), m.processor)
    suffix, rule = m.lm.embed_tokens(batch["suffix"]), m.settings["latent_positions"]
    r = rollout(m.lm, m.adapter, m.prefix(batch), K, suffix, rule)
    states = torch.cat([r.start[:, None], r.latents], 1)
    return m.backbone.lm_head(states).softmax(-1)[..., m.processor.id["<eot>"]]


def threshold(m, items):
    """One at which some stop early, some late, some never; in the middle between two readings."""
    p = readings(m, items)
    middle = sorted(p.amax(1).tolist())[len(items) // 3 :][:2]
    return sum(middle) / 2


def test_auto_is_the_naive_computation_for_mixed_items_on_the_batch_and_on_every_row_alone(adaptive, world):
    items = mixed_items(world) + ["another word", "and one more, which is longer", "7", "nine nine nine"]
    done = threshold(adaptive, items)
    expected, steps, tokens = zip(*[by_hand(adaptive, item, done) for item in items])
    assert len(set(steps)) > 2 and 0 in tokens and max(tokens) > 0, (steps, tokens)  # all cases are there
    for size in (1, 3, len(items)):
        spent = {}
        ours = adaptive.encode(items, "auto", batch_size=size, limit=LIMIT, done=done, spent=spent)
        assert spent == dict(steps=list(steps), tokens=list(tokens)), f"batches of {size}"
        for i, vector in enumerate(expected):
            assert_close(ours[i], vector.detach().float(), f"item {i}, batches of {size}", 1e-5)
    order = np.random.default_rng(0).permutation(len(items))
    again = adaptive.encode([items[i] for i in order], "auto", batch_size=4, limit=LIMIT, done=done)
    assert_close(again, ours[order], "another order", 1e-6)


def test_a_row_that_stops_has_the_embedding_of_as_many_steps(adaptive, world):
    items, m = mixed_items(world), adaptive
    done, spent = threshold(m, items), {}
    ours = m.encode(items, "auto", limit=LIMIT, done=done, spent=spent)
    for item, vector, steps, tokens in zip(items, ours, *spent.values()):
        if not tokens:
            assert_close(vector, m.encode([item], steps=steps)[0], f"{steps} steps", 1e-6)
    at_once = m.encode(items, "auto", done=0.0, spent=(none := {}))
    assert none["steps"] == [0] * len(items)
    assert_close(at_once, m.encode(items, steps=0), "all stop before the first step", 1e-6)
    m.encode(items, "auto", done=1.0, limit=LIMIT, spent=(never := {}))
    assert never["steps"] == [K] * len(items) and min(never["tokens"]) > 0
    # a model without steps never stops either: what is left is mode cot
    none = make_model(adaptive=True, latent_steps=0)
    written = none.encode(items, "auto", limit=LIMIT, done=1.0)
    assert_close(written, none.encode(items, "cot", limit=LIMIT), "cot", 1e-6)


def test_what_is_spent_on_nothing_is_told_and_mode_latent_says_that_auto_is_meant(adaptive):
    assert len(adaptive.encode([], "auto", spent=(spent := {}))) == 0 and spent == dict(steps=[], tokens=[])
    with pytest.warns(UserWarning, match="was trained for mode auto"):
        adaptive.encode(["a"])


def test_a_checkpoint_that_does_not_say_when_it_is_done_takes_all_steps_and_says_so(model, world):
    items, spent = mixed_items(world)[:3], {}
    with pytest.warns(UserWarning, match="takes all latent steps"):
        ours = model.encode(items, "auto", spent=spent)
    assert np.array_equal(ours, model.encode(items)) and spent == dict(steps=[8] * 3, tokens=[0] * 3)
    with pytest.raises(ValueError, match="probability"):
        model.encode(items, "auto", done=1.5)


@pytest.mark.skipif(not GOLDEN.exists(), reason="no ../shared/golden")
def test_the_released_layout_takes_all_steps():
    m = Plume.from_pretrained(GOLDEN / "ckpt", "cpu", "float32")
    with pytest.warns(UserWarning, match="takes all latent steps"):
        assert np.array_equal(m.encode(["a text"], "auto"), m.encode(["a text"]))


def test_an_adaptive_checkpoint_says_so_and_older_ones_are_not(adaptive, tmp_path):
    adaptive.save_pretrained(tmp_path / "a")
    assert Plume.from_pretrained(tmp_path / "a", "cpu").settings["adaptive"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["plume"]["adaptive"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert not Plume.from_pretrained(tmp_path / "a", "cpu").settings["adaptive"]


def test_held_out_queries_may_write_what_the_longest_rationale_needs(monkeypatch):
    m, asked = make_model(adaptive=True, latent_steps=2), []
    pairs = [(Side([("text", "a?")], " one two three four", "it"), Side([("text", "b")])),
             (Side([("text", "c?")], " one"), Side([("text", "d")], "", "it"))]

    def encode(items, mode, limit):
        asked.append((mode, limit))
        return np.eye(2)

    monkeypatch.setattr(m, "encode", encode)
    assert train.hit_at_1(m, pairs, [0, 1], contextlib.nullcontext()) == 1
    whole = [m.processor.render(side, Stage(0, 0, True), Curriculum(2, 1)) for pair in pairs for side in pair]
    needed = max(len(sample["suffix"]) for sample in whole)
    assert asked == [asked[0]] * 2 and asked[0][0] == "auto" and needed <= asked[0][1] < needed + 16


# ------------------------------------------------------------------------------------------------- curriculum


@pytest.mark.parametrize("rationale, units", [
    ("", [""]),
    (" one", [" one"]),
    (" one two three", [" one", " two", " three"]),
    ("A b. C d! E", ["A b.", " C d!", " E"]),
])
def test_an_adaptive_curriculum_gives_each_unit_a_step(model, rationale, units):
    side, p = Side([("text", "what?")], rationale, "it", "here"), model.processor
    for S in (2, 4):
        c = Curriculum(S, 1, adaptive=True)
        assert c.parts(rationale) == units + [""] * (S - len(units))
        for s in range(S + 1):
            for answer in (True, False):
                stage = Stage(s, s, answer)
                left = "".join(units[s:])
                end = "</think>\n<answer>it</answer>\n<gen_emb>" if answer or left else "</think>\n<gen_emb>"
                sample = p.render(side, stage, c)
                assert p.tokenizer.decode(sample["suffix"]) == f"{left}<eot>{end}"
                reads = dict(sample["replaced"])
                assert list(reads) == list(range(s))  # every step reads something
                for i, token in reads.items():
                    told = i < len(units) and units[i]
                    assert token == (p.encode(units[i])[0] if told else p.id["<eot>"])
    with pytest.raises(ValueError, match="adaptive"):
        Curriculum(4, 2, adaptive=True)


def test_an_adaptive_run_ends_without_answers_behind_any_number_of_steps():
    c = Curriculum(4, 1, replay=0.5, adaptive=True)
    progress = Progress(c, 400)
    late = [progress.stage(step) for step in range(350, 400)]
    assert {stage.latent_steps for stage in late} == {0, 1, 2, 3, 4}
    assert not any(stage.answer for stage in late)
    assert all(progress.stage(step).answer for step in range(340) if progress.place(step) < 5)


# ---------------------------------------------------------------------------------------- tokens in parallel


def test_parallel_thought_is_learnt_tokens_in_one_pass(world):
    m, items = make_model(adapter=dict(kind="parallel")), mixed_items(world)
    samples, steps = rendered(m, items), 5
    batch = collate(samples, m.processor)
    r = rollout(m.lm, m.adapter, m.prefix(batch), steps, m.lm.embed_tokens(batch["suffix"]))
    for i, sample in enumerate(samples):
        h, cache = reference_prefill(m, sample)
        suffix = m.lm.embed_tokens(torch.tensor([sample["suffix"]]))
        x = torch.cat([m.adapter.tokens.weight[None, :steps], suffix], 1)
        h = reference_step(m, x, int(sample["positions"].max()) + 1, cache)[0]
        assert_close(r.latents[i], h[:steps], f"states of row {i}", 1e-5)
        assert_close(r.suffix[i], h[steps:], f"suffix of row {i}", 1e-5)
    m.zero_grad()
    r.suffix[:, -1].sum().backward()
    grad = m.adapter.tokens.weight.grad
    assert (grad[:steps].abs().amax(1) > 0).all() and not grad[steps:].any()
    with pytest.warns(UserWarning, match="takes all latent steps"):
        m.encode(items, "auto")


def test_parallel_thought_is_saved_and_has_no_place_in_the_released_layout(tmp_path):
    m = make_model(adapter=dict(kind="parallel")).float()
    m.save_pretrained(tmp_path / "p")
    assert_close(Plume.from_pretrained(tmp_path / "p", "cpu").encode(["a"]), m.encode(["a"]), "loaded", 1e-6)
    with pytest.raises(DataError, match="learnt tokens"):
        m.save_pretrained(tmp_path / "r", released=True)


# ------------------------------------------------------------------------------------------- the command line


WORLD = ["--families=image_ret", "--moves=2-3", "--segments=2", "--steps=8"]


def test_an_adaptive_run_and_its_evaluation_in_mode_auto(tmp_path):
    run("train.py", "--out", tmp_path, *QUICK, *WORLD, "--adaptive", "--replay=0.4", "--rules")
    base = ["eval.py", "--ckpt", tmp_path / "checkpoint", "--task=image_ret", "--moves=2-3", "--rules"]
    hits = {}
    for done in (0, 1):
        file = tmp_path / f"{done}.json"
        call(*base, "--mode=auto", "--done", done, "--limit=5", "--json", file)
        hits[done] = json.loads(file.read_text())["tasks"]["image_ret/turtle"]
    call(*base, "--steps=0", "--json", tmp_path / "none.json")
    none = json.loads((tmp_path / "none.json").read_text())["tasks"]["image_ret/turtle"]
    assert hits[0]["ranks"] == none["ranks"] != hits[1]["ranks"]
    with pytest.warns(UserWarning, match="have 24 frames, and the checkpoint takes 16"):
        call(*base[:-2], "--moves=2-12", "--mode=single")


def trained(out):
    return load_file(out / "checkpoint" / "model.safetensors")


def test_a_frozen_backbone_changes_in_stage_0_alone(tmp_path):
    flags = [*QUICK, "--families=image_ret", "--segments=2", "--gate=0", "--replay=0", "--last_stage=0.5"]
    run("train.py", "--out", tmp_path / "a", *flags, "--steps=8", "--freeze_backbone", "--keep=9")
    stages = [row["reached"] for row in log(tmp_path / "a")]
    assert stages == [0, 0, 1, 1, 2, 2, 2, 2]
    before, after = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors"), trained(tmp_path / "a")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if not name.startswith("adapter.")}
    # from a checkpoint that can reason in words: never
    run("train.py", "--out", tmp_path / "b", *flags, "--steps=4", "--freeze_backbone", "--init",
        tmp_path / "a" / "checkpoint")
    last = trained(tmp_path / "b")
    assert {name for name in after if torch.equal(after[name], last[name])} == same


def test_a_run_ends_when_it_has_come_so_far_and_goes_on_when_asked_for_more(tmp_path):
    flags = ["--out", tmp_path, *QUICK, "--families=image_ret", "--segments=2", "--steps=20"]
    flags.append("--eval_every=3")
    done = run("train.py", *flags, "--until=0.000001")
    rows = log(tmp_path)
    ended = [row["step"] + 1 for row in rows if row.get("hit", 0) > 0][0]
    assert ended % 3 == 0 and len(rows) == ended < 20 and f"{ended} of {ended} steps done" in done.stdout
    run("train.py", *flags, "--resume")
    whole = tmp_path / "whole"
    run("train.py", *flags, "--out", whole)  # the schedule was that of 20 steps all along
    for a, b in zip(log(tmp_path), log(whole), strict=True):
        assert (a["step"], a["K"], a["lr"]) == (b["step"], b["K"], b["lr"])
        assert abs(a["loss"] - b["loss"]) < 1e-5
    failed = run("train.py", *flags[:-1], "--until=0.5", "--out", tmp_path / "c", check=False)
    assert failed.returncode == 1 and "--eval_every" in failed.stderr


def test_a_run_says_that_moves_are_lost(tmp_path):
    flags = [*QUICK, "--families=video_cls", "--segments=2", "--steps=1"]
    short = run("train.py", "--out", tmp_path / "a", *flags, "--moves=9", "--num_frames=16")
    assert "have 18 frames, and the checkpoint takes 16" in short.stdout
    assert "warning" not in run("train.py", "--out", tmp_path / "b", *flags, "--moves=9").stdout


def test_untied_embeddings_are_two(tmp_path):
    run("train.py", "--out", tmp_path, *QUICK, "--families=image_ret", "--steps=2", "--tied=false")
    weights = trained(tmp_path)
    m = Plume.from_pretrained(tmp_path / "checkpoint", "cpu")
    assert m.backbone.lm_head.weight is not m.lm.embed_tokens.weight
    assert torch.equal(m.backbone.lm_head.weight, weights["lm_head.weight"])
    assert not torch.equal(weights["lm_head.weight"], m.lm.embed_tokens.weight)


@pytest.mark.parametrize("flags, why", [
    (["--thought=paralel"], "recurrent or parallel"),
    (["--thought=parallel", "--adapter=mlp"], "no --adapter"),
    (["--adapter=parallel"], "--thought parallel"),
    (["--adaptive", "--steps_per_segment=2", "--segments=2"], "steps_per_segment 1"),
    (["--adaptive", "--preset=qwen2vl_2b", "--replay=0"], "--replay above 0"),
    (["--adaptive", "--w_read=0"], "--w_read 0.0: needs a number above 0"),
    (["--adaptive", "--thought=parallel"], "do not stop earlier"),
    (["--freeze_backbone", "--last_stage=1"], "would keep random weights"),
    (["--tied=false", "--init=out/checkpoint"], "random weights"),
    (["--moves=8", "--data=x.jsonl", "--rules"], "turtle world"),
    (["--until=2", "--eval_every=1"], "a share"),
])
def test_flags_that_make_no_sense_are_refused(flags, why):
    cfg, _ = train.parse_flags(train.Config, flags, "")
    with pytest.raises(DataError, match=why):
        train_flags.check_flags(cfg, 1)
