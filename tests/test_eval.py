"""Ranking, metrics and the command line of eval.py."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from data import DataError, Pairs
from model import Plume
from tasks.beir import Task, list_tasks, read_task
from test_plume import SHARED, call, run


def worst_ranks(scores, gains):
    """Sort with every tie broken against the model."""
    order = sorted(range(len(scores)), key=lambda j: (-round(float(scores[j]), 5), gains.get(j, 0)))
    return sorted((gains[j], order.index(j) + 1) for j in gains)


@pytest.mark.parametrize("block", [(1024, 16384), (3, 4)])
def test_ranks_equal_brute_force_with_ties_candidates_and_grades(block):
    rng = np.random.default_rng(0)
    corpus = F.normalize(torch.tensor(rng.integers(-1, 2, (40, 4)) + 1e-3, dtype=torch.float32), dim=-1)  # many equal rows
    queries = F.normalize(torch.tensor(rng.standard_normal((25, 4)), dtype=torch.float32), dim=-1)
    relevant = [{int(j): int(rng.integers(1, 4)) for j in rng.choice(40, rng.integers(1, 5), replace=False)} for _ in queries]
    candidates = [None if i % 3 else list(dict.fromkeys([*relevant[i], *range(0, 40, 3)])) for i in range(25)]
    ranks = evaluation.rank(queries, corpus, relevant, candidates, block)
    for i, gains in enumerate(relevant):
        rows = candidates[i] or list(range(40))
        expected = worst_ranks([queries[i] @ corpus[j] for j in rows], {rows.index(j): g for j, g in gains.items()})
        assert sorted(ranks[i]) == expected, f"query {i}"


def test_a_tie_between_relevant_documents_puts_the_lesser_first():
    q, same = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]).repeat(3, 1)
    same[1] += 1e-8  # rounding is no difference
    for candidates in (None, [0, 1, 2]):
        assert sorted(evaluation.rank(q, same, [{0: 1, 1: 3}], [candidates])[0]) == [(1, 2), (3, 3)]


def test_scores_with_candidates_are_against_the_candidates_only():
    corpus, query = torch.eye(6), F.normalize(torch.tensor([[3.0, 2, 1, 0, 0, 0]]), dim=-1)
    task = Task("x/y", [], list("abcdef"), [{1: 1, 5: 2}], [[1, 2, 3, 4]], ["q"])
    scores = evaluation.evaluate(task, (query, corpus))
    assert scores["hit@1"] == 1 and scores["chance"] == 0.25 and scores["candidates"] == 4 and scores["ndcg@5"] == 1  # 5 is no candidate
    assert evaluation.ndcg([(1, r) for r in range(1, 8)], 5, [1] * 7) == pytest.approx(1)  # the best order is cut at 5 too
    with pytest.raises(DataError, match="x/y: .* not finite"):
        evaluation.evaluate(task, (query * math.nan, corpus))
    luck = Task("x/y", [], list("ab"), [{0: 1}] * 20, [None] * 20, [str(i) for i in range(20)])
    half = torch.eye(2)[[0] * 12 + [1] * 8]
    assert evaluation.evaluate(luck, (half, torch.eye(2)))["at_chance"]  # 12 of 20 at chance 1/2 is nothing


def test_ndcg_and_hits_by_hand():
    ranks = [(1, 1), (3, 4)]  # gain 1 at rank 1, gain 3 at rank 4
    assert evaluation.ndcg(ranks, 5, [1, 3]) == pytest.approx((1 + 3 / math.log2(5)) / (3 + 1 / math.log2(3)))
    assert evaluation.ndcg([(2, 6)], 5, [2]) == 0 and evaluation.hit(ranks, 1) and not evaluation.hit([(2, 6)], 5)


def test_a_constant_embedding_scores_zero_and_is_reported_at_chance():
    same = torch.ones(4, 8) / 8**0.5
    task = Task("x/y", [], list("abcd"), [{i: 1} for i in range(4)], [None] * 4, list("abcd"))
    scores = evaluation.evaluate(task, (same, same))
    assert scores["hit@1"] == 0 and scores["chance"] == 0.25 and scores["at_chance"] and "at chance" in evaluation.table({"x/y": scores})
    perfect = evaluation.evaluate(task, (torch.eye(4), torch.eye(4)))
    assert perfect["hit@1"] == perfect["ndcg@5"] == 1 and not perfect["at_chance"] and perfect["ranks"] == dict.fromkeys("abcd", 1)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_the_real_development_set_reads_completely():
    print("using", SHARED / "real_dev")
    pairs = Pairs(str(SHARED / "real_dev" / "train.jsonl"))
    assert len(pairs) == 5996 and len(pairs.names) == 11 and len(list_tasks(str(SHARED / "real_dev"))) == 13
    assert len(read_task(str(SHARED / "real_dev"), "video_ret/fluent_t2v").queries) == 108


def test_evaluation_by_command_line_in_all_modes(trained, world, tmp_path):
    out, _ = trained
    base = ["eval.py", "--data", world / "tasks", "--ckpt", out / "checkpoint"]
    done = run(*base, "--task=all", "--json", tmp_path / "scores.json", "--batch_size", "5")
    assert "image_ret/t2i" in done.stdout and "mean" in done.stdout and "chance" in done.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    m = Plume.from_pretrained(out / "checkpoint", "cpu")
    task = read_task(str(world / "tasks"), "image_ret/t2i")
    similarity = m.encode(task.queries) @ m.encode(task.corpus).T  # independent of eval.py's ranking
    assert scores["tasks"]["image_ret/t2i"]["hit@1"] == np.mean(similarity.argmax(1) == np.arange(12))
    assert scores["tasks"]["image_ret/t2i"]["chance"] == pytest.approx(1 / 12) and scores["steps"] == 8
    assert "mode cot" in call(*base, "--task", "video_cls", "--mode", "cot", "--limit", 20).stdout
    assert "image_ret" not in call(*base, "--task", "video_cls/v2t", "--mode", "single").stdout
    for flags, why in ((["--taks", "x"], "Did you mean 'task'"), (["--mode", "lattent"], "mode is one of"), (["--steps", "few"], "--steps needs a value of type int"), (["--ckpt", tmp_path / "no"], "no such checkpoint"),
                       (["--dtype", "float31"], "needs 'float32' or 'bfloat16'"), (["--json", tmp_path / "no" / "x.json"], "in a folder that exists"), (["--json"], "--json needs a value")):
        failed = call(*base, *flags, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr
    assert "python -m tools.speed" in call(*base, "--task", "speed", check=False).stderr
    assert "python -m tools.compare" in call("eval.py", "--compare", "x.png", check=False).stderr
    failed = run(*base, "--mode=lattent", check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: --mode 'lattent'") and "Traceback" not in failed.stderr
