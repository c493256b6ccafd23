"""Pixel limits in the processor files of a Qwen-VL, which transformers writes: read, and kept true.

    preprocessor_config.json         of pictures
    video_preprocessor_config.json   of clips
    processor_config.json            of both, in two objects: all that transformers 5 writes

A limit has several spellings: min_pixels or size.shortest_edge, max_pixels or size.longest_edge.  Of a clip
they are each frame's, in a Qwen3-VL those of all its frames together.  Their `fps` is not
read: unless told (train.py --fps) we take `num_frames` from a clip of any length.  A checkpoint of ours has
its limits in the plume block.
"""

import os
from dataclasses import asdict

from backbones.families import BACKBONES, Limits
from files.errors import DataError, quote
from files.writing import write_json
from hub.folders import CLIP_PROCESSOR, PREPROCESSOR, PROCESSOR
from hub.weights import read_json

SPELLINGS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
PREFIX = {"image": "", "video": "video_"}  # of our names


def sections(folder):
    """-> (file, its whole object, "image" or "video", the object in it that has the limits of these)"""
    found = []
    for name in (PREPROCESSOR, CLIP_PROCESSOR, PROCESSOR):
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            continue
        whole = read_json(file)
        if name == PROCESSOR:
            nested = [(kind, whole.get(f"{kind}_processor")) for kind in PREFIX]
            found += [(file, whole, kind, section) for kind, section in nested if isinstance(section, dict)]
        else:
            found.append((file, whole, "image" if name == PREPROCESSOR else "video", whole))
    return found


def limits_in(kind, section):
    """-> the limits that a section sets, by our names; min_pixels goes before size, as in transformers."""
    size = section.get("size") if isinstance(section.get("size"), dict) else {}
    said = {}
    for name, edge in SPELLINGS:
        for value in (section.get(name), size.get(edge), size.get(name)):
            if value is not None:
                said.setdefault(PREFIX[kind] + name, value)
    if kind == "video" and section.get("num_frames") is not None:
        said["num_frames"] = section["num_frames"]
    return said


def stored_limits(path, limits, model_type, kinds=tuple(PREFIX)):
    """`limits` with those of the files -> limits, and for the user: which of them, and of which file.

    kinds: the media whose limits are taken.  DataError where two files contradict each other.
    """
    said, file_of = {}, {}
    for file, _, kind, section in sections(path):
        for name, value in limits_in(kind, section).items() if kind in kinds else ():
            if said.setdefault(name, value) != value:
                raise DataError(f"{file}: {name} is {quote(value)}, in {file_of[name]} it is "
                                f"{quote(said[name])}; make them equal, or remove what is out of date")
            file_of.setdefault(name, os.path.basename(file))
    found, frames = limits | said, said.get("num_frames", limits["num_frames"])
    if BACKBONES[model_type].time == "text" and type(frames) is int and frames > 0:
        for name, up in (("video_min_pixels", frames - 1), ("video_max_pixels", 0)):
            if type(said.get(name)) is int:
                found[name] = (said[name] + up) // frames
    try:
        found = asdict(Limits(**found))
    except DataError as e:
        files = ", ".join(sorted(set(file_of.values())))
        raise DataError(f"{os.path.join(path, files)}: {e}") from e
    return found, ", ".join(f"{name} {found[name]:,} ({file_of[name]})" for name in said)


def write_limits(folder, limits, facts):
    """preprocessor_config.json, which other software reads; what others wrote beside it says the same then.

    limits: a checkpoint's; facts: its Backbone.
    """
    write_json(os.path.join(folder, PREPROCESSOR), dict(
        image_processor_type="Qwen2VLImageProcessor", min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels, patch_size=facts.patch, merge_size=facts.merge,
        temporal_patch_size=facts.temporal, image_mean=facts.mean, image_std=facts.std))
    for file, whole, kind, section in sections(folder):
        if os.path.basename(file) == PREPROCESSOR:
            continue
        frames = limits.num_frames if kind == "video" and facts.time == "text" else 1
        size = section.get("size") if isinstance(section.get("size"), dict) else {}
        for name, edge in SPELLINGS:
            value = vars(limits)[PREFIX[kind] + name] * frames
            size = {key: given for key, given in size.items() if key != name} | {edge: value}
            if section.get(name) is not None:
                section[name] = value
        if kind == "video" and limits.fps:
            section.pop("num_frames", None)  # one excludes the other there
            section |= dict(fps=limits.fps, max_frames=limits.num_frames)
        elif kind == "video" and section.get("num_frames") is not None:
            section["num_frames"] = limits.num_frames
        section["size"] = size
        write_json(file, whole)
