"""What has never run on a GPU, in one command, about ten minutes on one.

    python -m tools.first_gpu --ckpt DIR                    a checkpoint
    python -m tools.first_gpu                               random weights in the shape of Qwen2-VL-2B
    python -m tools.first_gpu --device cpu --shape tiny     here; what needs CUDA is left out

    tests      pytest -k cuda: graphs against the plain rollout, embeddings against the CPU's
    ranks      on several GPUs: train.py's losses on all, as copies and as shards, against those on one
    equality   the four modes against the CPU: in float32 to 1e-4; in bfloat16 the least cosine
    graphs     CUDA graphs against the plain rollout, in float32 to 1e-4
    training   a step, recomputation on: the most memory, against tools.dry_run's number; time; MFU, the share
               of the peak rate that its FLOP without recomputation make
    latency    tools.speed's table for queries of one picture

--out gets one JSON, written again after every part; the markdown table at the end is for docs/gpu.md.  A part
that fails is recorded with its error, and the rest goes on; then the exit status is 1.
"""

import engine.threads  # before torch

import gc
import time
from dataclasses import dataclass

import torch

from backbones.shapes import SHAPES
from engine.flags import command, parse_flags, whole_numbers
from engine.ranks import pick_device
from files.errors import DataError, nearest
from files.writing import writable, write_json
from hub.weights import side_by_side
from tools.first_gpu_parts import (
    cuda_tests, equality, graphs_equal, latency, random_or_loaded, ranks_agree, ROOT, training)

NO_CUDA, ONE_GPU, NO_TESTS = "not run: no CUDA", "not run: one GPU", "not run: no tests/ here"


@dataclass
class Config:
    ckpt: str = ""  # checkpoint folder or hub name; default: random weights
    shape: str = "qwen2vl_2b"  # of random weights: qwen2vl_2b, qwen3vl_2b, mid, tiny, tiny3
    device: str = ""  # cuda, mps or cpu; default: the best there is
    out: str = "first_gpu.json"  # file that gets the numbers
    batch_sizes: str = "1,32"  # queries in a batch of the latency table, with commas between
    tokens: int = 403  # of a written rationale there
    pairs: int = 8  # in the training step


class Report:
    """What was measured so far, in a file that is whole at every moment."""

    def __init__(self, path, **head):
        self.path, self.begun, self.numbers = path, time.perf_counter(), dict(head, parts={})

    def part(self, name, function, *given, unless=""):
        """Runs one; unless: why it is left out."""
        begun, found = time.perf_counter(), dict(result=unless)
        if not unless:
            try:
                found = function(*given)
            except Exception as e:  # whatever it is: nobody has seen it before, and the other parts shall run
                found = dict(error=f"{type(e).__name__}: {e}"[-2000:])
        found["seconds"] = time.perf_counter() - begun
        self.numbers["parts"][name] = found
        write_json(self.path, self.numbers)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{time.perf_counter() - self.begun:5.0f} s  {name}: {self.told(found)}", flush=True)

    @staticmethod
    def told(found):
        line = found.get("result", "")
        if "error" in found:
            line = f"FAILED: {found['error'].splitlines()[0][:300]} {line}"
        return line

    def table(self):
        what = ", ".join(self.numbers[name] for name in ("device", "model", "date"))
        lines = [f"| part | {what} | seconds |", "| --- | --- | --- |"]
        for name, found in self.numbers["parts"].items():
            told = self.told(found).replace("|", "/")
            lines.append(f"| {name} | {told} | {found['seconds']:.0f} |")
        return "\n".join(lines)


def main(argv):
    cfg, given = parse_flags(Config, argv, __doc__)
    if cfg.shape not in SHAPES or cfg.ckpt and "shape" in given:
        raise DataError(f"--shape {cfg.shape!r}: one of {', '.join(SHAPES)}, and without --ckpt."
                        f"{nearest(cfg.shape, SHAPES)}")
    if not writable(cfg.out):
        raise DataError(f"--out {cfg.out!r}: name a file in a folder that exists")
    if min(cfg.tokens, cfg.pairs) < 2:
        raise DataError(f"--tokens {cfg.tokens} and --pairs {cfg.pairs}: need at least 2")
    sizes = whole_numbers("batch_sizes", cfg.batch_sizes, ",", "numbers of at least 1, as 1,32")
    device, dtype = pick_device(cfg.device or None)
    cuda = device.type == "cuda"
    torch.backends.cudnn.allow_tf32 = False  # a convolution of Qwen3-VL's would have other digits
    report = Report(
        cfg.out, date=time.strftime("%Y-%m-%d"), device=torch.cuda.get_device_name() if cuda else str(device),
        gpus=torch.cuda.device_count(), torch=torch.__version__, cuda=torch.version.cuda, dtype=str(dtype),
        model=cfg.ckpt or f"random weights, {cfg.shape}")

    no_cuda = "" if cuda else NO_CUDA
    no_tests = "" if (ROOT / "tests").is_dir() else NO_TESTS
    one_gpu = "" if torch.cuda.device_count() > 1 else ONE_GPU
    model = random_or_loaded(cfg.ckpt, cfg.shape)  # first: --ckpt may be wrong
    report.part("tests", cuda_tests, unless=no_cuda or no_tests)
    report.part("ranks", ranks_agree, "cuda", torch.cuda.device_count(), unless=no_cuda or one_gpu)
    report.part("equality", equality, model, device)
    side_by_side(model.to(device))
    report.part("graphs", graphs_equal, model, unless=no_cuda)
    report.part("training", training, model, dtype, cfg.pairs)
    model.zero_grad()
    report.part("latency", latency, model, dtype, sizes, cfg.tokens)
    print(f"\n{report.table()}\n\n{cfg.out} has all numbers")
    return int(any("error" in found for found in report.numbers["parts"].values()))


if __name__ == "__main__":
    command(main)
