"""What --ckpt, --data and --task of a command stand for: a model; turtle world, your folders, MMEB-V2."""

import functools
import os
import warnings

from backbones.families import QWEN2_VL
from engine.ranks import say
from files.errors import DataError, nearest
from hub.prompts import PROMPTS
from model import Plume
from tasks.beir import list_tasks, read_task
from tasks.mmeb import MMEB, modality, read_published
from tasks.turtle import moves_lost, world_tasks


def select(tasks, wanted, root):
    """--task -> the names it stands for, of tasks named "<meta-task>/<dataset>"."""
    means = {"all": tasks}  # what may be asked for -> tasks
    for name_of in (modality, os.path.dirname, str, os.path.basename):
        for task in tasks:
            means.setdefault(name_of(task), []).append(task)
    chosen = set()
    for name in wanted.split(","):
        if name not in means:
            raise DataError(f"--task {name!r}: no such task in {root!r}.{nearest(name, means)}")
        chosen.update(means[name])
    return [task for task in tasks if task in chosen]


def is_published(root):
    """Whether a folder is a copy of MMEB-V2."""
    folders = ("rows", "image-tasks", "video-tasks", "visdoc-tasks")
    return bool(root) and any(os.path.isdir(os.path.join(root, folder)) for folder in folders)


def load_model(ckpt, device="", dtype="", **settings):
    """The checkpoint of --ckpt, with a hint where there is none yet."""
    if ckpt == "out/checkpoint" and not os.path.exists(ckpt):
        raise DataError(f"{ckpt}: no checkpoint there yet; train one with: python train.py, or name one "
                        "with --ckpt")
    return Plume.from_pretrained(ckpt, device or None, dtype or None, **settings)


def find_tasks(data, processor=None, released=False, skip_bad=False, moves="8", rules=False, codes=False,
               prompts=None):
    """-> names of all tasks of --data ("": turtle world), and a function: name -> its Task

    processor: the model's, for which turtle world draws its pictures; None: a Qwen2-VL's.
    prompts: the model's, for your folders; the others have instructions of their own.
    released, skip_bad: see `read_published`; moves, rules, codes: see `World`.
    """
    if is_published(data):
        def make(name):
            return read_published(data, os.path.basename(name), released, skip_bad)
        return [task.full_name for task in MMEB.values()], make
    if data:
        if prompts and prompts != PROMPTS:
            say(f"the checkpoint's prompts: queries {prompts['query']!r}, corpora {prompts['document']!r}")
        return list_tasks(data), functools.partial(read_task, data, prompts=prompts)
    turtle = world_tasks(processor.backbone if processor else QWEN2_VL, moves, rules, codes)
    if processor and moves_lost(processor, moves):
        warnings.warn(moves_lost(processor, moves))
    return list(turtle), turtle.get
