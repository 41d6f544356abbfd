"""Secrets lie sealed in the database, under the key that is first, and are opened only where they are used."""

from __future__ import annotations

import re
from base64 import urlsafe_b64encode
from dataclasses import replace

import pytest
from sqlalchemy import select, update

from nvila.errors import InvalidRequest, Unavailable
from nvila.recordings import schema
from nvila.recordings.asking import fingerprint
from nvila.recordings.database import Database
from nvila.recordings.jobs import JobStore
from nvila.recordings.reseal import reseal
from nvila.recordings.seal import Seal
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import JobKind, Source, SourceKind
from tests.recordings import made

OLD, NEW = (urlsafe_b64encode(bytes([number]) * 32).decode() for number in range(2))
SECRET = "operator:p@ss wörd"


def test_what_is_sealed_shows_nothing_and_opens_again() -> None:
    seal = Seal([NEW])
    kept = seal.close(SECRET)

    assert not re.search("operator|p@ss|wörd", kept)
    assert kept != seal.close(SECRET), "equal secrets do not look equal"
    assert seal.open(kept) == SECRET


def test_the_first_key_seals_and_all_of_them_open() -> None:
    before, both, after = Seal([OLD]), Seal([NEW, OLD]), Seal([NEW])

    assert both.open(before.close(SECRET)) == SECRET
    assert after.open(both.close(SECRET)) == SECRET
    assert not both.is_current(before.close(SECRET))
    assert both.is_current(both.close(SECRET))
    with pytest.raises(Unavailable, match="a key that this process does not have"):
        after.open(before.close(SECRET))


def test_without_keys_nothing_is_sealed_and_what_was_is_not_opened() -> None:
    none = Seal()

    assert not none.is_on
    assert none.close(SECRET) == none.open(SECRET) == SECRET
    assert Seal([NEW]).open(SECRET) == SECRET, "from before there was a key"
    with pytest.raises(Unavailable):
        none.open(Seal([NEW]).close(SECRET))
    with pytest.raises(InvalidRequest):
        none.close("sealed:by nobody")


@pytest.mark.parametrize("key", ["", "short", "é" * 44, "A" * 43, NEW + NEW])
def test_what_is_no_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ValueError, match="key 2 is not 32 bytes") as refused:
        Seal([OLD, key])
    assert not key or key not in str(refused.value)


def test_a_fingerprint_is_no_way_to_guess_a_secret() -> None:
    one, other = ({"question": "?", "secret": secret} for secret in ("1234567890123456", "6543210987654321"))
    assert fingerprint(JobKind.WATCH, one, "rec") == fingerprint(JobKind.WATCH, other, "rec")
    assert fingerprint(JobKind.WATCH, {**one, "question": "!"}, "rec") != fingerprint(JobKind.WATCH, one, "rec")


async def kept_secrets(database: Database) -> list[str]:
    async with database.read() as connection:
        recordings = (await connection.execute(select(schema.recordings.c.secret))).scalars().all()
        params = (await connection.execute(select(schema.jobs.c.params))).scalars().all()
    return [*(one for one in recordings if one is not None), *(one["secret"] for one in params if "secret" in one)]


async def test_a_worker_seals_what_lay_in_clear_or_under_an_older_key(
    database: Database, jobs: JobStore, store: RecordingStore
) -> None:
    camera, file = made.recording(kind=SourceKind.RTSP), made.recording()
    camera = replace(camera, source=Source(kind=SourceKind.RTSP, url="rtsp://yard/1", secret=SECRET))
    await made.submit(jobs, kind=JobKind.INGEST, recording=camera)
    await made.submit(jobs, kind=JobKind.INGEST, recording=file)
    watch = await made.submit(jobs, kind=JobKind.WATCH, params={"question": "?", "secret": Seal([OLD]).close(SECRET)})

    assert await reseal(database, Seal()) == (0, 0)
    seal = Seal([NEW, OLD])
    assert await reseal(database, seal) == (2, 0)
    assert await reseal(database, seal) == (0, 0)

    only_new = Seal([NEW])
    assert [only_new.open(one) for one in await kept_secrets(database)] == [SECRET, SECRET]
    assert not any("p@ss" in one for one in await kept_secrets(database))
    shown = await store.get(camera.id, tenant="acme")
    assert shown.source.secret is not None
    assert only_new.open(shown.source.secret) == SECRET
    assert (await jobs.get(watch.id, tenant="acme")).params["question"] == "?"


async def test_what_no_key_opens_is_counted_and_left(database: Database, jobs: JobStore) -> None:
    camera = made.recording(kind=SourceKind.RTSP)
    await made.submit(jobs, kind=JobKind.INGEST, recording=camera)
    lost = Seal([OLD]).close(SECRET)
    async with database.write() as connection:
        await connection.execute(update(schema.recordings).values(secret=lost))

    assert await reseal(database, Seal([NEW])) == (0, 1)
    assert await kept_secrets(database) == [lost]
