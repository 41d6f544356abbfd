"""Which groups need no encoding because nothing happened: near-identical frames, told cheaply from their pixels.

A frame is looked at as cells of 4 x 4 pixels (112 x 112 of them at 448 x 448), as brightness and two colour
differences. It is *like* another when no cell differs by more than a bound: the largest difference counts, never the
mean, so that a small thing that moves, or a line of text that changes, is seen however large the still rest is. The
mean over a cell takes away most of a sensor's noise. The bound is higher where the reference has edges, since that is
where a codec's frames differ; and by the noise left over, measured in each pair of frames (the median of all cells,
which no small event moves), but only up to `_MOST`, so that a change of the whole picture never passes for noise.

A group is static when all its frames are like the reference, and so were all frames of the last encoded group; the
reference is that group's last frame. It stays the same until something is encoded, so slow changes add up against it
and are seen. At least one group in `floor_s` is encoded, whatever it looks like.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CELL_PX = 4
_LEAST = np.array([9.0, 12.0, 12.0], np.float32)
"""Levels of 255, brightness and colours. Still scenes with a sensor's noise (sigma 0 to 6) through H.264 at CRF 23 to
28 and 640 pixels across stay below in every cell, beyond `_AT_EDGES`; a digit of 16 pixels that changes lies above
(tests/recordings/test_gate.py)."""
_AT_EDGES, _MOST_AT_EDGES = 0.1, 8.0
"""Share of the contrast around a cell that is added to its bound, and the most of it."""
_NOISES = 8.0
"""So many times the measured noise of a cell: of 12,544 cells with Gaussian noise the largest lies near 4."""
_MOST = 24.0
_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation."""

Cells = NDArray[np.float32]
"""(3, rows, columns): brightness and two colour differences of each cell, levels."""


@dataclass(frozen=True)
class Reference:
    """The last encoded group: its last frame's cells and the contrast around each, whether all its frames were like
    that one, when it began."""

    cells: Cells
    contrast: NDArray[np.float32]
    is_still: bool
    time_s: float


class Gate:
    """Decides group by group, in the order of time. `reference`: what it compares with; kept by its user to go on
    elsewhere (`reference_of` makes it again from the frames of the last encoded group)."""

    def __init__(self, floor_s: float, reference: Reference | None = None) -> None:
        self._floor_s = floor_s
        self.reference = reference

    def is_static(self, frames_FHWC: NDArray[np.uint8], time_s: float) -> bool:
        """Whether a group needs no encoding: it looks like the reference. Otherwise it becomes the reference.

        frames_FHWC: uint8 RGB (frames, rows, columns, 3). time_s: of its first frame.
        """
        cells = [cells_of(frame) for frame in frames_FHWC]
        last = self.reference
        if (
            last is not None
            and last.is_still
            and time_s - last.time_s < self._floor_s
            and all(are_alike(one, last.cells, last.contrast) for one in cells)
        ):
            return True
        self.reference = _reference(cells, time_s)
        return False

    def forget(self) -> None:
        """The next group is to be encoded: the last one's tokens are not to be had."""
        self.reference = None


def reference_of(frames_FHWC: NDArray[np.uint8], time_s: float) -> Reference:
    return _reference([cells_of(frame) for frame in frames_FHWC], time_s)


def _reference(cells: list[Cells], time_s: float) -> Reference:
    last, contrast = cells[-1], contrast_of(cells[-1])
    return Reference(last, contrast, all(are_alike(one, last, contrast) for one in cells[:-1]), time_s)


def cells_of(frame_HWC: NDArray[np.uint8]) -> Cells:
    """A picture's cells. frame_HWC: uint8 RGB (rows, columns, 3)."""
    red, green, blue = np.moveaxis(np.asarray(Image.fromarray(frame_HWC).reduce(_CELL_PX), np.float32), 2, 0)
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue  # BT.601, as frames are converted (video/decode.py)
    return np.stack([brightness, 0.564 * (blue - brightness), 0.713 * (red - brightness)])


def contrast_of(cells: Cells) -> NDArray[np.float32]:
    """(rows, columns): lightest minus darkest of each cell and the eight around it."""
    lightest = darkest = cells[0]
    for axis in (0, 1):
        lightest = _of_three(np.maximum, lightest, axis)
        darkest = _of_three(np.minimum, darkest, axis)
    apart: NDArray[np.float32] = lightest - darkest
    return apart


def _of_three(choose: np.ufunc, values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    width = [(1, 1) if at == axis else (0, 0) for at in (0, 1)]
    padded = np.moveaxis(np.pad(values, width, mode="edge"), axis, 0)
    chosen: NDArray[np.float32] = choose(choose(padded[:-2], padded[1:-1]), padded[2:])
    return np.moveaxis(chosen, 0, axis)


def are_alike(one: Cells, reference: Cells, contrast: NDArray[np.float32]) -> bool:
    """Whether a picture shows what the reference, of the same size, shows; `contrast` is the reference's."""
    if one.shape != reference.shape:
        return False
    apart = np.abs(one - reference)
    noise = _TO_SIGMA * np.median(apart, axis=(1, 2))
    bound = np.clip(_NOISES * noise, _LEAST, _MOST)
    at_edges = np.minimum(_AT_EDGES * contrast, _MOST_AT_EDGES)
    return bool((apart <= bound[:, None, None] + at_edges).all())
