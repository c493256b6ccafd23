"""The parts of tools.first_gpu.

Each gives a dict of numbers, with `result`, a line about them, and `error` when they are wrong.
"""

import copy
import json
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

import train
from curriculum import Curriculum
from data import Batches, to_device
from engine.trained import choose_trained
from hub.weights import count_parameters, side_by_side, without_weights
from model import Plume
from tasks.turtle import World
from tools import speed, speed_methods
from tools.counts import bytes_counter, count_work, peak_rates, rounds
from tools.dry_run import bytes_of_a_rank, GIB, micro_batch_bytes

ROOT = Path(__file__).parent.parent
SIDE = 448  # pixels of a picture
STAGE = Curriculum().stages[-2]  # of the training step: 8 latent steps, and the answer is still written
MODES = ("single", "latent", "cot", "auto")
DATA_SHEET = {  # FLOP a second of dense bfloat16 products, by NVIDIA; the first name that fits counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12}


def random_or_loaded(ckpt, shape):
    """The model in float32 on the CPU."""
    return speed.load_model(speed.Config(ckpt, shape, "cpu", "float32"), SIDE**2)


def checked(found, fine, why):
    return found if fine else dict(found, error=why)


# ---- programs of their own
def output_of(*argv, seconds):
    """What a command in the repository prints; RuntimeError with the end of it when it fails."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(argv, cwd=ROOT, **pipes) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks then
            raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv[:6])} ..: status {process.returncode}: {printed[-1500:]}")
    return printed


def cuda_tests():
    """test_latent.py has all tests that need CUDA."""
    argv = "-m", "pytest", "-q", "-k", "cuda", "-p", "no:cacheprovider", "tests/test_latent.py"
    return dict(result=output_of(sys.executable, *argv, seconds=200).strip().splitlines()[-1])


RUN = ["--shape=tiny", "--dtype=float32", "--steps=3", "--gate=0", "--replay=0", "--last_stage=0.9",
       "--workers=1"]
LOSSES = ("ce", "gen", "disc", "bal", "norm")


def ranks_agree(device, ranks):
    """Three steps of train.py on all GPUs, as copies and with --fsdp, and on one."""
    python, logs = [sys.executable], {}
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    ways = dict(
        one=[*python, "train.py"], copies=[*torchrun, "train.py"], shards=[*torchrun, "train.py", "--fsdp"])
    with tempfile.TemporaryDirectory() as folder:
        for name, start in ways.items():
            out = Path(folder, name)
            flags = [*RUN, f"--device={device}", f"--global_batch={4 * ranks}", f"--out={out}"]
            output_of(*start, *flags, seconds=150)
            logs[name] = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    one, *others = [np.array([[row[name] for name in LOSSES] for row in rows]) for rows in logs.values()]
    worst = float(max(np.max(np.abs(other - one) / (0.05 + np.abs(one))) for other in others))
    result = f"{ranks} ranks: losses and norms differ by {worst:.1e}"
    found = dict(ranks=ranks, difference=worst, result=result)
    return checked(found, worst < 2e-3, "that is more than 2e-3")


# ---- embeddings
def embeddings(model):
    """Of texts and a picture, in each mode -> {mode: (3, D)}"""
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    items = ["a red square", {"text": "What is this?", "image": noise}, "which turtle turns left? " * 8]
    with warnings.catch_warnings(), mock.patch.dict(model.settings, adaptive=True):  # as mode auto needs it
        warnings.simplefilter("ignore")
        return {mode: model.encode(items, mode, limit=8) for mode in MODES}


def equality(model, device):
    on_cpu, there = embeddings(model), embeddings(side_by_side(model.to(device)))
    half = embeddings(side_by_side(copy.deepcopy(model).to(torch.bfloat16)))
    differs = {mode: float(np.abs(there[mode] - on_cpu[mode]).max()) for mode in MODES}
    cosine = {mode: float((half[mode] * on_cpu[mode]).sum(1).min()) for mode in MODES}
    told = ", ".join(f"{mode} {differs[mode]:.1e} and {cosine[mode]:.4f}" for mode in MODES)
    found = dict(float32=differs, bfloat16=cosine, result=f"float32 differs by, bfloat16's cosine: {told}")
    fine = all(value <= 1e-4 for value in differs.values())
    return checked(found, fine, "float32 differs by more than 1e-4")


@torch.no_grad()
def graphs_equal(model):
    batch = speed_methods.speed_batch(model, (SIDE, SIDE, 0), (0, 0), 2)
    graphs, (plain, _) = speed_methods.Graphs(), model.embed(batch, "latent", 8)
    for _ in range(3):  # as usual, recorded, replayed
        replayed, _ = speed_methods.replayed(model, batch, graphs)
    worst = float((replayed - plain).abs().max())
    found = dict(difference=worst, recorded=len(graphs.recorded), result=f"differ by {worst:.1e}")
    return checked(found, worst <= 1e-4 and graphs.recorded, "another embedding, or no graph was recorded")


# ---- a training step
def on_paper(model, groups, settings):
    """FLOP of forward and backward without recomputation, bytes of a rank with it: of shapes, on "meta"."""
    with torch.device("meta"):
        shapes = Plume(without_weights(model.backbone.config), model.processor.tokenizer, model.settings)
    choose_trained(settings, shapes)
    groups = [to_device(group, shapes.device) for group in groups]

    def forward_and_backward():
        sum(x.sum() for x in tree_leaves(shapes(groups, STAGE.latent_steps))).backward()

    flop, _ = count_work(forward_and_backward, shapes.device)
    shapes.checkpointing = True
    _, forward, peak = micro_batch_bytes(shapes, groups, STAGE.latent_steps)
    weights = 4 * count_parameters(shapes)
    return flop, bytes_of_a_rank(weights, shapes, torch.float32, forward, peak)[0]


def stepping(model, batch, settings):
    """-> train.py's step as a function of autocast, and the bytes of all that is there between two of them"""
    choose_trained(settings, model)
    model.checkpointing = True
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def step(autocast):
        train.backward(model, batch, settings, autocast)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # they are there from the second micro-batch on

    step(nullcontext())
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    return step, sum(t.nbytes for t in (*model.parameters(), *(p.grad for p in trained), *moments))


def training(model, dtype, count):
    """Of so many pairs with a picture each; float32 is what can be counted on paper."""
    settings, pairs = train.Config(freeze_vision="true"), World("train", "image_qa")
    pairs.backbone, model.processor.limits.min_pixels = model.processor.backbone, SIDE**2
    batch = Batches(pairs, model.processor, Curriculum())[0, STAGE, np.arange(count)]
    flop, predicted = on_paper(model, batch["micro"][0], settings)
    device, measured = model.device, {}
    rate, _ = peak_rates(device, dtype)  # which takes 8 GiB on a GPU: before there are gradients and moments
    step, there = stepping(model, batch, settings)
    mixed = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    for name, autocast in (("float32", nullcontext()), ("mixed", mixed)):
        with bytes_counter(device) as counter:
            step(autocast)
        measured[name] = there + counter.peak
    seconds = float(np.median(rounds(dict(step=partial(step, mixed)), 4, device)["step"]))
    off = predicted / measured["float32"] - 1
    plain, usual = measured["float32"] / GIB, measured["mixed"] / GIB
    told = [f"in float32 {plain:.2f} GiB, by tools.dry_run {predicted / GIB:.2f} ({off:+.1%})",
            f"as in train.py {usual:.2f} GiB and {1e3 * seconds:.0f} ms",
            f"MFU {flop / seconds / rate:.1%} of a large product's rate"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    sheet = next((known for word, known in DATA_SHEET.items() if word in name), None)
    if sheet:
        told.append(f"MFU {flop / seconds / sheet:.1%} of the data sheet's")
    found = dict(columns=batch["columns"], flop=flop, seconds_a_step=seconds, predicted=predicted,
                 measured=measured, rate=rate, data_sheet=sheet, result="; ".join(told))
    return checked(found, abs(off) <= 0.1, "tools.dry_run is off by more than 10%")


# ---- speed
def latency(model, dtype, sizes, tokens):
    side_by_side(model.to(dtype))
    rates, rows, told = peak_rates(model.device, dtype), [], []
    shown = ("single", "latent, K = 8", speed_methods.GRAPH, f"cot, {tokens} tokens")
    for size in sizes:
        batch = speed_methods.speed_batch(model, (SIDE, SIDE, 0), (0, 0), size)
        measured = speed.measure_speed(model, batch, speed.Config(tokens=tokens, repeats=3), rates)
        print(f"{size} queries a batch\n{speed.speed_table(measured)}")
        cells = [f"{row['method']}: {row['ms']:.1f}" for row in measured if row["method"] in shown]
        told.append(f"batch of {size}, ms a query: {', '.join(cells)}")
        rows += measured
    return dict(flops=rates[0], bytes_per_s=rates[1], rows=rows, result="; ".join(told))
