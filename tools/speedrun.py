"""A row of the leaderboard in docs/turtle.md: trains turtle world, evaluates it, tells what the run cost.

    python train.py                                 here, or in --reference FOLDER: the run that costs 1.00
    python -m tools.speedrun --steps 1200 --out out/run     flags of train.py

Seconds of a whole run say more about the machine, and about what else it does, than about the run.  So steps
of both runs are measured by turns, on one thread, in core seconds with their batches, at K = 0, half of the
stages and K = S; what lies between is taken from the straight line.  The sum over the steps in a run's log is
its cost: checkpoints and the start are not in it.  The lowest hit@1 is that of the nine families' tests.
"""

import engine.threads  # before torch

import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

import train
from engine.flags import command, parse_flags
from files.errors import DataError, reason
from hub.folders import LOG
from tools import speedrun_steps

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass
class Config(train.Config):
    # leaderboard
    reference: str = ""  # folder of code, with out/log.jsonl of its `python train.py`; default: this code
    turns: int = 5  # measurements of every stage, after one that does not count


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    if cfg.data or cfg.init or cfg.resume or cfg.turns < 1 or os.path.abspath(cfg.out) == f"{HERE}/out":
        raise DataError("tools.speedrun trains turtle world from scratch, --turns 1 or more, and not in out, "
                        "where the reference may be: leave out --data, --init, --resume; give --out")
    flags = [f"--{name}={value}" for name, value in asdict(cfg).items()
             if name in given - {"reference", "turns", "out"}]
    reference = cfg.reference or HERE
    theirs = steps_of(os.path.join(reference, "out"))
    scores = os.path.join(cfg.out, "scores.json")
    for script in (["train.py", *flags, "--out", cfg.out],
                   ["eval.py", "--ckpt", f"{cfg.out}/checkpoint", "--json", scores]):
        if code := subprocess.run([sys.executable, os.path.join(HERE, script[0]), *script[1:]]).returncode:
            return code
    with open(scores) as f:
        lowest = min(task["hit@1"] for task in json.load(f)["tasks"].values())
    mine = steps_of(cfg.out)
    costs = seconds_by_turns([(HERE, flags), (reference, [])], cfg.turns)
    cost_here, cost_there = (cost(*run) for run in zip((mine, theirs), costs))
    for name, seconds in zip(("this run", "reference"), costs):
        steps = ", ".join(f"{1e3 * value:.0f} ms in stage {stage}" for stage, value in seconds.items())
        print(f"{name}: a step takes {steps}")
    print(f"{cost_here:.0f} core seconds; of the reference, {cost_there:.0f}")
    print("| steps | core seconds | lowest hit@1 | command |\n| --- | --- | --- | --- |\n"
          f"| {sum(mine.values()):,} | {cost_here / cost_there:.2f} | {lowest:.1%} | `{' '.join(flags)}` |")
    return 0


def steps_of(folder):
    """The log in a run's folder -> Counter of its steps by stage."""
    path = os.path.join(folder, LOG)
    try:
        with open(path) as f:
            return Counter(row["stage"] for row in map(json.loads, f))
    except (OSError, ValueError, LookupError) as e:
        raise DataError(f"{path}: not the log of a run: {reason(e)}; train it with: python train.py") from e


def seconds_by_turns(runs, turns):
    """runs: folder of the code and flags of each -> for each {stage: core seconds of a step}, the mean."""
    processes = [start(folder, flags) for folder, flags in runs]
    found = []
    for _, flags in runs:
        cfg, _ = parse_flags(train.Config, flags, __doc__)
        found.append({stage: [] for stage in (0, cfg.segments // 2, cfg.segments)})
    for _ in range(1 + turns):
        for position in range(3):
            for process, seconds in zip(processes, found):
                stage = list(seconds)[position]
                seconds[stage].append(ask(process, stage))
    for process in processes:
        process.stdin.close()
        process.wait()
    return [{stage: np.mean(values[1:]) for stage, values in seconds.items()} for seconds in found]


def start(folder, flags):
    """tools.speedrun_steps of this folder, with everything else of the given one."""
    command = [sys.executable, "-c", inspect.getsource(speedrun_steps), *flags]
    one_thread, pipe = dict(os.environ, OMP_NUM_THREADS="1"), subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, text=True, env=one_thread)


def ask(process, stage):
    """-> core seconds of a step in this stage"""
    process.stdin.write(f"{stage}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("core seconds"):
            return float(line.split()[-1])
    raise DataError("tools.speedrun_steps ended before it had measured a step")


def cost(steps, seconds):
    """Counter of steps by stage, {stage: seconds of a step} of some stages -> core seconds of them all."""
    return sum(n * np.interp(stage, list(seconds), list(seconds.values())) for stage, n in steps.items())


if __name__ == "__main__":
    command(main)
