"""A real Redis server per test session, and one of its own for tests that harm it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nvila.cache.store import TokenStore
from nvila.telemetry.metrics import Metrics
from tests.cache.redis_server import RedisServer


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def store(shared_redis: RedisServer, metrics: Metrics) -> AsyncIterator[TokenStore]:
    opened = TokenStore.open(shared_redis.url, metrics, ttl_s=60)
    yield opened
    await opened.close()
