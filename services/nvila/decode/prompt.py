"""From a request to the embeddings of its prompt: check, wait for visual tokens, fetch them, place them among the text.

What does not fit is refused before anything is waited for. Nothing that comes from the cache or beside it is trusted:
keys, layouts, widths and values are compared with what the request and the model say.

Shapes: T visual tokens · P prompt positions · D language-model width.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nvila.cache.codec import RecordFormat, dequantize
from nvila.errors import InvalidRequest, LimitExceeded, Unavailable
from nvila.model.checkpoint import Checkpoint
from nvila.model.prompt import Layout, Segment, TextIds, lay_out, splice
from nvila.types import Deadline, GenerateRequest, TokensRef, VisualTokens

Warm = Callable[[torch.Tensor], Awaitable[None]]
"""Prefills a prompt's beginning, so that the engine's prefix cache holds it."""


class Tokens(Protocol):
    """What is asked of the token cache (`cache/store.py`). It never raises; what is not there is missing."""

    async def has(self, refs: Iterable[TokensRef], form: RecordFormat) -> set[str]: ...
    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]: ...
    async def await_tokens(self, refs: Iterable[TokensRef], form: RecordFormat, deadline: Deadline) -> set[str]: ...


class MissingTokens(Exception):
    """Records that did not come in time or cannot be used. Ends as a `TokensMissing` event, not as an error."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = tuple(keys)
        super().__init__(f"{len(self.keys)} records are missing")


@dataclass(frozen=True, kw_only=True)
class PromptLimits:
    """`max_model_len`: positions of prompt plus answer. `token_wait_s`: longest wait for records. `prefill_step`:
    positions by which a prompt's beginning must have grown to be prefilled ahead; 0: never."""

    max_model_len: int
    token_wait_s: float
    prefill_step: int


class PromptBuilder:
    """One model's prompts. `tokens`: the cache, or None where all tokens come inline. `form`: what records must be."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        form: RecordFormat,
        tokens: Tokens | None,
        limits: PromptLimits,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._form = form
        self._tokens = tokens
        self._limits = limits

    def lay_out(self, request: GenerateRequest) -> Layout:
        """The prompt's layout. Raises `InvalidRequest`, `LimitExceeded` with both numbers, and `Unavailable` when the
        tokens are of other weights than ours."""
        self._check_sizes(request)
        if request.media and request.vision_revision != self._form.vision_revision:
            raise Unavailable(
                f"visual tokens of weights {request.vision_revision[:12]}… came, "
                f"this replica has {self._form.vision_revision[:12]}…"
            )
        config = self._checkpoint.config
        layout = lay_out(request.messages, request.media, self._checkpoint.tokenizer(), config)
        longest = self._limits.max_model_len - 1  # the answer needs a position
        if layout.usage.total > longest:
            raise LimitExceeded.of("prompt tokens", asked=layout.usage.total, limit=longest, param="messages")
        return layout

    async def fetch(self, request: GenerateRequest, layout: Layout, warm: Warm | None) -> dict[str, torch.Tensor]:
        """The values (T, D) of every record of the prompt, by key, float32. Raises `MissingTokens`.

        Records are taken as they come. While later ones are awaited, the prompt's beginning is given to `warm`
        (streaming prefill), one piece at a time.
        """
        refs = _refs(request)
        values = await asyncio.to_thread(self._take_inline, request, refs)
        wanted = [refs[key] for key in layout.keys if key not in values]
        if wanted and self._tokens is None:
            raise MissingTokens(ref.key for ref in wanted)
        wait = Deadline(min(request.deadline.at_s, time.monotonic() + self._limits.token_wait_s))
        warmed = 0
        while wanted:
            assert self._tokens is not None
            await self._tokens.await_tokens(wanted[:1], self._form, wait)
            present = await self._tokens.has(wanted, self._form)
            found = await self._tokens.get([ref for ref in wanted if ref.key in present], self._form)
            if wanted[0].key not in found:
                raise MissingTokens(ref.key for ref in wanted if ref.key not in found)
            values |= await asyncio.to_thread(_dequantized, found)
            wanted = [ref for ref in wanted if ref.key not in found]
            if wanted and warm is not None and self._limits.prefill_step:
                beginning = _beginning(layout, values)
                positions = sum(segment.positions for segment in beginning)
                if positions - warmed >= self._limits.prefill_step:
                    await warm(await asyncio.to_thread(splice, beginning, self._embed, values))
                    warmed = positions
        return values

    def splice(self, layout: Layout, values: Mapping[str, torch.Tensor], resume_ids: tuple[int, ...]) -> torch.Tensor:
        """The prompt's embeddings (P, D) in the model's dtype, the answer so far behind it. Blocking work."""
        return splice([*layout.segments, TextIds(resume_ids)], self._embed, values)

    def embed_text(self, text: str) -> NDArray[np.float32]:
        """Mean of the input embeddings of a text's tokens, of unit length: (width,). Any engine's, because no engine is
        asked. Raises `InvalidRequest` for a text without tokens, `LimitExceeded` for one that no prompt could hold."""
        most = self._limits.max_model_len * _MOST_CHARACTERS_PER_TOKEN
        if len(text) > most:
            raise LimitExceeded.of("characters", asked=len(text), limit=most)
        ids = self._checkpoint.tokenizer().encode(text)
        if not ids:
            raise InvalidRequest("an empty text has no place among the model's words")
        mean_D = self._checkpoint.embedding_rows(ids).float().mean(dim=0)
        length = float(mean_D.norm())
        if not 0 < length < math.inf:
            raise InvalidRequest("the text's embeddings cancel out")
        unit_D: NDArray[np.float32] = (mean_D / length).numpy()
        return unit_D

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._checkpoint.embedding_rows(ids).to(self._dtype)

    def _check_sizes(self, request: GenerateRequest) -> None:
        """Before anything is laid out: a layout has an entry per block, and block counts come from the wire."""
        levels = [level for item in request.media for ref in item.records for level in ref.levels]
        asked = sum(level.blocks * max(1, level.tokens) for level in levels)
        if asked >= self._limits.max_model_len:
            raise LimitExceeded.of("visual tokens", asked=asked, limit=self._limits.max_model_len - 1, param="messages")
        characters = sum(len(getattr(part, "text", "")) for message in request.messages for part in message.parts)
        most = self._limits.max_model_len * _MOST_CHARACTERS_PER_TOKEN
        if characters > most:
            raise LimitExceeded.of("prompt characters", asked=characters, limit=most, param="messages")
        vocabulary = self._checkpoint.config.vocab
        if any(not 0 <= i < vocabulary for i in request.resume_ids):
            raise InvalidRequest(f"resume_ids must be below {vocabulary}, the vocabulary's size")

    def _take_inline(self, request: GenerateRequest, refs: Mapping[str, TokensRef]) -> dict[str, torch.Tensor]:
        for tokens in request.inline:
            self._check_inline(tokens, refs)
        return _dequantized({tokens.ref.key: tokens for tokens in request.inline})

    def _check_inline(self, tokens: VisualTokens, refs: Mapping[str, TokensRef]) -> None:
        ref = refs.get(tokens.ref.key)
        if ref is None:
            raise InvalidRequest(f"inline tokens {tokens.ref.key} belong to no media item of the request")
        expected = (ref.levels, self._form.dtype, self._form.vision_revision, (ref.tokens, self._form.width))
        came = (tokens.ref.levels, tokens.dtype, tokens.vision_revision, tokens.values_TD.shape)
        for what, want, have in zip(("levels", "dtype", "vision revision", "shape"), expected, came, strict=True):
            if want != have:
                raise InvalidRequest(f"inline tokens {ref.key}: {what} is {have}, expected {want}")


_MOST_CHARACTERS_PER_TOKEN = 64
"""Text longer than this times the positions cannot fit (only runs of blanks come near) and is not tokenized."""


def _refs(request: GenerateRequest) -> dict[str, TokensRef]:
    refs: dict[str, TokensRef] = {}
    for item in request.media:
        for ref in item.records:
            if refs.setdefault(ref.key, ref).levels != ref.levels:
                raise InvalidRequest(f"record {ref.key} is named twice, with different layouts")
    return refs


def _dequantized(tokens: Mapping[str, VisualTokens]) -> dict[str, torch.Tensor]:
    """Values by key, checked to be finite: one that is not would spoil every position after it."""
    values: dict[str, torch.Tensor] = {}
    for key, record in tokens.items():
        values_TD = torch.from_numpy(dequantize(record))
        if not bool(torch.isfinite(values_TD).all()):
            raise InvalidRequest(f"tokens {key} hold values that are not finite")
        values[key] = values_TD
    return values


def _beginning(layout: Layout, values: Mapping[str, torch.Tensor]) -> list[Segment]:
    """Segments up to the first whose record is not here."""
    return list(takewhile(lambda segment: isinstance(segment, TextIds) or segment.key in values, layout.segments))
