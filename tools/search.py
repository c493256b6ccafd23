"""Search a folder of pictures, clips and pages by text, by a picture or clip, or by both.

    python -m tools.search FOLDER                                    bring the folder's index up to date
    python -m tools.search FOLDER "two people at a fountain"         the same, then the first results
    python -m tools.search FOLDER --image query.jpg --count 20       what looks like this picture
    python -m tools.search FOLDER "the same car in red" --image query.jpg --html results.html
    python -m tools.search FOLDER --video query.mp4 --kind video,page --json
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

import contextlib
import json
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np

from engine.flags import command, parse_words
from engine.kept import Embedder, fingerprint
from engine.ranks import rank_and_world
from files.errors import closest, DataError, Interrupted, nearest, quote, reason
from files.items import parse_item
from files.writing import writable
from hub.settings import warn_of_two_spaces
from tasks.find import load_model
from tools.encode_parts import load_vectors, read_manifest
from tools.search_gallery import write_gallery
from tools.search_index import Index, name_of, NAMES, printable, read_lines, scan, write_lines

@dataclass
class Config:
    # query
    image: str = ""  # a picture that is the query, or a part of it
    video: str = ""  # the same for a clip
    count: int = 10  # results shown
    kind: str = ""  # only what is of these kinds: image, video, page, with commas between; default: all
    json: bool = False  # instead: one JSON object, and nothing else on stdout
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


NOT_WITH_VECTORS = ("serve", "kind", "index", "index_mode", "every", "html", "batch_size", "dtype")


def check_flags(cfg, given, folder, query):
    if cfg.mode not in ("latent", "single", "auto"):
        raise DataError(f"--mode {cfg.mode!r}: needs latent, single or auto")
    if cfg.json and query is None:
        raise DataError("--json: needs a query, a text, --image or --video")
    if cfg.vectors:
        return
    if not os.path.isdir(folder):
        above, name = os.path.split(os.path.abspath(folder))
        beside = [entry.name for entry in os.scandir(above) if entry.is_dir()] if os.path.isdir(above) else []
        raise DataError(f"{quote(folder)}: no such folder.{closest(name, beside)}")
    for kind in cfg.kind.split(","):
        if cfg.kind and kind not in NAMES.values():
            raise DataError(f"--kind {kind!r}: no such kind.{nearest(kind, NAMES.values())}")
    if cfg.index_mode not in ("", "single", "same"):
        raise DataError(f"--index_mode {cfg.index_mode!r}: needs single or same")
    if cfg.count < 1 or cfg.batch_size < 1 or not 0 <= cfg.every < math.inf:
        raise DataError(f"--count {cfg.count} and --batch_size {cfg.batch_size} must be at least 1, --every "
                        f"{cfg.every} at least 0 seconds")
    if not writable(cfg.html) or cfg.html and query is None:
        raise DataError(f"--html {cfg.html!r}: needs a query, and a file in a folder that exists")
    if "serve" in given and query is not None:
        raise DataError("--serve: queries are typed into the page; leave out text, --image, --video, --html")


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


def search_vectors(cfg, given, query):
    """What is nearest to a Side among the vectors of --vectors, as `answer_of` has it."""
    for name in NOT_WITH_VECTORS:
        if name in given:
            raise DataError(f"--{name} belongs to the index of a folder; leave it out beside --vectors")
    if query is None or cfg.count < 1:
        raise DataError("--vectors needs a query, a text, --image or --video, and --count of at least 1")
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
    rows = np.argsort(-scores)[: cfg.count]
    results = [dict(score=float(scores[row]), name=printable(ids[row]), id=ids[row]) for row in rows]
    return answer_of(mode, len(ids), begun, results)


def answer_of(mode, total, begun, results, **more):
    """What --json prints.  total: of how many items; begun: when they were ranked; results: best first."""
    return dict(more, mode=mode, similarity="cosine", items=total,
                seconds=time.perf_counter() - begun, results=results)


def print_answer(answer):
    count = f"{len(answer['results'])} of {answer['items']:,} items"
    print(f"{count} by cosine similarity, ranked in {answer['seconds']:.2f} s")
    for number, found in enumerate(answer["results"], 1):
        print(f"{number:4}  {found['score']:6.3f}  {found['name']}")
    if "gallery" in answer:
        print(answer["gallery"])


def index_mode_of(place, checkpoint, given):
    """How this folder's files are embedded for a checkpoint: "single", or "same" as queries are.

    As given; "": as it was given the last time.
    """
    file, known = os.path.join(place, "modes.json"), {}
    with contextlib.suppress(FileNotFoundError, ValueError, LookupError, TypeError):  # none yet, or damaged
        known = dict(read_lines(file)[0])
    if given and known.get(checkpoint, "same") != given:
        write_lines(file, [known | {checkpoint: given}])
    return given or known.get(checkpoint, "same")


def open_index(cfg, folder, model):
    """-> the folder's index for this checkpoint and mode, as it is on the disk."""
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
    return index


def update(cfg, folder, index, limits):
    """Brings the index up to date, and says what was done."""
    files, others = scan(folder, cfg.index or os.path.join(folder, ".plume"), cfg.every)
    try:
        print(index.update(folder, files, limits.max_pixels))
    except OSError as e:
        raise DataError(f"{e}; the index needs a folder where there is room: --index") from e
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {len(index.items)} items are in the index, the same command goes on "
                          "with the rest") from None
    print_others(others)
    print_bad(index)


def search_folder(cfg, given, folder, query):
    """What is nearest to a Side in a folder, as `answer_of` has it; None without a query, or with --serve."""
    if "serve" in given:  # extras
        from tools.serve import Service
        from tools.serve_http import open_socket, run
        from tools.search_page import HOST, search_page

        listening = open_socket(HOST, cfg.serve)
    model = load_model(cfg.ckpt, cfg.device, cfg.dtype)
    if cfg.mode == "auto" and not model.says_when_done:
        cfg.mode = "latent"  # its vectors are the same, and so is the index
    index = open_index(cfg, folder, model)
    update(cfg, folder, index, model.processor.limits)
    if cfg.kind:
        index.only(cfg.kind.split(","))
    if "serve" in given:
        index.vectors = np.array(index.vectors)  # from the disk into memory
        app = search_page(Service(model, cfg.batch_size), index, folder, cfg)
        return run(app, listening, "the page")
    if query is None:
        return None
    vector = model.encode_query([query], mode=cfg.mode)[0]
    begun = time.perf_counter()
    found = index.search(vector, cfg.count)
    results = []
    for score, item in found:
        part = {key: item[key] for key in ("path", "page", "start", "end") if key in item}
        results.append(dict(score=score, name=name_of(item), kind=NAMES[item["kind"]], **part))
    answer = answer_of(
        cfg.mode, len(index.items), begun, results, folder=os.path.abspath(folder), kind=cfg.kind)
    if cfg.html:
        answer["gallery"] = printable(write_gallery(cfg.html, folder, query, found, len(index.items)))
    return answer


def what_is_asked(cfg, words):
    """-> the folder, None with --vectors; the query as a Side, None without one"""
    if rank_and_world()[1] > 1:
        raise DataError("a search is one process; many make vectors with torchrun ... -m tools.encode FOLDER "
                        "DIR, which are searched with python -m tools.search TEXT --vectors DIR")
    if cfg.vectors:
        words = [None, *words]
    if not 1 <= len(words) <= 2:
        raise DataError(f"needs a folder (or --vectors) and perhaps a text in quotes; got {quote(words)}")
    text, query = words[1] if len(words) > 1 else None, None
    if text is not None or cfg.image or cfg.video:
        query = parse_item({"text": text, "image": cfg.image or None, "video": cfg.video or None},
                           where="the query")
    return words[0], query


def main(argv):
    cfg, given, words = parse_words(Config, argv, __doc__)
    folder, query = what_is_asked(cfg, words)
    check_flags(cfg, given, folder, query)
    with contextlib.redirect_stdout(sys.stderr if cfg.json else sys.stdout):
        if cfg.vectors:
            answer = search_vectors(cfg, given, query)
        else:
            answer = search_folder(cfg, given, folder, query)
    if cfg.json:
        print(json.dumps(answer))
    elif answer:
        print_answer(answer)


if __name__ == "__main__":
    command(main)
