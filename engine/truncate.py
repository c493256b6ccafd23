"""An item that is too long loses the end of its text, where that is asked for; what it loses is counted."""

import warnings
from dataclasses import replace

from files.errors import DataError
from hub.prompts import with_prompt


def render_truncated(processor, side, template="{}"):
    """A Side -> its sample, with "cut": how many tokens of its text are left out to fit into max_len.

    template: of a prompt; it stands around what is left of the text.
    DataError where its media alone are too long.
    """
    lost = 0
    while True:
        try:
            return dict(processor.render(with_prompt(side, template)), cut=lost)
        except DataError as e:
            shorter, tokens = without_end(processor, side, e.over)
            if not tokens:
                raise
        side, lost = shorter, lost + tokens


def without_end(processor, side, tokens):
    """A Side whose texts have lost so many tokens at their end, if they have as many -> Side, tokens lost.

    The last text goes first; one behind <disc_emb> is the prompt and stays.
    """
    parts, lost = list(side.parts), 0
    kinds = [kind for kind, _ in parts]
    end = kinds.index("disc") if "disc" in kinds else len(parts)
    for i in reversed(range(end)):
        kind, text = parts[i]
        if kind != "text" or lost == tokens:
            continue
        found = processor.backend.encode(str(text), add_special_tokens=False)
        begins = [begin for begin, _ in found.offsets]
        kept = max(0, len(begins) - (tokens - lost))
        while 0 < kept < len(begins) and begins[kept - 1] == begins[kept]:
            kept -= 1  # several tokens of one character go together
        lost += len(begins) - kept
        parts[i] = kind, text[: begins[kept]] if kept < len(begins) else text
    return replace(side, parts=parts), lost


def warn_of_cut(cut, number, max_len):
    """cut: {an item's number: tokens lost}, or None; number: of all items"""
    if not cut:
        return
    first = min(cut)
    warnings.warn(f"{len(cut)} of {number} items are longer than {max_len} tokens and lost the end of their "
                  f"text, {sum(cut.values())} tokens together; the first is item {first}")
