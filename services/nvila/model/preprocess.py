"""Pictures to tiles to pixel values (NVILA-SPEC §2). NumPy and Pillow only; `model/tiles.py` chooses the grid.

H, W are pixels here, S the tile side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvila.model.config import ImageMode, NvilaConfig
from nvila.model.cost import tile_grid
from nvila.model.estimate import PAD_STRIP_PX
from nvila.model.tiles import TileGrid, square_splits

PAD_LEVEL = 127
"""Grey that fills `pad` squares: ⌊0.5 · 255⌋, of the processor's mean (`expand2square` in llava/mm_utils.py)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TiledImage:
    """Tiles in the tower's order: for Dynamic-S2 scale by scale, small to large; for `dynamic` the thumbnail last.

    `tiles_NHWC`: uint8 RGB, (tiles, S, S, 3). `block_size`: (rows, columns) of the last scale, Dynamic-S2 only.
    """

    tiles_NHWC: NDArray[np.uint8]
    block_size: tuple[int, int] | None = None


def resize_exact(rgb_HWC: NDArray[np.uint8], width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Pillow's antialiased bicubic, horizontal pass first, rounded to 8 bits between the passes.

    Two resizes along one axis each, because Pillow 13 swaps the passes of some two-axis ones, which changes the result.
    """
    image = Image.fromarray(rgb_HWC)
    if image.width != width_px:
        image = image.resize((width_px, image.height), Image.Resampling.BICUBIC)
    return np.asarray(_to_height(image, height_px))


def _to_height(image: Image.Image, height_px: int) -> Image.Image:
    if image.height == height_px:
        return image
    return image.resize((image.width, height_px), Image.Resampling.BICUBIC)


def pad_square(rgb_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture in the middle of a grey square of its longer side."""
    height, width = rgb_HWC.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), PAD_LEVEL, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = rgb_HWC
    return square


def resize_padded(rgb_HWC: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """`resize_exact` of `pad_square`, (S, S, 3), without ever making the square, which a thin picture makes huge.

    The horizontal pass sees one row at a time, and leaves rows of grey as they are.
    """
    height, width = rgb_HWC.shape[:2]
    longer = max(height, width)
    if longer == side_px:
        return pad_square(rgb_HWC)
    top, left = (longer - height) // 2, (longer - width) // 2
    narrow = Image.new("RGB", (side_px, longer), (PAD_LEVEL,) * 3)
    rows = max(1, PAD_STRIP_PX // longer)
    for at in range(0, height, rows):
        strip = rgb_HWC[at : at + rows]
        padded = np.full((len(strip), longer, 3), PAD_LEVEL, np.uint8)
        padded[:, left : left + width] = strip
        narrow.paste(Image.fromarray(resize_exact(padded, side_px, len(strip))), (0, top + at))
    return np.asarray(_to_height(narrow, side_px))


def split_image(config: NvilaConfig, rgb_HWC: NDArray[np.uint8], is_tiled: bool) -> TiledImage:
    """Cut one picture (uint8 RGB, any size) as the model expects; `is_tiled` only for a prompt's single image."""
    side = config.tile_px
    if config.image_mode is ImageMode.PAD:
        return TiledImage(tiles_NHWC=resize_padded(rgb_HWC, side)[None])
    whole_1HWC = resize_exact(rgb_HWC, side, side)[None]
    if not (is_tiled and config.can_tile):
        return TiledImage(tiles_NHWC=whole_1HWC)
    grid = tile_grid(config, rgb_HWC.shape[1], rgb_HWC.shape[0])
    large_NHWC = _cut(rgb_HWC, grid, side)
    if config.image_mode is ImageMode.DYNAMIC:
        thumbnail = [whole_1HWC] if grid.tiles > 1 else []
        return TiledImage(tiles_NHWC=np.concatenate([large_NHWC, *thumbnail]))
    squares = [_cut(rgb_HWC, TileGrid(split, split), side) for split in square_splits(config.s2_scales)]
    return TiledImage(tiles_NHWC=np.concatenate([*squares, large_NHWC]), block_size=grid.block_size)


def split_frames(config: NvilaConfig, frames_FHWC: NDArray[np.uint8]) -> TiledImage:
    """One tile per video frame; frames of another size are resized (padded first in `pad` mode)."""
    side = config.tile_px
    if frames_FHWC.shape[1:3] == (side, side):
        return TiledImage(tiles_NHWC=frames_FHWC)
    return TiledImage(tiles_NHWC=np.concatenate([split_image(config, rgb, False).tiles_NHWC for rgb in frames_FHWC]))


def _cut(rgb_HWC: NDArray[np.uint8], grid: TileGrid, side: int) -> NDArray[np.uint8]:
    """Resize to the grid's size, then cut row by row: (tiles, S, S, 3)."""
    sized_HWC = resize_exact(rgb_HWC, side * grid.columns, side * grid.rows)
    tiles = sized_HWC.reshape(grid.rows, side, grid.columns, side, 3).swapaxes(1, 2)
    return np.ascontiguousarray(tiles).reshape(-1, side, side, 3)


def normalise(tiles_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """SigLIP's processor on 8-bit tiles: (N, 3, S, S) float32 in [-1, 1]."""
    return _LEVELS[_channels_first(tiles_NHWC)]


def pixel_values(tiles_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the tower is given: `normalise`, then rounded to float16 as the reference does whatever the weights' dtype.

    Returns (N, 3, S, S) float32 holding float16 values.
    """
    return _HALF_LEVELS[_channels_first(tiles_NHWC)]


def _channels_first(tiles_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Contiguous: a tower's convolution may pick another algorithm, with other rounding, for other strides."""
    return np.ascontiguousarray(tiles_NHWC.transpose(0, 3, 1, 2))


def _processor(level: NDArray[np.uint8]) -> NDArray[np.float32]:
    """SiglipImageProcessor: the rescaling in double precision, mean and deviation in single."""
    rescaled = (level * (1 / 255)).astype(np.float32)
    return (rescaled - np.float32(0.5)) / np.float32(0.5)


_LEVELS = _processor(np.arange(256, dtype=np.uint8))
_HALF_LEVELS = _LEVELS.astype(np.float16).astype(np.float32)
