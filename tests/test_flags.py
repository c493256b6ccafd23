"""The command line: a dataclass is its flags, and the comments in its source are the help."""

from dataclasses import dataclass

import pytest

from engine.flags import parse_flags


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
    "--fsdp=maybe": "--fsdp needs true or false, got 'maybe'", "--compare": "--compare needs a value",
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
