"""What both faces do around an answer: admit, turn what was asked into a question, answer, and keep the account.

HTTP and gRPC read and write their own wire; between the two everything is here, once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

from opentelemetry import trace

from nvila.errors import Cancelled, DeadlineExceeded, NvilaError
from nvila.gateway.admission import Admission
from nvila.gateway.request import Asked, Files, RequestLimits, to_question
from nvila.model.estimate import RequestCost
from nvila.telemetry import names, tracing
from nvila.telemetry.metrics import Metrics
from nvila.types import Answered, AnswerEvent, Deadline, MediaKind, ModelCard, Question, TextPart

_DESCRIBE_S = 10.0


class Answerer(Protocol):
    """What the faces ask of the pipeline."""

    def answer(self, question: Question) -> AsyncGenerator[AnswerEvent, None]: ...
    async def estimate(self, question: Question) -> RequestCost: ...
    async def describe(self) -> ModelCard: ...


class Front:
    """One for both faces of a gateway."""

    def __init__(
        self, *, pipeline: Answerer, admission: Admission, files: Files, limits: RequestLimits, metrics: Metrics
    ) -> None:
        self._pipeline = pipeline
        self._admission = admission
        self._files = files
        self._metrics = metrics
        self.limits = limits

    @asynccontextmanager
    async def admitted(self, face: str) -> AsyncIterator[None]:
        """Hold a permit for one request and count how it ends: `ok`, an error's code, `cancelled` or `internal`.

        Raises `Overloaded` when there is none to be had.
        """
        began = time.perf_counter()
        outcome = "internal"
        try:
            async with self._admission.permit():
                self._show_load()
                yield
            outcome = "ok"
        except NvilaError as error:
            outcome = error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = Cancelled.code
            raise
        finally:
            self._show_load()
            self._metrics.add(names.REQUESTS, face=face, outcome=outcome)
            self._metrics.observe(names.REQUEST_SECONDS, time.perf_counter() - began, outcome=outcome)

    async def card(self) -> ModelCard:
        """What is served. Raises `Unavailable` as long as nobody knows."""
        try:
            async with asyncio.timeout(_DESCRIBE_S):
                return await self._pipeline.describe()
        except TimeoutError:
            raise DeadlineExceeded(f"the decode service did not describe its model in {_DESCRIBE_S:g} s") from None

    async def question(self, asked: Asked, tenant: str) -> tuple[Question, ModelCard]:
        card = await self.card()
        return await to_question(asked, tenant, card, self._files, self.limits), card

    async def estimate(self, question: Question) -> RequestCost:
        return await self._pipeline.estimate(question)

    async def answer(
        self, question: Question, card: ModelCard, *, is_stream: bool
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The pipeline's events, with the current span's GenAI attributes set as they become known.

        Text deltas without text are left out, and numbers of the coverage end at the sixth decimal. Close it
        (`aclosing`) to stop the work.
        """
        current = trace.get_current_span()
        began = time.perf_counter()
        kinds = {source.kind for source in question.media}
        media = MediaKind.VIDEO if MediaKind.VIDEO in kinds else MediaKind.IMAGE if kinds else "none"
        _describe_request(current, question, card, is_stream)
        said: list[str] = []
        has_begun = False
        async with aclosing(self._pipeline.answer(question)) as events:
            async for event in events:
                if isinstance(event, Answered):
                    event = replace(event, coverage=_rounded(event.coverage))
                    _describe_answer(current, event, said)
                elif not event.text:
                    continue
                else:
                    if not has_begun:
                        has_begun = True
                        seconds = time.perf_counter() - began
                        self._metrics.observe(names.FIRST_TOKEN_SECONDS, seconds, media=media)
                        current.set_attribute(names.ATTR_TIME_TO_FIRST_CHUNK, seconds)
                    said.append(event.text)
                yield event

    def _show_load(self) -> None:
        self._metrics.set(names.REQUESTS_IN_FLIGHT, self._admission.running)


@asynccontextmanager
async def in_time(deadline: Deadline) -> AsyncIterator[None]:
    """Let the block take until `deadline`, writing to a slow client included."""
    try:
        async with asyncio.timeout(deadline.left_s()):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the request's time is up") from None


def _describe_request(current: trace.Span, question: Question, card: ModelCard, is_stream: bool) -> None:
    sampling = question.sampling
    current.update_name(f"chat {card.name}")
    current.set_attributes(
        {
            names.ATTR_OPERATION: "chat",
            names.ATTR_PROVIDER: names.PROVIDER,
            names.ATTR_REQUEST_MODEL: card.name,
            names.ATTR_MAX_TOKENS: sampling.max_tokens,
            names.ATTR_TEMPERATURE: sampling.temperature,
            names.ATTR_TOP_P: sampling.top_p,
            names.ATTR_STREAM: is_stream,
            names.ATTR_RESPONSE_ID: answer_id(question),
            names.ATTR_RESPONSE_MODEL: card.name,
        }
    )
    if sampling.top_k:
        current.set_attribute(names.ATTR_TOP_K, sampling.top_k)
    if sampling.seed is not None:
        current.set_attribute(names.ATTR_SEED, sampling.seed)
    if tracing.captures_content():
        messages = [
            {
                "role": message.role,
                "parts": [
                    {"type": "text", "content": part.text}
                    if isinstance(part, TextPart)
                    else {"type": question.media[part.index].kind}
                    for part in message.parts
                ],
            }
            for message in question.messages
        ]
        current.set_attribute(names.ATTR_INPUT_MESSAGES, json.dumps(messages))


def _describe_answer(current: trace.Span, answered: Answered, said: list[str]) -> None:
    usage = answered.usage
    media = answered.coverage.media
    current.set_attributes(
        {
            names.ATTR_FINISH_REASONS: [answered.reason],
            names.ATTR_INPUT_TOKENS: usage.total,
            names.ATTR_OUTPUT_TOKENS: answered.completion_tokens,
            names.ATTR_CACHED_TOKENS: usage.cached,
            names.ATTR_TEXT_TOKENS: usage.text,
            names.ATTR_IMAGE_TOKENS: usage.image,
            names.ATTR_VIDEO_TOKENS: usage.video,
            names.ATTR_FRAMES_ASKED: sum(item.frames_asked for item in media),
            names.ATTR_FRAMES_DECODED: sum(item.frames_decoded for item in media),
            names.ATTR_FRAMES_ENCODED: sum(item.frames_encoded for item in media),
            names.ATTR_FRAMES_DROPPED: sum(item.frames_dropped for item in media),
            names.ATTR_TILES: sum(item.tiles for item in media),
        }
    )
    if tracing.captures_content():
        answer = [{"role": "assistant", "parts": [{"type": "text", "content": "".join(said)}]}]
        current.set_attribute(names.ATTR_OUTPUT_MESSAGES, json.dumps(answer))


def _rounded(value: Any) -> Any:
    """The same with microseconds as the finest: sums and quotients of times end in digits that mean nothing."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, tuple):
        return tuple(_rounded(one) for one in value)
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _rounded(getattr(value, field.name)) for field in fields(value)})
    return value


def answer_id(question: Question) -> str:
    """The public id of an answer, the same in both APIs, in logs and in spans."""
    return f"chatcmpl-{question.request_id}"
