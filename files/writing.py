"""Files that are written whole or not at all, and the names they have until then."""

import contextlib
import json
import os
import secrets
import shutil

from safetensors import SafetensorError

from files.errors import reason


@contextlib.contextmanager
def writing(path, mode="w"):
    """A new file, with a name of its own until the block ends well; then it becomes `path`."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout
        with open(path, mode) as f:
            yield f
        return
    part = temporary_name(path)
    try:
        with write_errors(path):
            with open(part, mode.replace("w", "x")) as f:
                yield f
            os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


def write_text(path, text):
    with writing(path) as f:
        f.write(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def writable(file):
    """Whether a file of this name can stand there; it may be there already."""
    return not os.path.isdir(file) and os.path.isdir(os.path.dirname(os.path.abspath(file)))


@contextlib.contextmanager
def write_errors(file):
    """Whatever is raised when a file cannot be written becomes an OSError that names it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have their own
        folder = os.path.dirname(os.path.abspath(file))
        full = os.path.isdir(folder) and shutil.disk_usage(folder).free < 1 << 20
        raise OSError(f"{file}: cannot be written: {'the disk is full' if full else reason(e)}") from e


def temporary_name(path, ending="writing"):
    """A name of this call's own beside `path`; ending: "writing", or "old" for what stood there before."""
    return f"{path}.{secrets.token_hex(4)}.{ending}"
