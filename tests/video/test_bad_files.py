"""Files that are broken, hostile or odd, through a real decode pool: a usable answer or a typed error, every time."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from nvila.errors import InvalidMedia, LimitExceeded, NvilaError, UnsupportedMedia
from nvila.types import Deadline, FrameRun, MediaKind
from nvila.video.media import DecodeLimits, MediaInfo
from nvila.video.pool import DecodePool
from tests.clips import BIKES
from tests.video.conftest import Pools
from tests.video.made import picture, write_video

VIDEO = MediaKind.VIDEO


async def probe(pool: DecodePool, path: Path, kind: MediaKind = VIDEO) -> MediaInfo:
    return await pool.probe(path, kind, Deadline.after(30))


async def decoded(pool: DecodePool, path: Path, numbers: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """(frames that came, positions that did not)"""
    async with pool.decode(path, VIDEO, FrameRun(indices=numbers), 64, 1, Deadline.after(30)) as chunk:
        assert len(chunk.frames_FHWC) == len(chunk.times_s)
        return len(chunk.times_s), chunk.missing


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


def nested_boxes(depth: int) -> bytes:
    body = b""
    for _ in range(depth):
        body = box(b"moov", body)
    return box(b"ftyp", b"isom\x00\x00\x02\x00isom") + body


def without_index(folder: Path) -> bytes:
    data = write_video(folder / "whole.mp4", frames=50).read_bytes()
    return data[: data.index(b"moov") - 4]


def with_patched(folder: Path, name: bytes, offset: int, value: bytes) -> bytes:
    data = bytearray(write_video(folder / "whole.mp4", frames=50).read_bytes())
    at = data.rindex(name) + offset
    data[at : at + len(value)] = value
    return bytes(data)


def audio_only(folder: Path) -> bytes:
    path = folder / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def encrypted(folder: Path) -> bytes:
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "0" * 31 + "1", "encryption_kid": "0" * 31 + "2"}
    return write_video(folder / "secret.mp4", frames=10, container_options=key).read_bytes()


def jpeg2000(folder: Path) -> bytes:
    return write_video(folder / "film.mov", frames=3, codec="jpeg2000", pixels="yuv420p").read_bytes()


def playlist(_: Path) -> bytes:
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXTINF:9,\nhttp://127.0.0.1:1/x.ts\n"


def still(suffix: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        path = folder / f"still.{suffix}"
        Image.fromarray(picture(1)).save(path)
        return path.read_bytes()

    return make


NOT_VIDEOS: dict[str, tuple[Callable[[Path], bytes], type[NvilaError]]] = {
    "empty": (lambda _: b"", InvalidMedia),
    "one byte": (lambda _: b"\x00", InvalidMedia),
    "text": (lambda _: b"this is no video\n" * 99, InvalidMedia),
    "random": (lambda _: np.random.default_rng(1).bytes(100_000), InvalidMedia),
    "index missing": (without_index, InvalidMedia),
    "audio only": (audio_only, InvalidMedia),
    "encrypted": (encrypted, UnsupportedMedia),
    "jpeg2000": (jpeg2000, UnsupportedMedia),
    "playlist": (playlist, InvalidMedia),
    "concat script": (lambda _: b"ffconcat version 1.0\nfile /etc/passwd\n", InvalidMedia),
    "dash manifest": (
        lambda _: b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        InvalidMedia,
    ),
    "subtitles": (lambda _: b"1\n00:00:00,000 --> 00:00:09,000\nhello\n", InvalidMedia),
    "png": (still("png"), InvalidMedia),
    "jpeg": (still("jpg"), InvalidMedia),
    "still webp": (still("webp"), InvalidMedia),
    "nested boxes": (lambda _: nested_boxes(20_000), InvalidMedia),
    "compressed boxes": (
        lambda _: nested_boxes(0) + box(b"moov", box(b"cmov", zlib.compress(bytes(10_000_000)))),
        InvalidMedia,
    ),
    "huge header": (lambda _: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(500), InvalidMedia),
}


@pytest.mark.parametrize("name", NOT_VIDEOS)
async def test_what_is_no_usable_video_gets_a_typed_error(name: str, pool: DecodePool, tmp_path: Path) -> None:
    make, error = NOT_VIDEOS[name]
    path = tmp_path / "clip.mp4"
    path.write_bytes(make(tmp_path))
    with pytest.raises(error) as caught:
        await probe(pool, path)
    assert str(tmp_path) not in caught.value.message
    assert "0x" not in caught.value.message
    assert pool.stats.crashes == 0


async def test_pixels_over_the_limit_are_refused_from_the_header(pools: Pools) -> None:
    async with pools(limits=DecodeLimits(workers=1, max_pixels=100_000)) as pool:
        with pytest.raises(LimitExceeded, match=r"640 x 272 picture: 174,080 asked, at most 100,000"):
            await probe(pool, BIKES)


async def test_a_file_over_the_size_limit_is_refused(pools: Pools) -> None:
    async with pools(limits=DecodeLimits(workers=1, max_file_bytes=1000)) as pool:
        with pytest.raises(LimitExceeded, match=r"509,868 asked, at most 1,000"):
            await probe(pool, BIKES)


async def test_too_many_frames_in_a_file_are_refused(pools: Pools) -> None:
    async with pools(limits=DecodeLimits(workers=1, max_source_frames=100)) as pool:
        with pytest.raises(LimitExceeded, match="frames in a video file"):
            await probe(pool, BIKES)


async def test_an_index_that_claims_a_billion_frames_ends_soon(pool: DecodePool, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(with_patched(tmp_path, b"stsz", 8, struct.pack(">II", 1, 1_000_000_000)))
    with contextlib.suppress(InvalidMedia, LimitExceeded):
        info = await probe(pool, path)
        assert info.frames <= 50
    assert pool.stats.crashes == 0


async def test_a_size_in_the_index_that_contradicts_the_pictures_does_no_harm(pool: DecodePool, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(with_patched(tmp_path, b"avc1", 28, struct.pack(">HH", 65_535, 65_535)))
    with contextlib.suppress(LimitExceeded):
        assert (await probe(pool, path)).width_px == 64
        assert await decoded(pool, path, (0, 49)) == (2, ())
    assert pool.stats.crashes == 0


async def test_paths_are_never_taken_for_protocols(pool: DecodePool, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", frames=3)
    for spelling in (
        f"concat:{tmp_path}/clip.mp4",
        f"subfile,,start,0,end,9,,:{tmp_path}/clip.mp4",
        "http://127.0.0.1:9/",
    ):
        with pytest.raises(InvalidMedia, match="cannot be read"):
            await probe(pool, Path(spelling))


async def test_a_pipe_or_a_device_is_not_opened(pool: DecodePool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero"), tmp_path):
        with pytest.raises(InvalidMedia, match="not a plain file"):
            await probe(pool, path)


async def test_a_broken_middle_is_reported_run_by_run(pool: DecodePool, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=96, options={"g": "16"})
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for packet in packets[32:64]:
        start = packet.pos or 0
        data[start : start + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    assert (await probe(pool, path)).frames == 96
    came = [await decoded(pool, path, tuple(range(at, at + 16))) for at in range(0, 96, 16)]
    assert [count for count, _ in came] == [16, 16, 0, 0, 16, 16]
    assert came[2][1] == tuple(range(16))


async def test_an_animated_gif_is_a_video(pool: DecodePool, tmp_path: Path) -> None:
    pictures = [Image.fromarray(picture(number)) for number in range(40)]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:], duration=100)
    info = await probe(pool, tmp_path / "moving.gif")
    assert (info.frames, info.codec) == (40, "gif")
    assert info.fps == pytest.approx(10, rel=0.05)
    assert await decoded(pool, tmp_path / "moving.gif", (0, 20, 39)) == (3, ())


async def test_an_animated_webp_is_a_video_with_the_times_of_its_frames(pool: DecodePool, tmp_path: Path) -> None:
    path = tmp_path / "moving.webp"
    pictures = [Image.fromarray(picture(number)) for number in range(12)]
    durations = [100] * 6 + [1000] * 6
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, lossless=True)
    info = await probe(pool, path)
    assert (info.frames, info.is_variable_rate) == (12, True)
    assert info.duration_s == pytest.approx(6.6, abs=1.0)
    assert info.time_s(11) == pytest.approx(5.6)
    run = FrameRun(indices=(0, 3, 11))
    for _ in range(2):
        async with pool.decode(path, VIDEO, run, None, 1, Deadline.after(30)) as chunk:
            assert chunk.missing == ()
            for frame, number in zip(chunk.frames_FHWC, run.indices, strict=True):
                assert np.array_equal(frame, picture(number))


async def test_a_video_with_sound_subtitles_and_cover_art_is_read_by_its_pictures(
    pool: DecodePool, tmp_path: Path
) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        container.add_attachment("font.ttf", "font/ttf", bytes(1000))
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        silence.sample_rate = 44100
        container.mux(sound.encode(silence))
        for number in range(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    assert (await probe(pool, path)).frames == 5
    assert await decoded(pool, path, (0, 4)) == (2, ())


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "webm", "gif"])
async def test_random_damage_gives_frames_or_a_typed_error_and_never_a_crash(
    suffix: str, pool: DecodePool, tmp_path: Path
) -> None:
    codec, pixels = {"webm": ("libvpx", "yuv420p"), "gif": ("gif", "rgb8"), "avi": ("mpeg4", "yuv420p")}.get(
        suffix, ("libx264", "yuv420p")
    )
    options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {}
    path = write_video(tmp_path / f"clip.{suffix}", frames=30, codec=codec, pixels=pixels, options=options)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    random = np.random.default_rng(len(suffix))
    for count in range(25):
        damaged = whole.copy()
        damaged[random.integers(0, len(whole), 1 + 4 * count)] = random.integers(0, 256, 1 + 4 * count)
        path.write_bytes(damaged[: len(damaged) if count % 2 else random.integers(1, len(damaged))].tobytes())
        with contextlib.suppress(InvalidMedia, LimitExceeded):
            info = await probe(pool, path)
            await decoded(pool, path, tuple(range(0, info.frames, 3)))
    assert pool.stats.crashes == 0
    assert pool.stats.kills == 0
