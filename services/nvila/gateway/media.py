"""One media item of a question: what it is, how it is cut, and an honest account of what became of each chunk.

`MediaItem` is filled in by `pipeline.py` as the item moves along; `coverage()` then says what the answer stands on.
`PlanRecord` is what is remembered about a file and a sampling, so that a second question decodes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from nvila.cache.keys import record_key
from nvila.gateway.ports import LocalMedia
from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.model.estimate import MediaCost, MediaSize, media_cost
from nvila.types import (
    Chunk,
    EncodeSettings,
    FrameRun,
    Gap,
    Level,
    MediaCoverage,
    MediaKind,
    MediaSource,
    PromptMedia,
    TokenDtype,
    TokensRef,
    VisualTokens,
)


@dataclass(frozen=True, kw_only=True)
class ChunkFacts:
    """What is known of a chunk once it was decoded. `expected_s`: where its frames should be, seconds.

    `ref` is None when none of them could be decoded.
    """

    indices: tuple[int, ...]
    expected_s: tuple[float, ...]
    ref: TokensRef | None
    times_s: tuple[float, ...]
    dropped: int
    padded: int
    gaps: tuple[Gap, ...]


@dataclass(kw_only=True)
class ChunkState:
    """A chunk on its way. `facts` come with decoding or from a remembered plan; then `is_named` is set.

    `inline`: the tokens themselves, in hand because the cache does not have them.
    """

    run: FrameRun
    expected_s: tuple[float, ...]
    facts: ChunkFacts | None = None
    is_named: asyncio.Event = field(default_factory=asyncio.Event)
    was_decoded: bool = False
    is_reused: bool = False
    encoded_frames: int = 0
    tiles: int = 0
    inline: VisualTokens | None = None

    def is_lost(self, keys: Collection[str]) -> bool:
        """Its record is one of `keys`, and its tokens are not in hand."""
        ref = self.facts.ref if self.facts is not None else None
        return self.inline is None and ref is not None and ref.key in keys


class Item(Protocol):
    """What a question's media have in common, wherever their tokens come from."""

    @property
    def source(self) -> MediaSource: ...
    @property
    def frames_asked(self) -> int: ...
    def refs(self) -> tuple[TokensRef, ...]: ...
    def prompt_media(self) -> PromptMedia: ...
    def inline(self) -> dict[str, VisualTokens]: ...
    def cost(self, config: NvilaConfig, dtype: TokenDtype) -> MediaCost: ...
    def coverage(self, config: NvilaConfig) -> MediaCoverage: ...


@dataclass(kw_only=True)
class MediaItem:
    """One media item on its way."""

    source: MediaSource
    file: LocalMedia
    settings: EncodeSettings
    plan_key: str
    frames_asked: int
    width_px: int
    height_px: int
    chunks: list[ChunkState]
    gaps: tuple[Gap, ...] = ()
    """What the file should hold of the window and does not. Frames lost in decoding are among the chunks' facts."""

    def name(self, chunk: ChunkState, decoded: Chunk, config: NvilaConfig, tenant: str) -> TokensRef | None:
        """Take note of a decoded chunk: its record's name, by content, and layout; None when no frame was usable."""
        frames = len(decoded.frames_FHWC)
        key = record_key(decoded.content_digest, self.settings, tenant)
        ref = TokensRef(key=key, levels=self._levels(config, frames)) if frames else None
        chunk.facts = ChunkFacts(
            indices=chunk.run.indices,
            expected_s=chunk.expected_s,
            ref=ref,
            times_s=decoded.times_s,
            dropped=len(decoded.missing),
            padded=decoded.padded,
            gaps=find_gaps(chunk.expected_s, decoded.times_s, decoded.missing),
        )
        chunk.was_decoded = True
        chunk.is_named.set()
        return ref

    async def all_named(self) -> None:
        """Wait until every chunk has its name."""
        for chunk in self.chunks:
            await chunk.is_named.wait()

    def refs(self) -> tuple[TokensRef, ...]:
        """The item's token records in time order; only chunks that have any frame."""
        return tuple(facts.ref for facts in self._facts() if facts.ref is not None)

    def prompt_media(self) -> PromptMedia:
        return PromptMedia(kind=self.source.kind, is_tiled=self.settings.is_tiled, records=self.refs())

    def inline(self) -> dict[str, VisualTokens]:
        """Tokens in hand, by key, because the cache does not have them."""
        return {chunk.inline.ref.key: chunk.inline for chunk in self.chunks if chunk.inline is not None}

    def is_published(self) -> bool:
        """The cache had every record when it was last asked."""
        return all(chunk.inline is None for chunk in self.chunks)

    def _facts(self) -> list[ChunkFacts]:
        return [chunk.facts for chunk in self.chunks if chunk.facts is not None]

    def size(self, config: NvilaConfig) -> MediaSize:
        """What it will be if every frame can be decoded: known before any work."""
        group = config.temporal_group if self.source.kind is MediaKind.VIDEO else 1
        return MediaSize(
            kind=self.source.kind,
            is_tiled=self.settings.is_tiled,
            width_px=self.width_px,
            height_px=self.height_px,
            runs=tuple(-(-len(chunk.run.indices) // group) * group for chunk in self.chunks),
            pool_sizes=self.settings.pool_sizes,
        )

    def cost(self, config: NvilaConfig, dtype: TokenDtype) -> MediaCost:
        return media_cost(config, self.size(config), dtype)

    def _levels(self, config: NvilaConfig, frames: int) -> tuple[Level, ...]:
        return cost.levels(
            config,
            kind=self.source.kind,
            is_tiled=self.settings.is_tiled,
            width_px=self.width_px,
            height_px=self.height_px,
            frames=frames,
            pool_sizes=self.settings.pool_sizes,
        )

    def _positions(self, config: NvilaConfig, levels: Sequence[Sequence[Level]]) -> int:
        joined = cost.join_levels(levels)
        return cost.positions(config, kind=self.source.kind, is_tiled=self.settings.is_tiled, levels=joined)

    def coverage(self, config: NvilaConfig) -> MediaCoverage:
        """What of this item the answer stands on."""
        facts = self._facts()
        good = [len(one.times_s) for one in facts]
        times = [time_s for one in facts for time_s in one.times_s]
        return MediaCoverage(
            kind=self.source.kind,
            frames_asked=self.frames_asked,
            frames_decoded=sum(n for n, chunk in zip(good, self.chunks, strict=True) if chunk.was_decoded),
            frames_encoded=sum(chunk.encoded_frames for chunk in self.chunks),
            frames_reused=sum(n for n, chunk in zip(good, self.chunks, strict=True) if chunk.is_reused),
            frames_dropped=sum(one.dropped for one in facts),
            frames_padded=sum(one.padded for one in facts),
            start_s=min(times, default=0.0),
            end_s=max(times, default=0.0),
            gaps=tuple(sorted((*self.gaps, *(gap for one in facts for gap in one.gaps)), key=lambda gap: gap.start_s)),
            tokens=self._positions(config, [ref.levels for ref in self.refs()]),
            chunks=len(self.chunks),
            cache_hits=sum(chunk.is_reused for chunk in self.chunks),
            tiles=sum(chunk.tiles for chunk in self.chunks),
        )


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """What a file and a sampling gave, as JSON in the cache. Only names and counts: the records they name are verified
    again when they are read."""

    frames_asked: int
    width_px: int
    height_px: int
    chunks: tuple[ChunkFacts, ...]
    gaps: tuple[Gap, ...] = ()

    @classmethod
    def of(cls, item: MediaItem) -> PlanRecord:
        return cls(
            frames_asked=item.frames_asked,
            width_px=item.width_px,
            height_px=item.height_px,
            chunks=tuple(item._facts()),
            gaps=item.gaps,
        )

    def item(self, source: MediaSource, file: LocalMedia, settings: EncodeSettings, plan_key: str) -> MediaItem:
        chunks = [
            ChunkState(run=FrameRun(indices=facts.indices), expected_s=facts.expected_s, facts=facts)
            for facts in self.chunks
        ]
        return MediaItem(
            source=source,
            file=file,
            settings=settings,
            plan_key=plan_key,
            frames_asked=self.frames_asked,
            width_px=self.width_px,
            height_px=self.height_px,
            chunks=chunks,
            gaps=self.gaps,
        )

    def to_bytes(self) -> bytes:
        return _PLAN.dump_json(self)

    @classmethod
    def from_bytes(cls, data: bytes | None) -> PlanRecord | None:
        """None for anything that is not a plan: a cache may hold what it likes, then the file is simply decoded."""
        try:
            return _PLAN.validate_json(data) if data is not None else None
        except ValidationError:
            return None


_PLAN = TypeAdapter(PlanRecord)


def find_gaps(expected_s: Sequence[float], times_s: Sequence[float], missing: Sequence[int]) -> tuple[Gap, ...]:
    """The stretches that a chunk's lost frames leave, each from the last good frame before it to the next one after.

    expected_s: where each frame of the run should be; times_s: where the good ones are, in order; missing: positions
    of the lost ones. At the chunk's ends the lost frames' own expected times bound the stretch.
    """
    lost = sorted(missing)
    gaps: list[Gap] = []
    while lost:
        first, last = lost[0], lost[0]
        while lost and lost[0] <= last + 1:
            last = lost.pop(0)
        good_before = first - sum(position < first for position in missing)
        start_s = times_s[good_before - 1] if good_before else expected_s[first]
        end_s = times_s[good_before] if good_before < len(times_s) else expected_s[last]
        count = last - first + 1
        reason = f"{count} frame{'s' * (count > 1)} could not be decoded"
        gaps.append(Gap(start_s=start_s, end_s=max(start_s, end_s), reason=reason))
    return tuple(gaps)


def is_tiled(kind: MediaKind, kinds: Sequence[MediaKind], image_mode: str) -> bool:
    """The checkpoint's tiling is used only for the one image of a prompt that has exactly one (NVILA-SPEC §2.5)."""
    single = kind is MediaKind.IMAGE and kinds.count(MediaKind.IMAGE) == 1
    return single and image_mode in ("dynamic", "dynamic_s2")
