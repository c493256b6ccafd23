"""Retrieval tasks from folders: what is read, and what is refused."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from engine import kept
from files.clips import load_frames
from files.errors import DataError
from model import Plume
from tasks.beir import AllBut, list_tasks, read_task
from tasks.find import select
from test_plume import assert_close
from tests.processes import call
from tests.samples import picture, write_clip, write_lines
from tests.test_checkpoints import LFS

HEADER = "query-id\tcorpus-id\tscore"


def copy_world(world, folder):
    """The world's media and tasks -> the folder of one task in the copy."""
    for file in world.glob("*.*"):
        shutil.copy(file, folder)
    shutil.copytree(world / "tasks", folder / "tasks")
    return folder / "tasks" / "image_ret" / "t2i"


WRONG = [  # file, a pattern and what takes its place, what the error says
    ("qrels.tsv", "q0\tred square\t1\n", "", "query 'q0' has no relevant document in qrels"),
    ("qrels.tsv", r"\A.*\n", "", "line 1 must be a header"),
    ("qrels.tsv", r"\Z", "q0\tred square\t2\n", "line 14: .* was judged 1 before"),
    ("qrels.tsv", r"\Z", "q0\tno such\t1\n", "line 14: needs a known query id"),
    ("qrels.tsv", r"\Z", "q0\tred square\t1\t1\n", "line 14: needs"),
    ("qrels.tsv", HEADER, "query-id\tdoc\tscore",
     "line 1 must be a header with the columns query-id, corpus-id, score"),
    ("qrels.tsv", HEADER, HEADER + "\tnote", "line 1 must be a header"),
    ("queries.jsonl", "(?s).*", "", "queries.jsonl: no record"),
    ("queries.jsonl", '"q0"', '"q0", "candidates": 5', "must be a list of ids"),
    ("queries.jsonl", '"q0"', '"q0", "candidates": ["red square", "blue bar", "red square"]',
     "queries.jsonl: record 1: candidate 'red square' stands there twice"),
    ("queries.jsonl", '"q0"', '"q0", "candidates": ["blue bar"]',
     "no relevant document among its candidates"),
    ("queries.jsonl", '"q0"', '"q0", "candidate": ["blue bar"]', "unknown key 'candidate'"),
    *[(file, r"(?s)\A.*\Z", LFS, f"{file}: .*; this file is a Git LFS pointer, .*: git lfs pull")
      for file in ("qrels.tsv", "queries.jsonl", "corpus.jsonl")],
    ("corpus.jsonl", r"(?s)\A(.*?\n)(.*)", r"\1\2\1", "record 13: the id 'red square' stands there twice"),
    ("corpus.jsonl", "../red bar.png", "../gone.png", "gone.png' does not exist"),
    ("corpus.jsonl", '"image"', '"video": "", "image"', "corpus.jsonl: record 1: video is an empty path"),
    ("corpus.jsonl", '"text"', '"text": "a", "text"', "record 1: the key 'text' stands twice"),
    ("corpus.jsonl", '"text"', '"title": 3, "text"', "record 1: 'title' and 'text' must be strings"),
]


def test_tasks_say_what_is_wrong(world, tmp_path):
    folder = copy_world(world, tmp_path)
    for file, pattern, other, why in WRONG:
        right = (folder / file).read_text()
        (folder / file).write_text(re.sub(pattern, other, right))
        with pytest.raises(DataError, match=why):
            read_task(str(tmp_path / "tasks"), "image_ret/t2i")
        (folder / file).write_text(right)
    with pytest.raises(DataError, match="Did you mean 'image_ret'"):
        select(list_tasks(str(world / "tasks")), "image_rett", "root")


def test_parts_of_a_clip_are_documents_of_their_own(small, tmp_path):
    clip = tmp_path / "clip.mp4"  # of two seconds, eight frames each
    write_clip(clip, [picture(colour, "bar") for colour in ["red"] * 8 + ["blue"] * 8])
    folder = tmp_path / "video_mret" / "parts"
    folder.mkdir(parents=True)
    item = dict(video=clip.name)
    corpus = [item | dict(_id="red", end=1.0), item | dict(_id="blue", start=1), item | dict(_id="both")]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (folder / "queries.jsonl").write_text(json.dumps(item | dict(_id="q", start=1.0, end=2)))
    (folder / "qrels.tsv").write_text(f"{HEADER}\nq\tblue\t1\n")
    task = read_task(str(tmp_path), "video_mret/parts")
    model = Plume.from_pretrained(small)
    embedder = kept.Embedder(model, "latent", 8)
    vectors, _ = embedder(task.queries + task.corpus, "parts")
    frames = load_frames(str(clip), 16)
    by_hand = model.encode([dict(video=part) for part in (frames[8:], frames[:8], frames[8:], str(clip))])
    assert_close(vectors, by_hand, "parts and their frames")
    assert np.abs(by_hand[1] - by_hand[2]).max() > 1e-3
    ranked = evaluation.evaluate(task, (vectors[:1], vectors[1:]))
    assert ranked["hit@1"] == 1 and list(ranked["found"]["q"])[0] == "blue"


def test_qrels_are_read_by_the_names_of_their_columns(world, tmp_path):
    expected = read_task(str(world / "tasks"), "image_ret/t2i")
    path = copy_world(world, tmp_path) / "qrels.tsv"
    _, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    for header in (HEADER, "QUERY_ID\tCORPUS_ID\tSCORE"):
        for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
            lines = []
            for row in [header.split("\t"), *rows]:
                lines.append("\t".join(row[i] for i in order) + "\r\n")
            path.write_text("".join(lines))
            assert read_task(str(tmp_path / "tasks"), "image_ret/t2i").relevant == expected.relevant


def test_beir_s_own_files_are_read_as_its_loader_reads_them(small, tmp_path):
    """Title and text with a blank between, stripped; only the queries that qrels/test.tsv judges."""
    folder = tmp_path / "text_ret" / "scifact"
    (folder / "qrels").mkdir(parents=True)
    about = {"url": "x"}
    corpus = [
        dict(_id="4983", title="Microstructural development", text="of human newborn", metadata=about),
        dict(_id="5836", title="", text="no title ", metadata=about),
        dict(_id="7912", title="only a title", text="", metadata=about),
    ]
    queries = [
        dict(_id="0", text="0-dimensional biomaterials", metadata={}),
        dict(_id="2", text="of the training set", metadata={}),
        dict(_id="3", text="an only title", metadata={}),
    ]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)) + "\n")
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)) + "\n")
    (folder / "qrels" / "train.tsv").write_text(f"{HEADER}\n2\t4983\t1\n")
    (folder / "qrels" / "test.tsv").write_text(f"{HEADER}\n0\t4983\t1\n3\t7912\t1\n3\t5836\t0\n")
    task = read_task(str(tmp_path), *list_tasks(str(tmp_path)))
    assert [side.parts for side in task.corpus] == [
        [("text", "Microstructural development of human newborn")],
        [("text", "no title")],
        [("text", "only a title")],
    ]
    assert task.query_ids == ["0", "3"]
    assert task.relevant == [{0: 1}, {2: 1}]
    assert task.about == dict(not_judged=1)
    printed = call("eval.py", "--data", tmp_path, "--ckpt", small, "--task=all").stdout
    assert "1 queries are not judged" in printed

    # its loader reads no title of a query
    right = (folder / "queries.jsonl").read_text()
    (folder / "queries.jsonl").write_text(right.replace('"text"', '"title": "T", "text"', 1))
    with pytest.raises(DataError, match="queries.jsonl: record 1: unknown key 'title'"):
        read_task(str(tmp_path), "text_ret/scifact")
    (folder / "queries.jsonl").write_text(right)

    # in our own layout every query counts
    shutil.copy(folder / "qrels" / "test.tsv", folder / "qrels.tsv")
    with pytest.raises(DataError, match="query '2' has no relevant document in qrels.tsv"):
        read_task(str(tmp_path), "text_ret/scifact")


OWN = {  # qrels of queries a, b, c, (candidates of a), documents that may be found for a, hit@1
    "it is not found": ([("a", "b"), ("b", "a"), ("c", "a")], None, "bc", 1),
    "it may be judged wrong": ([("a", "a", 0), ("a", "b"), ("b", "a"), ("c", "a")], None, "bc", 1),
    "unless it is right": ([("a", "a"), ("b", "a"), ("c", "c")], None, "abc", 1),
    "or one of the right ones": ([("a", "b"), ("a", "a"), ("b", "a"), ("c", "a")], None, "abc", 1),
    "or a candidate": ([("a", "b"), ("b", "a"), ("c", "a")], ["a", "b"], "ab", 2 / 3),
}


@pytest.mark.parametrize("case", OWN)
def test_a_document_with_the_query_s_own_id_does_not_count(tmp_path, case):
    """ArguAna: the query is a document itself, and would always be the first that is found."""
    rows, among, found, hit = OWN[case]
    folder, ids = tmp_path / "text_ret" / "own", ["a", "b", "c"]
    folder.mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [dict(_id=name, text=name) for name in ids])
    first = dict(_id="a", text="a") | (dict(candidates=among) if among else {})
    write_lines(folder / "queries.jsonl", [first, dict(_id="b", text="b"), dict(_id="c", text="c")])
    qrels = ["\t".join([*row[:2], str(row[2] if row[2:] else 1)]) for row in rows]
    (folder / "qrels.tsv").write_text("\n".join([HEADER, *qrels]))
    task = read_task(str(tmp_path), "text_ret/own")
    corpus = F.normalize(torch.tensor([[1.0, 0, 0], [0.9, 0.5, 0], [0.7, 0, 0.7]]), dim=1)
    whole = corpus, [None] * 3
    scores = evaluation.evaluate(*evaluation.without_bad(task, whole, whole))  # the queries are the documents
    assert set(scores["found"]["a"]) == set(found)
    sizes = [len(found) if name == "a" else 3 - ((name, name) not in rows) for name in ids]
    assert scores["candidates"] == pytest.approx(np.mean(sizes))
    assert scores["hit@1"] == pytest.approx(hit)
    assert scores["ranks"].keys() == {*ids}
    task = replace(task, relevant=[{2: 1}] * 3, candidates=[AllBut(1, 3), AllBut(0, 3), None])
    rest, _ = evaluation.without_bad(task, whole, (corpus, ["broken", None, None]))
    assert rest.candidates == [AllBut(0, 2), None, None]  # of the rows that are left
