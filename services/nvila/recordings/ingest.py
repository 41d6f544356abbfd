"""The handlers of ingest and of deletion: what a worker does with a recording's job.

A file is kept once (a second name for an upload's bytes on the same disk), probed, and taken in chunk by chunk from
where the chunks in the database end. A live source runs two things side by side: a *feeder* that keeps each piece of
footage as it comes, and the taking in, chunk after chunk, as far as the footage reaches. While the source is away the
clock runs on, so chunks of gaps are written; when taking in falls behind by more than `backlog_s`, the oldest chunks
that wait are left out, counted and told as gaps. A source that can wait itself is held back instead.

A service that is away does not end the attempt at a live source, which would let go of the camera: footage is kept on,
and up to `outage_s` of it is taken in once the service is back. A file waits by itself, so there the attempt ends and
another one goes on. An attempt is for one model: when another one is served by now, what waits is given back, and the
next attempt goes on for that one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from nvila.errors import (
    DeadlineExceeded,
    InvalidMedia,
    InvalidRequest,
    NotFound,
    NvilaError,
    Overloaded,
    Unavailable,
)
from nvila.recordings import cut
from nvila.recordings.chunks import NO_FOOTAGE, ChunkIngest, IngestLimits, MetricSink, OpenSegment, last_encoded
from nvila.recordings.claims import Claim, LeaseLost
from nvila.recordings.cold import ColdStore
from nvila.recordings.cut import PlannedChunk
from nvila.recordings.encode import Frames, GroupEncoder, Model, Models
from nvila.recordings.sources import Away, Ended, FileSources, Footage, LiveEvent, Lost
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import Counters, Recording, RecordingState, Segment, SourceKind
from nvila.telemetry import names
from nvila.telemetry.logs import fields
from nvila.types import Deadline, MediaKind
from nvila.video.media import MediaInfo

_log = logging.getLogger(__name__)

AWAY = "the source was away"

_READ_BYTES = 1 << 20
_CHUNKS_ON_THE_WAY = 6
"""No more chunks than this are planned and not written yet (chunks.py)."""
_SWEEP_AT_ONCE = 500
_LOOK_EVERY_S = 1.0
_TRY_AGAIN_S = 2.0
_SLACK_S = 3600.0
"""Footage that is older than it is to be kept may have been left by a worker that was killed: so much of it is looked
for."""
_FULL_PAUSE_S = 15.0
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


class IngestHandler:
    """Takes in one recording. `clock`: seconds since 1970."""

    def __init__(
        self,
        *,
        shelf: RecordingStore,
        cold: ColdStore,
        files: FileSources,
        live: Live,
        frames: Frames,
        encoder: GroupEncoder,
        models: Models,
        metrics: MetricSink,
        limits: IngestLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._shelf = shelf
        self._cold = cold
        self._files = files
        self._live = live
        self._frames = frames
        self._encoder = encoder
        self._models = models
        self._metrics = metrics
        self._limits = limits
        self._clock = clock
        self.load = LiveLoad(limits.capacity)

    async def __call__(self, claim: Claim) -> Mapping[str, Any]:
        """Until the recording is complete; a camera's never is. What is wrong with the source itself fails the
        recording, everything else is for another attempt."""
        assert claim.job.recording_id is not None, "an ingest job has a recording"
        recording = await self._shelf.get(claim.job.recording_id, tenant=claim.job.tenant)
        try:
            cut.check_policy(recording.policy)
            model = Model.of(await self._models.describe())
            ingest = ChunkIngest(
                recording=recording,
                claim=claim,
                model=model,
                frames=self._frames,
                encoder=self._encoder,
                metrics=self._metrics,
                limits=self._limits,
                gap_reason=AWAY if recording.source.kind.is_live else NO_FOOTAGE,
            )
            if recording.source.kind.is_live:
                await self._admit(recording, claim)
                await _LiveIngest(self, ingest).run()
            else:
                await self._take_file(ingest)
        except (InvalidRequest, NotFound) as error:
            await claim.update_recording(state=RecordingState.FAILED, error_code=error.code, error=error.message)
            raise
        done = await self._shelf.get(recording.id, tenant=recording.tenant)
        return {"duration_s": done.duration_s, "counters": asdict(done.counters), "seconds": asdict(ingest.seconds)}

    async def _admit(self, recording: Recording, claim: Claim) -> None:
        """Give a live source back, for another worker or a better moment, when this one has no room for it."""
        refusal = self.load.refusal()
        if refusal:
            await claim.update_recording(error_code=Overloaded.code, error=f"waiting for room: {refusal}")
            await claim.release(delay_s=_FULL_PAUSE_S)
            raise LeaseLost("given back: this worker has no room for another live source")
        self.load.measured(recording.id, 0.0, 0.0)

    async def give_back_for_another_model(self, ingest: ChunkIngest) -> None:
        """Raises `LeaseLost` when the model that this attempt encodes for is not the one that is served; the job waits
        for its next attempt. Raises `Unavailable` when nobody says what is served."""
        if Model.of(await self._models.describe()) == ingest.model:
            return
        await ingest.claim.release()
        raise LeaseLost("given back: another model is served by now")

    # -- a file

    async def _take_file(self, ingest: ChunkIngest) -> None:
        recording, claim = ingest.recording, ingest.claim
        segments = await self._shelf.segments(recording.id)
        segment = segments[0] if segments else await self._keep_file(recording, claim)
        async with self._cold.open(segment.path) as path:
            info = await self._frames.probe(path, MediaKind.VIDEO, Deadline.after(self._limits.probe_timeout_s))
            ingest.segments[0] = OpenSegment(path=path, start_s=0.0, info=info)
            duration_s = cut.whole_us(info.duration_s)
            await claim.update_recording(state=RecordingState.INGESTING, duration_s=duration_s)
            first = await self.go_on(ingest)
            await ingest.run(_chunks_of_file(ingest, first, duration_s))
        await claim.update_recording(state=RecordingState.COMPLETE, ingested_s=duration_s)

    async def _keep_file(self, recording: Recording, claim: Claim) -> Segment:
        deadline = Deadline.after(self._limits.fetch_timeout_s)
        async with self._files.open(recording.source, recording.tenant, deadline) as media:
            info = await self._frames.probe(media.path, MediaKind.VIDEO, Deadline.after(self._limits.probe_timeout_s))
            segment = Segment(
                recording_id=recording.id,
                number=0,
                path=await self._cold.keep(media.path, recording.id, "0"),
                start_s=0.0,
                duration_s=cut.whole_us(info.duration_s),
                size_bytes=media.size_bytes,
                digest=media.digest.hex(),
            )
        async with claim.transaction() as now:
            await now.add_segment(segment)
            await now.update_recording(digest=segment.digest)
        return segment

    async def go_on(self, ingest: ChunkIngest) -> int:
        """Number of the first chunk that is not written; the gate is where it was after the last one."""
        last = await self._shelf.last_chunk(ingest.recording.id)
        if last is None:
            return 0
        group = await last_encoded(self._shelf, ingest.recording, last.number + 1)
        if group is not None and ingest.recording.policy.gate:
            segment = await self._shelf.segment(ingest.recording.id, group.segment)
            try:
                if not segment.path:
                    raise NotFound("it is not kept any more")
                async with self._cold.open(segment.path) as path:
                    await ingest.go_on_from(group, path, self._cold)
            except (NotFound, InvalidMedia):
                _log.info("the last encoded group's footage is gone", extra=fields(recording=ingest.recording.id))
        return last.number + 1


async def _chunks_of_file(ingest: ChunkIngest, first: int, duration_s: float) -> AsyncIterator[PlannedChunk]:
    policy, footage = ingest.recording.policy, [ingest.segments[0].footage(0)]
    for number in range(first, cut.chunk_count(policy, duration_s)):
        yield cut.plan_chunk(policy, number, footage, ingest.model.group, duration_s)


class _LiveIngest:
    """One live recording: what its feeder has brought, and how far it reaches."""

    def __init__(self, services: IngestHandler, ingest: ChunkIngest) -> None:
        self._services = services
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
            most_lag_s = self._services.load.forget(self._recording.id)
            self._services._metrics.set(names.INGEST_LAG_SECONDS, most_lag_s)
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
        reach_s, kept_s = self._recording.duration_s or 0.0, self._services._limits.footage_s + _SLACK_S
        before = await self._services._shelf.segments(self._recording.id, start_s=max(0.0, reach_s - kept_s))
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
        async with aclosing(self._services._live.events(self._recording, after)) as events:
            async for event in events:
                if isinstance(event, Footage):
                    self._is_away = False  # however long it takes to keep it, the clock does not run past it
                    await self._room_for(event)
                    await self._ingest.patiently(partial(self._keep, event))
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
        while piece.can_wait and self._reach_s - self._wanted_s > self._services._limits.backlog_s:
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _keep(self, piece: Footage) -> None:
        """Keep a piece, note it, open it. One that cannot be read is a gap, not an end."""
        number, services = self._next_segment, self._services
        deadline = Deadline.after(services._limits.probe_timeout_s)
        try:
            info = await services._frames.probe(piece.path, MediaKind.VIDEO, deadline)
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
            path=await services._cold.keep(
                piece.path, self._recording.id, f"{number}-{digest[:16]}{piece.path.suffix}"
            ),
            start_s=max(at_s, self._reach_s),
            duration_s=cut.whole_us(info.duration_s),
            size_bytes=size_bytes,
            digest=digest,
            source_number=piece.number,
            source_until=piece.until,
        )
        async with self._claim.transaction() as now:
            await now.add_segment(segment)
            if piece.is_new_session and not is_first:
                await now.add_counters(Counters(reconnects=1))
            await now.update_recording(
                state=RecordingState.LIVE,
                captured_at=captured_at,
                duration_s=segment.start_s + segment.duration_s,
                error_code=self._trouble.code if self._trouble else "",
                error=self._trouble.message if self._trouble else "",
            )
        if piece.is_new_session and not is_first:
            services._metrics.add(names.CAPTURE_RECONNECTS)
        piece.taken()
        self._captured_at, self._next_segment = captured_at, number + 1
        self._kept.append(segment)
        self._films[number] = _Film(segment, info)
        self._reach_s = segment.start_s + segment.duration_s
        await self._forget_old()

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
        self._services._metrics.add(names.CAPTURE_LOST_SECONDS, lost.until - lost.start)
        if self._captured_at is not None:
            self._lost.append((lost.start - self._captured_at, lost.until - self._captured_at))

    async def _gone(self, error: NvilaError) -> None:
        self._is_away = True
        state = RecordingState.WAITING if self._captured_at is None else RecordingState.INTERRUPTED
        await self._claim.update_recording(state=state, error_code=error.code, error=error.message)

    async def _forget_old(self) -> None:
        """Files of footage that is older than it is to be kept; the rows stay, and so do the tokens."""
        before_s = self._reach_s - self._services._limits.footage_s
        while self._kept and self._kept[0].start_s + self._kept[0].duration_s < before_s:
            if self._kept[0].number in self._films:
                return
            segment = self._kept.popleft()
            if segment.path:
                await forget_footage(self._services._shelf, self._services._cold, segment)

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
            self._services.load.measured(self._recording.id, sum(seconds.values()), max(0.0, start_s - begun_s))
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
        limits, lag_s = self._services._limits, self._show_lag()
        if lag_s <= limits.backlog_s:
            self._was_held_up = False
        if self._is_ended or self._can_wait:
            return False
        return lag_s > (max(limits.outage_s, limits.backlog_s) if self._was_held_up else limits.backlog_s)

    def _show_lag(self) -> float:
        lag_s = self._edge_s() - self._wanted_s
        self._services._metrics.set(names.INGEST_LAG_SECONDS, self._services.load.waits(self._recording.id, lag_s))
        return lag_s

    def _edge_s(self) -> float:
        """How far it is known what there is: to the end of the footage, or nearly to now while the source is away."""
        if self._captured_at is None:
            return -math.inf
        if self._is_away:
            return max(self._reach_s, self._services._clock() - self._captured_at - self._services._limits.late_s)
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
            async with services._cold.open(segment.path) as path:
                deadline = Deadline.after(services._limits.probe_timeout_s)
                self._films[segment.number] = _Film(
                    segment, await services._frames.probe(path, MediaKind.VIDEO, deadline)
                )
        except (NotFound, InvalidMedia):
            _log.info("footage is gone", extra=fields(recording=self._recording.id, segment=segment.number))

    async def _open(self, number: int) -> bool:
        """Have a segment's file at hand. False: it is gone."""
        if number in self._opened:
            return True
        film, opened = self._films[number], AsyncExitStack()
        try:
            path: Path = await opened.enter_async_context(self._services._cold.open(film.segment.path))
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


async def forget_footage(shelf: RecordingStore, cold: ColdStore, segment: Segment) -> None:
    """Remove a segment's file; its row stays and says so."""
    await cold.forget_segment(segment.path)
    await shelf.forget_path(segment)


async def sweep_footage(shelf: RecordingStore, cold: ColdStore, ended_before: float) -> int:
    """Remove footage that ended before this time (seconds since 1970), of live recordings that are over: those that
    run look after their own. Returns how many files went."""
    gone = 0
    while segments := await shelf.old_footage(ended_before, limit=_SWEEP_AT_ONCE):
        for segment in segments:
            await forget_footage(shelf, cold, segment)
        gone += len(segments)
    return gone


class DeleteHandler:
    """Removes what a deleted recording has left: tokens that no other recording stands on, footage, rows. Each step may
    be repeated; a deletion that was cut off goes on."""

    def __init__(self, cold: ColdStore, remove_pushed: Callable[[str], None]) -> None:
        self._cold = cold
        self._remove_pushed = remove_pushed

    async def __call__(self, claim: Claim) -> Mapping[str, Any]:
        recording_id = claim.job.recording_id
        assert recording_id is not None, "a deletion has a recording"
        freed = 0
        while True:
            async with claim.transaction() as now:  # whoever comes to stand on these records waits for its end
                keys = await now.drop_keys()
                if keys is None:
                    break
                freed += await self._cold.drop(keys)
        await self._cold.forget_segments(recording_id)
        await asyncio.to_thread(self._remove_pushed, recording_id)
        while True:
            async with claim.transaction() as now:
                if not await now.remove_chunks():
                    await now.remove_recording()
                    break
        return {"bytes_freed": freed}


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
