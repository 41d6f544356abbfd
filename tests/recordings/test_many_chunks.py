"""Ten thousand chunks, four days at 32 s each: what people look at stays usable, and costs what it is long.

Bounds are seconds of this process's own work, several times what it takes on a small machine.
"""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nvila.gateway.playing import Player
from nvila.gateway.recordings import Recordings
from nvila.model.config import NvilaConfig
from nvila.recordings import schema
from nvila.recordings.asking import Asked, Piece, Steps, pieces
from nvila.recordings.captions import say_of_each
from nvila.recordings.cold import ColdStore
from nvila.recordings.database import Database
from nvila.recordings.inbox import Inbox
from nvila.recordings.jobs import JobStore
from nvila.recordings.planner import Budget
from nvila.recordings.search import SimilaritySearch
from nvila.recordings.store import RecordingStore, pack_chunk
from nvila.recordings.timeline import events_of
from nvila.recordings.types import ChunkPolicy, Group, Job, JobKind, RecordedChunk, Recording, RecordingState
from nvila.recordings.when import intervals_of
from nvila.recordings.window import lay_window
from nvila.types import Gap, Level, RecordingWindow, TokensRef
from tests.recordings import made
from tests.recordings.taking import CARD

COUNT = 10_000
CHUNK_S = 32.0
WIDTH = 64
GROUPS = 4
VECTORS = np.random.default_rng(0).normal(size=(COUNT, WIDTH)).astype("<f4")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    gc.collect()
    gc.disable()  # a collection looks through all that the tests before have left, for more than a second
    try:
        began = time.process_time()
        yield
        took_s = time.process_time() - began
    finally:
        gc.enable()
    assert took_s < seconds, f"{took_s:.2f} s"


def chunk(recording_id: str, number: int) -> RecordedChunk:
    """Every third has a gap, every fifth is still."""
    start_s = number * CHUNK_S
    levels = (Level(1, 256),)
    groups = tuple(
        Group(
            times_s=tuple(start_s + 8.0 * place + second for second in range(8)),
            segment=0,
            indices=tuple(range(8)),
            ref=TokensRef(key=f"{number * GROUPS + place:064x}", levels=levels),
            is_static=number % 5 == 0,
        )
        for place in range(GROUPS)
    )
    gaps = (Gap(start_s=start_s + 30, end_s=start_s + 31, reason="away"),) if number % 3 == 0 else ()
    return RecordedChunk(
        recording_id=recording_id,
        number=number,
        start_s=start_s,
        end_s=start_s + CHUNK_S,
        groups=groups,
        gaps=gaps,
    )


@pytest.fixture(scope="module")
async def database(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Database]:
    opened = Database.open(f"sqlite:///{tmp_path_factory.mktemp('many')}/recordings.db")
    await opened.migrate()
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
async def recording(database: Database) -> Recording:
    """Of all the chunks, each with a vector."""
    whole_s = COUNT * CHUNK_S
    policy = ChunkPolicy(chunk_s=CHUNK_S)
    new = replace(made.recording(), policy=policy, state=RecordingState.COMPLETE, ingested_s=whole_s)
    await made.submit(JobStore(database), kind=JobKind.INGEST, recording=new)
    chunks = [chunk(new.id, number) for number in range(COUNT)]
    async with database.write() as connection:
        rows = [
            {
                "recording_id": one.recording_id,
                "number": one.number,
                "start_s": one.start_s,
                "end_s": one.end_s,
                "body": pack_chunk(one),
            }
            for one in chunks
        ]
        await connection.execute(schema.chunks.insert(), rows)
        await connection.execute(
            schema.chunk_vectors.insert(),
            [
                {"recording_id": new.id, "number": number, "vector": vector.tobytes()}
                for number, vector in enumerate(VECTORS)
            ],
        )
    return new


@pytest.fixture
def store(database: Database) -> RecordingStore:
    return RecordingStore(database)


async def test_a_page_costs_the_same_at_the_beginning_and_at_the_end(
    store: RecordingStore, recording: Recording
) -> None:
    for after in (None, COUNT - 200):
        with within(0.5):
            page = await store.chunks(recording.id, after=after, limit=101)
        first = 0 if after is None else after + 1
        assert [one.number for one in page] == list(range(first, first + 101))
    with within(0.5):
        (there,) = await store.chunks(recording.id, start_s=8_000 * CHUNK_S + 1, limit=1)
        last = await store.last_chunk(recording.id)
        count = await store.count_chunks(recording.id)
    assert there.number == 8_000
    assert last is not None
    assert (last.number, count) == (COUNT - 1, COUNT)


async def test_coverage_of_all_of_it_is_one_look(
    database: Database, store: RecordingStore, recording: Recording, tmp_path: Path
) -> None:
    seen_by = Recordings(
        shelf=store,
        jobs=JobStore(database),
        files=None,  # type: ignore[arg-type]  # not looked at
        inbox=Inbox(tmp_path),
        player=Player(ColdStore(str(tmp_path / "cold")), tmp_path / "playing"),
    )
    with within(8):
        seen = await seen_by.coverage("acme", recording.id, None, None)
    assert (seen.chunks, seen.frames) == (COUNT, COUNT * GROUPS * 8)
    assert (len(seen.gaps), len(seen.static)) == (-(-COUNT // 3), COUNT // 5)


async def test_the_likest_chunks_are_found_at_once_when_the_index_is_there(
    store: RecordingStore, recording: Recording
) -> None:
    class Words:
        async def embed(self, text: str) -> NDArray[np.float32]:
            wanted_D: NDArray[np.float32] = VECTORS[int(text)] / np.linalg.norm(VECTORS[int(text)])
            return wanted_D

    search = SimilaritySearch(store, Words())
    window = RecordingWindow(recording_id=recording.id)
    with within(30):
        (first, *_) = await search.most_like("7777", window, "acme", 5)
    with within(5):
        (again, *_) = await search.most_like("1234", window, "acme", 5)
    assert (first.chunk, again.chunk) == (7777, 1234)


async def test_a_window_of_all_of_it_is_planned(store: RecordingStore, recording: Recording) -> None:
    config = NvilaConfig.from_json(CARD.config_json)
    chunks = await store.chunks(recording.id)
    budget = Budget.of(config, longest=CARD.max_model_len, text=100, answer=100)
    with within(10):
        window = lay_window(recording, 0.0, COUNT * CHUNK_S, chunks, budget, config)
    assert window.is_in_parts
    assert len(window.groups) == COUNT * GROUPS
    assert sum(len(stretch.blocks) for stretch in window.planned.stretches) == COUNT * GROUPS


class _Held:
    """A claim that keeps what is written."""

    def __init__(self) -> None:
        self.kept: dict[str, Mapping[str, Any]] = {}
        self.events = 0

    @property
    def job(self) -> Job:
        raise AssertionError("not looked at")

    async def checkpoints(self) -> Mapping[str, Mapping[str, Any]]:
        return self.kept

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[_Held]:
        yield self

    async def checkpoint(self, step: str, payload: Mapping[str, Any]) -> bool:
        self.kept[step] = payload
        return True

    async def event(self, kind: str, data: Mapping[str, Any]) -> int:
        self.events += 1
        return self.events

    async def progress(self, data: Mapping[str, Any]) -> None:
        await self.event("progress", data)


async def test_timelines_and_when_questions_grow_with_the_chunks(store: RecordingStore, recording: Recording) -> None:
    window = RecordingWindow(recording_id=recording.id, start_s=0.0, end_s=COUNT * CHUNK_S)
    with within(10):
        found = await pieces(store, window)
    asked = Asked(window=window, captured_at=0.0, pieces=found)
    assert len(found) == COUNT

    async def say(piece: Piece) -> Mapping[str, Any]:
        return {"label": f"scene {piece.number // 2}", "happens": piece.number % 7 < 3}

    claim = _Held()
    with within(20):
        told = await say_of_each(Steps(claim, {}), found, say, holds=("label", "happens"), at_once=2)
    with within(5):
        events = events_of(told, asked)
        intervals = intervals_of(told, asked)
    assert (len(claim.kept), claim.events) == (COUNT, 2 * COUNT)
    assert len(events) == COUNT // 2
    assert COUNT // 7 < len(intervals) < COUNT // 2


async def test_lists_of_jobs_do_not_carry_their_results(database: Database) -> None:
    jobs = JobStore(database)
    job = await made.submit(jobs, kind=JobKind.TIMELINE)
    claim = await made.claim(jobs, "w", JobKind.TIMELINE)
    await claim.finish({"events": [{"start_s": number, "label": "x" * 100} for number in range(COUNT)]})

    (listed,) = (await jobs.list(tenant="acme", kind=JobKind.TIMELINE)).items
    assert listed == replace(await jobs.get(job.id, tenant="acme"), result=None)
    assert len((await jobs.get(job.id, tenant="acme")).result or {}) == 1
