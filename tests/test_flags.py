"""The command line: a dataclass is its flags, and the comments in its source are the help."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from engine import flags
from engine.flags import command_with, parse_flags, parse_words
from test_plume import HERE
from tests.test_house import PRODUCT, SOURCES


@dataclass
class Config:
    # recipe
    lr: float = 2e-3  # peak learning rate for the tiny preset in turtle world;
    #     1e-3 on real pictures,
    #     1e-5 for a pretrained backbone
    warmup: float = 0.03  # share of the run
    # run
    seed: int = 0  # of the weights
    out_folder: str = "out"  # where to; with # and = in it
    fsdp: bool = False  # shard everything
    compare: tuple = ()  # two files


@dataclass
class More(Config):
    # more
    seeds: int = 2  # runs


def test_values_are_read_in_every_spelling():
    argv = ["--lr", "1e-5", "--seed=-3", "--fsdp", "--compare", "a.json", "b.json", "--out-folder", "-x = y"]
    values = dict(lr=1e-5, seed=-3, fsdp=True, compare=("a.json", "b.json"), out_folder="-x = y")
    assert parse_flags(Config, argv, "about") == (Config(**values), set(values))
    for argv, values in {
        "": {}, "--fsdp False": dict(fsdp=False), "--fsdp=true": dict(fsdp=True),
        "--fsdp --seed=1": dict(fsdp=True, seed=1), "--seed=1 --seed=2": dict(seed=2),
        "--out_folder=": dict(out_folder=""), "--compare=a.json b.json": dict(compare=("a.json", "b.json")),
    }.items():
        assert parse_flags(Config, argv.split(), "about") == (Config(**values), set(values))


@pytest.mark.parametrize("argv, why", {
    "--wramup 1": "unknown argument '--wramup'. Did you mean 'warmup'? Known: lr, warmup, seed",
    "--war=1": "unknown argument '--war'",  # no abbreviations
    "seed 1": "unknown argument 'seed'", "--seed 1 2": "unknown argument '2'",
    "--seed 1.5": "--seed needs a value of type int, got '1.5'",
    "--fsdp=maybe": "--fsdp needs true or false, got 'maybe'", "--fsdp maybe": "unknown argument 'maybe'",
    "--learning_rate 1": "unknown argument '--learning_rate'. Did you mean 'lr'? Known: lr, warmup",
    "--Output-Dir=x": "Known: lr", "-x": "unknown argument '-x'", "--compare": "--compare needs a value",
    "--lr": "--lr needs a value of type float", "--lr --seed 1": "--lr needs a value of type float",
}.items())
def test_what_is_no_flag_or_no_value_ends_the_program_with_one_line(argv, why):
    with pytest.raises(SystemExit) as ended:
        parse_flags(Config, argv.split(), "about")
    assert str(ended.value).startswith("error: ") and why in str(ended.value)


def test_the_help_is_the_comments_of_the_class_and_of_those_above_it(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_flags(More, ["--seed=1", "--help"], "\nwhat this is\n")
    assert ended.value.code == 0
    assert capsys.readouterr().out == """\
what this is

flags (--key value or --key=value):

 recipe
  --lr FLOAT                  peak learning rate for the tiny preset in turtle world; 1e-3 on real pictures, \
1e-5 for a pretrained backbone [2e-3]
  --warmup FLOAT              share of the run [0.03]

 run
  --seed INT                  of the weights [0]
  --out_folder STR            where to; with # and = in it ["out"]
  --fsdp BOOL                 shard everything [False]
  --compare TUPLE             two files [()]

 more
  --seeds INT                 runs [2]
"""


def test_words_stand_before_between_and_behind_flags(monkeypatch):
    monkeypatch.setitem(flags.ALONE, "seed", "7")
    for argv in ("a b --fsdp --lr 1", "--fsdp a --lr 1 b", "--lr=1 a b --fsdp", "--fsdp true a b --lr 1"):
        cfg, given, words = parse_words(Config, argv.split(), "about")
        assert (cfg, given, words) == (Config(lr=1.0, fsdp=True), {"lr", "fsdp"}, ["a", "b"])
    for argv, seed, words in (("--seed a", 7, ["a"]), ("--seed 9 a", 9, ["a"]), ("a --seed", 7, ["a"])):
        cfg, _, found = parse_words(Config, argv.split(), "about")
        assert (cfg.seed, found) == (seed, words)


COMMANDS = [name for name in PRODUCT if "parse_flags(" in SOURCES[name] or "parse_words(" in SOURCES[name]]
COMMANDS = [name for name in COMMANDS if "__main__" in SOURCES[name]]


@pytest.fixture
def started(tmp_path):
    """The function that starts a command in a Python of its own; what is done where torch would be."""
    def started(name, *argv, torch="raise SystemExit('torch is imported')"):
        (tmp_path / "torch.py").write_text(torch)
        return subprocess.Popen(
            [sys.executable, "-m", name, *argv], cwd=HERE, env=dict(os.environ, PYTHONPATH=str(tmp_path)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return started


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_wrong_flags_are_answered_before_torch_is_imported(started, name):
    wrong, helped = started(name, "--bogus=1"), started(name, "--help")
    printed, error = wrong.communicate(timeout=60)
    assert (wrong.returncode, printed, error.count("\n")) == (1, "", 1), error
    assert error.startswith("error: unknown argument '--bogus'.")
    printed, error = helped.communicate(timeout=60)
    assert (helped.returncode, error) == (0, "") and "flags (--key value" in printed and "\n  --" in printed


@pytest.mark.parametrize("words, why", {
    "train --lr=1 --steps 3": "torch is imported", "train --steps=a": "--steps needs a value of type int",
    "tools.serve x --port=a": "--port needs a value of type int", "tools.search --serve": "torch is imported",
    "tools.ablations --seds=3": "Did you mean 'seeds'",  # its own; and those of train.py:
    "tools.ablations --batch_size=3": "Did you mean 'global_batch'"}.items())
def test_only_what_is_right_goes_on_to_the_imports(started, words, why):
    _, error = started(*words.split()).communicate(timeout=60)
    assert why in error and error.count("\n") == 1


def test_ctrl_c_while_modules_are_imported_is_one_line(started):
    running = started("train", torch="print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    assert running.stdout.readline() == "importing\n"
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=50) == ("", "interrupted\n") and running.returncode == 130


@pytest.mark.parametrize("folder, name", [("tools", "search"), ("tools", "encode"), ("tasks", "check")])
def test_a_module_that_is_started_as_a_file_says_the_command_to_paste(folder, name, tmp_path):
    words = [sys.executable, str(HERE / folder / f"{name}.py"), "--data", "a b"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    expected = f"PYTHONPATH={HERE} {sys.executable} -m {folder}.{name} --data 'a b'"
    assert done.returncode == 1 and done.stderr.splitlines()[1:] == [expected]


def test_the_command_that_goes_on_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "and", "more"])
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python3", "train.py"])
    for name in ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    again = ".venv/bin/python3 train.py --out 'a b' --resume"
    assert command_with("--resume", ["--out", "a b"]) == again
    assert command_with("--resume", ["--out", "a b", "--resume"]) == again
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command_with("--resume", ["--seed=1"]) == "torchrun --nproc_per_node=2 train.py --seed=1 --resume"
