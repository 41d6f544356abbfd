"""Stretches of a video that its file should hold and does not: what was cut off, what damage took away.

Frames whose packets are there but cannot be decoded are told run by run (`decode.py`); these here have no packet at
all, so that only the clock shows that they are missing. Plain arithmetic on the packets' stamps; decodes nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Span = tuple[float, float]
"""From and to, seconds since the first frame."""

_MOST = 64
_LEAST_S = 0.1
"""Shorter than this is rounding."""
_LEAST_STEPS = 3.0
"""A step this many times the usual one is no jitter."""
_MOST_SHARE = 0.05
"""More uneven steps than this are a variable frame rate."""


def find_holes(
    times_s: NDArray[np.float64], ends_s: NDArray[np.float64], announced_s: float, *, is_indexed: bool = False
) -> tuple[Span, ...]:
    """times_s, ends_s: from when to when each frame is to be shown by its packet's own stamp and duration, ascending;
    where a packet has no duration, the two are equal. announced_s: the video's length by the file's header, 0 when it
    does not say. is_indexed: an index names all packets, so none can be lost without a trace, save those at the end.
    """
    steps_s = np.diff(times_s)
    usual_s = float(np.median(steps_s)) if len(steps_s) else 0.0
    least_s = max(_LEAST_S, _LEAST_STEPS * usual_s)
    open_s = times_s[1:] - ends_s[:-1]
    after = np.flatnonzero((open_s > least_s) & (ends_s[:-1] > times_s[:-1]))
    is_even = not is_indexed and len(after) <= max(1.0, _MOST_SHARE * len(steps_s))
    holes = [(float(ends_s[at]), float(times_s[at + 1])) for at in after] if is_even else []
    read_s = float(ends_s.max())
    if announced_s - read_s > max(least_s, float(np.quantile(steps_s, 0.95)) if len(steps_s) else 0.0):
        holes.append((read_s, announced_s))
    return tuple(sorted(sorted(holes, key=lambda hole: hole[0] - hole[1])[:_MOST]))
