"""PLUME as a model of MTEB, on tasks made here."""

import numpy as np
import pytest

from files.errors import DataError
from model import Plume
from tests.samples import in_one_space, NAMES, with_prompts

mteb = pytest.importorskip("mteb", reason="needs mteb: pip install mteb")
datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")

from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType

from tools.mteb_model import PlumeEncoder

NO_DATA_SET = dict(path="nobody/nothing", revision="1")


def make_task(task_name, kind, modality, documents):
    """Retrieval with the query "Find: NAME" for every name, document i for name i."""
    rows = [dict(id=f"d{i}", **document) for i, document in enumerate(documents)]
    corpus = datasets.Dataset.from_list(rows)
    if modality == "image":
        corpus = corpus.cast_column("image", datasets.Image())
    queries = datasets.Dataset.from_list([dict(id=f"q{i}", text=f"Find: {n}") for i, n in enumerate(NAMES)])
    relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(NAMES))}
    split = dict(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=task_name, description="made here", dataset=NO_DATA_SET, type=kind,
            category=f"t2{modality[0]}", modalities=sorted({"text", modality}), eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1")

        def load_data(self, *given, **more):
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Local()


def test_mteb_scores_text_and_pictures_as_ranking_by_hand(small, world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = [dict(title="", text=name) for name in NAMES]
    pictures = [dict(image=str(world / f"{name}.png")) for name in NAMES]
    tasks = [make_task("LocalNames", "Retrieval", "text", names),
             make_task("LocalPictures", "Any2AnyRetrieval", "image", pictures)]
    plume, prompt = Plume.from_pretrained(small, "cpu"), "Represent the query. "
    queries = plume.encode([f"{prompt}Find: {name}" for name in NAMES])
    encoder = PlumeEncoder(small, mode="single", prompts=dict(query=prompt), device="cpu")
    with_prompt = PlumeEncoder(small, prompts=dict(query=prompt), device="cpu")
    cache = mteb.ResultCache(tmp_path)
    mteb.evaluate(encoder, tasks, cache=cache, show_progress_bar=False)  # its results are its own
    results = mteb.evaluate(with_prompt, tasks, cache=cache, encode_kwargs=dict(batch_size=5))
    for result, documents in zip(results.task_results, (NAMES, pictures), strict=True):
        found = (queries @ plume.encode(documents).T).argmax(1)
        by_hand = float((found == np.arange(len(NAMES))).mean())
        assert result.scores["test"][0]["hit_rate_at_1"] == pytest.approx(by_hand, abs=1e-4)
    usual = PlumeEncoder(small, device="cpu")
    mteb.evaluate(usual, tasks[:1], cache=cache, show_progress_bar=False)
    found = cache.load_results(models=[usual.mteb_model_meta.name], include_remote=False)
    (kept,) = found.model_results
    assert [result.task_name for result in kept.task_results] == ["LocalNames"]
    assert usual.mteb_model_meta.n_parameters == sum(p.numel() for p in plume.parameters())
    first, second = encoder.mteb_model_meta, with_prompt.mteb_model_meta
    assert first.revision == second.revision and first.experiment_name != second.experiment_name
    other = PlumeEncoder(small, device="cpu", latent_steps=3)
    assert other.mteb_model_meta.revision != first.revision  # so that no result of another model is read


def test_a_document_that_is_too_long_does_not_end_a_task_unless_told(small):
    long, metadata = "red bar " * 400, make_task("Names", "Retrieval", "text", []).metadata
    loader = [dict(text=["red", long])]
    with pytest.warns(UserWarning, match="1 of 2 items are longer than 512 tokens"):
        vectors = PlumeEncoder(small, device="cpu").encode(loader, task_metadata=metadata)
    assert np.isfinite(vectors).all()
    with pytest.raises(DataError, match="exceed max_len"):
        PlumeEncoder(small, device="cpu", truncate=False).encode(loader, task_metadata=metadata)


def test_in_one_space_documents_take_one_pass_and_queries_think(small, tmp_path):
    ours, loader = in_one_space(small, tmp_path), [dict(text=NAMES[:3]), dict(text=NAMES[3:5])]
    plume, metadata = Plume.from_pretrained(ours, "cpu"), make_task("Names", "Retrieval", "text", []).metadata
    latent, single = plume.encode(NAMES[:5]), plume.encode(NAMES[:5], "single")
    default = PlumeEncoder(ours, device="cpu")
    both_latent = PlumeEncoder(ours, index_mode="latent", device="cpu")
    two_spaces = PlumeEncoder(small, device="cpu")
    for encoder, documents in ((default, single), (both_latent, latent), (two_spaces, latent)):
        for kind, expected in ((PromptType.document, documents), (PromptType.query, latent), (None, latent)):
            vectors = encoder.encode(loader, task_metadata=metadata, prompt_type=kind, batch_size=2)
            assert np.abs(vectors - expected).max() < 1e-5, kind
    fewer = PlumeEncoder(ours, steps=2, device="cpu")  # of queries
    vectors = fewer.encode(loader, task_metadata=metadata, prompt_type=PromptType.document)
    assert np.abs(vectors - single).max() < 1e-5
    names = {encoder.mteb_model_meta.experiment_name for encoder in (default, both_latent, fewer)}
    assert len(names) == 3  # no result of one is read for another


def test_the_checkpoints_prompts_are_used_until_a_task_has_its_own(small, world, tmp_path):
    ckpt = with_prompts(small, tmp_path, query="Find: {}", document="{} Represent.")
    plume, path = Plume.from_pretrained(ckpt, "cpu"), str(world / "red bar.png")
    metadata = make_task("Names", "Retrieval", "text", []).metadata
    loader = [dict(text=NAMES[:3], image=[path] * 3), dict(image=[path])]

    def encoded(kind, **prompts):
        encoder = PlumeEncoder(ckpt, device="cpu", prompts=prompts)
        return encoder.encode(loader, task_metadata=metadata, prompt_type=kind), encoder

    def by_hand(template):
        texts = [template.replace("{}", text) for text in (*NAMES[:3], "")]
        return plume.encode([dict(text=text, image=path) for text in texts])

    _, own = encoded(None)
    for kind, given, template in (
            (PromptType.query, {}, "Find: {}"), (PromptType.document, {}, "{} Represent."),
            (PromptType.query, dict(query="Look: "), "Look: {}"), (PromptType.query, dict(query=""), "{}"),
            (PromptType.document, dict(Retrieval="Seek {}!"), "Seek {}!"), (None, {}, "{}")):
        vectors, _ = encoded(kind, **given)
        assert np.abs(vectors - by_hand(template)).max() < 1e-5, template
    without = PlumeEncoder(small, device="cpu")
    assert own.mteb_model_meta.revision != without.mteb_model_meta.revision
    assert not own.mteb_model_meta.experiment_kwargs  # its own prompts are as usual: load_results finds them
