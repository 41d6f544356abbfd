"""A window of a recording as a media item: which token records it is made of, and how lost ones are made again.

The database says which groups lie in the window, the planner how they fit (`planner.py`). Records are looked for in
Redis, then in the cold store, and are encoded again from the segment's frames when neither has them; averages over
groups (`pooling.py`) are made of groups' records, and kept in Redis only: they cost a few milliseconds to make again.
So Redis may be away at any time: answers get slower, never wrong.

A recording outlives the model that it was recorded for. Its groups have names of their own for every other one
(`Model.ref_of`), under which they are encoded again when they are first asked for; while two models are served, each
finds its own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from nvila.cache.codec import Record, RecordFormat, pack
from nvila.errors import InvalidMedia, InvalidRequest, NotFound
from nvila.model.config import NvilaConfig
from nvila.recordings.encode import Model
from nvila.recordings.planner import MOST_POOL, Budget, GroupShape, Planned, Run, Unit, plan_window
from nvila.recordings.pooling import average, pooled_ref
from nvila.recordings.types import Group, RecordedChunk, Recording, RecordingState
from nvila.types import (
    Deadline,
    Gap,
    RecordingCoverage,
    RecordingWindow,
    TokensRef,
    VisualTokens,
    WindowMode,
)

NOT_YET = "not ingested yet"
NOT_SAMPLED = "between chunks: not looked at"
UNDECODABLE = "frames could not be decoded"
_LATEST_S = 1e10
_GROWING = (RecordingState.WAITING, RecordingState.INGESTING, RecordingState.LIVE, RecordingState.INTERRUPTED)


class Shelf(Protocol):
    """What is asked of `RecordingStore`."""

    async def get(self, recording_id: str, *, tenant: str) -> Recording: ...
    async def chunks(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None
    ) -> Sequence[RecordedChunk]: ...


class Hot(Protocol):
    """What is asked of the token cache (`cache/store.py`); it never fails, what is not there is missing."""

    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]: ...
    async def put(self, record: Record) -> bool: ...


class Cold(Protocol):
    """What is asked of the cold store: verified tokens, or None for what is not there or not usable."""

    async def get(self, ref: TokensRef, form: RecordFormat) -> VisualTokens | None: ...


class Encoder(Protocol):
    """Makes a group's tokens from the recording's own frames, under `model.ref_of(group)`.

    Raises `NotFound` when the frames are gone or are others than they were, `Unavailable` while a service is away.
    """

    async def encode_again(
        self, recording: Recording, group: Group, model: Model, deadline: Deadline
    ) -> VisualTokens: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenWindow:
    """A window with its plan. `groups`: those with tokens, in order of time, one for each unit of the plan. `gaps`: of
    the window, in order. `sampled`: frames; `dropped`: of them, not decodable. `chunks`: how many it touches. `model`:
    that its records are to be for; None while that matters to nobody."""

    recording: Recording
    start_s: float
    end_s: float
    groups: tuple[Group, ...]
    gaps: tuple[Gap, ...]
    sampled: int
    dropped: int
    chunks: int
    planned: Planned
    model: Model | None = None

    def served_by(self, config: NvilaConfig, form: RecordFormat) -> OpenWindow:
        """The same window, with records for this model. Raises `InvalidRequest` when it cannot take its groups."""
        window = replace(self, model=Model.made_of(config, form))
        for group in self.groups:
            window.ref_of(group)
        return window

    def ref_of(self, group: Group) -> TokensRef:
        """The record of a group."""
        return _ref_of(group) if self.model is None else self.model.ref_of(group)

    @property
    def refs(self) -> tuple[TokensRef, ...]:
        """Of a window that one call sees: its token records in order of time, averages included."""
        (stretch,) = self.planned.stretches
        return tuple(self.ref(run) for run in stretch.blocks)

    def groups_of(self, key: str) -> tuple[Group, ...]:
        """The groups that a record of this window is the average of; one group for a record of its own."""
        for stretch in self.planned.stretches:
            for run in stretch.blocks:
                if self.ref(run).key == key:
                    return tuple(self.groups[place] for place in run)
        raise AssertionError(f"{key} is no record of this window")

    def ref(self, run: Run) -> TokensRef:
        """The record of a block of the plan."""
        return pooled_ref([self.ref_of(self.groups[place]) for place in run])

    @property
    def is_in_parts(self) -> bool:
        """It needs several calls."""
        return self.planned.plan.mode is WindowMode.MAP_REDUCE

    def parts(self) -> list[RecordingWindow]:
        """Its stretches as windows of their own."""
        return [
            RecordingWindow(recording_id=self.recording.id, start_s=stretch.start_s, end_s=stretch.end_s)
            for stretch in self.planned.stretches
        ]

    @property
    def frames(self) -> int:
        """Sampled frames with tokens, those that look alike included."""
        return sum(len(group.times_s) for group in self.groups)

    def coverage(self) -> RecordingCoverage:
        at = self.recording.captured_at
        return RecordingCoverage(
            recording_id=self.recording.id,
            start_s=self.start_s,
            end_s=self.end_s,
            captured_from=None if at is None else at + self.start_s,
            captured_to=None if at is None else at + self.end_s,
            frames_static=sum(len(group.times_s) for group in self.groups if group.is_static),
            frames_left_out=self.planned.left_out,
            chunks=self.chunks,
            plan=self.planned.plan,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Restored:
    """Tokens that the cache did not have. `is_published`: now it does. `encoded_frames`: that the tower saw again."""

    tokens: VisualTokens
    is_published: bool
    encoded_frames: int


class RecordingWindows:
    """Opens windows and restores their tokens. `most_pool`: consecutive groups that one block may stand for."""

    def __init__(self, shelf: Shelf, hot: Hot, cold: Cold, encoder: Encoder, *, most_pool: int = MOST_POOL) -> None:
        self._shelf = shelf
        self._hot = hot
        self._cold = cold
        self._encoder = encoder
        self._most_pool = most_pool

    async def open(self, asked: RecordingWindow, tenant: str, budget: Budget, config: NvilaConfig) -> OpenWindow:
        """Plan a window; nothing is computed or fetched but the database's rows.

        Raises `NotFound` for another tenant's recording, `InvalidRequest` for a window that is none or that holds no
        frame, `LimitExceeded` for a budget without room for anything.
        """
        recording = await self._shelf.get(asked.recording_id, tenant=tenant)
        start_s, end_s = resolve(asked, recording)
        chunks = await self._shelf.chunks(recording.id, start_s=start_s, end_s=end_s)
        budget = replace(budget, most_pool=self._most_pool)
        return await asyncio.to_thread(lay_window, recording, start_s, end_s, chunks, budget, config)

    async def restore(
        self, window: OpenWindow, ref: TokensRef, form: RecordFormat, config: NvilaConfig, deadline: Deadline
    ) -> Restored:
        """The tokens of one of the window's records, wherever they can be had, published again if that is possible.

        Raises `NotFound` when they cannot be had at all, `Unavailable` while a service is away.
        """
        model = Model.made_of(config, form)
        groups = window.groups_of(ref.key)
        records: list[VisualTokens] = []
        encoded_frames = 0
        found = await self._hot.get([model.ref_of(group) for group in groups], form) if len(groups) > 1 else {}
        for group in groups:
            deadline.left_s()
            one = model.ref_of(group)
            tokens = found.get(one.key) or await self._cold.get(one, form)
            if tokens is None:
                source = await self._shown_first(window.recording, group) if group.is_static else group
                tokens = await self._encoder.encode_again(window.recording, source, model, deadline)
                encoded_frames += len(source.times_s)
            records.append(tokens)
        tokens = await asyncio.to_thread(average, records)
        record = await asyncio.to_thread(pack, tokens, group_start_s=[group.times_s[0] for group in groups])
        return Restored(tokens=tokens, is_published=await self._hot.put(record), encoded_frames=encoded_frames)

    async def _shown_first(self, recording: Recording, group: Group) -> Group:
        """The group whose frames gave a static group's tokens: the nearest before it that was encoded.

        It is at most `floor_s` away while the scene is sampled, so few chunks are read; all of them after a gap.
        """
        reach_s = recording.policy.floor_s + recording.policy.chunk_s
        for start_s in (group.times_s[0] - reach_s, None):
            chunks = await self._shelf.chunks(recording.id, start_s=start_s, end_s=group.times_s[0])
            for chunk in reversed(chunks):
                for other in reversed(chunk.groups):
                    if other.ref == group.ref and not other.is_static:
                        return other
        raise NotFound(f"the tokens of {group.times_s[0]:g} s are lost, and the frames that gave them are not known")


# -- the window -------------------------------------------------------------------------------------------------------


def resolve(asked: RecordingWindow, recording: Recording) -> tuple[float, float]:
    """(start_s, end_s) on the recording's clock. Raises `InvalidRequest` with both numbers for what is no window of it.

    The end may lie up to one sampling interval past the recording's, and beyond it while the recording grows.
    """
    for name in ("start_s", "end_s", "start_at", "end_at"):
        value = getattr(asked, name)
        if value is not None and not 0 <= value <= _LATEST_S:
            raise InvalidRequest(f"{name} must be a number of seconds from 0 to {_LATEST_S:g}, not {value:g}")
    start_s = _offset(asked.start_s, asked.start_at, "start", recording)
    end_s = _offset(asked.end_s, asked.end_at, "end", recording)
    reach_s = recording.ingested_s
    begins_s = 0.0 if start_s is None else start_s
    if end_s is not None and end_s <= begins_s:
        raise InvalidRequest(
            f"the window must end after it starts: it starts at {begins_s:g} s and ends at {end_s:g} s"
        )
    is_growing = recording.state in _GROWING
    if begins_s >= reach_s:
        what = "what is ingested so far, which ends" if is_growing else "the recording's end"
        raise InvalidRequest(f"the window starts at {begins_s:g} s, past {what} at {reach_s:g} s")
    if end_s is not None and not is_growing and end_s > reach_s + 1 / recording.policy.fps:
        raise InvalidRequest(f"the window ends at {end_s:g} s, past the recording's end at {reach_s:g} s")
    return begins_s, reach_s if end_s is None or (not is_growing and end_s > reach_s) else end_s


def _offset(on_clock: float | None, captured: float | None, name: str, recording: Recording) -> float | None:
    if captured is None:
        return on_clock
    if on_clock is not None:
        raise InvalidRequest(f"{name}_s ({on_clock:g}) and {name}_time ({rfc3339(captured)}) exclude each other")
    if recording.captured_at is None:
        raise InvalidRequest("nobody knows when this recording was captured: give start_s and end_s")
    if captured < recording.captured_at:
        raise InvalidRequest(
            f"the window's {name} at {rfc3339(captured)} is before the recording's first frame at "
            f"{rfc3339(recording.captured_at)}"
        )
    return captured - recording.captured_at


def rfc3339(at: float) -> str:
    """A capture time in words."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def lay_window(
    recording: Recording,
    start_s: float,
    end_s: float,
    chunks: Sequence[RecordedChunk],
    budget: Budget,
    config: NvilaConfig,
) -> OpenWindow:
    """A window's groups, gaps and plan from its chunks, in order of time.

    A group belongs to a window when one of its frames does. Where chunks overlap, one all of whose frames others have
    is left out.
    """
    groups: list[Group] = []
    numbers: list[int] = []
    lost: list[Gap] = []
    dropped = 0
    for number, group in _covering(chunks, start_s, end_s):
        if group.ref is None:
            dropped += len(group.times_s)
            until_s = group.times_s[-1] + 1 / recording.policy.fps
            lost.append(Gap(start_s=group.times_s[0], end_s=until_s, reason=UNDECODABLE))
        else:
            groups.append(group)
            numbers.append(number)
    if not groups:
        raise InvalidMedia(f"the window from {start_s:g} to {end_s:g} s holds no frame that could be decoded")
    gaps = _gaps(recording, start_s, end_s, chunks, lost)
    return OpenWindow(
        recording=recording,
        start_s=start_s,
        end_s=end_s,
        groups=tuple(groups),
        gaps=gaps,
        sampled=sum(len(group.times_s) for group in groups) + dropped,
        dropped=dropped,
        chunks=len(set(numbers)),
        planned=plan_window(
            _units(groups, numbers, gaps),
            start_s,
            end_s,
            missing_s=sum(gap.end_s - gap.start_s for gap in gaps),
            budget=budget,
            shape=GroupShape.of(config),
            config=config,
        ),
    )


def _covering(chunks: Sequence[RecordedChunk], start_s: float, end_s: float) -> list[tuple[int, Group]]:
    """Groups with their chunks' numbers, each beginning and ending after the one before it, which together have every
    frame of the window. Of a window cut where one of them begins, the two parts have the same."""
    found: list[tuple[int, Group]] = []
    for chunk in chunks:
        for group in chunk.groups:
            if not group.times_s or group.times_s[-1] < start_s or group.times_s[0] >= end_s:
                continue
            if found and not any(found[-1][1].times_s[-1] < time_s < end_s for time_s in group.times_s):
                continue
            while found and group.times_s[0] <= max(start_s, found[-1][1].times_s[0]):
                found.pop()
            found.append((chunk.number, group))
    return found


def _units(groups: Sequence[Group], numbers: Sequence[int], gaps: Sequence[Gap]) -> list[Unit]:
    units: list[Unit] = []
    waiting = iter([*gaps, Gap(start_s=math.inf, end_s=math.inf, reason="")])
    gap = next(waiting)
    before_s = -math.inf
    for group, number in zip(groups, numbers, strict=True):
        first_s = group.times_s[0]
        while gap.end_s <= before_s:
            gap = next(waiting)
        units.append(
            Unit(
                start_s=first_s,
                key=_ref_of(group).key,
                frames=len(group.times_s),
                chunk=number,
                is_after_gap=bool(units) and gap.start_s < first_s,
            )
        )
        before_s = group.times_s[-1]
    return units


def _gaps(
    recording: Recording, start_s: float, end_s: float, chunks: Sequence[RecordedChunk], lost: Sequence[Gap]
) -> tuple[Gap, ...]:
    """All that is missing in the window, in order, none twice."""
    found = [*lost, *(gap for chunk in chunks for gap in chunk.gaps), *_between(chunks)]
    if chunks and chunks[-1].end_s < end_s and recording.state in _GROWING:
        found.append(Gap(start_s=chunks[-1].end_s, end_s=end_s, reason=NOT_YET))
    clipped = (Gap(start_s=max(gap.start_s, start_s), end_s=min(gap.end_s, end_s), reason=gap.reason) for gap in found)
    return tuple(
        joined_gaps(_without_overlap(sorted((gap for gap in clipped if gap.start_s < gap.end_s), key=_in_time)))
    )


def _between(chunks: Sequence[RecordedChunk]) -> Iterator[Gap]:
    reach_s = chunks[0].end_s if chunks else 0.0
    for chunk in chunks[1:]:
        if chunk.start_s > reach_s + 1e-6:
            yield Gap(start_s=reach_s, end_s=chunk.start_s, reason=NOT_SAMPLED)
        reach_s = max(reach_s, chunk.end_s)


def _in_time(gap: Gap) -> tuple[float, float]:
    return gap.start_s, gap.end_s


def _without_overlap(gaps: Iterable[Gap]) -> Iterator[Gap]:
    """What two of them say of the same time is said once, by the first."""
    reach_s = -math.inf
    for gap in gaps:
        if gap.end_s > reach_s:
            yield replace(gap, start_s=max(gap.start_s, reach_s))
            reach_s = gap.end_s


def joined_gaps(gaps: Iterable[Gap]) -> list[Gap]:
    """Neighbours that say the same are one, wherever a group or a chunk ended."""
    found: list[Gap] = []
    for gap in gaps:
        if found and found[-1].reason == gap.reason and gap.start_s <= found[-1].end_s + 1e-6:
            found[-1] = replace(found[-1], end_s=gap.end_s)
        else:
            found.append(gap)
    return found


def _ref_of(group: Group) -> TokensRef:
    assert group.ref is not None, "a group of a window has tokens"
    return group.ref
