"""Standing questions: each new chunk once, each yes one event and one call's job, whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpcore
import pytest
from cryptography.fernet import Fernet

from nvila.errors import ForbiddenURL, InvalidRequest
from nvila.gateway.egress import parse_url
from nvila.recordings.jobs import JobStore
from nvila.recordings.seal import Seal
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import Job, JobKind, Recording, RecordingState
from nvila.recordings.watch import WatchHandler
from nvila.recordings.webhooks import WebhookSender
from nvila.types import RecordingWindow
from tests.recordings import made
from tests.recordings.asked import CAPTURED_AT, Asking, Dying, Killed, Model, chunk_of, fill, grow
from tests.recordings.made import Clock

SEAL = Seal([Fernet.generate_key().decode()])
SECRET = "a secret of the client"
HOOK = {"webhook_url": "https://hooks.example/alerts", "secret": SEAL.close(SECRET)}


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """What is tested here is not the database."""
    return f"sqlite:///{tmp_path}/recordings.db"


@pytest.fixture
def asking(jobs: JobStore, store: RecordingStore) -> Asking:
    return Asking(jobs, store, Model(say=odd))


@pytest.fixture
async def sender() -> AsyncIterator[WebhookSender]:
    made_sender = WebhookSender(httpcore.AnyIOBackend(), parse_url)
    yield made_sender
    await made_sender.close()


def odd(text: str, window: RecordingWindow | None) -> str:
    """Yes for chunks 1, 3, 5, …"""
    assert window is not None
    return "yes" if int(window.start_s or 0) // 16 % 2 else "no"


def watching(asking: Asking, sender: WebhookSender) -> WatchHandler:
    return WatchHandler(asking.caller, asking.store, sender, SEAL, poll_s=0.01)


async def calls(jobs: JobStore) -> list[Job]:
    listed = await jobs.list(tenant="acme", kind=JobKind.DELIVER)
    return sorted(listed.items, key=lambda job: str(job.params["webhook_id"]))


async def test_each_chunk_of_a_finished_window_is_asked_about_once(asking: Asking, sender: WebhookSender) -> None:
    recording = await fill(asking.jobs, 5)
    job = await asking.submit(JobKind.WATCH, recording, question="Is a car there?", start_s=0.0, **HOOK)

    result = await watching(asking, sender)(await made.claim(asking.jobs, "w", JobKind.WATCH))

    assert result == {"chunks": 5, "alerts": 2, "unclear": 0}
    assert [window.start_s for _, window in asking.model.asked if window] == [0, 16, 32, 48, 64]
    events = await asking.events(job)
    assert [kind for kind, _ in events] == ["begin", *["verdict", "verdict", "alert"] * 2, "verdict"]
    alert = events[3][1]
    assert alert["id"] == f"{job.id}.1"
    assert (alert["recording_id"], alert["start_s"], alert["end_s"]) == (recording.id, 16, 32)
    assert alert["captured"] == {"from": CAPTURED_AT + 16, "to": CAPTURED_AT + 32}
    delivered = await calls(asking.jobs)
    assert [json.loads(call.params["body"])["id"] for call in delivered] == [f"{job.id}.1", f"{job.id}.3"]
    assert json.loads(delivered[0].params["body"]) == alert
    assert all(SEAL.open(call.params["secret"]) == SECRET for call in delivered)
    assert not any(SECRET in str(call.params) for call in delivered)


async def test_on_a_live_recording_it_begins_with_the_next_chunk_and_ends_with_the_recording(
    asking: Asking, sender: WebhookSender
) -> None:
    recording = await fill(asking.jobs, 3, state=RecordingState.LIVE)
    job = await asking.submit(JobKind.WATCH, recording, question="Is a car there?")
    watch = asyncio.create_task(_run(watching(asking, sender), await made.claim(asking.jobs, "w", JobKind.WATCH)))
    await begun(asking, job)
    await grow(asking.jobs, recording, chunk_of(recording.id, 3))
    await grow(asking.jobs, recording, chunk_of(recording.id, 4), RecordingState.COMPLETE)

    result = await asyncio.wait_for(watch, 30)

    assert result == {"chunks": 2, "alerts": 1, "unclear": 0}
    assert [window.start_s for _, window in asking.model.asked if window] == [48, 64]
    assert await calls(asking.jobs) == [], "no webhook was asked for"


async def begun(asking: Asking, job: Job) -> None:
    """The watch has noted where it begins."""
    async with asyncio.timeout(30):
        while "begin" not in [kind for kind, _ in await asking.events(job)]:
            await asyncio.sleep(0.01)


async def _run(handler: WatchHandler, claim: Any) -> Any:
    return await handler(claim)


async def test_a_window_ends_the_watch(asking: Asking, sender: WebhookSender) -> None:
    recording = await fill(asking.jobs, 6, state=RecordingState.LIVE)
    await asking.submit(JobKind.WATCH, recording, question="Is a car there?", start_s=20.0, end_s=60.0)
    result = await watching(asking, sender)(await made.claim(asking.jobs, "w", JobKind.WATCH))
    assert result["chunks"] == 3
    assert [window.start_s for _, window in asking.model.asked if window] == [16, 32, 48]


@pytest.mark.parametrize("window", [{"start_s": 70.0, "end_s": 90.0}, {"start_at": CAPTURED_AT + 70.0}])
async def test_a_window_that_is_still_to_come_is_waited_for(
    asking: Asking, sender: WebhookSender, window: dict[str, float]
) -> None:
    recording = await fill(asking.jobs, 2, state=RecordingState.LIVE)
    job = await asking.submit(JobKind.WATCH, recording, question="Is a car there?", **window)
    watch = asyncio.create_task(_run(watching(asking, sender), await made.claim(asking.jobs, "w", JobKind.WATCH)))
    await begun(asking, job)
    for number in (2, 3, 4):
        await grow(asking.jobs, recording, chunk_of(recording.id, number))
    await grow(asking.jobs, recording, chunk_of(recording.id, 5), RecordingState.COMPLETE)

    assert (await asyncio.wait_for(watch, 30))["chunks"] == 2
    assert [window.start_s for _, window in asking.model.asked if window] == [64, 80]


async def test_capture_times_of_a_window_are_resolved_with_the_first_frame(
    asking: Asking, sender: WebhookSender
) -> None:
    recording = await fill(asking.jobs, 0, state=RecordingState.WAITING, captured_at=None)
    job = await asking.submit(
        JobKind.WATCH, recording, question="Is a car there?", start_at=CAPTURED_AT + 20, end_at=CAPTURED_AT + 60
    )
    watch = asyncio.create_task(_run(watching(asking, sender), await made.claim(asking.jobs, "w", JobKind.WATCH)))
    await begun(asking, job)
    await grow(asking.jobs, recording, chunk_of(recording.id, 0), captured_at=CAPTURED_AT)
    for number in range(1, 5):
        await grow(asking.jobs, recording, chunk_of(recording.id, number))

    assert (await asyncio.wait_for(watch, 30))["chunks"] == 3
    assert [window.start_s for _, window in asking.model.asked if window] == [16, 32, 48]


async def test_capture_times_are_refused_for_a_recording_that_has_none(asking: Asking, sender: WebhookSender) -> None:
    recording = await fill(asking.jobs, 2, captured_at=None)
    await asking.submit(JobKind.WATCH, recording, question="Is a car there?", end_at=CAPTURED_AT)
    with pytest.raises(InvalidRequest, match="nobody knows when"):
        await watching(asking, sender)(await made.claim(asking.jobs, "w", JobKind.WATCH))


async def test_a_still_scene_is_asked_about_once_and_alerts_once(asking: Asking, sender: WebhookSender) -> None:
    recording = await fill(
        asking.jobs, [lambda one: chunk_of(one, 0), *(partial(chunk_of, number=n, keys=[2, 2]) for n in (1, 2, 3))]
    )
    asking.model.say = lambda text, window: "yes" if (window and window.start_s) else "no"
    await asking.submit(JobKind.WATCH, recording, question="Is a car there?", start_s=0.0, **HOOK)

    result = await watching(asking, sender)(await made.claim(asking.jobs, "w", JobKind.WATCH))

    assert result == {"chunks": 4, "alerts": 1, "unclear": 0}
    assert len(asking.model.asked) == 2
    assert len(await calls(asking.jobs)) == 1


async def test_answers_that_are_neither_are_counted_and_call_nobody(asking: Asking, sender: WebhookSender) -> None:
    recording = await fill(asking.jobs, 2)
    asking.model.say = lambda text, window: "a yard"
    await asking.submit(JobKind.WATCH, recording, question="Is a car there?", start_s=0.0, **HOOK)
    result = await watching(asking, sender)(await made.claim(asking.jobs, "w", JobKind.WATCH))
    assert result == {"chunks": 2, "alerts": 0, "unclear": 2}
    assert await calls(asking.jobs) == []


@pytest.mark.parametrize("after", [False, True])
async def test_killed_at_any_write_it_alerts_once_for_each_yes(
    asking: Asking, sender: WebhookSender, clock: Clock, after: bool
) -> None:
    recording = await fill(asking.jobs, 4)
    for at in range(6):
        job = await asking.submit(JobKind.WATCH, recording, question="Is a car there?", start_s=0.0, **HOOK)
        first = await made.claim(asking.jobs, "first", JobKind.WATCH)
        with contextlib.suppress(Killed):
            await watching(asking, sender)(Dying(first, asking.model, at, after=after))
        was_killed, asking.model.is_dead = asking.model.is_dead, False
        clock.now += 31
        second = await made.claim(asking.jobs, "second", JobKind.WATCH)
        result = await watching(asking, sender)(second)
        await second.finish(result)

        assert result == {"chunks": 4, "alerts": 2, "unclear": 0}
        kinds = [kind for kind, _ in await asking.events(job)]
        assert (kinds.count("verdict"), kinds.count("alert")) == (4, 2)
        mine = [call for call in await calls(asking.jobs) if json.loads(call.params["body"])["job_id"] == job.id]
        assert len(mine) == 2
        assert was_killed == (at < 5), "it was killed at every write: where it begins, and each chunk"


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        ({}, InvalidRequest, "question"),
        ({"question": "?", "webhook_url": "https://x", "secret": "s"}, InvalidRequest, "1 characters given"),
        ({"question": "?", **HOOK, "webhook_url": "ftp://x"}, ForbiddenURL, "must be http or https"),
    ],
)
async def test_what_cannot_stand_is_refused_at_once(
    asking: Asking, sender: WebhookSender, params: dict[str, Any], error: type[Exception], says: str
) -> None:
    recording: Recording = await fill(asking.jobs, 1)
    await asking.submit(JobKind.WATCH, recording, **params)
    with pytest.raises(error, match=says):
        await watching(asking, sender)(await made.claim(asking.jobs, "w", JobKind.WATCH))
