"""Fewer tokens from the same features: space-to-channel, and pooling over time and space (NVILA-SPEC §4, §5.3).

F frames · N tiles · T tokens · C channels · D language-model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nvila.errors import InvalidRequest
from nvila.types import Level


def space_to_channel(x_NTC: Tensor, block: int) -> Tensor:
    """Join each `block` × `block` square of neighbouring tokens into one with block² · C channels (`DownSampleBlock`).

    x_NTC: (tiles, side², channels), row-major. A side that `block` does not divide is extended by zero rows below, then
    zero columns on the right. Cells of a square follow each other row by row, each with its channels together.
    Returns (tiles, ceil(side / block)², block² · C).
    """
    tiles, tokens, channels = x_NTC.shape
    side = square_side(tokens)
    missing = -side % block
    x_NHWC = functional.pad(x_NTC.reshape(tiles, side, side, channels), (0, 0, 0, missing, 0, missing))
    out = (side + missing) // block
    cells = x_NHWC.reshape(tiles, out, block, out, block, channels).transpose(2, 3)
    return cells.reshape(tiles, out * out, block * block * channels)


def pool_frames(x_FTD: Tensor, pool: tuple[int, int, int]) -> Tensor:
    """Average runs of frames, then of rows, then of columns, without overlap (`TSPVideoEncoder`, spec §5.3).

    x_FTD: (frames, side², width), any float dtype, in which the means are taken. `pool`: (frames, rows, columns).
    Returns (F / frames, (side / rows) · (side / columns), D). Raises `InvalidRequest` when a size does not divide.
    """
    by_time, by_row, by_column = pool
    frames, tokens, width = x_FTD.shape
    side = square_side(tokens)
    if frames % by_time or side % by_row or side % by_column:
        raise InvalidRequest(
            f"{frames} frames of {side}×{side} tokens cannot be pooled by {by_time}×{by_row}×{by_column}"
        )
    x = x_FTD.reshape(frames // by_time, by_time, side, side, width).mean(1)
    x = x.reshape(-1, side // by_row, by_row, side, width).mean(2)
    x = x.reshape(-1, side // by_row, side // by_column, by_column, width).mean(3)
    return x.flatten(1, 2)


def pool_levels(x_FTD: Tensor, pool_sizes: Sequence[tuple[int, int, int]]) -> tuple[Tensor, tuple[Level, ...]]:
    """Every pooling level of a run of frames, one after the other: rows of a token record (T, D), and their layout."""
    pooled = [pool_frames(x_FTD, pool) for pool in pool_sizes]
    return torch.cat([x.flatten(0, 1) for x in pooled]), tuple(Level(x.shape[0], x.shape[1]) for x in pooled)


def square_side(tokens: int) -> int:
    side = math.isqrt(tokens)
    assert side * side == tokens, f"{tokens} tokens are no square"
    return side
