"""The local files of a task of MMEB-V2: copies of hub repositories, and extracted archives of media.

    DIR/rows/<owner>/<name>                                     its rows
    DIR/image-tasks, DIR/video-tasks, DIR/visdoc-tasks          its media, in every spelling that is in use
"""

import glob
import hashlib
import itertools
import os
import shlex
from contextlib import suppress
from dataclasses import replace

import numpy as np

from files.errors import DataError, quote
from files.items import printable, Side
from files.pictures import frame_files
from tasks.mmeb_readers import momentseeker, mvbench, pages, ssv2
from tasks.mmeb_rows import data_files, rows_of

CLIP_FRAMES = 8  # of every clip
SSV2_ROWS = 1000  # only the first of SmthSmthV2 count
MVBENCH = [  # its subsets, in VLM2Vec's order
    "episodic_reasoning", "action_sequence", "action_prediction", "action_antonym", "fine_grained_action",
    "unexpected_action", "object_existence", "object_interaction", "object_shuffle", "moving_direction",
    "action_localization", "scene_transition", "action_count", "moving_count", "moving_attribute",
    "state_change", "fine_grained_pose", "character_order", "egocentric_navigation",
    "counterfactual_inference"]


def copies(root, hub):
    """Where a hub repository's rows may lie; the others are how visdoc-tasks.data.tar.gz holds them."""
    name, archive = hub.split("/")[1], os.path.join(root, "visdoc-tasks")
    return [
        os.path.join(root, "rows", *hub.split("/")),
        os.path.join(archive, "data", name),
        os.path.join(archive, "visdoc-tasks", "data", name)]


def download(root, hub):
    """The command that copies a hub repository's rows to where they are looked for."""
    patterns = ("*.parquet", "*.json*", "*.tsv", "README.md")
    parts = " ".join(f"--include '{pattern}'" for pattern in patterns)
    return f"hf download {hub} --repo-type dataset {parts} --local-dir {shlex.quote(copies(root, hub)[0])}"


def revision(folder):
    """The commit of a copy that `hf download --local-dir` made, or ""."""
    left = os.path.join(folder, ".cache", "huggingface", "download", "**", "*.metadata")
    found = sorted(glob.glob(left, recursive=True)) if folder else []
    if not found:
        return ""
    with open(found[0]) as f:
        return f.readline().strip()


def media_places(task, hub, extracted):
    """Folders below the root that may hold a task's media, in every spelling that is in use."""
    if task.is_document:
        names = [task.folder, task.folder.removeprefix("ViDoRe_"), hub.split("/")[1]]
        archives = [(), ("images",), ("visdoc-tasks",), ("visdoc-tasks", "images")]
        return [extracted, *(os.path.join("visdoc-tasks", *a, name) for a in archives for name in names)]
    if task.meta.startswith("image"):
        return ["image-tasks", os.path.join("image-tasks", "MMEB")]
    names = [task.folder, task.folder.replace("-", "_"), task.folder.replace("_", "-"), task.folder.lower()]
    groups = [task.meta]
    if task.meta == "video_ret":  # so does video_ret.tar.gz hold its folders
        inside = os.path.join("data", "ziyan", "video_retrieval")
        groups += [os.path.join(task.meta, inside), inside]
    spellings = itertools.product(("frames", ""), groups, dict.fromkeys(names), ("", "frames"))
    return [os.path.normpath(os.path.join("video-tasks", *spelling)) for spelling in spellings]


class Tree:
    """The local files of one task.

    released: the prompts and frames of the released evaluation; extract: pages that are only in the rows are
    written to DIR/visdoc-tasks/extracted.  Raises DataError when there are no rows.
    """

    def __init__(self, root, task, released=False, extract=True):
        if released and task.read is pages and task.meta != "visrag":
            task = replace(task, query="", target="")
        self.root, self.task, self.released, self.extract = root, task, released, extract
        all_frames = released and task.read is momentseeker
        self.max_frames = 10**6 if all_frames else CLIP_FRAMES
        self.judged = {}  # of a document task, query id -> {page: gain}
        self.frames = {}  # folder -> its frames that are used
        self.media = {}  # (kind, name) -> is it there?
        self.used = set()  # the files of those that are
        self.hub, self.copy, self.jsonl = self.find_rows()
        self.revision = revision(self.copy)
        # pages out of other rows are other pages
        of_rows = self.revision or self.files_hash()
        extracted = os.path.join("visdoc-tasks", "extracted", *self.hub.split("/"), of_rows)
        self.extracted = os.path.join(root, extracted)
        places = [os.path.join(root, p) for p in media_places(task, self.hub, extracted)]
        self.places = [p for p in places if os.path.isdir(p)]

    def find_rows(self):
        """-> repository, the folder that is its copy or "", the name of the file beside the videos or ""."""
        task = self.task
        for hub in task.versions or [task.hub]:
            for place in copies(self.root, hub):
                if os.path.isdir(place):
                    return hub, place, ""
        name = task.name.lower()
        stems = [name, name.replace("-", "_"), task.folder.lower()]
        if task.versions:
            stems.insert(0, f"{name}_1k6")
        for stem in stems:
            if os.path.exists(os.path.join(self.root, "video-tasks", "data", f"{stem}.jsonl")):
                return task.hub, "", stem
        wanted = copies(self.root, task.hub)[0]
        raise DataError(f"{wanted}: no such folder; get it with: {download(self.root, task.hub)}")

    def rows(self, config=None, columns=None):
        """The task's Rows, or those of one config of its repository."""
        task = self.task
        if not self.copy:
            return rows_of(os.path.join(self.root, "video-tasks", "data"), self.jsonl, "")
        if task.read is mvbench:
            return self.mvbench_rows()
        rows = rows_of(self.copy, config or task.subset, task.split, columns)
        return itertools.islice(rows, SSV2_ROWS) if task.read is ssv2 else rows

    def mvbench_rows(self):
        for subset in MVBENCH:
            for row in rows_of(self.copy, subset, self.task.split):
                row["subset"] = subset
                yield row

    def find(self, name, usable=os.path.isfile):
        """The path of a file, or of a folder that is usable, in one of the places.  Raises DataError."""
        if name not in ("", None):
            for place in self.places:
                path = os.path.join(place, str(name))
                if usable(path):
                    return path
        places = " or ".join(self.places) or "the folder of this task, which does not exist"
        raise DataError(f"{quote(name)} is not in {places}")

    def files_hash(self):
        """Hash of what the files are, by name, size and time: those of the rows, and all media so far."""
        rows, classes = self.copy, os.path.join(self.root, "classes", f"{self.task.name}.txt")
        files = [os.path.join(rows, name) for name in data_files(rows)] if rows else []
        files += glob.glob(os.path.join(glob.escape(self.root), "video-tasks", "data", f"{self.jsonl}.*"))
        h = hashlib.blake2b(digest_size=8)
        for file in sorted({*files, classes, *self.used}):
            with suppress(OSError):
                about = os.stat(file)
                name = os.path.relpath(file, self.root)
                h.update(repr((name, about.st_size, about.st_mtime_ns)).encode())
        return h.hexdigest()

    def has_frames(self, path):
        """Whether a folder holds a clip; its frames are kept: in natural order, at most 8, evenly spaced."""
        if path not in self.frames:
            frames = frame_files(path) if os.path.isdir(path) else []
            if len(frames) > self.max_frames:
                chosen = np.linspace(0, len(frames) - 1, self.max_frames, dtype=int)
                frames = [frames[i] for i in chosen]
            self.frames[path] = frames
        return bool(self.frames[path])

    def side(self, item, where):
        """An item -> Side.  Raises DataError for media that are not there."""
        text, kind, name = item
        if self.released:  # as its collator does
            text = text.strip()
        parts = []
        if kind:
            self.media.setdefault((kind, name), False)
            media = self.find(name) if kind == "image" else self.frames[self.find(name, self.has_frames)]
            self.media[kind, name] = True
            self.used.update([media] if kind == "image" else media)
            parts.append((kind, media))
        return Side([*parts, ("text", printable(text, where))], where=where)
