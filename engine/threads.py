"""How long torch's threads spin before they sleep.  Commands import this first: torch reads it only once,
and what is wrong with their flags (engine/early.py) is said before seconds are spent on torch.

At each barrier of a product OpenMP's threads wait for the slowest.  By default they spin, and where another
process has the core of one of them the others burn theirs meanwhile: steps then take seconds (docs/log.md has
the measurement).  A short spin costs little on a quiet machine.
"""

import os
import sys

from engine.early import check_command_line

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # a user's own wins

if "torch" not in sys.modules:  # a command, not a user's program
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers and `encode` bring their own
if "torch" not in sys.modules and not any(name in os.environ for name in SETTINGS):
    os.environ["GOMP_SPINCOUNT"] = "5000"  # OpenMP's own is 300,000
if "torch" not in sys.modules:
    check_command_line()


def describe_threads(number):
    """What is said at the start of a run.  number: of torch's threads."""
    given = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return ", ".join([f"{number} threads", *given])
