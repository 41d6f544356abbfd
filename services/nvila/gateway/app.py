"""The gateway as a process (`python -m nvila.gateway.app`): the one place where concrete classes are named and opened.

Ready means: the decode service has said what it serves, vision has loaded the model, and the largest request that is
allowed fits everywhere. The database of recordings may be away, also at the start: only recordings wait for it.
Shutdown: admit nobody more, let requests in flight end, then close in reverse order.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace

from fastapi import FastAPI

from nvila.cache.store import TokenStore
from nvila.decode.client import DecodeClient
from nvila.errors import NvilaError, Unavailable
from nvila.gateway import grpc, http
from nvila.gateway.admission import Admission
from nvila.gateway.auth import ApiKeys
from nvila.gateway.egress import EgressPolicy
from nvila.gateway.fetch import FetchLimits, MediaFetcher
from nvila.gateway.files import FileStore
from nvila.gateway.front import Front
from nvila.gateway.http_services import HttpSettings, Services
from nvila.gateway.pipeline import Pipeline, PipelineLimits
from nvila.gateway.playing import Player
from nvila.gateway.recordings import Recordings
from nvila.gateway.request import RequestLimits
from nvila.gateway.scratch import Scratch
from nvila.gateway.serve import serve
from nvila.gateway.settings import GatewaySettings
from nvila.gateway.tls import channel_credentials
from nvila.gateway.uploads import UploadLimits, Uploads
from nvila.recordings.cold import ColdStore
from nvila.recordings.database import Database
from nvila.recordings.encode import GroupEncoder, LostTokens
from nvila.recordings.inbox import Inbox
from nvila.recordings.jobs import JobStore
from nvila.recordings.seal import UNSEALED, Seal
from nvila.recordings.store import Quota, RecordingStore
from nvila.recordings.window import RecordingWindows
from nvila.telemetry import logs, names
from nvila.telemetry.logs import fields
from nvila.telemetry.metrics import Metrics
from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits
from nvila.video.pool import DecodePool, PoolStats
from nvila.vision.client import VisionClient

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_SWEEP_EVERY_S = 60.0


def main() -> None:
    settings = GatewaySettings.load()
    logs.configure("gateway", level=settings.log_level, style=settings.log_style)
    logging.getLogger("httpcore").setLevel(logging.WARNING)  # its debug lines hold whole addresses
    serve(build(settings), "gateway", host=settings.host, port=settings.http_port, drain_s=settings.drain_s)


def build(settings: GatewaySettings) -> FastAPI:
    """The whole gateway as one ASGI app; its lifespan opens everything else, the gRPC server included."""
    keys = ApiKeys((key.get_secret_value() for key in settings.api_keys), is_open=settings.auth == "none")
    http_settings = HttpSettings(
        body_bytes=settings.max_body_bytes,
        upload_bytes=settings.max_upload_bytes,
        body_s=settings.body_timeout_s,
        upload_s=settings.upload_timeout_s,
        docs=settings.docs,
        console=settings.console,
    )

    @asynccontextmanager
    async def open_services() -> AsyncIterator[Services]:
        async with AsyncExitStack() as opened:
            yield await _open(settings, keys, opened)

    return http.create_app(keys, http_settings, open_services)


async def _open(settings: GatewaySettings, keys: ApiKeys, opened: AsyncExitStack) -> Services:
    metrics = Metrics()
    scratch = Scratch(settings.data_dir / "scratch")
    opened.callback(scratch.close)
    files = FileStore(settings.data_dir / "files", scratch)
    resumable = Uploads(
        settings.data_dir / "uploads", files, scratch, UploadLimits(file_bytes=settings.max_upload_bytes)
    )
    fetcher = MediaFetcher(
        files=files,
        scratch=scratch,
        policy=EgressPolicy(allow=settings.fetch_allow, ports=settings.fetch_ports),
        limits=FetchLimits(
            media_bytes=settings.max_media_bytes,
            timeout_s=settings.fetch_timeout_s,
            connect_timeout_s=settings.fetch_connect_timeout_s,
            silence_s=settings.fetch_silence_s,
            redirects=settings.fetch_redirects,
        ),
        metrics=metrics,
    )
    opened.push_async_callback(fetcher.close)
    recorded = await _open_recordings(settings, files, scratch, opened) if settings.recordings else None
    pool = await DecodePool.start(
        decode_limits(settings),
        FrameArena.create(settings.shared_memory_prefix, settings.frame_memory_bytes),
    )
    opened.push_async_callback(pool.aclose)
    store = TokenStore.open(settings.redis_url, metrics, ttl_s=settings.cache_ttl_s)
    opened.push_async_callback(store.close)
    credentials = channel_credentials(settings.backend_tls_dir)
    vision = VisionClient(settings.vision_url, credentials=credentials)
    opened.push_async_callback(vision.close)
    decoder = DecodeClient(settings.decode_target, credentials=credentials)
    opened.push_async_callback(decoder.close)
    windows = None
    if recorded is not None:
        encoder = GroupEncoder(recorded.cold, store, vision, recovery_s=settings.recovery_s)
        lost = LostTokens(recorded.shelf, recorded.cold, pool, encoder)
        windows = RecordingWindows(recorded.shelf, store, recorded.cold, lost)
    pipeline = Pipeline(
        fetcher=fetcher,
        frames=pool,
        store=store,
        vision=vision,
        decoder=decoder,
        limits=PipelineLimits(
            chunk_frames=settings.chunk_frames, max_frames=settings.max_frames, recovery_s=settings.recovery_s
        ),
        metrics=metrics,
        recordings=windows,
    )
    admission = Admission(permits=settings.max_concurrency, queue=settings.max_queue, wait_s=settings.queue_timeout_s)
    front = Front(pipeline=pipeline, admission=admission, files=files, limits=request_limits(settings), metrics=metrics)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    streams = Admission(permits=settings.max_streams, queue=0, wait_s=settings.queue_timeout_s)
    recordings = recorded.recordings if recorded is not None else None
    grpc_server = await grpc.serve(
        front, recordings, streams, keys, f"{host}:{settings.grpc_port}", max_message_bytes=settings.max_body_bytes
    )
    opened.push_async_callback(grpc_server.stop, settings.drain_s)
    opened.callback(admission.close)
    health = Health(pipeline, vision)
    gauges = Gauges(pool, store, metrics)
    await opened.enter_async_context(
        _regularly(_LOOK_EVERY_S, health.look, gauges.show, lambda: grpc_server.show_ready(health.is_ready))
    )
    await opened.enter_async_context(_regularly(_SWEEP_EVERY_S, resumable.sweep))
    _log.info("gateway started", extra=fields(grpc_port=grpc_server.port, tenants_need_keys=settings.auth != "none"))
    return Services(
        keys=keys,
        front=front,
        files=files,
        scratch=scratch,
        uploads=Admission(permits=settings.max_uploads, queue=settings.max_queue, wait_s=settings.queue_timeout_s),
        resumable=resumable,
        recorded=recordings,
        streams=streams,
        health=health,
        metrics=metrics,
    )


def decode_limits(settings: GatewaySettings) -> DecodeLimits:
    """What clients send is measured when it comes. Footage of recordings, of which lost tokens are made again, may be
    as large as the workers let in: there its size is no reason to refuse a file."""
    return DecodeLimits(
        max_pixels=settings.max_pixels,
        max_file_bytes=sys.maxsize if settings.recordings else settings.max_media_bytes,
        memory_bytes=settings.decode_memory_bytes,
        task_s=settings.decode_task_s,
        workers=settings.decode_workers,
        threads=settings.decode_threads,
    )


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What recordings are kept in, and what is done with them for clients."""

    shelf: RecordingStore
    cold: ColdStore
    recordings: Recordings


async def _open_recordings(
    settings: GatewaySettings, files: FileStore, scratch: Scratch, opened: AsyncExitStack
) -> _Recorded:
    url = settings.recordings_database_url
    live = settings.recordings_dir or settings.data_dir / "recordings"
    database = Database.open(url.get_secret_value() if url else f"sqlite:///{settings.data_dir}/recordings.db")
    opened.push_async_callback(database.close)
    await _migrate(database, opened)
    shelf = RecordingStore(database)
    cold = await asyncio.to_thread(ColdStore, settings.recordings_cold_url or str(live))
    seal = Seal(key.get_secret_value() for key in settings.recordings_secret_keys)
    if not seal.is_on:
        _log.warning(UNSEALED, extra=fields(setting="NVILA_GATEWAY_RECORDINGS_SECRET_KEYS"))
    recordings = Recordings(
        shelf=shelf,
        jobs=JobStore(database),
        files=files,
        inbox=Inbox(live),
        player=Player(cold, scratch.new_path()),
        quota=Quota(
            recordings=settings.max_recordings, live=settings.max_live_recordings, queued_jobs=settings.max_queued_jobs
        ),
        seal=seal,
    )
    await opened.enter_async_context(_regularly(_SWEEP_EVERY_S, recordings.player.tidy))
    return _Recorded(shelf=shelf, cold=cold, recordings=recordings)


async def _migrate(database: Database, opened: AsyncExitStack) -> None:
    """While the database is away, recordings answer 503; chat does not wait for it."""

    async def try_again() -> None:
        if database.is_behind:
            with suppress(Unavailable):
                await database.migrate()
                _log.info("the database of recordings answers")

    try:
        await database.migrate()
    except Unavailable as error:
        reason = getattr(error.__cause__, "orig", error)
        _log.warning("the database of recordings does not answer", extra=fields(reason=str(reason)))
        await opened.enter_async_context(_regularly(_LOOK_EVERY_S, try_again))


class Health:
    """Whether the gateway can answer, as of the last look (one a second)."""

    def __init__(self, pipeline: Pipeline, vision: VisionClient) -> None:
        self._pipeline = pipeline
        self._vision = vision
        self._reasons: Sequence[str] = ("the gateway has just started",)

    def reasons(self) -> Sequence[str]:
        return self._reasons

    @property
    def is_ready(self) -> bool:
        return not self._reasons

    async def look(self) -> None:
        """A decode service that is away keeps its last description: requests may outlast its absence."""
        reasons = []
        try:
            self._pipeline.model = await self._pipeline.decoder.describe()
        except NvilaError as error:
            reasons.append(error.message)
        else:
            reasons.extend(self._pipeline.check_budgets())
        vision = await self._vision.ready()
        if not vision:
            reasons.append(vision.reason)
        if bool(reasons) != bool(self._reasons):
            _log.info("ready" if not reasons else "not ready", extra=fields(reasons=reasons))
        self._reasons = reasons


class Gauges:
    """Copies what decoding and the cache count themselves into the process's metrics."""

    def __init__(self, pool: DecodePool, store: TokenStore, metrics: Metrics) -> None:
        self._pool = pool
        self._store = store
        self._metrics = metrics
        self._seen = PoolStats()

    async def show(self) -> None:
        now, seen, metrics = replace(self._pool.stats), self._seen, self._metrics
        metrics.set(names.DECODE_WORKERS, self._pool.live_workers)
        metrics.set(names.FRAME_MEMORY_BYTES, self._pool.arena.used_bytes)
        metrics.add(names.DECODE_BUSY_SECONDS, now.busy_s - seen.busy_s)
        metrics.add(names.DECODE_KILLS, now.kills - seen.kills, reason="killed")
        metrics.add(names.DECODE_KILLS, now.crashes - seen.crashes, reason="crashed")
        self._seen = now
        await self._store.measure()


@asynccontextmanager
async def _regularly(every_s: float, *looks: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Do all of these, in order, now and every `every_s`, for the length of the block."""

    async def keep_looking() -> None:
        while True:
            for look in looks:
                try:
                    await look()
                except Exception:
                    _log.exception("a regular look failed")
            await asyncio.sleep(every_s)

    task = asyncio.create_task(keep_looking())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def request_limits(settings: GatewaySettings) -> RequestLimits:
    return RequestLimits(
        messages=settings.max_messages,
        media=settings.max_media,
        text_chars=settings.max_text_chars,
        media_bytes=settings.max_media_bytes,
        frames=settings.max_frames,
        answer_tokens=settings.max_answer_tokens,
        default_answer_tokens=settings.default_answer_tokens,
        timeout_s=settings.max_request_timeout_s,
        default_timeout_s=settings.request_timeout_s,
    )


if __name__ == "__main__":
    main()
