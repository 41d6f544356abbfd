"""The recordings part as a process (`python -m nvila.recordings.app`): a worker of jobs, and a port for its health.

The one place where `nvila.recordings` meets the gateway's parts: questions are answered by the gateway's own pipeline,
media are fetched under its egress policy. The process keeps nothing: any number of them work on one database, on one
host or on many, and each may be killed at any moment.

Ready means: the database answers, and so do the services that jobs need. Jobs that need a service that is away wait.
Shutdown: claim nothing more, let short jobs end, give the others back, then close in reverse order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nvila.cache.store import TokenStore
from nvila.decode.client import DecodeClient
from nvila.errors import NvilaError, Unavailable
from nvila.gateway.egress import Door, EgressPolicy, PinnedBackend, SystemResolver, parse_url
from nvila.gateway.fetch import FetchLimits, MediaFetcher
from nvila.gateway.files import FileStore
from nvila.gateway.pipeline import Pipeline, PipelineLimits
from nvila.gateway.scratch import Scratch
from nvila.gateway.serve import serve
from nvila.gateway.tls import channel_credentials
from nvila.recordings.asking import Caller
from nvila.recordings.camera import CameraLimits, CameraReader
from nvila.recordings.chunks import IngestLimits
from nvila.recordings.cold import ColdStore
from nvila.recordings.database import Database
from nvila.recordings.encode import GroupEncoder, LostTokens
from nvila.recordings.footage import DeleteHandler, sweep_footage
from nvila.recordings.hls import HlsReader
from nvila.recordings.inbox import Inbox
from nvila.recordings.ingest import IngestHandler
from nvila.recordings.ingest_services import IngestServices
from nvila.recordings.jobs import JobStore
from nvila.recordings.questions import AskHandler
from nvila.recordings.reseal import reseal
from nvila.recordings.seal import UNSEALED, Seal
from nvila.recordings.search import SimilaritySearch
from nvila.recordings.settings import RecordingsSettings
from nvila.recordings.sources import FileSources, LiveSources, PushedReader
from nvila.recordings.store import RecordingStore
from nvila.recordings.summaries import SummaryHandler
from nvila.recordings.timeline import TimelineHandler
from nvila.recordings.types import JobKind, JobState, SourceKind
from nvila.recordings.watch import WatchHandler
from nvila.recordings.webhooks import DeliverHandler, WebhookLimits, WebhookSender
from nvila.recordings.when import WhenHandler
from nvila.recordings.window import RecordingWindows
from nvila.recordings.worker import Handler, Pool, Worker, WorkerLimits
from nvila.telemetry import logs, names
from nvila.telemetry.logs import fields
from nvila.telemetry.metrics import CONTENT_TYPE, Metrics
from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits
from nvila.video.pool import DecodePool
from nvila.vision.client import VisionClient

_log = logging.getLogger(__name__)

QUESTIONS = (JobKind.ASK, JobKind.SUMMARY, JobKind.TIMELINE, JobKind.WHEN)

_LOOK_EVERY_S = 1.0
_COUNT_EVERY_S = 5.0
_SWEEP_EVERY_S = 60.0
_SWEEP_FOOTAGE_EVERY_S = 600.0
_KEEP_OPEN_S = 60.0
"""Reading the headers of hours of video takes seconds: a decode worker keeps its file open while others are encoded."""
_LATE_S = 30.0
"""A worker that has heard nothing from its database for so long is not ready."""


def main() -> None:
    settings = RecordingsSettings.load()
    logs.configure("recordings", level=settings.log_level, style=settings.log_style)
    logging.getLogger("httpcore").setLevel(logging.WARNING)  # its debug lines hold whole addresses
    logging.getLogger("alembic").setLevel(logging.WARNING)
    serve(build(settings), "recordings", host=settings.host, port=settings.http_port, drain_s=0)


def build(settings: RecordingsSettings) -> Starlette:
    """Health and metrics; the lifespan opens everything else and runs the worker."""
    metrics, health = Metrics(), Health()

    @asynccontextmanager
    async def work(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as opened:
            await _open(settings, metrics, health, opened)
            yield

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        reasons = health.reasons()
        return JSONResponse(
            {"status": "not ready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200
        )

    async def scrape(request: Request) -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    routes = [Route("/health/live", live), Route("/health/ready", ready), Route("/metrics", scrape)]
    return Starlette(routes=routes, lifespan=work)


async def _open(settings: RecordingsSettings, metrics: Metrics, health: Health, opened: AsyncExitStack) -> None:
    database = Database.open(settings.database())
    opened.push_async_callback(database.close)
    await database.migrate()
    seal = settings.seal()
    await _reseal(database, seal)
    shelf, jobs = RecordingStore(database), JobStore(database)
    folder = settings.folder()
    inbox = Inbox(folder)
    cold = await asyncio.to_thread(ColdStore, settings.cold_url or str(folder))

    scratch = Scratch(settings.data_dir / "scratch")
    opened.callback(scratch.close)
    policy = EgressPolicy(allow=settings.fetch_allow, ports=settings.fetch_ports)
    fetcher = MediaFetcher(
        files=FileStore(settings.data_dir / "files", scratch),
        scratch=scratch,
        policy=policy,
        limits=FetchLimits(
            media_bytes=settings.max_source_bytes,
            timeout_s=settings.fetch_timeout_s,
            connect_timeout_s=settings.fetch_connect_timeout_s,
            silence_s=settings.fetch_silence_s,
            redirects=settings.fetch_redirects,
        ),
        metrics=metrics,
    )
    opened.push_async_callback(fetcher.close)
    sender = WebhookSender(
        PinnedBackend(policy, SystemResolver()),
        parse_url,
        limits=WebhookLimits(timeout_s=settings.webhook_timeout_s, connect_s=settings.fetch_connect_timeout_s),
    )
    opened.push_async_callback(sender.close)
    cameras = CameraReader(
        Door(EgressPolicy(allow=settings.fetch_allow, ports=settings.camera_ports), SystemResolver()),
        folder / "cameras",
        metrics,
        CameraLimits(),
        seal,
    )
    opened.callback(cameras.close)

    pool = await DecodePool.start(
        DecodeLimits(
            max_pixels=settings.max_pixels,
            max_file_bytes=settings.max_source_bytes,
            memory_bytes=settings.decode_memory_bytes,
            task_s=settings.decode_task_s,
            workers=settings.decode_workers,
            threads=settings.decode_threads,
            idle_s=_KEEP_OPEN_S,
        ),
        FrameArena.create(settings.shared_memory_prefix, settings.frame_memory_bytes),
    )
    opened.push_async_callback(pool.aclose)
    hot = TokenStore.open(settings.redis_url, metrics, ttl_s=settings.cache_ttl_s)
    opened.push_async_callback(hot.close)
    credentials = channel_credentials(settings.backend_tls_dir)
    vision = VisionClient(settings.vision_url, credentials=credentials)
    opened.push_async_callback(vision.close)
    decoder = DecodeClient(settings.decode_target, credentials=credentials)
    opened.push_async_callback(decoder.close)

    encoder = GroupEncoder(cold, hot, vision, recovery_s=settings.recovery_s)
    windows = RecordingWindows(shelf, hot, cold, LostTokens(shelf, cold, pool, encoder))
    pipeline = Pipeline(
        fetcher=fetcher,
        frames=pool,
        store=hot,
        vision=vision,
        decoder=decoder,
        limits=PipelineLimits(recovery_s=settings.recovery_s),
        metrics=metrics,
        recordings=windows,
    )
    caller = Caller(answerer=pipeline, call_s=settings.call_timeout_s)
    services = IngestServices(
        shelf=shelf,
        cold=cold,
        frames=pool,
        encoder=encoder,
        models=decoder,
        metrics=metrics,
        limits=IngestLimits(
            capacity=settings.decode_workers,
            window=settings.group_window,
            fetch_timeout_s=settings.fetch_timeout_s,
            backlog_s=settings.backlog_s,
            outage_s=settings.outage_s,
            footage_s=settings.keep_footage_s,
        ),
    )
    handlers: dict[JobKind, Handler] = {
        JobKind.INGEST: IngestHandler(
            services,
            FileSources(fetcher, seal, stores=settings.source_stores, most_bytes=settings.max_source_bytes),
            LiveSources(
                {
                    SourceKind.PUSH: PushedReader(inbox),
                    SourceKind.RTSP: cameras,
                    SourceKind.HLS: HlsReader(fetcher, scratch.new_path(), metrics, seal),
                }
            ),
        ),
        JobKind.DELETE: DeleteHandler(cold, inbox.remove),
        JobKind.ASK: AskHandler(caller, windows, SimilaritySearch(shelf, decoder)),
        JobKind.SUMMARY: SummaryHandler(caller, windows, shelf),
        JobKind.TIMELINE: TimelineHandler(caller, windows, shelf),
        JobKind.WHEN: WhenHandler(caller, windows, shelf),
        JobKind.WATCH: WatchHandler(caller, shelf, sender, seal),
        JobKind.DELIVER: DeliverHandler(sender, seal),
    }
    worker = Worker(settings.worker_name, jobs, handlers, worker_limits(settings, health), metrics)
    health.watch(database, worker, decoder, vision, metrics)
    backlog = Backlogs(jobs, metrics)
    await opened.enter_async_context(_regularly(_LOOK_EVERY_S, health.look))
    await opened.enter_async_context(_regularly(_COUNT_EVERY_S, backlog.show, hot.measure))
    await opened.enter_async_context(_regularly(_SWEEP_EVERY_S, lambda: jobs.sweep(time.time() - settings.keep_jobs_s)))
    await opened.enter_async_context(
        _regularly(_SWEEP_FOOTAGE_EVERY_S, lambda: sweep_footage(shelf, cold, time.time() - settings.keep_footage_s))
    )
    await opened.enter_async_context(_working(worker))
    _log.info("recordings started", extra=fields(worker=settings.worker_name, sqlite=database.is_sqlite))


async def _reseal(database: Database, seal: Seal) -> None:
    if not seal.is_on:
        _log.warning(UNSEALED, extra=fields(setting="NVILA_RECORDINGS_SECRET_KEYS"))
        return
    done, left = await reseal(database, seal)
    if done:
        _log.info("secrets were sealed with the first key", extra=fields(count=done))
    if left:
        _log.error("secrets were sealed with none of the keys that are set", extra=fields(count=left))


def worker_limits(settings: RecordingsSettings, health: Health) -> WorkerLimits:
    """Each kind of work has places of its own, so that cameras do not keep questions out, nor questions deletions."""
    day_s = 24 * 3600.0
    return WorkerLimits(
        pools=(
            Pool((JobKind.INGEST,), settings.ingest_slots, None, health.has_model),
            Pool(QUESTIONS, settings.question_slots, settings.question_timeout_s, health.has_model),
            Pool((JobKind.WATCH,), settings.watch_slots, None, health.has_model),
            Pool((JobKind.DELIVER,), settings.delivery_slots, 2 * settings.webhook_timeout_s + 30),
            Pool((JobKind.DELETE,), 1, day_s),
        ),
        lease_s=settings.lease_s,
        drain_s=settings.drain_s,
    )


class Health:
    """Whether jobs can be done, as of the last look (one a second)."""

    def __init__(self) -> None:
        self._reasons: Sequence[str] = ("the recordings part has just started",)
        self._has_model = False
        self._look: Callable[[], Awaitable[None]] | None = None

    def reasons(self) -> Sequence[str]:
        return self._reasons

    def has_model(self) -> bool:
        """Whether the services that encode and answer are there."""
        return self._has_model

    def watch(
        self, database: Database, worker: Worker, decoder: DecodeClient, vision: VisionClient, metrics: Metrics
    ) -> None:
        """From now on, `look` asks these."""

        async def look() -> None:
            model, answers = await _reasons_of_services(decoder, vision), await _reason_of(database, worker)
            metrics.set(names.RECORDINGS_DATABASE_UP, 0 if answers else 1)
            reasons = [*answers, *model]
            if bool(reasons) != bool(self._reasons):
                _log.info("ready" if not reasons else "not ready", extra=fields(reasons=reasons))
            self._has_model, self._reasons = not model, reasons

        self._look = look

    async def look(self) -> None:
        assert self._look is not None, "`watch` comes first"
        await self._look()


async def _reasons_of_services(decoder: DecodeClient, vision: VisionClient) -> list[str]:
    reasons = []
    try:
        await decoder.describe()
    except NvilaError as error:
        reasons.append(error.message)
    vision_is = await vision.ready()
    if not vision_is:
        reasons.append(vision_is.reason)
    return reasons


async def _reason_of(database: Database, worker: Worker) -> list[str]:
    try:
        await database.ping()
    except Unavailable as error:
        return [error.message]
    silent_s = time.monotonic() - worker.looked_at
    return [f"the worker has asked for no jobs for {silent_s:.0f} s"] if silent_s > _LATE_S else []


class Backlogs:
    """Shows what waits, runs and is dead in the whole database."""

    def __init__(self, jobs: JobStore, metrics: Metrics) -> None:
        self._jobs = jobs
        self._metrics = metrics

    async def show(self) -> None:
        found = {(backlog.kind, backlog.state): backlog for backlog in await self._jobs.backlog()}
        for kind in JobKind:
            for state in (JobState.QUEUED, JobState.RUNNING, JobState.FAILED):
                there = found.get((kind, state))
                self._metrics.set(names.JOBS, there.count if there else 0, kind=kind, state=state)
            waiting = found.get((kind, JobState.QUEUED))
            self._metrics.set(names.JOBS_OLDEST_SECONDS, waiting.oldest_s if waiting else 0, kind=kind)


@asynccontextmanager
async def _working(worker: Worker) -> AsyncIterator[None]:
    """The worker works for the length of the block, then drains."""
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.end()
        await task


@asynccontextmanager
async def _regularly(every_s: float, *looks: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Do all of these each `every_s`, in order, for the length of the block."""

    async def keep_looking() -> None:
        while True:
            for look in looks:
                try:
                    await look()
                except Unavailable as error:
                    _log.warning("a regular look failed", extra=fields(reason=error.message))
                except Exception:
                    _log.exception("a regular look failed")
            await asyncio.sleep(every_s)

    task = asyncio.create_task(keep_looking())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


if __name__ == "__main__":
    main()
