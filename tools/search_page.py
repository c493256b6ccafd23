"""The page of python -m tools.search FOLDER --serve: a query of text, a picture or both; the results.

Plain HTML, no script runs.  The only files that are shown are those of the index, by their row in it.
"""

import io
import os
import threading
import time
from html import escape

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse, HTMLResponse, Response

from files.clips import load_frames
from files.errors import DataError
from files.items import parse_item
from files.pictures import load_image
from tools.probe_report import media_of, strip, STYLE
from tools.search_index import media_of_item, name_of
from tools.serve_http import make_app, Places, read_body
from tools.serve_input import How

try:
    import python_multipart  # starlette's parser of forms needs it
except ModuleNotFoundError as e:
    raise SystemExit("error: python_multipart is missing: pip install python-multipart") from e

HOST = "127.0.0.1"
LARGEST = 16 << 20  # bytes of an upload
MOST = 200  # results
DRAWING = threading.Lock()  # the library that draws pages bears one thread
HEADERS = {"Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
                                      "form-action 'self'; base-uri 'none'"}
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}
.cards {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }}
form {{ display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: 1rem 0; }}
form [name=text] {{ flex: 1 1 20rem; }} form [name=count] {{ width: 4.5rem; }}
input, button {{ font: inherit; padding: .4rem .6rem; }} article img {{ max-height: 220px; width: auto; }}
article h2 {{ font-size: 1rem; margin: .6rem 0 .2rem; }}
</style></head><body><header><h1>{title}</h1>
<form method="post" action="/" enctype="multipart/form-data" role="search">
<input name="text" type="search" aria-label="Text" placeholder="what you look for" value="{text}" autofocus>
<input name="image" type="file" accept="image/*" aria-label="Picture">
<input name="count" type="number" min="1" max="{most}" value="{count}" aria-label="Results">
<button>Search</button></form>{query}<p class="soft" role="status">{status}</p></header>
<main class="cards">
{cards}
</main></body></html>
"""


def search_page(service, index, folder, cfg):
    """-> the app.  service: tools.serve.Service; cfg: tools.search.Config"""
    index.items = [item | dict(row=row) for row, item in enumerate(index.items)]
    places, title = Places(64), f"{len(index.items):,} pictures, clips and pages"

    def page(status, text="", count=cfg.count, query="", cards=(), code=200):
        html = PAGE.format(title=title, style=STYLE, most=MOST, text=escape(text), count=count, query=query,
                           status=escape(status), cards="\n".join(cards))
        return HTMLResponse(html, code, HEADERS)

    async def ask(request):
        return page("A text, a picture, or both as one query.")

    async def search(request):
        with places:
            text, image, count = await read_form(request, cfg.count)
            begun = time.perf_counter()
            try:
                query = parse_item({"text": text or None, "image": image or None}, where="the query")
                (vector,), _ = await service.embed([query], How(cfg.mode, prompt="query"))
                shown = await run_in_threadpool(media_of, query, "the query", 200, 6)
            except DataError as e:
                return page(str(e), text, count, code=400)
        found = await run_in_threadpool(index.search, vector, count)
        cards = [card(number, score, item) for number, (score, item) in enumerate(found, 1)]
        took = time.perf_counter() - begun
        return page(f"{len(cards)} of {len(index.items):,} items, {took:.2f} s", text, count, shown, cards)

    def thumbnail(request):
        row = request.path_params["row"]
        if row >= len(index.items):
            raise HTTPException(404)
        try:
            return Response(picture_of(folder, index.items[row]), media_type="image/jpeg")
        except (DataError, StopIteration) as e:  # changed or deleted since; the browser shows its name
            raise HTTPException(404, str(e)) from e

    def file(request):
        row = request.path_params["row"]
        path = os.path.join(folder, index.items[row]["path"]) if row < len(index.items) else ""
        if not os.path.isfile(path):
            raise HTTPException(404)
        return FileResponse(path, headers=HEADERS)

    app = make_app(HOST)
    app.add_route("/", ask, ["GET"])
    app.add_route("/", search, ["POST"])
    app.add_route("/thumbnails/{row:int}", thumbnail, ["GET"])
    app.add_route("/files/{row:int}", file, ["GET"])
    return app


async def read_form(request, count):
    """-> text, bytes of the picture, how many results"""
    body = await read_body(request, LARGEST)

    async def pieces():
        yield body

    try:
        form = await MultiPartParser(request.headers, pieces(), max_files=1, max_fields=9).parse()
    except (MultiPartException, KeyError) as e:
        raise DataError(f"needs a form of this page: {e}") from e
    text, image, number = (form.get(name, "") for name in ("text", "image", "count"))
    if not isinstance(text, str) or not isinstance(number, str):
        raise DataError("needs a form of this page: text and count are no files")
    if not isinstance(image, str):
        image = await image.read()
    if number.isdecimal():
        count = min(MOST, max(1, int(number[:9])))
    return text, image, count


def card(number, score, item):
    name = escape(name_of(item))
    return (f'<article><img src="/thumbnails/{item["row"]}" loading="lazy" alt="{name}">'
            f'<h2><a href="/files/{item["row"]}">{number}. {name}</a></h2>'
            f'<p class="soft">cosine {score:.3f}</p></article>')


def picture_of(folder, item):
    """An item of the index -> a small JPEG of the picture or page, of a clip four frames side by side."""
    with DRAWING:
        kind, value = parse_item(media_of_item(folder, item), where=name_of(item)).parts[0]
        image = strip(load_frames(value, 4)) if kind == "video" else load_image(value)
    image.thumbnail((880, 440))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
