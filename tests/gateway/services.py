"""The services around the pipeline, as fakes that keep their contracts and can be told to fail.

`FakeStore` and `FakeVision` really share records, `FakeDecoder` really needs them: a wrong order of work shows.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nvila.cache.codec import RecordFormat
from nvila.cache.keys import content_digest
from nvila.cache.store import Lease
from nvila.errors import NvilaError, Unavailable
from nvila.types import (
    Accepted,
    Chunk,
    Deadline,
    DecodeEvent,
    Encoded,
    EncodeSettings,
    Finished,
    FinishReason,
    FrameRun,
    GenerateRequest,
    MediaKind,
    MediaSource,
    ModelCard,
    PromptUsage,
    TextDelta,
    TokenDtype,
    TokensMissing,
    TokensRef,
    VisualTokens,
)
from nvila.video.media import MediaInfo

WIDTH = 8


@dataclass(frozen=True)
class FakeFile:
    path: Path
    digest: bytes
    size_bytes: int = 1


class FakeFetcher:
    """Any URL is a file; its digest is made of the URL."""

    def __init__(self) -> None:
        self.is_open = 0

    @asynccontextmanager
    async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[FakeFile]:
        self.is_open += 1
        try:
            name = source.url or ""
            yield FakeFile(Path(name), name.encode().ljust(32)[:32])
        finally:
            self.is_open -= 1


class FakeFrames:
    """Videos of `frames` frames at 10 per second; frame i is one pixel of value i. `lost` frames do not decode."""

    def __init__(self, frames: int = 64, lost: Iterable[int] = ()) -> None:
        self.frames, self.lost = frames, frozenset(lost)
        self.probes = self.decodes = self.held = 0

    async def probe(self, path: Path, kind: MediaKind, deadline: Deadline) -> MediaInfo:
        self.probes += 1
        is_video = kind is MediaKind.VIDEO
        return MediaInfo(
            kind=kind,
            container="mp4",
            codec="h264",
            width_px=640,
            height_px=360,
            frames=self.frames if is_video else 1,
            fps=10.0 if is_video else 0.0,
            duration_s=self.frames / 10 if is_video else 0.0,
            knots=((0, 0.0), (self.frames, self.frames / 10)) if is_video else ((0, 0.0),),
        )

    @asynccontextmanager
    async def decode(
        self, path: Path, kind: MediaKind, run: FrameRun, size_px: int | None, group: int, deadline: Deadline
    ) -> AsyncIterator[Chunk]:
        self.decodes += 1
        good = [index for index in run.indices if index not in self.lost]
        padded = -len(good) % group
        values = good + good[-1:] * padded
        frames_FHWC = np.array(values, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
        self.held += 1
        try:
            yield Chunk(
                frames_FHWC=frames_FHWC,
                content_digest=content_digest(frames_FHWC),
                times_s=tuple(index / 10 for index in good),
                missing=tuple(at for at, index in enumerate(run.indices) if index in self.lost),
                padded=padded,
            )
        finally:
            self.held -= 1


class FakeStore:
    """Keeps the names of records; `is_down` forgets and refuses everything."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.plans: dict[str, bytes] = {}
        self.is_down = False

    async def has(self, refs: Iterable[TokensRef], form: RecordFormat) -> set[str]:
        return set() if self.is_down else {ref.key for ref in refs} & self.keys

    @asynccontextmanager
    async def lease(self, ref: TokensRef, form: RecordFormat, deadline: Deadline) -> AsyncIterator[Lease]:
        if self.is_down:
            yield Lease.WITHOUT
        else:
            yield Lease.REUSED if ref.key in self.keys else Lease.HELD

    async def recall(self, plan_key: str) -> bytes | None:
        return None if self.is_down else self.plans.get(plan_key)

    async def remember(self, plan_key: str, plan: bytes) -> None:
        if not self.is_down:
            self.plans[plan_key] = plan


class FakeVision:
    """Publishes to the store unless it is down. `failures` are raised first, one per call."""

    def __init__(self, store: FakeStore, failures: Iterable[NvilaError] = ()) -> None:
        self._store = store
        self.failures = list(failures)
        self.calls: list[TokensRef] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def encode(
        self, chunk: Chunk, ref: TokensRef, settings: EncodeSettings, *, want_inline: bool, deadline: Deadline
    ) -> Encoded:
        self.calls.append(ref)
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        is_published = not self._store.is_down
        if is_published:
            self._store.keys.add(ref.key)
        tokens = VisualTokens(
            ref=ref,
            dtype=settings.token_dtype,
            values_TD=np.zeros((ref.tokens, WIDTH), np.float32),
            scales_T=None,
            vision_revision=settings.vision_revision,
        )
        inline = tokens if want_inline or not is_published else None
        return Encoded(ref=ref, is_published=is_published, inline=inline, tiles=len(chunk.frames_FHWC), stage_ms={})


@dataclass
class FakeDecoder:
    """Says the words of `answer`, one id each, if every record is in the store or inline.

    `breaks_after`: how many words each call says before it breaks off, one entry per call; then no more breaks.
    `is_away`: it does not describe itself.
    """

    store: FakeStore
    card: ModelCard
    answer: tuple[str, ...] = ("a ", "bike ", "rides ", "past")
    breaks_after: list[int] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)
    running: int = 0
    is_away: bool = False

    async def describe(self) -> ModelCard:
        if self.is_away:
            raise Unavailable("the decode service does not answer")
        return self.card

    async def generate(self, request: GenerateRequest) -> AsyncIterator[DecodeEvent]:
        self.requests.append(request)
        self.running += 1
        try:
            inline = {tokens.ref.key for tokens in request.inline}
            wanted = {ref.key for media in request.media for ref in media.records} - inline
            while wanted - self.store.keys:
                if self.store.is_down:
                    yield TokensMissing(keys=tuple(wanted - self.store.keys))
                    return
                await asyncio.sleep(0)
            usage = PromptUsage(text=5, image=0, video=7)
            yield Accepted(prompt=usage)
            break_at = self.breaks_after.pop(0) if self.breaks_after else None
            for said in itertools.count():
                number = len(request.resume_ids) + said
                if said == break_at:
                    raise Unavailable("a replica died")
                if number == len(self.answer):
                    break
                yield TextDelta(self.answer[number], (number,))
            yield Finished(
                reason=FinishReason.STOP, prompt=usage, completion_tokens=len(self.answer), stage_ms={"prefill": 1.0}
            )
        finally:
            self.running -= 1


def card_of(config_json: str, max_model_len: int = 16384) -> ModelCard:
    return ModelCard(
        name="fake",
        vision_revision="r1",
        config_json=config_json,
        max_model_len=max_model_len,
        token_dtype=TokenDtype.FLOAT32,
        engine="fake",
        is_random=True,
    )
