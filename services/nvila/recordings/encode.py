"""A group's frames become its tokens: found cold, found hot, or encoded; and kept cold from then on.

Where tokens come from is told by their name, which is made of the pixels (cache/keys.py): the same frames, in whichever
recording of the tenant and at whichever pass, are encoded once. Redis may be away, which costs an encoding at most; the
cold store may not, since what is not kept there would have to be encoded again next week.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nvila.cache.codec import Record, RecordFormat, dequantize, pack
from nvila.cache.keys import record_key, renamed_key, settings_key
from nvila.cache.store import Lease
from nvila.errors import InvalidMedia, InvalidRequest, NotFound, Overloaded, Unavailable
from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.recordings.cold import ColdStore
from nvila.recordings.types import Group, Recording, Segment
from nvila.telemetry.logs import fields
from nvila.types import (
    Chunk,
    Deadline,
    Encoded,
    EncodeSettings,
    FrameRun,
    Level,
    MediaKind,
    ModelCard,
    TokensRef,
    VisualTokens,
)
from nvila.video.media import MediaInfo

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class Frames(Protocol):
    """Looks into files and decodes frames, away from this process (`video/pool.py`)."""

    async def probe(self, path: Path, kind: MediaKind, deadline: Deadline) -> MediaInfo: ...

    def decode(
        self, path: Path, kind: MediaKind, run: FrameRun, size_px: int | None, group: int, deadline: Deadline
    ) -> AbstractAsyncContextManager[Chunk]: ...


class Vision(Protocol):
    """Encodes frames and publishes their tokens (`vision/client.py`)."""

    async def encode(
        self, chunk: Chunk, ref: TokensRef, settings: EncodeSettings, *, want_inline: bool, deadline: Deadline
    ) -> Encoded: ...


class Hot(Protocol):
    """The token cache (`cache/store.py`): it may forget anything, and never fails."""

    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]: ...
    def lease(self, ref: TokensRef, form: RecordFormat, deadline: Deadline) -> AbstractAsyncContextManager[Lease]: ...


class Models(Protocol):
    """Says what is served (the decode service's client)."""

    async def describe(self) -> ModelCard: ...


class Segments(Protocol):
    """What is asked of `RecordingStore`."""

    async def segment(self, recording_id: str, number: int) -> Segment: ...
    async def note_key(self, recording_id: str, key: str) -> None: ...


Note = Callable[[str], Awaitable[None]]
"""Notes in the database that a recording stands on the record of this key: what is kept unnoted is never removed."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What groups are encoded for: the served model, as the decode service describes it."""

    config: NvilaConfig
    form: RecordFormat
    settings: EncodeSettings

    @classmethod
    def of(cls, card: ModelCard) -> Model:
        config = NvilaConfig.from_json(card.config_json)
        form = RecordFormat(width=config.llm_width, dtype=card.token_dtype, vision_revision=card.vision_revision)
        return cls.made_of(config, form)

    @classmethod
    def made_of(cls, config: NvilaConfig, form: RecordFormat) -> Model:
        return cls(
            config=config,
            form=form,
            settings=EncodeSettings(
                kind=MediaKind.VIDEO,
                is_tiled=False,
                pool_sizes=config.pool_sizes,
                token_dtype=form.dtype,
                vision_revision=form.vision_revision,
            ),
        )

    @property
    def group(self) -> int:
        """Frames of one group."""
        return self.config.temporal_group

    @cached_property
    def name(self) -> str:
        """What two models have in common whose records have the same names: `Group.named_for`."""
        return settings_key(self.settings)

    @cached_property
    def _group_levels(self) -> tuple[Level, ...]:
        return self._levels(self.group)

    def ref(self, chunk: Chunk, tenant: str) -> TokensRef:
        """Name and layout of the tokens of these frames."""
        key = record_key(chunk.content_digest, self.settings, tenant)
        return TokensRef(key=key, levels=self._levels(len(chunk.frames_FHWC)))

    def ref_of(self, group: Group) -> TokensRef:
        """Name and layout of a recorded group's tokens for this model: those that it has, or, when it was recorded for
        another one (other weights, another storage type), a name of this model's own, which no two models share.

        Raises `InvalidRequest` when this model cannot take the group's frames together.
        """
        assert group.ref is not None, "a group without tokens has no name"
        if group.named_for in ("", self.name):
            return group.ref
        if len(group.indices) > self.group:
            raise InvalidRequest(
                f"the recording was cut into groups of {len(group.indices)} frames for another model; the one that is "
                f"served takes {self.group} at a time: add the recording again"
            )
        return TokensRef(key=renamed_key(group.ref.key, self.settings), levels=self._group_levels)

    def _levels(self, frames: int) -> tuple[Level, ...]:
        return cost.levels(
            self.config,
            kind=MediaKind.VIDEO,
            is_tiled=False,
            frames=frames,
            pool_sizes=self.settings.pool_sizes,
        )


class Fate(StrEnum):
    """How a group came to its tokens."""

    ENCODED = "encoded"
    REUSED = "reused"
    STATIC = "static"
    CORRUPT = "corrupt"
    """It has none: no frame could be decoded."""


@dataclass(frozen=True, eq=False)
class Found:
    """`bytes_cold`: newly kept. `encode_s`: seconds in the vision service."""

    tokens: VisualTokens
    fate: Fate
    bytes_cold: int
    encode_s: float


class GroupEncoder:
    """Finds or makes the tokens of decoded groups. `recovery_s`: how long vision may be away before it gives up."""

    def __init__(self, cold: ColdStore, hot: Hot, vision: Vision, *, recovery_s: float) -> None:
        self._cold = cold
        self._hot = hot
        self._vision = vision
        self._recovery_s = recovery_s

    async def tokens(self, chunk: Chunk, ref: TokensRef, model: Model, deadline: Deadline, note: Note) -> Found:
        """The group's tokens, which are noted and in the cold store when this returns. Raises `Unavailable` when vision
        stays away or the cold store cannot keep them, `DeadlineExceeded`, and what `note` raises."""
        await note(ref.key)  # before it is looked for: from here on no deletion removes what is found
        kept = await self._cold.get(ref, model.form)
        if kept is not None:
            return Found(kept, Fate.REUSED, 0, 0.0)
        async with self._hot.lease(ref, model.form, deadline) as lease:
            if not lease.must_encode:
                there = (await self._hot.get([ref], model.form)).get(ref.key)
                if there is not None:
                    return Found(there, Fate.REUSED, await self._keep(there, chunk), 0.0)
            began = time.perf_counter()
            tokens = await self._encode(chunk, ref, model, deadline)
            seconds = time.perf_counter() - began
            return Found(tokens, Fate.ENCODED, await self._keep(tokens, chunk), seconds)

    async def _encode(self, chunk: Chunk, ref: TokensRef, model: Model, deadline: Deadline) -> VisualTokens:
        pause_s, give_up_at = _FIRST_PAUSE_S, time.monotonic() + self._recovery_s
        while True:
            try:
                encoded = await self._vision.encode(chunk, ref, model.settings, want_inline=True, deadline=deadline)
                if encoded.inline is None:
                    raise Unavailable("the vision service sent no tokens though they were asked for")
                return encoded.inline
            except (Unavailable, Overloaded) as error:
                if time.monotonic() + pause_s > give_up_at:
                    raise
                _log.warning("vision is away or busy, trying again", extra=fields(error=error.message))
                await asyncio.sleep(max(pause_s, error.retry_after_s or 0.0))
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _keep(self, tokens: VisualTokens, chunk: Chunk) -> int:
        record: Record = await asyncio.to_thread(pack, tokens, group_start_s=chunk.times_s[:1], writer="recordings")
        return await self._cold.put(record)


class LostTokens:
    """Makes a group's tokens again from the recording's own frames, for a question whose records are gone."""

    def __init__(self, segments: Segments, cold: ColdStore, frames: Frames, encoder: GroupEncoder) -> None:
        self._segments = segments
        self._cold = cold
        self._frames = frames
        self._encoder = encoder

    async def encode_again(self, recording: Recording, group: Group, model: Model, deadline: Deadline) -> VisualTokens:
        """The group's tokens for `model`, whichever it was recorded for.

        Raises `NotFound` when the frames are gone or are others than they were, `Unavailable` while vision is away,
        `DeadlineExceeded`.
        """
        ref, note = model.ref_of(group), partial(self._segments.note_key, recording.id)
        lost = f"the tokens of {group.times_s[0]:g} to {group.times_s[-1]:g} s of this recording " + (
            "are lost" if ref == group.ref else "were made for another model than the one that is served"
        )
        async with AsyncExitStack() as held:
            try:
                segment = await self._segments.segment(recording.id, group.segment)
                if not segment.path:
                    raise NotFound("its source was not kept")
                path = await held.enter_async_context(self._cold.open(segment.path))
                run = FrameRun(indices=group.indices)
                chunk = await held.enter_async_context(
                    self._frames.decode(path, MediaKind.VIDEO, run, model.config.tile_px, model.group, deadline)
                )
            except (NotFound, InvalidMedia):
                raise NotFound(f"{lost}, and the footage that could give them again is not kept any more") from None
            is_whole = len(chunk.times_s) == len(group.indices)
            if not is_whole or (ref == group.ref and model.ref(chunk, recording.tenant) != ref):
                raise NotFound(f"{lost}, and the footage gives other frames than it did")
            return (await self._encoder.tokens(chunk, ref, model, deadline, note)).tokens


def mean_token(tokens: VisualTokens) -> NDArray[np.float32]:
    """The mean of a record's tokens: (width,) float32."""
    mean: NDArray[np.float32] = dequantize(tokens).mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def unit_vector(means: Sequence[tuple[NDArray[np.float32], int]]) -> bytes:
    """A chunk's embedding from its groups' means and their frames: weighted by frames, of unit length, as float32
    little endian; empty when there is nothing to take the mean of, or it is zero."""
    if not means:
        return b""
    total = np.sum([mean.astype(np.float64) * frames for mean, frames in means], axis=0)
    length = float(np.linalg.norm(total))
    return (total / length).astype("<f4").tobytes() if length > 0 else b""
