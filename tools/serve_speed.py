"""What the endpoint of tools/serve.py costs beside `Plume.encode` with the same batches.

    OMP_NUM_THREADS=1 python -m tools.serve_speed                    64 clients, one short text a request
    OMP_NUM_THREADS=1 python -m tools.serve_speed --texts 16 --preset mid

The server runs in this process, its clients in another one.  Round by round they send their requests, then
`encode` gets what the server had in its batches, batch by batch.  Seconds are of the clock, and of the CPU of
this process; throughput is encode's seconds divided by the server's.
"""

import engine.threads  # before torch

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import uvicorn

from backbones.shapes import SHAPES
from engine.flags import command, parse_flags
from engine.ranks import pick_device
from hub.settings import RELEASED_PROMPT
from model import Plume
from tasks.find import load_model
from tasks.turtle import World
from tools.serve import Config as ServeConfig, endpoint, Service
from tools.serve_http import open_socket


@dataclass
class Config:
    ckpt: str = ""  # checkpoint folder or hub name; default: random weights
    preset: str = "tiny"  # shape of the random weights
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast
    clients: int = 64  # each sends its next request when the last one is answered
    requests: int = 10  # of each client in a round
    texts: int = 1  # in a request
    rounds: int = 5  # each of the server, then of encode
    port: int = 0  # of the server, for the process of the clients, which this one starts


async def client(port, number, cfg):
    """Raw HTTP: the client is not what is measured."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for i in range(cfg.requests):
        texts = [f"red square {number} {i} {n}" for n in range(cfg.texts)]
        body = json.dumps(dict(input=texts, model="speed", encoding_format="base64")).encode()
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
    writer.close()


async def clients(cfg):
    """A round for each line that comes in, and a line when it is over."""
    while sys.stdin.readline():
        await asyncio.gather(*(client(cfg.port, number, cfg) for number in range(cfg.clients)))
        print("done", flush=True)


class Recorded(Service):
    """Remembers what was in each batch."""

    batches = []

    def encode(self, sides, how):
        self.batches.append(sides)
        return super().encode(sides, how)


def seconds():
    """Of the clock, of this process's CPU"""
    return np.array([time.perf_counter(), time.process_time()])


async def measure(cfg, service):
    app, listening = endpoint(service, ServeConfig(queue=cfg.clients), "speed"), open_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning", ws="none"))
    running, ratios = asyncio.create_task(server.serve([listening])), []
    flags = [f"--{name}={getattr(cfg, name)}" for name in ("clients", "requests", "texts")]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tools.serve_speed", *flags, f"--port={listening.getsockname()[1]}",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for number in range(1 + cfg.rounds):
        service.batches.clear()
        child.stdin.write(b"go\n")
        begun = seconds()
        await child.stdout.readline()
        served, begun = seconds() - begun, seconds()
        for sides in service.batches:
            service.model.encode(sides, batch_size=service.batch_size)
        encoded, count = seconds() - begun, sum(map(len, service.batches))
        if number:  # the first one warms up
            ratios.append(encoded / served)
            print(f"round {number}: {count} items in {len(service.batches)} batches; by the clock "
                  f"{served[0]:.2f} s, encode {encoded[0]:.2f} s; CPU {served[1]:.2f} s, {encoded[1]:.2f} s")
    child.stdin.close()
    await child.wait()
    server.should_exit = True
    await running
    clock, cpu = np.median(ratios, 0)
    print(f"throughput of encode's, median: {clock:.2f} by the clock, {cpu:.2f} by the CPU")


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    if cfg.port:
        return asyncio.run(clients(cfg))
    if cfg.ckpt:
        model = load_model(cfg.ckpt, cfg.device, cfg.dtype)
    else:
        device, dtype = pick_device(cfg.device or None, cfg.dtype or None)
        prompt = SHAPES[cfg.preset].get("prompt", RELEASED_PROMPT)
        model = Plume.random([*World("test").texts(), *[prompt] * 20], cfg.preset, device=device).to(dtype)
    loop = uvicorn.Config(None).get_loop_factory()  # uvloop where it is installed, as the command has
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(measure(cfg, Recorded(model, 16)))


if __name__ == "__main__":
    command(main)
