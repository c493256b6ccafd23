"""An endpoint that speaks OpenAI's /v1/embeddings, for texts, pictures and clips; see docs/serve.md.

    pip install starlette "uvicorn[standard]" orjson
    python -m tools.serve out/checkpoint
    python -m tools.serve out/checkpoint --port 9000 --media pictures/

What has come within 5 ms goes through `Plume.encode` together, in one thread; meanwhile the next requests
gather.  Ctrl-C or SIGTERM: what was taken is answered, then it ends.
"""

import engine.threads  # before torch

import asyncio
import contextlib
import os
import signal
import socket
import time
from base64 import b64encode
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.flags import command, leave, parse_words
from files.errors import DataError, quote, reason
from hub.prompts import template_of, with_prompt
from tasks.find import load_model
from tools.serve_input import parse_request

try:
    import orjson
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
except ModuleNotFoundError as e:
    raise SystemExit(f'error: {e.name} is missing: pip install starlette "uvicorn[standard]" orjson') from e

WAIT = 0.005  # seconds that the first request of a batch waits for others
SLOW = 60  # seconds within which a body must have come


@dataclass
class Config:
    # endpoint
    host: str = "127.0.0.1"  # there is no password: put a proxy in front of it for others
    port: int = 8000  # 0: one that is free
    name: str = ""  # what requests call the model; default: the name of its folder
    media: str = ""  # requests may name files below this folder; default: none
    # limits
    queue: int = 256  # requests at a time; one more is refused
    body_mib: int = 16  # MiB of a request; a larger one is refused
    batch_size: int = 16  # items embedded together; does not change the result
    # how
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


# A request's items (of files.items.Side), when it came, the future that gets its vectors or a DataError, and
# a dict for what they lose, see `embed`
Job = namedtuple("Job", "sides mode dim since answer cut prompt")


class Service:
    """A model, the thread that it runs in, and the requests that wait for it."""

    def __init__(self, model, batch_size, most):
        self.model, self.batch_size, self.most, self.open = model, batch_size, most, 0
        self.jobs, self.thread = asyncio.Queue(), ThreadPoolExecutor(1)

    @contextlib.contextmanager
    def place(self):
        """Of a request, from before its body is read until it is answered."""
        if self.open >= self.most:
            raise HTTPException(503, f"{self.open} requests wait already; try again later")
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def embed(self, sides, mode="latent", dim=None, cut=None, prompt=None):
        """-> float32 (n, D) unit rows, as `Plume.encode`; DataError where an item cannot be read

        cut: a dict that gets {an item's number: tokens that its text has lost}; None: too long is an error.
        """
        answer = asyncio.get_running_loop().create_future()
        self.jobs.put_nowait(Job(sides, mode, dim, time.monotonic(), answer, cut, prompt))
        return await answer

    async def work(self):
        """Batch after batch, until it is cancelled."""
        while True:
            jobs = [await self.jobs.get()]
            await asyncio.sleep(jobs[0].since + WAIT - time.monotonic())
            while not self.jobs.empty() and sum(len(job.sides) for job in jobs) < 8 * self.batch_size:
                jobs.append(self.jobs.get_nowait())
            for kind in {kind_of(job) for job in jobs}:
                await self.answer([job for job in jobs if kind_of(job) == kind])

    async def answer(self, jobs):
        """Hands the answers of all over at once."""
        done = asyncio.get_running_loop().run_in_executor(self.thread, self.encode, jobs)
        await asyncio.wait([done])
        answers = [done.exception()] * len(jobs) if done.exception() else done.result()
        for job, answer in zip(jobs, answers):
            if job.answer.cancelled():
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)

    def encode(self, jobs):
        """Jobs of one kind -> for each its vectors, or the DataError that says why not."""
        sides, bad, cut = [side for job in jobs for side in job.sides], {}, {}
        try:
            vectors = self.model.encode(
                sides, jobs[0].mode, batch_size=self.batch_size, dim=jobs[0].dim, bad=bad,
                truncate=False if jobs[0].cut is None else cut, prompt=jobs[0].prompt)
        except DataError as e:  # an embedding is not finite: only who asked for it is to hear of it
            return [e] if len(jobs) == 1 else [answer for job in jobs for answer in self.encode([job])]
        answers, begin = [], 0
        for job in jobs:
            end = begin + len(job.sides)
            why = [bad[i] for i in range(begin, end) if i in bad]
            answers.append(vectors[begin:end])
            if job.cut is not None:
                job.cut.update({i - begin: cut[i] for i in range(begin, end) if i in cut})
            if why:
                more = f"; and {len(why) - 3} more" if len(why) > 3 else ""
                answers[-1] = DataError("; ".join(why[:3]) + more)
            begin = end
        return answers

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        task = asyncio.create_task(self.work())
        yield
        task.cancel()


def kind_of(job):
    """What the jobs of a batch have in common."""
    return job.mode, job.dim, job.cut is None, job.prompt


async def read_body(request, most):
    """-> bytes, at most so many; HTTPException as soon as there are more, or when they do not come."""
    announced, chunks, received = int(request.headers.get("content-length", 0)), [], 0
    try:
        async with asyncio.timeout(SLOW):
            async for chunk in request.stream():
                received += len(chunk)
                if max(announced, received) > most:
                    raise HTTPException(413, f"the body is larger than {most:,} bytes, this server's limit")
                chunks.append(chunk)
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {SLOW} s") from None
    return b"".join(chunks)


def json_answer(value, status=200):
    content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, media_type="application/json")


def refuse(request, error):
    """The answer to an error, in OpenAI's form."""
    status, message = 400, str(error)
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    kind = "invalid_request_error" if status < 500 else "server_error"
    return json_answer(dict(error=dict(message=message, type=kind, param=None, code=None)), status)


def broken(request, error):
    return refuse(request, HTTPException(500, f"{type(error).__name__}: {error}"))


def make_app(service):
    """Without routes; errors are answered in OpenAI's form."""
    errors = dict.fromkeys((DataError, HTTPException, ClientDisconnect), refuse) | {500: broken}
    return Starlette(lifespan=service.lifespan, exception_handlers=errors)


def endpoint(service, cfg, name):
    """-> the app.  name: what requests call the model"""
    app, width = make_app(service), service.model.lm.config.hidden_size
    encode_text, prompts = service.model.processor.encode, service.model.settings["prompts"]

    async def embeddings(request):
        with service.place():
            body = await read_body(request, cfg.body_mib << 20)
            wanted = parse_request(body, width, cfg.media, prompts)
            if wanted.model not in ("", name):
                raise HTTPException(404, f"model {quote(wanted.model)}: this server has {name!r}")
            cut = {} if wanted.truncate else None
            vectors = await service.embed(wanted.sides, wanted.mode, wanted.dim, cut, wanted.prompt)
        if wanted.base64:
            vectors = [b64encode(row).decode() for row in vectors.astype("<f4")]
        data = [dict(object="embedding", index=i, embedding=row) for i, row in enumerate(vectors)]
        asked = [with_prompt(side, template_of(prompts, wanted.prompt)) for side in wanted.sides]
        texts = [text for side in asked for kind, text in side.parts if kind == "text"]
        tokens = sum(len(encode_text(text)) for text in texts)
        tokens -= sum((cut or {}).values())
        answer = dict(object="list", data=data, model=name)
        if cut is not None:
            answer["truncated"] = {str(i): lost for i, lost in cut.items()}  # tokens of an item's text
        return json_answer(answer | dict(usage=dict(prompt_tokens=tokens, total_tokens=tokens)))

    async def health(request):
        return json_answer(dict(status="ok", model=name, dimensions=width, waiting=service.open))

    app.add_route("/v1/embeddings", embeddings, ["POST"])
    app.add_route("/health", health, ["GET"])
    return app


def open_socket(host, port):
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as e:
        raise DataError(f"--host {host} --port {port}: cannot be listened on: {reason(e)}") from e


def run(app, listening, what):
    """Until Ctrl-C or SIGTERM; a second Ctrl-C does not wait for what is being embedded."""
    interrupts = []

    def remember(number, frame):
        interrupts.append(number)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn has handlers of its own, and raises what
    signal.signal(signal.SIGINT, remember)  # it got again at the end, for these
    host, port = listening.getsockname()[:2]
    print(f"{what}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    server = uvicorn.Server(uvicorn.Config(
        app, access_log=False, log_level="warning", ws="none", timeout_keep_alive=60))
    server.run([listening])
    if interrupts or server.force_exit:
        leave(130)


def main(argv):
    cfg, _, words = parse_words(Config, argv, __doc__)
    if len(words) != 1:
        raise DataError(f"needs a checkpoint: python -m tools.serve out/checkpoint; got {words}")
    ckpt, = words
    if min(cfg.queue, cfg.body_mib, cfg.batch_size) < 1:
        raise DataError(f"--queue {cfg.queue}, --body_mib {cfg.body_mib}, --batch_size {cfg.batch_size}: at "
                        "least 1")
    if cfg.media and not os.path.isdir(cfg.media):
        raise DataError(f"--media {quote(cfg.media)}: no such folder")
    listening = open_socket(cfg.host, cfg.port)
    model = load_model(ckpt, cfg.device, cfg.dtype)
    service, name = Service(model, cfg.batch_size, cfg.queue), cfg.name or os.path.basename(ckpt.rstrip("/"))
    run(endpoint(service, cfg, name), listening, f"model {name!r} is served")


if __name__ == "__main__":
    command(main)
