"""A recording's window as one media item of a question: its records exist already, most of them in the cache.

Like `media.py`'s items it says what the answer stands on; unlike them it is planned by `nvila.recordings`, and what the
cache has lost is restored, not encoded from a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.model.estimate import MediaCost
from nvila.recordings.window import OpenWindow, Restored
from nvila.types import MediaCoverage, MediaKind, MediaSource, PromptMedia, TokenDtype, TokensRef, VisualTokens


@dataclass(kw_only=True)
class RecordedItem:
    """`restored`: keys of records that the cache did not have in this request. `in_hand`: those that it would not take
    either. `encoded_frames`: that the tower saw again."""

    source: MediaSource
    window: OpenWindow
    restored: set[str] = field(default_factory=set)
    in_hand: dict[str, VisualTokens] = field(default_factory=dict)
    encoded_frames: int = 0

    @property
    def frames_asked(self) -> int:
        return self.window.sampled

    def refs(self) -> tuple[TokensRef, ...]:
        return self.window.refs

    def prompt_media(self) -> PromptMedia:
        return PromptMedia(kind=MediaKind.VIDEO, is_tiled=False, records=self.refs())

    def inline(self) -> dict[str, VisualTokens]:
        return self.in_hand

    def take(self, restored: Restored, *, is_wanted: bool) -> None:
        """Note tokens that were restored; keep them when the cache did not take them or they `is_wanted` at hand."""
        key = restored.tokens.ref.key
        self.restored.add(key)
        self.encoded_frames += restored.encoded_frames
        if is_wanted or not restored.is_published:
            self.in_hand[key] = restored.tokens

    def cost(self, config: NvilaConfig, dtype: TokenDtype) -> MediaCost:
        """`tokens` and `positions` are those of the largest call; the plan has what all together have."""
        plan = self.window.planned.plan
        most = max(self.window.planned.stretches, key=lambda stretch: len(stretch.blocks))
        refs = [self.window.ref(run) for run in most.blocks]
        levels = cost.join_levels([ref.levels for ref in refs])
        shown = {self.window.ref(run) for stretch in self.window.planned.stretches for run in stretch.blocks}
        return MediaCost(
            kind=MediaKind.VIDEO,
            grid=(1, 1),
            frames=plan.frames,
            chunks=self.window.chunks,
            tiles=0,
            levels=levels,
            tokens=cost.tokens(levels),
            positions=cost.positions(config, kind=MediaKind.VIDEO, is_tiled=False, levels=levels),
            record_bytes=sum(cost.record_bytes(ref.levels, config.llm_width, dtype) for ref in shown),
            pixel_bytes=0,
            recording=self.window.coverage(),
        )

    def coverage(self, config: NvilaConfig) -> MediaCoverage:
        """Of a window that one call sees."""
        window, group = self.window, config.temporal_group
        levels = cost.join_levels([ref.levels for ref in self.refs()])
        keys = {ref.key for ref in self.refs()}
        return MediaCoverage(
            kind=MediaKind.VIDEO,
            frames_asked=window.sampled,
            frames_decoded=self.encoded_frames,
            frames_encoded=self.encoded_frames,
            frames_reused=max(0, window.planned.plan.frames - self.encoded_frames),
            frames_dropped=window.dropped,
            frames_padded=sum(-len(one.times_s) % group for one in window.groups),
            start_s=window.groups[0].times_s[0],
            end_s=window.groups[-1].times_s[-1],
            gaps=window.gaps,
            tokens=cost.positions(config, kind=MediaKind.VIDEO, is_tiled=False, levels=levels),
            chunks=window.chunks,
            cache_hits=len(keys - self.restored),
            tiles=self.encoded_frames,
            recording=window.coverage(),
        )
