"""What one item of MMEB-V2 costs with the 2B model and 8 latent steps, counted on shapes alone.

    PYTHONPATH=$PWD python docs/mmeb_cost.py
"""

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data import collate, to_device
from files.items import parse_item
from hub.settings import RELEASED_PROMPT
from model import Plume
from tools.counts import UNKNOWN_TO_TORCH


def picture(width, height):
    return {"image": Image.new("RGB", (width, height))}


items = {
    "label": "bread",
    "question": "summarize the entire input in a word or sentence " * 6,
    "picture 448 x 448": picture(448, 448),
    "picture 640 x 480": picture(640, 480),
    "clip": {"video": [picture(640, 480)["image"]] * 8},
    "page": picture(1240, 1754),
}
model = Plume.random([RELEASED_PROMPT] * 20, "qwen2vl_2b", device="meta").eval()
for name, item in items.items():
    sample = model.processor.render(parse_item(item))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as flops:
        model.embed(to_device(collate([sample], model.processor), "meta"), "latent", 8)
    print(f"{name:18}{len(sample['ids']):5} tokens {flops.get_total_flops() / 1e12:5.2f} TFLOP")
