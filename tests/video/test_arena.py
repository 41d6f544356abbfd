"""Shared memory between decoding and encoding."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvila.errors import DeadlineExceeded, LimitExceeded, Unavailable
from nvila.types import Deadline
from nvila.video.arena import FrameArena

PREFIX = f"nvila-test-{os.getpid()}"
PAGE = 4096


def regions(prefix: str = PREFIX) -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob(f"{prefix}-*"))


@pytest.fixture
def arena() -> Iterator[FrameArena]:
    made = FrameArena.create(PREFIX, 4 * PAGE)
    yield made
    made.close()
    assert regions() == []


async def test_locations_never_overlap_and_name_the_region(arena: FrameArena) -> None:
    first, second = [await arena.allocate(PAGE + 1, Deadline.after(1)) for _ in range(2)]
    assert first.offset + 2 * PAGE <= second.offset
    assert (first.region, first.region_bytes) == (arena.region, 4 * PAGE)
    assert Path("/dev/shm", first.region.lstrip("/")).stat().st_size == 4 * PAGE


async def test_a_new_region_takes_no_memory_until_it_is_written(arena: FrameArena) -> None:
    assert arena.path.stat().st_blocks == 0


async def test_a_full_arena_makes_the_next_wait_for_room(arena: FrameArena) -> None:
    held = await arena.allocate(4 * PAGE, Deadline.after(1))
    waiting = asyncio.create_task(arena.allocate(PAGE, Deadline.after(5)))
    await asyncio.sleep(0)
    assert not waiting.done()
    arena.release(held)
    assert (await waiting).offset == 0


async def test_a_large_request_is_not_overtaken_by_small_ones(arena: FrameArena) -> None:
    first = await arena.allocate(2 * PAGE, Deadline.after(1))
    large = asyncio.create_task(arena.allocate(4 * PAGE, Deadline.after(5)))
    await asyncio.sleep(0)
    small = asyncio.create_task(arena.allocate(PAGE, Deadline.after(5)))
    await asyncio.sleep(0)
    assert not small.done()
    arena.release(first)
    arena.release(await large)
    assert (await small).nbytes == PAGE


async def test_a_wait_ends_with_the_requests_deadline_and_reserves_nothing(arena: FrameArena) -> None:
    held = await arena.allocate(4 * PAGE, Deadline.after(1))
    with pytest.raises(DeadlineExceeded):
        await arena.allocate(PAGE, Deadline.after(0.01))
    arena.release(held)
    assert arena.used_bytes == 0


async def test_a_cancelled_wait_lets_the_next_in_line_pass(arena: FrameArena) -> None:
    held = await arena.allocate(2 * PAGE, Deadline.after(1))
    large = asyncio.create_task(arena.allocate(4 * PAGE, Deadline.after(5)))
    small = asyncio.create_task(arena.allocate(PAGE, Deadline.after(5)))
    await asyncio.sleep(0)
    large.cancel()
    arena.release(await small)
    arena.release(held)
    assert arena.used_bytes == 0


async def test_room_that_comes_to_a_wait_being_cancelled_is_given_on(arena: FrameArena) -> None:
    held = await arena.allocate(4 * PAGE, Deadline.after(1))
    waiting = asyncio.create_task(arena.allocate(4 * PAGE, Deadline.after(5)))
    await asyncio.sleep(0)
    arena.release(held)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert arena.used_bytes == 0


async def test_what_can_never_fit_is_refused_with_both_numbers(arena: FrameArena) -> None:
    with pytest.raises(LimitExceeded, match=r"20,000 asked, at most 16,384"):
        await arena.allocate(20_000, Deadline.after(1))


def test_more_than_the_machines_shared_memory_is_refused_at_the_start() -> None:
    with pytest.raises(Unavailable, match="bytes free"):
        FrameArena.create(PREFIX, 1 << 60)
    assert regions() == []


def test_what_a_killed_owner_left_behind_is_removed_and_a_living_owners_region_is_not(arena: FrameArena) -> None:
    program = f"import os; from nvila.video.arena import FrameArena; FrameArena.create('{PREFIX}', 4096); os.kill(0, 9)"
    subprocess.run([sys.executable, "-c", program], check=False, start_new_session=True)
    assert len(regions()) == 2
    FrameArena.create(PREFIX, PAGE).close()
    assert regions() == [arena.path.name]
