"""Media of data sets, decoded: pictures by Pillow, clips by NumPy, video files by PyAV where it is installed.

Unlike in serving, files are decoded in the process itself: whoever trains chose them. Broken ones raise `InvalidMedia`.
"""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nvila.errors import InvalidMedia, NotFound, Unavailable
from nvila.model.preprocess import resize_exact
from nvila.train.data import clips
from nvila.train.samples import SampleMedia
from nvila.types import MediaKind
from nvila.video.media import DecodeLimits
from nvila.video.sampling import uniform_indices

if TYPE_CHECKING:
    from nvila.video.decode import VideoReader

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_BROKEN = (
    *(OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, ArithmeticError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_MOST_PIXELS = 64 << 20


@dataclass(frozen=True, kw_only=True)
class VideoReading:
    """How much of a video file is decoded."""

    frames: int = 32
    """Evenly spaced, by the reference's rule; a clip in a shard is read whole."""
    side_px: int | None = None
    """Frames are brought to this square; None leaves them as they are."""


def image_of(encoded: bytes) -> SampleMedia:
    """A picture, upright, as RGB."""
    return SampleMedia(kind=MediaKind.IMAGE, frames_FHWC=_rgb(encoded)[None])


def video_of(encoded: bytes, reading: VideoReading) -> SampleMedia:
    """A video file's content, as a shard holds it."""
    with (
        tempfile.NamedTemporaryFile() as file
    ):  # removed as soon as it is open: a process that is killed leaves nothing
        file.write(encoded)
        file.flush()
        reader = _reader(Path(file.name))
    return _video(reader, reading)


def open_media(kind: MediaKind, path: Path, reading: VideoReading) -> SampleMedia:
    """Raises `NotFound`, or `InvalidMedia` and its kin."""
    if kind is MediaKind.VIDEO and path.is_dir():
        return _folder(path, reading)
    if not path.is_file():
        raise NotFound(f"there is no {kind} {path.name!r}")
    if kind is MediaKind.IMAGE:
        return image_of(path.read_bytes())
    if path.name.endswith(clips.ENDING):
        return clips.unpack(path.read_bytes())
    return _video(_reader(path), reading)


def _rgb(encoded: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise InvalidMedia(f"a picture of {image.width} x {image.height} pixels; at most {_MOST_PIXELS:,}")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.uint8)
    except _BROKEN as error:
        raise InvalidMedia(f"a broken or unknown picture: {error}") from None


def _folder(path: Path, reading: VideoReading) -> SampleMedia:
    """Frames as files, in the order of their names; one a second, as nothing says otherwise."""
    files = sorted(file for file in path.iterdir() if file.is_file())
    if not files:
        raise InvalidMedia(f"the folder {path.name!r} holds no frames")
    chosen = uniform_indices(len(files), min(reading.frames, len(files)))
    frames, shapes = [], set()
    for i in chosen:
        rgb_HWC = _rgb(files[i].read_bytes())
        shapes.add(rgb_HWC.shape)
        if len(shapes) > 1:
            raise InvalidMedia(f"the frames of {path.name!r} differ in size")
        side = reading.side_px
        frames.append(resize_exact(rgb_HWC, side, side) if side else rgb_HWC)
    times_s = tuple(float(i) for i in chosen)
    return SampleMedia(
        kind=MediaKind.VIDEO, frames_FHWC=np.stack(frames), times_s=times_s, duration_s=float(len(files))
    )


def _reader(path: Path) -> VideoReader:
    try:
        from nvila.video.decode import VideoReader
    except ImportError:
        raise Unavailable("reading video files needs PyAV: pip install av") from None
    return VideoReader(path, DecodeLimits())


def _video(reader: VideoReader, reading: VideoReading) -> SampleMedia:
    try:
        info = reader.info()
        chosen = sorted(set(uniform_indices(info.frames, reading.frames)))
        size = (reading.side_px, reading.side_px) if reading.side_px else None
        read = [(time_s, rgb_HWC) for _, time_s, rgb_HWC in reader.read(chosen, size) if rgb_HWC is not None]
    finally:
        reader.close()
    if not read:
        raise InvalidMedia("no frame of the video can be decoded")
    return SampleMedia(
        kind=MediaKind.VIDEO,
        frames_FHWC=np.stack([rgb_HWC for _, rgb_HWC in read]),
        times_s=tuple(time_s for time_s, _ in read),
        duration_s=info.duration_s,
    )
