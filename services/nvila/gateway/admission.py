"""A bounded number of requests at once, and a bounded queue before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nvila.errors import Overloaded, Unavailable

_LONGEST_RETRY_S = 60.0


class Admission:
    """Permits taken at the door. `permits` requests run, `queue` more wait at most `wait_s` for their turn, in order;
    the rest are refused with an estimate of when to come back. One event loop."""

    def __init__(self, *, permits: int, queue: int, wait_s: float) -> None:
        self._permits = permits
        self._queue = queue
        self._wait_s = wait_s
        self._free = asyncio.Semaphore(permits)
        self._is_open = True
        self._idle = asyncio.Event()
        self._idle.set()
        self._hold_s = 1.0
        self.running = 0
        """Requests that hold a permit."""
        self.waiting = 0
        """Requests in the queue."""

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[None]:
        """Hold a permit for the block. Raises `Overloaded` when the queue is full or the wait too long, `Unavailable`
        once closed."""
        await self._take()
        self.running += 1
        self._idle.clear()
        began = time.monotonic()
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
            self._hold_s += 0.2 * (time.monotonic() - began - self._hold_s)
            if not self.running:
                self._idle.set()

    def close(self) -> None:
        """Admit nobody any more."""
        self._is_open = False

    async def drain(self, timeout_s: float) -> bool:
        """Wait until no permit is held; False when some still are after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _take(self) -> None:
        self._check_open()
        if self._free.locked() and self.waiting >= self._queue:
            raise Overloaded(
                f"{self.running} requests are running and {self.waiting} waiting, the most that are taken on",
                retry_after_s=self._retry_after_s(),
            )
        self.waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise Overloaded(
                f"no turn came in {self._wait_s:g} s; {self.running} requests are running",
                retry_after_s=self._retry_after_s(),
            ) from None
        finally:
            self.waiting -= 1
        if not self._is_open:
            self._free.release()
            self._check_open()

    def _check_open(self) -> None:
        if not self._is_open:
            raise Unavailable("the gateway is shutting down", retry_after_s=1.0)

    def _retry_after_s(self) -> float:
        """About when a permit comes free for somebody new: the queue's length times what a request lately took."""
        return min(max(1.0, self._hold_s * (self.waiting + 1) / self._permits), _LONGEST_RETRY_S)
