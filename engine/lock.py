"""One run a folder: it is locked while a run is at work, and nobody's work in --out is written over."""

import os
import shutil
import socket
from contextlib import contextmanager, suppress

from engine.log import ROW
from engine.ranks import say
from files.errors import DataError, quote, reason
from files.writing import require_utf8
from hub.folders import CHECKPOINT, LEFT_OVER, LOCK, LOG
from hub.weights import count_parameters

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def exclusive_lock(cfg):
    """Makes --out and takes it for this run alone.  The lock goes with the process, however that ends."""
    out, path = f"--out {quote(cfg.out)}", os.path.join(cfg.out, LOCK)
    made = not os.path.isdir(cfg.out)
    require_utf8(os.path.realpath(cfg.out))

    def refuse(who):
        raise DataError(f"{out}: another run is at work there ({who}); wait, or choose another")

    try:
        os.makedirs(cfg.out, exist_ok=True)
        file = open(path, "a+")
    except OSError as e:
        raise DataError(f"{out}: nothing can be written there: {reason(e)}; choose another folder") from e
    with file:
        lock_file(file, out, refuse)
        try:
            check_overwrite(cfg)
            yield
        finally:
            if made and os.listdir(cfg.out) == [LOCK]:  # nothing was written
                with suppress(OSError):
                    os.remove(path)
                    os.rmdir(cfg.out)


def lock_file(file, name, busy):
    """Locks an open file until it is closed -> whether that can be done there.

    busy: called with what the file says of another process that has it; when it returns, that one is waited
    for.
    """
    locked = fcntl is not None
    try:
        if locked:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        busy(file.read().strip()[:200])
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as e:
        locked = False
        say(f"warning: {name} cannot be locked ({reason(e)}); see to it that no other run writes there")
    with suppress(OSError):  # a full disk: what stands there is only for people
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return locked


def check_overwrite(cfg):
    """Raises DataError for an --out that this run would write over; names what a killed run left there."""
    names = sorted(os.listdir(cfg.out))
    left = [name for name in names if LEFT_OVER.fullmatch(name)]
    if left:
        say(f"{cfg.out} holds what a killed run left behind; you may delete it when nobody needs it:", *left)
    if cfg.resume:
        return
    there = [name for name in names if CHECKPOINT.fullmatch(name)]
    if there:
        raise DataError(f"{cfg.out} holds {', '.join(there)}: continue with --resume, delete it, or choose "
                        "another --out")
    if LOG in names:
        with open(os.path.join(cfg.out, LOG), "rb") as f:
            line = f.readline()
        if line and not ROW.match(line):
            raise DataError(f"{cfg.out}/{LOG}: not the log of a training run, which would write over it; "
                            "choose another --out")


def check_disk_space(cfg, model):
    """Raises DataError when a checkpoint would not fit on the disk of --out."""
    needed = (4 * count_parameters(model) + 8 * count_parameters(model, trained=True)) / 1e9
    free = shutil.disk_usage(cfg.out).free / 1e9
    if needed > free:
        raise DataError(f"--out {quote(cfg.out)}: a checkpoint takes {needed:.2f} GB, and {free:.2f} GB are "
                        "free; a new one is whole before the old goes.  Make room, or choose another --out")
