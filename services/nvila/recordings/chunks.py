"""Planned chunks are decoded, gated, encoded and written, in order, each once: what every ingest comes down to.

One group after the other is decided (static or not), but several are on their way at a time: while one is encoded the
next are decoded. At most `IngestLimits.window` groups are in memory, whatever the recording's length.

Everything is decided by the footage and the policy alone, and the gate's state is made again from the last encoded
group that is written; so a worker that takes over after any kill writes the very chunks that the first would have
written, and finds the tokens that it had made already by their names.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvila.errors import DeadlineExceeded, InvalidMedia, LimitExceeded, NvilaError, Overloaded, Unavailable
from nvila.recordings import cut
from nvila.recordings.claims import Claim
from nvila.recordings.cold import ColdStore
from nvila.recordings.cut import PlannedChunk, PlannedGroup
from nvila.recordings.encode import Fate, Found, Frames, GroupEncoder, Model, mean_token, unit_vector
from nvila.recordings.gate import Gate, Reference, reference_of
from nvila.recordings.types import Counters, Group, RecordedChunk, Recording
from nvila.telemetry import names, tracing
from nvila.telemetry.logs import fields
from nvila.telemetry.names import Metric
from nvila.types import Chunk, Deadline, FrameRun, MediaKind, TokensRef
from nvila.video.media import MediaInfo

_log = logging.getLogger(__name__)
T = TypeVar("T")

UNDECODABLE = "frames could not be decoded"
NO_FOOTAGE = "the source holds no frames here"
FELL_BEHIND = "left out: ingest could not keep up"
NOT_KEPT = "lost: the footage could not be kept in time"

_THUMBNAIL_PX = 192
_THUMBNAIL_QUALITY = 72
_CHUNKS_AHEAD = 2


class MetricSink(Protocol):
    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None: ...
    def set(self, metric: Metric, value: float, **labels: str) -> None: ...
    def observe(self, metric: Metric, value: float, **labels: str) -> None: ...


class Shelf(Protocol):
    """What is asked of `RecordingStore`."""

    async def chunks(
        self, recording_id: str, *, start_s: float | None = None, end_s: float | None = None
    ) -> Sequence[RecordedChunk]: ...


@dataclass(frozen=True, kw_only=True)
class IngestLimits:
    """`capacity`: seconds of work per second that live sources may take together, about the number of decode workers;
    beyond, others are given back. `window`: groups in memory at a time. `group_timeout_s`: for decoding and encoding
    one group. `probe_timeout_s`: for reading a file's headers, which for hours of video are many. `fetch_timeout_s`:
    for a source's bytes. `backlog_s`: footage of a live source that may wait; beyond, the oldest chunks that wait are
    left out, counted. `outage_s`: the same after a service was away, until what waited for it is taken in. `late_s`:
    while a live source is away, how long after the fact footage may still come: a piece is complete only at its last
    frame. `footage_s`: how long a live source's own files are kept, so that lost tokens can be made again."""

    capacity: float = 2.0
    window: int = 4
    group_timeout_s: float = 300.0
    probe_timeout_s: float = 120.0
    fetch_timeout_s: float = 3600.0
    backlog_s: float = 120.0
    outage_s: float = 3600.0
    late_s: float = 30.0
    footage_s: float = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class OpenSegment:
    """A segment's file as it is decoded from. `start_s`: the recording's clock at its first frame."""

    path: Path
    start_s: float
    info: MediaInfo

    def footage(self, number: int) -> cut.Footage:
        return cut.Footage(
            segment=number,
            start_s=self.start_s,
            end_s=self.start_s + self.info.duration_s,
            times_s=self.start_s + self.info.times_s(),
            holes=tuple((self.start_s + start, self.start_s + end) for start, end in self.info.holes),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Taken:
    """What became of one group. `mean`: of its tokens, None without any."""

    group: Group
    fate: Fate
    mean: NDArray[np.float32] | None
    lost_s: tuple[float, ...] = ()
    bytes_cold: int = 0
    thumbnail: bytes = b""


@dataclass(eq=False)
class _Shown:
    """What the last encoded group gave: a static group has the same."""

    ref: TokensRef
    mean: asyncio.Future[NDArray[np.float32]]


@dataclass(kw_only=True)
class StageSeconds:
    """Seconds of work by stage, groups that were on their way together counted each."""

    decode: float = 0.0
    gate: float = 0.0
    encode: float = 0.0
    keep: float = 0.0


@dataclass(kw_only=True, eq=False)
class ChunkIngest:
    """Takes in the chunks of one recording. `segments`: files by number, filled by its user before a chunk that needs
    one is given. `gap_reason`: what is said of time without footage. `wait_out`: waits a while for a service that is
    away, and then what needs it is tried again; None: its error ends the attempt."""

    recording: Recording
    claim: Claim
    model: Model
    frames: Frames
    encoder: GroupEncoder
    metrics: MetricSink
    limits: IngestLimits
    gap_reason: str = NO_FOOTAGE
    wait_out: Callable[[NvilaError], Awaitable[None]] | None = None
    segments: dict[int, OpenSegment] = field(default_factory=dict)
    seconds: StageSeconds = field(default_factory=StageSeconds)

    def __post_init__(self) -> None:
        self._gate = Gate(self.recording.policy.floor_s)
        self._shown: _Shown | None = None
        self._room = asyncio.Semaphore(self.limits.window)

    async def go_on_from(self, group: Group, path: Path, cold: ColdStore) -> None:
        """Take up the gate's state where the worker before left it: at the last group that was not static."""
        assert group.ref is not None, "a group that was encoded has tokens"
        tokens = await cold.get(group.ref, self.model.form)
        if tokens is None:
            return  # whoever asks next has them made again; here the next group is simply encoded
        async with self._decoded(path, group.indices) as chunk:
            if not len(chunk.frames_FHWC) or self.model.ref(chunk, self.recording.tenant) != group.ref:
                return
            reference: Reference = await asyncio.to_thread(reference_of, chunk.frames_FHWC, group.times_s[0])
        self._gate.reference = reference
        self._shown = _Shown(group.ref, _done(mean_token(tokens)))

    async def run(self, chunks: AsyncIterator[PlannedChunk]) -> None:
        """Take in these chunks, written in their order. Raises what a group or the database raises; what is written by
        then stays."""
        ready: asyncio.Queue[tuple[PlannedChunk, list[asyncio.Task[_Taken]]] | None] = asyncio.Queue(_CHUNKS_AHEAD)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write_all(ready))
                turn = _done(None)
                async for chunk in chunks:
                    works = []
                    for position, group in enumerate(() if chunk.is_left_out else chunk.groups):
                        await self._room.acquire()
                        next_turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                        is_middle = position == len(chunk.groups) // 2
                        work = self._take(group, turn, next_turn, wants_thumbnail=is_middle)
                        works.append(tasks.create_task(work))
                        turn = next_turn
                    await ready.put((chunk, works))
                await ready.put(None)
        except BaseExceptionGroup as group_of_errors:
            raise _first_of(group_of_errors) from None

    async def patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it, again and again while what it needs is away and that can be waited out."""
        while True:
            try:
                return await work()
            except (Unavailable, Overloaded, DeadlineExceeded) as error:
                if self.wait_out is None:
                    raise
                await self.wait_out(error)

    # -- one group

    async def _take(
        self,
        planned: PlannedGroup,
        turn: asyncio.Future[None],
        next_turn: asyncio.Future[None],
        *,
        wants_thumbnail: bool,
    ) -> _Taken:
        segment = self.segments[planned.segment]
        try:
            async with AsyncExitStack() as held:
                began = time.perf_counter()
                chunk: Chunk | None
                try:
                    chunk = await self.patiently(
                        lambda: held.enter_async_context(self._decoded(segment.path, planned.indices))
                    )
                except (InvalidMedia, LimitExceeded) as error:  # these frames kill a decoder: a stretch without, no end
                    _log.warning("a group cannot be decoded", extra=fields(reason=error.message))
                    chunk = None
                self._spent("decode", began)
                await turn
                if chunk is None or not len(chunk.frames_FHWC):
                    next_turn.set_result(None)
                    return _corrupt(planned)
                group, lost_s = _timed(planned, chunk, segment.start_s)
                thumbnail = await asyncio.to_thread(_thumbnail, chunk, segment.info) if wants_thumbnail else b""
                taken = await self._decide(chunk, group, next_turn)
                return replace(taken, lost_s=lost_s, thumbnail=thumbnail)
        finally:
            self._room.release()

    async def _decide(self, chunk: Chunk, group: Group, next_turn: asyncio.Future[None]) -> _Taken:
        """Whether the group is static, in its turn; the next one's turn comes before this one is encoded."""
        began = time.perf_counter()
        is_static = self.recording.policy.gate and await asyncio.to_thread(
            self._gate.is_static, chunk.frames_FHWC, group.times_s[0]
        )
        self._spent("gate", began)
        if is_static and self._shown is not None:
            shown = self._shown
            next_turn.set_result(None)
            static = replace(group, ref=shown.ref, is_static=True, named_for=self.model.name)
            return _Taken(group=static, fate=Fate.STATIC, mean=await shown.mean)
        ref = self.model.ref(chunk, self.recording.tenant)
        mean: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._shown = _Shown(ref, mean)
        next_turn.set_result(None)
        with tracing.span("recordings.group", nvila__chunk__frames=len(chunk.frames_FHWC)):
            found = await self.patiently(lambda: self._tokens(chunk, ref))
        mean.set_result(await asyncio.to_thread(mean_token, found.tokens))
        group = replace(group, ref=ref, named_for=self.model.name)
        return _Taken(group=group, fate=found.fate, mean=mean.result(), bytes_cold=found.bytes_cold)

    async def _tokens(self, chunk: Chunk, ref: TokensRef) -> Found:
        began = time.perf_counter()
        found = await self.encoder.tokens(chunk, ref, self.model, self._deadline(), self._note)
        self.seconds.encode += found.encode_s
        self.seconds.keep += time.perf_counter() - began - found.encode_s
        return found

    async def _note(self, key: str) -> None:
        async with self.claim.transaction() as now:
            await now.add_keys([key])

    def _decoded(self, path: Path, indices: tuple[int, ...]) -> AbstractAsyncContextManager[Chunk]:
        run, tile_px = FrameRun(indices=indices), self.model.config.tile_px
        return self.frames.decode(path, MediaKind.VIDEO, run, tile_px, self.model.group, self._deadline())

    def _deadline(self) -> Deadline:
        return Deadline.after(self.limits.group_timeout_s)

    def _spent(self, stage: str, began: float) -> None:
        seconds = time.perf_counter() - began
        setattr(self.seconds, stage, getattr(self.seconds, stage) + seconds)
        self.metrics.observe(names.STAGE_SECONDS, seconds, stage=f"recordings.{stage}")

    # -- one chunk

    async def _write_all(
        self,
        ready: asyncio.Queue[tuple[PlannedChunk, list[asyncio.Task[_Taken]]] | None],
    ) -> None:
        while (item := await ready.get()) is not None:
            planned, works = item
            taken = [await work for work in works]
            await self._write(planned, taken)

    async def _write(self, planned: PlannedChunk, taken: list[_Taken]) -> None:
        if planned.is_left_out:
            await self.patiently(lambda: write_chunk(self.claim, *_left_out(self.recording, planned)))
            dropped = sum(len(g.indices) for g in planned.groups) + len(planned.lost_s)
            self.metrics.add(names.RECORDED_FRAMES, dropped, fate="dropped")
            return
        fps = self.recording.policy.fps
        lost_s = [time_s for one in taken for time_s in one.lost_s]
        gaps = (
            *cut.gaps_between(planned.missing_s, fps, planned.end_s, self.gap_reason),
            *cut.gaps_between(planned.lost_s, fps, planned.end_s, NOT_KEPT),
            *cut.gaps_between(lost_s, fps, planned.end_s, UNDECODABLE),
        )
        chunk = RecordedChunk(
            recording_id=self.recording.id,
            number=planned.number,
            start_s=planned.start_s,
            end_s=planned.end_s,
            groups=tuple(one.group for one in taken),
            gaps=tuple(sorted(gaps, key=lambda gap: gap.start_s)),
            vector=unit_vector([(one.mean, len(one.group.times_s)) for one in taken if one.mean is not None]),
            thumbnail=next((one.thumbnail for one in taken if one.thumbnail), b""),
        )
        counters = _counted(planned, taken)
        await self.patiently(lambda: write_chunk(self.claim, chunk, counters))
        self.metrics.add(names.RECORDED_FRAMES, len(planned.lost_s), fate="dropped")
        for fate in Fate:
            count = sum(len(one.group.times_s) for one in taken if one.fate is fate)
            self.metrics.add(names.RECORDED_FRAMES, count, fate=fate.value)


async def write_chunk(claim: Claim, chunk: RecordedChunk, counters: Counters) -> None:
    """A chunk, the counters, how far the recording is, and the event that says so: together or not at all."""
    async with claim.transaction() as now:
        if await now.add_chunk(chunk, counters):
            told = {"number": chunk.number, "start_s": chunk.start_s, "end_s": chunk.end_s, "gaps": len(chunk.gaps)}
            await now.event("chunk", told)
        await now.update_recording(ingested_s=chunk.end_s)


def _left_out(recording: Recording, planned: PlannedChunk) -> tuple[RecordedChunk, Counters]:
    """A chunk that is left out under back-pressure: its time is a gap, its frames are counted."""
    times_s = (*planned.missing_s, *planned.lost_s, *(time_s for one in planned.groups for time_s in one.instants_s))
    gaps = cut.gaps_between(times_s, recording.policy.fps, planned.end_s, FELL_BEHIND)
    frames = sum(len(group.instants_s) for group in planned.groups) + len(planned.lost_s)
    chunk = RecordedChunk(
        recording_id=recording.id,
        number=planned.number,
        start_s=planned.start_s,
        end_s=planned.end_s,
        groups=(),
        gaps=gaps,
    )
    return chunk, Counters(chunks=1, frames_sampled=frames, frames_dropped=frames)


async def last_encoded(shelf: Shelf, recording: Recording, before: int) -> Group | None:
    """The last group before this chunk that was not static, if it is near enough to matter to the gate."""
    policy = recording.policy
    start_s, _ = cut.chunk_span(policy, before)
    reach_s = policy.floor_s + policy.chunk_s
    chunks = await shelf.chunks(recording.id, start_s=max(0.0, start_s - reach_s), end_s=start_s + policy.chunk_s)
    for chunk in sorted((one for one in chunks if one.number < before), key=lambda one: -one.number):
        for group in reversed(chunk.groups):
            if group.ref is not None and not group.is_static:
                return group
    return None


def _timed(planned: PlannedGroup, chunk: Chunk, start_s: float) -> tuple[Group, tuple[float, ...]]:
    """The frames that were decoded, with the times at which they were captured; and the instants that have none.

    A frame that is on show at several instants has its own time at the first, and the instants' after.
    """
    missing = set(chunk.missing)
    good = [place for place in range(len(planned.indices)) if place not in missing]
    times_s: list[float] = []
    for place, own_s in zip(good, chunk.times_s, strict=True):
        time_s = cut.whole_us(planned.instants_s[place] if planned.is_still[place] else start_s + own_s)
        times_s.append(max(time_s, times_s[-1]) if times_s else time_s)
    group = Group(
        times_s=tuple(times_s),
        segment=planned.segment,
        indices=tuple(planned.indices[place] for place in good),
        ref=None,
    )
    return group, tuple(planned.instants_s[place] for place in sorted(missing))


def _corrupt(planned: PlannedGroup) -> _Taken:
    group = Group(times_s=planned.instants_s, segment=planned.segment, indices=planned.indices, ref=None)
    return _Taken(group=group, fate=Fate.CORRUPT, mean=None, lost_s=planned.instants_s)


def _counted(planned: PlannedChunk, taken: list[_Taken]) -> Counters:
    def frames(fate: Fate) -> int:
        return sum(len(one.group.times_s) for one in taken if one.fate is fate)

    return Counters(
        frames_sampled=sum(len(group.instants_s) for group in planned.groups) + len(planned.lost_s),
        frames_encoded=frames(Fate.ENCODED),
        frames_static=frames(Fate.STATIC),
        frames_reused=frames(Fate.REUSED),
        frames_dropped=len(planned.lost_s),
        frames_corrupt=sum(len(one.lost_s) for one in taken),
        chunks=1,
        bytes_cold=sum(one.bytes_cold for one in taken),
    )


def _thumbnail(chunk: Chunk, info: MediaInfo) -> bytes:
    """The middle frame in the source's own proportions."""
    frame_HWC = chunk.frames_FHWC[len(chunk.times_s) // 2]
    shrink = _THUMBNAIL_PX / max(info.width_px, info.height_px)
    size = (max(1, round(info.width_px * shrink)), max(1, round(info.height_px * shrink)))
    file = io.BytesIO()
    Image.fromarray(frame_HWC).resize(size, Image.Resampling.BILINEAR).save(file, "JPEG", quality=_THUMBNAIL_QUALITY)
    return file.getvalue()


def _done(value: T) -> asyncio.Future[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that the others came with: one of our own before any that says that something is broken."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(_first_of(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((leaf for leaf in leaves if isinstance(leaf, NvilaError)), leaves[0])
