"""Where a recording's footage comes from: files that are there, and live sources that deliver piece after piece.

A file source gives one file. A live source gives *events*: a piece of footage, the news that the source is away (and
why), its end. Which of the network's readers stands behind a live source is told by its kind: RTSP in a process of its
own (`capture.py`), HLS by its playlist (`hls.py`), pushed pieces from the inbox that the gateway fills (`inbox.py`).

What may be reached is decided elsewhere (the ports below): the gateway's egress policy for http(s), RTSP and HLS; for
object stores, addresses that the operator names, since they are opened with the operator's credentials.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import fsspec
from blake3 import blake3

from nvila.errors import ForbiddenURL, InvalidMedia, InvalidRequest, LimitExceeded, MediaUnavailable, NvilaError
from nvila.recordings.inbox import Inbox, Piece
from nvila.recordings.seal import Seal
from nvila.recordings.types import Recording, Segment, Source, SourceKind
from nvila.telemetry import names
from nvila.telemetry.names import Metric
from nvila.types import Deadline, MediaKind, MediaSource

_log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_LOOK_EVERY_S = 0.25


class LocalMedia(Protocol):
    """A file on local disk. `digest`: BLAKE3 of its bytes."""

    @property
    def path(self) -> Path: ...
    @property
    def digest(self) -> bytes: ...
    @property
    def size_bytes(self) -> int: ...


class Fetcher(Protocol):
    """Brings uploaded files and public addresses to local disk (the gateway's `MediaFetcher`)."""

    def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AbstractAsyncContextManager[LocalMedia]: ...


@dataclass(frozen=True, kw_only=True)
class Footage:
    """A piece of a live source: a file that opens on its own. `captured_at`: capture time of its first frame.
    `taken`: to be called when the file is kept elsewhere; then it goes. `number`, `until`: see `Segment.source_number`
    and `source_until`. `is_new_session`: the first after a connection was made, so what lies before it was missed.
    `can_wait`: the source keeps what follows until it is asked for, so nothing is lost by taking it later."""

    path: Path
    captured_at: float
    taken: Callable[[], None]
    number: int | None = None
    until: float | None = None
    is_new_session: bool = False
    can_wait: bool = False


@dataclass(frozen=True, kw_only=True)
class Away:
    """The source delivers nothing at present, and why; it is tried again."""

    error: NvilaError


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Footage from `start` to `until` (capture times) was there, and went because it was not taken in time."""

    start: float
    until: float


@dataclass(frozen=True)
class Ended:
    """Nothing follows."""


LiveEvent = Footage | Away | Lost | Ended


class LiveReader(Protocol):
    """Reads live sources of some kinds."""

    def events(self, recording: Recording, after: Segment | None = None) -> AsyncGenerator[LiveEvent, None]:
        """Until the source ends, or the iterator is closed; then nothing of it is left. `after`: the last piece that is
        kept; what the source shows again is not given again."""
        ...


class MetricSink(Protocol):
    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None: ...
    def set(self, metric: Metric, value: float, **labels: str) -> None: ...


class Connections:
    """Shows how many sources of a kind are connected to, and how many are away: what has not shown itself yet is."""

    def __init__(self, metrics: MetricSink, kind: SourceKind) -> None:
        self._metrics = metrics
        self._kind = kind
        self._is_away: dict[object, bool] = {}

    def show(self, source: object, *, is_away: bool) -> None:
        self._is_away[source] = is_away
        self._count()

    def forget(self, source: object) -> None:
        del self._is_away[source]
        self._count()

    def _count(self) -> None:
        away = sum(self._is_away.values())
        self._metrics.set(names.CAPTURES, len(self._is_away) - away, source=self._kind, state="connected")
        self._metrics.set(names.CAPTURES, away, source=self._kind, state="away")


class FileSources:
    """Files of FILE and URL recordings. `stores`: addresses (`s3://bucket/prefix/`) below which tenants may name
    objects; they are opened with this process's credentials, so none unless the operator says so. `most_bytes`: of one
    object."""

    def __init__(
        self, fetcher: Fetcher, seal: Seal | None = None, *, stores: Sequence[str] = (), most_bytes: int = 64 << 30
    ) -> None:
        self._fetcher = fetcher
        self._seal = seal or Seal()
        self._stores = tuple(stores)
        self._most_bytes = most_bytes

    def open(self, source: Source, tenant: str, deadline: Deadline) -> AbstractAsyncContextManager[LocalMedia]:
        """The source's file until the end of the block. Raises `InvalidRequest` and its kin, `NotFound`,
        `DeadlineExceeded`, `Unavailable`."""
        if source.kind is SourceKind.FILE:
            wanted = MediaSource(kind=MediaKind.VIDEO, file_id=source.file_id)
            return self._fetcher.open(wanted, tenant, deadline)
        assert source.url is not None, "checked where recordings are made"
        if urlsplit(source.url).scheme.lower() in ("http", "https"):
            credentials = self._seal.open(source.secret) if source.secret else None
            wanted = MediaSource(kind=MediaKind.VIDEO, url=source.url, credentials=credentials)
            return self._fetcher.open(wanted, tenant, deadline)
        return self._from_store(source.url, deadline)

    @asynccontextmanager
    async def _from_store(self, url: str, deadline: Deadline) -> AsyncIterator[LocalMedia]:
        check_store_url(url, self._stores)
        with tempfile.TemporaryDirectory(prefix="nvila-source-") as folder:
            path = Path(folder) / "content"
            async with asyncio.timeout(deadline.left_s()):
                size, digest = await asyncio.to_thread(_download, url, path, self._most_bytes)
            yield _Downloaded(path, digest, size)


def check_store_url(url: str, stores: Sequence[str]) -> None:
    """Raises `ForbiddenURL` unless the address lies below one of `stores`."""
    if any(part in ("..", ".") for part in url.split("/")) or not any(
        url.startswith(store if store.endswith("/") else store + "/") for store in stores
    ):
        raise ForbiddenURL("the address is none of the object stores that this service may read", param="url")


@dataclass(frozen=True)
class _Downloaded:
    path: Path
    digest: bytes
    size_bytes: int


def _download(url: str, path: Path, most_bytes: int) -> tuple[int, bytes]:
    fs, name = fsspec.core.url_to_fs(url)
    digest, size = blake3(), 0
    try:
        with fs.open(name, "rb") as source, path.open("xb") as target:
            while data := source.read(_READ_BYTES):
                size += len(data)
                if size > most_bytes:
                    raise LimitExceeded.of("media bytes", asked=size, limit=most_bytes, param="url")
                digest.update(data)
                target.write(data)
    except NvilaError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise InvalidMedia("the object is not in its store, or may not be read", param="url") from None
    except Exception as error:  # the edge to whichever store this is: each has errors of its own
        _log.warning("a source could not be read", extra={"fields": {"reason": type(error).__name__}})
        raise MediaUnavailable("the object could not be read from its store", param="url") from None
    return size, digest.digest()


class PushedReader:
    """Pieces that a client pushes, as the gateway puts them in the inbox."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    async def events(self, recording: Recording, after: Segment | None = None) -> AsyncGenerator[LiveEvent, None]:
        last = -1
        if after is not None and after.source_number is not None:
            last = after.source_number
            for piece in await asyncio.to_thread(self._inbox.pieces, recording.id):
                if piece.number <= last:  # the worker before kept it, and was gone before it could say so
                    self._inbox.take(piece)
        while True:
            is_ended = self._inbox.is_ended(recording.id)  # before its pieces: then they are complete
            pieces = await asyncio.to_thread(self._inbox.pieces, recording.id)
            for piece in pieces:
                if piece.number > last:
                    last = piece.number
                    yield Footage(
                        path=piece.path,
                        captured_at=piece.captured_at,
                        taken=self._taker(piece),
                        number=piece.number,
                        can_wait=True,
                    )
            if is_ended:
                yield Ended()
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    def _taker(self, piece: Piece) -> Callable[[], None]:
        return lambda: self._inbox.take(piece)


class LiveSources:
    """The reader of each kind of live source."""

    def __init__(self, readers: dict[SourceKind, LiveReader]) -> None:
        self._readers = readers

    def events(self, recording: Recording, after: Segment | None = None) -> AsyncGenerator[LiveEvent, None]:
        reader = self._readers.get(recording.source.kind)
        if reader is None:
            raise InvalidRequest(f"this service reads no {recording.source.kind} sources", param="source")
        return reader.events(recording, after)
