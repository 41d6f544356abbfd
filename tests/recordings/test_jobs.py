"""Jobs as clients and workers see them: submitted once, each in its turn, cancelled, dead, retried, followed."""

from __future__ import annotations

import asyncio
import base64
import tracemalloc
from collections.abc import Sequence

import pytest
from sqlalchemy import String, cast, literal, select, true

from nvila.errors import Conflict, InvalidRequest, LimitExceeded, NotFound, Overloaded, Unavailable
from nvila.recordings import schema
from nvila.recordings.claims import Claim
from nvila.recordings.database import Database
from nvila.recordings.job_rows import NewJob
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import Quota, RecordingStore
from nvila.recordings.types import JobKind, JobState, RecordingState, SourceKind
from tests.recordings import made
from tests.recordings.made import Clock

ALL = tuple(JobKind)


# -- submitting


async def test_the_same_idempotency_key_gives_the_same_job_and_recording(jobs: JobStore, store: RecordingStore) -> None:
    first = await made.submit(jobs, kind=JobKind.INGEST, idempotency_key="k", recording=made.recording())
    again = await made.submit(jobs, kind=JobKind.INGEST, idempotency_key="k", recording=made.recording())

    assert again == first
    assert [found.id for found in (await store.list(tenant="acme")).items] == [first.recording_id]


async def test_an_idempotency_key_stands_for_one_request(jobs: JobStore) -> None:
    await made.submit(jobs, idempotency_key="k", fingerprint="one")

    with pytest.raises(Conflict, match="used for another request"):
        await made.submit(jobs, idempotency_key="k", fingerprint="two")


async def test_an_idempotency_key_is_its_tenants(jobs: JobStore) -> None:
    mine = await made.submit(jobs, idempotency_key="k")
    theirs = await made.submit(jobs, tenant="other", idempotency_key="k", fingerprint="another")

    assert mine.id != theirs.id


async def test_a_storm_of_the_same_request_makes_one_job(jobs: JobStore) -> None:
    storm = await asyncio.gather(*(made.submit(jobs, idempotency_key="k") for _ in range(20)))

    assert len({job.id for job in storm}) == 1
    assert len((await jobs.list(tenant="acme")).items) == 1


async def test_a_job_about_another_tenants_recording_is_not_taken(jobs: JobStore) -> None:
    theirs = await made.submit(jobs, tenant="other", kind=JobKind.INGEST, recording=made.recording("other"))

    with pytest.raises(NotFound):
        await made.submit(jobs, recording_id=theirs.recording_id)


async def test_another_tenants_job_does_not_exist(jobs: JobStore) -> None:
    theirs = await made.submit(jobs, tenant="other")

    for ask in (jobs.get, jobs.cancel, jobs.retry_dead, jobs.events_after):
        with pytest.raises(NotFound):
            await ask(theirs.id, tenant="acme")
    assert (await jobs.list(tenant="acme")).items == []
    assert await jobs.get(theirs.id, tenant="other") == theirs


async def test_quotas_hold_even_for_requests_at_the_same_time(jobs: JobStore) -> None:
    quota = Quota(recordings=3, live=2, queued_jobs=5)

    async def add(kind: SourceKind) -> object:
        try:
            return await made.submit(jobs, kind=JobKind.INGEST, recording=made.recording(kind=kind), quota=quota)
        except LimitExceeded as error:
            return error.message

    cameras = await asyncio.gather(*(add(SourceKind.RTSP) for _ in range(4)))
    files = await asyncio.gather(*(add(SourceKind.FILE) for _ in range(3)))

    assert (
        sorted(answer for answer in cameras if isinstance(answer, str))
        == ["live recordings: 3 asked, at most 2 allowed"] * 2
    )
    assert [answer for answer in files if isinstance(answer, str)] == ["recordings: 4 asked, at most 3 allowed"] * 2
    for _ in range(2):
        await made.submit(jobs, quota=quota)
    with pytest.raises(Overloaded, match="5 jobs are waiting"):
        await made.submit(jobs, quota=quota)


# -- turns


async def test_the_oldest_job_that_may_begin_is_begun_first(jobs: JobStore, clock: Clock) -> None:
    later = await made.submit(jobs, not_before=clock.now + 60)
    clock.now += 1
    first = await made.submit(jobs)
    clock.now += 1
    second = await made.submit(jobs)

    assert [(await made.claim(jobs)).job.id for _ in range(2)] == [first.id, second.id]
    assert await jobs.claim("worker", ALL, 30) is None
    clock.now += 60
    assert (await jobs.claim("worker", (JobKind.WATCH,), 30)) is None
    assert (await made.claim(jobs)).job.id == later.id


async def test_a_tenant_with_a_thousand_jobs_does_not_starve_another(jobs: JobStore, clock: Clock) -> None:
    await asyncio.gather(*(made.submit(jobs, tenant="flood") for _ in range(200)))
    clock.now += 60
    await made.submit(jobs, tenant="small")

    with_many_slots = [(await made.claim(jobs)).job.tenant for _ in range(2)]

    assert sorted(with_many_slots) == ["flood", "small"]


async def test_with_a_single_slot_tenants_take_turns(jobs: JobStore, clock: Clock) -> None:
    for _ in range(6):
        await made.submit(jobs, tenant="flood")
    for tenant in ("b", "c"):
        clock.now += 1
        await made.submit(jobs, tenant=tenant)
    turns = []
    for _ in range(5):
        clock.now += 1
        claim = await made.claim(jobs)
        turns.append(claim.job.tenant)
        await claim.finish({})

    assert turns == ["flood", "b", "c", "flood", "flood"]


async def test_long_cameras_of_a_tenant_do_not_hold_up_its_questions(jobs: JobStore, clock: Clock) -> None:
    for _ in range(3):
        await made.submit(jobs, kind=JobKind.INGEST, recording=made.recording(kind=SourceKind.RTSP))
        await made.claim(jobs, "worker", JobKind.INGEST)
    for _ in range(2):
        await made.submit(jobs, tenant="other")
    assert (await made.claim(jobs)).job.tenant == "other"
    clock.now += 1
    await made.submit(jobs)

    assert [(await made.claim(jobs)).job.tenant for _ in range(2)] == ["acme", "other"]


async def test_many_workers_never_get_the_same_job(jobs: JobStore) -> None:
    submitted = {(await made.submit(jobs)).id for _ in range(40)}

    async def work(name: str) -> list[str]:
        mine = []
        while (claim := await jobs.claim(name, ALL, 30)) is not None:
            mine.append(claim.job.id)
            await claim.finish({})
        return mine

    done = await asyncio.gather(*(work(f"worker-{n}") for n in range(6)))

    assert sorted(job_id for mine in done for job_id in mine) == sorted(submitted)


# -- ends


async def test_a_waiting_job_is_cancelled_at_once(jobs: JobStore) -> None:
    job = await made.submit(jobs)

    assert (await jobs.cancel(job.id, tenant="acme")).state is JobState.CANCELLED

    assert await jobs.claim("worker", ALL, 30) is None
    assert [event.kind for event in await jobs.events_after(job.id, tenant="acme")] == ["cancelled"]
    assert (await jobs.cancel(job.id, tenant="acme")).state is JobState.CANCELLED
    assert len(await jobs.events_after(job.id, tenant="acme")) == 1


async def test_a_cancelled_job_whose_worker_died_is_over_when_its_lease_is(jobs: JobStore, clock: Clock) -> None:
    job = await made.submit(jobs)
    await made.claim(jobs)
    assert (await jobs.cancel(job.id, tenant="acme")).state is JobState.RUNNING
    clock.now += 31

    assert await jobs.claim("worker-2", ALL, 30) is None
    assert (await jobs.get(job.id, tenant="acme")).state is JobState.CANCELLED


@pytest.mark.parametrize(
    ("kind", "state", "code"),
    [(SourceKind.FILE, RecordingState.FAILED, "cancelled"), (SourceKind.RTSP, RecordingState.COMPLETE, "")],
)
async def test_an_ingest_that_is_cancelled_before_it_began_shows_in_its_recording(
    jobs: JobStore, store: RecordingStore, kind: SourceKind, state: RecordingState, code: str
) -> None:
    recording = made.recording(kind=kind)
    job = await made.submit(jobs, kind=JobKind.INGEST, recording=recording)

    await jobs.cancel(job.id, tenant="acme")

    shown = await store.get(recording.id, tenant="acme")
    assert (shown.state, shown.error_code) == (state, code)


async def test_an_ingest_that_killed_its_workers_fails_its_recording(
    jobs: JobStore, store: RecordingStore, clock: Clock
) -> None:
    recording = made.recording()
    job = await made.submit(jobs, kind=JobKind.INGEST, recording=recording, max_attempts=2)
    for _ in range(2):
        await made.claim(jobs)
        clock.now += 60
        await jobs.reap()

    assert (await jobs.get(job.id, tenant="acme")).state is JobState.FAILED
    shown = await store.get(recording.id, tenant="acme")
    assert (shown.state, shown.error_code) == (RecordingState.FAILED, "unavailable")
    assert "2 times in a row" in shown.error


async def test_a_cancelled_job_is_not_tried_again(jobs: JobStore) -> None:
    for leave in ("fail", "release", "put_off"):
        job = await made.submit(jobs)
        claim = await made.claim(jobs)
        await jobs.cancel(job.id, tenant="acme")
        if leave == "fail":
            await claim.fail(Unavailable("away"), retry=True)
        elif leave == "release":
            await claim.release()
        else:
            await claim.put_off(15)
        assert (await jobs.get(job.id, tenant="acme")).state is JobState.CANCELLED


async def test_a_dead_job_is_queued_again_with_all_its_attempts_and_what_it_had_done(jobs: JobStore) -> None:
    job = await made.submit(jobs, max_attempts=1)
    claim = await made.claim(jobs)
    await claim.checkpoint("map/0", {"n": 1})
    assert await claim.fail(Unavailable("vision is away"), retry=True) is JobState.FAILED
    dead = await jobs.get(job.id, tenant="acme")
    assert (dead.state, dead.error_code, dead.error) == (JobState.FAILED, "unavailable", "vision is away")
    assert [found.id for found in (await jobs.list(tenant="acme", state=JobState.FAILED)).items] == [job.id]

    assert (await jobs.retry_dead(job.id, tenant="acme")).state is JobState.QUEUED

    again = await made.claim(jobs)
    assert (again.job.attempt, again.fence > claim.fence) == (1, True)
    assert await again.checkpoints() == {"map/0": {"n": 1}}
    await again.finish({})
    with pytest.raises(Conflict):
        await jobs.retry_dead(job.id, tenant="acme")


async def test_a_job_that_is_done_shows_no_error_of_an_earlier_attempt(jobs: JobStore) -> None:
    job = await made.submit(jobs)
    assert await (await made.claim(jobs)).fail(Unavailable("vision is away"), retry=True) is JobState.QUEUED
    assert (await jobs.get(job.id, tenant="acme")).error == "vision is away", "while it waits"
    await (await made.claim(jobs)).finish({"text": "a yard"})
    done = await jobs.get(job.id, tenant="acme")
    assert (done.state, done.error_code, done.error) == (JobState.DONE, "", "")


async def test_the_last_numbered_checkpoint_is_found_without_reading_all(jobs: JobStore) -> None:
    await made.submit(jobs)
    claim = await made.claim(jobs, "a")
    assert await claim.last_checkpoint("chunk/") is None
    for number in (8, 9, 10):
        await claim.checkpoint(f"chunk/{number}", {"n": number})
    await claim.checkpoint("begin", {"n": 0})
    assert await claim.last_checkpoint("chunk/") == {"n": 10}
    assert await claim.last_checkpoint("begin") == {"n": 0}
    assert await claim.last_checkpoint("chunk_") is None


async def test_jobs_that_were_over_long_ago_are_forgotten_with_all_they_said(jobs: JobStore, clock: Clock) -> None:
    old, waiting = await made.submit(jobs), await made.submit(jobs, kind=JobKind.WHEN)
    claim = await made.claim(jobs, "worker", JobKind.ASK)
    await claim.checkpoint("map/0", {})
    await claim.progress({"done": 1})
    await claim.finish({})
    clock.now += 100

    assert await jobs.sweep(clock.now - 200) == 0
    assert await jobs.sweep(clock.now - 50) == 1

    with pytest.raises(NotFound):
        await jobs.events_after(old.id, tenant="acme")
    assert (await jobs.get(waiting.id, tenant="acme")).state is JobState.QUEUED


async def test_a_job_that_a_job_submits_is_there_once_though_the_step_is_repeated(jobs: JobStore, clock: Clock) -> None:
    await made.submit(jobs, kind=JobKind.WATCH)
    new = NewJob(kind=JobKind.DELIVER, params={"id": "evt-1"}, fingerprint="evt-1", idempotency_key="deliver/evt-1")
    died = await made.claim(jobs, "worker-1", JobKind.WATCH)
    first = await died.submit(new)
    clock.now += 31

    again = await (await made.claim(jobs, "worker-2", JobKind.WATCH)).submit(new)

    assert again.id == first.id
    assert (again.tenant, again.kind) == ("acme", JobKind.DELIVER)


# -- events


async def test_events_have_no_holes_though_many_write_at_a_time(jobs: JobStore) -> None:
    job = await made.submit(jobs)
    claim = await made.claim(jobs)

    await asyncio.gather(*(claim.event("delta", {"n": n}) for n in range(30)))
    await claim.finish({})

    events = await jobs.events_after(job.id, tenant="acme")
    assert [event.number for event in events] == list(range(1, 32))
    assert {event.data["n"] for event in events[:-1]} == set(range(30))
    assert [event.number for event in await jobs.events_after(job.id, 28, tenant="acme", limit=2)] == [29, 30]


async def test_a_follower_that_was_cut_off_goes_on_after_the_last_event_it_saw(jobs: JobStore) -> None:
    job = await made.submit(jobs)
    claim = await made.claim(jobs)
    seen: list[int] = []

    async def follow() -> None:
        async for event in jobs.follow(job.id, seen[-1] if seen else 0, tenant="acme"):
            seen.append(event.number)
            if event.number == 2:
                return  # the connection broke

    await claim.event("delta", {})
    await claim.progress({"done": 0.5})
    await asyncio.wait_for(follow(), 20)
    following = asyncio.create_task(follow())
    await claim.event("delta", {})
    await claim.finish({})
    await asyncio.wait_for(following, 20)

    assert seen == [1, 2, 3, 4]


async def test_progress_is_shown_and_told(jobs: JobStore) -> None:
    job = await made.submit(jobs)
    claim = await made.claim(jobs)
    await claim.progress({"done": 1, "of": 4})

    assert (await jobs.get(job.id, tenant="acme")).progress == {"done": 1, "of": 4}
    (event,) = await jobs.events_after(job.id, tenant="acme")
    assert (event.kind, event.data) == ("progress", {"done": 1, "of": 4})


async def test_numbers_that_json_does_not_have_are_refused(jobs: JobStore) -> None:
    job = await made.submit(jobs)
    claim = await made.claim(jobs)

    with pytest.raises(Exception, match="Out of range float values"):
        await claim.progress({"done": float("nan")})

    assert await jobs.events_after(job.id, tenant="acme") == []


# -- lists


async def test_lists_are_read_page_by_page_newest_first(jobs: JobStore, clock: Clock) -> None:
    submitted = []
    for n in range(7):
        clock.now += n % 2  # some at the very same time
        submitted.append((await made.submit(jobs)).id)
    seen: list[str] = []
    cursor = None
    while True:
        page = await jobs.list(tenant="acme", limit=3, cursor=cursor)
        seen += [job.id for job in page.items]
        if (cursor := page.next_cursor) is None:
            break

    assert sorted(seen) == sorted(submitted)
    assert [len(seen), len(set(seen))] == [7, 7]
    with pytest.raises(InvalidRequest):
        await jobs.list(tenant="acme", cursor="bm90IG91cnM=")
    with pytest.raises(InvalidRequest, match="cursor"):
        await jobs.list(tenant="acme", cursor=base64.urlsafe_b64encode(b"0x1p99999 job").decode())


async def test_the_backlog_is_counted_by_kind_and_state(jobs: JobStore, clock: Clock) -> None:
    await made.submit(jobs)
    clock.now += 5
    await made.submit(jobs)
    await made.submit(jobs, kind=JobKind.WHEN)
    await made.claim(jobs, "worker", JobKind.WHEN)

    counted = {(found.kind, found.state): (found.count, found.oldest_s) for found in await jobs.backlog()}

    assert counted[JobKind.ASK, JobState.QUEUED] == (2, 5.0)
    assert counted[JobKind.WHEN, JobState.RUNNING][0] == 1


async def test_a_job_for_which_there_is_no_room_goes_on_waiting(jobs: JobStore, clock: Clock) -> None:
    await made.submit(jobs)
    for _ in range(3):
        await (await made.claim(jobs)).put_off(15)
        assert await jobs.claim("worker", [JobKind.ASK], 30) is None
        clock.now += 15
    (waiting,) = await jobs.backlog()
    assert (waiting.state, waiting.oldest_s) == (JobState.QUEUED, 45)

    claim = await made.claim(jobs)
    assert (claim.job.attempt, claim.waited_s) == (1, 45)
    clock.now += 5
    await claim.release()
    (waiting,) = await jobs.backlog()
    assert waiting.oldest_s == 0, "it had begun"
    await made.claim(jobs)


# -- deletion


async def test_a_deleted_recording_is_gone_at_once_and_drains_behind(
    jobs: JobStore, store: RecordingStore, database: Database, clock: Clock
) -> None:
    recording, other = made.recording(), made.recording()
    ingest = await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
    writer = await made.claim(jobs)
    for number in range(3):
        await writer.add_chunk(made.chunk(recording.id, number, key="shared" if number == 0 else None))
    await made.submit(jobs, kind=JobKind.INGEST, recording=other)
    elsewhere = await made.claim(jobs)
    await elsewhere.add_chunk(made.chunk(other.id, 0, key="shared"))
    question = await made.submit(jobs, recording_id=recording.id)

    deletion = await jobs.delete_recording(recording.id, tenant="acme")

    with pytest.raises(NotFound):
        await store.get(recording.id, tenant="acme")
    with pytest.raises(NotFound):
        await jobs.delete_recording(recording.id, tenant="acme")
    with pytest.raises(NotFound):
        await made.submit(jobs, recording_id=recording.id)
    assert [found.id for found in (await store.list(tenant="acme")).items] == [other.id]
    assert (await jobs.get(question.id, tenant="acme")).state is JobState.CANCELLED
    assert await jobs.interrupted([writer]) == {ingest.id: True}
    assert await jobs.claim("worker", (JobKind.DELETE,), 30) is None, "its ingest still runs"

    await writer.update_recording(state=RecordingState.LIVE)
    await writer.cancelled()
    remover = await made.claim(jobs, "worker", JobKind.DELETE)
    assert remover.job.id == deletion.id
    async with remover.transaction() as now:
        assert await now.drop_keys() == ["key-1", "key-2"], "the other recording stands on the third"
    async with remover.transaction() as now:
        assert await now.drop_keys() is None
    async with remover.transaction() as now:
        assert await now.remove_chunks() == 3
        assert await now.remove_chunks() == 0
        await now.remove_recording()
        await now.end(JobState.DONE, result={})

    assert await store.count_chunks(recording.id) == 0
    assert await store.count_chunks(other.id) == 1
    assert [found.id for found in (await jobs.list(tenant="acme", recording_id=recording.id)).items] == [deletion.id]


async def test_a_recording_about_which_a_hundred_thousand_calls_were_made_is_removed(
    jobs: JobStore, store: RecordingStore, database: Database
) -> None:
    ingest = await _standing_on(jobs)
    remover = await _removing(jobs, ingest)
    await _copy(database, ingest.job.id, 100_000)

    async with remover.transaction() as now:
        await now.remove_recording()

    left = await jobs.list(tenant="acme", recording_id=remover.job.recording_id)
    assert [job.id for job in left.items] == [remover.job.id]


async def test_a_deletion_reads_no_results_of_what_was_asked_before(jobs: JobStore, database: Database) -> None:
    recording = made.recording()
    await made.submit(jobs, kind=JobKind.INGEST, recording=recording)
    claim = await made.claim(jobs)
    await claim.finish({"text": "x" * 1_000_000})
    await _copy(database, claim.job.id, 40)

    tracemalloc.start()
    await jobs.delete_recording(recording.id, tenant="acme")
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert most_bytes < 10_000_000


async def _copy(database: Database, job_id: str, count: int) -> None:
    table, numbers = schema.jobs, select(literal(1).label("n")).cte(recursive=True)
    numbers = numbers.union_all(select(numbers.c.n + 1).where(numbers.c.n < count))
    copied = [literal("job_") + cast(numbers.c.n, String) if column is table.c.id else column for column in table.c]
    rows = select(*copied).join_from(table, numbers, true()).where(table.c.id == job_id)
    async with database.write() as connection:
        await connection.execute(table.insert().from_select(list(table.c), rows))


async def _standing_on(jobs: JobStore, *keys: str) -> Claim:
    """The ingest of a recording that stands on these records."""
    await made.submit(jobs, kind=JobKind.INGEST, recording=made.recording())
    claim = await made.claim(jobs)
    async with claim.transaction() as now:
        await now.add_keys(keys)
    return claim


async def _removing(jobs: JobStore, ingest: Claim) -> Claim:
    assert ingest.job.recording_id is not None
    await jobs.delete_recording(ingest.job.recording_id, tenant="acme")
    await ingest.cancelled()
    return await made.claim(jobs, "worker", JobKind.DELETE)


async def test_of_two_deletions_at_once_the_second_removes_what_only_they_shared(jobs: JobStore) -> None:
    first = await _removing(jobs, await _standing_on(jobs, "mine", "ours"))
    second = await _removing(jobs, await _standing_on(jobs, "ours", "theirs"))

    async def drop() -> Sequence[str] | None:
        async with second.transaction() as now:
            return await now.drop_keys()

    async with first.transaction() as now:
        assert await now.drop_keys() == ["mine"]
        meanwhile = asyncio.create_task(drop())
        await asyncio.sleep(0.2)
    assert await meanwhile == ["ours", "theirs"]


async def test_who_comes_to_stand_on_a_record_waits_for_a_deletion_that_is_at_it(jobs: JobStore) -> None:
    remover = await _removing(jobs, await _standing_on(jobs, "key"))
    await made.submit(jobs, kind=JobKind.INGEST, recording=made.recording())
    newcomer = await made.claim(jobs)

    async def note() -> None:
        async with newcomer.transaction() as now:
            await now.add_keys(["key"])

    async with remover.transaction() as now:
        assert await now.drop_keys() == ["key"]
        noting = asyncio.create_task(note())
        await asyncio.sleep(0.2)
        assert not noting.done(), "it would find what is about to vanish"
    await noting


async def test_a_recording_that_is_being_deleted_comes_to_stand_on_nothing_more(
    jobs: JobStore, store: RecordingStore
) -> None:
    remover = await _removing(jobs, await _standing_on(jobs, "key"))
    with pytest.raises(NotFound):
        await store.note_key(remover.job.recording_id or "", "another")


async def test_nobody_waits_for_another_writer_for_ever(database_url: str, database: Database, jobs: JobStore) -> None:
    await made.submit(jobs)
    impatient = Database.open(database_url, wait_s=0.5)
    try:
        async with database.write() as connection, asyncio.timeout(10):
            await connection.execute(schema.tenants.update().values(served_at=1.0))
            with pytest.raises(Unavailable):
                await made.submit(JobStore(impatient))
    finally:
        await impatient.close()
