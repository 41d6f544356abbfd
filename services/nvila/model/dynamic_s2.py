"""Dynamic-S2: one picture at several scales, joined along the channels (NVILA-SPEC §3.3-3.5; arXiv:2412.04468).

Follows `merge_features_for_dynamic_s2` and `encode_images` of NVlabs/VILA llava/model/llava_arch.py.

N tiles · T tokens of a tile · H, W rows and columns of a map · C tower channels · D language-model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nvila.model.compress import square_side
from nvila.model.tiles import square_splits

BlockSize = tuple[int, int]
"""(rows, columns) of tiles."""


def merge_chessboard(x_NCHW: Tensor, rows: int, columns: int) -> Tensor:
    """Lay tiles out as a board, row by row: (rows · columns · b, C, H, W) becomes (b, C, rows · H, columns · W).

    With b > 1, each cell owns b consecutive items.
    """
    tiles, channels, height, width = x_NCHW.shape
    batch = tiles // (rows * columns)
    board = x_NCHW.reshape(rows, columns, batch, channels, height, width).permute(2, 3, 0, 4, 1, 5)
    return board.reshape(batch, channels, rows * height, columns * width)


def split_chessboard(x_NCHW: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `merge_chessboard`; `rows` and `columns` must divide the map."""
    batch, channels, height, width = x_NCHW.shape
    cells = x_NCHW.reshape(batch, channels, rows, height // rows, columns, width // columns).permute(2, 4, 0, 1, 3, 5)
    return cells.reshape(rows * columns * batch, channels, height // rows, width // columns)


def tokens_to_maps(x_NTC: Tensor) -> Tensor:
    """(N, side², C) row-major to (N, C, side, side)."""
    tiles, tokens, channels = x_NTC.shape
    side = square_side(tokens)
    return x_NTC.transpose(1, 2).reshape(tiles, channels, side, side)


def merge_scales(
    features_NTC: Tensor, block_sizes: Sequence[BlockSize | None], scales: Sequence[int], merge_index: int
) -> tuple[list[Tensor], list[BlockSize]]:
    """Tower features of all tiles of several pictures to one map per picture, and its size in tiles.

    A picture without block size is one tile, whose channels are repeated for every scale. Otherwise its scales are laid
    out and brought to the size of scale `merge_index` by area averaging in float32. Maps are (1, scales · C, H, W).
    """
    maps: list[Tensor] = []
    sizes: list[BlockSize] = []
    at = 0
    for block_size in block_sizes:
        boards = [(1, 1)] if block_size is None else [(k, k) for k in square_splits(scales)] + [block_size]
        layers = []
        for rows, columns in boards:
            tiles_NCHW = tokens_to_maps(features_NTC[at : at + rows * columns])
            layers.append(merge_chessboard(tiles_NCHW, rows, columns))
            at += rows * columns
        if block_size is None:
            maps.append(layers[0].repeat(1, len(scales), 1, 1))
            sizes.append((1, 1))
        else:
            maps.append(_stack(layers, layers[merge_index].shape[-2:]))
            sizes.append(boards[merge_index])
    assert at == len(features_NTC), f"{len(features_NTC)} tiles came, block sizes account for {at}"
    return maps, sizes


def _stack(layers_1CHW: Sequence[Tensor], size: torch.Size) -> Tensor:
    resized = [functional.interpolate(layer.float(), size, mode="area").to(layer.dtype) for layer in layers_1CHW]
    return torch.cat(resized, 1)


def project_map(map_1CHW: Tensor, block_size: BlockSize, project: Callable[[Tensor], Tensor]) -> Tensor:
    """A picture's map to its visual tokens: the projector sees one tile at a time, then the tiles are woven together
    again, so that tokens run row by row over the whole picture. Returns (T, D)."""
    rows, columns = block_size
    tiles_NTC = split_chessboard(map_1CHW, rows, columns).flatten(2).transpose(1, 2)
    projected_NDHW = tokens_to_maps(project(tiles_NTC))
    return merge_chessboard(projected_NDHW, rows, columns)[0].flatten(1).transpose(0, 1).contiguous()
