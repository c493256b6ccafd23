"""Which records make which step, on every rank and with any number of workers."""

import json

import numpy as np
import pytest
import torch

import train
from curriculum import Curriculum, Progress
from data import Batches, DataError, Pairs, Schedule, StepSampler
from test_plume import FINAL, assert_close, whole, make_model, turns, record


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
