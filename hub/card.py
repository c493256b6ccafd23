"""What a checkpoint holds for others: model card, chat template, what sentence-transformers reads."""

import json
import os
import shlex
import shutil
import string
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from files.writing import write_errors, write_json
from hub.folders import CARD, HUB_FILES, ST_CONFIG
from hub.prompts import prefixes
from hub.weights import count_parameters, read_json

HERE = Path(__file__).parent
NOT_ON_CARD = ("out", "resume", "wandb", "media", "device")  # of this machine, not of the recipe


def about_run(cfg, done, steps, scored):
    """What the model card tells of the run, in Markdown; scored: its last hit@1, or ""."""
    default, flags = asdict(type(cfg)()), []
    for name, value in asdict(cfg).items():
        if value != default[name] and name not in NOT_ON_CARD:
            flags.append(f"--{name} {shlex.quote(str(value))}")
    data = "pairs of turtle world" if not cfg.data else "the pairs of --data"
    lines = [f"{done:,} of {steps:,} steps on {data}:", "```", " ".join(["python train.py", *flags]), "```"]
    if scored:
        lines.append(f"hit@1 {scored}.")
    return "\n".join(lines)


def write_hub_files(model, folder, run="Nothing is known here about its training.", size=None):
    """What sentence-transformers reads, and a model card.

    run: how it was trained, in Markdown; size: numbers in the weights that are written, if not the model's.
    """
    text = template_file("card.md").substitute(
        backbone=model.backbone.config.model_type, dim=model.lm.config.hidden_size,
        size=f"{(size or count_parameters(model)) / 1e6:,.1f}", steps=model.settings["latent_steps"], run=run,
        settings=json.dumps(model.settings, indent=1, ensure_ascii=False),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}")
    with write_errors(folder):
        Path(folder, CARD).write_text(text, encoding="utf-8", errors="backslashreplace")
        for name in HUB_FILES:
            shutil.copyfile(HERE / name, Path(folder, name))
    config = read_json(HERE / ST_CONFIG)
    write_json(os.path.join(folder, ST_CONFIG), config | dict(prompts=prefixes(model.settings["prompts"])))


def chat_template(processor):
    """What `Processor.sequence` does, as a Jinja template.  Special tokens in a text are tokens there."""
    anchor = processor.template["anchor"].replace("{prompt}", processor.prompt)
    values = dict(
        before=processor.before, behind=anchor + processor.behind, white_image=processor.white_image)
    literals = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return template_file("chat_template.jinja").substitute(literals)


def template_file(name):
    """A file of this folder with $names to fill in."""
    return string.Template((HERE / name).read_text(encoding="utf-8"))
