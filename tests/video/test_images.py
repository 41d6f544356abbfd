"""Images: RGB as the reference makes it, upright, and typed errors for what is none."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from nvila.errors import InvalidMedia, LimitExceeded, NvilaError, UnsupportedMedia
from nvila.video.images import probe_image, read_image
from nvila.video.media import DecodeLimits
from tests.video.made import picture, write_image

LIMITS = DecodeLimits()
RGB = Image.fromarray(picture(3))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_every_allowed_format_reads_as_pillow_converts_it(suffix: str, tmp_path: Path) -> None:
    path = write_image(tmp_path / f"picture.{suffix}", RGB)
    info = probe_image(path, LIMITS)
    assert (info.width_px, info.height_px, info.frames) == (64, 48, 1)
    with Image.open(path) as image:
        assert np.array_equal(read_image(path, LIMITS), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_every_mode_becomes_rgb_with_alpha_dropped(mode: str, tmp_path: Path) -> None:
    image = RGB.convert(mode)
    path = write_image(tmp_path / "picture.png", image)
    assert np.array_equal(read_image(path, LIMITS), np.asarray(image.convert("RGB")))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    path = write_image(tmp_path / "picture.jpg", RGB.convert("CMYK"), quality=95)
    assert np.abs(read_image(path, LIMITS).astype(int) - np.asarray(RGB)).mean() < 8


def test_deep_grey_is_not_clipped_to_white(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64 * 48, dtype=np.uint16).reshape(48, 64)
    path = write_image(tmp_path / "deep.png", Image.fromarray(levels))
    assert np.array_equal(read_image(path, LIMITS)[:, :, 0], levels >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write_image(tmp_path / "turned.png", RGB, exif=exif)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    assert np.array_equal(read_image(path, LIMITS), np.asarray(upright))
    info = probe_image(path, LIMITS)
    assert (info.width_px, info.height_px) == upright.size


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_of_an_animation_the_first_frame_is_taken(suffix: str, tmp_path: Path) -> None:
    others = [Image.fromarray(picture(number)) for number in range(20)]
    path = tmp_path / f"moving.{suffix}"
    RGB.save(path, save_all=True, append_images=others)
    first = read_image(path, LIMITS).astype(int)
    assert np.abs(first - np.asarray(RGB)).mean() < 10


def test_a_colour_profile_of_megabytes_is_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(4_000_000)
    path = write_image(tmp_path / "profile.png", RGB, icc_profile=profile)
    with contextlib.suppress(InvalidMedia):  # Pillow bounds what a chunk may inflate to
        assert np.array_equal(read_image(path, LIMITS), np.asarray(RGB))


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def broken_files() -> dict[str, tuple[bytes, type[NvilaError]]]:
    bomb = png_header(40_000, 40_000) + png_chunk(b"IDAT", zlib.compress(bytes(100_000))) + png_chunk(b"IEND", b"")
    return {
        "empty": (b"", InvalidMedia),
        "text": (b"not an image at all\n" * 50, UnsupportedMedia),
        "bomb": (bomb, LimitExceeded),
        "huge header": (png_header(65_535, 65_535) + png_chunk(b"IDAT", b""), LimitExceeded),
        "a line": (png_header(1, 1_000_000) + png_chunk(b"IDAT", b""), LimitExceeded),
        "header only": (png_header(64, 48), InvalidMedia),
        "jpeg2000": (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64), UnsupportedMedia),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", UnsupportedMedia),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnsupportedMedia),
    }


@pytest.mark.parametrize("name", broken_files())
def test_what_is_no_usable_image_gets_a_typed_error(name: str, tmp_path: Path) -> None:
    data, error = broken_files()[name]
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        read_image(path, LIMITS)
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_a_cut_off_image_gets_a_typed_error(suffix: str, part: float, tmp_path: Path) -> None:
    path = write_image(tmp_path / f"picture.{suffix}", Image.fromarray(picture(1, 640, 480)))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InvalidMedia):
        read_image(path, LIMITS)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_random_damage_never_raises_anything_else(suffix: str, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    path = write_image(tmp_path / f"picture.{suffix}", RGB)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        damaged = whole.copy()
        damaged[random.integers(0, len(whole), 6)] = random.integers(0, 256, 6)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(NvilaError):
            assert read_image(path, LIMITS).shape[2] == 3


def test_both_numbers_are_in_the_message_about_too_many_pixels(tmp_path: Path) -> None:
    path = write_image(tmp_path / "picture.png", RGB)
    with pytest.raises(LimitExceeded, match=r"64 x 48 picture: 3,072 asked, at most 3,000"):
        probe_image(path, DecodeLimits(max_pixels=3000))


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(InvalidMedia, match="not a plain file"):
        probe_image(tmp_path, LIMITS)
