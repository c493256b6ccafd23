"""Retrieval tasks from folders: what is read, and what is refused."""

import json
import shutil

import pytest

import eval as evaluation
from data import DataError
from tasks.beir import list_tasks, read_task
from test_plume import call


def test_tasks_say_what_is_wrong(world, tmp_path):
    def broken(file, change, why):
        shutil.rmtree(tmp_path / "tasks", ignore_errors=True)
        shutil.copytree(world / "tasks", tmp_path / "tasks")
        for f in world.glob("*.*"):
            shutil.copy(f, tmp_path)
        path = tmp_path / "tasks" / "image_ret" / "t2i" / file
        path.write_text(change(path.read_text()))
        with pytest.raises(DataError, match=why):
            read_task(str(tmp_path / "tasks"), "image_ret/t2i")

    broken("qrels.tsv", lambda s: s.replace("q0\tred square\t1\n", ""), "query 'q0' has no relevant document in qrels")
    broken("qrels.tsv", lambda s: s.split("\n", 1)[1], "line 1 must be a header")
    broken("qrels.tsv", lambda s: s + "q0\tred square\t2\n", "line 14: .* was judged 1 before")
    broken("queries.jsonl", lambda s: "", "queries.jsonl: no record")
    broken("queries.jsonl", lambda s: s.replace('"q0"', '"q0", "candidates": 5'), "must be a list of ids")
    broken("qrels.tsv", lambda s: s + "q0\tno such\t1\n", "line 14: needs a known query id")
    broken("corpus.jsonl", lambda s: s + s.splitlines()[0], "record 13: the id 'red square' stands there twice")
    broken("corpus.jsonl", lambda s: s.replace("../red bar.png", "../gone.png"), "gone.png' does not exist")
    broken("queries.jsonl", lambda s: s.replace('"q0"', '"q0", "candidates": ["blue bar"]'), "no relevant document among its candidates")
    broken("queries.jsonl", lambda s: s.replace('"q0"', '"q0", "candidate": ["blue bar"]'), "unknown key 'candidate'")
    broken("qrels.tsv", lambda s: s.replace("query-id\tcorpus-id\tscore", "query-id\tdoc\tscore"), "line 1 must be a header with the columns query-id, corpus-id, score")
    broken("qrels.tsv", lambda s: s.replace("query-id\tcorpus-id\tscore", "query-id\tcorpus-id\tscore\tnote"), "line 1 must be a header")
    broken("qrels.tsv", lambda s: s + "q0\tred square\t1\t1\n", "line 14: needs")
    broken("corpus.jsonl", lambda s: s.replace('"image"', '"video": "", "image"', 1), "corpus.jsonl: record 1: video is an empty path")
    broken("corpus.jsonl", lambda s: s.replace('"text"', '"text": "a", "text"', 1), "record 1: the key 'text' stands twice")
    broken("corpus.jsonl", lambda s: s.replace('"text"', '"title": 3, "text"', 1), "record 1: 'title' and 'text' must be strings")
    with pytest.raises(DataError, match="Did you mean 'image_ret'"):
        evaluation.select(list_tasks(str(world / "tasks")), "image_rett", "root")


def test_qrels_are_read_by_the_names_of_their_columns(world, tmp_path):
    expected = read_task(str(world / "tasks"), "image_ret/t2i")
    rows = [line.split("\t") for line in (world / "tasks/image_ret/t2i/qrels.tsv").read_text().splitlines()]
    for f in world.glob("*.*"):
        shutil.copy(f, tmp_path)
    shutil.copytree(world / "tasks", tmp_path / "tasks")
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        for spell in (str, lambda name: name.upper().replace("-", "_")):
            lines = [[row[i] for i in order] for row in [list(map(spell, rows[0])), *rows[1:]]]
            (tmp_path / "tasks/image_ret/t2i/qrels.tsv").write_text("".join("\t".join(line) + "\r\n" for line in lines))
            assert read_task(str(tmp_path / "tasks"), "image_ret/t2i").relevant == expected.relevant


def test_beir_s_own_files_are_read_as_its_loader_reads_them(small, tmp_path):
    """Title and text with a blank between, stripped; only the queries that qrels/test.tsv judges."""
    folder = tmp_path / "text_ret" / "scifact"
    (folder / "qrels").mkdir(parents=True)
    corpus = [("4983", "Microstructural development", "of human newborn"), ("5836", "", "no title "), ("7912", "only a title", "")]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "title": title, "text": text, "metadata": {"url": "x"}}) + "\n" for i, title, text in corpus))
    queries = [("0", "0-dimensional biomaterials"), ("2", "of the training set"), ("3", "an only title")]
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": i, "text": text, "metadata": {}}) + "\n" for i, text in queries))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n2\t4983\t1\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t4983\t1\n3\t7912\t1\n3\t5836\t0\n")
    task = read_task(str(tmp_path), *list_tasks(str(tmp_path)))
    assert [s.parts for s in task.corpus] == [[("text", t)] for t in ("Microstructural development of human newborn", "no title", "only a title")]
    assert task.query_ids == ["0", "3"] and task.relevant == [{0: 1}, {2: 1}] and task.about == dict(not_judged=1)
    assert "1 queries are not judged" in call("eval.py", "--data", tmp_path, "--ckpt", small, "--task=all").stdout
    (folder / "queries.jsonl").write_text((folder / "queries.jsonl").read_text().replace('"text"', '"title": "T", "text"', 1))
    with pytest.raises(DataError, match="queries.jsonl: record 1: unknown key 'title'"):  # its loader does not read one there
        read_task(str(tmp_path), "text_ret/scifact")
    (folder / "queries.jsonl").write_text((folder / "queries.jsonl").read_text().replace('"title": "T", ', ""))
    (folder / "qrels.tsv").write_text((folder / "qrels" / "test.tsv").read_text())  # our own layout: every query counts
    with pytest.raises(DataError, match="query '2' has no relevant document in qrels.tsv"):
        read_task(str(tmp_path), "text_ret/scifact")
