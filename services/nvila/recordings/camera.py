"""Cameras as live sources: one capture process per camera and tenant, shared by all who record it, kept connected.

A process is one connection (`capture.py`). When it ends, for whatever reason, those who record the camera are told why,
and after a pause another is started: the pauses double from `first_pause_s` to `longest_pause_s` while nothing comes. A
camera that answers but refuses (credentials, no such stream, a codec or an address that is not allowed) is asked only
every `refused_pause_s`: it will not change its mind by itself, and asking often locks accounts. A name that is not
known, or a stream that cannot be read, is no refusal: name servers forget, cameras restart.

Pieces lie in a folder of the capture's own until all who record the camera have taken them; one that is slower than
`most_waiting` pieces loses the oldest, and is told so (`Lost`). When the last one leaves, process, folder and all are
gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import secrets
import shutil
import ssl
import sys
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from nvila.errors import (
    ForbiddenURL,
    InvalidRequest,
    NotFound,
    NvilaError,
    Unauthenticated,
    Unavailable,
    UnsupportedMedia,
    from_wire,
)
from nvila.locks import OwnFolder
from nvila.recordings.connection import Hello
from nvila.recordings.seal import Seal
from nvila.recordings.sources import Away, Connections, Footage, LiveEvent, Lost, MetricSink
from nvila.recordings.types import Recording, Segment, SourceKind
from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)

_REFUSALS = (Unauthenticated, NotFound, UnsupportedMedia, ForbiddenURL)
_START_S = 30.0
_TOUCHING_S = 1.0
"""Capture times of pieces that follow each other differ by less: the camera's clock drifts against ours."""


class Door(Protocol):
    """Says where a host may be connected to (the gateway's egress policy)."""

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Of a host, all allowed. Raises `ForbiddenURL`, `InvalidMedia` for a name that is not known, or
        `Unavailable`."""
        ...


@dataclass(frozen=True, kw_only=True)
class CameraLimits:
    """See the module's docstring. `segment_s`: least length of a piece of footage, cut at key frames; `open_s`,
    `silence_s`: longest wait for a camera's first and next packet."""

    segment_s: float = 8.0
    open_s: float = 15.0
    silence_s: float = 10.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    refused_pause_s: float = 60.0
    most_waiting: int = 32


class CameraReader:
    """Reads RTSP sources (`sources.LiveReader`). `folder`: where pieces on their way lie, in a folder of this process's
    own; what killed processes left there is removed."""

    def __init__(
        self, door: Door, folder: Path, metrics: MetricSink, limits: CameraLimits, seal: Seal | None = None
    ) -> None:
        self._folder = OwnFolder(folder)
        self._door = door
        self._connections = Connections(metrics, SourceKind.RTSP)
        self._limits = limits
        self._seal = seal or Seal()
        self._captures: dict[tuple[str, str, str], _Capture] = {}

    @property
    def captures(self) -> int:
        """Cameras being read."""
        return len(self._captures)

    def close(self) -> None:
        """Once no events are being iterated."""
        self._folder.close()

    async def events(self, recording: Recording, after: Segment | None = None) -> AsyncGenerator[LiveEvent, None]:
        source = recording.source
        assert source.url is not None, "checked where recordings are made"
        check_camera_url(source.url)
        secret = self._seal.open(source.secret) if source.secret else None
        key = (recording.tenant, source.url, secret or "")
        capture = self._captures.get(key)
        if capture is None:
            folder = self._folder.path / secrets.token_hex(8)
            capture = _Capture(self._door, source.url, secret, folder, self._connections, self._limits)
            self._captures[key] = capture
        listener = capture.listen()
        try:
            while True:
                yield await listener.next()
        finally:
            if capture.leave(listener):
                del self._captures[key]
                await capture.stop()


def check_camera_url(url: str) -> None:
    """Raises `InvalidRequest` for what is no address of a camera, or carries credentials (they go into `secret`)."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidRequest("the camera's address is not a valid URL", param="url") from None
    if parts.scheme not in ("rtsp", "rtsps") or not parts.hostname:
        raise InvalidRequest("a camera's address is rtsp://host[:port]/path, or rtsps://", param="url")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest("the camera's address carries credentials; give them apart from it", param="url")
    if port == 0 or any(ord(char) < 33 for char in url):
        raise InvalidRequest("the camera's address is not a valid URL", param="url")


class _Listener:
    """One who records a camera: events that wait for it, however long, in little room."""

    def __init__(self, most_waiting: int) -> None:
        self._waiting: deque[LiveEvent] = deque()
        self._most = most_waiting
        self._in_hand: Footage | None = None
        self._news = asyncio.Event()

    def put(self, event: LiveEvent) -> None:
        if isinstance(event, Away):  # those before it are over
            self._waiting = deque(waiting for waiting in self._waiting if not isinstance(waiting, Away))
        self._waiting.append(event)
        footage = [(place, waiting) for place, waiting in enumerate(self._waiting) if isinstance(waiting, Footage)]
        if len(footage) > self._most:
            _log.warning("footage of a camera is lost: it is not taken in", extra=fields(waiting=len(footage)))
            place, oldest = footage[0]
            assert oldest.until is not None, "a camera's piece says how long it is"
            self._waiting[place] = Lost(start=oldest.captured_at, until=oldest.until)
            before = self._waiting[place - 1] if place else None
            if isinstance(before, Lost) and abs(oldest.captured_at - before.until) < _TOUCHING_S:
                self._waiting[place] = Lost(start=before.start, until=oldest.until)
                del self._waiting[place - 1]
            oldest.taken()
        self._news.set()

    async def next(self) -> LiveEvent:
        while not self._waiting:
            self._news.clear()
            await self._news.wait()
        event = self._waiting.popleft()
        self._in_hand = event if isinstance(event, Footage) else None
        return event

    def close(self) -> None:
        """Also the piece that it was given last is let go: who leaves in the middle of it takes it no more."""
        for event in (self._in_hand, *self._waiting):
            if isinstance(event, Footage):
                event.taken()
        self._waiting.clear()


class _Capture:
    """A camera that is kept connected to as long as anybody listens."""

    def __init__(
        self,
        door: Door,
        url: str,
        secret: str | None,
        folder: Path,
        connections: Connections,
        limits: CameraLimits,
    ) -> None:
        folder.mkdir(mode=0o700)
        self._door = door
        self._url = url
        self._secret = secret
        self._folder = folder
        self._connections = connections
        self._limits = limits
        self._listeners: list[_Listener] = []
        self._away: Away | None = None
        self._connections.show(self, is_away=True)
        self._work = asyncio.create_task(self._keep_connected())

    def listen(self) -> _Listener:
        listener = _Listener(self._limits.most_waiting)
        if self._away is not None:
            listener.put(self._away)
        self._listeners.append(listener)
        return listener

    def leave(self, listener: _Listener) -> bool:
        """True when it was the last."""
        listener.close()
        self._listeners.remove(listener)
        return not self._listeners

    async def stop(self) -> None:
        self._connections.forget(self)
        self._work.cancel()
        await asyncio.wait({self._work})
        await asyncio.to_thread(shutil.rmtree, self._folder, True)

    async def _keep_connected(self) -> None:
        pause_s, session = self._limits.first_pause_s, 0
        while True:
            try:
                error, pieces = await self._one_session(session)
            except NvilaError as refused:
                error, pieces = refused, 0
            session += 1
            if pieces:
                pause_s = self._limits.first_pause_s
            _log.info("a camera is away", extra=fields(code=error.code, reason=error.message, pieces=pieces))
            self._away = Away(error=error)
            self._connections.show(self, is_away=True)
            for listener in self._listeners:
                listener.put(self._away)
            is_refused = isinstance(error, _REFUSALS) and not pieces
            wait_s = self._limits.refused_pause_s if is_refused else pause_s
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))
            pause_s = min(pause_s * 2, self._limits.longest_pause_s)

    async def _one_session(self, session: int) -> tuple[NvilaError, int]:
        """One process from start to end: why it ended, and how many pieces it brought."""
        parts = urlsplit(self._url)
        port = parts.port or (322 if parts.scheme == "rtsps" else 554)
        addresses = await self._door.addresses(parts.hostname or "", port)
        user, _, password = (self._secret or "").partition(":")
        hello = Hello(
            url=self._url,
            addresses=tuple(addresses),
            user=user,
            password=password,
            folder=str(self._folder),
            session=session,
            segment_s=self._limits.segment_s,
            open_s=self._limits.open_s,
            silence_s=self._limits.silence_s,
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-W", "ignore", "-m", "nvila.recordings.capture", str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **_authorities()},
            start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asdict(hello)).encode() + b"\n")
            with contextlib.suppress(ConnectionError):
                await process.stdin.drain()
            return await self._follow(process.stdout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())
            if process.stdin is not None:
                process.stdin.close()

    async def _follow(self, replies: asyncio.StreamReader) -> tuple[NvilaError, int]:
        """Between two pieces lie at most a piece's length, the wait for a key frame, and the camera's silence; a
        process that says nothing for twice that hangs."""
        pieces = 0
        limits = self._limits
        patience_s = _START_S + 2 * (limits.open_s + limits.silence_s) + 10 * limits.segment_s
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    line = await replies.readline()
            except TimeoutError:
                return Unavailable("reading from the camera hung"), pieces
            if not line.endswith(b"\n"):
                return Unavailable("reading from the camera broke off"), pieces
            told = json.loads(line)
            if "error" in told:
                return from_wire(told["error"], told["message"]), pieces
            captured_at, seconds = float(told["captured_at"]), float(told["seconds"])
            self._hand_out(self._folder / told["piece"], captured_at, captured_at + seconds, is_first=not pieces)
            pieces += 1

    def _hand_out(self, path: Path, captured_at: float, until: float, *, is_first: bool) -> None:
        self._away = None
        self._connections.show(self, is_away=False)
        left = set(self._listeners)

        def taken(listener: _Listener) -> None:
            left.discard(listener)
            if not left:
                path.unlink(missing_ok=True)

        for listener in self._listeners:
            listener.put(
                Footage(
                    path=path,
                    captured_at=captured_at,
                    taken=partial(taken, listener),
                    until=until,
                    is_new_session=is_first,
                )
            )


def _authorities() -> dict[str, str]:
    """What this process trusts certificates by, for one that is told nothing else of the environment."""
    trusted = ssl.get_default_verify_paths()
    found = {trusted.openssl_cafile_env: trusted.cafile, trusted.openssl_capath_env: trusted.capath}
    return {name: path for name, path in found.items() if path is not None}
