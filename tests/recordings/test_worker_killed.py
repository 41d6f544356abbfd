"""Real worker processes on one database, killed with SIGKILL again and again: every chunk once, every event once."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nvila.recordings.database import Database
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import Counters, Job, JobKind, JobState, RecordingState
from tests.recordings import made

CHUNKS, STEPS, KILLS = 200, 150, 4
PATIENCE_S = 120


class Workers:
    def __init__(self, url: str, count: int) -> None:
        self._url = url
        self.processes = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.recordings.working", self._url, f"worker-{number}"]
        return subprocess.Popen(command)

    def replace(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait(30)
        self.processes[number] = self._start(number)

    def end(self) -> list[int]:
        """Exit statuses after SIGTERM."""
        for process in self.processes:
            process.terminate()
        return [process.wait(30) for process in self.processes]


@contextmanager
def workers(url: str, count: int) -> Iterator[Workers]:
    started = Workers(url, count)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait(30)


@pytest.mark.slow
async def test_workers_killed_at_random_leave_each_chunk_and_each_event_once(database_url: str) -> None:
    database = Database.open(database_url)
    await database.migrate()
    jobs, store = JobStore(database), RecordingStore(database)
    recording = made.recording(created_at=time.time())
    ingest = await made.submit(jobs, kind=JobKind.INGEST, params={"chunks": CHUNKS}, recording=recording)
    summary = await made.submit(jobs, kind=JobKind.SUMMARY, params={"steps": STEPS}, recording_id=recording.id)
    order = random.Random(5)

    async def are_over() -> bool:
        return all([(await jobs.get(job.id, tenant="acme")).state.is_over for job in (ingest, summary)])

    async def done() -> int:
        return await store.count_chunks(recording.id) + len(await jobs.events_after(summary.id, tenant="acme"))

    kills = 0
    with workers(database_url, 2) as running:
        async with asyncio.timeout(PATIENCE_S):
            while not await are_over():
                so_far = await done()
                await asyncio.sleep(order.uniform(0.02, 0.1))
                if kills < KILLS and await done() > so_far:  # in the middle of work
                    await asyncio.to_thread(running.replace, kills % 2)
                    kills += 1
        statuses = await asyncio.to_thread(running.end)

    assert kills == KILLS
    assert statuses == [0, 0]
    await _is_whole(jobs, ingest, "chunk", CHUNKS)
    await _is_whole(jobs, summary, "part", STEPS)
    assert await store.chunks(recording.id) == [made.bare(made.chunk(recording.id, n)) for n in range(CHUNKS)]
    now = await store.get(recording.id, tenant="acme")
    assert (now.state, now.ingested_s) == (RecordingState.COMPLETE, CHUNKS * 10.0)
    assert now.counters == Counters(chunks=CHUNKS, frames_sampled=2 * CHUNKS)
    text = (await jobs.get(summary.id, tenant="acme")).result
    assert text == {"text": " ".join(f"part {number}" for number in range(STEPS))}
    await database.close()


async def _is_whole(jobs: JobStore, job: Job, kind: str, count: int) -> None:
    over = await jobs.get(job.id, tenant="acme")
    assert (over.state, over.error) == (JobState.DONE, "")
    events = await jobs.events_after(job.id, tenant="acme", limit=count * 2)
    assert [event.number for event in events] == list(range(1, count + 2))
    assert [event.data["number"] for event in events if event.kind == kind] == list(range(count))
    assert events[-1].kind == "done"
