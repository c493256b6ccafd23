"""What tools/serve.py and tools/search_page.py share of HTTP: requests' bodies, errors, the server itself."""

import asyncio
import ipaddress
import signal
import socket
import sys

from files.errors import DataError, reason

try:
    import orjson
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
except ModuleNotFoundError as e:
    raise SystemExit(f'error: {e.name} is missing: pip install starlette "uvicorn[standard]" orjson') from e

SLOW = 60  # seconds within which a body must have come, and a client must take some of its answer
LOCAL = ["127.0.0.1", "localhost", "::1", "[::1]"]  # names of this machine for itself


def make_app(host):
    """Without routes; errors are answered in OpenAI's form.

    host: what is listened on.  What only this machine reaches answers only under its own names: a web site
    may have a name that leads here, to read the answers.
    """
    errors = dict.fromkeys((DataError, ClientDisconnect, HTTPException, Exception), refuse)
    app = Starlette(exception_handlers=errors)
    address = socket.getaddrinfo(host, None, family_of(host))[0][4][0]
    if ipaddress.ip_address(address).is_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, host, address])
    return app


def family_of(host):
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Places:
    """How many requests there are, from before their bodies are read until they are answered."""

    def __init__(self, most):
        self.most, self.taken = most, 0

    def __enter__(self):
        if self.taken >= self.most:
            raise HTTPException(503, f"{self.taken} requests wait already; try again later")
        self.taken += 1

    def __exit__(self, *error):
        self.taken -= 1


async def read_body(request, most):
    """-> bytes, at most so many; HTTPException as soon as there are more, or when they do not come."""
    announced, received, chunks = int(request.headers.get("content-length", 0)), 0, []
    try:
        async with asyncio.timeout(SLOW):
            async for chunk in request.stream():
                chunks.append(chunk)
                received += len(chunk)
                if max(announced, received) > most:
                    raise HTTPException(413, f"the body is larger than {most:,} bytes, this server's limit")
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {SLOW} s") from None
    return b"".join(chunks)


def json_answer(value, status=200):
    content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, media_type="application/json")


def refuse(request, error):
    """The answer to an error, in OpenAI's form."""
    status, message = 500, reason(error)
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    elif isinstance(error, (DataError, ClientDisconnect)):
        status, message = 400, str(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return json_answer(dict(error=dict(message=message, type=kind, param=None, code=None)), status)


def open_socket(host, port):
    try:
        listening = socket.create_server((host, port), family=family_of(host))
    except (OSError, OverflowError) as e:
        raise DataError(f"--host {host} --port {port}: cannot be listened on: {reason(e)}") from e
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; else a client that stops reading keeps us from ending
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SLOW * 1000)
    return listening


def run(app, listening, what):
    """Until SIGTERM or Ctrl-C, when what was taken is answered; a second Ctrl-C does not wait for that."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises it again when all is answered
    host, port = listening.getsockname()[:2]
    print(f"{what}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", ws="none", lifespan="off", timeout_keep_alive=60)
    uvicorn.Server(config).run([listening])
