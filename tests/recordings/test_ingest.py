"""A file becomes chunks, each once, whatever happens on the way; its frames are encoded once, whoever asks again."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from blake3 import blake3
from PIL import Image

from nvila.errors import InvalidMedia, InvalidRequest, MediaUnavailable, NotFound, Unavailable
from nvila.recordings.cold import ColdStore
from nvila.recordings.encode import GroupEncoder, LostTokens, Model
from nvila.recordings.footage import DeleteHandler
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import ChunkPolicy, JobKind, RecordedChunk, Recording, RecordingState
from nvila.types import Deadline, MediaSource
from nvila.video.pool import DecodePool
from tests.recordings.taking import CARD, Local, Taking, Uploads, write_clip
from tests.video.conftest import decode_pool

_MOVING = ChunkPolicy(fps=1.0, chunk_s=16.0)


@pytest.fixture(scope="module")
async def frames() -> AsyncIterator[DecodePool]:
    async with decode_pool(arena_bytes=96 * 1024**2) as pool:
        yield pool


@pytest.fixture
def taking(store: RecordingStore, jobs: JobStore, frames: DecodePool, tmp_path: Path) -> Taking:
    return Taking.over(store, jobs, frames, tmp_path)


async def all_of(taking: Taking, recording: Recording) -> list[RecordedChunk]:
    return [await taking.shelf.chunk(recording.id, number) for number in range(recording.counters.chunks)]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/recordings.db"


async def test_a_file_becomes_chunks_with_tokens_vectors_and_thumbnails(taking: Taking, tmp_path: Path) -> None:
    recording = await taking.take_in(write_clip(tmp_path / "a.mp4", 40.0), _MOVING)
    assert (recording.state, recording.duration_s, recording.ingested_s) == (RecordingState.COMPLETE, 40.0, 40.0)
    chunks = await all_of(taking, recording)
    assert [(chunk.start_s, chunk.end_s) for chunk in chunks] == [(0, 16), (16, 32), (32, 40)]
    assert [len(group.times_s) for chunk in chunks for group in chunk.groups] == [8] * 5
    times_s = [time_s for chunk in chunks for group in chunk.groups for time_s in group.times_s]
    assert times_s == [float(second) for second in range(40)]
    form = Model.of(CARD).form
    for chunk in chunks:
        for group in chunk.groups:
            assert group.ref is not None
            assert await taking.cold.get(group.ref, form) is not None
    vectors = await taking.shelf.vectors(recording.id)
    assert [number for number, _ in vectors] == [0, 1, 2]
    assert np.linalg.norm(np.frombuffer(vectors[0][1], "<f4")) == pytest.approx(1.0)
    with Image.open(io.BytesIO(await taking.shelf.thumbnail(recording.id, 1))) as thumbnail:
        assert thumbnail.size == (192, 128), "the clip's own proportions"
    assert recording.counters.frames_encoded == recording.counters.frames_sampled == 40
    assert recording.counters.bytes_cold > 0


async def test_a_second_pass_over_the_same_file_encodes_nothing_with_redis_empty(
    taking: Taking, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "a.mp4", 40.0)
    first = await taking.take_in(clip, _MOVING)
    taking.hot.records.clear()
    encoded = taking.vision.frames
    second = await taking.take_in(clip, _MOVING)
    assert taking.vision.frames == encoded
    assert (second.counters.frames_encoded, second.counters.frames_reused) == (0, 40)
    assert second.counters.bytes_cold == 0
    assert second.digest == first.digest
    assert [chunk.groups for chunk in await all_of(taking, second)] == [
        chunk.groups for chunk in await all_of(taking, first)
    ]


async def test_what_is_only_hot_is_kept_cold_and_not_encoded(taking: Taking, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 16.0)
    first = await taking.take_in(clip, _MOVING)
    await taking.cold.drop(list(taking.hot.records))
    second = await taking.take_in(clip, _MOVING)
    assert second.counters.frames_encoded == 0
    assert second.counters.bytes_cold == first.counters.bytes_cold


async def test_two_tenants_with_one_file_share_no_tokens(taking: Taking, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 16.0)
    first = await taking.take_in(clip, _MOVING, tenant="acme")
    second = await taking.take_in(clip, _MOVING, tenant="umbra")
    assert second.counters.frames_encoded == first.counters.frames_encoded == 16
    keys = [
        {group.ref.key for chunk in await all_of(taking, one) for group in chunk.groups if group.ref}
        for one in (first, second)
    ]
    assert not keys[0] & keys[1]


async def test_a_still_file_is_encoded_at_its_floor_rate_only(taking: Taking, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "still.mp4", 128.0, still=True)
    recording = await taking.take_in(clip, ChunkPolicy(fps=1.0, chunk_s=32.0, floor_s=64.0))
    counters = recording.counters
    assert (counters.frames_sampled, counters.frames_encoded + counters.frames_reused) == (128, 16)
    assert counters.frames_static == 112
    chunks = await all_of(taking, recording)
    first = chunks[0].groups[0].ref
    assert [group.is_static for group in chunks[0].groups] == [False, True, True, True]
    assert all(group.ref == first for group in chunks[1].groups)
    assert (await taking.shelf.vectors(recording.id))[1][1], "a chunk that is all static has its vector all the same"


async def test_without_the_gate_every_group_is_looked_at(taking: Taking, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "still.mp4", 32.0, still=True)
    recording = await taking.take_in(clip, ChunkPolicy(fps=1.0, chunk_s=32.0, gate=False))
    assert recording.counters.frames_static == 0


async def test_a_worker_that_takes_over_writes_what_the_first_would_have(taking: Taking, tmp_path: Path) -> None:
    """Killed after any number of chunks: the same chunks, each once, and no frame is encoded twice."""
    policy = ChunkPolicy(fps=1.0, chunk_s=8.0, floor_s=40.0)
    clip = write_clip(tmp_path / "half.mp4", 64.0, still=True)
    whole = await taking.take_in(clip, policy)
    undisturbed = [chunk.groups for chunk in await all_of(taking, whole)]
    await taking.cold.drop(list(taking.hot.records))
    taking.hot.records.clear()
    taking.vision.frames = 0
    recording_id = await taking.submit(clip, policy)
    for chunks_before_the_kill in (1, 3, 4):
        claim = await taking.claim()
        work = asyncio.ensure_future(taking.handler()(claim))
        while not work.done() and await taking.shelf.count_chunks(recording_id) < chunks_before_the_kill:
            await asyncio.sleep(0.005)
        work.cancel()
        await asyncio.wait({work})
        await claim.release()
    claim = await taking.claim()
    await claim.finish(await taking.handler()(claim))
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert [chunk.groups for chunk in await all_of(taking, recording)] == undisturbed
    assert recording.counters.chunks == whole.counters.chunks == 8
    assert recording.counters.frames_static == whole.counters.frames_static
    assert taking.vision.frames == 16, "one group at 0 and one at the floor, 40 s later"


async def test_vision_that_is_away_for_a_moment_is_waited_for(taking: Taking, tmp_path: Path) -> None:
    taking.vision.failures = [Unavailable("restarting"), Unavailable("restarting")]
    recording = await taking.take_in(write_clip(tmp_path / "a.mp4", 16.0), _MOVING)
    assert recording.counters.frames_encoded == 16


async def test_vision_that_stays_away_ends_the_attempt_and_keeps_what_is_written(
    taking: Taking, tmp_path: Path
) -> None:
    recording_id = await taking.submit(write_clip(tmp_path / "a.mp4", 40.0), _MOVING)
    taking.vision.failures = [Unavailable("away")] * 1000
    claim = await taking.claim()
    with pytest.raises(Unavailable):
        await taking.handler()(claim)
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert recording.state is RecordingState.INGESTING, "another attempt goes on"


async def test_a_redis_that_is_down_costs_nothing_but_hits(taking: Taking, tmp_path: Path) -> None:
    taking.hot.is_down = True
    recording = await taking.take_in(write_clip(tmp_path / "a.mp4", 16.0), _MOVING)
    assert recording.state is RecordingState.COMPLETE


async def test_no_more_groups_than_the_window_are_in_memory(taking: Taking, tmp_path: Path) -> None:
    work = asyncio.ensure_future(taking.take_in(write_clip(tmp_path / "a.mp4", 80.0), _MOVING))
    taking.vision.gate.clear()
    for _ in range(40):
        await asyncio.sleep(0.02)
    taking.vision.gate.set()
    await work
    assert 2 <= taking.vision.most_at_once <= taking.limits.window


async def test_a_file_that_is_no_video_fails_the_recording_and_says_why(taking: Taking, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video" * 100)
    recording_id = await taking.submit(bad, _MOVING)
    with pytest.raises(InvalidMedia):
        await taking.handler()(await taking.claim())
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert (recording.state, recording.error_code) == (RecordingState.FAILED, "invalid_media")


async def test_a_source_whose_host_is_away_does_not_fail_the_recording(taking: Taking, tmp_path: Path) -> None:
    class Away(Uploads):
        @asynccontextmanager
        async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[Local]:
            raise MediaUnavailable("the host of the media address answered 503", param="url")
            yield

    path = write_clip(tmp_path / "a.mp4", 4.0)
    there, taking.uploads = taking.uploads, Away()
    recording_id = await taking.submit(path, _MOVING)
    claim = await taking.claim()
    with pytest.raises(MediaUnavailable):
        await taking.handler()(claim)
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert (recording.state, recording.error_code) == (RecordingState.WAITING, "")
    taking.uploads = there
    there.paths[recording_id] = path
    await taking.handler()(claim)
    assert (await taking.shelf.get(recording_id, tenant="acme")).state is RecordingState.COMPLETE


async def test_a_source_that_has_other_bytes_after_a_kill_is_kept_as_it_is_then(taking: Taking, tmp_path: Path) -> None:
    class KilledOnce(ColdStore):
        kills = 1

        async def keep(self, source: Path, recording_id: str, name: str) -> str:
            kept = await super().keep(source, recording_id, name)
            if self.kills:
                self.kills -= 1
                raise Unavailable("killed before it could say what it has kept")
            return kept

    taking.cold = KilledOnce(str(tmp_path / "cold"))
    recording_id = await taking.submit(write_clip(tmp_path / "a.mp4", 4.0), _MOVING)
    claim = await taking.claim()
    with pytest.raises(Unavailable):
        await taking.handler()(claim)
    taking.uploads.paths[recording_id] = write_clip(tmp_path / "b.mp4", 8.0, seed=1)
    await taking.handler()(claim)
    (segment,) = await taking.shelf.segments(recording_id)
    async with taking.cold.open(segment.path) as path:
        assert blake3(path.read_bytes()).hexdigest() == segment.digest
    assert segment.duration_s == 8.0


async def test_a_policy_that_means_nothing_fails_the_recording(taking: Taking, tmp_path: Path) -> None:
    await taking.submit(write_clip(tmp_path / "a.mp4", 2.0), ChunkPolicy(fps=-1.0))
    with pytest.raises(InvalidRequest, match="fps"):
        await taking.handler()(await taking.claim())


async def test_a_corrupt_middle_is_a_gap_and_the_rest_is_taken_in(taking: Taking, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 64.0, size=(320, 192))
    data = bytearray(clip.read_bytes())
    start = data.find(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    noise = np.random.default_rng(1).integers(0, 256, size * 3 // 10, dtype=np.uint8).tobytes()
    data[start + size * 4 // 10 : start + size * 4 // 10 + len(noise)] = noise
    clip.write_bytes(data)
    recording = await taking.take_in(clip, _MOVING)
    assert recording.state is RecordingState.COMPLETE
    counters = recording.counters
    assert 5 <= counters.frames_corrupt <= 35
    assert counters.frames_sampled == 64
    assert counters.frames_encoded + counters.frames_static + counters.frames_reused == 64 - counters.frames_corrupt
    chunks = await all_of(taking, recording)
    lost_s = sum(gap.end_s - gap.start_s for chunk in chunks for gap in chunk.gaps)
    assert lost_s == pytest.approx(counters.frames_corrupt)
    assert chunks[-1].groups[-1].ref is not None


async def test_lost_tokens_are_made_again_from_the_footage(taking: Taking, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 16.0)
    recording = await taking.take_in(clip, _MOVING)
    clip.unlink()
    group = (await all_of(taking, recording))[0].groups[1]
    assert group.ref is not None
    before = await taking.cold.get(group.ref, Model.of(CARD).form)
    assert before is not None
    await taking.cold.drop(list(taking.hot.records))
    taking.hot.records.clear()
    encoder = GroupEncoder(taking.cold, taking.hot, taking.vision, recovery_s=1.0)
    lost = LostTokens(taking.shelf, taking.cold, taking.frames, encoder)
    again = await lost.encode_again(recording, group, Model.of(CARD), Deadline.after(30))
    np.testing.assert_array_equal(again.values_TD, before.values_TD)
    assert await taking.cold.has(group.ref.key), "and are kept again"


async def test_tokens_whose_footage_is_gone_are_not_found(taking: Taking, tmp_path: Path) -> None:
    recording = await taking.take_in(write_clip(tmp_path / "a.mp4", 16.0), _MOVING)
    group = (await all_of(taking, recording))[0].groups[1]
    await taking.cold.forget_segments(recording.id)
    encoder = GroupEncoder(taking.cold, taking.hot, taking.vision, recovery_s=1.0)
    lost = LostTokens(taking.shelf, taking.cold, taking.frames, encoder)
    with pytest.raises(NotFound, match=r"of 8 to 15 s .* are lost, and the footage .* is not kept any more"):
        await lost.encode_again(recording, group, Model.of(CARD), Deadline.after(30))


async def test_deleting_leaves_what_another_recording_stands_on(taking: Taking, tmp_path: Path) -> None:
    long, short = write_clip(tmp_path / "a.mp4", 32.0), write_clip(tmp_path / "b.mp4", 16.0)
    keeper = await taking.take_in(short, _MOVING)
    goner = await taking.take_in(long, _MOVING)
    kept = {group.ref.key for chunk in await all_of(taking, keeper) for group in chunk.groups if group.ref}
    gone = {group.ref.key for chunk in await all_of(taking, goner) for group in chunk.groups if group.ref} - kept
    await taking.jobs.delete_recording(goner.id, tenant="acme")
    claim = await taking.claim(JobKind.DELETE)
    removed: list[str] = []
    result = await DeleteHandler(taking.cold, removed.append)(claim)
    await claim.finish(result)
    assert gone
    assert [await taking.cold.has(key) for key in sorted(kept)] == [True] * len(kept)
    assert [await taking.cold.has(key) for key in sorted(gone)] == [False] * len(gone)
    assert result["bytes_freed"] > 0
    assert removed == [goner.id]
    assert await taking.shelf.count_chunks(goner.id) == 0
    assert not (tmp_path / "cold" / "segments" / goner.id).exists()


def records_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cold" / "tokens").rglob("*") if path.is_file()}


async def test_a_deletion_in_the_middle_of_an_ingest_leaves_no_tokens(taking: Taking, tmp_path: Path) -> None:
    recording_id = await taking.submit(write_clip(tmp_path / "a.mp4", 64.0), ChunkPolicy(fps=1.0, chunk_s=64.0))
    claim = await taking.claim()
    work = asyncio.ensure_future(taking.handler()(claim))
    async with asyncio.timeout(30):
        while not records_in(tmp_path):
            await asyncio.sleep(0.005)
    work.cancel()
    await asyncio.wait({work})
    assert await taking.shelf.count_chunks(recording_id) == 0, "what is kept already is of no chunk yet"
    await taking.jobs.delete_recording(recording_id, tenant="acme")
    await claim.cancelled()
    await DeleteHandler(taking.cold, lambda recording_id: None)(await taking.claim(JobKind.DELETE))
    assert records_in(tmp_path) == set()


async def test_what_is_taken_in_while_its_like_is_deleted_keeps_its_tokens(taking: Taking, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 16.0)
    goner = await taking.take_in(clip, _MOVING)
    taking.hot.records.clear()
    await taking.jobs.delete_recording(goner.id, tenant="acme")
    removal = await taking.claim(JobKind.DELETE)
    begun: list[asyncio.Future[Recording]] = []

    class Slow(ColdStore):
        async def drop(self, keys: Iterable[str]) -> int:
            begun.append(asyncio.ensure_future(taking.take_in(clip, _MOVING)))
            await asyncio.sleep(1.0)
            return await super().drop(keys)

    await DeleteHandler(Slow(str(tmp_path / "cold")), lambda recording_id: None)(removal)
    (again,) = begun
    kept = {group.ref.key for chunk in await all_of(taking, await again) for group in chunk.groups if group.ref}
    assert kept
    assert records_in(tmp_path) == kept


@pytest.mark.slow
async def test_two_hours_need_no_more_memory_than_minutes(taking: Taking, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", 7200.0, fps=1, gop=30)
    process, seen = psutil.Process(), []
    recording_id = await taking.submit(clip, ChunkPolicy(fps=1.0, chunk_s=32.0, floor_s=86400.0))
    claim = await taking.claim()
    work = asyncio.ensure_future(taking.handler()(claim))
    while not work.done():
        await asyncio.sleep(0.5)
        written = await taking.shelf.count_chunks(recording_id)
        children = process.children(recursive=True)
        seen.append((written, process.memory_info().rss + sum(child.memory_info().rss for child in children)))
    await claim.finish(await work)
    recording = await taking.shelf.get(recording_id, tenant="acme")
    assert (recording.counters.chunks, recording.duration_s) == (225, 7200.0)
    early = max(used for written, used in seen if 20 <= written <= 60)
    late = max(used for written, used in seen if written > 150)
    assert late < early * 1.15, f"{early:,} bytes after minutes, {late:,} after hours"
