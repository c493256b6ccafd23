"""Training runs by their command line: stopped, killed, resumed, refused."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import latent
import train
from curriculum import Curriculum, Progress
from data import Schedule
from files.errors import DataError
from files.records import Pairs
from model import Plume
from test_plume import assert_close, GATED, HERE, log, make_model, PAPER, QUICK, weights
from tests.processes import call, run, run_ranks, Started
from tests.samples import record, turns
from tests.test_checkpoints import cut, LFS
from engine import log as run_log
from hub import folders


def state_of(checkpoint):
    return torch.load(checkpoint / "train_state.pt", weights_only=True)


def assert_equal_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def timeless(out):
    """The rows of log.jsonl without what the clock said."""
    rows = log(out)
    for row in rows:
        for name in ("ms", "wait", "pairs_per_s"):
            del row[name]
    return rows


def refused(failed, why):
    """The run has ended with one line that says why, and no traceback."""
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert re.search(why, failed.stderr), failed.stderr[-2000:]


def test_training_goes_through_all_stages_and_the_loss_falls(trained):
    out, printed = trained
    rows = log(out)
    assert [r["step"] for r in rows] == list(range(40))
    assert [r["K"] for r in rows] == [0] * 5 + [2] * 5 + [4] * 5 + [6] * 5 + [8] * 20
    assert [r["answer"] for r in rows] == [True] * 30 + [False] * 10

    def mean(name, of):
        return np.mean([r[name] for r in of])

    assert mean("ce", rows[-5:]) < 0.5 * mean("ce", rows[:5])
    assert mean("disc", rows[-5:]) < 0.95 * mean("disc", rows[:5])
    assert mean("gen", rows[20:30]) < 0.8 * mean("gen", rows[:5])
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    assert rows[-1]["bal"] > 0
    for text in ("24 pairs in 2 data sets: t2i 12 (20 steps), v2t 12 (20 steps)", "latent steps",
                 "global contrastive batch 4 = 1 ranks x 4", "pairs/s", "ETA", "40 of 40 steps done"):
        assert text in printed, text
    line = printed[printed.index("step 39/40") :].splitlines()[0]
    names = [cell.split()[0] for cell in line.split(" | ")[:-6]]
    assert names == ["step", "stage", "K", "ce", "gen", "disc", "read", "bal", "gate_loss"]


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(world, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train.py", "--data", world / "train.jsonl", "--steps=50", "--save_every=1000", *QUICK, *GATED]
    run(*command, "--out", whole)
    command += ["--out", parts]
    running = Started(*command)
    running.wait_for("step 22/")  # the gate has decided, and the stage has not changed yet
    os.killpg(running.pid, signal.SIGTERM)  # as a batch system does: the workers get it too
    assert running.wait(60) == 130 and "--resume" in running.stdout
    stopped = log(parts)[-1]["step"]
    assert 22 <= stopped < 34
    state = state_of(parts / "checkpoint")
    assert state["step"] == stopped + 1
    assert "adapter.w1" not in state["optimizer"]["state"]  # not used so far
    assert state["progress"]["entry"][1] in range(35, 40)
    assert Progress(Curriculum(1, 4, last_stage=0.1, gate=99), 50).entry[1] == 45  # by the schedule alone
    refused(run(*command, check=False), "--resume")
    refused(run(*command, "--lr=1e-3", "--resume", check=False), "lr: 0.002 then, 0.001 now")
    run(*command, "--resume")
    assert_equal_weights(whole, parts)
    assert timeless(whole) == timeless(parts)
    rows = log(parts)
    assert (rows[-1]["stage"], rows[-1]["answer"]) == (1, False)
    assert any(r["stage"] < r["reached"] for r in rows)


def test_a_new_flag_stops_no_run_and_a_state_that_numbers_the_parameters_is_refused(trained, world, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    file, state = out / "checkpoint" / "train_state.pt", state_of(out / "checkpoint")
    flags = ["--data", world / "train.jsonl", "--out", out, "--steps=40", *QUICK, *PAPER]
    command = ["train.py", *flags, "--resume"]
    del state["config"]["w_bal"]  # as if it were newer than the run
    torch.save(state, file)
    assert "new since the run began: w_bal = 0.1\n" in run(*command).stdout
    refused(run(*command, "--w_bal=0.2", check=False), "w_bal: 0.1 then, 0.2 now")
    moments = state["optimizer"]
    assert "adapter.w1" in moments["state"]
    moments["state"] = dict(enumerate(moments["state"].values()))  # as earlier versions wrote it
    torch.save(state, file)
    refused(run(*command, check=False), re.escape(f"{file}: an earlier version wrote it, which numbered"))


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import train
die, at = sys.argv.pop(1), int(sys.argv.pop(1))
save, rename = train.torch.save, os.rename

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def killing_rename(a, b):
    kill() if a.endswith(".writing") else rename(a, b)

def half(state, path):
    save(state, path)
    if state["step"] == at:
        if die == "writing":
            os.truncate(path, os.path.getsize(path) // 2)
        if die != "renaming":
            kill()
        os.rename = killing_rename

train.torch.save = half
sys.exit(train.main(sys.argv[1:]))
"""


def test_killed_while_a_checkpoint_is_written_costs_the_steps_since_the_last_one(trained, world, tmp_path):
    out, script = tmp_path / "out", tmp_path / "killed.py"
    script.write_text(KILLED.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--out", out, "--steps", 40, *QUICK, *PAPER]
    more = ["--resume", "--keep=2"]

    def names():
        there = [name for name in os.listdir(out) if name != ".plume.lock"]
        return sorted(re.sub(r"\.[0-9a-f]{8}", ".X", name) for name in there)

    killed = run(script, "writing", 15, *flags, check=False)  # half a file
    assert killed.returncode == -signal.SIGKILL
    assert names() == ["checkpoint", "checkpoint.X.writing", "log.jsonl"]
    killed = run(script, "renaming", 30, *flags, *more, check=False)  # between two renames
    assert killed.returncode == -signal.SIGKILL
    left = ["checkpoint.X.writing", "checkpoint.X.writing", "log.jsonl"]
    assert names() == ["checkpoint-10", "checkpoint-15", "checkpoint-20", *left]
    printed = run("train.py", *flags, *more).stdout
    assert "what a killed run left behind" in printed and printed.count(".writing") == 2
    # of checkpoint-20 nobody can tell any more that it is not somebody's copy: it stays
    assert names() == ["checkpoint", "checkpoint-15", "checkpoint-20", "checkpoint-30", *left]
    assert_equal_weights(trained[0], out)
    assert [r["step"] for r in log(out)] == list(range(40))
    assert state_of(out / "checkpoint-30")["step"] == 30
    with folders.replacing(out / "checkpoint", keep=str(out / "checkpoint-40")) as folder:
        shutil.copytree(out / "checkpoint-30", folder, dirs_exist_ok=True)
    newest = [os.path.basename(path) for path in folders.checkpoints_in(out)]
    assert newest[:3] == ["checkpoint", "checkpoint-40", "checkpoint-30"]
    (out / "checkpoint").rename(tmp_path / "elsewhere")
    refused(run("train.py", *flags, check=False), "holds checkpoint-")  # what is kept is not written over


def test_a_second_run_is_refused_by_a_lock_that_a_killed_run_does_not_leave(world, tmp_path):
    out = tmp_path / "out"
    flags = ["--data", world / "train.jsonl", "--out", out, *QUICK, *PAPER, "--save_every=5", "--keep=1"]
    first = Started("train.py", *flags, "--steps=400")
    first.wait_for("step 12/")
    for more in (["--resume"], ["--resume", "--workers=0"]):
        before = (out / "log.jsonl").read_text()
        second = run("train.py", *flags, "--steps=400", *more, check=False)
        refused(second, rf"another run is at work there \(process {first.pid} on ")
        assert (out / "log.jsonl").read_text().startswith(before)
    assert first.process.exitcode is None  # the first one does not notice
    copies = {"checkpoint.old", "checkpoint.writing", "checkpoint-notes", "checkpoint-1"}
    for name in copies:  # somebody's, in every shape
        shutil.copytree(out / "checkpoint", out / name)
    (out / "checkpoint" / "README.md").write_text("card")
    os.kill(first.pid, signal.SIGKILL)  # its data worker lives on for a moment
    first.wait()
    step = len(log(out))
    with open(out / "log.jsonl", "ab") as f:
        f.write(b"here the power failed \xff\n")
    shorter = run("train.py", *flags, "--steps", step + 8, "--resume", check=False)
    # no lock is left, and steps are part of the recipe
    refused(shorter, "--resume with another configuration: steps")
    again = Started("train.py", *flags, "--steps=400", "--resume")
    again.wait_for(f"step {step + 12}/")
    again.terminate()
    assert again.wait() == 130, again.stderr
    assert copies < set(os.listdir(out))
    assert b"here the power failed \xff\n" in (out / "log.jsonl").read_bytes()
    assert (out / "checkpoint" / "README.md").read_text() == "card"
    assert len([name for name in os.listdir(out) if re.fullmatch(r"checkpoint-\d+", name)]) >= 2
    (kept,) = state_of(out / "checkpoint")["kept"]
    assert kept != "checkpoint-1" and (out / kept / "train_state.pt").exists()


SLOW = """
import sys, time
sys.path.insert(0, {here!r})
import train

def slow(*a, **k):
    print("reading", flush=True)
    time.sleep(60)

train.Pairs = slow
sys.exit(train.main(sys.argv[1:]))
"""


def test_the_lock_is_taken_before_the_data_are_read_and_a_failed_start_leaves_nothing(world, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.format(here=str(HERE)))
    flags, out = ["--data", world / "train.jsonl", "--steps=2", *QUICK, "--out"], tmp_path / "out"
    first = Started(tmp_path / "slow.py", *flags, out)
    first.wait_for("reading")
    refused(run("train.py", *flags, out, check=False), "another run is at work there")
    assert os.listdir(out) == [".plume.lock"]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    failed = run("train.py", *flags, tmp_path / "never", "--data", tmp_path / "gone.jsonl", check=False)
    refused(failed, "no such file")
    assert not (tmp_path / "never").exists()
    run("train.py", *flags, out)
    # under the lock it is looked at again: here a run has come and gone since the flags were read
    refused(run("train.py", *flags, out, check=False), "out holds checkpoint: continue with --resume")
    assert len(log(out)) == 2


@pytest.mark.parametrize("harm", ["cut off", "empty", "pointer", "no step", "a list", "pickle"])
def test_a_damaged_training_state_is_an_error_that_names_it(trained, world, tmp_path, harm):
    out = tmp_path / "out"
    shutil.copytree(trained[0] / "checkpoint", out / "checkpoint")
    file = out / "checkpoint" / "train_state.pt"
    if harm == "cut off":
        cut(file.parent, file.name)
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "pointer":
        file.write_text(LFS)
    elif harm == "pickle":
        torch.save(dict(step=Fraction(1, 2)), file)
    elif harm == "a list":
        torch.save([1, 2], file)
    else:
        state = state_of(out / "checkpoint")
        del state["step"]
        torch.save(state, file)
    flags = ["--data", world / "train.jsonl", "--out", out, "--steps=40", "--device=cpu", *QUICK, *PAPER]
    failed = call("train.py", *flags, "--resume", check=False)
    refused(failed, re.escape(f"{file}: not the"))
    assert ("Git LFS pointer" in failed.stderr) == (harm == "pointer")
    assert ("has no step" in failed.stderr) == (harm == "no step")


FULL = """
import resource, sys
sys.path.insert(0, {here!r})
import train
size, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
import engine.resume
save, write = train.save, engine.resume.write_checkpoint

def limited(*a, **k):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # no file may be longer: what a full disk does
    return write(*a, **k)

def late(cfg, model, optimizer, state, *rest):
    if state["step"] == at:
        engine.resume.write_checkpoint = limited
    return save(cfg, model, optimizer, state, *rest)

train.save = late
train.command(train.main)
"""


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(world, tmp_path, monkeypatch):
    (tmp_path / "full.py").write_text(FULL.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--steps", 12, "--save_every=4", *QUICK, *GATED, "--gate=0"]
    for size, file in ((100_000, "model.safetensors"), (8 << 20, "train_state.pt")):
        out = tmp_path / f"out {size}"
        failed = run(tmp_path / "full.py", size, 8, *flags, "--out", out, check=False)
        new, old = "of step 8 could not be written", "the checkpoint of step 4 is still there"
        refused(failed, rf"error: .*{out}/checkpoint: the checkpoint {new}, {old}: .*{file}: cannot.*\s*\Z")
        assert sorted(os.listdir(out)) == [".plume.lock", "checkpoint", "log.jsonl"]
        assert state_of(out / "checkpoint")["step"] == 4
        Plume.from_pretrained(out / "checkpoint", "cpu")
    run("train.py", *flags, "--out", out, "--resume")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(DataError, match=r"a checkpoint takes 0.0\d GB, and 0.01 GB are free"):
        train.main([*map(str, flags), "--out", str(tmp_path / "little"), "--device=cpu"])


def test_a_place_where_nothing_can_be_written_is_refused_before_data_are_read(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "read_pairs", None)
    mine, theirs = tmp_path / "file", tmp_path / "theirs"
    mine.write_text("mine")
    flags = ["--data", world / "train.jsonl", "--steps=2", "--device=cpu", "--out"]
    for out in (mine, mine / "deeper" / "x", "/proc/plume", "/dev/null/x"):
        failed = call("train.py", *flags, out, check=False)
        refused(failed, re.escape(f"--out '{out}': nothing can be written there"))
    assert mine.read_text() == "mine"
    theirs.mkdir()
    for line in ('{"level": "info"}', '{"loss": 2.3, "epoch": 0.1, "step": 10}', '{"step": 10, "loss": 2.3}',
                 "a note", '"step":'):
        (theirs / "log.jsonl").write_text(line + "\n")
        failed = call("train.py", *flags, theirs, check=False)
        refused(failed, "log.jsonl: not the log of a training run")
        assert (theirs / "log.jsonl").read_text() == line + "\n"


def test_moments_are_forgotten_when_a_stage_is_entered(trained):
    state = state_of(trained[0] / "checkpoint")
    steps = {int(moments["step"]) for moments in state["optimizer"]["state"].values()}
    assert state["step"] == 40 and steps == {10}  # since the answer was dropped


DIES = """
import os, signal, sys
sys.path.insert(0, {here!r})
import train
backward = train.backward

def dying(model, batch, *rest):
    if batch["step"] == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(model, batch, *rest)

train.backward = dying
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_killed_rank_costs_nothing_and_shards_go_on_as_copies_and_back(world, tmp_path):
    (tmp_path / "dies.py").write_text(DIES.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--steps=12", "--save_every=4", "--micro_batch=2", *QUICK,
             "--global_batch=8", "--segments=1", "--gate=0", "--replay=0", "--keep=9", "--checkpointing"]
    whole, killed, copies, back = (tmp_path / name for name in ("whole", "killed", "copies", "back"))
    run_ranks(2, "train.py", *flags, "--fsdp", "--out", whole)
    assert run_ranks(2, tmp_path / "dies.py", *flags, "--fsdp", "--out", killed, check=False).returncode
    state = state_of(killed / "checkpoint")
    assert 4 <= state["step"] <= 6 and state["ranks"] == 2
    # the adapter is first used after the resume: its moments must not be there before
    used = [r["K"] for r in log(whole)]
    assert used[:7] == [0] * 7 and used[-1] == 1 and "adapter.w1" not in state["optimizer"]["state"]
    shutil.copytree(killed, copies)
    run_ranks(2, "train.py", *flags, "--fsdp", "--out", killed, "--resume")
    assert_equal_weights(whole, killed)
    assert [r["step"] for r in log(killed)] == list(range(12))
    printed = run("train.py", *flags, "--out", copies, "--resume").stdout  # shards to one whole model
    assert "began on 2 ranks and goes on with 1" in printed
    assert state_of(copies / "checkpoint-8")["ranks"] == 1
    shutil.copytree(copies / "checkpoint-8", back / "checkpoint")
    run_ranks(2, "train.py", *flags, "--fsdp", "--out", back, "--resume")  # and one whole model to shards
    for out in (copies, back):
        assert weights(out).keys() == weights(whole).keys()
        for name, w in weights(whole).items():
            assert_close(weights(out)[name], w, name, 2e-3)


def test_ranks_that_read_different_files_are_refused(world, tmp_path):
    lines = (world / "train.jsonl").read_text().splitlines(True)
    (tmp_path / "0.jsonl").write_text("".join(lines))
    (tmp_path / "1.jsonl").write_text("".join(lines[:-2]))
    (tmp_path / "other.jsonl").write_text("".join(lines).replace("shows one thing", "shows 1 thing"))
    names = ("0.jsonl", "1.jsonl", "other.jsonl")
    assert len({Pairs(str(tmp_path / name), str(world)).digest for name in names}) == 3
    script = tmp_path / "differ.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
                      "train.main([*sys.argv[1:], '--data', os.environ['RANK'] + '.jsonl'])")
    failed = run_ranks(2, script, "--media", world, "--out", tmp_path / "none", check=False, cwd=tmp_path)
    assert failed.returncode and "rank 1: 22 pairs" in failed.stderr and not (tmp_path / "none").exists()


def test_what_no_rank_uses_is_not_moved(tmp_path):
    """Text alone, no latent step: vision tower and adapter keep their weights, whatever the weight decay."""
    rows = []
    for i in range(8):
        query, target = turns(f"question {i}"), turns(f"answer {i}")
        rows.append(json.dumps(record(qry=dict(conversations=query), pos=dict(conversations=target))))
    file, before = tmp_path / "t.jsonl", tmp_path / "before"
    file.write_text("\n".join(rows))
    flags = ["--data", file, "--steps=3", "--segments=1", "--last_stage=0.3", "--gate=0", "--micro_batch=2",
             "--weight_decay=9", *QUICK, "--global_batch=8"]
    run_ranks(2, "train.py", *flags, "--out", tmp_path / "out")
    run_ranks(2, "train.py", *flags, "--out", tmp_path / "shards", "--fsdp")
    assert [r["K"] for r in log(tmp_path / "out")] == [0] * 3
    Plume.random(Pairs(str(file)).texts()).save_pretrained(before / "checkpoint")
    idle = {name for name in weights(before) if name.startswith(("visual.", "adapter."))}
    assert len(idle) > 20
    for out in (tmp_path / "out", tmp_path / "shards"):
        after = weights(out)
        kept = {name for name, w in weights(before).items() if torch.equal(w, after[name])}
        assert kept == idle, sorted(idle ^ kept)[:4]


def test_the_paper_s_preset_and_hit_at_1_on_held_out_pairs(world, tmp_path):
    make_model().float().save_pretrained(tmp_path / "ck")
    lines = (world / "train.jsonl").read_text().splitlines()
    file, one, two = tmp_path / "t.jsonl", tmp_path / "one", tmp_path / "two"
    file.write_text("\n".join(lines + lines))  # 48 pairs: 4 are held out
    flags = ["--preset=qwen2vl_2b", "--init", tmp_path / "ck", "--data", file, "--media", world, "--steps=4",
             "--dtype=float32", *QUICK, "--global_batch=8", "--eval_every=2"]
    printed = run("train.py", *flags, "--out", one, "--micro_batch=3").stdout
    assert "4 pairs are held out" in printed and "48 pairs in 2 data sets" in printed
    config, preset = state_of(one / "checkpoint")["config"], train.PRESETS["qwen2vl_2b"]
    given = dict(init=str(tmp_path / "ck"), dtype="float32", global_batch=8, lr=2e-3)
    assert {name: config[name] for name in preset} == preset | given

    # what the log calls hit is hit@1 of the pairs that no step has trained on
    rows = log(one)
    assert [("hit" in r) for r in rows] == [False, True, False, True]
    m, pairs = Plume.from_pretrained(one / "checkpoint", "cpu"), Pairs(str(file), str(world))
    held = np.random.default_rng([0, 2]).permutation(48)[:4]
    queries, targets = (m.encode([pairs[i][side] for i in held]) for side in (0, 1))
    nearest = held[(queries @ targets.T).argmax(1)]
    assert rows[-1]["hit"] == np.mean(pairs.target[nearest] == pairs.target[held])
    schedule = Schedule(np.where(np.isin(np.arange(48), held), -1, pairs.dataset), pairs.names, 8, 40, 0)
    assert not np.isin(held, np.concatenate([schedule[step] for step in range(40)])).any()

    run_ranks(2, "train.py", *flags, "--out", two, "--fsdp")
    assert [r.get("hit") for r in log(two)] == [r.get("hit") for r in rows]
    with pytest.raises(DataError, match="Did you mean 'qwen2vl_2b'"):
        train.main(["--preset", "qwen2vl_2"])
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:8]))
    few = ["--data", tmp_path / "few.jsonl", "--media", world, "--steps=2", *QUICK, "--eval_every=1"]
    refused(run("train.py", *few, "--out", tmp_path / "few", check=False), "leaves none to hold out")


REFUSED = (  # flags, what the error says
    ("--global_bach=1", "Did you mean"),
    ("--lr=fast", "--lr needs a value of type float"),
    ("--reset_moments=maybe", "true or false"),
    ("--global_batch=1", "--global_batch 1: needs at least 2"),
    ("--data=no.jsonl", "no such file"),
    ("--rest_of_rationale=before", "'inside' or 'after'"),
    ("--segments=8 --steps_per_segment=5", "at most 32"),
    ("--latent_positions=rope", "mrope or cache"),
    ("--freeze_vision=no", "auto, true or false"),
    ("--adapter=moo", "'moe', 'mlp', 'none'"),
    ("--save_every=0", "needs at least 1"),
    ("--steps=-5", "needs at least 0"),
    ("--epochs=inf", "above 0 and finite"),
    ("--vision_lr=nan", "--vision_lr nan: needs at least 0"),
    ("--weight_decay=-1", "--weight_decay -1.0: needs at least 0"),
    ("--decay=-1", "--decay -1.0: needs at least 0"),
    ("--decay=2", "--decay 2.0: needs a share of the run"),
    ("--warmup=1", "--warmup 1.0: needs a share of the run"),
    ("--scale=0", "--scale 0.0: needs a number above 0"),
    ("--matryoshka=16,x", "needs numbers of components"),
    ("--matryoshka=16,128", "has 128 components; name fewer"),
    ("--workers=16", "at most 15"),
    ("--micro_batch=-1", "needs at least 0"),
    ("--fsdp", "torchrun"),
    ("--families=image_ret", "leave it out"),
    ("--seed=-1", "--seed -1: needs at least 0"),
    ("--keep=-1", "needs at least 0"),
    ("--device=meta", "tools.dry_run"),
    ("--dry_run", "python -m tools.dry_run"),
    ("--ablations=a.json", "python -m tools.ablations"),
    ("--wandb=mine", "pip install wandb"),
    ("--dtype=bf16", "needs 'float32'"),
    ("--init=./nowhere", "no such checkpoint"),
    ("--resume", "no checkpoint of a run"),
)


@pytest.mark.parametrize("extra, why", REFUSED)
def test_training_refuses_what_cannot_work(world, tmp_path, monkeypatch, extra, why):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(world / "train.jsonl"), "--out", str(tmp_path)]
    with pytest.raises((SystemExit, DataError, FileNotFoundError), match=re.escape(why)):
        train.main([*flags, *extra.split()])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no CUDA device"):
        train.main(["--device=cuda", "--out", str(tmp_path)])


def test_errors_of_the_command_line_are_one_line_and_help_names_every_flag(world, tmp_path, capsys):
    flags = ["train.py", "--data", world / "train.jsonl", "--out", tmp_path]
    failed = run(*flags, "--lr", "fast", check=False)
    refused(failed, "^error: ")
    burst = run(*flags, "--steps=6", "--lr=1e30", "--clip=1e30", *QUICK[:4], check=False)
    refused(burst, r"error: step \d, data set '(t2i|v2t)': loss nan")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    help_ = capsys.readouterr().out
    assert [name for name in vars(train.Config()) if f"--{name} " not in help_] == [] and "torchrun" in help_


def test_checkpoints_come_at_stage_ends_every_save_every_and_at_the_end(world, tmp_path, monkeypatch):
    saved, clips, recomputed = [], [], []
    write, clip, recompute = train.torch.save, torch.nn.utils.clip_grad_norm_, latent.checkpoint

    def save(state, file):
        saved.append(state["step"])
        write(state, file)

    def clip_grad_norm_(parameters, norm):
        clips.append(norm)
        return clip(parameters, norm)

    def checkpoint(*args, **keywords):
        recomputed.append(1)
        return recompute(*args, **keywords)

    monkeypatch.setattr(signal, "signal", lambda *a: None)  # leave this process's own alone
    monkeypatch.setattr(train.torch, "save", save)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
    monkeypatch.setattr(latent, "checkpoint", checkpoint)
    train.main(["--data", str(world / "train.jsonl"), "--out", str(tmp_path), "--steps=9", "--save_every=8",
                "--workers=0", "--global_batch=4", "--clip=0.5", "--checkpointing", "--device=cpu", *PAPER])
    assert saved == [2, 3, 4, 5, 7, 8, 9] and clips == [0.5] * 9
    assert len(recomputed) == 9 * 2 * 3  # steps x (prefill, suffix) x layers


WANDB = """
rows = []

class Run:
    def log(self, row, step):
        rows.append((row, step))

    def finish(self):
        rows.append("end")

def init(**given):
    rows.append(given)
    return Run()
"""


def test_wandb_gets_the_rows_of_the_log(world, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    train.main(["--data", str(world / "train.jsonl"), "--steps=2", "--workers=0", "--global_batch=4",
                "--device=cpu", "--wandb=mine", "--out", str(tmp_path / "out")])
    first, *rows, end = sys.modules.pop("wandb").rows
    assert first["project"] == "mine" and first["config"]["steps"] == 2 and end == "end"
    assert rows == [(row, row["step"]) for row in log(tmp_path / "out")]
    out = str(tmp_path / "out")
    assert run_log.wandb_id(train.Config(out=out, resume=True)) == first["id"]  # goes on there
    assert run_log.wandb_id(train.Config(out=out)) != first["id"]  # another run


def test_tensorboard_gets_the_numbers_of_the_log(world, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    train.main(["--data", str(world / "train.jsonl"), "--steps=3", "--workers=0", "--global_batch=4",
                "--device=cpu", "--tensorboard", "--out", str(tmp_path)])
    found = events.EventAccumulator(str(tmp_path)).Reload()
    rows = log(tmp_path)
    for name in ("loss", "lr", "K", "answer"):
        seen = [(event.step, event.value) for event in found.Scalars(name)]
        assert seen == [(row["step"], pytest.approx(row[name])) for row in rows], name


def test_too_little_memory_is_an_error_that_says_what_helps(world, tmp_path, monkeypatch):
    def too_much(*a):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(signal, "signal", lambda *a: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", too_much)
    flags = ["--steps=2", "--workers=0", "--global_batch=4", "--device=cpu", "--out", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(world / "train.jsonl"), *flags])
    with pytest.raises(SystemExit, match="out of memory.*Lower --micro_batch.*tools.dry_run"):
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")


def test_skip_bad_trains_on_the_rest_and_prints_the_count(world, tmp_path):
    lines = (world / "train.jsonl").read_text().splitlines()
    (tmp_path / "red bar.png").write_bytes(b"not a picture")
    lines[0] = lines[0].replace("red square.png", str(tmp_path / "red bar.png"))
    lines[3] = "{not json"
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    flags = ["train.py", "--data", file, "--media", world, "--steps=6", *QUICK, "--out"]
    printed = run(*flags, tmp_path / "out", "--skip_bad", "--save_every=2").stdout
    assert re.search(r"1 records left out at the start, [123] while training", printed)
    assert "record 4: not JSON" in printed
    assert re.search(r"left out: .*record 1: pos: .*red bar.png: cannot be used as a picture", printed)
    refused(run(*flags, tmp_path / "other", check=False), "record 4: not JSON")
