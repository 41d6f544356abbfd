"""One answer's generation, over as many calls of the decode service as it takes.

A call may end because tokens are not in the cache, or because a replica died. What was said so far is kept: the next
call carries the token ids, goes on after them, and sends no text twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from blake3 import blake3

from nvila.errors import InvalidMedia, Unavailable
from nvila.gateway.media import Item
from nvila.gateway.ports import Decoder
from nvila.gateway.work import stop
from nvila.telemetry import tracing
from nvila.types import (
    Accepted,
    Finished,
    GenerateRequest,
    ModelCard,
    Question,
    TextDelta,
    TokensMissing,
    VisualTokens,
)


class Generation:
    """`token_ids`: what was said so far, exactly the ids of the text that was emitted. `first_at`: `perf_counter` of
    the first text."""

    def __init__(
        self,
        decoder: Decoder,
        question: Question,
        card: ModelCard,
        items: Sequence[Item],
        emit: Callable[[TextDelta], None],
    ) -> None:
        for position, item in enumerate(items):
            if not item.refs():
                raise InvalidMedia(
                    f"media item {position + 1}: none of its {item.frames_asked} frames could be decoded",
                    param="messages",
                )
        self._decoder = decoder
        self._question = question
        self._card = card
        self._items = items
        self._emit = emit
        self.token_ids: list[int] = []
        self.first_at: float | None = None

    async def attempt(self, encoding: asyncio.Task[None]) -> Finished | TokensMissing:
        """One call. Raises `Unavailable` when it broke off.

        While chunks are still being encoded the service awaits their tokens. If `encoding` ends and some could not be
        published, the wait is pointless: the call is given up, and the next one carries them inline.
        """
        inline = self._inline()
        call = asyncio.create_task(self._call(inline))
        try:
            await asyncio.wait({call, encoding}, return_when=asyncio.FIRST_COMPLETED)
            unpublished = self._inline().keys() - inline.keys()
            if unpublished and not call.done():
                return TokensMissing(keys=tuple(unpublished))
            return await call
        finally:
            await stop(call)

    async def _call(self, inline: dict[str, VisualTokens]) -> Finished | TokensMissing:
        async for event in self._decoder.generate(self._request(inline)):
            match event:
                case Accepted():
                    pass
                case TextDelta():
                    if self.first_at is None:
                        self.first_at = time.perf_counter()
                    self.token_ids.extend(event.token_ids)
                    self._emit(event)
                case TokensMissing() | Finished():
                    return event
        raise Unavailable("the decode service broke off in the middle of an answer")

    def _inline(self) -> dict[str, VisualTokens]:
        """Tokens in hand, because the cache does not have them."""
        return {key: tokens for item in self._items for key, tokens in item.inline().items()}

    def _request(self, inline: dict[str, VisualTokens]) -> GenerateRequest:
        question = self._question
        media = tuple(item.prompt_media() for item in self._items)
        return GenerateRequest(
            request_id=question.request_id,
            messages=question.messages,
            media=media,
            sampling=question.sampling,
            deadline=question.deadline,
            vision_revision=self._card.vision_revision,
            cache_salt=blake3(question.tenant.encode(), derive_key_context="nvila prefix cache salt").hexdigest(),
            affinity=media[0].records[0].key if media else "",
            inline=tuple(inline.values()),
            resume_ids=tuple(self.token_ids),
            traceparent=tracing.current_traceparent(),
        )
