"""An endpoint that speaks OpenAI's /v1/embeddings, for texts, pictures and clips; see docs/serve.md.

    pip install starlette "uvicorn[standard]" orjson
    python -m tools.serve out/checkpoint --media pictures/

What comes within 5 ms, and while others are embedded, goes through the model together, in one thread.
Ctrl-C or SIGTERM: what was taken is answered, then it ends.
"""

import engine.threads  # before torch

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from engine.flags import command, parse_words
from engine.stream import encoding
from files.errors import DataError, quote
from tasks.find import load_model
from tools.serve_http import json_answer, make_app, open_socket, Places, read_body, run
from tools.serve_input import answer_of, check_reasons, MOST, parse_request
from starlette.exceptions import HTTPException  # behind tools.serve_http, which says what is missing


@dataclass
class Config:
    host: str = "127.0.0.1"  # there is no password: put a proxy in front of it for others
    port: int = 8000  # 0: one that is free
    name: str = ""  # what requests call the model; default: the name of its folder
    media: str = ""  # requests may name files below this folder; default: none
    queue: int = 256  # requests at a time; one more is refused
    body_mib: int = 16  # MiB of a request; a larger one is refused
    batch_size: int = 16  # items embedded together; does not change the result
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


class Service:
    """A model, the thread that it runs in, and the items that wait for it."""

    def __init__(self, model, batch_size):
        self.model, self.batch_size = model, batch_size
        self.waiting = {}  # How -> the items of a batch that has not begun, and the task that embeds them
        self.turn, self.thread = asyncio.Lock(), ThreadPoolExecutor(1)

    async def embed(self, sides, how):
        """-> float32 (n, D) unit rows, as `Plume.encode`; {an item's number: tokens that its text has lost}

        DataError where an item cannot be embedded; others of the same batch are.
        """
        if how not in self.waiting:
            batch = []
            self.waiting[how] = batch, asyncio.create_task(self.run(batch, how))
        batch, embedded = self.waiting[how]
        begin, end = len(batch), len(batch) + len(sides)
        batch += sides
        if end >= MOST:
            del self.waiting[how]  # it is full; what comes next waits in another one, behind all others
        vectors, bad, lost = await asyncio.shield(embedded)
        check_reasons([bad[i] for i in range(begin, end) if i in bad])
        return vectors[begin:end], {i - begin: lost[i] for i in range(begin, end) if i in lost}

    async def run(self, batch, how):
        await asyncio.sleep(0.005)
        async with self.turn:  # until then more may come
            if len(batch) < MOST:
                del self.waiting[how]
            return await asyncio.get_running_loop().run_in_executor(self.thread, self.encode, batch, how)

    def encode(self, sides, how):
        """-> vectors, and by an item's number: why it has none; how many tokens its text has lost"""
        bad, lost = {}, {}
        windows = encoding(
            self.model, sides, how.mode, batch_size=self.batch_size, dim=how.dim, prompt=how.prompt,
            truncate=lost if how.truncate else False, bad=bad, unfit=bad)
        return np.concatenate(list(windows)), bad, lost


def endpoint(service, cfg, name):
    """-> the app.  name: what requests call the model"""
    app, places, model = make_app(cfg.host), Places(cfg.queue), service.model
    width, prompts = model.lm.config.hidden_size, model.settings["prompts"]

    async def embeddings(request):
        with places:
            body = await read_body(request, cfg.body_mib << 20)
            wanted = parse_request(body, width, cfg.media, prompts)
            if wanted.model not in ("", name):
                raise HTTPException(404, f"model {quote(wanted.model)}: this server has {name!r}")
            vectors, lost = await service.embed(wanted.sides, wanted.how)
        return json_answer(await asyncio.to_thread(answer_of, wanted, vectors, lost, model, name))

    async def health(request):
        return json_answer(dict(status="ok", model=name, dimensions=width, waiting=places.taken))

    app.add_route("/v1/embeddings", embeddings, ["POST"])
    app.add_route("/health", health, ["GET"])
    return app


def main(argv):
    cfg, _, words = parse_words(Config, argv, __doc__)
    if len(words) != 1:
        raise DataError(f"needs a checkpoint: python -m tools.serve out/checkpoint; got {words}")
    if min(cfg.queue, cfg.body_mib, cfg.batch_size) < 1:
        raise DataError("--queue, --body_mib and --batch_size: at least 1")
    if cfg.media and not os.path.isdir(cfg.media):
        raise DataError(f"--media {quote(cfg.media)}: no such folder")
    ckpt, listening = words[0], open_socket(cfg.host, cfg.port)
    service = Service(load_model(ckpt, cfg.device, cfg.dtype), cfg.batch_size)
    name = cfg.name or os.path.basename(ckpt.rstrip("/"))
    run(endpoint(service, cfg, name), listening, f"model {name!r} is served")


if __name__ == "__main__":
    command(main)
