"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL want of pictures and clips, and a checkpoint's limits."""

import math
from dataclasses import asdict, dataclass, replace

from files.errors import DataError, quote


@dataclass(frozen=True)
class Backbone:
    """What a model type wants of pictures and clips."""

    patch: int = 14  # pixels of a patch's side
    merge: int = 2  # patches of a visual token's side
    temporal: int = 2  # frames of a patch
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of the pixels' channels; CLIP's
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    # How a clip tells the time of its frame pairs.  "steps": their M-RoPE positions are 0, 1, 2, ..
    # "seconds": they are seconds times `rate`.  "text": each pair is a picture, with "<1.2 seconds>" in front
    time: str = "steps"
    rate: int = 0  # positions a second; the configuration's

    @property
    def side(self):
        """Pixels of a visual token's side."""
        return self.patch * self.merge


QWEN2_VL = Backbone()
BACKBONES = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": Backbone(time="seconds"),
    "qwen3_vl": Backbone(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), time="text"),
}


@dataclass
class Limits:
    """Pixel and token limits.  They belong to the checkpoint: embeddings compare only under the same ones."""

    min_pixels: int = 56 * 56  # a picture is scaled up to this area
    max_pixels: int = 28 * 28 * 1280  # and down to this one
    video_min_pixels: int = 56 * 56  # the same for each frame of a clip
    video_max_pixels: int = 28 * 28 * 32
    num_frames: int = 8  # frames sampled from a clip; with fps at most
    fps: float = 0.0  # frames sampled from a second of a clip, see files.sampling; 0: num_frames
    frame_rate: float = 2.0  # frames a second of a clip that is given as frames; Qwen2-VL does not ask
    max_len: int = 8192  # tokens in one sequence: prefix, suffix, in training also the latent steps

    def __post_init__(self):
        if type(self.frame_rate) is not float or not 0 < self.frame_rate < math.inf:
            raise DataError(f"frame_rate {quote(self.frame_rate)}: needs a number above 0, as 2.0")
        if type(self.fps) is not float or not 0 <= self.fps < math.inf:
            raise DataError(f"fps {quote(self.fps)}: needs a number of at least 0, as 2.0")
        for name, value in vars(self).items():
            if name not in ("frame_rate", "fps") and (type(value) is not int or value < 1):
                raise DataError(f"{name} {quote(value)}: needs a whole number of at least 1")
        for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
            if vars(self)[low] > vars(self)[high]:
                raise DataError(f"{low} {vars(self)[low]} is above {high} {vars(self)[high]}")

    def check(self, backbone):
        """DataError where not even one visual token of this backbone is allowed."""
        least = backbone.side**2
        for name in ("max_pixels", "video_max_pixels"):
            if vars(self)[name] < least:
                raise DataError(f"{name} {vars(self)[name]}: needs a whole number of at least {least}, the "
                                f"{backbone.side}x{backbone.side} pixels of a visual token")


def facts_of(config):
    """Backbone of a configuration; DataError for one that computes something else than its family."""
    text, vision, facts = config.text_config, config.vision_config, BACKBONES[config.model_type]
    sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rope = text.rope_parameters or {}
    half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    axes = rope.get("mrope_section")
    three = isinstance(axes, list) and [type(n) for n in axes] == [int] * 3
    known = three and min(axes) >= 0 and sum(axes) == half and rope.get("rope_type") == "default"
    window = getattr(text, "use_sliding_window", False)
    if sizes != (facts.patch, facts.merge, facts.temporal) or not known or window:
        raise DataError(
            f"this backbone is not a plain {config.model_type}: needs patch size {facts.patch}, merge "
            f"{facts.merge}, temporal patch {facts.temporal}, default rotary embedding with an mrope_section "
            f"of 3 numbers that sum to {half}, no sliding window; has {sizes}, {quote(rope)}")
    return replace(facts, rate=getattr(vision, "tokens_per_second", 0))


def limits_of(model_type, **given):
    """Limits that are given for a Qwen2-VL -> a backbone's: as many visual tokens, of its own size."""
    larger = BACKBONES[model_type].side**2, QWEN2_VL.side**2
    limits = asdict(Limits(**given))
    return limits | {k: v * larger[0] // larger[1] for k, v in limits.items() if k.endswith("pixels")}
