"""The command python -m tools.encode: what it is given becomes vectors, whatever ends it on the way."""

import contextlib
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from model import Plume
from test_plume import assert_close
from tests.processes import call, ROOT, run, Started
from tests.samples import in_one_space, NAMES, odd_folder, ODD, write_lines
from tools import encode
from tools.encode_input import count_records, open_source
from tools.encode_parts import load_vectors, narrowed, read_part, TYPES, whole_parts

TEXTS = [f"a {name} and {n} more" for n in range(5) for name in NAMES]  # 60


@pytest.fixture
def texts(tmp_path):
    """A file of 60 short texts."""
    path = tmp_path / "texts.jsonl"
    write_lines(path, [dict(_id=f"d{n}", text=text) for n, text in enumerate(TEXTS)])
    return path


@pytest.fixture(scope="module")
def expected(small):
    return Plume.from_pretrained(small, "cpu").encode(TEXTS)


def encoded(small, source, out, *flags, **kw):
    """The command with these flags -> what it printed, or its error."""
    done = call("tools.encode", source, out, "--ckpt", small, "--part_size", 7, *flags, **kw)
    return done.stderr or done.stdout


def bad_in(out):
    return {item["_id"]: item["why"] for file in sorted(out.glob("part-*/bad.json"))
            for item in json.loads(file.read_text())}


def check(out, expected, what="vectors"):
    """The folder has every text once, in order, with its vector."""
    ids, vectors = load_vectors(out)
    assert ids == [f"d{n}" for n in range(len(TEXTS))], what
    assert_close(vectors, expected, what)


def test_records_of_every_kind_equal_encode_and_what_cannot_be_read_is_named(small, world, tmp_path):
    (tmp_path / "cut.png").write_bytes((world / "red bar.png").read_bytes()[:90])
    good = {
        "plain": "red", "Zoë\n\U0001f600": dict(text="of BEIR", title="A title", metadata={"url": "x"}),
        "7": dict(image="red bar.png"), "clip": dict(text="what?", video="green bar.mp4", start=0.2, end=0.6),
        "two": dict(image=["red bar.png", "blue bar.png"], text=None)}
    items = [dict(item, _id=int(name) if name == "7" else name) for name, item in good.items()
             if name != "plain"]
    bad = [dict(_id="cut", image=str(tmp_path / "cut.png")), dict(_id="lost", image="lost.png"),
           dict(_id="key", imgae="x"), dict(_id="none"), 17]
    path = tmp_path / "items.jsonl"
    write_lines(path, ["red", *items, *bad])
    with open(path, "a") as f:
        f.write('\n  \n{"_id": "twice", "text": "a", "text": "b"}\n{"_id": "half", "te')
    printed = encoded(small, path, tmp_path / "out", "--media", world)
    ids, vectors = load_vectors(tmp_path / "out")
    assert ids == ["1", *list(good)[1:]]
    plain = [dict(item) if isinstance(item, dict) else item for item in good.values()]
    plain[1] = dict(text="A title of BEIR")
    for item in plain[2:]:
        for kind in ("image", "video"):
            if kind in item:
                one = isinstance(item[kind], str)
                item[kind] = str(world / item[kind]) if one else [str(world / name) for name in item[kind]]
    assert_close(vectors, Plume.from_pretrained(small, "cpu").encode(plain), "vectors")
    why = bad_in(tmp_path / "out")
    assert list(why) == ["cut", "lost", "key", "none", "10", "11", "12"]
    for name, reason in dict(cut="cut.png", lost="does not exist", key="Did you mean 'image'", none="needs",
                             **{"10": "got 17", "11": "stands twice", "12": "not JSON"}).items():
        assert reason in why[name], why[name]
    assert "7 items could not be read" in printed and "with 5 vectors" in printed


def test_parquet_has_the_same_columns(small, world, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stored = [dict(bytes=(world / f"{name}.png").read_bytes(), path=None) for name in NAMES]
    broken = dict(bytes=b"no picture", path=None)
    columns = dict(_id=list(range(13)), text=[None, *NAMES], image=[*stored, broken], url=["x"] * 13)
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet", row_group_size=5)
    source = tmp_path / "x.parquet"
    printed = [encoded(small, source, tmp_path / "out", "--shard", n, "--of", 2) for n in (1, 0)]
    assert "not used: url" in printed[0] and "1 of 2 parts are there" in printed[0]
    ids, vectors = load_vectors(tmp_path / "out")
    items = [dict(text=t, image=i) for t, i in zip(columns["text"], stored)]
    assert ids == [str(n) for n in range(12)] and bad_in(tmp_path / "out").keys() == {"12"}
    assert_close(vectors, Plume.from_pretrained(small, "cpu").encode(items), "vectors")
    parquet.write_table(pyarrow.table(dict(text=NAMES)), tmp_path / "without.parquet")
    encoded(small, tmp_path / "without.parquet", tmp_path / "without")
    assert load_vectors(tmp_path / "without")[0] == [str(n) for n in range(1, 13)]
    parquet.write_table(pyarrow.table(dict(words=NAMES)), tmp_path / "words.parquet")
    assert "none of its columns" in encoded(small, tmp_path / "words.parquet", tmp_path / "no", check=False)
    (tmp_path / "no.parquet").write_bytes(b"x")
    assert "as a Parquet file" in encoded(small, tmp_path / "no.parquet", tmp_path / "no", check=False)


def test_a_folder_gives_its_pictures_clips_and_pages(small, world, tmp_path):
    folder = tmp_path / "files"
    odd = odd_folder(tmp_path / "files" if folder.mkdir() is None else None)
    shutil.copy(world / "red bar.png", odd / "x.png")
    shutil.copy(world / "red bar.mp4", folder)
    (folder / "broken.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    items = {"red bar.mp4": dict(video=str(folder / "red bar.mp4"))}
    if importlib.util.find_spec("pypdfium2"):
        first, second = [Image.new("L", size) for size in ((200, 300), (300, 200))]
        first.save(folder / "paper.pdf", save_all=True, append_images=[second])
    items[f"{ODD}/x.png"] = dict(image=str(odd / "x.png"))
    printed = encoded(small, folder, folder / "out")  # which is no part of what is read
    ids, vectors = load_vectors(folder / "out")
    pages = [name for name in ids if "pdf" in name]
    assert pages in ([], ["paper.pdf page 1", "paper.pdf page 2"]) and set(ids) == {*items, *pages}
    assert bad_in(folder / "out").keys() == {"broken.png"} and ".txt 1" in printed
    rows = vectors[[ids.index(name) for name in items]]
    assert_close(rows, Plume.from_pretrained(small, "cpu").encode(items.values()), "vectors")
    again = encoded(small, folder, folder / "out")
    assert " 0 records to encode" in again and "1 others are no" in again
    os.utime(folder / "broken.png", (1, 1))
    assert "input" in encoded(small, folder, folder / "out", check=False)


def test_types_keep_what_can_be_found(small, texts, expected, tmp_path):
    for kind, most in zip(TYPES, (1e-5, 2e-4, 6e-3)):
        encoded(small, texts, tmp_path / kind, "--type", kind, "--dim", 64)
        stored = np.load(tmp_path / kind / "part-000000" / "vectors.npy")
        assert stored.dtype == kind and stored.shape == (7, 64)
        _, vectors = load_vectors(tmp_path / kind)
        first = expected[:, :64] / np.linalg.norm(expected[:, :64], axis=1, keepdims=True)
        assert vectors.dtype == np.float32
        assert_close(vectors, first, kind, most)
        assert_close(np.linalg.norm(vectors, axis=1), np.ones(60), "norms")
    assert (np.abs(stored.astype(int)).max(1) == 127).all()
    assert narrowed(np.empty((0, 4)), "int8").shape == (0, 4)


def test_shards_hold_every_item_once_however_many_there_are(small, texts, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert "3 of 9 parts, 0 of" in encoded(small, texts, out, "--shard", 1, "--of", 3)
    with pytest.warns(UserWarning, match="3 of 9 parts are there"):
        assert len(load_vectors(out)[0]) == 21
    monkeypatch.setenv("RANK", "1")  # as torchrun does, with another number of processes
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "shard 1 of 2: 4 of 9 parts, 2 of them are there; 14 records" in encoded(small, texts, out)
    monkeypatch.setenv("RANK", "0")
    encoded(small, texts, out)
    assert whole_parts(out) == list(range(9))
    check(out, expected)
    for name in ("vectors.npy", "ids.json", "bad.json"):  # somebody deletes a file, or a part
        os.remove(out / "part-000004" / name)
        assert "; 7 records to encode" in encoded(small, texts, out)
    shutil.rmtree(out / "part-000008")
    assert "4 records to encode" in encoded(small, texts, out)
    check(out, expected)


def test_the_same_shard_twice_at_once_harms_nothing(small, texts, expected, tmp_path):
    command = ["tools.encode", texts, tmp_path / "out", "--ckpt", small, "--part_size", 3]
    twins = [Started(*command) for _ in range(2)]
    for twin in twins:
        assert twin.wait(120) == 0, twin.stderr
    check(tmp_path / "out", expected)
    assert not list((tmp_path / "out").glob("*.writing"))


@pytest.mark.parametrize("flags, differs", [
    (["--mode", "single"], "mode 'latent', now 'single'; steps 8, now None"),
    (["--steps", 3], "steps 8, now 3"),
    (["--dim", 8], "dim 128, now 8"), (["--type", "int8"], "type 'float32', now 'int8'"),
    (["--part_size", 8], "part_size 7, now 8"), (["--dtype", "bfloat16"], "dtype 'float32', now 'bfloat16'"),
    ("other", "checkpoint '.*', now '.*'"), ("input", "input '.*', now '.*'")])
def test_other_vectors_in_the_same_folder_are_refused(small, texts, tmp_path, flags, differs):
    encoded(small, texts, tmp_path / "out", "--shard", 0, "--of", 9)
    before = sorted(tmp_path.glob("out/**/*"))
    if flags == "other":
        flags, small = [], in_one_space(small, tmp_path)
    if flags == "input":
        flags = []
        texts.write_text(texts.read_text().replace("more", "less"))
    error = encoded(small, texts, tmp_path / "out", *flags, check=False)
    assert re.search(f"holds vectors with (.*; )?{differs}", error), error
    assert sorted(tmp_path.glob("out/**/*")) == before


def test_input_that_cannot_be_meant_is_refused_before_anything_is_encoded(small, texts, world, tmp_path):
    def refused(lines, *flags):
        path = tmp_path / "wrong.jsonl"
        path.write_text("".join(lines))
        error = encoded(small, path, tmp_path / "out", *flags, check=False)
        assert not list(tmp_path.glob("out/*.json")) and error, error
        return error

    assert "no item in it" in refused(["\n"])
    assert "none of the first 20" in refused(['{"_id": "a", "body": "x"}\n'] * 30)
    assert "the id 'b' stands in records 2 and 4" in refused(
        [f'{{"_id": "{name}", "text": "x"}}\n' for name in "abcb"])
    assert "the id '2' stands in records 1 and 2" in refused(['{"_id": 2, "text": "x"}\n', '"x"\n'])
    assert "none of the first 1" in refused(['{"image": "red bar.png"}\n'])
    assert "no such folder" in refused(['"x"'], "--media", tmp_path / "no")
    assert "--of" in refused(['"x"'], "--shard", 0)
    assert "from 0 to N - 1" in refused(['"x"'], "--shard", 2, "--of", 2)
    assert "Did you mean 'int8'" in refused(['"x"'], "--type", "int4")
    assert "128 components" in refused(['"x"'], "--dim", 129)
    assert "steps" in refused(['"x"'], "--mode", "single", "--steps", 3)
    assert "Did you mean 'texts.jsonl'" in encoded(small, tmp_path / "text.jsonl", tmp_path, check=False)


def test_twenty_kills_lose_nothing_and_double_nothing(small, tmp_path):
    path, out, dice, killed = tmp_path / "texts.jsonl", tmp_path / "out", random.Random(0), 0
    write_lines(path, TEXTS * 12)
    command = ["tools.encode", path, out, "--ckpt", small, "--part_size=1", "--batch_size=2", "--mode=single"]

    def names():
        return os.listdir(out) if out.is_dir() else []

    for kill in range(20):
        process, before = Started(*command), names()
        if kill % 4:  # while it writes
            while process.process.exitcode is None and names() == before:
                time.sleep(0.0005)
            time.sleep(dice.choice((0, 0.0005, 0.001, 0.002)))
        else:
            time.sleep(dice.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):  # it has not begun
            os.killpg(process.pid, signal.SIGKILL)
        process.process.kill()
        killed += process.wait(60) == -signal.SIGKILL
    assert killed == 20 and 0 < len(whole_parts(out)) < 720
    left, printed = [name for name in names() if name.endswith(".writing")], run(*command).stdout
    ids, vectors = load_vectors(out)
    assert ids == [str(n) for n in range(1, 721)] and len(whole_parts(out)) == 720
    assert_close(vectors, Plume.from_pretrained(small, "cpu").encode(TEXTS * 12, "single"), "vectors")
    assert not left or f"{len(left)} that killed runs left behind" in printed


def test_a_long_file_is_never_in_memory(model, tmp_path):
    path, line = tmp_path / "long.jsonl", json.dumps(dict(text="x", metadata="y" * 480)) + "\n"
    path.write_text(line * 20_000)
    source = open_source(str(path), "", tmp_path)
    tracemalloc.start()
    try:
        assert len(list(source.items(lambda number: number >= 19_990, 0))) == 10
        assert len(source.digest()) == 16 and count_records(source) == 20_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < path.stat().st_size / 4  # 8 bytes of hash for each id, and some of them in numpy's growth
    read = []

    def items():
        for item in source.items(lambda number: True, 0):
            read.append(item)
            yield item

    cfg, manifest = encode.Config(mode="single", batch_size=8), dict(steps=None, dim=None, prompt="{}")
    rows = encode.embedded(model, items(), cfg, manifest)
    with contextlib.closing(rows):
        ahead = [len(read) - row.record for row in itertools.islice(rows, 300)]
    assert len(ahead) == 300 and max(ahead) <= 2 * 8 * 8  # two windows


def test_input_that_changes_while_it_is_read_is_an_error(small, texts, tmp_path, monkeypatch):
    shorter = "".join(texts.read_text().splitlines(True)[:-2])

    def manifest_and_change(*given):
        manifest = write_or_compare(*given)
        texts.write_text(shorter)
        return manifest

    write_or_compare = encode.write_or_compare_manifest
    monkeypatch.setattr(encode, "write_or_compare_manifest", manifest_and_change)
    error = encoded(small, texts, tmp_path / "out", check=False)
    assert "changed while it was read: 58 records instead of 60; delete" in error


def interrupted(write_part, out, number, *rest):
    print("writing", flush=True)
    write_part(out, number, *rest)
    if number == 2:
        os.kill(os.getpid(), signal.SIGINT)


def on_a_full_disk(write_part, out, number, *rest):
    if number == 2:  # no file may be longer
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    write_part(out, number, *rest)


@pytest.mark.parametrize("function, status, says", [
    (interrupted, 130, "^interrupted: the parts that are there stay, the same command goes on"),
    (on_a_full_disk, 1, "^error: .*vectors.npy: cannot be written.*; the parts that are there stay")])
def test_an_end_on_the_way_is_one_sentence_and_the_same_command_goes_on(
        small, texts, expected, tmp_path, function, status, says):
    out = tmp_path / "out"
    command = ["tools.encode", texts, out, "--ckpt", small, "--part_size", 7]
    ended = run(*command, patch=("tools.encode.write_part", function), check=False)
    assert ended.returncode == status and "Traceback" not in ended.stderr
    assert re.search(says, ended.stderr.splitlines()[-1]), ended.stderr
    there = whole_parts(out)
    assert there[:2] == [0, 1] and len(there) < 9 and not list(out.glob("*.writing"))
    assert len(read_part(out, 1)[0]) == 7
    encoded(small, texts, out)
    check(out, expected)


def test_search_finds_in_the_vectors_what_encode_ranks_first(small, texts, world, tmp_path):
    encoded(small, texts, tmp_path / "out", "--mode", "single", "--dim", 32)
    words = [TEXTS[7], "--vectors", tmp_path / "out", "--ckpt", small]
    printed = call("tools.search", *words, "--count", 3).stdout
    found = re.findall(r"^ +\d+ +(-?\d\.\d{3})  (.*)$", printed, re.M)
    plume = Plume.from_pretrained(small, "cpu")
    scores = plume.encode(TEXTS, "single", dim=32) @ plume.encode([TEXTS[7]], "single", dim=32)[0]
    best = np.argsort(-scores)[:3]
    assert [name for _, name in found] == [f"d{n}" for n in best] and best[0] == 7
    assert "3 of 60 items" in printed
    assert_close([float(score) for score, _ in found], scores[best], "scores", 1e-3)
    with pytest.warns(UserWarning, match="in mode latent hardly find what is embedded in mode single"):
        call("tools.search", *words, "--mode", "latent")
    picture_alone = ["--image", world / "red bar.png", *words[1:]]
    assert "10 of 60 items" in call("tools.search", *picture_alone).stdout
    for flag, value in (("--index", "x"), ("--every", 3), ("--index_mode", "same"), ("--html", "x")):
        assert f"{flag} belongs" in call("tools.search", *words, flag, value, check=False).stderr
    assert "needs a query" in call("tools.search", *words[1:], check=False).stderr
    other = in_one_space(small, tmp_path)
    assert "of another checkpoint" in call("tools.search", *words[:-1], other, check=False).stderr
    assert "python -m tools.encode made" in call("tools.search", "x", "--vectors", world, check=False).stderr
    (tmp_path / "manifest.json").write_text("[]")
    assert "is none of" in call("tools.search", "x", "--vectors", tmp_path, check=False).stderr
    file = tmp_path / "out" / "part-000001" / "vectors.npy"
    file.write_bytes(file.read_bytes()[:-100])
    assert "part-000001: cannot be read" in call("tools.search", *words, check=False).stderr


@pytest.mark.parametrize("package", ["faiss", "lancedb"])
def test_other_software_opens_the_vectors_as_the_page_says(
        small, texts, expected, tmp_path, monkeypatch, package):
    pytest.importorskip(package, reason="needs it: pip install faiss-cpu lancedb")
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    code = next(code for code in page.split("```python\n") if code.startswith(f"import {package}"))
    code = code.split("```")[0]
    encoded(small, texts, tmp_path / "out" / "vectors", "--type", "int8")
    monkeypatch.chdir(tmp_path)
    names = dict(query=expected[17])
    exec(code, names)
    best = np.argsort(-(load_vectors(tmp_path / "out" / "vectors")[1] @ expected[17]))[:5]
    assert names["found"] == [f"d{n}" for n in best] and best[0] == 17


def test_the_recipe_for_ray_equals_encode_with_two_actors(small, world, tmp_path):
    pytest.importorskip("ray.data", reason="needs ray: pip install \"ray[data]\"")
    from pyarrow import parquet

    rows = [dict(_id=f"d{n}", text=text) for n, text in enumerate(TEXTS)]
    rows += [dict(_id="picture", image=str(world / "red bar.png")), dict(_id="lost", image="lost.png")]
    write_lines(tmp_path / "x.jsonl", rows)
    out = tmp_path / "out"
    command = [sys.executable, "docs/ray_encode.py", tmp_path / "x.jsonl", out, small, "2", "0"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", RAY_ADDRESS="local")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-9000:]
    found = {row["_id"]: row for row in parquet.read_table(out).to_pylist()}
    assert found.keys() == {row["_id"] for row in rows} and "lost.png' does not exist" in found["lost"]["why"]
    items = [*TEXTS, dict(image=str(world / "red bar.png"))]
    vectors = [found[row["_id"]]["vector"] for row in rows[:-1]]
    assert_close(np.array(vectors), Plume.from_pretrained(small, "cpu").encode(items), "vectors")


def test_an_embedding_that_is_not_finite_is_named_and_does_not_hold_the_others_up(
        small, texts, tmp_path, monkeypatch):
    model = Plume.from_pretrained(small, "cpu")
    embed, longest = model.embed, max(TEXTS, key=len)

    def embed_one_badly(batch, *given, **more):
        vectors, spent = embed(batch, *given, **more)
        vectors[batch["lengths"] == batch["lengths"].max()] = np.nan
        return vectors, spent

    monkeypatch.setattr(model, "embed", embed_one_badly)
    monkeypatch.setattr(encode, "load_model", lambda *_: model)
    printed = encoded(small, texts, tmp_path / "out", "--batch_size", len(TEXTS))
    bad = bad_in(tmp_path / "out")
    assert bad and all("not finite; the weights are finite" in why for why in bad.values())
    assert f"{len(bad)} items could not be read" in printed and f"d{TEXTS.index(longest)}" in bad
    assert len(load_vectors(tmp_path / "out")[0]) == len(TEXTS) - len(bad)
