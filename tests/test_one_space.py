"""Latent and single-pass embeddings in one space: the loss, what a checkpoint says of it, eval.py --index."""

import json
import warnings

import numpy as np
import pytest
import torch

import train
from curriculum import Curriculum
from data import Batches
from engine.train_flags import check_flags
from files.errors import DataError
from files.records import Pairs
from hub.settings import stored_settings
from model import Plume
from tasks.beir import read_task
from test_plume import assert_close, FINAL, make_model, whole
from tests.processes import call, run_ranks
from tests.samples import in_one_space, record, write_lines
from tests.test_runs import refused


@pytest.fixture
def claiming(small, tmp_path):
    return in_one_space(small, tmp_path)


# ---- the loss
def info_nce_in_numpy(query, candidates, names, asked, scale):
    """Both halves of InfoNCE, term by term; candidates and their names of every query, its target first."""
    right = {(who, called[0]) for who, called in zip(asked, names)}
    total = 0.0
    for i, who in enumerate(asked):
        target, name = candidates[i][0], names[i][0]
        own = np.exp(scale * query[i] @ target)
        among, back = own, own
        for j, other in enumerate(asked):
            among += sum(np.exp(scale * query[i] @ c) for c, n in zip(candidates[j], names[j])
                         if (who, n) not in right)
            back += np.exp(scale * query[j] @ target) if (other, name) not in right else 0
        total += np.log(among / own) / 2 + np.log(back / own) / 2
    return total / len(asked)


def test_cross_is_latent_queries_against_single_pass_targets_and_hard_negatives(tmp_path):
    asked, names = list("aabc"), [["x", "y", "v"], ["y", "w"], ["x"], ["z", "b", "x", "z"]]
    rows = [record(qry=query, pos=target, neg=negatives) for query, (target, *negatives) in zip(asked, names)]
    write_lines(tmp_path / "t.jsonl", rows)
    m, pairs = make_model(), Pairs(str(tmp_path / "t.jsonl"))
    batch = whole(Batches(pairs, m.processor, Curriculum()), (0, FINAL, np.arange(4)))
    out = m([batch], 8)
    gen, disc = (out["per_pair"][name].detach().numpy() for name in ("gen", "disc"))

    def expected(size):
        g, d = (x[:, :size] / np.linalg.norm(x[:, :size], axis=1, keepdims=True) for x in (gen, disc))
        negatives = iter(d[8:])
        candidates = [[d[4 + i], *(next(negatives) for _ in called[1:])] for i, called in enumerate(names)]
        return info_nce_in_numpy(g[:4], candidates, names, asked, 10)

    plain, crossed = (train.losses(out, batch, train.Config(w_cross=weight)) for weight in (0, 0.3))
    assert "cross" not in plain
    assert_close(crossed["cross"], expected(128), "cross", 1e-9)
    assert_close(crossed["loss"], plain["loss"] + 0.3 * crossed["cross"], "sum", 1e-9)
    cut = train.losses(out, batch, train.Config(w_cross=0.3, matryoshka="16,64"))
    assert_close(cut["cross"], expected(128) + (expected(16) + expected(64)) / 2, "cut, too", 1e-9)


# ---- what a checkpoint says
def test_a_checkpoint_says_that_its_spaces_are_one_while_that_is_trained(world, tmp_path, capsys):
    records, path, cpu = str(world / "train.jsonl"), str(tmp_path / "ck"), torch.device("cpu")
    pairs = Pairs(records)
    train.build_model(train.Config(data=records, w_cross=0.3), set(), pairs, cpu).save_pretrained(path)
    assert Plume.from_pretrained(path, "cpu").settings["one_space"]
    assert "one space" not in capsys.readouterr().out
    for weight, said in ((0.3, 0), (0.0, 1)):
        m = train.build_model(train.Config(init=path, w_cross=weight), {"init"}, pairs, cpu)
        assert m.settings["one_space"] == (weight > 0)
        assert capsys.readouterr().out.count(f"warning: {path} says that its latent and single-pass") == said
    m.save_pretrained(path)
    assert not Plume.from_pretrained(path, "cpu").settings["one_space"]
    with pytest.raises(DataError, match="--w_cross -1"):
        check_flags(train.Config(w_cross=-1.0), 1)


def test_older_checkpoints_and_the_released_layout_do_not_say_it(small, claiming, tmp_path):
    block = json.loads((small / "config.json").read_text())["plume"]
    del block["one_space"]
    assert not stored_settings(block, "here")["one_space"]
    m = Plume.from_pretrained(claiming, "cpu")
    with pytest.warns(UserWarning, match="implies other values than .*'one_space': True"):
        m.save_pretrained(tmp_path / "released", released=True)
    assert not Plume.from_pretrained(tmp_path / "released", "cpu").settings["one_space"]


# ---- eval.py --index
@pytest.mark.parametrize("mode, index", [("latent", "single"), ("single", "latent")])
def test_eval_ranks_queries_in_one_mode_against_corpora_in_the_other(claiming, world, tmp_path, mode, index):
    base = ["eval.py", "--data", world / "tasks", "--task", "image_ret", "--ckpt", claiming]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        printed = call(*base, "--mode", mode, "--index", index, "--json", tmp_path / "scores.json").stdout
    assert f", corpora {index}: queries: 12 items, 12 encoded" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    result, task = scores["tasks"]["image_ret/t2i"], read_task(str(world / "tasks"), "image_ret/t2i")
    assert (scores["mode"], scores["index"], result["index"]) == (mode, index, index)
    assert result["items_encoded"] == 24
    m = Plume.from_pretrained(claiming, "cpu")
    cosines = m.encode(task.queries, mode) @ m.encode(task.corpus, index).T
    assert result["hit@1"] == np.mean(cosines.argmax(1) == np.arange(12))
    for n, found in enumerate(result["found"].values()):
        assert_close([*found.values()], np.sort(cosines[n])[::-1][:10].copy(), f"query {n}", 1e-5)


def test_two_ranks_embed_queries_and_corpora_each_in_its_mode(claiming, world, tmp_path):
    flags = ["eval.py", "--data", world / "tasks", "--task=image_ret", "--ckpt", claiming, "--index=single",
             "--batch_size=2", "--json"]
    call(*flags, tmp_path / "one.json")
    assert run_ranks(2, *flags, tmp_path / "two.json").stdout.count("12 encoded") == 2
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    one, two = (scores["tasks"]["image_ret/t2i"]["found"] for scores in (one, two))
    assert one.keys() == two.keys()
    for query, found in one.items():
        assert two[query] == pytest.approx(found, abs=1e-5)


def test_kept_embeddings_of_a_mode_are_used_for_that_mode_alone(claiming, world, tmp_path):
    task, m = read_task(str(world / "tasks"), "image_ret/t2i"), Plume.from_pretrained(claiming, "cpu")
    queries, corpus = ({mode: m.encode(sides, mode) for mode in ("latent", "single")}
                       for sides in (task.queries, task.corpus))
    command = ["eval.py", "--data", world / "tasks", "--task=image_ret", "--ckpt", claiming,
               "--scores", tmp_path / "kept", "--json", tmp_path / "scores.json"]
    for number, (mode, index, said) in enumerate((
            ("latent", "single", "queries: 12 items, 12 encoded, 0 known from before, 0 shared; corpora: 12 "
             "items, 12 encoded"),
            ("single", "single", "24 items, 12 encoded, 12 known from before"),
            ("latent", "latent", "24 items, 12 encoded, 12 known from before"),
            ("single", "latent", "corpora: 12 items, 0 encoded, 12 known from before")), 1):
        assert said in call(*command, "--mode", mode, "--index", index).stdout
        result = json.loads((tmp_path / "scores.json").read_text())["tasks"]["image_ret/t2i"]
        best = (queries[mode] @ corpus[index].T).max(1)
        assert_close([max(found.values()) for found in result["found"].values()], best, mode + index, 1e-5)
        assert len(list((tmp_path / "kept").rglob("*_score.json"))) == number
    assert len(list((tmp_path / "kept" / "embeddings").iterdir())) == 2


def test_a_checkpoint_that_does_not_say_it_is_warned_of(small, world, tmp_path):
    base = ["eval.py", "--data", world / "tasks", "--task=image_ret", "--ckpt", small]
    with pytest.warns(UserWarning, match="one space .*mode latent hardly find what is .* mode single"):
        call(*base, "--index=single")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(*base, "--mode=single", "--index=single")  # the same mode
    for flags in (["--index=latent", "--mode=cot"], ["--index=sinlge"]):
        refused("needs single, or latent with --mode single", *base, *flags, by=call)
