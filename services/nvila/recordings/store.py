"""Recordings, their segments and their chunks, as the database holds them.

Who asks for a tenant's recording names the tenant: another tenant's recording does not exist for it (`NotFound`).
What a worker writes goes through `jobs.ClaimTransaction`, which checks the worker's lease in the same transaction and
calls the `write_…` functions at the end of this module; nothing else writes chunks.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Row, Select, and_, case, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from nvila.errors import InvalidRequest, LimitExceeded, NotFound, NvilaError, Overloaded
from nvila.recordings import schema
from nvila.recordings.database import Database, to_json
from nvila.recordings.types import (
    ChunkPolicy,
    Counters,
    Group,
    JobState,
    RecordedChunk,
    Recording,
    RecordingState,
    Segment,
    Source,
    SourceKind,
)
from nvila.types import Gap, Level, TokensRef

Item = TypeVar("Item")

_FEW = 100
_COUNTERS = tuple(field.name for field in fields(Counters))
_OVER = (RecordingState.COMPLETE, RecordingState.FAILED, RecordingState.DELETING)


@dataclass(frozen=True, kw_only=True)
class Quota:
    """Of one tenant; None: no limit. `live`: cameras and pushed streams that have not ended. `queued_jobs`: of all
    kinds. Beyond the first two a recording is refused with `LimitExceeded`, beyond the last a job with `Overloaded`."""

    recordings: int | None = None
    live: int | None = None
    queued_jobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one tenant has: see `Quota`. `bytes_cold`: of tokens kept in the cold store."""

    recordings: int
    live: int
    queued_jobs: int
    seconds: float
    bytes_cold: int


@dataclass(frozen=True)
class Page(Generic[Item]):
    """A part of a list. `next_cursor` asks for what follows; None: nothing does."""

    items: Sequence[Item]
    next_cursor: str | None


class ChunkConflict(NvilaError):
    """A chunk or segment of this number exists with another content: two inputs were mixed up. Never shown."""

    code = "chunk_conflict"


def new_recording_id() -> str:
    return f"rec_{secrets.token_hex(16)}"


class RecordingStore:
    """Reads of recordings, and the few changes that a client makes itself. Recordings are made and deleted together
    with the job that does it: `JobStore.submit` and `JobStore.delete_recording`."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    # -- recordings

    async def get(self, recording_id: str, *, tenant: str) -> Recording:
        """Raises `NotFound`; a recording that is being deleted is not found any more."""
        async with self._database.read() as connection:
            return await read_recording(connection, recording_id, tenant=tenant)

    async def list(
        self,
        *,
        tenant: str,
        limit: int = 100,
        cursor: str | None = None,
        state: RecordingState | None = None,
        kind: SourceKind | None = None,
    ) -> Page[Recording]:
        """Newest first. `cursor`: of the page before; one that is not ours raises `InvalidRequest`."""
        table = schema.recordings
        query = select(table).where(table.c.tenant == tenant, table.c.state != RecordingState.DELETING)
        if state is not None:
            query = query.where(table.c.state == state)
        if kind is not None:
            query = query.where(table.c.source_kind == kind)
        async with self._database.read() as connection:
            rows = (await connection.execute(page_of(query, table.c, limit, cursor))).all()
        return Page([_recording(row) for row in rows[:limit]], cursor_after(rows, limit))

    async def update(
        self, recording_id: str, *, tenant: str, name: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Recording:
        """Give it another name, or other metadata (the whole of them)."""
        values: dict[str, Any] = {}
        if name is not None:
            values["name"] = name
        if metadata is not None:
            values["metadata"] = dict(metadata)
        async with self._database.write() as connection:
            recording = await read_recording(connection, recording_id, tenant=tenant)
            if not values:
                return recording
            table = schema.recordings
            await connection.execute(update(table).where(table.c.id == recording_id).values(values))
            return await read_recording(connection, recording_id, tenant=tenant)

    async def usage(self, *, tenant: str) -> Usage:
        async with self._database.read() as connection:
            return await read_usage(connection, tenant)

    # -- segments

    async def segments(
        self,
        recording_id: str,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        after: int | None = None,
        limit: int | None = None,
    ) -> Sequence[Segment]:
        """Those that reach into the window, in order. `after`: only greater numbers."""
        table = schema.segments
        query = select(table).where(table.c.recording_id == recording_id).order_by(table.c.number)
        if start_s is not None:
            query = query.where(table.c.start_s + table.c.duration_s > start_s)
        if end_s is not None:
            query = query.where(table.c.start_s < end_s)
        if after is not None:
            query = query.where(table.c.number > after)
        if limit is not None:
            query = query.limit(limit)
        async with self._database.read() as connection:
            return [_segment(row) for row in await connection.execute(query)]

    async def segment(self, recording_id: str, number: int) -> Segment:
        table = schema.segments
        query = select(table).where(table.c.recording_id == recording_id, table.c.number == number)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        if row is None:
            raise NotFound(f"recording {recording_id} has no segment {number}")
        return _segment(row)

    async def old_footage(self, ended_before: float, *, limit: int) -> Sequence[Segment]:
        """Segments whose files are kept, of live recordings that are complete or failed, which ended before this time:
        on the clock that began when the recording was made, or with its first frame if that was later."""
        recording, segment = schema.recordings.c, schema.segments.c
        made_at, captured_at = recording.created_at, func.coalesce(recording.captured_at, recording.created_at)
        began_at = case((captured_at > made_at, captured_at), else_=made_at)
        query = (
            select(schema.segments)
            .join(schema.recordings, recording.id == segment.recording_id)
            .where(recording.source_kind.in_([kind for kind in SourceKind if kind.is_live]))
            .where(recording.state.in_([RecordingState.COMPLETE, RecordingState.FAILED]))
            .where(segment.path != "", began_at + segment.start_s + segment.duration_s < ended_before)
            .limit(limit)
        )
        async with self._database.read() as connection:
            return [_segment(row) for row in await connection.execute(query)]

    async def forget_path(self, segment: Segment) -> None:
        """Note that a segment's file is not kept any more."""
        table = schema.segments
        mine = and_(table.c.recording_id == segment.recording_id, table.c.number == segment.number)
        async with self._database.write() as connection:
            await connection.execute(update(table).where(mine).values(path=""))

    # -- chunks

    async def chunks(
        self,
        recording_id: str,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        after: int | None = None,
        limit: int | None = None,
    ) -> Sequence[RecordedChunk]:
        """Those that reach into the window, by number, without vectors and thumbnails. `after`: only greater numbers.
        About 20 µs each; a recording of a month at 32 s a chunk has 81,000."""
        table = schema.chunks
        query = select(table).where(*_in_window(table.c, recording_id, start_s, end_s)).order_by(table.c.number)
        if after is not None:
            query = query.where(table.c.number > after)
        if limit is not None:
            query = query.limit(limit)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        if len(rows) <= _FEW:
            return [_chunk(row) for row in rows]
        return await asyncio.to_thread(lambda: [_chunk(row) for row in rows])  # others are to be served meanwhile

    async def chunk(self, recording_id: str, number: int) -> RecordedChunk:
        table = schema.chunks
        query = select(table).where(table.c.recording_id == recording_id, table.c.number == number)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        if row is None:
            raise NotFound(f"recording {recording_id} has no chunk {number}")
        return _chunk(row)

    async def last_chunk(self, recording_id: str) -> RecordedChunk | None:
        """The one with the greatest number: where a worker that takes over goes on."""
        table = schema.chunks
        query = select(table).where(table.c.recording_id == recording_id).order_by(table.c.number.desc()).limit(1)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else _chunk(row)

    async def count_chunks(self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None) -> int:
        table = schema.chunks
        query = select(func.count()).select_from(table).where(*_in_window(table.c, recording_id, start_s, end_s))
        async with self._database.read() as connection:
            return int((await connection.execute(query)).scalar_one())

    async def spans(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None
    ) -> Sequence[tuple[int, float, float]]:
        """(number, start_s, end_s) of the chunks that reach into the window, by number; nothing else is read."""
        table = schema.chunks
        query = select(table.c.number, table.c.start_s, table.c.end_s).order_by(table.c.number)
        query = query.where(*_in_window(table.c, recording_id, start_s, end_s))
        async with self._database.read() as connection:
            return [(number, start_s, end_s) for number, start_s, end_s in await connection.execute(query)]

    async def thumbnail(self, recording_id: str, number: int) -> bytes:
        """JPEG bytes. Raises `NotFound` when the chunk has none."""
        table = schema.chunk_thumbnails
        query = select(table.c.thumbnail).where(table.c.recording_id == recording_id, table.c.number == number)
        async with self._database.read() as connection:
            found = (await connection.execute(query)).scalar_one_or_none()
        if found is None:
            raise NotFound(f"chunk {number} of recording {recording_id} has no thumbnail")
        return bytes(found)

    async def vectors(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None, after: int | None = None
    ) -> Sequence[tuple[int, bytes]]:
        """(chunk number, `RecordedChunk.vector`) of those chunks of the window that have one, by number."""
        chunk, vector = schema.chunks.c, schema.chunk_vectors.c
        joined = schema.chunks.join(
            schema.chunk_vectors, and_(chunk.recording_id == vector.recording_id, chunk.number == vector.number)
        )
        query = (
            select(vector.number, vector.vector)
            .select_from(joined)
            .where(*_in_window(chunk, recording_id, start_s, end_s))
            .order_by(vector.number)
        )
        if after is not None:
            query = query.where(vector.number > after)
        async with self._database.read() as connection:
            return [(number, bytes(value)) for number, value in await connection.execute(query)]

    # -- token records

    async def note_key(self, recording_id: str, key: str) -> None:
        """Note that the recording stands on this token record too, before it is looked for or kept: its deletion
        removes what is noted. Raises `NotFound` for a recording that is being deleted."""
        table = schema.recordings
        query = select(table.c.id).where(table.c.id == recording_id, table.c.state != RecordingState.DELETING)
        async with self._database.write() as connection:
            if (await connection.execute(query.with_for_update(read=True))).first() is None:
                raise NotFound(f"no recording {recording_id[:64]!r}")
            await write_keys(self._database, connection, recording_id, [key])


# -- inside a transaction: reading ------------------------------------------------------------------------------------


async def read_recording(
    connection: AsyncConnection, recording_id: str, *, tenant: str | None, deleting: bool = False
) -> Recording:
    """`tenant` None: whosesoever it is. `deleting`: also one that is being deleted."""
    table = schema.recordings
    query = select(table).where(table.c.id == recording_id)
    if tenant is not None:
        query = query.where(table.c.tenant == tenant)
    if not deleting:
        query = query.where(table.c.state != RecordingState.DELETING)
    row = (await connection.execute(query)).first()
    if row is None:
        raise NotFound(f"no recording {recording_id[:64]!r}")
    return _recording(row)


async def read_usage(connection: AsyncConnection, tenant: str) -> Usage:
    table = schema.recordings.c
    is_live = and_(table.source_kind.in_([kind for kind in SourceKind if kind.is_live]), table.state.not_in(_OVER))
    found = (
        await connection.execute(
            select(
                func.count(),
                func.coalesce(func.sum(func.coalesce(table.ingested_s, 0)), 0),
                func.coalesce(func.sum(table.bytes_cold), 0),
            ).where(table.tenant == tenant, table.state != RecordingState.DELETING)
        )
    ).one()
    live = (
        await connection.execute(
            select(func.count()).select_from(schema.recordings).where(table.tenant == tenant, is_live)
        )
    ).scalar_one()
    job = schema.jobs.c
    queued = (
        await connection.execute(
            select(func.count()).select_from(schema.jobs).where(job.tenant == tenant, job.state == JobState.QUEUED)
        )
    ).scalar_one()
    return Usage(recordings=found[0], seconds=float(found[1]), bytes_cold=int(found[2]), live=live, queued_jobs=queued)


def page_of(query: Select[Any], columns: Any, limit: int, cursor: str | None) -> Select[Any]:
    """`query` newest first, from after `cursor`, with one row more than `limit` to tell whether there are more."""
    if cursor is not None:
        at, last_id = _read_cursor(cursor)
        query = query.where(or_(columns.created_at < at, and_(columns.created_at == at, columns.id < last_id)))
    return query.order_by(columns.created_at.desc(), columns.id.desc()).limit(limit + 1)


def cursor_after(rows: Sequence[Row[Any]], limit: int) -> str | None:
    if len(rows) <= limit:
        return None
    last = rows[limit - 1]
    return base64.urlsafe_b64encode(f"{last.created_at.hex()} {last.id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[float, str]:
    try:
        at, last_id = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        return float.fromhex(at), last_id
    except (ValueError, OverflowError, binascii.Error):
        raise InvalidRequest("cursor: not one that a page before this has given", param="cursor") from None


def _in_window(
    columns: Any, recording_id: str, start_s: float | None, end_s: float | None
) -> Iterable[ColumnElement[bool]]:
    yield columns.recording_id == recording_id
    if start_s is not None:
        yield columns.end_s > start_s
    if end_s is not None:
        yield columns.start_s < end_s


# -- inside a transaction: writing ------------------------------------------------------------------------------------


async def check_quota(connection: AsyncConnection, tenant: str, quota: Quota, recording: Recording | None) -> None:
    """The caller holds the tenant's row, so that two requests do not both take the last place."""
    used = await read_usage(connection, tenant)
    if recording is not None and quota.recordings is not None and used.recordings >= quota.recordings:
        raise LimitExceeded.of("recordings", asked=used.recordings + 1, limit=quota.recordings)
    if recording is not None and recording.source.kind.is_live and quota.live is not None and used.live >= quota.live:
        raise LimitExceeded.of("live recordings", asked=used.live + 1, limit=quota.live)
    if quota.queued_jobs is not None and used.queued_jobs >= quota.queued_jobs:
        raise Overloaded(f"{used.queued_jobs} jobs are waiting, at most {quota.queued_jobs} may", retry_after_s=30)


async def write_recording(connection: AsyncConnection, recording: Recording) -> None:
    source = recording.source
    await connection.execute(
        schema.recordings.insert().values(
            id=recording.id,
            tenant=recording.tenant,
            name=recording.name,
            source_kind=source.kind,
            url=source.url,
            file_id=source.file_id,
            secret=source.secret,
            policy=asdict(recording.policy),
            state=recording.state,
            created_at=recording.created_at,
            captured_at=recording.captured_at,
            duration_s=recording.duration_s,
            ingested_s=recording.ingested_s,
            error_code=recording.error_code,
            error=recording.error,
            digest=recording.digest,
            metadata=dict(recording.metadata),
            **asdict(recording.counters),
        )
    )


async def write_segment(connection: AsyncConnection, segment: Segment) -> bool:
    """False: it was there. Raises `ChunkConflict` when another one has its number."""
    table = schema.segments
    query = select(table).where(table.c.recording_id == segment.recording_id, table.c.number == segment.number)
    there = (await connection.execute(query)).first()
    if there is None:
        await connection.execute(table.insert().values(**asdict(segment)))
        return True
    if _segment(there) != segment:
        raise ChunkConflict(f"segment {segment.number} of {segment.recording_id} exists with another content")
    return False


async def write_chunk(database: Database, connection: AsyncConnection, chunk: RecordedChunk) -> bool:
    """False: it was there. Raises `ChunkConflict` when a chunk of this number has another time, other groups or other
    gaps. (Vector and thumbnail may differ in their last bits from run to run; the first ones stay.)"""
    table, body = schema.chunks, pack_chunk(chunk)
    query = select(table).where(table.c.recording_id == chunk.recording_id, table.c.number == chunk.number)
    there = (await connection.execute(query)).first()
    if there is not None:
        if (there.start_s, there.end_s, there.body) != (chunk.start_s, chunk.end_s, body):
            raise ChunkConflict(f"chunk {chunk.number} of {chunk.recording_id} exists with another content")
        return False
    name = {"recording_id": chunk.recording_id, "number": chunk.number}
    await connection.execute(table.insert().values(**name, start_s=chunk.start_s, end_s=chunk.end_s, body=body))
    if chunk.vector:
        await connection.execute(schema.chunk_vectors.insert().values(**name, vector=chunk.vector))
    if chunk.thumbnail:
        await connection.execute(schema.chunk_thumbnails.insert().values(**name, thumbnail=chunk.thumbnail))
    await write_keys(database, connection, chunk.recording_id, {group.ref.key for group in chunk.groups if group.ref})
    return True


async def write_keys(database: Database, connection: AsyncConnection, recording_id: str, keys: Iterable[str]) -> None:
    """Note that the recording stands on these token records. While another one's deletion is at them (`drop_keys`) it
    is waited for: who looks for them afterwards sees what it has left."""
    rows = [{"key": key, "recording_id": recording_id} for key in sorted(set(keys))]
    if rows:
        await connection.execute(_uses_of([row["key"] for row in rows]).with_for_update(read=True))
        await connection.execute(database.insert(schema.token_uses).on_conflict_do_nothing(), rows)


async def add_counters(connection: AsyncConnection, recording_id: str, more: Counters) -> None:
    table = schema.recordings
    values = {name: table.c[name] + getattr(more, name) for name in _COUNTERS if getattr(more, name)}
    if values:
        await connection.execute(update(table).where(table.c.id == recording_id).values(values))


async def drop_keys(connection: AsyncConnection, recording_id: str, limit: int) -> Sequence[str] | None:
    """The recording does not stand on up to `limit` of its token records any more. Returns the keys of those that no
    other one stands on, which nobody can come to stand on before the transaction ends; None: there were none left."""
    table = schema.token_uses
    query = select(table.c.key).where(table.c.recording_id == recording_id).order_by(table.c.key).limit(limit)
    keys = [key for (key,) in await connection.execute(query)]
    if not keys:
        return None
    await connection.execute(_uses_of(keys).with_for_update())
    # A statement of its own: it sees what was committed while the locks were waited for.
    others = select(table.c.key).where(table.c.key.in_(keys), table.c.recording_id != recording_id)
    shared = {key for (key,) in await connection.execute(others)}
    await connection.execute(delete(table).where(table.c.recording_id == recording_id, table.c.key.in_(keys)))
    return [key for key in keys if key not in shared]


def _uses_of(keys: Sequence[str]) -> Select[Any]:
    table = schema.token_uses
    return select(table.c.key).where(table.c.key.in_(keys)).order_by(table.c.key, table.c.recording_id)


async def remove_chunks(connection: AsyncConnection, recording_id: str, limit: int) -> int:
    """Of the chunks that are left, remove up to `limit`, the greatest numbers first. Returns how many."""
    table = schema.chunks
    query = select(table.c.number).where(table.c.recording_id == recording_id).order_by(table.c.number.desc())
    numbers = [number for (number,) in await connection.execute(query.limit(limit))]
    if numbers:
        for part in (schema.chunk_vectors, schema.chunk_thumbnails, table):
            await connection.execute(
                delete(part).where(
                    part.c.recording_id == recording_id, part.c.number >= numbers[-1], part.c.number <= numbers[0]
                )
            )
    return len(numbers)


async def remove_recording(connection: AsyncConnection, recording_id: str) -> None:
    """What is left of it when its chunks are gone."""
    for table in (schema.token_uses, schema.segments):
        await connection.execute(delete(table).where(table.c.recording_id == recording_id))
    await connection.execute(delete(schema.recordings).where(schema.recordings.c.id == recording_id))


# -- rows and dataclasses ---------------------------------------------------------------------------------------------


def pack_chunk(chunk: RecordedChunk) -> str:
    """Groups and gaps as compact JSON; equal contents give equal texts."""
    named_for = next((group.named_for for group in chunk.groups if group.ref is not None), "")
    groups = [
        [
            list(group.times_s),
            group.segment,
            list(group.indices),
            None if group.ref is None else [group.ref.key, [[lv.blocks, lv.tokens] for lv in group.ref.levels]],
            int(group.is_static),
        ]
        for group in chunk.groups
    ]
    body = {"groups": groups, "gaps": [[gap.start_s, gap.end_s, gap.reason] for gap in chunk.gaps]}
    return to_json({**body, "named_for": named_for} if named_for else body)


def _chunk(row: Row[Any]) -> RecordedChunk:
    body = json.loads(row.body)
    named_for = body.get("named_for", "")
    return RecordedChunk(
        recording_id=row.recording_id,
        number=row.number,
        start_s=row.start_s,
        end_s=row.end_s,
        groups=tuple(
            Group(
                times_s=tuple(times),
                segment=segment,
                indices=tuple(indices),
                ref=None if ref is None else TokensRef(key=ref[0], levels=tuple(Level(*level) for level in ref[1])),
                is_static=bool(is_static),
                named_for="" if ref is None else named_for,
            )
            for times, segment, indices, ref, is_static in body["groups"]
        ),
        gaps=tuple(Gap(start_s=start, end_s=end, reason=reason) for start, end, reason in body["gaps"]),
    )


def _segment(row: Row[Any]) -> Segment:
    return Segment(**row._mapping)


def _recording(row: Row[Any]) -> Recording:
    return Recording(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        source=Source(kind=SourceKind(row.source_kind), url=row.url, file_id=row.file_id, secret=row.secret),
        policy=ChunkPolicy(**row.policy),
        state=RecordingState(row.state),
        created_at=row.created_at,
        captured_at=row.captured_at,
        duration_s=row.duration_s,
        ingested_s=row.ingested_s,
        counters=Counters(**{name: row._mapping[name] for name in _COUNTERS}),
        error_code=row.error_code,
        error=row.error,
        digest=row.digest,
        metadata=row.metadata,
    )
