"""A dataclass is a command line, the comment behind each field its help."""

import inspect
import io
import os
import re
import sys
import threading
import time
from dataclasses import fields

from files.errors import DataError, Interrupted, last_line, nearest


def parse_flags(config_class, argv, about):
    """`--key value` and `--key=value` -> an instance of a dataclass with defaults, and the names given.

    `--flag` alone is true; a tuple takes all values up to the next flag.
    Unknown names and values of the wrong type end the program with the nearest right name.
    """
    kinds = {field.name: field.type for field in fields(config_class)}
    if "-h" in argv or "--help" in argv:
        print(about.strip(), "", "flags (--key value or --key=value):", *flag_help(config_class), sep="\n")
        raise SystemExit(0)
    values, rest = {}, list(argv)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        if not flag.startswith("--") or name not in kinds:
            raise SystemExit(f"error: unknown argument {flag!r}.{nearest(name, kinds)}")
        given = [text] if equals else []
        while rest and not rest[0].startswith("--") and (not given or kinds[name] is tuple):
            given.append(rest.pop(0))
        values[name] = flag_value(name, kinds[name], given)
    return config_class(**values), set(values)


def command(main):
    """Runs main(argv) of a script and ends the process: an error, or Ctrl-C, with one line, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(sys.argv[1:])
        print(end="", flush=True)  # a full disk behind > is an error, too
        sys.exit(status)
    except SystemExit as e:
        if not isinstance(e.code, str):
            raise
        status, line = 1, e.code
    except (KeyboardInterrupt, Interrupted) as e:
        status, line = 130, str(e) or "interrupted"
    except (DataError, OSError) as e:
        status, line = 1, f"error: {last_line(e)}"
    print(line, file=sys.stderr)
    leave(status)


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
    try:
        if kind is bool:
            return {"true": True, "false": False}[given[0].lower()] if given else True
        if kind is tuple and given:
            return tuple(given)
        return kind(given[0])
    except (ValueError, LookupError):
        raise SystemExit(f"error: --{name} needs {needs}, got {given[0]!r}" if given
                         else f"error: --{name} needs {needs} behind it") from None


def flag_help(config_class):
    """The lines of the help, from the source of a config class and of those above it.

    A field is `name: type = default  # what it is`.  A comment line below it with at least 4 blanks behind
    the # goes on with what it is; every other comment line is the heading of a chapter.
    """
    entries = []  # [flag, what it is, default]
    for cls in reversed(config_class.__mro__[:-1]):
        for line in inspect.getsource(cls).splitlines():
            if field := re.match(r"    (\w+): (\w+) = (.*?)  # (.*)", line):
                name, kind, default, what = field.groups()
                entries.append([f"  --{name} {kind.upper()}", what, f" [{default}]"])
            elif more := re.match(r"    # {4,}(.*)", line):
                entries[-1][1] += " " + more[1]
            elif heading := re.match(r"    # (.*)", line):
                entries.append([f"\n {heading[1]}", "", ""])
    return [f"{flag:29} {what}{default}".rstrip() for flag, what, default in entries]
