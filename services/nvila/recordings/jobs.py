"""Jobs: what is to be done, who does it now, how far it is, what came out; in the database, so that it outlives kills.

The contract (checkpoints of crash-safe jobs):

- A job has one id over all attempts, and a fingerprint of its input.
- A worker *claims* a job for a lease. Each claim has a greater *fence* than the one before; every write of the worker
  is one transaction that first checks that the fence is still the job's, and raises `LeaseLost` when it is not. So a
  worker that was thought dead and comes back (a zombie) changes nothing.
- A *checkpoint* is immutable, and counts only for the input whose fingerprint it carries. The next attempt reads the
  checkpoints and goes on after them.
- The result and the end of the job are one transaction: a job whose result is there is never claimed again.
- `attempt` counts tries since the job last got further (a new checkpoint or chunk): a recording of days may be
  interrupted any number of times, while a job that kills its worker at the same place is dead after `max_attempts`.

Here a client's calls and the turn of workers; what a worker writes about the job it holds is `claims.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from nvila.errors import Conflict
from nvila.recordings import job_rows, schema, store
from nvila.recordings.claims import Claim
from nvila.recordings.database import Database
from nvila.recordings.job_rows import MAX_ATTEMPTS, NewJob
from nvila.recordings.store import Page, Quota
from nvila.recordings.types import Job, JobEvent, JobKind, JobState, Recording, RecordingState

_FOLLOW_EVERY_S = 0.25
_SWEEP_AT_ONCE = 500


@dataclass(frozen=True)
class Backlog:
    """Jobs of one kind and state. `oldest_s`: how long the oldest could have begun."""

    kind: JobKind
    state: JobState
    count: int
    oldest_s: float


class JobStore:
    """Jobs of all tenants. A client's calls name the tenant: another tenant's job is `NotFound`."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._news = asyncio.Event()

    # -- clients

    async def submit(
        self,
        *,
        tenant: str,
        kind: JobKind,
        params: Mapping[str, Any],
        fingerprint: str,
        idempotency_key: str | None = None,
        recording_id: str | None = None,
        recording: Recording | None = None,
        not_before: float = 0.0,
        max_attempts: int = MAX_ATTEMPTS,
        quota: Quota | None = None,
    ) -> Job:
        """The job, durable. `recording`: made in the same transaction (an ingest job and its recording come together);
        with `recording_id` the job is about one that exists.

        The same `idempotency_key` gives the job that has it, whatever became of it (its `recording_id` names the
        recording that was made then); with another fingerprint it raises `Conflict`. Raises `NotFound` when the
        recording is not the tenant's, `LimitExceeded` or `Overloaded` over `quota`.
        """
        assert recording is None or recording.tenant == tenant, "a job and its recording have one tenant"
        new = NewJob(
            kind=kind,
            params=params,
            fingerprint=fingerprint,
            recording_id=recording.id if recording else recording_id,
            idempotency_key=idempotency_key,
            not_before=not_before,
            max_attempts=max_attempts,
        )
        async with self._database.write() as connection:
            await job_rows.hold_tenant(self._database, connection, tenant)
            there = await job_rows.same_key(connection, tenant, new)
            if there is not None:
                return there
            if quota is not None:
                await store.check_quota(connection, tenant, quota, recording)
            if recording is not None:
                await store.write_recording(connection, recording)
            elif recording_id is not None:
                await store.read_recording(connection, recording_id, tenant=tenant)
            job = await job_rows.insert_job(connection, tenant, new, self._clock())
        self._news.set()
        return job

    async def get(self, job_id: str, *, tenant: str) -> Job:
        async with self._database.read() as connection:
            return await job_rows.read_job(connection, job_id, tenant)

    async def list(
        self,
        *,
        tenant: str,
        limit: int = 100,
        cursor: str | None = None,
        kind: JobKind | None = None,
        state: JobState | None = None,
        recording_id: str | None = None,
    ) -> Page[Job]:
        """Newest first, without their results, which may be megabytes each. `cursor`: of the page before; one that is
        not ours raises `InvalidRequest`."""
        table = schema.jobs
        told = [column for column in table.c if column.name != "result"]
        query = select(*told, literal(None).label("result")).where(table.c.tenant == tenant)
        if kind is not None:
            query = query.where(table.c.kind == kind)
        if state is not None:
            query = query.where(table.c.state == state)
        if recording_id is not None:
            query = query.where(table.c.recording_id == recording_id)
        async with self._database.read() as connection:
            rows = (await connection.execute(store.page_of(query, table.c, limit, cursor))).all()
        return Page([job_rows.job_of(row) for row in rows[:limit]], store.cursor_after(rows, limit))

    async def cancel(self, job_id: str, *, tenant: str) -> Job:
        """A job that waits is over at once; one that runs is told, and is over when its worker has stopped (within a
        second, or when a dead worker's lease ends). One that is over stays as it is."""
        async with self._database.write() as connection:
            row = await job_rows.hold_job(connection, job_id, tenant)
            await self._cancel(connection, row)
            return await job_rows.read_job(connection, job_id, tenant)

    async def retry_dead(self, job_id: str, *, tenant: str) -> Job:
        """Queue a failed or cancelled job again, with all its attempts; its checkpoints count. One that is not over is
        returned as it is; one that is done raises `Conflict`."""
        async with self._database.write() as connection:
            row = await job_rows.hold_job(connection, job_id, tenant)
            if row.state == JobState.DONE:
                raise Conflict(f"job {job_id} is done; only one that failed or was cancelled can be retried")
            if not JobState(row.state).is_over:
                return job_rows.job_of(row)
            if row.recording_id is not None:
                await store.read_recording(connection, row.recording_id, tenant=tenant)
                await job_rows.tell_recording(connection, row, JobState.QUEUED)
            number = await job_rows.write_event(connection, row.id, row.last_event + 1, "queued", {}, self._clock())
            await job_rows.set_job(
                connection,
                job_id,
                state=JobState.QUEUED,
                attempt=0,
                cancel_asked=False,
                not_before=self._clock(),
                lease_until=0.0,
                finished_at=None,
                error_code="",
                error="",
                last_event=number,
            )
            job = await job_rows.read_job(connection, job_id, tenant)
        self._news.set()
        return job

    async def delete_recording(self, recording_id: str, *, tenant: str) -> Job:
        """The recording is gone for its tenant when this returns. Its waiting jobs are cancelled, its running ones
        told; the returned job removes the data once those have stopped."""
        async with self._database.write() as connection:
            table, jobs = schema.recordings, schema.jobs
            await store.read_recording(connection, recording_id, tenant=tenant)
            # Jobs before the recording, as workers hold them: otherwise each would wait for the other.
            mine = select(jobs).where(jobs.c.recording_id == recording_id).order_by(jobs.c.id).with_for_update()
            not_over = [state for state in JobState if not state.is_over]  # the others may be many, and large
            rows = (await connection.execute(mine.where(jobs.c.state.in_(not_over)))).all()
            await connection.execute(select(table.c.id).where(table.c.id == recording_id).with_for_update())
            await store.read_recording(connection, recording_id, tenant=tenant)  # nobody was faster
            for row in rows:
                await self._cancel(connection, row)
            await connection.execute(
                update(table).where(table.c.id == recording_id).values(state=RecordingState.DELETING)
            )
            job = await job_rows.insert_job(
                connection,
                tenant,
                NewJob(
                    kind=JobKind.DELETE,
                    params={},
                    fingerprint=recording_id,
                    recording_id=recording_id,
                    max_attempts=1000,  # there is nothing better to do about data that must go than to try again
                ),
                self._clock(),
            )
        self._news.set()
        return job

    async def events_after(self, job_id: str, number: int = 0, *, tenant: str, limit: int = 1000) -> Sequence[JobEvent]:
        """Events with greater numbers than `number`, in order."""
        table = schema.job_events
        query = select(table).where(table.c.job_id == job_id, table.c.number > number).order_by(table.c.number)
        async with self._database.read() as connection:
            await job_rows.read_job(connection, job_id, tenant)
            return [JobEvent(**row._mapping) for row in await connection.execute(query.limit(limit))]

    async def follow(self, job_id: str, number: int = 0, *, tenant: str) -> AsyncGenerator[JobEvent, None]:
        """Events with greater numbers than `number` as they come, until the job is over and all have been given.
        Raises `NotFound` when the job is removed meanwhile."""
        while True:
            job = await self.get(job_id, tenant=tenant)  # before its events: when it was over then, they are complete
            events = await self.events_after(job_id, number, tenant=tenant)
            for event in events:
                number = event.number
                yield event
            if job.state.is_over and not events:
                return
            if not events:
                await asyncio.sleep(_FOLLOW_EVERY_S)

    # -- workers

    async def claim(self, worker: str, kinds: Collection[JobKind], lease_s: float) -> Claim | None:
        """The next job of these kinds, for `lease_s` unless renewed; None when none may begin now. `worker`: a name for
        logs. Jobs whose worker's lease has ended are queued again first (or are over, see `reap`)."""
        if not kinds:
            return None
        async with self._database.write() as connection:
            await self._reap(connection)
            now = self._clock()
            row = (await connection.execute(job_rows.next_job(kinds, now))).first()
            if row is None:
                return None
            await job_rows.set_job(
                connection,
                row.id,
                state=JobState.RUNNING,
                fence=row.fence + 1,
                attempt=row.attempt + 1,
                worker=worker[:128],
                lease_until=now + lease_s,
            )
            await job_rows.hold_tenant(self._database, connection, row.tenant, served_at=now)
            job = await job_rows.read_job(connection, row.id, row.tenant)
        return Claim(self._database, self._clock, job, lease_s=lease_s, waited_s=now - max(row.not_before, 0.0))

    async def reap(self) -> int:
        """End the leases that have run out: such a job is queued again, or cancelled when that was asked for, or failed
        when it has had all its attempts. Returns how many. Workers need not call it: `claim` does the same."""
        async with self._database.write() as connection:
            return await self._reap(connection)

    async def interrupted(self, claims: Iterable[Claim]) -> Mapping[str, bool]:
        """Of these, the jobs that must stop now, by id: True when the client cancelled it, False when the lease is
        lost. One cheap query for all that a worker runs."""
        by_id = {claim.job.id: claim for claim in claims}
        if not by_id:
            return {}
        table = schema.jobs.c
        query = select(table.id, table.fence, table.state, table.cancel_asked).where(table.id.in_(by_id))
        async with self._database.read() as connection:
            rows = {row.id: row for row in await connection.execute(query)}
        stop: dict[str, bool] = {}
        for job_id, claim in by_id.items():
            row = rows.get(job_id)
            if row is None or row.fence != claim.fence or row.state != JobState.RUNNING:
                stop[job_id] = False
            elif row.cancel_asked:
                stop[job_id] = True
        return stop

    async def backlog(self) -> Sequence[Backlog]:
        """How many jobs of each kind wait, run, or are dead, for metrics and scaling."""
        table, now = schema.jobs.c, self._clock()
        states = (JobState.QUEUED, JobState.RUNNING, JobState.FAILED)
        query = (
            select(table.kind, table.state, func.count(), func.min(table.not_before))
            .where(table.state.in_(states))
            .group_by(table.kind, table.state)
        )
        async with self._database.read() as connection:
            return [
                Backlog(JobKind(kind), JobState(state), count, max(0.0, now - oldest))
                for kind, state, count, oldest in await connection.execute(query)
            ]

    async def sweep(self, finished_before: float) -> int:
        """Forget jobs that were over before this time, with their events and checkpoints. Returns how many."""
        table = schema.jobs
        query = select(table.c.id).where(table.c.finished_at < finished_before).limit(_SWEEP_AT_ONCE)
        async with self._database.write() as connection:
            ids = [job_id for (job_id,) in await connection.execute(query.with_for_update(skip_locked=True))]
            await job_rows.remove_jobs(connection, ids)
        return len(ids)

    async def wait_for_news(self, timeout_s: float) -> None:
        """Until a job was submitted through this object, at most `timeout_s`. (Other processes' jobs are found by
        asking again.)"""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout_s)
        self._news.clear()

    # -- inside a transaction

    async def _cancel(self, connection: AsyncConnection, row: Row[Any]) -> None:
        if JobState(row.state).is_over or row.kind == JobKind.DELETE:
            return
        if row.state == JobState.RUNNING and row.lease_until > self._clock():
            await job_rows.set_job(connection, row.id, cancel_asked=True)
        else:
            await self._end(connection, row, JobState.CANCELLED, {"cancel_asked": True})

    async def _end(self, connection: AsyncConnection, row: Row[Any], state: JobState, values: dict[str, Any]) -> None:
        """End a job that no worker holds any more. The fence grows, so that one that believes it does is refused."""
        now = self._clock()
        told: dict[str, Any] = {name: values[name] for name in ("error_code", "error") if name in values}
        number = await job_rows.write_event(connection, row.id, row.last_event + 1, state.value, told, now)
        await job_rows.tell_recording(connection, row, state, **told)
        await job_rows.set_job(
            connection, row.id, state=state, fence=row.fence + 1, finished_at=now, last_event=number, **values
        )

    async def _reap(self, connection: AsyncConnection) -> int:
        table = schema.jobs
        late = select(table).where(table.c.state == JobState.RUNNING, table.c.lease_until < self._clock())
        rows = (await connection.execute(late.with_for_update(skip_locked=True))).all()
        for row in rows:
            if row.cancel_asked:
                await self._end(connection, row, JobState.CANCELLED, {})
            elif row.attempt >= row.max_attempts:
                message = f"its worker died or fell silent {row.attempt} times in a row at the same place"
                await self._end(connection, row, JobState.FAILED, {"error_code": "unavailable", "error": message})
            else:
                await job_rows.set_job(
                    connection, row.id, state=JobState.QUEUED, fence=row.fence + 1, not_before=self._clock()
                )
        return len(rows)
