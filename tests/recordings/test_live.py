"""A live source becomes chunks while it runs: gaps where it was away, nothing twice, the oldest left out when it is
more than can be taken in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nvila.errors import InvalidMedia, Unauthenticated, Unavailable
from nvila.recordings.camera import CameraLimits, CameraReader
from nvila.recordings.chunks import FELL_BEHIND, NOT_KEPT, IngestLimits
from nvila.recordings.claims import Claim, ClaimTransaction, LeaseLost
from nvila.recordings.cold import ColdStore
from nvila.recordings.footage import sweep_footage
from nvila.recordings.hls import HlsReader
from nvila.recordings.inbox import Inbox
from nvila.recordings.ingest import AWAY
from nvila.recordings.jobs import JobStore
from nvila.recordings.sources import Away, Ended, Footage, LiveSources, Lost, PushedReader
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import ChunkPolicy, Recording, RecordingState, SourceKind
from nvila.telemetry.metrics import Metrics
from nvila.types import Deadline, MediaSource
from nvila.video.pool import DecodePool
from tests.recordings.made import Clock
from tests.recordings.rtsp import Clip, camera
from tests.recordings.taking import NEW_CARD, Elsewhere, Local, Taking, write_clip
from tests.recordings.test_camera import Loopback
from tests.video.conftest import decode_pool

_POLICY = ChunkPolicy(fps=1.0, chunk_s=8.0)


@pytest.fixture(scope="module")
async def frames() -> AsyncIterator[DecodePool]:
    async with decode_pool(arena_bytes=96 * 1024**2) as pool:
        yield pool


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/recordings.db"


@pytest.fixture
def taking(store: RecordingStore, jobs: JobStore, frames: DecodePool, tmp_path: Path) -> Taking:
    return Taking.over(store, jobs, frames, tmp_path, limits=IngestLimits(late_s=12.0))


class Show:
    """Says what a camera would: pieces of `seconds` each, from a time on the test's clock."""

    def __init__(self, taking: Taking, folder: Path, clock: Clock) -> None:
        self._taking, self._folder, self._clock = taking, folder, clock
        self._number = 0
        self.taken: list[int] = []

    def piece(self, at_s: float, seconds: float, *, is_new: bool = False, size: tuple[int, int] = (96, 64)) -> None:
        number, self._number = self._number, self._number + 1
        path = write_clip(self._folder / f"{number}.ts", seconds, seed=number, size=size)
        self._clock.now = max(self._clock.now, self._start + at_s + seconds)
        self._taking.live.queue.put_nowait(
            Footage(
                path=path,
                captured_at=self._start + at_s,
                taken=lambda: self.taken.append(number),
                is_new_session=is_new,
            )
        )

    _start = 1_800_000_000.0

    def away(self, until_s: float, error: Unavailable | Unauthenticated | None = None) -> None:
        self._taking.live.queue.put_nowait(Away(error=error or Unavailable("the connection broke off")))
        self._clock.now = self._start + until_s

    def lost(self, at_s: float, until_s: float) -> None:
        self._taking.live.queue.put_nowait(Lost(start=self._start + at_s, until=self._start + until_s))

    def end(self) -> None:
        self._taking.live.queue.put_nowait(Ended())


@pytest.fixture
def show(taking: Taking, tmp_path: Path, clock: Clock) -> Show:
    folder = tmp_path / "show"
    folder.mkdir()
    return Show(taking, folder, clock)


async def until(taking: Taking, recording_id: str, chunks: int) -> Recording:
    async with asyncio.timeout(30):
        while await taking.shelf.count_chunks(recording_id) < chunks:
            await asyncio.sleep(0.02)
    return await taking.shelf.get(recording_id, tenant="acme")


async def run(taking: Taking, clock: Clock) -> tuple[str, asyncio.Task[object]]:
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.RTSP)
    claim = await taking.claim()

    async def work() -> None:
        await claim.finish(await taking.handler(clock)(claim))

    return recording_id, asyncio.create_task(work())


async def test_chunks_are_written_while_the_source_runs(taking: Taking, show: Show, clock: Clock) -> None:
    recording_id, work = await run(taking, clock)
    show.piece(0, 5, is_new=True)
    show.piece(5, 5)
    recording = await until(taking, recording_id, 1)
    assert recording.state is RecordingState.LIVE
    assert recording.captured_at == 1_800_000_000.0
    show.piece(10, 7)
    show.end()
    await work
    recording = await taking.shelf.get(recording_id, tenant="acme")
    chunks = await taking.shelf.chunks(recording_id)
    assert (recording.state, recording.duration_s) == (RecordingState.COMPLETE, 17.0)
    assert [(chunk.start_s, chunk.end_s, chunk.gaps) for chunk in chunks] == [(0, 8, ()), (8, 16, ()), (16, 17, ())]
    times_s = [time_s for chunk in chunks for group in chunk.groups for time_s in group.times_s]
    assert times_s == [float(second) for second in range(17)]
    assert show.taken == [0, 1, 2]


async def test_while_the_source_is_away_the_clock_runs_on_and_gaps_are_written(
    taking: Taking, show: Show, clock: Clock
) -> None:
    recording_id, work = await run(taking, clock)
    show.piece(0, 10, is_new=True)
    await until(taking, recording_id, 1)
    show.away(until_s=52)
    recording = await until(taking, recording_id, 5)
    assert (recording.state, recording.error_code) == (RecordingState.INTERRUPTED, "unavailable")
    show.piece(70, 10, is_new=True)
    show.end()
    await work
    recording = await taking.shelf.get(recording_id, tenant="acme")
    chunks = await taking.shelf.chunks(recording_id)
    assert [chunk.number for chunk in chunks] == list(range(10))
    gaps = [(gap.start_s, gap.end_s) for chunk in chunks for gap in chunk.gaps]
    assert gaps[0] == (10.0, 16.0)
    assert gaps[-1] == (64.0, 70.0)
    assert sum(end - start for start, end in gaps) == 60.0
    assert {gap.reason for chunk in chunks for gap in chunk.gaps} == {AWAY}
    assert recording.counters.reconnects == 1
    assert (recording.state, recording.error_code) == (RecordingState.COMPLETE, "")


async def test_footage_that_could_not_be_kept_is_told_apart_and_counted(
    taking: Taking, show: Show, clock: Clock
) -> None:
    recording_id, work = await run(taking, clock)
    show.piece(0, 6, is_new=True)
    show.lost(6, 12)
    show.away(until_s=13)
    show.piece(14, 2, is_new=True)
    show.end()
    await work
    chunks = await taking.shelf.chunks(recording_id)
    gaps = [(gap.start_s, gap.end_s, gap.reason) for chunk in chunks for gap in chunk.gaps]
    assert gaps == [(6.0, 8.0, NOT_KEPT), (8.0, 12.0, NOT_KEPT), (12.0, 14.0, AWAY)]
    counters = (await taking.shelf.get(recording_id, tenant="acme")).counters
    assert (counters.frames_sampled, counters.frames_dropped) == (14, 6)
    assert taking.metrics.registry.get_sample_value("nvila_capture_lost_seconds_total") == 6.0
    assert taking.metrics.registry.get_sample_value("nvila_recorded_frames_total", {"fate": "dropped"}) == 6.0


async def test_no_gap_is_written_where_footage_waits_to_be_kept(
    taking: Taking, show: Show, clock: Clock, tmp_path: Path
) -> None:
    cold = taking.cold = NotNow(str(tmp_path / "cold"))
    recording_id, work = await run(taking, clock)
    show.piece(0, 8, is_new=True)
    await until(taking, recording_id, 1)
    cold.is_away = True
    show.away(until_s=9)
    show.piece(10, 8, is_new=True)
    async with asyncio.timeout(30):
        while not cold.refused:
            await asyncio.sleep(0.02)
    clock.now += 600.0
    cold.is_away = False
    show.end()
    await work
    chunks = await taking.shelf.chunks(recording_id)
    assert [(gap.start_s, gap.end_s) for chunk in chunks for gap in chunk.gaps] == [(8.0, 10.0)]


class NotNow(ColdStore):
    """Keeps nothing while it `is_away`."""

    is_away = False
    refused = 0

    async def keep(self, source: Path, recording_id: str, name: str) -> str:
        if self.is_away:
            self.refused += 1
            raise Unavailable("the cold store is away")
        return await super().keep(source, recording_id, name)


async def test_revoked_credentials_show_in_the_state(taking: Taking, show: Show, clock: Clock) -> None:
    recording_id, work = await run(taking, clock)
    show.away(until_s=0, error=Unauthenticated("the camera does not accept the user name and password"))
    async with asyncio.timeout(30):
        while not (recording := await taking.shelf.get(recording_id, tenant="acme")).error_code:
            await asyncio.sleep(0.02)
    assert (recording.state, recording.error_code) == (RecordingState.WAITING, "unauthenticated")
    assert not taking.metrics.registry.get_sample_value("nvila_capture_reconnects_total"), "it never came"
    work.cancel()
    await asyncio.wait({work})


async def test_another_resolution_goes_on_without_a_gap(taking: Taking, show: Show, clock: Clock) -> None:
    recording_id, work = await run(taking, clock)
    show.piece(0, 5, is_new=True)
    show.piece(5, 5, size=(160, 96))
    show.end()
    await work
    chunks = await taking.shelf.chunks(recording_id)
    assert not [gap for chunk in chunks for gap in chunk.gaps]
    assert [group.segment for group in chunks[0].groups] == [0, 1]


async def test_a_piece_that_cannot_be_read_is_a_gap(taking: Taking, show: Show, clock: Clock, tmp_path: Path) -> None:
    recording_id, work = await run(taking, clock)
    show.piece(0, 5, is_new=True)
    show.piece(5, 5)
    (tmp_path / "show" / "1.ts").write_bytes(b"rubbish" * 1000)
    show.piece(10, 6)
    show.end()
    await work
    chunks = await taking.shelf.chunks(recording_id)
    assert [(gap.start_s, gap.end_s) for chunk in chunks for gap in chunk.gaps] == [(5.0, 8.0), (8.0, 10.0)]


async def test_a_backlog_leaves_the_oldest_chunks_out_and_counts_them(taking: Taking, show: Show, clock: Clock) -> None:
    taking.limits = IngestLimits(window=1, backlog_s=20.0)
    taking.vision.gate.clear()
    recording_id, work = await run(taking, clock)
    for number in range(12):
        show.piece(number * 8, 8, is_new=number == 0)
    async with asyncio.timeout(30):
        while len(show.taken) < 12:
            await asyncio.sleep(0.02)
    taking.vision.gate.set()
    recording = await until(taking, recording_id, 12)
    chunks = await taking.shelf.chunks(recording_id)
    left_out = [chunk for chunk in chunks if not chunk.groups]
    assert left_out
    assert {gap.reason for chunk in left_out for gap in chunk.gaps} == {FELL_BEHIND}
    assert recording.counters.frames_dropped == 8 * len(left_out)
    assert chunks[-1].groups
    assert chunks[-2].groups, "what is near the live edge is not left out"
    work.cancel()
    await asyncio.wait({work})


async def taken(show: Show, pieces: int) -> None:
    async with asyncio.timeout(30):
        while len(show.taken) < pieces:
            await asyncio.sleep(0.02)


async def until_it_waits(taking: Taking, recording_id: str) -> Recording:
    async with asyncio.timeout(30):
        while not (recording := await taking.shelf.get(recording_id, tenant="acme")).error_code:
            await asyncio.sleep(0.02)
    return recording


async def test_an_outage_of_the_vision_service_makes_no_gap(taking: Taking, show: Show, clock: Clock) -> None:
    taking.limits = IngestLimits(window=1, backlog_s=20.0)
    taking.vision.is_away = True
    recording_id, work = await run(taking, clock)
    for number in range(8):
        show.piece(number * 8, 8, is_new=number == 0)
    await taken(show, 8)
    recording = await until_it_waits(taking, recording_id)
    assert (recording.state, recording.error_code) == (RecordingState.LIVE, "unavailable")
    assert recording.counters.chunks == 0
    taking.vision.is_away = False
    recording = await until(taking, recording_id, 7)
    show.piece(64, 8)
    show.end()
    await work
    recording = await taking.shelf.get(recording_id, tenant="acme")
    chunks = await taking.shelf.chunks(recording_id)
    assert [chunk.number for chunk in chunks] == list(range(9))
    assert not [gap for chunk in chunks for gap in chunk.gaps]
    assert (recording.counters.frames_dropped, recording.counters.reconnects) == (0, 0)
    assert (recording.state, recording.error_code) == (RecordingState.COMPLETE, "")


async def test_after_new_weights_the_next_attempt_takes_in_what_waited(
    taking: Taking, show: Show, clock: Clock
) -> None:
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.RTSP)
    claim = await taking.claim()
    work = asyncio.ensure_future(taking.handler(clock)(claim))
    show.piece(0, 10, is_new=True)
    await until(taking, recording_id, 1)
    taking.vision.revision = NEW_CARD.vision_revision
    show.piece(10, 10)
    await until_it_waits(taking, recording_id)
    assert not work.done(), "what is served still says that it is the old model"
    taking.models.card = NEW_CARD
    async with asyncio.timeout(30):
        with pytest.raises(LeaseLost, match="another model"):
            await work
    claim = await taking.claim()
    assert claim.job.attempt == 1, "being given back costs no attempt"
    show.end()
    await taking.handler(clock)(claim)
    chunks = await taking.shelf.chunks(recording_id)
    assert [chunk.number for chunk in chunks] == [0, 1, 2]
    assert not [gap for chunk in chunks for gap in chunk.gaps]
    assert len({group.named_for for chunk in chunks for group in chunk.groups}) == 2


def lag_s(taking: Taking) -> float:
    lines = taking.metrics.render().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith("nvila_ingest_lag_seconds ")), 0.0)


async def test_a_source_that_is_let_go_shows_no_lag_any_more(taking: Taking, show: Show, clock: Clock) -> None:
    taking.limits = IngestLimits(window=1)
    taking.vision.is_away = True
    _, work = await run(taking, clock)
    for number in range(4):
        show.piece(number * 8, 8, is_new=number == 0)
    async with asyncio.timeout(30):
        while lag_s(taking) <= 0:
            await asyncio.sleep(0.02)
    work.cancel()
    await asyncio.wait({work})
    assert lag_s(taking) == 0


async def test_of_a_long_outage_the_oldest_footage_is_left_out_and_counted(
    taking: Taking, show: Show, clock: Clock
) -> None:
    taking.limits = IngestLimits(window=1, backlog_s=10.0, outage_s=40.0)
    taking.vision.is_away = True
    recording_id, work = await run(taking, clock)
    for number in range(12):
        show.piece(number * 8, 8, is_new=number == 0)
    await taken(show, 12)
    await until_it_waits(taking, recording_id)
    taking.vision.is_away = False
    recording = await until(taking, recording_id, 12)
    chunks = await taking.shelf.chunks(recording_id)
    left_out = [chunk.number for chunk in chunks if not chunk.groups]
    assert left_out
    assert max(left_out) == 5, "48 s behind is left out, 40 s is not"
    assert recording.counters.frames_dropped == 8 * len(left_out)
    work.cancel()
    await asyncio.wait({work})


async def test_a_worker_that_takes_over_goes_on_with_the_same_recording(
    taking: Taking, show: Show, clock: Clock
) -> None:
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.RTSP)
    claim = await taking.claim()
    work: asyncio.Future[object] = asyncio.ensure_future(taking.handler(clock)(claim))
    show.piece(0, 10, is_new=True)
    await until(taking, recording_id, 1)
    work.cancel()
    await asyncio.wait({work})
    await claim.release()
    clock.now += 20
    claim = await taking.claim()
    work = asyncio.ensure_future(taking.handler(clock)(claim))
    show.piece(30, 10, is_new=True)
    show.end()
    await work
    chunks = await taking.shelf.chunks(recording_id)
    assert [chunk.number for chunk in chunks] == [0, 1, 2, 3, 4]
    assert sum(gap.end_s - gap.start_s for chunk in chunks for gap in chunk.gaps) == 20.0
    times_s = [time_s for chunk in chunks for group in chunk.groups for time_s in group.times_s]
    assert times_s == [*(float(s) for s in range(10)), *(float(s) for s in range(30, 40))]


async def test_a_piece_that_was_kept_before_a_kill_is_not_taken_twice(taking: Taking, tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    taking.live = LiveSources({SourceKind.PUSH: PushedReader(inbox)})  # type: ignore[assignment]  # the real one
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.PUSH)
    push(inbox, recording_id, tmp_path, range(1))
    (kept,) = inbox.pieces(recording_id)
    again = kept.path.read_bytes()
    claim = await taking.claim()
    work: asyncio.Future[object] = asyncio.ensure_future(taking.handler()(claim))
    async with asyncio.timeout(30):
        while inbox.pieces(recording_id):
            await asyncio.sleep(0.02)
    work.cancel()
    await asyncio.wait({work})
    await claim.release()
    kept.path.write_bytes(again)  # killed before it was let go
    push(inbox, recording_id, tmp_path, range(1, 2), end=True)
    await taking.handler()(await taking.claim())
    segments = await taking.shelf.segments(recording_id)
    assert [(segment.number, segment.source_number) for segment in segments] == [(0, 0), (1, 1)]
    assert (await taking.shelf.get(recording_id, tenant="acme")).duration_s == 16.0
    assert inbox.pieces(recording_id) == []


class Lists:
    """One HLS list and its segments of 4 s, each another clip."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.listed = range(0)
        self.is_ended = False

    @asynccontextmanager
    async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[Local]:
        name = (source.url or "").rpartition("/")[2]
        path = self._folder / name
        if name.endswith(".ts"):
            await asyncio.to_thread(write_clip, path, 4.0, seed=int(path.stem))
        else:
            lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:4", f"#EXT-X-MEDIA-SEQUENCE:{self.listed.start}"]
            lines += [f"#EXTINF:4.0,\n{number}.ts" for number in self.listed]
            path.write_text("\n".join([*lines, *(["#EXT-X-ENDLIST"] if self.is_ended else [])]))
        yield Local(path, b"", path.stat().st_size)


async def killed_while_reading(taking: Taking, lists: Lists, clock: Clock, tmp_path: Path) -> str:
    """A recording of a list whose worker was killed once it had kept what was listed."""
    reader = HlsReader(lists, tmp_path / "hls", Metrics(), clock=clock)
    taking.live = LiveSources({SourceKind.HLS: reader})  # type: ignore[assignment]  # the real one
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.HLS)
    claim = await taking.claim()
    work: asyncio.Future[object] = asyncio.ensure_future(taking.handler(clock)(claim))
    async with asyncio.timeout(30):
        while len(await taking.shelf.segments(recording_id)) < len(lists.listed):
            await asyncio.sleep(0.02)
    work.cancel()
    await asyncio.wait({work})
    await claim.release()
    return recording_id


async def placed(taking: Taking, recording_id: str) -> list[tuple[int | None, float]]:
    return [(segment.source_number, segment.start_s) for segment in await taking.shelf.segments(recording_id)]


async def test_a_complete_list_is_not_begun_again_by_the_next_worker(
    taking: Taking, clock: Clock, tmp_path: Path
) -> None:
    lists = Lists(tmp_path)
    lists.listed = range(2)
    recording_id = await killed_while_reading(taking, lists, clock, tmp_path)
    lists.listed, lists.is_ended = range(4), True
    clock.now += 600
    await taking.handler(clock)(await taking.claim())
    assert await placed(taking, recording_id) == [(0, 0.0), (1, 4.0), (2, 8.0), (3, 12.0)]
    chunks = await taking.shelf.chunks(recording_id)
    assert [(chunk.start_s, chunk.end_s, chunk.gaps) for chunk in chunks] == [(0.0, 8.0, ()), (8.0, 16.0, ())]


async def test_segments_that_are_still_listed_are_not_taken_twice_and_later_ones_lie_where_they_were_captured(
    taking: Taking, clock: Clock, tmp_path: Path
) -> None:
    lists = Lists(tmp_path)
    lists.listed = range(3)
    recording_id = await killed_while_reading(taking, lists, clock, tmp_path)
    lists.listed = range(1, 5)
    clock.now += 8.0
    claim = await taking.claim()
    work: asyncio.Future[object] = asyncio.ensure_future(taking.handler(clock)(claim))
    async with asyncio.timeout(30):
        while len(found := await placed(taking, recording_id)) < 5:
            await asyncio.sleep(0.02)
    work.cancel()
    await asyncio.wait({work})
    assert found == [(0, 0.0), (1, 4.0), (2, 8.0), (3, 12.0), (4, 16.0)]


async def test_old_footage_is_removed_and_its_tokens_stay(
    taking: Taking, show: Show, clock: Clock, tmp_path: Path
) -> None:
    taking.limits = IngestLimits(footage_s=40.0)
    recording_id, work = await run(taking, clock)
    for number in range(20):
        show.piece(number * 8, 8, is_new=number == 0)
        await until(taking, recording_id, number + 1)
    kept = sorted(
        int(path.stem.partition("-")[0]) for path in (tmp_path / "cold" / "segments" / recording_id).iterdir()
    )
    assert kept[0] >= 10
    assert kept[-1] == 19
    group = (await taking.shelf.chunk(recording_id, 0)).groups[0]
    assert group.ref is not None
    assert await taking.cold.has(group.ref.key)
    work.cancel()
    await asyncio.wait({work})


async def test_a_piece_is_kept_once_though_removing_an_old_one_has_to_be_tried_again(
    taking: Taking, show: Show, clock: Clock, tmp_path: Path
) -> None:
    class FailsOnce(ColdStore):
        failures = 1

        async def forget_segment(self, relative: str) -> None:
            if self.failures:
                self.failures -= 1
                raise Unavailable("the store of recordings could not remove a segment")
            await super().forget_segment(relative)

    taking.limits = IngestLimits(footage_s=8.0)
    taking.cold = cold = FailsOnce(str(tmp_path / "cold"))
    recording_id, work = await run(taking, clock)
    for number in range(10):
        show.piece(number * 8, 8, is_new=number == 0)
        await until(taking, recording_id, number + 1)
    show.end()
    await work
    assert not cold.failures
    segments = await taking.shelf.segments(recording_id)
    assert [(segment.number, segment.start_s) for segment in segments] == [(n, 8.0 * n) for n in range(10)]
    assert show.taken == list(range(10))
    assert not segments[0].path, "it was tried again"


async def test_a_reconnection_is_counted_once_though_the_answer_to_its_commit_is_lost(
    taking: Taking, show: Show, clock: Clock
) -> None:
    class AnswerLost(Claim):
        """Of the transaction that has counted the first reconnection."""

        is_lost = False

        @asynccontextmanager
        async def transaction(self) -> AsyncIterator[ClaimTransaction]:
            async with super().transaction() as now:
                yield now
            if not self.is_lost and (await taking.shelf.get(recording_id, tenant="acme")).counters.reconnects:
                self.is_lost = True
                raise Unavailable("the database of recordings does not answer")

    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.RTSP)
    claim = await taking.claim()
    claim.__class__ = AnswerLost
    work: asyncio.Future[object] = asyncio.ensure_future(taking.handler(clock)(claim))
    show.piece(0, 8, is_new=True)
    await until(taking, recording_id, 1)
    show.piece(8, 8, is_new=True)
    show.end()
    await work
    assert claim.is_lost  # type: ignore[attr-defined]  # it is one that loses answers
    assert show.taken == [0, 1]
    assert (await taking.shelf.get(recording_id, tenant="acme")).counters.reconnects == 1


async def test_footage_of_a_recording_that_is_over_is_removed_when_it_is_old(
    taking: Taking, show: Show, clock: Clock, tmp_path: Path
) -> None:
    recording_id, work = await run(taking, clock)
    for number in range(3):
        show.piece(number * 8, 8, is_new=number == 0)
    await until(taking, recording_id, 2)
    at_s = clock.now
    assert await sweep_footage(taking.shelf, taking.cold, at_s - 1) == 0, "it runs"
    show.end()
    await work
    assert await sweep_footage(taking.shelf, taking.cold, at_s - 1) == 2
    assert await sweep_footage(taking.shelf, taking.cold, at_s - 1) == 0
    segments = await taking.shelf.segments(recording_id)
    assert [bool(segment.path) for segment in segments] == [False, False, True]
    files = (tmp_path / "cold" / "segments" / recording_id).iterdir()
    assert [path.name for path in files] == [Path(segments[2].path).name]
    group = (await taking.shelf.chunk(recording_id, 0)).groups[0]
    assert group.ref is not None
    assert await taking.cold.has(group.ref.key)


async def test_a_worker_without_room_gives_another_live_source_back(taking: Taking, show: Show, clock: Clock) -> None:
    handler = taking.handler(clock)
    handler.load.measured("rec_another", work_s=30.0, footage_s=20.0)
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.RTSP)
    with pytest.raises(LeaseLost):
        await handler(await taking.claim())
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert (recording.state, recording.error_code) == (RecordingState.WAITING, "overloaded")
    handler.load.forget("rec_another")
    clock.now += 20
    claim = await taking.claim()
    assert claim.job.attempt == 1, "being given back costs no attempt"
    show.piece(0, 5, is_new=True)
    show.end()
    await handler(claim)
    assert handler.load.refusal() == ""


async def test_pushed_pieces_become_a_recording_that_ends(taking: Taking, tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    taking.live = LiveSources({SourceKind.PUSH: PushedReader(inbox)})  # type: ignore[assignment]  # the real one
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.PUSH)
    with inbox.writing(recording_id) as writer:
        for number in range(2):
            path = write_clip(tmp_path / f"{number}.ts", 6.0, seed=number)
            path = path.rename(writer.new_path())
            writer.add(path, "ts", 1_800_000_000.0 + 6 * number)
        writer.end()
    claim = await taking.claim()
    await claim.finish(await taking.handler()(claim))
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert (recording.state, recording.duration_s) == (RecordingState.COMPLETE, 12.0)
    assert inbox.pieces(recording_id) == []


def push(inbox: Inbox, recording_id: str, folder: Path, numbers: range, *, end: bool = False) -> None:
    """Pieces of 8 s each."""
    with inbox.writing(recording_id) as writer:
        for number in numbers:
            path = write_clip(folder / f"pushed-{number}.ts", 8.0, seed=number).rename(writer.new_path())
            writer.add(path, "ts", 1_800_000_000.0 + 8 * number)
        if end:
            writer.end()


async def test_a_client_that_pushes_faster_than_is_taken_in_is_held_back_and_loses_nothing(
    taking: Taking, tmp_path: Path
) -> None:
    inbox = Inbox(tmp_path)
    taking.live = LiveSources({SourceKind.PUSH: PushedReader(inbox)})  # type: ignore[assignment]  # the real one
    taking.limits = IngestLimits(window=1, backlog_s=10.0)
    taking.vision.gate.clear()
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.PUSH)
    push(inbox, recording_id, tmp_path, range(10), end=True)
    claim = await taking.claim()
    work: asyncio.Future[object] = asyncio.ensure_future(taking.handler()(claim))
    async with asyncio.timeout(30):
        while taking.vision.calls == 0 or len(inbox.pieces(recording_id)) == 10:
            await asyncio.sleep(0.02)
    await asyncio.sleep(1.0)
    assert len(inbox.pieces(recording_id)) >= 4, "the rest waits where the client put it"
    taking.vision.gate.set()
    await work
    chunks = await taking.shelf.chunks(recording_id)
    assert [chunk.number for chunk in chunks] == list(range(10))
    assert not [gap for chunk in chunks for gap in chunk.gaps]
    assert inbox.pieces(recording_id) == []


async def test_what_was_pushed_while_no_worker_was_there_is_no_gap(
    taking: Taking, clock: Clock, tmp_path: Path
) -> None:
    inbox = Inbox(tmp_path)
    taking.live = LiveSources({SourceKind.PUSH: PushedReader(inbox)})  # type: ignore[assignment]  # the real one
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.PUSH)
    push(inbox, recording_id, tmp_path, range(2))
    claim = await taking.claim()
    work: asyncio.Future[object] = asyncio.ensure_future(taking.handler(clock)(claim))
    await until(taking, recording_id, 1)
    work.cancel()
    await asyncio.wait({work})
    await claim.release()
    push(inbox, recording_id, tmp_path, range(2, 5), end=True)
    clock.now += 3600
    await taking.handler(clock)(await taking.claim())
    chunks = await taking.shelf.chunks(recording_id)
    assert [chunk.number for chunk in chunks] == list(range(5))
    assert not [gap for chunk in chunks for gap in chunk.gaps]


async def test_a_live_recording_begins_with_its_first_frame_whatever_was_said_before(
    taking: Taking, show: Show, clock: Clock
) -> None:
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.RTSP)
    claim = await taking.claim()
    await claim.update_recording(captured_at=5.0)
    work: asyncio.Future[object] = asyncio.ensure_future(taking.handler(clock)(claim))
    show.away(until_s=0)
    show.piece(0, 10, is_new=True)
    show.end()
    await work
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert recording.captured_at == 1_800_000_000.0
    assert (recording.duration_s, recording.counters.chunks) == (10.0, 2)


async def test_a_client_whose_clock_jumps_for_years_fails_its_recording(taking: Taking, tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    taking.live = LiveSources({SourceKind.PUSH: PushedReader(inbox)})  # type: ignore[assignment]  # the real one
    recording_id = await taking.submit(None, _POLICY, kind=SourceKind.PUSH)
    push(inbox, recording_id, tmp_path, range(1))
    with inbox.writing(recording_id) as writer:
        writer.add(write_clip(tmp_path / "late.ts", 8.0).rename(writer.new_path()), "ts", 1_800_000_000.0 * 2)
    with pytest.raises(InvalidMedia, match="days after what came before it"):
        await taking.handler()(await taking.claim())
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert (recording.state, recording.duration_s) == (RecordingState.FAILED, 8.0)
    assert recording.counters.chunks <= 1


async def test_a_real_camera_with_a_drop_becomes_chunks_with_a_gap(taking: Taking, tmp_path: Path) -> None:
    clip = Clip.read(write_clip(tmp_path / "a.mp4", 4.0, fps=10, gop=5))
    limits = CameraLimits(segment_s=2.0, first_pause_s=0.1, longest_pause_s=0.2)
    reader = CameraReader(Loopback(), tmp_path / "captures", taking.metrics, limits)
    taking.live = LiveSources({SourceKind.RTSP: reader})  # type: ignore[assignment]  # the real one
    async with camera(clip) as shown:
        policy = ChunkPolicy(fps=4.0, chunk_s=2.0)
        recording_id = await taking.submit(None, policy, kind=SourceKind.RTSP)
        real = await taking.shelf.get(recording_id, tenant="acme")
        shelf = Elsewhere(taking.shelf, replace(real.source, url=shown.url))
        taking.shelf = shelf  # type: ignore[assignment]  # with the camera's own port
        claim = await taking.claim()
        work = asyncio.ensure_future(taking.handler()(claim))
        await until(taking, recording_id, 2)
        stopped = time.monotonic()
        await shown.stop()
        await asyncio.sleep(3.0)
        await shown.start()
        recording = await until(taking, recording_id, 5)
        away_s = time.monotonic() - stopped
        work.cancel()
        await asyncio.wait({work})
    reader.close()
    chunks = await taking.shelf.chunks(recording_id)
    gaps = [gap for chunk in chunks for gap in chunk.gaps]
    assert 1.0 < sum(gap.end_s - gap.start_s for gap in gaps) < away_s
    assert recording.counters.reconnects == 1
    assert taking.metrics.registry.get_sample_value("nvila_capture_reconnects_total") == 1.0
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
