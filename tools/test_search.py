"""The command python -m tools.search, on real files that change between two runs."""

import importlib.util
import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation
from engine import kept, stream
from model import Plume
from test_plume import assert_close
from tests.processes import call
from tests.samples import picture, write_clip
from tools.search_files import scan
from tools import search

LINE = re.compile(r" *\d+ +(-?\d\.\d{3})  (.*)")


@pytest.fixture
def folder(tmp_path):
    """Pictures, a clip of 2.5 seconds, a broken picture, and what is none of these."""
    root = tmp_path / "files"
    (root / "deep" / "deeper").mkdir(parents=True)
    for colour in ("red", "green", "blue"):
        picture(colour, "bar").save(root / "deep" / f"{colour}.png")
    picture("red", "circle").save(root / "deep" / "deeper" / "CIRCLE.JPG", "JPEG")
    write_clip(root / "clip.mp4", [picture(c, "square") for c in ["red"] * 8 + ["blue"] * 12])
    (root / "broken.png").write_bytes(b"no picture")
    (root / "notes.txt").write_text("x")
    (root / ".hidden.png").write_bytes(b"x")
    (root / "around").symlink_to(root)
    return root


def searched(small, folder, *words):
    """The command with these words -> its lines, the results as (score, name)."""
    printed = call("tools.search", folder, *words, "--ckpt", small).stdout
    found = [LINE.fullmatch(line) for line in printed.splitlines()]
    return printed, [(float(m[1]), m[2]) for m in found if m]


def test_results_equal_encode_by_hand(small, folder):
    printed, found = searched(small, folder, "a red bar")
    assert "0 files as they were, 6 new or changed, 0 moved, 0 deleted; 6 items encoded, 5 in" in printed
    assert "1 others are no pictures, clips or pages: .txt 1" in printed
    assert "1 cannot be read" in printed and "broken.png: cannot be used as a picture" in printed
    names = ["clip.mp4", "deep/red.png", "deep/green.png", "deep/blue.png", "deep/deeper/CIRCLE.JPG"]
    model = Plume.from_pretrained(small, "cpu")
    items = [{"video" if name.endswith("mp4") else "image": str(folder / name)} for name in names]
    scores = model.encode(items) @ model.encode(["a red bar"])[0]
    expected = sorted(zip(scores.tolist(), names), reverse=True)
    assert [name for _, name in found] == [name for _, name in expected]
    assert_close([score for score, _ in found], [score for score, _ in expected], "scores", 1e-3)

    query = str(folder / "deep" / "blue.png")
    _, found = searched(small, folder, "--image", query, "--count", 2)
    assert found[0][1] == "deep/blue.png" and len(found) == 2
    _, both = searched(small, folder, "what is it?", "--image", query, "--mode", "single")
    vector = model.encode([{"image": query, "text": "what is it?"}], "single")[0]
    expected = np.sort(model.encode(items, "single") @ vector)
    assert_close(sorted(score for score, _ in both), expected, "both", 1e-3)


def test_only_what_is_new_is_embedded_and_only_what_changed_is_read(small, folder, monkeypatch):
    model, counts = Plume.from_pretrained(small, "cpu"), {}
    decode = stream.read_item

    def counted(model, i, item, bad):
        counts["read"] = counts.get("read", 0) + 1
        return decode(model, i, item, bad)

    monkeypatch.setattr(stream, "read_item", counted)

    def updated(every=0.0):
        """-> what was done, how many items were decoded, names of the index"""
        counts.clear()
        cfg = evaluation.Config(batch_size=2, skip_bad=True)
        embedder = kept.Embedder(model, cfg, "single", None, str(folder / ".plume" / "embeddings"))
        index = search.Index(str(folder / ".plume"), embedder, every)
        files, _ = scan(folder, folder / ".plume")
        done = index.update(str(folder), files, 10**6).split("; ")[0]
        assert len(index.items) == len(index.vectors) and len({len(v) for v in index.vectors}) == 1
        return done, counts.get("read", 0), sorted(search.name_of(item) for item in index.items)

    first = updated()
    assert first[:2] == ("0 files as they were, 6 new or changed, 0 moved, 0 deleted", 6)
    assert updated() == ("6 files as they were, 0 new or changed, 0 moved, 0 deleted", 0, first[2])
    (folder / "deep" / "red.png").rename(folder / "moved.png")
    (folder / "deep" / "green.png").unlink()
    shutil.copy(folder / "deep" / "blue.png", folder / "copy.png")
    os.utime(folder / "clip.mp4")
    done, read, names = updated()
    assert done == "3 files as they were, 3 new or changed, 1 moved, 1 deleted" and read == 0
    assert names == ["clip.mp4", "copy.png", "deep/blue.png", "deep/deeper/CIRCLE.JPG", "moved.png"]
    picture("green", "circle").save(folder / "copy.png")  # changed
    picture("green", "bar").save(folder / "broken.png")  # mended, with what was deleted before
    done, read, names = updated()
    assert done == "4 files as they were, 2 new or changed, 0 moved, 0 deleted" and read == 1
    assert "broken.png" in names
    done, read, names = updated(every=1.0)
    assert done == "5 files as they were, 1 new or changed, 0 moved, 0 deleted" and read == 3
    assert [name for name in names if "clip" in name] == [
        "clip.mp4", "clip.mp4 0 - 1 s", "clip.mp4 1 - 2 s", "clip.mp4 2 - 3 s"]
    assert updated(every=1.0)[1] == 0 and len(updated()[2]) == 6


def test_windows_are_parts_of_the_clip(small, folder):
    _, found = searched(small, folder, "blue", "--every", 1)
    model = Plume.from_pretrained(small, "cpu")
    part, query = model.encode([{"video": str(folder / "clip.mp4"), "start": 1, "end": 2}, "blue"])
    scores = {name: score for score, name in found}
    assert_close(scores["clip.mp4 1 - 2 s"], float(part @ query), "window", 1e-3)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_is_stopped_goes_on(small, folder, monkeypatch, after):
    for n in range(12):
        picture("red", "bar", (60, 60), n).save(folder / f"{n}.png")
    model = Plume.from_pretrained(small, "cpu")
    cfg = evaluation.Config(batch_size=1, skip_bad=True)

    def opened():
        embedder = kept.Embedder(model, cfg, "single", None, str(folder / ".plume" / "embeddings"))
        return search.Index(str(folder / ".plume"), embedder, 0.3)

    files, _ = scan(folder, folder / ".plume")
    index, embed, calls = opened(), kept.Embedder.__call__, []

    def stopped(self, *args):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return embed(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(kept.Embedder, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            index.update(str(folder), files, 10**6)
    there = len(opened().items)
    assert there <= 4 * after
    again = opened()
    again.update(str(folder), files, 10**6)
    whole = {search.name_of(item) for item in again.items}
    assert len(again.items) == len(whole) == 12 + 4 + 1 + 9  # the clip, whole and in nine windows of 0.3 s
    tried = again.embedder.encoded + index.embedder.encoded
    assert tried in (len(whole) + 1, len(whole) + 2)  # the broken one again, when it was in the last chunk
    names = [search.name_of(item) for item in again.items]
    by_hand = model.encode([{"image": str(folder / "7.png")}], "single")[0]
    assert_close(again.vectors[names.index("7.png")], by_hand, "a vector stands at its name", 1e-5)


def test_other_modes_have_an_index_of_their_own_and_eval_shares_the_embeddings(small, folder):
    searched(small, folder, "x", "--mode", "single")
    printed, _ = searched(small, folder, "x")
    assert "6 items encoded" in printed
    assert "0 items encoded" in searched(small, folder, "x", "--mode", "single")[0]
    latent, auto = (searched(small, folder, "x", "--mode", mode)[1] for mode in ("latent", "auto"))
    assert latent == auto  # of a checkpoint that does not say when it is done
    embeddings = folder / ".plume" / "embeddings"
    assert len(list(embeddings.iterdir())) == 3
    task = folder / "image_ret" / "own"
    task.mkdir(parents=True)
    items = [dict(_id=name, image=f"deep/{name}.png") for name in ("red", "blue")]
    (task / "corpus.jsonl").write_text("\n".join(map(json.dumps, items)))
    (task / "queries.jsonl").write_text(json.dumps(dict(_id="q", image="deep/green.png")))
    (task / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\tred\t1\n")
    flags = ["--data", folder, "--ckpt", small, "--scores", folder / ".plume"]
    assert "3 items, 0 encoded, 3 known from before" in call("eval.py", *flags).stdout


class Reader(HTMLParser):
    """Pictures without a text in their place, and addresses outside of the file."""

    def __init__(self):
        super().__init__()
        self.images, self.wrong = 0, []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images += 1
            if not attributes.get("alt") or not attributes["src"].startswith("data:image/"):
                self.wrong.append(attributes)
        if tag in ("script", "link", "iframe"):
            self.wrong.append(tag)


def test_the_gallery_is_one_file_with_every_picture_and_odd_names_are_shown(small, folder):
    names = ['a "quoted" <b>.png', "two\nlines.png", "\u00fc\u4e2d\U0001f422.png", "n" * 200 + ".png"]
    for n, name in enumerate(names):
        picture("green", "bar", (90, 90), n).save(folder / name)
    os.rename(folder / names[-1], os.fsencode(folder) + b"/\xff.png")
    html = folder / "results.html"
    query = "is it a <red> & 'blue' bar?"
    printed, found = searched(small, folder, query, "--every", 1, "--html", html, "--count", 50)
    assert "two\\nlines.png" in printed and "\\xff.png" in printed
    text, reader = html.read_text(encoding="utf-8"), Reader()
    reader.feed(text)
    assert reader.images == len(found) == 12 and not reader.wrong
    assert "is it a &lt;red&gt;" in text and "&lt;b&gt;.png" in text and "http" not in text
    assert f"gallery: {html}, 12 of 12 results" in printed


def test_what_is_wrong_is_named(small, folder, tmp_path):
    for words, why in (
            ((tmp_path / "file",), "no such folder. Did you mean 'files'"),
            ((), "needs a folder"),
            ((folder, "two", "texts"), "needs a folder and perhaps a text in quotes"),
            ((folder, "x", "--cuont", 3), "Did you mean 'count'"),
            ((folder, "x", "--count", 0), "must be at least 1"),
            ((folder, "x", "--mode", "cot"), "needs latent, single or auto"),
            ((folder, "x", "--every", -1), "at least 0 seconds"),
            ((folder, "--html", "x.html"), "needs a query"),
            ((folder, "--image", "gone.png"), "'gone.png' does not exist"),
            ((folder, "x", "--index", folder / "notes.txt"), "name a folder with --index")):
        failed = call("tools.search", *words, "--ckpt", small, check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    printed, found = searched(small, empty, "x")
    assert "0 in the index" in printed and not found


def pdf_of(sizes):
    """The bytes of a PDF file with blank pages of these sizes, each with a grey box."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>",
               b"<</Type/Pages/Count %d/Kids[%s]>>" % (
                   len(sizes), b" ".join(b"%d 0 R" % (3 + 2 * i) for i in range(len(sizes))))]
    for i, (width, height) in enumerate(sizes):
        ink = b"%.1f g 10 10 %d %d re f" % (i / len(sizes), width // 2, height // 2)
        objects.append(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %d %d]/Contents %d 0 R>>" % (
            width, height, 4 + 2 * i))
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(ink), ink))
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj%sendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1, table, len(objects) + 1, len(out))
    return out + end


def test_pages_are_searched_where_a_reader_is_installed_and_otherwise_named(small, folder):
    (folder / "paper.pdf").write_bytes(pdf_of([(200, 300), (300, 200), (200, 200)]))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and no more")
    printed, found = searched(small, folder, "a page", "--html", folder / "found.html")
    pages = sorted(name for _, name in found if "paper.pdf" in name)
    if importlib.util.find_spec("pypdfium2") is None:
        print("pypdfium2 is not installed")
        assert "2 PDF files are left out: pip install pypdfium2" in printed and not pages
        return
    assert pages == ["paper.pdf page 1", "paper.pdf page 2", "paper.pdf page 3"]
    assert "broken.pdf: cannot be used as a PDF file" in (
        next((folder / ".plume").glob("*/bad.jsonl")).read_text())
    assert (folder / "found.html").read_text(encoding="utf-8").count("<img") == len(found)
    assert "0 items encoded" in searched(small, folder, "a page")[0]


def test_a_hundred_thousand_vectors_are_ranked_in_a_moment():
    rng = np.random.default_rng(0)
    index = SimpleNamespace(vectors=rng.standard_normal((100_000, 1536), np.float32), items=range(100_000))
    begun = time.perf_counter()
    found = search.Index.search(index, index.vectors[77], 10)
    took = time.perf_counter() - begun
    scores = index.vectors @ index.vectors[77]
    assert [row for _, row in found] == np.argsort(-scores)[:10].tolist() and found[0][1] == 77
    assert took < 5, took  # 0.1 s on two free cores; the tests run side by side
