"""The instructions of a checkpoint, {name: template}, and the one place where they are put around an item.

    {"query": "Find the picture: {}", "document": "Represent this picture.{}"}

A template has "{}" once, where the item's text comes; of an item without text that is "".  As in training
records the instruction stands behind the pictures and clips that an item begins with.  `query` and `document`
are always there; "{}" alone changes nothing.
"""

import contextlib
import os
from dataclasses import replace

from files.errors import DataError, nearest, quote
from files.items import printable
from hub.weights import read_json

PROMPTS = dict(query="{}", document="{}")


def fill_prompts(given, where):
    """A dict of some prompts -> of all; DataError for what is no prompt."""
    for name, template in given.items():
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: prompts: the name of a prompt must be a text, got {quote(name)}")
        check_template(template, f"{where}: prompts: {quote(name)}")
    return PROMPTS | given


def check_template(template, where):
    """DataError unless it is a text with one {}."""
    if not isinstance(template, str) or template.count("{}") != 1:
        raise DataError(f"{where}: got {quote(template)}; a prompt is a text that has {{}} once, where the "
                        "item's text comes, as 'Find the picture: {}'")
    printable(template, where)


def template_of(prompts, name):
    """The template of a prompt by its name; None: no prompt."""
    if name is None:
        return "{}"
    if not isinstance(name, str) or name not in prompts:
        raise DataError(f"prompt {quote(name)}: this checkpoint has no such prompt.{nearest(name, prompts)}")
    return prompts[name]


def with_prompt(side, template):
    """A Side -> the same with the template around its text; where it has <disc_emb>, in front of that."""
    before, behind = template.split("{}")
    if not before and not behind:
        return side
    kinds = [kind for kind, _ in side.parts]
    end = kinds.index("disc") if "disc" in kinds else len(kinds)
    begin = kinds[:end].index("text") if "text" in kinds[:end] else end
    parts = [*side.parts[:begin], ("text", before), *side.parts[begin:end], ("text", behind)]
    joined = []
    for kind, value in parts:
        if kind == "text" and joined and joined[-1][0] == "text":
            joined[-1] = kind, joined[-1][1] + value
        elif kind != "text" or value:
            joined.append((kind, value))
    return replace(side, parts=joined + side.parts[end:])


# ---- for sentence-transformers, whose prompts are texts in front
def prefix_of(template):
    """A template -> how its files have it: the text in front, or where text stands behind, the template."""
    return template.removesuffix("{}")


def template_of_prefix(prompt):
    """A prompt of these files, or of MTEB: with one {} it is a template, else a text in front."""
    template = prompt if "{}" in prompt else prompt + "{}"
    check_template(template, "prompt")
    return template


def prefixes(prompts):
    return {name: prefix_of(template) for name, template in prompts.items()}


def stored_prefixes(folder):
    """What the checkpoint in a folder would give them of its own; none where there is no checkpoint."""
    with contextlib.suppress(DataError, OSError, AttributeError, TypeError):
        block = read_json(os.path.join(folder, "config.json")).get("plume", {})
        return prefixes(PROMPTS | block.get("prompts", {}))
    return {}


def keep_foreign(theirs, before, ours):
    """Prompts in these files: `ours`, but for what others have changed or added since PLUME wrote `before`.

    theirs: what the files have now; "" is no prompt of anybody.
    """
    kept = {name: text for name, text in theirs.items() if name in ours or text != before.get(name)}
    for name, text in ours.items():
        if theirs.get(name, "") in ("", before.get(name)) and (text or name in theirs):
            kept[name] = text
    return kept
