"""A job that a worker holds: every write is one transaction that first checks that the job is still this worker's.

The contract that this keeps is told in `jobs.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Row, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from nvila.errors import NvilaError
from nvila.recordings import job_rows, schema, store
from nvila.recordings.database import Database, to_json
from nvila.recordings.job_rows import NewJob
from nvila.recordings.types import Counters, Job, JobState, RecordedChunk, RecordingState, Segment

_DELETE_CHUNKS_AT_ONCE = 500
_DROP_KEYS_AT_ONCE = 32
"""Records are removed from the cold store inside of a transaction: on an object store 32 take about two seconds."""


class LeaseLost(NvilaError):
    """The job is another worker's now, or over: stop, write nothing more. Never shown to a client."""

    code = "lease_lost"


class CheckpointConflict(NvilaError):
    """A checkpoint of this step exists with another payload: the handler is not repeatable. Never shown."""

    code = "checkpoint_conflict"


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
                now.changes |= {
                    "state": JobState.QUEUED,
                    "not_before": self._clock() + delay_s,
                    "lease_until": 0.0,
                    **told,
                }
                return JobState.QUEUED
            await now.end(JobState.FAILED, **told)
            return JobState.FAILED

    async def cancelled(self) -> None:
        """It has stopped because the client asked for it. The lease ends."""
        async with self.transaction() as now:
            await now.end(JobState.CANCELLED)

    async def release(self) -> None:
        """Give it back unfinished, through no fault of its own (the worker goes): it is queued again and this attempt
        does not count. The lease ends."""
        await self._give_back(not_before=self._clock(), lease_until=0.0)

    async def put_off(self, delay_s: float) -> None:
        """Give it back before anything was done, as there is no room for it: nobody has it for `delay_s`, and it is as
        if it had not been claimed; it has waited for as long as it could have begun."""
        await self._give_back(lease_until=self._clock() + delay_s)

    async def _give_back(self, **changes: float) -> None:
        async with self.transaction() as now:
            if now.cancel_asked:
                await now.end(JobState.CANCELLED)
                return
            now.changes |= {"state": JobState.QUEUED, "attempt": max(0, now.attempt - 1), **changes}


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
        self._last_event = await job_rows.write_event(
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
        there = await job_rows.same_key(self._connection, self._row.tenant, new)
        return there or await job_rows.insert_job(self._connection, self._row.tenant, new, self._at)

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
        await job_rows.remove_jobs(self._connection, query)

    async def end(self, state: JobState, **values: Any) -> None:
        """The job is over, in this transaction."""
        assert state.is_over
        told: dict[str, Any] = {name: values[name] for name in ("error_code", "error") if name in values}
        await self.event(state.value, told)
        await job_rows.tell_recording(self._connection, self._row, state, **told)
        self.changes |= {"state": state, "finished_at": self._at, "error_code": "", "error": "", **values}

    async def write(self) -> None:
        """Called by `Claim.transaction` at the end of the block."""
        if self._last_event != self._row.last_event:
            self.changes["last_event"] = self._last_event
        if self.changes:
            await job_rows.set_job(self._connection, self._row.id, **self.changes)

    @property
    def _recording_id(self) -> str:
        assert self._row.recording_id is not None, "a job about a recording"
        return str(self._row.recording_id)
