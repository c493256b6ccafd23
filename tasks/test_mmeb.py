"""MMEB-V2: the table of its tasks, its readers, and eval.py over a miniature of the published files."""

import functools
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from engine import kept
from files.errors import DataError
from files.items import parse_item
from hub.settings import RELEASED_PROMPT
from model import Plume
from tasks.beir import Task
from tasks.find import select
from tasks.miniature import CHOOSE, CLIP_QUERIES, INST, Miniature, PAGE_TARGET
from tasks.mmeb import META, MMEB, modality, read_published
from tasks.mmeb_corpus import classes_of
from tasks.mmeb_report import paper_rows
from tasks.mmeb_rows import row_files, rows_of
from test_plume import HERE, make_model, mixed_items
from tests.processes import call, run, run_ranks
from tests.samples import edit_json, NAMES, picture
from tests.test_checkpoints import LFS

DOCVQA = "vidore/docvqa_test_subsampled_beir"
FIRST, EVERY, GONE = slice(1), slice(None), object()  # rows to edit; what takes a column away


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


def edit(mini, table, which, columns):
    """Gives some rows of a table, "<task>" or "<document task>/<part>", other values for some columns."""
    name, _, part = table.partition("/")
    hub, config = MMEB[name].hub, part or MMEB[name].subset
    rows = [dict(row) for row in rows_of(str(mini.root / "rows" / hub), config, "test")]
    for row in rows[which]:
        row |= columns
    mini.write_rows(hub, config, "test", [{k: v for k, v in row.items() if v is not GONE} for row in rows])


def words(sides):
    return [side.parts[-1][1] for side in sides]


def read_json(path):
    return json.loads(path.read_text())


def test_the_78_tasks_and_their_weight_are_the_benchmarks():
    metas = [t.meta for t in MMEB.values()]
    assert [metas.count(m) for m in META] == [10, 10, 12, 4, 5, 5, 5, 3, 10, 4, 6, 4]
    assert list(dict.fromkeys(metas)) == list(META)
    assert sum(t.queries for t in MMEB.values() if t.meta.startswith("image")) == 36_000
    mended = {t.name for t in MMEB.values() if t.versions}
    assert mended == {"MomentSeeker", "ViDoSeek-page", "MMLongBench-page"}
    assert MMEB["VATEX"].queries == 4478
    assert MMEB["ViDoRe_tatdqa"].hub == "vidore/tatdqa_test_beir" and MMEB["ViDoRe_docvqa"].hub == DOCVQA

    means = dict(image=0.663, video=0.441, visdoc=0.675)
    results = {}
    for t in MMEB.values():
        results[t.full_name] = {"metric": "x", "x": means[modality(t.meta)], "partial": False}
    (header, ours, paper, *_), missing = paper_rows(results, "ours")
    assert not missing and ours[5] == paper[5] == "66.3"
    assert " ".join(header) == "model CLS QA RET GD image CLS QA RET MRET video VDRv1 VDRv2 VR OOD visdoc all"
    assert abs(float(ours[-1]) - float(paper[-1])) < 0.11  # the plain mean over 78; of the three means: 59.3

    results.popitem()  # a document task
    (_, ours, *_), missing = paper_rows(results, "ours")
    assert missing and ours[-1].endswith("*") and ours[-2].endswith("*") and not ours[5].endswith("*")


def score_by_hand(model, queries, candidates, gains, metric):
    """The mean metric, from `encode` and a sort."""
    vectors = iter(model.encode([*queries, *itertools.chain(*candidates)]).astype(float))
    asked, discounts, scores = [next(vectors) for _ in queries], 1 / np.log2(np.arange(2, 7)), []
    for query, found, right in zip(asked, candidates, gains, strict=True):
        rows = [next(vectors) for _ in found]
        cosines = [round(float(row @ query), 6) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (-cosines[i], i in right))  # ties against the model
        got, best = [right.get(i, 0) for i in order[:5]], sorted(right.values(), reverse=True)[:5]
        ndcg = got @ discounts[: len(got)] / (best @ discounts[: len(best)])
        scores.append(float(order[0] in right) if metric == "hit@1" else ndcg)
    return np.mean(scores)


def assert_score_folder_is_right(folder, results):
    """What stands in --scores beside the embeddings."""
    one = read_json(folder / "video_ret" / "MSVD_score.json")
    assert one == results["video_ret/MSVD"]
    assert one["queries_per_s"] > 0 and one["steps"] == 8 and one["mode"] == "latent"
    assert one["checkpoint_hash"] and one["prompt_hash"]

    board = read_json(folder / "leaderboard.json")
    metrics = board["metrics"]
    assert {part: len(found) for part, found in metrics.items()} == dict(image=36, video=18, visdoc=24)
    assert board["metadata"]["incomplete"] == [] and "MomentSeeker" in metrics["video"]
    assert {"ViDoSeek-page-fixed", "MMLongBench-page-fixed", "ViDoSeek-doc"} <= metrics["visdoc"].keys()
    ndcg = results["visrag/VisRAG_PlotQA"]["ndcg@5"]
    assert metrics["visdoc"]["VisRAG_PlotQA"]["ndcg_linear@5"] == ndcg

    rows = [line.split("|") for line in (folder / "table.md").read_text().splitlines()]
    assert rows[3][1].strip() == "PLUME, paper" and rows[3][-2].strip() == "61.6"
    mean = 100 * np.mean([r[r["metric"]] for r in results.values()])
    assert abs(float(rows[2][-2]) - mean) < 0.051


def test_all_78_tasks_from_their_files_score_what_an_independent_computation_does(
        mmeb, small, counts, tmp_path):
    printed = call("tasks.check", "--data", mmeb.root).stdout
    assert "78 of 78 tasks are there without a problem" in printed
    for line in ("video_ret/MSVD +4 / 4 +4 +4 / 4\n", "image_gd/RefCOCO +4 / 4 ", "ViDoSeek-page .* fixed\n"):
        assert re.search(line, printed), line

    model = Plume.from_pretrained(small)
    flags = ["--data", mmeb.root, "--ckpt", small, "--scores", tmp_path / "scores"]
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    printed = call("eval.py", *flags, "--json", a).stdout
    results = read_json(a)["tasks"]
    assert len(results) == len(mmeb.expected) == 78
    for name, expected in mmeb.expected.items():
        r, metric = results[MMEB[name].full_name], "ndcg@5" if MMEB[name].is_document else "hit@1"
        assert (r["metric"], r["queries"], r["partial"]) == (metric, len(expected[0]), False), name
        assert abs(r[metric] - score_by_hand(model, *expected, metric)) < 1e-9, name
        assert r["interval"][0] <= r[metric] <= r["interval"][1]
        assert r["version"] == ("fixed" if MMEB[name].versions else "")
    summary = r"(\d+) items, (\d+) encoded, 0 known from before, (\d+) shared"
    asked, encoded, shared = map(int, re.search(summary, printed).groups())
    assert encoded + shared == asked and shared > 100  # labels and pages that several tasks have
    (folder,) = (tmp_path / "scores").glob("small?-small-latent8-??????")
    assert_score_folder_is_right(folder, results)

    # once more: everything is known, and the times are still those of the run that did the work
    printed = call("eval.py", *flags, "--json", a).stdout
    assert f"{asked} items, 0 encoded, {encoded} known from before, {shared} shared" in printed
    assert read_json(a)["tasks"] == results

    # some of the tasks in another mode
    call("eval.py", *flags, "--json", b, "--mode", "single", "--task", "image_gd,MSVD,visdoc")
    others = read_json(b)["tasks"]
    assert len(others) == 4 + 1 + 24 and (folder / "table.md").exists()
    assert all(r["run_hash"] != results[name]["run_hash"] for name, r in others.items())

    # compared: the biggest difference first; b has some of a's tasks
    printed = call("tasks.compare", a, b).stdout
    sizes = [abs(float(line.split()[-1])) for line in printed.splitlines()[1 : 1 + len(others)]]
    assert sizes == sorted(sizes, reverse=True) and "visdoc/ViDoSeek-doc" in printed
    assert "only in a" in printed and "only in b" not in printed
    board = folder / "leaderboard.json"  # holds the same scores in another format
    for other in (board, a):
        printed = call("tasks.compare", board, other).stdout
        assert len(printed.splitlines()) == 80 and "image/ImageNet-1K" in printed and "+0.0" in printed
        assert "only in" not in printed and not re.search(r"[1-9]\n", printed)


def write_scores(path, **hits):
    """A file as --json writes it, of tasks with nothing but hit@1."""
    scores = {f"{name}/turtle": {"metric": "hit@1", "hit@1": value} for name, value in hits.items()}
    path.write_text(json.dumps(dict(tasks=scores)))


def test_several_meta_tasks_may_have_a_data_set_of_one_name_when_score_files_are_compared(tmp_path):
    write_scores(tmp_path / "x.json", image_cls=0.5, image_qa=0.1)
    write_scores(tmp_path / "y.json", image_cls=0.5, image_qa=0.9)  # the biggest difference goes first
    lines = run("tasks.compare", tmp_path / "x.json", tmp_path / "y.json").stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["+80.0", "+0.0", "+40.0"]


@pytest.mark.parametrize("line, why", [
    ("tasks.compare", "two JSON files of scores and no flag, got nothing"),
    ("tasks.compare a.json", "two JSON files"),
    ("tasks.compare a.json a.json a.json", "two JSON files"),
    ("tasks.compare --png x.png", "python -m tools.compare"),
    ("tasks.compare a.json gone.json", "No such file"),
    ("tasks.compare table.md table.md", "table.md: neither a file that"),
    ("tasks.compare a.json b.json", "a.json and b.json: no task is in both"),
    ("tasks.check", "--data '': needs a copy of MMEB-V2"),
    ("tasks.check --data copy --protocol odd", "--protocol 'odd': needs clean or released"),
])
def test_what_cannot_be_checked_or_compared_is_named_and_no_score_file_is_touched(
        tmp_path, monkeypatch, line, why):
    command, *argv = line.split()
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path / "a.json", video_ret=0.5)
    write_scores(tmp_path / "b.json", image_ret=0.5)
    (tmp_path / "table.md").write_text("| model | CLS |\n| --- | --- |\n")
    (tmp_path / "copy" / "rows").mkdir(parents=True)
    before = (tmp_path / "a.json").read_bytes()
    failed = call(command, *argv, check=False)
    assert failed.returncode == 1 and why in failed.stderr
    assert (tmp_path / "a.json").read_bytes() == before
    assert f"    python -m {command} " in call(command, "--help", check=False).stdout


def stored(folder):
    """All embeddings that a run kept, by their key: 16 bytes, and 128 numbers of 4."""
    found = {}
    for path in sorted(Path(folder).glob("embeddings/*/*.bin")):
        raw = path.read_bytes()
        found |= {raw[a : a + 16]: raw[a + 16 : a + 528] for a in range(0, len(raw) - 527, 528)}
    return found


def timeless(path):
    """The scores without what the clock, or how much was known before, says."""
    clock = ("seconds", "queries_per_s", "items_encoded")
    return {(t, k): v for t, r in read_json(path)["tasks"].items() for k, v in r.items() if k not in clock}


def test_a_stopped_run_goes_on_and_two_ranks_equal_one_bit_for_bit(mmeb, small, tmp_path, monkeypatch):
    flags = [
        "--data", mmeb.root, "--ckpt", small, "--task", "MomentSeeker,QVHighlight,image_gd,vidore_v2",
        "--skip_bad", "--batch_size", "3"]
    one, two, stopped, whole = folders = [tmp_path / name for name in ("one", "two", "stopped", "whole")]
    outputs = {folder: ["--scores", folder, "--json", f"{folder}.json"] for folder in folders}
    run("eval.py", *flags, *outputs[one])
    run_ranks(2, "eval.py", *flags, *outputs[two])
    scores = timeless(tmp_path / "one.json")
    assert scores == timeless(tmp_path / "two.json")
    assert stored(one) == stored(two) and len(stored(one)) > 60
    assert {path.name[0] for path in two.glob("embeddings/*/*.bin")} == {"0", "1"}  # both have kept some

    encoding, windows = kept.encoding, iter(range(5))

    def interrupted(*args, **kw):
        for window in encoding(*args, **kw):
            yield window
            if next(windows, None) is None:  # behind the sixth of all
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kept, "encoding", interrupted)
        failed = call("eval.py", *flags, "--scores", stopped, check=False)
    assert "interrupted after" in failed.stderr and "the same command goes on" in failed.stderr
    (path,) = stopped.glob("embeddings/*/*.bin")
    path.write_bytes(path.read_bytes() + b"half a record")
    before = len(stored(stopped))
    assert before > 10
    assert f"{before} known from before" in call("eval.py", *flags, *outputs[stopped]).stdout
    here = timeless(tmp_path / "stopped.json")
    assert here.keys() == scores.keys()
    assert all(here[task, key] == value for (task, key), value in scores.items() if key == "ranks")
    call("eval.py", *flags, *outputs[whole])  # in this process, too, but in one go
    assert here == timeless(tmp_path / "whole.json") and stored(stopped) == stored(whole)


def run_hash(model, mode="latent", steps=8, **flags):
    return kept.Embedder(model, mode, steps, **flags).run_hash


def test_embeddings_of_another_checkpoint_mode_or_setting_are_never_used(small, tmp_path, monkeypatch):
    model, again = Plume.from_pretrained(small), Plume.from_pretrained(small)
    runs = [run_hash(model), run_hash(model, steps=4), run_hash(model, "single", None)]
    runs.append(run_hash(model, protocol="released"))
    runs += [run_hash(model, "cot", None), run_hash(model, "cot", None, limit=5)]
    runs += [run_hash(model, "auto", None), run_hash(model, "auto", None, done=0.4)]
    for library in (torch, np, kept.transformers, kept.tokenizers, kept.PIL, kept.av):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0")
            runs.append(run_hash(model))
    with torch.no_grad():
        model.adapter.state_dict()["ln.bias"][3] += 1e-6
    runs.append(run_hash(model))
    runs.append(run_hash(Plume.from_pretrained(small, limits=dict(max_pixels=784))))
    runs.append(run_hash(Plume.from_pretrained(small, dtype="bfloat16")))
    text = read_json(small / "config.json")["text_config"]
    other_theta = dict(rope_parameters=dict(text["rope_parameters"], rope_theta=1e6))
    for name, change in (("theta", other_theta), ("eps", dict(rms_norm_eps=0.01))):  # what is in no weight
        shutil.copytree(small, tmp_path / name)
        edit_json(tmp_path / name / "config.json", text_config=text | change)
        runs.append(run_hash(Plume.from_pretrained(tmp_path / name)))

    files = {str(path.relative_to(HERE)): path.read_text() for path in kept.code_files()}
    computing = {"model.py", "latent.py", "adapter.py", "data.py", "backbones/vision.py", "files/clips.py"}
    readers = {f"tasks/mmeb{room}.py" for room in ("", "_readers", "_rows", "_files", "_corpus")}
    worlds = {"tasks/turtle.py", "tasks/turtle_pictures.py", "tasks/beir.py"}
    assert computing | readers | worlds | {"hub/weights.py", "engine/stream.py"} <= files.keys()
    assert not files.keys() & {"train.py", "eval.py", "engine/lock.py", "tools/search.py", "tasks/compare.py"}
    monkeypatch.setattr(kept, "HOME", tmp_path / "source")
    for file, code in files.items():
        (tmp_path / "source" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / file).write_text(code)
    assert run_hash(again) == runs[0]
    for file, code in files.items():  # one line more in any file on which an embedding can depend
        (tmp_path / "source" / file).write_text(code + "\n")
        runs.append(run_hash(again))
        (tmp_path / "source" / file).write_text(code)
    assert len(set(runs)) == len(runs) > 30


def alike(folder):
    """Items with the same bytes or pixels that look different."""
    frames = [picture("red", "bar", at=at) for at in (0, 9)]
    (folder / "frames").mkdir()
    for file in (folder / "frames" / "a.gif", folder / "a.gif"):
        frames[0].save(file, save_all=True, append_images=frames[1:])
    clips = [str(folder / "frames"), str(folder / "a.gif")]
    pictures = [frames[0].quantize(4) for _ in range(3)] + [frames[0].copy(), frames[0].copy()]
    pictures[1].info["transparency"], pictures[2].info["transparency"] = 0, 1
    pictures[3].getexif()[kept.ExifTags.Base.Orientation] = 6
    return [parse_item(dict(video=clip)) for clip in clips] + [parse_item(image) for image in pictures]


def test_items_are_known_by_their_content_and_weighed_by_their_tokens(small, world, tmp_path):
    model = Plume.from_pretrained(small)
    red = str(world / "red bar.png")
    again = str(shutil.copy(red, tmp_path / "again.png"))
    items = mixed_items(world) + ["red ", dict(image=red, text="x"), dict(video=[red]), dict(image=again)]
    sides = [parse_item(item) for item in items]
    embedder = kept.Embedder(model, "latent", 8)
    weights = [embedder.weigh(side) for side in sides]
    assert len({weight.key for weight in weights}) == len(items) - 1
    assert weights[-1].key == weights[2].key  # that of the red bar
    assert len({embedder.weigh(side).key for side in alike(tmp_path)}) == 7
    before = embedder.weigh(sides[-1])
    picture("blue", "bar").save(again)
    assert embedder.weigh(sides[-1]) != before  # written over while it is at work
    # tokens of the prompt around each item
    beside = [len(model.processor.render(s)["ids"]) - w.tokens for s, w in zip(sides, weights)]
    del beside[4]  # of a video file: only decoding would tell
    assert max(beside) - min(beside) < 8


def test_scores_of_other_files_are_not_in_the_table_and_pages_of_other_rows_are_taken_anew(
        small, counts, tmp_path):
    mini, docvqa = Miniature(tmp_path / "mmeb", ["MSVD", "MSCOCO_t2i", "ViDoRe_docvqa"]), "ViDoRe_docvqa"
    flags = ["--data", mini.root, "--ckpt", small, "--scores", tmp_path / "scores", "--task"]

    def printed(task="MSVD"):
        return call("eval.py", *flags, task).stdout

    def page():
        return read_published(str(mini.root), docvqa).corpus[0].parts[0][1]

    assert "2 tasks of this command\n" in printed(f"MSCOCO_t2i,{docvqa}")
    assert "1 tasks of this command and 2 that were scored before" in printed()
    media = next((mini.root / "image-tasks").rglob("*.jpg"))
    media.write_bytes(media.read_bytes() + b" ")
    assert re.search("and 1 that were .* not in the table: image_ret/MSCOCO_t2i\n", printed())
    printed("MSCOCO_t2i")
    first = page()
    edit(mini, f"{docvqa}/qrels", FIRST, dict(score=2))
    assert f"so not in the table: vidore_v1/{docvqa}\n" in printed()
    assert page() != first and Path(page()).read_bytes() == Path(first).read_bytes()


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_what_is_written_may_be_read_by_whom_the_umask_lets(small, mmeb, counts, tmp_path, mask):
    old = os.umask(mask)
    try:
        make_model().float().save_pretrained(tmp_path / "ck")
        outputs = ["--scores", tmp_path / "scores", "--json", tmp_path / "a.json"]
        call("eval.py", "--data", mmeb.root, "--task", "MSVD", "--ckpt", small, *outputs)
    finally:
        os.umask(old)
    written = [p for p in tmp_path.rglob("*") if not p.is_symlink()]
    assert len([p for p in written if p.suffix in (".safetensors", ".bin", ".json")]) > 5
    modes = {str(path): path.stat().st_mode & 0o777 for path in written}
    assert modes == {str(path): (0o777 if path.is_dir() else 0o666) & ~mask for path in written}


def test_ranks_get_equal_cost_and_batches_do_not_depend_on_them(small, world):
    embedder = kept.Embedder(Plume.from_pretrained(small), "latent", 8, batch_size=2)
    pictures = [dict(image=str(world / "red bar.png"), text=str(n)) for n in range(10)]
    sides = [parse_item(item) for item in ["red " * n for n in range(1, 40)] + pictures]
    weights = [embedder.weigh(side) for side in sides]
    (alone,) = embedder.plan(sides, weights)
    embedder.planned, embedder.world = set(), 3
    shares = embedder.plan(sides, weights)

    def batches(*shares):
        return {frozenset(key for key, _ in s[a : a + 2]) for s in shares for a in range(0, len(s), 2)}

    assert batches(alone) == batches(*shares)
    assert sum(map(len, shares)) == len(alone) == len(sides)

    # equal cost, not equal rows; a batch is as long as its first
    parts = embedder.model.backbone.model.visual, embedder.model.lm.layers
    visual, decoder = (sum(p.numel() for p in part.parameters()) for part in parts)
    weight_of, loads = {weight.key: weight for weight in weights}, []
    for share in shares:
        found = [weight_of[key] for key, _ in share]
        loads.append(2 * sum(w.tokens for w in found[::2]) + visual / decoder * sum(w.patches for w in found))
    assert max(loads) < 1.1 * min(loads)
    assert len({len(share) for share in shares}) > 1


def content_of(sides):
    """The parts of sides, with the bytes of media for their paths."""
    parts = [(kind, str(v)) for side in sides for kind, value in side.parts for v in np.atleast_1d(value)]
    return [(kind, value if kind == "text" else Path(value).read_bytes()) for kind, value in parts]


def test_both_spellings_of_the_published_folders_are_read(mmeb, counts, tmp_path):
    only = ["image_cls", "image_gd", "video_cls", "video_ret", "video_mret", "ActivityNetQA", "vidore_v2"]
    other = Miniature(tmp_path, [*only, "visrag", "visdoc_ood"], other=True)
    for name in other.expected:
        a, b = read_published(str(mmeb.root), name), read_published(str(tmp_path), name)
        assert content_of(a.queries + a.corpus) == content_of(b.queries + b.corpus), name
        assert (a.relevant, a.candidates, a.query_ids) == (b.relevant, b.candidates, b.query_ids), name
    assert (mmeb.root / "visdoc-tasks" / "extracted").exists()
    assert not (tmp_path / "visdoc-tasks" / "extracted").exists()


def test_versions_are_told_apart_and_another_count_is_an_error(counts, tmp_path, monkeypatch):
    read = functools.partial(read_published, str(tmp_path))
    Miniature(tmp_path, ["ViDoSeek-page", "MomentSeeker"])
    fixed, original = "VLM2Vec/ViDoSeek-page-fixed", "VLM2Vec/ViDoSeek-page"
    assert read("ViDoSeek-page").about["version"] == "fixed"

    # of ViDoSeek the repository tells: both versions have as many queries
    (tmp_path / "rows" / fixed).rename(tmp_path / "rows" / original)
    versions = {fixed: ("fixed", 4), original: ("original", 4)}
    monkeypatch.setitem(MMEB, "ViDoSeek-page", replace(MMEB["ViDoSeek-page"], versions=versions))
    assert read("ViDoSeek-page").about["version"] == "original"
    printed = call("tasks.check", "--data", tmp_path, "--task", "ViDoSeek-page").stdout
    assert f"\nhf download {fixed} --repo-type dataset" in printed

    # of MomentSeeker the number of queries tells: one repository has held both
    seeker = tmp_path / "rows/VLM2Vec/MomentSeeker/test.jsonl"
    rows = seeker.read_text().splitlines() * 4
    for count, version, problems in ((13, "original", 0), (4, "fixed", 0), (5, "unknown", 1)):
        seeker.write_text("\n".join(rows[:count]) + "\n")
        task = read("MomentSeeker", skip_bad=True)
        assert (task.about["version"], len(task.queries), len(task.bad)) == (version, count, problems)
    with pytest.raises(DataError, match="5 queries, 4 are published: an unknown version"):
        read("MomentSeeker")


SOME = ["ImageNet-1K", "MSCOCO_t2i", "MSVD", "ViDoRe_docvqa", "K700"]
PICTURES = "image-tasks/MSCOCO_t2i/Test"
LOSSES = [  # what is lost, one behind the other; the task; what is said, the last of it by every command
    ("image-tasks/ImageNet-1K/Test/red circle.jpg", "ImageNet-1K",
     "test-00000-of-00002.parquet: row 2|red circle.jpg"),
    ("video-tasks/frames/video_ret/MSVD/v2", "MSVD", "test-00001-of-00002.parquet: row 1|'v2' is not in"),
    ("classes/K700.txt", "K700", "classes/K700.txt|video_classification_utils.py"),
    ("judgements", "ViDoRe_docvqa", "queries|row 2|no right candidate"),
    ("rows/vidore", "ViDoRe_docvqa", f"hf download {DOCVQA} --repo-type dataset --include")]


def lose(mini, what):
    """Something below the root, or the judgements of all queries but the first."""
    if what == "judgements":
        edit(mini, "ViDoRe_docvqa/qrels", EVERY, {"query-id": 0})
    elif (mini.root / what).is_dir():
        shutil.rmtree(mini.root / what)
    else:
        (mini.root / what).unlink()


def test_what_is_missing_is_named_and_rows_that_cannot_be_read_do_not_take_other_tasks_with_them(
        small, counts, tmp_path):
    mini = Miniature(tmp_path / "mmeb", SOME)
    check = ["tasks.check", "--data", mini.root, "--task"]
    done = call(*check, ",".join(SOME))
    assert "5 of 5 tasks" in done.stdout and done.returncode == 0
    assert not (mini.root / "visdoc-tasks").exists()  # nothing is taken out of the rows
    for what, task, said in LOSSES:
        lose(mini, what)
        done, said = call(*check, task, check=False), said.split("|")
        assert done.returncode == 1 and all(word in done.stdout for word in ("0 of 1 tasks", task, *said))
        failed = call("eval.py", "--data", mini.root, "--task", task, "--ckpt", small, check=False)
        assert failed.returncode == 1 and "1 of 1 tasks have problems" in failed.stderr
        assert said[-1] in failed.stderr
        with pytest.raises(DataError, match=re.escape(said[-1])):
            read_published(str(mini.root), task)
    broken = mini.root / "rows" / MMEB["MSCOCO_t2i"].hub / "MSCOCO_t2i/test-00000-of-00002.parquet"
    broken.write_bytes(b"PAR1 no PAR1")
    done = run(*check, "MSCOCO_t2i,MSVD", check=False)
    assert "test-00000-of-00002.parquet: not a readable .parquet" in done.stdout
    assert "video_ret/MSVD" in done.stdout and done.returncode == 1


@pytest.fixture
def damaged(small, counts, tmp_path):
    """The root of a miniature of which some is lost and one picture cut off; eval.py over tasks of it."""
    mini = Miniature(tmp_path / "mmeb", SOME)
    for what, _, _ in LOSSES:
        lose(mini, what)
    cut_off = mini.root / PICTURES / "red square.jpg"
    cut_off.write_bytes(cut_off.read_bytes()[:-60])
    flags = ["--data", mini.root, "--ckpt", small, "--scores", tmp_path / "scores", "--skip_bad", "--task"]
    return mini.root, functools.partial(call, "eval.py", *flags)


def read_score(folder, name):
    (path,) = folder.glob(f"scores/*-latent8-*/{name}.json")
    return read_json(path)


def test_what_is_missing_or_broken_is_named_and_with_skip_bad_marks_the_score_as_partial(damaged, tmp_path):
    # a picture of which only the beginning is there is found when it is decoded
    _, scored = damaged
    failed = scored("MSCOCO_t2i", "--skip_bad=false", check=False)
    assert "red square.jpg" in failed.stderr and "image_ret/MSCOCO_t2i" not in failed.stdout

    printed = scored("MSCOCO_t2i,ImageNet-1K,MSVD").stdout
    assert "partial: " in printed and "*" in printed
    for name, problems in (
        ("image_ret/MSCOCO_t2i", 2),  # its right candidate is broken: so is the query
        ("image_cls/ImageNet-1K", 1),  # the picture of a query is missing
        ("video_ret/MSVD", 2),  # a clip is missing: so is the query that it is right for
    ):
        score = read_score(tmp_path, f"{name}_score")
        assert (score["partial"], score["queries"], len(score["bad"])) == (True, 3, problems)
    assert "red square.jpg" in read_score(tmp_path, "image_ret/MSCOCO_t2i_score")["bad"][0]
    assert score["candidates"] == 3  # of MSVD

    # a task of which nothing is there does not take the others with it
    # and what was scored before stays in the table
    printed = scored("K700,ViDoRe_docvqa,MSVD", "--json", tmp_path / "rest.json").stdout
    rest = read_json(tmp_path / "rest.json")
    assert list(rest["tasks"]) == ["video_ret/MSVD"]
    assert list(rest["left_out"]) == ["video_cls/K700", "vidore_v1/ViDoRe_docvqa"] and "left out: " in printed
    assert "1 tasks of this command and 2 that were scored before" in printed
    board = read_score(tmp_path, "leaderboard")
    assert list(board["metrics"]["image"]) == ["ImageNet-1K", "MSCOCO_t2i"]
    assert len(board["metadata"]["incomplete"]) == 78
    failed = scored("K700", check=False)
    assert "no task is left" in failed.stderr and "classes/K700.txt" in failed.stderr


def test_a_query_that_is_left_with_its_right_candidate_alone_counts_as_bad(damaged, tmp_path):
    root, scored = damaged
    scored("MSCOCO_t2i")  # keeps embeddings of what these were
    shutil.copy(root / PICTURES / "red circle.jpg", root / PICTURES / "red square.jpg")  # whole again
    # of the first query all candidates but the right one, of the third the right one
    broken = ["green square.jpg", "blue square.jpg", "black square.jpg", "red bar.jpg"]
    for name in broken:
        (root / PICTURES / name).write_bytes(b"")
    scored("MSCOCO_t2i")
    bad = "\n".join(read_score(tmp_path, "image_ret/MSCOCO_t2i_score")["bad"])
    for why in ("only the right candidate is left", "no right candidate is left", *broken):
        assert why in bad


@pytest.mark.parametrize("table, which, columns, why, row", [
    ("ViDoRe_docvqa/corpus", EVERY, {"corpus-id": "doc/0"}, "'doc/0' stands there twice", "row 2"),
    ("ViDoRe_docvqa/corpus", EVERY, dict(image="x.png"), "doc_0.png' is not in", "row 1"),
    ("ViDoRe_docvqa/corpus", FIRST, {"corpus-id": "doc_1"}, "'doc_1' and 'doc/1' have one file name", "row "),
    ("ViDoRe_docvqa/queries", EVERY, {"query-id": 0}, "'0' stands there twice", "row 2"),
    ("ViDoRe_docvqa/queries", EVERY, dict(query=GONE, querry="x"), "Did you mean 'querry'?", "row 1"),
    ("ViDoRe_docvqa/queries", FIRST, dict(query=None), "needs a text, got None", "row 1"),
    ("ViDoRe_docvqa/qrels", EVERY, dict(score=GONE), "no column 'score'", "row 1"),
    ("ViDoRe_docvqa/qrels", EVERY, dict(score="1"), "'score' must be a number", "row 1"),
    ("ViDoRe_docvqa/qrels", slice(2, 3), {"corpus-id": "d/77"}, "'d/77' is none of the candidates", "row 2"),
    ("ImageNet-1K", FIRST, dict(qry_img_path=""), "'' is not in", "row 1"),
    ("ImageNet-1K", EVERY, dict(tgt_text="red bar"), "'tgt_text' must be a list of texts", "row 1"),
    ("ImageNet-1K", FIRST, dict(tgt_text=["red bar"]), "a query with one candidate", "row 1"),
    ("MSCOCO", FIRST, dict(tgt_img_path=["MSCOCO/Test/red bar.jpg"] * 3, tgt_text=["x"] * 4), "ValueError",
     "row 1"),
    ("SmthSmthV2", FIRST, dict(pos_text="blue bar"), "'blue bar' is none of the candidates", "row 1"),
    ("Video-MME", FIRST, dict(answer="E"), "ValueError", "row 1"),
])
def test_a_row_that_cannot_be_right_is_named(counts, tmp_path, table, which, columns, why, row):
    name = table.split("/")[0]
    edit(Miniature(tmp_path, [name]), table, which, columns)
    with pytest.raises(DataError) as error:
        read_published(str(tmp_path), name)
    said = str(error.value)
    assert why in said and row in said and str(tmp_path) in said and said.count(": row ") == 1


BLANKS = dict(qry_inst="<|image_1|>\n Look \n", qry_text="what \nis it \n here?")
PAIRS = dict(
    tgt_img_path=["RefCOCO/Test/red square.jpg"] * 4, tgt_text=["", "left", '"left"', " "],
    tgt_inst="<|image_1|>\nIt.")


@pytest.mark.parametrize("name, columns, query, candidates", [
    # blanks in front of a line break go beside a picture only
    # and the instruction is stripped before it is joined
    ("DocVQA", BLANKS, "Look what\nis it\n here?", None),
    ("CIRR", BLANKS, "Look what\nis it\n here?", None),
    ("VisDial", dict(qry_inst=" Find it: ", qry_text="Q \nA \nQ", tgt_inst="<|image_1|>\nRepresent \nit."),
     "Find it: Q \nA \nQ", ["Represent\nit."] * 4),
    ("WebQA", dict(tgt_inst="<|image_1|>\nWith: ", tgt_text=["a \nb", "", "c", "d"]), None,
     ["With:  a\nb", "With:", "With:  c", "With:  d"]),
    ("MSVD", dict(caption=["a man \nruns", "no"]), f"{CLIP_QUERIES['MSVD']} a man \nruns", None),
    ("ImageNet-1K", dict(qry_text=None), f"{INST} for ImageNet-1K.", None),
    ("DocVQA", dict(tgt_text=[" a ", "b", "c", "d"]), None, [" a ", "b", "c", "d"]),
    # pairs are named by path and caption, whether or not the first caption is blank
    ("RefCOCO", PAIRS, None, ["It."] * 3),
    # of an option without ". " only the last character is left; no blank behind the dot; equal texts
    ("Video-MME", dict(question=" When? \nNow", options=["A. x y. ", "B", "C: no", "D. z. w."]),
     f"{CHOOSE}  When? \nNow\nA. x y. \nB\nC: no\nD. z. w.", ["x y", "B", "o", "z. w"]),
    ("Video-MME", dict(options=["A.cats", "B.dogs", "C. pet.", "D. pet"]), None, ["s", "s", "pet", "pet"]),
    ("EgoSchema", dict(option=["A.one", "B. two", "C) three.", "", "E. . five .."]), None,
     ["e", "two", "", "", "five"]),
])
def test_rows_are_read_as_vlm2vec_reads_them(counts, tmp_path, name, columns, query, candidates):
    """What VLM2Vec's own reader makes of the row, less the visual token and what stands at both ends."""
    edit(Miniature(tmp_path / ".hidden", [name]), name, FIRST, columns)
    task = read_published(str(tmp_path / ".hidden"), name)
    assert not query or words(task.queries[:1]) == [query]
    assert not candidates or words(task.corpus[row] for row in task.candidates[0]) == candidates


def test_of_equal_options_of_mvbench_the_last_is_right(counts, tmp_path):
    Miniature(tmp_path, ["MVBench"])
    path = tmp_path / "rows/VLM2Vec/MVBench/json/action_sequence.json"
    (row,) = read_json(path)
    path.write_text(json.dumps([row | dict(candidates=["cat", "dog", "cat", "cow"], answer="cat")]))
    task = read_published(str(tmp_path), "MVBench")
    (i,) = [i for i, text in enumerate(words(task.queries)) if "(C) cat" in text]
    assert words(task.corpus[right] for right in task.relevant[i]) == ["(C) cat"]
    path.write_text(json.dumps([row | dict(candidates=["cat", "dog"], answer="cow")]))
    with pytest.raises(DataError, match="the answer 'cow' is none of the candidates"):
        read_published(str(tmp_path), "MVBench")


def test_oddities_of_folders_that_are_right(counts, tmp_path):
    mini = Miniature(tmp_path / ".hidden", ["MomentSeeker", "ViDoSeek-page"])
    root = mini.root

    # the newer layout of MomentSeeker names the folders of frames
    before = read_published(str(root), "MomentSeeker").corpus
    entries = [dict(output_path="gone.mp4", frame_path=f"video_frames/clips_0_{k}") for k in range(4)]
    edit(mini, "MomentSeeker", FIRST, dict(positive_frames=entries[:2], negative_frames=entries[2:]))
    assert content_of(read_published(str(root), "MomentSeeker").corpus) == content_of(before)

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
    (copy / ".cache/huggingface/download").mkdir(parents=True)
    (copy / ".cache/huggingface/download/x.metadata").write_text("0123abcd\netag\n1.0\n")
    task = read_published(str(root), "ViDoSeek-page")
    (_, page), _ = task.corpus[1].parts
    assert task.about["revision"] == "0123abcd" and "ViDoSeek-page-fixed/0123abcd/" in page

    # judgements as .tsv
    rows = [row.values() for row in rows_of(str(copy), "qrels", "test")]
    lines = ["\t".join(map(str, cells)) for cells in [("query-id", "corpus-id", "score"), *rows]]
    shutil.rmtree(copy / "qrels")
    (copy / "qrels").mkdir()
    (copy / "qrels" / "eval-qrels.tsv").write_text("\n".join(lines) + "\n")
    assert read_published(str(root), "ViDoSeek-page").relevant == task.relevant


def test_ids_in_a_tsv_are_texts_and_what_is_a_number_and_nothing_else_stays_one(tmp_path):
    (tmp_path / "test.tsv").write_text("query\tcorpus\tscore\n007\t0010\t1\n7\t-3\t0\n1e3\t+5\t2\n")
    cells = [tuple(row.values()) for row in rows_of(str(tmp_path), "", "test")]
    assert cells == [("007", "0010", 1), (7, -3, 0), ("1e3", "+5", 2)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".tsv"])
def test_rows_that_cannot_be_read_are_an_error_of_their_file(tmp_path, suffix):
    file = tmp_path / f"test{suffix}"
    for content, why in ((LFS.encode(), "Git LFS pointer.*git lfs pull"), (b"a\tb\n\xff\0\t\"\n" * 9, "")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{re.escape(str(file))}: .*{why}"):
            list(rows_of(str(tmp_path), "", "test"))


def test_names_of_classes_and_scores_that_are_pointers_are_called_so(tmp_path):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "K700.txt").write_text(LFS)
    with pytest.raises(DataError, match="K700.txt: .*Git LFS pointer"):
        classes_of(SimpleNamespace(root=str(tmp_path), task=MMEB["K700"]))
    scores = [tmp_path / "classes" / "K700.txt"] * 2
    assert "Git LFS pointer" in call("tasks.compare", *scores, check=False).stderr


def test_only_the_first_1000_rows_of_ssv2_count_and_parquet_without_pyarrow_says_what_to_install(
        counts, tmp_path, monkeypatch):
    mini, hub = Miniature(tmp_path, ["SmthSmthV2"]), MMEB["SmthSmthV2"].hub
    monkeypatch.setitem(MMEB, "SmthSmthV2", replace(MMEB["SmthSmthV2"], queries=1000))
    mini.write_rows(hub, "", "test", 300 * list(rows_of(str(tmp_path / "rows" / hub), "", "test")))
    assert len(read_published(str(tmp_path), "SmthSmthV2").queries) == 1000
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.delattr(sys.modules["pyarrow"], "parquet", raising=False)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_published(str(tmp_path), "SmthSmthV2")


VERSIONS = ("[{config_name: test_1k, data_files: [{split: test, path: x/1k*.json}]}, "
            "{config_name: test_3k, data_files: x/3k.json}]")
FOUND = [  # files, the first of which is found; subset, split, the `configs` of README.md
    (["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], "", "test", ""),
    (["MC/test-00000-of-00001.parquet", "OE/test-00000-of-00001.parquet"], "MC", "test", ""),
    (["queries/test.jsonl", "corpus/test.jsonl", ".cache/x/test.jsonl"], "queries", "test", ""),
    (["json/action_count.json", "json/moving_count.json"], "action_count", "train", ""),
    (["latest.parquet"], "", "test", ""),
    (["data/validation-0.parquet"], "", "val", ""),
    (["x/1k_a.json", "x/3k.json"], "test_1k", "test", VERSIONS),
    (["x/3k.json", "x/1k_a.json"], "test_3k", "test", VERSIONS),
    (["RefCOCO.parquet", "RefCOCO-Matching.parquet"], "RefCOCO", "test", ""),
    (["test-00000-of-00001-0a1b.parquet", "x.json"], "", "test", ""),
    (["rows/a.json", "b.json"], "", "test", "[{config_name: default, data_files: ./rows}]"),
    (["a.json", "b.json"], "", "test", "[{config_name: default, data_files: {path: a.json}}]")]


def test_files_of_a_subset_and_split_are_found_as_the_hub_names_them(tmp_path):
    folder = tmp_path / "d"

    def found(files, subset, split, configs=""):
        shutil.rmtree(folder, ignore_errors=True)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("{}")
        (folder / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
        return row_files(str(folder), subset, split)

    assert found(["train.jsonl"], "", "test") == []
    for files, *asked in FOUND:
        assert found(files, *asked) == files[:1]
    with pytest.raises(DataError, match="no .parquet, .jsonl, .json or .tsv file of subset 'q', split 'x'"):
        list(rows_of(str(folder), "q", "x"))
    with pytest.raises(DataError, match="test-...-of-00003.parquet: 2 of 3 files are there"):
        found(["test-00000-of-00003.parquet", "test-00002-of-00003.parquet"], "", "test")
    for broken in ("[", "7"):
        with pytest.raises(DataError, match="README.md: its 'configs' cannot be read"):
            found(["a.json"], "", "test", broken)


def test_the_released_protocol_is_the_released_evaluation_s_input(mmeb, counts, small, tmp_path):
    read = functools.partial(read_published, str(mmeb.root))
    released = read("ViDoRe_docvqa", True)
    assert [side.parts for side in released.queries] == [[("text", f"a {name}")] for name in NAMES[:4]]
    assert words(released.corpus[:1]) == [""]
    for name, protocol in (("ViDoRe_docvqa", False), ("VisRAG_PlotQA", True)):  # VisRAG's keep it
        assert words(read(name, protocol).corpus[:1]) == [PAGE_TARGET]
    for protocol, count in ((False, 8), (True, 9)):
        (_, clip), _ = read("MomentSeeker", protocol).corpus[0].parts
        assert len(clip) == count
    edit(Miniature(tmp_path / "blanks", ["DocVQA"]), "DocVQA", FIRST, dict(tgt_text=[" a ", "b", "c", "d"]))
    blanks = read_published(str(tmp_path / "blanks"), "DocVQA", released=True)
    assert words(blanks.corpus[:4]) == ["a", "b", "c", "d"]  # its collator strips what it is given

    outputs = ["--scores", tmp_path, "--json", tmp_path / "r.json"]
    task = ["--task", "MSVD", "--protocol", "released"]
    call("eval.py", "--data", mmeb.root, "--ckpt", small, *task, *outputs)
    Plume.random(["a"], "tiny3").save_pretrained(tmp_path / "3")
    failed = call("eval.py", "--data", mmeb.root, "--ckpt", tmp_path / "3", *task, check=False)
    assert "--protocol released is how a Qwen2-VL was scored" in failed.stderr
    (file,) = tmp_path.glob("*-latent8-released-*/video_ret/MSVD_score.json")
    r = read_json(tmp_path / "r.json")["tasks"]["video_ret/MSVD"]
    assert r["protocol"] == read_json(file)["protocol"] == "released"
    model = Plume.from_pretrained(
        small, latent_positions="cache", white_image=True, prompt=RELEASED_PROMPT,
        limits=dict(min_pixels=784, max_pixels=2359296, max_len=11288, num_frames=64))
    assert abs(r["hit@1"] - score_by_hand(model, *mmeb.expected["MSVD"], "hit@1")) < 1e-9


def test_task_names_of_every_kind():
    names = [t.full_name for t in MMEB.values()]
    for wanted, pattern, count in (
            ("image", "image_", 36), ("visdoc", "visdoc|visrag|vidore", 24), ("video,visdoc", "v", 42),
            ("all", "", 78), ("video_mret", "video_mret/", 3), ("MSVD", "video_ret/MSVD$", 1),
            ("video_ret/MSVD", "video_ret/MSVD$", 1)):
        chosen = select(names, wanted, "x")
        assert len(chosen) == count and chosen == [name for name in names if re.match(pattern, name)]
    with pytest.raises(DataError, match="Did you mean 'MSR-VTT'"):
        select(names, "MSRVTT", "x")


def test_the_interval_is_that_of_the_task_s_own_metric_over_its_queries():
    """40 hits of 100: by the normal approximation 0.4 +- 1.96 sqrt(0.4 * 0.6 / 100)."""
    relevant = [{0: 1}] * 40 + [{1: 1}] * 60
    task = Task("t", ["q"] * 100, ["a", "b"], relevant, [None] * 100, list(map(str, range(100))), ["a", "b"])
    vectors = torch.eye(2)[:1].expand(100, 2), torch.eye(2)
    result = evaluation.evaluate(task, vectors)
    assert result["hit@1"] == 0.4 and result["interval"] == pytest.approx([0.304, 0.496], abs=0.015)
    graded = evaluation.evaluate(replace(task, metric="ndcg@5"), vectors)
    assert abs(np.mean(graded["interval"]) - graded["ndcg@5"]) < 0.01
    assert graded["interval"][0] > result["interval"][1]
