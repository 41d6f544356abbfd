"""What is known of a media file before its pixels are decoded, and what decoding may cost. Plain data, no codec.

Both travel to and from the decode workers as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvila.types import MediaKind

_MAX_KNOTS = 50_000
_MAX_KEY_FRAMES = 1_000


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """Bounds on one decode worker and on what it accepts; the gateway's settings fill them."""

    max_pixels: int = 64 * 1024 * 1024
    """Width x height of an image or of a video's frames, read from headers before anything is decoded."""
    max_side_px: int = 65_535
    """Longer side of an image or a frame, JPEG's own limit: bringing a line of a million pixels to a tile's size takes
    gigabytes between the two passes, however few pixels it has (`preparation_bytes`)."""
    max_file_bytes: int = 8 * 1024**3
    """Size of one media file."""
    max_source_frames: int = 4_000_000
    """Frames in one video file (18 hours at 60 per second), whatever is sampled from it."""
    memory_bytes: int = 1536 * 1024**2
    """Address space that decoding may add to an idle worker."""
    task_s: float = 60.0
    """Wall-clock and processor seconds for one probe or one run of frames; then the worker is killed and replaced."""
    workers: int = 2
    """Decode processes."""
    threads: int = 1
    """Decoder threads in each worker."""
    idle_s: float = 2.0
    """A worker keeps its last file open this long for the next run; a deleted upload gives its disk back after it."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            assert value > 0, f"{name} must be positive, not {value}"


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What a probe finds out. For an image: one frame, no duration, no rate.

    `width_px`, `height_px`: as shown, after the file's rotation; non-square pixels are not stretched (the reference
    resizes frames to a square anyway). `frames`: usable ones, by the reference's rule (`sampling.usable_frames`).
    `fps`: mean frames per second, 0 when the file does not tell. `duration_s`: first frame's start to last frame's end.
    `knots`: (frame number, presentation time), the first frame at 0; between knots, times are interpolated. Two knots
    when the rate is constant. `key_frames`: frame numbers at which decoding can start, thinned when there are many.
    `stream_count`: video streams in the file; the first is used. `holes`: stretches (from, to; seconds) that the file
    should hold and does not, because it was cut off or damaged.
    """

    kind: MediaKind
    container: str
    codec: str
    width_px: int
    height_px: int
    frames: int
    fps: float = 0.0
    duration_s: float = 0.0
    rotation_deg: int = 0
    is_variable_rate: bool = False
    knots: tuple[tuple[int, float], ...] = ((0, 0.0),)
    key_frames: tuple[int, ...] = (0,)
    stream_count: int = 1
    holes: tuple[tuple[float, float], ...] = ()

    def times_s(self) -> NDArray[np.float64]:
        """Presentation time of every frame, seconds, ascending from 0."""
        numbers, times = zip(*self.knots, strict=True)
        return np.interp(np.arange(self.frames), numbers, times)

    def time_s(self, frame: int) -> float:
        """Presentation time of one frame, seconds."""
        numbers, times = zip(*self.knots, strict=True)
        return float(np.interp(frame, numbers, times))

    @classmethod
    def of_video(
        cls,
        *,
        container: str,
        codec: str,
        size_px: tuple[int, int],
        times_s: NDArray[np.float64],
        fps: float,
        key_frames: Sequence[int] = (0,),
        rotation_deg: int = 0,
        stream_count: int = 1,
        holes: Sequence[tuple[float, float]] = (),
    ) -> MediaInfo:
        """times_s: presentation time of every usable frame, ascending from 0. fps: as the header says, 0 if it does
        not; where it contradicts a constant spacing of the frames by more than 1 %, the spacing is believed.
        """
        frames = len(times_s)
        mean_s = float(times_s[-1]) / (frames - 1) if frames > 1 else 0.0
        is_variable = bool(mean_s and np.max(np.abs(times_s - np.arange(frames) * mean_s)) > mean_s / 2)
        if mean_s and not is_variable and abs(fps * mean_s - 1) > 0.01:
            fps = 1 / mean_s
        step = max(1, math.ceil(frames / _MAX_KNOTS)) if is_variable else max(1, frames - 1)
        knots = sorted({*range(0, frames, step), frames - 1})
        return cls(
            kind=MediaKind.VIDEO,
            container=container,
            codec=codec,
            width_px=size_px[0],
            height_px=size_px[1],
            frames=frames,
            fps=fps,
            duration_s=float(times_s[-1]) + (1 / fps if fps else mean_s),
            rotation_deg=rotation_deg,
            is_variable_rate=is_variable,
            knots=tuple((number, float(times_s[number])) for number in knots),
            key_frames=tuple(key_frames[:: max(1, math.ceil(len(key_frames) / _MAX_KEY_FRAMES))]),
            stream_count=stream_count,
            holes=tuple(holes),
        )

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> MediaInfo:
        return cls(
            **{
                **fields,
                "kind": MediaKind(fields["kind"]),
                "knots": tuple((int(number), float(time)) for number, time in fields["knots"]),
                "key_frames": tuple(fields["key_frames"]),
                "holes": tuple((float(start), float(end)) for start, end in fields["holes"]),
            }
        )
