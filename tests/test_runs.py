"""Training runs by their command line: stopped, killed, resumed, refused."""

import math
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import latent
import train
from curriculum import Curriculum, Progress
from engine.log import wandb_id
from files.errors import DataError
from files.records import Pairs
from hub.folders import checkpoints_in, replacing
from model import Plume
from test_plume import assert_close, GATED, HERE, log, make_model, PAPER, QUICK, weights
from tests.processes import call, run, run_ranks, Started
from tests.samples import record, turns, write_lines
from tests.test_checkpoints import LFS


def state_of(checkpoint):
    return torch.load(checkpoint / "train_state.pt", weights_only=True)


def assert_equal_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def timeless(out):
    """The rows of log.jsonl without what the clock said."""
    return [{k: v for k, v in row.items() if k not in ("ms", "wait", "pairs_per_s")} for row in log(out)]


def refused(why, *command, by=run, **keywords):
    """The command ends with one line that says why, and no traceback -> what ended."""
    failed = by(*command, check=False, **keywords)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert re.search(why, failed.stderr), failed.stderr[-2000:]
    return failed


@pytest.fixture
def on_world(world):
    return ["train.py", "--data", world / "train.jsonl", *QUICK]


@pytest.fixture
def train_here(on_world, monkeypatch):
    """train.main in this process, whose signals are left alone."""
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    usual = [*on_world[1:], "--workers=0", "--device=cpu"]
    return lambda *flags: train.main([str(flag) for flag in (*usual, *flags)])


# What goes wrong in a run: these take the place of one of its functions, which is their first argument


def die_in_the_file(save, state, path):
    """When half of the state of step 15 is written."""
    save(state, path)
    if state["step"] == 15:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def die_between_renames(rename, a, b):
    """When the checkpoint of step 30 is written, and the one before it has got another name."""
    if a.endswith(".writing") and state_of(Path(a))["step"] == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(a, b)


def die_on_rank_1(backward, model, batch, *rest):
    if batch["step"] == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(model, batch, *rest)


def fill_disk(size, save, cfg, model, optimizer, state, *rest):
    """From step 8's checkpoint on no file may be longer than `size` bytes, as on a full disk."""
    if state["step"] == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return save(cfg, model, optimizer, state, *rest)


def read_slowly(read_pairs, cfg):
    print("reading", flush=True)
    time.sleep(60)


def read_another_file(read_pairs, cfg):
    """Another one on every rank."""
    cfg.data = f"{os.environ['RANK']}.jsonl"
    return read_pairs(cfg)


def test_training_goes_through_all_stages_and_the_loss_falls(trained):
    out, printed = trained
    rows = log(out)
    assert [r["step"] for r in rows] == list(range(40))
    assert [r["K"] for r in rows] == [0] * 5 + [2] * 5 + [4] * 5 + [6] * 5 + [8] * 20
    assert [r["answer"] for r in rows] == [True] * 30 + [False] * 10
    ce, disc, gen = (np.array([r[name] for r in rows]) for name in ("ce", "disc", "gen"))
    assert ce[-5:].mean() < 0.5 * ce[:5].mean() and disc[-5:].mean() < 0.95 * disc[:5].mean()
    assert gen[20:30].mean() < 0.8 * gen[:5].mean()
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    assert rows[-1]["bal"] > 0
    for text in ("24 pairs in 2 data sets: t2i 12 (20 steps), v2t 12 (20 steps)", "latent steps",
                 "global contrastive batch 4 = 1 ranks x 4", "pairs/s", "ETA", "40 of 40 steps done"):
        assert text in printed, text
    line = printed[printed.index("step 39/40") :].splitlines()[0]
    names, keys = [cell.split()[0] for cell in line.split(" | ")[:-6]], list(rows[-1])
    losses = keys[keys.index("lr") + 1 : keys.index("loss")]
    assert {"ce", "gen", "disc", "read", "bal", "gate_loss"} <= set(losses)
    assert names == ["step", "stage", "K", *losses]
    state = state_of(out / "checkpoint")  # moments are forgotten when a stage is entered
    steps = {int(moments["step"]) for moments in state["optimizer"]["state"].values()}
    assert state["step"] == 40 and steps == {10}  # since the answer was dropped


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(on_world, tmp_path):
    whole, parts, command = tmp_path / "whole", tmp_path / "parts", [*on_world, "--steps=50", *GATED]
    run(*command, "--out", whole)
    command += ["--out", parts]
    running = Started(*command)
    running.wait_for("step 22/")  # the gate has decided, and the stage has not changed yet
    os.killpg(running.pid, signal.SIGTERM)  # as a batch system does: the workers get it too
    assert running.wait(60) == 130
    assert re.search(r"; go on with: \S*python\S* \S*train.py .*--steps=50 .*--resume$", running.stdout, re.M)
    stopped, state = log(parts)[-1]["step"], state_of(parts / "checkpoint")
    assert 22 <= stopped < 34 and state["step"] == stopped + 1
    assert "adapter.w1" not in state["optimizer"]["state"]  # not used so far
    assert state["progress"]["entry"][1] in range(35, 40)
    assert Progress(Curriculum(1, 4, last_stage=0.1, gate=99), 50).entry[1] == 45  # by the schedule alone
    refused("--resume", *command)
    other = [*command, "--lr=1e-3", "--steps=51", "--resume"]
    refused("another configuration: steps: 50 then, 51 now; lr: 0.002 then, 0.001 now", *other)
    run(*command, "--resume")
    assert_equal_weights(whole, parts)
    assert timeless(whole) == timeless(parts)
    rows = log(parts)
    assert (rows[-1]["stage"], rows[-1]["answer"]) == (1, False)
    assert any(r["stage"] < r["reached"] for r in rows)


def test_a_flag_that_is_newer_than_the_run_does_not_stop_it(trained, on_world, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    state = state_of(out / "checkpoint")
    del state["config"]["w_bal"]
    assert "frozen" not in state["config"]  # --lora's alone
    torch.save(state, out / "checkpoint" / "train_state.pt")
    command = [*on_world, "--out", out, "--steps=40", *PAPER, "--resume"]
    assert "new since the run began: w_bal = 0.1\n" in run(*command).stdout
    refused("w_bal: 0.1 then, 0.2 now", *command, "--w_bal=0.2")


def test_killed_while_a_checkpoint_is_written_costs_the_steps_since_the_last_one(trained, on_world, tmp_path):
    out = tmp_path / "out"
    command, more = [*on_world, "--out", out, "--steps=40", *PAPER], ["--resume", "--keep=2"]

    def names():
        there = [name for name in os.listdir(out) if name != ".plume.lock"]
        return sorted(re.sub(r"\.[0-9a-f]{8}", ".X", name) for name in there)

    assert run(*command, patch=("torch.save", die_in_the_file), check=False).returncode == -signal.SIGKILL
    assert names() == ["checkpoint", "checkpoint.X.writing", "log.jsonl"]
    killed = run(*command, *more, patch=("os.rename", die_between_renames), check=False)
    assert killed.returncode == -signal.SIGKILL
    left = ["checkpoint.X.writing", "checkpoint.X.writing", "log.jsonl"]
    assert names() == ["checkpoint-10", "checkpoint-15", "checkpoint-20", *left]
    printed = run(*command, *more).stdout
    assert "what a killed run left behind" in printed and printed.count(".writing") == 2
    # of checkpoint-20 nobody can tell any more that it is not somebody's copy: it stays
    assert names() == ["checkpoint", "checkpoint-15", "checkpoint-20", "checkpoint-30", *left]
    assert_equal_weights(trained[0], out)
    assert [r["step"] for r in log(out)] == list(range(40))
    assert state_of(out / "checkpoint-30")["step"] == 30
    with replacing(out / "checkpoint", keep=str(out / "checkpoint-40")) as folder:
        shutil.copytree(out / "checkpoint-30", folder, dirs_exist_ok=True)
    newest = [os.path.basename(path) for path in checkpoints_in(out)]
    assert newest[:3] == ["checkpoint", "checkpoint-40", "checkpoint-30"]
    (out / "checkpoint").rename(tmp_path / "elsewhere")
    refused("holds checkpoint-", *command)  # what is kept is not written over


def test_a_second_run_is_refused_by_a_lock_that_a_killed_run_does_not_leave(on_world, tmp_path):
    out = tmp_path / "out"
    command = [*on_world, "--out", out, *PAPER, "--save_every=5", "--keep=1", "--steps=400"]
    first = Started(*command)
    first.wait_for("step 12/")
    before = (out / "log.jsonl").read_text()
    refused(rf"another run is at work there \(process {first.pid} on ", *command, "--resume")
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
    again = Started(*command, "--resume")
    again.wait_for(f"step {step + 12}/")
    again.terminate()
    assert again.wait() == 130, again.stderr
    assert copies < set(os.listdir(out))
    assert b"here the power failed \xff\n" in (out / "log.jsonl").read_bytes()
    assert (out / "checkpoint" / "README.md").read_text() == "card"
    assert len([name for name in os.listdir(out) if re.fullmatch(r"checkpoint-\d+", name)]) >= 2
    (kept,) = state_of(out / "checkpoint")["kept"]
    assert kept != "checkpoint-1" and (out / kept / "train_state.pt").exists()


def test_the_lock_is_taken_before_the_data_are_read_and_a_failed_start_leaves_nothing(on_world, tmp_path):
    out, command = tmp_path / "out", [*on_world, "--steps=2", "--out"]
    first = Started(*command, out, patch=("train.read_pairs", read_slowly))
    first.wait_for("reading")
    refused("another run is at work there", *command, out)
    assert os.listdir(out) == [".plume.lock"]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    refused("no such file", *command, tmp_path / "never", "--data", tmp_path / "gone.jsonl")
    assert not (tmp_path / "never").exists()
    run(*command, out)
    # under the lock it is looked at again: here a run has come and gone since the flags were read
    refused("out holds checkpoint: continue with --resume", *command, out)
    assert len(log(out)) == 2


@pytest.mark.parametrize("harm", ["cut off", "pointer", "no step", "a list", "pickle"])
def test_a_damaged_training_state_is_an_error_that_names_it(trained, on_world, tmp_path, harm):
    out = tmp_path / "out"
    shutil.copytree(trained[0] / "checkpoint", out / "checkpoint")
    file, state = out / "checkpoint" / "train_state.pt", state_of(out / "checkpoint")
    del state["step"]
    other = {"no step": state, "a list": [1, 2], "pickle": dict(step=Path())}
    if harm in other:
        torch.save(other[harm], file)
    else:
        raw = file.read_bytes()
        file.write_bytes({"cut off": raw[: len(raw) // 2], "pointer": LFS.encode()}[harm])
    command = [*on_world, "--out", out, "--steps=40", "--device=cpu", *PAPER, "--resume"]
    failed = refused(re.escape(f"{file}: not the"), *command, by=call)
    assert ("Git LFS pointer" in failed.stderr) == (harm == "pointer")
    assert ("has no step" in failed.stderr) == (harm == "no step")


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(on_world, tmp_path, monkeypatch):
    command = [*on_world, "--steps", 12, "--save_every=4", *GATED, "--gate=0", "--out"]
    for size, file in ((100_000, "model.safetensors"), (8 << 20, "train_state.pt")):
        out = tmp_path / f"out {size}"
        new, old = "of step 8 could not be written", "the checkpoint of step 4 is still there"
        refused(rf"error: .*{out}/checkpoint: the checkpoint {new}, {old}: .*{file}: cannot.*\s*\Z",
                *command, out, patch=("train.save", partial(fill_disk, size)))
        assert sorted(os.listdir(out)) == [".plume.lock", "checkpoint", "log.jsonl"]
        assert state_of(out / "checkpoint")["step"] == 4
        Plume.from_pretrained(out / "checkpoint", "cpu")
    run(*command, out, "--resume")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(DataError, match=r"a checkpoint takes 0.0\d GB, and 0.01 GB are free"):
        train.main([*map(str, command[1:]), str(tmp_path / "little"), "--device=cpu"])


def test_a_place_where_nothing_can_be_written_is_refused_before_data_are_read(on_world, tmp_path):
    command = [*on_world, "--device=cpu", "--data=/gone.jsonl", "--out"]
    mine, theirs = tmp_path / "file", tmp_path / "theirs"
    mine.write_text("mine")
    for out in (mine, mine / "deeper" / "x", "/proc/plume", "/dev/null/x"):
        refused(re.escape(f"--out '{out}': nothing can be written there"), *command, out, by=call)
    assert mine.read_text() == "mine"
    theirs.mkdir()
    for line in ('{"step": 10, "loss": 2.3}', '{"loss": 2.3, "step": 10}', "a note"):
        (theirs / "log.jsonl").write_text(line + "\n")
        refused("log.jsonl: not the log of a training run", *command, theirs, by=call)
        assert (theirs / "log.jsonl").read_text() == line + "\n"


def test_a_killed_rank_costs_nothing_and_shards_go_on_as_copies_and_back(on_world, tmp_path):
    flags = [*on_world, "--steps=12", "--save_every=4", "--micro_tokens=150", "--segments=1", "--gate=0",
             "--replay=0", "--keep=9", "--checkpointing"]
    whole, killed, copies, back = (tmp_path / name for name in ("whole", "killed", "copies", "back"))
    run_ranks(2, *flags, "--fsdp", "--out", whole)
    dying = ("train.backward", die_on_rank_1)
    assert run_ranks(2, *flags, "--fsdp", "--out", killed, patch=dying, check=False).returncode
    state = state_of(killed / "checkpoint")
    assert 4 <= state["step"] <= 6 and state["ranks"] == 2
    # the adapter is first used after the resume: its moments must not be there before
    used = [r["K"] for r in log(whole)]
    assert used[:7] == [0] * 7 and used[-1] == 1 and "adapter.w1" not in state["optimizer"]["state"]
    shutil.copytree(killed, copies)
    run_ranks(2, *flags, "--fsdp", "--out", killed, "--resume")
    assert_equal_weights(whole, killed)
    assert [r["step"] for r in log(killed)] == list(range(12))
    printed = run(*flags, "--out", copies, "--resume").stdout  # shards to one whole model
    assert "began on 2 ranks and goes on with 1" in printed
    assert state_of(copies / "checkpoint-8")["ranks"] == 1
    shutil.copytree(copies / "checkpoint-8", back / "checkpoint")
    run_ranks(2, *flags, "--fsdp", "--out", back, "--resume")  # and one whole model to shards
    for out in (copies, back):
        assert weights(out).keys() == weights(whole).keys()
        for name, w in weights(whole).items():
            assert_close(weights(out)[name], w, name, 2e-3)


def test_ranks_that_read_different_files_are_refused(world, tmp_path):
    text, digests = (world / "train.jsonl").read_text(), set()
    fewer, other = "".join(text.splitlines(True)[:-2]), text.replace("shows one thing", "shows 1 thing")
    for name, content in (("0.jsonl", text), ("1.jsonl", fewer), ("other.jsonl", other)):
        (tmp_path / name).write_text(content)
        digests.add(Pairs(str(tmp_path / name), str(world)).digest)
    assert len(digests) == 3
    refused("rank 1: 22 pairs", 2, "train.py", "--media", world, "--out", tmp_path / "none", by=run_ranks,
            cwd=tmp_path, patch=("train.read_pairs", read_another_file))
    assert not (tmp_path / "none").exists()


def test_what_no_rank_uses_is_not_moved(tmp_path):
    """Text alone, no latent step: vision tower and adapter keep their weights, whatever the weight decay."""
    file, before = tmp_path / "t.jsonl", tmp_path / "before"
    texts = [[dict(conversations=turns(f"{side} {i}")) for side in ("question", "answer")] for i in range(8)]
    write_lines(file, [record(qry=query, pos=target) for query, target in texts])
    flags = ["train.py", "--data", file, "--steps=3", "--segments=1", "--last_stage=0.3", "--gate=0",
             "--micro_tokens=200", "--weight_decay=9", *QUICK, "--global_batch=8", "--out"]
    run_ranks(2, *flags, tmp_path / "out")
    run_ranks(2, *flags, tmp_path / "shards", "--fsdp")
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
    flags = ["train.py", "--preset=qwen2vl_2b", "--init", tmp_path / "ck", "--data", file, "--media", world,
             "--steps=4", "--dtype=float32", *QUICK, "--global_batch=8", "--eval_every=2"]
    printed = run(*flags, "--out", one, "--micro_tokens=300").stdout
    assert "4 pairs are held out" in printed and "48 pairs in 2 data sets" in printed
    config, preset = state_of(one / "checkpoint")["config"], train.PRESETS["qwen2vl_2b"]
    given = dict(init=str(tmp_path / "ck"), dtype="float32", global_batch=8, lr=2e-3)
    assert {name: config[name] for name in preset} == preset | given
    # what the log calls hit is hit@1 of the pairs that no step has trained on
    rows = log(one)
    assert [("hit" in r) for r in rows] == [False, True, False, True]
    m, pairs = Plume.from_pretrained(one / "checkpoint", "cpu"), Pairs(str(file), str(world))
    schedule, held = train.make_schedule(train.Config(data=str(file), steps=40, eval_every=2), pairs)
    assert len(held) == 4 and sorted(held % 24)[::2] == sorted(held % 24)[1::2]  # two pairs, each twice
    queries, targets = (m.encode([pairs[i][side] for i in held]) for side in (0, 1))
    nearest = held[(queries @ targets.T).argmax(1)]
    assert rows[-1]["hit"] == np.mean(pairs.target[nearest] == pairs.target[held])
    assert not np.isin(held, np.concatenate([schedule[step] for step in range(40)])).any()
    run_ranks(2, *flags, "--out", two, "--fsdp")
    assert [r.get("hit") for r in log(two)] == [r.get("hit") for r in rows]
    file.write_text("\n".join(lines[::2] * 8))  # 96 pairs of 12 queries; then of 1
    assert "8 pairs are held out" in run(*flags, "--out", tmp_path / "groups", "--steps=1").stdout
    file.write_text("\n".join(lines[:1] * 30))
    refused("leaves none to hold out .* the same query", *flags, "--out", tmp_path / "few")


def rewrite_at_step_4(backward, model, batch, *rest):
    """Every record becomes another one of the same length."""
    if batch["step"] == 4:
        path = Path(sys.argv[sys.argv.index("--data") + 1])
        path.write_text(path.read_text().replace("shows one thing", "shows two hats"))
    return backward(model, batch, *rest)


def test_data_that_are_rewritten_during_a_run_end_it(world, tmp_path):
    file = tmp_path / "t.jsonl"
    shutil.copy(world / "train.jsonl", file)
    command = ["train.py", "--data", file, "--media", world, "--out", tmp_path / "out", *QUICK, "--steps=99",
               "--skip_bad", "--workers=0"]
    refused("t.jsonl: was changed while it was in use: record [0-9]+ is another", *command,
            patch=("train.backward", rewrite_at_step_4))
    assert len(log(tmp_path / "out")) == 5


REFUSED = {  # flags: what the error says
    "--preset=qwen2vl_2": "Did you mean 'qwen2vl_2b'", "--vision_lr=nan": "--vision_lr nan: needs at least 0",
    "--global_batch=1": "--global_batch 1: needs at least 2", "--save_every=0": "--save_every 0: needs at",
    "--decay=2": "--decay 2.0: needs a share of the run", "--scale=0": "--scale 0.0: needs a number above 0",
    "--warmup=1": "--warmup 1.0: needs a share of the run", "--epochs=inf": "above 0 and finite",
    "--rest_of_rationale=before": "'inside' or 'after'", "--latent_positions=rope": "mrope or cache",
    "--freeze_vision=no": "auto, true or false", "--codes": "leave it out",
    "--segments=8 --steps_per_segment=5": "at most 32", "--workers=16": "at most 15",
    "--matryoshka=16,x": "needs numbers of components", "--families=image_ret": "leave it out",
    "--matryoshka=16,128": "has 128 components; name fewer", "--moves=4": "leave it out",
    "--shape=tiny3 --max_pixels=800": "min_pixels 1024 is above max_pixels 800",
    "--fsdp": "torchrun", "--device=meta": "tools.dry_run",
    "--wandb=mine": "pip install wandb", "--dtype=bf16": "needs 'float32'",
    "--init=./nowhere": "no such checkpoint", "--resume": "no checkpoint of a run",
}
if not torch.cuda.is_available():
    REFUSED["--device=cuda"] = "no CUDA device"


@pytest.mark.parametrize("extra, why", REFUSED.items())
def test_training_refuses_what_cannot_work(world, tmp_path, monkeypatch, extra, why):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(world / "train.jsonl"), "--out", str(tmp_path)]
    with pytest.raises((SystemExit, DataError, FileNotFoundError), match=re.escape(why)):
        train.main([*flags, *extra.split()])


def test_errors_of_the_command_line_are_one_line_and_help_names_every_flag(on_world, tmp_path, capsys):
    command = [*on_world, "--out", tmp_path, "--steps=6"]
    refused("^error: ", *command, "--lr", "fast")
    refused(r"error: step \d, data set '(t2i|v2t)': loss nan", *command, "--lr=1e30", "--clip=1e30")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    help_ = capsys.readouterr().out
    assert [name for name in vars(train.Config()) if f"--{name} " not in help_] == [] and "torchrun" in help_


def test_checkpoints_come_at_stage_ends_every_save_every_and_at_the_end(train_here, tmp_path):
    with (mock.patch.object(torch, "save", wraps=torch.save) as save,
          mock.patch.object(torch.nn.utils, "clip_grad_norm_", wraps=torch.nn.utils.clip_grad_norm_) as clip,
          mock.patch.object(latent, "checkpoint", wraps=latent.checkpoint) as recompute):
        train_here("--out", tmp_path, "--steps=9", "--save_every=8", "--clip=0.5", "--checkpointing", *PAPER)
    assert [call.args[0]["step"] for call in save.call_args_list] == [2, 3, 4, 5, 7, 8, 9]
    assert [call.args[1] for call in clip.call_args_list] == [0.5] * 9
    assert recompute.call_count == 9 * 2 * 2 * 3  # steps x groups of rows x (prefill, suffix) x layers


def test_wandb_gets_the_rows_of_the_log(train_here, tmp_path, monkeypatch):
    wandb, out = mock.Mock(__spec__=mock.Mock(origin="here")), str(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train_here("--steps=2", "--wandb=mine", "--out", out)
    (start, _, first), *rows, (end, *_) = wandb.mock_calls
    assert first["project"] == "mine" and first["config"]["steps"] == 2
    assert rows == [mock.call.init().log(row, step=row["step"]) for row in log(out)]
    assert (start, end) == ("init", "init().finish")
    assert wandb_id(train.Config(out=out, resume=True)) == first["id"]  # goes on there
    assert wandb_id(train.Config(out=out)) != first["id"]  # another run


def test_tensorboard_gets_the_numbers_of_the_log(train_here, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_here("--steps=3", "--tensorboard", "--out", tmp_path)
    found, rows = events.EventAccumulator(str(tmp_path)).Reload(), log(tmp_path)
    for name in ("loss", "lr", "K", "answer"):
        seen = [(event.step, event.value) for event in found.Scalars(name)]
        assert seen == [(row["step"], pytest.approx(row[name])) for row in rows], name


def test_too_little_memory_is_an_error_that_says_what_helps(on_world, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    too_much = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(torch.optim.AdamW, "step", too_much)
    flags = ["--steps=2", "--workers=0", "--device=cpu", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*map(str, on_world), *flags])
    with pytest.raises(SystemExit, match="out of memory.*Lower --micro_tokens.*tools.dry_run"):
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")


def test_skip_bad_trains_on_the_rest_and_prints_the_count(on_world, world, tmp_path):
    lines = (world / "train.jsonl").read_text().splitlines()
    (tmp_path / "red bar.png").write_bytes(b"not a picture")
    lines[0] = lines[0].replace("red square.png", str(tmp_path / "red bar.png"))
    lines[3] = "{not json"
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    command = [*on_world, "--data", file, "--media", world, "--steps=6", "--out"]
    printed = run(*command, tmp_path / "out", "--skip_bad", "--save_every=2").stdout
    assert re.search(r"1 records left out at the start, [123] while training", printed)
    assert "record 4: not JSON" in printed
    assert re.search(r"left out: .*record 1: pos: .*red bar.png: cannot be used as a picture", printed)
