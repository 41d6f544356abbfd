"""The frame choice of the reference's older data-set and evaluation scripts (NVILA-SPEC §5.1, "Legacy helper").

Only for comparing with figures that those scripts gave; everything else samples with `nvila.video.sampling`.
"""

from __future__ import annotations

import numpy as np


def legacy_indices(frames: int, video_fps: float, count: int, max_fps: float = 0.0) -> tuple[int, ...]:
    """At most `count` frame numbers, equally spaced and truncated, each once; none for a video that is no video.

    With `max_fps`, a clip too short to fill `count` at that rate gives fewer, but at least two where it gives any. The
    reference returns black pictures in place of an empty choice (`opencv_extract_frames` in llava/mm_utils.py).
    """
    if frames == 0 or video_fps <= 0:
        return ()
    duration_s = frames / video_fps
    if max_fps > 0 and duration_s < count / max_fps:
        allowed = int(duration_s * max_fps)
        count = max(2, allowed) if allowed else 0
    elif frames < count and frames <= 1:
        count = 0
    return tuple(sorted(set(np.linspace(0, frames - 1, count, dtype=int).tolist())))
