"""The database that holds recordings and jobs: how it is opened, brought up to date, and written in one transaction.

SQLite by default (one file on a local disk, any number of processes on one host), PostgreSQL in production. What is
stored where is said in `schema.py`; `store.py` and `job_rows.py` ask the questions.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from sqlalchemy import URL, Connection, Table, event, exc, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from nvila.errors import InvalidRequest, Unavailable

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
_MIGRATIONS_LOCK = 0x6E76_696C_61  # "nvila": the key of PostgreSQL's advisory lock; any constant would do
_AWAY = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)
_NOT_KEPT = "a text that was given holds a NUL character, or a number is larger than any that is kept"
"""PostgreSQL refuses such a value, even to look for it; SQLite takes it."""

Insert = sqlite.Insert | postgresql.Insert


class Database:
    """Connections to one database. `open` neither connects nor creates anything; `migrate` does, once, at start, and
    again where it failed: until then nothing is read or written."""

    def __init__(self, engine: AsyncEngine, wait_s: float) -> None:
        self._engine = engine
        self._wait_s = wait_s
        self.is_behind = False
        """Whether the tables may be those of another version, or none."""

    @classmethod
    def open(cls, url: str, *, wait_s: float = 20.0, connections: int = 8) -> Database:
        """`url`: sqlite:///folder/file.db or postgresql://user:password@host/database. `wait_s`: how long an operation
        waits for its turn (another writer, a free connection) before it raises `Unavailable`."""
        address = _with_driver(url)
        connect: dict[str, Any] = {"timeout": wait_s} if _is_sqlite(address) else _patience(wait_s)
        engine = create_async_engine(
            address,
            connect_args=connect,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=wait_s,
            pool_pre_ping=not _is_sqlite(address),
            json_serializer=to_json,
        )
        if _is_sqlite(address):
            event.listen(engine.sync_engine, "connect", partial(_prepare_sqlite, wait_s=wait_s))
            event.listen(engine.sync_engine, "begin", _begin_sqlite)
        else:
            event.listen(engine.sync_engine, "connect", partial(_prepare_postgresql, wait_s=wait_s))
        return cls(engine, wait_s)

    @property
    def is_sqlite(self) -> bool:
        return _is_sqlite(self._engine.url)

    async def migrate(self) -> None:
        """Bring the tables to this program's version. Processes that start together do it one after the other; a
        process that dies half-way leaves everything as it was. Raises `Unavailable` while the database is away."""
        self.is_behind = True
        if self.is_sqlite and self._engine.url.database:
            await asyncio.to_thread(_begin_file, Path(self._engine.url.database), self._wait_s)
        async with self._write() as connection:
            if not self.is_sqlite:
                for setting in ("lock_timeout", "statement_timeout"):  # another process may be at it for a while
                    await connection.execute(text(f"SET LOCAL {setting} = 0"))
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATIONS_LOCK})
            await connection.run_sync(_upgrade)
        self.is_behind = False

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """One transaction that only reads; on SQLite it never waits for a writer."""
        self._check_tables()
        try:
            async with self._engine.connect() as connection:
                yield connection
        except _AWAY as error:
            raise Unavailable("the database of recordings does not answer") from error
        except exc.DataError as error:
            raise InvalidRequest(_NOT_KEPT) from error

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """One transaction that writes, committed at the end of the block, undone when the block raises. On SQLite it
        is the only one of all processes from its first moment, so that what it has read stays true."""
        self._check_tables()
        async with self._write() as connection:
            yield connection

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[AsyncConnection]:
        try:
            async with self._engine.connect() as connection:
                await connection.execution_options(nvila_writes=True)
                async with connection.begin():
                    yield connection
        except _AWAY as error:
            raise Unavailable("the database of recordings does not answer") from error
        except exc.DataError as error:
            raise InvalidRequest(_NOT_KEPT) from error

    def insert(self, table: Table) -> Insert:
        """An INSERT that can say what happens on a conflict, in this database's dialect."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    async def ping(self) -> None:
        """Raises `Unavailable` when the database does not answer."""
        async with self.read() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        await self._engine.dispose()

    def _check_tables(self) -> None:
        if self.is_behind:
            raise Unavailable("the database of recordings does not answer")


def to_json(value: Any) -> str:
    """Compact and canonical: equal values have equal texts. Refuses NaN and infinities, which JSON does not have."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False, ensure_ascii=False)


def _with_driver(url: str) -> URL:
    address = make_url(url)
    backend = address.get_backend_name()
    if backend == "postgres":
        backend = "postgresql"
    if backend not in _DRIVERS:
        raise ValueError(f"database URL: expected sqlite:///… or postgresql://…, got {backend}://…")
    return address.set(drivername=_DRIVERS[backend])


def _is_sqlite(address: URL) -> bool:
    return address.get_backend_name() == "sqlite"


def _begin_file(path: Path, wait_s: float) -> None:
    """A new database is its owner's alone, for the credentials of cameras are in it; SQLite's own files follow it.

    The write-ahead log is set here, in the file, for good. To change to it SQLite needs the file alone and does not
    wait for it whatever its busy timeout (of six processes that begin one file together, some meet "database is
    locked"), so the waiting is done here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with closing(sqlite3.connect(path, timeout=wait_s)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise Unavailable(f"the database of recordings at {path}: {error}") from error
                if time.monotonic() > deadline:
                    raise Unavailable("the database of recordings is locked by another program") from error
                time.sleep(0.02)
            else:
                return


def _prepare_sqlite(connection: Any, _record: object, *, wait_s: float) -> None:
    """Per connection. FULL: what was committed survives a loss of power too, at one fsync per transaction."""
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={round(wait_s * 1000)}",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _patience(wait_s: float) -> dict[str, Any]:
    """What libpq is told, so that a server that vanished without a word is noticed in `wait_s`."""
    return {
        "connect_timeout": max(2, round(wait_s)),
        "keepalives_idle": max(1, round(wait_s / 2)),
        "keepalives_interval": max(1, round(wait_s / 8)),
        "keepalives_count": 4,
        "tcp_user_timeout": round(wait_s * 1000),
    }


def _prepare_postgresql(connection: Any, _record: object, *, wait_s: float) -> None:
    """Per connection: nobody waits for a row for ever, and a client that vanished in mid-transaction holds none."""
    cursor = connection.cursor()
    for setting, limit_s in (
        ("lock_timeout", wait_s),
        ("statement_timeout", 3 * wait_s),
        ("idle_in_transaction_session_timeout", 3 * wait_s),
    ):
        cursor.execute(f"SET {setting} = {round(limit_s * 1000)}")
    cursor.close()
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: a transaction that reads first and then finds that it must wait would fail."""
    writes = connection.get_execution_options().get("nvila_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _upgrade(connection: Connection) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", "nvila.recordings:migrations")
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
