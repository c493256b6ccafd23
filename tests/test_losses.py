"""Batches: which records make which step; losses, gradients in pieces; learning rate; what is trained."""

import contextlib
import pickle
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_leaves

import model as plume_model
import train
from adapter import balance_loss
from curriculum import Curriculum, Progress, Stage
from data import Batches, Schedule, StepSampler
from engine import ranks
from engine.train_flags import weights_of
from files.errors import DataError
from files.packing import (
    best_cut, columns_of, distinct, fill_micro_batches, group_by_length, pack, unpack)
from files.records import Pairs
from test_plume import assert_close, by_hand, FINAL, GATED, gradients, log, make_model, weights, whole
from tests.processes import run_ranks
from tests.samples import record, turns, write_lines


def test_schedule_gives_every_data_set_its_share_all_over_the_run():
    dataset = np.repeat([0, 1, 2], [500, 90, 10])
    schedule = Schedule(dataset, list("abc"), 8, 600, seed=1)
    assert schedule.counts.tolist() == [500, 90, 10]
    batches = [schedule[step] for step in range(600)]
    assert all(len(set(dataset[batch])) == 1 for batch in batches)
    which = np.array([dataset[batch[0]] for batch in batches])
    for d, share in enumerate(schedule.counts / 600):
        for part in np.array_split(which == d, 6):
            assert abs(part.mean() - share) < 0.03

    rows = np.concatenate([batch for batch, d in zip(batches, which) if d == 1])
    for start in range(0, len(rows) - 89, 90):  # whole passes
        assert sorted(rows[start : start + 90]) == list(range(500, 590))

    again = Schedule(dataset, list("abc"), 8, 600, seed=1)
    for step in (599, 3):  # a function of the step alone
        assert np.array_equal(again[step], batches[step])
    assert not np.array_equal(Schedule(dataset, list("abc"), 8, 600, seed=2)[0], batches[0])


def test_weights_multiply_the_share_of_a_data_set_and_1_changes_nothing():
    dataset = np.repeat([0, 1, 2], [500, 90, 10])
    plain, names = Schedule(dataset, list("abc"), 8, 600, seed=1), list("abc")
    ones = Schedule(dataset, names, 8, 600, 1, [1.0] * 3)
    assert all(np.array_equal(plain[step], ones[step]) for step in range(600))
    pairs = SimpleNamespace(names=names, weights={})
    schedule = Schedule(dataset, names, 8, 600, 1, weights_of(SimpleNamespace(weights="b=2,a=0.2"), pairs))
    assert schedule.counts.tolist() == [207, 372, 21]  # of 600 as 100 : 180 : 10
    for text in ("a", "a=0", "a=1,a=2", "a=x", "=2", "a=inf", "a=nan", "a=1,"):
        with pytest.raises(DataError, match="needs names of data sets, each once, with numbers above 0"):
            weights_of(SimpleNamespace(weights=text), pairs)
    with pytest.raises(DataError, match="--weights d: no such data set. Known: a, b, c"):
        weights_of(SimpleNamespace(weights="d=2"), pairs)
    pairs = SimpleNamespace(names=["x=y", "a", "b"], weights=dict(a=0.5, b=3.0))  # their own, if not told
    assert weights_of(SimpleNamespace(weights="x=y=2,b=4"), pairs) == [2.0, 0.5, 4.0]


def test_a_data_set_smaller_than_the_batch_is_repeated_in_a_new_order():
    schedule = Schedule(np.repeat([0, 1], [3, 40]), ["small", "large"], 8, 43, seed=0)
    rows = np.concatenate([schedule[step] for step in range(43) if schedule.which[step] == 0])
    laps = rows.reshape(-1, 3)
    assert len(laps) == 8
    assert all(sorted(lap) == [0, 1, 2] for lap in laps)
    assert len({tuple(lap) for lap in laps}) > 1


def test_ranks_split_the_global_batch_and_resuming_skips_nothing():
    schedule = Schedule(np.zeros(50, int), ["a"], 12, 20, seed=0)
    progress = Progress(Curriculum(replay=0.4), 20)
    alone = list(StepSampler(schedule, progress))
    first, second = (StepSampler(schedule, progress, rank=rank, world=2) for rank in (0, 1))
    for (_, stage, rows), (_, stage_a, a), (_, stage_b, b) in zip(alone, first, second, strict=True):
        assert np.array_equal(rows, np.concatenate([a, b]))
        assert stage == stage_a == stage_b
    resumed = list(StepSampler(schedule, progress, start=7))
    for (step, stage, rows), (step_a, stage_a, a) in zip(resumed, alone[7:], strict=True):
        assert (step, stage, rows.tolist()) == (step_a, stage_a, a.tolist())


def test_rows_are_grouped_with_as_little_padding_as_said_and_each_is_in_one_group():
    random = np.random.default_rng(0)
    for n in (1, 2, 7, 64, 500):
        for low, high in ((1, 2), (30, 40), (1, 400)):
            lengths = random.integers(low, high, (n, 2))
            groups = group_by_length(lengths)
            assert sorted(np.concatenate(groups)) == list(range(n))
            computed = sum(len(g) * (lengths[g, 0].max() + lengths[g, 1].max()) for g in groups)
            assert computed == sum(columns_of(lengths[g]) for g in groups)
            assert lengths.sum() >= 0.95 * computed
            longest = [lengths[g].sum(1).max() for g in groups]
            assert longest == sorted(longest, reverse=True)
    assert len(group_by_length(np.array([[300, 20], [299, 20], [30, 20], [31, 20]]))) == 2


def test_a_group_is_cut_where_it_saves_most():
    """Against all cuts of a sorted column."""
    random = np.random.default_rng(1)
    for _ in range(20):
        lengths = random.integers(1, 50, (9, 2))
        every = []
        for column in (0, 1):
            order = lengths[:, column].argsort(kind="stable")
            every += [columns_of(lengths[order[:k]]) + columns_of(lengths[order[k:]]) for k in range(1, 9)]
        saved, *halves = best_cut(lengths)
        assert saved == columns_of(lengths) - min(every)
        assert sum(columns_of(lengths[half]) for half in halves) == min(every)
    assert best_cut(np.array([[3, 4], [3, 4]])) == (0,)


def test_micro_batches_are_full_and_not_over():
    lengths = np.array([[300, 20]] * 3 + [[40, 10]] * 5 + [[2000, 10]])
    visual = np.array([250] * 3 + [0] * 5 + [1900])
    groups = [np.array([8]), np.array([0, 1, 2]), np.arange(3, 8)]
    assert fill_micro_batches(groups, lengths, visual, 0) == [groups]
    micro = fill_micro_batches(groups, lengths, visual, 1250)
    # 3,910 is more than fits, and alone; 2 * 570 fit; 570 and 5 * 50, too
    rows = [[part.tolist() for part in groups] for groups in micro]
    assert rows == [[[8]], [[0, 1]], [[2], [3, 4, 5, 6, 7]]]
    micro = fill_micro_batches(groups, lengths, visual, 1)
    assert [[part.tolist() for part in groups] for groups in micro] == [[[i]] for i in (8, *range(8))]


def test_workers_write_the_text_of_the_step_they_prefetch_for(model, world):
    pairs = Pairs(str(world / "train.jsonl"))
    batches = Batches(pairs, model.processor, Curriculum())
    progress = Progress(Curriculum(replay=0.3), 12)
    sampler = StepSampler(Schedule(pairs.dataset, pairs.names, 4, 12, 0), progress)
    ahead = dict(num_workers=2, prefetch_factor=6)
    one = torch.utils.data.DataLoader(batches, batch_size=None, sampler=sampler, num_workers=0)
    two = torch.utils.data.DataLoader(batches, batch_size=None, sampler=sampler, **ahead)
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        assert a["stage"] == b["stage"] == progress.stage(a["step"])
        tensors = [[x for x in tree_leaves(batch) if torch.is_tensor(x)] for batch in (a, b)]
        assert len(tensors[0]) > 20 and all(map(torch.equal, *tensors))
        row = sampler.schedule[a["step"]][0]
        assert a["dataset"] == pairs.names[pairs.dataset[row]]
        assert len(a["target"]) == 4 and len(a["order"]) == 8


def test_a_worker_hands_over_one_tensor_of_a_batch(model, world):
    batches = Batches(Pairs(str(world / "train.jsonl")), model.processor, Curriculum())
    six = torch.arange(6, dtype=torch.int16)
    odd = dict(bool=torch.tensor([True, False, True]), number=torch.tensor(3.0), none=torch.zeros(0, 2),
               turned=six.view(2, 3).T, every_other=six[::2], words=["a", None, (1, 2)], empty=[])
    for given in (batches[0, FINAL, np.array([1, 3, 5])], odd):
        packed = pack(given)
        assert sum(map(torch.is_tensor, tree_leaves(packed))) == 1
        leaves, tree = tree_flatten(unpack(pickle.loads(pickle.dumps(packed))))
        expected, expected_tree = tree_flatten(given)
        assert tree == expected_tree and len(leaves) == len(expected)
        for x, y in zip(leaves, expected):
            if torch.is_tensor(y):
                assert x.dtype == y.dtype and torch.equal(x, y) and x.data_ptr() % x.element_size() == 0
            else:
                assert x == y


def test_a_medium_that_breaks_while_training_is_named_and_in_no_loss(model, world, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes((world / "red bar.png").read_bytes()[:-60])
    rows = [record(pos=dict(conversations=turns(f"answer {i}"))) for i in range(4)]
    rows[2]["qry"]["image"] = [str(torn)]
    write_lines(tmp_path / "t.jsonl", rows)
    pairs, curriculum, m = Pairs(str(tmp_path / "t.jsonl"), str(world)), Curriculum(), make_model()
    with pytest.raises(DataError, match="record 3: qry: .*torn.png"):
        Batches(pairs, m.processor, curriculum)[0, FINAL, np.arange(4)]

    batch = whole(Batches(pairs, m.processor, curriculum, skip_bad=True), (0, FINAL, np.arange(4)))
    assert len(batch["bad"]) == 1 and "record 3" in batch["bad"][0]
    assert batch["valid"][:, 0].tolist() == [True, True, False, True]
    good = whole(Batches(pairs, m.processor, curriculum), (0, FINAL, np.array([0, 1, 3])))
    parts = train.losses(m([batch], 8), batch, train.Config())
    for name, value in train.losses(m([good], 8), good, train.Config()).items():
        assert_close(parts[name], value, name, 1e-6)


def test_equal_rows_are_computed_once_and_count_as_often_as_they_stand_there(tmp_path):
    """Two of four targets are equal, and a hard negative is a third one; text of a target counts for each."""
    thought = [f"<think>One {i}. Two. Three. Four.</think>{i}" for i in range(4)]
    pos = [dict(conversations=turns("x", thought[0])), dict(conversations=turns("x", thought[1]))]
    picked = [(0, []), (1, ["c"]), (0, ["c", "d"]), (0, [pos[1]])]  # x with two rationales is two rows
    rows = [record(qry=dict(conversations=turns(f"question {i}", thought[i])), pos=pos[p], neg=n)
            for i, (p, n) in enumerate(picked)]
    write_lines(tmp_path / "t.jsonl", rows)
    m, pairs = make_model(), Pairs(str(tmp_path / "t.jsonl"))
    job = 0, Stage(2, 4, True), np.arange(4)
    batches, cfg = Batches(pairs, m.processor, Curriculum()), train.Config()
    parts = train.backward(m, batches[job], cfg, contextlib.nullcontext())
    once = gradients(m)
    assert sum(len(group["ids"]) for group in batches[job]["micro"][0]) == 4 + 2 + 2
    m.zero_grad()
    batch = whole(batches, job)
    assert len(batch["ids"]) == 4 + 4 + 4
    expected = train.losses(m([batch], 4), batch, cfg)
    expected["loss"].backward()
    for name, value in expected.items():
        assert_close(parts[name], value, name, 1e-12)
    for name, g in gradients(m).items():
        assert_close(once[name], g, name, 1e-9 * g.abs().max().item())


def test_rows_that_differ_in_anything_are_not_equal():
    """Ids, what stands behind, what a step replaced, pictures and their places."""
    row = dict(ids=[1, 2], suffix=[3], gate_at=None, replaced=[(0, 7)], grids=[(1, 2, 2)],
               positions=np.zeros((3, 2), int), pixels=[np.zeros((4, 9), np.uint8)])
    others = [dict(ids=[1, 3]), dict(suffix=[4]), dict(replaced=[(0, 8)]), dict(grids=[(1, 4, 1)]),
              dict(gate_at=0), dict(positions=np.ones((3, 2), int)), dict(pixels=[np.ones((4, 9), np.uint8)])]
    rows, places = distinct([row, *(row | other for other in others), dict(row, times=0), dict(row)])
    assert places.tolist() == [*range(8), 0, 0] and [r["times"] for r in rows] == [2] + [1] * 7


def test_chunked_cross_entropy_equals_the_plain_one():
    h = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(30, 8, dtype=torch.float64))
    y, scale = torch.randint(0, 30, (50,)), torch.rand(50, dtype=torch.float64)
    plain = F.cross_entropy(h @ w.T, y, reduction="none")
    head = torch.nn.Linear(8, 30, bias=False)
    head.weight = w
    chunked = plume_model.cross_entropy(h, head, y, elements=30 * 7)
    expected = torch.autograd.grad((plain * scale).sum(), (h, w))
    grads = torch.autograd.grad((chunked * scale).sum(), (h, w))
    assert_close(grads[0], expected[0], "dh", 1e-6)
    assert_close(grads[1], expected[1], "dW", 1e-6)
    assert plume_model.cross_entropy(h[:0], head, y[:0]).shape == (0,)


def test_hard_negatives_are_candidates_of_every_query_but_those_whose_target_they_are(world):
    m, pairs = make_model(), Pairs(str(world / "hard.jsonl"))
    assert pairs.names == ["hard"] and pairs.negatives == 3
    rows = np.array([0, 1, 2, 3, 5])
    batch = whole(Batches(pairs, m.processor, Curriculum(last_stage=1.0)), (0, FINAL, rows))
    assert batch["valid"].sum(1).tolist() == [1, 2, 3, 1, 4]
    assert len(batch["ids"]) == 5 + 5 + 6
    out = m([batch], 8)
    parts = train.losses(out, batch, train.Config())
    names = [[side.key() for side in pairs[i][1:]] for i in rows]
    assert names[2][1] == names[3][0] and names[4][1] == names[4][0]  # another's target, its own
    for loss in ("gen", "disc"):
        query, target, negative = out["per_pair"][loss].split([5, 5, 6])
        own = iter(negative)
        candidates = [[target[i], *(next(own) for _ in called[1:])] for i, called in enumerate(names)]
        assert_close(parts[loss], by_hand(query, candidates, names, 10), loss, 1e-9)
    router = out["per_pair"]["router"].mean(0)
    assert_close(parts["bal"], balance_loss(router), "balance", 1e-12)


def test_the_text_of_hard_negatives_is_in_no_loss(world, tmp_path):
    """They are seen by contrast and router alone: with and without them the rest is the same."""
    sides = [dict(conversations=turns(f"question {i}", f"<think>One {i}. Two. Three. Four.</think>{i}"))
             for i in range(6)]
    for name, more in (("hard", dict(neg=[sides[4], sides[5]])), ("plain", {})):
        write_lines(tmp_path / name, [record(qry=sides[i], pos=sides[i + 2], **more) for i in range(2)])
    m, found = make_model(), []
    for name in ("hard", "plain"):
        batches = Batches(Pairs(str(tmp_path / name)), m.processor, Curriculum(), micro_tokens=99)
        batch = batches[0, Stage(2, 4, True), np.arange(2)]
        assert train.batch_counts(batch)["gated"] == 4
        found.append(train.backward(m, batch, train.Config(), contextlib.nullcontext()))
    hard, plain = found
    for name in ("ce", "read", "gate_loss"):
        assert_close(hard[name], plain[name], name, 1e-12)
    assert hard["gen"] > plain["gen"] and hard["bal"] != plain["bal"]


def test_pairs_of_one_query_are_no_negatives_of_each_other_with_hard_negatives(tmp_path):
    spelled = [dict(text="a"), "a", "b", dict(conversations=turns("a", "<think>So.</think>"))]
    rows = [("x", ["y", "v"]), ("y", ["w"]), ("x", []), ("z", ["b", "x", "z"])]
    write_lines(tmp_path / "t.jsonl", [record(qry=q, pos=p, neg=n) for q, (p, n) in zip(spelled, rows)])
    m, pairs = make_model(), Pairs(str(tmp_path / "t.jsonl"))
    batch = whole(Batches(pairs, m.processor, Curriculum()), (0, FINAL, np.arange(4)))
    out, names = m([batch], 8), [[p, *n] for p, n in rows]
    parts = train.losses(out, batch, train.Config(matryoshka="32"))
    for name, vectors in (("gen", out["per_pair"]["gen"]), ("disc", out["per_pair"]["disc"]),
                          ("matryoshka", F.normalize(out["per_pair"]["gen"][:, :32], dim=-1))):
        query, target, negative = vectors.split([4, 4, 6])
        own = iter(negative)
        candidates = [[target[i], *(next(own) for _ in called[1:])] for i, called in enumerate(names)]
        assert_close(parts[name], by_hand(query, candidates, names, 10, list("aaba")), name, 1e-9)


def test_the_losses_copy_no_number_to_the_device(world):
    m, pairs = make_model(), Pairs(str(world / "hard.jsonl"))
    batch = whole(Batches(pairs, m.processor, Curriculum()), (0, FINAL, np.arange(4)))
    out, waits = m([batch], 8), AssertionError("the device would be waited for")
    with mock.patch.object(torch, "tensor", side_effect=waits):
        train.losses(out, batch, train.Config(matryoshka="32"))


def newer_torch(model, gradient_as_bucket_view, broadcast_buffers=None, forward_sync_buffers=None):
    return broadcast_buffers, forward_sync_buffers


def older_torch(model, gradient_as_bucket_view, broadcast_buffers=True):
    return broadcast_buffers


@pytest.mark.parametrize("torch_has, sent", [(newer_torch, (None, False)), (older_torch, False)])
def test_buffers_are_not_sent_in_the_words_of_this_torch(torch_has, sent, monkeypatch):
    monkeypatch.setattr(ranks, "DistributedDataParallel", torch_has)
    assert ranks.ddp(torch.nn.Linear(1, 1)) == sent


def test_matryoshka_is_the_same_loss_on_the_first_components(world):
    m, pairs = make_model(), Pairs(str(world / "hard.jsonl"))
    batch = whole(Batches(pairs, m.processor, Curriculum()), (0, FINAL, np.array([0, 3])))
    out = m([batch], 8)
    plain, cut = (train.losses(out, batch, train.Config(matryoshka=sizes)) for sizes in ("", "16,100"))
    names = [[side.key() for side in pairs[i][1:]] for i in (0, 3)]
    expected = 0
    for size in (16, 100):
        query, target = F.normalize(out["per_pair"]["gen"][:, :size], dim=-1).split(2)
        expected = expected + by_hand(query, target[:, None], names, 10) / 2
    assert_close(cut["matryoshka"], expected, "InfoNCE of cut embeddings", 1e-9)
    assert_close(cut["loss"], plain["loss"] + cut["matryoshka"], "sum", 1e-9)


def test_micro_batches_replay_their_random_state(world):
    m, pairs = make_model(), Pairs(str(world / "train.jsonl"))
    m.adapter.ln.register_forward_hook(lambda module, args, out: F.dropout(out, 0.2))
    batch = Batches(pairs, m.processor, Curriculum(), micro_tokens=200)[1, FINAL, np.arange(5)]
    assert len(batch["micro"]) == 3

    torch.manual_seed(0)
    train.backward(m, batch, train.Config(), contextlib.nullcontext())
    grads = gradients(m)

    m.zero_grad()
    torch.manual_seed(0)
    outs = [m(part, 8) for part in batch["micro"]]  # in one graph
    joined = train.join_micro_batches(outs, batch["order"])
    train.losses(joined, batch, train.Config())["loss"].backward()
    for name, g in gradients(m).items():
        assert_close(grads[name], g, name, 1e-9 * g.abs().max().item())


def test_learning_rate_weight_decay_and_frozen_vision(world, tmp_path):
    for decay, flat in ((1.0, 10), (0.2, 80)):
        cfg = train.Config(lr=2.0, warmup=0.1, decay=decay)
        rates = [train.learning_rate(cfg, s, 100) for s in range(100)]
        assert rates[0] == pytest.approx(0.2) and rates[9] == rates[flat] == 2.0
        assert rates[(flat + 100) // 2] == pytest.approx(1.1) and rates[99] == pytest.approx(0.2, abs=0.02)

    ck = str(tmp_path / "ck")
    make_model(adapter=dict(top_k=1, anchor=False), latent_positions="cache").float().save_pretrained(ck)
    pairs = Pairs(str(world / "train.jsonl"))
    cfg = train.Config(init=ck, segments=2, steps_per_segment=2, max_pixels=28 * 28 * 5)
    m = train.build_model(cfg, {"init"}, pairs, "cpu")
    adapter = m.settings["adapter"]  # the checkpoint's own
    assert (adapter["top_k"], adapter["anchor"], m.settings["latent_positions"]) == (1, False, "cache")
    assert m.settings["latent_steps"] == 4 and m.settings["limits"]["max_pixels"] == 28 * 28 * 5
    frozen = {n for n, p in m.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in m.named_parameters() if "model.visual" in n and "merger" not in n}

    groups = train.parameter_groups(m, 0.3, 0.5)
    for n, p in m.named_parameters():  # each in one group, the frozen in none
        where = [(g["weight_decay"], g["share"]) for g in groups if any(p is x for x in g["params"])]
        decay = 0.0 if p.ndim < 2 or n.split(".")[1] in ("b1", "b2", "step_embed") else 0.3
        share = 0.5 if "model.visual" in n else 1.0
        assert where == ([] if n in frozen else [(decay, share)]), n

    given = dict(init=ck, top_k=3, anchor=True)
    m = train.build_model(train.Config(**given), set(given), pairs, "cpu")
    assert m.settings["adapter"]["top_k"] == 3 and m.settings["adapter"]["anchor"]
    with pytest.raises(DataError, match="adapter does not fit"):
        train.build_model(train.Config(init=ck, experts=7), {"init", "experts"}, pairs, "cpu")


def test_shards_in_bfloat16_equal_one_process_but_for_rounding(world, tmp_path, monkeypatch):
    flags = ["--data", world / "train.jsonl", "--steps", 2, "--global_batch", 4, "--workers", 0, "--lr=1e-3",
             "--checkpointing", *GATED, "--last_stage=1", "--dtype=bfloat16", "--out"]
    run_ranks(2, "train.py", "--fsdp", *flags, tmp_path / "half shards")
    monkeypatch.setattr("signal.signal", lambda *a: None)
    train.main([*map(str, flags), str(tmp_path / "half")])
    mine, theirs = log(tmp_path / "half"), log(tmp_path / "half shards")
    for name in ("ce", "gen", "disc", "read"):
        assert [r[name] for r in mine] == pytest.approx([r[name] for r in theirs], rel=3e-2), name
    assert mine[0]["K"] == 4
    assert {v.dtype for v in weights(tmp_path / "half shards").values()} == {torch.float32}
