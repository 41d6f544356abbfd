"""Video as clients push it: encoded here, small, with a key frame a second."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np

FPS = 25
MP4 = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def encoded(
    container: str, seconds: int = 6, options: dict[str, str] | None = None, size: tuple[int, int] = (64, 48)
) -> bytes:
    """MPEG-TS ("mpegts") or MP4 ("mp4")."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=options or {}) as target:
        settings = {"g": f"{FPS}", "sc_threshold": "0", "preset": "ultrafast"}
        stream = target.add_stream("libx264", rate=FPS, options=settings)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(seconds * FPS):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), number % 256, np.uint8))
            frame.pts = number
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return out.getvalue()


def pictures(times: list[float], size: tuple[int, int] = (64, 48)) -> bytes:
    """JPEGs, each after its capture time and its length."""
    said = b""
    for number, at in enumerate(times):
        encoder = av.CodecContext.create("mjpeg", "w")
        assert isinstance(encoder, av.VideoCodecContext)
        encoder.width, encoder.height = size
        encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, FPS)
        frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), number * 9 % 256, np.uint8))
        frame = frame.reformat(format="yuvj420p")
        frame.pts = 0
        picture = bytes(encoder.encode(frame)[0])
        said += struct.pack(">dI", at, len(picture)) + picture
    return said
