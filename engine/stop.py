"""What ends a run: Ctrl-C, a signal, a loss that is not a number; and that all its processes end with it."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager

from engine.ranks import rank_and_world
from files.errors import DataError, quote

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal to get when the parent ends


class StopOnSignal:
    """Ctrl-C (or SIGTERM) asks for a stop after the running step; another, 3 seconds later, stops at once.

    torchrun passes on what the terminal has already sent to everybody: two signals, one wish.  A third wish
    does not even wait for the cleaning up.
    """

    def __init__(self):
        self.asked, self.wishes = 0.0, 0
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        if self.wishes and time.monotonic() < self.asked + 3:
            return
        self.asked, self.wishes = time.monotonic(), self.wishes + 1
        if self.wishes == 1:
            os.write(2, b"stopping after this step; once more to stop at once\n")
        elif self.wishes == 2:
            raise KeyboardInterrupt
        else:
            os._exit(130)


def bind_to_parent(worker):
    """A data worker outlives a signal to the whole group, so that the step can end, but never its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_workers():
    """Ends the data workers, whatever they are doing.

    Nobody else would: they ignore the signal that torch and Python send them before they wait for them.
    """
    if os.name == "posix":  # where torch would raise an error for each of them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
            worker.join()


@contextmanager
def ending_workers():
    """However the block ends, the data workers end, too; DataError for one that was killed."""
    try:
        yield
    except RuntimeError as e:
        if not str(e).startswith("DataLoader worker"):
            raise
        raise DataError(f"{str(e).strip()}  It may have needed more memory than there is: lower --workers, "
                        "and go on from the last checkpoint with --resume") from e
    finally:
        end_workers()


def check_finite(metrics, batch, saved):
    """Ends all ranks when a loss or gradient is not a number; DataError on the first."""
    if not math.isfinite(metrics["loss"] + metrics["norm"]):
        if rank_and_world()[0] > 0:
            raise SystemExit(1)  # one says it for all
        raise DataError(f"step {batch['step']}, data set {quote(batch['dataset'])}: loss {metrics['loss']}, "
                        f"gradient norm {metrics['norm']}.  Nothing was written since step {saved}; lower "
                        "--lr, or look at this data set's records")
