"""Every name that a checkpoint and a run leave on disk, and how one checkpoint takes another's place.

    OUT/checkpoint                the newest; FILES and CARD are in it
    OUT/checkpoint-STEP           an earlier one that --keep has kept
    OUT/checkpoint.XXXXXXXX.old   was being replaced when the run died
    OUT/NAME.XXXXXXXX.writing     was being written when the run died; see `temporary_name`
    OUT/log.jsonl                 a row a step
    OUT/wandb_id                  the run's name at Weights & Biases
    OUT/.plume.lock               held while a run is at work

What a new checkpoint does with the files of the one whose place it takes:

    kept with what others added   config_sentence_transformers.json (prompts, default prompt, similarity),
                                  sentence_bert_config.json, modules.json (Normalize, Dense)
    kept, its limits made true    processor_config.json, video_preprocessor_config.json (hub/limits.py)
    kept                          a model card without our line in it, every file that is not in FILES
    written anew                  the others: they follow from the model, as chat_template.jinja from the
                                  template in config.json's plume block

Prompts in the first of these are the checkpoint's (hub/prompts.py), but for those that others have changed.
In another folder nothing of what others added is known: it is to be set there again, or the files copied.
"""

import contextlib
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

from backbones.families import BACKBONES
from files.errors import DataError, quote, reason
from files.writing import require_utf8, temporary_name, write_json
from hub.prompts import keep_foreign, stored_prefixes
from hub.weights import INDEX, read_json, weight_files, WEIGHTS

# What a checkpoint of ours consists of, and a model card
MODULES, ST_CONFIG, INPUTS = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
HUB_FILES = (MODULES, ST_CONFIG, INPUTS, "plume_st.py")
PREPROCESSOR, RUN_STATE = "preprocessor_config.json", "train_state.pt"
CLIP_PROCESSOR, PROCESSOR = "video_preprocessor_config.json", "processor_config.json"  # transformers' own
FILES = ("config.json", WEIGHTS, PREPROCESSOR, "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", RUN_STATE, *HUB_FILES)
CARD, OUR_CARD = "README.md", "<!-- written by PLUME; saving again replaces this file"
# Names in --out: checkpoints, and what a run leaves behind that is killed while it writes
NEWEST, LOG, LOCK, WANDB_ID = "checkpoint", "log.jsonl", ".plume.lock", "wandb_id"
CHECKPOINT = re.compile(r"checkpoint(-\d+(\.[0-9a-f]{8})?|\.[0-9a-f]{8}\.old)?")
LEFT_OVER = re.compile(r"checkpoint\.[0-9a-f]{8}\.(old|writing)|log\.jsonl\.[0-9a-f]{8}\.writing")


def checkpoints_in(out):
    """The run's checkpoints, the newest first.  One that died between two renames left no `checkpoint`."""
    states = [file for file in Path(out).glob(f"*/{RUN_STATE}") if CHECKPOINT.fullmatch(file.parent.name)]
    # `checkpoint` goes before all others, then the last one written
    states.sort(key=lambda file: (file.parent.name != NEWEST, -file.stat().st_mtime))
    return [os.path.join(out, file.parent.name) for file in states]


def newest_checkpoint(out):
    """The newest of them; DataError when there is none."""
    found = checkpoints_in(out)
    if not found:
        raise DataError(f"--resume: no checkpoint of a run in {out!r}")
    return found[0]


@contextlib.contextmanager
def replacing(path, keep=None):
    """A new folder that becomes `path` when the block ends well, in place of the checkpoint that stood there.

    keep: a free name under which that one stays.  Files in it that are not the checkpoint's (a model card, a
    licence) move to the new one, and so does what others added to ours, see above.  Temporary names are this
    call's own, and nothing else is removed.  Dying between the two renames leaves the old one as `keep`, or
    `path.XXXXXXXX.old`.
    """
    path = os.path.realpath(path)
    require_utf8(path)
    temporary, old = temporary_name(path), keep or temporary_name(path, "old")
    there = os.path.exists(path)
    if there:
        check_replaceable(path)
    assert not os.path.exists(old), f"{old} exists"
    os.makedirs(temporary)
    try:
        if there:
            shutil.copymode(path, temporary)
            for name in (CLIP_PROCESSOR, PROCESSOR):
                if os.path.isfile(os.path.join(path, name)):
                    shutil.copy(os.path.join(path, name), temporary)
        yield temporary
        keep_additions(path, temporary)
        card = os.path.join(path, CARD)
        if os.path.lexists(card) and not is_our_card(card):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(temporary, CARD))
        new = set(os.listdir(temporary))
        clash = [name for name in sorted(new) if os.path.isdir(os.path.join(path, name))]
        if clash:
            raise FileExistsError(f"{path}: holds a folder {clash[0]!r}, the name of a checkpoint's file; "
                                  "move it away")
        if there:
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.exists(old) and not os.path.exists(path):
            os.rename(old, path)
        raise
    if there:
        names = set(os.listdir(old))
        mine = checkpoint_files(old) | new & names
        stuck = move_files(old, path, names - mine)
        if stuck:  # the new checkpoint stands, nothing is lost
            warnings.warn(f"{path} is written, but these files that stood there could not be moved and are "
                          f"in {old}: {', '.join(stuck)}")
        if not keep:
            remove_checkpoint(old, mine)


def keep_additions(old, new):
    """What others added to a checkpoint's files for sentence-transformers goes into the new ones."""
    for name in (ST_CONFIG, INPUTS, MODULES):
        there, file = os.path.join(old, name), os.path.join(new, name)
        if not os.path.isfile(there) or not os.path.isfile(file):
            continue
        try:
            theirs = read_json(there, list if name == MODULES else dict)
        except DataError as e:
            warnings.warn(f"{e}; what it says is not taken over, it is now {name}.old")
            shutil.copy(there, f"{file}.old")
            continue
        ours = read_json(file, type(theirs))
        if name == ST_CONFIG and isinstance(theirs.get("prompts"), dict):
            theirs["prompts"] = keep_foreign(theirs["prompts"], stored_prefixes(old), ours["prompts"])
        if name != MODULES:
            fixed = {key: ours[key] for key in ("model_type", "requirements") if key in ours}
            write_json(file, ours | theirs | fixed)
        elif any(isinstance(module, dict) and module.get("type") == ours[0]["type"] for module in theirs):
            write_json(file, theirs)


def check_replaceable(path):
    """Raises FileExistsError for what is neither a checkpoint nor a folder of other files."""
    if not os.path.isdir(path):
        raise FileExistsError(f"{path}: exists and is not a folder; choose another name")
    if os.path.join(os.path.realpath("."), "").startswith(os.path.join(path, "")):
        raise FileExistsError(f"{path}: is the current folder, which cannot be replaced; start elsewhere, or "
                              "choose another name")
    if checkpoint_files(path):
        with contextlib.suppress(DataError, FileNotFoundError):
            config = read_json(os.path.join(path, "config.json"))
            if config.get("model_type") in BACKBONES and weight_files(path):
                return
        names = quote(sorted(os.listdir(path)))
        raise FileExistsError(f"{path}: holds {names}, which is no checkpoint of a Qwen-VL; choose another "
                              "name")


def move_files(old, new, names):
    """Moves files from one folder to another -> those that could not be moved, each with the reason."""
    stuck = []
    for name in sorted(names):
        try:
            os.rename(os.path.join(old, name), os.path.join(new, name))
        except OSError as e:
            stuck.append(f"{name} ({reason(e)})")
    return stuck


def remove_checkpoint(folder, names):
    """Removes these files, and the folder when nothing else is in it."""
    with contextlib.suppress(OSError):  # what cannot be removed stays, and so do somebody's own files
        for name in names:
            os.remove(os.path.join(folder, name))
        os.rmdir(folder)


def kept_name(path, step):
    """A free name for a checkpoint that stays when the next one takes its place."""
    name = f"{path}-{step}"
    return f"{name}.{secrets.token_hex(4)}" if os.path.exists(name) else name  # there: somebody's copy


def checkpoint_files(folder):
    """The names of the files that make the checkpoint in a folder; what else is there is somebody else's."""
    names = {*FILES, INDEX}
    with contextlib.suppress(DataError, FileNotFoundError):
        names |= {os.path.basename(file) for file in weight_files(folder)}
    if is_our_card(os.path.join(folder, CARD)):
        names.add(CARD)
    return {name for name in names if os.path.isfile(os.path.join(folder, name))}


def is_our_card(file):
    """Whether this model card is of `write_hub_files`; somebody else's stays where it is."""
    if not os.path.isfile(file):
        return False
    with open(file, "rb") as f:
        return OUR_CARD.encode() in f.read(1000)
