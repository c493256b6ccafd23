"""Files that are written whole or not at all, and the names they have until then."""

import contextlib
import io
import json
import os
import secrets
import shutil

from safetensors import SafetensorError

from files.errors import DataError, readable, reason


class Target(io.FileIO):
    """A file whose errors name `path`, which it becomes; those of other files in the block stay theirs."""

    def __init__(self, file, path, how):
        self.path = path
        with write_errors(path):
            super().__init__(file, how)

    def write(self, data):
        with write_errors(self.path):
            return super().write(data)

    def close(self):
        with write_errors(self.path):
            super().close()

    def fileno(self):
        """numpy and Pillow would write past `write`."""
        raise io.UnsupportedOperation("fileno")


def open_target(file, path, how, mode):
    """how: "w" or "x"; mode: "wb", or "w": UTF-8, with escapes for what is no character."""
    raw = io.BufferedWriter(Target(file, path, how))
    if mode == "wb":
        return raw
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def writing(path, mode="w"):
    """A new file, with a name of its own until the block ends well; then it becomes `path`."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout
        with open_target(path, path, "w", mode) as f:
            yield f
        return
    part = temporary_name(path)
    try:
        with open_target(part, path, "x", mode) as f:
            yield f
        with write_errors(path):
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


def require_utf8(folder):
    """DataError for a checkpoint's folder: tokenizers and safetensors take no other names."""
    if readable(folder) != folder:
        raise DataError(f"{folder}: a checkpoint cannot be there: this name is no UTF-8; choose another")


@contextlib.contextmanager
def write_errors(file):
    """Whatever is raised when a file cannot be written becomes an OSError that names it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have their own
        if str(e).startswith("DataLoader worker"):  # torch raises it in whatever is going on
            raise
        folder = os.path.dirname(os.path.abspath(file))
        full = os.path.isdir(folder) and shutil.disk_usage(folder).free < 1 << 20
        raise OSError(f"{file}: cannot be written: {'the disk is full' if full else reason(e)}") from e


def temporary_name(path, ending="writing"):
    """A name of this call's own beside `path`; ending: "writing", or "old" for what stood there before."""
    return f"{path}.{secrets.token_hex(4)}.{ending}"
