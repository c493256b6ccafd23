"""The gallery of tools/search.py: one HTML file with what was found, which opens without a network."""

import os
from html import escape

from tqdm import tqdm

from files.errors import DataError
from files.items import parse_item
from files.writing import writing
from tools.probe_report import LARGEST, media_of, STYLE
from tools.search_files import media_of_item

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}
.cards {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }}</style></head><body>
<header><h1>{title}</h1>{query}<p class="soft">{count}</p></header><main class="cards">
{cards}
</main></body></html>
"""


def write_gallery(path, folder, query, found):
    """Writes the file -> a line that says what is in it.

    query: Side; found: (score, name, item of the index) each, best first.
    """
    cards, size = [], 0
    for number, (score, name, item) in enumerate(tqdm(found, "gallery", leave=False), 1):
        if size > LARGEST:
            break
        card = (f"<article>{shown(folder, item, name)}<h2>{number}. {escape(name)}</h2>"
                f'<p class="soft">{score:.3f}</p></article>')
        size += len(card)
        cards.append(card)
    text = " ".join(value for kind, value in query.parts if kind == "text" and value)
    count = f"{len(cards)} of {len(found)} results"
    with writing(path) as f:
        f.write(PAGE.format(
            title=escape(text or "What looks like this picture"), style=STYLE, count=count,
            query=media_of(query, "the query", 200, 6), cards="\n".join(cards)))
    return f"gallery: {path}, {count}, {os.path.getsize(path) / 2**20:.1f} MB"


def shown(folder, item, name):
    """The picture, the frames or the page of an item; or why there is none any more."""
    try:
        return media_of(parse_item(media_of_item(folder, item), where=name), name, 220, 4)
    except (DataError, StopIteration) as e:
        return f"<p>cannot be shown: {escape(str(e))}</p>"
