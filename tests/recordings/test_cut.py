"""Time becomes chunks and groups by arithmetic alone: nothing is lost, nothing is taken twice but where it is asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.errors import InvalidRequest, LimitExceeded
from nvila.recordings import cut
from nvila.recordings.types import ChunkPolicy
from nvila.types import Gap

_FPS = st.sampled_from([0.2, 0.5, 1.0, 3.0, 29.97])
_few = settings(max_examples=60, deadline=None)


@st.composite
def policies(draw: st.DrawFn) -> ChunkPolicy:
    fps = draw(_FPS)
    chunk_s = draw(st.integers(1, 100)) / 10 + 1 / fps
    stride_s = draw(st.one_of(st.none(), st.integers(0, 200).map(lambda tenths: tenths / 10 + 1 / fps)))
    return ChunkPolicy(fps=fps, chunk_s=chunk_s, stride_s=stride_s)


durations = st.integers(1, 300).map(lambda tenths: tenths / 10)


@_few
@given(policies(), durations)
def test_each_instant_is_in_exactly_the_chunks_whose_stretch_it_lies_in(policy: ChunkPolicy, duration_s: float) -> None:
    count = cut.chunk_count(policy, duration_s)
    held: dict[float, list[int]] = {}
    for number in range(count):
        for time_s in cut.chunk_times(policy, number, duration_s):
            held.setdefault(time_s, []).append(number)
    for instant in range(cut.last_instant(policy, duration_s) + 1):
        time_s = instant / policy.fps
        by_policy = [
            number
            for number in range(count)
            if cut.chunk_span(policy, number)[0] - 1e-6 <= time_s < cut.chunk_span(policy, number)[1] - 1e-6
        ]
        assert held.get(time_s, []) == by_policy


@_few
@given(policies(), durations)
def test_chunks_that_touch_or_overlap_lose_no_instant(policy: ChunkPolicy, duration_s: float) -> None:
    if cut.stride_s(policy) > policy.chunk_s:
        return
    taken = {
        time_s
        for number in range(cut.chunk_count(policy, duration_s))
        for time_s in cut.chunk_times(policy, number, duration_s)
    }
    assert taken == {instant / policy.fps for instant in range(cut.last_instant(policy, duration_s) + 1)}


@_few
@given(policies(), durations)
def test_every_counted_chunk_holds_an_instant_and_the_next_would_add_none(
    policy: ChunkPolicy, duration_s: float
) -> None:
    count = cut.chunk_count(policy, duration_s)
    assert count >= 1
    seen: set[float] = set()
    for number in range(count):
        times_s = set(cut.chunk_times(policy, number, duration_s))
        assert times_s - seen, f"chunk {number} of {count} adds nothing"
        seen |= times_s
    assert not set(cut.chunk_times(policy, count, duration_s)) - seen


@_few
@given(st.integers(0, 500), st.integers(1, 16))
def test_groups_are_in_order_whole_but_the_last_and_leave_nothing_out(count: int, group: int) -> None:
    slices = cut.cut_groups(count, group)
    assert [at for one in slices for at in range(count)[one]] == list(range(count))
    assert all(len(range(count)[one]) == group for one in slices[:-1])


def test_overlapping_chunks_share_groups_when_the_stride_is_a_whole_number_of_them() -> None:
    policy = ChunkPolicy(fps=1.0, chunk_s=32.0, stride_s=24.0)
    first, second = cut.chunk_times(policy, 0), cut.chunk_times(policy, 1)
    groups = [[times_s[one] for one in cut.cut_groups(len(times_s), 8)] for times_s in (first, second)]
    assert groups[0][3] == groups[1][0] == tuple(float(s) for s in range(24, 32))


def test_unseen_time_between_chunks_is_in_none() -> None:
    policy = ChunkPolicy(fps=1.0, chunk_s=10.0, stride_s=60.0)
    assert cut.chunk_times(policy, 0)[-1] == 9.0
    assert cut.chunk_times(policy, 1)[0] == 60.0
    assert cut.chunk_count(policy, 59.0) == 1


def test_a_frame_stays_on_show_until_the_next_and_not_over_a_hole_or_past_the_end() -> None:
    times_s = np.array([0.0, 0.4, 0.8, 5.0])
    shown = cut.frames_on_show([0.0, 0.5, 1.0, 3.0, 5.0, 6.0], times_s, 5.5, holes=[(1.2, 5.0)])
    assert shown == (0, 1, 2, -1, 3, -1)


def test_nothing_is_on_show_before_the_first_frame() -> None:
    assert cut.frames_on_show([0.0, 1.0], np.array([0.5]), 2.0) == (-1, 0)


def test_lost_instants_that_follow_each_other_are_one_gap_that_ends_with_the_chunk() -> None:
    gaps = cut.gaps_between([3.0, 1.0, 2.0, 7.0], 1.0, 7.5, "why")
    assert gaps == (Gap(start_s=1.0, end_s=4.0, reason="why"), Gap(start_s=7.0, end_s=7.5, reason="why"))


@pytest.mark.parametrize(
    ("policy", "param"),
    [
        (ChunkPolicy(fps=0.0), "fps"),
        (ChunkPolicy(fps=31.0), "fps"),
        (ChunkPolicy(fps=math.nan), "fps"),
        (ChunkPolicy(chunk_s=-1.0), "chunk_s"),
        (ChunkPolicy(chunk_s=3601.0), "chunk_s"),
        (ChunkPolicy(stride_s=0.0), "stride_s"),
        (ChunkPolicy(floor_s=math.inf), "floor_s"),
        (ChunkPolicy(fps=0.01, chunk_s=10.0), "chunk_s"),
        (ChunkPolicy(fps=0.5, stride_s=1.0), "stride_s"),
    ],
)
def test_a_policy_that_means_nothing_is_refused_and_the_field_named(policy: ChunkPolicy, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        cut.check_policy(policy)
    assert refused.value.param == f"policy.{param}"


def test_a_chunk_of_more_frames_than_a_worker_holds_is_refused_with_both_numbers() -> None:
    cut.check_policy(ChunkPolicy(fps=16.0, chunk_s=256.0))
    with pytest.raises(LimitExceeded, match=r"4,112.0 asked, at most 4,096"):
        cut.check_policy(ChunkPolicy(fps=16.0, chunk_s=257.0))


def film(segment: int, start_s: float, frames: int, fps: float = 10.0, **more: object) -> cut.Footage:
    times_s = start_s + np.arange(frames) / fps
    return cut.Footage(segment=segment, start_s=start_s, end_s=start_s + frames / fps, times_s=times_s, **more)  # type: ignore[arg-type]  # holes only


def test_a_chunk_takes_the_frame_on_show_at_each_instant() -> None:
    chunk = cut.plan_chunk(ChunkPolicy(fps=2.0, chunk_s=4.0), 1, [film(0, 0.0, 100)], group=8)
    assert (chunk.start_s, chunk.end_s, chunk.missing_s) == (4.0, 8.0, ())
    (group,) = chunk.groups
    assert group.instants_s == (4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5)
    assert group.indices == (40, 45, 50, 55, 60, 65, 70, 75)
    assert not any(group.is_still)


def test_a_group_crosses_neither_a_chunk_nor_a_segment() -> None:
    chunk = cut.plan_chunk(ChunkPolicy(chunk_s=16.0), 0, [film(0, 0.0, 50), film(1, 5.0, 200)], group=8)
    assert [(group.segment, len(group.indices)) for group in chunk.groups] == [(0, 5), (1, 8), (1, 3)]


def test_instants_without_footage_are_missing() -> None:
    chunk = cut.plan_chunk(ChunkPolicy(chunk_s=12.0), 0, [film(0, 0.0, 30), film(1, 8.0, 100)], group=8)
    assert chunk.missing_s == (3.0, 4.0, 5.0, 6.0, 7.0)


def test_a_hole_in_the_file_is_missing_and_the_recordings_end_is_not() -> None:
    chunk = cut.plan_chunk(ChunkPolicy(chunk_s=32.0), 0, [film(0, 0.0, 100, holes=((2.5, 4.5),))], 8, duration_s=10.0)
    assert chunk.missing_s == (3.0, 4.0)
    assert chunk.end_s == 10.0


def test_a_frame_that_is_still_on_show_is_marked_so() -> None:
    slow = cut.Footage(segment=0, start_s=0.0, end_s=10.0, times_s=np.array([0.0, 2.5, 7.0]))
    (group,) = cut.plan_chunk(ChunkPolicy(chunk_s=8.0), 0, [slow], 8).groups
    assert group.indices == (0, 0, 0, 1, 1, 1, 1, 2)
    assert group.is_still == (False, True, True, False, True, True, True, False)
