"""What tools/search.py has found, as one HTML file: pictures, frames and pages, with links to the files."""

import os
import urllib.parse
from html import escape

from tqdm import tqdm

from files.errors import DataError
from files.items import parse_item
from files.writing import writing
from tools.probe_report import LARGEST, media_of, STYLE
from tools.search_index import media_of_item, name_of

GALLERY = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}
.cards {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }}
article h2 {{ font-size: 1rem; margin: .6rem 0 .2rem; }}</style></head><body>
<header><h1>{title}</h1>{query}<p class="soft">{count}</p></header><main class="cards">
{cards}
</main></body></html>
"""


def write_gallery(path, folder, query, found, total):
    """Writes the file -> what is in it.

    query: Side; found: (score, item of the index), best first; total: of how many items.
    """
    cards = []
    for number, (score, item) in enumerate(tqdm(found, "gallery", leave=False), 1):
        if sum(map(len, cards)) > LARGEST:
            break
        name = name_of(item)
        cards.append(f"<article>{shown(folder, item, name)}"
                     f'<h2>{number}. <a href="{link_to(folder, item, path)}">{escape(name)}</a></h2>'
                     f'<p class="soft">cosine {score:.3f}</p></article>')
    text = " ".join(value for kind, value in query.parts if kind == "text" and value)
    count = f"{len(cards)} of {total:,} items"
    if len(cards) < len(found):
        count += f"; the other {len(found) - len(cards)} results would make this file over 8 MB"
    with writing(path) as f:
        f.write(GALLERY.format(
            title=escape(text or "What looks like this"), style=STYLE, count=count,
            query=media_of(query, "the query", 200, 6), cards="\n".join(cards)))
    return f"gallery: {path}, {count}, {os.path.getsize(path) / 2**20:.1f} MB"


def shown(folder, item, name):
    """The picture, the frames or the page of an item; or why there is none any more."""
    try:
        return media_of(parse_item(media_of_item(folder, item), where=name), name, 220, 4)
    except (DataError, StopIteration) as e:
        return f"<p>cannot be shown: {escape(str(e))}</p>"


def link_to(folder, item, page):
    """The address of an item's file as seen from an HTML file, at its page or its seconds."""
    file = os.path.abspath(os.path.join(folder, item["path"]))
    link = os.path.relpath(file, os.path.dirname(os.path.abspath(page)))
    link = urllib.parse.quote(os.fsencode(link))
    if "page" in item:
        link += f"#page={item['page']}"
    if "start" in item:
        link += f"#t={item['start']:g},{item['end']:g}"
    return link
