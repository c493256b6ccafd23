"""The one error for what users give, and the words of its message: quotes, hints, reasons."""

import contextlib
import difflib
import re

LFS_POINTER = b"version https://git-lfs."  # how one begins
LFS_HINT = "; this file is a Git LFS pointer, the contents were not downloaded: git lfs pull"


class DataError(ValueError):
    """Bad input: the message says what was given, where, and what is needed.

    over: of an item that is too long, how many tokens it has too many.
    """

    def __init__(self, message="", over=0):
        super().__init__(message)
        self.over = over

    def __str__(self):
        return readable(super().__str__())


class Interrupted(DataError):
    """Ctrl-C: the message says what there is by now."""


def readable(text):
    """The text as every terminal and file takes it: a byte of a name that is no UTF-8 becomes \\xff."""
    text = re.sub("[\udc80-\udcff]", escaped_byte, text)
    text = re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", text)  # as Python's repr has it
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def escaped_byte(match):
    """What os.fsdecode makes of a byte -> its escape."""
    return f"\\x{ord(match[0]) - 0xDC00:02x}"


def quote(value):
    """Somebody's data in a message: its repr, at most 200 characters of it."""
    text = repr(value[:200] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 200 else text[:197] + "..."


def nearest(name, known):
    """A hint for an unknown name: ' Did you mean ...?' and all that are known."""
    return f"{closest(name, known)} Known: {', '.join(map(str, known))}."


def closest(name, known):
    """' Did you mean ...?' with the known name that is most alike, or ''."""
    found = difflib.get_close_matches(str(name)[:200], [str(k)[:200] for k in known], 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def reason(error):
    """The first line of somebody else's error, at most 200 characters of it."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def lfs_hint(file):
    """What a message adds when a file is only Git LFS's pointer to its contents, otherwise ""."""
    with contextlib.suppress(OSError, TypeError, ValueError), open(file, "rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            return LFS_HINT
    return ""


def last_line(error):
    """The message of an error; of one that a data worker raised, the last line of its traceback."""
    text = readable(str(error))
    if "Original Traceback" not in text:
        return text
    name = f"{DataError.__module__}.{DataError.__qualname__}"  # as a traceback spells it
    return text.strip().splitlines()[-1].removeprefix(f"{name}: ")
