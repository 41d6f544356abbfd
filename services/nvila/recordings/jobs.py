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

Whose turn it is: of the jobs that may begin, one whose tenant has the fewest running jobs of its kind; among those the
one whose tenant was served longest ago; of a tenant's jobs the oldest.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, and_, delete, func, literal, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from nvila.errors import Conflict, NotFound, NvilaError
from nvila.recordings import schema, store
from nvila.recordings.database import Database, to_json
from nvila.recordings.store import Page, Quota
from nvila.recordings.types import (
    Counters,
    Job,
    JobEvent,
    JobKind,
    JobState,
    RecordedChunk,
    Recording,
    RecordingState,
    Segment,
    SourceKind,
)

MAX_ATTEMPTS = 8
_FOLLOW_EVERY_S = 0.25
_DELETE_CHUNKS_AT_ONCE = 500
_DROP_KEYS_AT_ONCE = 32
"""Records are removed from the cold store inside of a transaction: on an object store 32 take about two seconds."""
_SWEEP_AT_ONCE = 500


class LeaseLost(NvilaError):
    """The job is another worker's now, or over: stop, write nothing more. Never shown to a client."""

    code = "lease_lost"


class CheckpointConflict(NvilaError):
    """A checkpoint of this step exists with another payload: the handler is not repeatable. Never shown."""

    code = "checkpoint_conflict"


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be submitted. `idempotency_key`: of the tenant's; a second submission with it gives the first job.
    `not_before`: seconds since 1970, 0 for at once."""

    kind: JobKind
    params: Mapping[str, Any]
    fingerprint: str
    recording_id: str | None = None
    idempotency_key: str | None = None
    not_before: float = 0.0
    max_attempts: int = MAX_ATTEMPTS


@dataclass(frozen=True)
class Backlog:
    """Jobs of one kind and state. `oldest_s`: how long the oldest has been allowed to begin."""

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
            await self._hold_tenant(connection, tenant)
            there = await self._same_key(connection, tenant, new)
            if there is not None:
                return there
            if quota is not None:
                await store.check_quota(connection, tenant, quota, recording)
            if recording is not None:
                await store.write_recording(connection, recording)
            elif recording_id is not None:
                await store.read_recording(connection, recording_id, tenant=tenant)
            job = await self._insert(connection, tenant, new)
        self._news.set()
        return job

    async def get(self, job_id: str, *, tenant: str) -> Job:
        async with self._database.read() as connection:
            return await _read_job(connection, job_id, tenant)

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
        return Page([_job(row) for row in rows[:limit]], store.cursor_after(rows, limit))

    async def cancel(self, job_id: str, *, tenant: str) -> Job:
        """A job that waits is over at once; one that runs is told, and is over when its worker has stopped (within a
        second, or when a dead worker's lease ends). One that is over stays as it is."""
        async with self._database.write() as connection:
            row = await _hold_job(connection, job_id, tenant)
            await self._cancel(connection, row)
            return await _read_job(connection, job_id, tenant)

    async def retry_dead(self, job_id: str, *, tenant: str) -> Job:
        """Queue a failed or cancelled job again, with all its attempts; its checkpoints count. One that is not over is
        returned as it is; one that is done raises `Conflict`."""
        async with self._database.write() as connection:
            row = await _hold_job(connection, job_id, tenant)
            if row.state == JobState.DONE:
                raise Conflict(f"job {job_id} is done; only one that failed or was cancelled can be retried")
            if not JobState(row.state).is_over:
                return _job(row)
            if row.recording_id is not None:
                await store.read_recording(connection, row.recording_id, tenant=tenant)
                await _tell_recording(connection, row, JobState.QUEUED)
            number = await _write_event(connection, row.id, row.last_event + 1, "queued", {}, self._clock())
            await _set(
                connection,
                job_id,
                state=JobState.QUEUED,
                attempt=0,
                cancel_asked=False,
                not_before=self._clock(),
                finished_at=None,
                error_code="",
                error="",
                last_event=number,
            )
            job = await _read_job(connection, job_id, tenant)
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
            rows = (await connection.execute(mine)).all()
            await connection.execute(select(table.c.id).where(table.c.id == recording_id).with_for_update())
            await store.read_recording(connection, recording_id, tenant=tenant)  # nobody was faster
            for row in rows:
                await self._cancel(connection, row)
            await connection.execute(
                update(table).where(table.c.id == recording_id).values(state=RecordingState.DELETING)
            )
            job = await self._insert(
                connection,
                tenant,
                NewJob(
                    kind=JobKind.DELETE,
                    params={},
                    fingerprint=recording_id,
                    recording_id=recording_id,
                    max_attempts=1000,  # there is nothing better to do about data that must go than to try again
                ),
            )
        self._news.set()
        return job

    async def events_after(self, job_id: str, number: int = 0, *, tenant: str, limit: int = 1000) -> Sequence[JobEvent]:
        """Events with greater numbers than `number`, in order."""
        table = schema.job_events
        query = select(table).where(table.c.job_id == job_id, table.c.number > number).order_by(table.c.number)
        async with self._database.read() as connection:
            await _read_job(connection, job_id, tenant)
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
            row = (await connection.execute(_next_job(kinds, now))).first()
            if row is None:
                return None
            await _set(
                connection,
                row.id,
                state=JobState.RUNNING,
                fence=row.fence + 1,
                attempt=row.attempt + 1,
                worker=worker[:128],
                lease_until=now + lease_s,
            )
            await self._hold_tenant(connection, row.tenant, served_at=now)
            job = await _read_job(connection, row.id, row.tenant)
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
            await _remove_jobs(connection, ids)
        return len(ids)

    async def wait_for_news(self, timeout_s: float) -> None:
        """Until a job was submitted through this object, at most `timeout_s`. (Other processes' jobs are found by
        asking again.)"""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout_s)
        self._news.clear()

    # -- inside a transaction

    async def _hold_tenant(self, connection: AsyncConnection, tenant: str, served_at: float | None = None) -> None:
        """Lock the tenant's row until the transaction's end (there is one from now on)."""
        table = schema.tenants
        insert = self._database.insert(table).values(tenant=tenant, served_at=served_at or 0.0)
        new = insert.excluded.served_at if served_at is not None else table.c.served_at
        await connection.execute(insert.on_conflict_do_update(index_elements=[table.c.tenant], set_={"served_at": new}))

    async def _same_key(self, connection: AsyncConnection, tenant: str, new: NewJob) -> Job | None:
        if new.idempotency_key is None:
            return None
        table = schema.jobs
        query = select(table).where(table.c.tenant == tenant, table.c.idempotency_key == new.idempotency_key)
        row = (await connection.execute(query)).first()
        if row is None:
            return None
        if (row.fingerprint, row.kind) != (new.fingerprint, new.kind):
            raise Conflict("the idempotency key was used for another request", param="Idempotency-Key")
        return _job(row)

    async def _insert(self, connection: AsyncConnection, tenant: str, new: NewJob) -> Job:
        job_id, now = f"job_{secrets.token_hex(16)}", self._clock()
        await connection.execute(
            schema.jobs.insert().values(
                id=job_id,
                tenant=tenant,
                kind=new.kind,
                recording_id=new.recording_id,
                params=dict(new.params),
                fingerprint=new.fingerprint,
                idempotency_key=new.idempotency_key,
                state=JobState.QUEUED,
                attempt=0,
                max_attempts=new.max_attempts,
                fence=0,
                worker="",
                lease_until=0.0,
                created_at=now,
                not_before=max(now, new.not_before),
                progress={},
                error_code="",
                error="",
                cancel_asked=False,
                last_event=0,
            )
        )
        return await _read_job(connection, job_id, tenant)

    async def _cancel(self, connection: AsyncConnection, row: Row[Any]) -> None:
        if JobState(row.state).is_over or row.kind == JobKind.DELETE:
            return
        if row.state == JobState.RUNNING and row.lease_until > self._clock():
            await _set(connection, row.id, cancel_asked=True)
        else:
            await self._end(connection, row, JobState.CANCELLED, {"cancel_asked": True})

    async def _end(self, connection: AsyncConnection, row: Row[Any], state: JobState, values: dict[str, Any]) -> None:
        """End a job that no worker holds any more. The fence grows, so that one that believes it does is refused."""
        now = self._clock()
        told: dict[str, Any] = {name: values[name] for name in ("error_code", "error") if name in values}
        number = await _write_event(connection, row.id, row.last_event + 1, state.value, told, now)
        await _tell_recording(connection, row, state, **told)
        await _set(connection, row.id, state=state, fence=row.fence + 1, finished_at=now, last_event=number, **values)

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
                await _set(connection, row.id, state=JobState.QUEUED, fence=row.fence + 1, not_before=self._clock())
        return len(rows)


class Claim:
    """A job that this worker holds. Each method is one transaction that checks the lease and raises `LeaseLost`; what
    must happen together happens in one `transaction`."""

    def __init__(
        self, database: Database, clock: Callable[[], float], job: Job, *, lease_s: float, waited_s: float
    ) -> None:
        self._database = database
        self._clock = clock
        self._lease_s = lease_s
        self.job = job
        """As it was when claimed."""
        self.fence = job.fence
        self.waited_s = waited_s
        """How long the job had been allowed to begin."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[ClaimTransaction]:
        """All that is done on it is committed together at the end of the block, or not at all."""
        async with self._database.write() as connection:
            table = schema.jobs
            query = select(table).where(
                table.c.id == self.job.id, table.c.fence == self.fence, table.c.state == JobState.RUNNING
            )
            row = (await connection.execute(query.with_for_update())).first()
            if row is None:
                raise LeaseLost(f"job {self.job.id} is not this worker's any more")
            transaction = ClaimTransaction(self._database, connection, row, self._clock())
            yield transaction
            await transaction.write()

    async def renew(self) -> None:
        """Hold the job for the length of a lease from now on."""
        async with self.transaction() as now:
            now.changes["lease_until"] = self._clock() + self._lease_s

    async def checkpoint(self, step: str, payload: Mapping[str, Any]) -> None:
        """Keep `payload` (a JSON object) as what `step` gave, for this and all later attempts. Again with the same
        payload: nothing happens; with another one: `CheckpointConflict`."""
        async with self.transaction() as now:
            await now.checkpoint(step, payload)

    async def checkpoints(self) -> Mapping[str, Mapping[str, Any]]:
        """Payloads by step, of this job's input, in the order in which they were made."""
        table = schema.checkpoints
        query = (
            select(table.c.step, table.c.payload)
            .where(table.c.job_id == self.job.id, table.c.fingerprint == self.job.fingerprint)
            .order_by(table.c.at, table.c.step)
        )
        async with self._database.read() as connection:
            return {row.step: row.payload for row in await connection.execute(query)}

    async def last_checkpoint(self, steps: str) -> Mapping[str, Any] | None:
        """The payload of the last of the steps `steps` and a number ("chunk/17"), or of the one step of that name; None
        before there is any. For a job that makes more checkpoints than should be read."""
        table = schema.checkpoints
        query = (
            select(table.c.payload)
            .where(table.c.job_id == self.job.id, table.c.fingerprint == self.job.fingerprint)
            .where(table.c.step.startswith(steps, autoescape=True))
            .order_by(func.length(table.c.step).desc(), table.c.step.desc())
            .limit(1)
        )
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else row.payload

    async def event(self, kind: str, data: Mapping[str, Any]) -> int:
        """Tell those who follow the job. Returns the event's number."""
        async with self.transaction() as now:
            return await now.event(kind, data)

    async def progress(self, data: Mapping[str, Any]) -> None:
        """What the job shows as its progress from now on, and an event of it."""
        async with self.transaction() as now:
            await now.progress(data)

    async def add_segment(self, segment: Segment) -> bool:
        """False: it was there."""
        async with self.transaction() as now:
            return await now.add_segment(segment)

    async def add_chunk(self, chunk: RecordedChunk, counters: Counters | None = None) -> bool:
        """Write a chunk and add `counters` to the recording's, once: when the chunk is there already, with the same
        content, nothing happens and the answer is False; with another one it raises `ChunkConflict`."""
        async with self.transaction() as now:
            return await now.add_chunk(chunk, counters)

    async def update_recording(self, **changes: Any) -> None:
        """See `ClaimTransaction.update_recording`."""
        async with self.transaction() as now:
            await now.update_recording(**changes)

    async def submit(self, new: NewJob) -> Job:
        """Submit a job of the same tenant."""
        async with self.transaction() as now:
            return await now.submit(new)

    async def finish(self, result: Mapping[str, Any]) -> None:
        """The job is done and this is its result. The lease ends."""
        async with self.transaction() as now:
            await now.end(JobState.DONE, result=dict(result))

    async def fail(self, error: NvilaError, *, retry: bool, delay_s: float = 0.0) -> JobState:
        """It did not work. `retry`: queue it again after `delay_s`, unless it has had all its attempts. The lease ends.
        Returns what the job is now."""
        async with self.transaction() as now:
            told = {"error_code": error.code, "error": error.message}
            if now.cancel_asked:
                await now.end(JobState.CANCELLED)
                return JobState.CANCELLED
            if retry and now.attempt < self.job.max_attempts:
                await now.event("retry", {**told, "delay_s": delay_s})
                now.changes |= {"state": JobState.QUEUED, "not_before": self._clock() + delay_s, **told}
                return JobState.QUEUED
            await now.end(JobState.FAILED, **told)
            return JobState.FAILED

    async def cancelled(self) -> None:
        """It has stopped because the client asked for it. The lease ends."""
        async with self.transaction() as now:
            await now.end(JobState.CANCELLED)

    async def release(self, *, delay_s: float = 0.0) -> None:
        """Give it back unfinished, through no fault of its own (the worker goes, or there is nothing to do before
        `delay_s` are over): it is queued again and this attempt does not count. The lease ends."""
        async with self.transaction() as now:
            if now.cancel_asked:
                await now.end(JobState.CANCELLED)
                return
            now.changes |= {
                "state": JobState.QUEUED,
                "not_before": self._clock() + delay_s,
                "attempt": max(0, now.attempt - 1),
            }


class ClaimTransaction:
    """What a worker writes about its job and the job's recording in one transaction. `changes`: columns of the job."""

    def __init__(self, database: Database, connection: AsyncConnection, row: Row[Any], at: float) -> None:
        self._database = database
        self._connection = connection
        self._row = row
        self._at = at
        self._last_event: int = row.last_event
        self.changes: dict[str, Any] = {}

    @property
    def attempt(self) -> int:
        """As the job will have it when this transaction is committed."""
        return int(self.changes.get("attempt", self._row.attempt))

    @property
    def cancel_asked(self) -> bool:
        return bool(self._row.cancel_asked)

    async def checkpoint(self, step: str, payload: Mapping[str, Any]) -> bool:
        """False: it was there with the same payload. Raises `CheckpointConflict` when it was with another."""
        table = schema.checkpoints
        query = select(table.c.payload, table.c.fingerprint).where(table.c.job_id == self._row.id, table.c.step == step)
        there = (await self._connection.execute(query)).first()
        if there is None:
            await self._connection.execute(
                table.insert().values(
                    job_id=self._row.id,
                    step=step,
                    fingerprint=self._row.fingerprint,
                    payload=dict(payload),
                    fence=self._row.fence,
                    at=self._at,
                )
            )
            self.changes["attempt"] = 1
            return True
        if to_json(there.payload) != to_json(dict(payload)):
            raise CheckpointConflict(f"job {self._row.id}: step {step!r} gave another result before")
        return False

    async def event(self, kind: str, data: Mapping[str, Any]) -> int:
        self._last_event = await _write_event(
            self._connection, self._row.id, self._last_event + 1, kind, dict(data), self._at
        )
        return self._last_event

    async def progress(self, data: Mapping[str, Any]) -> None:
        self.changes["progress"] = dict(data)
        await self.event("progress", data)

    async def add_segment(self, segment: Segment) -> bool:
        return await store.write_segment(self._connection, segment)

    async def add_chunk(self, chunk: RecordedChunk, counters: Counters | None = None) -> bool:
        is_new = await store.write_chunk(self._database, self._connection, chunk)
        if is_new:
            self.changes["attempt"] = 1
            if counters is not None:
                await store.add_counters(self._connection, chunk.recording_id, counters)
        return is_new

    async def add_counters(self, counters: Counters) -> None:
        """Add to the counters of the job's recording what belongs to no chunk (reconnects, dropped frames)."""
        await store.add_counters(self._connection, self._recording_id, counters)

    async def add_keys(self, keys: Iterable[str]) -> None:
        """Note that the job's recording stands on these token records too, before they are looked for or kept: its
        deletion removes what is noted. (`add_chunk` does so for its own.)"""
        await store.write_keys(self._database, self._connection, self._recording_id, keys)

    async def update_recording(
        self,
        *,
        state: RecordingState | None = None,
        captured_at: float | None = None,
        duration_s: float | None = None,
        ingested_s: float | None = None,
        digest: str | None = None,
        error_code: str | None = None,
        error: str | None = None,
    ) -> None:
        """Change these of the job's recording. One that is being deleted stays so."""
        table = schema.recordings
        given = {
            "state": state,
            "captured_at": captured_at,
            "duration_s": duration_s,
            "ingested_s": ingested_s,
            "digest": digest,
            "error_code": error_code,
            "error": error,
        }
        values = {name: value for name, value in given.items() if value is not None}
        if values:
            await self._connection.execute(
                update(table)
                .where(table.c.id == self._recording_id, table.c.state != RecordingState.DELETING)
                .values(values)
            )

    async def submit(self, new: NewJob) -> Job:
        """A job of the same tenant, in this transaction: what it is about and it are there together or not at all. Its
        `idempotency_key` makes it one job though the step be repeated."""
        jobs = JobStore(self._database, clock=lambda: self._at)
        there = await jobs._same_key(self._connection, self._row.tenant, new)
        return there or await jobs._insert(self._connection, self._row.tenant, new)

    async def drop_keys(self) -> Sequence[str] | None:
        """The job's recording does not stand on some of its token records any more. Returns the keys of those that no
        other recording stands on, to be removed from the cold store before this transaction ends; None: there were no
        more."""
        return await store.drop_keys(self._connection, self._recording_id, _DROP_KEYS_AT_ONCE)

    async def remove_chunks(self) -> int:
        """Remove some hundreds of the chunks of the job's recording, the last ones first. 0: there were none left."""
        return await store.remove_chunks(self._connection, self._recording_id, _DELETE_CHUNKS_AT_ONCE)

    async def remove_recording(self) -> None:
        """Remove what is left of the recording when its chunks are gone, and its other jobs with all they said."""
        await store.remove_recording(self._connection, self._recording_id)
        table = schema.jobs
        query = select(table.c.id).where(table.c.recording_id == self._recording_id, table.c.id != self._row.id)
        await _remove_jobs(self._connection, [job_id for (job_id,) in await self._connection.execute(query)])

    async def end(self, state: JobState, **values: Any) -> None:
        """The job is over, in this transaction."""
        assert state.is_over
        told: dict[str, Any] = {name: values[name] for name in ("error_code", "error") if name in values}
        await self.event(state.value, told)
        await _tell_recording(self._connection, self._row, state, **told)
        self.changes |= {"state": state, "finished_at": self._at, **values}

    async def write(self) -> None:
        """Called by `Claim.transaction` at the end of the block."""
        if self._last_event != self._row.last_event:
            self.changes["last_event"] = self._last_event
        if self.changes:
            await _set(self._connection, self._row.id, **self.changes)

    @property
    def _recording_id(self) -> str:
        assert self._row.recording_id is not None, "a job about a recording"
        return str(self._row.recording_id)


# -- queries ----------------------------------------------------------------------------------------------------------


def _next_job(kinds: Collection[JobKind], now: float) -> Any:
    job, other, tenant = schema.jobs.c, schema.jobs.alias("other").c, schema.tenants.c
    busy = (
        select(job.tenant, job.kind, func.count().label("running"))
        .where(job.state == JobState.RUNNING, job.kind.in_(kinds))
        .group_by(job.tenant, job.kind)
        .subquery("busy")
    )
    is_in_use = select(other.id).where(other.recording_id == job.recording_id, other.state == JobState.RUNNING).exists()
    return (
        select(schema.jobs)
        .outerjoin(busy, and_(busy.c.tenant == job.tenant, busy.c.kind == job.kind))
        .outerjoin(schema.tenants, tenant.tenant == job.tenant)
        .where(job.state == JobState.QUEUED, job.kind.in_(kinds), job.not_before <= now)
        .where(or_(job.kind != JobKind.DELETE, ~is_in_use))
        .order_by(
            func.coalesce(busy.c.running, 0),
            func.coalesce(tenant.served_at, 0),
            job.not_before,
            job.created_at,
            job.id,
        )
        .limit(1)
        .with_for_update(of=schema.jobs, skip_locked=True)
    )


async def _hold_job(connection: AsyncConnection, job_id: str, tenant: str) -> Row[Any]:
    table = schema.jobs
    query = select(table).where(table.c.id == job_id, table.c.tenant == tenant).with_for_update()
    row = (await connection.execute(query)).first()
    if row is None:
        raise NotFound(f"no job {job_id[:64]!r}")
    return row


async def _read_job(connection: AsyncConnection, job_id: str, tenant: str) -> Job:
    table = schema.jobs
    row = (await connection.execute(select(table).where(table.c.id == job_id, table.c.tenant == tenant))).first()
    if row is None:
        raise NotFound(f"no job {job_id[:64]!r}")
    return _job(row)


async def _set(connection: AsyncConnection, job_id: str, **values: Any) -> None:
    await connection.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(values))


async def _tell_recording(
    connection: AsyncConnection, row: Row[Any], state: JobState, error_code: str = "", error: str = ""
) -> None:
    """What becomes of a recording when its ingest job ends other than by being done (then the handler says so), or is
    queued again. A camera whose job is cancelled is complete: somebody has switched it off."""
    if row.kind != JobKind.INGEST or row.recording_id is None:
        return
    table = schema.recordings
    mine = and_(table.c.id == row.recording_id, table.c.state != RecordingState.DELETING)
    values: dict[str, Any] = {"error_code": error_code, "error": error}
    if state is JobState.QUEUED:
        values["state"] = RecordingState.WAITING
    elif state is JobState.FAILED:
        values["state"] = RecordingState.FAILED
    elif state is JobState.CANCELLED:
        live = [kind for kind in SourceKind if kind.is_live]
        await connection.execute(
            update(table).where(mine, table.c.source_kind.in_(live)).values(state=RecordingState.COMPLETE)
        )
        mine = and_(mine, table.c.source_kind.not_in(live))
        values |= {
            "state": RecordingState.FAILED,
            "error_code": "cancelled",
            "error": "its ingest was cancelled",
        }
    else:
        return
    await connection.execute(update(table).where(mine).values(values))


async def _write_event(
    connection: AsyncConnection, job_id: str, number: int, kind: str, data: Mapping[str, Any], at: float
) -> int:
    """The caller holds the job's row: no two events of a job get one number, and none is seen before a lower one."""
    await connection.execute(
        schema.job_events.insert().values(job_id=job_id, number=number, kind=kind, data=dict(data), at=at)
    )
    return number


async def _remove_jobs(connection: AsyncConnection, ids: Sequence[str]) -> None:
    for table, column in (
        (schema.job_events, schema.job_events.c.job_id),
        (schema.checkpoints, schema.checkpoints.c.job_id),
        (schema.jobs, schema.jobs.c.id),
    ):
        await connection.execute(delete(table).where(column.in_(ids)))


def _job(row: Row[Any]) -> Job:
    return Job(
        id=row.id,
        tenant=row.tenant,
        kind=JobKind(row.kind),
        recording_id=row.recording_id,
        params=row.params,
        fingerprint=row.fingerprint,
        state=JobState(row.state),
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        fence=row.fence,
        created_at=row.created_at,
        not_before=row.not_before,
        finished_at=row.finished_at,
        progress=row.progress,
        result=row.result,
        error_code=row.error_code,
        error=row.error,
        cancel_asked=row.cancel_asked,
    )
