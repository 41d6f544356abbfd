"""The services around ingest, as fakes that keep their contracts; files and the decoders are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
from blake3 import blake3

from nvila.cache.codec import RecordFormat, quantize
from nvila.cache.store import Lease
from nvila.capacity.models import nvila_8b_video
from nvila.errors import NvilaError, Unavailable
from nvila.model.config import NvilaConfig
from nvila.recordings.chunks import IngestLimits
from nvila.recordings.claims import Claim
from nvila.recordings.cold import ColdStore
from nvila.recordings.encode import Frames, GroupEncoder
from nvila.recordings.ingest import IngestHandler
from nvila.recordings.ingest_services import IngestServices
from nvila.recordings.jobs import JobStore
from nvila.recordings.sources import FileSources, LiveEvent
from nvila.recordings.store import RecordingStore, new_recording_id
from nvila.recordings.types import ChunkPolicy, JobKind, Recording, RecordingState, Segment, Source, SourceKind
from nvila.telemetry.metrics import Metrics
from nvila.types import (
    Chunk,
    Deadline,
    Encoded,
    EncodeSettings,
    MediaSource,
    ModelCard,
    TokenDtype,
    TokensRef,
    VisualTokens,
)

CONFIG: NvilaConfig = replace(nvila_8b_video(), llm=replace(nvila_8b_video().llm, width=16))
CARD = ModelCard(
    name="small",
    vision_revision="vision-1",
    config_json=CONFIG.to_json(),
    max_model_len=16384,
    token_dtype=TokenDtype.FLOAT32,
    engine="fake",
    is_random=True,
)


NEW_CARD = replace(CARD, vision_revision="vision-2")


@dataclass
class Models:
    card: ModelCard = CARD

    async def describe(self) -> ModelCard:
        return self.card


class Hot:
    """Keeps tokens until it is told to forget; `is_down` never has any."""

    def __init__(self) -> None:
        self.records: dict[str, VisualTokens] = {}
        self.is_down = False

    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]:
        return {} if self.is_down else {ref.key: self.records[ref.key] for ref in refs if ref.key in self.records}

    @asynccontextmanager
    async def lease(self, ref: TokensRef, form: RecordFormat, deadline: Deadline) -> AsyncIterator[Lease]:
        if self.is_down:
            yield Lease.WITHOUT
        else:
            yield Lease.REUSED if ref.key in self.records else Lease.HELD


class Vision:
    """Tokens made of the frames' mean colour, for callers that count on its weights. `failures` are raised first, one a
    call; `gate` holds calls back, and while it `is_away` there are no answers."""

    def __init__(self, hot: Hot, failures: Iterable[NvilaError] = (), *, revision: str = CARD.vision_revision) -> None:
        self._hot = hot
        self.revision = revision
        self.failures = list(failures)
        self.is_away = False
        self.frames = 0
        self.calls = 0
        self.most_at_once = self._at_once = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def encode(
        self, chunk: Chunk, ref: TokensRef, settings: EncodeSettings, *, want_inline: bool, deadline: Deadline
    ) -> Encoded:
        self.calls += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            if self.is_away:
                raise Unavailable("the vision service is not ready")
            if self.failures:
                raise self.failures.pop(0)
            if settings.vision_revision != self.revision:
                raise Unavailable("the services are not of one deployment")
        finally:
            self._at_once -= 1
        self.frames += len(chunk.times_s)
        colour = chunk.frames_FHWC.mean(axis=(0, 1, 2)).astype(np.float32)
        values_TD = np.tile(np.resize(colour, CONFIG.llm_width), (ref.tokens, 1))
        stored_TD, scales_T = quantize(values_TD, settings.token_dtype)
        tokens = VisualTokens(
            ref=ref,
            dtype=settings.token_dtype,
            values_TD=stored_TD,
            scales_T=scales_T,
            vision_revision=settings.vision_revision,
        )
        if not self._hot.is_down:
            self._hot.records[ref.key] = tokens
        return Encoded(ref=ref, is_published=not self._hot.is_down, inline=tokens, tiles=0, stage_ms={})


@dataclass(frozen=True)
class Local:
    path: Path
    digest: bytes
    size_bytes: int


class Uploads:
    """Uploaded files by id, each a path of the test's."""

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}

    @asynccontextmanager
    async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[Local]:
        path = self.paths[source.file_id or ""]
        yield Local(path, blake3(path.read_bytes()).digest(), path.stat().st_size)


class Told:
    """A live reader that says what a test says. `seen`: events that were taken up."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[LiveEvent] = asyncio.Queue()

    async def events(self, recording: Recording, after: Segment | None) -> AsyncGenerator[LiveEvent, None]:
        while True:
            yield await self.queue.get()


@dataclass(kw_only=True)
class Taking:
    """Everything that ingest needs, and what a test looks at afterwards."""

    shelf: RecordingStore
    jobs: JobStore
    cold: ColdStore
    frames: Frames
    hot: Hot
    vision: Vision
    uploads: Uploads
    live: Told
    metrics: Metrics
    models: Models = field(default_factory=Models)
    clock: Iterator[float] | None = None
    limits: IngestLimits = field(default_factory=IngestLimits)
    recovery_s: float = 0.5

    @classmethod
    def over(
        cls,
        store: RecordingStore,
        jobs: JobStore,
        frames: Frames,
        folder: Path,
        *,
        hot: Hot | None = None,
        limits: IngestLimits | None = None,
    ) -> Taking:
        """On this database, with everything else its own unless it is given."""
        hot = hot or Hot()
        return cls(
            shelf=store,
            jobs=jobs,
            cold=ColdStore(str(folder / "cold")),
            frames=frames,
            hot=hot,
            vision=Vision(hot),
            uploads=Uploads(),
            live=Told(),
            metrics=Metrics(),
            limits=limits or IngestLimits(),
        )

    def handler(self, clock: object = None) -> IngestHandler:
        more = {} if clock is None else {"clock": clock}
        services = IngestServices(
            shelf=self.shelf,
            cold=self.cold,
            frames=self.frames,
            encoder=GroupEncoder(self.cold, self.hot, self.vision, recovery_s=self.recovery_s),
            models=self.models,
            metrics=self.metrics,
            limits=self.limits,
            **more,  # type: ignore[arg-type]  # a clock or none
        )
        return IngestHandler(services, FileSources(self.uploads), self.live)

    async def submit(
        self, path: Path | None, policy: ChunkPolicy, tenant: str = "acme", kind: SourceKind = SourceKind.FILE
    ) -> str:
        """A new recording of a file, or of a live source; its id."""
        recording_id = new_recording_id()
        if path is not None:
            self.uploads.paths[recording_id] = path
        source = Source(kind=kind, file_id=recording_id) if path else Source(kind=kind, url="rtsp://camera/yard")
        await self.jobs.submit(
            tenant=tenant,
            kind=JobKind.INGEST,
            params={},
            fingerprint=recording_id,
            recording=Recording(
                id=recording_id,
                tenant=tenant,
                name="yard",
                source=source,
                policy=policy,
                state=RecordingState.WAITING,
                created_at=0.0,
            ),
        )
        return recording_id

    async def claim(self, kind: JobKind = JobKind.INGEST) -> Claim:
        claim = await self.jobs.claim("worker", [kind], 600.0)
        assert claim is not None
        return claim

    async def take_in(self, path: Path, policy: ChunkPolicy, tenant: str = "acme") -> Recording:
        """Submit, claim, ingest, finish."""
        recording_id = await self.submit(path, policy, tenant)
        claim = await self.claim()
        await claim.finish(await self.handler()(claim))
        return await self.shelf.get(recording_id, tenant=tenant)


class Elsewhere:
    """The shelf, with a recording's source at another address."""

    def __init__(self, shelf: RecordingStore, source: object) -> None:
        self._shelf, self._source = shelf, source

    def __getattr__(self, name: str) -> object:
        return getattr(self._shelf, name)

    async def get(self, recording_id: str, *, tenant: str) -> Recording:
        return replace(await self._shelf.get(recording_id, tenant=tenant), source=self._source)  # type: ignore[arg-type]  # a source


def write_clip(
    path: Path,
    seconds: float,
    *,
    fps: int = 5,
    size: tuple[int, int] = (96, 64),
    still: bool = False,
    seed: int = 0,
    gop: int | None = None,
    slices: int = 1,
) -> Path:
    """A clip in which a block of light moves each second, or (`still`) nothing does."""
    width, height = size
    rng = np.random.default_rng(seed)
    ground = rng.integers(40, 90, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264",
            rate=fps,
            options={"g": str(gop or fps * 2), "bf": "0", "preset": "veryfast", "slices": str(slices)},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(round(seconds * fps)):
            picture = ground.copy()
            second = 0 if still else number // fps
            left, top = second * 8 % (width - 16), second // 10 * 8 % (height - 16)
            picture[top : top + 16, left : left + 16] = 120 + second * 37 % 130
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path
