"""From a sampling to runs of frames."""

from __future__ import annotations

import math

import pytest

from nvila.errors import InvalidRequest, LimitExceeded, NvilaError
from nvila.types import MediaKind, VideoSampling
from nvila.video.media import MediaInfo
from nvila.video.plan import FramePlan, plan_frames
from nvila.video.sampling import uniform_indices


def video(frames: int = 250, fps: float = 25.0) -> MediaInfo:
    return MediaInfo(
        kind=MediaKind.VIDEO,
        container="mp4",
        codec="h264",
        width_px=640,
        height_px=272,
        frames=frames,
        fps=fps,
        duration_s=frames / fps,
        knots=((0, 0.0), (frames - 1, (frames - 1) / fps)),
    )


def planned(info: MediaInfo | None = None, group: int = 8, max_frames: int = 256, **sampling: float | int) -> FramePlan:
    wanted = VideoSampling(**sampling)  # type: ignore[arg-type]  # the table below also holds numbers of the wrong kind
    return plan_frames(wanted, info or video(), default_frames=64, max_frames=max_frames, group=group)


def test_256_frames_are_eight_runs_of_32() -> None:
    plan = planned(num_frames=256)
    assert [len(run.indices) for run in plan.runs] == [32] * 8
    assert plan.indices == uniform_indices(250, 256)
    assert (plan.start_s, plan.end_s) == (0.0, 249 / 25)


def test_a_number_of_frames_is_brought_up_to_whole_groups() -> None:
    plan = planned(num_frames=33)
    assert plan.frames_asked == 33
    assert plan.indices == uniform_indices(250, 40)
    assert [len(run.indices) for run in plan.runs] == [32, 8]


def test_a_number_of_frames_is_brought_down_where_up_would_pass_the_maximum() -> None:
    assert len(planned(num_frames=99, max_frames=100).indices) == 96


def test_a_maximum_below_the_group_keeps_the_number_and_leaves_filling_up_to_the_decoder() -> None:
    assert len(planned(num_frames=3, max_frames=4).indices) == 3


def test_no_wish_means_the_models_default() -> None:
    plan = planned()
    assert (plan.frames_asked, len(plan.indices)) == (64, 64)


def test_runs_are_whole_groups_even_when_the_group_does_not_divide_a_chunk() -> None:
    assert [len(run.indices) for run in planned(num_frames=72, group=12).runs] == [24, 24, 24]


def test_a_rate_counts_from_the_windows_first_frame() -> None:
    plan = planned(fps=2.0, start_s=2.0, end_s=4.0)
    assert plan.indices == (50, 62, 75, 87)
    assert plan.frames_asked == 4


def test_a_window_limits_the_frames() -> None:
    plan = planned(num_frames=8, start_s=1.0, end_s=2.0)
    assert (plan.indices[0], plan.indices[-1]) == (25, 49)


def test_a_window_may_end_past_the_video_and_the_plan_says_where_it_ended() -> None:
    plan = planned(num_frames=8, start_s=9.0, end_s=1000.0)
    assert plan.indices[-1] == 249
    assert plan.end_s == pytest.approx(9.96)


def test_variable_rates_follow_the_frames_own_times() -> None:
    info = MediaInfo(
        kind=MediaKind.VIDEO, container="mp4", codec="h264", width_px=64, height_px=64, frames=5, fps=2.0,
        duration_s=3.0, is_variable_rate=True, knots=((0, 0.0), (1, 0.1), (2, 0.2), (3, 1.0), (4, 2.5)),
    )  # fmt: skip
    assert planned(info, fps=2.0).indices == (0, 2, 3, 3, 3, 4)
    assert planned(info, num_frames=8, start_s=0.9, end_s=2.0).indices == (3,) * 8


def test_an_image_is_one_run_of_one_frame() -> None:
    info = MediaInfo(kind=MediaKind.IMAGE, container="png", codec="png", width_px=3, height_px=3, frames=1)
    assert planned(info, num_frames=99).indices == (0,)


@pytest.mark.parametrize(
    ("sampling", "error", "words"),
    [
        ({"num_frames": 0}, InvalidRequest, "at least 1, not 0"),
        ({"num_frames": -1}, InvalidRequest, "at least 1, not -1"),
        ({"num_frames": 257}, LimitExceeded, "257 asked, at most 256"),
        ({"num_frames": 8, "fps": 1.0}, InvalidRequest, "exclude each other"),
        ({"fps": 0.0}, InvalidRequest, "positive"),
        ({"fps": math.nan}, InvalidRequest, "positive"),
        ({"fps": math.inf}, InvalidRequest, "positive"),
        ({"fps": 1e308}, LimitExceeded, "at most 1,000"),
        ({"fps": 30.0}, LimitExceeded, "300 asked, at most 256"),
        ({"start_s": 3.0, "end_s": 2.0}, InvalidRequest, "end after it starts"),
        ({"start_s": 2.0, "end_s": 2.0}, InvalidRequest, "end after it starts"),
        ({"start_s": -1.0}, InvalidRequest, "from 0"),
        ({"end_s": math.nan}, InvalidRequest, "from 0"),
        ({"start_s": math.inf}, InvalidRequest, "from 0"),
        ({"start_s": 10.0}, InvalidRequest, "past the video's end at 10.000 s"),
    ],
)
def test_a_sampling_that_cannot_be_served_is_refused(
    sampling: dict[str, float], error: type[NvilaError], words: str
) -> None:
    with pytest.raises(error, match=words):
        planned(**sampling)  # type: ignore[arg-type]  # mypy does not see that the names are those of a sampling


def test_a_tiny_rate_gives_the_first_frame() -> None:
    assert planned(fps=5e-324).indices == (0,)


def test_what_travels_to_the_workers_comes_back_the_same() -> None:
    assert MediaInfo.from_wire(video().to_wire()) == video()
