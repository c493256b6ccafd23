"""What of MMEB-V2 is there: rows, candidates and media of each task, and the commands that get the rest.

    python -m tasks.check --data MMEB-V2                       all 78 tasks; nothing is encoded
    python -m tasks.check --data MMEB-V2 --task video_ret      some of them, named as for eval.py
    python -m tasks.check --data MMEB-V2 | grep '^hf download' > rows.sh; sh rows.sh

One line a task: what was found / what is published, its version, its problems.  The exit status is 1 when a
task has problems.  Every evaluation on MMEB-V2 begins with the same look.
"""

import engine.threads  # before torch

import os
from dataclasses import dataclass

from tqdm import tqdm

from engine.flags import command, parse_flags
from engine.ranks import rank_and_world
from files.errors import DataError
from tasks.find import is_published, select
from tasks.mmeb import MMEB, read_published
from tasks.mmeb_files import copies, download
from tasks.mmeb_readers import video_classes


@dataclass
class Config:
    data: str = ""  # folder of the copy of MMEB-V2, with rows/, image-tasks/ and so on: see docs/mmeb_v2.md
    task: str = "all"  # all, image, video, visdoc, a meta-task (video_ret) or data set (MSVD);
    #     several with commas between
    protocol: str = "clean"  # clean, or released: as the released checkpoint was scored


LINE = "{:58}{:>14}{:>14}{:>18}  {:8}  {}"


def found_of(n, published):
    return f"{n:,} / {published:,}" if published else f"{n:,}"


def check_line(name, about, corpus, published, bad):
    queries = found_of(about["rows"], published.queries)
    candidates = found_of(corpus, published.corpus)
    media = found_of(about["media"], about["media_wanted"])
    problems = f"{len(bad)}, the first: {bad[0]}" if bad else ""
    return LINE.format(name, queries, candidates, media, about["version"], problems).rstrip()


def check_tasks(root, names, released):
    """-> a line for each task, those of tasks with problems, and commands that get rows that are missing."""
    lines, problems, commands = [], [], {}
    for name in tqdm(names, desc="looking at the files", leave=False):
        published = MMEB[os.path.basename(name)]
        try:
            task = read_published(root, published.name, released, skip_bad=True, extract=False)
            about, corpus, bad = task.about, len(task.corpus), task.bad
        except DataError as e:
            about, corpus, bad = dict(rows=0, version="", media=0, media_wanted=0), 0, [str(e)]
        if published.read is video_classes:  # its corpus is not in the repository
            short = not any(map(os.path.isdir, copies(root, published.hub)))
        else:
            short = about["rows"] != published.queries or published.corpus and corpus != published.corpus
        if short or about["version"] == "original":
            commands[published.hub] = download(root, published.hub)
        lines.append(check_line(name, about, corpus, published, bad))
        if bad:
            problems.append(lines[-1])
    return lines, problems, list(commands.values())


def require_tasks(root, names, released=False, skip_bad=False):
    """Raises DataError for tasks of the benchmark that are not all there, before anything is encoded."""
    _, problems, _ = check_tasks(root, names, released)
    if problems and not skip_bad:
        raise DataError("\n".join([
            f"{len(problems)} of {len(names)} tasks have problems; mend them, choose others with --task, or "
            "leave out what is bad with --skip_bad", *problems]))


def check_flags(cfg):
    """Raises DataError for flags that cannot work."""
    if rank_and_world()[1] > 1:
        raise DataError("it runs as one process: python instead of torchrun")
    if not is_published(cfg.data):
        raise DataError(f"--data {cfg.data!r}: needs a copy of MMEB-V2, a folder with rows/, image-tasks/, "
                        "video-tasks/ or visdoc-tasks/")
    if cfg.protocol not in ("clean", "released"):
        raise DataError(f"--protocol {cfg.protocol!r}: needs clean or released")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    check_flags(cfg)
    names = select([task.full_name for task in MMEB.values()], cfg.task, cfg.data)
    lines, problems, commands = check_tasks(cfg.data, names, cfg.protocol == "released")
    print(LINE.format("task", "queries", "candidates", "media", "version", "problems"), *lines, sep="\n")
    if commands:
        print("", "rows that are not there, not all there, or not the mended ones:", *commands, sep="\n")
    print(f"{len(names) - len(problems)} of {len(names)} tasks are there without a problem")
    return 1 if problems else 0


if __name__ == "__main__":
    command(main)
