"""Ranking, metrics and the command line of eval.py."""

import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from engine import kept, stream
from files.errors import DataError
from files.items import parse_item
from files.records import Pairs
from model import Plume
from tasks.beir import list_tasks, read_task, Task
from test_plume import make_model, SHARED
from tests.processes import call, run, start_ranks, Started
from tests.samples import NAMES, ODD, odd_folder, picture
from tests.test_runs import refused


def unit_rows(numbers):
    return F.normalize(torch.tensor(numbers, dtype=torch.float32), dim=-1)


def a_task(corpus, relevant, candidates=None):
    """A task of which only the ids and the judgements matter."""
    query_ids = [str(i) for i in range(len(relevant))]
    corpus_ids = [f"d{j}" for j in range(len(corpus))]
    candidates = candidates or [None] * len(relevant)
    return Task("x/y", [], corpus, relevant, candidates, query_ids, corpus_ids)


def worst_ranks(scores, gains):
    """Sort with every tie broken against the model."""
    order = sorted(range(len(scores)), key=lambda j: (-round(float(scores[j]), 5), gains.get(j, 0)))
    return sorted((gains[j], order.index(j) + 1) for j in gains)


@pytest.mark.parametrize("elements", [1 << 26, 200])
def test_ranks_equal_brute_force_with_ties_candidates_and_grades(elements):
    rng = np.random.default_rng(0)
    corpus = unit_rows(rng.integers(-1, 2, (40, 4)) + 1e-3)  # many equal rows
    corpus += 1e-7 * torch.from_numpy(rng.standard_normal((40, 4))).float()  # rounding is no difference
    queries = unit_rows(rng.standard_normal((25, 4)))
    relevant, candidates = [], []
    for i in range(25):
        chosen = rng.choice(40, rng.integers(1, 5), replace=False)
        relevant.append({int(j): int(rng.integers(1, 4)) for j in chosen})
        candidates.append(None if i % 3 else list(dict.fromkeys([*relevant[i], *range(0, 40, 3)])))
    ranks = evaluation.rank_relevant(queries, corpus, relevant, candidates, elements)
    for i, gains in enumerate(relevant):
        rows = candidates[i] or list(range(40))
        scores = [queries[i] @ corpus[j] for j in rows]
        expected = worst_ranks(scores, {rows.index(j): gain for j, gain in gains.items()})
        assert sorted(ranks[i]) == expected, f"query {i}"


def test_the_first_ten_equal_a_sort_of_all_candidates():
    rng = np.random.default_rng(0)
    corpus, queries = (unit_rows(rng.standard_normal((n, 8))) for n in (60, 9))
    candidates = [list(range(0, 30, 3)), None, None] * 3
    task = a_task(corpus, [{i: 1, 7: 2} for i in range(9)], candidates)
    scores = evaluation.evaluate(task, (queries, corpus))
    for i in range(9):
        cosine = (corpus.numpy() @ queries[i].numpy()).round(6)
        rows = sorted(candidates[i] or range(60), key=lambda j: -cosine[j])[:10]
        expected = [(f"d{j}", pytest.approx(cosine[j], abs=1e-5)) for j in rows]
        assert list(scores["found"][str(i)].items()) == expected
        assert scores["relevant"][str(i)] == {f"d{i}": 1, "d7": 2}


def test_scores_with_candidates_are_against_the_candidates_only():
    query = unit_rows([[3.0, 2, 1, 0, 0, 0]])
    task = a_task(list("abcdef"), [{1: 1, 5: 2}], [[1, 2, 3, 4]])
    scores = evaluation.evaluate(task, (query, torch.eye(6)))
    assert scores["hit@1"] == scores["ndcg@5"] == 1  # row 5 is no candidate
    assert (scores["candidates"], scores["chance"]) == (4, 0.25)
    with pytest.raises(DataError, match="x/y: .* not finite"):
        evaluation.evaluate(task, (query * math.nan, torch.eye(6)))


def test_ndcg_and_the_first_rank_by_hand():
    ranks = [(1, 1), (3, 4)]  # gain 1 at rank 1, gain 3 at rank 4
    best = 3 + 1 / math.log2(3)
    assert evaluation.ndcg(ranks, 5) == pytest.approx((1 + 3 / math.log2(5)) / best)
    assert evaluation.ndcg([(2, 6)], 5) == 0
    assert evaluation.ndcg([(1, rank) for rank in range(1, 8)], 5) == pytest.approx(1)  # the best is cut too
    assert evaluation.first_rank(ranks) == 1 and evaluation.first_rank([(2, 6)]) == 6


def test_a_constant_embedding_scores_zero_and_is_reported_at_chance_and_so_is_luck():
    task = a_task(list("abcd"), [{i: 1} for i in range(4)])
    same = torch.ones(4, 8) / 8**0.5
    scores = evaluation.evaluate(task, (same, same))
    assert (scores["hit@1"], scores["chance"], scores["at_chance"]) == (0, 0.25, True)
    assert "at chance" in evaluation.table({"x/y": scores})
    perfect = evaluation.evaluate(task, (torch.eye(4), torch.eye(4)))
    assert perfect["hit@1"] == perfect["ndcg@5"] == 1
    assert perfect["ranks"] == dict.fromkeys("0123", 1) and not perfect["at_chance"]
    luck, half = a_task(list("ab"), [{0: 1}] * 20), torch.eye(2)[[0] * 12 + [1] * 8]
    assert evaluation.evaluate(luck, (half, torch.eye(2)))["at_chance"]  # 12 of 20 at chance 1/2 is nothing


def test_latent_steps_that_do_nothing_are_found_with_fewer_queries_and_said():
    m = make_model(latent_steps=3).float()
    sides = [parse_item(f"red {i}") for i in range(150)]
    task = replace(a_task(sides, [{i: 1} for i in range(150)]), queries=sides)
    embedder = SimpleNamespace(model=m, batch_size=32)
    for steps, idle in ((3, False), (0, True)):  # each text is its own candidate, embedded with these steps
        vectors = torch.from_numpy(m.encode(sides, steps=steps))
        assert evaluation.steps_do_nothing(embedder, task, (vectors, vectors)) == idle
    assert len(evaluation.evenly_spaced(150, 100)) == 100 and evaluation.evenly_spaced(3, 100) == [0, 1, 2]
    scores = evaluation.evaluate(task, (vectors, vectors))
    assert "not above K = 0" in evaluation.table({"x/y": scores | dict(steps_do_nothing=True)})


EDITS = {  # file of the task, what stands there, what takes its place
    "qrels": ("qrels.tsv", "q3\tgreen square", "q3\tblue circle"),
    "another grade": ("qrels.tsv", "q4\tgreen circle\t1", "q4\tgreen circle\t2"),
    "queries": ("queries.jsonl", "Find the picture: red bar", "Find the picture: red bars"),
    "candidates": ("queries.jsonl", '"q0",', '"q0", "candidates": ["red square", "red circle"],'),
    "corpus": ("corpus.jsonl", '"Represent."', '"Represent it."'),
    "ids": ("corpus.jsonl", '"blue square"', '"Blue square"'),
    "media": ("red bar.png", None, None),
}


def test_what_is_kept_of_a_task_is_used_while_all_that_it_depends_on_is_as_it_was(small, world, tmp_path):
    """The note of the idle steps is the dearest of what is kept; scores stand in a file for each task."""
    root, scores = tmp_path / "a" / "tasks", tmp_path / "scores"
    shutil.copytree(world, tmp_path / "a", ignore=shutil.ignore_patterns("*.mp4", "video_cls"))

    def evaluated(*flags, data=root, ckpt=small):
        """-> how often the idle steps were looked at, how many score files there are"""
        with mock.patch.object(evaluation, "steps_do_nothing", return_value=True) as looked:
            call("eval.py", "--data", data, "--ckpt", ckpt, "--scores", scores, *flags)
        return looked.call_count, len(list(scores.rglob("*_score.json")))

    assert (evaluated(), evaluated()) == ((1, 1), (0, 1))
    for what, (name, old, new) in EDITS.items():
        (file,) = (tmp_path / "a").rglob(name)
        if old is None:
            picture("red", "bar", at=9).save(file)
        else:
            assert old in file.read_text(), what
            file.write_text(file.read_text().replace(old, new, 1))
            qrels = file.with_name("qrels.tsv")
            if what == "ids":
                qrels.write_text(qrels.read_text().replace("\tblue square", "\tBlue square"))
        assert (evaluated(), evaluated()) == ((1, 1), (0, 1)), what

    make_model(latent_steps=3).float().save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert evaluated("--steps=2") == (1, 2) and evaluated("--dim=16") == (1, 3)
    assert evaluated("--mode=single") == (0, 4)  # it has no steps
    assert evaluated(ckpt=tmp_path / "other") == (1, 5)
    assert evaluated(data=tmp_path / "b" / "tasks") == (1, 6)
    assert evaluated() == evaluated(data=tmp_path / "b" / "tasks") == (0, 6)  # nobody wrote over it
    assert evaluated(data=os.path.relpath(root)) == (0, 6)


def test_names_that_are_no_utf_8_are_evaluated_and_named(small, world, tmp_path):
    data = odd_folder(tmp_path)
    folder = data / "image_ret" / ODD
    shutil.copytree(world / "tasks" / "image_ret" / "t2i", folder)
    for file in world.glob("*.png"):
        shutil.copy(file, data / f"{file.stem}{ODD}.png")
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("../", "").replace(".png", r"\udcff.png"))
    command = ["eval.py", "--data", data, "--ckpt", small, "--scores", data, "--json", data / f"{ODD}.json"]
    assert r"image_ret/\udcff" in run(*command).stdout and "24 known from before" in run(*command).stdout
    (data / f"red bar{ODD}.png").write_bytes(b"no picture")
    refused(r"(?m)^error: .*\\xff/corpus.jsonl: record 3: .*red bar\\xff.png: cannot be used", *command)


def read_for_ever(read, model, i, *rest):
    """In place of read_item: a long clip."""
    if i == 1:
        print("reading", flush=True)
        time.sleep(600)
    return read(model, i, *rest)


def read_or_fail(read, model, i, *rest):
    """Another one is read for ever when this one cannot be read."""
    if i == 0:
        raise OSError("the disk is gone")
    return read_for_ever(read, model, i, *rest)


def weigh_for_ever(target_size, *given):
    print("reading", flush=True)
    time.sleep(600)


def fill_disk(code_files):
    """No file may be longer, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
    return code_files()


ENDS = {  # what takes the place of a function, signals, status, what is said
    "Ctrl-C while one is read": ("engine.stream.read_item", read_for_ever, 1, 130, "^interrupted.* goes on"),
    "and once more": ("engine.stream.read_item", read_for_ever, 2, 130, "^interrupted"),
    "Ctrl-C while one is hashed": ("engine.kept.target_size", weigh_for_ever, 1, 130, "^interrupted"),
    "an error": ("engine.stream.read_item", read_or_fail, 0, 1, "^error: the disk is gone"),
    "a full disk": ("engine.kept.code_files", fill_disk, 0, 1, r"^error: .*\.(bin|npy): cannot be written"),
}


@pytest.mark.parametrize("way", ENDS)
@pytest.mark.parametrize("script", ["eval.py", "tools.search"])
def test_every_end_is_soon_with_one_line_and_the_right_status(small, world, tmp_path, script, way):
    name, function, signals, status, line = ENDS[way]
    command = ["tools.search", world, "--index", tmp_path, "--batch_size", 2]
    if script == "eval.py":
        command = ["eval.py", "--data", world / "tasks", "--scores", tmp_path]
    started = Started(*command, "--ckpt", small, patch=(name, function))
    if function is not fill_disk:
        started.wait_for("reading")
    begun = time.monotonic()
    for _ in range(signals):
        time.sleep(0.2)
        os.killpg(started.pid, signal.SIGINT)
    assert started.wait(60) == status
    assert time.monotonic() - begun < 10
    *_, last = started.stderr.splitlines()
    assert re.search(line, last) and "Traceback" not in started.stderr, started.stderr
    assert "Exception" not in started.stderr


def test_an_error_beside_the_threads_that_read_ahead_ends_them(small, world, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "AHEAD", 1)  # a full buffer: they wait for what was read to be used
    embedder = kept.Embedder(Plume.from_pretrained(small, "cpu"), "single", None, 1, folder=str(tmp_path))
    monkeypatch.setattr(embedder, "keep", mock.Mock(side_effect=OSError("the disk is full")))
    before, sides = threading.active_count(), [parse_item(world / f"{name}.png") for name in NAMES]
    with pytest.raises(OSError) as error:  # who holds the error holds the frames that it came through
        embedder.work([(b"", side) for side in sides])
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before and "full" in str(error.value)


def fail_on_rank_1(busy, read, *rest):
    """busy: rank 0 is at work for a long time and asks nobody anything."""
    if os.environ["RANK"] == "1":
        raise DataError("an item that cannot be read")
    time.sleep(300 * busy)
    return read(*rest)


@pytest.mark.parametrize("busy", [False, True])
def test_when_a_rank_ends_the_others_end_with_one_line(small, world, busy):
    ranks = start_ranks(2, "eval.py", "--data", world / "tasks", "--ckpt", small, "--batch_size=2",
                        patch=("engine.stream.read_item", functools.partial(fail_on_rank_1, busy)))
    assert ranks[1].wait(60) == 1
    assert ranks[0].wait(10) == 1
    reasons = "rank 0 stops: another rank has ended", "error: an item that cannot be read"
    for rank, why in zip(ranks, reasons):
        assert f"\n{why}" in f"\n{rank.stderr}" and "Traceback" not in rank.stderr, rank.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_the_real_development_set_reads_completely():
    folder = SHARED / "real_dev"
    print("using", folder)
    pairs = Pairs(str(folder / "train.jsonl"))
    assert (len(pairs), len(pairs.names), len(list_tasks(str(folder)))) == (5996, 11, 13)
    assert len(read_task(str(folder), "video_ret/fluent_t2v").queries) == 108


REFUSED = {  # flags: what the error says
    "--taks x": "Did you mean 'task'", "--task=speed": "no such task", "--ckpt no/such": "no such checkpoint",
    "--steps=33": "steps are 0..32", "--mode=cot --steps=3": "belong to mode latent",
    "--dtype float31": "needs 'float32' or 'bfloat16'", "--dim=129": "the checkpoint has 128 components",
    "--json no/such/x.json": "in a folder that exists", "--limit=0": "must be at least 1",
    "--batch_size=0": "must be at least 1", "--mode=auto --done=2": "needs a probability",
    "--done=0.4": "and --mode auto", "--protocol=other": "needs clean or released",
    "--protocol=clean": "for MMEB-V2 only", "--skip_bad": "for MMEB-V2 only", "--moves=4": "turtle world's",
}


def test_evaluation_by_command_line_in_all_modes(trained, world, tmp_path):
    base = ["eval.py", "--data", world / "tasks", "--ckpt", trained[0] / "checkpoint"]
    printed = run(*base, "--task=all", "--json", tmp_path / "scores.json", "--batch_size", "5").stdout
    assert all(word in printed for word in ("image_ret/t2i", "mean", "chance"))
    scores = json.loads((tmp_path / "scores.json").read_text())
    found, m = scores["tasks"]["image_ret/t2i"], Plume.from_pretrained(trained[0] / "checkpoint", "cpu")
    task = read_task(str(world / "tasks"), "image_ret/t2i")
    similarity = m.encode(task.queries) @ m.encode(task.corpus).T  # independent of eval.py's ranking
    assert found["hit@1"] == np.mean(similarity.argmax(1) == np.arange(12))
    assert found["chance"] == pytest.approx(1 / 12) and scores["steps"] == 8
    assert found["relevant"].keys() == found["found"].keys() == set(task.query_ids)
    idle = [name for name, r in scores["tasks"].items() if r["steps_do_nothing"]]
    assert printed.count("not above K = 0") == len(idle)
    assert printed.count("warning: the latent steps do nothing") == bool(idle)

    assert "mode cot" in call(*base, "--task", "video_cls", "--mode", "cot", "--limit", 20).stdout
    assert "image_ret" not in call(*base, "--task", "video_cls/v2t", "--mode", "single").stdout
    for flags, why in REFUSED.items():
        refused(re.escape(why), *base, *flags.split(), by=call)
    refused("^error: --mode 'lattent'", *base, "--mode=lattent")
