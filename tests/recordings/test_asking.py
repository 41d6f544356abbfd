"""Jobs that ask about recordings: what they find, and that being killed anywhere changes nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import InvalidMedia, InvalidRequest, LimitExceeded, NotFound, Unavailable
from nvila.model.config import NvilaConfig
from nvila.recordings.asking import budget_of
from nvila.recordings.jobs import JobStore
from nvila.recordings.planner import Budget
from nvila.recordings.questions import AskHandler
from nvila.recordings.search import Hit
from nvila.recordings.store import RecordingStore
from nvila.recordings.summaries import SummaryHandler
from nvila.recordings.timeline import TimelineHandler
from nvila.recordings.types import Job, JobKind, Recording, RecordingState
from nvila.recordings.when import WhenHandler, verdict
from nvila.recordings.window import NOT_YET
from nvila.types import Gap, ModelCard, RecordingWindow
from tests.recordings import made
from tests.recordings.asked import CAPTURED_AT, Asking, Dying, Killed, Model, chunk_of, fill, grow
from tests.recordings.made import Clock
from tests.recordings.taking import CARD, CONFIG

Run = Callable[[Any], Awaitable[Mapping[str, Any]]]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """What is tested here is not the database."""
    return f"sqlite:///{tmp_path}/recordings.db"


@pytest.fixture
def asking(jobs: JobStore, store: RecordingStore) -> Asking:
    return Asking(jobs, store, Model())


class Likest:
    """Finds the chunks that a test names."""

    def __init__(self, *chunks: int) -> None:
        self.chunks = chunks

    async def most_like(self, text: str, window: RecordingWindow, tenant: str, count: int) -> list[Hit]:
        return [
            Hit(chunk=number, start_s=number * 16.0, end_s=number * 16.0 + 16, likeness=0.5) for number in self.chunks
        ][:count]


def handler(kind: JobKind, asking: Asking, *, at_once: int = 2, likest: Likest | None = None) -> Run:
    caller, windows = asking.caller, asking.windows
    match kind:
        case JobKind.ASK:
            return AskHandler(caller, windows, likest or Likest(), at_once=at_once)
        case JobKind.SUMMARY:
            return SummaryHandler(caller, windows, asking.store, at_once=at_once)
        case JobKind.TIMELINE:
            return TimelineHandler(caller, windows, asking.store, at_once=at_once)
        case _:
            return WhenHandler(caller, windows, asking.store, at_once=at_once)


async def run(asking: Asking, kind: JobKind, recording: Recording, **params: Any) -> tuple[Job, Mapping[str, Any]]:
    job = await asking.submit(kind, recording, **params)
    claim = await made.claim(asking.jobs, "w", kind)
    result = await handler(kind, asking)(claim)
    await claim.finish(result)
    return job, result


def begin(window: RecordingWindow | None) -> float:
    assert window is not None, "asked about a window"
    return window.start_s or 0.0


# -- questions


async def test_a_window_that_fits_is_one_call(asking: Asking) -> None:
    recording = await fill(asking.jobs, 4)
    asking.model.say = lambda text, window: "a yard"

    job, result = await run(asking, JobKind.ASK, recording, question="What is it?")

    assert result["text"] == "a yard"
    assert result["plan"]["mode"] == "full"
    assert result["plan"]["calls"] == 1
    assert result["window"] == {"start_s": 0, "end_s": 64}
    assert result["captured"] == {"from": CAPTURED_AT, "to": CAPTURED_AT + 64}
    assert [window for _, window in asking.model.asked] == [
        RecordingWindow(recording_id=recording.id, start_s=0, end_s=64)
    ]
    assert [kind for kind, _ in await asking.events(job)] == ["plan", "part", "done"]


async def test_a_long_window_is_asked_about_in_parts_and_closed_over_their_answers(asking: Asking) -> None:
    recording = await fill(asking.jobs, 200)
    asking.model.say = lambda text, window: f"seen from {window.start_s:g}" if window else f"all of it: {text[-9:]}"

    _, result = await run(asking, JobKind.ASK, recording, question="What moves?")

    *parts, (closing, nothing) = asking.model.asked
    assert result["plan"]["mode"] == "map_reduce"
    assert result["plan"]["calls"] == len(parts) + 1 == 14
    assert nothing is None
    assert "[0:04:16 to 0:08:32] seen from 256" in closing
    assert closing.endswith("What moves?")
    assert [part["start_s"] for part in result["parts"]] == [256.0 * number for number in range(13)]
    assert sum(part["frames"] for part in result["parts"]) == 200 * 16
    assert all("part " in text and "What moves?" in text for text, _ in parts)


async def test_progress_counts_parts_as_they_end_though_several_are_asked_about_together(asking: Asking) -> None:
    recording = await fill(asking.jobs, 200)

    job, _ = await run(asking, JobKind.ASK, recording, question="What moves?")

    events = await asking.jobs.events_after(job.id, tenant="acme")
    told = [event.data["done"] for event in events if event.kind == "progress"]
    assert told == list(range(1, 14))


async def test_answers_that_do_not_fit_one_call_are_condensed_first(asking: Asking) -> None:
    recording = await fill(asking.jobs, 400)
    asking.model.say = lambda text, window: "word " * 150 if window else "short"

    _, result = await run(asking, JobKind.ASK, recording, question="What moves?")

    assert result["text"] == "short"
    condensing = [text for text, _ in asking.model.asked if "Sum up what these notes say" in text]
    assert len(condensing) == 2
    assert all(len(text) < 16_384 for text, window in asking.model.asked if window is None)


async def test_relevant_chunks_are_all_that_is_looked_at(asking: Asking) -> None:
    recording = await fill(asking.jobs, 40)
    await asking.submit(JobKind.ASK, recording, question="Where is the dog?", relevant_chunks=3)
    claim = await made.claim(asking.jobs, "w", JobKind.ASK)

    result = await handler(JobKind.ASK, asking, likest=Likest(7, 30, 8))(claim)

    windows = [(window.start_s, window.end_s) for _, window in asking.model.asked if window is not None]
    assert sorted(windows) == [(112, 144), (480, 496)]
    assert [hit["chunk"] for hit in result["relevant"]] == [7, 30, 8]
    plan = result["plan"]
    assert (plan["mode"], plan["calls"], plan["frames"], plan["blocks"]) == ("map_reduce", 3, 3 * 16, 3 * 2)
    assert plan["seconds_per_frame"] == pytest.approx(1)


async def test_relevant_chunks_that_are_neighbours_are_asked_about_in_parts_that_fit(asking: Asking) -> None:
    recording = await fill(asking.jobs, 200)
    await asking.submit(JobKind.ASK, recording, question="Where is the dog?", relevant_chunks=199)
    claim = await made.claim(asking.jobs, "w", JobKind.ASK)

    result = await handler(JobKind.ASK, asking, likest=Likest(*range(1, 200)))(claim)

    windows = [window for _, window in asking.model.asked if window is not None]
    assert len(windows) == 13
    assert (min(map(begin, windows)), max(window.end_s or 0 for window in windows)) == (16, 3200)
    assert result["plan"]["calls"] == len(asking.model.asked) == 14
    assert result["plan"]["frames"] == 199 * 16


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "question: None given"),
        ({"question": "  "}, "question: '  ' given"),
        ({"question": "x" * 8001}, "characters of question: 8,001 asked, at most 8,000 allowed"),
        ({"question": "x", "max_tokens": 0}, "max_tokens: 0 given"),
        ({"question": "x", "max_tokens": 9999}, "max_tokens: 9,999 asked, at most 4,096 allowed"),
        ({"question": "x", "relevant_chunks": True}, "relevant_chunks: True given"),
        ({"question": "x", "start_s": "5"}, "start_s must be a number of seconds, not '5'"),
        ({"question": "x", "start_s": 40.0, "end_s": 20.0}, "starts at 40 s and ends at 20 s"),
        ({"question": "x", "start_s": 65.0}, "starts at 65 s, past the recording's end at 64 s"),
        ({"question": "x", "end_s": 900.0}, "ends at 900 s, past the recording's end at 64 s"),
    ],
)
async def test_bad_params_end_the_job_with_both_numbers(asking: Asking, params: dict[str, Any], says: str) -> None:
    recording = await fill(asking.jobs, 4)
    await asking.submit(JobKind.ASK, recording, **params)
    claim = await made.claim(asking.jobs, "w", JobKind.ASK)

    with pytest.raises(InvalidRequest, match=says):
        await handler(JobKind.ASK, asking)(claim)


async def test_a_failure_of_one_part_is_the_jobs_and_not_a_group_of_errors(asking: Asking) -> None:
    recording = await fill(asking.jobs, 200)

    def say(text: str, window: RecordingWindow | None) -> str:
        raise Unavailable("decode is away")

    asking.model.say = say
    for kind in (JobKind.ASK, JobKind.SUMMARY):
        await asking.submit(kind, recording, question="What moves?")
        with pytest.raises(Unavailable, match="decode is away"):
            await handler(kind, asking)(await made.claim(asking.jobs, "w", kind))


# -- summaries


async def test_a_summary_grows_from_captions_to_sections_to_the_whole(asking: Asking) -> None:
    recording = await fill(asking.jobs, 5)
    asking.model.say = lambda text, window: f"<{window.start_s:g}>" if window else f"sum of {text.count('[0:')}"

    job, result = await run(asking, JobKind.SUMMARY, recording, section_chunks=2)

    assert [chunk["text"] for chunk in result["chunks"]] == ["<0>", "<16>", "<32>", "<48>", "<64>"]
    assert [(one["start_s"], one["end_s"], one["text"]) for one in result["sections"]] == [
        (0, 32, "sum of 2"),
        (32, 64, "sum of 2"),
        (64, 80, "<64>"),
    ]
    assert result["text"] == "sum of 3"
    events = await asking.events(job)
    assert [kind for kind, _ in events] == [*["chunk", "chunk", "section"] * 2, "chunk", "section", "summary", "done"]
    assert events[2][1]["text"] == "sum of 2"


async def test_gaps_are_named_to_the_model_and_in_every_item_that_holds_them(asking: Asking) -> None:
    gap = Gap(start_s=24.0, end_s=30.0, reason="camera away")
    recording = await fill(
        asking.jobs,
        [
            lambda one: chunk_of(one, 0),
            lambda one: chunk_of(one, 1, gaps=[gap]),
            lambda one: chunk_of(one, 2, keys=[None, None]),
        ],
    )

    _, result = await run(asking, JobKind.SUMMARY, recording)

    told = {"start_s": 24.0, "end_s": 30.0, "reason": "camera away"}
    assert result["chunks"][1]["gaps"] == [told]
    assert told in result["sections"][0]["gaps"]
    assert told in result["gaps"]
    assert "text" not in result["chunks"][2], "nothing was to be seen"
    reduction = asking.model.asked[-1][0]
    assert "[0:00:24 to 0:00:30] not seen: camera away" in reduction


async def test_chunks_of_a_still_scene_are_asked_about_once(asking: Asking) -> None:
    recording = await fill(
        asking.jobs,
        [
            lambda one: chunk_of(one, 0),
            lambda one: chunk_of(one, 1, keys=[2, 2]),  # looks like the end of chunk 0, not like all of it
            lambda one: chunk_of(one, 2, keys=[2, 2]),
            lambda one: chunk_of(one, 3, keys=[2, 2]),
            lambda one: chunk_of(one, 4),
        ],
    )
    asking.model.say = lambda text, window: f"<{window.start_s:g}>" if window else "all"

    _, result = await run(asking, JobKind.SUMMARY, recording)

    assert [chunk["text"] for chunk in result["chunks"]] == ["<0>", "<16>", "<16>", "<16>", "<64>"]
    assert [chunk.get("is_unchanged", False) for chunk in result["chunks"]] == [False, False, True, True, False]
    assert sum(window is not None for _, window in asking.model.asked) == 3


async def test_a_still_chunk_is_asked_about_when_the_window_shows_nothing_of_the_one_before(asking: Asking) -> None:
    recording = await fill(
        asking.jobs,
        [
            lambda one: replace(chunk_of(one, 0, keys=[1]), gaps=(Gap(start_s=8, end_s=16, reason="camera away"),)),
            lambda one: chunk_of(one, 1, keys=[1, 1]),
        ],
    )
    asking.model.say = lambda text, window: f"<{window.start_s:g}>" if window else "all"

    _, result = await run(asking, JobKind.SUMMARY, recording, start_s=10.0)

    assert [chunk.get("text") for chunk in result["chunks"]] == [None, "<16>"]


# -- timelines


async def test_neighbours_that_show_the_same_are_one_event_unless_a_gap_parts_them(asking: Asking) -> None:
    labels = ["A car stops.", "a car stops", "nothing", "Rain", "rain.", "rain"]
    gap = Gap(start_s=80.0, end_s=82.0, reason="camera away")
    recording = await fill(asking.jobs, [partial(chunk_of, number=n, gaps=[gap] if n == 5 else []) for n in range(6)])
    asking.model.say = lambda text, window: labels[int(begin(window) // 16)] + "\nmore"

    job, result = await run(asking, JobKind.TIMELINE, recording)

    assert [(one["start_s"], one["end_s"], one["label"], one["chunks"]) for one in result["events"]] == [
        (0, 32, "A car stops", [0, 1]),
        (48, 80, "Rain", [3, 4]),
        (80, 96, "rain", [5, 5]),
    ]
    assert result["events"][1]["captured"] == {"from": CAPTURED_AT + 48, "to": CAPTURED_AT + 80}
    events = await asking.events(job)
    assert [data for kind, data in events if kind == "event"] == result["events"]


# -- when


async def test_time_tokens_become_intervals_of_the_recording_joined_across_chunks(asking: Asking) -> None:
    asking.model.card = with_time_tokens(101)
    answers = {32.0: "<t50> <t100>", 48.0: "<t0> <t100>", 64.0: "<t1> <t25>", 128.0: "<t75> <t50>"}

    def say(text: str, window: RecordingWindow | None) -> str:
        assert window is not None
        start_s = window.start_s or 0.0
        if text.endswith("Answer yes or no."):
            return "Yes." if start_s in answers else "No, nothing."
        return answers[start_s]

    asking.model.say = say
    recording = await fill(asking.jobs, 10)

    job, result = await run(asking, JobKind.WHEN, recording, question="When does the car stop?")

    assert [(one["start_s"], one["end_s"], one["chunks"]) for one in result["intervals"]] == [
        (40.0, 68.0, [2, 4]),
        (136.0, 140.0, [8, 8]),
    ]
    assert result["intervals"][0]["captured"] == {"from": CAPTURED_AT + 40, "to": CAPTURED_AT + 68}
    assert [kind for kind, _ in await asking.events(job)].count("interval") == 2
    assert len(asking.model.asked) == 10 + 4


async def test_without_time_tokens_a_chunk_that_says_yes_is_an_interval(asking: Asking) -> None:
    asking.model.say = lambda text, window: {0.0: "yes", 16.0: "maybe", 32.0: "Yes, it is"}.get(begin(window), "no")
    recording = await fill(asking.jobs, 5)

    _, result = await run(asking, JobKind.WHEN, recording, question="When is it dark?")

    assert [(one["start_s"], one["end_s"]) for one in result["intervals"]] == [(0, 16), (32, 48)]
    assert result["unclear"] == [1]
    assert result["method"] == {"whether": True, "time_tokens": 0}


async def test_what_holds_of_a_still_scene_holds_for_its_whole_length(asking: Asking) -> None:
    asking.model.card = with_time_tokens(101)
    asking.model.say = lambda text, window: "yes" if "yes or no" in text else "<t0> <t100>"
    recording = await fill(asking.jobs, [partial(chunk_of, number=n, keys=[1, 1]) for n in range(4)])

    _, result = await run(asking, JobKind.WHEN, recording, question="When is the gate open?")

    assert [(one["start_s"], one["end_s"]) for one in result["intervals"]] == [(0, 64)]
    assert len(asking.model.asked) == 2


@pytest.mark.parametrize(
    ("method", "says"), [("times", "must be one of"), ("time_tokens", "the served model has none")]
)
async def test_a_method_that_cannot_be_is_refused(asking: Asking, method: str, says: str) -> None:
    recording = await fill(asking.jobs, 2)
    await asking.submit(JobKind.WHEN, recording, question="When?", method=method)
    with pytest.raises(InvalidRequest, match=says):
        await handler(JobKind.WHEN, asking)(await made.claim(asking.jobs, "w", JobKind.WHEN))


@pytest.mark.parametrize(
    ("answer", "means"),
    [("Yes.", True), ("no", False), ("No, but yes", False), ("I know nothing", None), ("", None), ("Noon", None)],
)
def test_an_answer_is_yes_no_or_neither(answer: str, means: bool | None) -> None:
    assert verdict(answer) is means


def with_time_tokens(count: int) -> ModelCard:
    return replace(CARD, config_json=replace(CONFIG, time_tokens=count).to_json())


# -- all of them


CASES: list[tuple[JobKind, dict[str, Any], int]] = [
    (JobKind.ASK, {"question": "What moves?"}, 150),
    (JobKind.SUMMARY, {"section_chunks": 2}, 4),
    (JobKind.TIMELINE, {}, 3),
    (JobKind.WHEN, {"question": "When is it dark?"}, 3),
]


def scene(text: str, window: RecordingWindow | None) -> str:
    """What depends on nothing but the question and the window."""
    if window is None:
        return f"{len(text)} characters"
    return ["yes, a car", "no", "yes, rain"][int(window.start_s or 0) // 16 % 3]


@pytest.mark.parametrize(("kind", "params", "chunks"), CASES, ids=lambda case: str(case))
async def test_a_kill_at_any_write_changes_neither_the_result_nor_what_was_told(
    asking: Asking, clock: Clock, kind: JobKind, params: dict[str, Any], chunks: int
) -> None:
    recording = await fill(asking.jobs, chunks)
    asking.model.say = scene
    whole, undisturbed = await run(asking, kind, recording, **params)
    told = (await asking.events(whole))[:-1]
    answers = len(asking.model.asked)
    for after in (False, True):
        for at in range(99):
            asking.model.asked.clear()
            job = await asking.submit(kind, recording, **params)
            first = await made.claim(asking.jobs, "first", kind)
            try:
                await handler(kind, asking, at_once=1)(Dying(first, asking.model, at, after=after))
            except Killed:
                pass
            else:
                await first.finish({})
                break
            clock.now += 31
            asking.model.is_dead = False
            second = await made.claim(asking.jobs, "second", kind)
            result = await handler(kind, asking, at_once=1)(second)
            await second.finish(result)

            assert result == undisturbed
            assert sorted(map(str, await told_by(asking, job))) == sorted(map(str, told))
            repeated = len(asking.model.asked) - answers
            assert 0 <= repeated <= (2 if kind is JobKind.WHEN else 1), "nothing but what was under way"
        writes = sum(event not in ("event", "interval") for event, _ in told)  # those come together
        assert at >= writes, "it was killed at every write"


async def told_by(asking: Asking, job: Job) -> list[tuple[str, Mapping[str, Any]]]:
    return [event for event in await asking.events(job) if event[0] != "done"]


async def test_a_window_of_a_growing_recording_stays_what_it_was_over_all_attempts(
    asking: Asking, clock: Clock
) -> None:
    recording = await fill(asking.jobs, 3, state=RecordingState.LIVE)
    asking.model.say = scene
    await asking.submit(JobKind.SUMMARY, recording)
    asking.model.dies_at = 1
    with pytest.raises(Killed):
        await handler(JobKind.SUMMARY, asking, at_once=1)(await made.claim(asking.jobs, "first", JobKind.SUMMARY))
    asking.model.dies_at = None
    await grow(asking.jobs, recording, chunk_of(recording.id, 3))
    clock.now += 31

    result = await handler(JobKind.SUMMARY, asking)(await made.claim(asking.jobs, "second", JobKind.SUMMARY))

    assert result["window"] == {"start_s": 0, "end_s": 48}
    assert [chunk["chunk"] for chunk in result["chunks"]] == [0, 1, 2]


async def test_an_answer_about_a_growing_recording_stands_on_what_its_plan_tells(asking: Asking, clock: Clock) -> None:
    recording = await fill(asking.jobs, 3, state=RecordingState.LIVE)
    await asking.submit(JobKind.ASK, recording, question="What moves?", end_s=200.0)
    asking.model.dies_at = 0
    with pytest.raises(Killed):
        await handler(JobKind.ASK, asking)(await made.claim(asking.jobs, "first", JobKind.ASK))
    asking.model.dies_at = None
    await grow(asking.jobs, recording, chunk_of(recording.id, 3))
    clock.now += 31

    result = await handler(JobKind.ASK, asking)(await made.claim(asking.jobs, "second", JobKind.ASK))

    assert result["gaps"] == [{"start_s": 48.0, "end_s": 200.0, "reason": NOT_YET}]
    assert [part["frames"] for part in result["parts"]] == [result["plan"]["frames"]] == [48]


@pytest.mark.parametrize("kind", [JobKind.ASK, JobKind.SUMMARY, JobKind.TIMELINE, JobKind.WHEN])
async def test_another_tenants_recording_is_not_found(asking: Asking, kind: JobKind) -> None:
    mine, theirs = await fill(asking.jobs, 2), await fill(asking.jobs, 2, tenant="zeta")
    with pytest.raises(NotFound):
        await asking.jobs.submit(
            tenant="zeta", kind=kind, params={"question": "?"}, fingerprint="f", recording_id=mine.id
        )
    with pytest.raises(NotFound):
        await asking.windows.open(RecordingWindow(recording_id=mine.id), "zeta", *await budget(asking))
    assert (
        await asking.windows.open(RecordingWindow(recording_id=theirs.id), "zeta", *await budget(asking))
    ).chunks == 2


async def budget(asking: Asking) -> tuple[Budget, NvilaConfig]:
    job = await asking.submit(JobKind.DELIVER, await fill(asking.jobs, 1))
    return await budget_of(asking.caller, asking.caller.question(job, [], "?"))


async def test_a_window_without_a_frame_ends_the_job(asking: Asking) -> None:
    recording = await fill(asking.jobs, [lambda one: chunk_of(one, 0, keys=[None, None])])
    await asking.submit(JobKind.ASK, recording, question="What?")
    with pytest.raises(InvalidMedia, match="from 0 to 16 s holds no frame"):
        await handler(JobKind.ASK, asking)(await made.claim(asking.jobs, "w", JobKind.ASK))


async def test_a_part_that_is_longer_than_the_model_says_so(asking: Asking) -> None:
    recording = await fill(asking.jobs, 200)
    asking.model.say = lambda text, window: "word " * 4000
    await asking.submit(JobKind.ASK, recording, question="What moves?")
    with pytest.raises(LimitExceeded, match="one part's answer"):
        await asyncio.wait_for(
            handler(JobKind.ASK, asking)(await made.claim(asking.jobs, "w", JobKind.ASK)), timeout=20
        )
