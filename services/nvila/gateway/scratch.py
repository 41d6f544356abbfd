"""Temporary files of one process, counted and hashed while they are written, in constant memory.

A process's files live in a folder of its own; the next process to start removes what dead ones left behind.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from nvila.errors import LimitExceeded, Unavailable
from nvila.locks import OwnFolder

_FLUSH_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Spooled:
    """A file that was written whole. `digest`: BLAKE3 of its bytes. `head`: its first bytes."""

    path: Path
    size_bytes: int
    digest: bytes
    head: bytes


class Spool:
    """A temporary file being written. More than `limit_bytes` raises `LimitExceeded`, before they reach the disk."""

    def __init__(self, path: Path, limit_bytes: int, param: str | None) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._param = param
        self._file = path.open("xb", buffering=0)
        self._digest = blake3()
        self._buffer = bytearray()
        self._head = b""
        self.size_bytes = 0

    async def write(self, data: bytes | memoryview) -> None:
        self.expect(self.size_bytes + len(data))
        self.size_bytes += len(data)
        self._buffer += data
        if len(self._buffer) >= _FLUSH_BYTES:
            await asyncio.to_thread(self._flush)

    def expect(self, size_bytes: int) -> None:
        """Raise `LimitExceeded` already now if the whole file is to have this many bytes and that is too much."""
        if size_bytes > self._limit_bytes:
            raise LimitExceeded.of("media bytes", asked=size_bytes, limit=self._limit_bytes, param=self._param)

    async def finish(self) -> Spooled:
        await asyncio.to_thread(self._flush)
        self._file.close()
        return Spooled(path=self._path, size_bytes=self.size_bytes, digest=self._digest.digest(), head=self._head)

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        if not self._head:
            self._head = bytes(self._buffer[:64])
        self._digest.update(self._buffer)
        try:
            with memoryview(self._buffer) as left:
                written = 0
                while written < len(left):
                    written += self._file.write(left[written:])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Unavailable("the server's disk is full") from None
        self._buffer.clear()


class Scratch:
    """This process's folder under `root`. Files leave it by being moved away, or when their context ends."""

    def __init__(self, root: Path) -> None:
        self._folder = OwnFolder(root)

    def new_path(self) -> Path:
        return self._folder.path / secrets.token_hex(16)

    @asynccontextmanager
    async def spool(self, limit_bytes: int, param: str | None = None) -> AsyncIterator[Spool]:
        """A file to write to; gone at the end of the block, unless it was moved away."""
        path = self.new_path()
        spool = Spool(path, limit_bytes, param)
        try:
            yield spool
        finally:
            spool.close()
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._folder.close()
