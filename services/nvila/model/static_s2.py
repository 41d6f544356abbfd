"""Static S2: a square picture at several scales, as VILA-1.5 had it (NVILA-SPEC §3.6; arXiv:2403.13043).

No published NVILA model uses it; older checkpoints do (`s2: true`). Unlike Dynamic-S2 it resizes float pixels, not the
picture, always squares, and treats images and video frames alike. Follows `forward` of the s2wrapper package
(bfshi/scaling_on_scales).

B pictures · N tiles · T tokens · C tower channels · S side of a picture in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nvila.model.dynamic_s2 import merge_chessboard, split_chessboard, tokens_to_maps


def static_s2_features(
    pixels_B3SS: Tensor,
    tower: Callable[[Tensor], Tensor],
    scales_px: Sequence[int],
    *,
    max_tile_px: int,
    merge_index: int = 0,
) -> Tensor:
    """Features of square pictures: (B, T, len(scales) · C), all scales brought to the size of scale `merge_index`.

    pixels_B3SS: normalised float pixels of any side, resized to each scale by bicubic interpolation without
    antialiasing, rounded to their own dtype and cut into squares of at most `max_tile_px`, which must divide them
    evenly. `tower`: (N, 3, s, s) to (N, t, C). The merging averages areas in float32.
    """
    maps = []
    for side_px in scales_px:
        splits = math.ceil(side_px / max_tile_px)
        sized = functional.interpolate(pixels_B3SS.float(), size=(side_px, side_px), mode="bicubic")
        tiles_N3ss = split_chessboard(sized.to(pixels_B3SS.dtype), splits, splits)
        maps.append(merge_chessboard(tokens_to_maps(tower(tiles_N3ss)), splits, splits))
    size = maps[merge_index].shape[-2:]
    resized = [functional.interpolate(x.float(), size=size, mode="area").to(x.dtype) for x in maps]
    return torch.cat(resized, 1).flatten(2).transpose(1, 2)
