"""What ends a run before its last step: Ctrl-C, a signal, a loss that is not a number."""

import math
import os
import signal
import time

from files.errors import DataError, quote


class StopOnSignal:
    """Ctrl-C (or SIGTERM) asks for a stop after the running step; another, 3 seconds later, stops at once.

    torchrun passes on what the terminal has already sent to everybody: two signals, one wish.
    """

    def __init__(self):
        self.asked = 0.0
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        if self.asked and time.monotonic() > self.asked + 3:
            raise KeyboardInterrupt
        self.asked = self.asked or time.monotonic()
        os.write(2, b"stopping after this step; once more to stop at once\n")


def ignore_interrupts(worker):
    """Data workers leave with their parent, not before it has written its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def check_finite(metrics, batch, saved):
    """Raises DataError, on all ranks alike, when a loss or gradient is not a number."""
    if not math.isfinite(metrics["loss"] + metrics["norm"]):
        raise DataError(f"step {batch['step']}, data set {quote(batch['dataset'])}: loss {metrics['loss']}, "
                        f"gradient norm {metrics['norm']}.  Nothing was written since step {saved}; lower "
                        "--lr, or look at this data set's records")
