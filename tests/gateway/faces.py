"""Real servers of both faces, in this process on loopback, over a pipeline that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from nvila.errors import NvilaError
from nvila.gateway import grpc, http
from nvila.gateway.admission import Admission
from nvila.gateway.auth import ApiKeys
from nvila.gateway.files import FileStore
from nvila.gateway.front import Front
from nvila.gateway.http_services import HttpSettings, Services
from nvila.gateway.playing import Player
from nvila.gateway.recordings import Recordings
from nvila.gateway.request import RequestLimits
from nvila.gateway.scratch import Scratch
from nvila.gateway.uploads import UploadLimits, Uploads
from nvila.model.estimate import RequestCost, request_cost
from nvila.recordings.cold import ColdStore
from nvila.recordings.database import Database
from nvila.recordings.inbox import Inbox
from nvila.recordings.jobs import JobStore
from nvila.recordings.seal import Seal
from nvila.recordings.store import Quota, RecordingStore
from nvila.telemetry.metrics import Metrics
from nvila.types import (
    Answered,
    AnswerEvent,
    Coverage,
    FinishReason,
    Gap,
    MediaCoverage,
    MediaKind,
    ModelCard,
    PromptUsage,
    Question,
    TextDelta,
    TokenDtype,
)
from tests.gateway.test_pipeline import CONFIG

KEY, OTHER_KEY = "key-of-acme-0001", "key-of-zeta-0001"
SEAL = Seal(["c2VhbHMgd2hhdCB0ZXN0cyBrZWVwIHNlY3JldC4uLi4="])
BEARER = {"Authorization": f"Bearer {KEY}"}
CARD = ModelCard(
    name="tiny",
    vision_revision="0123456789abcdef",
    config_json=CONFIG.to_json(),
    max_model_len=16384,
    token_dtype=TokenDtype.FLOAT32,
    engine="fake",
    is_random=True,
)
COVERAGE = Coverage(
    media=(
        MediaCoverage(
            kind=MediaKind.VIDEO,
            frames_asked=64,
            frames_decoded=62,
            frames_encoded=62,
            frames_reused=0,
            frames_dropped=2,
            frames_padded=2,
            start_s=0.0,
            end_s=6.3,
            gaps=(Gap(start_s=1.0, end_s=1.2, reason="2 frames could not be decoded"),),
            tokens=2056,
            chunks=2,
            cache_hits=0,
            tiles=64,
        ),
    ),
    stage_ms={"video": 12.5, "total": 99.0},
)
ANSWERED = Answered(
    reason=FinishReason.STOP,
    usage=PromptUsage(text=20, image=0, video=2056, cached=5),
    completion_tokens=3,
    coverage=COVERAGE,
)
PAUSE = object()
LIMITS = RequestLimits(
    messages=64,
    media=8,
    text_chars=10_000,
    media_bytes=1 << 20,
    frames=256,
    answer_tokens=1024,
    default_answer_tokens=64,
    timeout_s=60,
    default_timeout_s=30,
)
HTTP = HttpSettings(body_bytes=1 << 20, upload_bytes=1 << 20, body_s=5, upload_s=5)


@dataclass
class ScriptedPipeline:
    """Says what the script says: text, an error, `PAUSE` (until `go` is set), then how it ended."""

    script: Sequence[Any] = ("A ", "cat", ".", ANSWERED)
    card: ModelCard | NvilaError = CARD
    questions: list[Question] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    pauses: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def describe(self) -> ModelCard:
        if isinstance(self.card, NvilaError):
            raise self.card
        return self.card

    async def estimate(self, question: Question) -> RequestCost:
        self.questions.append(question)
        return request_cost(
            CONFIG,
            [],
            question.messages,
            answer_tokens=question.sampling.max_tokens,
            longest=CARD.max_model_len,
            dtype=CARD.token_dtype,
        )

    async def answer(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        self.questions.append(question)
        try:
            for step in self.script:
                if isinstance(step, NvilaError):
                    raise step
                if step is PAUSE:
                    self.pauses.set()
                    await self.go.wait()
                else:
                    yield TextDelta(step, (1,)) if isinstance(step, str) else step
        finally:
            self.stopped.set()


class _Health:
    def reasons(self) -> list[str]:
        return []


@dataclass
class Gateway:
    url: str
    grpc_target: str
    pipeline: ScriptedPipeline
    admission: Admission
    metrics: Metrics
    files: FileStore
    database: Database
    client: httpx.AsyncClient
    streams: Admission

    async def ask(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={"messages": HELLO, **body}, headers=BEARER)

    async def outcomes(self) -> dict[str, float]:
        """How requests ended, as the metrics say once none is running."""
        assert await self.admission.drain(5)
        return {
            sample.labels["outcome"]: sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "nvila_requests_total"
        }


HELLO: Any = [{"role": "user", "content": "Hello"}]


def video(url: str = "https://example.com/a.mp4", **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **more}}


@asynccontextmanager
async def serving(
    folder: Path,
    pipeline: ScriptedPipeline | None = None,
    *,
    admission: Admission | None = None,
    limits: RequestLimits = LIMITS,
    is_recording: bool = True,
    cold: ColdStore | None = None,
    **http_settings: Any,
) -> AsyncIterator[Gateway]:
    pipeline = pipeline or ScriptedPipeline()
    admission = admission or Admission(permits=8, queue=8, wait_s=5)
    keys = ApiKeys([f"{KEY}:acme", f"{OTHER_KEY}:zeta"])
    metrics = Metrics()
    scratch = Scratch(folder / "scratch")
    files = FileStore(folder / "files", scratch)
    settings = replace(HTTP, **http_settings)
    uploads = Uploads(folder / "uploads", files, scratch, UploadLimits(file_bytes=settings.upload_bytes, silence_s=1))
    front = Front(pipeline=pipeline, admission=admission, files=files, limits=limits, metrics=metrics)
    database = Database.open(f"sqlite:///{folder}/recordings.db")
    await database.migrate()
    recordings = Recordings(
        shelf=RecordingStore(database),
        jobs=JobStore(database),
        files=files,
        inbox=Inbox(folder / "recordings", most_bytes=1 << 20),
        player=Player(cold or ColdStore(str(folder / "recordings")), folder / "playing"),
        quota=Quota(recordings=8, live=4, queued_jobs=8),
        seal=SEAL,
    )
    streams = Admission(permits=8, queue=0, wait_s=5)
    services = Services(
        keys=keys,
        front=front,
        files=files,
        scratch=scratch,
        uploads=Admission(permits=2, queue=2, wait_s=5),
        resumable=uploads,
        recorded=recordings if is_recording else None,
        streams=streams,
        health=_Health(),
        metrics=metrics,
    )

    @asynccontextmanager
    async def open_services() -> AsyncIterator[Services]:
        yield services

    app = http.create_app(keys, settings, open_services)
    grpc_server = await grpc.serve(front, services.recorded, streams, keys, "127.0.0.1:0", max_message_bytes=1 << 20)
    try:
        async with _listening(app) as url, httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as client:
            target = f"127.0.0.1:{grpc_server.port}"
            yield Gateway(url, target, pipeline, admission, metrics, files, database, client, streams)
    finally:
        await grpc_server.stop(0)
        await database.close()
        scratch.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _listening(app: Any) -> AsyncIterator[str]:
    server = _Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=0, http="h11", log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
    )
    running = asyncio.create_task(server.serve())
    while not server.started:
        if running.done():
            await running
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running
