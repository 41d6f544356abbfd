"""Windows of recordings: what they hold, what is refused, and where lost tokens come back from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nvila.cache.codec import Record, RecordFormat, unpack
from nvila.errors import InvalidMedia, InvalidRequest, NotFound
from nvila.recordings.encode import Model
from nvila.recordings.planner import Budget
from nvila.recordings.types import ChunkPolicy, Group, RecordedChunk, Recording, RecordingState, SourceKind
from nvila.recordings.window import NOT_SAMPLED, NOT_YET, UNDECODABLE, OpenWindow, RecordingWindows, lay_window, resolve
from nvila.types import (
    Deadline,
    Gap,
    Level,
    RecordingWindow,
    TokenDtype,
    TokensRef,
    VisualTokens,
    WindowMode,
)
from tests.recordings import made
from tests.recordings.asked import CAPTURED_AT, chunk_of, ref
from tests.recordings.taking import CONFIG

FORM = RecordFormat(width=CONFIG.llm_width, dtype=TokenDtype.FLOAT32, vision_revision="vision-1")
BUDGET = Budget.of(CONFIG, longest=16_384, text=100, answer=100)


def recording(
    chunks: int = 4, state: RecordingState = RecordingState.COMPLETE, captured_at: float | None = CAPTURED_AT
) -> Recording:
    kind = SourceKind.FILE if state is RecordingState.COMPLETE else SourceKind.RTSP
    return replace(
        made.recording("acme", kind),
        policy=ChunkPolicy(chunk_s=16),
        state=state,
        captured_at=captured_at,
        ingested_s=chunks * 16.0,
    )


def window(**bounds: float | None) -> RecordingWindow:
    return RecordingWindow(recording_id="rec", **bounds)


def lay(chunks: list[RecordedChunk], start_s: float = 0.0, end_s: float | None = None, **more: Any) -> OpenWindow:
    one = more.pop("recording", recording(len(chunks)))
    end = chunks[-1].end_s if end_s is None else end_s
    return lay_window(one, start_s, end, chunks, more.pop("budget", BUDGET), CONFIG)


# -- which window


@pytest.mark.parametrize(
    ("bounds", "resolved"),
    [
        ({}, (0.0, 64.0)),
        ({"start_s": 10.0}, (10.0, 64.0)),
        ({"end_s": 30.5}, (0.0, 30.5)),
        ({"end_s": 64.9}, (0.0, 64.0)),
        ({"start_at": CAPTURED_AT + 5, "end_at": CAPTURED_AT + 20}, (5.0, 20.0)),
        ({"start_s": 5.0, "end_at": CAPTURED_AT + 20}, (5.0, 20.0)),
    ],
)
def test_bounds_are_on_either_clock_and_may_be_left_out(
    bounds: dict[str, float], resolved: tuple[float, float]
) -> None:
    assert resolve(window(**bounds), recording()) == resolved


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ({"start_s": 30.0, "end_s": 20.0}, "it starts at 30 s and ends at 20 s"),
        ({"start_s": 30.0, "end_s": 30.0}, "it starts at 30 s and ends at 30 s"),
        ({"end_s": 0.0}, "it starts at 0 s and ends at 0 s"),
        ({"start_s": -1.0}, "start_s must be a number of seconds from 0 to 1e\\+10, not -1"),
        ({"end_s": math.nan}, "end_s must be a number of seconds .* not nan"),
        ({"start_s": math.inf}, "not inf"),
        ({"start_s": 64.0}, "starts at 64 s, past the recording's end at 64 s"),
        ({"start_s": 1.0, "end_s": 66.0}, "ends at 66 s, past the recording's end at 64 s"),
        ({"start_at": CAPTURED_AT - 60}, "2027-01-15T07:59:00.000Z is before .* 2027-01-15T08:00:00.000Z"),
        ({"start_s": 1.0, "start_at": CAPTURED_AT}, "exclude each other"),
    ],
)
def test_what_is_no_window_is_refused_with_both_numbers(bounds: dict[str, float], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        resolve(window(**bounds), recording())


def test_capture_times_need_a_recording_that_has_them() -> None:
    with pytest.raises(InvalidRequest, match="nobody knows when"):
        resolve(window(start_at=CAPTURED_AT), recording(captured_at=None))


def test_a_growing_recording_may_be_asked_about_what_is_still_to_come() -> None:
    live = recording(state=RecordingState.LIVE)
    assert resolve(window(end_s=100.0), live) == (0.0, 100.0)
    with pytest.raises(InvalidRequest, match="starts at 70 s, past what is ingested so far, which ends at 64 s"):
        resolve(window(start_s=70.0), live)
    opened = lay([chunk_of("rec", n) for n in range(4)], 0.0, 100.0, recording=live)
    assert opened.gaps == (Gap(start_s=64.0, end_s=100.0, reason=NOT_YET),)


# -- what is in it


def test_a_group_belongs_to_a_window_when_one_of_its_frames_does() -> None:
    opened = lay([chunk_of("rec", n) for n in range(4)], 10.0, 33.0)
    assert [group.times_s[0] for group in opened.groups] == [8, 16, 24, 32]
    assert opened.chunks == 3
    assert [one.key for one in opened.refs] == [ref(n).key for n in (2, 3, 4, 5)]


def test_what_is_missing_is_told_once_and_in_order() -> None:
    chunks = [
        chunk_of("rec", 0, gaps=[Gap(start_s=6, end_s=8, reason="camera away")]),
        chunk_of("rec", 1, keys=[None, 4]),
        replace(chunk_of("rec", 3), gaps=(Gap(start_s=60, end_s=90, reason="camera away"),)),
    ]
    opened = lay(chunks, 7.0, 64.0)
    assert opened.gaps == (
        Gap(start_s=7, end_s=8, reason="camera away"),
        Gap(start_s=16, end_s=24, reason=UNDECODABLE),
        Gap(start_s=32, end_s=48, reason=NOT_SAMPLED),
        Gap(start_s=60, end_s=64, reason="camera away"),
    )
    assert (opened.sampled, opened.dropped) == (48, 8)
    assert opened.planned.plan.seconds_per_frame == pytest.approx((57 - 1 - 8 - 16 - 4) / 40)


def test_what_is_missing_across_the_border_of_chunks_is_one_gap() -> None:
    chunks = [
        chunk_of("rec", 0, keys=[0, None]),
        chunk_of("rec", 1, keys=[None, 3], gaps=[Gap(start_s=24, end_s=25, reason=UNDECODABLE)]),
    ]
    assert lay(chunks, 0.0, 32.0).gaps == (Gap(start_s=8, end_s=25, reason=UNDECODABLE),)


def test_overlapping_chunks_show_each_moment_once() -> None:
    first = chunk_of("rec", 0)
    second = replace(first, number=1, start_s=8.0, end_s=24.0, groups=(first.groups[1], chunk_of("rec", 1).groups[0]))
    opened = lay([first, second], 0.0, 24.0)
    assert [group.times_s[0] for group in opened.groups] == [0, 8, 16]
    assert opened.gaps == ()


@pytest.mark.parametrize(("chunk_s", "stride_s"), [(32, 27), (32, 5), (10, 7), (48, 40)])
def test_chunks_that_overlap_by_parts_of_groups_show_every_moment_whole_and_in_parts(
    chunk_s: int, stride_s: int
) -> None:
    chunks = [_cut_in_eights(number, number * stride_s, chunk_s) for number in range(60)]
    one = replace(recording(), policy=ChunkPolicy(chunk_s=chunk_s, stride_s=stride_s), ingested_s=chunks[-1].end_s)
    small = replace(BUDGET, groups=12, most_pool=1)

    opened = lay(chunks, recording=one, budget=small)

    starts = [group.times_s[0] for group in opened.groups]
    assert starts == sorted(set(starts))
    assert {at_s for group in opened.groups for at_s in group.times_s} == {float(n) for n in range(int(one.ingested_s))}
    assert opened.planned.is_map
    for stretch in opened.planned.stretches:
        part = lay(chunks, stretch.start_s, stretch.end_s, recording=one, budget=small)
        assert [group.times_s for group in part.groups] == [
            group.times_s for group in opened.groups if stretch.start_s <= group.times_s[0] < stretch.end_s
        ]


def _cut_in_eights(number: int, start_s: int, chunk_s: int) -> RecordedChunk:
    seconds = range(start_s, start_s + chunk_s)
    groups = tuple(
        Group(
            times_s=tuple(map(float, seconds[at : at + 8])),
            segment=0,
            indices=tuple(seconds[at : at + 8]),
            ref=ref(1000 * number + at),
        )
        for at in range(0, chunk_s, 8)
    )
    return RecordedChunk(
        recording_id="rec", number=number, start_s=float(start_s), end_s=float(start_s + chunk_s), groups=groups
    )


def test_coverage_tells_static_frames_capture_times_and_the_plan() -> None:
    opened = lay([chunk_of("rec", 0), chunk_of("rec", 1, keys=[2, 2])], 0.0, 32.0)
    told = opened.coverage()
    assert (told.frames_static, told.frames_left_out, told.chunks) == (16, 0, 2)
    assert (told.captured_from, told.captured_to) == (CAPTURED_AT, CAPTURED_AT + 32)
    assert told.plan.mode is WindowMode.FULL
    assert len(opened.refs) == 4, "what fits is shown at its full length"


def test_a_window_without_a_frame_is_refused() -> None:
    with pytest.raises(InvalidMedia, match="from 0 to 16 s holds no frame"):
        lay([chunk_of("rec", 0, keys=[None, None])])


def test_laying_out_takes_time_in_proportion_to_the_chunks() -> None:
    def laid_s(chunks: list[RecordedChunk]) -> float:
        began = time.thread_time()
        assert lay(chunks).planned.plan.frames == 16 * len(chunks)
        return time.thread_time() - began

    chunks = [chunk_of("rec", n) for n in range(10_000)]
    few, all_of_them = (min(laid_s(some) for _ in range(3)) for some in (chunks[:1000], chunks))

    assert all_of_them < 40 * few, "ten times as many; 100 times as long would be quadratic"


# -- tokens


class Shelf:
    def __init__(self, one: Recording, chunks: list[RecordedChunk]) -> None:
        self.recording = one
        self.rows = chunks

    async def get(self, recording_id: str, *, tenant: str) -> Recording:
        if tenant != self.recording.tenant:
            raise NotFound(f"no recording {recording_id!r}")
        return self.recording

    async def chunks(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None
    ) -> list[RecordedChunk]:
        return [
            one
            for one in self.rows
            if (start_s is None or one.end_s > start_s) and (end_s is None or one.start_s < end_s)
        ]


def tokens(number: int) -> VisualTokens:
    values_TD = np.full((256, CONFIG.llm_width), float(number), np.float32)
    return VisualTokens(
        ref=ref(number), dtype=FORM.dtype, values_TD=values_TD, scales_T=None, vision_revision=FORM.vision_revision
    )


class Hot:
    def __init__(self, *numbers: int) -> None:
        self.records = {ref(number).key: tokens(number) for number in numbers}
        self.is_down = False
        self.asked = 0

    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]:
        self.asked += 1
        return {} if self.is_down else {one.key: self.records[one.key] for one in refs if one.key in self.records}

    async def put(self, record: Record) -> bool:
        if self.is_down:
            return False
        expect = TokensRef(key=record.key, levels=(Level(1, 256),))
        self.records[record.key] = unpack(record.manifest, record.shards, expect, FORM)
        return True


class Cold:
    def __init__(self, *numbers: int) -> None:
        self.records = {ref(number).key: tokens(number) for number in numbers}

    async def get(self, one: TokensRef, form: RecordFormat) -> VisualTokens | None:
        return self.records.get(one.key)


class Encoder:
    """Makes tokens of frames; `gone`: the frames are not there any more."""

    def __init__(self) -> None:
        self.gone = False
        self.groups: list[Group] = []

    async def encode_again(self, one: Recording, group: Group, model: Model, deadline: Deadline) -> VisualTokens:
        if self.gone:
            raise NotFound("the frames are gone")
        assert model.config == CONFIG
        assert group.ref is not None
        self.groups.append(group)
        return replace(
            tokens(int(group.ref.key, 16)), ref=model.ref_of(group), vision_revision=model.form.vision_revision
        )


def windows(chunks: list[RecordedChunk], hot: Hot, cold: Cold, encoder: Encoder) -> RecordingWindows:
    return RecordingWindows(Shelf(recording(len(chunks)), chunks), hot, cold, encoder)


async def opened_with(
    chunks: list[RecordedChunk], hot: Hot, cold: Cold, encoder: Encoder, budget: Budget = BUDGET
) -> tuple[RecordingWindows, OpenWindow]:
    some = windows(chunks, hot, cold, encoder)
    return some, await some.open(window(), "acme", budget, CONFIG)


async def test_another_tenants_recording_is_not_there() -> None:
    some = windows([chunk_of("rec", 0)], Hot(), Cold(), Encoder())
    with pytest.raises(NotFound):
        await some.open(window(), "zeta", BUDGET, CONFIG)


async def test_lost_tokens_come_from_the_cold_store_and_are_published_again() -> None:
    hot, encoder = Hot(), Encoder()
    some, opened = await opened_with([chunk_of("rec", 0)], hot, Cold(1, 2), encoder)

    restored = await some.restore(opened, ref(2), FORM, CONFIG, Deadline.after(5))

    assert (restored.is_published, restored.encoded_frames, encoder.groups) == (True, 0, [])
    np.testing.assert_array_equal(hot.records[ref(2).key].values_TD, tokens(2).values_TD)


async def test_what_is_not_cold_either_is_encoded_again() -> None:
    hot, encoder = Hot(), Encoder()
    some, opened = await opened_with([chunk_of("rec", 0)], hot, Cold(), encoder)

    restored = await some.restore(opened, ref(2), FORM, CONFIG, Deadline.after(5))

    assert restored.encoded_frames == 8
    assert [group.times_s[0] for group in encoder.groups] == [8]
    np.testing.assert_array_equal(restored.tokens.values_TD, tokens(2).values_TD)


async def test_with_redis_away_the_tokens_are_in_hand() -> None:
    hot = Hot()
    hot.is_down = True
    some, opened = await opened_with([chunk_of("rec", 0)], hot, Cold(1, 2), Encoder())

    restored = await some.restore(opened, ref(1), FORM, CONFIG, Deadline.after(5))

    assert not restored.is_published
    np.testing.assert_array_equal(restored.tokens.values_TD, tokens(1).values_TD)


async def test_a_static_groups_tokens_are_made_of_the_frames_that_gave_them() -> None:
    chunks = [chunk_of("rec", 0), chunk_of("rec", 1, keys=[2, 2]), chunk_of("rec", 2, keys=[2, 2])]
    encoder = Encoder()
    some = windows(chunks, Hot(), Cold(), encoder)
    opened = await some.open(window(start_s=32.0), "acme", BUDGET, CONFIG)

    await some.restore(opened, ref(2), FORM, CONFIG, Deadline.after(5))

    assert [group.times_s[0] for group in encoder.groups] == [8], "of chunk 0, before the window"


async def test_averages_are_made_of_what_is_hot_cold_and_lost() -> None:
    chunks = [chunk_of("rec", n) for n in range(2)]
    budget = replace(BUDGET, groups=1)
    hot, encoder = Hot(1, 2), Encoder()
    some, opened = await opened_with(chunks, hot, Cold(3), encoder, budget)
    (pooled,) = opened.refs

    restored = await some.restore(opened, pooled, FORM, CONFIG, Deadline.after(5))

    assert opened.planned.plan.pool == 4
    assert restored.encoded_frames == 8
    np.testing.assert_allclose(restored.tokens.values_TD, 2.5)
    assert pooled.key in hot.records, "the next question finds it"


async def test_what_cannot_be_had_at_all_is_an_error_and_not_an_empty_answer() -> None:
    encoder = Encoder()
    encoder.gone = True
    some, opened = await opened_with([chunk_of("rec", 0)], Hot(), Cold(), encoder)
    with pytest.raises(NotFound, match="the frames are gone"):
        await some.restore(opened, ref(1), FORM, CONFIG, Deadline.after(5))
