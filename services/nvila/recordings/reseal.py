"""Brings what is secret in the database under the key that seals now: once, when a worker starts.

So keys that were set later seal what lay in clear, and an old key can be taken away (`seal.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from nvila.errors import Unavailable
from nvila.recordings import schema
from nvila.recordings.database import Database
from nvila.recordings.seal import SECRET, Seal
from nvila.recordings.types import JobKind

_HOLDERS = (JobKind.WATCH, JobKind.DELIVER)


async def reseal(database: Database, seal: Seal) -> tuple[int, int]:
    """Seal with the first key what lies in the database in clear or under another key. Returns how many were, and how
    many are left because none of the keys opens them. May be repeated, and done by several workers at once."""
    done = left = 0

    def again(kept: str) -> str | None:
        nonlocal done, left
        if not seal.is_on or seal.is_current(kept):
            return None
        try:
            closed = seal.close(seal.open(kept))
        except Unavailable:
            left += 1
            return None
        done += 1
        return closed

    async with database.write() as connection:
        await _each_recording(connection, again)
        await _each_job(connection, again)
    return done, left


async def _each_recording(connection: AsyncConnection, again: Callable[[str], str | None]) -> None:
    table = schema.recordings
    query = select(table.c.id, table.c.secret).where(table.c.secret.is_not(None)).order_by(table.c.id)
    for row in (await connection.execute(query.with_for_update())).all():
        if (closed := again(row.secret)) is not None:
            await connection.execute(update(table).where(table.c.id == row.id).values(secret=closed))


async def _each_job(connection: AsyncConnection, again: Callable[[str], str | None]) -> None:
    table = schema.jobs
    query = select(table.c.id, table.c.params).where(table.c.kind.in_(_HOLDERS)).order_by(table.c.id)
    for row in (await connection.execute(query)).all():
        kept = row.params.get(SECRET)
        if isinstance(kept, str) and (closed := again(kept)) is not None:
            values = {"params": {**row.params, SECRET: closed}}
            await connection.execute(update(table).where(table.c.id == row.id).values(values))
