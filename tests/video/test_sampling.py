"""Frame numbers against the reference's own (tests/data/golden/frame_sampling.json), and windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvila.video.sampling import fps_indices, fps_indices_at, uniform_indices, usable_frames, window_frames

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden" / "frame_sampling.json").read_text())


def sampled(case: dict[str, Any], uses_fps: bool) -> list[int]:
    broken = set(case["undecodable_indices"])
    frames = usable_frames(
        case["reported_frame_count"], lambda number: number < case["decodable_frames"] and number not in broken
    )
    if uses_fps and case["config_fps"] > 0:
        taken = fps_indices(frames, case["video_fps"], case["config_fps"], case["num_video_frames"])
    else:
        taken = uniform_indices(frames, case["num_video_frames"])
    return [number for number in taken if number not in broken]


@pytest.mark.parametrize("family", ["head_load_video", "jan2025_and_remote_code_load_video"])
def test_frame_numbers_equal_the_references(family: str) -> None:
    cases = [case for case in GOLDEN[family] if "raises" not in case]
    assert len(cases) > 100
    for case in cases:
        assert sampled(case, uses_fps=family == "head_load_video") == case["indices"], case


def test_a_video_without_a_decodable_frame_has_no_usable_frames() -> None:
    for case in GOLDEN["head_load_video"]:
        if "raises" in case:
            assert usable_frames(case["reported_frame_count"], lambda _: False) == 0


def test_frames_at_a_rate_are_those_on_show_when_the_rate_varies() -> None:
    times_s = np.array([0.0, 0.1, 0.2, 1.0, 2.5])
    assert fps_indices_at(times_s, 3.0, 2.0, 100) == (0, 2, 3, 3, 3, 4)


def test_variable_and_constant_rules_agree_on_a_constant_rate() -> None:
    times_s = np.arange(100) / 25
    assert fps_indices_at(times_s, 4.0, 5.0, 100) == fps_indices(100, 25.0, 5.0, 100)


def test_neighbouring_windows_share_no_frame_and_miss_none() -> None:
    times_s = np.arange(90) / 30
    borders = [window_frames(times_s, float(second), second + 1.0) for second in range(3)]
    assert borders == [(0, 30), (30, 60), (60, 90)]


def test_a_window_shorter_than_a_frame_gives_the_frame_on_show() -> None:
    times_s = np.arange(10) / 1.0
    assert window_frames(times_s, 3.4, 3.5) == (3, 4)
