"""A dataclass is a command line, the comment behind each field its help."""

import inspect
import io
import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import fields

from files.errors import DataError, Interrupted, last_line, nearest

FIELD = re.compile(r"    (\w+): (\w+) = (.*?)  # (.*)")  # of a config class
KINDS = dict(str=str, int=int, float=float, bool=bool, tuple=tuple)
TRUTH = {"true": True, "false": False}

# Names that other programs have for these flags: the first one that a command knows is meant
OTHER_NAMES = dict(
    learning_rate=["lr"], batch_size=["global_batch"], train_batch_size=["global_batch"], bs=["global_batch"],
    per_device_train_batch_size=["micro_tokens"], num_epochs=["epochs"], num_train_epochs=["epochs"],
    max_steps=["steps"], num_steps=["steps"], warmup_ratio=["warmup"], max_grad_norm=["clip"],
    grad_clip=["clip"], temperature=["scale"], gradient_checkpointing=["checkpointing"], fp16=["dtype"],
    bf16=["dtype"], lora_r=["lora"], lora_rank=["lora"], num_workers=["workers"], max_length=["max_len"],
    max_seq_length=["max_len"], checkpoint=["ckpt", "init"], ckpt=["init"], init=["ckpt"],
    model=["ckpt", "init"], model_path=["ckpt", "init"], model_name_or_path=["ckpt", "init"],
    pretrained=["init", "ckpt"], output=["out"], output_dir=["out"], resume_from_checkpoint=["resume"],
    dataset=["data"], train_file=["data"], data_path=["data"], data_dir=["data"], image_folder=["media"],
    eval_steps=["eval_every"], save_steps=["save_every"], logging_steps=["log_every"], tasks=["task"],
    k=["count", "top_k"], top_k=["count"], n=["count"], type=["kind"], num_shards=["of"],
    embedding_dim=["dim"], truncate_dim=["dim"])
ALONE = dict(serve="8001")  # what a flag of a number stands for when there is no number behind it


def parse_flags(config_class, argv, about):
    """`--key value` and `--key=value` -> an instance of a dataclass with defaults, and the names given.

    `--flag` alone is true; a tuple takes all values up to the next flag.
    Unknown names and values of the wrong type end the program with the nearest right name.
    """
    cfg, given, words = parse_words(config_class, argv, about)
    if words:
        names = [field.name for field in fields(config_class)]
        raise SystemExit(f"error: unknown argument {words[0]!r}.{nearest(words[0], names)}")
    return cfg, given


def parse_words(config_class, argv, about):
    """The same, and the words that belong to no flag, wherever they stand."""
    lines = []
    for cls in reversed(config_class.__mro__[:-1]):
        lines += inspect.getsource(cls).splitlines()
    values, words = read_flags(lines, argv, about)
    return config_class(**values), set(values), words


def read_flags(lines, argv, about):
    """The lines of a config class, and a command line -> {name: value} of its flags, the other words.

    --help prints what it is about and ends the program.
    """
    if "-h" in argv or "--help" in argv:
        print(about.strip(), "", "flags (--key value or --key=value):", *flag_help(lines), sep="\n")
        raise SystemExit(0)
    kinds = {field[1]: KINDS[field[2]] for field in map(FIELD.match, lines) if field}
    values, words, rest = {}, [], list(argv)
    while rest:
        flag, equals, text = rest[0].partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("-"):
            words.append(rest.pop(0))
            continue
        if not flag.startswith("--") or name not in kinds:
            raise SystemExit(f"error: unknown argument {flag!r}.{meant(name, kinds)}")
        rest.pop(0)
        given = [text] if equals else []
        while rest and takes(name, kinds[name], given, rest[0]):
            given.append(rest.pop(0))
        values[name] = flag_value(name, kinds[name], given)
    return values, words


def takes(name, kind, given, word):
    """Whether a flag that has the values `given` takes the next word, too."""
    if word.startswith("--") or given and kind is not tuple:
        return False
    if kind is bool:
        return word.lower() in TRUTH
    return name not in ALONE or word.isdecimal()


def meant(name, known):
    """A hint for an unknown flag, also for one that another program has."""
    for ours in OTHER_NAMES.get(name.lower(), []):
        if ours in known:
            return f" Did you mean {ours!r}? Known: {', '.join(known)}."
    return nearest(name, known)


def command(main):
    """Runs main(argv) of a script and ends the process: an error, or Ctrl-C, with one line, no traceback."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    one_line_errors(run_to_the_end, main)


def run_to_the_end(main):
    status = main(sys.argv[1:])
    print(end="", flush=True)  # a full disk behind > is an error, too
    sys.exit(status)


def end_at_once(number, frame):
    """Ctrl-C before `command`, while modules are imported."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def one_line_errors(function, *given):
    """Calls it; what ends the command there is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        function(*given)
        return
    except SystemExit as e:
        if not isinstance(e.code, str):
            raise
        status, line = 1, e.code
    except (KeyboardInterrupt, Interrupted) as e:
        status, line = 130, str(e) or "interrupted"
    except (DataError, OSError) as e:
        status, line = 1, f"error: {last_line(e)}"
    print(line, file=sys.stderr)  # the error is forgotten by now, and a bar that it held has ended its line
    leave(status)


def command_with(flag, argv):
    """This command with one flag more, to be pasted into a shell."""
    start = [sys.orig_argv[0]]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        start = ["torchrun", "OPTIONS_OF_THIS_MACHINE"]
    flags = argv if flag in argv else [*argv, flag]
    return shlex.join([*start, sys.argv[0], *flags])


def leave(status, seconds=1):
    """Ends the process.  Python would wait for its threads: one may be reading a long clip or a dead disk."""
    until = time.monotonic() + seconds
    mine = threading.current_thread()
    others = [thread for thread in threading.enumerate() if thread is not mine and not thread.daemon]
    try:
        for thread in others:
            thread.join(max(0, until - time.monotonic()))
        print(end="", flush=True)
        stuck = any(thread.is_alive() for thread in others)
    except (KeyboardInterrupt, OSError):
        stuck = True
    if stuck:
        os._exit(status)
    sys.exit(status)


def whole_numbers(flag, text, between, needs):
    """"1,8,32" -> [1, 8, 32]; needs: what the flag needs, for the error."""
    try:
        numbers = [int(number) for number in text.split(between)]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise DataError(f"--{flag} {text!r}: needs {needs}")
    return numbers


def flag_value(name, kind, given):
    """The texts behind a flag -> its value."""
    needs = {bool: "true or false", tuple: "a value"}.get(kind, f"a value of type {kind.__name__}")
    if not given and name in ALONE:
        given = [ALONE[name]]
    try:
        if kind is bool:
            return TRUTH[given[0].lower()] if given else True
        if kind is tuple and given:
            return tuple(given)
        return kind(given[0])
    except (ValueError, LookupError):
        raise SystemExit(f"error: --{name} needs {needs}, got {given[0]!r}" if given
                         else f"error: --{name} needs {needs} behind it") from None


def flag_help(lines):
    """The lines of the help, from those of a config class and of the ones above it.

    A field is `name: type = default  # what it is`.  A comment line below it with at least 4 blanks behind
    the # goes on with what it is; every other comment line is the heading of a chapter.
    """
    entries = []  # [flag, what it is, default]
    for line in lines:
        if field := FIELD.match(line):
            name, kind, default, what = field.groups()
            entries.append([f"  --{name} {kind.upper()}", what, f" [{default}]"])
        elif more := re.match(r"    # {4,}(.*)", line):
            entries[-1][1] += " " + more[1]
        elif heading := re.match(r"    # (.*)", line):
            entries.append([f"\n {heading[1]}", "", ""])
    return [f"{flag:29} {what}{default}".rstrip() for flag, what, default in entries]
