"""The paper's ablations in turtle world, a run for each setting and seed, one process a core.

    python -m tools.ablations --json ablations.json --families image_cls,image_ret --steps 500     other flags are train.py's

Finished runs stay in the JSON; the same command goes on where it stopped.
"""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace

import torch
from tqdm import tqdm

import train
from data import DataError, parse_flags, reason, said, writing
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
    "no curriculum": (dict(last_stage=1.0, replay=0.0, w_read=0.0), 54.8),  # the read-out loss would show it the rationale
    "K = 4": (dict(segments=4), 59.9),
    "K = 6": (dict(segments=6), 61.1),
    "rest after the thought": (dict(rest_of_rationale="after"), None),
    "no read-out loss": (dict(w_read=0.0), None),
    "paper's schedule": (dict(gate=0.0, replay=0.0, last_stage=0.5), None),
    "no curriculum, but read-out loss": (dict(last_stage=1.0, replay=0.0), None),
}


@dataclass
class Config(train.Config):
    # ablations
    json: str = "ablations.json"  # where the results are kept
    seeds: int = 2  # runs of each setting


def main(argv):
    """Train and evaluate every setting with every seed, one process a core; finished runs stay in the JSON, begun ones are resumed."""
    cfg, given = parse_flags(Config, argv, __doc__)
    if wrong := sorted(given & {"data", "init", "seed", "resume", "workers", "preset"}):
        raise DataError(f"ablations run turtle world from scratch with {cfg.seeds} seeds: leave out --{' --'.join(wrong)}")
    if cfg.seeds < 1 or not os.path.isdir(os.path.dirname(os.path.abspath(cfg.json))):
        raise DataError(f"--seeds {cfg.seeds} must be at least 1, and --json {cfg.json!r} in a folder that exists")
    usual = asdict(train.Config())
    base_run = train.Config(**{k: v for k, v in asdict(cfg).items() if k in usual})
    families = World("test", cfg.families).names
    out_of = lambda name, seed: os.path.join(cfg.out, "ablations", re.sub(r"\W+", "_", f"{name} {seed}"))
    flags_of = lambda name, seed: asdict(replace(base_run, **ABLATIONS[name][0], seed=seed, out=out_of(name, seed), workers=0))
    for name in ABLATIONS:
        train.check(train.Config(**dict(flags_of(name, 0), resume=True)), 1)
    base = {k: v for k, v in asdict(base_run).items() if k not in train.FREE_ON_RESUME + ("seed",)}
    results = dict(config=base, settings={name: flags for name, (flags, _) in ABLATIONS.items()}, cores=os.cpu_count(),
                   torch=torch.__version__, runs=[])
    if os.path.exists(cfg.json):
        try:
            with open(cfg.json) as f:
                then = json.load(f)
            then["config"], then["settings"], then["runs"]
        except (ValueError, LookupError, TypeError) as e:
            raise DataError(
                f"{cfg.json}: not a file that this command writes: {reason(e)}; choose another name") from e
        if changed := [k for k in ("config", "settings") if then[k] != results[k]]:
            raise DataError(f"{cfg.json} holds runs of another {changed[0]} ({then[changed[0]]}); choose another file, or the same flags")
        results = then
    done = {(r["setting"], r["seed"]) for r in results["runs"]}
    todo = [(name, seed) for seed in range(cfg.seeds) for name in ABLATIONS if (name, seed) not in done]
    here, running, stopping = os.path.dirname(os.path.abspath(train.__file__)), [], []

    def run(job):
        out = out_of(*job)
        os.makedirs(out, exist_ok=True)
        flags = [f"--{k}={v}" for k, v in flags_of(*job).items() if v != usual[k]]
        training = ["train.py", *flags, *["--resume"] * bool(train.checkpoints_in(out))]
        test = ["eval.py", "--task", ",".join(f"{f}/turtle" for f in families), "--ckpt", os.path.join(out, "checkpoint"),
                "--json", os.path.join(out, "scores.json")]
        for script, *rest in (training, test):
            with open(os.path.join(out, "output.txt"), "a") as log:
                process = subprocess.Popen([sys.executable, os.path.join(here, script), *rest], stdout=log, stderr=log,
                                           env=dict(os.environ, OMP_NUM_THREADS="1"))
            running.append(process)
            if process.wait() or stopping:
                return None
        with open(os.path.join(out, "scores.json")) as f, open(os.path.join(out, "log.jsonl")) as log:
            hits = {task: r["hit@1"] for task, r in json.load(f)["tasks"].items()}
            seconds = sum(json.loads(line)["ms"] for line in log) / 1e3
        return dict(setting=job[0], seed=job[1], hits=hits, mean=sum(hits.values()) / len(hits), seconds=round(seconds))

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(todo), desc="ablations", unit="run") as bar:
        try:
            jobs = {pool.submit(run, job): job for job in todo}
            for future in as_completed(jobs):
                if (result := future.result()) is None:
                    raise DataError(f"{jobs[future]} did not finish; see output.txt in {out_of(*jobs[future])}. The same command goes on")
                results["runs"].append(result)
                with writing(cfg.json) as f:
                    json.dump(results, f, indent=1)
                bar.update()
        except KeyboardInterrupt:
            print("stopped; the same command goes on")
            return 130
        finally:
            stopping.append(True)
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:  # those that still run write a checkpoint
                process.terminate()
    print("setting                           hit@1 mean  (lowest - highest)  paper, MMEB-V2")
    for name, (_, paper) in ABLATIONS.items():
        scores = [r["mean"] for r in results["runs"] if r["setting"] == name]
        print(f"{name:34}{sum(scores) / len(scores):10.1%}  ({min(scores):.1%} - {max(scores):.1%})".ljust(68) + (f"{paper}" if paper else ""))
    print(f"{len(results['runs'])} runs, {sum(r['seconds'] for r in results['runs']) / 3600:.1f} hours of training on one core each")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (DataError, OSError) as e:
        sys.exit(f"error: {said(e)}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
