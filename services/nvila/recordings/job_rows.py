"""The rows of jobs: what is read and written of them inside of a transaction that somebody else began.

`jobs.py` does so for clients and for the turn of workers, `claims.py` for the worker that holds a job.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, and_, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from nvila.errors import Conflict, NotFound
from nvila.recordings import schema
from nvila.recordings.database import Database
from nvila.recordings.types import Job, JobKind, JobState, RecordingState, SourceKind

MAX_ATTEMPTS = 8


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


async def hold_tenant(
    database: Database, connection: AsyncConnection, tenant: str, served_at: float | None = None
) -> None:
    """Lock the tenant's row until the transaction's end (there is one from now on)."""
    table = schema.tenants
    insert = database.insert(table).values(tenant=tenant, served_at=served_at or 0.0)
    new = insert.excluded.served_at if served_at is not None else table.c.served_at
    await connection.execute(insert.on_conflict_do_update(index_elements=[table.c.tenant], set_={"served_at": new}))


async def same_key(connection: AsyncConnection, tenant: str, new: NewJob) -> Job | None:
    """The tenant's job that has the new one's idempotency key. Raises `Conflict` when that was for something else."""
    if new.idempotency_key is None:
        return None
    table = schema.jobs
    query = select(table).where(table.c.tenant == tenant, table.c.idempotency_key == new.idempotency_key)
    row = (await connection.execute(query)).first()
    if row is None:
        return None
    if (row.fingerprint, row.kind) != (new.fingerprint, new.kind):
        raise Conflict("the idempotency key was used for another request", param="Idempotency-Key")
    return job_of(row)


async def insert_job(connection: AsyncConnection, tenant: str, new: NewJob, at: float) -> Job:
    job_id = f"job_{secrets.token_hex(16)}"
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
            created_at=at,
            not_before=max(at, new.not_before),
            progress={},
            error_code="",
            error="",
            cancel_asked=False,
            last_event=0,
        )
    )
    return await read_job(connection, job_id, tenant)


def next_job(kinds: Collection[JobKind], now: float) -> Any:
    """The query of whose turn it is: of the jobs that may begin and are not put off, one whose tenant has the fewest
    running jobs of its kind; among those the one whose tenant was served longest ago; of a tenant's jobs the oldest. A
    deletion waits until nothing else of its recording runs."""
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
        .where(job.state == JobState.QUEUED, job.kind.in_(kinds), job.not_before <= now, job.lease_until <= now)
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


async def hold_job(connection: AsyncConnection, job_id: str, tenant: str) -> Row[Any]:
    table = schema.jobs
    query = select(table).where(table.c.id == job_id, table.c.tenant == tenant).with_for_update()
    row = (await connection.execute(query)).first()
    if row is None:
        raise NotFound(f"no job {job_id[:64]!r}")
    return row


async def read_job(connection: AsyncConnection, job_id: str, tenant: str) -> Job:
    table = schema.jobs
    row = (await connection.execute(select(table).where(table.c.id == job_id, table.c.tenant == tenant))).first()
    if row is None:
        raise NotFound(f"no job {job_id[:64]!r}")
    return job_of(row)


async def set_job(connection: AsyncConnection, job_id: str, **values: Any) -> None:
    await connection.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(values))


async def tell_recording(
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


async def write_event(
    connection: AsyncConnection, job_id: str, number: int, kind: str, data: Mapping[str, Any], at: float
) -> int:
    """The caller holds the job's row: no two events of a job get one number, and none is seen before a lower one."""
    await connection.execute(
        schema.job_events.insert().values(job_id=job_id, number=number, kind=kind, data=dict(data), at=at)
    )
    return number


async def remove_jobs(connection: AsyncConnection, ids: Sequence[str] | Select[Any]) -> None:
    """`ids`: some hundreds, or the query that finds them: a statement takes only so many parameters."""
    for table, column in (
        (schema.job_events, schema.job_events.c.job_id),
        (schema.checkpoints, schema.checkpoints.c.job_id),
        (schema.jobs, schema.jobs.c.id),
    ):
        await connection.execute(delete(table).where(column.in_(ids)))


def job_of(row: Row[Any]) -> Job:
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
