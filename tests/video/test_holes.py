"""What of a video its file should hold and does not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from nvila.types import MediaKind, VideoSampling
from nvila.video.decode import VideoReader
from nvila.video.holes import find_holes
from nvila.video.media import DecodeLimits, MediaInfo
from nvila.video.plan import plan_frames
from tests.video.made import write_video

STEPS_S = np.arange(100) * 0.04


def info_of(path: Path) -> MediaInfo:
    reader = VideoReader(path, DecodeLimits())
    try:
        return reader.info()
    finally:
        reader.close()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "flv"])
def test_a_whole_file_has_no_holes(suffix: str, tmp_path: Path) -> None:
    assert info_of(write_video(tmp_path / f"clip.{suffix}", frames=50)).holes == ()


def test_a_pause_in_a_variable_frame_rate_is_no_hole(tmp_path: Path) -> None:
    stamps = [*range(0, 800, 40), *range(9_000, 9_800, 40)]

    info = info_of(write_video(tmp_path / "clip.mp4", frames=len(stamps), stamps=stamps, time_base=Fraction(1, 1000)))

    assert info.holes == ()


@pytest.mark.parametrize(("suffix", "options"), [("mkv", {}), ("mp4", {"movflags": "faststart"})])
def test_what_was_cut_off_is_a_hole_up_to_the_announced_end(
    suffix: str, options: dict[str, str], tmp_path: Path
) -> None:
    whole = write_video(tmp_path / f"clip.{suffix}", frames=100, options={"g": "10"}, container_options=options)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * 6 // 10])

    info = info_of(whole)

    assert 10 < info.frames < 90
    ((start_s, end_s),) = info.holes
    assert start_s == pytest.approx(info.frames * 0.04, abs=0.1)  # decoding order is not quite that of time
    assert end_s == pytest.approx(4.0)


def test_what_damage_took_out_of_the_middle_is_a_hole(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mkv", frames=200, options={"g": "10"})
    data = bytearray(path.read_bytes())
    data[len(data) * 4 // 10 : len(data) * 6 // 10] = bytes(len(data) * 6 // 10 - len(data) * 4 // 10)
    path.write_bytes(data)

    info = info_of(path)

    assert info.frames < 190
    assert sum(end - start for start, end in info.holes) == pytest.approx((200 - info.frames) * 0.04, abs=0.05)


def test_the_holes_of_a_window_become_its_gaps() -> None:
    info = MediaInfo.of_video(
        container="mkv",
        codec="h264",
        size_px=(64, 48),
        times_s=np.concatenate([np.arange(50) * 0.04, 4.0 + np.arange(50) * 0.04]),
        fps=25,
        holes=[(2.0, 4.0), (6.0, 8.0)],
    )

    def gaps(start_s: float | None, end_s: float | None) -> list[tuple[float, float]]:
        wanted = VideoSampling(num_frames=8, start_s=start_s, end_s=end_s)
        plan = plan_frames(wanted, info, default_frames=8, max_frames=256, group=8)
        return [(gap.start_s, gap.end_s) for gap in plan.gaps]

    assert gaps(None, None) == [(2.0, 4.0), (6.0, 8.0)]
    assert gaps(0.0, 3.0) == [(2.0, 3.0)]
    assert gaps(4.0, 5.0) == []
    assert MediaInfo.from_wire(info.to_wire()) == info
    assert info.kind is MediaKind.VIDEO


def test_holes_are_told_from_jitter_and_from_uneven_rates() -> None:
    jitter_s = STEPS_S + np.random.default_rng(0).uniform(0, 0.02, 100)
    uneven_s = np.cumsum(np.tile([0.04, 0.04, 0.04, 1.0], 25))

    assert find_holes(STEPS_S, STEPS_S + 0.04, 4.0) == ()
    assert find_holes(jitter_s, jitter_s + 0.04, 4.0) == ()
    assert find_holes(uneven_s, uneven_s + 0.04, 0.0) == ()
    assert find_holes(STEPS_S, STEPS_S, 0.0) == ()
    assert find_holes(STEPS_S[:1], STEPS_S[:1] + 0.04, 0.04) == ()
    ((start_s, end_s),) = find_holes(STEPS_S[:50], STEPS_S[:50] + 0.04, 4.0)
    assert start_s == pytest.approx(2.0)
    assert end_s == pytest.approx(4.0)


def test_a_stream_that_begins_in_mid_file_does_not_end_the_first(tmp_path: Path) -> None:
    first = write_video(tmp_path / "first.ts", frames=1000, options={"preset": "ultrafast"}).read_bytes()
    other = write_video(tmp_path / "other.ts", frames=20, container_options={"mpegts_start_pid": "512"}).read_bytes()
    (tmp_path / "clip.ts").write_bytes(first + other + first)

    assert info_of(tmp_path / "clip.ts").frames == 2000
