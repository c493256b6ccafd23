"""The command python -m tools.search, on real files that change between two runs."""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import time
import warnings
from types import SimpleNamespace
from unittest import mock
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from engine import kept, stream
from files import pages
from files.errors import DataError
from model import Plume
from test_plume import assert_close
from tests.processes import call, run, Started
from tests.samples import in_one_space, ODD, odd_folder, pdf, picture, write_clip, write_lines
from tools import search_index
from tools.search_index import Index, media_of_item, name_of, scan

LINE = re.compile(r"^ *\d+ +(-?\d\.\d{3})  (.*)$", re.M)


@pytest.fixture
def folder(tmp_path):
    """Pictures, a clip of 2.5 seconds, a broken picture, and what is none of these."""
    root, deep = tmp_path / "files", tmp_path / "files" / "deep"
    (deep / "deeper").mkdir(parents=True)
    for colour in ("red", "green", "blue"):
        picture(colour, "bar").save(deep / f"{colour}.png")
    picture("red", "circle").save(deep / "deeper" / "CIRCLE.JPG", "JPEG")
    write_clip(root / "clip.mp4", [picture(c, "square") for c in ["red"] * 8 + ["blue"] * 12])
    (root / "broken.png").write_bytes(b"no picture")
    (root / "notes.txt").write_text("x")
    (root / ".hidden.png").write_bytes(b"x")
    (root / "around").symlink_to(root)
    return root


def searched(small, folder, *words):
    """The command with these words -> its lines, the results in order as {name: score}."""
    printed = call("tools.search", folder, *words, "--ckpt", small).stdout
    return printed, {name: float(score) for score, name in LINE.findall(printed)}


def opened(small, folder, size):
    """The folder's index in mode single, in batches of so many."""
    model, embeddings = Plume.from_pretrained(small, "cpu"), str(folder / ".plume" / "embeddings")
    return Index(str(folder / ".plume"), kept.Embedder(
        model, "single", None, size, skip_bad=True, folder=embeddings))


def update(index, folder, every):
    """-> what was done, names of the items"""
    files, _ = scan(folder, folder / ".plume", every)
    done = index.update(str(folder), files, 10**6).split("; ")[0]
    assert len(index.items) == len(index.vectors) and len({len(v) for v in index.vectors}) == 1
    return done, [name_of(item) for item in index.items]


def test_results_equal_encode_by_hand(small, folder):
    printed, found = searched(small, folder, "a red bar")
    assert "0 files as they were, 6 new or changed, 0 moved, 0 deleted; 6 items encoded, 5 in" in printed
    assert "1 others are no pictures, clips or pages: .txt 1" in printed
    assert "1 cannot be read" in printed and "broken.png: cannot be used as a picture" in printed
    names = ["clip.mp4", "deep/red.png", "deep/green.png", "deep/blue.png", "deep/deeper/CIRCLE.JPG"]
    model = Plume.from_pretrained(small, "cpu")
    items = [{"video" if name.endswith("mp4") else "image": str(folder / name)} for name in names]

    def check(found, query, mode="latent"):
        scores = model.encode(items, mode) @ model.encode([query], mode)[0]
        assert found.keys() == {*names} and [*found.values()] == sorted(found.values(), reverse=True)
        assert_close([found[name] for name in names], scores, "scores", 1e-3)

    check(found, "a red bar")
    query = str(folder / "deep" / "blue.png")
    _, found = searched(small, folder, "--image", query, "--count", 2)
    assert list(found)[0] == "deep/blue.png" and len(found) == 2
    _, found = searched(small, folder, "what is it?", "--image", query, "--mode", "single")
    check(found, {"image": query, "text": "what is it?"}, "single")
    names += [f"clip.mp4 {n} - {n + 1} s" for n in range(3)]
    items += [{"video": str(folder / "clip.mp4"), "start": n, "end": n + 1} for n in range(3)]
    check(searched(small, folder, "blue", "--every", 1)[1], "blue")


def test_only_what_is_new_is_embedded_and_only_what_changed_is_read(small, folder, monkeypatch):
    read_item = mock.Mock(side_effect=stream.read_item)
    monkeypatch.setattr(stream, "read_item", read_item)

    def updated(every=0.0):
        """-> what was done, how many items were decoded, names of the items"""
        read_item.reset_mock()
        done, names = update(opened(small, folder, 2), folder, every)
        return done, read_item.call_count, sorted(names)

    done, read, names = updated()
    assert (done, read) == ("0 files as they were, 6 new or changed, 0 moved, 0 deleted", 6)
    assert updated() == ("6 files as they were, 0 new or changed, 0 moved, 0 deleted", 0, names)
    (folder / "deep" / "red.png").rename(folder / "moved.png")
    (folder / "deep" / "green.png").unlink()
    shutil.copy(folder / "deep" / "blue.png", folder / "copy.png")
    os.utime(folder / "clip.mp4")
    assert updated()[:2] == ("3 files as they were, 3 new or changed, 1 moved, 1 deleted", 0)
    assert updated()[2] == ["clip.mp4", "copy.png", "deep/blue.png", "deep/deeper/CIRCLE.JPG", "moved.png"]
    picture("green", "circle").save(folder / "copy.png")  # changed
    picture("green", "bar").save(folder / "broken.png")  # mended, with what was deleted before
    done, read, names = updated()
    assert done == "4 files as they were, 2 new or changed, 0 moved, 0 deleted"
    assert read == 1 and "broken.png" in names
    windows = updated(every=1.0)
    assert windows[:2] == ("5 files as they were, 1 new or changed, 0 moved, 0 deleted", 3)
    assert updated(every=1.0)[1:] == (0, windows[2]) and len(windows[2]) == 9 and len(updated()[2]) == 6


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_is_stopped_goes_on(small, folder, after):
    for n in range(12):
        picture("red", "bar", (60, 60), n).save(folder / f"{n}.png")
    index, left = opened(small, folder, 1), [kept.Embedder.__call__] * after

    def stopped(self, *args):
        if not left:
            raise KeyboardInterrupt
        return left.pop()(self, *args)

    with mock.patch.object(kept.Embedder, "__call__", stopped), pytest.raises(KeyboardInterrupt):
        update(index, folder, 0.3)
    again = opened(small, folder, 1)
    assert len(again.items) <= 4 * after
    _, names = update(again, folder, 0.3)
    assert len(names) == len({*names}) == 12 + 4 + 1 + 9  # the clip, whole and in nine windows of 0.3 s
    tried = again.embedder.encoded + index.embedder.encoded
    assert tried in (len(names) + 1, len(names) + 2)  # the broken one again, when it was in the last chunk
    by_hand = again.embedder.model.encode([{"image": str(folder / "7.png")}], "single")[0]
    assert_close(again.vectors[names.index("7.png")], by_hand, "a vector stands at its name", 1e-5)


def test_other_modes_have_an_index_of_their_own_and_eval_shares_the_embeddings(small, folder):
    searched(small, folder, "x", "--mode", "single")
    assert "6 items encoded" in searched(small, folder, "x")[0]
    assert "0 items encoded" in searched(small, folder, "x", "--mode", "single")[0]
    latent, auto = (searched(small, folder, "x", "--mode", mode)[1] for mode in ("latent", "auto"))
    assert latent == auto  # of a checkpoint that does not say when it is done
    assert len(list((folder / ".plume" / "embeddings").iterdir())) == 2  # and there is no second index of it
    assert len(list((folder / ".plume").glob("*/items.jsonl"))) == 2
    task = folder / "image_ret" / "own"
    task.mkdir(parents=True)
    write_lines(task / "corpus.jsonl", [dict(_id=name, image=f"deep/{name}.png") for name in ("red", "blue")])
    write_lines(task / "queries.jsonl", [dict(_id="q", image="deep/green.png")])
    (task / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\tred\t1\n")
    flags = ["--data", folder, "--ckpt", small, "--scores", folder / ".plume"]
    assert "3 items, 0 encoded, 3 known from before" in call("eval.py", *flags).stdout


def test_json_is_all_that_stands_on_stdout_and_flags_may_stand_anywhere(small, folder):
    words = ["--json", "--count", 3, folder, "--every=1", "a red bar", "--html", folder / "x.html"]
    ran = run("tools.search", *words, "--ckpt", small)
    answer = json.loads(ran.stdout)
    assert ran.stdout.count("\n") == 1 and "6 new or changed" in ran.stderr and "broken.png" in ran.stderr
    _, found = searched(small, folder, "a red bar", "--every", 1, "--count", 3)
    assert {result["name"]: round(result["score"], 3) for result in answer["results"]} == found
    about = {key: answer[key] for key in ("folder", "mode", "similarity", "items", "kind")}
    assert about == dict(folder=str(folder), mode="latent", similarity="cosine", items=8, kind="")
    every = json.loads(searched(small, folder, "x", "--every", 1, "--json", "--count=50")[0])["results"]
    assert len(every) == 8 and all((folder / result["path"]).is_file() for result in every)
    parts = [(result["start"], result["end"]) for result in every if "start" in result]
    assert sorted(parts) == [(0, 1), (1, 2), (2, 3)]
    failed = call("tools.search", folder, "--json", "--ckpt", small, check=False)
    assert "--json: needs a query" in failed.stderr and failed.stdout == ""


def test_a_clip_is_a_query_and_kinds_are_chosen_without_another_index(small, folder):
    query, model = str(folder / "clip.mp4"), Plume.from_pretrained(small, "cpu")
    printed, found = searched(small, folder, "--video", query, "--count", 2)
    assert list(found)[0] == "clip.mp4" and abs(found["clip.mp4"] - 1) < 1e-3
    assert "2 of 5 items by cosine similarity" in printed
    printed, found = searched(small, folder, "--kind", "image", "red", "--video", query)
    assert "0 items encoded, 5 in the index" in printed and "4 of 4 items" in printed and len(found) == 4
    both = model.encode([{"text": "red", "video": query}])[0]
    expected = model.encode([{"image": str(folder / name)} for name in found]) @ both
    assert_close([*found.values()], expected, "scores", 1e-3)
    printed, found = searched(small, folder, "--kind=video,page", "red", "--every=1")
    assert set(found) == {"clip.mp4", *(f"clip.mp4 {n} - {n + 1} s" for n in range(3))}
    assert not searched(small, folder, "--kind=page", "red")[1]
    assert len(searched(small, folder, "red")[1]) == 5


def test_an_index_among_the_files_hides_only_its_own_files(small, folder):
    place, every = folder / "deep", []
    for mode in ("latent", "single", "latent"):
        printed, found = searched(small, folder, "x", "--index", place, "--mode", mode)
        assert len(found) == 5 and "1 others are no pictures, clips or pages: .txt 1" in printed
        every.append(printed)
    assert "5 in the index" in every[0] and "0 items encoded" in every[2]
    (place / "own.json").write_text("[]")
    (place / "items.jsonl").write_text("[]")
    inside = place / "embeddings"
    picture("red", "bar").save(inside / "mine.png")
    (inside / "mine.bin").write_text("x")
    printed, found = searched(small, folder, "x", "--index", place)
    assert "deep/embeddings/mine.png" in found and len(found) == 6
    assert "4 others are no pictures, clips or pages: .txt 1, .jsonl 1, .json 1, .bin 1" in printed
    printed, found = searched(small, folder, "x", "--index", folder)  # the folder itself
    assert len(found) == 6 and "0 items encoded" not in printed
    assert searched(small, folder, "x", "--index", folder)[1] == found


def test_ranks_are_refused_with_the_name_of_the_tool_that_has_them(small, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    failed = call("tools.search", folder, "x", "--ckpt", small, check=False)
    assert "torchrun ... -m tools.encode FOLDER DIR" in failed.stderr and not (folder / ".plume").exists()


def test_files_in_one_pass_are_found_by_latent_queries_and_the_index_remembers_that(small, folder, tmp_path):
    ours = in_one_space(small, tmp_path)
    latent = searched(ours, folder, "a red bar")[1]
    printed, found = searched(ours, folder, "a red bar", "--index_mode", "single")
    assert "files in mode single, queries in mode latent" in printed and "6 items encoded" in printed
    model = Plume.from_pretrained(ours, "cpu")
    items = [{"video" if name.endswith("mp4") else "image": str(folder / name)} for name in found]
    expected = model.encode(items, "single") @ model.encode(["a red bar"])[0]
    assert len(found) == 5 and [*found.values()] == sorted(found.values(), reverse=True)
    assert_close([*found.values()], expected, "scores", 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        printed, again = searched(ours, folder, "a red bar")
    assert again == found != latent and "0 items encoded" in printed
    printed, single = searched(ours, folder, "a red bar", "--mode", "single")
    assert "0 items encoded" in printed and "queries in mode" not in printed and single != found
    assert "queries in mode" not in searched(small, folder, "a red bar")[0]  # another checkpoint
    with pytest.warns(UserWarning, match="one space .*mode latent hardly find what is .* mode single"):
        searched(small, folder, "a red bar", "--index_mode", "single")
    assert searched(ours, folder, "a red bar", "--index_mode", "same")[1] == latent
    (folder / ".plume" / "modes.json").write_text("[")  # damaged
    assert searched(ours, folder, "a red bar")[1] == latent


def test_the_gallery_is_one_file_with_every_picture_and_odd_names_are_shown(small, folder, tmp_path):
    names = ['a "quoted" <b>.png', "two\nlines.png", "\u00fc\u4e2d\U0001f422.png", "n" * 200 + ".png"]
    for n, name in enumerate(names):
        picture("green", "bar", (90, 90), n).save(folder / name)
    os.rename(folder / names[-1], os.fsencode(folder) + b"/\xff.png")
    html = folder / "results.html"
    query = "is it a <red> & 'blue' bar?"
    printed, found = searched(small, folder, query, "--every", 1, "--html", html, "--count", 50)
    assert "two\\nlines.png" in printed and "\\xff.png" in printed
    text = html.read_text(encoding="utf-8")
    pictures = re.findall(r'<img [^<>]*alt="[^"<>]+"[^<>]* src="data:image/[^"<>]+">', text)
    assert text.count("<img") == len(pictures) == len(found) == 12
    assert not re.search("<(script|link|iframe)", text)
    assert "is it a &lt;red&gt;" in text and "&lt;b&gt;.png" in text and "http" not in text
    assert f"gallery: {html}, 12 of 12 items" in printed and text.count('<p class="soft">cosine ') == 12
    assert "overflow-wrap: anywhere" in text.split("body {")[1].split("}")[0]
    links = re.findall(r'<h2>\d+\. <a href="([^"]+)">', text)
    files = [html.parent / os.fsdecode(unquote_to_bytes(link.split("#")[0])) for link in links]
    assert len(files) == 12 and all(file.is_file() for file in files)
    assert "clip.mp4#t=1,2" in links and "two%0Alines.png" in links and "%FF.png" in links
    searched(small, folder, query, "--count", 5, "--html", tmp_path / "else.html")
    text = (tmp_path / "else.html").read_text(encoding="utf-8")
    assert "5 of 9 items" in text and text.count('<a href="files/') == 5


def stop_at_the_list(write, file, lines, seconds):
    """In place of write_lines: the vectors are written, the list that names them is not."""
    if file.endswith("items.jsonl"):
        print("vectors are written", flush=True)
        time.sleep(seconds)
    write(file, lines)


def stopped_at_the_list(small, folder, seconds):
    patch = "tools.search_index.write_lines", functools.partial(stop_at_the_list, seconds=seconds)
    started = Started("tools.search", folder, "--ckpt", small, patch=patch)
    started.wait_for("vectors are written")
    return started


def left_in(folder):
    """The files of the folder's only index beside its embeddings, and whether its list is whole."""
    (items,) = (folder / ".plume").glob("*/items.jsonl")
    head, *lines = map(json.loads, items.read_text().splitlines())
    good = [line for line in lines if "why" not in line]
    assert len(np.load(items.with_name(head["vectors"]))) == len(good)
    names = {path.name for path in items.parent.iterdir()}
    assert names == {head["vectors"], "items.jsonl", "bad.jsonl", ".plume.lock"}
    return sorted(line["path"] for line in good)


def test_two_updates_at_once_leave_one_index_that_is_whole(small, folder):
    first = stopped_at_the_list(small, folder, 5)
    picture("black", "bar").save(folder / "later.png")
    second = run("tools.search", folder, "a bar", "--ckpt", small)
    assert re.search(r"another run is at work on this index \(process \d+ on .*\): waiting", second.stdout)
    assert "5 files as they were, 1 new" in second.stdout or "6 files as they were, 1 new" in second.stdout
    assert first.wait() == 0 and "later.png" in left_in(folder) and len(left_in(folder)) == 6


def test_a_run_that_is_killed_between_two_files_leaves_an_index_that_is_whole(small, folder):
    names = []
    for change in ("none", "broken", "mended"):
        if change != "none":
            good = folder / "deep" / "red.png"
            good.write_bytes(b"x") if change == "broken" else picture("red", "bar").save(good)
        killed = stopped_at_the_list(small, folder, 60)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        printed, found = searched(small, folder, "a bar")
        names.append(left_in(folder))
        assert len(found) == len(names[-1]) == (4 if change == "broken" else 5), change
        assert f"{2 if change == 'broken' else 1} cannot be read" in printed
        assert "6 files as they were, 0 new" in searched(small, folder)[0]  # broken ones, too
    assert names[0] == names[2] and set(names[0]) - set(names[1]) == {"deep/red.png"}


@pytest.mark.parametrize("harm", ["vectors are gone", "vectors are cut off", "the list is cut off", "empty"])
def test_an_index_that_is_not_whole_is_made_anew(small, folder, harm):
    expected = searched(small, folder, "a bar")[1]
    (vectors,), (items,) = ((folder / ".plume").glob(f"*/{name}") for name in ("vectors-*", "items.jsonl"))
    if harm == "vectors are gone":
        vectors.unlink()
    elif harm == "vectors are cut off":
        vectors.write_bytes(vectors.read_bytes()[:-100])
    else:
        items.write_bytes(items.read_bytes()[:-9] if harm == "the list is cut off" else b"")
    printed, found = searched(small, folder, "a bar")
    assert found == expected and "5 items encoded" not in printed and left_in(folder)


@contextlib.contextmanager
def reading_only(folder):
    """Nothing new in it; whoever may write everywhere is somebody else meanwhile."""
    root, below = os.geteuid() == 0, [path for path in folder.rglob("*") if path.is_dir()]
    above = [path for path in folder.parents if root and not path.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in (folder, *below, *above)}
    try:
        for path in modes:
            path.chmod(0o755 if path in above else 0o555)
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


def test_an_index_that_cannot_be_written_is_searched_until_something_is_new(small, folder, tmp_path):
    os.remove(folder / "around")
    small = shutil.copytree(small, tmp_path / "small")
    words = ["tools.search", folder, "a bar", "--ckpt", small]
    with reading_only(tmp_path):
        refused = call(*words, check=False).stderr
    found = searched(small, folder, "a bar")[1]
    with reading_only(tmp_path):
        assert searched(small, folder, "a bar")[1] == found
    picture("black", "bar").save(folder / "later.png")
    with reading_only(tmp_path):
        late = call(*words, check=False).stderr
    for error in (refused, late):
        assert ".plume" in error and "--index" in error and "Permission" in error


def test_folders_in_one_index_are_told_apart_and_so_are_ways_to_read_them(small, tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, colour in zip(folders, ("red", "blue")):
        folder.mkdir()
        picture(colour, "square").save(folder / "x.bmp")
        os.utime(folder / "x.bmp", (4e9, 4e9))  # the same name, size and time
    place = ["--index", tmp_path / "index"]
    (first,), (second,) = (searched(small, folder, "red", *place)[1].values() for folder in folders)
    assert abs(first - second) > 1e-4 and searched(small, folders[0], "red", *place)[1] == {"x.bmp": first}
    monkeypatch.setattr(search_index, "__file__", __file__)
    printed, _ = searched(small, folders[0], "red", *place)
    assert "0 files as they were, 1 new" in printed and "0 items encoded" in printed


def test_a_folder_with_names_that_are_no_utf_8_is_searched(small, folder):
    odd = odd_folder(folder)
    for name in ("broken.png", "notes.txt"):
        os.rename(folder / name, odd / f"{ODD}{name[-4:]}")
    shutil.copy(folder / "clip.mp4", odd / f"{ODD}.mp4")
    shutil.copy(folder / "deep" / "red.png", odd / f"red{ODD}.png")
    (odd / f"cut{ODD}.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:900])
    (odd / f"x.{ODD}").write_text("x")
    words = [folder, "red", "--image", odd / f"red{ODD}.png", "--every", 1, "--ckpt", small]
    printed = run("tools.search", *words, "--html", odd / f"{ODD}.html", "--count", 50).stdout
    found = [name for _, name in LINE.findall(printed)]
    assert {r"\xff/red\xff.png", r"\xff/\xff.mp4", r"\xff/\xff.mp4 1 - 2 s"} <= {*found} and len(found) == 13
    assert "2 cannot be read" in printed and r".\xff 1" in printed and "gallery: " in printed
    assert re.search(r"\\xff/\\xff.png: cannot be used as a picture", printed)
    assert re.search(r"\\xff/cut\\xff.mp4: cannot be used as a video", printed)
    assert r"\xff/red\xff.png" in (odd / f"{ODD}.html").read_text(encoding="utf-8")
    other = run("tools.search", odd, "red", "--ckpt", small, "--index", odd / ODD).stdout
    assert r"red\xff.png" in other and len(LINE.findall(other)) == 2


def test_an_empty_folder_has_an_empty_index_and_a_file_is_no_place_for_one(small, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    printed, found = searched(small, tmp_path / "empty", "x")
    assert "0 in the index" in printed and not found
    failed = call("tools.search", folder, "--index", folder / "notes.txt", "--ckpt", small, check=False)
    assert failed.returncode == 1 and "name a folder with --index" in failed.stderr


def test_pages_are_searched_where_a_reader_is_installed_and_otherwise_named(small, folder):
    first, *others = [Image.new("L", size) for size in ((200, 300), (300, 200), (200, 200))]
    first.save(folder / "paper.pdf", save_all=True, append_images=others)
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and no more")
    printed, found = searched(small, folder, "a page", "--html", folder / "found.html")
    pages = sorted(name for name in found if "paper.pdf" in name)
    if importlib.util.find_spec("pypdfium2") is None:
        assert "2 PDF files are left out: pip install pypdfium2" in printed and not pages
        return
    assert pages == ["paper.pdf page 1", "paper.pdf page 2", "paper.pdf page 3"]
    bad = next((folder / ".plume").glob("*/bad.jsonl")).read_text()
    assert "broken.pdf: cannot be used as a PDF file" in bad
    assert (folder / "found.html").read_text(encoding="utf-8").count("<img") == len(found)
    assert "0 items encoded" in searched(small, folder, "a page")[0]


@pytest.fixture
def pages_of(tmp_path):
    """The function that gives the pages of a PDF file's bytes."""
    pytest.importorskip("pypdfium2")
    numbers = itertools.count()

    def pages_of(content, area=10**5):
        file = tmp_path / f"{next(numbers)}.pdf"
        file.write_bytes(content)
        return list(pages.pages(str(file), area))

    return pages_of


PAGE_OF = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] %s >>"
SIZED = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %s] >>"
FIELD = b"<< /Subtype /Widget /T (f) /Rect [20 80 280 140] /DA (/F 24 Tf 0 g) /F 4 /P 10 0 R %s >>"
LOOK = b"<< /Type /XObject /Subtype /Form /BBox [0 0 260 60] /Length 14 >> stream\n0 0 260 60 re f\nendstream"


@pytest.mark.parametrize("field", [
    b"/FT /Tx /V (Hello world)", b"/FT /Tx /V (Hello world) /AP << /N 6 0 R >>",
    b"/FT /Ch /Ff 131072 /Opt [(one) (two)] /V (two)", b"/FT /Btn /V /Yes /AS /Yes /MK << /CA (4) >>"])
def test_what_is_written_in_the_fields_of_a_form_is_drawn(pages_of, field):
    page = PAGE_OF % b"/Annots [5 0 R]"
    form, = pages_of(pdf(page, fields=b"5 0 R", more=[FIELD % field, LOOK]))
    empty, = pages_of(pdf(page, fields=b"5 0 R", more=[FIELD % b"/FT /Tx"]))
    assert form.size == empty.size and np.asarray(empty).min() > 250
    dark = np.asarray(form.convert("L")) < 128
    assert 100 < dark.sum() and not dark[: len(dark) // 4].any() and not dark[3 * len(dark) // 4 :].any()


def test_pages_have_the_size_that_they_are_shown_in_and_absurd_ones_are_refused(pages_of):
    content = pdf(PAGE_OF % b"", PAGE_OF % b"/Rotate 90", PAGE_OF % b"/CropBox [0 0 100 50]",
                  SIZED % b"0.0001 900000000", SIZED % b"1 90000", SIZED % b"900000000 900000000")
    plain, turned, cropped, long, narrow, large = pages_of(content, 300 * 200)
    assert (plain.size, turned.size, cropped.size) == ((300, 200), (200, 300), (347, 174))
    assert "0.0001x9e+08 points" in str(long) and "the limit is" in str(long)
    assert narrow.size[0] == 1 and large.size < (250, 250)


def test_a_page_that_cannot_be_drawn_is_named_and_the_others_are_searched(small, folder, pages_of):
    page = PAGE_OF % b""
    (folder / "paper.pdf").write_bytes(pdf(page, b"null", PAGE_OF % b"/Rotate 90", b"17", page))
    (folder / "none.pdf").write_bytes(pdf())
    (folder / "locked.pdf").write_bytes(pdf(page, more=[
        b"<< /Filter /Standard /V 1 /R 2 /P -4 /O (%s) /U (%s) >>" % (b"o" * 32, b"u" * 32)
    ]).replace(b"/Root", b"/ID [(i) (i)] /Encrypt 5 0 R /Root"))
    index = opened(small, folder, 2)
    _, names = update(index, folder, 0)
    assert [name for name in names if "pdf" in name] == [f"paper.pdf page {n}" for n in (1, 3, 5)]
    why = {(item["path"], item.get("page")): item["why"] for item in index.bad}
    assert why.keys() == {("broken.png", None), ("none.pdf", None), ("locked.pdf", None),
                          ("paper.pdf", 2), ("paper.pdf", 4)}
    for number in (2, 4):
        assert why["paper.pdf", number].startswith(f"paper.pdf page {number}: cannot be drawn: ")
    assert re.search("none.pdf: cannot be used as a PDF file", why["none.pdf", None])
    assert re.search("locked.pdf: cannot be used as a PDF file: .*password", why["locked.pdf", None])
    done, _ = update(opened(small, folder, 2), folder, 0)
    assert done.startswith("9 files as they were, 0 new or changed")
    with pytest.raises(DataError, match="cannot be drawn"):
        media_of_item(folder, dict(path="paper.pdf", kind="pdf", page=2))
    promising = pdf(page).replace(b"/Count 1 ", b"/Count 900000 ")  # the table of objects is mended
    with pytest.raises(DataError, match="page 1002 of 900000 and 1000 in front of it cannot be drawn"):
        pages_of(promising)


def test_clips_are_searched_by_every_suffix_and_sources_are_none(small, folder):
    write_clip(folder / "tape.mts", [picture("red", "square", (64, 64))] * 8, container=("mpegts", {}))
    (folder / "index.ts").write_text("export const G = 1;\n" * 99)
    files, others = scan(folder, folder / ".plume", 0)
    assert files["tape.mts"]["kind"] == "video" and "index.ts" not in files and others[".ts"] == 1
    assert "tape.mts" in update(opened(small, folder, 2), folder, 0)[1]


def test_a_hundred_thousand_vectors_are_ranked_in_a_moment():
    vectors = np.random.default_rng(0).standard_normal((100_000, 384), np.float32)
    index, begun = SimpleNamespace(vectors=vectors, items=range(100_000)), time.perf_counter()
    found = Index.search(index, vectors[77], 10)
    took = time.perf_counter() - begun
    expected = np.argsort(vectors @ vectors[77])[::-1][:10].tolist()
    assert [row for _, row in found] == expected and expected[0] == 77
    assert took < 5, took  # 0.1 s on two free cores; the tests run side by side
