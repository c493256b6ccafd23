"""What python -m tools.encode takes beside Plume.encode, in CPU seconds by turns.  In PLUME's folder:

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python docs/encode_overhead.py
"""

import contextlib
import io
import json
import os
import shutil
import time

from PIL import Image

from model import Plume
from tools import encode

FOLDER = os.path.abspath("out/overhead")
os.makedirs(FOLDER, exist_ok=True)
items = [{"text": f"the {n} of {n % 97} things"} for n in range(500)]
model = Plume.random([item["text"] for item in items])
for n in range(20):
    Image.new("RGB", (200, 150), (n, 2 * n, 255 - n)).save(f"{FOLDER}/{n}.png")
    items.append({"image": f"{FOLDER}/{n}.png"})
with open(f"{FOLDER}/items.jsonl", "w") as f:
    f.write("\n".join(map(json.dumps, items)))
encode.load_model = lambda *given: model
took = {"Plume.encode": 0, "tools.encode": 0}
for turn in range(60):
    name = list(took)[turn % 2]
    shutil.rmtree(f"{FOLDER}/vectors", ignore_errors=True)
    begun = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if name == "Plume.encode":
            model.encode(items)
        else:
            encode.main([f"{FOLDER}/items.jsonl", f"{FOLDER}/vectors"])
    took[name] += time.process_time() - begun
print(took, f"{took['tools.encode'] / took['Plume.encode'] - 1:.1%}")
