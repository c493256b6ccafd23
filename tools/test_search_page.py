"""The page of python -m tools.search FOLDER --serve, by plain requests and in a browser."""

import base64
import contextlib
import re
import shutil
import subprocess
import time

import pytest

for package in ("starlette", "uvicorn", "orjson", "python_multipart"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")

from files.pictures import load_image
from model import Plume
from tests.processes import call, Started
from tests.samples import picture, with_prompts, write_clip

ODD = "red <b>bar & 'x'.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("page") / "files"
    root.mkdir()
    picture("red", "bar", (640, 480)).save(root / ODD)
    picture("blue", "circle").save(root / "blue circle.jpg")
    write_clip(root / "clip.mp4", [picture(c, "square") for c in ["red"] * 8 + ["blue"] * 12])
    (root.parent / "secret.png").write_bytes((root / ODD).read_bytes())
    return root


@pytest.fixture(scope="module")
def page(small, folder):
    """The address of the running command."""
    with serving(folder, "--ckpt", small) as address:
        yield address


@contextlib.contextmanager
def serving(folder, *flags):
    started = Started("tools.search", folder, "--serve=0", *flags)
    try:
        started.wait_for("the page: ")
        yield re.search(r"the page: (\S+)", started.stdout)[1]
    finally:
        started.terminate()
        assert started.wait(60) == 0, started.stderr


def names(html):
    return re.findall(r"<h2><a[^>]*>\d+\. (.*?)</a></h2>", html)


def test_results_are_those_of_the_index_and_names_are_escaped(page, small, folder):
    form = httpx.get(page)
    assert form.status_code == 200 and "3 pictures, clips and pages" in form.text
    model = Plume.from_pretrained(small, "cpu")
    found = httpx.post(page, files={"text": (None, 'a <i>red</i> "bar"'), "count": (None, "2")}).text
    assert "2 of 3 items" in found and len(names(found)) == 2
    assert 'value="a &lt;i&gt;red&lt;/i&gt; &quot;bar&quot;"' in found
    assert "<i>" not in found and "<b>" not in found
    files = [{"image": str(folder / ODD)}, {"image": str(folder / "blue circle.jpg")},
             {"video": str(folder / "clip.mp4")}]
    scores = sorted(model.encode(files) @ model.encode(['a <i>red</i> "bar"'])[0], reverse=True)
    assert re.findall(r"-?\d\.\d{3}(?=</p>)", found) == [f"{score:.3f}" for score in scores[:2]]
    content = (folder / "blue circle.jpg").read_bytes()
    found = httpx.post(page, files={"text": (None, ""), "image": ("../x", content)}).text
    assert names(found)[0] == "blue circle.jpg" and "1.000" in found


def test_queries_of_the_page_get_the_prompt_of_the_checkpoint(small, folder, tmp_path):
    ckpt = with_prompts(small, tmp_path, query="Find: {}", document="Represent.{}")
    with serving(folder, "--ckpt", ckpt) as address:
        found = httpx.post(address, files={"text": (None, "red"), "count": (None, "1")}).text
    model = Plume.from_pretrained(small, "cpu")
    media = [{"image": str(folder / ODD)}, {"image": str(folder / "blue circle.jpg")},
             {"video": str(folder / "clip.mp4")}]
    documents = model.encode([dict(text="Represent.", **item) for item in media])
    scores = documents @ model.encode(["Find: red"])[0]
    assert re.findall(r"-?\d\.\d{3}(?=</p>)", found) == [f"{max(scores):.3f}"]


def test_only_files_of_the_index_are_shown(page, folder):
    rows = [httpx.get(f"{page}/thumbnails/{row}") for row in range(4)]
    assert [answer.status_code for answer in rows] == [200, 200, 200, 404]
    for answer in rows[:3]:
        assert answer.headers["content-type"] == "image/jpeg" and load_image(answer.content).height > 50
    links = re.findall(r'href="(/files/\d+)"', httpx.post(page, files={"text": (None, "red")}).text)
    assert sorted(links) == ["/files/0", "/files/1", "/files/2"]
    for link in links:
        assert httpx.get(page.rstrip("/") + link).content in {file.read_bytes() for file in files_in(folder)}
    for path in ("../secret.png", "%2e%2e/secret.png", "secret.png", "-1", "3"):
        for kind in ("thumbnails", "files"):
            assert httpx.get(f"{page}/{kind}/{path}").status_code == 404


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_no_query_is_said(page):
    assert "the query: needs a string" in httpx.post(page, files={"text": (None, "")}).text
    broken = httpx.post(page, files={"image": ("x.png", b"no picture")})
    assert broken.status_code == 400 and "that are no picture" in broken.text
    assert httpx.post(page, content=b"x").status_code == 400
    assert httpx.post(page, files={"text": ("a.txt", b"x")}).status_code == 400
    assert httpx.get(page, headers=dict(host="elsewhere.example")).status_code == 400
    assert httpx.post(page, content=b"x" * (17 << 20)).status_code == 413


def test_a_query_on_the_command_line_does_not_go_with_a_page(small, folder):
    failed = call("tools.search", folder, "red", "--serve", "--ckpt", small, check=False)
    assert failed.returncode == 1 and "queries are typed into the page" in failed.stderr


def test_the_page_in_a_browser(page, folder, tmp_path):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs Debian's chromium and chromium-driver")
    with browser(tmp_path / "profile") as ask:
        ask("POST", "url", url=page)
        form = {name: element(ask, f"[name={name}]") for name in ("text", "image")}
        ask("POST", f"element/{form['text']}/value", text="a red bar")
        ask("POST", f"element/{form['image']}/value", text=str(folder / ODD))
        ask("POST", f"element/{element(ask, 'button')}/click")
        until(lambda: ask("POST", "execute/sync", script=SHOWN, args=[]) == [True] * 4)
        first = ask("GET", f"element/{element(ask, 'article')}/text")
        assert first.startswith(f"1. {ODD}"), first
        (tmp_path / "page.png").write_bytes(base64.b64decode(ask("GET", "screenshot")))
        assert load_image(tmp_path / "page.png").width > 500


SHOWN = "return [...document.images].map(image => image.complete && image.naturalWidth > 0)"
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update "
         "--disable-background-networking --disable-sync --window-size=1100,800").split()


@contextlib.contextmanager
def browser(profile):
    """-> ask(method, path, **body): a command of WebDriver to a new Chromium"""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        ports = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
        port = next(filter(None, ports))[1]
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        options = dict(args=[*FLAGS, f"--user-data-dir={profile}"], binary=shutil.which("chromium"))
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        session = client.post("/session", json=dict(capabilities=wanted)).json()["value"]["sessionId"]

        def ask(method, path, **body):
            given = dict(json=body) if method == "POST" else {}
            answer = client.request(method, f"/session/{session}/{path}", **given)
            assert answer.status_code == 200, answer.text
            return answer.json()["value"]

        try:
            yield ask
        finally:
            client.delete(f"/session/{session}")
    finally:
        driver.terminate()
        driver.wait(60)


def element(ask, selector):
    return next(iter(ask("POST", "element", using="css selector", value=selector).values()))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
