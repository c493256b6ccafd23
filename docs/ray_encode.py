"""In PLUME's folder; absolute media paths; GPUS of an actor: 1 or 0; OUT: a new folder.

    PYTHONPATH=$PWD python docs/ray_encode.py CORPUS.jsonl OUT CHECKPOINT ACTORS GPUS"""

import os
import sys

import ray  # pip install "ray[data]"

from model import Plume


class Encoder:
    def __init__(self, checkpoint):
        self.model = Plume.from_pretrained(checkpoint)

    def __call__(self, table):
        rows, bad = table.to_pylist(), {}
        items = [{k: v for k, v in row.items() if v is not None and k != "_id"} for row in rows]
        vectors = self.model.encode(items, prompt="document", bad=bad)  # an unknown key is a bad item
        why = [bad.get(i, "") for i in range(len(rows))]  # with NaN in its vector
        return dict(_id=[row["_id"] for row in rows], vector=vectors, why=why)

if __name__ == "__main__":
    corpus, out, checkpoint, actors, gpus = sys.argv[1:]
    os.mkdir(out)  # a second run would add to it
    ray.init(runtime_env=dict(env_vars=dict(PYTHONPATH=os.getcwd())))
    ray.data.read_json(corpus, lines=True).map_batches(
        Encoder, fn_constructor_args=[checkpoint], batch_size=512, batch_format="pyarrow", num_cpus=0.5,
        num_gpus=float(gpus), compute=ray.data.ActorPoolStrategy(size=int(actors))).write_parquet(out)
