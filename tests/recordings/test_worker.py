"""How a worker begins, keeps, stops and ends jobs. Handlers wait for events of the test, never for time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import select

from nvila.errors import InvalidRequest, Overloaded, Unavailable
from nvila.recordings import schema
from nvila.recordings.claims import Claim
from nvila.recordings.database import Database
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import Job, JobKind, JobState, RecordingState, SourceKind
from nvila.recordings.worker import Handler, Pool, Worker, WorkerLimits
from nvila.telemetry import names
from nvila.telemetry.metrics import Metrics
from tests.recordings import made
from tests.recordings.made import Clock

PATIENCE_S = 20


def limits(*, slots: int = 2, deadline_s: float | None = 60, drain_s: float = 0.1, lease_s: float = 30) -> WorkerLimits:
    kinds = (JobKind.ASK, JobKind.INGEST)
    return WorkerLimits(
        pools=(Pool(kinds=kinds, slots=slots, deadline_s=deadline_s),),
        lease_s=lease_s,
        look_s=0.02,
        poll_s=0.02,
        drain_s=drain_s,
        stop_s=5,
        first_pause_s=1,
    )


@asynccontextmanager
async def working(
    jobs: JobStore, handler: Handler, limits: WorkerLimits, metrics: Metrics | None = None
) -> AsyncIterator[Worker]:
    handlers = {JobKind.ASK: handler, JobKind.INGEST: handler}
    worker = Worker("worker-1", jobs, handlers, limits, metrics or Metrics(), pause=lambda pause_s: pause_s)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.end()
        await asyncio.wait_for(task, PATIENCE_S)


async def until(jobs: JobStore, job: Job, is_so: Callable[[Job], bool]) -> Job:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so(now := await jobs.get(job.id, tenant=job.tenant)):
            await asyncio.sleep(0.01)
    return now


class Waiting:
    """A handler that says when it was begun and when it was cancelled, and waits until it is let go."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.running = self.most = 0

    async def __call__(self, claim: Claim) -> Mapping[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.begun.set()
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1
        return {"fence": claim.fence}


async def test_a_job_is_done_and_its_result_kept(jobs: JobStore) -> None:
    metrics = Metrics()

    async def handle(claim: Claim) -> Mapping[str, Any]:
        await claim.event("delta", {"text": claim.job.params["q"]})
        return {"text": "42"}

    async with working(jobs, handle, limits(), metrics):
        job = await made.submit(jobs, params={"q": "?"})
        done = await until(jobs, job, lambda now: now.state.is_over)

    assert (done.state, done.result, done.attempt) == (JobState.DONE, {"text": "42"}, 1)
    assert [event.kind for event in await jobs.events_after(job.id, tenant="acme")] == ["delta", "done"]
    assert b'nvila_jobs_finished_total{kind="ask",outcome="done"} 1.0' in metrics.render()
    assert names.JOBS_RUNNING.name.encode() + b'{kind="ask"} 0.0' in metrics.render()


@pytest.mark.parametrize(
    "error", [Unavailable("vision is away"), Overloaded("full"), ValueError("a bug"), TimeoutError()]
)
async def test_what_may_pass_is_tried_again_after_a_growing_pause(
    jobs: JobStore, clock: Clock, error: Exception
) -> None:
    async def handle(claim: Claim) -> Mapping[str, Any]:
        if claim.job.attempt < 3:
            raise error
        return {}

    async with working(jobs, handle, limits()):
        job = await made.submit(jobs)
        for attempt, pause_s in ((1, 1.0), (2, 2.0)):
            waits = await until(
                jobs,
                job,
                lambda now, n=attempt: now.state is JobState.QUEUED and now.attempt == n,  # type: ignore[misc]
            )
            assert waits.not_before == clock.now + pause_s
            clock.now += pause_s
        done = await until(jobs, job, lambda now: now.state.is_over)

    assert (done.state, done.attempt) == (JobState.DONE, 3)
    assert [event.kind for event in await jobs.events_after(job.id, tenant="acme")] == ["retry", "retry", "done"]


async def test_a_look_that_is_answered_late_stops_no_later_attempt(database: Database, clock: Clock) -> None:
    class Late(JobStore):
        """Answers about leases when it is told to."""

        looked, answer = asyncio.Event(), asyncio.Event()

        async def interrupted(self, claims: Iterable[Claim]) -> Mapping[str, bool]:
            mine = list(claims)
            if mine and not self.looked.is_set():
                self.looked.set()
                await self.answer.wait()
            return await super().interrupted(mine)

    jobs, again = Late(database, clock=clock), Waiting()

    async def handle(claim: Claim) -> Mapping[str, Any]:
        if claim.job.attempt == 1:
            await jobs.looked.wait()
            raise Unavailable("vision is away")
        return await again(claim)

    async with working(jobs, handle, limits()):
        job = await made.submit(jobs)
        await until(jobs, job, lambda now: now.state is JobState.QUEUED and now.attempt == 1)
        clock.now += 1
        await asyncio.wait_for(again.begun.wait(), PATIENCE_S)
        jobs.answer.set()
        await asyncio.sleep(0.2)  # ten looks
        again.let_go.set()
        done = await until(jobs, job, lambda now: now.state.is_over)

    assert (done.state, done.attempt) == (JobState.DONE, 2)
    assert not again.cancelled.is_set()


async def test_a_pause_is_as_long_as_who_is_overloaded_asks_for(jobs: JobStore, clock: Clock) -> None:
    async def handle(claim: Claim) -> Mapping[str, Any]:
        raise Overloaded("full", retry_after_s=120)

    async with working(jobs, handle, limits()):
        job = await made.submit(jobs)
        waits = await until(jobs, job, lambda now: now.state is JobState.QUEUED and now.attempt == 1)

    assert waits.not_before == clock.now + 120


async def test_what_is_wrong_is_dead_at_once_and_can_be_queued_again(jobs: JobStore) -> None:
    is_wrong = True

    async def handle(claim: Claim) -> Mapping[str, Any]:
        if is_wrong:
            raise InvalidRequest("no such thing: 3 asked, 2 there")
        return {"ok": True}

    async with working(jobs, handle, limits()):
        job = await made.submit(jobs)
        dead = await until(jobs, job, lambda now: now.state.is_over)
        assert (dead.state, dead.error_code) == (JobState.FAILED, "invalid_request")
        assert dead.error == "no such thing: 3 asked, 2 there"
        is_wrong = False
        await jobs.retry_dead(job.id, tenant="acme")
        done = await until(jobs, job, lambda now: now.state.is_over)

    assert (done.state, done.result, done.error) == (JobState.DONE, {"ok": True}, "")


async def test_an_unexpected_error_tells_its_client_nothing_of_the_inside(jobs: JobStore) -> None:
    async def handle(claim: Claim) -> Mapping[str, Any]:
        raise KeyError("/srv/secret")

    async with working(jobs, handle, limits()):
        job = await made.submit(jobs, max_attempts=1)
        dead = await until(jobs, job, lambda now: now.state.is_over)

    assert (dead.state, dead.error_code) == (JobState.FAILED, "internal")
    assert "secret" not in dead.error


async def test_a_cancelled_job_stops_within_a_second(jobs: JobStore) -> None:
    handler = Waiting()
    async with working(jobs, handler, limits()):
        job = await made.submit(jobs)
        await asyncio.wait_for(handler.begun.wait(), PATIENCE_S)
        asked = await jobs.cancel(job.id, tenant="acme")
        assert (asked.state, asked.cancel_asked) == (JobState.RUNNING, True)

        await asyncio.wait_for(handler.cancelled.wait(), 1)

        over = await until(jobs, job, lambda now: now.state.is_over)
    assert over.state is JobState.CANCELLED


async def test_a_worker_whose_job_was_taken_over_stops_it_and_says_nothing(jobs: JobStore, clock: Clock) -> None:
    handler = Waiting()
    async with working(jobs, handler, limits(slots=1)):
        job = await made.submit(jobs)
        await asyncio.wait_for(handler.begun.wait(), PATIENCE_S)
        clock.now += 31
        heir = await made.claim(jobs, "worker-2", lease_s=1000)

        await asyncio.wait_for(handler.cancelled.wait(), PATIENCE_S)

        assert (await jobs.get(job.id, tenant="acme")).fence == heir.fence
        await heir.finish({"by": "heir"})
    assert (await jobs.get(job.id, tenant="acme")).result == {"by": "heir"}


async def lease_end(database: Database, job: Job) -> float:
    async with database.read() as connection:
        query = select(schema.jobs.c.lease_until).where(schema.jobs.c.id == job.id)
        return float((await connection.execute(query)).scalar_one())


async def test_a_long_job_keeps_its_lease(database: Database, jobs: JobStore, clock: Clock) -> None:
    handler = Waiting()
    async with working(jobs, handler, limits(lease_s=0.2)):  # renewed each 0.05 s of the worker's own clock
        job = await made.submit(jobs)
        await asyncio.wait_for(handler.begun.wait(), PATIENCE_S)
        for _ in range(5):
            clock.now += 0.15
            async with asyncio.timeout(PATIENCE_S):
                while await lease_end(database, job) < clock.now + 0.15:
                    await asyncio.sleep(0.01)
            assert await jobs.claim("worker-2", (JobKind.ASK,), 30) is None
        handler.let_go.set()
        done = await until(jobs, job, lambda now: now.state.is_over)

    assert (done.state, done.fence) == (JobState.DONE, 1)


async def test_an_attempt_has_a_deadline(jobs: JobStore) -> None:
    async with working(jobs, Waiting(), limits(deadline_s=0.05)):
        job = await made.submit(jobs, max_attempts=1)
        dead = await until(jobs, job, lambda now: now.state.is_over)

    assert (dead.state, dead.error_code) == (JobState.FAILED, "deadline_exceeded")


async def test_no_more_jobs_run_at_a_time_than_there_are_slots(jobs: JobStore) -> None:
    handler = Waiting()
    async with working(jobs, handler, limits(slots=2)) as worker:
        all_of_them = [await made.submit(jobs) for _ in range(5)]
        async with asyncio.timeout(PATIENCE_S):
            while worker.running < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        handler.let_go.set()
        for job in all_of_them:
            await until(jobs, job, lambda now: now.state is JobState.DONE)

    assert handler.most == 2


async def test_a_worker_that_ends_gives_its_jobs_back_unharmed(jobs: JobStore) -> None:
    handler = Waiting()
    async with working(jobs, handler, limits()):
        job = await made.submit(jobs, max_attempts=1)
        await asyncio.wait_for(handler.begun.wait(), PATIENCE_S)

    given_back = await jobs.get(job.id, tenant="acme")
    assert handler.cancelled.is_set()
    assert (given_back.state, given_back.attempt) == (JobState.QUEUED, 0)
    assert (await made.claim(jobs, "worker-2")).job.id == job.id


async def test_a_worker_that_ends_lets_short_jobs_finish(jobs: JobStore) -> None:
    handler = Waiting()
    async with working(jobs, handler, limits(drain_s=PATIENCE_S)) as worker:
        job = await made.submit(jobs)
        await asyncio.wait_for(handler.begun.wait(), PATIENCE_S)
        worker.end()
        handler.let_go.set()

    assert (await jobs.get(job.id, tenant="acme")).state is JobState.DONE


@pytest.mark.parametrize(
    ("kind", "state", "code"),
    [
        (SourceKind.RTSP, RecordingState.COMPLETE, ""),
        (SourceKind.FILE, RecordingState.FAILED, "cancelled"),
    ],
)
async def test_a_recording_says_what_became_of_its_cancelled_ingest(
    jobs: JobStore, store: RecordingStore, kind: SourceKind, state: RecordingState, code: str
) -> None:
    handler, recording = Waiting(), made.recording(kind=kind)
    async with working(jobs, handler, limits()):
        job = await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
        await asyncio.wait_for(handler.begun.wait(), PATIENCE_S)
        await jobs.cancel(job.id, tenant="acme")
        await until(jobs, job, lambda now: now.state.is_over)

    now = await store.get(recording.id, tenant="acme")
    assert (now.state, now.error_code) == (state, code)


async def test_a_recording_whose_ingest_died_waits_again_when_it_is_retried(
    jobs: JobStore, store: RecordingStore
) -> None:
    recording = made.recording()

    async def handle(claim: Claim) -> Mapping[str, Any]:
        raise InvalidRequest("not a video")

    async with working(jobs, handle, limits()):
        job = await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
        await until(jobs, job, lambda now: now.state.is_over)
    dead = await store.get(recording.id, tenant="acme")
    assert (dead.state, dead.error_code, dead.error) == (RecordingState.FAILED, "invalid_request", "not a video")

    await jobs.retry_dead(job.id, tenant="acme")

    assert await store.get(recording.id, tenant="acme") == recording


class Failing(JobStore):
    """Jobs in a database that does not answer while `is_away`."""

    is_away = False

    async def claim(self, worker: str, kinds: Collection[JobKind], lease_s: float) -> Claim | None:
        if self.is_away:
            raise Unavailable("the database does not answer")
        return await super().claim(worker, kinds, lease_s)

    async def interrupted(self, claims: Iterable[Claim]) -> Mapping[str, bool]:
        if self.is_away:
            raise Unavailable("the database does not answer")
        return await super().interrupted(claims)


async def test_a_worker_does_not_take_its_own_job_away_when_the_database_comes_back(
    database: Database, clock: Clock
) -> None:
    jobs, handler = Failing(database, clock=clock), Waiting()
    async with working(jobs, handler, limits(lease_s=0.4)):
        job = await made.submit(jobs)
        await asyncio.wait_for(handler.begun.wait(), PATIENCE_S)
        jobs.is_away = True
        await asyncio.sleep(0.5)
        clock.now += 1
        jobs.is_away = False
        await asyncio.sleep(0.3)
        handler.let_go.set()
        done = await until(jobs, job, lambda now: now.state.is_over)

    assert (done.state, done.result, done.attempt) == (JobState.DONE, {"fence": 1}, 1)


async def test_a_claim_that_breaks_does_not_end_the_worker(database: Database, clock: Clock) -> None:
    class Breaking(JobStore):
        left = 3

        async def claim(self, worker: str, kinds: Collection[JobKind], lease_s: float) -> Claim | None:
            self.left -= 1
            if self.left >= 0:
                raise ValueError("nobody foresaw this")
            return await super().claim(worker, kinds, lease_s)

    async def handle(claim: Claim) -> Mapping[str, Any]:
        return {}

    jobs = Breaking(database, clock=clock)
    async with working(jobs, handle, limits()):
        job = await made.submit(jobs)
        assert (await until(jobs, job, lambda now: now.state.is_over)).state is JobState.DONE
