"""Core seconds of training steps, for tools.speedrun, which has it run by the code of another folder, too.

    python -m tools.speedrun_steps [--FLAG VALUE ...]        flags of train.py

Reads numbers of stages from stdin; for each it trains STEPS steps and prints the core seconds of one.
"""

import engine.threads  # before torch

import sys
import time
from contextlib import nullcontext

import torch

import train
from data import Batches

STEPS = 42  # the first ones of the run: of each family about its share


class Config(train.Config):
    """train.py's flags: --help, and what is wrong, are told by engine.early, which reads this."""


def main(argv):
    cfg, given = train.parse_flags(train.Config, argv, __doc__)
    curriculum, pairs = train.check_flags(cfg, 1), train.read_pairs(cfg)
    schedule, _ = train.make_schedule(cfg, pairs)
    model = train.build_model(cfg, given, pairs, torch.device("cpu"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, fused=True)
    batches = Batches(pairs, model.processor, curriculum)
    for line in sys.stdin:
        stage, begin = curriculum.stages[int(line)], time.process_time()
        for step in range(STEPS):
            batch = batches[step, stage, schedule[step % schedule.steps]]
            train.backward(model, batch, cfg, nullcontext())
            torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        print("core seconds", (time.process_time() - begin) / STEPS, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
