"""The instructions that a training file's texts begin or end with: proposed as prompts, never just taken."""

import os
import re
import shlex
from collections import Counter

import numpy as np

from engine.ranks import say
from engine.train_flags import PROMPT_FLAGS

LOOKED_AT = 1000  # pairs, evenly over the file
FEWEST = 8  # pairs of a data set: of fewer nothing is said
SIDES = dict(query="queries", document="targets")
# Two words, or one with a mark behind it, as "query: "
INSTRUCTION = re.compile(r"\w[^\w]+\w|\w *[^\w\s]")


def propose_prompts(cfg, given, pairs, prompts):
    """Says which prompts a checkpoint may be given; prompts: what it has.

    Every data set is looked at, and the instruction that is most frequent is named, unless a flag was given.
    """
    if not cfg.data or cfg.resume or given & PROMPT_FLAGS.keys() == PROMPT_FLAGS.keys():
        return
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), LOOKED_AT)).round().astype(int))
    texts = {}  # (data set, number of the side) -> (first, last) text of each pair
    for row in rows.tolist():
        for place, side in enumerate(pairs[row][:2]):
            texts.setdefault((pairs.dataset[row], place), []).append(first_and_last(side))
    for place, (flag, name) in enumerate(PROMPT_FLAGS.items()):
        found = Counter()
        for (_, where), ends in texts.items():
            if where == place and len(ends) >= FEWEST:
                found[template_in(ends)] += len(ends)
        del found["{}"]
        if not found or flag in given:
            continue
        template, count = found.most_common(1)[0]
        if prompts[name] != template:
            say(f"{count:,} of {len(rows):,} {SIDES[name]} looked at have one instruction, the checkpoint's "
                f"prompt {name!r} is {prompts[name]!r}; to keep it there: --{flag} {shlex.quote(template)}")


def first_and_last(side):
    """The first and the last text of an item; "" where there is none, or pictures stand behind it."""
    kinds = [kind for kind, _ in side.parts]
    item = side.parts[: kinds.index("disc")] if "disc" in kinds else side.parts
    texts = [value for kind, value in item if kind == "text"]
    before_media = "text" in kinds and {"image", "video"} & set(kinds[kinds.index("text") :])
    if not texts or before_media:  # no prompt can stand there: its text comes behind the media
        return "", ""
    return texts[0], texts[-1]


def template_in(ends):
    """(first, last) texts of items -> the template of what all have in common, or "{}"."""
    firsts, lasts = zip(*ends)
    before = common_beginning(firsts)
    rest = [last[len(before) :] if last == first else last for first, last in ends]
    behind = common_end(rest)
    template = f"{before}{{}}{behind}"
    return template if template.count("{}") == 1 else "{}"


def common_beginning(texts):
    """What all begin with, up to the end of a word; "" where that is no instruction."""
    common = os.path.commonprefix(texts)
    if any(text[len(common) : len(common) + 1].isalnum() for text in texts):  # perhaps within a word
        common = re.sub(r"\w+$", "", common)
    return common if INSTRUCTION.search(common) else ""


def common_end(texts):
    """What all end with, from the beginning of a word."""
    common = os.path.commonprefix([text[::-1] for text in texts])[::-1]
    blank = re.search(r"\s", common)
    common = common[blank.start() :] if blank else ""
    return common if re.search(r"\w\W+\w", common) else ""
