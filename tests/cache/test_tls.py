"""The token store over TLS: with the right authority it works, with any doubt it is a miss."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nvila.cache.store import TokenStore
from nvila.telemetry.metrics import Metrics
from tests.cache.redis_server import PASSWORD, RedisServer
from tests.cache.test_store import FORM, every_operation_is_a_miss, make_record
from tests.certificates import make_certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate for 127.0.0.1, its key): its own authority."""
    folder = make_certificate(tmp_path_factory.mktemp("tls"))
    return folder / "ca.crt", folder / "tls.key"


@asynccontextmanager
async def tls_before(server: RedisServer, certificate: tuple[Path, Path]) -> AsyncIterator[int]:
    """A port that speaks TLS and passes all on to the server, whose build here knows no TLS itself."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pass_on(reader, inner_writer), pass_on(inner_reader, writer))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as listening:
        yield listening.sockets[0].getsockname()[1]


async def test_records_pass_over_tls_that_the_given_authority_vouches_for(
    shared_redis: RedisServer, certificate: tuple[Path, Path], metrics: Metrics
) -> None:
    async with tls_before(shared_redis, certificate) as port:
        url = f"rediss://:{PASSWORD}@127.0.0.1:{port}/0?ssl_ca_certs={certificate[0]}"
        store = TokenStore.open(url, metrics, ttl_s=60)
        ref, record = make_record(80)
        assert await store.put(record)
        assert set(await store.get([ref], FORM)) == {ref.key}
        await store.close()


@pytest.mark.parametrize(
    ("scheme", "host", "query"),
    [
        ("rediss", "127.0.0.1", ""),
        ("rediss", "localhost", "?ssl_ca_certs={ca}"),
        ("rediss+cluster", "127.0.0.1", ""),
        ("redis", "127.0.0.1", ""),
    ],
    ids=["an unknown authority", "another name", "a cluster of an unknown authority", "no TLS"],
)
async def test_nothing_passes_to_a_server_in_doubt(
    shared_redis: RedisServer, certificate: tuple[Path, Path], metrics: Metrics, scheme: str, host: str, query: str
) -> None:
    async with tls_before(shared_redis, certificate) as port:
        url = f"{scheme}://:{PASSWORD}@{host}:{port}/0{query.format(ca=certificate[0])}"
        store = TokenStore.open(url, metrics, ttl_s=60)
        await every_operation_is_a_miss(store)
        await store.close()
