"""Loading says what is wrong; writing loses nothing that is not ours."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from engine import ranks
from hub import folders
from hub import settings
from files.errors import DataError
from model import Plume
from test_plume import make_model, rendered
from tests.processes import call
from tests.samples import edit_json, shard

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAST = "model-00003-of-00003.safetensors"  # of the three that `shard` makes


def save(folder, tensors, **about):
    save_file(tensors, folder / WEIGHTS, {"format": "pt"} | about)


def save_released(folder):
    """A checkpoint as the released one is stored -> the model."""
    m = make_model(latent_positions="cache", white_image=True).float()
    m.save_pretrained(folder, released=True)
    return m


def edit_inside(folder, key, changes):
    """Changes keys of an object in config.json."""
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{key: config[key] | changes})


def pixel_limits(folder):
    limits = Plume.from_pretrained(folder, "cpu").settings["limits"]
    return limits["min_pixels"], limits["max_pixels"]


def test_a_released_folder_without_pixel_limits_gets_the_released_ones(tmp_path):
    save_released(tmp_path / "ck")
    stored = tmp_path / "ck" / "preprocessor_config.json"
    stored.unlink()
    m = Plume.from_pretrained(tmp_path / "ck", "cpu")
    limits = m.settings["limits"]
    assert (limits["min_pixels"], limits["max_pixels"], limits["max_len"]) == (784, 2359296, 11288)
    sizes = [(1000, 1400), (28, 28)]
    samples = rendered(m, [{"image": Image.new("RGB", size)} for size in sizes])
    pads = [sample["ids"].count(m.processor.id["<|image_pad|>"]) for sample in samples]
    assert pads == [1800, 1]  # 36 x 50 tokens of 28 x 28 pixels, and not the 1,280 of a plain Qwen2-VL
    stored.write_text('{"min_pixels": 3136, "max_pix')
    with pytest.raises(DataError, match="preprocessor_config.json: not JSON"):
        pixel_limits(tmp_path / "ck")
    for wrong in (
        '{"min_pixels": "x"}',
        '{"max_pixels": 0}',
        '{"max_pixels": 2359296.0}',
        '{"size": {"longest_edge": -1}}',
        '{"min_pixels": 9999999}',
    ):
        stored.write_text(wrong)
        with pytest.raises(DataError, match="preprocessor_config.json: m[ia][nx]_pixels"):
            pixel_limits(tmp_path / "ck")
    stored.write_text('{"size": {"shortest_edge": 3136}}')
    assert pixel_limits(tmp_path / "ck") == (3136, 2359296)


@pytest.mark.parametrize("layout", ["ours", "released", "sharded", "shifted"])
def test_every_loaded_weight_begins_at_a_multiple_of_64_bytes(tmp_path, layout):
    """Where a weight lies decides which path a product takes, and so its last bits.

    Loaded ones lie as trained ones do.
    """
    folder = tmp_path / "ck"
    if layout == "released":
        m = save_released(folder)
    else:
        m = make_model().float()
        m.save_pretrained(folder)
    if layout == "sharded":
        shard(folder)
    if layout == "shifted":  # the header is padded: data begin elsewhere in the file
        save(folder, load_file(folder / WEIGHTS), note="x" * 13)
    again = Plume.from_pretrained(folder, "cpu")
    tensors = [*again.named_parameters(), *again.named_buffers()]
    assert [name for name, t in tensors if t.data_ptr() % 64 != 0] == []
    assert again.backbone.lm_head.weight is again.lm.embed_tokens.weight
    loaded = again.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in m.state_dict().items())


def test_loading_says_what_is_wrong(tmp_path):
    folder = tmp_path / "ck"
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        Plume.from_pretrained(tmp_path / "nothing")
    with pytest.raises(DataError, match="float32"):
        ranks.pick_device("cpu", "float23")
    with pytest.raises(DataError, match="latent_steps 33"):
        make_model(latent_steps=33)
    with pytest.raises(DataError, match="Did you mean 'max_pixels'"):
        make_model(limits=dict(max_pixel=3))
    make_model().float().save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    save(folder, {name: t for name, t in tensors.items() if "layers.1.mlp.up_proj" not in name})
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj"):
        Plume.from_pretrained(folder, "cpu")
    save(folder, tensors | dict(stray=torch.zeros(1)))
    with pytest.raises(ValueError, match="stray"):
        Plume.from_pretrained(folder, "cpu")
    save(folder, tensors)
    edit_inside(folder, "plume", dict(latent_step=3))
    with pytest.raises(ValueError, match="Did you mean 'latent_steps'"):
        Plume.from_pretrained(folder, "cpu")
    for dtype in (torch.float16, "float16", torch.float64, torch.int8, 3):
        with pytest.raises(DataError, match="needs 'float32' or 'bfloat16'"):
            Plume.from_pretrained(folder, "cpu", dtype)


# What can be wrong with a checkpoint folder is made so by these


def cut(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def remove(folder, name):
    (folder / name).unlink()


def write(folder, name, text):
    (folder / name).write_text(text)


def edit(folder, name, changes):
    edit_json(folder / name, **changes)


def edit_adapter(folder, changes):
    edit_inside(folder, "plume", dict(adapter=settings.ADAPTER | changes))


def sharded(folder, do, *arguments):
    shard(folder)
    do(folder, *arguments)


def index_names_the_first_shard_only(folder):
    names = shard(folder)
    edit(folder, INDEX, dict(weight_map=dict.fromkeys(names, "model-00001-of-00003.safetensors")))


def other_shape(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 128)
    save(folder, tensors)


def as_type(folder, dtype):
    tensors = load_file(folder / WEIGHTS)
    for name in tensors:
        if "up_proj" in name:
            tensors[name] = tensors[name].to(dtype)
    save(folder, tensors)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4400000000\n"
NOBODY = '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'
NO_AXES = dict(rope_parameters=dict(rope_type="default", rope_theta=100.0))
OTHER_AXES = dict(rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 6, 7]))

# what is wrong with a folder: how it is made so, then the file and the reason that the error names
BROKEN = {
    "weights cut off": (cut, WEIGHTS, "model.safetensors: not a whole safetensors file"),
    "weights are a pointer": (write, WEIGHTS, LFS, "model.safetensors: .*a Git LFS pointer.*git lfs pull"),
    "weights are empty": (write, WEIGHTS, "", "model.safetensors: not a whole safetensors file"),
    "no weights": (remove, WEIGHTS, "neither model.safetensors nor model.safetensors.index.json"),
    "a shard is gone": (sharded, remove, LAST, "model-00003-of-00003.safetensors: .* is not there"),
    "a shard is cut off": (sharded, cut, LAST, "model-00003-of-00003.safetensors: not a whole"),
    "the index is cut off": (sharded, cut, INDEX, "model.safetensors.index.json: not JSON"),
    "the index names other tensors":
        (index_names_the_first_shard_only,
         "model-00001-of-00003.safetensors: does not hold what model.safetensors.index.json says"),
    "whole numbers": (as_type, torch.int8, "model.safetensors: .*is stored as torch.int8"),
    "numbers of 8 bits": (as_type, torch.float8_e4m3fn, "is stored as torch.float8_e4m3fn"),
    "the index leads elsewhere":
        (sharded, edit, INDEX, dict(weight_map=dict(a="../x")), "'weight_map' must name"),
    "another shape": (other_shape, r"up_proj.weight: \(3, 128\) in the file, \(384, 128\) by config.json"),
    "config cut off": (cut, "config.json", "config.json: not JSON"),
    "config is a pointer": (write, "config.json", LFS, "config.json: not JSON.*Git LFS pointer"),
    "config is a list": (write, "config.json", "[]", "config.json: needs an object"),
    "another model":
        (edit, "config.json", dict(model_type="qwen3_vl_moe"),
         "model_type 'qwen3_vl_moe'; PLUME builds on qwen2_vl, .*Did you mean 'qwen3_vl'"),
    "another backbone's name":
        (edit, "config.json", dict(model_type="qwen2_5_vl"), "no Qwen-VL that can be built"),
    "no model type": (edit, "config.json", dict(model_type=None), "model_type None"),
    "no text model":
        (edit, "config.json", dict(text_config=None),
         "describes no Qwen-VL that can be built: .*parameters, and the files hold"),
    "no heads": (edit_inside, "text_config", dict(num_attention_heads=0), "describes no Qwen-VL"),
    "no axes": (edit_inside, "text_config", NO_AXES, "an mrope_section of 3 numbers that sum to 16"),
    "axes of another width": (edit_inside, "text_config", OTHER_AXES, "mrope_section"),
    "a million experts": (edit_adapter, dict(experts=10**9), "settings: adapter"),
    "no plume block":
        (edit, "config.json", dict(plume=None), "config.json has no 'plume' block.*take config.json"),
    "a width in words":
        (edit, "config.json", dict(text_config=dict(hidden_size="wide")), "no Qwen-VL that can be built"),
    "an unknown activation":
        (edit, "config.json", dict(text_config=dict(hidden_act="relu9")), "no Qwen-VL that can be built"),
    "tokenizer cut off": (cut, "tokenizer.json", "tokenizer.json: not JSON"),
    "tokenizer is a pointer": (write, "tokenizer.json", LFS, "tokenizer.json: not JSON.*Git LFS pointer"),
    "no tokenizer": (remove, "tokenizer.json", "tokenizer.json: no such file"),
    "tokenizer's settings cut off": (cut, "tokenizer_config.json", "tokenizer_config.json: not JSON"),
    "tokenizer of nobody": (write, "tokenizer.json", NOBODY, "the tokenizer"),
    "adapter of another width": (edit_adapter, dict(experts=7), "its adapter does not fit"),
    "an adapter of no kind": (edit_adapter, dict(kind="x" * 9999), "adapter kind 'x{40}'"),
    "positions of no rule":
        (edit_inside, "plume", dict(latent_positions="y" * 9999),
         "latent_positions 'y{190,200}.*'mrope' or 'cache'"),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_checkpoint_is_one_error_that_names_file_and_reason(tmp_path, harm, capsys):
    folder = tmp_path / "ck"
    make_model().float().save_pretrained(folder)
    do, *arguments, why = BROKEN[harm]
    do(folder, *arguments)
    with pytest.raises((DataError, FileNotFoundError), match=rf"(?s){folder}.*{why}") as error:
        Plume.from_pretrained(folder, "cpu", "float32")
    said = str(error.value)
    assert str(tmp_path) in said and len(said) < 1200 and "\n\n" not in said
    # what `call` lets through is a traceback
    failed = call("eval.py", "--ckpt", folder, "--task", "image_cls", "--device=cpu", check=False)
    assert failed.returncode == 1 and re.search(why, failed.stderr, re.S)
    flags = ["--init", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises((DataError, OSError), match=f"(?s){why}"):
        train.main([*flags, "--device=cpu", "--families=image_cls", "--steps=1"])


def test_an_incomplete_released_adapter_is_an_error(tmp_path):
    folder = tmp_path / "ck"
    save_released(folder)
    tensors = load_file(folder / WEIGHTS)
    for gone in ("latent_moe_transition.experts.1.fc1.bias", "latent_moe_transition.router.weight"):
        save(folder, {name: tensor for name, tensor in tensors.items() if name != gone})
        with pytest.raises(DataError, match="ck: its adapter"):
            Plume.from_pretrained(folder, "cpu")
    save(folder, tensors | {"latent_moe_transition.experts.1.fc1.weight": torch.zeros(5, 128)})
    with pytest.raises(DataError, match="ck: its adapter's tensors are incomplete or do not fit"):
        Plume.from_pretrained(folder, "cpu")


def test_an_interrupted_write_keeps_the_old_checkpoint_and_a_foreign_folder_is_not_overwritten(tmp_path):
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    before = (tmp_path / "ck" / WEIGHTS).read_bytes()
    with pytest.raises(RuntimeError), folders.replacing(tmp_path / "ck") as folder:
        (Path(folder) / "config.json").write_text("{")
        raise RuntimeError("killed")
    assert (tmp_path / "ck" / WEIGHTS).read_bytes() == before
    assert os.listdir(tmp_path) == ["ck"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    (mine / "thesis.txt").write_text("do not lose")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        m.save_pretrained(mine)
    assert (mine / "thesis.txt").exists()
    assert (mine / "config.json").read_text() == "{}"
    (tmp_path / "link").symlink_to(tmp_path / "ck")
    m.save_pretrained(tmp_path / "link")
    m.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["ck", "link", "mine"]


def refuse_rename(monkeypatch, end):
    """os.rename fails for a name that ends so."""
    rename = os.rename

    def refusing(a, b):
        if str(a).endswith(end):
            raise OSError("no")
        rename(a, b)

    monkeypatch.setattr(os, "rename", refusing)


NEIGHBOURS = [".best", "best-1", "best.old", "best.writing", "best.writing.old"]
NOTES = {  # as in a cloned repository, some under names that a checkpoint of other software has
    "README.md": "card",
    "LICENSE": "MIT",
    ".gitattributes": "lfs",
    "runs/1/events": "log",
    "lora.safetensors": "theirs",
    "train_state.txt": "x",
    "vocab.json": "{}",
    "merges.txt": "",
    "generation_config.json": "{}",
}


def make_neighbours(root):
    """`best` with files that are no checkpoint's, between folders with names much like it."""
    for name in NEIGHBOURS:
        (root / name).mkdir()
        (root / name / "config.json").write_text("somebody's")
        (root / name / WEIGHTS).write_text("somebody's")
    best = root / "best"
    best.mkdir()
    for name, text in NOTES.items():
        (best / name).parent.mkdir(parents=True, exist_ok=True)
        (best / name).write_text(text)
    (best / "latest").symlink_to("README.md")
    (best / "train_state").mkdir()
    best.chmod(0o750)
    return best


def test_saving_removes_nothing_but_the_checkpoint_that_it_replaces(tmp_path, monkeypatch):
    m, best = make_model().float(), make_neighbours(tmp_path)
    inode = (best / "README.md").stat().st_ino

    def all_stands():
        assert sorted(os.listdir(tmp_path)) == sorted(["best", *NEIGHBOURS])
        assert {name: (best / name).read_text() for name in NOTES} == NOTES

    for _ in range(2):
        m.save_pretrained(best)
    all_stands()
    assert best.stat().st_mode & 0o777 == 0o750
    assert (best / "train_state").is_dir()
    assert (best / "README.md").stat().st_ino == inode
    assert os.readlink(best / "latest") == "README.md"
    assert {(tmp_path / name / "config.json").read_text() for name in NEIGHBOURS} == {"somebody's"}
    Plume.from_pretrained(best, "cpu")

    # the second rename fails: what stood there stands there again
    refuse_rename(monkeypatch, ".writing")
    with pytest.raises(OSError, match="no"):
        m.save_pretrained(best)
    monkeypatch.undo()
    all_stands()

    # a folder of theirs has the name of a file of ours: an error in front of everything
    (best / "preprocessor_config.json").unlink()
    (best / "preprocessor_config.json").mkdir()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="holds a folder 'preprocessor_config.json'"):
        m.save_pretrained(best)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    (best / "preprocessor_config.json").rmdir()

    # what cannot be moved along is left where it is, with a warning: the new checkpoint stands
    refuse_rename(monkeypatch, "LICENSE")
    where = r"best is written, but .* are in .*best\.[0-9a-f]{8}\.old: LICENSE"
    with pytest.warns(UserWarning, match=where):
        m.save_pretrained(best)
    monkeypatch.undo()
    Plume.from_pretrained(best, "cpu")
    (left,) = set(os.listdir(tmp_path)) - {"best", *NEIGHBOURS}
    assert left.endswith(".old")
    assert (tmp_path / left / "LICENSE").read_text() == "MIT"

    # a checkpoint, but of something else
    m.save_pretrained(tmp_path / "bert")
    edit_json(tmp_path / "bert" / "config.json", model_type="bert")
    with pytest.raises(FileExistsError, match="no checkpoint of a Qwen-VL"):
        m.save_pretrained(tmp_path / "bert")

    monkeypatch.chdir(best)
    m.save_pretrained("../best2")
    m.save_pretrained("../best2/")
    with pytest.raises(FileExistsError, match="current folder"):
        m.save_pretrained(".")
    with pytest.raises(FileExistsError, match="not a folder"):
        m.save_pretrained(best / "README.md")
