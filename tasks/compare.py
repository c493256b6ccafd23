"""Two files of scores, task by task, the biggest difference first.

    python -m tasks.compare a.json b.json

A file is what `python eval.py --json a.json` writes, or the leaderboard.json of a folder of scores.  A score
is the task's own metric: hit@1, of documents ndcg@5.  The mean is that of the tasks that both files have.
"""

import json

import numpy as np

from engine.flags import command
from files.errors import DataError, lfs_hint
from tasks.mmeb import MMEB, modality


def main_scores(path):
    """A file that --json wrote, or one in the leaderboard's form -> {"video/MSVD": the task's own metric}."""
    names = {t.full_name: f"{modality(t.meta)}/{t.name}" for t in MMEB.values()}
    scores = {}
    try:
        with open(path) as f:
            raw = json.load(f)
        if "tasks" in raw:
            return {names.get(name, name): r[r["metric"]] for name, r in raw["tasks"].items()}
        for part, found in raw["metrics"].items():
            metric = "ndcg_linear@5" if part == "visdoc" else "hit@1"
            for name, r in found.items():
                scores[f"{part}/{name.removesuffix('-fixed')}"] = r[metric]
        return scores
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        why = f"{type(e).__name__} {e}{lfs_hint(path)}"
        raise DataError(f"{path}: neither a file that --json writes nor a leaderboard.json: {why}") from e


def differences(paths):
    """Two score files -> a table of the tasks that both have, the biggest difference first."""
    a, b = map(main_scores, paths)
    both = sorted(a.keys() & b.keys(), key=lambda t: (-abs(b[t] - a[t]), t))
    if not both:
        raise DataError(f"{paths[0]} and {paths[1]}: no task is in both")
    wide = max(map(len, [*both, "mean"])) + 2
    rows = [(name, a[name], b[name]) for name in both]
    rows.append(("mean", np.mean([x for _, x, _ in rows]), np.mean([y for _, _, y in rows])))
    lines = [f"{'task':{wide}}{'a':>8}{'b':>8}{'b - a':>8}"]
    for name, x, y in rows:
        lines.append(f"{name:{wide}}{x:8.1%}{y:8.1%}{100 * (y - x):+8.1f}")
    for name, path, only in (("a", paths[0], a.keys() - b.keys()), ("b", paths[1], b.keys() - a.keys())):
        if only:
            lines.append(f"only in {name} ({path}): {', '.join(sorted(only))}")
    return "\n".join(lines)


def main(argv):
    if "-h" in argv or "--help" in argv:
        return print(__doc__.strip())
    if len(argv) != 2 or any(name.startswith("-") for name in argv):
        raise DataError(f"needs two JSON files of scores and no flag, got {' '.join(argv) or 'nothing'}; "
                        "accuracy against latency as a picture: python -m tools.compare --png compare.png")
    print(differences(argv))


if __name__ == "__main__":
    command(main)
