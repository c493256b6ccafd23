"""The endpoint of python -m tools.serve: with OpenAI's client, with 64 at once, and with what is wrong."""

import asyncio
import base64
import concurrent.futures
import importlib
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest

for package in ("starlette", "uvicorn", "orjson"):
    pytest.importorskip(package)
httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")
import uvicorn
from starlette.testclient import TestClient

from files.errors import DataError
from files.items import parse_item
from hub.prompts import PROMPTS
from model import Plume
from test_plume import assert_close
from tests.processes import call, Started
from tests.samples import picture, png, with_prompts, write_clip
from tools import serve_http
from tools.serve import Service
from tools.serve_input import How, parse_request


def data_uri(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def start(*flags, **kw):
    """-> the command that runs, its address"""
    started = Started("tools.serve", *flags, "--port=0", **kw)
    started.wait_for("model ")
    return started, re.search(r"is served: (\S+)", started.stdout)[1]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder of files, and beside it what no request may read."""
    root = tmp_path_factory.mktemp("served") / "media"
    (root / "deep").mkdir(parents=True)
    (root / "frames").mkdir()
    picture("red", "bar").save(root / "deep" / "rød bar.png")
    picture("blue", "bar").save(root.parent / "secret.png")
    (root / "media").symlink_to(root)
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "out").symlink_to(root.parent)
    (root / "frames" / "1.png").symlink_to(root.parent / "secret.png")
    os.mkfifo(root / "pipe.png")
    write_clip(root / "clip.mp4", [picture(c, "square") for c in ["red"] * 8 + ["blue"] * 12])
    return root


@pytest.fixture(scope="module")
def address(small, media, tmp_path_factory):
    ckpt = with_prompts(small, tmp_path_factory.mktemp("with prompts"), query="Find: {} ?", other="{}!")
    started, address = start(ckpt, "--media", media, "--body_mib=1")
    yield address
    started.terminate()
    assert started.wait(60) == 0, started.stderr


@pytest.fixture(scope="module")
def plume(small):
    return Plume.from_pretrained(small, "cpu")


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def rows(answer):
    assert [row.index for row in answer.data] == list(range(len(answer.data)))
    return np.array([row.embedding for row in answer.data], np.float32)


def test_64_clients_at_once_get_the_vectors_of_encode(address, plume):
    """None is lost or swapped, whatever else is in the batch."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    kinds = [dict(), dict(dimensions=16), dict(encoding_format="float"), dict(extra_body=dict(mode="single"))]
    asked = [([f"{n} {word}" for word in "red green blue".split()[: 1 + n % 3]], kinds[n % 4])
             for n in range(64)]

    async def ask():
        async with client:
            return await asyncio.gather(*(
                client.embeddings.create(model="small", input=texts[0] if len(texts) == 1 else texts, **more)
                for texts, more in asked))

    for (texts, more), answer in zip(asked, asyncio.run(ask()), strict=True):
        expected = plume.encode(texts, more.get("extra_body", {}).get("mode", "latent"),
                                dim=more.get("dimensions"))
        assert_close(rows(answer), expected, str(texts))
        tokens = sum(len(plume.processor.encode(text)) for text in texts)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens and answer.model == "small"


def test_pictures_and_clips_in_every_spelling_are_what_encode_gives(address, client, media, plume):
    red, file = picture("red", "bar"), media / "deep" / "rød bar.png"
    uri, clip = data_uri(red), str(media / "clip.mp4")
    part = dict(type="image_url", image_url=dict(url=uri, detail="low"))
    items = [
        ({"image": uri}, {"image": red}), (part, {"image": red}),
        ({"image": [uri, uri]}, {"image": [red, red]}),
        ({"image": "deep/rød bar.png"}, {"image": red}), ({"image": file.as_uri()}, {"image": red}),
        ({"image": "media/deep/../deep/rød bar.png"}, {"image": red}),  # a link to where it stands
        ({"text": "what? <image>", "image": uri}, {"text": "what? <image>", "image": red}),
        ({"content": [part, dict(type="text", text="what?")]}, {"text": "what?", "image": red}),
        ({"video": "clip.mp4", "start": 1, "end": 2}, {"video": clip, "start": 1, "end": 2}),
        ({"video": [uri, "deep/rød bar.png"]}, {"video": [red, red]}),
        (dict(type="video_url", video_url=dict(url="clip.mp4")), {"video": clip}),
        ("naïve 東京 🐢", "naïve 東京 🐢")]
    answer = client.embeddings.create(model="small", input=[item for item, _ in items])
    assert_close(rows(answer), plume.encode([item for _, item in items]), "items")
    both = [part, dict(type="text", text="so?")]
    for content, item in (("red", "red"), (both, dict(text="so?", image=red))):
        body = dict(messages=[dict(role="user", content=content)])
        answer = httpx.post(f"{address}/v1/embeddings", json=body).json()
        assert_close([answer["data"][0]["embedding"]], plume.encode([item]), "messages")


def test_a_prompt_is_asked_for_by_its_name(client, plume):
    items = ["red", {"image": data_uri(picture("red", "bar"))}]
    wanted = dict(query=("Find: red ?", "Find:  ?"), other=("red!", "!"), document=("red", ""))
    for name, texts in (*wanted.items(), (None, ("red", ""))):
        more = dict(extra_body=dict(prompt_name=name)) if name else {}
        answer = client.embeddings.create(model="small", input=items, **more)
        expected = [texts[0], {"image": picture("red", "bar"), "text": texts[1]}]
        assert_close(rows(answer), plume.encode(expected), str(name))


REFUSED = {
    "{": "not JSON", "[1]": "needs an object", '{"input": "a", "input": "b"}': "stands twice",
    "{}": "either 'input' or 'messages'", '{"input": "a", "messages": []}': "either 'input' or 'messages'",
    '{"inptu": "a"}': "Did you mean 'input'?", '{"input": []}': "1 to 2048 items, got 0",
    json.dumps(dict(input=["a"] * 2049)): "got 2049", '{"input": [1, 2]}': "token ids are not taken",
    '{"input": [[1, 2]]}': "token ids are not taken", '{"input": ["a", NaN]}': "input[1]: needs a string",
    '{"input": ["a", null]}': "input[1]: needs a string", '{"input": [{"image": 3}]}': "needs a data: URI",
    '{"input": "\\ud800"}': "not valid Unicode", '{"input": {"txet": "a"}}': "Did you mean 'text'?",
    '{"input": "a", "dimensions": 0}': "1 to 128", '{"input": "a", "dimensions": 1.5}': "1 to 128",
    '{"input": "a", "mode": "latnet"}': "Did you mean 'latent'?",
    '{"input": "a", "mode": []}': "Known: latent", '{"input": {"image": [["a.png"]]}}': "needs a data: URI",
    '{"input": "a", "prompt_name": "qury"}': "Did you mean 'query'?",
    '{"input": "a", "prompt_name": []}': "no such prompt. Known: query, document.",
    '{"input": "a", "encoding_format": "int8"}': "Known: float, base64",
    '{"input": "a", "truncate": "yes"}': "Known: False, True",
    '{"input": "a", "truncate": 1}': "Known: False, True",
    '{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}': "system texts",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "needs 'role' 'user'",
    '{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}': "'type' is one of text, image_url",
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}': "unknown key 'x'",
    '{"messages": [{"role": "user", "content": []}]}': "a string or a list of parts",
    '{"input": {"image": "https://example.org/a.png"}}': "no address is opened",
    '{"input": {"image": "data:image/png;base64,%%%"}}': "not base64",
    '{"input": {"image": "data:image/svg+xml,<svg/>"}}': "needs data:image/png;base64",
    '{"input": {"image": "data:image/png;base64,AAAA"}}': "no picture",
    '{"input": {"video": "data:video/mp4;base64,AAAA"}}': "needs a path (write its bytes to a file)",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_wrong_is_named(body):
    with pytest.raises(DataError) as refused:
        parse_request(body.encode(), 128, "", PROMPTS)
    assert REFUSED[body] in str(refused.value)


@pytest.mark.parametrize("body, why", [
    ("{" + "".join(f'"{n}": 1, ' for n in range(50_000)) + '"0": 1}', "the key '0' stands twice"),
    (json.dumps(dict(input=["a", "red " * 100_000])), "input.1.: a text of 400,000 characters"),
    (json.dumps(dict(input=dict(content=[dict(type="text", text="a")] * 3_000))), "input: 3,000 parts"),
], ids=["keys", "text", "parts"])
def test_a_large_body_is_refused_soon(body, why):
    """Others wait while it is read."""
    begun = time.process_time()
    with pytest.raises(DataError, match=why):
        parse_request(body.encode(), 128, "", PROMPTS)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("item", [
    {"image": "../secret.png"}, {"image": "link.png"}, {"image": "out/secret.png"}, {"image": "/etc/passwd"},
    {"image": "file:///etc/passwd"}, {"image": "file://../secret.png"}, {"image": "deep/../../secret.png"},
    {"image": "FILE://%2e%2e/secret.png"}, {"image": ["deep/rød bar.png", "link.png"]},
    {"video": ["link.png", "link.png"]}, {"video": "frames"}, {"video": "out"},
    {"image": {"bytes": None, "path": "secret.png"}}, {"bytes": None, "path": "secret.png"},
    {"image": "pipe.png"}, {"image": "deep"}, {"image": ""}, {"image": "a\0.png"}, {"image": "x" * 5000},
    {"type": "image_url", "image_url": {"url": "link.png"}},
    {"type": "image_url", "image_url": "out/secret.png"},
])
def test_no_file_outside_of_media_is_opened(item, media, monkeypatch):
    monkeypatch.chdir(media.parent)
    with pytest.raises(DataError) as refused:
        parse_request(json.dumps(dict(input=[item])).encode(), 128, str(media), PROMPTS)
    assert str(media) not in str(refused.value)
    with pytest.raises(DataError, match="without --media|needs|unknown key"):
        parse_request(json.dumps(dict(input=[item])).encode(), 128, "", PROMPTS)


def test_errors_have_openais_form_and_their_status(address, client):
    with pytest.raises(openai.BadRequestError, match="Did you mean 'dimensions'"):
        client.embeddings.create(model="small", input="a", extra_body=dict(dimension=3))
    with pytest.raises(openai.NotFoundError, match="this server has 'small'"):
        client.embeddings.create(model="smal", input="a")
    bomb = png(30_000, 2, 8, (b"IDAT", b""))
    broken = [f"data:image/png;base64,{base64.b64encode(body).decode()}" for body in (
        bomb, png(9_000, 2, 8, (b"IDAT", b"")), png(30, 2, 8, (b"IDAT", b"x")))]
    for uri, why in zip(broken, ("decompression bomb", "9000x9000|cannot be", "cannot be used"), strict=True):
        with pytest.raises(openai.BadRequestError, match=f"(?i)input.1.*({why})") as refused:
            client.embeddings.create(model="small", input=["a", {"image": uri}])
        assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="and 7 more"):
        client.embeddings.create(model="small", input=[{"image": broken[2]}] * 10)
    url, large = f"{address}/v1/embeddings", b" " * ((1 << 20) + 1)

    def in_chunks():
        for begin in range(0, len(large), 1 << 16):
            yield large[begin : begin + (1 << 16)]

    for body in (large, in_chunks()):
        answer = httpx.post(url, content=body)
        assert answer.status_code == 413
        assert "larger than 1,048,576 bytes" in answer.json()["error"]["message"]
    assert httpx.get(url).status_code == 405 and httpx.get(f"{address}/v1/x").json()["error"]["message"]
    health = dict(status="ok", model="small", dimensions=128, waiting=0)
    assert httpx.get(f"{address}/health").json() == health
    rebound = httpx.get(f"{address}/health", headers=dict(host="elsewhere.example"))
    assert rebound.status_code == 400 and "host" in rebound.text


def test_clients_that_leave_take_nothing_along(address, client, plume):
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(dict(input=["gone"] * 64)).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    for sent in (body[:50], body):
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(head + sent)
    assert_close(rows(client.embeddings.create(model="small", input="here")), plume.encode(["here"]), "here")
    until(lambda: httpx.get(f"{address}/health").json()["waiting"] == 0)


def encoding_later(encoding, *given, **more):
    """Nothing until a file is there."""
    until(lambda: os.path.exists(os.environ["GO"]))
    return encoding(*given, **more)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_refuses_and_a_server_that_stops_answers_what_it_has_taken(small, tmp_path, plume):
    go = tmp_path / "go"
    started, address = start(
        small, "--queue=3", "--name=mine", patch=("tools.serve.encoding", encoding_later), GO=str(go))
    with concurrent.futures.ThreadPoolExecutor(3) as clients:
        def ask(text):
            return httpx.post(f"{address}/v1/embeddings", json=dict(model="mine", input=text), timeout=120)

        taken = [clients.submit(ask, text) for text in ("one", "two", "three")]
        until(lambda: httpx.get(f"{address}/health").json()["waiting"] == 3)
        full = ask("four")
        assert full.status_code == 503 and "3 requests wait already" in full.json()["error"]["message"]
        started.terminate()
        until(lambda: refused(address))
        started.terminate()
        assert not any(answer.done() for answer in taken)
        go.touch()
        vectors = [answer.result().json()["data"][0]["embedding"] for answer in taken]
    assert_close(vectors, plume.encode(["one", "two", "three"]), "taken")
    assert started.wait(60) == 0, started.stderr
    assert "Traceback" not in started.stderr


def refused(address):
    try:
        return httpx.get(f"{address}/health").status_code != 200
    except httpx.TransportError:
        return True


def test_what_is_in_a_batch_does_not_touch_its_neighbours(plume, monkeypatch):
    """What is not finite is an error of its request alone; a request that is given up takes none along."""
    embed, batches = plume.embed, []

    def broken(batch, *given, **more):
        vectors, spent = embed(batch, *given, **more)
        vectors[batch["lengths"] == batch["lengths"].max()] = np.nan
        batches.append(len(vectors))
        return vectors, spent

    async def ask():
        service = Service(plume, 16)
        asked = [["red", "blue"], ["green", "red bar red bar"], ["gone"], ["green"]]
        sides = [[parse_item(text) for text in texts] for texts in asked]
        tasks = [asyncio.create_task(service.embed(given, How())) for given in sides]
        await asyncio.sleep(0)
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with monkeypatch.context() as patched:
        patched.setattr(plume, "embed", broken)
        first, second, third, fourth = asyncio.run(ask())
    assert batches == [6]
    assert_close(first[0], plume.encode(["red", "blue"]), "in front of it")
    assert isinstance(second, DataError) and "not finite" in str(second)
    assert isinstance(third, asyncio.CancelledError)
    assert_close(fourth[0], plume.encode(["green"]), "behind it")


def test_a_batch_is_full_at_some_size_and_the_next_one_waits_behind_all_others(monkeypatch):
    batches = []

    def encode(self, sides, how):
        batches.append((how.mode, len(sides)))
        return np.array(sides), {}, {}

    async def ask():
        service = Service(None, 16)
        asked = [([n] * size, How(mode)) for n, (size, mode) in enumerate(
            [(1500, "latent"), (1500, "latent"), (3, "latent"), (2, "single"), (4, "latent"), (1, "single")])]
        return await asyncio.gather(*(service.embed(*given) for given in asked))

    monkeypatch.setattr(Service, "encode", encode)
    answers = asyncio.run(ask())
    assert sorted(batches[1:]) == [("latent", 7), ("single", 3)] and batches[0] == ("latent", 3000)
    assert [set(vectors) for vectors, _ in answers] == [{n} for n in range(6)]


@pytest.mark.parametrize("host, refused", [
    ("127.0.0.1", True), ("127.2", True), ("localhost", True), ("0.0.0.0", False)])
def test_what_only_this_machine_reaches_answers_under_its_own_names(host, refused):
    app = serve_http.make_app(host)
    app.add_route("/", lambda request: serve_http.Response(b""), ["GET"])
    address = socket.gethostbyname(host)  # as `run` prints it
    known = ((name, 200) for name in ("localhost", host, address))
    for name, status in (("evil.example", 400 if refused else 200), *known):
        assert TestClient(app, base_url=f"http://{name}").get("/").status_code == status


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="of Linux")
def test_a_client_that_stops_reading_does_not_keep_the_server_from_ending(monkeypatch):
    monkeypatch.setattr(serve_http, "SLOW", 1)
    app, listening = serve_http.make_app("127.0.0.1"), serve_http.open_socket("127.0.0.1", 0)

    async def answer(request):
        return serve_http.Response(bytes(1 << 26))  # more than the system buffers

    app.add_route("/", answer, ["GET"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="off"))
    running = threading.Thread(target=server.run, args=([listening],), daemon=True)
    running.start()
    with socket.create_connection(listening.getsockname()) as stalled:
        stalled.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stalled.recv(100).startswith(b"HTTP/1.1 200")
        server.should_exit = True
        running.join(30)
        assert not running.is_alive()


def test_a_text_that_is_too_long_is_cut_where_asked_for_and_the_answer_says_so(address, plume):
    items = ["red", "red bar " * 400]
    asked = dict(input=items, truncate=True)
    answer = httpx.post(f"{address}/v1/embeddings", json=asked, timeout=60).json()
    cut = {}
    expected = plume.encode(items, truncate=cut)
    assert_close(rows_of(answer), expected, "cut", 1e-5)
    assert answer["truncated"] == {"1": cut[1]} and answer["usage"]["prompt_tokens"] < 512
    refused = httpx.post(f"{address}/v1/embeddings", json=dict(input=items), timeout=60)
    assert refused.status_code == 400 and "exceed max_len" in refused.json()["error"]["message"]


def rows_of(answer):
    return np.array([entry["embedding"] for entry in answer["data"]], np.float32)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "orjson", None)
    monkeypatch.delitem(sys.modules, "tools.serve_http")
    with pytest.raises(SystemExit, match="orjson is missing: pip install starlette"):
        importlib.import_module("tools.serve_http")


@pytest.mark.parametrize("words, why", {
    "": "needs a checkpoint", "--port=1": "needs a checkpoint", "none --queue=0": "at least 1",
    "none --media=gone": "no such folder", "none --port=99999": "cannot be listened on",
    "none --prot=1": "Did you mean 'port'?", "none --port=0": "none",
}.items())
def test_what_cannot_be_served_is_said_at_once(words, why):
    failed = call("tools.serve", *words.split(), check=False)
    assert failed.returncode == 1 and why in failed.stderr


def test_ctrl_c_ends_it_with_130_as_every_command(small):
    started, address = start(small, "--host=0.0.0.0")  # for others, who may know it by any name
    until(lambda: not refused(address))
    assert httpx.get(f"{address}/health", headers=dict(host="gpu1"), timeout=60).status_code == 200
    os.kill(started.pid, signal.SIGINT)
    assert started.wait(60) == 130 and started.stderr.endswith("interrupted\n")


def test_usage_counts_the_text_with_its_prompt(address):
    def tokens(**request):
        answer = httpx.post(f"{address}/v1/embeddings", json=request, timeout=60).json()
        return answer["usage"]["prompt_tokens"]

    written_out = tokens(input="Find: red ?")
    assert tokens(input="red", prompt_name="query") == written_out > tokens(input="red")


def encoding_without_memory(encoding, *given, **more):
    raise RuntimeError("out of memory")


def test_an_error_of_the_server_has_the_same_form(small):
    started, address = start(small, patch=("tools.serve.encoding", encoding_without_memory))
    for _ in range(2):  # it goes on
        answer = httpx.post(f"{address}/v1/embeddings", json=dict(input="red"), timeout=60)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "RuntimeError: out of memory"
        assert answer.json()["error"]["type"] == "server_error"
    started.terminate()
    assert started.wait(60) == 0
