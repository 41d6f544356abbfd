"""Resumable uploads: what a tus client does, what breaks in between, and what is on the disk afterwards."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from nvila.errors import Conflict, LimitExceeded, NotFound, Overloaded
from nvila.gateway.files import FileStore
from nvila.gateway.scratch import Scratch
from nvila.gateway.uploads import Upload, UploadLimits, Uploads
from tests.gateway.faces import BEARER, OTHER_KEY, Gateway, serving

DATA = random.Random(7).randbytes(300_000)
TUS = {**BEARER, "Tus-Resumable": "1.0.0"}
PIECE = {**TUS, "Content-Type": "application/offset+octet-stream"}


def _metadata(**values: str) -> str:
    return ",".join(f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in values.items())


async def _create(gateway: Gateway, size: int = len(DATA), **metadata: str) -> str:
    headers = {**TUS, "Upload-Length": str(size), "Upload-Metadata": _metadata(**metadata)}
    made = await gateway.client.post("/v1/uploads", headers=headers)
    assert made.status_code == 201, made.text
    return str(made.headers["location"])


async def _patch(gateway: Gateway, url: str, offset: int, data: bytes) -> httpx.Response:
    return await gateway.client.patch(url, content=data, headers={**PIECE, "Upload-Offset": str(offset)})


async def test_a_file_that_comes_in_pieces_is_the_same_file(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        url = await _create(gateway, filename="día.mp4", purpose="user_data")
        offset = 0
        for size in (1, 99_999, 0, 150_000, 50_000):
            sent = await _patch(gateway, url, offset, DATA[offset : offset + size])
            offset += size
            assert (sent.status_code, sent.headers["upload-offset"]) == (204, str(offset))
            assert sent.headers["upload-expires"].endswith("GMT")
        file_id = sent.headers["nvila-file-id"]
        file = (await gateway.client.get(f"/v1/files/{file_id}", headers=BEARER)).json()
        content = (await gateway.client.get(f"/v1/files/{file_id}/content", headers=BEARER)).content
        looked = await gateway.client.head(url, headers=TUS)
    assert (file["filename"], file["purpose"], file["bytes"]) == ("día.mp4", "user_data", len(DATA))
    assert content == DATA
    assert (looked.headers["upload-offset"], looked.headers["nvila-file-id"]) == (str(len(DATA)), file_id)
    assert looked.headers["cache-control"] == "no-store"


async def test_what_arrived_before_the_line_broke_is_kept(tmp_path: Path) -> None:
    began = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield DATA[:100_000]
        began.set()
        await asyncio.sleep(60)

    async with serving(tmp_path) as gateway:
        url = await _create(gateway)
        headers = {**PIECE, "Upload-Offset": "0"}
        sending = asyncio.create_task(gateway.client.patch(url, content=half(), headers=headers))
        await began.wait()
        sending.cancel()
        async with asyncio.timeout(30):
            while (await gateway.client.head(url, headers=TUS)).headers["upload-offset"] != "100000":
                await asyncio.sleep(0.01)
            while (sent := await _patch(gateway, url, 100_000, DATA[100_000:])).status_code == 409:
                await asyncio.sleep(0.01)
        content = await gateway.client.get(f"/v1/files/{sent.headers['nvila-file-id']}/content", headers=BEARER)
    assert content.content == DATA


async def test_a_silent_client_loses_its_turn_but_not_its_bytes(tmp_path: Path) -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield DATA[:10]
        await asyncio.sleep(8)  # the gateway of these tests waits for one second

    async with serving(tmp_path) as gateway:
        url = await _create(gateway)
        headers = {**PIECE, "Upload-Offset": "0"}
        refused = await gateway.client.patch(url, content=silent(), headers=headers)
        looked = await gateway.client.head(url, headers=TUS)
    assert refused.status_code == 504
    assert looked.headers["upload-offset"] == "10"


async def test_a_second_writer_and_a_wrong_offset_conflict(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield DATA[:270_000]
        await go.wait()

    async with serving(tmp_path) as gateway:
        url = await _create(gateway)
        headers = {**PIECE, "Upload-Offset": "0"}
        sending = asyncio.create_task(gateway.client.patch(url, content=slow(), headers=headers))
        async with asyncio.timeout(30):
            while (await gateway.client.head(url, headers=TUS)).headers["upload-offset"] == "0":
                await asyncio.sleep(0.01)
        assert (await _patch(gateway, url, 0, b"")).status_code == 409
        assert (await gateway.client.delete(url, headers=TUS)).status_code == 409
        go.set()
        assert (await sending).headers["upload-offset"] == "270000"
        wrong = await _patch(gateway, url, 5, b"x")
        assert wrong.status_code == 409
        assert "5 given, this upload is at 270,000" in wrong.json()["error"]["message"]


async def test_more_than_was_announced_is_refused_by_its_header_and_by_its_bytes(tmp_path: Path) -> None:
    async def lying() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield DATA[:40_000]

    async with serving(tmp_path) as gateway:
        url = await _create(gateway, 100_000)
        told = await _patch(gateway, url, 0, DATA[:100_001])
        assert (told.status_code, told.json()["error"]["param"]) == (413, "Content-Length")
        assert (await gateway.client.head(url, headers=TUS)).headers["upload-offset"] == "0"
        lied = await gateway.client.patch(url, content=lying(), headers={**PIECE, "Upload-Offset": "0"})
        assert lied.status_code == 413
        assert int((await gateway.client.head(url, headers=TUS)).headers["upload-offset"]) <= 100_000
        assert (await gateway.client.get("/v1/files", headers=BEARER)).json()["data"] == []


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({"Upload-Length": str((1 << 20) + 1)}, 413, "Upload-Length"),
        ({"Upload-Length": "0"}, 422, "Upload-Length"),
        ({"Upload-Length": "-1"}, 422, "Upload-Length"),
        ({"Upload-Length": "9" * 20}, 422, "Upload-Length"),
        ({"Upload-Defer-Length": "1"}, 422, "Upload-Length"),
        ({"Upload-Length": "5", "Upload-Metadata": "filename ???"}, 422, "Upload-Metadata"),
        ({"Upload-Length": "5", "Upload-Metadata": "filename /w=="}, 422, "Upload-Metadata"),
        ({"Upload-Length": "5", "Upload-Metadata": _metadata(purpose="evil")}, 422, "purpose"),
        ({"Upload-Length": "5", "Upload-Metadata": "a " + "A" * 5000}, 413, "Upload-Metadata"),
        ({"Upload-Length": "5", "Tus-Resumable": "0.2.2"}, 412, "Tus-Resumable"),
    ],
)
async def test_uploads_that_cannot_be_are_refused_before_their_bytes(
    tmp_path: Path, headers: dict[str, str], status: int, param: str
) -> None:
    async with serving(tmp_path) as gateway:
        refused = await gateway.client.post("/v1/uploads", headers={**TUS, **headers})
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)
    if status == 412:
        assert refused.headers["tus-version"] == "1.0.0"


async def test_the_server_says_what_it_understands_to_holders_of_a_key(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        told = await gateway.client.options("/v1/uploads", headers=BEARER)
        for method, path in (("OPTIONS", ""), ("POST", ""), ("HEAD", "/upload_" + "0" * 32)):
            assert (await gateway.client.request(method, f"/v1/uploads{path}")).status_code == 401
    assert told.headers["tus-extension"] == "creation,termination,expiration"
    assert (told.headers["tus-version"], told.headers["tus-max-size"]) == ("1.0.0", str(1 << 20))


async def test_another_tenants_upload_and_ids_that_are_none_are_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        url = await _create(gateway)
        other = {"Authorization": f"Bearer {OTHER_KEY}"}
        for path in (url, "/v1/uploads/upload_" + "0" * 32, "/v1/uploads/..%2f..%2facme", "/v1/uploads/%00"):
            assert (await gateway.client.head(path, headers={**TUS, **other})).status_code == 404
            patched = await gateway.client.patch(path, content=b"x", headers={**PIECE, **other, "Upload-Offset": "0"})
            assert patched.status_code == 404
            assert (await gateway.client.delete(path, headers={**TUS, **other})).status_code == 404
        assert (await gateway.client.delete(url, headers=TUS)).status_code == 204
        assert (await gateway.client.head(url, headers=TUS)).status_code == 404
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]


# -- the store itself


class _Store:
    """A gateway's process over `folder`, which can be told to die."""

    def __init__(self, folder: Path, **limits: float) -> None:
        self.scratch = Scratch(folder / "scratch")
        self.files = FileStore(folder / "files", self.scratch)
        most = {"file_bytes": 1 << 20, **limits}
        self.uploads = Uploads(folder / "uploads", self.files, self.scratch, UploadLimits(**most))  # type: ignore[arg-type]

    def die(self) -> None:
        self.scratch._folder._locks.close()

    async def begin(self) -> Upload:
        return await self.uploads.create("acme", size_bytes=len(DATA), filename="a", purpose="vision")


async def _pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def test_an_upload_killed_before_it_became_a_file_becomes_one_when_looked_at(tmp_path: Path) -> None:
    first = _Store(tmp_path)
    upload = await first.begin()
    await first.uploads.append("acme", upload.id, 0, _pieces(DATA[:-1]))
    with (tmp_path / "uploads" / "acme" / upload.id / "content").open("ab") as content:
        content.write(DATA[-1:])  # the last byte was written; then came the kill
    first.die()
    second = _Store(tmp_path)
    with pytest.raises(NotFound):
        await second.files.get("acme", upload.file_id)
    assert (await second.uploads.get("acme", upload.id)).is_done
    assert second.files.content_path("acme", upload.file_id).read_bytes() == DATA


async def test_an_upload_killed_after_it_became_a_file_becomes_no_second_one(tmp_path: Path) -> None:
    first = _Store(tmp_path)
    upload = await first.begin()
    await first.uploads.append("acme", upload.id, 0, _pieces(DATA))
    folder = tmp_path / "uploads" / "acme" / upload.id
    (folder / "content").write_bytes(DATA)  # as it was just before `done`
    (folder / "done").unlink()
    first.die()
    second = _Store(tmp_path)
    assert (await second.uploads.get("acme", upload.id)).is_done
    files, _ = await second.files.list("acme", limit=10, after=None, order="asc", purpose=None)
    assert [file.id for file in files] == [upload.file_id]


async def test_a_deleted_file_does_not_come_back_by_its_upload(tmp_path: Path) -> None:
    store = _Store(tmp_path)
    upload = await store.begin()
    await store.uploads.append("acme", upload.id, 0, _pieces(DATA))
    await store.files.delete("acme", upload.file_id)
    assert (await store.uploads.get("acme", upload.id)).is_done
    with pytest.raises(NotFound):
        await store.files.get("acme", upload.file_id)


async def test_cancelled_in_the_middle_of_a_write_it_is_whole_up_to_its_offset(tmp_path: Path) -> None:
    store = _Store(tmp_path, file_bytes=64 << 20)
    data = random.Random(1).randbytes(8 << 20)
    upload = await store.uploads.create("acme", size_bytes=len(data), filename="a", purpose="vision")
    pieces = (data[at : at + 4096] for at in range(0, len(data), 4096))

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece

    writing = asyncio.create_task(store.uploads.append("acme", upload.id, 0, body()))
    content = tmp_path / "uploads" / "acme" / upload.id / "content"
    while content.stat().st_size < 2 << 20:
        await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    offset = (await store.uploads.get("acme", upload.id)).offset
    assert offset >= 2 << 20
    assert content.read_bytes() == data[:offset]
    done = await store.uploads.append("acme", upload.id, offset, _pieces(data[offset:]))
    assert store.files.content_path("acme", done.file_id).read_bytes() == data


async def test_two_gateways_on_one_folder_do_not_write_at_once(tmp_path: Path) -> None:
    here, there = _Store(tmp_path), _Store(tmp_path)
    upload = await here.begin()
    began = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield DATA[:10]
        began.set()
        await asyncio.sleep(60)

    writing = asyncio.create_task(here.uploads.append("acme", upload.id, 0, slow()))
    await began.wait()
    with pytest.raises(Conflict):
        await there.uploads.append("acme", upload.id, 0, _pieces(DATA))
    writing.cancel()
    await asyncio.wait({writing})
    assert (await there.uploads.append("acme", upload.id, 10, _pieces(DATA[10:]))).is_done


async def test_what_nobody_goes_on_with_is_forgotten(tmp_path: Path) -> None:
    store = _Store(tmp_path, expiry_s=100)
    old, young = await store.begin(), await store.begin()
    ago = time.time() - 101
    os.utime(tmp_path / "uploads" / "acme" / old.id / "content", (ago, ago))
    with pytest.raises(NotFound):
        await store.uploads.get("acme", old.id)
    await store.uploads.sweep()
    assert os.listdir(tmp_path / "uploads" / "acme") == [young.id]


async def test_a_tenant_has_only_so_many_unfinished_uploads(tmp_path: Path) -> None:
    store = _Store(tmp_path, open=2)
    first = await store.begin()
    await store.begin()
    with pytest.raises(Overloaded):
        await store.begin()
    await store.uploads.create("zeta", size_bytes=1, filename="a", purpose="vision")
    await store.uploads.append("acme", first.id, 0, _pieces(DATA))
    await store.begin()


async def test_a_file_larger_than_allowed_is_never_begun(tmp_path: Path) -> None:
    store = _Store(tmp_path, file_bytes=len(DATA) - 1)
    with pytest.raises(LimitExceeded, match="300,000 asked, at most 299,999 allowed"):
        await store.begin()
