"""Small media files made for a test, with PyAV and Pillow, so that none is committed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image


def picture(number: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    """A smooth picture that differs from frame to frame: a bright block that moves, on a slope of grey."""
    slope = np.linspace(20, 120, width, dtype=np.uint8)
    rgb = np.repeat(np.repeat(slope[None, :, None], height, 0), 3, 2).copy()
    left = number * 3 % max(1, width - 8)
    rgb[: max(1, height // 2), left : left + 8] = (250, 40 + number * 5 % 200, 90)
    return rgb


@contextmanager
def at_usual_priority() -> Iterator[None]:
    """SVT-AV1, run by root, makes its caller a real-time process, and all that is started from there: whole stacks
    then keep each other, and this machine, from running."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def write_video(
    path: Path,
    *,
    frames: int = 24,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    rate: Fraction | int = 25,
    stamps: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation_deg: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    colorspace: int | None = None,
) -> Path:
    """Write a clip whose frame n shows `picture(n)`. stamps: presentation times in units of time_base."""
    with at_usual_priority(), av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options or {})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation_deg:
            stream.set_display_rotation(rotation_deg)
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24").reformat(format=pixels)
            if colorspace is not None:
                frame.colorspace = colorspace
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = time_base or Fraction(1) / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_everything(path: Path) -> list[NDArray[np.uint8]]:
    """Every frame as the decoder gives them (presentation order), from first packet to last, as full-size RGB."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [
            np.ascontiguousarray(
                np.rot90(
                    frame.to_ndarray(
                        format="rgb24", interpolation="BICUBIC", src_colorspace="ITU601", dst_colorspace="ITU601"
                    ),
                    frame.rotation // 90 % 4,
                )
            )
            for frame in container.decode(stream)
        ]


def write_image(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path
