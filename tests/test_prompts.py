"""A checkpoint's prompts: what a template is, and that every command puts it where training had it."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from engine.instructions import first_and_last, propose_prompts, template_in
from files.errors import DataError
from files.items import parse_item, parse_side, Side
from files.records import Pairs
from hub.prompts import keep_foreign, PROMPTS, template_of_prefix, with_prompt
from model import Plume
from tasks.find import find_tasks
from test_plume import assert_close, make_model
from tests.processes import call, run
from tests.samples import edit_json, in_one_space, NAMES, with_prompts, write_lines
from tools.encode_parts import load_vectors

FIND, REPRESENT = "Find the picture: {}", "Represent.{}"  # as in the records of make_world
LINE = re.compile(r"^ *\d+ +(-?\d\.\d{3})  (.*)$", re.M)


@pytest.fixture(scope="module")
def ckpt(small, tmp_path_factory):
    return with_prompts(small, tmp_path_factory.mktemp("prompts"), query=FIND, document=REPRESENT)


@pytest.fixture(scope="module")
def plume(ckpt):
    return Plume.from_pretrained(ckpt, "cpu")


@pytest.fixture
def pictures(world, tmp_path):
    """A folder of the world's pictures alone, and their paths."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(world / f"{name}.png", folder)
    return folder


# ---- what a prompt is
@pytest.mark.parametrize("template, why", [
    ("Find: ", "got 'Find: '; a prompt is a text that has {} once"), ("{} or {}", "has {} once"),
    (3, "got 3; a prompt is a text"), (None, "got None"), ("\udcff{}", "not valid Unicode")])
def test_a_template_without_exactly_one_place_for_the_text_is_refused(small, tmp_path, template, why):
    with pytest.raises(DataError) as refused:
        Plume.from_pretrained(small, "cpu", prompts=dict(query=template))
    assert str(refused.value).startswith(f"{small}: ") and "prompts: 'query'" in str(refused.value)
    assert why in str(refused.value)
    with pytest.raises(DataError, match="prompts: 'ask'"):
        Plume.from_pretrained(with_prompts(small, tmp_path, ask=template), "cpu")
    if isinstance(template, str):
        done = call("train.py", f"--query_prompt={template}", "--out", tmp_path / "out", check=False)
        assert why in done.stderr and not (tmp_path / "out").exists()


def test_prompts_that_are_no_object_or_have_no_name_are_refused(small, tmp_path):
    for prompts, why in (([FIND], "'prompts' must be of type dict"), ({"": "{}"}, "the name of a prompt")):
        with pytest.raises(DataError, match=why):
            Plume.from_pretrained(small, "cpu", prompts=prompts)


def test_checkpoints_of_before_have_prompts_that_do_nothing(small, tmp_path):
    old = with_prompts(small, tmp_path, query=FIND)
    block = json.loads((old / "config.json").read_text())["plume"]
    del block["prompts"]
    edit_json(old / "config.json", plume=block)
    m = Plume.from_pretrained(old, "cpu")
    assert m.settings["prompts"] == PROMPTS
    assert np.array_equal(m.encode_query(NAMES), m.encode(NAMES))
    assert np.array_equal(m.encode_document(NAMES), m.encode(NAMES))


@pytest.mark.parametrize("parts, expected", [
    ("text=a", "text=Q: a ?"), ("text=", "text=Q:  ?"), ("", "text=Q:  ?"),
    ("image=1", "image=1 text=Q:  ?"), ("image=1 text=", "image=1 text=Q:  ?"),
    ("image=1 video=2 text=a", "image=1 video=2 text=Q: a ?"),
    ("text=a image=1", "text=Q: a image=1 text= ?"),
    ("image=1 text=a image=2 text=b", "image=1 text=Q: a image=2 text=b ?"),
    ("image=1 text=a disc= text=own", "image=1 text=Q: a ? disc= text=own"),
    ("disc= text=own", "text=Q:  ? disc= text=own"),
])
def test_the_instruction_stands_behind_the_media_that_an_item_begins_with(parts, expected):
    def read(line):
        return [tuple(part.split("=")) for part in re.findall(r"\w+=.*?(?= \w+=|$)", line)]

    side = Side(read(parts), where="here")
    before = list(side.parts)
    assert with_prompt(side, "Q: {} ?").parts == read(expected)
    assert with_prompt(side, "Q: {} ?").where == "here" and side.parts == before
    assert with_prompt(side, "{}") is side


# ---- as in training
def test_what_encode_gives_with_a_prompt_is_what_the_record_gives_as_trained(plume, world):
    pairs = Pairs(str(world / "train.jsonl"))
    records = [pairs[i][:2] for i in range(0, len(pairs), 2)]  # a name, its picture
    queries = [query for query, _ in records]
    targets = [target for _, target in records]
    pictures = [{"image": str(world / f"{name}.png")} for name in NAMES]
    for name, side, target in zip(NAMES, queries, targets, strict=True):
        assert with_prompt(parse_item(name), FIND).key() == side.key()
        assert with_prompt(parse_item({"image": str(world / f"{name}.png")}), REPRESENT).key() == target.key()
    for how in (dict(), dict(mode="single"), dict(steps=2)):
        assert np.array_equal(plume.encode(NAMES, prompt="query", **how), plume.encode(queries, **how))
        assert np.array_equal(plume.encode_query(NAMES, **how), plume.encode(queries, **how))
        assert np.array_equal(plume.encode_document(pictures, **how), plume.encode(targets, **how))
    assert np.abs(plume.encode(NAMES) - plume.encode_query(NAMES)).max() > 1e-3


def test_an_unknown_prompt_is_named_and_bad_items_keep_their_numbers(plume):
    for name, why in (("qury", "Did you mean 'query'"), ("", "Known: query, document"), ([], "Known: query")):
        with pytest.raises(DataError, match=f"no such prompt.*{why}"):
            plume.encode(["red"], prompt=name)
    bad = {}
    vectors = plume.encode_query(["red", {"image": "gone.png"}, {"txt": 1}], bad=bad)
    assert bad.keys() == {1, 2} and bad[1].startswith("item 1: ") and np.isfinite(vectors[0]).all()


def test_in_one_space_encode_document_takes_one_pass_unless_told(ckpt, tmp_path):
    m = Plume.from_pretrained(in_one_space(ckpt, tmp_path), "cpu")
    with_it = [name.join(REPRESENT.split("{}")) for name in NAMES]
    assert_close(m.encode_document(NAMES), m.encode(with_it, "single"), "documents")
    assert_close(m.encode_document(NAMES, mode="latent"), m.encode(with_it), "as told")
    assert_close(m.encode_document(NAMES, steps=2), m.encode(with_it, steps=2), "steps")
    assert_close(m.encode_query(NAMES), m.encode([FIND.format(name) for name in NAMES]), "queries")


# ---- commands
def search(ckpt, *words):
    return {name: float(score) for score, name in
            LINE.findall(call("tools.search", *words, "--ckpt", ckpt).stdout)}


def scores_of(plume, world, query):
    """Of every picture, as the records have both sides."""
    items = [{"image": str(world / f"{name}.png"), "text": "Represent."} for name in NAMES]
    return plume.encode(items) @ plume.encode([f"Find the picture: {query}"])[0]


def test_search_asks_as_training_did_and_embeds_again_only_for_another_prompt(
        ckpt, plume, pictures, world, tmp_path):
    found = search(ckpt, pictures, "red bar")
    expected = dict(zip((f"{name}.png" for name in NAMES), scores_of(plume, world, "red bar")))
    assert len(found) == 10
    assert_close([*found.values()], sorted(expected.values(), reverse=True)[:10], "scores", 1e-3)
    assert_close([*found.values()], [expected[name] for name in found], "of these", 1e-3)
    other = with_prompts(ckpt, tmp_path, query="{}", document=REPRESENT)  # the same index
    assert "0 items encoded" in call("tools.search", pictures, "--ckpt", other).stdout
    bare = with_prompts(ckpt, tmp_path / "bare")
    assert "12 items encoded" in call("tools.search", pictures, "--ckpt", bare).stdout
    assert "0 items encoded" in call("tools.search", pictures, "--ckpt", ckpt).stdout


def test_encode_writes_the_prompt_into_the_manifest_and_search_finds_it_there(
        ckpt, plume, world, pictures, tmp_path):
    out = tmp_path / "vectors"
    call("tools.encode", pictures, out, "--ckpt", ckpt)
    names, vectors = load_vectors(out)
    items = [{"image": str(pictures / name), "text": "Represent."} for name in names]
    assert_close(vectors, plume.encode(items), "documents")
    assert json.loads((out / "manifest.json").read_text())["prompt"] == REPRESENT
    found = search(ckpt, "red bar", "--vectors", out, "--count", 12)
    expected = dict(zip((f"{name}.png" for name in NAMES), scores_of(plume, world, "red bar")))
    assert_close([found[name] for name in expected], [*expected.values()], "search", 1e-3)

    again = call("tools.encode", pictures, out, "--ckpt", with_prompts(ckpt, tmp_path, document=REPRESENT))
    assert "1 of them are there; 0 records" in again.stdout  # queries have nothing to do with it
    for flags, why in ((["--prompt="], "prompt 'Represent.{}', now '{}'"),
                       (["--prompt", "documnt"], "Did you mean 'document'")):
        done = call("tools.encode", pictures, out, "--ckpt", ckpt, *flags, check=False)
        assert why in done.stderr
    for flag, text in (("--prompt=", ""), ("--prompt=query", "Find the picture: ")):
        call("tools.encode", pictures, tmp_path / flag, "--ckpt", ckpt, flag)
        items = [{"image": str(pictures / name), "text": text} for name in names]
        assert_close(load_vectors(tmp_path / flag)[1], plume.encode(items), flag)
    with pytest.warns(UserWarning, match="have the prompt '{}', and the checkpoint's .* is 'Represent.{}'"):
        search(ckpt, "red bar", "--vectors", tmp_path / "--prompt=")


def test_evaluation_puts_prompts_around_your_folders_and_nothing_else(ckpt, small, plume, world, tmp_path):
    bare = tmp_path / "tasks"
    shutil.copytree(world, bare, ignore=shutil.ignore_patterns("*.mp4", "video_cls"))
    folder = bare / "tasks" / "image_ret" / "t2i"
    write_lines(folder / "queries.jsonl", [dict(_id=f"q{i}", text=name) for i, name in enumerate(NAMES)])
    documents = [dict(_id=name, image=f"../{name}.png") for name in NAMES]
    write_lines(folder / "corpus.jsonl", documents)

    def scored(checkpoint, data):
        file = tmp_path / "scores.json"
        call("eval.py", "--task=image_ret", "--data", data, "--ckpt", checkpoint, "--json", file)
        return json.loads(file.read_text())["tasks"]["image_ret/t2i"]

    as_trained, asked = scored(small, world / "tasks"), scored(ckpt, bare / "tasks")
    without = scored(small, bare / "tasks")
    assert asked["found"] == as_trained["found"] != without["found"]
    assert asked["prompts"] == dict(query=FIND, document=REPRESENT)
    names, make = find_tasks("", plume.processor, prompts=plume.settings["prompts"])
    _, without = find_tasks("", plume.processor)
    assert make(names[0]).queries[0].parts == without(names[0]).queries[0].parts  # turtle world has its own


# ---- training
def test_flags_go_into_the_checkpoint_and_init_keeps_what_they_do_not_name(world, tmp_path):
    def trained(out, *flags):
        done = run("train.py", "--data", world / "train.jsonl", "--out", tmp_path / out, "--steps=1",
                   "--global_batch=4", "--workers=0", *flags)
        m = Plume.from_pretrained(tmp_path / out / "checkpoint", "cpu")
        return m.settings["prompts"], done.stdout

    prompts, said = trained("a", "--query_prompt", FIND)
    assert prompts == PROMPTS | dict(query=FIND) and said.count("looked at") == 1
    assert "12 of 24 targets looked at" in said and "--document_prompt 'Represent.{}'" in said
    prompts, said = trained("b", "--init", tmp_path / "a" / "checkpoint", "--document_prompt", "This is {}.")
    assert prompts == dict(query=FIND, document="This is {}.") and "looked at" not in said


def test_search_finds_what_training_taught_and_bare_texts_do_not(pictures, tmp_path):
    """The command that docs/training.md names: -s shows the figures."""
    query, document = "Find the picture that is described: {}", "Represent this picture.{}"
    rows = [dict(qry=query.format(name), pos=dict(text=document.format(""), image=f"{name}.png"))
            for name in NAMES]
    write_lines(pictures / "pairs.jsonl", rows)
    run("train.py", "--data", pictures / "pairs.jsonl", "--out", tmp_path, "--steps=40", "--global_batch=12",
        "--segments=1", "--gate=0", "--replay=0", "--lr=2e-3", "--workers=0", "--query_prompt", query,
        "--document_prompt", document)
    ckpt = tmp_path / "checkpoint"
    plume, right = Plume.from_pretrained(ckpt, "cpu"), np.arange(len(NAMES))
    images = [str(pictures / f"{name}.png") for name in NAMES]
    trained = [dict(text=row["pos"]["text"], image=image) for row, image in zip(rows, images)]

    def hit(queries, documents):
        return float(((queries @ documents.T).argmax(1) == right).mean())

    exact = hit(plume.encode([row["qry"] for row in rows]), plume.encode(trained))
    bare = hit(plume.encode(NAMES), plume.encode([dict(image=image) for image in images]))
    first = [next(iter(search(ckpt, pictures, name, "--count=1"))) for name in NAMES]
    found = float(np.mean([file == f"{name}.png" for file, name in zip(first, NAMES)]))
    print(f"hit@1: the records' texts {exact:.2f}, tools.search {found:.2f}, bare texts {bare:.2f}")
    assert exact >= 0.9 and found >= 0.9 * exact and bare <= 0.6 * exact


def test_a_text_in_front_of_pictures_is_not_proposed():
    """No prompt could stand there."""
    for parts in (["text", "image"], ["text", "image", "text"], ["text", "video"]):
        assert first_and_last(Side([(kind, "Find what looks like this: ") for kind in parts])) == ("", "")
    assert first_and_last(Side([("image", "x.png"), ("text", "What?")])) == ("What?", "What?")


def test_a_text_in_front_with_several_places_is_refused():
    assert template_of_prefix("Find: ") == "Find: {}" and template_of_prefix("{} here") == "{} here"
    with pytest.raises(DataError, match="json {} and {}.*once"):
        template_of_prefix("json {} and {} ")


@pytest.mark.parametrize("texts, template", [
    (["Find the picture: red", "Find the picture: rose"], "Find the picture: {}"),
    (["query: red car", "query: red bus", "query: a"], "query: {}"),
    (["Instruct: x\nQuery:red", "Instruct: x\nQuery:rose"], "Instruct: x\nQuery:{}"),
    (["Represent this picture."] * 3, "Represent this picture.{}"),
    (["why? In one word.", "who is it? In one word."], "{} In one word."),
    (["Query: red? Say yes.", "Query: blue? Say yes."], "Query: {} Say yes."),
    (["找图片：红", "找图片：蓝"], "找图片：{}"),
    (["red car", "red bus"], "{}"), (["the red", "the blue"], "{}"), (["apple"] * 4, "{}"),
    (["", ""], "{}"), (["Find {} : a", "Find {} : b"], "{}"), (["Find: a", "Look: b"], "{}"),
])
def test_what_all_texts_have_in_common_is_proposed_when_it_is_an_instruction(texts, template):
    ends = [first_and_last(parse_item(text)) for text in texts]
    assert template_in(ends) == template
    if template != "{}":  # text by text it gives back what the file has
        before, behind = template.split("{}")
        for text in texts:
            rest = text[len(before) : len(text) - len(behind)]
            assert with_prompt(parse_item(rest), template).parts == [("text", text)]


def test_the_most_frequent_instruction_is_named_and_flags_and_few_pairs_are_silent(tmp_path, capsys):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is shown?\n<disc_emb>\nthink"}]
    asked = dict(conversations=turns, image="a.png")
    rows = [dict(dataset_name="a", qry=f"Find it: {name}", pos=f"{name} {i}")
            for i, name in enumerate(NAMES)]
    rows += [dict(dataset_name="b", qry=asked, pos=name) for name in NAMES * 2]
    rows += [dict(dataset_name="c", qry="Too few: x", pos="x")]
    write_lines(tmp_path / "pairs.jsonl", rows)
    pairs = Pairs(str(tmp_path / "pairs.jsonl"))

    def said(*given, prompts=PROMPTS, **flags):
        cfg = SimpleNamespace(**dict(data="pairs.jsonl", resume=False) | flags)
        propose_prompts(cfg, {*given}, pairs, prompts)
        return capsys.readouterr().out

    assert said() == ("24 of 37 queries looked at have one instruction, the checkpoint's prompt 'query' is "
                      "'{}'; to keep it there: --query_prompt 'What is shown?\n{}'\n")
    assert not said("query_prompt") and not said(resume=True) and not said(data="")
    assert not said(prompts=PROMPTS | dict(query="What is shown?\n{}"))
    assert parse_side(asked, str(tmp_path), "x").parts[1] == ("text", "What is shown?\n")


# ---- for sentence-transformers
def test_its_files_have_the_prompts_anew_but_what_others_changed_stays(tmp_path):
    folder, m = tmp_path / "ck", make_model(prompts=dict(query=FIND, ask="{}?")).float()
    config = folder / "config_sentence_transformers.json"

    def saved(**prompts):
        Plume.from_pretrained(folder, "cpu", prompts=prompts).save_pretrained(folder)
        return json.loads(config.read_text())["prompts"]

    m.save_pretrained(folder)
    first = dict(query="Find the picture: ", document="", ask="{}?")
    assert json.loads(config.read_text())["prompts"] == first
    assert json.loads(config.read_text())["default_prompt_name"] is None
    assert saved(query="Look: {}") == first | dict(query="Look: ")
    edit_json(config, prompts=dict(query="Theirs: ", document="", ask="{}?", more="More: "))
    assert saved(query="Seek: {}", document=REPRESENT) == dict(
        query="Theirs: ", document="Represent.", ask="{}?", more="More: ")
    edit_json(config, prompts=dict(more="More: "))  # as of a checkpoint whose own were written by hand
    assert saved(query="Again: {}") == dict(more="More: ", query="Again: ", document="Represent.", ask="{}?")


def test_of_prompts_in_files_only_foreign_ones_win():
    before, ours = dict(a="1", b="2", c="3"), dict(a="1", b="new", d="4")
    theirs = dict(a="1", b="2", c="3", e="5")
    assert keep_foreign(theirs, before, ours) == dict(a="1", b="new", d="4", e="5")
    assert keep_foreign(dict(b="own", d="own"), before, ours) == dict(a="1", b="own", d="own")
    assert keep_foreign({}, {}, ours) == ours
    assert keep_foreign(dict(b="", x=""), before, ours) == dict(a="1", b="new", d="4", x="")
    assert keep_foreign(dict(a="1"), dict(a="1", b=""), dict(a="", b="")) == dict(a="")
