"""A dataclass is a command line, the comment behind each field its help."""

import inspect
import re
import sys
from dataclasses import fields

from files.errors import DataError, last_line, nearest


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
    """Runs main(argv) of a script; what a user did wrong ends it with one line instead of a traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (DataError, OSError) as e:
        sys.exit(f"error: {last_line(e)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as the shell says it: 128 + SIGINT


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
