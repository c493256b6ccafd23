"""Queries in one mode and the index in another: hit@1, and what a query and a document cost.

    pip install matplotlib
    python -m tools.one_space --png one_space.png                          turtle world, train.py's checkpoint
    python -m tools.one_space --ckpt out/a/checkpoint out/b/checkpoint     several, perhaps of other seeds
"""

import engine.threads  # before torch

from dataclasses import dataclass

import numpy as np
import torch

from engine.flags import command, parse_flags
from eval import per_query_scores
from files.writing import write_json
from tasks.find import find_tasks, load_model, select
from tools.plots import check_output, new_figure, save_figure

BATCH = 32  # items encoded together
MODES = ("latent", "single")
WAYS = [(asked, indexed) for asked in MODES for indexed in MODES]


@dataclass
class Config:
    ckpt: tuple = ("out/checkpoint",)  # checkpoint folders or hub names
    png: str = "one_space.png"  # the picture to draw
    json: str = ""  # also write the rows to this file
    data: str = ""  # folder of the tasks; default: turtle world
    task: str = "all"  # as eval.py's: all, a meta-task (video_ret), a data set, several with commas between
    device: str = ""  # cuda, mps or cpu; default: the best there is
    dtype: str = ""  # float32 or bfloat16; default: bfloat16 where it is fast


def measure(model, tasks):
    """[Task] -> a row for each two modes: mean hit@1 of the tasks, ms a query and a document, the model's."""
    vectors, ms = {}, {}
    for mode in MODES:
        model.encode(tasks[0].queries[:BATCH], mode, None, BATCH)  # the first call is slower
        for side in ("queries", "corpus"):
            items, took = [getattr(task, side) for task in tasks], dict(seconds=0.0, tokens=0)
            vectors[side, mode] = [
                torch.from_numpy(model.encode(some, mode, None, BATCH, f"{side}, {mode}", took=took))
                for some in items]
            ms[side, mode] = 1e3 * took["seconds"] / sum(map(len, items))
    rows = []
    for asked, indexed in WAYS:
        both = zip(tasks, vectors["queries", asked], vectors["corpus", indexed])
        hits = [per_query_scores(task, of)[1]["hit@1"].mean() for task, *of in both]
        rows.append(dict(queries=asked, index=indexed, hit=float(np.mean(hits)),
                         query_ms=ms["queries", asked], document_ms=ms["corpus", indexed]))
    return rows


def draw(rows, path):
    figure, (axes,) = new_figure(900, 560)
    for way in WAYS:
        mine = [row for row in rows if (row["queries"], row["index"]) == way]
        label = "queries {}, {:.2f} ms each; index {}".format(way[0], mine[0]["query_ms"], way[1])
        axes.plot([row["document_ms"] for row in mine], [row["hit"] for row in mine], "o", label=label)
    axes.set(xlabel="milliseconds a document", xlim=(0, None), ylabel="hit@1", ylim=(-0.08, 1.08))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(color="#dddddd")
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path)


def main(argv):
    cfg, _ = parse_flags(Config, argv, __doc__)
    check_output("png", cfg.png, cfg.json)
    rows = []
    for path in cfg.ckpt:
        model = load_model(path, cfg.device, cfg.dtype)
        names, make = find_tasks(cfg.data, model.processor, prompts=model.settings["prompts"])
        tasks = [make(name) for name in select(names, cfg.task, cfg.data or "turtle world")]
        rows += [dict(row, ckpt=path) for row in measure(model, tasks)]
    print(f"{'queries':9}{'index':9}{'hit@1':>8}{'ms/query':>10}{'ms/document':>13}   checkpoint")
    for row in rows:
        print("{queries:9}{index:9}{hit:8.1%}{query_ms:10.2f}{document_ms:13.2f}   {ckpt}".format(**row))
    draw(rows, cfg.png)
    print(f"cost against accuracy: {cfg.png}")
    if cfg.json:
        write_json(cfg.json, dict(data=cfg.data, batch_size=BATCH, rows=rows))


if __name__ == "__main__":
    command(main)
