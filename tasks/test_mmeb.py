"""MMEB-V2: the table of its tasks, its readers, and eval.py over a miniature of the published files."""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
from files.errors import DataError
from files.items import parse_item
from hub.settings import RELEASED_PROMPT
from model import Plume
from tasks.beir import Task
from tasks.miniature import CHOOSE, CLIP_QUERIES, INST, Miniature, PAGE_TARGET
from tasks.mmeb import META, MMEB, modality, read_published, row_files, rows_of
from tasks.mmeb_report import paper_rows
from test_plume import HERE, make_model, mixed_items
from tests.processes import call, run, run_ranks
from tests.samples import NAMES, picture
from engine import kept

IMAGE_ROWS = "ziyjiang/MMEB_Test_Instruct"
DOCVQA = "vidore/docvqa_test_subsampled_beir"
SSV2 = "VLM2Vec/SmthSmthV2"
VIDEO_MME = "VLM2Vec/Video-MME"
SEEKER = "rows/VLM2Vec/MomentSeeker/test.jsonl"


@pytest.fixture(scope="session")
def mmeb(tmp_path_factory):
    return Miniature(tmp_path_factory.mktemp("mmeb"))


@pytest.fixture
def counts(mmeb, monkeypatch):
    """As if the miniature's counts were the published ones; an original version has 9 queries more."""
    for name, (queries, candidates, _) in mmeb.expected.items():
        task, versions = MMEB[name], {}
        for hub, (version, _) in (task.versions or {}).items():
            versions[hub] = version, len(queries) + (9 if version == "original" else 0)
        corpus = len(candidates[0]) if task.corpus else 0
        changed = replace(task, queries=len(queries), corpus=corpus, versions=versions or None)
        monkeypatch.setitem(MMEB, name, changed)


def edit(mini, hub, config, change):
    """Rewrites the rows of a part of a hub repository."""
    old = [dict(row) for row in rows_of(str(mini.root / "rows" / hub), config, "test")]
    mini.write_rows(hub, config, "test", change(old))


def first(**columns):
    """The first row, with other values for some of its columns."""
    def change(rows):
        return [rows[0] | columns, *rows[1:]]

    return change


def words(side):
    return side.parts[-1][1]


def words_of_candidates(task):
    """Those of the first query."""
    return [words(task.corpus[row]) for row in task.candidates[0]]


def scores_in(path):
    """The tasks of a file that --json wrote."""
    return json.loads(path.read_text())["tasks"]


def write_scores(path, hits):
    """A file as --json writes it, of tasks with nothing but hit@1."""
    scores = {name: {"metric": "hit@1", "hit@1": value} for name, value in hits.items()}
    path.write_text(json.dumps(dict(tasks=scores)))


# ------------------------------------------------------------------------------- the table, and all its tasks


COLUMNS = [
    "model", "CLS", "QA", "RET", "GD", "image", "CLS", "QA", "RET", "MRET", "video",
    "VDRv1", "VDRv2", "VR", "OOD", "visdoc", "all"]


def test_the_78_tasks_and_their_weight_are_the_benchmarks():
    metas = [t.meta for t in MMEB.values()]
    assert [metas.count(m) for m in META] == [10, 10, 12, 4, 5, 5, 5, 3, 10, 4, 6, 4]
    assert list(dict.fromkeys(metas)) == list(META)
    assert sum(t.queries for t in MMEB.values() if t.meta.startswith("image")) == 36_000
    assert MMEB["VATEX"].queries == 4478
    mended = {t.name for t in MMEB.values() if t.versions}
    assert mended == {"MomentSeeker", "ViDoSeek-page", "MMLongBench-page"}
    assert MMEB["ViDoRe_tatdqa"].hub == "vidore/tatdqa_test_beir"
    assert MMEB["ViDoRe_docvqa"].hub == DOCVQA

    means = dict(image=0.663, video=0.441, visdoc=0.675)
    results = {}
    for t in MMEB.values():
        results[t.full_name] = {"metric": "x", "x": means[modality(t.meta)], "partial": False}
    (header, ours, paper, *_), missing = paper_rows(results, "ours")
    assert not missing
    assert header == COLUMNS
    # the plain mean over 78; that of the three means is 59.3
    assert abs(float(ours[-1]) - float(paper[-1])) < 0.11
    assert ours[5] == paper[5] == "66.3"

    results.popitem()  # a document task
    (_, ours, *_), missing = paper_rows(results, "ours")
    assert missing
    assert ours[-1].endswith("*")
    assert ours[-2].endswith("*")
    assert not ours[5].endswith("*")


def ndcg_by_hand(order, gains):
    """order: candidates, the best first."""
    best = sorted(gains.values(), reverse=True)[:5]
    ideal = sum(gain / math.log2(i + 2) for i, gain in enumerate(best))
    return sum(gains.get(c, 0) / math.log2(i + 2) for i, c in enumerate(order[:5])) / ideal


def score_by_hand(model, queries, candidates, gains, metric):
    """The mean metric, from `encode` and a sort."""
    items, sizes = [*queries], [len(queries)]
    for found in candidates:
        items += found
        sizes.append(len(found))
    vectors = torch.from_numpy(model.encode(items, batch_size=32)).double()
    asked, *found = vectors.split(sizes)
    scores = []
    for query, rows, right in zip(asked, found, gains, strict=True):
        cosines = [round(float(row @ query), 6) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (-cosines[i], i in right))  # ties against the model
        scores.append(float(order[0] in right) if metric == "hit@1" else ndcg_by_hand(order, right))
    return sum(scores) / len(scores)


def assert_check_finds_all(root):
    printed = call("eval.py", "--data", root, "--check").stdout
    assert "78 of 78 tasks are there without a problem" in printed
    cells = {}
    for line in printed.splitlines():
        if "/" in line:
            name, *rest = line.split()
            cells[name] = rest
    assert cells["video_ret/MSVD"] == "4 / 4 4 4 / 4".split()
    assert cells["image_gd/RefCOCO"][:3] == ["4", "/", "4"]
    assert cells["visdoc_ood/ViDoSeek-page"][-1] == "fixed"


def assert_scores_are_right(results, expected, model):
    """expected: as that of a Miniature, of all tasks."""
    assert len(results) == 78
    assert len(expected) == 78
    for name, (queries, candidates, gains) in expected.items():
        task = MMEB[name]
        r = results[task.full_name]
        metric = "ndcg@5" if task.is_document else "hit@1"
        assert r["metric"] == metric, name
        assert r["queries"] == len(queries), name
        assert not r["partial"], name
        by_hand = score_by_hand(model, queries, candidates, gains, metric)
        assert abs(r[metric] - by_hand) < 1e-9, name
        assert r["interval"][0] <= r[metric] <= r["interval"][1]
    for name in ("video_mret/MomentSeeker", "visdoc_ood/ViDoSeek-page", "visdoc_ood/MMLongBench-page"):
        assert results[name]["version"] == "fixed"


def assert_score_folder_is_right(folder, results):
    """What stands in --scores beside the embeddings."""
    one = json.loads((folder / "video_ret" / "MSVD_score.json").read_text())
    assert one == results["video_ret/MSVD"]
    assert one["queries_per_s"] > 0
    assert one["steps"] == 8
    assert one["mode"] == "latent"
    assert one["checkpoint_hash"]
    assert one["prompt_hash"]

    board = json.loads((folder / "leaderboard.json").read_text())
    metrics = board["metrics"]
    assert {part: len(found) for part, found in metrics.items()} == dict(image=36, video=18, visdoc=24)
    assert board["metadata"]["incomplete"] == []
    named = {"ViDoSeek-page-fixed", "MMLongBench-page-fixed", "ViDoSeek-doc"}
    assert named <= metrics["visdoc"].keys()
    assert "MomentSeeker" in metrics["video"]
    ndcg = results["visrag/VisRAG_PlotQA"]["ndcg@5"]
    assert metrics["visdoc"]["VisRAG_PlotQA"]["ndcg_linear@5"] == ndcg

    rows = [line.split("|") for line in (folder / "table.md").read_text().splitlines()]
    assert rows[3][1].strip() == "PLUME, paper"
    assert rows[3][-2].strip() == "61.6"
    mean = 100 * np.mean([r[r["metric"]] for r in results.values()])
    assert abs(float(rows[2][-2]) - mean) < 0.051


def assert_compared_by_size(a, b):
    """Two files of --json; b has some of a's tasks."""
    lines = call("eval.py", "--compare", a, b).stdout.splitlines()
    sizes = [abs(float(line.split()[-1])) for line in lines[1 : 1 + len(scores_in(b))]]
    assert sizes == sorted(sizes, reverse=True)
    printed = "\n".join(lines)
    assert "only in a" in printed
    assert "only in b" not in printed
    assert "visdoc/ViDoSeek-doc" in printed


def assert_leaderboard_holds_the_same(board, scores):
    printed = call("eval.py", "--compare", board, board).stdout
    assert "image/ImageNet-1K" in printed
    assert "+0.0" in printed
    printed = call("eval.py", "--compare", board, scores).stdout  # the same scores in two formats
    assert len(printed.splitlines()) == 80
    assert "only in" not in printed
    assert not re.search(r"[1-9]\n", printed)


def test_all_78_tasks_from_their_files_score_what_an_independent_computation_does(
        mmeb, small, counts, tmp_path):
    assert_check_finds_all(mmeb.root)
    flags = ["--data", mmeb.root, "--ckpt", small, "--scores", tmp_path / "scores"]
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    printed = call("eval.py", *flags, "--json", a).stdout
    results = scores_in(a)
    assert_scores_are_right(results, mmeb.expected, Plume.from_pretrained(small))
    summary = r"(\d+) items, (\d+) encoded, (\d+) known from before, (\d+) shared"
    asked, encoded, known, shared = map(int, re.search(summary, printed).groups())
    assert encoded + shared == asked
    assert shared > 100  # labels and pages that several tasks have
    assert known == 0
    (folder,) = (tmp_path / "scores").glob("small?-small-latent8-??????")
    assert_score_folder_is_right(folder, results)

    # once more: everything is known, and the times are still those of the run that did the work
    printed = call("eval.py", *flags, "--json", a).stdout
    assert f"{asked} items, 0 encoded, {encoded} known from before, {shared} shared" in printed
    assert scores_in(a) == results

    # some of the tasks in another mode
    call("eval.py", *flags, "--json", b, "--mode", "single", "--task", "image_gd,MSVD,visdoc")
    others = scores_in(b)
    assert len(others) == 4 + 1 + 24
    assert all(r["run_hash"] != results[name]["run_hash"] for name, r in others.items())
    assert (folder / "table.md").exists()
    assert_compared_by_size(a, b)
    assert_leaderboard_holds_the_same(folder / "leaderboard.json", a)


def test_several_meta_tasks_may_have_a_data_set_of_one_name_when_score_files_are_compared(tmp_path):
    x, y = tmp_path / "x.json", tmp_path / "y.json"
    write_scores(x, {"image_cls/turtle": 0.5, "image_qa/turtle": 0.1})
    write_scores(y, {"image_cls/turtle": 0.5, "image_qa/turtle": 0.9})  # the biggest difference goes first
    lines = call("eval.py", "--compare", x, y).stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["+80.0", "+0.0", "+40.0"]


NOT_COMPARED = [  # files, what is said
    (["a.json"], "two JSON files"),
    (["a.json", "a.json", "a.json"], "two JSON files"),
    (["a.json", "gone.json"], "No such file"),
    (["table.md", "table.md"], "neither a file that"),
]


def test_what_cannot_be_compared_is_named_and_no_score_file_is_touched(tmp_path):
    write_scores(tmp_path / "a.json", {"video_ret/MSVD": 0.5})
    (tmp_path / "table.md").write_text("| model | CLS |\n| --- | --- |\n")
    before = (tmp_path / "a.json").read_bytes()
    for files, why in NOT_COMPARED:
        failed = call("eval.py", "--compare", *(tmp_path / file for file in files), check=False)
        assert why in failed.stderr
    assert (tmp_path / "a.json").read_bytes() == before


# -------------------------------------------------------------------------------- embeddings that a run keeps


def stored(folder):
    """All embeddings that a run kept, by their key."""
    size, found = 16 + 4 * 128, {}
    for path in sorted(Path(folder).glob("embeddings/*/*.bin")):
        raw = path.read_bytes()
        for begin in range(0, len(raw) - size + 1, size):
            key, vector = raw[begin : begin + 16], raw[begin + 16 : begin + size]
            found[key] = vector
    return found


def timeless(path):
    """The scores without what the clock, or how much was known before, says."""
    tasks = scores_in(path)
    for r in tasks.values():
        for name in ("seconds", "queries_per_s", "items_encoded"):
            del r[name]
    return tasks


def interrupt(patch, after):
    """Plume.encoding is as if Ctrl-C were pressed behind so many windows."""
    encoding, windows = kept.encoding, []

    def stopping(model, *args, **kw):
        for window in encoding(model, *args, **kw):
            windows.append(window)
            yield window
            if len(windows) == after:
                raise KeyboardInterrupt

    patch.setattr(kept, "encoding", stopping)


def test_a_stopped_run_goes_on_and_two_ranks_equal_one_bit_for_bit(mmeb, small, tmp_path, monkeypatch):
    flags = [
        "--data", mmeb.root, "--ckpt", small, "--task", "MomentSeeker,QVHighlight,image_gd,vidore_v2",
        "--skip_bad", "--batch_size", "3"]

    def outputs(name):
        return ["--scores", tmp_path / name, "--json", tmp_path / f"{name}.json"]

    run("eval.py", *flags, *outputs("one"))
    run_ranks(2, "eval.py", *flags, *outputs("two"))
    one = timeless(tmp_path / "one.json")
    assert one == timeless(tmp_path / "two.json")
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    assert len(stored(tmp_path / "one")) > 60
    files = (tmp_path / "two").glob("embeddings/*/*.bin")
    assert {path.name[0] for path in files} == {"0", "1"}  # both ranks have kept some

    with monkeypatch.context() as patch:
        interrupt(patch, after=6)
        failed = call("eval.py", *flags, "--scores", tmp_path / "stopped", check=False)
    assert "interrupted after" in failed.stderr
    assert "the same command goes on" in failed.stderr
    (path,) = (tmp_path / "stopped").glob("embeddings/*/*.bin")
    with open(path, "ab") as f:
        f.write(b"half a record")
    kept = len(stored(tmp_path / "stopped"))
    assert kept > 10
    printed = call("eval.py", *flags, *outputs("stopped")).stdout
    assert f"{kept} known from before" in printed
    here = timeless(tmp_path / "stopped.json")
    assert {t: r["ranks"] for t, r in here.items()} == {t: r["ranks"] for t, r in one.items()}
    call("eval.py", *flags, *outputs("whole"))  # in this process, too, but in one go
    assert here == timeless(tmp_path / "whole.json")
    assert stored(tmp_path / "stopped") == stored(tmp_path / "whole")


def run_hash(model, mode="latent", steps=8, **flags):
    return kept.Embedder(model, mode, steps, **flags).run_hash


def with_text_config(small, folder, change):
    """A copy of a checkpoint, of whose text model's settings some are others -> the model."""
    shutil.copytree(small, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["text_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return Plume.from_pretrained(folder)


def other_theta(text):
    text["rope_parameters"]["rope_theta"] = 1e6


def other_eps(text):
    text["rms_norm_eps"] = 0.01


def test_embeddings_of_another_checkpoint_mode_or_setting_are_never_used(small, world, tmp_path, monkeypatch):
    model = Plume.from_pretrained(small)
    runs = [
        run_hash(model),
        run_hash(model, steps=4),
        run_hash(model, "single", None),
        run_hash(model, protocol="released")]
    with torch.no_grad():
        model.adapter.state_dict()["ln.bias"][3] += 1e-6
    runs.append(run_hash(model))
    runs.append(run_hash(Plume.from_pretrained(small, limits=dict(max_pixels=784))))
    runs.append(run_hash(Plume.from_pretrained(small, dtype="bfloat16")))
    # what is in no weight
    runs.append(run_hash(with_text_config(small, tmp_path / "theta", other_theta)))
    runs.append(run_hash(with_text_config(small, tmp_path / "eps", other_eps)))
    source = tmp_path / "source"
    for changed in kept.code_files():  # one line more in any file on which an embedding can depend
        left = shutil.ignore_patterns(".*", "out", "assets")
        shutil.copytree(HERE, source, dirs_exist_ok=True, ignore=left)
        with open(source / changed.relative_to(HERE), "a") as f:
            f.write("\n")
        with monkeypatch.context() as patch:
            patch.setattr(kept, "ROOT", source)
            runs.append(run_hash(Plume.from_pretrained(small)))
    assert len(set(runs)) == len(runs)
    assert run_hash(Plume.from_pretrained(small)) == runs[0]


def test_items_are_known_by_their_content_and_weighed_by_their_tokens(small, world):
    model = Plume.from_pretrained(small)
    embedder = kept.Embedder(model, "latent", 8)

    def weigh(item):
        return embedder.weigh(parse_item(item))

    red = str(world / "red bar.png")
    items = mixed_items(world) + ["red ", dict(image=red, text="x"), dict(video=[red])]
    weights = [weigh(item) for item in items]
    assert len({weight.key for weight in weights}) == len(items)
    again = str(shutil.copy(red, world / "again.png"))
    assert weigh(dict(image=again)).key == weigh(dict(image=red)).key
    beside = []  # tokens of the prompt around each item
    for item, weight in zip(items, weights):
        beside.append(len(model.processor.render(parse_item(item))["ids"]) - weight.tokens)
    del beside[4]  # of a video file: only decoding would tell
    assert max(beside) - min(beside) < 8


def test_kept_embeddings_depend_on_every_file_that_can_change_one():
    found = {str(path.relative_to(HERE)) for path in kept.code_files()}
    computing = {"model.py", "latent.py", "adapter.py", "data.py", "backbones/vision.py", "files/clips.py"}
    assert computing | {"hub/weights.py", "engine/stream.py", "tasks/turtle.py", "tasks/beir.py"} <= found
    assert not found & {"train.py", "eval.py", "engine/lock.py", "tools/search.py"}


@pytest.mark.parametrize("mask, file, folder", [
    (0o022, 0o644, 0o755),
    (0o007, 0o660, 0o770),
    (0o077, 0o600, 0o700),
])
def test_what_is_written_may_be_read_by_whom_the_umask_lets(
        small, mmeb, counts, tmp_path, mask, file, folder):
    old = os.umask(mask)
    try:
        make_model().float().save_pretrained(tmp_path / "ck")
        outputs = ["--scores", tmp_path / "scores", "--json", tmp_path / "a.json"]
        call("eval.py", "--data", mmeb.root, "--task", "MSVD", "--ckpt", small, *outputs)
    finally:
        os.umask(old)
    written = [p for p in tmp_path.rglob("*") if not p.is_symlink()]
    assert len([p for p in written if p.suffix in (".safetensors", ".bin", ".json")]) > 5
    wrong = {}
    for path in written:
        mode = path.stat().st_mode & 0o777
        if mode != (folder if path.is_dir() else file):
            wrong[str(path)] = oct(mode)
    assert wrong == {}


def in_pairs(share):
    return [share[a : a + 2] for a in range(0, len(share), 2)]


def keys_of(pair):
    return frozenset(key for key, _ in pair)


def batches_of(share):
    return set(map(keys_of, in_pairs(share)))


def size_of(module):
    return sum(p.numel() for p in module.parameters())


def test_ranks_get_equal_cost_and_batches_do_not_depend_on_them(small, world):
    embedder = kept.Embedder(Plume.from_pretrained(small), "latent", 8, batch_size=2)
    red = str(world / "red bar.png")
    sides = [parse_item("red " * n) for n in range(1, 40)]
    sides += [parse_item(dict(image=red, text=str(n))) for n in range(10)]
    weights = [embedder.weigh(side) for side in sides]
    (alone,) = embedder.plan(sides, weights)
    embedder.planned, embedder.world = set(), 3
    shares = embedder.plan(sides, weights)
    assert batches_of(alone) == set().union(*map(batches_of, shares))
    assert sum(map(len, shares)) == len(alone) == len(sides)

    # equal cost, not equal rows; a batch is as long as its first
    model = embedder.model
    patch = size_of(model.backbone.model.visual) / size_of(model.lm.layers)
    weight_of = {weight.key: weight for weight in weights}
    loads = []
    for share in shares:
        load = 0
        for pair in in_pairs(share):
            found = [weight_of[key] for key, _ in pair]
            load += 2 * found[0].tokens + patch * sum(weight.patches for weight in found)
        loads.append(load)
    assert max(loads) < 1.1 * min(loads)
    assert len({len(share) for share in shares}) > 1


# --------------------------------------------------------------------------- what is there, and which version


def content_of(sides):
    """The parts of sides, with the bytes of media for their paths."""
    found = []
    for side in sides:
        parts = []
        for kind, value in side.parts:
            if kind in ("image", "video"):
                paths = [value] if isinstance(value, str) else value
                value = [Path(path).read_bytes() for path in paths]
            parts.append((kind, value))
        found.append(parts)
    return found


def test_both_spellings_of_the_published_folders_are_read(mmeb, counts, tmp_path):
    only = [
        "image_cls", "image_gd", "video_cls", "video_ret", "video_mret", "ActivityNetQA", "vidore_v2",
        "visrag", "visdoc_ood"]
    other = Miniature(tmp_path, only, other=True)
    for name in other.expected:
        a, b = read_published(str(mmeb.root), name), read_published(str(tmp_path), name)
        assert content_of(a.queries) == content_of(b.queries), name
        assert content_of(a.corpus) == content_of(b.corpus), name
        assert a.relevant == b.relevant, name
        assert a.candidates == b.candidates, name
        assert a.query_ids == b.query_ids, name
    assert (mmeb.root / "visdoc-tasks" / "extracted").exists()
    assert not (tmp_path / "visdoc-tasks" / "extracted").exists()


def test_versions_are_told_apart_and_another_count_is_an_error(mmeb, counts, tmp_path, monkeypatch):
    Miniature(tmp_path, ["ViDoSeek-page", "MomentSeeker"])
    fixed, original = "VLM2Vec/ViDoSeek-page-fixed", "VLM2Vec/ViDoSeek-page"
    assert read_published(str(tmp_path), "ViDoSeek-page").about["version"] == "fixed"

    # of ViDoSeek the repository tells: both versions have as many queries
    (tmp_path / "rows" / fixed).rename(tmp_path / "rows" / original)
    versions = {fixed: ("fixed", 4), original: ("original", 4)}
    monkeypatch.setitem(MMEB, "ViDoSeek-page", replace(MMEB["ViDoSeek-page"], versions=versions))
    assert read_published(str(tmp_path), "ViDoSeek-page").about["version"] == "original"
    printed = call("eval.py", "--data", tmp_path, "--check", "--task", "ViDoSeek-page").stdout
    assert f"\nhf download {fixed} --repo-type dataset" in printed

    # of MomentSeeker the number of queries tells: one repository has held both
    rows = (tmp_path / SEEKER).read_text().splitlines() * 4
    for count, version in ((13, "original"), (4, "fixed"), (5, "unknown")):
        (tmp_path / SEEKER).write_text("\n".join(rows[:count]) + "\n")
        problems = 0
        if version == "unknown":
            problems = 1
            with pytest.raises(DataError, match="5 queries, 4 are published: an unknown version"):
                read_published(str(tmp_path), "MomentSeeker")
        task = read_published(str(tmp_path), "MomentSeeker", skip_bad=True)
        assert task.about["version"] == version
        assert len(task.bad) == problems
        assert len(task.queries) == count


# ---------------------------------------------------------------------------------- what is missing or broken


def lose_a_picture(mini):
    (mini.root / "image-tasks/ImageNet-1K/Test/red circle.jpg").unlink()


def lose_a_clip(mini):
    shutil.rmtree(mini.root / "video-tasks/frames/video_ret/MSVD/v2")


def lose_the_classes(mini):
    (mini.root / "classes/K700.txt").unlink()


def lose_judgements(mini):
    judged = [{"query-id": 0, "corpus-id": f"doc/{k}", "score": 1} for k in range(3)]
    mini.write_rows(DOCVQA, "qrels", "test", judged)


def lose_rows(mini):
    shutil.rmtree(mini.root / "rows/vidore")


LOSSES = [  # what is lost, one behind the other; the task; what is said, the last of it by every command
    (lose_a_picture, "ImageNet-1K", ["test-00000-of-00002.parquet: row 2", "red circle.jpg"]),
    (lose_a_clip, "MSVD", ["test-00001-of-00002.parquet: row 1", "'v2' is not in"]),
    (lose_the_classes, "K700", ["classes/K700.txt", "video_classification_utils.py"]),
    (lose_judgements, "ViDoRe_docvqa", ["queries", "row 2", "no right candidate"]),
    (lose_rows, "ViDoRe_docvqa", [f"hf download {DOCVQA} --repo-type dataset --include"]),
]
SOME = ["ImageNet-1K", "MSCOCO_t2i", "MSVD", "ViDoRe_docvqa", "K700"]


def check_of(root, *tasks):
    return call("eval.py", "--data", root, "--check", "--task", ",".join(tasks), check=False)


def test_what_is_missing_is_named(small, counts, tmp_path):
    mini = Miniature(tmp_path / "mmeb", SOME)
    root = mini.root
    done = check_of(root, *SOME)
    assert "5 of 5 tasks" in done.stdout
    assert done.returncode == 0
    assert not (root / "visdoc-tasks").exists()  # nothing is taken out of the rows
    for lose, task, said in LOSSES:
        lose(mini)
        done = check_of(root, task)
        assert done.returncode == 1
        for word in ("0 of 1 tasks", task, *said):
            assert word in done.stdout
        failed = call("eval.py", "--data", root, "--task", task, "--ckpt", small, check=False)
        assert failed.returncode != 0
        assert "1 of 1 tasks have problems" in failed.stderr
        assert said[-1] in failed.stderr
        with pytest.raises(DataError, match=re.escape(said[-1])):
            read_published(str(root), task)


class Damaged:
    """A miniature of which some is lost and one picture is cut off, and eval.py over it."""

    def __init__(self, small, folder):
        mini = Miniature(folder / "mmeb", SOME)
        for lose, _, _ in LOSSES:
            lose(mini)
        self.root, self.scores = mini.root, folder / "scores"
        self.pictures = self.root / "image-tasks/MSCOCO_t2i/Test"
        cut_off = self.pictures / "red square.jpg"
        cut_off.write_bytes(cut_off.read_bytes()[:-60])
        self.flags = ["--data", self.root, "--ckpt", small, "--scores", self.scores]

    def call(self, tasks, *flags, check=True):
        return call("eval.py", *self.flags, "--task", tasks, *flags, check=check)

    @property
    def folder(self):
        (folder,) = self.scores.glob("*-latent8-*")
        return folder

    def score(self, name):
        return json.loads((self.folder / f"{name}_score.json").read_text())


@pytest.fixture
def damaged(small, counts, tmp_path):
    return Damaged(small, tmp_path)


def test_what_is_missing_or_broken_is_named_and_with_skip_bad_marks_the_score_as_partial(damaged, tmp_path):
    # a picture of which only the beginning is there is found when it is decoded
    failed = damaged.call("MSCOCO_t2i", check=False)
    assert "red square.jpg" in failed.stderr
    assert "image_ret/MSCOCO_t2i" not in failed.stdout

    printed = damaged.call("MSCOCO_t2i,ImageNet-1K,MSVD", "--skip_bad").stdout
    assert "partial: " in printed
    assert "*" in printed
    for name, problems in (
        ("image_ret/MSCOCO_t2i", 2),  # its right candidate is broken: so is the query
        ("image_cls/ImageNet-1K", 1),  # the picture of a query is missing
        ("video_ret/MSVD", 2),  # a clip is missing: so is the query that it is right for
    ):
        score = damaged.score(name)
        assert score["partial"]
        assert score["queries"] == 3
        assert len(score["bad"]) == problems
    assert "red square.jpg" in damaged.score("image_ret/MSCOCO_t2i")["bad"][0]
    assert damaged.score("video_ret/MSVD")["candidates"] == 3

    # a task of which nothing is there does not take the others with it
    # and what was scored before stays in the table
    path = tmp_path / "rest.json"
    printed = damaged.call("K700,ViDoRe_docvqa,MSVD", "--skip_bad", "--json", path).stdout
    rest = json.loads(path.read_text())
    assert list(rest["tasks"]) == ["video_ret/MSVD"]
    assert list(rest["left_out"]) == ["video_cls/K700", "vidore_v1/ViDoRe_docvqa"]
    assert "left out: " in printed
    assert "1 tasks of this command and 2 that were scored before" in printed
    board = json.loads((damaged.folder / "leaderboard.json").read_text())
    assert list(board["metrics"]["image"]) == ["ImageNet-1K", "MSCOCO_t2i"]
    assert len(board["metadata"]["incomplete"]) == 78

    failed = damaged.call("K700", "--skip_bad", check=False)
    assert "no task is left" in failed.stderr
    assert "classes/K700.txt" in failed.stderr


def test_a_query_that_is_left_with_its_right_candidate_alone_counts_as_bad(damaged):
    damaged.call("MSCOCO_t2i", "--skip_bad")  # keeps embeddings of what these were
    shutil.copy(damaged.pictures / "red circle.jpg", damaged.pictures / "red square.jpg")  # whole again
    # of the first query all candidates but the right one, of the third the right one
    broken = ["green square.jpg", "blue square.jpg", "black square.jpg", "red bar.jpg"]
    for name in broken:
        (damaged.pictures / name).write_bytes(b"")
    damaged.call("MSCOCO_t2i", "--skip_bad")
    bad = damaged.score("image_ret/MSCOCO_t2i")["bad"]
    assert any("only the right candidate is left" in why for why in bad)
    assert any("no right candidate is left" in why for why in bad)
    for name in broken:
        assert name in str(bad)


def test_rows_that_cannot_be_read_do_not_take_other_tasks_with_them(damaged):
    broken = damaged.root / "rows" / IMAGE_ROWS / "MSCOCO_t2i/test-00000-of-00002.parquet"
    broken.write_bytes(b"PAR1 no PAR1")
    printed = check_of(damaged.root, "MSCOCO_t2i", "MSVD").stdout
    assert "test-00000-of-00002.parquet: not a readable .parquet" in printed
    assert "video_ret/MSVD" in printed


def every(**columns):
    """All rows, with other values for some of their columns."""
    def change(rows):
        return [row | columns for row in rows]

    return change


def adding(row):
    def change(rows):
        return [*rows, row]

    return change


def without_scores(rows):
    for row in rows:
        del row["score"]
    return rows


def scores_as_texts(rows):
    return [row | dict(score=str(row["score"])) for row in rows]


def misspelled_query(rows):
    return [dict(querry="x", **{"query-id": row["query-id"]}) for row in rows]


def text_for_texts(rows):
    return [row | dict(tgt_text=row["tgt_text"][0]) for row in rows]


UNJUDGED = {"query-id": 1, "corpus-id": "doc/77", "score": 1}
THREE_FOR_FOUR = first(tgt_img_path=["MSCOCO/Test/red bar.jpg"] * 3, tgt_text=["x"] * 4)


@pytest.mark.parametrize("name, hub, config, change, why, row", [
    ("ViDoRe_docvqa", DOCVQA, "corpus", every(**{"corpus-id": "doc/0"}),
     "'doc/0' stands there twice", "row 2"),
    ("ViDoRe_docvqa", DOCVQA, "corpus", every(image="x.png"), "doc_0.png' is not in", "row 1"),
    ("ViDoRe_docvqa", DOCVQA, "corpus", first(**{"corpus-id": "doc_1"}),
     "'doc_1' and 'doc/1' have one file name", "row "),
    ("ViDoRe_docvqa", DOCVQA, "queries", every(**{"query-id": 0}), "'0' stands there twice", "row 2"),
    ("ViDoRe_docvqa", DOCVQA, "queries", misspelled_query,
     "no column 'query'. Did you mean 'querry'?", "row 1"),
    ("ViDoRe_docvqa", DOCVQA, "queries", first(query=None), "needs a text, got None", "row 1"),
    ("ViDoRe_docvqa", DOCVQA, "qrels", without_scores, "no column 'score'", "row 1"),
    ("ViDoRe_docvqa", DOCVQA, "qrels", scores_as_texts, "'score' must be a number", "row 1"),
    ("ViDoRe_docvqa", DOCVQA, "qrels", adding(UNJUDGED), "'doc/77' is none of the candidates", "row 2"),
    ("ImageNet-1K", IMAGE_ROWS, "ImageNet-1K", first(qry_img_path=""), "'' is not in", "row 1"),
    ("ImageNet-1K", IMAGE_ROWS, "ImageNet-1K", text_for_texts, "'tgt_text' must be a list of texts", "row 1"),
    ("ImageNet-1K", IMAGE_ROWS, "ImageNet-1K", first(tgt_text=["red bar"]),
     "a query with one candidate", "row 1"),
    ("MSCOCO", IMAGE_ROWS, "MSCOCO", THREE_FOR_FOUR, "ValueError", "row 1"),
    ("SmthSmthV2", SSV2, "", first(pos_text="blue bar"), "'blue bar' is none of the candidates", "row 1"),
    ("Video-MME", VIDEO_MME, "", first(answer="E"), "ValueError", "row 1"),
])
def test_a_row_that_cannot_be_right_is_named(counts, tmp_path, name, hub, config, change, why, row):
    mini = Miniature(tmp_path, [name])
    edit(mini, hub, config, change)
    with pytest.raises(DataError) as error:
        read_published(str(tmp_path), name)
    said = str(error.value)
    for word in (why, row, str(tmp_path)):
        assert word in said
    assert said.count(": row ") == 1


# ------------------------------------------------------------------------------------- what is odd, and right


def parts_of(sides):
    return [side.parts for side in sides]


def test_oddities_of_rows_that_are_right(counts, tmp_path):
    mini = Miniature(tmp_path / ".hidden", ["ImageNet-1K", "MomentSeeker", "Video-MME"])
    root = str(mini.root)
    edit(mini, IMAGE_ROWS, "ImageNet-1K", first(qry_text=None))
    task = read_published(root, "ImageNet-1K")
    for query in task.queries[:2]:
        assert query.parts[-1] == ("text", f"{INST} for ImageNet-1K.")

    # the newer layout of MomentSeeker names the folders of frames
    before = read_published(root, "MomentSeeker")
    entries = []
    for k in range(4):
        entries.append(dict(output_path="gone.mp4", frame_path=f"video_frames/clips_0_{k}"))
    rows = [json.loads(line) for line in (mini.root / SEEKER).read_text().splitlines()]
    rows[0] |= dict(positive_frames=entries[:2], negative_frames=entries[2:])
    mini.write_rows("VLM2Vec/MomentSeeker", "", "test", rows, "json")
    assert parts_of(read_published(root, "MomentSeeker").corpus) == parts_of(before.corpus)

    # no blank behind the dot; equal texts.  As VLM2Vec cuts them:
    edit(mini, VIDEO_MME, "", first(options=["A.cats", "B.dogs", "C. a pet.", "D. a pet"]))
    task = read_published(root, "Video-MME")
    found = [task.corpus[row].parts for row in task.candidates[0]]
    assert found == [[("text", text)] for text in ("s", "s", "a pet", "a pet")]


def test_oddities_of_folders_that_are_right(counts, tmp_path):
    mini = Miniature(tmp_path / ".hidden", ["MomentSeeker", "ViDoSeek-page"])
    root = mini.root

    # a Mac's hidden files are no frames; an empty folder does not hide the full one
    frames = root / "video-tasks/frames/video_mret/MomentSeeker/video_frames/clips_0_0"
    (frames / "._frame_1.jpg").write_bytes(b"what a Mac puts into archives")
    moved = root / "video-tasks/video_mret/MomentSeeker/frames/video_frames/clips_0_0"
    moved.parent.mkdir(parents=True)
    frames.rename(moved)
    frames.mkdir()
    (_, clip), _ = read_published(str(root), "MomentSeeker").corpus[0].parts
    assert len(clip) == 8

    # pages of an archive of who knows which version are not those of the rows
    archive = root / "visdoc-tasks/images/ViDoSeek-page"
    archive.mkdir(parents=True)
    picture("red", "bar").save(archive / "doc_1.png")
    (_, page), _ = read_published(str(root), "ViDoSeek-page").corpus[1].parts
    assert "extracted" in page

    # the commit, as `hf download` leaves it
    copy = root / "rows/VLM2Vec/ViDoSeek-page-fixed"
    left = copy / ".cache/huggingface/download"
    left.mkdir(parents=True)
    (left / "x.metadata").write_text("0123abcd\netag\n1.0\n")
    task = read_published(str(root), "ViDoSeek-page")
    assert task.about["revision"] == "0123abcd"
    (_, page), _ = task.corpus[1].parts
    assert "ViDoSeek-page-fixed/0123abcd/" in page

    # judgements as .tsv
    judged = list(rows_of(str(copy), "qrels", "test"))
    lines = ["query-id\tcorpus-id\tscore"]
    for row in judged:
        lines.append("\t".join(map(str, row.values())))
    shutil.rmtree(copy / "qrels")
    (copy / "qrels").mkdir()
    (copy / "qrels" / "eval-qrels.tsv").write_text("\n".join(lines) + "\n")
    assert read_published(str(root), "ViDoSeek-page").relevant == task.relevant


# Each case of the next three is what VLM2Vec's own reader makes of the row, less the visual token and what
# stands at both ends


def test_image_rows_are_read_as_vlm2vec_reads_them(counts, tmp_path):
    mini, root = Miniature(tmp_path, ["DocVQA", "CIRR", "RefCOCO", "VisDial", "WebQA"]), str(tmp_path)

    # blanks in front of a line break go beside a picture only
    # and the instruction is stripped before it is joined
    change = first(qry_inst="<|image_1|>\n Look \n", qry_text="what \nis it \n here?")
    for name in ("DocVQA", "CIRR"):
        edit(mini, IMAGE_ROWS, name, change)
        assert words(read_published(root, name).queries[0]) == "Look what\nis it\n here?"
    change = first(qry_inst=" Find it: ", qry_text="Q \nA \nQ", tgt_inst="<|image_1|>\nRepresent \nit.")
    edit(mini, IMAGE_ROWS, "VisDial", change)
    task = read_published(root, "VisDial")
    assert words(task.queries[0]) == "Find it: Q \nA \nQ"
    assert words(task.corpus[0]) == "Represent\nit."
    change = first(tgt_inst="<|image_1|>\nWith: ", tgt_text=["a \nb", "", "c", "d"])
    edit(mini, IMAGE_ROWS, "WebQA", change)
    found = [words(side) for side in read_published(root, "WebQA").corpus[:4]]
    assert found == ["With:  a\nb", "With:", "With:  c", "With:  d"]

    # pairs are named by path and caption, whether or not the first caption is blank
    paths, captions = ["RefCOCO/Test/red square.jpg"] * 4, ["", "left", '"left"', " "]
    change = first(tgt_img_path=paths, tgt_text=captions, tgt_inst="<|image_1|>\nIt.")
    edit(mini, IMAGE_ROWS, "RefCOCO", change)
    task = read_published(root, "RefCOCO")
    assert len(set(task.candidates[0])) == 3
    assert set(words_of_candidates(task)) == {"It."}

    # the released collator strips what it is given
    edit(mini, IMAGE_ROWS, "DocVQA", first(tgt_text=[" a ", "b", "c", "d"]))
    assert words_of_candidates(read_published(root, "DocVQA")) == [" a ", "b", "c", "d"]
    assert words_of_candidates(read_published(root, "DocVQA", released=True)) == ["a", "b", "c", "d"]


def test_video_rows_are_read_as_vlm2vec_reads_them(counts, tmp_path):
    mini, root = Miniature(tmp_path, ["MSVD", "MVBench", "Video-MME", "EgoSchema"]), str(tmp_path)

    # a blank in front of a line break stays
    edit(mini, "VLM2Vec/MSVD", "", first(caption=["a man \nruns", "no"]))
    assert words(read_published(root, "MSVD").queries[0]) == f"{CLIP_QUERIES['MSVD']} a man \nruns"
    change = first(question=" When? \nNow", options=["A. x y. ", "B", "C: no", "D. z. w."])
    edit(mini, VIDEO_MME, "", change)
    task = read_published(root, "Video-MME")
    assert words(task.queries[0]) == f"{CHOOSE}  When? \nNow\nA. x y. \nB\nC: no\nD. z. w."

    # of an option without ". " only the last character is left
    assert words_of_candidates(task) == ["x y", "B", "o", "z. w"]
    change = first(option=["A.one", "B. two", "C) three.", "", "E. . five .."])
    edit(mini, "VLM2Vec/EgoSchema", "Subset", change)
    assert words_of_candidates(read_published(root, "EgoSchema")) == ["e", "two", "", "", "five"]

    # of equal options the last is right
    path = tmp_path / "rows/VLM2Vec/MVBench/json/action_sequence.json"
    (row,) = json.loads(path.read_text())
    path.write_text(json.dumps([row | dict(candidates=["cat", "dog", "cat", "cow"], answer="cat")]))
    task = read_published(root, "MVBench")
    (i,) = [i for i, side in enumerate(task.queries) if "(C) cat" in words(side)]
    assert [words(task.corpus[right]) for right in task.relevant[i]] == ["(C) cat"]
    path.write_text(json.dumps([row | dict(candidates=["cat", "dog"], answer="cow")]))
    with pytest.raises(DataError, match="the answer 'cow' is none of the candidates"):
        read_published(root, "MVBench")


def test_ids_in_a_tsv_are_texts_and_what_is_a_number_and_nothing_else_stays_one(tmp_path):
    (tmp_path / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", "007\t0010\t1", "7\t-3\t0", "1e3\t+5\t2"]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    rows = rows_of(str(tmp_path), "qrels", "test")
    cells = [(row["query-id"], row["corpus-id"], row["score"]) for row in rows]
    assert cells == [("007", "0010", 1), (7, -3, 0), ("1e3", "+5", 2)]


def three_hundred_times(rows):
    return rows * 300


def test_only_the_first_1000_rows_of_ssv2_count_and_parquet_without_pyarrow_says_what_to_install(
        counts, tmp_path, monkeypatch):
    mini = Miniature(tmp_path, ["SmthSmthV2"])
    monkeypatch.setitem(MMEB, "SmthSmthV2", replace(MMEB["SmthSmthV2"], queries=1000))
    edit(mini, SSV2, "", three_hundred_times)
    assert len(read_published(str(tmp_path), "SmthSmthV2").queries) == 1000
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.delattr(sys.modules["pyarrow"], "parquet", raising=False)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_published(str(tmp_path), "SmthSmthV2")


def card(*configs):
    """A README.md of a hub repository."""
    return "\n".join(["---", "configs:", *configs, "---", ""])


VERSIONS = card(
    "- config_name: test_1k",
    "  data_files:",
    "  - split: test",
    "    path: x/1k*.json",
    "- config_name: test_3k",
    "  data_files: x/3k.json")
FOLDER = card("- config_name: default", "  data_files: ./rows")
PATH_ALONE = card("- config_name: default", "  data_files:", "    path: a.json")

FOUND = [  # files, subset, split, README.md, the one that is found
    (["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], "", "test", "",
     "data/test-00000-of-00001.parquet"),
    (["MC/test-00000-of-00001.parquet", "OE/test-00000-of-00001.parquet"], "MC", "test", "",
     "MC/test-00000-of-00001.parquet"),
    (["queries/test.jsonl", "corpus/test.jsonl", ".cache/x/test.jsonl"], "queries", "test", "",
     "queries/test.jsonl"),
    (["json/action_count.json", "json/moving_count.json"], "action_count", "train", "",
     "json/action_count.json"),
    (["latest.parquet"], "", "test", "", "latest.parquet"),
    (["data/validation-0.parquet"], "", "val", "", "data/validation-0.parquet"),
    (["x/1k_a.json", "x/3k.json"], "test_1k", "test", VERSIONS, "x/1k_a.json"),
    (["x/1k_a.json", "x/3k.json"], "test_3k", "test", VERSIONS, "x/3k.json"),
    (["RefCOCO.parquet", "RefCOCO-Matching.parquet"], "RefCOCO", "test", "", "RefCOCO.parquet"),
    (["test-00000-of-00001-0a1b.parquet", "x.json"], "", "test", "", "test-00000-of-00001-0a1b.parquet"),
    (["rows/a.json"], "", "test", FOLDER, "rows/a.json"),
    (["a.json"], "", "test", PATH_ALONE, "a.json"),
]


def test_files_of_a_subset_and_split_are_found_as_the_hub_names_them(tmp_path):
    folder = tmp_path / "d"

    def found(files, subset, split, readme=""):
        shutil.rmtree(folder, ignore_errors=True)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("{}")
        (folder / "README.md").write_text(readme)
        return row_files(str(folder), subset, split)

    assert found(["train.jsonl"], "", "test") == []
    for files, subset, split, readme, right in FOUND:
        assert found(files, subset, split, readme) == [right]
    nothing = "no .parquet, .jsonl, .json or .tsv file of subset 'q', split 'test'"
    with pytest.raises(DataError, match=nothing):
        list(rows_of(str(folder), "q", "test"))
    with pytest.raises(DataError, match="test-...-of-00003.parquet: 2 of 3 files are there"):
        found(["test-00000-of-00003.parquet", "test-00002-of-00003.parquet"], "", "test")
    for broken in ("---\nconfigs: [\n---\n", "---\nconfigs: 7\n---\n"):
        with pytest.raises(DataError, match="README.md: its 'configs' cannot be read"):
            found(["a.json"], "", "test", broken)


# ----------------------------------------------------------------------------------- protocol, names, metrics


def test_the_released_protocol_is_the_released_evaluation_s_input(mmeb, counts, small, tmp_path):
    def read(name, released):
        return read_published(str(mmeb.root), name, released)

    released = read("ViDoRe_docvqa", True)
    assert parts_of(released.queries) == [[("text", f"a {name}")] for name in NAMES[:4]]
    assert released.corpus[0].parts[-1] == ("text", "")
    assert read("ViDoRe_docvqa", False).corpus[0].parts[-1] == ("text", PAGE_TARGET)
    assert read("VisRAG_PlotQA", True).corpus[0].parts[-1] == ("text", PAGE_TARGET)  # VisRAG's keep it
    for protocol, count in ((False, 8), (True, 9)):
        (_, clip), _ = read("MomentSeeker", protocol).corpus[0].parts
        assert len(clip) == count

    outputs = ["--scores", tmp_path, "--json", tmp_path / "r.json"]
    task = ["--task", "MSVD", "--protocol", "released"]
    call("eval.py", "--data", mmeb.root, "--ckpt", small, *task, *outputs)
    Plume.random(["a"], "tiny3").save_pretrained(tmp_path / "3")
    failed = call("eval.py", "--data", mmeb.root, "--ckpt", tmp_path / "3", *task, check=False)
    assert "--protocol released is how a Qwen2-VL was scored" in failed.stderr
    r = scores_in(tmp_path / "r.json")["video_ret/MSVD"]
    assert r["protocol"] == "released"
    assert len(list(tmp_path.glob("*-latent8-released-*/video_ret/MSVD_score.json"))) == 1
    model = Plume.from_pretrained(
        small, latent_positions="cache", white_image=True, prompt=RELEASED_PROMPT,
        limits=dict(min_pixels=784, max_pixels=2359296, max_len=11288, num_frames=64))
    assert abs(r["hit@1"] - score_by_hand(model, *mmeb.expected["MSVD"], "hit@1")) < 1e-9


def test_task_names_of_every_kind():
    names = [t.full_name for t in MMEB.values()]

    def pick(wanted):
        return [name.split("/")[1] for name in evaluation.select(names, wanted, "x")]

    for wanted, count in (("image", 36), ("visdoc", 24), ("video,visdoc", 42), ("all", 78)):
        assert len(pick(wanted)) == count
    assert pick("video_mret") == ["QVHighlight", "Charades-STA", "MomentSeeker"]
    assert pick("MSVD") == ["MSVD"]
    assert pick("video_ret/MSVD") == ["MSVD"]
    with pytest.raises(DataError, match="Did you mean 'MSR-VTT'"):
        pick("MSRVTT")


def test_graded_ndcg_by_hand():
    """Documents of gain 2 and 1 at ranks 3 and 1, as a share of the best order's: 2 + 1 / log2(3)."""
    best = 2 + 1 / math.log2(3)
    assert abs(evaluation.ndcg([(2, 3), (1, 1)], 5) - (1 + 2 / 2) / best) < 1e-12
    query = torch.tensor([[1.0, 0, 0]])
    corpus = torch.tensor([[0.6, 0.8, 0], [0.6, 0, 0.8], [0.6, -0.8, 0], [0, 1, 0.0]])  # the first three tie
    task = Task("t", ["q"], list("abcd"), [{0: 2, 2: 1}], [None], ["q"], list("abcd"), "ndcg@5")
    # of a tie the wrong one goes first, then the lesser of the right ones
    tie = evaluation.evaluate(task, (query, corpus))
    assert abs(tie["ndcg@5"] - (1 / math.log2(3) + 2 / 2) / best) < 1e-12
    assert tie["hit@1"] == 0


def test_the_interval_is_that_of_the_task_s_own_metric_over_its_queries():
    """40 hits of 100: by the normal approximation 0.4 +- 1.96 sqrt(0.4 * 0.6 / 100)."""
    relevant = [{0: 1}] * 40 + [{1: 1}] * 60
    ids = [str(i) for i in range(100)]
    task = Task("t", ["q"] * 100, ["a", "b"], relevant, [None] * 100, ids, ["a", "b"])
    vectors = torch.eye(2)[:1].expand(100, 2), torch.eye(2)
    result = evaluation.evaluate(task, vectors)
    assert result["hit@1"] == 0.4
    low, high = result["interval"]
    assert abs(low - 0.304) < 0.015
    assert abs(high - 0.496) < 0.015
    graded = evaluation.evaluate(replace(task, metric="ndcg@5"), vectors)
    assert abs(np.mean(graded["interval"]) - graded["ndcg@5"]) < 0.01
    assert graded["interval"][0] > high
