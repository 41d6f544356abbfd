"""The Redis that `nvila up` starts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import redis.asyncio as redis
from redis.exceptions import AuthenticationError, NoPermissionError

from nvila.cache.server import find_redis_server, write_config
from tests.cache.redis_server import RedisServer


def test_a_server_is_found_on_this_machine() -> None:
    assert find_redis_server().exists()


def test_the_file_with_the_password_is_for_its_owner_only(tmp_path: Path) -> None:
    config = write_config(tmp_path, port=1, maxmemory_bytes=1, password="x")
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


async def test_without_the_password_nothing_is_served(shared_redis: RedisServer) -> None:
    client = redis.Redis(port=shared_redis.port)
    with pytest.raises(AuthenticationError):
        await client.get("nvila:x")
    await client.aclose()


@pytest.mark.parametrize("command", ["FLUSHALL", "CONFIG GET *", "SHUTDOWN", "KEYS *", "GET elsewhere"])
async def test_the_default_user_can_neither_administrate_nor_leave_its_keys(
    shared_redis: RedisServer, command: str
) -> None:
    client = redis.Redis.from_url(shared_redis.url)
    with pytest.raises(NoPermissionError):
        await client.execute_command(*command.split())  # type: ignore[no-untyped-call]
    await client.aclose()
