"""One generation from request to answer, whatever runs around it: Ray Serve in production, a plain call in one process.

Wait for tokens, lay the prompt out, generate, turn ids into text; count, time and trace all of it. Everything happens
under the request's deadline, and stops when whoever reads the events leaves.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from opentelemetry.trace import Span, SpanKind

from nvila.decode.engine import Engine
from nvila.decode.prompt import MissingTokens, PromptBuilder, Warm
from nvila.decode.text import TextStream, Vocabulary
from nvila.errors import DeadlineExceeded, InvalidRequest, NvilaError
from nvila.telemetry import names, tracing
from nvila.telemetry.metrics import Metrics
from nvila.types import (
    Accepted,
    DecodeEvent,
    Finished,
    FinishReason,
    GenerateRequest,
    ModelCard,
    PromptUsage,
    SamplingParams,
    TextDelta,
    TokensMissing,
)

_MOST_STOPS, _LONGEST_STOP = 16, 1024
_RATE_MEMORY = 0.8
"""Weight of the past in the engine's prefill speed, which turns waiting positions into seconds."""

Emit = Callable[[DecodeEvent], None]


class DecodeService:
    """Answers generation requests with one engine."""

    def __init__(
        self,
        prompts: PromptBuilder,
        engine: Engine,
        vocabulary: Vocabulary,
        card: ModelCard,
        metrics: Metrics,
        stop_ids: tuple[int, ...],
    ) -> None:
        self._prompts = prompts
        self._engine = engine
        self._vocabulary = vocabulary
        self._card = card
        self._stop_ids = stop_ids
        self._metrics = metrics
        self._pending = 0
        self._positions_per_s = 0.0
        self.running = 0
        """Generations that are being worked on."""
        self._note_backlog()  # a replica that nobody has asked yet reports, too

    async def describe(self) -> ModelCard:
        return self._card

    async def check(self) -> None:
        """Raises `Unavailable` when the engine is dead."""
        await self._engine.check()

    async def embed(self, text: str) -> NDArray[np.float32]:
        """A text in the space of the language model's input embeddings: see `PromptBuilder.embed_text`."""
        return await asyncio.to_thread(self._prompts.embed_text, text)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[DecodeEvent, None]:
        """The events of one generation: Accepted, TextDelta…, Finished; or TokensMissing instead of text.

        A delta may have ids and no text. Raises any `NvilaError`. Leaving the iterator stops the work.
        """
        events: asyncio.Queue[DecodeEvent | None] = asyncio.Queue()
        # A task of its own: deadline and spans then cover the work, not the time in which the reader is away.
        work = asyncio.create_task(self._answer(request, events.put_nowait))
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await work
        finally:
            work.cancel()
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # seen; nobody may be left to tell

    async def _answer(self, request: GenerateRequest, emit: Emit) -> None:
        self.running += 1
        outcome = "internal"
        try:
            with tracing.span("decode", parent=request.traceparent, kind=SpanKind.SERVER) as span:
                _describe_request(span, request, self._card)
                try:
                    async with asyncio.timeout(request.deadline.left_s()):
                        outcome = await self._work(request, emit, span)
                except TimeoutError:
                    raise DeadlineExceeded("the request's time is up") from None
        except NvilaError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.running -= 1
            self._metrics.add(names.DECODE_REQUESTS, outcome=outcome)

    async def _work(self, request: GenerateRequest, emit: Emit, span: Span) -> str:
        """Returns the outcome: a finish reason, or `tokens_missing`."""
        started = time.perf_counter()
        check_sampling(request.sampling)
        layout = await asyncio.to_thread(self._prompts.lay_out, request)
        usage = layout.usage
        emit(Accepted(prompt=usage))
        answer = _Answer(self._vocabulary, request, self._stop_ids, emit)
        if answer.reason is None and usage.total + len(request.resume_ids) >= self._card.max_model_len:
            answer.reason = FinishReason.LENGTH
        if answer.reason is not None:
            emit(self._finished(answer, usage, {}))
            return str(answer.reason)
        with self._waiting(usage.total) as begun:
            try:
                with tracing.span("fetch tokens"):
                    values = await self._prompts.fetch(request, layout, self._warm(request))
            except MissingTokens as missing:
                emit(TokensMissing(missing.keys))
                return "tokens_missing"
            fetched = time.perf_counter()
            with tracing.span("prompt"):
                embeds_TD = await asyncio.to_thread(self._prompts.splice, layout, values, request.resume_ids)
                del values
            spliced = time.perf_counter()
            with tracing.span("generate"):
                stage_ms, cached = await self._generate(request, embeds_TD, answer, begun, started)
        stage_ms |= {"fetch": (fetched - started) * 1000, "prompt": (spliced - fetched) * 1000}
        usage = replace(usage, cached=min(cached, usage.total))
        self._count(usage, answer)
        _describe_answer(span, request, usage, answer)
        emit(self._finished(answer, usage, stage_ms))
        return str(answer.reason)

    async def _generate(
        self,
        request: GenerateRequest,
        embeds_TD: torch.Tensor,
        answer: _Answer,
        begun: Callable[[], None],
        started: float,
    ) -> tuple[dict[str, float], int]:
        """Milliseconds of queue, prefill and generate, and how many positions were cached."""
        submitted = first = time.perf_counter()
        queue_s, cached = 0.0, 0
        steps = self._engine.generate(
            embeds_TD,
            replace(request.sampling, max_tokens=request.sampling.max_tokens - len(request.resume_ids)),
            request_id=request.request_id,
            cache_salt=request.cache_salt,
            traceparent=tracing.current_traceparent(),
        )
        async with aclosing(steps):
            async for step in steps:
                if step.cached is not None:
                    first = time.perf_counter()
                    queue_s, cached = step.queue_s, step.cached
                    begun()
                    self._metrics.observe(names.DECODE_FIRST_TOKEN_SECONDS, first - started)
                    self._measure(len(embeds_TD) - cached, first - submitted - queue_s)
                if answer.take(step.token_ids, step.reason):
                    break
        ended = time.perf_counter()
        return {
            "queue": queue_s * 1000,
            "prefill": max(0.0, first - submitted - queue_s) * 1000,
            "generate": (ended - first) * 1000,
        }, cached

    def _warm(self, request: GenerateRequest) -> Warm | None:
        if not self._engine.keeps_prefixes:
            return None

        async def warm(embeds_TD: torch.Tensor) -> None:
            with tracing.span("prefill ahead"):
                steps = self._engine.generate(
                    embeds_TD,
                    SamplingParams(max_tokens=1),
                    request_id=f"{request.request_id}-prefill-{len(embeds_TD)}",
                    cache_salt=request.cache_salt,
                    traceparent=tracing.current_traceparent(),
                )
                async with aclosing(steps):
                    async for _ in steps:
                        pass

        return warm

    @staticmethod
    def _finished(answer: _Answer, usage: PromptUsage, stage_ms: dict[str, float]) -> Finished:
        assert answer.reason is not None, "a generation that went well has a reason to end"
        return Finished(reason=answer.reason, prompt=usage, completion_tokens=answer.tokens, stage_ms=stage_ms)

    # -- counting

    @contextmanager
    def _waiting(self, positions: int) -> Iterator[Callable[[], None]]:
        """Counts a prompt's positions as waiting until the given function is called, or the block ends."""
        waiting = positions

        def change(by: int) -> None:
            self._pending += by
            self._note_backlog()

        def begun() -> None:
            nonlocal waiting
            change(-waiting)
            waiting = 0

        change(positions)
        try:
            yield begun
        finally:
            begun()

    def _note_backlog(self) -> None:
        backlog_s = self._pending / self._positions_per_s if self._positions_per_s else 0.0
        self._metrics.set(names.DECODE_PENDING_TOKENS, self._pending)
        self._metrics.set(names.DECODE_BACKLOG_SECONDS, backlog_s)

    def _measure(self, positions: int, seconds: float) -> None:
        """Take a prefill into the engine's recent speed."""
        if positions > 0 and seconds > 0:
            speed = positions / seconds
            past = self._positions_per_s or speed
            self._positions_per_s = _RATE_MEMORY * past + (1 - _RATE_MEMORY) * speed

    def _count(self, usage: PromptUsage, answer: _Answer) -> None:
        kinds = {"text": usage.text, "image": usage.image, "video": usage.video, "cached": usage.cached}
        for kind, count in (kinds | {"completion": answer.tokens}).items():
            self._metrics.add(names.DECODE_TOKENS, count, kind=kind)


class _Answer:
    """The answer so far: its ids, its text as far as it has been given out, and why it ended."""

    def __init__(self, vocabulary: Vocabulary, request: GenerateRequest, stop_ids: tuple[int, ...], emit: Emit) -> None:
        self._stop_ids = () if request.sampling.ignore_eos else stop_ids
        self._text = TextStream(vocabulary, request.sampling.stop)
        self._untold: tuple[int, ...] = ()
        self._emit = emit
        self.tokens = len(request.resume_ids)
        self.reason: FinishReason | None = None
        self._text.add(request.resume_ids)  # the client has this text
        if self._text.is_stopped or (request.resume_ids and request.resume_ids[-1] in self._stop_ids):
            self.reason = FinishReason.STOP
        elif self.tokens >= request.sampling.max_tokens:
            self._give(self._text.finish())
            self.reason = FinishReason.LENGTH

    def take(self, token_ids: tuple[int, ...], reason: FinishReason | None) -> bool:
        """Give out what text these ids complete; True when the answer has ended."""
        self.tokens += len(token_ids)
        self._untold += token_ids
        spoken = token_ids[:-1] if token_ids and token_ids[-1] in self._stop_ids else token_ids
        text = self._text.add(spoken)
        if self._text.is_stopped:
            reason = FinishReason.STOP
        elif reason is not None:
            text += self._text.finish()
        self.reason = reason
        if text or (reason is not None and self._untold):
            self._give(text)
        return reason is not None

    def _give(self, text: str) -> None:
        if text or self._untold:
            self._emit(TextDelta(text, self._untold))
        self._untold = ()


def check_sampling(sampling: SamplingParams) -> None:
    """Raises `InvalidRequest` naming the field, its value and what is allowed. Engines die of some of these (P36)."""
    allowed = {
        "max_tokens": (sampling.max_tokens, sampling.max_tokens >= 1, "at least 1"),
        "temperature": (sampling.temperature, 0 <= sampling.temperature <= 2, "from 0 to 2"),
        "top_p": (sampling.top_p, 0 < sampling.top_p <= 1, "above 0, at most 1"),
        "top_k": (sampling.top_k, 0 <= sampling.top_k < 1 << 31, "0 (all) or more"),
        "min_p": (sampling.min_p, 0 <= sampling.min_p <= 1, "from 0 to 1"),
        "seed": (sampling.seed, sampling.seed is None or 0 <= sampling.seed < 1 << 64, "from 0 to 2^64 - 1"),
        "stop": (
            f"{len(sampling.stop)} strings",
            len(sampling.stop) <= _MOST_STOPS and all(0 < len(text) <= _LONGEST_STOP for text in sampling.stop),
            f"at most {_MOST_STOPS} strings of 1 to {_LONGEST_STOP} characters",
        ),
    }
    for name, (value, is_allowed, words) in allowed.items():
        if not is_allowed or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidRequest(f"{name} is {value}; it must be {words}", param=name)


def _describe_request(span: Span, request: GenerateRequest, card: ModelCard) -> None:
    sampling = request.sampling
    span.set_attributes(
        {
            names.ATTR_OPERATION: "chat",
            names.ATTR_PROVIDER: names.PROVIDER,
            names.ATTR_REQUEST_MODEL: card.name,
            names.ATTR_MAX_TOKENS: sampling.max_tokens,
            names.ATTR_TEMPERATURE: sampling.temperature,
            names.ATTR_TOP_P: sampling.top_p,
            names.ATTR_TOP_K: sampling.top_k,
            names.ATTR_STREAM: True,
        }
    )
    if sampling.seed is not None:
        span.set_attribute(
            names.ATTR_SEED, str(sampling.seed)
        )  # 64 bits without sign do not fit an attribute's integer


def _describe_answer(span: Span, request: GenerateRequest, usage: PromptUsage, answer: _Answer) -> None:
    span.set_attributes(
        {
            names.ATTR_RESPONSE_ID: request.request_id,
            names.ATTR_FINISH_REASONS: (str(answer.reason),),
            names.ATTR_INPUT_TOKENS: usage.total,
            names.ATTR_OUTPUT_TOKENS: answer.tokens,
            names.ATTR_CACHED_TOKENS: usage.cached,
            names.ATTR_TEXT_TOKENS: usage.text,
            names.ATTR_IMAGE_TOKENS: usage.image,
            names.ATTR_VIDEO_TOKENS: usage.video,
        }
    )
