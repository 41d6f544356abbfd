"""What a request will cost, from sizes alone: tiles, tokens, bytes, arithmetic (NVILA-SPEC §2-5). Pure Python.

The gateway's limits and estimates, the caches' sizes and the decode service's layout check all use these functions, and
a property test holds them equal to what `model/encoder.py` really makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from nvila.errors import InvalidRequest
from nvila.model.config import (
    RESAMPLERS,
    TOKEN_LEARNER_WIDTH,
    TOKEN_LEARNERS,
    ImageMode,
    NvilaConfig,
    Wrap,
    projector_widths,
)
from nvila.model.tiles import TileGrid, dynamic_grid, dynamic_s2_grid, dynamic_tiles, square_splits
from nvila.types import Level, MediaKind, TokenDtype

VALUE_BYTES = {TokenDtype.FLOAT32: 4, TokenDtype.BFLOAT16: 2, TokenDtype.INT8: 1}
SCALE_BYTES = 4
"""INT8 records hold one float32 scale per token."""


def tile_grid(config: NvilaConfig, width_px: int, height_px: int) -> TileGrid:
    """The grid that the checkpoint's tiling gives a picture; (1, 1) where it does not tile."""
    if config.image_mode is ImageMode.DYNAMIC:
        return dynamic_grid(width_px, height_px, config.tile_px, config.min_tiles, config.max_tiles)
    if config.image_mode is ImageMode.DYNAMIC_S2:
        return dynamic_s2_grid(width_px, height_px, config.s2_scales, config.max_tiles)
    return TileGrid(1, 1)


def merged_block_size(config: NvilaConfig, block_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of output tiles after the Dynamic-S2 merge of a picture whose last scale has `block_size`."""
    index = config.s2_merge_index % len(config.s2_scales)
    if index == len(config.s2_scales) - 1:
        return block_size
    side = square_splits(config.s2_scales)[index]
    return side, side


def levels(
    config: NvilaConfig,
    *,
    kind: MediaKind,
    is_tiled: bool,
    width_px: int = 0,
    height_px: int = 0,
    frames: int = 1,
    pool_sizes: Sequence[tuple[int, int, int]] = (),
) -> tuple[Level, ...]:
    """Layout of the token record of one picture or of one run of `frames` video frames.

    Sizes in pixels matter only for a tiled image. `pool_sizes` is for videos; empty means no pooling. Raises
    `InvalidRequest` where the reference would fail: frames or token rows that a pooling level does not divide.
    """
    per_tile = config.side**2
    if kind is MediaKind.VIDEO:
        return tuple(_pooled(config.side, frames, pool) for pool in pool_sizes or ((1, 1, 1),))
    if not (is_tiled and config.can_tile):
        return (Level(1, per_tile),)
    grid = tile_grid(config, width_px, height_px)
    if config.image_mode is ImageMode.DYNAMIC:
        return (Level(dynamic_tiles(grid), per_tile),)
    rows, columns = merged_block_size(config, grid.block_size)
    return (Level(1, rows * columns * per_tile),)


def _pooled(side: int, frames: int, pool: tuple[int, int, int]) -> Level:
    by_time, by_row, by_column = pool
    if frames < 1 or frames % by_time:
        raise InvalidRequest(f"{frames} frames cannot be pooled in groups of {by_time}: a multiple is needed")
    if side % by_row or side % by_column:
        raise InvalidRequest(f"{side}×{side} tokens per frame cannot be pooled in groups of {by_row}×{by_column}")
    return Level(frames // by_time, (side // by_row) * (side // by_column))


def join_levels(records: Iterable[Sequence[Level]]) -> tuple[Level, ...]:
    """Levels of a media item made of several records (the chunks of a video): blocks add up, level by level."""
    joined: list[Level] = []
    for record in records:
        if joined and [level.tokens for level in joined] != [level.tokens for level in record]:
            raise InvalidRequest(f"records of one media item disagree: {tuple(joined)} and {tuple(record)}")
        counts = [level.blocks for level in joined] or [0] * len(record)
        joined = [Level(count + level.blocks, level.tokens) for count, level in zip(counts, record, strict=True)]
    return tuple(joined)


def wrap_of(config: NvilaConfig, kind: MediaKind) -> Wrap:
    """The text ids around blocks of this kind."""
    return config.video_wrap if kind is MediaKind.VIDEO else config.image_wrap


def tokens(item: Iterable[Level]) -> int:
    """Visual tokens, without anything around them."""
    return sum(level.blocks * level.tokens for level in item)


def positions(config: NvilaConfig, *, kind: MediaKind, is_tiled: bool, levels: Sequence[Level]) -> int:
    """Language-model positions of a whole media item (`join_levels` of its records): tokens, the start, end and
    separator embeddings around them, and the text newline that follows each tile of a `dynamic` image."""
    wrap = wrap_of(config, kind)
    around = len(wrap.start) + len(wrap.end)
    if kind is MediaKind.IMAGE and is_tiled and config.image_mode is ImageMode.DYNAMIC:
        around += 1
    return sum(level.blocks * (level.tokens + around) + len(wrap.sep) for level in levels)


def tower_tiles(
    config: NvilaConfig, *, kind: MediaKind, is_tiled: bool, width_px: int = 0, height_px: int = 0, frames: int = 1
) -> int:
    """Tiles that the tower computes for a picture or a run of frames (static S2: each as `config.squares` squares)."""
    if kind is MediaKind.VIDEO:
        return frames
    if not (is_tiled and config.can_tile):
        return 1
    grid = tile_grid(config, width_px, height_px)
    if config.image_mode is ImageMode.DYNAMIC:
        return dynamic_tiles(grid)
    return sum(side**2 for side in square_splits(config.s2_scales)) + grid.tiles


def record_bytes(levels: Iterable[Level], width: int, dtype: TokenDtype) -> int:
    """Bytes of a token record's payload; `width` is the language model's."""
    count = tokens(levels)
    return count * width * VALUE_BYTES[dtype] + (count * SCALE_BYTES if dtype is TokenDtype.INT8 else 0)


def tower_flops(config: NvilaConfig, tiles: int) -> float:
    """Floating-point operations (a multiply-add is two) of the tower's matrix products for `tiles` tiles, with static
    S2 for all their squares."""
    tower, patches = config.tower, config.grid**2
    embed = 2 * patches * tower.width * 3 * tower.patch_px**2
    projections = 2 * patches * (4 * tower.width**2 + 2 * tower.width * tower.mlp_width)
    attention = 4 * patches**2 * tower.width
    return float(tiles * config.squares * (embed + tower.blocks * (projections + attention)))


def projector_flops(config: NvilaConfig, tiles: int) -> float:
    """Floating-point operations of the projector's matrix products for `tiles` tiles, learned compression included."""
    tokens_in, tokens_out = config.map_grid**2, config.side**2
    chain = projector_widths(config.projector_type, config.projector_width, config.llm_width)
    linear = 2 * tokens_out * sum(before * after for before, after in pairwise(chain))
    return float(tiles * (linear + compressor_flops(config, tokens_in, tokens_out)))


def compressor_flops(config: NvilaConfig, tokens_in: int, tokens_out: int) -> int:
    """Of one tile in a compressor that learns (`model/compressors.py`); 0 for the published ones."""
    W, D = config.projector_width, config.llm_width
    if config.projector_type in TOKEN_LEARNERS:
        weigh = W * TOKEN_LEARNER_WIDTH + TOKEN_LEARNER_WIDTH * tokens_out + tokens_out * W
        return 2 * tokens_in * weigh
    if config.projector_type in RESAMPLERS:
        keys_and_values = tokens_in * (W * D + 2 * D * D)
        return 2 * (keys_and_values + tokens_out * 2 * D * D + 2 * tokens_out * tokens_in * D)
    return 0


def prefill_flops(config: NvilaConfig, positions: int) -> float:
    """Floating-point operations of the language model's matrix products over a prompt, without the output head."""
    llm = config.llm
    attention_width, kv_width = llm.heads * llm.head_width, llm.kv_heads * llm.head_width
    weights = llm.width * (2 * attention_width + 2 * kv_width + 3 * llm.mlp_width)
    scores = positions * attention_width  # causal: half of positions², for scores and again for values
    return float(2 * positions * llm.layers * (weights + scores))


def kv_bytes(config: NvilaConfig, positions: int, value_bytes: int = 2) -> int:
    """Bytes that the language model's cache holds for so many positions."""
    return 2 * config.llm.layers * config.llm.kv_heads * config.llm.head_width * positions * value_bytes
