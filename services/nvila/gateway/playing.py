"""A recording's footage as a browser plays it: a file of this disk, or bytes of the store by ranges.

What browsers play (MP4, WebM) is given as it lies. Footage of cameras lies in MPEG transport streams and Matroska,
which they do not play: it is put into MP4, packets as they are, by a process without rights (`video/remux.py`), and
kept for some minutes, since a player asks for the same file several times.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nvila.errors import NotFound, Unavailable
from nvila.recordings.types import Segment
from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)

MOST_REMUXED_BYTES = 64 << 20
"""As `video.remux.MOST_BYTES`, which this process does not import."""
HEAD_BYTES = 189

_KEEP_S = 600.0
_MOST_KEPT_BYTES = 512 << 20
_REMUX_S = 30.0
_BLOCK_BYTES = 4 << 20


class Store(Protocol):
    """What is asked of `recordings.cold.ColdStore`."""

    async def local(self, relative: str) -> Path | None: ...
    async def size(self, relative: str) -> int: ...
    async def read(self, relative: str, start: int, end: int) -> bytes: ...
    def open(self, relative: str) -> contextlib.AbstractAsyncContextManager[Path]: ...


@dataclass(frozen=True, eq=False)
class Stored:
    """A file of the store that is not on this disk."""

    store: Store
    relative: str
    size_bytes: int
    media_type: str

    async def blocks(self, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes [start, end), in order."""
        for at in range(start, end, _BLOCK_BYTES):
            yield await self.store.read(self.relative, at, min(at + _BLOCK_BYTES, end))


class Player:
    """`folder`: this process's own, for files that were made to be played."""

    def __init__(self, store: Store, folder: Path, *, most_kept_bytes: int = _MOST_KEPT_BYTES) -> None:
        self._store = store
        self._folder = folder
        self._most_kept_bytes = most_kept_bytes
        self._turn = asyncio.Lock()

    async def open(self, segment: Segment) -> Path | Stored:
        """Raises `NotFound` for footage that is not kept any more, `Unavailable`."""
        if not segment.path:
            raise NotFound("this part of the recording's source is not kept")
        path = await self._store.local(segment.path)
        size = await self._store.size(segment.path)
        if path is not None:
            with await asyncio.to_thread(path.open, "rb") as file:
                kind = media_type(file.read(HEAD_BYTES))
        else:
            kind = media_type(await self._store.read(segment.path, 0, min(size, HEAD_BYTES)))
        if kind in ("video/mp2t", "video/x-matroska") and size <= MOST_REMUXED_BYTES:
            made = await self._remuxed(segment)
            if made is not None:
                return made
        return path or Stored(self._store, segment.path, size, kind)

    async def tidy(self) -> None:
        """Remove what nobody has asked for lately; called regularly."""
        await asyncio.to_thread(self._tidy)

    # -- inside

    async def _remuxed(self, segment: Segment) -> Path | None:
        """None: it holds nothing that a browser plays, which an empty file remembers as long as others are kept."""
        name = hashlib.sha256(f"{segment.recording_id}/{segment.number}/{segment.digest}".encode()).hexdigest()
        path = self._folder / f"{name}.mp4"
        async with self._turn:  # one at a time: it takes a processor for a fraction of a second
            if await asyncio.to_thread(_touched, path):
                return path if path.stat().st_size else None
            await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True, mode=0o700)
            beside = self._folder / f".{secrets.token_hex(8)}"
            try:
                async with self._store.open(segment.path) as source:
                    is_made = await _remux(source, beside)
                if not is_made:
                    os.truncate(beside, 0)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
            await asyncio.to_thread(self._tidy)
        return path if is_made else None

    def _tidy(self) -> None:
        """The oldest go first; one that was asked for a moment ago stays, for its answer is still to be sent."""
        kept = []
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.glob("*.mp4"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    kept.append((status.st_mtime, status.st_size, path))
        total, now = sum(size for _, size, _ in kept), time.time()
        for touched_at, size, path in sorted(kept, key=lambda one: one[0]):
            age_s = now - touched_at
            if age_s > _KEEP_S or (total > self._most_kept_bytes and age_s > _REMUX_S):
                path.unlink(missing_ok=True)
                total -= size


def media_type(head: bytes) -> str:
    """By a file's first bytes, and only types that a browser plays: what a client uploaded must never be a page."""
    if head[4:8] == b"ftyp":
        return "video/mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "video/webm" if b"webm" in head[:64] else "video/x-matroska"
    if head[:1] == b"G" and head[188:189] == b"G":
        return "video/mp2t"
    return "application/octet-stream"


def _touched(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


async def _remux(source: Path, target: Path) -> bool:
    """False: there is nothing in it that a browser plays. Raises `Unavailable` when it takes too long."""
    with target.open("xb") as made:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-W", "ignore", "-m", "nvila.video.remux", str(os.getpid()), str(source),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_REMUX_S):
                while data := await process.stdout.read(1 << 20):
                    await asyncio.to_thread(made.write, data)
                code = await process.wait()
        except TimeoutError:
            raise Unavailable("preparing this part of the recording took too long") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())
    if code:
        _log.info("footage cannot be played", extra=fields(code=code))
    return code == 0
