"""Makes requests, and visual tokens that fit them, for tests of the decode service."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import numpy as np

from nvila.cache.codec import RecordFormat
from nvila.types import (
    Deadline,
    DecodeEvent,
    Finished,
    GenerateRequest,
    Level,
    MediaKind,
    MediaPart,
    Message,
    PromptMedia,
    Role,
    SamplingParams,
    TextDelta,
    TextPart,
    TokenDtype,
    TokensRef,
    VisualTokens,
)

_numbers = itertools.count()


def video(name: str, *, chunks: int = 2, frames: int = 4, tokens: int = 16) -> PromptMedia:
    """A video of several records, each of `frames` pooled frames."""
    refs = (TokensRef(key=f"{name}-{n}".ljust(64, "0"), levels=(Level(frames, tokens),)) for n in range(chunks))
    return PromptMedia(kind=MediaKind.VIDEO, is_tiled=False, records=tuple(refs))


def tokens_of(media: PromptMedia, form: RecordFormat, *, seed: int = 0) -> tuple[VisualTokens, ...]:
    """Random values for each record of a media item; the same seed gives the same values."""
    assert form.dtype is TokenDtype.FLOAT32, "the tests' model is float32"
    draw = np.random.default_rng(seed)
    return tuple(
        VisualTokens(
            ref=ref,
            dtype=form.dtype,
            values_TD=draw.standard_normal((ref.tokens, form.width), dtype=np.float32),
            scales_T=None,
            vision_revision=form.vision_revision,
        )
        for ref in media.records
    )


def request(
    text: str = "What is going on here?",
    *,
    media: Iterable[PromptMedia] = (),
    inline: Iterable[VisualTokens] = (),
    sampling: SamplingParams | None = None,
    vision_revision: str = "",
    resume_ids: tuple[int, ...] = (),
    timeout_s: float = 60,
    affinity: str = "",
    cache_salt: str = "tenant",
    traceparent: str = "",
) -> GenerateRequest:
    items = tuple(media)
    parts: tuple[TextPart | MediaPart, ...] = (*map(MediaPart, range(len(items))), TextPart(text))
    return GenerateRequest(
        request_id=f"test-{next(_numbers)}",
        messages=(Message(Role.USER, parts),),
        media=items,
        inline=tuple(inline),
        sampling=sampling or SamplingParams(max_tokens=12),
        deadline=Deadline.after(timeout_s),
        vision_revision=vision_revision,
        cache_salt=cache_salt,
        resume_ids=resume_ids,
        affinity=affinity,
        traceparent=traceparent,
    )


@dataclass(frozen=True)
class Answer:
    """What came of a generation."""

    events: tuple[DecodeEvent, ...]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for event in self.events if isinstance(event, TextDelta) for i in event.token_ids)

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished), f"it ended with {last}"
        return last


async def answer(events: AsyncIterator[DecodeEvent]) -> Answer:
    return Answer(tuple([event async for event in events]))
