"""Which tiles a picture is cut into (NVILA-SPEC §2.2-2.4): the reference's grid choice, tie by tie. Pure Python.

A grid is (columns, rows) as in `process_images` of NVlabs/VILA llava/mm_utils.py; a block size, the same thing as the
tower's merge sees it, is (rows, columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class TileGrid(NamedTuple):
    columns: int
    rows: int

    @property
    def tiles(self) -> int:
        return self.columns * self.rows

    @property
    def block_size(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[TileGrid, ...]:
    """Every grid of `min_tiles` to `max_tiles` tiles, in the order in which the reference looks at them.

    The reference collects pairs of integers in a set and sorts it, stably, by their product. So equal products keep
    the set's iteration order, which settles ties and is the same in CPython 3.9 to 3.13; the same set is built here,
    and the tests compare it with the recorded order.
    """
    grids = {
        (columns, rows)
        for most in range(min_tiles, max_tiles + 1)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(TileGrid(*grid) for grid in sorted(grids, key=lambda grid: grid[0] * grid[1]))


def closest_grid(width_px: int, height_px: int, tile_px: int, candidates: Sequence[TileGrid]) -> TileGrid:
    """The candidate whose columns/rows is nearest to width/height (`find_closest_aspect_ratio`).

    Of candidates exactly as near, a later one wins only if the picture has more than half the pixels of its tiles.
    Without candidates: one tile.
    """
    ratio = width_px / height_px
    best, best_distance = TileGrid(1, 1), float("inf")
    for grid in candidates:
        distance = abs(ratio - grid.columns / grid.rows)
        is_full = width_px * height_px > 0.5 * tile_px * tile_px * grid.columns * grid.rows
        if distance < best_distance or (distance == best_distance and is_full):
            best, best_distance = grid, distance
    return best


def dynamic_grid(width_px: int, height_px: int, tile_px: int, min_tiles: int, max_tiles: int) -> TileGrid:
    """The grid of `dynamic` mode; more than one tile gets a thumbnail beside it (`dynamic_tiles`)."""
    return closest_grid(width_px, height_px, tile_px, candidate_grids(min_tiles, max_tiles))


def dynamic_tiles(grid: TileGrid) -> int:
    """Tiles of `dynamic` mode, thumbnail included."""
    return grid.tiles + (grid.tiles > 1)


def square_splits(scales: Sequence[int]) -> tuple[int, ...]:
    """Tiles per side of each scale of Dynamic-S2 but the last, which follows the picture's shape."""
    return tuple(scale // scales[0] for scale in scales[:-1])


def dynamic_s2_grid(width_px: int, height_px: int, scales: Sequence[int], max_tiles: int) -> TileGrid:
    """The last scale's grid of `dynamic_s2` mode: at least as many tiles as the scale's square has."""
    candidates = candidate_grids((scales[-1] // scales[0]) ** 2, max_tiles)
    return closest_grid(width_px, height_px, scales[0], candidates)
