"""Starts scripts of the repository as a user would, but sooner: forked from a process that has imported all.

    run("train.py", "--steps", 3)            one process, waited for
    run_ranks(2, "train.py", "--steps", 3)   as torchrun would start them
    torchrun(2, "train.py", "--steps", 3)    torchrun itself
    call("eval.py", "--ckpt", path)          in this process
    Started("train.py", ...)                 not waited for: it can be watched and killed
    run("train.py", ..., patch=("train.save", f))    with f(save, ...) in place of train.save(...)
"""

import contextlib
import functools
import importlib
import io
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

from engine.flags import command
from files.errors import DataError

ROOT = Path(__file__).parent.parent


@functools.cache
def server():
    """The process that is forked for each script: to start Python and import torch takes 4 seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_plume"])
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore", PYTHONPATH=str(ROOT)):
        multiprocessing.forkserver.ensure_running()
    return context


def run_as_main(script, argv, cwd, out, environment, patch):
    """In the forked process: what `python script argv`, or `python -m script argv`, would do."""
    os.setsid()
    os.chdir(cwd)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the usual one
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    warnings.simplefilter("ignore")
    sys.argv, sys.path[0] = [script, *argv], str(ROOT)
    if patch:
        where, name = patch[0].rsplit(".", 1)
        module = importlib.import_module(where)
        setattr(module, name, functools.partial(patch[1], getattr(module, name)))
        command(importlib.import_module(script.removesuffix(".py")).main)
    elif script.endswith(".py"):
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Started:
    """A script (or the name of a module) that runs in a process and a session of its own.

    stdout, stderr: what it has printed so far.
    """

    def __init__(self, script, *argv, cwd=ROOT, out=None, patch=None, **environment):
        self.out = out or os.path.join(tempfile.mkdtemp(), "printed")
        given = str(script), [str(a) for a in argv], str(cwd), self.out, environment, patch
        self.process = server().Process(target=run_as_main, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def stdout(self):
        return Path(f"{self.out}.out").read_text()

    @property
    def stderr(self):
        return Path(f"{self.out}.err").read_text()

    def wait(self, timeout=600):
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f"still running after {timeout} s: {self.stdout[-3000:]}{self.stderr[-3000:]}")
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()

    def wait_for(self, line):
        """Until it has printed a line that begins so."""
        while not os.path.exists(f"{self.out}.out") or not re.search(f"^{line}", self.stdout, re.M):
            assert self.process.exitcode is None, self.stdout + self.stderr
            time.sleep(0.02)


def done(started, check):
    started.returncode = started.wait()
    assert not check or started.returncode == 0, started.stdout[-3000:] + started.stderr[-9000:]
    return started


def run(script, *argv, check=True, **kw):
    """check: it must succeed; kw: cwd, patch, or variables of the environment."""
    return done(Started(script, *argv, **kw), check)


def start_ranks(number, script, *argv, **kw):
    """As torchrun starts them, but nobody watches over them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    kw |= dict(WORLD_SIZE=str(number), MASTER_ADDR="localhost", MASTER_PORT=port)
    return [Started(script, *argv, RANK=str(r), LOCAL_RANK=str(r), **kw) for r in range(number)]


def run_ranks(number, script, *argv, check=True, **kw):
    """As torchrun: when one rank fails, the others are killed."""
    together = os.path.join(tempfile.mkdtemp(), "printed")
    ranks = start_ranks(number, script, *argv, out=together, **kw)
    running, failed = ranks, []
    while running and not failed:
        time.sleep(0.05)
        failed = [rank for rank in running if rank.process.exitcode]
        running = [rank for rank in running if rank.process.exitcode is None]
    for rank in running:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
    return done((failed or ranks)[0], check)


def torchrun(number, script, *argv):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    finished = subprocess.run(
        [*start, script, *map(str, argv)], capture_output=True, text=True, cwd=ROOT,
        env=dict(os.environ, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-9000:]
    return finished


def call(script, *argv, check=True):
    """As `run`, but in this process: starting Python takes longer than what it is asked."""
    main = importlib.import_module(script.removesuffix(".py")).main
    finished, printed = subprocess.CompletedProcess(script, 0, "", ""), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            finished.returncode = main([str(a) for a in argv]) or 0
    except (DataError, OSError, SystemExit) as e:
        assert not check, e
        finished.returncode, finished.stderr = 1, str(e)
    finished.stdout = printed.getvalue()
    return finished
