"""Frames of an animated WebP, which FFmpeg does not read, by Pillow. Runs in a decode worker only.

The same methods as `decode.VideoReader`. Frames are composited on the ones before, so they are decoded in order; their
times are in the file's chunk headers. Alpha is dropped, as for images.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvila.errors import InvalidMedia, LimitExceeded
from nvila.model.preprocess import resize_exact
from nvila.video.images import BROKEN_IMAGE, open_image
from nvila.video.media import DecodeLimits, MediaInfo


class WebpReader:
    """One open animation, and where it is."""

    def __init__(self, path: Path, limits: DecodeLimits) -> None:
        """Raises `InvalidMedia` (a still picture is no video) or `LimitExceeded`."""
        self._durations_s = _durations_s(path, limits)
        self._image = open_image(path, limits)
        self.decoded_frames = 0

    def close(self) -> None:
        self._image.close()

    def info(self) -> MediaInfo:
        times_s = np.concatenate([[0.0], np.cumsum(self._durations_s)])
        return MediaInfo.of_video(
            container="webp",
            codec="webp",
            size_px=self._image.size,
            times_s=times_s[:-1],
            fps=len(self._durations_s) / times_s[-1] if times_s[-1] else 0.0,
        )

    def read(
        self, numbers: Sequence[int], size_px: tuple[int, int] | None
    ) -> Iterator[tuple[int, float, NDArray[np.uint8] | None]]:
        """As `VideoReader.read`."""
        width, height = size_px or self._image.size
        times_s = np.cumsum([0.0, *self._durations_s[:-1]])
        for number in numbers:
            rgb = self._frame(number)
            resized = None if rgb is None else resize_exact(rgb, width, height)
            yield number, float(times_s[min(number, len(times_s) - 1)]), resized

    def _frame(self, number: int) -> NDArray[np.uint8] | None:
        try:
            self._image.seek(number)
            self.decoded_frames += 1
            return np.asarray(self._image.convert("RGB"), dtype=np.uint8)
        except MemoryError:
            raise
        except BROKEN_IMAGE:
            return None


def is_webp(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def _durations_s(path: Path, limits: DecodeLimits) -> NDArray[np.float64]:
    """How long each frame is shown, from the ANMF chunks (RFC 9649 §2.7.1.1): bytes 12 to 14, milliseconds."""
    durations: list[float] = []
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            end = file.tell() + size + size % 2
            if name == b"ANMF":
                durations.append(int.from_bytes(file.read(16)[12:15], "little") / 1000)
            if len(durations) > limits.max_source_frames:
                raise LimitExceeded.of("frames in an animation", asked=len(durations), limit=limits.max_source_frames)
            file.seek(end)
    if not durations:
        raise InvalidMedia("the file is a still image, not a video")
    return np.array(durations)
