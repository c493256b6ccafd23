"""The paper's ablations in turtle world, a run for each setting and seed, one process a core.

    python -m tools.ablations --json ablations.json --families image_cls,image_ret --steps 500

Other flags are train.py's.  Finished runs stay in the JSON; the same command goes on where it stopped.
"""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace

import torch
from tqdm import tqdm

import train
from data import DataError, command, parse_flags, reason, writing
from tasks.turtle import World

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
    "paper's schedule": (dict(gate=0.0, replay=0.0, last_stage=0.5), None),
    "no curriculum, but read-out loss": (dict(last_stage=1.0, replay=0.0), None),
}

NOT_HERE = {"data", "init", "seed", "resume", "workers", "preset"}  # flags of train.py


@dataclass
class Config(train.Config):
    # ablations
    json: str = "ablations.json"  # where the results are kept
    seeds: int = 2  # runs of each setting


class Runs:
    """The runs of one command: each trains and evaluates in processes of its own."""

    def __init__(self, base, families):
        self.base, self.families = base, families
        self.processes, self.stopping = [], False

    def config(self, setting, seed):
        flags, _ = ABLATIONS[setting]
        return replace(self.base, **flags, seed=seed, out=self.out(setting, seed), workers=0)

    def out(self, setting, seed):
        return os.path.join(self.base.out, "ablations", re.sub(r"\W+", "_", f"{setting} {seed}"))

    def run(self, setting, seed):
        """Trains, or goes on, and evaluates -> a row of the results, or None when that did not end well."""
        out, usual = self.out(setting, seed), asdict(train.Config())
        os.makedirs(out, exist_ok=True)
        flags = [f"--{k}={v}" for k, v in asdict(self.config(setting, seed)).items() if v != usual[k]]
        if train.checkpoints_in(out):
            flags.append("--resume")
        tasks = ",".join(f"{family}/turtle" for family in self.families)
        scores = os.path.join(out, "scores.json")
        ckpt = os.path.join(out, "checkpoint")
        ended_well = self.start(out, "train.py", *flags) and self.start(
            out, "eval.py", "--task", tasks, "--ckpt", ckpt, "--json", scores)
        if not ended_well:
            return None
        with open(scores) as f:
            hits = {task: result["hit@1"] for task, result in json.load(f)["tasks"].items()}
        with open(os.path.join(out, "log.jsonl")) as f:
            seconds = sum(json.loads(line)["ms"] for line in f) / 1e3
        mean = sum(hits.values()) / len(hits)
        return dict(setting=setting, seed=seed, hits=hits, mean=mean, seconds=round(seconds))

    def start(self, out, script, *flags):
        """Runs a script of the folder above to its end, on one core -> whether it ended well."""
        if self.stopping:
            return False
        folder = os.path.dirname(os.path.abspath(train.__file__))
        command = [sys.executable, os.path.join(folder, script), *flags]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        with open(os.path.join(out, "output.txt"), "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.processes.append(process)
        return process.wait() == 0 and not self.stopping

    def stop(self):
        """Those that still run write a checkpoint."""
        self.stopping = True
        for process in self.processes:
            process.terminate()


def results_so_far(path, base):
    """The results of the JSON, or new ones; raises DataError for those of another command."""
    config = {k: v for k, v in asdict(base).items() if k not in (*train.FREE_ON_RESUME, "seed")}
    settings = {name: flags for name, (flags, _) in ABLATIONS.items()}
    new = dict(config=config, settings=settings, cores=os.cpu_count(), torch=torch.__version__, runs=[])
    if not os.path.exists(path):
        return new
    try:
        with open(path) as f:
            then = json.load(f)
        then["config"], then["settings"], then["runs"]
    except (ValueError, LookupError, TypeError) as e:
        raise DataError(f"{path}: not a file that this command writes: {reason(e)}; choose another") from e
    for key in ("config", "settings"):
        if then[key] != new[key]:
            raise DataError(f"{path} holds runs of another {key} ({then[key]}); choose another file, or the "
                            "same flags")
    return then


def show(runs):
    print("setting                           hit@1 mean  (lowest - highest)  paper, MMEB-V2")
    for name, (_, paper) in ABLATIONS.items():
        scores = [r["mean"] for r in runs if r["setting"] == name]
        cells = f"{name:34}{sum(scores) / len(scores):10.1%}  ({min(scores):.1%} - {max(scores):.1%})"
        print(f"{cells:68}{paper or ''}")
    hours = sum(r["seconds"] for r in runs) / 3600
    print(f"{len(runs)} runs, {hours:.1f} hours of training on one core each")


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    wrong = sorted(given & NOT_HERE)
    if wrong:
        raise DataError(f"ablations run turtle world from scratch with {cfg.seeds} seeds: leave out "
                        f"--{' --'.join(wrong)}")
    if cfg.seeds < 1 or not os.path.isdir(os.path.dirname(os.path.abspath(cfg.json))):
        raise DataError(f"--seeds {cfg.seeds}, --json {cfg.json!r}: needs 1 or more, a folder that exists")
    base = train.Config(**{field.name: getattr(cfg, field.name) for field in fields(train.Config)})
    runs = Runs(base, World("test", cfg.families).names)
    for name in ABLATIONS:
        train.check(runs.config(name, 0), 1)
    results = results_so_far(cfg.json, base)
    done = {(r["setting"], r["seed"]) for r in results["runs"]}
    todo = [(name, seed) for seed in range(cfg.seeds) for name in ABLATIONS if (name, seed) not in done]

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    bar = tqdm(total=len(todo), desc="ablations", unit="run")
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        try:
            jobs = {pool.submit(runs.run, *job): job for job in todo}
            for future in as_completed(jobs):
                row = future.result()
                if row is None:
                    job = jobs[future]
                    raise DataError(f"{job} did not finish; see output.txt in {runs.out(*job)}.  The same "
                                    "command goes on")
                results["runs"].append(row)
                with writing(cfg.json) as f:
                    json.dump(results, f, indent=1)
                bar.update()
        except KeyboardInterrupt:
            print("stopped; the same command goes on")
            return 130
        finally:
            runs.stop()
            pool.shutdown(wait=False, cancel_futures=True)
    show(results["runs"])
    return 0


if __name__ == "__main__":
    command(main)
