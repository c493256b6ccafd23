"""Search a folder of pictures, clips and pages by text, by a picture, or by both.

    python -m tools.search FOLDER                                    bring the folder's index up to date
    python -m tools.search FOLDER "two people at a fountain"         the same, then the first results
    python -m tools.search FOLDER --image query.jpg --count 20       what looks like this picture
    python -m tools.search FOLDER "the same car in red" --image query.jpg --html results.html
    python -m tools.search FOLDER --serve                            a page to search on, see docs/serve.md
    python -m tools.search FOLDER "a goal" --every 10                clips also in windows of 10 seconds
    python -m tools.search FOLDER --index_mode single                files in one pass, see docs/one_space.md
    python -m tools.search "a red car" --vectors DIR                 what python -m tools.encode has embedded

The index is a folder: items.jsonl (path, content hash, and which seconds or page; a line for each row of the
vectors), vectors-XXXXXXXX.npy (float32, unit rows), bad.jsonl (what cannot be read, and why), and
embeddings/, where every item is kept as soon as it is encoded: a run that was stopped goes on there, and
`eval.py --scores INDEX` shares it.  What has the same size and time is not read again, what has the same
content not encoded again.  Another checkpoint, prompt, mode or version has its own; modes.json has what
--index_mode was given for a checkpoint.  Queries get the checkpoint's prompt `query`, files `document`.  PDF
files need pypdfium2.
"""

import engine.threads  # before torch

import itertools
import math
import os
import time
import warnings
from dataclasses import dataclass
from html import escape

import numpy as np
from tqdm import tqdm

from engine.flags import command, parse_flags
from engine.kept import Embedder, fingerprint
from files.errors import closest, DataError, Interrupted, quote, reason
from files.items import parse_item
from files.writing import writable, writing
from hub.settings import warn_of_two_spaces
from tasks.find import load_model
from tools.encode_parts import load_vectors, read_manifest
from tools.probe_report import LARGEST, media_of, STYLE
from tools.search_index import Index, index_mode_of, media_of_item, name_of, printable, scan

GALLERY = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}
.cards {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }}</style></head><body>
<header><h1>{title}</h1>{query}<p class="soft">{count}</p></header><main class="cards">
{cards}
</main></body></html>
"""


@dataclass
class Config:
    # query
    image: str = ""  # a picture that is the query, or a part of it
    count: int = 10  # results shown
    html: str = ""  # also write them as a gallery to this file
    vectors: str = ""  # search this folder of python -m tools.encode, in its mode unless --mode is given
    serve: int = -1  # instead: the port of a page on this machine; alone: 8001, 0: any that is free
    # index
    index: str = ""  # its folder; default: FOLDER/.plume
    index_mode: str = ""  # single: files are embedded in one pass, queries in --mode, for a checkpoint of
    #     train.py --w_cross; same: files in --mode, too; default: what this index was given before, or same
    every: float = 0.0  # clips are indexed whole and in windows of so many seconds; 0: whole
    # how
    ckpt: str = "out/checkpoint"  # checkpoint folder or hub name
    mode: str = "latent"  # latent; single: one pass; auto: for a checkpoint of train.py --adaptive
    batch_size: int = 16  # items embedded together; does not change the result
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


NOT_WITH_VECTORS = ("serve", "index", "index_mode", "every", "html", "batch_size", "dtype")


def check_flags(cfg, folder, given):
    if not os.path.isdir(folder):
        above, name = os.path.split(os.path.abspath(folder))
        beside = [entry.name for entry in os.scandir(above) if entry.is_dir()] if os.path.isdir(above) else []
        raise DataError(f"{quote(folder)}: no such folder.{closest(name, beside)}")
    if cfg.index_mode not in ("", "single", "same"):
        raise DataError(f"--index_mode {cfg.index_mode!r}: needs single or same")
    if cfg.count < 1 or cfg.batch_size < 1 or not 0 <= cfg.every < math.inf:
        raise DataError(f"--count {cfg.count} and --batch_size {cfg.batch_size} must be at least 1, --every "
                        f"{cfg.every} at least 0 seconds")
    if not writable(cfg.html) or cfg.html and not given:
        raise DataError(f"--html {cfg.html!r}: needs a query, and a file in a folder that exists")


def with_port(argv):
    """--serve alone -> --serve 8001"""
    given = []
    for word, following in zip(argv, [*argv[1:], "--"]):
        given.append(word)
        if word == "--serve" and following.startswith("--"):
            given.append("8001")
    return given


def print_others(others):
    """What else than pictures, clips and pages a folder holds, by `scan`."""
    if left_out := others.pop(".pdf", 0):  # no reader is installed
        print(f"{left_out} PDF files are left out: pip install pypdfium2, and start again")
    if others:
        kinds = ", ".join(f"{kind} {count}" for kind, count in others.most_common(8))
        print(f"{sum(others.values())} others are no pictures, clips or pages: {kinds}")


def print_bad(index):
    if index.bad:
        print(f"{len(index.bad)} cannot be read, see {printable(index.file('bad.jsonl'))}; the first:")
        for item in index.bad[:3]:
            print(f"  {printable(item['why'])}")


def write_gallery(path, folder, query, found):
    """Writes the file -> what is in it.  query: Side; found: (score, name, item of the index), best first."""
    cards = []
    for number, (score, name, item) in enumerate(tqdm(found, "gallery", leave=False), 1):
        if sum(map(len, cards)) > LARGEST:
            break
        cards.append(f"<article>{shown(folder, item, name)}<h2>{number}. {escape(name)}</h2>"
                     f'<p class="soft">{score:.3f}</p></article>')
    text = " ".join(value for kind, value in query.parts if kind == "text" and value)
    count = f"{len(cards)} of {len(found)} results"
    with writing(path) as f:
        f.write(GALLERY.format(
            title=escape(text or "What looks like this picture"), style=STYLE, count=count,
            query=media_of(query, "the query", 200, 6), cards="\n".join(cards)))
    return f"gallery: {path}, {count}, {os.path.getsize(path) / 2**20:.1f} MB"


def shown(folder, item, name):
    """The picture, the frames or the page of an item; or why there is none any more."""
    try:
        return media_of(parse_item(media_of_item(folder, item), where=name), name, 220, 4)
    except (DataError, StopIteration) as e:
        return f"<p>cannot be shown: {escape(str(e))}</p>"


def search_vectors(cfg, given, query):
    """What is nearest to a Side among the vectors of --vectors is printed."""
    for name in NOT_WITH_VECTORS:
        if name in given:
            raise DataError(f"--{name} belongs to the index of a folder; leave it out beside --vectors")
    if query is None or cfg.count < 1:
        raise DataError("--vectors needs a query, a text or --image, and --count of at least 1")
    manifest = read_manifest(cfg.vectors)
    model = load_model(cfg.ckpt, cfg.device, manifest["dtype"])
    if fingerprint(model) != manifest["checkpoint"]:
        raise DataError(f"{cfg.vectors}: these vectors are of another checkpoint than --ckpt {cfg.ckpt}")
    mode = cfg.mode if "mode" in given else manifest["mode"]
    steps = manifest["steps"] if mode == manifest["mode"] else None
    warn_of_two_spaces(model.settings, mode, manifest["mode"])
    document = model.settings["prompts"]["document"]
    if manifest["prompt"] != document:
        warnings.warn(f"{cfg.vectors}: these vectors have the prompt {quote(manifest['prompt'])}, and the "
                      f"checkpoint's for documents is {quote(document)}")
    vector = model.encode_query([query], mode=mode, steps=steps, dim=manifest["dim"])[0]
    ids, vectors = load_vectors(cfg.vectors)
    begun = time.perf_counter()
    scores = vectors @ vector
    found = [(scores[row], printable(ids[row])) for row in np.argsort(-scores)[: cfg.count]]
    print_found(found, len(ids), begun)


def print_found(found, total, begun):
    """found: (score, name, ...), best first; total: of how many; begun: when the search did."""
    print(f"{len(found)} of {total:,} items, ranked in {time.perf_counter() - begun:.2f} s")
    for number, (score, name, *_) in enumerate(found, 1):
        print(f"{number:4}  {score:6.3f}  {name}")


def main(argv):
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    cfg, given = parse_flags(Config, with_port(argv[len(words) :]), __doc__)
    if cfg.vectors:
        words = [None, *words]
    if not 1 <= len(words) <= 2:
        raise DataError("needs a folder (or --vectors) and perhaps a text in quotes, in front of all flags; "
                        f"got {quote(words)}")
    folder, text = words[0], words[1] if len(words) > 1 else None
    query = None
    if text is not None or cfg.image:
        query = parse_item({"text": text, "image": cfg.image or None}, where="the query")
    if cfg.mode not in ("latent", "single", "auto"):
        raise DataError(f"--mode {cfg.mode!r}: needs latent, single or auto")
    if cfg.vectors:
        return search_vectors(cfg, given, query)
    check_flags(cfg, folder, query)
    if "serve" in given:  # extras
        from tools.search_page import search_page
        from tools.serve import open_socket, run, Service

        if query is not None or cfg.html:
            raise DataError("--serve: queries are typed into the page; leave out text, --image, --html")
        listening = open_socket("127.0.0.1", cfg.serve)
    model = load_model(cfg.ckpt, cfg.device, cfg.dtype)
    place, checkpoint = cfg.index or os.path.join(folder, ".plume"), fingerprint(model)
    try:
        os.makedirs(place, exist_ok=True)
        mode = cfg.mode
        if index_mode_of(place, checkpoint, cfg.index_mode) == "single":
            mode = "single"
        steps = model.settings["latent_steps"] if mode == "latent" else None
        embedder = Embedder(
            model, mode, steps, cfg.batch_size, skip_bad=True, folder=os.path.join(place, "embeddings"),
            checkpoint_hash=checkpoint)
        index = Index(place, embedder, model.settings["prompts"]["document"])
    except OSError as e:
        raise DataError(f"{place}: the index cannot be there: {reason(e)}; name a folder with --index") from e
    if mode != cfg.mode:
        warn_of_two_spaces(model.settings, cfg.mode, mode)
        print(f"files in mode {mode}, queries in mode {cfg.mode}; --index_mode same: both in mode {cfg.mode}")
    files, others = scan(folder, place, cfg.every)
    try:
        print(index.update(folder, files, model.processor.limits.max_pixels))
    except OSError as e:
        raise DataError(f"{e}; the index needs a folder where there is room: --index") from e
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {len(index.items)} items are in the index, the same command goes on "
                          "with the rest") from None
    print_others(others)
    print_bad(index)
    if "serve" in given:
        index.vectors = np.array(index.vectors)  # from the disk into memory
        app = search_page(Service(model, cfg.batch_size, most=64), index, folder, cfg)
        return run(app, listening, "the page")
    if query is None:
        return
    vector = model.encode_query([query], mode=cfg.mode)[0]
    begun = time.perf_counter()
    found = [(score, name_of(item), item) for score, item in index.search(vector, cfg.count)]
    print_found(found, len(index.items), begun)
    if cfg.html:
        print(printable(write_gallery(cfg.html, folder, query, found)))


if __name__ == "__main__":
    command(main)
