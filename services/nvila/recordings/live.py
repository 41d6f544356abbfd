"""The taking in of a live source: a *feeder* keeps each piece of footage as it comes, and beside it chunk after chunk
is taken in, as far as the footage reaches.

While the source is away the clock runs on, so chunks of gaps are written; when taking in falls behind by more than
`backlog_s`, the oldest chunks that wait are left out, counted and told as gaps. A source that can wait itself is held
back instead.

A service that is away does not end the attempt, which would let go of the camera: footage is kept on, and up to
`outage_s` of it is taken in once the service is back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from nvila.errors import DeadlineExceeded, InvalidMedia, NotFound, NvilaError, Overloaded, Unavailable
from nvila.recordings import cut
from nvila.recordings.chunks import ChunkIngest, OpenSegment
from nvila.recordings.cut import PlannedChunk
from nvila.recordings.footage import forget_footage
from nvila.recordings.ingest_services import IngestServices
from nvila.recordings.sources import Away, Ended, Footage, LiveEvent, Lost
from nvila.recordings.types import Counters, Recording, RecordingState, Segment, SourceKind
from nvila.telemetry import names
from nvila.telemetry.logs import fields
from nvila.types import Deadline, MediaKind
from nvila.video.media import MediaInfo

_log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_CHUNKS_ON_THE_WAY = 6
"""No more chunks than this are planned and not written yet (chunks.py)."""
_LOOK_EVERY_S = 1.0
_TRY_AGAIN_S = 2.0
_SLACK_S = 3600.0
"""Footage that is older than it is to be kept may have been left by a worker that was killed: so much of it is looked
for."""
_LONGEST_GAP_S = 30 * 86400.0


class Live(Protocol):
    """What is asked of `LiveSources`."""

    def events(self, recording: Recording, after: Segment | None) -> AsyncGenerator[LiveEvent, None]: ...


class LiveLoad:
    """What the live sources of this worker cost, as measured: seconds of work (decoding, gate, encoding, keeping) per
    second of footage. `capacity`: how much of it may be promised at a time; one more source is expected to cost what
    the present ones do."""

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self._sources: dict[str, tuple[float, float]] = {}
        self._lags: dict[str, float] = {}

    def refusal(self) -> str:
        """Why no other live source can be taken; empty when one can."""
        costs = [work_s / footage_s for work_s, footage_s in self._sources.values() if footage_s > 0]
        if not costs:
            return ""
        expected = sum(costs) * (len(self._sources) + 1) / len(costs)
        if expected <= self._capacity:
            return ""
        return f"{len(self._sources)} live sources and this one would need {expected:.2f} of {self._capacity:.2f}"

    def measured(self, recording_id: str, work_s: float, footage_s: float) -> None:
        self._sources[recording_id] = (work_s, footage_s)

    def waits(self, recording_id: str, lag_s: float) -> float:
        """Note how much footage of a source waits; returns the most of any."""
        self._lags[recording_id] = max(0.0, lag_s)
        return max(self._lags.values())

    def forget(self, recording_id: str) -> float:
        """Returns the most footage that waits of any other source."""
        self._sources.pop(recording_id, None)
        self._lags.pop(recording_id, None)
        return max(self._lags.values(), default=0.0)


class LiveIngest:
    """One live recording: what its feeder has brought, and how far it reaches. `run` once."""

    def __init__(self, services: IngestServices, source: Live, load: LiveLoad, ingest: ChunkIngest) -> None:
        self._services = services
        self._source = source
        self._load = load
        self._ingest = ingest
        self._recording = ingest.recording
        self._claim = ingest.claim
        self._films: dict[int, _Film] = {}
        self._opened: dict[int, AsyncExitStack] = {}
        self._kept: deque[Segment] = deque()
        self._lost: list[tuple[float, float]] = []
        # What a client says of a live source's beginning is not when its first frame comes.
        has_begun = ingest.recording.duration_s is not None
        self._captured_at = ingest.recording.captured_at if has_begun else None
        self._reach_s = 0.0
        self._wanted_s = 0.0
        self._next_segment = 0
        self._trouble: NvilaError | None = None
        self._was_held_up = False
        self._can_wait = False
        self._is_away = False
        self._is_ended = False
        self._news = asyncio.Event()
        ingest.wait_out = self._wait_out

    async def run(self) -> None:
        """Until the source ends; a camera does not. Raises what ends the attempt."""
        try:
            before = await self._before()
            async with asyncio.TaskGroup() as tasks:
                feeder = tasks.create_task(self._feed(before[-1] if before else None))
                first = await self._ingest.patiently(lambda: self._services.go_on(self._ingest))
                begin_s, _ = cut.chunk_span(self._recording.policy, first)
                for segment in before:
                    if segment.start_s + segment.duration_s > begin_s:
                        await self._ingest.patiently(partial(self._look_into, segment))
                await self._ingest.run(self._chunks(first))
                feeder.cancel()
        except BaseExceptionGroup as group:
            raise _of_ours(group) from None
        finally:
            most_lag_s = self._load.forget(self._recording.id)
            self._services.metrics.set(names.INGEST_LAG_SECONDS, most_lag_s)
            for opened in self._opened.values():
                await opened.aclose()
        await self._claim.update_recording(
            state=RecordingState.COMPLETE,
            duration_s=self._reach_s,
            ingested_s=self._reach_s,
            error_code="",
            error="",
        )

    async def _before(self) -> Sequence[Segment]:
        """What workers before have kept, as far as its files may still be there."""
        reach_s, kept_s = self._recording.duration_s or 0.0, self._services.limits.footage_s + _SLACK_S
        before = await self._services.shelf.segments(self._recording.id, start_s=max(0.0, reach_s - kept_s))
        self._kept.extend(before)
        if before:
            self._next_segment = before[-1].number + 1
            self._reach_s = max(segment.start_s + segment.duration_s for segment in before)
        return before

    async def _wait_out(self, error: NvilaError) -> None:
        """Something is away that ingest needs. What comes from the source meanwhile is kept, and waits."""
        if self._trouble is None:
            _log.warning("footage waits", extra=fields(recording=self._recording.id, reason=error.message))
        self._trouble, self._was_held_up = error, True
        self._show_lag()
        with suppress(Unavailable):  # the database may be what is away
            await self._claim.update_recording(error_code=error.code, error=error.message)
        await asyncio.sleep(max(_TRY_AGAIN_S, error.retry_after_s or 0.0))
        with suppress(Unavailable, Overloaded, DeadlineExceeded):
            await self._services.give_back_for_another_model(self._ingest)

    # -- the feeder

    async def _feed(self, after: Segment | None) -> None:
        async with aclosing(self._source.events(self._recording, after)) as events:
            async for event in events:
                if isinstance(event, Footage):
                    self._is_away = False  # however long it takes to keep it, the clock does not run past it
                    await self._room_for(event)
                    await self._ingest.patiently(partial(self._keep, event))
                    await self._ingest.patiently(self._forget_old)
                elif isinstance(event, Away):
                    await self._ingest.patiently(partial(self._gone, event.error))
                elif isinstance(event, Lost):
                    self._note_lost(event)
                else:
                    assert isinstance(event, Ended)
                    break
                self._news.set()
        self._is_ended = True
        self._news.set()

    async def _room_for(self, piece: Footage) -> None:
        """Leave what can wait where it is while enough waits here."""
        self._can_wait = piece.can_wait
        while piece.can_wait and self._reach_s - self._wanted_s > self._services.limits.backlog_s:
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _keep(self, piece: Footage) -> None:
        """Keep a piece, note it, open it. One that cannot be read is a gap, not an end."""
        number, services = self._next_segment, self._services
        deadline = Deadline.after(services.limits.probe_timeout_s)
        try:
            info = await services.frames.probe(piece.path, MediaKind.VIDEO, deadline)
        except InvalidMedia as error:
            _log.warning("a piece of footage cannot be read", extra=fields(reason=error.message))
            piece.taken()
            return
        is_first = self._captured_at is None
        captured_at = piece.captured_at if self._captured_at is None else self._captured_at
        size_bytes, digest = await asyncio.to_thread(_measured, piece.path)
        at_s = cut.whole_us(piece.captured_at - captured_at)
        self._check_time(at_s)
        segment = Segment(
            recording_id=self._recording.id,
            number=number,
            path=await services.cold.keep(piece.path, self._recording.id, f"{number}-{digest[:16]}{piece.path.suffix}"),
            start_s=max(at_s, self._reach_s),
            duration_s=cut.whole_us(info.duration_s),
            size_bytes=size_bytes,
            digest=digest,
            source_number=piece.number,
            source_until=piece.until,
        )
        async with self._claim.transaction() as now:
            is_new = await now.add_segment(segment)  # else it was committed though its answer was lost
            if is_new and piece.is_new_session and not is_first:
                await now.add_counters(Counters(reconnects=1))
            await now.update_recording(
                state=RecordingState.LIVE,
                captured_at=captured_at,
                duration_s=segment.start_s + segment.duration_s,
                error_code=self._trouble.code if self._trouble else "",
                error=self._trouble.message if self._trouble else "",
            )
        if piece.is_new_session and not is_first:
            services.metrics.add(names.CAPTURE_RECONNECTS)
        piece.taken()
        self._captured_at, self._next_segment = captured_at, number + 1
        self._kept.append(segment)
        self._films[number] = _Film(segment, info)
        self._reach_s = segment.start_s + segment.duration_s

    def _check_time(self, at_s: float) -> None:
        """A client's or a playlist's clock may say anything, and every chunk up to there would be written."""
        gap_s = at_s - max(self._reach_s, self._wanted_s)
        if gap_s > _LONGEST_GAP_S and self._recording.source.kind is not SourceKind.RTSP:
            raise InvalidMedia(
                f"footage was captured {gap_s / 86400:,.0f} days after what came before it, by its own clock; at most "
                f"{_LONGEST_GAP_S / 86400:g} are taken for a gap"
            )

    def _note_lost(self, lost: Lost) -> None:
        """What a camera showed while nothing could be kept. It is known until this worker ends."""
        self._services.metrics.add(names.CAPTURE_LOST_SECONDS, lost.until - lost.start)
        if self._captured_at is not None:
            self._lost.append((lost.start - self._captured_at, lost.until - self._captured_at))

    async def _gone(self, error: NvilaError) -> None:
        self._is_away = True
        state = RecordingState.WAITING if self._captured_at is None else RecordingState.INTERRUPTED
        await self._claim.update_recording(state=state, error_code=error.code, error=error.message)

    async def _forget_old(self) -> None:
        """Files of footage that is older than it is to be kept; the rows stay, and so do the tokens."""
        before_s = self._reach_s - self._services.limits.footage_s
        while self._kept and self._kept[0].start_s + self._kept[0].duration_s < before_s:
            if self._kept[0].number in self._films:
                return
            if self._kept[0].path:
                await forget_footage(self._services.shelf, self._services.cold, self._kept[0])
            self._kept.popleft()

    # -- the taking in

    async def _chunks(self, first: int) -> AsyncIterator[PlannedChunk]:
        policy = self._recording.policy
        number, (begun_s, _) = first, cut.chunk_span(policy, first)
        while True:
            self._trouble = None  # there is room for another chunk, so those before it get on
            start_s, self._wanted_s = cut.chunk_span(policy, number)
            last_s = cut.chunk_times(policy, number)[-1]
            while not self._is_ended and self._edge_s() <= last_s:  # then it is known what its last instant shows
                await self._wait()
            duration_s = self._reach_s if self._is_ended else math.inf
            if self._is_ended and number >= cut.chunk_count(policy, duration_s):
                return
            yield await self._planned(number, duration_s)
            number += 1
            seconds = asdict(self._ingest.seconds)
            self._load.measured(self._recording.id, sum(seconds.values()), max(0.0, start_s - begun_s))
            await self._close_before(cut.chunk_span(policy, max(0, number - _CHUNKS_ON_THE_WAY))[0])

    async def _planned(self, number: int, duration_s: float) -> PlannedChunk:
        """The chunk, its footage open. Footage that is gone by now is none."""
        policy, group = self._recording.policy, self._ingest.model.group
        while True:
            planned = cut.plan_chunk(policy, number, self._footage(*cut.chunk_span(policy, number)), group, duration_s)
            planned = cut.with_lost(planned, self._lost)
            if planned.groups and self._is_too_much():
                return replace(planned, is_left_out=True)
            segments = dict.fromkeys(one.segment for one in planned.groups)
            opened = [await self._ingest.patiently(partial(self._open, segment)) for segment in segments]
            if all(opened):
                return planned

    def _is_too_much(self) -> bool:
        """Whether more waits than may. After an outage more may, until what waited is taken in."""
        limits, lag_s = self._services.limits, self._show_lag()
        if lag_s <= limits.backlog_s:
            self._was_held_up = False
        if self._is_ended or self._can_wait:
            return False
        return lag_s > (max(limits.outage_s, limits.backlog_s) if self._was_held_up else limits.backlog_s)

    def _show_lag(self) -> float:
        lag_s = self._edge_s() - self._wanted_s
        self._services.metrics.set(names.INGEST_LAG_SECONDS, self._load.waits(self._recording.id, lag_s))
        return lag_s

    def _edge_s(self) -> float:
        """How far it is known what there is: to the end of the footage, or nearly to now while the source is away."""
        if self._captured_at is None:
            return -math.inf
        if self._is_away:
            return max(self._reach_s, self._services.clock() - self._captured_at - self._services.limits.late_s)
        return self._reach_s

    def _footage(self, start_s: float, end_s: float) -> list[cut.Footage]:
        films = (self._films[number] for number in sorted(self._films))
        return [film.footage for film in films if film.end_s > start_s and film.segment.start_s < end_s]

    async def _wait(self) -> None:
        self._news.clear()
        try:
            async with asyncio.timeout(_LOOK_EVERY_S):
                await self._news.wait()
        except TimeoutError:
            pass

    # -- files of footage

    async def _look_into(self, segment: Segment) -> None:
        """Know the frames of a segment that the worker before has kept."""
        services = self._services
        if not segment.path:
            return
        try:
            async with services.cold.open(segment.path) as path:
                deadline = Deadline.after(services.limits.probe_timeout_s)
                self._films[segment.number] = _Film(
                    segment, await services.frames.probe(path, MediaKind.VIDEO, deadline)
                )
        except (NotFound, InvalidMedia):
            _log.info("footage is gone", extra=fields(recording=self._recording.id, segment=segment.number))

    async def _open(self, number: int) -> bool:
        """Have a segment's file at hand. False: it is gone."""
        if number in self._opened:
            return True
        film, opened = self._films[number], AsyncExitStack()
        try:
            path: Path = await opened.enter_async_context(self._services.cold.open(film.segment.path))
        except NotFound:
            del self._films[number]
            return False
        self._opened[number] = opened
        self._ingest.segments[number] = OpenSegment(path=path, start_s=film.segment.start_s, info=film.info)
        return True

    async def _close_before(self, time_s: float) -> None:
        self._lost = [lost for lost in self._lost if lost[1] >= time_s]
        for number in [number for number, film in self._films.items() if film.end_s < time_s]:
            del self._films[number]
            if number in self._opened:
                del self._ingest.segments[number]
                await self._opened.pop(number).aclose()


@dataclass(frozen=True)
class _Film:
    """A segment of a live recording and the frames in it."""

    segment: Segment
    info: MediaInfo

    @property
    def end_s(self) -> float:
        return self.segment.start_s + self.info.duration_s

    @property
    def footage(self) -> cut.Footage:
        return OpenSegment(path=Path(), start_s=self.segment.start_s, info=self.info).footage(self.segment.number)


def _measured(path: Path) -> tuple[int, str]:
    digest, size = blake3(), 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()


def _of_ours(group: BaseExceptionGroup[BaseException]) -> BaseException:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(_of_ours(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((leaf for leaf in leaves if isinstance(leaf, NvilaError)), leaves[0])
