"""Which frames of a video are looked at: the reference's frame-index rules (NVILA-SPEC §5.1), and windows.

Plain arithmetic on frame numbers (presentation order, from 0) and times; opens no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_TIME_SLACK_S = 1e-6
"""A frame's time comes from integer ticks and a window's from decimal text: closer than this they are equal."""


def usable_frames(reported: int, can_decode: Callable[[int], bool]) -> int:
    """The reference's frame count: what the container reports, lowered until the last frame can be decoded."""
    frames = reported
    while frames > 0 and not can_decode(frames - 1):
        frames -= 1
    return frames


def uniform_indices(frames: int, count: int) -> tuple[int, ...]:
    """`count` frame numbers equally spaced from the first to the last frame, rounded half to even.

    Repeats are kept when count > frames; count 1 is the first frame (`_load_video` in llava/utils/media.py).
    """
    assert frames > 0, frames
    assert count > 0, count
    return tuple(np.round(np.linspace(0, frames - 1, count)).astype(int).tolist())


def fps_indices(frames: int, video_fps: float, fps: float, limit: int) -> tuple[int, ...]:
    """Frame numbers at 0, 1/fps, 2/fps … seconds, before the end, at most the first `limit`, each rounded down.

    For constant frame rates (`_load_video` in llava/utils/media.py with `fps` > 0). No video rate, no frames.
    """
    if video_fps <= 0:
        return ()
    times_s = _ticks(frames / video_fps, fps, limit)
    return tuple((times_s * video_fps).astype(int).tolist())


def fps_indices_at(times_s: NDArray[np.float64], duration_s: float, fps: float, limit: int) -> tuple[int, ...]:
    """The same for variable frame rates: at each instant, the frame that is shown then.

    times_s: presentation time of every frame, ascending from 0.
    """
    ticks_s = _ticks(duration_s, fps, limit)
    shown = np.searchsorted(times_s, ticks_s + _TIME_SLACK_S, side="right") - 1
    return tuple(np.maximum(shown, 0).tolist())


def count_at_fps(duration_s: float, fps: float) -> int:
    """How many frames the fps rule takes when nothing limits it."""
    return max(1, math.ceil(duration_s * fps - _TIME_SLACK_S))


def window_frames(times_s: NDArray[np.float64], start_s: float, end_s: float) -> tuple[int, int]:
    """Frame numbers [first, end) shown in the window [start_s, end_s): neighbouring windows share no frame unless one
    holds no frame of its own; then it is the frame on show at start_s.

    times_s: presentation time of every frame, ascending from 0. start_s must lie within the video.
    """
    first = int(np.searchsorted(times_s, start_s - _TIME_SLACK_S, side="left"))
    end = int(np.searchsorted(times_s, end_s - _TIME_SLACK_S, side="left"))
    if first >= end:
        first = max(0, int(np.searchsorted(times_s, start_s + _TIME_SLACK_S, side="right")) - 1)
        end = first + 1
    return first, end


def _ticks(duration_s: float, fps: float, limit: int) -> NDArray[np.float64]:
    count = min(limit, count_at_fps(duration_s, fps) + 1)
    with np.errstate(over="ignore"):  # the second tick of the smallest rates is at infinity: past the end
        ticks_s = np.arange(count, dtype=np.float64) / fps
    return ticks_s[ticks_s < duration_s]
