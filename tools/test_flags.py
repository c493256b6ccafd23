"""What cannot work is named before anything is loaded: flags of every command, a package that is missing."""

import sys

import pytest

from tests.processes import call

REFUSED = {
    "ablations --until=0.9 --eval_every=2 --steps=6": [
        ("--data=x.jsonl", "leave out --data"), ("--rules", "leave out --rules"),
        ("--adapter=parallel", "leave out --adapter"), ("--json=", "needs 1 or more, a file"),
        ("--seeds=0", "--seeds 0"), ("--until=0", "needs the hit@1 at which a run ends"),
        ("--json=no/a.json", "folder that exists"), ("--families=image_clss", "Did you mean 'image_cls'")],
    "compare": [("--batch_size=0", "at least 1"), ("--limit=0", "at least 1"), ("--png=no/c.png", "exist")],
    "lengths": [("--moves=8", "the fewest and the most"), ("--rounds=0", "at least 1"),
                ("--done=2", "a probability")],
    "look": [("", "--show sheet.png"), ("--shw x", "Did you mean 'show'"),
             ("--show no/x.png", "No such file"), ("--bench --count=1", "at least 0 workers")],
    "one_space": [("--png=no/c.png", "exist")],
    "search": [
        ("file", "no such folder. Did you mean 'files'"), ("", "needs a folder"),
        ("files two texts", "needs a folder (or --vectors) and perhaps a text in quotes"),
        ("files x --cuont 3", "Did you mean 'count'"), ("files x --count 0", "must be at least 1"),
        ("files x --mode cot", "needs latent, single or auto"), ("files x --every -1", "at least 0 seconds"),
        ("files x --index_mode both", "needs single or same"),
        ("--kind=image,vidoe files x", "Did you mean 'video'"), ("--video gone.mp4 files", "does not exist"),
        ("files --serve --html x.html", "needs a query"), ("files x --serve", "typed into the page"),
        ("files --html x.html", "needs a query"), ("files --image gone.png", "'gone.png' does not exist")],
    "speed": [
        ("--preset=midd", "one of tiny"), ("--prefix=3", "prompt alone has"), ("--prefix=a", "needs numbers"),
        ("--prefix=9-", "needs numbers"), ("--prefix=60-40", "the smaller number goes first"),
        ("--prefix=1-2-3", "two numbers at most"), ("--image=448", "as 448x448"),
        ("--batch_sizes=0", "needs numbers"), ("--json=no/s.json", "in a folder that exists"),
        ("--mode=single", "unknown argument"), ("--growth=g.png --prefix=9", "not with --growth")]}


@pytest.mark.parametrize("command, flags, why", [
    (command, *row) for command, rows in REFUSED.items() for row in rows])
def test_flags_that_cannot_work_are_refused(tmp_path, monkeypatch, command, flags, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    tool, *usual = command.split()
    failed = call(f"tools.{tool}", *usual, *flags.split(), check=False)
    assert failed.returncode == 1 and why in failed.stderr, failed.stderr


@pytest.mark.parametrize("tool, flag", [
    ("compare", "png"), ("lengths", "png"), ("one_space", "png"), ("speed", "growth")])
def test_a_missing_matplotlib_is_named_before_anything_is_loaded(tmp_path, monkeypatch, tool, flag):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for file, why in (("x.png", "pip install matplotlib"), ("x.jpg", "must end in .png")):
        failed = call(f"tools.{tool}", f"--{flag}", tmp_path / file, "--ckpt", tmp_path / "none", check=False)
        assert failed.returncode == 1 and why in failed.stderr, failed.stderr
