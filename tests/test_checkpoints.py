"""Loading says what is wrong; writing loses nothing that is not ours."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from adapter import TransitionAdapter
from files.errors import DataError
from hub.folders import replacing
from hub.layouts import write_checkpoint
from hub.settings import ADAPTER
from hub.weights import INDEX, WEIGHTS
from model import Plume
from test_plume import make_model, rendered
from tests.processes import call
from tests.samples import edit_json, shard

FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"  # of those of `shard`


def save_released(folder):
    """A checkpoint as the released one is stored."""
    make_model(latent_positions="cache", white_image=True).float().save_pretrained(folder, released=True)


def test_a_released_folder_without_pixel_limits_gets_the_released_ones(tmp_path):
    def pixel_limits():
        limits = Plume.from_pretrained(tmp_path / "ck", "cpu").settings["limits"]
        return limits["min_pixels"], limits["max_pixels"]

    save_released(tmp_path / "ck")
    stored = tmp_path / "ck" / "preprocessor_config.json"
    stored.unlink()
    m = Plume.from_pretrained(tmp_path / "ck", "cpu")
    assert pixel_limits() == (784, 2359296) and m.settings["limits"]["max_len"] == 11288
    samples = rendered(m, [{"image": Image.new("RGB", size)} for size in ((1000, 1400), (28, 28))])
    pads = [sample["ids"].count(m.processor.id["<|image_pad|>"]) for sample in samples]
    assert pads == [1800, 1]  # 36 x 50 tokens of 28 x 28 pixels, and not the 1,280 of a plain Qwen2-VL
    for text, why in (('{"min_pixels": 31', "not JSON"), ('{"size": {"longest_edge": -1}}', "max_pixels")):
        stored.write_text(text)
        with pytest.raises(DataError, match=f"preprocessor_config.json: {why}"):
            pixel_limits()
    stored.write_text('{"size": {"shortest_edge": 3136}}')
    assert pixel_limits() == (3136, 2359296)
    # its evaluation does not ask this file
    write(tmp_path / "ck", "video_preprocessor_config.json", '{"max_pixels": 999999}')
    assert Plume.from_pretrained(tmp_path / "ck", "cpu").processor.limits.video_max_pixels == 28 * 28 * 32


def test_too_many_steps_and_other_numbers_than_float32_and_bfloat16_are_refused(small):
    with pytest.raises(DataError, match="latent_steps 33"):
        make_model(latent_steps=33)
    for dtype in (torch.float16, "float16", torch.float64, torch.int8, 3):
        with pytest.raises(DataError, match="needs 'float32' or 'bfloat16'"):
            Plume.from_pretrained(small, "cpu", dtype)


# What can be wrong with a checkpoint folder is made so by these


def cut(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def remove(folder, name):
    (folder / name).unlink()


def write(folder, name, text):
    (folder / name).write_text(text)


def edit(folder, changes, name="config.json"):
    """Changes keys of a JSON file, and those of the objects in it; None takes one away."""
    there = json.loads((folder / name).read_text())
    edit_json(folder / name, **{k: there[k] | v if isinstance(v, dict) else v for k, v in changes.items()})


def edit_weights(folder, changes):
    """Other tensors by their names; None takes one away."""
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS, dict(format="pt"))


def sharded(folder, do, *arguments):
    shard(folder)
    do(folder, *arguments)


def index_names_the_first_shard_only(folder):
    edit(folder, dict(weight_map=dict.fromkeys(shard(folder), FIRST)), INDEX)


def adapter(**changes):
    return dict(plume=dict(adapter=ADAPTER | changes))


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4400000000\n"
NOBODY = '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'
NO_AXES = dict(rope_parameters=dict(rope_type="default", rope_theta=100.0))
OTHER_AXES = dict(rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 6, 7]))
UP, ZEROS = "model.layers.1.mlp.up_proj.weight", torch.zeros(384, 128)
NO_QWEN = "describes no Qwen-VL that can be built"

# what is wrong with a folder: how it is made so, then the file and the reason that the error names
BROKEN = {
    "weights cut off": (cut, WEIGHTS, "model.safetensors: not a whole safetensors file"),
    "weights are a pointer": (write, WEIGHTS, LFS, "model.safetensors: .*a Git LFS pointer.*git lfs pull"),
    "no weights": (remove, WEIGHTS, "neither model.safetensors nor model.safetensors.index.json"),
    "a weight is missing": (edit_weights, {UP: None}, "layers.1.mlp.up_proj"),
    "a stray weight": (edit_weights, dict(stray=torch.zeros(1)), "stray"),
    "another shape": (edit_weights, {UP: ZEROS[:3]}, r"\(3, 128\) in the file, \(384, 128\) by config.json"),
    "numbers of 8 bits": (edit_weights, {UP: ZEROS.to(torch.float8_e4m3fn)}, "stored as torch.float8_e4m3fn"),
    "a shard is gone": (sharded, remove, LAST, "model-00003-of-00003.safetensors: .* is not there"),
    "the index names others": (index_names_the_first_shard_only, f"{FIRST}: does not hold what {INDEX} says"),
    "the index leads out": (sharded, edit, dict(weight_map=dict(a="../x")), INDEX, "'weight_map' must name"),
    "config is a pointer": (write, "config.json", LFS, "config.json: not JSON.*Git LFS pointer"),
    "config is a list": (write, "config.json", "[]", "config.json: needs an object"),
    "another model": (edit, dict(model_type="qwen3_vl_moe"),
                      "'qwen3_vl_moe'; PLUME builds on qwen2_vl, .*Did you mean 'qwen3_vl'"),
    "another backbone's name": (edit, dict(model_type="qwen2_5_vl"), NO_QWEN),
    "no text model": (edit, dict(text_config=None), f"{NO_QWEN}: .*parameters, and the files hold"),
    "no heads": (edit, dict(text_config=dict(num_attention_heads=0)), "describes no Qwen-VL"),
    "no axes": (edit, dict(text_config=NO_AXES), "an mrope_section of 3 numbers that sum to 16"),
    "axes of another width": (edit, dict(text_config=OTHER_AXES), "mrope_section"),
    "a width in words": (edit, dict(text_config=dict(hidden_size="wide")), NO_QWEN),
    "an unknown activation": (edit, dict(text_config=dict(hidden_act="relu9")), NO_QWEN),
    "tokenizer is a pointer": (write, "tokenizer.json", LFS, "tokenizer.json: not JSON.*Git LFS pointer"),
    "no tokenizer": (remove, "tokenizer.json", "tokenizer.json: no such file"),
    "tokenizer's settings cut off": (cut, "tokenizer_config.json", "tokenizer_config.json: not JSON"),
    "tokenizer of nobody": (write, "tokenizer.json", NOBODY, "the tokenizer"),
    "no plume block": (edit, dict(plume=None), "config.json has no 'plume' block.*take config.json"),
    "an unknown setting": (edit, dict(plume=dict(latent_step=3)), "Did you mean 'latent_steps'"),
    "a million experts": (edit, adapter(experts=10**9), "settings: adapter"),
    "an adapter of another width": (edit, adapter(experts=7), "its adapter does not fit"),
    "an adapter of no kind": (edit, adapter(kind="x" * 9999), "adapter kind 'x{40}'"),
    "positions of no rule": (edit, dict(plume=dict(latent_positions="y" * 9999)),
                             "latent_positions 'y{190,200}.*'mrope' or 'cache'"),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_checkpoint_is_one_error_that_names_file_and_reason(tmp_path, harm):
    folder = tmp_path / "ck"
    make_model().float().save_pretrained(folder)
    do, *arguments, why = BROKEN[harm]
    do(folder, *arguments)
    with pytest.raises((DataError, FileNotFoundError), match=rf"(?s){folder}.*{why}") as error:
        Plume.from_pretrained(folder, "cpu", "float32")
    message = str(error.value)
    assert len(message) < 1200 and "\n\n" not in message
    train = ["train.py", "--out", tmp_path / "out", "--families=image_cls", "--steps=1", "--init"]
    for command in (train, ["eval.py", "--task=image_cls", "--ckpt"]):  # a traceback would end this test, too
        failed = call(*command, folder, "--device=cpu", check=False)
        assert failed.returncode == 1 and re.search(why, failed.stderr, re.S)


def test_an_incomplete_released_adapter_is_an_error(tmp_path):
    expert, mixed = "experts.1.fc1", "'s tensors are incomplete or do not fit each other"
    for name, tensor, why in (("router.weight", None, " does not fit"), (f"{expert}.bias", None, mixed),
                              (f"{expert}.weight", torch.zeros(5, 128), mixed)):
        save_released(tmp_path / "ck")
        edit_weights(tmp_path / "ck", {f"latent_moe_transition.{name}": tensor})
        with pytest.raises(DataError, match=f"ck: its adapter{why}"):
            Plume.from_pretrained(tmp_path / "ck", "cpu")


def test_an_interrupted_write_keeps_the_old_checkpoint_and_a_foreign_folder_is_not_overwritten(tmp_path):
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    before = (tmp_path / "ck" / WEIGHTS).read_bytes()
    with pytest.raises(RuntimeError), replacing(tmp_path / "ck") as folder:
        (Path(folder) / "config.json").write_text("{")
        raise RuntimeError("killed")
    assert (tmp_path / "ck" / WEIGHTS).read_bytes() == before
    assert os.listdir(tmp_path) == ["ck"]
    mine = {"config.json": '{"model_type": "bert"}', WEIGHTS: "of a bert", "thesis.txt": "do not lose"}
    (tmp_path / "mine").mkdir()
    for name, text in mine.items():
        write(tmp_path / "mine", name, text)
    with pytest.raises(FileExistsError, match="thesis.txt"):
        m.save_pretrained(tmp_path / "mine")
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == mine
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


def wrapped_by_lora(m):
    layer = m.lm.layers[0].mlp
    layer.up_proj = torch.nn.ModuleDict(dict(base_layer=layer.up_proj, lora_A=torch.nn.Linear(128, 2)))


def compiled(m):
    m.lm.layers[1] = torch.nn.ModuleDict(dict(_orig_mod=m.lm.layers[1]))  # its names; compile takes seconds


def with_a_buffer(m):
    m.register_buffer("mean", torch.zeros(2))


def quantised(m):
    m.lm.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(384, 128, dtype=torch.int8), False)


def with_a_head_of_its_own(m):
    m.backbone.lm_head.weight = torch.nn.Parameter(m.backbone.lm_head.weight + 1)


def without_a_layer(m):
    del m.lm.layers[2]


def with_another_adapter(m):
    m.adapter = TransitionAdapter(128, experts=2)


@pytest.mark.parametrize("change, why", [
    (wrapped_by_lora, "up_proj.base_layer.weight is unknown.*merge_and_unload"),
    (compiled, "_orig_mod.* is unknown.*torch.compile"),
    (with_a_buffer, "mean is unknown"),
    (quantised, "up_proj.weight is torch.int8"),
    (with_a_head_of_its_own, "lm_head is not the input embedding"),
    (without_a_layer, "layers.2.* is missing"),
    (with_another_adapter, r"b1 is .* of \(3, .*not of \(5, "),
])
def test_a_model_that_could_not_be_loaded_again_is_not_saved(change, why, tmp_path):
    m = make_model().float()
    m.save_pretrained(tmp_path / "ck")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir()}
    change(m)
    for write in (m.save_pretrained, lambda folder: write_checkpoint(m, folder)):  # as sentence-transformers
        for name in ("ck", "new"):
            with pytest.raises(DataError, match=f"nothing is saved: .*{why}"):
                write(tmp_path / name)
    assert os.listdir(tmp_path) == ["ck"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir()} == before


NEIGHBOURS = [".best", "best-1", "best.old", "best.writing", "best.writing.old"]
NOTES = {  # as in a cloned repository, some under names that a checkpoint of other software has
    "README.md": "card", "LICENSE": "MIT", ".gitattributes": "lfs", "runs/1/events": "log",
    "lora.safetensors": "theirs", "train_state.txt": "x", "vocab.json": "{}", "merges.txt": "",
    "generation_config.json": "{}"}


def make_neighbours(root):
    """`best` with files that are no checkpoint's, between folders with names much like it."""
    for name in NEIGHBOURS:
        (root / name).mkdir()
        for file in ("config.json", WEIGHTS):
            write(root / name, file, "somebody's")
    best = root / "best"
    (best / "runs" / "1").mkdir(parents=True)
    for name, text in NOTES.items():
        write(best, name, text)
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
    assert best.stat().st_mode & 0o777 == 0o750 and (best / "train_state").is_dir()
    assert (best / "README.md").stat().st_ino == inode and os.readlink(best / "latest") == "README.md"
    assert {(tmp_path / name / "config.json").read_text() for name in NEIGHBOURS} == {"somebody's"}
    Plume.from_pretrained(best, "cpu")

    # the second rename fails: what stood there stands there again
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        refuse_rename(patch, ".writing")
        m.save_pretrained(best)
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
    where = r"best is written, but .* are in .*best\.[0-9a-f]{8}\.old: LICENSE"
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=where):
        refuse_rename(patch, "LICENSE")
        m.save_pretrained(best)
    Plume.from_pretrained(best, "cpu")
    (left,) = set(os.listdir(tmp_path)) - {"best", *NEIGHBOURS}
    assert left.endswith(".old") and (tmp_path / left / "LICENSE").read_text() == "MIT"

    monkeypatch.chdir(best)
    m.save_pretrained("../best2")
    m.save_pretrained("../best2/")
    for path, why in ((".", "current folder"), (best / "README.md", "not a folder")):
        with pytest.raises(FileExistsError, match=why):
            m.save_pretrained(path)


def test_the_folder_of_a_run_names_its_checkpoint(small, tmp_path):
    shutil.copytree(small, tmp_path / "run" / "checkpoint")
    with pytest.raises(FileNotFoundError, match=f"of a run; its checkpoint is {tmp_path}/run/checkpoint"):
        Plume.from_pretrained(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no config.json in this folder"):
        Plume.from_pretrained(tmp_path)
