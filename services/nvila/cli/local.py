"""The same path with no services: the gateway's pipeline, with the model in this process behind each of its seams.

It is what the platform's answers are compared with: the reference engine, float32, one request at a time. Frames are
still decoded in a worker process, because media files are not to be trusted anywhere.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from pydantic import TypeAdapter
from transformers.utils.logging import disable_progress_bar

from nvila.cache.codec import RecordFormat, quantize
from nvila.cache.store import Lease
from nvila.cli.client import Ask, Media, Report
from nvila.decode.engine import EngineModel, choose_dtype
from nvila.decode.engine_transformers import TransformersEngine
from nvila.decode.prompt import PromptBuilder, PromptLimits
from nvila.decode.service import DecodeService
from nvila.decode.text import Vocabulary
from nvila.gateway.egress import EgressPolicy
from nvila.gateway.fetch import FetchLimits, MediaFetcher
from nvila.gateway.files import FileStore
from nvila.gateway.pipeline import Pipeline, PipelineLimits
from nvila.gateway.ports import LocalMedia
from nvila.gateway.replies import usage
from nvila.gateway.scratch import Scratch
from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.telemetry.metrics import Metrics
from nvila.types import (
    Answered,
    Chunk,
    Coverage,
    Deadline,
    DecodeEvent,
    Encoded,
    EncodeSettings,
    GenerateRequest,
    MediaPart,
    MediaSource,
    Message,
    ModelCard,
    Question,
    Role,
    SamplingParams,
    TextPart,
    TokenDtype,
    TokensRef,
    VideoSampling,
    VisualTokens,
)
from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits
from nvila.video.pool import DecodePool

_MOST_POSITIONS = 32_768
_MOST_MEDIA_BYTES = 2 << 30
_ARENA_BYTES = 256 << 20


class LocalTokenStore:
    """A token cache that is a dictionary, and lives as long as this process."""

    def __init__(self) -> None:
        self._records: dict[str, VisualTokens] = {}
        self._plans: dict[str, bytes] = {}
        self._changed = asyncio.Condition()

    async def has(self, refs: Iterable[TokensRef], form: RecordFormat) -> set[str]:
        return {ref.key for ref in refs if ref.key in self._records}

    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]:
        return {ref.key: self._records[ref.key] for ref in refs if ref.key in self._records}

    async def put(self, tokens: VisualTokens) -> None:
        async with self._changed:
            self._records[tokens.ref.key] = tokens
            self._changed.notify_all()

    async def await_tokens(self, refs: Iterable[TokensRef], form: RecordFormat, deadline: Deadline) -> set[str]:
        keys = {ref.key for ref in refs}
        try:
            async with asyncio.timeout(deadline.left_s()), self._changed:
                await self._changed.wait_for(lambda: keys <= self._records.keys())
        except TimeoutError:
            pass
        return keys - self._records.keys()

    @asynccontextmanager
    async def lease(self, ref: TokensRef, form: RecordFormat, deadline: Deadline) -> AsyncIterator[Lease]:
        yield Lease.REUSED if ref.key in self._records else Lease.HELD

    async def recall(self, plan_key: str) -> bytes | None:
        return self._plans.get(plan_key)

    async def remember(self, plan_key: str, plan: bytes) -> None:
        self._plans[plan_key] = plan


class LocalVision:
    """The vision tower, called. One chunk at a time: there is one processor."""

    def __init__(self, encoder: VisionEncoder, store: LocalTokenStore) -> None:
        self._encoder = encoder
        self._store = store
        self._turn = asyncio.Lock()

    async def encode(
        self, chunk: Chunk, ref: TokensRef, settings: EncodeSettings, *, want_inline: bool, deadline: Deadline
    ) -> Encoded:
        async with self._turn:
            deadline.left_s()
            tokens, tiles = await asyncio.to_thread(self._encode, chunk, ref, settings)
        await self._store.put(tokens)
        inline = tokens if want_inline else None
        return Encoded(ref=ref, is_published=True, inline=inline, tiles=tiles, stage_ms={})

    def _encode(self, chunk: Chunk, ref: TokensRef, settings: EncodeSettings) -> tuple[VisualTokens, int]:
        tiles = self._encoder.prepare(chunk.frames_FHWC, settings).tiles
        values_TD, levels = self._encoder.encode(chunk.frames_FHWC, settings)
        assert levels == ref.levels, f"the tower made {levels}, the plan says {ref.levels}"
        stored_TD, scales_T = quantize(values_TD.cpu().numpy().astype(np.float32), settings.token_dtype)
        tokens = VisualTokens(
            ref=ref,
            dtype=settings.token_dtype,
            values_TD=stored_TD,
            scales_T=scales_T,
            vision_revision=settings.vision_revision,
        )
        return tokens, tiles


class LocalDecoder:
    """The decode service's own work, without Ray Serve around it."""

    def __init__(self, service: DecodeService) -> None:
        self._service = service

    def generate(self, request: GenerateRequest) -> AsyncIterator[DecodeEvent]:
        return self._service.generate(request)

    async def describe(self) -> ModelCard:
        return await self._service.describe()


@dataclass(frozen=True)
class _File:
    path: Path
    digest: bytes
    size_bytes: int


class LocalFetcher:
    """Files of this machine by `file:` address; everything else as the gateway does it, with its rules."""

    def __init__(self, remote: MediaFetcher) -> None:
        self._remote = remote

    @asynccontextmanager
    async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[LocalMedia]:
        if source.url is None or not source.url.startswith("file:"):
            async with self._remote.open(source, tenant, deadline) as media:
                yield media
            return
        path = Path(source.url.removeprefix("file:"))
        digest = await asyncio.to_thread(lambda: blake3().update_mmap(path).digest())
        yield _File(path, digest, path.stat().st_size)


@asynccontextmanager
async def local_pipeline(model: Path) -> AsyncIterator[Pipeline]:
    """The pipeline with everything in this process; the model is loaded first."""
    async with AsyncExitStack() as opened:
        metrics = Metrics()
        store = LocalTokenStore()
        checkpoint = await asyncio.to_thread(Checkpoint.open, model)
        encoder = await asyncio.to_thread(VisionEncoder.from_checkpoint, checkpoint)
        decoder = await asyncio.to_thread(_decode_service, checkpoint, store, metrics)
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="nvila-"))
        scratch = Scratch(Path(folder) / "scratch")
        opened.callback(scratch.close)
        remote = MediaFetcher(
            files=FileStore(Path(folder) / "files", scratch),
            scratch=scratch,
            policy=EgressPolicy(allow=(), ports={80, 443}),
            limits=FetchLimits(media_bytes=_MOST_MEDIA_BYTES),
            metrics=metrics,
        )
        opened.push_async_callback(remote.close)
        arena = FrameArena.create("nvila-local", _ARENA_BYTES)
        pool = await DecodePool.start(DecodeLimits(workers=1), arena)
        opened.push_async_callback(pool.aclose)
        yield Pipeline(
            fetcher=LocalFetcher(remote),
            frames=pool,
            store=store,
            vision=LocalVision(encoder, store),
            decoder=LocalDecoder(decoder),
            limits=PipelineLimits(),
            metrics=metrics,
        )


def _decode_service(checkpoint: Checkpoint, store: LocalTokenStore, metrics: Metrics) -> DecodeService:
    disable_progress_bar()  # transformers draws one per weight file, into the answer
    config = checkpoint.config
    dtype = choose_dtype("auto")
    max_model_len = min(config.max_positions, _MOST_POSITIONS)
    token_dtype = TokenDtype.FLOAT32 if dtype is torch.float32 else TokenDtype.BFLOAT16
    form = RecordFormat(width=config.llm_width, dtype=token_dtype, vision_revision=checkpoint.vision_revision)
    engine = TransformersEngine(
        EngineModel(
            llm_path=checkpoint.dense_llm_path,
            dtype=dtype,
            max_model_len=max_model_len,
            stop_ids=checkpoint.stop_ids,
            suppressed_ids=checkpoint.suppressed_ids,
        )
    )
    card = ModelCard(
        name=checkpoint.name,
        vision_revision=checkpoint.vision_revision,
        config_json=config.to_json(),
        max_model_len=max_model_len,
        token_dtype=token_dtype,
        engine=engine.name,
        is_random=checkpoint.is_random,
    )
    limits = PromptLimits(max_model_len=max_model_len, token_wait_s=600, prefill_step=0)
    prompts = PromptBuilder(checkpoint, dtype, form, store, limits)
    vocabulary = Vocabulary(checkpoint.tokenizer())
    return DecodeService(prompts, engine, vocabulary, card, metrics, checkpoint.stop_ids)


def to_question(ask: Ask) -> Question:
    sampling = VideoSampling(num_frames=ask.num_frames, fps=ask.fps, start_s=ask.start_s, end_s=ask.end_s)
    parts: list[TextPart | MediaPart] = [MediaPart(place) for place in range(len(ask.media))]
    parts.append(TextPart(ask.question))
    return Question(
        request_id=uuid.uuid4().hex,
        tenant="local",
        messages=(Message(Role.USER, tuple(parts)),),
        media=tuple(MediaSource(kind=one.kind, url=_address(one), sampling=sampling) for one in ask.media),
        sampling=SamplingParams(max_tokens=ask.max_tokens, temperature=ask.temperature),
        deadline=Deadline.after(ask.timeout_s),
    )


def answer_here(ask: Ask, model: Path) -> Generator[str | Report, None, None]:
    """As `GatewayClient.ask`: pieces of text, then one `Report`. The event loop turns while a piece is awaited."""
    with asyncio.Runner() as runner:
        pieces = _pieces(ask, model)
        try:
            while True:
                piece = runner.run(_next(pieces))
                yield piece
                if isinstance(piece, Report):
                    return
        finally:
            runner.run(pieces.aclose())


async def _pieces(ask: Ask, model: Path) -> AsyncGenerator[str | Report, None]:
    async with local_pipeline(model) as pipeline:
        card = await pipeline.describe()
        async for event in pipeline.answer(to_question(ask)):
            yield _report(card, event) if isinstance(event, Answered) else event.text


async def _next(pieces: AsyncGenerator[str | Report, None]) -> str | Report:
    return await anext(pieces)


def _report(card: ModelCard, answered: Answered) -> Report:
    return Report(
        model=card.name,
        finish_reason=str(answered.reason),
        usage=usage(answered.usage, answered.completion_tokens).model_dump(),
        coverage=TypeAdapter(Coverage).dump_python(answered.coverage, mode="json"),
    )


def _address(media: Media) -> str:
    return media.url if media.path is None and media.url is not None else f"file:{media.path and media.path.absolute()}"
