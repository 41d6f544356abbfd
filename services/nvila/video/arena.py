"""One named shared-memory region that holds the frames of all chunks between decoding and encoding.

Decode workers write into it, Triton can map it by name, and the gateway never copies a frame. It is as large as the
frames that may be in flight: when it is full, decoding waits (back-pressure). The region is a file of /dev/shm, as
POSIX shared memory is on Linux; its pages exist only once something was written to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import secrets
from collections import deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvila.errors import DeadlineExceeded, LimitExceeded, Unavailable
from nvila.types import Deadline, FrameLocation

_SHM = Path("/dev/shm")
_PAGE_BYTES = 4096
"""Offsets are whole pages, so that two chunks never share one."""


class FrameArena:
    """First-fit allocation in one region; belongs to one event loop.

    The creator holds a file lock on the region as long as it lives. `create` removes regions with the same prefix whose
    lock is free: their owner was killed before it could.
    """

    def __init__(self, path: Path, fd: int, size_bytes: int) -> None:
        """Use `create`."""
        self._path = path
        self._fd = fd
        self._map = mmap.mmap(fd, size_bytes)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._free: list[tuple[int, int]] = [(0, size_bytes)]
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()
        self.size_bytes = size_bytes
        self.used_bytes = 0

    @classmethod
    def create(cls, prefix: str, size_bytes: int) -> FrameArena:
        """Make a region of at least size_bytes named "<prefix>-<random>".

        Raises `Unavailable` when shared memory is smaller than that: a full /dev/shm would kill whoever writes to it.
        """
        assert "/" not in prefix, prefix
        size_bytes = _whole_pages(size_bytes)
        _remove_left_behind(prefix)
        room = os.statvfs(_SHM)
        if room.f_bavail * room.f_frsize < size_bytes:
            raise Unavailable(
                f"shared memory has {room.f_bavail * room.f_frsize:,} bytes free, the frame arena needs {size_bytes:,}"
            )
        path = _SHM / f"{prefix}-{secrets.token_hex(6)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, size_bytes)
            return cls(path, fd, size_bytes)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise

    @property
    def region(self) -> str:
        """The region's POSIX name."""
        return f"/{self._path.name}"

    @property
    def path(self) -> Path:
        return self._path

    async def allocate(self, nbytes: int, deadline: Deadline) -> FrameLocation:
        """Reserve nbytes, waiting in line for room; give them back with `release`.

        Raises `LimitExceeded` when it could never fit and `DeadlineExceeded` when the wait takes too long.
        """
        need = _whole_pages(nbytes)
        if need > self.size_bytes:
            raise LimitExceeded.of("bytes of decoded frames", asked=nbytes, limit=self.size_bytes)
        offset = None if self._waiting else self._take(need)
        if offset is None:
            offset = await self._wait_for(need, deadline)
        return FrameLocation(region=self.region, region_bytes=self.size_bytes, offset=offset, nbytes=nbytes)

    def release(self, location: FrameLocation) -> None:
        self._give(location.offset, _whole_pages(location.nbytes))
        self._serve_waiting()

    def view(self, location: FrameLocation, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The bytes of a location as a read-only array."""
        size = int(np.prod(shape))
        assert size <= location.nbytes, (shape, location)
        view = self._bytes[location.offset : location.offset + size].reshape(shape)
        view.flags.writeable = False
        return view

    def close(self) -> None:
        """Remove the region's name and unmap it (as soon as no view of it is left)."""
        self._path.unlink(missing_ok=True)
        del self._bytes
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._fd)

    async def _wait_for(self, need: int, deadline: Deadline) -> int:
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((need, turn))
        try:
            async with asyncio.timeout(deadline.left_s()):
                return await turn
        except (TimeoutError, asyncio.CancelledError) as error:
            if turn.done() and not turn.cancelled():
                self._give(turn.result(), need)  # room came in the same moment
            turn.cancel()
            self._serve_waiting()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's time is up: no room for its frames came free") from None
            raise

    def _take(self, need: int) -> int | None:
        for at, (offset, size) in enumerate(self._free):
            if size >= need:
                self._free[at : at + 1] = [(offset + need, size - need)] if size > need else []
                self.used_bytes += need
                return offset
        return None

    def _give(self, offset: int, size: int) -> None:
        self.used_bytes -= size
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (offset, size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged

    def _serve_waiting(self) -> None:
        """In order of arrival; a large request at the head is not overtaken by small ones, so it does get its turn."""
        while self._waiting:
            need, turn = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
                continue
            offset = self._take(need)
            if offset is None:
                return
            self._waiting.popleft()
            turn.set_result(offset)


def _whole_pages(nbytes: int) -> int:
    return max(1, -(-nbytes // _PAGE_BYTES)) * _PAGE_BYTES


def _remove_left_behind(prefix: str) -> None:
    for path in _SHM.glob(f"{prefix}-*"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or gone since it was listed
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            pass  # its owner lives
        finally:
            os.close(fd)
