"""The layout: what may import what, how long a file may be, and what the seven files can do without."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys

from hub.folders import CARD, HUB_FILES
from test_plume import HERE

SEVEN = ("adapter", "curriculum", "latent", "data", "model", "train", "eval")
# Imports go to the left, or stay in their layer
LAYERS = (("files", "adapter", "curriculum"), ("latent",), ("backbones",), ("data",), ("hub",), ("engine",),
          ("model",), ("tasks",), ("train", "eval"), ("tools",), ("tests", "test_plume"))
ROOMS = ("files", "backbones", "hub", "engine", "tasks", "tools")
NOT_NEEDED = ("tools", "docs", "assets", "tests", "test_plume.py")
FILES = [file for folder in (".", *ROOMS, "tests") for file in HERE.joinpath(folder).glob("*.py")]
SOURCES = {".".join(file.relative_to(HERE).with_suffix("").parts): file.read_text("utf-8") for file in FILES}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
FOR_TESTS = ("test_", "conftest", "miniature")  # how the names of files begin
PRODUCT = [name for name in SOURCES
           if not name.startswith("tests.") and not name.split(".")[-1].startswith(FOR_TESTS)]


def imports(name):
    """Our modules that this one imports, anywhere in it -> pairs of a module and a name in it, or None."""
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.append((below, None) if below in SOURCES else (node.module, alias.name))
    return [(module, wanted) for module, wanted in found if module in SOURCES]


def defined(name):
    """The names to which a module itself gives a value."""
    found = set()
    for node in TREES[name].body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        else:
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            found |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return found


def layer(name):
    return next(i for i, layer in enumerate(LAYERS) if name.split(".")[0] in layer)


def lines(names):
    return {name: SOURCES[name].count("\n") for name in names}


def test_imports_point_one_way():
    wrong = [f"{name}: {module}" for name in PRODUCT for module, _ in imports(name)
             if layer(module) > layer(name)]
    assert not wrong, "\n".join(wrong)
    graph = {name: {module for module, _ in imports(name)} for name in PRODUCT}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_import_names_the_file_that_defines_the_name():
    wrong = [f"{name}: {wanted} of {module}" for name in SOURCES for module, wanted in imports(name)
             if wanted and wanted not in defined(module)]
    assert not wrong, "\n".join(wrong)


def test_commands_set_how_threads_wait_before_torch_is_imported(monkeypatch):
    graph = {name: {module for module, _ in imports(name)} for name in PRODUCT}

    def needed(name):
        return {name}.union(*map(needed, graph[name]))

    commands = [name for name in PRODUCT if "__main__" in SOURCES[name] and "model" in needed(name)]
    assert {"train", "eval", "tools.search"} <= set(commands)
    for name in commands:
        first = next(node for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert ast.unparse(first) == "import engine.threads", name

    told = "import os, sys{}; from engine.threads import describe_threads; print(describe_threads(2))"
    late = "; sys.modules['torch'] = sys"  # as in a user's program: there the setting would come too late
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for before, given, expected in (
            ("", {}, ", GOMP_SPINCOUNT=5000"), (late, {}, ""),
            ("", dict(GOMP_SPINCOUNT="7"), ", GOMP_SPINCOUNT=7"),
            ("", dict(OMP_WAIT_POLICY="PASSIVE"), ", OMP_WAIT_POLICY=PASSIVE")):
        assert run(HERE, "-c", told.format(before), **given) == f"2 threads{expected}\n"


def test_files_and_functions_stay_short():
    seven, rooms = lines(SEVEN), lines(name for name in PRODUCT if name.split(".")[0] in ROOMS)
    assert sum(seven.values()) <= 2700 and max(seven.values()) <= 600, seven
    long = [f"{name}: {n} lines" for name, n in rooms.items() if n > 300]
    every = [(name, line) for name, text in SOURCES.items() for line in text.splitlines()]
    long += [f"{name}: {line}" for name, line in every if len(line) > 110]
    long += [f"{name}: {node.name}" for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 90]
    assert not long, "\n".join(long)


def test_the_readme_is_the_map_of_the_house():
    """The seven with what they are; of each folder all files, where `name*` is name.py and name_*.py."""
    house = (HERE / "README.md").read_text("utf-8").split("## The house")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^(\w+)\.py  ", house, re.M)) == sorted(SEVEN) and "test_plume.py" in house
    shown, room = {room: set() for room in ROOMS}, None
    for line in house.split("```")[3].strip().splitlines():
        if begin := re.match(r"(\w+)/", line):
            room = begin[1]
        if room in ROOMS:
            shown[room] |= set(re.split(r"  +", line)[-1].split())
    for room, patterns in shown.items():
        files = {name.split(".")[1] for name in PRODUCT if name.startswith(f"{room}.")} - {"__init__"}
        found = {pattern: {name for name in files if name == pattern or name_of_family(pattern, name)}
                 for pattern in patterns}
        missing, gone = files.difference(*found.values()), [p for p, names in found.items() if not names]
        assert not missing and not gone, f"README's map of {room}/: not there: {missing}; no file: {gone}"


def name_of_family(pattern, name):
    """Whether a file belongs to `family*`."""
    family = pattern.removesuffix("*")
    return pattern.endswith("*") and (name == family or name.startswith(f"{family}_"))


def test_an_installed_package_of_the_same_name_does_not_win(tmp_path):
    folders = (*ROOMS, "tests")
    assert all((HERE / folder / "__init__.py").read_text() == "" for folder in folders)
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise ImportError('the installed one')")
    run(HERE, "-c", f"import {', '.join(folders)}", PYTHONPATH=str(tmp_path))


def run(cwd, *argv, **environment):
    """A new Python, which has imported nothing of ours."""
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH="") | environment
    command = [sys.executable, *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copy_code(folder):
    """PLUME without what the seven files do not need."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "out*", *NOT_NEEDED)
    return shutil.copytree(HERE, folder, ignore=ignored)


AGAIN = """
import eval
from model import Plume
Plume.from_pretrained("out/checkpoint", "cpu").save_pretrained("again")
eval.main(["--task=image_ret", "--ckpt=again", "--mode=single", "--device=cpu"])
"""


def test_the_seven_train_save_and_evaluate_without_tools_docs_assets_and_tests(tmp_path):
    home = copy_code(tmp_path / "home")
    assert not any((home / name).exists() for name in NOT_NEEDED)
    run(home, "train.py", "--steps=2", "--global_batch=4", "--families=image_ret", "--device=cpu")
    assert "hit@1" in run(home, "-c", AGAIN)
    for name in (CARD, "chat_template.jinja", *HUB_FILES):
        assert (home / "out" / "checkpoint" / name).stat().st_size, name
        assert (home / "again" / name).stat().st_size, name
