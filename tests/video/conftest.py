"""A decode pool of two workers that the tests of this folder share, and a check that it leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import psutil
import pytest

from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits
from nvila.video.pool import DecodePool

PREFIX = f"nvila-test-pool-{os.getpid()}"
Pools = Callable[..., AbstractAsyncContextManager[DecodePool]]


@asynccontextmanager
async def decode_pool(arena_bytes: int = 32 * 1024**2, limits: DecodeLimits | None = None) -> AsyncIterator[DecodePool]:
    before = set(psutil.Process().children(recursive=True))
    pool = await DecodePool.start(limits or DecodeLimits(), FrameArena.create(PREFIX, arena_bytes))
    region = pool.arena.path
    try:
        yield pool
    finally:
        await pool.aclose()
    assert set(psutil.Process().children(recursive=True)) <= before, "a worker outlived its pool"
    assert not region.exists(), "shared memory outlived its pool"
    assert region not in set(Path("/dev/shm").iterdir())


@pytest.fixture
def pools() -> Pools:
    """Makes a pool with its own limits; closing it checks that nothing is left."""
    return decode_pool


@pytest.fixture(scope="session")
async def pool() -> AsyncIterator[DecodePool]:
    async with decode_pool() as made:
        yield made
