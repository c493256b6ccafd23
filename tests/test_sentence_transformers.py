"""A checkpoint folder is a model of sentence-transformers: the same vectors, its losses, its files."""

import copy
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import collate
from engine.stream import encoding
from files.errors import DataError
from files.items import Side
from files.records import Pairs
from hub.isolated import NAMES as OURS
from model import Plume
from test_plume import assert_close, gradients, HERE, mixed_items, rendered
from tests.processes import call
from tests.samples import in_one_space, NAMES, with_prompts
from tests.test_house import copy_code, run

st = pytest.importorskip("sentence_transformers", "6.2", reason="needs: pip install sentence-transformers")

from sentence_transformers.sentence_transformer import losses


def forget(monkeypatch, *names):
    """As if Python had not imported these modules and packages."""
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def load(monkeypatch, tmp_path):
    """transformers copies a checkpoint's module into its cache, here one of our own, and imports it there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    forget(monkeypatch, "transformers_modules")

    def load(folder, **settings):
        return st.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **settings)

    return load


@pytest.fixture
def plume(small):
    return Plume.from_pretrained(small, "cpu")


def test_the_same_batches_give_the_same_bits_and_others_the_same_numbers(load, small, plume, world):
    m, items = load(small), mixed_items(world)
    assert np.array_equal(m.encode(items, batch_size=1), plume.encode(items, batch_size=1))
    (together,) = encoding(plume, items, batch_size=len(items), sort=False)
    with torch.no_grad():
        assert np.array_equal(m(m.preprocess(items))["sentence_embedding"], together)
    many = items * 7
    vectors = m.encode(many, batch_size=4)
    assert vectors.dtype == np.float32
    assert_close(vectors, plume.encode(many), "other batches")
    assert_close(m.encode("red"), plume.encode(["red"])[0], "a single item")
    for how in (dict(mode="single"), dict(steps=2), dict(dim=16), dict(mode="cot", limit=3),
                dict(mode="auto", done=0.1)):
        assert_close(m.encode(items, **how), plume.encode(items, **how), str(how))


def test_a_prompt_stands_in_front_of_the_text_and_behind_the_picture(load, small, plume, world):
    m, red = load(small, prompts=dict(ask="Which? ")), str(world / "red bar.png")
    items = ["red", {"image": red}, {"image": red, "text": "bar"}, Path(red)]
    texts = ("Which? ", "Which? bar", "Which? ")
    expected = ["Which? red"] + [{"image": red, "text": text} for text in texts]
    assert_close(m.encode(items, prompt_name="ask"), plume.encode(expected), "prompt")
    assert_close(m.encode_query(items), plume.encode(items), "none of its own")


def test_in_one_space_documents_take_one_pass_and_queries_think(load, small, plume, world, tmp_path):
    items = mixed_items(world)
    m = load(in_one_space(small, tmp_path))
    latent, single = plume.encode(items), plume.encode(items, "single")
    assert_close(m.encode_document(items), single, "documents")
    for how, expected in ((dict(mode="latent"), latent), (dict(steps=2), plume.encode(items, steps=2))):
        assert_close(m.encode_document(items, **how), expected, f"documents, {how}")
    assert_close(m.encode_query(items), latent, "queries")
    assert_close(m.encode(items), latent, "neither")
    assert_close(load(small).encode_document(items), latent, "of two spaces")


def test_training_ends_the_claim_of_one_space_and_says_so(load, small, world, tmp_path):
    m = load(in_one_space(small, tmp_path)).train()
    loss = losses.MultipleNegativesRankingLoss(m)
    features = [m.preprocess(column) for column in triplets(world)]
    with torch.no_grad():
        loss(features, None)
    assert m[0].plume.settings["one_space"]
    with pytest.warns(UserWarning, match="does not keep latent and single-pass embeddings in one space"):
        loss(features, None)
    m.save_pretrained(str(tmp_path / "trained"))
    assert not Plume.from_pretrained(tmp_path / "trained", "cpu").settings["one_space"]


def test_a_turn_of_the_user_is_the_item_with_its_media_in_the_same_places(load, small, plume, world):
    m, red, clip = load(small), str(world / "red bar.png"), str(world / "green circle.mp4")
    parts = [("text", "first <image> "), ("image", red), ("text", " then "), ("video", clip)]
    content = [dict([("type", kind), (kind, value)]) for kind, value in parts]
    turns = [[dict(role="user", content=content)], dict(role="user", content="red")]
    assert_close(m.encode(turns), plume.encode([Side(parts), "red"]), "turns")
    with pytest.raises(DataError, match="one turn of the user"):
        m.encode([[dict(role="system", content="x"), dict(role="user", content="y")]])


def test_what_it_offers_and_what_it_refuses(load, small):
    m = load(small)
    assert m.modalities == ["text", "image", "video", "message"] and m.similarity_fn_name == "cosine"
    assert (m.get_embedding_dimension(), m.max_seq_length) == (128, 512)
    vectors = m.encode(NAMES, convert_to_tensor=True)
    assert_close(m.similarity(vectors, vectors), vectors @ vectors.T, "cosine")
    assert_close(m.encode(NAMES, truncate_dim=8), vectors[:, :8], "cut")
    folder = str(small)  # for encode a text as any other
    for method, given, error, why in (
        (m.encode, dict(mode="sinlge"), ValueError, "Did you mean 'single'"),
        (m.encode, dict(stps=9), ValueError, "stps"),
        (m.encode, dict(dim=129), ValueError, "dim 129: this model has 1 to 128"),
        (m.encode, dict(done=2), ValueError, "done 2: needs a probability"),
        (m.encode, dict(limit=0), ValueError, "limit 0: need at least 1"),
        (load, dict(model_kwargs=dict(device_map="auto")), ValueError, "device_map: not known here"),
        (load, dict(processor_kwargs=dict(max_pixels=9)), ValueError, "max_pixels: not known here"),
    ):
        with pytest.raises(error, match=why):
            method(folder, **given)
    assert load(small, model_kwargs=dict(dtype="bfloat16")).dtype == torch.bfloat16
    assert load(small, config_kwargs=dict(latent_steps=3))[0].plume.settings["latent_steps"] == 3
    m.gradient_checkpointing_enable()
    assert m[0].plume.checkpointing
    m[0].plume.lm.norm.weight.data[3] = torch.nan
    with pytest.raises(DataError, match="item 'red': the embedding is not finite"):
        m.encode(["red"])


def test_max_seq_length_cuts_texts_with_a_warning_and_tables_are_refused(load, small, plume, world):
    m, long = load(small), "red circle " * 400
    with pytest.raises(DataError, match="exceed max_len 512"):
        m.encode([long])
    for length in (0, 1024, "9", 99.5):
        with pytest.raises(DataError, match=f"max_seq_length {length!r}: needs a whole number up to 512"):
            m.max_seq_length = length
    m.max_seq_length = 60
    items = [{"text": long, "image": str(world / "red bar.png")}, "red"]
    with pytest.warns(UserWarning, match="1 of 2 items are longer than 60 tokens .* the first is item 0"):
        sample = m.preprocess(items)["samples"][0]
    assert len(sample["ids"]) + len(sample["suffix"]) in (59, 60) and sample["cut"] > 300
    kept = max(n for n in range(600) if not too_long(plume, long[:n], 60))
    with pytest.warns(UserWarning, match="1 of 1 items are longer than 60 tokens"):
        vectors = m.encode([long])
    assert_close(vectors, plume.encode([long[:kept]]), "as cut by hand")
    m.max_seq_length = None
    assert m.max_seq_length == 512
    with pytest.raises(DataError, match="exceed max_len 512"):
        m.encode([long])
    assert load(small, config_kwargs=dict(limits=dict(max_len=128))).max_seq_length == 128
    table = type("DataFrame", (), dict(columns=["text"], __iter__=lambda table: iter(["text"])))()
    for items, why in ((table, "DataFrame for a single item; give one of its columns"),
                       ({"red"}, "set for a single item; .*sorted"), (iter(["red"]), r"take list\(items\)")):
        with pytest.raises(DataError, match=f"takes a .*{why}"):
            m.encode(items)


def too_long(plume, text, most):
    sample = plume.processor.render(Side([("text", text)]))
    return len(sample["ids"]) + len(sample["suffix"]) > most


def test_bytes_are_pictures(load, small, plume, world):
    m, path = load(small), world / "red bar.png"
    content = path.read_bytes()
    stored = dict(bytes=content, path=None)
    turn = dict(role="user", content=[dict(type="image", image=stored)])
    expected = plume.encode([path])
    for item in (content, stored, {"image": content}, {"image": stored}, [turn]):
        assert_close(m.encode([item]), expected, str(item)[:40])


def test_prompts_stay_when_plume_saves_over_them(load, small, tmp_path):
    m = load(small, prompts=dict(query="Find a picture: "), default_prompt_name="query")
    m.save_pretrained(str(tmp_path / "ck"))
    expected = m.encode(["red"]), m.encode_query(["red"])
    Plume.from_pretrained(tmp_path / "ck", "cpu").save_pretrained(tmp_path / "ck")
    again = load(tmp_path / "ck")
    assert again.default_prompt_name == "query"
    assert np.array_equal(again.encode(["red"]), expected[0])
    assert np.array_equal(again.encode_query(["red"]), expected[1])


def test_saved_and_loaded_again_it_is_the_same_and_a_checkpoint_of_plume(
        load, small, world, tmp_path, monkeypatch):
    m, items = load(small, prompts=dict(query="Find: "), truncate_dim=64), mixed_items(world)
    m.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert again.prompts["query"] == "Find: " and again.truncate_dim == 64
    assert np.array_equal(again.encode(items), m.encode(items))
    plume = Plume.from_pretrained(tmp_path / "saved", "cpu")
    assert_close(plume.encode(items)[:, :64], m.encode(items), "as PLUME")
    config = tmp_path / "saved" / "sentence_bert_config.json"
    config.write_text(json.dumps(dict(modalities=["text"])))
    with pytest.raises(ValueError, match="image"):
        load(tmp_path / "saved").encode([items[2]])
    vectors, sent = m.encode(items), pickle.dumps(m)
    assert_close(copy.deepcopy(m).encode(items), vectors, "a copy")  # whose weights lie apart
    assert isinstance(m[0].plume, Plume)
    forget(monkeypatch, "transformers_modules", *OURS)
    opened = pickle.loads(sent)  # as in a process of its own
    assert type(opened[0].plume) is type(opened[0]).Plume is sys.modules["model"].Plume
    assert_close(opened.encode(items), vectors, "pickled")


def triplets(world):
    """Columns: a name, its picture, the picture of another name."""
    pictures = [{"image": str(world / f"{name}.png")} for name in NAMES]
    return list(NAMES), pictures, pictures[1:] + pictures[:1]


def test_its_losses_have_the_gradients_of_our_embeddings(load, small, plume, world):
    m, columns = load(small), triplets(world)
    batches = [collate(rendered(plume, column), plume.processor) for column in columns]
    anchor, positive, negative = (plume.embed(batch)[0] for batch in batches)
    logits = 20 * anchor @ torch.cat([positive, negative]).T  # the loss by hand: its scale is 20
    by_hand = torch.nn.functional.cross_entropy(logits, torch.arange(len(NAMES)))
    by_hand.backward()
    wanted = gradients(plume)
    assert wanted["backbone.model.visual.patch_embed.proj.weight"].any() and wanted["adapter.w2"].any()
    cached = losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=5)  # GradCache cuts the batch
    for loss in (losses.MultipleNegativesRankingLoss(m), cached):
        m.zero_grad()
        value = loss([m.preprocess(column) for column in columns], None)
        value.backward()
        assert_close(value.detach(), by_hand.detach(), "loss", 1e-4)
        for name, gradient in gradients(m[0].plume).items():
            most = wanted[name].abs().max().item()
            assert_close(gradient, wanted[name], name, 1e-3 * max(most, 1e-2))


def test_training_through_its_trainer_makes_the_loss_fall(load, small, world, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
    pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    m, before = load(small), load(small)
    columns = dict(zip(("anchor", "positive", "negative"), triplets(world)))
    args = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=12, learning_rate=1e-3,
        report_to=[], logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True)
    columns, loss = datasets.Dataset.from_dict(columns), losses.MultipleNegativesRankingLoss(m)
    trainer = st.SentenceTransformerTrainer(model=m, args=args, train_dataset=columns, loss=loss)
    trainer.train()
    fell = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert fell[-1] < 0.75 * fell[0], fell
    m.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert str(world) not in card and "{'image': '&lt;image&gt;'}" in card and "<code>red bar</code>" in card
    assert 'SentenceTransformer("sentence_transformers_model_id", trust_remote_code=True)' in card
    assert type(copy.deepcopy(m).model_card_data) is type(m.model_card_data)
    old = dict(before.named_parameters())
    still = [name for name, p in m.named_parameters() if torch.equal(p, old[name])]
    assert all("step" in name for name in still), still


def test_hard_negatives_that_it_mines_with_our_checkpoint_train_as_neg(load, small, plume, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
    asked = [f"Find: {name}" for name in NAMES]
    pairs = datasets.Dataset.from_dict(dict(anchor=asked, positive=NAMES))
    mined = st.util.mine_hard_negatives(
        pairs, load(small), num_negatives=3, output_format="n-tuple", verbose=False)
    mined.to_json(tmp_path / "mined.jsonl")
    call("tools.convert", "--data", tmp_path / "mined.jsonl", "--out", tmp_path / "pairs.jsonl")
    scores = plume.encode(asked) @ plume.encode(NAMES).T
    np.fill_diagonal(scores, -1)
    best = [{NAMES[i] for i in row.argsort()[-3:]} for row in scores]
    found = {}
    for query, target, *negatives in Pairs(str(tmp_path / "pairs.jsonl")):
        texts = [text for side in (query, target, *negatives) for _, text in side.parts]
        found[texts[0]] = texts[1], set(texts[2:])
    assert found == {query: (name, three) for query, name, three in zip(asked, NAMES, best)}


PROGRAM = """
import sys
import model
from sentence_transformers import SentenceTransformer

if __name__ == "__main__":
    m = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
    import data
    assert model.mine and data.mine and not {"latent", "engine", "hub.card"} & set(sys.modules)
    pool = m.start_multi_process_pool(["cpu"])
    print([m.encode(["red", "blue"], pool=p).tolist() for p in (None, pool)])
    try:
        m.encode([{"image": "gone.png"}], pool=pool)
    except ValueError as e:
        print(type(e).__name__, e)
    m.stop_multi_process_pool(pool)
"""


def test_a_program_keeps_its_own_modules_and_so_do_its_workers(small, plume, tmp_path):
    for name, text in (("model.py", "mine = 1"), ("data.py", "mine = 1"), ("program.py", PROGRAM)):
        (tmp_path / name).write_text(text)
    environment = dict(PLUME_HOME=str(HERE), HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
    *_, vectors, error = run(tmp_path, "program.py", small, **environment).splitlines()
    assert_close(json.loads(vectors), [plume.encode(["red", "blue"]).tolist()] * 2, "in a program")
    assert error.startswith("DataError item") and "'gone.png' does not exist" in error


def test_plumes_folder_is_that_of_its_variable_and_missing_it_is_said(load, small, monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != HERE])
    for home, state in (("", "not set"), (str(tmp_path), f"'{tmp_path}', where there is no hub")):
        monkeypatch.setenv("PLUME_HOME", home)
        with pytest.raises(ModuleNotFoundError, match=f"set the environment variable PLUME_HOME.*is {state}"):
            load(small)
    other = copy_code(tmp_path / "other")
    monkeypatch.setenv("PLUME_HOME", str(other))
    m = load(small)
    assert sys.modules[type(m[0].plume).__module__].__file__ == str(other / "model.py")
    monkeypatch.setenv("PLUME_HOME", str(HERE))
    with pytest.raises(ImportError, match="PLUME_HOME is .* now, .*other'; start Python anew"):
        load(small)


def test_the_checkpoints_prompts_are_its_own_and_are_put_around_once(load, small, world, tmp_path):
    prompts = dict(query="Find the picture: {}", document="{} Represent.", ask="Which? {}")
    ckpt = with_prompts(small, tmp_path, **prompts)
    plume = Plume.from_pretrained(ckpt, "cpu")
    plume.save_pretrained(ckpt)
    m, items = load(ckpt), ["red", {"image": str(world / "red bar.png")}, *mixed_items(world)[3:]]
    assert m.prompts == dict(query="Find the picture: ", document="{} Represent.", ask="Which? ")
    assert_close(m.encode(items), plume.encode(items), "bare")
    assert_close(m.encode_query(items), plume.encode_query(items), "queries")
    assert_close(m.encode_document(items), plume.encode_document(items), "documents")
    assert_close(m.encode(items, prompt_name="ask"), plume.encode(items, prompt="ask"), "by name")
    by_hand = plume.encode(["Find the picture: red", {"image": items[1]["image"], "text": " Represent."}])
    assert_close(m.encode_query(items[:1]), by_hand[:1], "as written")
    assert_close(m.encode_document(items[1:2]), by_hand[1:], "behind the picture")
    m.save_pretrained(str(tmp_path / "again"))
    again = load(tmp_path / "again")
    assert again.prompts == m.prompts and np.array_equal(again.encode_query(items), m.encode_query(items))
    assert np.array_equal(Plume.from_pretrained(tmp_path / "again", "cpu").encode_query(items),
                          plume.encode_query(items))
