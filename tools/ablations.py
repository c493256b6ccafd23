"""The paper's ablations in turtle world: how many steps each setting takes until it is right, over seeds.

    python -m tools.ablations --families image_ret --global_batch 16 --until 0.9 --eval_every 50 --steps 1300

Every setting is trained in the plain world and with rule books, a process a core, until hit@1 on 256 held-out
queries has come to --until, or --steps are over.  A setting that does not come so far with any of its first
three seeds gets no more.  Other flags are train.py's.  Finished runs stay in the JSON; the same command goes
on where it stopped.
"""

import engine.threads  # before torch

import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace

import torch
from tqdm import tqdm

import train
from engine import lock, resume, train_flags
from engine.flags import command, parse_flags
from files.errors import DataError, reason
from files.writing import writable, write_json
from tasks.turtle import World
from hub import folders

WORLDS = {"plain": False, "rule books": True}  # --rules
# setting: its flags, and the paper's score for it (table of ablations, column All)
ABLATIONS = {
    "full": ({}, 61.6),
    "no latent transition": (dict(adapter="none"), 58.8),
    "single MLP": (dict(adapter="mlp"), 59.2),
    "no anchor": (dict(anchor=False), 60.1),
    "no shared expert": (dict(shared_expert=False), 60.3),
    "top-1": (dict(top_k=1), 60.8),
    "no step embedding": (dict(step_embedding=False), 60.4),
    # without the read-out loss, too, which would show it the rationale
    "no curriculum": (dict(last_stage=1.0, replay=0.0, w_read=0.0), 54.8),
    "K = 4": (dict(segments=4), 59.9),
    "K = 6": (dict(segments=6), 61.1),
    "rest after the thought": (dict(rest_of_rationale="after"), None),
    "no read-out loss": (dict(w_read=0.0), None),
    "no gate": (dict(gate=0.0), None),
    "paper's schedule": (dict(gate=0.0, replay=0.0, last_stage=0.5), None),
    "no curriculum, but read-out loss": (dict(last_stage=1.0, replay=0.0), None),
    "tokens in parallel": (dict(adapter="parallel"), None),
    "frozen backbone": (dict(freeze_backbone=True), None),
    "frozen, no latent transition": (dict(freeze_backbone=True, adapter="none"), None),
    "frozen, single MLP": (dict(freeze_backbone=True, adapter="mlp"), None),
    "frozen, no anchor": (dict(freeze_backbone=True, anchor=False), None),
    "untied embeddings": (dict(tied=False), None),
    "untied, no latent transition": (dict(tied=False, adapter="none"), None),
    "untied, single MLP": (dict(tied=False, adapter="mlp"), None),
    "untied, no anchor": (dict(tied=False, anchor=False), None),
}
WHOLE = {"frozen": "frozen backbone", "untied": "untied embeddings"}  # before a comma: compared with this

ENOUGH = 3  # seeds of a setting that all stay below --until; it gets no more of them
NOT_HERE = {  # flags of train.py
    "data", "init", "seed", "resume", "workers", "preset", "rules", "codes", "adaptive", "adapter",
    "freeze_backbone"}
ROW = ("setting", "world", "seed", "steps", "hit", "seconds")  # of the results


@dataclass
class Config(train.Config):
    # ablations
    json: str = "ablations.json"  # where the results are kept
    seeds: int = 5  # runs of each setting in each world, at most


class Runs:
    """The runs of one command, each in a process of its own; `run` adds to the results, `rows`."""

    def __init__(self, base, rows):
        self.base, self.rows, self.processes, self.stopping = base, rows, [], False

    def config(self, setting, world, seed):
        flags, _ = ABLATIONS[setting]
        name = re.sub(r"\W+", "_", f"{setting} {world} {seed}")
        out = os.path.join(self.base.out, "ablations", name)
        return replace(self.base, **flags, rules=WORLDS[world], seed=seed, out=out, workers=0)

    def run(self, setting, world, seed):
        """Trains, or goes on, where there is need; DataError for a run that failed or has other flags."""
        if self.stopping or hopeless(outcomes_of(self.rows, setting, world)):
            return
        cfg, usual = asdict(self.config(setting, world, seed)), asdict(train.Config())
        out = cfg["out"]
        os.makedirs(out, exist_ok=True)
        flags = [f"--{name}={value}" for name, value in cfg.items() if value != usual[name]]
        rows, steps = [], None
        if folders.checkpoints_in(out):
            flags.append("--resume")
            state = resume.read_state(folders.newest_checkpoint(out))
            if changed := resume.changes(state["config"], cfg, usual):
                raise DataError(f"{out} holds a run of other flags ({changed}): choose another --out")
            rows, steps = self.logged(out, state["step"])
        if steps is None and len(rows) < self.base.steps:
            self.start(out, flags)
            if self.stopping:
                return
            rows, steps = self.logged(out)
        hit = [row["hit"] for row in rows if "hit" in row][-1]
        seconds = round(sum(row["ms"] for row in rows) / 1e3)
        self.rows.append(dict(zip(ROW, (setting, world, seed, steps, hit, seconds))))

    def logged(self, out, done=0):
        """-> the rows of a run's log, `done` of them at least; the steps until it came so far, or None"""
        path, rows, broken = os.path.join(out, folders.LOG), [], ""
        try:
            with open(path) as f:
                rows = [json.loads(line) for line in f if line.endswith("\n")]
        except (OSError, ValueError) as e:
            broken = f": {reason(e)}"
        if broken or len(rows) < done:
            raise DataError(f"{path}: not the whole log of this run{broken}; remove {out}, and the same "
                            "command runs it anew")
        there = (row["step"] + 1 for row in rows if row.get("hit", 0) >= self.base.until)
        return rows, next(there, None)

    def start(self, out, flags):
        """Runs train.py to its end, on one core."""
        command = [sys.executable, os.path.abspath(train.__file__), *flags]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        with open(os.path.join(out, "output.txt"), "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.processes.append(process)
        if self.stopping:
            process.terminate()
        if process.wait() and not self.stopping:
            self.stopping = True  # no other begins
            raise DataError(f"{out}: this run did not end well; output.txt there says why.  Then the same "
                            "command goes on")

    def stop(self):
        """Those that still run write a checkpoint."""
        self.stopping = True
        for process in self.processes:
            process.terminate()


def results_so_far(path, base):
    """The results of the JSON, or new ones; raises DataError for those of another command."""
    config, usual = asdict(base), asdict(train.Config())
    for name in {*resume.FREE_ON_RESUME, "seed"} - {"until"}:
        del config[name]
    settings = {name: flags for name, (flags, _) in ABLATIONS.items()}
    new = dict(config=config, settings=settings, cores=os.cpu_count(), torch=torch.__version__, runs=[])
    if not os.path.exists(path):
        return new
    try:
        with open(path) as f:
            then = json.load(f)
        then["config"] = {name: usual[name] for name in config} | then["config"]  # flags since then
        if not isinstance(then["runs"], list) or not all(run.keys() == set(ROW) for run in then["runs"]):
            raise LookupError("its runs are others")
        then["settings"] = settings | then["settings"]
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise DataError(f"{path}: not a file that this command writes: {reason(e)}; choose another") from e
    for key in ("config", "settings"):
        if then[key] != new[key]:
            raise DataError(f"{path} holds runs of another {key} ({then[key]}); choose another file, or the "
                            "same flags")
    return then


def outcomes_of(runs, setting, world):
    """-> (steps, 0) of a seed that came so far, (infinity, share of queries missed) of another; best first"""
    mine = [run for run in runs if run["setting"] == setting and run["world"] == world]
    return sorted((run["steps"], 0) if run["steps"] else (math.inf, 1 - run["hit"]) for run in mine)


def hopeless(outcomes):
    """Whether no seed came so far, of enough."""
    return len(outcomes) >= ENOUGH and outcomes[0][0] == math.inf


def as_text(outcomes, most):
    """Median and range of the steps of all seeds."""
    if not outcomes:
        return "-"
    seeds = outcomes[0], statistics.median_low(outcomes), outcomes[-1]
    low, middle, high = (f"{steps:.0f}" if steps <= most else f"> {most}" for steps, _ in seeds)
    return low if low == high else f"{middle} ({low} .. {high})"


def whole_of(setting):
    """The setting that this one leaves something out of."""
    return WHOLE.get(setting.partition(", ")[0], "full")


def verdict(outcomes, whole):
    """Whether what a setting leaves out shows: every one of enough seeds is behind each of the whole's."""
    if min(len(outcomes), len(whole)) < ENOUGH:
        return ""
    if outcomes[0] > whole[-1]:
        return "worse"
    return "better" if outcomes[-1] < whole[0] else ""


def show(runs, most):
    """The table: steps of every setting in every world, and whether they lie apart from the full method's."""
    print("steps: median (lowest .. highest) of the seeds, > N alone: none of them came so far;\n"
          "worse, better: every seed is behind, before each of full's (or frozen backbone's, untied\n"
          "embeddings'), by steps, and those that did not come so far by their last hit@1")
    print(f"{'setting':34}" + "".join(f"{world:>32}" for world in WORLDS) + "   paper, MMEB-V2")
    for name, (_, paper) in ABLATIONS.items():
        line = f"{name:34}"
        for world in WORLDS:
            mine, whole = outcomes_of(runs, name, world), outcomes_of(runs, whole_of(name), world)
            line += f"{as_text(mine, most):>24}{verdict(mine, whole):>8}"
        print(f"{line}   {paper or ''}")
    hours = sum(r["seconds"] for r in runs) / 3600
    print(f"{len(runs)} runs, {hours:.1f} hours of training steps on one core each")


def check_flags(cfg, given):
    if wrong := sorted(given & NOT_HERE):
        raise DataError("ablations run turtle world from scratch, plain and with rule books, and set adapter "
                        f"and seeds themselves: leave out --{' --'.join(wrong)}")
    if cfg.seeds < 1 or not cfg.json or not writable(cfg.json):
        raise DataError(f"--seeds {cfg.seeds}, --json {cfg.json!r}: needs 1 or more, a file in a folder that "
                        "exists")
    if not (cfg.until and cfg.eval_every and cfg.steps):
        raise DataError(f"--until {cfg.until} --eval_every {cfg.eval_every} --steps {cfg.steps}: needs the "
                        "hit@1 at which a run ends, how often to look, and the most steps")


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    check_flags(cfg, given)
    base = train.Config(**{field.name: getattr(cfg, field.name) for field in fields(train.Config)})
    World("test", cfg.families, moves=cfg.moves)
    results = results_so_far(cfg.json, base)
    runs = Runs(base, results["runs"])
    for name in ABLATIONS:
        train_flags.check_flags(runs.config(name, "plain", 0), 1)
    done = {(r["setting"], r["world"], r["seed"]) for r in results["runs"]}
    jobs = itertools.product(range(cfg.seeds), WORLDS, ABLATIONS)  # a seed is whole before the next begins
    todo = [(name, world, seed) for seed, world, name in jobs if (name, world, seed) not in done]

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    alone = lock.exclusive_lock(replace(base, out=os.path.join(base.out, "ablations"), resume=True))
    with alone, ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            jobs = [pool.submit(runs.run, *job) for job in todo]
            for future in tqdm(as_completed(jobs), "ablations", len(jobs), unit="run"):
                future.result()
                write_json(cfg.json, results)
        except KeyboardInterrupt:
            print("stopped; the same command goes on")
            return 130
        finally:
            runs.stop()
            pool.shutdown(wait=False, cancel_futures=True)
    show(results["runs"], cfg.steps)
    return 0


if __name__ == "__main__":
    command(main)
