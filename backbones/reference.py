"""A collated batch as transformers' own models take it: what our numbers are compared with."""

import torch

from backbones.vision import normalised

MEDIA = (  # value in mm_token_type_ids, and the names of the inputs
    (1, "pixel_values", "image_grid_thw"),
    (2, "pixel_values_videos", "video_grid_thw"))


def transformers_inputs(batch, processor):
    """A batch of data.collate -> keyword arguments of transformers' model, without positions."""
    ids, token = batch["ids"], processor.id  # (B, P)
    real = torch.arange(ids.shape[1], device=ids.device) < batch["lengths"][:, None]
    inputs = dict(input_ids=ids, attention_mask=real.long())
    if batch["pixels"] is None:
        return inputs
    kinds = (ids == token["<|image_pad|>"]).int() + 2 * (ids == token["<|video_pad|>"]).int()
    inputs["mm_token_type_ids"] = kinds
    grid, merge = batch["grid"], processor.backbone.merge
    sizes = grid.prod(1)  # patches of each medium
    first = (sizes.cumsum(0) - sizes) // merge**2  # place of its first token among those of all media
    kind_of = kinds.flatten()[batch["media"]][first]
    patches = normalised(batch["pixels"], processor.backbone).split(sizes.tolist())
    for kind, pixels_name, grid_name in MEDIA:
        mine = (kind_of == kind).nonzero()[:, 0].tolist()
        if mine:
            inputs[pixels_name] = torch.cat([patches[i] for i in mine])
            inputs[grid_name] = grid[mine].to(ids.device)
    return inputs
