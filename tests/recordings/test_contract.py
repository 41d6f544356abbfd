"""The contract of crash-safe jobs: stable id, input fingerprint, fencing token, immutable checkpoints; and its three
failure windows: death after a checkpoint's commit, death between the result's commit and its acknowledgement, and a
zombie that comes back after its lease was taken over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nvila.errors import Unavailable
from nvila.recordings.claims import CheckpointConflict, Claim, LeaseLost
from nvila.recordings.job_rows import NewJob
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import ChunkConflict, RecordingStore
from nvila.recordings.types import Counters, JobKind, JobState, RecordingState, Segment
from tests.recordings import made
from tests.recordings.made import Clock


async def take_over(jobs: JobStore, clock: Clock) -> tuple[Claim, Claim]:
    """(the first worker's claim, whose lease ran out; the second worker's)."""
    zombie = await made.claim(jobs, "worker-1", lease_s=30)
    clock.now += 31
    return zombie, await made.claim(jobs, "worker-2")


# -- window 1: death after a checkpoint's commit


async def test_the_next_attempt_finds_the_checkpoints_of_the_one_that_died(jobs: JobStore, clock: Clock) -> None:
    job = await made.submit(jobs, params={"q": "?"})
    died = await made.claim(jobs)
    await died.checkpoint("map/1", {"text": "b"})
    clock.now += 1
    await died.checkpoint("map/0", {"text": "a"})
    clock.now += 31

    again = await made.claim(jobs)

    assert again.job.id == job.id
    assert again.job.params == {"q": "?"}
    assert list((await again.checkpoints()).items()) == [("map/1", {"text": "b"}), ("map/0", {"text": "a"})]


async def test_a_chunk_written_before_death_is_there_once_and_counted_once(
    jobs: JobStore, store: RecordingStore, clock: Clock
) -> None:
    recording = made.recording()
    await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
    chunk, counters = made.chunk(recording.id, 0), Counters(chunks=1, frames_sampled=10)
    died = await made.claim(jobs)
    assert await died.add_chunk(chunk, counters)
    clock.now += 31

    again = await made.claim(jobs)

    assert not await again.add_chunk(chunk, counters)
    assert await store.chunks(recording.id) == [made.bare(chunk)]
    assert (await store.get(recording.id, tenant="acme")).counters == counters


async def test_a_step_is_kept_once_and_never_with_another_payload(jobs: JobStore) -> None:
    await made.submit(jobs)
    claim = await made.claim(jobs)
    await claim.checkpoint("map/0", {"text": "a", "n": 1})
    await claim.checkpoint("map/0", {"n": 1, "text": "a"})

    with pytest.raises(CheckpointConflict):
        await claim.checkpoint("map/0", {"text": "b", "n": 1})

    assert await claim.checkpoints() == {"map/0": {"text": "a", "n": 1}}


async def test_a_number_is_never_written_with_another_content(jobs: JobStore, store: RecordingStore) -> None:
    recording = made.recording()
    await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
    claim = await made.claim(jobs)
    segment = Segment(
        recording_id=recording.id, number=0, path="0.mp4", start_s=0, duration_s=9, size_bytes=3, digest="d"
    )
    await claim.add_chunk(made.chunk(recording.id, 0))
    assert await claim.add_segment(segment)
    assert not await claim.add_segment(segment)

    with pytest.raises(ChunkConflict):
        await claim.add_chunk(made.chunk(recording.id, 0, key="another"))
    with pytest.raises(ChunkConflict):
        await claim.add_segment(replace(segment, digest="e"))

    assert await store.chunks(recording.id) == [made.bare(made.chunk(recording.id, 0))]
    assert await store.segments(recording.id) == [segment]


# -- window 2: death after the result's commit, before anybody heard of it


async def test_a_job_whose_result_is_there_is_never_begun_again(jobs: JobStore, clock: Clock) -> None:
    job = await made.submit(jobs)
    claim = await made.claim(jobs)
    await claim.finish({"answer": 42})
    clock.now += 1000  # the worker died here

    assert await jobs.claim("worker-2", tuple(JobKind), 30) is None

    done = await jobs.get(job.id, tenant="acme")
    assert (done.state, done.result) == (JobState.DONE, {"answer": 42})
    assert [event.kind for event in await jobs.events_after(job.id, tenant="acme")] == ["done"]


async def test_an_end_is_told_once(jobs: JobStore) -> None:
    job = await made.submit(jobs)
    claim = await made.claim(jobs)
    await claim.finish({"answer": 42})

    for again in (claim.finish({"answer": 43}), claim.fail(Unavailable("late"), retry=True), claim.cancelled()):
        with pytest.raises(LeaseLost):
            await again

    assert (await jobs.get(job.id, tenant="acme")).result == {"answer": 42}


async def test_result_and_what_belongs_to_it_are_there_together_or_not_at_all(
    jobs: JobStore, store: RecordingStore
) -> None:
    recording = made.recording()
    await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
    claim = await made.claim(jobs)

    async def die_before_commit() -> None:
        async with claim.transaction() as now:
            await now.add_chunk(made.chunk(recording.id, 0), Counters(chunks=1))
            await now.update_recording(state=RecordingState.COMPLETE)
            await now.event("chunk", {"number": 0})
            await now.end(JobState.DONE, result={})
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        await die_before_commit()

    assert await store.chunks(recording.id) == []
    assert (await store.get(recording.id, tenant="acme")).state is RecordingState.WAITING
    assert (await jobs.get(claim.job.id, tenant="acme")).state is JobState.RUNNING
    assert await jobs.events_after(claim.job.id, tenant="acme") == []


# -- window 3: a zombie after its lease was taken over


async def test_a_zombie_writes_nothing(jobs: JobStore, store: RecordingStore, clock: Clock) -> None:
    recording = made.recording()
    job = await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
    zombie, _ = await take_over(jobs, clock)

    for attempt in (
        zombie.renew(),
        zombie.checkpoint("late", {}),
        zombie.event("late", {}),
        zombie.progress({"late": True}),
        zombie.add_chunk(made.chunk(recording.id, 0), Counters(chunks=1)),
        zombie.update_recording(state=RecordingState.FAILED),
        zombie.submit(NewJob(kind=JobKind.DELIVER, params={}, fingerprint="late")),
        zombie.fail(Unavailable("late"), retry=False),
        zombie.release(),
        zombie.cancelled(),
        zombie.finish({"late": True}),
    ):
        with pytest.raises(LeaseLost):
            await attempt

    assert await store.chunks(recording.id) == []
    assert (await store.get(recording.id, tenant="acme")) == recording
    now = await jobs.get(job.id, tenant="acme")
    assert (now.state, now.progress, now.result) == (JobState.RUNNING, {}, None)
    assert await jobs.events_after(job.id, tenant="acme") == []
    assert [listed.id for listed in (await jobs.list(tenant="acme")).items] == [job.id]


async def test_a_zombie_is_told_to_stop(jobs: JobStore, clock: Clock) -> None:
    await made.submit(jobs)
    zombie, heir = await take_over(jobs, clock)

    assert await jobs.interrupted([zombie]) == {zombie.job.id: False}
    assert await jobs.interrupted([heir]) == {}
    assert heir.fence > zombie.fence


async def test_what_the_zombie_was_about_to_say_the_heir_says(jobs: JobStore, clock: Clock) -> None:
    job = await made.submit(jobs)
    zombie = await made.claim(jobs, lease_s=30)
    await zombie.event("delta", {"text": "one"})
    clock.now += 31
    heir = await made.claim(jobs)
    with pytest.raises(LeaseLost):
        await zombie.event("delta", {"text": "two"})
    await heir.event("delta", {"text": "two"})
    await heir.finish({})

    events = await jobs.events_after(job.id, tenant="acme")

    assert [(event.number, event.kind) for event in events] == [(1, "delta"), (2, "delta"), (3, "done")]


async def test_a_lease_that_is_renewed_is_not_taken_over(jobs: JobStore, clock: Clock) -> None:
    await made.submit(jobs)
    holder = await made.claim(jobs, lease_s=30)
    for _ in range(10):
        clock.now += 20
        await holder.renew()
        assert await jobs.claim("worker-2", tuple(JobKind), 30) is None

    await holder.finish({})


# -- attempts


async def test_a_job_that_kills_its_worker_at_the_same_place_is_dead_in_the_end(jobs: JobStore, clock: Clock) -> None:
    job = await made.submit(jobs, max_attempts=3)
    for _ in range(3):
        await made.claim(jobs)
        clock.now += 31

    assert await jobs.claim("worker", tuple(JobKind), 30) is None

    dead = await jobs.get(job.id, tenant="acme")
    assert (dead.state, dead.attempt, dead.error_code) == (JobState.FAILED, 3, "unavailable")
    assert "3 times in a row" in dead.error


async def test_a_job_that_gets_further_may_be_interrupted_any_number_of_times(jobs: JobStore, clock: Clock) -> None:
    job = await made.submit(jobs, max_attempts=2)
    for step in range(20):
        claim = await made.claim(jobs)
        assert len(await claim.checkpoints()) == step
        await claim.checkpoint(f"step/{step}", {})
        clock.now += 31

    await (await made.claim(jobs)).finish({})

    assert (await jobs.get(job.id, tenant="acme")).state is JobState.DONE
