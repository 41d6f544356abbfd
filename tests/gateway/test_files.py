"""Uploaded files: through the routes with the official client, and what odd uploads and names do."""

from __future__ import annotations

import asyncio
import io
import socket
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from blake3 import blake3

from nvila.errors import InvalidRequest, LimitExceeded, NotFound, NvilaError
from nvila.gateway import multipart
from nvila.gateway.files import FileStore, look_at, plain_name
from nvila.gateway.scratch import Scratch
from nvila.locks import LOCK
from nvila.types import MediaKind
from tests.gateway.faces import BEARER, KEY, LIMITS, OTHER_KEY, Gateway, serving

PNG = b"\x89PNG\r\n\x1a\n" + bytes(1000)


async def _upload(gateway: Gateway, name: str = "a.png", data: bytes = PNG, key: str = KEY) -> str:
    response = await gateway.client.post(
        "/v1/files",
        data={"purpose": "vision"},
        files={"file": (name, data)},
        headers={"Authorization": f"Bearer {key}"},
    )
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def _stray(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]


async def test_the_openai_client_uploads_lists_reads_and_deletes(tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        made = await client.files.create(file=("cat.png", io.BytesIO(PNG)), purpose="vision")
        assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(PNG), "cat.png", "vision")
        assert made.status == "processed"
        assert await client.files.retrieve(made.id) == made
        assert [file.id async for file in client.files.list()] == [made.id]
        assert (await client.files.content(made.id)).content == PNG
        assert (await client.files.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(made.id)
    assert _stray(tmp_path / "scratch") == []


async def test_pages_go_by_age_in_both_orders(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        ids = [await _upload(gateway, f"{n}.png") for n in range(5)]

        async def page(**query: str) -> tuple[list[str], bool]:
            body = (await gateway.client.get("/v1/files", params=query, headers=BEARER)).json()
            return [file["id"] for file in body["data"]], body["has_more"]

        assert await page(order="asc") == (ids, False)
        assert await page(limit="2") == (ids[:2:-1], True)
        assert await page(limit="2", order="asc", after=ids[1]) == (ids[2:4], True)
        assert await page(limit="2", order="asc", after=ids[3]) == (ids[4:], False)
        assert await page(purpose="assistants") == ([], False)
        for query in ({"limit": "0"}, {"limit": "x"}, {"order": "odd"}, {"after": "file-no"}):
            refused = await gateway.client.get("/v1/files", params=query, headers=BEARER)
            assert refused.status_code == 422
            assert refused.json()["error"]["param"] == next(iter(query))


async def test_a_tenants_files_are_not_there_for_another(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        file_id = await _upload(gateway)
        other = {"Authorization": f"Bearer {OTHER_KEY}"}
        assert (await gateway.client.get("/v1/files", headers=other)).json()["data"] == []
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            response = await gateway.client.request(method, f"/v1/files/{file_id}{path}", headers=other)
            assert response.status_code == 404
        assert (await gateway.client.get(f"/v1/files/{file_id}", headers=BEARER)).status_code == 200


@pytest.mark.parametrize(
    "file_id",
    ["file-../../etc", "..%2F..%2Fetc%2Fpasswd", "file-" + "0" * 32, "file-" + "Z" * 32, "%00", "file-0%0a", "%2e"],
)
async def test_ids_that_are_none_are_not_found(tmp_path: Path, file_id: str) -> None:
    async with serving(tmp_path) as gateway:
        assert (await gateway.client.get(f"/v1/files/{file_id}", headers=BEARER)).status_code in (404, 405)
        response = await gateway.client.get(f"/v1/files/{file_id}/content", headers=BEARER)
        assert response.status_code == 404


async def test_content_comes_in_ranges_and_never_as_a_page(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        file_id = await _upload(gateway, 'ev"il\r\n.html', b"<script>" + bytes(92))
        response = await gateway.client.get(f"/v1/files/{file_id}/content", headers={**BEARER, "Range": "bytes=1-6"})
    assert (response.status_code, response.content) == (206, b"script")
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ("bytes=3-1", 400, "start must be less than end"),
        ("lines=1-2", 400, "bytes"),
        ("bytes=500-600", 416, "bytes */6"),
    ],
)
async def test_a_range_that_cannot_be_had_is_an_error_object(
    tmp_path: Path, asked: str, status: int, said: str
) -> None:
    async with serving(tmp_path) as gateway:
        file_id = await _upload(gateway, "a.mp4", b"script")
        response = await gateway.client.get(f"/v1/files/{file_id}/content", headers={**BEARER, "Range": asked})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, "invalid_request", "Range")
    assert said in error["message"]
    assert response.headers.get("content-range") == ("bytes */6" if status == 416 else None)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\a.mp4", "a.mp4"),
        ("/", "upload"),
        ("..", "upload"),
        ("", "upload"),
        ("a\x00b\n\u202ec\u200b.mp4", "abc.mp4"),
        ("x" * 1000, "x" * 255),
        ("été.mp4", "été.mp4"),
    ],
)
def test_names_lose_folders_and_invisible_characters(given: str, kept: str) -> None:
    assert plain_name(given) == kept


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (PNG, MediaKind.IMAGE),
        (b"\xff\xd8\xff\xe0", MediaKind.IMAGE),
        (b"RIFF\0\0\0\0WEBPVP8 ", MediaKind.IMAGE),
        (b"RIFF\0\0\0\0AVI LIST", MediaKind.VIDEO),
        (b"\0\0\0\x20ftypavif", MediaKind.IMAGE),
        (b"\0\0\0\x20ftypisom", MediaKind.VIDEO),
        (b"", MediaKind.VIDEO),
    ],
)
def test_images_are_told_by_their_first_bytes(head: bytes, kind: MediaKind) -> None:
    assert look_at(head) is kind


async def test_files_outlive_the_process_and_what_it_left_half_done_is_removed(tmp_path: Path) -> None:
    first = Scratch(tmp_path / "scratch")
    store = FileStore(tmp_path / "files", first)
    async with first.spool(100) as spool:
        await spool.write(b"whole")
        kept = await store.add("acme", await spool.finish(), filename="a", purpose="vision")
    (first.new_path()).write_bytes(b"half an upload")
    beside = Scratch(tmp_path / "scratch")  # another process, while the first is alive: it removes nothing
    assert len(_stray(tmp_path / "scratch")) == 1
    first._folder._locks.close()  # the first dies: the system closes its locks
    beside.close()
    second = Scratch(tmp_path / "scratch")
    assert _stray(tmp_path / "scratch") == []
    again = FileStore(tmp_path / "files", second)
    assert await again.get("acme", kept.id) == kept
    assert again.content_path("acme", kept.id).read_bytes() == b"whole"
    second.close()


async def test_a_file_in_use_outlives_its_deletion(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch")
    store = FileStore(tmp_path / "files", scratch)
    async with scratch.spool(100) as spool:
        await spool.write(b"whole")
        file = await store.add("acme", await spool.finish(), filename="a", purpose="vision")
    async with store.open("acme", file.id) as media:
        await store.delete("acme", file.id)
        assert media.path.read_bytes() == b"whole"
        assert media.digest == blake3(b"whole").digest()
    with pytest.raises(NotFound):
        await store.get("acme", file.id)
    assert _stray(tmp_path / "scratch") == []
    scratch.close()


# -- multipart

_TYPE = "multipart/form-data; boundary=XX"


def _form(*parts: tuple[str, bytes], end: bytes = b"--XX--\r\n") -> bytes:
    return (
        b"".join(
            b'--XX\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), data)
            for name, data in parts
        )
        + end
    )


_FILE = ('file"; filename="a.mp4', b"bytes\r\n--X not the end")


async def _receive(scratch: Scratch, body: bytes, step: int, content_type: str = _TYPE, limit: int = 1000) -> bytes:
    async def arriving() -> AsyncIterator[bytes]:
        for start in range(0, len(body), step):
            yield body[start : start + step]

    async with scratch.spool(limit) as spool:
        form = await multipart.receive(arriving(), content_type, spool)
        assert form.filename == "a.mp4"
        assert form.fields == {"purpose": "vision"}
        assert form.file.digest == blake3(form.file.path.read_bytes()).digest()
        return form.file.path.read_bytes()


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("purpose_first", [False, True])
async def test_forms_are_read_however_they_arrive(tmp_path: Path, step: int, purpose_first: bool) -> None:
    parts = [_FILE, ("purpose", b"vision")]
    body = _form(*(parts[::-1] if purpose_first else parts))
    assert await _receive(Scratch(tmp_path), body, step) == _FILE[1]


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        (_form(_FILE, end=b""), _TYPE, InvalidRequest),
        (_form(_FILE, end=b"--XX"), _TYPE, InvalidRequest),
        (b"", _TYPE, InvalidRequest),
        (b"nonsense", _TYPE, InvalidRequest),
        (_form(("purpose", b"vision")), _TYPE, InvalidRequest),
        (_form(_FILE, _FILE), _TYPE, InvalidRequest),
        (_form(_FILE, ("purpose", b"a"), ("purpose", b"b")), _TYPE, InvalidRequest),
        (_form(_FILE, ("purpose", b"\xff")), _TYPE, InvalidRequest),
        (_form(_FILE, ("purpose", b"a" * 5000)), _TYPE, LimitExceeded),
        (_form(_FILE, *((f"f{n}", b"") for n in range(100))), _TYPE, LimitExceeded),
        (_form(("file", bytes(1001))), _TYPE, LimitExceeded),
        (_form(_FILE), "application/json", InvalidRequest),
        (_form(_FILE), "multipart/form-data", InvalidRequest),
        (_form(_FILE), "multipart/form-data; boundary=" + "Y" * 300, InvalidRequest),
        (_form(_FILE), "", InvalidRequest),
    ],
)
async def test_forms_that_are_odd_are_refused(
    tmp_path: Path, body: bytes, content_type: str, error: type[NvilaError]
) -> None:
    with pytest.raises(error):
        await _receive(Scratch(tmp_path), body, 100, content_type)
    assert _stray(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "data", "param"),
    [
        ({}, PNG, "purpose"),
        ({"purpose": "fine-tune"}, PNG, "purpose"),
        ({"purpose": "vision", "expires_after[seconds]": "60"}, PNG, "expires_after[seconds]"),
        ({"purpose": "vision"}, b"", "file"),
    ],
)
async def test_uploads_that_cannot_be_kept_say_why(
    tmp_path: Path, fields: dict[str, str], data: bytes, param: str
) -> None:
    async with serving(tmp_path) as gateway:
        response = await gateway.client.post("/v1/files", data=fields, files={"file": ("a", data)}, headers=BEARER)
        assert (await gateway.client.get("/v1/files", headers=BEARER)).json()["data"] == []
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param
    assert _stray(tmp_path / "scratch") == []


async def test_a_large_upload_takes_constant_memory(tmp_path: Path) -> None:
    size = 48 << 20

    async def body() -> AsyncIterator[bytes]:
        yield b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
        yield b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        for _ in range(size >> 16):
            yield bytes(1 << 16)
        yield b"\r\n--XX--\r\n"

    scratch = Scratch(tmp_path)
    tracemalloc.start()
    try:
        async with scratch.spool(size) as spool:
            form = await multipart.receive(body(), _TYPE, spool)
            assert form.file.size_bytes == size
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
        scratch.close()


async def test_a_file_may_be_larger_than_a_chat_request_takes(tmp_path: Path) -> None:
    limits = replace(LIMITS, media_bytes=len(PNG) - 1)
    async with serving(tmp_path, limits=limits) as gateway:
        file_id = await _upload(gateway)
        part = {"type": "file", "file": {"file_id": file_id}}
        refused = await gateway.ask(messages=[{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (413, "messages[0].content[0].file")
    assert f"{len(PNG):,} asked, at most {len(PNG) - 1:,} allowed" in error["message"]


async def test_an_upload_over_the_limit_is_refused_by_its_header_before_it_is_sent(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        response = await asyncio.to_thread(_send_head, gateway.url, f"Content-Length: {8 * 2**30 + 1}")
    assert response.startswith(b"HTTP/1.1 413")
    assert b"8,589,934,593 asked" in response


async def test_an_upload_that_lies_about_its_end_is_cut_off(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(64):
            yield bytes(1 << 16)

    async with serving(tmp_path) as gateway:
        headers = {**BEARER, "Content-Type": _TYPE}
        response = await gateway.client.post("/v1/files", content=endless(), headers=headers)
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert _stray(tmp_path / "scratch") == []


async def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_nothing_behind(tmp_path: Path) -> None:
    began = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(1000)
        began.set()
        await asyncio.sleep(60)

    async with serving(tmp_path) as gateway:
        headers = {**BEARER, "Content-Type": _TYPE}
        sending = asyncio.create_task(gateway.client.post("/v1/files", content=half(), headers=headers))
        await began.wait()
        while not _stray(tmp_path / "scratch"):
            await asyncio.sleep(0.005)
        sending.cancel()
        async with asyncio.timeout(30):
            while _stray(tmp_path / "scratch"):
                await asyncio.sleep(0.005)


def _send_head(url: str, *headers: str) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        lines = "\r\n".join(["POST /v1/files HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {KEY}", *headers])
        connection.sendall(lines.encode() + b"\r\n\r\n")
        received = b""
        while data := connection.recv(65536):
            received += data
        return received
