"""The gateway as a real process, with nothing behind it: it says why it is not ready, and ends cleanly."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from nvila.errors import LimitExceeded
from nvila.gateway.app import build, decode_limits
from nvila.gateway.settings import GatewaySettings
from nvila.video.probe import check_file
from tests.recordings.postgres import PostgresServer

PREFIX = f"nvila-test-{os.getpid()}"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@asynccontextmanager
async def _process(
    folder: Path, **environment: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    http_port, grpc_port, nobody = _free_ports(3)
    settings = {
        "HOST": "127.0.0.1",
        "HTTP_PORT": str(http_port),
        "GRPC_PORT": str(grpc_port),
        "API_KEYS": "key-number-one",
        "VISION_URL": f"127.0.0.1:{nobody}",
        "DECODE_TARGET": f"127.0.0.1:{nobody}",
        "REDIS_URL": f"redis://127.0.0.1:{nobody}/0",
        "DATA_DIR": str(folder),
        "SHARED_MEMORY_PREFIX": PREFIX,
        "FRAME_MEMORY_BYTES": str(16 << 20),
        "DECODE_WORKERS": "1",
        "RECOVERY_S": "0.2",
        **environment,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "nvila.gateway.app",
        env={**os.environ, **{f"NVILA_GATEWAY_{name}": value for name, value in settings.items()}},
        stderr=asyncio.subprocess.PIPE,
    )
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", trust_env=False, verify=False)
    try:
        yield process, client
    finally:
        await client.aclose()
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _until_live(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                assert (await client.get("/health/live")).status_code == 200
                return
            except httpx.TransportError:
                await asyncio.sleep(0.05)


async def _said_to(port: int | None, words: bytes) -> dict[str, Any]:
    """The error object that answers bytes which are no request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(words)
    async with asyncio.timeout(30):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 400 ")
    error: dict[str, Any] = json.loads(body)["error"]
    return error


async def test_without_the_services_behind_it_is_live_not_ready_answers_503_and_ends_cleanly(tmp_path: Path) -> None:
    headers = {"Authorization": "Bearer key-number-one"}
    async with _process(tmp_path) as (process, client):
        await _until_live(client)
        async with asyncio.timeout(30):
            while len(reasons := (await client.get("/health/ready")).json()["reasons"]) < 2:
                await asyncio.sleep(0.05)
        assert any("decode" in reason for reason in reasons)
        assert any("vision" in reason for reason in reasons)
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        answer = await client.post("/v1/chat/completions", json=body, headers=headers, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        metrics = (await client.get("/metrics", headers=headers)).text
        assert "nvila_decode_workers 1.0" in metrics
        assert "nvila_cache_up 0.0" in metrics
        error = await _said_to(client.base_url.port, b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            _, log = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in log
    assert list(Path("/dev/shm").glob(f"{PREFIX}*")) == []
    assert list((tmp_path / "scratch").iterdir()) == []


async def test_it_starts_without_the_database_of_recordings_and_uses_it_when_it_is_there(tmp_path: Path) -> None:
    headers = {"Authorization": "Bearer key-number-one"}
    server = PostgresServer()
    try:
        server.start()
        url = server.new_database()
        server.stop()
        async with _process(tmp_path, RECORDINGS_DATABASE_URL=url) as (_, client):
            await _until_live(client)
            answer = await client.get("/v1/recordings", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            reasons = (await client.get("/health/ready")).json()["reasons"]
            assert not any("database" in reason for reason in reasons)
            server.start()
            async with asyncio.timeout(60):
                while (answer := await client.get("/v1/recordings", headers=headers)).status_code == 503:
                    await asyncio.sleep(0.2)
            assert answer.json()["data"] == []
    finally:
        server.remove()


async def test_with_recordings_off_it_opens_no_database_and_says_so(tmp_path: Path) -> None:
    headers = {"Authorization": "Bearer key-number-one"}
    async with _process(tmp_path, RECORDINGS="false") as (_, client):
        await _until_live(client)
        answer = await client.get("/v1/recordings", headers=headers)
        metrics = await client.get("/metrics", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert metrics.status_code == 200
    assert not (tmp_path / "recordings.db").exists()


async def test_what_cannot_start_ends_the_process_with_a_failure(tmp_path: Path) -> None:
    async with _process(tmp_path, FRAME_MEMORY_BYTES=str(1 << 50)) as (process, _):
        async with asyncio.timeout(60):
            _, log = await process.communicate()
    assert process.returncode == 3
    assert b"shared memory" in log


async def test_a_malformed_setting_ends_the_process_with_its_name(tmp_path: Path) -> None:
    async with _process(tmp_path, MAX_FRAMES="many") as (process, _):
        async with asyncio.timeout(60):
            _, log = await process.communicate()
    assert process.returncode == 1
    assert b"NVILA_GATEWAY_MAX_FRAMES" in log
    assert b"Traceback" not in log


@pytest.mark.parametrize("path", ["/v1/files", "/v1/uploads/up_0"])
async def test_uploads_have_a_limit_of_their_own_that_is_checked_before_any_byte(path: str) -> None:
    settings = GatewaySettings(auth="none", max_media_bytes=5, max_upload_bytes=1 << 20, recordings=False)
    transport = httpx.ASGITransport(build(settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        refused = await client.post(path, headers={"Content-Length": f"{2 << 20}"})
    assert refused.status_code == 413
    limit = (1 << 20) + ((64 << 10) if path == "/v1/files" else 0)
    assert f"at most {limit:,} allowed" in refused.json()["error"]["message"]


def test_footage_of_a_recording_may_be_larger_than_what_clients_may_send(tmp_path: Path) -> None:
    footage = tmp_path / "footage"
    footage.write_bytes(bytes(10))
    keeping = GatewaySettings(auth="none", max_media_bytes=5)
    assert check_file(footage, decode_limits(keeping)).st_size == 10
    with pytest.raises(LimitExceeded):
        check_file(footage, decode_limits(keeping.model_copy(update={"recordings": False})))
