"""Which frames of a clip are taken: a fixed number of them, or so many a second up to that number."""

import numpy as np

LEAST_FRAMES = 4  # that `fps` takes of a clip, if it has so many: Qwen3-VL's own rule


def frames_taken(total, rate, count, fps):
    """How many of the `total` frames of a clip are taken, which has `rate` a second.

    With fps so many a second, at least LEAST_FRAMES and at most `count`; without, `count`.  Or all there are.
    """
    if fps:
        count = min(max(int(total / rate * fps), LEAST_FRAMES), count)
    return min(count, total)


def evenly_spaced(total, count):
    """-> numbers of `count` of them, the first and the last among these"""
    return [round(i) for i in np.linspace(0, total - 1, count)]
