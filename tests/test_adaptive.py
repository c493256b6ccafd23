"""Mode auto, the adaptive curriculum, learnt tokens in parallel, a frozen backbone, untied embeddings."""

import contextlib
import json
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from curriculum import Curriculum, Progress, Stage
from engine.held_out import hit_at_1
from engine.stream import encoding
from engine.train_flags import check_flags
from files.errors import DataError
from files.items import Side
from model import Plume
from test_plume import (
    assert_close, first_said, GOLDEN, log, make_model, mixed_items, naive, naive_words, our_rollout, QUICK,
    rendered, weights)
from tests.processes import call, run
from tests.samples import edit_json

K, LIMIT = 4, 4


@pytest.fixture(scope="module", params=[
    {}, dict(shape="tiny3"), dict(latent_positions="cache", adapter=dict(kind="mlp"))], ids=str)
def adaptive(request):
    return make_model(adaptive=True, latent_steps=K, **request.param)


def readings(m, sample):
    """(K+1,): the probability of <eot> that the state behind 0 .. K steps gives, by transformers."""
    r = naive(m, sample, K)
    states = torch.cat([r.start, r.latents[0]])
    return m.backbone.lm_head(states).softmax(-1)[:, m.processor.id["<eot>"]]


def by_hand(m, sample, done):
    """One item in mode auto, through transformers' modules and cache -> embedding, steps, tokens written."""
    for k, probability in enumerate(readings(m, sample)):
        if probability > done:
            return F.normalize(naive(m, sample, k).suffix[0, -1], dim=-1), k, 0
    state, tokens = naive_words(m, sample, K, LIMIT)
    return F.normalize(state, dim=-1), K, len(tokens)


def threshold(m, items):
    """One at which some stop early, some late, some never; in the middle between two readings."""
    highest = sorted(readings(m, sample).max().item() for sample in rendered(m, items))
    return sum(highest[len(items) // 3 :][:2]) / 2


@torch.no_grad()
def test_auto_is_the_naive_computation_for_mixed_items_on_the_batch_and_on_every_row_alone(adaptive, world):
    items = mixed_items(world) + ["another word", "and one more, which is longer", "7", "nine nine nine"]
    done = threshold(adaptive, items)
    expected, steps, tokens = zip(*[by_hand(adaptive, sample, done) for sample in rendered(adaptive, items)])
    assert len(set(steps)) > 2 and 0 in tokens and max(tokens) > 0, (steps, tokens)  # all cases are there
    for size in (1, 3, len(items)):
        spent = {}
        ours = adaptive.encode(items, "auto", batch_size=size, limit=LIMIT, done=done, spent=spent)
        assert spent == dict(steps=list(steps), tokens=list(tokens)), f"batches of {size}"
        assert_close(ours, torch.stack(expected).float(), f"batches of {size}", 1e-5)
    order = np.random.default_rng(0).permutation(len(items))
    again = adaptive.encode([items[i] for i in order], "auto", batch_size=4, limit=LIMIT, done=done)
    assert_close(again, ours[order], "another order", 1e-6)


def test_rows_wait_to_be_written_until_they_are_two_batches_or_the_window_ends(monkeypatch):
    m, size = make_model(adaptive=True, latent_steps=K), 2
    items = [f"{i} " + "word " * (i % 5) for i in range(24)]
    how, spent, took = dict(limit=LIMIT, done=threshold(m, items)), {}, dict(seconds=0.0, tokens=0)
    alone = {}
    expected = np.concatenate([m.encode([item], "auto", spent=alone, **how) for item in items])
    finish, written, widths, caches = m.finish, [], set(), []

    def counted_finish(unfinished, limit):
        written.append([len(left.rows) for left in unfinished])  # of each batch
        widths.add(len({left.cache.hide.shape[-1] for left in unfinished}))
        caches.extend(left.cache for left in unfinished)
        return finish(unfinished, limit)

    monkeypatch.setattr(m, "finish", counted_finish)
    more = dict(how, batch_size=size, bad={}, spent=spent, took=took)
    together = np.concatenate([*encoding(m, [None, *items], "auto", **more)])  # None cannot be read
    assert_close(together[1:], expected, "one by one", 1e-6)
    assert spent == {name: [0, *values] for name, values in alone.items()}
    assert took["tokens"] == sum(spent["tokens"])
    assert max(widths) > 1  # prefixes of several lengths were written together
    windows_end = sum(sum(rows) < 2 * size for rows in written)
    assert len(written) > windows_end <= 2  # 25 items are two windows of 16
    # what bounds memory: another batch begins only while less than two wait, and what is joined is let go
    assert all(sum(rows[:-1]) < 2 * size and max(rows) <= size for rows in written)
    assert not any(cache.prefix or cache.slots for cache in caches)


def test_at_the_ends_of_done_all_rows_stop_at_once_or_never(adaptive, world):
    m, items, at_once, never, nothing = adaptive, mixed_items(world), {}, {}, {}
    ours = m.encode(items, "auto", done=0.0, spent=at_once)
    assert_close(ours, m.encode(items, steps=0), "all stop before the first step", 1e-6)
    m.encode(items, "auto", done=1.0, limit=LIMIT, spent=never)
    assert at_once["steps"] == [0] * len(items) and never["steps"] == [K] * len(items)
    assert min(never["tokens"]) > 0
    assert len(m.encode([], "auto", spent=nothing)) == 0 and nothing == dict(steps=[], tokens=[])
    with pytest.warns(UserWarning, match="was trained for mode auto"):
        m.encode(["a"])
    # a model without steps never stops either: what is left is mode cot
    none = make_model(adaptive=True, latent_steps=0)
    written = none.encode(items, "auto", limit=LIMIT, done=1.0)
    assert_close(written, none.encode(items, "cot", limit=LIMIT), "cot", 1e-6)


@pytest.mark.parametrize("released", [False, True])
def test_a_checkpoint_that_does_not_say_when_it_is_done_takes_all_steps_and_says_so(model, world, released):
    if released and not GOLDEN.exists():
        pytest.skip("no ../shared/golden")
    m = Plume.from_pretrained(GOLDEN / "ckpt", "cpu", "float32") if released else model
    items, spent = mixed_items(world)[:3], {}
    with pytest.warns(UserWarning, match="takes all latent steps"):
        ours = m.encode(items, "auto", spent=spent)
    assert np.array_equal(ours, m.encode(items)) and spent == dict(steps=[8] * 3, tokens=[0] * 3)
    with pytest.raises(ValueError, match="probability"):
        m.encode(items, "auto", done=1.5)


def test_an_adaptive_checkpoint_says_so_and_older_ones_are_not(adaptive, tmp_path):
    adaptive.save_pretrained(tmp_path)
    assert Plume.from_pretrained(tmp_path, "cpu").settings["adaptive"]
    block = json.loads((tmp_path / "config.json").read_text())["plume"]
    del block["adaptive"]
    edit_json(tmp_path / "config.json", plume=block)
    assert not Plume.from_pretrained(tmp_path, "cpu").settings["adaptive"]


def test_held_out_queries_may_write_what_the_longest_rationale_needs(monkeypatch):
    m, encode = make_model(adaptive=True, latent_steps=2), mock.Mock(return_value=np.eye(2))
    pairs = [(Side([("text", "a?")], " one two three four", "it"), Side([("text", "b")])),
             (Side([("text", "c?")], " one"), Side([("text", "d")], "", "it"))]
    monkeypatch.setattr(m, "encode", encode)
    assert hit_at_1(m, pairs, [0, 1], contextlib.nullcontext()) == 1
    whole = [m.processor.render(side, Stage(0, 0, True), Curriculum(2, 1)) for pair in pairs for side in pair]
    needed = max(len(sample["suffix"]) for sample in whole)
    limit = encode.call_args.kwargs["limit"]
    assert encode.call_args_list == [mock.call(mock.ANY, "auto", limit=limit)] * 2
    assert needed <= limit < needed + 16


def test_every_target_of_a_held_out_query_is_a_hit(monkeypatch):
    m, texts = make_model(), ["ax", "ay", "bz", "bx"]
    pairs = [(Side([("text", q)]), Side([("text", t)])) for q, t in texts]
    found = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "x": [0.1, 0.1, 0.8], "y": [0.9, 0, 0], "z": [0.3, 0, 0.9]}
    monkeypatch.setattr(m, "encode", lambda items, *rest, **more: np.array(
        [found[side.parts[0][1]] for side in items]))
    assert hit_at_1(m, pairs, range(4), contextlib.nullcontext()) == 1  # a finds y, b finds x


@pytest.mark.parametrize("rationale, units", [
    ("", [""]), (" one", [" one"]), (" one two three", [" one", " two", " three"]),
    ("A b. C d! E", ["A b.", " C d!", " E"])])
def test_an_adaptive_curriculum_gives_each_unit_a_step(model, rationale, units):
    side, p = Side([("text", "what?")], rationale, "it", "here"), model.processor
    for S in (2, 4):
        c = Curriculum(S, 1, adaptive=True)
        assert c.parts(rationale) == units + [""] * (S - len(units))
        first = [first_said(p, part) if part else p.id["<eot>"] for part in c.parts(rationale)]
        for stage in [Stage(s, s, answer) for s in range(S + 1) for answer in (True, False)]:
            left = "".join(units[stage.index :])
            answer = "\n<answer>it</answer>" if stage.answer or left else ""
            sample = p.render(side, stage, c)
            assert p.tokenizer.decode(sample["suffix"]) == f"{left}<eot></think>{answer}\n<gen_emb>"
            assert dict(sample["replaced"]) == dict(enumerate(first[: stage.index]))  # every step has one
    with pytest.raises(ValueError, match="adaptive"):
        Curriculum(4, 2, adaptive=True)


def test_an_adaptive_run_ends_without_answers_behind_any_number_of_steps():
    progress = Progress(Curriculum(4, 1, replay=0.5, adaptive=True), 400)
    late = [progress.stage(step) for step in range(350, 400)]
    assert {stage.latent_steps for stage in late} == {0, 1, 2, 3, 4}
    assert not any(stage.answer for stage in late)
    assert all(progress.stage(step).answer for step in range(340) if progress.place(step) < 5)


def test_parallel_thought_is_learnt_tokens_in_one_pass_saved_but_not_in_the_released_layout(world, tmp_path):
    m, items, steps = make_model(adapter=dict(kind="parallel")), mixed_items(world), 5
    samples, learnt = rendered(m, items), m.adapter.tokens.weight
    r = our_rollout(m, samples, steps)
    for sample, ours in zip(samples, torch.cat([r.latents, r.suffix], 1)):
        suffix = m.lm.embed_tokens(torch.tensor([sample["suffix"]]))
        theirs = naive(m, sample, 0, suffix=torch.cat([learnt[None, :steps], suffix], 1)).suffix[0]
        assert_close(ours, theirs, "states of tokens and suffix", 1e-5)
    m.zero_grad()
    r.suffix[:, -1].sum().backward()
    assert (learnt.grad[:steps].abs().amax(1) > 0).all() and not learnt.grad[steps:].any()
    with pytest.warns(UserWarning, match="takes all latent steps"):
        m.encode(items, "auto")
    m.float().save_pretrained(tmp_path / "p")
    assert_close(Plume.from_pretrained(tmp_path / "p", "cpu").encode(["a"]), m.encode(["a"]), "loaded")
    with pytest.raises(DataError, match="learnt tokens"):
        m.save_pretrained(tmp_path / "r", released=True)


def test_an_adaptive_run_and_its_evaluation_in_mode_auto(tmp_path, few_queries):
    base, world = ["eval.py", "--ckpt", tmp_path / "checkpoint"], ["--moves=2-3", "--rules"]
    run("train.py", "--out", tmp_path, *QUICK, *world, "--families=image_ret", "--segments=2", "--steps=8",
        "--replay=0.4", "--adaptive")

    def ranks(*mode):
        call(*base, "--task=image_ret", *world, *mode, "--json", tmp_path / "scores.json")
        return json.loads((tmp_path / "scores.json").read_text())["tasks"]["image_ret/turtle"]["ranks"]

    at_once, never = (ranks("--mode=auto", "--done", done, "--limit=5") for done in (0, 1))
    assert at_once == ranks("--steps=0") != never
    with pytest.warns(UserWarning, match="have 24 frames, and the checkpoint takes 16"):
        call(*base, "--task=image_ret", "--moves=2-12", "--mode=single")


def test_a_frozen_backbone_changes_in_stage_0_alone(tmp_path):
    flags = [*QUICK, "--families=image_ret", "--segments=2", "--gate=0", "--replay=0", "--last_stage=0.5",
             "--freeze_backbone"]
    run("train.py", "--out", tmp_path / "a", *flags, "--steps=8", "--keep=9")
    assert [row["reached"] for row in log(tmp_path / "a")] == [0, 0, 1, 1, 2, 2, 2, 2]
    # from a checkpoint that can reason in words: never
    run("train.py", "--out", tmp_path / "b", *flags, "--steps=4", "--init", tmp_path / "a" / "checkpoint")
    early = load_file(tmp_path / "a" / "checkpoint-2" / "model.safetensors")
    late, last = weights(tmp_path / "a"), weights(tmp_path / "b")
    frozen = {name for name in early if not name.startswith("adapter.")}
    for before, after in ((early, late), (late, last)):
        assert {name for name in before if torch.equal(before[name], after[name])} == frozen


def test_a_run_ends_when_it_has_come_so_far_and_goes_on_when_asked_for_more(tmp_path):
    flags = [*QUICK, "--families=image_ret", "--segments=2", "--steps=20"]
    short, whole = tmp_path / "short", tmp_path / "whole"
    done = run("train.py", *flags, "--eval_every=3", "--out", short, "--until=0.000001")
    rows = log(short)
    ended = [row["step"] + 1 for row in rows if row.get("hit", 0) > 0][0]
    assert ended % 3 == 0 and len(rows) == ended < 20 and f"{ended} of {ended} steps done" in done.stdout
    run("train.py", *flags, "--eval_every=3", "--out", short, "--resume")
    run("train.py", *flags, "--eval_every=3", "--out", whole)  # its schedule was that of 20 steps all along
    for a, b in zip(log(short), log(whole), strict=True):
        assert (a["step"], a["K"], a["lr"]) == (b["step"], b["K"], b["lr"])
        assert abs(a["loss"] - b["loss"]) < 1e-5
    failed = run("train.py", *flags, "--until=0.5", "--out", tmp_path / "c", check=False)
    assert failed.returncode == 1 and "--eval_every" in failed.stderr


def test_a_run_says_that_moves_are_lost_and_untied_embeddings_are_two(tmp_path):
    flags = [*QUICK, "--families=video_cls", "--segments=2", "--steps=1", "--moves=9"]
    short = run("train.py", "--out", tmp_path / "a", *flags, "--num_frames=16", "--tied=false")
    assert "have 18 frames, and the checkpoint takes 16" in short.stdout
    assert "warning" not in run("train.py", "--out", tmp_path / "b", *flags).stdout
    m = Plume.from_pretrained(tmp_path / "a" / "checkpoint", "cpu")
    assert torch.equal(m.backbone.lm_head.weight, weights(tmp_path / "a")["lm_head.weight"])
    assert not torch.equal(m.backbone.lm_head.weight, m.lm.embed_tokens.weight)


@pytest.mark.parametrize("flags, why", [
    (["--adapter=paralel"], "needs 'moe', 'mlp', 'none' or 'parallel'"),
    (["--adaptive", "--adapter=parallel"], "do not stop earlier"),
    (["--adaptive", "--steps_per_segment=2", "--segments=2"], "steps_per_segment 1"),
    (["--adaptive", "--preset=qwen2vl_2b", "--replay=0"], "--replay above 0"),
    (["--adaptive", "--w_read=0"], "--w_read 0.0: needs a number above 0"),
    (["--freeze_backbone", "--last_stage=1"], "would keep random weights"),
    (["--tied=false", "--init=out/checkpoint"], "random weights"),
    (["--moves=8", "--data=x.jsonl", "--rules"], "turtle world"),
    (["--until=2", "--eval_every=1"], "a share"),
])
def test_flags_that_make_no_sense_are_refused(flags, why):
    cfg, _ = train.parse_flags(train.Config, flags, "")
    with pytest.raises(DataError, match=why):
        check_flags(cfg, 1)
