"""A run must end: whatever ends it, every process of it is gone soon, with one line and the right status.

Each way is tried by one process and by two ranks, without data workers and with some, all side by side.
"""

import contextlib
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from test_plume import HERE, QUICK
from tests.processes import start_ranks
from tests.test_runs import fill_disk

SOON = 10  # seconds


def at_step_3(deed, backward, model, batch, *rest):
    """In place of train.backward."""
    parts = backward(model, batch, *rest)
    if batch["step"] == 3:
        deed(parts)
    return parts


def signal_all(number, parts):
    """As a terminal does: to all processes of the group."""
    os.killpg(0, number)


def lose_the_number(parts):
    parts["loss"] = parts["loss"] * torch.nan


def kill_a_worker(parts):
    if os.environ.get("RANK", "0") == "0" and multiprocessing.active_children():
        multiprocessing.active_children()[-1].kill()
        time.sleep(1)  # long enough to hear of it


def kill_the_last_rank(parts):
    if os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", 1)) - 1):
        os.kill(os.getpid(), signal.SIGKILL)


def make_a_mistake(parts):
    raise ZeroDivisionError("a mistake")


def hang(fill_micro_batches, *given, calls=itertools.count()):
    """In place of data.fill_micro_batches, in a worker or not: its third batch never comes."""
    if next(calls) == 2:
        time.sleep(300)
    return fill_micro_batches(*given)


def deed(function):
    return "train.backward", partial(at_step_3, function)


STOPPING = "stopping after this step; once more to stop at once"
PEER = r"rank \d stops: another rank has ended: .*"  # in place of the line, on the other rank
WAYS = {  # what happens: what takes a function's place, exit status, its line
    "bad record": (None, 1, "error: .*: record 5: pos: .*red bar.png: cannot be used as a picture.*"),
    "not a number": (deed(lose_the_number), 1, "error: step 3, data set '...': loss nan.*"),
    "full disk": (("train.save", partial(fill_disk, 100_000)), 1, "error: .*step 8 could not be written.*"),
    "Ctrl-C": (deed(partial(signal_all, signal.SIGINT)), 130, STOPPING),
    "SIGTERM": (deed(partial(signal_all, signal.SIGTERM)), 130, STOPPING),
    "Ctrl-C twice": (("data.fill_micro_batches", hang), 130, f"{STOPPING}\ninterrupted"),
    "killed worker": (deed(kill_a_worker), 1, r"error: DataLoader worker \(pid \d+\) is killed.*--resume"),
    "killed rank": (deed(kill_the_last_rank), -signal.SIGKILL, ""),
    "mistake": (deed(make_a_mistake), 1, ".*Traceback.*ZeroDivisionError: a mistake"),
}


def group_is_gone(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


def said(rank):
    """What a rank has printed as errors, without the progress bar."""
    lines = re.split("[\r\n]+", rank.stderr)
    return "\n".join(line for line in lines if line.strip() and not line.startswith("reading pairs"))


def interrupt(ranks):
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):  # what it ended with is looked at below
            os.killpg(rank.pid, signal.SIGINT)


@pytest.mark.parametrize("way", WAYS)
def test_every_process_ends_with_its_run(world, tmp_path, way):
    patch, status, line = WAYS[way]
    data, runs = tmp_path / "data", {}
    shutil.copytree(world, data)
    if way == "bad record":
        (data / "red bar.png").write_bytes(b"no picture")  # it is there: nobody notices before it is used
    for number, workers in ((1, 0), (1, 2), (2, 0), (2, 1)):
        out = tmp_path / f"{number} {workers}"
        flags = ["--data", data / "train.jsonl", "--out", out, "--steps=12", "--device=cpu", *QUICK,
                 "--gate=0", "--segments=1", "--save_every=4", f"--workers={workers}"]
        runs[number, workers] = start_ranks(number, "train.py", *flags, patch=patch)
    if way == "Ctrl-C twice":
        for (_, workers), ranks in runs.items():  # two batches come from each that makes them
            ranks[0].wait_for(f"step {2 * max(workers, 1) - 1}/")
        time.sleep(2)  # now they wait for the next one
        for pause in (3.2, 0):
            for ranks in runs.values():
                interrupt(ranks)
            time.sleep(pause)
    for (number, workers), ranks in runs.items():
        codes, texts = [rank.wait(120) for rank in ranks], [said(rank) for rank in ranks]
        where = number, workers, codes, texts
        late = time.monotonic() + SOON
        while not all(group_is_gone(rank.pid) for rank in ranks):
            assert time.monotonic() < late, where
            time.sleep(0.02)
        if way == "killed worker" and not workers:  # nothing has happened
            assert codes == [0] * number, where
            continue
        told = [code == status and re.fullmatch(line, text, re.S) for code, text in zip(codes, texts)]
        assert any(told), where
        for code, text, it in zip(codes, texts, told):
            assert it or code == 1 and re.fullmatch(f"({PEER})?", text), where
        kept = tmp_path / f"{number} {workers}" / "checkpoint"
        assert kept.exists() or way not in ("full disk", "Ctrl-C", "SIGTERM"), where


def test_under_torchrun_no_rank_outlives_the_launcher(world, tmp_path):
    """What each of them inherits is closed when the last one is gone."""
    shutil.copytree(world, tmp_path / "data")
    (tmp_path / "data" / "red bar.png").write_bytes(b"no picture")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--data", tmp_path / "data" / "train.jsonl", "--out", tmp_path / "out", *QUICK, "--workers=2"]
    command = [*torchrun, "train.py", *flags, "--steps=12", "--device=cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=60)
    assert ended.returncode == 1 and ended.stderr.count("error: ") == 1
    assert "red bar.png: cannot be used as a picture" in ended.stderr
