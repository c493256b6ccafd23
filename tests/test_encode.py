"""`encode`: any container in its own order, bad items named, nothing that is not finite."""

import bisect
import io
import math
import threading
import time
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from data import collate, Processor
from engine import stream
from files.errors import DataError
from files.items import parse_item, parse_side
from engine.graphs import Graphs
from hub.prompts import with_prompt
from test_plume import assert_close, gradients, HERE, make_model, mixed_items, rendered
from tests.samples import picture, png, turns

ITEMS = ["red", "a blue square", "green", "what colour?", "black bar"]


@pytest.mark.parametrize("workers", [1, 4])
def test_media_in_memory_are_bounded_in_bytes_whatever_the_batch(workers, model, world, monkeypatch):
    shared = Image.open(world / "red bar.png")  # threads share a picture whose file is not read yet
    items = [{"image": shared, "text": "word " * (i % 5)} for i in range(40)]
    items[7:7] = ["text alone"] * 9 + [{"image": picture("blue", "bar", (28, 28))}]
    plain = model.encode(items)
    read, embed_rows = stream.read_item, stream.embed_rows
    each = stream.media_bytes(read(model, 0, items[0], None))
    counts = dict(read=0, embedded=0, most=0)

    def counted_read(m, i, *rest):
        sample = read(m, i, *rest)
        counts["read"] += stream.media_bytes(sample)
        counts["most"] = max(counts["most"], counts["read"] - counts["embedded"])
        return sample

    def counted_rows(m, out, rows, samples, *rest):
        embed_rows(m, out, rows, samples, *rest)
        counts["embedded"] += sum(stream.media_bytes(samples[i]) for i in rows)

    monkeypatch.setattr(stream, "read_item", counted_read)
    monkeypatch.setattr(stream, "embed_rows", counted_rows)
    monkeypatch.setattr(stream, "AHEAD", 3 * each)
    assert_close(model.encode(items, batch_size=16, workers=workers), plain, "many small windows", 1e-6)
    assert counts["read"] == counts["embedded"] > 40 * each
    # two windows of at most 3, each with the one that fills it, and one in every thread
    assert counts["most"] <= (6 + 2 + workers) * each

    windows = stream.encoding(model, iter(items), batch_size=2, workers=workers)
    next(windows)
    windows.close()
    deadline = time.monotonic() + 10
    while any("ThreadPoolExecutor" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a reader is left behind"
        time.sleep(0.01)


def test_cut_embeddings_are_the_first_components_normalised_again(model):
    whole = model.encode(ITEMS)
    cut = model.encode(ITEMS, dim=16)
    assert_close(cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), "cut", 1e-6)
    assert model.encode([], dim=16).shape == (0, 16)
    assert_close(model.encode(ITEMS, dim=128), whole, "all of them", 0)
    for dim in (0, 129):
        with pytest.raises(ValueError, match=f"dim {dim}: this model has 1 to 128"):
            model.encode(ITEMS, dim=dim)


def container(**methods):
    """An object that has these special methods and no other."""
    return type("Container", (), {f"__{name}__": staticmethod(method) for name, method in methods.items()})()


def containers():
    """All that may hold the items; some can be gone through only once."""
    through, length = ITEMS.__iter__, ITEMS.__len__
    column = dict(zip((7, 3, 0, 1, 2), ITEMS))  # a filtered column of a table: its [3] is not the third
    return {
        "filtered column": container(iter=through, len=length, getitem=column.__getitem__),
        "[0], [1], ... until IndexError": container(getitem=ITEMS.__getitem__),
        "map-style data set without IndexError": container(getitem=(ITEMS * 9).__getitem__, len=length),
        "values of a dict": dict(zip("edcba", ITEMS)).values(),
        "iterator": iter(ITEMS),
        "array": np.array(ITEMS),
        # without a length, or with one that is not to be trusted
        "too short": container(iter=through, len=Mock(return_value=2)),
        "too long": container(iter=through, len=Mock(return_value=99)),
        "TypeError": container(iter=through, len=Mock(side_effect=TypeError)),
        "NotImplementedError": container(iter=through, len=Mock(side_effect=NotImplementedError)),
    }


def test_items_are_taken_in_the_order_in_which_any_container_gives_them(model, capsys):
    expected = model.encode(ITEMS)
    for progress in (True, "some items"):
        for name, items in containers().items():
            assert_close(model.encode(items, progress=progress, batch_size=2), expected, name, 1e-6)
    assert "some items" in capsys.readouterr().err
    assert model.encode(iter([])).shape == (0, 128)
    pictures = Path("x.png"), Image.new("RGB", (9, 9)), np.zeros((9, 9, 3), np.uint8)
    for single in ("x", b"x", {"text": "x"}, {"a": "x", "b": "y"}, *pictures, 3, None):
        with pytest.raises(TypeError, match=r"list.*put a single item into \[ \]"):
            model.encode(single)


def a_table():
    """As a DataFrame: going through it gives the names of its columns."""
    table = container(iter=["text", "image"].__iter__)
    table.columns = ["text", "image"]
    return table


@pytest.mark.parametrize("items, instead", [
    (a_table(), r"one of its columns: table\['text'\].tolist\(\)"),
    (io.StringIO("red\nblue\n"), r"lines give file.read\(\).splitlines\(\)"), (io.BytesIO(b"red"), "lines"),
    ({"red", "blue"}, "no order.*sorted"), (frozenset("ab"), "no order"),
    (torch.utils.data.DataLoader([{"image": "a.png"}] * 2), "gives batches"),
    (bytearray(b"x"), r"single item into \[ \]"), (memoryview(b"x"), r"single item into \[ \]"),
])
def test_what_goes_through_something_else_than_items_is_refused_and_says_what_to_give(model, items, instead):
    with pytest.raises(TypeError, match=f"items, got {type(items).__name__}; .*{instead}"):
        model.encode(items)


def test_tables_of_pyarrow_are_refused_and_their_columns_are_items(model):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    table = pa.table(dict(text=ITEMS, label=ITEMS))
    for items in (table, table.to_batches()[0]):
        with pytest.raises(TypeError, match="one of its columns: .*to_pylist"):
            model.encode(items)
    assert np.array_equal(model.encode(table["text"].to_pylist()), model.encode(ITEMS))


def test_bytes_of_a_picture_are_a_picture_in_every_place(model, world):
    path = world / "red bar.png"
    content = path.read_bytes()
    stored = [dict(bytes=content, path=None), dict(bytes=content, path="gone.png"),  # as datasets has them
              dict(bytes=None, path=str(path))]
    bare = [content, bytearray(content), memoryview(content), io.BytesIO(content), *stored]
    assert_close(model.encode(bare), np.repeat(model.encode([path]), len(bare), 0), "bare", 1e-6)
    for given in (content, *stored):
        items = [{"image": given}, {"text": "which?", "image": [given, given]}, {"video": [given, given]}]
        same = [{"image": path}, {"text": "which?", "image": [path, path]}, {"video": [path, path]}]
        assert_close(model.encode(items), model.encode(same), "in an object", 1e-6)
    record = dict(conversations=turns("<image>\nwhat?"), image=[dict(bytes=None, path="red bar.png")])
    assert parse_side(record, world, "record 1").parts[0] == ("image", str(path))
    for item, why in (
        (b"hello", "needs a string or a picture, got 5 bytes that are no picture"),
        (dict(bytes="aGk=", path=None), "'bytes' must be the bytes of a file"),
        (dict(bytes=None, path=None), "needs"), (dict(path="x.png"), "unknown key 'path'"),
        (dict(video=dict(bytes=b"..", path="x.mp4")), r"video needs a path \(write its bytes to a file\)"),
        (png(10000, 2, 8), "limit is 89,478,485"),  # said before anything is decoded
    ):
        with pytest.raises(DataError, match=f"item 0: .*{why}"):
            model.encode([item])


def test_texts_that_are_remembered_are_bounded_by_their_size(model):
    p = Processor(model.processor.tokenizer, "Think.", model.processor.limits)
    for i in range(60):
        assert p.encode(f"word {i} " * 2000) == p.encode(f"word {i} " * 2000)
        p.encode("a piece of the prompt")
    assert sum(len(text) + len(ids) for text, ids in p.known.items()) < 400_000
    assert "a piece of the prompt" in p.known


class Wrapped(torch.nn.Module):
    """As LoRA stands around a module."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.weight = base, base.weight
        rows, *columns = base.weight.shape
        self.lora_B = torch.nn.Linear(columns[0] if columns else 1, rows, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(x)


def wrap(m, name):
    parent, _, child = name.rpartition(".")
    setattr(m.get_submodule(parent), child, Wrapped(m.get_submodule(name)))


@pytest.mark.parametrize("name", [
    "backbone.lm_head", "backbone.model.language_model.norm", "backbone.model.visual.patch_embed.proj",
    "adapter.step_embed"])
def test_a_module_whose_weight_is_read_must_not_be_wrapped(name):
    m = make_model()
    batch = collate(rendered(m, ["red"]), m.processor)
    m([batch], 2)  # seen once without
    wrap(m, name)
    for run in (lambda: m([batch], 2), lambda: m.embed(batch), lambda: m.encode(["red"])):
        with pytest.raises(DataError, match=f"^{name}, a Wrapped: .*no gradient.*target_modules.*merge"):
            run()


def test_a_wrapped_module_that_is_called_has_an_effect_and_a_gradient():
    m = make_model()
    before, inside = m.encode(["red"]), "backbone.model.language_model.layers.1"
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        wrap(m, f"{inside}.{name}")
    assert np.abs(m.encode(["red"]) - before).max() > 1e-4
    m.embed(collate(rendered(m, ["red"]), m.processor))[0].sin().sum().backward()
    assert all(m.get_submodule(f"{inside}.{name}").lora_B.weight.grad.any()
               for name in ("self_attn.q_proj", "mlp.down_proj"))
    m.lm.layers[1].mlp = torch.nn.Sequential(m.lm.layers[1].mlp)  # a whole block, which is not called
    with pytest.raises(DataError, match=f"^{inside}.mlp.0.gate_proj.weight: "):
        m.encode(["red"])


def test_adapters_of_peft_are_taken_where_modules_are_called():
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    for target in ("q_proj", "embed_tokens", "lm_head"):
        m = make_model().float()
        before = m.encode(["red"])
        peft.get_peft_model(m, peft.LoraConfig(target_modules=[target], init_lora_weights=False))
        if target == "lm_head":
            with pytest.raises(DataError, match="^backbone.lm_head, a Linear: "):
                m.encode(["red"])
        else:
            assert np.abs(m.encode(["red"]) - before).max() > 1e-4, target


def test_what_cannot_be_read_is_a_row_of_nan_with_its_reason_and_the_others_stay(model, world):
    red = str(world / "red bar.png")
    items = ["red", {"image": "gone.png"}, {"image": red}, {"txt": "x"}, None, "blue",
             {"image": str(HERE / "model.py")}] * 5
    reasons = {1: "gone.png", 3: "Did you mean 'text'", 4: "needs", 6: "model.py"}
    good = [i for i in range(len(items)) if i % 7 not in reasons]
    bad = {}
    out = model.encode(items, batch_size=2, bad=bad)
    assert sorted(bad) == [i for i in range(len(items)) if i not in good]
    assert np.isnan(out[sorted(bad)]).all()
    assert_close(out[good], model.encode([items[i] for i in good]), "the others", 1e-6)
    assert all(f"item {i}: " in why and reasons[i % 7] in why for i, why in bad.items())
    with pytest.raises(DataError, match="item 1: .*gone.png"):
        model.encode(items)
    bad = {}
    assert np.isnan(model.encode([None, None], bad=bad)).all()  # nothing is left
    assert list(bad) == [0, 1]
    assert np.isfinite(model.encode(["x"], bad=bad)).all()
    assert list(bad) == [0, 1]


def test_an_embedding_that_is_not_finite_is_never_returned(world):
    m = make_model().float()
    m.lm.layers[1].mlp.down_proj.weight.data[3, 4] = math.nan
    why = r"item 0, item 1: .*not finite.*weights are not finite either \(1 tensors.*layers.1.mlp.down_proj"
    for bad in (None, {}):
        for mode in ("latent", "single", "cot"):
            with pytest.raises(DataError, match=why):
                m.encode(["red", "blue"], mode, limit=4, bad=bad)
    m = make_model().float()
    word, embed = m.processor.encode("Q")[0], m.embed

    def overflows(batch, *rest):  # on one word, as half precision may
        vectors, tokens = embed(batch, *rest)
        has_word = (batch["ids"] == word).any(1)  # (B,)
        return torch.where(has_word[:, None], math.inf, vectors), tokens

    m.embed = overflows
    why = "^item 2: the embedding is not finite; the weights are finite, so it is something in these items"
    with pytest.raises(DataError, match=why):
        m.encode(["red", "blue", "Q", "green"], bad={})
    with pytest.raises(DataError, match="^item 0: .*computed in torch.bfloat16, try float32"):
        m.bfloat16().encode(["Q"])
    m.float()
    with pytest.raises(DataError, match="item 0, .*item 9 and 30 more: "):
        m.encode(["Q"] * 40, batch_size=8)


def test_a_string_that_names_a_picture_file_is_embedded_as_text_with_one_warning(model, world, monkeypatch):
    monkeypatch.chdir(world)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = model.encode(["red", "red bar.png", "blue bar.png", "red bar.mp4", "gone.png"])
    said = [str(w.message) for w in seen if "name of a file" in str(w.message)]
    assert len(said) == 1
    assert "red bar.png" in said[0] and "{'image': ...}" in said[0]
    assert_close(out[1], model.encode([{"text": "red bar.png"}])[0], "as text", 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["gone.png", "a picture.png of a cat", {"text": "red bar.png"}, "model.py"])


def test_a_text_that_is_too_long_is_cut_where_asked_for_counted_and_said(model, world):
    long, red = "red circle and a blue bar " * 200, str(world / "red bar.png")
    behind = {"text": f"{long}<image> blue", "image": red}
    items = ["red", long, {"text": long, "image": red}, behind, long[:99]]
    with pytest.raises(DataError, match="item 1: .* exceed max_len"):
        model.encode(items)
    cut, p = {}, model.processor
    with pytest.warns(UserWarning, match="3 of 5 items .* than 512 tokens .* first is item 1") as seen:
        vectors = model.encode(items, truncate=cut)
    assert list(cut) == [1, 2, 3] and f"{sum(cut.values())} tokens together" in str(seen[0].message)
    for i, made in ((1, lambda n: long[:n]), (2, lambda n: {"text": long[:n], "image": red}),
                    (3, lambda n: {"text": f"{long[:n]}<image>", "image": red})):
        about = bisect.bisect(range(len(long)), 512, key=lambda n: length(p, made(n)))
        most = max(n for n in range(about - 20, about + 20) if length(p, made(n)) <= 512)
        assert_close(model.encode([made(most)])[0], vectors[i], f"item {i}", 1e-6)
        assert cut[i] == length_of_text(p, items[i]) - length_of_text(p, made(most))
    assert_close(vectors[[0, 4]], model.encode([items[0], items[4]]), "not cut", 1e-6)
    bad = {}
    wide = {"image": [red] * 99, "text": "red"}
    out = model.encode([wide], truncate=True, bad=bad)
    assert np.isnan(out).all() and "exceed max_len" in bad[0]  # no text would make room


def length(processor, item):
    try:
        sample = processor.render(parse_item(item))
    except DataError:
        return math.inf
    return len(sample["ids"]) + len(sample["suffix"])


def length_of_text(processor, item):
    parts = parse_item(item).parts
    return sum(len(processor.encode(text)) for kind, text in parts if kind == "text")


def test_the_adapter_may_get_parameters_and_layers():
    m = make_model()
    m.adapter.gate = torch.nn.Parameter(torch.ones(1))
    m.adapter.norm = torch.nn.LayerNorm(128)
    m.adapter.layers = torch.nn.Sequential(torch.nn.Linear(128, 8), torch.nn.MultiheadAttention(8, 2))
    m.encode(["a"])


@pytest.mark.parametrize("mode, name", [("latent", "gen"), ("single", "disc")])
def test_gradients_of_embed_are_those_of_a_training_pass(mode, name, world):
    m, found = make_model(), []
    batch = collate(rendered(m, mixed_items(world)), m.processor)
    m.graphs = Graphs()  # for inference: they carry no gradients
    for checkpointing in (False, True):
        m.checkpointing = checkpointing
        vectors, _ = m.embed(batch, mode)
        for output in (vectors, m([batch], 8)["per_pair"][name]):
            m.zero_grad()
            output.sin().sum().backward()
            found.append(dict(gradients(m), output=output.detach()))
    everywhere = {name for name, g in found[0].items() if g.any()}
    assert {"backbone.model.visual.patch_embed.proj.weight", "output"} <= everywhere
    assert any(name.startswith("adapter") for name in everywhere) == (mode == "latent")
    for grads in found[1:]:
        for name in everywhere:
            assert_close(grads[name], found[0][name], name, 1e-10)


def test_encode_keeps_no_graph_and_leaves_the_callers_gradients_on(model, monkeypatch):
    embed, graphs = model.embed, []

    def watched(*args):
        vectors, tokens = embed(*args)
        graphs.append(vectors.requires_grad)
        return vectors, tokens

    monkeypatch.setattr(model, "embed", watched)
    for _ in stream.encoding(model, ["red", "blue", "green"], batch_size=1, sort=False):
        assert torch.is_grad_enabled()  # between two windows
    assert graphs == [False] * 3


def test_a_text_that_is_cut_keeps_the_instruction_behind_it():
    m = make_model()
    m.settings["prompts"] |= dict(topic="First: {} What is it about?")
    room, words = m.processor.limits.max_len, "red bar blue circle " * 400
    cut = {}
    vectors = m.encode([words], prompt="topic", truncate=cut)
    ids = m.processor.backend.encode(words, add_special_tokens=False)
    kept = words[: ids.offsets[len(ids) - cut[0]][0]]
    whole = with_prompt(parse_item(kept), "First: {} What is it about?")
    assert len(m.processor.render(whole)["ids"]) <= room
    assert_close(vectors, m.encode([f"First: {kept} What is it about?"]), "as written out", 1e-6)


@pytest.mark.parametrize("truncate", [None, 0, "yes"])
def test_truncate_is_true_false_or_a_dict(model, truncate):
    with pytest.raises(ValueError, match="truncate .*needs True, False, or a dict"):
        model.encode(["red"], truncate=truncate)


def test_tokens_of_one_character_are_cut_and_counted_together(model):
    p, text, cut = model.processor, "\U0001f98a" * 700, {}
    with pytest.warns(UserWarning, match="lost the end of their text"):
        vectors = model.encode([text], truncate=cut)
    tokens = [len(p.backend.encode(text[:n], add_special_tokens=False).ids) for n in range(701)]
    kept = tokens.index(tokens[700] - cut[0])
    assert_close(vectors, model.encode([text[:kept]]), "as written out", 1e-6)
