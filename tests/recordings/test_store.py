"""Recordings, segments and chunks in the database; and the database itself, shared by processes, killed, away."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from nvila.errors import InvalidRequest, NotFound, Unavailable
from nvila.recordings import schema
from nvila.recordings.database import Database
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import RecordingStore, Usage, pack_chunk
from nvila.recordings.types import Counters, JobKind, RecordingState, Segment, Source, SourceKind
from tests.recordings import made
from tests.recordings.postgres import PostgresServer


async def filled(jobs: JobStore, chunks: int, tenant: str = "acme") -> str:
    recording = made.recording(tenant)
    await made.submit(jobs, tenant=tenant, kind=JobKind.INGEST, recording=recording)
    claim = await made.claim(jobs)
    async with claim.transaction() as now:
        for number in range(chunks):
            await now.add_chunk(made.chunk(recording.id, number), Counters(chunks=1))
        await now.update_recording(ingested_s=chunks * 10.0)
    return recording.id


# -- recordings


async def test_a_recording_comes_back_as_it_was_made(jobs: JobStore, store: RecordingStore) -> None:
    recording = replace(
        made.recording(kind=SourceKind.RTSP, created_at=1.5),
        source=Source(kind=SourceKind.RTSP, url="rtsp://yard/1", secret="user:pass"),
        metadata={"site": "Köln"},
        captured_at=1_700_000_000.25,
    )
    await made.submit(jobs, kind=JobKind.INGEST, recording=recording)

    found = await store.get(recording.id, tenant="acme")

    assert found == recording
    assert "pass" not in repr(found)


async def test_a_new_database_file_is_its_owners_alone(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/data/recordings.db")
    await database.migrate()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "data").iterdir()}
    await database.close()
    assert modes["recordings.db"] == 0o600
    assert set(modes.values()) == {0o600}


async def test_another_tenants_recording_does_not_exist(jobs: JobStore, store: RecordingStore) -> None:
    theirs = await filled(jobs, 1, tenant="other")

    with pytest.raises(NotFound):
        await store.get(theirs, tenant="acme")
    with pytest.raises(NotFound):
        await store.update(theirs, tenant="acme", name="mine")
    assert (await store.list(tenant="acme")).items == []


async def test_an_id_that_no_database_could_hold_is_an_error_of_the_request(
    jobs: JobStore, store: RecordingStore
) -> None:
    with pytest.raises((NotFound, InvalidRequest)):
        await store.get("rec_\0", tenant="acme")
    with pytest.raises((NotFound, InvalidRequest)):
        await jobs.cancel("job_\0", tenant="acme")
    with pytest.raises((NotFound, InvalidRequest)):
        await made.submit(jobs, recording_id="rec_\0")


async def test_a_recordings_name_and_metadata_can_be_changed(jobs: JobStore, store: RecordingStore) -> None:
    recording_id = await filled(jobs, 0)

    await store.update(recording_id, tenant="acme", name="gate", metadata={"a": "b"})
    found = await store.update(recording_id, tenant="acme")

    assert (found.name, found.metadata) == ("gate", {"a": "b"})


async def test_lists_can_be_narrowed(jobs: JobStore, store: RecordingStore) -> None:
    for number, kind in enumerate((SourceKind.FILE, SourceKind.RTSP, SourceKind.FILE)):
        await made.submit(jobs, kind=JobKind.INGEST, recording=made.recording(kind=kind, created_at=float(number)))

    files = await store.list(tenant="acme", kind=SourceKind.FILE)
    one = await store.list(tenant="acme", limit=1)
    rest = await store.list(tenant="acme", cursor=one.next_cursor)

    assert [found.created_at for found in files.items] == [2.0, 0.0]
    assert [found.created_at for found in (*one.items, *rest.items)] == [2.0, 1.0, 0.0]
    assert (await store.list(tenant="acme", state=RecordingState.LIVE)).items == []


async def test_usage_is_counted(jobs: JobStore, store: RecordingStore) -> None:
    await filled(jobs, 3)
    await made.submit(jobs, kind=JobKind.INGEST, recording=made.recording(kind=SourceKind.PUSH))

    assert await store.usage(tenant="acme") == Usage(recordings=2, live=1, queued_jobs=1, seconds=30.0, bytes_cold=0)


# -- chunks


@pytest.mark.parametrize(
    ("start_s", "end_s", "numbers"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (10.0, 30.0, [1, 2]),
        (9.99, 30.01, [0, 1, 2, 3]),
        (49.0, None, [4]),
        (50.0, 60.0, []),
        (None, 0.0, []),
    ],
)
async def test_a_window_has_the_chunks_that_reach_into_it(
    jobs: JobStore, store: RecordingStore, start_s: float | None, end_s: float | None, numbers: list[int]
) -> None:
    recording_id = await filled(jobs, 5)

    found = await store.chunks(recording_id, start_s=start_s, end_s=end_s)
    vectors = await store.vectors(recording_id, start_s=start_s, end_s=end_s)

    assert found == [made.bare(made.chunk(recording_id, number)) for number in numbers]
    assert vectors == [(number, bytes([number] * 8)) for number in numbers]
    assert await store.count_chunks(recording_id, start_s=start_s, end_s=end_s) == len(numbers)


async def test_chunks_are_found_one_by_one(jobs: JobStore, store: RecordingStore) -> None:
    recording_id = await filled(jobs, 3)

    assert (await store.chunk(recording_id, 1)).start_s == 10.0
    last = await store.last_chunk(recording_id)
    assert last is not None
    assert last.number == 2
    assert await store.thumbnail(recording_id, 2) == b"\xff\xd8\x02"
    assert [chunk.number for chunk in await store.chunks(recording_id, after=0, limit=1)] == [1]
    for ask in (store.chunk, store.thumbnail, store.segment):
        with pytest.raises(NotFound):
            await ask(recording_id, 3)
    assert await store.last_chunk("rec_none") is None


async def test_ten_thousand_chunks_are_listed_and_windowed_quickly(
    database: Database, jobs: JobStore, store: RecordingStore
) -> None:
    recording_id = await filled(jobs, 0)
    chunks = [made.chunk(recording_id, number) for number in range(10_000)]
    async with database.write() as connection:  # all at once, to save the test's time
        rows = [
            {
                "recording_id": recording_id,
                "number": chunk.number,
                "start_s": chunk.start_s,
                "end_s": chunk.end_s,
                "body": pack_chunk(chunk),
            }
            for chunk in chunks
        ]
        await connection.execute(schema.chunks.insert(), rows)

    began = time.perf_counter()
    everything = await store.chunks(recording_id)
    listed_s = time.perf_counter() - began
    began = time.perf_counter()
    window = await store.chunks(recording_id, start_s=50_000, end_s=50_300)
    windowed_s = time.perf_counter() - began

    assert everything == [made.bare(chunk) for chunk in chunks]
    assert [chunk.number for chunk in window] == list(range(5_000, 5_030))
    assert listed_s < 5, "about 0.2 s on an idle machine"
    assert windowed_s < 0.5, "about 2 ms on an idle machine"


async def test_segments_are_found_by_window(jobs: JobStore, store: RecordingStore) -> None:
    recording = made.recording()
    await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
    claim = await made.claim(jobs)
    kept = [
        Segment(
            recording_id=recording.id, number=n, path=f"{n}.mp4", start_s=n * 60, duration_s=50, size_bytes=9, digest=""
        )
        for n in range(3)
    ]
    for segment in kept:
        await claim.add_segment(segment)

    assert await store.segments(recording.id) == kept
    assert await store.segments(recording.id, start_s=55, end_s=120) == [kept[1]]
    assert await store.segment(recording.id, 2) == kept[2]


async def test_old_footage_is_that_of_live_recordings_that_are_over_and_is_told_once(
    jobs: JobStore, store: RecordingStore
) -> None:
    made_at = 1_800_000_000.0
    camera, pushed, runs, file = (
        made.recording(kind=kind, created_at=made_at)
        for kind in (SourceKind.RTSP, SourceKind.PUSH, SourceKind.RTSP, SourceKind.FILE)
    )
    for one, captured_at in ((camera, made_at + 100), (pushed, 5.0), (runs, made_at), (file, made_at)):
        await made.submit(jobs, kind=JobKind.INGEST, recording=one)
        claim = await made.claim(jobs)
        for number in range(2):
            segment = Segment(
                recording_id=one.id,
                number=number,
                path=f"segments/{number}",
                start_s=number * 10.0,
                duration_s=10.0,
                size_bytes=1,
                digest="",
            )
            await claim.add_segment(segment)
        state = RecordingState.LIVE if one is runs else RecordingState.COMPLETE
        await claim.update_recording(captured_at=captured_at, state=state)

    async def old(ended_before: float) -> set[tuple[str, int]]:
        return {(one.recording_id, one.number) for one in await store.old_footage(ended_before, limit=10)}

    assert await old(made_at + 15) == {(pushed.id, 0)}, "its clock is the client's, and was long ago when it came"
    assert await old(made_at + 115) == {(pushed.id, 0), (pushed.id, 1), (camera.id, 0)}
    await store.forget_path(await store.segment(pushed.id, 0))
    assert await old(made_at + 115) == {(pushed.id, 1), (camera.id, 0)}


async def test_what_a_worker_says_of_a_recording_is_shown(jobs: JobStore, store: RecordingStore) -> None:
    recording = made.recording(kind=SourceKind.RTSP)
    await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
    claim = await made.claim(jobs)

    async with claim.transaction() as now:
        await now.update_recording(state=RecordingState.LIVE, captured_at=5.0, duration_s=60.0)
        await now.add_counters(Counters(reconnects=1, frames_dropped=7))
        await now.add_counters(Counters(reconnects=1))

    found = await store.get(recording.id, tenant="acme")
    assert (found.state, found.captured_at, found.duration_s) == (RecordingState.LIVE, 5.0, 60.0)
    assert found.counters == Counters(reconnects=2, frames_dropped=7)


# -- migrations


async def test_migrations_make_exactly_the_tables_that_the_program_knows(database: Database) -> None:
    def differences(connection: Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection), schema.metadata)

    async with database.read() as connection:
        assert await connection.run_sync(differences) == []


async def test_processes_that_start_together_migrate_one_after_the_other(database_url: str) -> None:
    together = [Database.open(database_url) for _ in range(8)]

    await asyncio.gather(*(database.migrate() for database in together))

    async with together[0].read() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM alembic_version"))).scalar_one() == 1
    for database in together:
        await database.close()


async def test_a_newer_databases_older_program_stops_instead_of_guessing(database: Database) -> None:
    async with database.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(Exception, match="9999"):
        await database.migrate()


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected sqlite:///… or postgresql://…, got mysql"):
        Database.open("mysql://user:secret@host/db")


# -- away, shared, killed


async def test_a_postgresql_that_goes_away_is_unavailable_and_used_again_when_it_is_back() -> None:
    server = PostgresServer()
    server.start()
    database = Database.open(server.new_database(), wait_s=5)
    try:
        await database.migrate()
        jobs = JobStore(database)
        job = await made.submit(jobs)
        server.stop(signal.SIGQUIT)
        with pytest.raises(Unavailable):
            await jobs.get(job.id, tenant="acme")
        with pytest.raises(Unavailable):
            await jobs.claim("worker", (JobKind.ASK,), 30)

        server.start()

        assert (await made.claim(jobs)).job.id == job.id
    finally:
        await database.close()
        server.remove()


async def test_a_database_that_could_not_be_brought_up_to_date_is_not_used_before_it_is(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/r.db", wait_s=0.1)
    other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Unavailable):
        await database.migrate()
    other.execute("ROLLBACK")
    other.close()
    with pytest.raises(Unavailable):
        await made.submit(JobStore(database))
    with pytest.raises(Unavailable):
        await database.ping()

    await database.migrate()
    await made.submit(JobStore(database))
    await database.close()


async def test_a_writer_that_waits_too_long_for_its_turn_says_so(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/r.db", wait_s=0.1)
    await database.migrate()
    other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(Unavailable):
        await made.submit(JobStore(database))
    await database.ping()  # readers do not wait

    other.execute("ROLLBACK")
    other.close()
    await made.submit(JobStore(database))
    await database.close()


WORKING_PROCESS = """
import asyncio, sys
from nvila.recordings.database import Database
from nvila.recordings.jobs import JobStore
from nvila.recordings.types import JobKind

async def main(url, name):
    database = Database.open(url)
    await database.migrate()
    jobs = JobStore(database)
    while (claim := await jobs.claim(name, tuple(JobKind), 30)) is not None:
        for step in range(3):
            await claim.checkpoint(f"step/{step}", {"by": name})
        await claim.finish({"by": name})
    await database.close()

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


async def test_several_processes_share_one_database_without_errors(database_url: str) -> None:
    database = Database.open(database_url)
    await database.migrate()
    jobs = JobStore(database)
    submitted = [await made.submit(jobs) for _ in range(30)]
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", WORKING_PROCESS, database_url, f"process-{n}"])
        for n in range(3)
    ]
    ends = [await asyncio.to_thread(process.wait, 60) for process in processes]

    assert ends == [0, 0, 0]
    for job in submitted:
        done = await jobs.get(job.id, tenant="acme")
        assert (done.fence, done.state) == (1, "done")
        assert done.result is not None
        assert isinstance(done.result, Mapping)
    await database.close()
