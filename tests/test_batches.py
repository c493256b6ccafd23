"""Which records make which step, on every rank and with any number of workers."""

import numpy as np
import pytest
import torch

import train
from curriculum import Curriculum, Progress
from data import Batches, Schedule, StepSampler
from files.errors import DataError
from files.records import Pairs
from test_plume import assert_close, FINAL, make_model, whole
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


def test_workers_write_the_text_of_the_step_they_prefetch_for(model, world):
    pairs = Pairs(str(world / "train.jsonl"))
    batches = Batches(pairs, model.processor, Curriculum())
    progress = Progress(Curriculum(replay=0.3), 12)
    sampler = StepSampler(Schedule(pairs.dataset, pairs.names, 4, 12, 0), progress)
    ahead = dict(num_workers=2, prefetch_factor=6)
    one = torch.utils.data.DataLoader(batches, batch_size=None, sampler=sampler, num_workers=0)
    two = torch.utils.data.DataLoader(batches, batch_size=None, sampler=sampler, **ahead)
    for a, b in zip(map(whole, one), map(whole, two)):
        assert a["step"] == b["step"]
        assert a["stage"] == b["stage"] == progress.stage(a["step"])
        assert all(torch.equal(value, b[name]) for name, value in a.items() if torch.is_tensor(value))
        row = sampler.schedule[a["step"]][0]
        assert a["dataset"] == pairs.names[pairs.dataset[row]]
        assert len(a["target"]) == 4 and len(a["ids"]) == 8


def test_a_medium_that_breaks_while_training_is_named_and_in_no_loss(model, world, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes((world / "red bar.png").read_bytes()[:-60])
    rows = [record(pos=dict(conversations=turns(f"answer {i}"))) for i in range(4)]
    rows[2]["qry"]["image"] = [str(torn)]
    write_lines(tmp_path / "t.jsonl", rows)
    pairs, curriculum, m = Pairs(str(tmp_path / "t.jsonl"), str(world)), Curriculum(), make_model()
    with pytest.raises(DataError, match="record 3: qry: .*torn.png"):
        Batches(pairs, m.processor, curriculum)[0, FINAL, np.arange(4)]

    batch = whole(Batches(pairs, m.processor, curriculum, skip_bad=True)[0, FINAL, np.arange(4)])
    assert len(batch["bad"]) == 1 and "record 3" in batch["bad"][0]
    assert batch["valid"][:, 0].tolist() == [True, True, False, True]
    good = whole(Batches(pairs, m.processor, curriculum)[0, FINAL, np.array([0, 1, 3])])
    parts = train.losses(m(batch, 8), batch, train.Config())
    for name, value in train.losses(m(good, 8), good, train.Config()).items():
        assert_close(parts[name], value, name, 1e-6)
