"""One image file as an RGB picture, by Pillow. Runs in a decode worker only.

As the reference does, pictures become 8-bit RGB by Pillow's `convert("RGB")`: alpha is dropped, not composited,
palettes are looked up, CMYK is converted, colour profiles are not applied (NVILA-SPEC §2.1). Unlike it, a picture is
turned upright by its EXIF orientation, as every viewer shows it. Of an animation the first frame is taken.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nvila.errors import InvalidMedia, UnsupportedMedia
from nvila.types import MediaKind
from nvila.video.media import DecodeLimits, MediaInfo
from nvila.video.probe import check_file, check_pixels

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow readers that may run. No JPEG2000, no formats that start other programs (EPS) or read lists of files."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture with this EXIF orientation upright, as in `ImageOps.exif_transpose`."""
_FIRST_SIDEWAYS = 5

BROKEN_IMAGE = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, ArithmeticError, struct.error)
"""What Pillow's readers raise on broken files."""


def probe_image(path: Path, limits: DecodeLimits) -> MediaInfo:
    """What the header says. Raises `InvalidMedia`, `UnsupportedMedia` or `LimitExceeded`."""
    with open_image(path, limits) as image:
        width, height = image.size
        if _orientation(image) >= _FIRST_SIDEWAYS:
            width, height = height, width
        return MediaInfo(
            kind=MediaKind.IMAGE,
            container=str(image.format).lower(),
            codec=str(image.format).lower(),
            width_px=width,
            height_px=height,
            frames=1,
        )


def read_image(path: Path, limits: DecodeLimits) -> NDArray[np.uint8]:
    """The picture as uint8 RGB (rows, columns, 3). Raises as `probe_image`; a cut-off file is `InvalidMedia`."""
    with open_image(path, limits) as image:
        turn = _UPRIGHT.get(_orientation(image))
        try:
            image.load()
            rgb = _deep_grey(image) if image.mode.startswith("I") else image.convert("RGB")
            return np.asarray(rgb if turn is None else rgb.transpose(turn), dtype=np.uint8)
        except MemoryError:
            raise
        except BROKEN_IMAGE:
            raise InvalidMedia("the image is broken or cut off") from None


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey by its upper byte; `convert` would clip it to white."""
    levels = np.asarray(image).clip(0, 65535).astype(np.uint16)
    return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")


def open_image(path: Path, limits: DecodeLimits) -> Image.Image:
    """Read the header and check it. Raises as `probe_image`."""
    check_file(path, limits)
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked below, before a pixel is decoded
    try:
        image = Image.open(path, formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise UnsupportedMedia(f"not an image of a known type ({', '.join(FORMATS)})") from None
    except BROKEN_IMAGE:
        raise InvalidMedia("the image's header is broken") from None
    try:
        check_pixels(*image.size, limits)
    except BaseException:
        image.close()
        raise
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none or the block cannot be read."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except MemoryError:
        raise
    except BROKEN_IMAGE:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
