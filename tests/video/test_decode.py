"""Exact frames: every frame that the reader gives equals the one that decoding everything gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nvila.model.preprocess import resize_exact
from nvila.video.decode import VideoReader
from nvila.video.media import DecodeLimits
from nvila.video.sampling import uniform_indices
from tests.clips import BIKES, BUNNY, CARPHONE
from tests.video.made import decode_everything, write_video

SIDE = 96
LIMITS = DecodeLimits()


@contextmanager
def reading(path: Path, limits: DecodeLimits = LIMITS) -> Iterator[VideoReader]:
    reader = VideoReader(path, limits)
    try:
        yield reader
    finally:
        reader.close()


def read(path: Path, numbers: list[int], limits: DecodeLimits = LIMITS) -> list[NDArray[np.uint8]]:
    with reading(path, limits) as reader:
        frames = [rgb for _, _, rgb in reader.read(numbers, (SIDE, SIDE))]
    decoded = [rgb for rgb in frames if rgb is not None]
    assert len(decoded) == len(numbers)
    return decoded


def assert_same_frames(path: Path, orders: list[list[int]], frames: int) -> None:
    """Each order of frame numbers is read with one reader, going on from where the one before ended."""
    expected = [resize_exact(rgb, SIDE, SIDE) for rgb in decode_everything(path)]
    assert len(expected) == frames
    with reading(path) as reader:
        assert reader.info().frames == frames
        for numbers in orders:
            for number, _, rgb in reader.read(numbers, (SIDE, SIDE)):
                assert rgb is not None, number
                assert np.array_equal(rgb, expected[number]), number


@pytest.mark.parametrize(("clip", "frames"), [(BIKES, 250), (CARPHONE, 120), (BUNNY, 132)])
def test_sparse_backward_and_full_reads_of_real_clips_give_the_right_frames(clip: Path, frames: int) -> None:
    sparse = [sorted(set(uniform_indices(frames, count))) for count in (1, 2, 8, 32)]
    backward = [[number] for number in (frames - 1, frames // 2, 3, 0, 0)]
    assert_same_frames(clip, [*sparse, *backward, list(range(frames))], frames)


def test_sparse_frames_are_reached_by_seeking() -> None:
    with reading(BIKES) as reader:
        reader.info()
        reader.decoded_frames = 0
        list(reader.read([0, 80, 245], (SIDE, SIDE)))
        assert reader.decoded_frames < 30


CONTAINERS = {
    "mp4": ("libx264", {"g": "12", "bf": "3", "b-pyramid": "normal"}),
    "mkv": ("libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}),
    "mov": ("libx265", {"g": "12", "x265-params": "log-level=none:open-gop=1:bframes=3"}),
    "ts": ("libx264", {"g": "12", "bf": "2"}),
    "flv": ("libx264", {"g": "12"}),
    "avi": ("mpeg4", {"g": "12"}),
    "h264.avi": ("libx264", {"g": "12", "bf": "2"}),
    "b.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "webm": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "vp8.webm": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1.mp4": ("libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}),
}


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_frames_are_exact_in_every_container_and_codec(suffix: str, tmp_path: Path) -> None:
    codec, options = CONTAINERS[suffix]
    path = write_video(tmp_path / f"clip.{suffix}", frames=60, codec=codec, options=options)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "an encoder made this process, and what it starts, real-time"
    frames = len(decode_everything(path))
    assert frames in (59, 60)
    assert_same_frames(path, [[0, 30, frames - 1], [1, 13, 14, 47], [25], [12], list(range(frames))], frames)


@pytest.mark.parametrize(("clip", "number"), [(BIKES, 77), (CARPHONE, 33), (BUNNY, 60)])
def test_pixels_equal_the_references_opencv_and_pillow(clip: Path, number: int) -> None:
    capture = cv2.VideoCapture(str(clip))
    for _ in range(number + 1):
        ok, bgr = capture.read()
    assert ok
    assert np.array_equal(read(clip, [number])[0], resize_exact(np.ascontiguousarray(bgr[:, :, ::-1]), SIDE, SIDE))


def test_colours_are_converted_as_the_models_were_trained_whatever_the_tag(tmp_path: Path) -> None:
    plain = write_video(tmp_path / "plain.mp4", frames=2)
    tagged = write_video(tmp_path / "tagged.mp4", frames=2, colorspace=1)
    with av.open(str(tagged)) as container:
        assert container.streams.video[0].codec_context.colorspace == 1
    assert np.array_equal(read(plain, [1])[0], read(tagged, [1])[0])


@pytest.mark.parametrize("rotation_deg", [90, 180, 270])
def test_rotation_is_applied_as_opencv_does(rotation_deg: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "turned.mp4", frames=3, rotation_deg=rotation_deg)
    with reading(path) as reader:
        info = reader.info()
        _, _, rgb = next(reader.read([0], None))
    ok, bgr = cv2.VideoCapture(str(path)).read()
    assert ok
    assert rgb is not None
    assert (info.height_px, info.width_px) == bgr.shape[:2] == rgb.shape[:2]
    assert np.array_equal(rgb, bgr[:, :, ::-1])


def test_large_frames_are_shrunk_during_conversion_and_stay_close_to_exact(tmp_path: Path) -> None:
    path = write_video(tmp_path / "large.mp4", frames=2, size=(2560, 1440), options={"preset": "ultrafast"})
    exact = resize_exact(decode_everything(path)[1], SIDE, SIDE).astype(int)
    shrunk = read(path, [1])[0]
    assert np.abs(shrunk - exact).mean() < 2.0  # its edges are harder than a camera's, where it is 0.5


def test_variable_frame_rates_keep_their_times(tmp_path: Path) -> None:
    stamps = [0, 10, 20, 400, 410, 2000, 2010, 2020]
    path = write_video(tmp_path / "vfr.mkv", frames=8, stamps=stamps, time_base=Fraction(1, 1000))
    with reading(path) as reader:
        info = reader.info()
        times_s = [time_s for _, time_s, _ in reader.read([0, 3, 5], (SIDE, SIDE))]
    assert info.is_variable_rate
    assert times_s == pytest.approx([0.0, 0.4, 2.0])
    assert info.times_s() == pytest.approx([stamp / 1000 for stamp in stamps])


@pytest.mark.parametrize("first", [-500, 90_000])
def test_the_first_frame_is_at_zero_wherever_the_containers_clock_starts(first: int, tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "late.mkv",
        frames=10,
        stamps=[first + 40 * number for number in range(10)],
        time_base=Fraction(1, 1000),
        container_options={"avoid_negative_ts": "disabled"},
    )
    with reading(path) as reader:
        info = reader.info()
        times_s = [time_s for _, time_s, _ in reader.read(list(range(info.frames)), (SIDE, SIDE))]
    assert times_s[:2] == pytest.approx([0.0, 0.04])
    assert not info.is_variable_rate


def test_a_recording_without_a_duration_or_an_index_is_read(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "live.mkv", frames=60, options={"g": "12", "bf": "2"}, container_options={"live": "1"}
    )
    with av.open(str(path)) as container:
        assert container.duration is None or container.streams.video[0].duration is None
    assert_same_frames(path, [[0, 30, 59], [7], list(range(60))], 60)


def test_frames_without_stamps_are_counted_from_the_start(tmp_path: Path) -> None:
    path = write_video(tmp_path / "same.mkv", frames=20, options={"g": "5", "bf": "0"})
    expected = [resize_exact(rgb, SIDE, SIDE) for rgb in decode_everything(path)]
    with reading(path) as reader:
        table = reader._table
        reader._table = replace(table, is_timed=False, pts=np.zeros_like(table.pts))
        reader._seek(None)
        for numbers in ([3, 17], [2], list(range(20))):
            for number, time_s, rgb in reader.read(numbers, (SIDE, SIDE)):
                assert rgb is not None
                assert np.array_equal(rgb, expected[number])
                assert time_s == pytest.approx(number / 25)


@pytest.mark.parametrize("rate", [Fraction(1, 1000), 1000])
def test_extreme_frame_rates_are_read(rate: Fraction | int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "rate.mp4", frames=5, rate=rate)
    with reading(path) as reader:
        info = reader.info()
    assert info.frames == 5
    assert info.fps == pytest.approx(float(rate))
    assert info.duration_s == pytest.approx(5 / float(rate))


@pytest.mark.parametrize("size", [(2, 2), (2, 2000), (4096, 16)])
def test_extreme_shapes_are_read(size: tuple[int, int], tmp_path: Path) -> None:
    path = write_video(tmp_path / "shape.mp4", frames=2, size=size)
    assert all(rgb.shape == (SIDE, SIDE, 3) for rgb in read(path, [0, 1]))


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "size"),
    [
        ("ten.mp4", "libx264", "yuv420p10le", (64, 48)),
        ("alpha.webm", "libvpx-vp9", "yuva420p", (64, 48)),
        ("odd.mkv", "mpeg4", "yuv420p", (65, 47)),
        ("grey.mp4", "libx264", "gray", (64, 48)),
        ("full.mp4", "libx264", "yuvj420p", (64, 48)),
        ("one.gif", "gif", "rgb8", (1, 1)),
        ("anim.gif", "gif", "rgb8", (65, 47)),
        ("motion.avi", "mjpeg", "yuvj420p", (64, 48)),
        ("prores.mov", "prores_ks", "yuv422p10le", (64, 48)),
    ],
)
def test_unusual_pixels_are_read(name: str, codec: str, pixels: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = write_video(tmp_path / name, frames=5, codec=codec, pixels=pixels, size=size)
    with reading(path) as reader:
        info = reader.info()
        frames = [rgb for _, _, rgb in reader.read([0, 4], (SIDE, SIDE))]
    assert (info.frames, info.width_px, info.height_px) == (5, *size)
    assert all(rgb is not None and rgb.shape == (SIDE, SIDE, 3) for rgb in frames)


def test_the_first_of_two_video_streams_is_used(tmp_path: Path) -> None:
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for stream, level in zip(streams, (200, 30), strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    with reading(path) as reader:
        assert reader.info().stream_count == 2
        _, _, rgb = next(reader.read([0], (SIDE, SIDE)))
    assert rgb is not None
    assert rgb.mean() > 150


def test_a_resolution_that_changes_midway_still_gives_frames_of_one_size(tmp_path: Path) -> None:
    parts = [write_video(tmp_path / f"{width}.ts", frames=10, size=(width, 48)) for width in (64, 128)]
    path = tmp_path / "changes.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with reading(path) as reader:
        info = reader.info()
        frames = [rgb for _, _, rgb in reader.read(list(range(info.frames)), (SIDE, SIDE))]
    assert info.frames > 10
    assert sum(rgb is not None for rgb in frames) > 10


def test_a_single_frame_is_a_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "single.mp4", frames=1)
    with reading(path) as reader:
        info = reader.info()
        assert (info.frames, info.is_variable_rate, info.knots) == (1, False, ((0, 0.0),))
        assert next(reader.read([0], (SIDE, SIDE)))[2] is not None


def test_a_broken_middle_gives_what_decodes_and_says_what_does_not(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=90, options={"g": "15", "bf": "2"})
    intact = [resize_exact(rgb, SIDE, SIDE) for rgb in decode_everything(path)]
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        damaged = [(p.pos or 0, p.size) for p in packets[30:45]]
    data = bytearray(path.read_bytes())
    for start, size in damaged:
        data[start : start + size] = bytes(size)
    path.write_bytes(data)
    with reading(path) as reader:
        assert reader.info().frames == 90
        frames = [rgb for _, _, rgb in reader.read(list(range(90)), (SIDE, SIDE))]
    missing = [number for number, rgb in enumerate(frames) if rgb is None]
    assert set(missing) >= set(range(32, 44))
    assert set(missing) <= set(range(28, 47))
    assert all(np.array_equal(rgb, intact[n]) for n, rgb in enumerate(frames) if rgb is not None and not 26 < n < 47)


def test_a_file_cut_off_behind_its_index_keeps_the_frames_before_the_cut(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "clip.mp4", frames=90, options={"g": "15"}, container_options={"movflags": "faststart"}
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with reading(path) as reader:
        info = reader.info()
        last = [rgb for _, _, rgb in reader.read([0, info.frames - 1], (SIDE, SIDE))]
    assert 20 < info.frames < 90
    assert all(rgb is not None for rgb in last)


def test_a_frame_number_past_the_end_is_missing_not_an_error(tmp_path: Path) -> None:
    with reading(write_video(tmp_path / "clip.mp4", frames=3)) as reader:
        frames = [rgb for _, _, rgb in reader.read([2, 99], (SIDE, SIDE))]
    assert frames[0] is not None
    assert frames[1] is None


def test_decoder_threads_change_nothing() -> None:
    numbers = [3, 77, 78, 200]
    threaded = read(BIKES, numbers, DecodeLimits(threads=2))
    assert all(np.array_equal(one, other) for one, other in zip(read(BIKES, numbers), threaded, strict=True))
