"""A checkpoint folder is a model of sentence-transformers: the same vectors, its losses, its files."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import collate
from files.errors import DataError
from files.items import Side
from model import Plume
from test_plume import assert_close, gradients, HERE, mixed_items, rendered
from tests.samples import NAMES

needs = "needs sentence-transformers: pip install sentence-transformers"
st = pytest.importorskip("sentence_transformers", minversion="6.2", reason=needs)

from sentence_transformers.sentence_transformer import losses


@pytest.fixture
def load(monkeypatch, tmp_path):
    """transformers copies a checkpoint's module into its cache, here one of our own, and imports it there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)

    def load(folder, **settings):
        return st.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **settings)

    return load


@pytest.fixture
def plume(small):
    return Plume.from_pretrained(small, "cpu")


def test_the_same_batches_give_the_same_bits_and_others_the_same_numbers(load, small, plume, world):
    m, items = load(small), mixed_items(world)
    assert np.array_equal(m.encode(items, batch_size=1), plume.encode(items, batch_size=1))
    (together,) = plume.encoding(items, batch_size=len(items), sort=False)
    with torch.no_grad():
        assert np.array_equal(m(m.preprocess(items))["sentence_embedding"], together)
    many = items * 7
    vectors = m.encode(many, batch_size=4)
    assert vectors.dtype == np.float32
    assert_close(vectors, plume.encode(many), "other batches", 1e-6)
    assert_close(m.encode("red"), plume.encode(["red"])[0], "a single item", 1e-6)
    for how in (dict(mode="single"), dict(steps=2)):
        assert_close(m.encode(items, **how), plume.encode(items, **how), str(how), 1e-6)


def test_a_prompt_stands_in_front_of_the_text_and_behind_the_picture(load, small, plume, world):
    m, red = load(small, prompts=dict(ask="Which? ")), str(world / "red bar.png")
    items = ["red", {"image": red}, {"image": red, "text": "bar"}, Path(red)]
    texts = ("Which? ", "Which? bar", "Which? ")
    expected = ["Which? red"] + [{"image": red, "text": text} for text in texts]
    assert_close(m.encode(items, prompt_name="ask"), plume.encode(expected), "prompt", 1e-6)
    assert_close(m.encode_query(items), plume.encode(items), "none of its own", 1e-6)


def test_a_turn_of_the_user_is_the_item_with_its_media_in_the_same_places(load, small, plume, world):
    m, red, clip = load(small), str(world / "red bar.png"), str(world / "green circle.mp4")
    parts = [("text", "first <image> "), ("image", red), ("text", " then "), ("video", clip)]
    content = [dict([("type", kind), (kind, value)]) for kind, value in parts]
    turns = [[dict(role="user", content=content)], dict(role="user", content="red")]
    assert_close(m.encode(turns), plume.encode([Side(parts), "red"]), "turns", 1e-6)
    with pytest.raises(DataError, match="one turn of the user"):
        m.encode([[dict(role="system", content="x"), dict(role="user", content="y")]])


def test_what_it_offers_and_what_it_refuses(load, small, plume, monkeypatch):
    m = load(small)
    assert m.modalities == ["text", "image", "video", "message"] and m.similarity_fn_name == "cosine"
    assert (m.get_embedding_dimension(), m.max_seq_length) == (128, 512)
    vectors = m.encode(NAMES, convert_to_tensor=True)
    assert_close(m.similarity(vectors, vectors), vectors @ vectors.T, "cosine", 1e-6)
    assert_close(m.encode(NAMES, truncate_dim=8), vectors[:, :8], "cut", 1e-6)
    for given, error, why in (
        (dict(mode="sinlge"), ValueError, "Did you mean 'single'"),
        (dict(steps=99), ValueError, "steps 99"),
        (dict(stps=9), ValueError, "stps"),
    ):
        with pytest.raises(error, match=why):
            m.encode(NAMES, **given)
    with pytest.raises(DataError, match="gone.png.*does not exist"):
        m.encode(["red", {"image": "gone.png"}])
    with pytest.raises(DataError, match="needs 'float32' or 'bfloat16'"):
        load(small, model_kwargs=dict(dtype="float16"))
    assert load(small, model_kwargs=dict(dtype="bfloat16")).dtype == torch.bfloat16
    assert load(small, config_kwargs=dict(latent_steps=3))[0].plume.settings["latent_steps"] == 3
    for given in (dict(processor_kwargs=dict(max_pixels=9)), dict(model_kwargs=dict(device_map="auto"))):
        with pytest.raises(ValueError, match="(max_pixels|device_map): not known here"):
            load(small, **given)
    m.gradient_checkpointing_enable()
    assert m[0].plume.checkpointing
    m[0].plume.lm.norm.weight.data[3] = torch.nan
    with pytest.raises(DataError, match="item 'red': the embedding is not finite"):
        m.encode(["red"])


def test_saved_and_loaded_again_it_is_the_same_and_a_checkpoint_of_plume(load, small, world, tmp_path):
    m, items = load(small, prompts=dict(query="Find: "), truncate_dim=64), mixed_items(world)
    m.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert again.prompts["query"] == "Find: " and again.truncate_dim == 64
    assert np.array_equal(again.encode(items), m.encode(items))
    plume = Plume.from_pretrained(tmp_path / "saved", "cpu")
    assert_close(plume.encode(items)[:, :64], m.encode(items), "as PLUME", 1e-6)
    config = tmp_path / "saved" / "sentence_bert_config.json"
    config.write_text(json.dumps(dict(modalities=["text"])))
    with pytest.raises(ValueError, match="image"):
        load(tmp_path / "saved").encode([items[2]])
    sent = pickle.loads(pickle.dumps(m))  # as to a process of a pool
    assert np.array_equal(sent.encode(items), m.encode(items))


def triplets(world):
    """Columns: a name, its picture, the picture of another name."""
    pictures = [{"image": str(world / f"{name}.png")} for name in NAMES]
    return list(NAMES), pictures, pictures[1:] + pictures[:1]


def test_its_losses_have_the_gradients_of_our_embeddings(load, small, plume, world):
    m, columns = load(small), triplets(world)

    def embed(items):
        batch = collate(rendered(plume, items), plume.processor)
        return plume.embed(batch)[0]

    anchor, positive, negative = (embed(column) for column in columns)
    logits = 20 * anchor @ torch.cat([positive, negative]).T  # the loss by hand: its scale is 20
    by_hand = torch.nn.functional.cross_entropy(logits, torch.arange(len(NAMES)))
    by_hand.backward()
    wanted = gradients(plume)
    assert wanted["backbone.model.visual.patch_embed.proj.weight"].any() and wanted["adapter.w2"].any()
    plain = losses.MultipleNegativesRankingLoss(m)
    in_pieces = losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=5)  # GradCache cuts the batch
    for loss in (plain, in_pieces):
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
    trainer = st.SentenceTransformerTrainer(
        model=m, args=args, train_dataset=datasets.Dataset.from_dict(columns),
        loss=losses.MultipleNegativesRankingLoss(m))
    trainer.train()
    fell = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert fell[-1] < 0.75 * fell[0], fell
    old = dict(before.named_parameters())
    still = [name for name, p in m.named_parameters() if torch.equal(p, old[name])]
    assert all("step" in name for name in still), still


def test_plumes_code_is_found_by_its_environment_variable_and_missing_it_is_said(load, small, monkeypatch):
    load(small)
    module = next(m for name, m in sys.modules.items() if name.endswith("plume_st"))
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != HERE])
    for name in ("model", "data", "latent", "adapter", "curriculum"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("PLUME_HOME", raising=False)
    with pytest.raises(ModuleNotFoundError, match="set the environment variable PLUME_HOME .*is None"):
        module.plume()
    monkeypatch.setenv("PLUME_HOME", str(HERE))
    assert module.plume().__file__ == str(HERE / "model.py")
    monkeypatch.setitem(sys.modules, "model", json)
    with pytest.raises(ImportError, match="json/__init__.py is another module 'model'"):
        module.plume()
