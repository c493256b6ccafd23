"""Starts scripts of the repository as a user would, but sooner: forked from a process that has imported all.

    run("train.py", "--steps", 3)            one process, waited for
    run_ranks(2, "train.py", "--steps", 3)   as torchrun would start them
    torchrun(2, "train.py", "--steps", 3)    torchrun itself
    call("eval.py", "--ckpt", path)          in this process
    Started("train.py", ...)                 not waited for: it can be watched and killed
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


def run_as_main(script, argv, cwd, environment, out):
    """In the forked process: what `python script argv`, or `python -m script argv`, would do."""
    os.setsid()
    os.chdir(cwd)
    usual = multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method(usual, force=True)  # for data workers
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    warnings.simplefilter("ignore")
    sys.argv = [script, *argv]
    if script.endswith(".py"):
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")
    else:
        sys.path[0] = str(ROOT)
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Started:
    """A script (or the name of a module) that runs in a process and a session of its own.

    stdout, stderr: what it has printed so far.  returncode: waits for its end.
    """

    def __init__(self, script, *argv, cwd=ROOT, out=None, **environment):
        self.out = out or os.path.join(tempfile.mkdtemp(), "printed")
        if str(script).endswith(".py"):
            script = os.path.join(ROOT, script)
        given = (script, [str(a) for a in argv], str(cwd), environment, self.out)
        self.process = server().Process(target=run_as_main, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def stdout(self):
        return Path(f"{self.out}.out").read_text()

    @property
    def stderr(self):
        return Path(f"{self.out}.err").read_text()

    @property
    def returncode(self):
        return self.wait()

    def wait(self, timeout=600):
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            printed = self.stdout[-3000:] + self.stderr[-3000:]
            raise TimeoutError(f"{self.process} is still running after {timeout} s: {printed}")
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()

    def wait_for(self, line):
        """Until it has printed a line that begins so."""
        while not os.path.exists(f"{self.out}.out") or not re.search(f"^{line}", self.stdout, re.M):
            assert self.process.exitcode is None, self.stdout + self.stderr
            time.sleep(0.02)


def done(started, check):
    code = started.wait()
    assert not check or code == 0, started.stdout[-3000:] + started.stderr[-9000:]
    return started


def run(script, *argv, check=True, **kw):
    """check: it must succeed; kw: cwd, or variables of the environment."""
    return done(Started(script, *argv, **kw), check)


def run_ranks(number, script, *argv, check=True, **kw):
    """As torchrun starts them: when one fails, the others are killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    about = dict(WORLD_SIZE=str(number), MASTER_ADDR="localhost", MASTER_PORT=str(port), **kw)
    out = os.path.join(tempfile.mkdtemp(), "printed")
    ranks = [Started(script, *argv, out=out, RANK=str(r), LOCAL_RANK=str(r), **about) for r in range(number)]
    codes = [None] * number
    while None in codes and not any(codes):
        time.sleep(0.05)
        codes = [rank.process.exitcode for rank in ranks]
    for rank in ranks:
        if rank.process.exitcode is None:
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
    failed = [rank for rank in ranks if rank.process.exitcode]
    return done((failed or ranks)[0], check)


def torchrun(number, script, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    command += [script, *map(str, argv)]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-9000:]
    return finished


def call(script, *argv, check=True):
    """As `run`, but in this process: starting Python takes longer than what it is asked."""
    finished, printed = subprocess.CompletedProcess(script, 0, "", ""), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module = importlib.import_module(script.removesuffix(".py"))
            finished.returncode = module.main([str(a) for a in argv]) or 0
    except (DataError, OSError, SystemExit) as e:
        assert not check, e
        finished.returncode, finished.stderr = 1, str(e)
    finished.stdout = printed.getvalue()
    return finished
