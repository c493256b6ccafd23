"""What python -m tools.probe changes, reads and reports."""

import copy
import functools
import json
import re
import shutil
import subprocess
from html import escape, unescape

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import latent
from curriculum import Curriculum
from data import collate
from files.errors import DataError
from files.items import parse_item
from latent import rollout
from model import Plume
from tasks.beir import Task
from tasks.turtle import state_word, walk, World
from test_plume import assert_close, make_model, mixed_items, naive, rendered
from tests.processes import call
from tools.probe_thoughts import Thoughts
from tools.probe_ways import INPUTS, Queries, TRAINED, ways_of
from tools import probe

K = 3


def test_a_hook_that_gives_back_its_input_changes_no_bit_and_runs_without_graphs(model, world):
    batch = collate(rendered(model, mixed_items(world)), model.processor)
    suffix, seen = model.lm.embed_tokens(batch["suffix"]), []
    given = model.lm, model.adapter, model.prefix(batch), K, suffix

    def look(k, x):
        seen.append((k, x.shape))
        return x

    plain, hooked = rollout(*given), rollout(*given, graphs=pytest.fail, hook=look)
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked))
    assert seen == [(k, suffix[:, 0].shape) for k in range(K)]
    other = rollout(*given, hook=lambda k, x: 0 * x)
    assert (other.suffix - plain.suffix).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["tiny", "tiny3"])
@torch.no_grad()
def test_every_way_equals_the_same_change_in_transformers(world, shape):
    m, items = make_model(shape=shape, latent_steps=K), mixed_items(world)[:4]
    samples, queries = rendered(m, items), Queries(m, [parse_item(item) for item in items])

    def usual(b, z, k, anchor):
        return m.adapter(z, k, anchor)[0]

    def routed(*logits):
        adapter = copy.deepcopy(m.adapter)
        adapter.top_k, adapter.router.bias = 4, torch.nn.Parameter(torch.tensor(logits).double())
        adapter.router.weight.zero_()
        return lambda b, z, k, anchor: adapter(z, k, anchor)[0]

    def theirs(adapter, steps=K):
        """adapter: (b, z, k, anchor) of query b -> input of step k -> embeddings (B, D), inputs [b][k]"""
        taken = [[] for _ in samples]

        def recorded(b, z, k, anchor):
            taken[b].append(adapter(b, z, k, anchor))
            return taken[b][-1], z[:, :0]

        found = [naive(m, sample, steps, adapter=functools.partial(recorded, b)).suffix[0, -1]
                 for b, sample in enumerate(samples)]
        return F.normalize(torch.stack(found), dim=-1), taken

    _, inputs = theirs(usual)
    anchors, ways = queries.anchor.roll(1, 0), ways_of(m)
    for name, adapter in {
        TRAINED: usual,
        "inputs zero": lambda b, z, k, anchor: 0 * z,
        "inputs of another query": lambda b, z, k, anchor: inputs[b - 1][k],
        "inputs mean": lambda b, z, k, anchor: sum(own[k] for own in inputs) / len(inputs),
        "adapter left out": lambda b, z, k, anchor: z,
        "expert 2 alone": routed(-torch.inf, -torch.inf, 0, -torch.inf),
        "experts uniform": routed(0, 0, 0, 0),
        "anchor shuffled": lambda b, z, k, anchor: usual(b, z, k, anchors[b][None]),
        "anchor zero": lambda b, z, k, anchor: usual(b, z, k, 0 * anchor),
    }.items():
        assert_close(ways[name].embed(queries), theirs(adapter)[0], name, 1e-5)
    for k in range(K):
        assert_close(ways[f"K = {k}"].embed(queries), theirs(usual, k)[0], f"K = {k}", 1e-5)
    assert m.adapter.top_k == 2 and torch.equal(ways[TRAINED].embed(queries), queries.roll(K)[0])


@torch.no_grad()
def test_hidden_latents_are_those_that_a_mask_hides_from_the_suffix(world, monkeypatch):
    m = make_model(latent_steps=K)
    sides = [parse_item(item) for item in mixed_items(world)[:3]]
    queries, causal_mask = Queries(m, sides), latent.causal_mask
    ours = ways_of(m)["latents hidden from the suffix"].embed(queries)

    def hiding(L, n, columns, like):  # of the last pass: the last latent, then the suffix
        mask, P = causal_mask(L, n, columns, like), n - (K - 1)
        mask[1:, P : P + K] = -torch.inf
        return mask

    monkeypatch.setattr(latent, "causal_mask", hiding)
    masked, _, _ = queries.roll(K)
    assert_close(ours, masked, "hidden", 1e-9)
    assert (ours - queries.trained).abs().max() > 1e-3


def test_noise_has_the_length_of_the_inputs_and_another_direction(model):
    x = 3 * torch.randn(K, 5, 128, dtype=torch.float64)
    noise = INPUTS["noise"](x)
    assert_close(noise.norm(dim=-1), x.norm(dim=-1), "length", 1e-9)
    assert F.cosine_similarity(noise, x, dim=-1).abs().max() < 0.5


def rows_for(m, texts):
    """Every text is its own candidate, as trained: 100% by construction -> {row: dict}"""
    sides, n = [parse_item(text) for text in texts], len(texts)
    task = Task("x/own", sides, sides, [{i: 1} for i in range(n)], [None] * n, texts, texts)
    result, _ = probe.probe(m, [task], n, set(), probe.Config(limit=0))
    return result["all"]


def test_the_table_tells_used_latents_from_latents_that_are_the_same_for_all():
    m = make_model(latent_steps=K).float()
    texts = [f"red {i}" for i in range(60)]
    used = rows_for(m, texts)
    assert used[TRAINED]["score"] == 1
    for name in ("K = 0", "inputs zero", "inputs of another query", "inputs noise"):
        assert re.match(r"the \w+ are (a little )?used: 100.0 -> ", used[name]["verdict"]), used[name]
    with torch.no_grad():
        m.adapter.b2[0] += 1e4 * torch.randn(m.lm.config.hidden_size)  # drowns what the state says
    same = rows_for(m, texts)
    for name in ("inputs of another query", "inputs mean"):
        assert same[name]["verdict"] == "the thoughts are not used: 100.0 -> 100.0"
    assert same["anchor shuffled"]["verdict"] == "the anchor is not used: 100.0 -> 100.0"
    assert " used: 100.0 -> " in same["inputs zero"]["verdict"]


def test_verdicts_by_hand():
    right, wrong = np.ones(200), np.zeros(200)
    few = np.r_[np.ones(190), np.zeros(10)]
    say = functools.partial(probe.verdict, "inputs zero", "the thoughts are")
    assert say(wrong, right) == "the thoughts are used: 100.0 -> 0.0"
    assert say(few, right) == "the thoughts are a little used: 100.0 -> 95.0"
    assert say(right, right) == "the thoughts are not used: 100.0 -> 100.0"
    assert say(np.array([1.0, 1, 1, 1, 0]), np.ones(5)) == "undecided with 5 queries: 100.0 -> 80.0"
    assert say(right, few) == "the thoughts are in the way: 95.0 -> 100.0"
    assert probe.verdict("single", "", wrong, right) == "latent is better than single: 100.0 against 0.0"
    assert probe.verdict("cot", "", right, few) == "latent is worse than cot: 95.0 against 100.0"
    assert probe.verdict("cot", "", few, few) == "latent is no better than cot: 95.0 against 95.0"


@pytest.fixture(scope="module")
def turtle():
    """A model of turtle world with random weights."""
    return Plume.random(World().texts(), latent_steps=8)


@torch.no_grad()
def test_agreement_is_with_the_worlds_own_walk(turtle):
    test, rows, eot = World("test"), [0, 1, 450, 2799], turtle.processor.id["<eot>"]  # tiles, words, a page
    sides = [test[i][0] for i in rows]
    queries, thoughts = Queries(turtle, sides), Thoughts()
    thoughts.add(queries, Curriculum(8, 1), sides)
    states = torch.cat([queries.start[:, None], queries.latents], 1)
    best = turtle.backbone.lm_head(states).argmax(-1)  # (B, 9)
    for b, i in enumerate(rows):
        passed = walk(test.starts[i], test.programs[i])
        (ids,) = zip(*(turtle.processor.encode(state_word(state)) for state in passed))
        assert thoughts.expected[b] == dict(enumerate(ids)) and None not in ids
        assert [tokens[0] for tokens in thoughts.tokens[b]] == best[b].tolist()
        thoughts.tokens[b][:8] = [[token] for token in ids]
    assert thoughts.agreement() == ([1.0] * 4, dict.fromkeys(range(8), 1.0))
    thoughts.tokens[0][3][0] = thoughts.tokens[2][3][0] = thoughts.tokens[2][5][0] = eot
    shares, by_step = thoughts.agreement()
    assert shares == [7 / 8, 1, 6 / 8, 1]
    assert (by_step[3], by_step[5], by_step[0]) == (0.5, 0.75, 1)
    cosine = functools.partial(F.cosine_similarity, dim=-1)
    assert_close(thoughts.to_before[1][0], cosine(states[1, 1], states[1, 0]), "to the state before")
    assert_close(thoughts.to_anchor[1][8], cosine(states[1, 8], queries.anchor[1]), "to the anchor")


def check_report(path, trajectories):
    """The file is whole, names every query shown, needs nothing from elsewhere -> what its pictures show."""
    text, inside = path.read_text(), []
    for end, tag in re.findall(r"<(/?)(\w+)[^>]*>", text):
        if end:
            assert inside.pop() == tag
        elif tag not in ("meta", "img", "br"):
            inside.append(tag)
    assert inside == [] and len(text) < 10e6
    titles = [unescape(title) for title in re.findall(r"<h3>(.*?)</h3>", text)]
    assert sorted(titles) == sorted(f"{t['task']}, query {t['id']}" for t in trajectories) and titles
    assert not re.search(r'<(script|link|iframe|object)|url\(|(src|href)="(?!data:image/|#)', text)
    alts = re.findall(r'<img[^>]* alt="([^"]+)"', text)
    assert len(alts) == text.count("<img")
    return alts


def test_probe_of_turtle_world_by_command_line(turtle, tmp_path):
    turtle.save_pretrained(tmp_path / "ck")
    files = ["--html", tmp_path / "r.html", "--json", tmp_path / "r.json"]
    few = ["--ckpt", tmp_path / "ck", "--queries=9", "--limit=3"]
    printed = call("tools.probe", *few, "--task=video_cls", *files).stdout
    for word in ("9 of 400 queries", "inputs noise", "expert 3 alone", "latents hidden", "cot",
                 "ck: 1 task, K = 8", "what was changed                  hit@1 %   95%            verdict"):
        assert word in printed
    assert re.search(r"\n\nagreement: steps .*\ntask +steps % +95%\nvideo_cls +\d+\.\d .*\nall +\d", printed)
    result = json.loads((tmp_path / "r.json").read_text())
    rows = result["tasks"]["video_cls/turtle"]["rows"]
    assert list(rows)[:2] == ["as trained", "K = 0"] and list(rows)[-2:] == ["single", "cot"]
    agreement = result["tasks"]["video_cls/turtle"]["agreement"]
    assert 0 <= agreement["score"] < 0.5 and agreement["score"] == result["agreement"]["score"]
    text = (tmp_path / "r.html").read_text()
    for row in rows.values():  # each has its own explanation in the report
        assert text.count(f'">{escape(row["what"])}</div></th>') == 1
    assert text.count('<th scope="col">what was changed</th><th scope="col">hit@1 %</th>') == 2
    assert "1 task," in text and '<th scope="col">steps %</th>' in text
    assert np.array(result["tasks"]["video_cls/turtle"]["experts"]).shape == (8, 4)
    first = result["trajectories"][0]
    assert len(first["steps"]) == 9 and len(first["retrieved"]) == 5
    assert {"tokens", "agrees", "rationale", "to_before", "to_anchor", "experts"} <= first["steps"][3].keys()
    assert "6 frames" in " ".join(check_report(tmp_path / "r.html", result["trajectories"]))

    few.append("--task=image_qa")
    printed = call("tools.probe", *few, "--ids", first["id"], "--limit=0").stdout
    assert f"image_qa/turtle, query {first['id']}: " in printed and "would retrieve" in printed
    for flags, why in (
        (["--ids=nobody"], "no query has this id"),
        (["--task=image_qaa"], "Did you mean 'image_qa'"),
        (["--segments=3"], "8 latent steps are no multiple"),
        (["--batch_size=1"], "at least 2"),
        (["--html", tmp_path / "no" / "x.html"], "in folders that exist"),
    ):
        failed = call("tools.probe", *few, *flags, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr


def test_probe_of_folders_without_rationales_by_command_line(small, world, tmp_path):
    files = ["--html", tmp_path / "r.html", "--json", tmp_path / "r.json"]
    flags = ["--data", world / "tasks", "--ckpt", small, "--limit=3", "--show=2"]
    printed = call("tools.probe", *flags, *files).stdout
    assert "no query comes with a rationale" in printed and "agreement" not in printed
    result = json.loads((tmp_path / "r.json").read_text())
    alts = check_report(tmp_path / "r.html", result["trajectories"])
    assert "picture: red bar.png" in alts or "picture: Represent." in alts
    assert "each with the first 5 of up to 12 candidates" in (tmp_path / "r.html").read_text()

    if chromium := shutil.which("chromium"):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                 f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shown.png'}"]
        done = subprocess.run([chromium, *flags, f"file://{tmp_path / 'r.html'}"],
                              capture_output=True, text=True, timeout=120)
        assert (tmp_path / "shown.png").exists() and "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.parametrize("settings, left_out", [
    (dict(kind="none"), ["adapter left out", "expert 0 alone", "anchor zero"]),
    (dict(kind="mlp"), ["expert 0 alone", "anchor zero"]),
    (dict(anchor=False), ["anchor zero"]),
], ids=str)
def test_what_a_checkpoint_does_not_have_is_left_out_and_said(settings, left_out):
    m = make_model(latent_steps=2, adapter=settings)
    rows = ways_of(m)
    for name in ("inputs zero", "adapter left out", "expert 0 alone", "anchor zero"):
        assert (name in rows) == (name not in left_out)
    said = probe.what_is_left_out(m, probe.Config(), [], 0, [1.0])
    assert len(said) == 1 and "no rows for" in said[0]


def test_no_latent_steps_is_an_error_and_one_query_leaves_out_what_needs_another():
    with pytest.raises(DataError, match="K = 0 has no latent steps"):
        probe.curriculum_of(probe.Config(), make_model(latent_steps=0))
    m = make_model(latent_steps=1).float()
    sides = [parse_item(f"number {i}") for i in range(7)]
    task = Task("x/one", sides[:1], sides, [{0: 1}], [[0, 3]], ["only"], list("abcdefg"))
    result, shown = probe.probe(m, [task], 1, set(), probe.Config(limit=0, show=1))
    assert "inputs of another query" not in result["all"] and "inputs zero" in result["all"]
    assert "one query has no other" in " ".join(result["notes"])
    assert len(shown[0][0]["retrieved"]) == 2  # of its two candidates
