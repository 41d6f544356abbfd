"""The token store on a real Redis: what it keeps, and that nothing Redis does becomes more than a miss."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import redis.asyncio as redis

from nvila.cache.codec import Record, RecordFormat, dequantize, pack, quantize
from nvila.cache.store import Lease, TokenStore
from nvila.errors import DeadlineExceeded
from nvila.telemetry.metrics import Metrics
from nvila.types import Deadline, Level, TokenDtype, TokensRef, VisualTokens
from tests.cache.redis_server import RedisServer

WIDTH = 512
_NUMBERS = itertools.count()
FORM = RecordFormat(width=WIDTH, dtype=TokenDtype.FLOAT32, vision_revision="rev")


def make_record(seed: int, *, tokens: int = 1200, form: RecordFormat = FORM) -> tuple[TokensRef, Record]:
    """Under a new key; about 2.4 MB in float32: three shards."""
    values_TD = np.random.default_rng(seed).normal(size=(tokens, WIDTH)).astype(np.float32)
    ref = TokensRef(key=f"{next(_NUMBERS):064x}", levels=(Level(4, tokens // 4),))
    stored, scales = quantize(values_TD, form.dtype)
    visual = VisualTokens(
        ref=ref, dtype=form.dtype, values_TD=stored, scales_T=scales, vision_revision=form.vision_revision
    )
    return ref, pack(visual)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def admin(shared_redis: RedisServer) -> AsyncIterator[redis.Redis]:
    """May do everything to the shared server."""
    client = redis.Redis.from_url(shared_redis.admin_url)
    yield client
    await client.aclose()


# -- what it keeps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TokenDtype)
async def test_what_was_put_is_had_and_got(store: TokenStore, metrics: Metrics, dtype: TokenDtype) -> None:
    form = RecordFormat(width=WIDTH, dtype=dtype, vision_revision="rev")
    ref, record = make_record(1000 + list(TokenDtype).index(dtype), form=form)
    assert await store.has([ref], form) == set()
    assert await store.put(record)
    assert await store.has([ref], form) == {ref.key}
    got = await store.get([ref], form)
    values_TD = np.random.default_rng(1000 + list(TokenDtype).index(dtype)).normal(size=(1200, WIDTH))
    np.testing.assert_allclose(dequantize(got[ref.key]), values_TD, atol=0.05)
    assert sample(metrics, "nvila_cache_reads_total", outcome="hit") == 1
    assert sample(metrics, "nvila_cache_bytes_total", direction="written") == form.payload_bytes(1200)


async def test_many_records_come_in_one_call_and_the_absent_are_left_out(store: TokenStore) -> None:
    made = [make_record(seed) for seed in range(15)]  # 60 values: two pipelines
    for _, record in made[:-1]:
        await store.put(record)
    got = await store.get([ref for ref, _ in made], FORM)
    assert set(got) == {ref.key for ref, _ in made[:-1]}


async def test_reading_a_record_begins_its_life_anew(store: TokenStore, admin: redis.Redis) -> None:
    ref, record = make_record(20)
    await store.put(record)
    names = [f"nvila:{{{ref.key}}}:{part}" for part in ("m", "s0", "s1", "s2")]
    for name in names:
        await admin.pexpire(name, 5_000)
    await store.get([ref], FORM)
    assert min([await admin.pttl(name) for name in names]) > 30_000


async def test_a_reader_takes_nothing_of_the_life_that_another_gave(
    store: TokenStore, shared_redis: RedisServer, admin: redis.Redis
) -> None:
    (ref, record), key = make_record(22), "ab" * 32
    await store.put(record)
    await store.remember(key, b"plan")
    hasty = TokenStore.open(shared_redis.url, Metrics(), ttl_s=1)
    assert ref.key in await hasty.get([ref], FORM)
    assert await hasty.recall(key) == b"plan"
    await hasty.close()
    names = [f"nvila:{{{ref.key}}}:m", f"nvila:{{{ref.key}}}:s0", f"nvila:plan:{{{key}}}"]
    assert min([await admin.pttl(name) for name in names]) > 30_000


async def test_two_writers_of_one_record_leave_one_good_record(store: TokenStore) -> None:
    ref, record = make_record(21)
    assert await asyncio.gather(*(store.put(record) for _ in range(4))) == [True] * 4
    assert ref.key in await store.get([ref], FORM)


async def test_plans_are_remembered_and_a_changed_one_is_forgotten(store: TokenStore, admin: redis.Redis) -> None:
    key = "ef" * 32
    assert await store.recall(key) is None
    await store.remember(key, b"plan")
    assert await store.recall(key) == b"plan"
    await admin.setrange(f"nvila:plan:{{{key}}}", 33, "x")
    assert await store.recall(key) is None


async def test_the_servers_memory_and_evictions_become_gauges(store: TokenStore, metrics: Metrics) -> None:
    assert await store.measure()
    assert sample(metrics, "nvila_cache_used_bytes") > 0
    assert sample(metrics, "nvila_cache_up") == 1


# -- records that must not be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["m", "s0", "s1", "s2"])
async def test_a_record_with_an_evicted_part_is_a_miss(store: TokenStore, admin: redis.Redis, part: str) -> None:
    ref, record = make_record(30)
    await store.put(record)
    await admin.unlink(f"nvila:{{{ref.key}}}:{part}")
    assert await store.has([ref], FORM) == set()
    assert await store.get([ref], FORM) == {}


@pytest.mark.parametrize("part", ["m", "s0", "s2"])
async def test_a_flipped_bit_is_a_counted_miss(
    store: TokenStore, metrics: Metrics, admin: redis.Redis, part: str
) -> None:
    ref, record = make_record(31)
    await store.put(record)
    name = f"nvila:{{{ref.key}}}:{part}"
    await admin.setbit(name, 12, 1 - await admin.getbit(name, 12))
    assert await store.get([ref], FORM) == {}
    assert sample(metrics, "nvila_cache_reads_total", outcome="corrupt") == 1


@pytest.mark.parametrize("part", ["m", "s0", "s2"])
async def test_a_truncated_value_is_a_miss(store: TokenStore, admin: redis.Redis, part: str) -> None:
    ref, record = make_record(32)
    await store.put(record)
    name = f"nvila:{{{ref.key}}}:{part}"
    value = await admin.get(name)
    await admin.set(name, value[: len(value) // 2], keepttl=True)
    assert await store.get([ref], FORM) == {}


async def test_a_value_of_another_redis_type_is_a_miss(store: TokenStore, admin: redis.Redis) -> None:
    ref, record = make_record(33)
    await store.put(record)
    name = f"nvila:{{{ref.key}}}:s1"
    await admin.unlink(name)
    await admin.execute_command("SADD", name, "x")  # type: ignore[no-untyped-call]
    assert await store.get([ref], FORM) == {}


@pytest.mark.parametrize(
    "form",
    [
        RecordFormat(width=WIDTH, dtype=TokenDtype.FLOAT32, vision_revision="another"),
        RecordFormat(width=WIDTH * 2, dtype=TokenDtype.BFLOAT16, vision_revision="rev"),
        RecordFormat(width=WIDTH, dtype=TokenDtype.BFLOAT16, vision_revision="rev"),
    ],
)
async def test_a_record_of_another_revision_width_or_type_is_a_miss(store: TokenStore, form: RecordFormat) -> None:
    ref, record = make_record(34)
    await store.put(record)
    assert await store.get([ref], form) == {}


# -- leases -----------------------------------------------------------------------------------------------------------


async def test_of_many_who_want_to_encode_one_does_and_the_others_reuse(store: TokenStore, metrics: Metrics) -> None:
    ref, record = make_record(40)
    encoded = 0

    async def encode() -> Lease:
        nonlocal encoded
        async with store.lease(ref, FORM, Deadline.after(5)) as lease:
            if lease.must_encode:
                encoded += 1
                await asyncio.sleep(0.05)
                await store.put(record)
            return lease

    leases = await asyncio.gather(*(encode() for _ in range(8)))
    assert encoded == 1
    assert sorted(leases) == [Lease.HELD] + [Lease.REUSED] * 7
    assert sample(metrics, "nvila_cache_leases_total", outcome="reused") == 7


async def test_a_waiter_takes_over_when_the_holder_ends_without_a_record(store: TokenStore) -> None:
    ref, _ = make_record(41)

    async def fail() -> None:
        async with store.lease(ref, FORM, Deadline.after(5)):
            await asyncio.sleep(0.05)
            raise RuntimeError("the encoder broke")

    failing = asyncio.create_task(fail())
    await asyncio.sleep(0.02)
    async with store.lease(ref, FORM, Deadline.after(5)) as lease:
        assert lease is Lease.TAKEN_OVER
    with pytest.raises(RuntimeError):
        await failing


async def test_the_lease_of_a_dead_process_expires_and_is_taken_over(
    shared_redis: RedisServer, admin: redis.Redis
) -> None:
    dead = TokenStore.open(shared_redis.url, Metrics(), ttl_s=60, lease_s=0.3)
    alive = TokenStore.open(shared_redis.url, Metrics(), ttl_s=60, lease_s=0.3)
    ref, _ = make_record(42)
    holding = dead.lease(ref, FORM, Deadline.after(5))
    await holding.__aenter__()
    for task in asyncio.all_tasks():  # as kill -9 would end its renewal
        if task.get_coro().__qualname__ == "TokenStore._renew":  # type: ignore[union-attr]
            task.cancel()
    async with alive.lease(ref, FORM, Deadline.after(5)) as lease:
        assert lease is Lease.TAKEN_OVER
        await holding.__aexit__(None, None, None)  # releases only what is its own
        assert await admin.exists(f"nvila:{{{ref.key}}}:l") == 1
    await dead.close()
    await alive.close()


async def test_a_lease_lives_as_long_as_its_holder_works(shared_redis: RedisServer) -> None:
    store = TokenStore.open(shared_redis.url, Metrics(), ttl_s=60, lease_s=0.3)
    ref, _ = make_record(43)
    async with store.lease(ref, FORM, Deadline.after(5)):
        with pytest.raises(DeadlineExceeded):
            async with store.lease(ref, FORM, Deadline.after(0.8)):
                pass
    await store.close()


async def test_a_cancelled_holder_gives_its_lease_back(store: TokenStore) -> None:
    ref, _ = make_record(44)

    async def hold() -> None:
        async with store.lease(ref, FORM, Deadline.after(5)):
            await asyncio.sleep(60)

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0.05)
    holder.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await holder
    async with store.lease(ref, FORM, Deadline.after(1)) as lease:
        assert lease is Lease.HELD


# -- waiting for records ----------------------------------------------------------------------------------------------


async def test_awaited_records_are_noticed_soon_after_they_are_put(store: TokenStore) -> None:
    ref, record = make_record(50)
    waiting = asyncio.create_task(store.await_tokens([ref], FORM, Deadline.after(60)))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await store.put(record)
    async with asyncio.timeout(5):
        assert await waiting == set()


async def test_records_that_do_not_come_in_time_are_named(store: TokenStore) -> None:
    (here, record), (absent, _) = make_record(51), make_record(52)
    await store.put(record)
    assert await store.await_tokens([here, absent], FORM, Deadline.after(0.1)) == {absent.key}


# -- a Redis that fails -----------------------------------------------------------------------------------------------


async def every_operation_is_a_miss(store: TokenStore) -> None:
    ref, record = make_record(60)
    assert await store.has([ref], FORM) == set()
    assert await store.get([ref], FORM) == {}
    assert not await store.put(record)
    assert await store.await_tokens([ref], FORM, Deadline.after(60)) == {ref.key}
    assert await store.recall("00" * 32) is None
    await store.remember("00" * 32, b"plan")
    assert not await store.measure()
    async with store.lease(ref, FORM, Deadline.after(60)) as lease:
        assert lease is Lease.WITHOUT


async def test_with_redis_absent_everything_is_a_miss(metrics: Metrics) -> None:
    store = TokenStore.open("redis://127.0.0.1:1/0", metrics, ttl_s=60)
    await every_operation_is_a_miss(store)
    assert sample(metrics, "nvila_cache_reads_total", outcome="unavailable") == 1
    assert sample(metrics, "nvila_cache_up") == 0
    await store.close()


async def test_a_dead_redis_is_asked_once_a_second_and_not_by_every_call(metrics: Metrics) -> None:
    asked = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        store = TokenStore.open(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", metrics, ttl_s=60)
        ref, _ = make_record(61)
        started = time.perf_counter()
        for _ in range(200):
            await store.get([ref], FORM)
        seconds = time.perf_counter() - started
        await store.close()
    assert asked <= seconds + 2
    assert sample(metrics, "nvila_cache_reads_total", outcome="unavailable") == 200


async def test_with_a_wrong_password_everything_is_a_miss(shared_redis: RedisServer, metrics: Metrics) -> None:
    store = TokenStore.open(f"redis://:wrong@127.0.0.1:{shared_redis.port}/0", metrics, ttl_s=60)
    await every_operation_is_a_miss(store)
    await store.close()


async def test_redis_killed_in_the_middle_of_a_pipeline_is_a_miss_and_comes_back(
    own_redis: RedisServer, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvila.cache.servers.PROBE_EVERY_S", 0.1)
    store = TokenStore.open(own_redis.url, metrics, ttl_s=60)
    ref, record = make_record(62, tokens=12_000)  # 24 shards
    assert await store.put(record)
    own_redis.signal(signal.SIGSTOP)  # so that the requests below are surely under way when it is killed
    reading, writing = asyncio.create_task(store.get([ref], FORM)), asyncio.create_task(store.put(record))
    await asyncio.sleep(0.1)
    own_redis.stop()
    assert await reading == {}
    assert not await writing
    await every_operation_is_a_miss(store)
    own_redis.start()
    async with asyncio.timeout(30):
        while not await store.put(record):
            await asyncio.sleep(0.05)
    assert ref.key in await store.get([ref], FORM)
    await store.close()


async def test_a_redis_that_hangs_costs_one_timeout_and_then_nothing(own_redis: RedisServer, metrics: Metrics) -> None:
    store = TokenStore.open(own_redis.url, metrics, ttl_s=60, timeout_s=1)
    assert await store.measure()
    own_redis.signal(signal.SIGSTOP)
    started = time.perf_counter()
    await every_operation_is_a_miss(store)
    assert time.perf_counter() - started < 4
    own_redis.signal(signal.SIGCONT)
    await store.close()


async def test_half_a_second_of_latency_is_slow_but_works(store: TokenStore, admin: redis.Redis) -> None:
    ref, record = make_record(63)
    await store.put(record)
    await admin.execute_command("CLIENT", "PAUSE", 500, "ALL")  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    assert ref.key in await store.get([ref], FORM)
    assert time.perf_counter() - started > 0.3


async def test_a_full_redis_that_may_not_evict_refuses_and_keeps_no_half_record(
    own_redis: RedisServer, metrics: Metrics
) -> None:
    admin = redis.Redis.from_url(own_redis.admin_url)
    await admin.config_set("maxmemory-policy", "noeviction")
    await admin.config_set("maxmemory", str(6 << 20))
    store = TokenStore.open(own_redis.url, metrics, ttl_s=60)
    made = [make_record(seed) for seed in range(6)]
    written = [await store.put(record) for _, record in made]
    assert not all(written)
    assert sample(metrics, "nvila_cache_writes_total", outcome="refused") == written.count(False)
    there = set(await store.get([ref for ref, _ in made], FORM))
    assert there == {ref.key for (ref, _), is_written in zip(made, written, strict=True) if is_written}
    await store.close()
    await admin.aclose()


async def test_an_evicting_redis_gives_whole_records_or_misses(own_redis: RedisServer, metrics: Metrics) -> None:
    admin = redis.Redis.from_url(own_redis.admin_url)
    await admin.config_set("maxmemory", str(12 << 20))
    store = TokenStore.open(own_redis.url, metrics, ttl_s=60)
    made = [make_record(seed) for seed in range(12)]
    for _, record in made:
        await store.put(record)
    got = await store.get([ref for ref, _ in made], FORM)
    assert len(got) < len(made)
    await store.measure()
    assert sample(metrics, "nvila_cache_evicted_keys") > 0
    await store.close()
    await admin.aclose()


async def test_a_cancelled_read_leaves_the_connection_usable(store: TokenStore) -> None:
    ref, record = make_record(64)
    await store.put(record)
    for _ in range(20):
        reading = asyncio.create_task(store.get([ref], FORM))
        await asyncio.sleep(0.001)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
    assert ref.key in await store.get([ref], FORM)
