"""What the pipeline asks of the services around it: a few methods each, declared by their user.

`app.py` hands the pipeline clients of the real services, `cli/local.py` the same work in one process, tests fakes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from nvila.cache.codec import RecordFormat
from nvila.cache.store import Lease
from nvila.model.config import NvilaConfig
from nvila.recordings.planner import Budget
from nvila.recordings.window import OpenWindow, Restored
from nvila.types import (
    Chunk,
    Deadline,
    DecodeEvent,
    Encoded,
    EncodeSettings,
    FrameRun,
    GenerateRequest,
    MediaKind,
    MediaSource,
    ModelCard,
    RecordingWindow,
    TokensRef,
)
from nvila.video.media import MediaInfo


class LocalMedia(Protocol):
    """A media item's bytes on local disk. `digest`: BLAKE3 of them, 32 bytes."""

    @property
    def path(self) -> Path: ...
    @property
    def digest(self) -> bytes: ...
    @property
    def size_bytes(self) -> int: ...


class Fetcher(Protocol):
    """Brings a media item's bytes to local disk for the length of the context."""

    def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AbstractAsyncContextManager[LocalMedia]: ...


class Frames(Protocol):
    """Looks into media files and decodes frames, away from this process."""

    async def probe(self, path: Path, kind: MediaKind, deadline: Deadline) -> MediaInfo: ...

    def decode(
        self, path: Path, kind: MediaKind, run: FrameRun, size_px: int | None, group: int, deadline: Deadline
    ) -> AbstractAsyncContextManager[Chunk]: ...


class Store(Protocol):
    """The token cache. It may forget anything at any time, and never fails: what is not there is missing."""

    async def has(self, refs: Iterable[TokensRef], form: RecordFormat) -> set[str]: ...

    def lease(self, ref: TokensRef, form: RecordFormat, deadline: Deadline) -> AbstractAsyncContextManager[Lease]: ...

    async def recall(self, plan_key: str) -> bytes | None: ...
    async def remember(self, plan_key: str, plan: bytes) -> None: ...


class Vision(Protocol):
    """Encodes a chunk and publishes its tokens under `ref`."""

    async def encode(
        self, chunk: Chunk, ref: TokensRef, settings: EncodeSettings, *, want_inline: bool, deadline: Deadline
    ) -> Encoded: ...


class Recordings(Protocol):
    """Plans recordings' windows and brings lost tokens back (`recordings/window.py`)."""

    async def open(self, asked: RecordingWindow, tenant: str, budget: Budget, config: NvilaConfig) -> OpenWindow: ...

    async def restore(
        self, window: OpenWindow, ref: TokensRef, form: RecordFormat, config: NvilaConfig, deadline: Deadline
    ) -> Restored: ...


class Decoder(Protocol):
    """Turns a prompt with media into text."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[DecodeEvent]: ...
    async def describe(self) -> ModelCard: ...
