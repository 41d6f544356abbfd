"""A client's sampling and what the file holds, made into the runs of frames that are decoded and encoded.

The one place where frames are chosen (the answer's coverage repeats its numbers). Opens no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvila.errors import InvalidMedia, InvalidRequest, LimitExceeded
from nvila.types import FrameRun, Gap, MediaKind, VideoSampling
from nvila.video import sampling as rules
from nvila.video.media import MediaInfo

DEFAULT_CHUNK_FRAMES = 32
"""Frames per vision call: 32 frames at 448 x 448 are 19 MB, and eight chunks of a 256-frame request overlap."""

NO_FRAMES = "the file holds no frames here"

MAX_FPS = 1000.0
"""No camera that we know of needs more, and the arithmetic stays far from overflow."""


@dataclass(frozen=True, kw_only=True)
class FramePlan:
    """Which frames, in which runs. An image is one run of one frame.

    `frames_asked`: what the client (or the model's default) asked for, before it was brought to a multiple of the
    temporal group. `start_s`, `end_s`: presentation time of the first and last planned frame. `gaps`: what the file
    should hold of the window and does not.
    """

    frames_asked: int
    runs: tuple[FrameRun, ...]
    start_s: float
    end_s: float
    gaps: tuple[Gap, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(index for run in self.runs for index in run.indices)


def plan_frames(
    wanted: VideoSampling,
    info: MediaInfo,
    *,
    default_frames: int,
    max_frames: int,
    group: int,
    chunk_frames: int = DEFAULT_CHUNK_FRAMES,
) -> FramePlan:
    """Choose the frames of one media item and cut them into runs.

    group: the model's temporal group. A number of frames is brought up to a multiple of it before the uniform rule
    (down when that would pass max_frames), because the model has no rule for remainders (NVILA-SPEC §5.3); frames
    taken at a rate stay where they are, and the decoder repeats the last one instead. chunk_frames: the longest run,
    itself brought down to a multiple of the group.

    Raises `InvalidRequest` for a sampling that means nothing, `LimitExceeded` for more frames than max_frames.
    """
    if info.kind is MediaKind.IMAGE:
        return FramePlan(frames_asked=1, runs=(FrameRun(indices=(0,)),), start_s=0.0, end_s=0.0)
    check_sampling(wanted, max_frames=max_frames)
    if info.frames < 1:
        raise InvalidMedia("the video has no frame that can be decoded")
    first, end = _window(wanted, info)
    if wanted.fps is None:
        asked = wanted.num_frames if wanted.num_frames is not None else min(default_frames, max_frames)
        taken = rules.uniform_indices(end - first, _whole_groups(asked, group, max_frames))
    else:
        taken = _at_rate(wanted.fps, info, first, end, max_frames)
        asked = len(taken)
    indices = tuple(first + number for number in taken)
    longest = max(group, chunk_frames // group * group)
    return FramePlan(
        frames_asked=asked,
        runs=tuple(FrameRun(indices=indices[at : at + longest]) for at in range(0, len(indices), longest)),
        start_s=info.time_s(indices[0]),
        end_s=info.time_s(indices[-1]),
        gaps=_gaps(wanted, info),
    )


def check_sampling(wanted: VideoSampling, *, max_frames: int) -> None:
    """Refuse a sampling that no video could satisfy; needs no file, so it can come before the fetch."""
    if wanted.num_frames is not None and wanted.fps is not None:
        raise InvalidRequest("num_frames and fps exclude each other; give at most one", param="num_frames")
    if wanted.num_frames is not None and wanted.num_frames < 1:
        raise InvalidRequest(f"num_frames must be at least 1, not {wanted.num_frames}", param="num_frames")
    if wanted.num_frames is not None and wanted.num_frames > max_frames:
        raise LimitExceeded.of("num_frames", asked=wanted.num_frames, limit=max_frames, param="num_frames")
    if wanted.fps is not None and not (math.isfinite(wanted.fps) and wanted.fps > 0):
        raise InvalidRequest(f"fps must be a positive number, not {wanted.fps}", param="fps")
    if wanted.fps is not None and wanted.fps > MAX_FPS:
        raise LimitExceeded.of("fps", asked=wanted.fps, limit=MAX_FPS, param="fps")
    for name, value in (("start_s", wanted.start_s), ("end_s", wanted.end_s)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"{name} must be a number of seconds from 0, not {value}", param=name)
    if wanted.end_s is not None and wanted.end_s <= (wanted.start_s or 0.0):
        raise InvalidRequest(
            f"the window must end after it starts: start_s is {wanted.start_s or 0.0}, end_s is {wanted.end_s}",
            param="end_s",
        )


def _window(wanted: VideoSampling, info: MediaInfo) -> tuple[int, int]:
    """Frame numbers [first, end) of the window. Its end may lie past the video's; its start may not."""
    if wanted.start_s is None and wanted.end_s is None:
        return 0, info.frames
    start_s = wanted.start_s or 0.0
    end_s = math.inf if wanted.end_s is None else wanted.end_s
    if start_s >= max(info.duration_s, 1e-6):
        raise InvalidRequest(
            f"the window starts at {start_s} s, past the video's end at {info.duration_s:.3f} s", param="start_s"
        )
    return rules.window_frames(info.times_s(), start_s, end_s)


def _gaps(wanted: VideoSampling, info: MediaInfo) -> tuple[Gap, ...]:
    first_s, end_s = wanted.start_s or 0.0, math.inf if wanted.end_s is None else wanted.end_s
    inside = ((max(start, first_s), min(end, end_s)) for start, end in info.holes)
    return tuple(Gap(start_s=start, end_s=end, reason=NO_FRAMES) for start, end in inside if start < end)


def _at_rate(fps: float, info: MediaInfo, first: int, end: int, max_frames: int) -> tuple[int, ...]:
    """Frames at a rate, counted from the window's first frame; more than max_frames is an error, never a silent cut."""
    if info.fps <= 0:
        raise InvalidRequest("the video tells no frame rate; ask for num_frames instead of fps", param="fps")
    after_s = info.time_s(end) if end < info.frames else info.duration_s
    length_s = (end - first) / info.fps if not info.is_variable_rate else after_s - info.time_s(first)
    count = rules.count_at_fps(length_s, fps)
    if count > max_frames:
        raise LimitExceeded.of(f"frames at fps={fps:g}", asked=count, limit=max_frames, param="fps")
    if not info.is_variable_rate:
        return rules.fps_indices(end - first, info.fps, fps, max_frames)
    times_s = info.times_s()[first:end]
    return rules.fps_indices_at(times_s - times_s[0], length_s, fps, max_frames)


def _whole_groups(count: int, group: int, max_frames: int) -> int:
    up = -(-count // group) * group
    if up <= max_frames:
        return up
    return max_frames // group * group or count
