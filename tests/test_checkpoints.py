"""Loading says what is wrong; writing loses nothing that is not ours."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model as plume_model
import train
from data import DataError
from model import Plume
from test_plume import call, edit_json, make_model, rendered, shard


def test_a_released_folder_without_pixel_limits_gets_the_released_ones(tmp_path):
    make_model(latent_positions="cache", white_image=True).float().save_pretrained(tmp_path / "ck", released=True)
    (tmp_path / "ck" / "preprocessor_config.json").unlink()
    m = Plume.from_pretrained(tmp_path / "ck", "cpu")
    limits = m.settings["limits"]
    assert (limits["min_pixels"], limits["max_pixels"], limits["max_len"]) == (784, 2359296, 11288)
    page, tiny = rendered(m, [{"image": Image.new("RGB", (1000, 1400))}, {"image": Image.new("RGB", (28, 28))}])
    pads = [sample["ids"].count(m.processor.id["<|image_pad|>"]) for sample in (page, tiny)]
    assert pads == [1800, 1]  # 36 x 50 tokens of 28 x 28 pixels, and not the 1,280 of a plain Qwen2-VL
    (tmp_path / "ck" / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pix')
    with pytest.raises(DataError, match="preprocessor_config.json: not JSON"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")
    for wrong in ('{"min_pixels": "x"}', '{"max_pixels": 0}', '{"max_pixels": 2359296.0}', '{"size": {"longest_edge": -1}}', '{"min_pixels": 9999999}'):
        (tmp_path / "ck" / "preprocessor_config.json").write_text(wrong)
        with pytest.raises(DataError, match="preprocessor_config.json: m[ia][nx]_pixels"):
            Plume.from_pretrained(tmp_path / "ck", "cpu")
    (tmp_path / "ck" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 3136}}')
    limits = Plume.from_pretrained(tmp_path / "ck", "cpu").settings["limits"]
    assert (limits["min_pixels"], limits["max_pixels"]) == (3136, 2359296)


@pytest.mark.parametrize("layout", ["ours", "released", "sharded", "shifted"])
def test_every_loaded_weight_begins_at_a_multiple_of_64_bytes(tmp_path, layout):
    """Where a weight lies decides which path a product takes, and so its last bits: loaded ones lie as trained ones do."""
    m = make_model(**(dict(latent_positions="cache", white_image=True) if layout == "released" else {})).float()
    m.save_pretrained(tmp_path / "ck", released=layout == "released")
    if layout == "sharded":
        shard(tmp_path / "ck")
    if layout == "shifted":  # the header is padded: data begin elsewhere in the file
        path = tmp_path / "ck" / "model.safetensors"
        save_file(load_file(path), path, {"format": "pt", "note": "x" * 13})
    again = Plume.from_pretrained(tmp_path / "ck", "cpu")
    assert [name for name, t in [*again.named_parameters(), *again.named_buffers()] if t.data_ptr() % 64] == []
    assert again.backbone.lm_head.weight is again.lm.embed_tokens.weight
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in m.state_dict().items())


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        Plume.from_pretrained(tmp_path / "nothing")
    with pytest.raises(DataError, match="float32"):
        plume_model.pick_device("cpu", "float23")
    with pytest.raises(DataError, match="latent_steps 33"):
        make_model(latent_steps=33)
    with pytest.raises(DataError, match="Did you mean 'max_pixels'"):
        make_model(limits=dict(max_pixel=3))
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    path = tmp_path / "ck" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")
    save_file(tensors | dict(stray=torch.zeros(1)), path, {"format": "pt"})
    with pytest.raises(ValueError, match="stray"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((tmp_path / "ck" / "config.json").read_text())
    config["plume"]["latent_step"] = 3
    (tmp_path / "ck" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Did you mean 'latent_steps'"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")
    for dtype in (torch.float16, "float16", torch.float64, torch.int8, 3):
        with pytest.raises(DataError, match="needs 'float32' or 'bfloat16'"):
            Plume.from_pretrained(tmp_path / "ck", "cpu", dtype)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4400000000\n"


def half_of(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 128)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def as_type(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.to(dtype) if "up_proj" in name else t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit_inside(folder, key, **changes):
    """Changes keys of an object in config.json."""
    edit_json(folder / "config.json", **{key: json.loads((folder / "config.json").read_text())[key] | changes})


BROKEN = {  # what was done to a checkpoint folder -> the file and the reason that the error names
    "weights cut off": (lambda f: half_of(f / "model.safetensors"), "model.safetensors: not a whole safetensors file"),
    "weights are a pointer": (lambda f: (f / "model.safetensors").write_bytes(LFS), "model.safetensors: .*a Git LFS pointer.*git lfs pull"),
    "weights are empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: not a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index.json"),
    "a shard is gone": (lambda f: (f / max(shard(f).values())).unlink(), "model-00003-of-00003.safetensors: .* is not there"),
    "a shard is cut off": (lambda f: half_of(f / max(shard(f).values())), "model-00003-of-00003.safetensors: not a whole"),
    "the index is cut off": (lambda f: (shard(f), half_of(f / "model.safetensors.index.json")), "model.safetensors.index.json: not JSON"),
    "the index names other tensors": (lambda f: edit_json(f / "model.safetensors.index.json", weight_map={
        name: "model-00001-of-00003.safetensors" for name in shard(f)}), "model-00001-of-00003.safetensors: does not hold what model.safetensors.index.json says"),
    "whole numbers": (lambda f: as_type(f, torch.int8), "model.safetensors: .*is stored as torch.int8"),
    "numbers of 8 bits": (lambda f: as_type(f, torch.float8_e4m3fn), "is stored as torch.float8_e4m3fn"),
    "the index leads elsewhere": (lambda f: (shard(f), edit_json(f / "model.safetensors.index.json", weight_map=dict(a="../x"))), "'weight_map' must name"),
    "another shape": (other_shape, r"up_proj.weight: \(3, 128\) in the file, \(384, 128\) by config.json"),
    "config cut off": (lambda f: half_of(f / "config.json"), "config.json: not JSON"),
    "config is a pointer": (lambda f: (f / "config.json").write_bytes(LFS), "config.json: not JSON.*Git LFS pointer"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: needs an object"),
    "another model": (lambda f: edit_json(f / "config.json", model_type="qwen2_5_vl"), "model_type 'qwen2_5_vl'; PLUME builds on 'qwen2_vl'"),
    "no model type": (lambda f: edit_json(f / "config.json", model_type=None), "model_type None"),
    "no text model": (lambda f: edit_json(f / "config.json", text_config=None), "describes no Qwen2-VL that can be built: .*parameters, and the files hold"),
    "no heads": (lambda f: edit_inside(f, "text_config", num_attention_heads=0), "describes no Qwen2-VL"),
    "no axes": (lambda f: edit_inside(f, "text_config", rope_parameters=dict(rope_type="default", rope_theta=100.0)), "an mrope_section of 3 numbers that sum to 16"),
    "axes of another width": (lambda f: edit_inside(f, "text_config", rope_parameters=dict(rope_type="default", rope_theta=1e2, mrope_section=[4, 6, 7])), "mrope_section"),
    "a million experts": (lambda f: edit_inside(f, "plume", adapter=dict(plume_model.ADAPTER, experts=10**9)), "settings: adapter"),
    "no plume block": (lambda f: edit_json(f / "config.json", plume=None), "config.json has no 'plume' block.*take config.json"),
    "a width in words": (lambda f: edit_json(f / "config.json", text_config=dict(hidden_size="wide")), "no Qwen2-VL that can be built"),
    "an unknown activation": (lambda f: edit_json(f / "config.json", text_config=dict(hidden_act="relu9")), "no Qwen2-VL that can be built"),
    "tokenizer cut off": (lambda f: half_of(f / "tokenizer.json"), "tokenizer.json: not JSON"),
    "tokenizer is a pointer": (lambda f: (f / "tokenizer.json").write_bytes(LFS), "tokenizer.json: not JSON.*Git LFS pointer"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "tokenizer's settings cut off": (lambda f: half_of(f / "tokenizer_config.json"), "tokenizer_config.json: not JSON"),
    "tokenizer of nobody": (lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'), "the tokenizer"),
    "adapter of another width": (lambda f: edit_inside(f, "plume", adapter=dict(plume_model.ADAPTER, experts=7)), "its adapter does not fit"),
    "an adapter of no kind": (lambda f: edit_inside(f, "plume", adapter=dict(plume_model.ADAPTER, kind="x" * 9999)), "adapter kind 'x{40}'"),
    "positions of no rule": (lambda f: edit_inside(f, "plume", latent_positions="y" * 9999), "latent_positions 'y{190,200}.*'mrope' or 'cache'"),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_checkpoint_is_one_error_that_names_file_and_reason(tmp_path, harm, capsys):
    make_model().float().save_pretrained(tmp_path / "ck")
    do, why = BROKEN[harm]
    do(tmp_path / "ck")
    with pytest.raises((DataError, FileNotFoundError), match=rf"(?s){tmp_path / 'ck'}.*{why}") as error:
        Plume.from_pretrained(tmp_path / "ck", "cpu", "float32")
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 1200 and "\n\n" not in str(error.value)
    failed = call("eval.py", "--ckpt", tmp_path / "ck", "--task", "image_cls", "--device=cpu", check=False)  # what `call` lets through is a traceback
    assert failed.returncode == 1 and re.search(why, failed.stderr, re.S)
    with pytest.raises((DataError, OSError), match=f"(?s){why}"):
        train.main(["--init", str(tmp_path / "ck"), "--out", str(tmp_path / "out"), "--device=cpu", "--families=image_cls", "--steps=1"])


def test_an_incomplete_released_adapter_is_an_error(tmp_path):
    make_model(latent_positions="cache", white_image=True).float().save_pretrained(tmp_path / "ck", released=True)
    path = tmp_path / "ck" / "model.safetensors"
    tensors = load_file(path)
    for gone in ("latent_moe_transition.experts.1.fc1.bias", "latent_moe_transition.router.weight"):
        save_file({k: v for k, v in tensors.items() if k != gone}, path, {"format": "pt"})
        with pytest.raises(DataError, match="ck: its adapter"):
            Plume.from_pretrained(tmp_path / "ck", "cpu")
    odd = tensors | {"latent_moe_transition.experts.1.fc1.weight": torch.zeros(5, 128)}
    save_file(odd, path, {"format": "pt"})
    with pytest.raises(DataError, match="ck: its adapter's tensors are incomplete or do not fit"):
        Plume.from_pretrained(tmp_path / "ck", "cpu")


def test_an_interrupted_write_keeps_the_old_checkpoint_and_a_foreign_folder_is_not_overwritten(tmp_path):
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    before = (tmp_path / "ck" / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError), plume_model.replacing(tmp_path / "ck") as folder:
        (Path(folder) / "config.json").write_text("{")
        raise RuntimeError("killed")
    assert (tmp_path / "ck" / "model.safetensors").read_bytes() == before and os.listdir(tmp_path) == ["ck"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        m.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists() and (tmp_path / "mine" / "config.json").read_text() == "{}"
    (tmp_path / "link").symlink_to(tmp_path / "ck")
    m.save_pretrained(tmp_path / "link"), m.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["ck", "link", "mine"]


def test_saving_removes_nothing_but_the_checkpoint_that_it_replaces(tmp_path, monkeypatch):
    m = make_model().float()
    for name in ("best.old", "best.writing", "best.writing.old", "best-1", ".best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("somebody's")
        (tmp_path / name / "model.safetensors").write_text("somebody's")
    (tmp_path / "best").mkdir()  # as a cloned repository without a model
    notes = {"README.md": "card", "LICENSE": "MIT", ".gitattributes": "lfs", "runs/1/events": "log", "lora.safetensors": "theirs", "train_state.txt": "x",
             "vocab.json": "{}", "merges.txt": "", "generation_config.json": "{}", "chat_template.jinja": "for other software"}
    for name, text in notes.items():
        (tmp_path / "best" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "best" / name).write_text(text)
    (tmp_path / "best" / "latest").symlink_to("README.md")
    (tmp_path / "best" / "train_state").mkdir()
    (tmp_path / "best").chmod(0o750)
    inode = (tmp_path / "best" / "README.md").stat().st_ino
    for _ in range(2):
        m.save_pretrained(tmp_path / "best")
    assert {name: (tmp_path / "best" / name).read_text() for name in notes} == notes
    assert (tmp_path / "best").stat().st_mode & 0o777 == 0o750 and (tmp_path / "best" / "train_state").is_dir()
    assert (tmp_path / "best" / "README.md").stat().st_ino == inode and os.readlink(tmp_path / "best" / "latest") == "README.md"
    assert sorted(os.listdir(tmp_path)) == [".best", "best", "best-1", "best.old", "best.writing", "best.writing.old"]
    assert all((tmp_path / name / "config.json").read_text() == "somebody's" for name in os.listdir(tmp_path) if name != "best")
    Plume.from_pretrained(tmp_path / "best", "cpu")
    # the second rename fails: what stood there stands there again
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if not str(a).endswith(".writing") else (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        m.save_pretrained(tmp_path / "best")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [".best", "best", "best-1", "best.old", "best.writing", "best.writing.old"]
    assert {name: (tmp_path / "best" / name).read_text() for name in notes} == notes
    # a folder of theirs has the name of a file of ours: an error in front of everything
    (tmp_path / "best" / "preprocessor_config.json").unlink()
    (tmp_path / "best" / "preprocessor_config.json").mkdir()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="holds a folder 'preprocessor_config.json'"):
        m.save_pretrained(tmp_path / "best")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    (tmp_path / "best" / "preprocessor_config.json").rmdir()
    # what cannot be moved along is left where it is, with a warning: the new checkpoint stands
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if not str(a).endswith("LICENSE") else (_ for _ in ()).throw(OSError("no")))
    with pytest.warns(UserWarning, match=r"best is written, but .* are in .*best\.[0-9a-f]{8}\.old: LICENSE"):
        m.save_pretrained(tmp_path / "best")
    monkeypatch.undo()
    Plume.from_pretrained(tmp_path / "best", "cpu")
    (left,) = [name for name in os.listdir(tmp_path) if name.endswith(".old") and name.count(".") == 2 and not name.startswith("best.w")]
    assert (tmp_path / left / "LICENSE").read_text() == "MIT"
    (tmp_path / "bert").mkdir()  # a checkpoint, but of something else
    m.save_pretrained(tmp_path / "bert")
    edit_json(tmp_path / "bert" / "config.json", model_type="bert")
    with pytest.raises(FileExistsError, match="no checkpoint of a Qwen2-VL"):
        m.save_pretrained(tmp_path / "bert")
    monkeypatch.chdir(tmp_path / "best")
    m.save_pretrained("../best2"), m.save_pretrained("../best2/")
    with pytest.raises(FileExistsError, match="current folder"):
        m.save_pretrained(".")
    with pytest.raises(FileExistsError, match="not a folder"):
        m.save_pretrained(tmp_path / "best" / "README.md")
