"""Clips: drawn frame by frame from what is on show when, stored without loss in few bytes, and written as H.264.

F frames · H, W rows and columns.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvila.errors import InvalidMedia, Unavailable
from nvila.train.data.draw import Draw
from nvila.train.samples import SampleMedia
from nvila.types import MediaKind

ENDING = "clip.npz"
"""Of clips in shards. Plain NumPy: every reader has it, also where there is no video decoder."""

_MOST_BYTES = 1 << 30


def length(draw: Draw) -> int:
    """Frames of a clip."""
    return round(draw.real(*draw.knobs.clip_s) * draw.knobs.video_fps)


def film(ground: Image.Image, frames: int, paint: Callable[[Image.Image, int], None]) -> NDArray[np.uint8]:
    """`paint` called on a copy of the ground for each frame. Returns (F, H, W, 3)."""
    film_FHWC = np.empty((frames, ground.height, ground.width, 3), np.uint8)
    for number in range(frames):
        frame = ground.copy()
        paint(frame, number)
        film_FHWC[number] = np.asarray(frame)
    return film_FHWC


def pack(clip: SampleMedia) -> bytes:
    """Each frame as its difference from the one before (modulo 256), compressed: what stands still costs nothing."""
    steps_FHWC = clip.frames_FHWC.copy()
    steps_FHWC[1:] -= clip.frames_FHWC[:-1]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in (("steps_FHWC", steps_FHWC), ("times_s", np.array(clip.times_s))):
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            # A fixed date: the same clip gives the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED, 1)
        archive.writestr(zipfile.ZipInfo("duration_s.txt"), repr(clip.duration_s))
    return buffer.getvalue()


def unpack(packed: bytes) -> SampleMedia:
    """Raises `InvalidMedia` for bytes that `pack` did not write."""
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MOST_BYTES:
                raise InvalidMedia(f"a clip of more than {_MOST_BYTES >> 20} MiB")
            steps_FHWC = np.load(io.BytesIO(archive.read("steps_FHWC.npy")), allow_pickle=False)
            times_s = np.load(io.BytesIO(archive.read("times_s.npy")), allow_pickle=False)
            duration_s = float(archive.read("duration_s.txt"))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise InvalidMedia(f"a broken clip: {error}") from None
    if steps_FHWC.ndim != 4 or steps_FHWC.dtype != np.uint8 or len(steps_FHWC) != len(times_s) or not len(times_s):
        raise InvalidMedia(f"a clip of shape {steps_FHWC.shape} and {len(times_s)} times")
    for number in range(1, len(steps_FHWC)):  # three times as fast as NumPy's accumulate
        steps_FHWC[number] += steps_FHWC[number - 1]
    return SampleMedia(
        kind=MediaKind.VIDEO, frames_FHWC=steps_FHWC, times_s=tuple(times_s.tolist()), duration_s=duration_s
    )


def write_h264(clip: SampleMedia, path: Path) -> None:
    """An MP4 file that plays everywhere (yuv420p), visually without loss. Raises `Unavailable` without PyAV."""
    try:
        import av
    except ImportError:
        raise Unavailable("writing H.264 files needs PyAV: pip install av") from None
    frames, height, width, _ = clip.frames_FHWC.shape
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=max(1, round(frames / clip.duration_s)))
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast", "bf": "0"}
        stream.thread_count = 1
        for picture_HWC in clip.frames_FHWC[:, : stream.height, : stream.width]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
