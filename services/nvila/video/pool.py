"""The gateway's door to decoding: a fixed number of worker processes, each killed and replaced when it misbehaves.

A request borrows a worker, sends one JSON line, waits for one. Whatever ends the wait otherwise (time limit, the client
leaving, the worker's death) ends that worker, and a new one starts in its place; other requests do not notice.

Which worker gets which run: a worker keeps its last video open where its decoder stopped, so the next run of that file
is cheapest there. When a second worker comes to help with a file, it starts at the middle of what is left, so that each
decodes a stretch of its own instead of both decoding all of it; and only where a key frame lets it start there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvila.errors import DeadlineExceeded, LimitExceeded, Unavailable, from_wire
from nvila.types import Chunk, Deadline, FrameRun, MediaKind
from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits, MediaInfo
from nvila.video.process import WorkerProcess

log = logging.getLogger(__name__)

_PATIENCE_S = 1.0
"""A request that waits longer than this is served next, whatever file a free worker has open."""
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0


@dataclass
class PoolStats:
    """Counters since the start, for the gateway's metrics."""

    tasks: int = 0
    failed: int = 0
    busy_s: float = 0.0
    """Seconds that workers spent working."""
    frames_decoded: int = 0
    """Frames that came out of decoders, those on the way to wanted ones included."""
    frames_delivered: int = 0
    kills: int = 0
    """Workers that the pool killed: time limit, cancellation."""
    crashes: int = 0
    """Workers that ended by themselves."""


@dataclass(eq=False)
class _Want:
    """A request in line for a worker."""

    path: Path
    first: int
    turn: asyncio.Future[WorkerProcess]
    since_s: float = field(default_factory=time.monotonic)


class DecodePool:
    """Decodes files in worker processes into a `FrameArena`, which it owns. Belongs to one event loop."""

    def __init__(self, limits: DecodeLimits, arena: FrameArena) -> None:
        """Use `start`."""
        self.arena = arena
        self.limits = limits
        self.stats = PoolStats()
        self._workers: set[WorkerProcess] = set()
        self._free: list[WorkerProcess] = []
        self._line: list[_Want] = []
        self._ending: set[WorkerProcess] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._is_handing_out = False
        self._is_closed = False
        self._key_frames: dict[Path, tuple[int, ...]] = {}

    @classmethod
    async def start(cls, limits: DecodeLimits, arena: FrameArena) -> DecodePool:
        """Start all workers and wait until they can decode. Raises `Unavailable` when one cannot start."""
        pool = cls(limits, arena)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(limits.workers):
                    group.create_task(pool._add_worker())
        except ExceptionGroup as errors:
            await pool.aclose()
            raise Unavailable("a decode worker did not start") from errors
        except BaseException:
            await pool.aclose()
            raise
        return pool

    @property
    def live_workers(self) -> int:
        return len(self._workers)

    @property
    def busy_workers(self) -> int:
        return len(self._workers) - len(self._free)

    @property
    def waiting(self) -> int:
        """Requests in line for a worker."""
        return len(self._line)

    async def probe(self, path: Path, kind: MediaKind, deadline: Deadline) -> MediaInfo:
        """What the file is, from its headers (and a video's last frame).

        Raises `InvalidMedia`, `UnsupportedMedia`, `LimitExceeded`, `DeadlineExceeded`, `Unavailable`.
        """
        reply = await self._ask({"do": "probe", "path": str(path), "kind": kind}, path, 0, 0, deadline)
        info = MediaInfo.from_wire(reply["info"])
        self._key_frames[path] = info.key_frames
        while len(self._key_frames) > 256:
            del self._key_frames[next(iter(self._key_frames))]
        return info

    @contextlib.asynccontextmanager
    async def decode(
        self, path: Path, kind: MediaKind, run: FrameRun, size_px: int | None, group: int, deadline: Deadline
    ) -> AsyncIterator[Chunk]:
        """Decode one run of frames; the chunk's pixels are in the arena until the context ends.

        size_px: side of the square that frames are resized to, or None for the picture's own size. group: the temporal
        group that the chunk is filled up to. Waits for room in the arena, then for a worker. Raises as `probe`; frames
        that cannot be decoded are no error (`Chunk.missing`), not even when none can (F is 0 then).
        """
        if size_px is None:
            info = await self.probe(path, kind, deadline)
            width, height = info.width_px, info.height_px
        else:
            width = height = size_px
        frames = -(-len(run.indices) // group) * group
        shape = (frames, height, width, 3)
        location = await self.arena.allocate(frames * height * width * 3, deadline)
        try:
            reply = await self._ask(
                {
                    "do": "decode",
                    "path": str(path),
                    "kind": kind,
                    "indices": run.indices,
                    "shape": shape,
                    "group": group,
                    "offset": location.offset,
                },
                path,
                run.indices[0],
                run.indices[-1],
                deadline,
            )
            self.stats.frames_delivered += len(reply["times_s"])
            yield Chunk(
                frames_FHWC=self.arena.view(location, tuple(reply["shape"])),
                content_digest=bytes.fromhex(reply["digest"]),
                times_s=tuple(reply["times_s"]),
                missing=tuple(reply["missing"]),
                padded=reply["padded"],
                location=location,
            )
        finally:
            self.arena.release(location)

    async def aclose(self) -> None:
        """End all workers, wait until they are gone, remove the arena. Requests still waiting get `Unavailable`."""
        self._is_closed = True
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers | self._ending))
        self._workers.clear()
        self._free.clear()
        for want in self._line:
            if not want.turn.done():
                want.turn.set_exception(Unavailable("decoding is shutting down"))
        self.arena.close()

    # -- one request ---------------------------------------------------------------------------------------------------

    async def _ask(
        self, request: dict[str, Any], path: Path, first: int, last: int, deadline: Deadline
    ) -> dict[str, Any]:
        worker = await self._borrow(path, first, deadline)
        self.stats.tasks += 1
        worker.path, worker.position = path, last
        limit_s, left_s = self.limits.task_s, deadline.at_s - time.monotonic()
        try:
            async with asyncio.timeout(min(limit_s, left_s)):
                reply = await worker.ask(request)
        except BaseException as error:
            self.stats.failed += 1
            await self._put_down(worker)  # before the caller gives back the memory that it writes to
            if isinstance(error, TimeoutError):
                if left_s <= limit_s:
                    raise DeadlineExceeded("the request's time is up: decoding was not done") from None
                raise LimitExceeded(f"decoding took more than the {limit_s:g} s allowed") from None
            raise
        self.stats.busy_s += reply["busy_s"]
        self.stats.frames_decoded += reply["decoded_frames"]
        if reply.get("is_last"):
            await self._put_down(worker)
        else:
            self._put_back(worker)
        if "error" in reply:
            self.stats.failed += 1
            raise from_wire(reply["error"], reply["message"], reply.get("retry_after_s"))
        return reply

    async def _borrow(self, path: Path, first: int, deadline: Deadline) -> WorkerProcess:
        if self._is_closed:
            raise Unavailable("decoding is shutting down")
        want = _Want(path, first, asyncio.get_running_loop().create_future())
        self._line.append(want)
        self._hand_out_soon()
        try:
            async with asyncio.timeout(deadline.left_s()):
                worker = await want.turn
            deadline.left_s()
            return worker
        except BaseException as error:
            if want in self._line:
                self._line.remove(want)
            if want.turn.done() and not want.turn.cancelled() and want.turn.exception() is None:
                self._put_back(want.turn.result())  # a worker came in the same moment
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's time is up: no decode worker came free") from None
            raise

    # -- who gets which worker -----------------------------------------------------------------------------------------

    def _put_back(self, worker: WorkerProcess) -> None:
        if not self._is_closed:
            self._free.append(worker)
            self._hand_out_soon()

    def _hand_out_soon(self) -> None:
        """Once the requests that arrive together are all in line, so that they can be shared out with foresight."""
        if not self._is_handing_out:
            self._is_handing_out = True
            asyncio.get_running_loop().call_soon(self._hand_out)

    def _hand_out(self) -> None:
        self._is_handing_out = False
        for choose in (self._next_of_same_file, self._any_other):
            for worker in list(self._free):
                line = [want for want in self._line if not want.turn.done()]
                want = choose(worker, line) if line else None
                if want is not None:
                    self._free.remove(worker)
                    self._line.remove(want)
                    worker.path, worker.position = want.path, want.first
                    want.turn.set_result(worker)

    def _next_of_same_file(self, worker: WorkerProcess, line: list[_Want]) -> _Want | None:
        """The nearest run ahead of where this worker's decoder is, unless somebody has waited too long."""
        if time.monotonic() - line[0].since_s > _PATIENCE_S:
            return line[0]
        ahead = [want for want in line if want.path == worker.path and want.first >= worker.position]
        return min(ahead, key=lambda want: want.first, default=None)

    def _any_other(self, worker: WorkerProcess, line: list[_Want]) -> _Want | None:
        """The first run of a file that nobody works on, or the middle run of one where a second worker saves time."""
        for path in dict.fromkeys(want.path for want in line):
            runs = sorted((want for want in line if want.path == path), key=lambda want: want.first)
            middle = runs[len(runs) // 2]
            busy = [other for other in self._workers.difference(self._free) if other.path == path]
            on_the_way = [other.position for other in busy if other.position <= middle.first]
            if not on_the_way:
                return runs[0]
            if self._key_frame_before(middle) >= max(on_the_way):
                return middle
        return None

    def _key_frame_before(self, want: _Want) -> int:
        """The frame at which a worker new to this file would have to begin."""
        keys = self._key_frames.get(want.path, (0,))
        return keys[max(0, bisect_right(keys, want.first) - 1)]

    # -- the workers ---------------------------------------------------------------------------------------------------

    async def _add_worker(self) -> None:
        worker = await WorkerProcess.start(self.limits, self.arena)
        self._workers.add(worker)
        self._in_background(self._watch(worker))
        self._put_back(worker)

    async def _watch(self, worker: WorkerProcess) -> None:
        """Replace a worker that dies while nobody uses it."""
        await worker.wait()
        if worker in self._free:
            self._free.remove(worker)
            await self._put_down(worker)

    async def _put_down(self, worker: WorkerProcess) -> None:
        """End a worker and begin to start another in its place."""
        if worker.has_ended:
            self.stats.crashes += 1
        else:
            self.stats.kills += 1
        self._workers.discard(worker)
        self._ending.add(worker)
        if not self._is_closed:
            self._in_background(self._start_another())
        await worker.end()
        self._ending.discard(worker)

    async def _start_another(self) -> None:
        pause_s = _FIRST_RETRY_S
        while True:
            try:
                return await self._add_worker()
            except Unavailable as error:
                log.error("a decode worker did not start: %s", error.message)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_RETRY_S)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
