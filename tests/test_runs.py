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
import model as plume_model
import train
from curriculum import Curriculum, Progress
from data import DataError, Pairs, Schedule
from model import Plume
from tests.test_checkpoints import LFS, half_of
from test_plume import (
    HERE, assert_close, make_model, turns, record, Started, run, run_ranks, call, QUICK, PAPER,
    GATED, weights, log)


def test_training_goes_through_all_stages_and_the_loss_falls(trained):
    out, printed = trained
    rows = log(out)
    assert [r["step"] for r in rows] == list(range(40)) and [r["K"] for r in rows] == [0] * 5 + [2] * 5 + [4] * 5 + [6] * 5 + [8] * 20
    assert [r["answer"] for r in rows] == [True] * 30 + [False] * 10
    for name, share in (("ce", 0.5), ("disc", 0.95)):
        assert np.mean([r[name] for r in rows[-5:]]) < share * np.mean([r[name] for r in rows[:5]]), name
    assert np.mean([r["gen"] for r in rows[20:30]]) < 0.8 * np.mean([r["gen"] for r in rows[:5]])
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float)) and rows[-1]["bal"] > 0
    for text in ("global contrastive batch 4 = 1 ranks x 4", "latent steps", "24 pairs in 2 data sets: t2i 12 (20 steps), v2t 12 (20 steps)", "pairs/s", "ETA", "40 of 40 steps done"):
        assert text in printed, text


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(world, tmp_path):
    command = ["train.py", "--data", world / "train.jsonl", "--steps", "50", *QUICK, *GATED, "--save_every=1000", "--out"]
    run(*command, tmp_path / "whole")
    command.append(tmp_path / "parts")
    running = Started(*command)
    running.wait_for("step 22/")  # the gate has decided, and the stage has not changed yet
    os.killpg(running.pid, signal.SIGTERM)  # as a batch system does: the workers get it too
    assert running.wait(60) == 130 and "--resume" in running.stdout
    stopped = log(tmp_path / "parts")[-1]["step"]
    assert 22 <= stopped < 34
    state = torch.load(tmp_path / "parts" / "checkpoint" / "train_state.pt", weights_only=True)
    assert state["step"] == stopped + 1 and state["progress"]["entry"][1] in range(35, 40) and 45 == Progress(Curriculum(1, 4, last_stage=0.1, gate=99), 50).entry[1]
    refused = run(*command, check=False)
    assert refused.returncode == 1 and "--resume" in refused.stderr
    changed = run(*command, "--lr=1e-3", "--resume", check=False)
    assert changed.returncode == 1 and "lr: 0.002 then, 0.001 now" in changed.stderr
    run(*command, "--resume")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    timeless = lambda rows: [{k: v for k, v in r.items() if k not in ("ms", "wait", "pairs_per_s")} for r in rows]
    assert timeless(log(tmp_path / "whole")) == timeless(log(tmp_path / "parts"))
    assert [(r["stage"], r["answer"]) for r in log(tmp_path / "parts")][-1] == (1, False) and any(r["stage"] < r["reached"] for r in log(tmp_path / "parts"))


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import train
die, at = sys.argv.pop(1), int(sys.argv.pop(1))
save, rename = train.torch.save, os.rename
def half(state, path):
    save(state, path)
    if state["step"] == at:
        if die == "writing": os.truncate(path, os.path.getsize(path) // 2)
        if die != "renaming": os.kill(os.getpid(), signal.SIGKILL)
        os.rename = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if a.endswith(".writing") else rename(a, b)
train.torch.save = half
sys.exit(train.main(sys.argv[1:]))
"""


def test_killed_while_a_checkpoint_is_written_costs_the_steps_since_the_last_one(trained, world, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--out", out, "--steps", 40, *QUICK, *PAPER]
    assert run(tmp_path / "killed.py", "writing", 15, *flags, check=False).returncode == -signal.SIGKILL  # half a file
    names = lambda: sorted(re.sub(r"\.[0-9a-f]{8}", ".X", name) for name in os.listdir(out) if name != ".plume.lock")
    assert names() == ["checkpoint", "checkpoint.X.writing", "log.jsonl"]
    assert run(tmp_path / "killed.py", "renaming", 30, *flags, "--resume", "--keep=2", check=False).returncode == -signal.SIGKILL
    assert names() == ["checkpoint-10", "checkpoint-15", "checkpoint-20", "checkpoint.X.writing", "checkpoint.X.writing", "log.jsonl"]  # between two renames
    printed = run("train.py", *flags, "--resume", "--keep=2").stdout
    assert "what a killed run left behind" in printed and printed.count(".writing") == 2
    # of checkpoint-20 nobody can tell any more that it is not somebody's copy: it stays
    kept = ["checkpoint", "checkpoint-15", "checkpoint-20", "checkpoint-30"]
    assert names() == [*kept, "checkpoint.X.writing", "checkpoint.X.writing", "log.jsonl"]
    whole, mine = weights(trained[0]), weights(out)
    assert whole.keys() == mine.keys() and all(torch.equal(v, mine[k]) for k, v in whole.items())
    assert [r["step"] for r in log(out)] == list(range(40))
    assert torch.load(out / "checkpoint-30" / "train_state.pt", weights_only=True)["step"] == 30
    with plume_model.replacing(out / "checkpoint", keep=str(out / "checkpoint-40")) as folder:
        shutil.copytree(out / "checkpoint-30", folder, dirs_exist_ok=True)
    assert [os.path.basename(p) for p in train.checkpoints_in(out)] [:3] == ["checkpoint", "checkpoint-40", "checkpoint-30"]
    (out / "checkpoint").rename(tmp_path / "elsewhere")
    refused = run("train.py", *flags, check=False)
    assert refused.returncode == 1 and "holds checkpoint-" in refused.stderr  # what is kept is not written over


def test_a_second_run_is_refused_by_a_lock_that_a_killed_run_does_not_leave(world, tmp_path):
    out = tmp_path / "out"
    flags = ["train.py", "--data", world / "train.jsonl", "--out", out, "--steps", 400, *QUICK, *PAPER, "--save_every=5", "--keep=1"]
    first = Started(*flags)
    first.wait_for("step 12/")
    for more in (["--resume"], ["--resume", "--workers=0"]):
        before = (out / "log.jsonl").read_text()
        second = run(*flags, *more, check=False)
        assert second.returncode == 1 and f"another run is at work there (process {first.pid} on " in second.stderr
        assert "Traceback" not in second.stderr and (out / "log.jsonl").read_text().startswith(before)
    assert first.process.exitcode is None  # the first one does not notice
    for name in ("checkpoint.old", "checkpoint.writing", "checkpoint-notes", "checkpoint-1"):  # somebody's copies, in every shape
        shutil.copytree(out / "checkpoint", out / name)
    (out / "checkpoint" / "README.md").write_text("card")
    os.kill(first.pid, signal.SIGKILL)  # its data worker lives on for a moment
    first.wait()
    step = len(log(out))
    with open(out / "log.jsonl", "ab") as f:
        f.write(b"here the power failed \xff\n")
    printed = run(*[f if f != 400 else step + 8 for f in flags], "--resume", check=False)
    assert "--resume with another configuration" in printed.stderr  # no lock is left, and steps are part of the recipe
    again = Started(*flags, "--resume")
    again.wait_for(f"step {step + 12}/")
    again.terminate()
    assert again.wait() == 130, again.stderr
    assert {"checkpoint.old", "checkpoint.writing", "checkpoint-notes", "checkpoint-1"} < set(os.listdir(out))
    assert b"here the power failed \xff\n" in (out / "log.jsonl").read_bytes()
    assert (out / "checkpoint" / "README.md").read_text() == "card" and len([n for n in os.listdir(out) if re.fullmatch(r"checkpoint-\d+", n)]) >= 2
    state = torch.load(out / "checkpoint" / "train_state.pt", weights_only=True)
    assert len(state["kept"]) == 1 and (out / state["kept"][0] / "train_state.pt").exists() and state["kept"] != ["checkpoint-1"]


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
    flags = ["--data", world / "train.jsonl", "--out", tmp_path / "out", "--steps=2", *QUICK]
    first = Started(tmp_path / "slow.py", *flags)
    first.wait_for("reading")
    second = run("train.py", *flags, check=False)
    assert second.returncode == 1 and "another run is at work there" in second.stderr and os.listdir(tmp_path / "out") == [".plume.lock"]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    failed = run("train.py", "--data", tmp_path / "gone.jsonl", *flags[2:3], tmp_path / "never", *flags[4:], check=False)
    assert "no such file" in failed.stderr and not (tmp_path / "never").exists()
    run("train.py", *flags)
    # under the lock it is looked at again: here a run has come and gone since the flags were read
    failed = run("train.py", *flags, check=False)
    assert "out holds checkpoint: continue with --resume" in failed.stderr and len(log(tmp_path / "out")) == 2


@pytest.mark.parametrize("harm", ["cut off", "empty", "pointer", "no step", "a list", "pickle"])
def test_a_damaged_training_state_is_an_error_that_names_it(trained, world, tmp_path, harm):
    out = tmp_path / "out"
    shutil.copytree(trained[0] / "checkpoint", out / "checkpoint")
    file = out / "checkpoint" / "train_state.pt"
    if harm == "cut off":
        half_of(file)
    elif harm in ("empty", "pointer"):
        file.write_bytes(LFS if harm == "pointer" else b"")
    elif harm == "pickle":
        torch.save(dict(step=Fraction(1, 2)), file)
    else:
        state = torch.load(file, weights_only=True)
        torch.save([1, 2] if harm == "a list" else {k: v for k, v in state.items() if k != "step"}, file)
    failed = call("train.py", "--data", world / "train.jsonl", "--out", out, "--steps=40", "--resume", "--device=cpu", *QUICK, *PAPER, check=False)
    assert failed.returncode == 1 and f"{file}: not the" in failed.stderr
    assert ("Git LFS pointer" in failed.stderr) == (harm == "pointer") and ("has no step" in failed.stderr) == (harm == "no step")


FULL = """
import resource, sys
sys.path.insert(0, {here!r})
import train
size, write = int(sys.argv.pop(1)), train.Plume.write
def limited(*a, **k):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # no file may be longer: what a full disk does
    return write(*a, **k)
at = int(sys.argv.pop(1))
save = train.save
def late(cfg, model, weights, state, saved, kept):
    if state["step"] == at: train.Plume.write = limited
    return save(cfg, model, weights, state, saved, kept)
train.save = late
try:
    sys.exit(train.main(sys.argv[1:]))
except (train.DataError, OSError) as e:
    sys.exit(f"error: {{train.said(e)}}")
"""


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(world, tmp_path, monkeypatch):
    (tmp_path / "full.py").write_text(FULL.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--steps", 12, "--save_every=4", *QUICK, *GATED, "--gate=0"]
    for size, file in ((100_000, "model.safetensors"), (8 << 20, "train_state.pt")):
        out = tmp_path / f"out {size}"
        failed = run(tmp_path / "full.py", size, 8, *flags, "--out", out, check=False)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
        last = failed.stderr.strip().splitlines()[-1]
        assert re.search(rf"error: .*{out}/checkpoint: the checkpoint of step 8 could not be written, the checkpoint of step 4 is still there: .*{file}: cannot", last)
        assert sorted(os.listdir(out)) == [".plume.lock", "checkpoint", "log.jsonl"]
        assert torch.load(out / "checkpoint" / "train_state.pt", weights_only=True)["step"] == 4
        Plume.from_pretrained(out / "checkpoint", "cpu")
    run("train.py", *flags, "--out", out, "--resume")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(DataError, match=r"a checkpoint takes 0.0\d GB, and 0.01 GB are free"):
        train.main([*map(str, flags), "--out", str(tmp_path / "little"), "--device=cpu"])


def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_loaded(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(train, "build_model", None)
    for out, why in ((tmp_path / "file", "nothing can be written in .*file"), (tmp_path / "file" / "deeper" / "x", "nothing can be written in .*file"),
                     ("/proc/plume", "nothing can be written"), ("/dev/null/x", "nothing can be written in '/dev/null'")):
        failed = call("train.py", "--data", world / "train.jsonl", "--out", out, "--steps=2", check=False)
        assert failed.returncode == 1 and re.search(why, failed.stderr), failed.stderr
    (tmp_path / "theirs").mkdir()
    for line in ('{"level": "info"}', '{"loss": 2.3, "epoch": 0.1, "step": 10}', '{"step": 10, "loss": 2.3}', "a note", '"step":'):
        (tmp_path / "theirs" / "log.jsonl").write_text(line + "\n")
        failed = call("train.py", "--data", world / "train.jsonl", "--out", tmp_path / "theirs", "--steps=2", "--device=cpu", check=False)
        assert "log.jsonl: not the log of a training run" in failed.stderr and (tmp_path / "theirs" / "log.jsonl").read_text() == line + "\n"
    assert (tmp_path / "file").read_text() == "mine"


def test_moments_are_forgotten_when_a_stage_is_entered(trained):
    state = torch.load(trained[0] / "checkpoint" / "train_state.pt", weights_only=True)
    assert state["step"] == 40 and {int(s["step"]) for s in state["optimizer"]["state"].values()} == {10}  # since the answer was dropped


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


def test_a_killed_rank_costs_nothing_and_shards_go_on_as_copies(world, tmp_path):
    (tmp_path / "dies.py").write_text(DIES.format(here=str(HERE)))
    flags = ["--data", world / "train.jsonl", "--steps", 12, "--save_every", 4, "--fsdp", "--micro_batch", 2, "--checkpointing", *QUICK, "--global_batch=8", "--out"]
    run_ranks(2, "train.py", *flags, tmp_path / "whole")
    assert run_ranks(2, tmp_path / "dies.py", *flags, tmp_path / "killed", check=False).returncode
    state = torch.load(tmp_path / "killed" / "checkpoint" / "train_state.pt", weights_only=True)
    assert 4 <= state["step"] <= 6 and state["ranks"] == 2
    shutil.copytree(tmp_path / "killed", tmp_path / "copies")
    run_ranks(2, "train.py", *flags, tmp_path / "killed", "--resume")
    printed = run("train.py", *(f for f in flags if f != "--fsdp"), tmp_path / "copies", "--resume").stdout  # shards to one whole model
    assert "began on 2 ranks and goes on with 1" in printed
    whole, killed, copies = (weights(tmp_path / name) for name in ("whole", "killed", "copies"))
    assert all(torch.equal(killed[k], v) for k, v in whole.items()) and killed.keys() == whole.keys() == copies.keys()
    for k, v in whole.items():
        assert_close(copies[k], v, k, 2e-3)
    assert [r["step"] for r in log(tmp_path / "killed")] == list(range(12))
    lines = (world / "train.jsonl").read_text().splitlines(True)
    for rank, text in enumerate((lines, lines[:-2])):
        (tmp_path / f"{rank}.jsonl").write_text("".join(text))
    (tmp_path / "other.jsonl").write_text("".join(lines).replace("shows one thing", "shows 1 thing"))
    assert len({Pairs(str(tmp_path / f), str(world)).digest for f in ("0.jsonl", "1.jsonl", "other.jsonl")}) == 3
    (tmp_path / "differ.py").write_text(f"import os, sys; sys.path.insert(0, {str(HERE)!r}); import train\ntrain.main([*sys.argv[1:], '--data', os.environ['RANK'] + '.jsonl'])")
    refused = run_ranks(2, tmp_path / "differ.py", "--media", world, "--out", tmp_path / "none", check=False, cwd=tmp_path)
    assert refused.returncode and "rank 1: 22 pairs" in refused.stderr and not (tmp_path / "none").exists()


def test_what_no_rank_uses_is_not_moved(tmp_path):
    """Text alone and no latent step: the vision tower and the adapter keep their weights, whatever the weight decay."""
    rows = [record(qry=dict(conversations=turns(f"question {i}")), pos=dict(conversations=turns(f"answer {i}"))) for i in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--data", tmp_path / "t.jsonl", "--steps=3", "--segments=1", "--last_stage=0.3", "--gate=0", "--micro_batch=2", "--weight_decay=9", *QUICK, "--global_batch=8"]
    run_ranks(2, "train.py", *flags, "--out", tmp_path / "out")
    run_ranks(2, "train.py", *flags, "--out", tmp_path / "shards", "--fsdp")
    assert [r["K"] for r in log(tmp_path / "out")] == [0] * 3
    Plume.random(Pairs(str(tmp_path / "t.jsonl")).texts()).save_pretrained(tmp_path / "before" / "checkpoint")
    before = weights(tmp_path / "before")
    for after in (weights(tmp_path / "out"), weights(tmp_path / "shards")):
        kept = {k for k, v in before.items() if torch.equal(v, after[k])}
        idle = {k for k in before if k.startswith(("visual.", "adapter."))}
        assert len(idle) > 20 and idle <= kept and kept - idle == set(), sorted(idle ^ kept)[:4]


def test_the_paper_s_preset_and_hit_at_1_on_held_out_pairs(world, tmp_path):
    make_model().float().save_pretrained(tmp_path / "ck")
    lines = (world / "train.jsonl").read_text().splitlines()
    (tmp_path / "t.jsonl").write_text("\n".join(lines + lines))  # 48 pairs: 4 are held out
    flags = ["--preset=qwen2vl_2b", "--init", tmp_path / "ck", "--data", tmp_path / "t.jsonl", "--media", world, "--dtype=float32", "--steps=4", *QUICK, "--global_batch=8", "--eval_every=2"]
    printed = run("train.py", *flags, "--out", tmp_path / "one", "--micro_batch=3").stdout
    config = torch.load(tmp_path / "one" / "checkpoint" / "train_state.pt", weights_only=True)["config"]
    given = dict(init=str(tmp_path / "ck"), dtype="float32", global_batch=8, lr=2e-3)
    assert {k: config[k] for k in train.PRESETS["qwen2vl_2b"]} == train.PRESETS["qwen2vl_2b"] | given
    rows = log(tmp_path / "one")
    assert [("hit" in r) for r in rows] == [False, True, False, True] and "4 pairs are held out" in printed and "48 pairs in 2 data sets" in printed
    m, pairs = Plume.from_pretrained(tmp_path / "one" / "checkpoint", "cpu"), Pairs(str(tmp_path / "t.jsonl"), str(world))
    held = np.random.default_rng([0, 2]).permutation(48)[:4]
    q, t = (m.encode([pairs[i][side] for i in held]) for side in (0, 1))
    mine = [pairs.target[held][j] == pairs.target[i] for i, j in zip(held, (q @ t.T).argmax(1))]
    assert rows[-1]["hit"] == np.mean(mine)
    schedule = Schedule(np.where(np.isin(np.arange(48), held), -1, pairs.dataset), pairs.names, 8, 40, 0)
    assert not {int(i) for step in range(40) for i in schedule[step]} & set(held.tolist())
    run_ranks(2, "train.py", *flags, "--out", tmp_path / "two", "--fsdp")
    assert [r.get("hit") for r in log(tmp_path / "two")] == [r.get("hit") for r in rows]
    with pytest.raises(DataError, match="Did you mean 'qwen2vl_2b'"):
        train.main(["--preset", "qwen2vl_2"])
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:8]))
    few = run("train.py", "--data", tmp_path / "few.jsonl", "--media", world, "--steps=2", *QUICK, "--eval_every=1", "--out", tmp_path / "few", check=False)
    assert few.returncode == 1 and "leaves none to hold out" in few.stderr


def test_training_refuses_what_cannot_work(world, tmp_path, capsys):
    flags = ["--data", world / "train.jsonl", "--out", tmp_path]
    for extra, why in ((["--global_bach", "1"], "Did you mean"), (["--lr", "fast"], "--lr needs a value of type float"), (["--reset_moments", "maybe"], "true or false"),
                       (["--global_batch", "1"], "at least 2"), (["--data", tmp_path / "no.jsonl"], "no such file"), (["--rest_of_rationale", "before"], "'inside' or 'after'"),
                       (["--segments=8", "--steps_per_segment=5"], "at most 32"), (["--latent_positions", "rope"], "mrope or cache"), (["--adapter", "moo"], "'moe', 'mlp' or 'none'"), (["--save_every", "0"], "at least 1"), (["--steps=-5"], "above 0"),
                       (["--decay=-1"], "needs shares of the run"), (["--scale=0"], "must be above 0"), (["--workers=16"], "at most 15"), (["--micro_batch=-1"], "at least 1 pair"), (["--fsdp"], "torchrun"), (["--families=image_ret"], "leave it out"),
                       (["--seed=-1"], "--seed -1: at least 0"), (["--epochs=inf"], "above 0 and finite"), *([] if torch.cuda.is_available() else [(["--device=cuda"], "no CUDA device")]),
                       (["--device=meta"], "tools.dry_run"), (["--dry_run"], "python -m tools.dry_run"), (["--ablations=a.json"], "python -m tools.ablations"), (["--wandb=mine"], "pip install wandb"), (["--keep=-1"], "at least 0"),
                       (["--dtype", "bf16"], "needs 'float32'"), (["--init", tmp_path / "nowhere"], "no such checkpoint"), (["--resume"], "no checkpoint of a run")):
        with pytest.raises((SystemExit, DataError, FileNotFoundError), match=re.escape(why)):
            train.main(list(map(str, [*flags, *extra])))
    failed = run("train.py", *flags, "--lr", "fast", check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    burst = run("train.py", *flags, "--steps", 6, "--lr", "1e30", "--clip", "1e30", *QUICK[:4], check=False)
    assert burst.returncode == 1 and re.search(r"error: step \d, data set '(t2i|v2t)': loss nan", burst.stderr) and "Traceback" not in burst.stderr, burst.stderr[-500:]
    with pytest.raises(SystemExit):
        train.main(["--help"])
    help_ = capsys.readouterr().out
    assert all(f"--{name} " in help_ for name in vars(train.Config())) and "torchrun" in help_


def test_checkpoints_come_at_stage_ends_every_save_every_and_at_the_end(world, tmp_path, monkeypatch):
    saved, clips, recomputed = [], [], []
    write, clip, recompute = train.torch.save, torch.nn.utils.clip_grad_norm_, latent.checkpoint
    monkeypatch.setattr(train.signal, "signal", lambda *a: None)  # leave this process's own alone
    monkeypatch.setattr(train.torch, "save", lambda state, file: (saved.append(state["step"]), write(state, file)))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: (clips.append(norm), clip(p, norm))[1])
    monkeypatch.setattr(latent, "checkpoint", lambda *a, **k: (recomputed.append(1), recompute(*a, **k))[1])
    train.main(["--data", str(world / "train.jsonl"), "--out", str(tmp_path), "--steps=9", "--save_every=8", "--workers=0",
                "--global_batch=4", "--clip=0.5", "--checkpointing", "--device=cpu", *PAPER])
    assert saved == [2, 3, 4, 5, 7, 8, 9] and clips == [0.5] * 9 and len(recomputed) == 9 * 2 * 3  # steps x (prefill, suffix) x layers


def test_wandb_gets_the_rows_of_the_log_and_too_little_memory_is_an_error_that_says_what_helps(world, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("from types import SimpleNamespace\nrows = []\n"
                                       "def init(**kw):\n    rows.append(kw)\n    return SimpleNamespace(log=lambda row, step: rows.append((row, step)), finish=lambda: rows.append('end'))")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *a: None)
    flags = ["--data", str(world / "train.jsonl"), "--steps=2", "--workers=0", "--global_batch=4", "--device=cpu", "--wandb=mine", "--out"]
    train.main([*flags, str(tmp_path / "out")])
    first, *rows, end = sys.modules.pop("wandb").rows
    assert first["project"] == "mine" and first["config"]["steps"] == 2 and rows == [(r, r["step"]) for r in log(tmp_path / "out")] and end == "end"

    def too_much(*a):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(torch.optim.AdamW, "step", too_much)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags[:-3], "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="out of memory.*Lower --micro_batch.*tools.dry_run"):
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")


def test_skip_bad_trains_on_the_rest_and_prints_the_count(world, tmp_path):
    lines = (world / "train.jsonl").read_text().splitlines()
    for name in ("red bar", "blue bar"):  # one that cannot be read, one that is gone
        (tmp_path / f"{name}.png").write_bytes(b"not a picture")
    lines[3] = "{not json"
    lines[0] = lines[0].replace("red square.png", str(tmp_path / "red bar.png"))
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    flags = ["--data", tmp_path / "bad.jsonl", "--media", world, "--out", tmp_path / "out", "--steps", 6, *QUICK]
    printed = run("train.py", *flags, "--skip_bad", "--save_every", 2).stdout
    assert re.search(r"1 records left out at the start, [123] while training", printed)
    assert "record 4: not JSON" in printed and re.search(r"left out: .*record 1: pos: .*red bar.png: cannot be used as a picture", printed)
    failed = run("train.py", *flags[:5], tmp_path / "other", *flags[6:], check=False)
    assert failed.returncode == 1 and "record 4: not JSON" in failed.stderr and "Traceback" not in failed.stderr
