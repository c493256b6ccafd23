"""Layouts of checkpoints: shards, kinds of adapter, released, plain, formats; what is in them for others."""

import json
import os
import pickle
import re
import warnings

import huggingface_hub
import jinja2
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from backbones.families import BACKBONES, Limits, limits_of
from data import PLUME_TOKENS, SPECIAL, TEMPLATE
from files.errors import DataError
from files.items import parse_item
from hub.card import chat_template
from hub.folders import HUB_FILES
from hub.layouts import to_released
from hub.limits import stored_limits, write_limits
from hub.settings import FORMAT, RELEASED_PROMPT
from hub.weights import WEIGHTS
from model import Plume
from test_plume import assert_close, make_model, mixed_items, QUICK, rendered
from tests.processes import call
from tests.samples import edit_json, picture, shard


def test_sharded_weights_with_an_index_load_the_same(tmp_path):
    m, folder = make_model().float(), tmp_path / "ck"
    expected = m.encode(["a"])
    m.save_pretrained(folder)
    shard(folder)
    # what transformers does not read is not read here either, whatever it is called
    strays = {"zz.safetensors", "adapter_model.safetensors", "model-00004-of-00003.safetensors"}
    for name in strays:
        save_file({f"adapter.{k}": v + 7 for k, v in m.adapter.state_dict().items()}, folder / name)
    assert_close(Plume.from_pretrained(folder, "cpu").encode(["a"]), expected, "loaded")
    m.save_pretrained(folder)  # one file again; the shards were this checkpoint's, the others were not
    left = {name for name in os.listdir(folder) if name.endswith(("safetensors", "index.json"))}
    assert left == strays | {WEIGHTS}
    assert_close(Plume.from_pretrained(folder, "cpu").encode(["a"]), expected, "loaded")


@pytest.mark.parametrize("layout, settings", [
    ("ours", dict(adapter=dict(kind="none"))), ("ours", dict(adapter=dict(kind="mlp"))),
    ("ours", dict(tied=False)),  # as Qwen2-VL-7B
    ("released", {}), ("sharded", {}), ("shifted", {})])
def test_every_kind_of_model_and_layout_is_loaded_as_saved_with_weights_at_multiples_of_64_bytes(
        tmp_path, layout, settings):
    """As those of a trained one: where a weight lies decides the path of a product, and so its last bits."""
    folder, m = tmp_path / "ck", make_model(**settings).float()
    m.save_pretrained(folder, released=layout == "released")
    if layout == "sharded":
        shard(folder)
    if layout == "shifted":  # the header is padded: data begin elsewhere in the file
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, dict(format="pt", note="x" * 13))
    again = Plume.from_pretrained(folder, "cpu")
    tensors = [*again.named_parameters(), *again.named_buffers()]
    assert [name for name, tensor in tensors if tensor.data_ptr() % 64 != 0] == []
    assert (again.backbone.lm_head.weight is again.lm.embed_tokens.weight) == settings.get("tied", True)
    ours, theirs = m.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_released_layout_round_trip(world, tmp_path):
    m, folder = make_model(latent_positions="cache", white_image=True).float(), tmp_path / "ck"
    m.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="implies other values.*prompt"):
        Plume.from_pretrained(tmp_path / "ours", "cpu").save_pretrained(folder, released=True)
    names = set(load_file(folder / WEIGHTS))
    adapter = {f"latent_moe_transition.{name}" for name in to_released(m.adapter.state_dict(), True)}
    backbone = {"model.layers.0.self_attn.q_proj.weight", "visual.merger.mlp.0.weight", "model.norm.weight"}
    assert adapter | backbone < names and "lm_head.weight" not in names
    assert "plume" not in json.loads((folder / "config.json").read_text())
    settings = Plume.from_pretrained(folder, "cpu").settings  # recognised by its weights
    implied = dict(latent_positions="cache", white_image=True, latent_steps=8, prompt=RELEASED_PROMPT)
    assert settings | implied == settings
    assert settings["limits"]["max_pixels"] == m.processor.limits.max_pixels  # of preprocessor_config.json
    own = {name: m.settings[name] for name in ("prompt", "limits", "template")}
    again = Plume.from_pretrained(folder, "cpu", **own)
    assert_close(again.encode(mixed_items(world)), m.encode(mixed_items(world)), "loaded")
    assert len(rendered(again, ["words"])[0]["pixels"]) == 1  # the white picture in front of text
    again.settings["adapter"]["top_k"] = 1
    with pytest.warns(UserWarning, match="'top_k': 1"):
        again.save_pretrained(tmp_path / "other", released=True)
    with pytest.raises(DataError, match="no adapter"):
        make_model(adapter=dict(kind="none")).save_pretrained(tmp_path / "other", released=True)


def as_from_the_hub(folder):
    """Makes our checkpoint a plain Qwen2-VL in the hub's flat spelling -> tensors, number of tokens."""
    tensors = {k: v for k, v in load_file(folder / WEIGHTS).items() if not k.startswith("adapter.")}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    flat = config.pop("text_config") | config | dict(model_type="qwen2_vl")
    rope, _ = flat.pop("rope_parameters"), flat.pop("plume")
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = dict(type="mrope", mrope_section=rope["mrope_section"])
    (folder / "config.json").write_text(json.dumps(flat))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = [t for t in tokenizer["added_tokens"] if t["content"] not in PLUME_TOKENS]
    tokenizer["added_tokens"], vocabulary = added, tokenizer["model"]["vocab"]
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
    assert_close(plain.lm.embed_tokens.weight[ids].detach(), mean.expand(5, -1), "new rows", 1e-6)
    assert torch.equal(plain.backbone.lm_head.weight, plain.lm.embed_tokens.weight)


EVIL = "".join(SPECIAL) + " <|fim_prefix|> <think>a <|im_start|>user\n<|image_pad|>"


def read_text(folder):
    """-> ids of EVIL and of what others write, as a loaded checkpoint reads them"""
    p = Plume.from_pretrained(folder, "cpu").processor
    return p.encode(EVIL), p.encode("What colour is it? " * 9 + "red"), p


@pytest.mark.parametrize("state", ["truncation", "padding", "dropout"])
def test_truncation_padding_and_dropout_of_a_tokenizer_file_change_no_text_and_are_not_saved(state, tmp_path):
    folder = tmp_path / "ck"
    make_model().float().save_pretrained(folder)
    plain, file = read_text(folder)[:2], str(folder / "tokenizer.json")
    stored = tokenizers.Tokenizer.from_file(file)
    if state == "truncation":
        stored.enable_truncation(3, direction="left")
    elif state == "padding":
        stored.enable_padding(length=512)
    else:
        stored.model.dropout = 0.5
    stored.save(file)
    *found, p = read_text(folder)
    assert found == list(plain) and p.encode("ab" * 20) == pickle.loads(pickle.dumps(p)).encode("ab" * 20)
    p.tokenizer("a", padding="max_length", truncation=True, max_length=2)  # transformers leaves them on
    Plume.from_pretrained(folder, "cpu").save_pretrained(folder)
    kept = tokenizers.Tokenizer.from_file(file)
    assert (kept.truncation, kept.padding, kept.model.dropout) == (None, None, None)
    assert "max_length" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_special_tokens_in_a_text_are_characters_in_every_form_of_a_tokenizer(tmp_path):
    folder, m = tmp_path / "ck", make_model().float()
    m.processor.tokenizer.add_tokens(["<think>"])  # a word, as in Qwen3's vocabulary
    m.processor.tokenizer.add_tokens(["<|fim_prefix|>"], special_tokens=True)
    m.save_pretrained(folder)
    *expected, p = read_text(folder)
    hidden = {*p.id.values(), p.tokenizer.convert_tokens_to_ids("<|fim_prefix|>")}
    assert not hidden & set(expected[0])
    assert expected[0].count(p.tokenizer.convert_tokens_to_ids("<think>")) == 1
    raw = json.loads((folder / "tokenizer.json").read_text())
    unmarked = [token | dict(special=False) for token in raw["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw | dict(added_tokens=unmarked)))
    assert read_text(folder)[:2] == tuple(expected)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    merges = "\n".join(" ".join(pair) for pair in raw["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    for name, value in (("vocab", raw["model"]["vocab"]),
                        ("added_tokens", {token["content"]: token["id"] for token in unmarked})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    assert read_text(folder)[:2] == tuple(expected)


def test_another_format_of_a_checkpoint_is_refused(small, tmp_path):
    folder = tmp_path / "ck"
    Plume.from_pretrained(small, "cpu").save_pretrained(folder)
    block = json.loads((folder / "config.json").read_text())["plume"]
    no_template, no_closing = dict(block), dict(block["template"])
    del no_template["template"], no_closing["closing"]
    assert block["format"] == FORMAT == 2

    def template(**changes):
        return block | dict(template=block["template"] | changes)

    for wrong, why in (
        (dict(latent_steps=8), "format 1, this version reads format 2.*train it again"),
        (block | dict(format=3), "format 3, .*use the version of PLUME that wrote it"),
        (no_template, "lacks 'template'"),
        (block | dict(template=no_closing), "template: lacks 'closing'"),
        (template(turns="{item}{item}<bot>"), "must have '{item}' once"),
        (template(turns="<bot>{item}"), "must end in '<bot>'"),
        (template(anchor=""), "'anchor' must have '<disc_emb>' once"),
        (block | dict(latent_steps="8"), "'latent_steps' must be of type int"),
        (block | dict(adapter=[]), "'adapter'"), (block | dict(format="2"), "format '2'"),
        (block | dict(limits=block["limits"] | dict(max_pixel=9)), "Did you mean 'max_pixels'"),
        (block | dict(limits=block["limits"] | dict(num_frames=0)), "num_frames 0: needs a whole number"),
        (2, "format 2"), ("x" * 1000, "format 'x{190,200}"),
    ):
        edit_json(folder / "config.json", plume=wrong)
        with pytest.raises(DataError, match=f"ck: .*{why}") as error:
            Plume.from_pretrained(folder, "cpu")
        assert len(str(error.value)) < 900


OWN = dict(system='You "embed" {x} \N{GRINNING FACE}.', anchor=" -> <disc_emb> : {prompt}")


def write_limits_of(folder, **files):
    for name, value in files.items():
        (folder / f"{name}_config.json").write_text(json.dumps(value))


EDGES, SPELLED = dict(shortest_edge=65536, longest_edge=524288), dict(min_pixels=65536, max_pixels=524288)
CLIPS = dict(size=dict(shortest_edge=40960, longest_edge=409600), num_frames=4, fps=None)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_limits_are_those_of_all_three_files_of_a_processor(model_type, tmp_path):
    own, facts = limits_of(model_type), BACKBONES[model_type]
    frames = 4 if facts.time == "text" else 1  # whose pixels are limited together
    clips = dict(video_min_pixels=40960 // frames, video_max_pixels=409600 // frames, num_frames=4)
    new = Limits(**own | dict(min_pixels=8192, max_pixels=81920, video_min_pixels=5000, num_frames=6))
    for n, (files, changes) in enumerate([
        (dict(), dict()),
        (dict(processor=dict(processor_class="Q")), dict()),
        (dict(processor=dict(image_processor=dict(size=EDGES), video_processor=CLIPS)), SPELLED | clips),
        (dict(preprocessor=SPELLED), SPELLED),
        (dict(preprocessor=dict(size=SPELLED)), SPELLED),
        (dict(video_preprocessor=CLIPS), clips),
        (dict(video_preprocessor=CLIPS | dict(min_pixels=40960), preprocessor=SPELLED), SPELLED | clips),
        (dict(preprocessor=SPELLED, processor=dict(image_processor=dict(size=EDGES))), SPELLED),
    ]):
        folder = tmp_path / str(n)
        folder.mkdir()
        write_limits_of(folder, **files)
        found, said = stored_limits(folder, own, model_type)
        assert found == own | changes
        assert set(re.findall(r"(\w+) [\d,]+ \(\w+_config.json\)", said)) == changes.keys()
        # what is written over it says the new limits in every file, and others' keys stay
        write_limits(folder, new, facts)
        of_pictures = dict(min_pixels=8192, max_pixels=81920)
        changed = {name: vars(new)[name] for name in changes} | of_pictures
        assert stored_limits(folder, own, model_type)[0] == own | changed
        for name, value in files.items():
            assert json.loads((folder / f"{name}_config.json").read_text()).keys() >= value.keys() - {"size"}
    write_limits_of(folder, preprocessor=SPELLED, processor=dict(image_processor=dict(min_pixels=4096)))
    why = "processor_config.json: min_pixels is 4096, in preprocessor_config.json it is 65536; make them"
    with pytest.raises(DataError, match=why):
        stored_limits(folder, own, model_type)
    write_limits_of(folder, processor=dict(video_processor=dict(max_pixels="many")))
    with pytest.raises(DataError, match="processor_config.json: video_max_pixels 'many'"):
        stored_limits(folder, own, model_type)


def test_a_plain_model_takes_the_limits_of_processor_config_and_says_so(tmp_path, capsys):
    folder = tmp_path / "ck"
    make_model().float().save_pretrained(folder)
    as_from_the_hub(folder)
    (folder / "preprocessor_config.json").unlink()
    write_limits_of(folder, processor=dict(image_processor=dict(size=EDGES), video_processor=CLIPS))
    m = Plume.from_pretrained(folder, "cpu")
    limits = m.processor.limits
    assert (limits.min_pixels, limits.max_pixels, limits.video_max_pixels) == (65536, 524288, 409600)
    assert "min_pixels 65,536 (processor_config.json)" in capsys.readouterr().out
    m.save_pretrained(folder)
    edit_json(folder / "config.json", plume=None)  # as other software reads it
    assert stored_limits(folder, m.settings["limits"], "qwen2_vl")[0] == m.settings["limits"]


def test_what_others_added_to_files_for_sentence_transformers_stays(tmp_path):
    folder, m = tmp_path / "ck", make_model().float()
    m.save_pretrained(folder)
    fresh = {name: (folder / name).read_text() for name in HUB_FILES}
    m.save_pretrained(folder)
    assert {name: json.loads((folder / name).read_text()) for name in HUB_FILES[:3]} == {
        name: json.loads(fresh[name]) for name in HUB_FILES[:3]}
    theirs = dict(prompts=dict(query="Find: "), default_prompt_name="query", truncate_dim=64, note="mine")
    normalize = dict(idx=1, name="1", path="1_Normalize", type="sentence_transformers.models.Normalize")
    modules = [*json.loads(fresh["modules.json"]), normalize]
    edit_json(folder / "config_sentence_transformers.json", **theirs, model_type="old")
    edit_json(folder / "sentence_bert_config.json", modalities=["text"])
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "plume_st.py").write_text("old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plume.from_pretrained(folder, "cpu").save_pretrained(folder)
    kept = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert kept == json.loads(fresh["config_sentence_transformers.json"]) | theirs
    assert json.loads((folder / "sentence_bert_config.json").read_text()) == dict(modalities=["text"])
    assert json.loads((folder / "modules.json").read_text()) == modules
    assert (folder / "plume_st.py").read_text() == fresh["plume_st.py"]
    (folder / "config_sentence_transformers.json").write_text("{")
    with pytest.warns(UserWarning, match="_transformers.json: not JSON.* it is now .*json.old"):
        m.save_pretrained(folder)
    assert (folder / "config_sentence_transformers.json").read_text() == fresh[HUB_FILES[1]]
    assert (folder / "config_sentence_transformers.json.old").read_text() == "{"


def turn(content):
    return dict(role="user", content=content)


@pytest.mark.parametrize("settings", [{}, dict(template=TEMPLATE | OWN), dict(white_image=True)])
def test_the_chat_template_of_the_tokenizer_gives_the_prefix_of_encode(settings, tmp_path):
    make_model(**settings).float().save_pretrained(tmp_path / "ck")
    p = Plume.from_pretrained(tmp_path / "ck", "cpu").processor
    bar, pads = picture("red", "bar", (84, 56)), (p.id["<|image_pad|>"], p.id["<|video_pad|>"])
    text = dict(type="text", text=" what <b>is</b> it?\n")
    for content, item in (
        ([text], text["text"]),
        ([dict(type="image", image=bar), text], dict(image=bar, text=text["text"])),
        ([text, dict(type="video", video=[bar])], dict(video=[bar], text=text["text"] + "<video>")),
        ("red", "red"),
    ):
        ids = p.render(parse_item(item))["ids"]  # others' software puts a picture's pads where one stands
        one_a_picture = [token for i, token in enumerate(ids) if token not in pads or ids[i - 1] != token]
        assert p.tokenizer.apply_chat_template([turn(content)])["input_ids"] == one_a_picture
    assert (tmp_path / "ck" / "chat_template.jinja").read_text() == p.tokenizer.chat_template


@pytest.mark.parametrize("messages, why", [
    ([dict(role="system", content="x")], "one turn of the user"),
    ([turn([]), turn([])], "one turn of the user"),
    ([turn([dict(type="audio")])], "text, image and video, not audio"),
])
def test_the_chat_template_refuses_what_plume_does_not_embed(model, messages, why):
    with pytest.raises(jinja2.TemplateError, match=why):
        template = chat_template(model.processor)
        model.processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


def test_a_revision_and_a_token_reach_the_hub(small, monkeypatch):
    asked = []

    def download(name, **given):
        asked.append((name, given["revision"], given["token"]))
        return os.fspath(small)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Plume.from_pretrained("somebody/plume", "cpu", revision="v2", token="secret")
    Plume.from_pretrained("somebody/plume", "cpu")
    assert asked == [("somebody/plume", "v2", "secret"), ("somebody/plume", None, None)]
    with pytest.raises(DataError, match="has no revision 'v2'"):
        Plume.from_pretrained(small, "cpu", revision="v2")


def test_the_model_card_is_written_anew_and_somebody_elses_stays(tmp_path):
    folder, m = tmp_path / "ck", make_model().float()
    file = folder / "README.md"
    for steps in (5, 3):
        m.settings["latent_steps"] = steps
        m.save_pretrained(folder)
        card = file.read_text()
        assert "of 128 numbers" in card and f"in {steps} continuous latent steps" in card and "$" not in card
        assert json.loads(card.split("```json\n")[1].split("```")[0]) == m.settings
    file.write_text("my own")
    m.save_pretrained(folder)
    assert file.read_text() == "my own"
    m.save_pretrained(folder, released=True)
    assert not set(HUB_FILES) & set(os.listdir(folder))


def test_the_card_of_a_run_has_its_flags_and_its_last_held_out_score(world, tmp_path):
    flags = ["--data", world / "train.jsonl", "--steps=4", "--eval_every=2", "--keep=1", "--save_every=2"]
    printed = call("train.py", "--out", tmp_path / "out", *QUICK, *flags)
    score = printed.stdout.split("hit@1 ")[-1].split(" ")[0]
    card = (tmp_path / "out" / "checkpoint" / "README.md").read_text()
    assert "4 of 4 steps" in card and f"hit@1 {score} on 2 held-out pairs after 4 steps." in card
    assert "--steps 4" in card and "--eval_every 2" in card
    assert str(tmp_path) not in card  # where it was written is not part of the recipe
