"""The vision towers over transformers' modules: patches -> features of the visual tokens."""

import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights, get_vision_position_ids, get_vision_window_index)

from backbones.families import QWEN2_VL
from latent import rotate


def normalised(patches, backbone=QWEN2_VL):
    """Patches (n, 6 patch^2) uint8 -> float32, as the backbone's own processor gives them.

    They travel as bytes: a quarter of the memory, and of what is copied to a device.
    """
    x = patches.view(len(patches), 3, -1).float() * (1 / 255)
    for channel in range(3):
        x[:, channel].sub_(backbone.mean[channel]).mul_(1 / backbone.std[channel])  # / is slow on a CPU
    return x.flatten(1)


def vision_features(visual, pixels, grid):
    """The vision tower: patches -> features of the visual tokens (M, D), and those that the decoder's first
    layers add, one (M, D) each (Qwen3-VL alone has some).

    visual: transformers' module; pixels: (N, 3 temporal patch^2) normalised patches of all frames,
    N = merge^2 M; grid: on the CPU, (t, h, w) in patches of each picture and clip.
    """
    if isinstance(visual, Qwen2VisionTransformerPretrainedModel):
        return qwen2_features(visual, pixels, grid), ()
    seen = visual(pixels, grid_thw=grid, **precomputed(visual, grid, pixels.device))
    return seen.pooler_output, tuple(getattr(seen, "deepstack_features", ()))


def precomputed(visual, grid, device):
    """What the tower would compute from the grid, where the device would have to be waited for."""
    merge = visual.spatial_merge_size
    known = dict(position_ids=get_vision_position_ids(grid, merge))
    if hasattr(visual, "pos_embed"):  # Qwen3-VL: a table of positions, interpolated
        known["interp_indices"], known["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners,
            merge)
    ends = {}
    if hasattr(visual, "window_size"):  # Qwen2.5-VL: most layers attend within windows
        known["window_index"], ends["cu_window_seqlens"] = get_vision_window_index(
            grid, merge, visual.window_size, visual.patch_size)
    return {name: value.to(device, non_blocking=True) for name, value in known.items()} | ends


def qwen2_features(visual, pixels, grid):
    """Qwen2-VL's tower, as `vision_features`.

    Two things are faster than in the module: the patch embedding is one product and not a convolution, and
    frames of as many patches are attended together (docs/speed.md).
    """
    order, places, groups = frames_by_size(grid, visual.spatial_merge_size)
    order, places = (index.to(pixels.device, non_blocking=True) for index in (order, places))
    x = F.linear(pixels[order], visual.patch_embed.proj.weight.flatten(1))
    cos, sin = visual.rotary_pos_emb(x, places)
    sin[:, : sin.shape[1] // 2].neg_()  # the minus of `rotate`
    for layer in visual.blocks:
        x = x + attend_frames(layer.attn, layer.norm1(x), cos[:, None], sin[:, None], groups)
        x = x + layer.mlp(layer.norm2(x))
    merged = visual.merger(x)
    each = visual.spatial_merge_size**2  # patches of a token, which stand side by side
    tokens = order[::each] // each
    return torch.empty_like(merged).index_copy(0, tokens, merged)


def frames_by_size(grid, merge):
    """How frames of as many patches come to stand together, small ones first; all on the CPU.

    -> order (N,): which patch stands n-th; places (N, 2): its row and column in its frame; groups: (frames,
    patches of each) of every size.
    """
    frames = grid.repeat_interleave(grid[:, 0], 0)[:, 1:]  # (h, w) of every frame
    sizes = frames.prod(1)
    order = sizes.repeat_interleave(sizes).argsort(stable=True)
    by_size = sizes.argsort(stable=True)
    places = patch_places(frames[by_size], sizes[by_size], merge)
    each, count = sizes.unique(return_counts=True)
    return order, places, list(zip(count.tolist(), each.tolist()))


def patch_places(frames, sizes, merge):
    """(h, w) and h * w of every frame -> row and column of every patch, (N, 2), those of a token together."""
    nth = torch.arange(sizes.sum()) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # in its frame
    token, inside = nth // merge**2, nth % merge**2
    tokens_wide = frames[:, 1].repeat_interleave(sizes) // merge
    rows = token // tokens_wide * merge + inside // merge
    columns = token % tokens_wide * merge + inside % merge
    return torch.stack([rows, columns], 1)


def attend_frames(att, x, cos, sin, groups):
    """Every frame attends to itself: x (N, D), cos and sin (N, 1, d), groups of (frames, patches of each)."""
    q, k, v = att.qkv(x).view(len(x), 3, att.num_heads, -1).unbind(1)  # (N, H, d) each
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    seen, begin = [], 0
    for n, size in groups:
        end = begin + n * size
        group = [t[begin:end].unflatten(0, (n, size)).transpose(1, 2) for t in (q, k, v)]  # (n, H, size, d)
        seen.append(F.scaled_dot_product_attention(*group).transpose(1, 2).flatten(0, 1))
        begin = end
    return att.proj(torch.cat(seen).flatten(1))
