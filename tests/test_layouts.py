"""Layouts of checkpoints: shards, kinds of adapter, the released one, a plain Qwen2-VL, another format."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data import PLUME_TOKENS
from files.errors import DataError
from hub.settings import FORMAT, RELEASED_PROMPT
from model import Plume
from test_plume import assert_close, make_model, mixed_items, rendered
from tests.samples import edit_json, shard


def test_sharded_weights_with_an_index_load_the_same(tmp_path):
    m, folder = make_model().float(), tmp_path / "ck"
    expected = m.encode(["a"])
    m.save_pretrained(folder)
    shard(folder)
    assert np.array_equal(Plume.from_pretrained(folder, "cpu").encode(["a"]), expected)
    # what transformers does not read is not read here either, whatever it is called
    strays = {"zz.safetensors", "adapter_model.safetensors", "model-00004-of-00003.safetensors"}
    wrong = {f"adapter.{k}": torch.full_like(v, 7.0) for k, v in m.adapter.state_dict().items()}
    for name in strays:
        save_file(wrong, folder / name)
    assert np.array_equal(Plume.from_pretrained(folder, "cpu").encode(["a"]), expected)
    m.save_pretrained(folder)  # one file again; the shards were this checkpoint's, the others were not
    left = {name for name in os.listdir(folder) if name.endswith(("safetensors", "index.json"))}
    assert left == strays | {"model.safetensors"}
    assert np.array_equal(Plume.from_pretrained(folder, "cpu").encode(["a"]), expected)


def make_kind(kind):
    if kind != "untied":
        return make_model(adapter=dict(kind=kind)).float()
    m = make_model().float()  # as Qwen2-VL-7B: an output embedding of its own
    config = m.backbone.config.to_dict() | {"tie_word_embeddings": False}
    backbone = type(m.backbone)(type(m.backbone.config).from_dict(config))
    m = Plume(backbone, m.processor.tokenizer, m.settings)
    torch.nn.init.normal_(m.backbone.lm_head.weight)
    return m


@pytest.mark.parametrize("kind", ["none", "mlp", "untied"])
def test_every_kind_of_model_saves_and_loads(tmp_path, kind):
    m = make_kind(kind)
    m.save_pretrained(tmp_path / "ck")
    again = Plume.from_pretrained(tmp_path / "ck", "cpu")
    ours, theirs = m.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert np.array_equal(again.encode(["a"], "cot", limit=5), m.encode(["a"], "cot", limit=5))


def test_released_layout_round_trip(world, tmp_path):
    m = make_model(latent_positions="cache", white_image=True).float()
    m.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="implies other values.*prompt"):
        Plume.from_pretrained(tmp_path / "ours", "cpu").save_pretrained(tmp_path / "ck", released=True)
    names = set(load_file(tmp_path / "ck" / "model.safetensors"))
    adapter = {"ln.weight", "ln.bias", "router.weight", "step_embed.weight"}
    for expert in ("shared_expert", "experts.0", "experts.1", "experts.2", "experts.3"):
        adapter |= {f"{expert}.fc1.weight", f"{expert}.fc1.bias"}
        adapter |= {f"{expert}.fc2.weight", f"{expert}.fc2.bias"}
    prefix = "latent_moe_transition."
    assert {n for n in names if n.startswith("latent_moe")} == {prefix + n for n in adapter}
    backbone = {"model.layers.0.self_attn.q_proj.weight", "visual.merger.mlp.0.weight", "model.norm.weight"}
    assert names >= backbone
    assert "lm_head.weight" not in names
    assert "plume" not in json.loads((tmp_path / "ck" / "config.json").read_text())

    settings = Plume.from_pretrained(tmp_path / "ck", "cpu").settings  # recognised by its weights
    assert settings["latent_positions"] == "cache" and settings["white_image"]
    assert settings["latent_steps"] == 8 and settings["prompt"] == RELEASED_PROMPT
    # from preprocessor_config.json
    assert settings["limits"]["max_pixels"] == m.settings["limits"]["max_pixels"]
    own = dict(prompt=m.settings["prompt"], limits=m.settings["limits"])
    again = Plume.from_pretrained(tmp_path / "ck", "cpu", **own)
    assert np.array_equal(again.encode(mixed_items(world)), m.encode(mixed_items(world)))
    assert len(rendered(again, ["words"])[0]["pixels"]) == 1  # the white picture in front of text
    again.settings["adapter"]["top_k"] = 1
    with pytest.warns(UserWarning, match="'top_k': 1"):
        again.save_pretrained(tmp_path / "other", released=True)
    with pytest.raises(DataError, match="no adapter"):
        make_model(adapter=dict(kind="none")).save_pretrained(tmp_path / "other", released=True)


def as_from_the_hub(folder):
    """Makes our checkpoint a plain Qwen2-VL in the hub's flat spelling -> tensors, number of tokens."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("adapter.")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    config = json.loads((folder / "config.json").read_text())
    flat = {**config.pop("text_config"), **config}
    rope = flat.pop("rope_parameters")
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = dict(type="mrope", mrope_section=rope["mrope_section"])
    flat["model_type"] = "qwen2_vl"
    del flat["plume"]
    (folder / "config.json").write_text(json.dumps(flat))

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    added = [t for t in tokenizer["added_tokens"] if t["content"] not in PLUME_TOKENS]
    tokenizer["added_tokens"] = added
    for token in PLUME_TOKENS:
        vocabulary[f"unused{token}"] = vocabulary.pop(token)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tensors, len({*vocabulary, *(t["content"] for t in added)})


def test_a_plain_qwen2_vl_gets_the_tokens_at_the_mean_and_a_near_identity_adapter(tmp_path):
    folder = tmp_path / "ck"
    make_model().float().save_pretrained(folder)
    tensors, size = as_from_the_hub(folder)
    plain = Plume.from_pretrained(folder, "cpu")
    ids = [plain.processor.id[t] for t in PLUME_TOKENS]
    assert ids == list(range(size, size + 5))
    assert plain.settings["latent_positions"] == "mrope" and not plain.settings["white_image"]
    mean = tensors["model.embed_tokens.weight"][:size].mean(0)
    for i in ids:
        assert_close(plain.lm.embed_tokens.weight[i].detach(), mean, "new row", 1e-6)
    assert torch.equal(plain.backbone.lm_head.weight, plain.lm.embed_tokens.weight)
    plain.save_pretrained(tmp_path / "start")
    again = Plume.from_pretrained(tmp_path / "start", "cpu")
    assert np.array_equal(again.encode(["a", "b"]), plain.encode(["a", "b"]))


def without(block, *names):
    return {key: value for key, value in block.items() if key not in names}


def test_another_format_of_a_checkpoint_is_refused(small, tmp_path):
    folder = tmp_path / "ck"
    Plume.from_pretrained(small, "cpu").save_pretrained(folder)
    block = json.loads((folder / "config.json").read_text())["plume"]
    template, no_frames = block["template"], block["limits"] | dict(num_frames=0)
    nowhere, twice = "no place for it <bot>", "{item}{item}<bot>"
    assert block["format"] == FORMAT == 2
    for wrong, why in (
        (without(block, "format", "template"), "format 1, this version reads format 2.*train it again"),
        (block | dict(format=3), "format 3, .*use the version of PLUME that wrote it"),
        (block | dict(format="2"), "format '2'"),
        (without(block, "template"), "lacks 'template'"),
        (block | dict(template=without(template, "closing")), "template: lacks 'closing'"),
        (block | dict(template=template | dict(turns=nowhere)), "'turns' must have '{item}' once"),
        (block | dict(template=template | dict(anchor="")), "'anchor' must have '<disc_emb>' once"),
        (block | dict(template=template | dict(turns="<bot>{item}")), "must end in '<bot>'"),
        (block | dict(template=template | dict(turns=twice)), "must have '{item}' once"),
        (block | dict(latent_steps="8"), "'latent_steps' must be of type int"),
        (block | dict(adapter=[]), "'adapter' must be of type dict"),
        (block | dict(limits=no_frames), "num_frames 0: needs a whole number of at least 1"),
        ([], "format"),
        ("x" * 1000, "format 'x{190,200}"),
    ):
        edit_json(folder / "config.json", plume=wrong)
        with pytest.raises(DataError, match=f"ck: .*{why}") as error:
            Plume.from_pretrained(folder, "cpu")
        assert len(str(error.value)) < 900
