"""What README.md and docs/ say: links, names of functions, pasted output, the picture, the commands."""

import ast
import json
import re
import shutil
import subprocess

import pytest

from test_plume import HERE
from tests.processes import call
from tests.test_house import NOT_NEEDED, TREES

pytestmark = pytest.mark.skipif(not (HERE / "docs").exists(), reason="there are no pages")
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
LINK = re.compile(r"\]\(\s*([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text("utf-8"))


def links(page):
    return ["".join(groups) for groups in LINK.findall(re.sub(r"`[^`]*`", "", prose(page)))]


def anchors(page):
    """The names that GitHub gives to a page's headings: "## A `b` c_d!" -> a-b-c_d, its second a-b-c_d-1."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.*)$", prose(page), re.M):
        heading = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        earlier = sum(other == name for other, _ in found)
        found.append((name, f"{name}-{earlier}" if earlier else name))
    return {anchor for _, anchor in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", path):  # another site
            continue
        file = (page.parent / path).resolve() if path else page
        room = file.relative_to(HERE).parts[0]
        if room in NOT_NEEDED and not (HERE / room).exists():
            continue
        assert file.exists(), f"{page.name}: {link}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{page.name}: {link}: there is no such heading"


def test_the_readme_leads_to_every_page():
    linked = {link.partition("#")[0] for link in links(PAGES[0])}
    missing = {f"docs/{page.name}" for page in PAGES[1:]} - linked
    assert not missing, "not linked from README.md: " + ", ".join(sorted(missing))


def test_anchors_are_github_s(tmp_path):
    page = tmp_path / "page.md"
    lines = ["# Why? A `b_c`, d-e", "## [Two](x.md) + 1", "```", "# code", "```", "## Two  1"]
    page.write_text("\n".join([*lines, "## Why? A b_c, d-e"]))
    assert anchors(page) == {"why-a-b_c-d-e", "two--1", "two--1-1", "why-a-b_c-d-e-1"}


def defined(tree, before=""):
    """Functions and classes of a module, those of a class as Class.name."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(before + node.name)
        if isinstance(node, ast.ClassDef):
            names |= defined(node, f"{before}{node.name}.")
    return names


def test_functions_that_pages_name_are_there():
    named = []
    for page in PAGES:
        for file, name in re.findall(r"`([\w/]+)\.py:([\w.]+)`", prose(page)):
            module = file.replace("/", ".")
            assert module in TREES, f"{page.name}: there is no {file}.py"
            assert name in defined(TREES[module]), f"{page.name}: {file}.py has no {name}"
            named.append((page.name, file))
    in_order = re.findall(r"^(\w+)\.py  ", (HERE / "README.md").read_text("utf-8"), re.M)
    reading = [file for name, file in named if name == "reading.md"]
    assert len(reading) > 30 and in_order == list(dict.fromkeys(reading)), "in README's order of reading"


def test_a_batch_in_numbers_is_what_the_command_prints():
    pytest.importorskip("tools.follow")
    page = (HERE / "docs" / "reading.md").read_text("utf-8")
    pasted = page.split("`python -m tools.follow`")[1].split("\n```\n")[1].split()
    printed = call("tools.follow").stdout.split()
    assert len(pasted) == len(printed) > 200
    for old, new in zip(pasted, printed):
        if old != new:
            assert re.fullmatch(r"-?\d+\.\d+", old), (old, new)
            last_digit = 10.0 ** -len(new.partition(".")[2])
            assert abs(float(old) - float(new)) <= 2 * last_digit + 1e-3 * abs(float(old)), (old, new)


def test_a_checkpoint_is_followed_up_to_its_last_step(small):
    pytest.importorskip("tools.follow")
    printed = call("tools.follow", "--ckpt", small, "--stage=8").stdout
    assert re.findall(r"^z_(\d)", printed, re.M) == list("012345678") and "K = 8" in printed
    failed = call("tools.follow", "--ckpt", small, "--stage=9", check=False)
    assert failed.returncode == 1 and "needs 1 to 8" in failed.stderr


def test_the_front_picture_and_the_table_show_what_was_measured():
    front = pytest.importorskip("tools.front_picture")
    compare = pytest.importorskip("tools.compare")
    if not (HERE / "assets").exists():
        pytest.skip("there are no pictures")
    measured = json.loads((HERE / "assets" / "turtle_compare.json").read_text())
    for name, theme in front.THEMES.items():
        drawn = (HERE / "assets" / f"front_{name}.svg").read_text("utf-8")
        assert drawn == front.picture(measured, theme), "python -m tools.front_picture draws it again"
    table = compare.compare_table(measured["rows"], measured["chance"])
    page = (HERE / "docs" / "turtle.md").read_text("utf-8")
    assert table in page, f"docs/turtle.md has not the table of assets/turtle_compare.json:\n{table}"


def test_the_front_door_is_short_and_names_the_test_command():
    readme = (HERE / "README.md").read_text("utf-8").splitlines()
    commands = [line for line in readme if line.startswith("python3 -m venv ")]  # to be copied as they are
    assert len(readme) <= 110 and len(commands) == 2
    assert all(len(line) <= 110 for line in readme if line not in commands)
    assert len((HERE / "docs" / "reading.md").read_text("utf-8").splitlines()) <= 190
    assert commands[1] + "'\n" in (HERE / ".ci" / "run").read_text()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("diff", sorted(HERE.glob("docs/solutions/*.diff")), ids=lambda path: path.stem)
def test_solutions_of_the_exercises_apply(diff):
    """Or have been applied."""
    ways = ["git", "apply", "--check", str(diff)], ["git", "apply", "--check", "--reverse", str(diff)]
    tried = [subprocess.run(way, cwd=HERE, capture_output=True, text=True) for way in ways]
    assert any(done.returncode == 0 for done in tried), tried[0].stderr
