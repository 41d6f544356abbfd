"""The token store on a real Redis Cluster: records on all servers, and what happens when slots move or servers go."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nvila.cache.codec import Record
from nvila.cache.servers import Cluster, connect
from nvila.cache.store import Lease, TokenStore
from nvila.telemetry.metrics import Metrics
from nvila.types import Deadline, TokensRef
from tests.cache.redis_cluster import RedisCluster
from tests.cache.redis_server import RedisServer
from tests.cache.test_store import FORM, every_operation_is_a_miss, make_record, sample

RULES = "~nvila:* -@all +exists +set +get +eval +pttl +pexpire +unlink +info +cluster|slots +asking"
"""Of the gateway, as the chart's NOTES print them (a test compares)."""


def _cluster(folder: Path) -> Iterator[RedisCluster]:
    servers = RedisCluster(folder, user_rules=RULES)
    try:
        servers.form()
        yield servers
    finally:
        servers.stop()


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    yield from _cluster(tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    yield from _cluster(tmp_path)


@pytest.fixture
async def store(shared_cluster: RedisCluster, metrics: Metrics) -> AsyncIterator[TokenStore]:
    opened = TokenStore.open(shared_cluster.url, metrics, ttl_s=60)
    yield opened
    await opened.close()


def manifest(ref: TokensRef) -> str:
    return f"nvila:{{{ref.key}}}:m"


def one_record_on_each(servers: RedisCluster) -> list[tuple[TokensRef, Record]]:
    """In the order of the servers."""
    found: dict[int, tuple[TokensRef, Record]] = {}
    while len(found) < 3:
        made = make_record(90, tokens=1200)
        found.setdefault(servers.holder(manifest(made[0])), made)
    return [found[index] for index in range(3)]


async def test_records_lie_on_all_servers_and_come_back_in_one_call(
    shared_cluster: RedisCluster, store: TokenStore
) -> None:
    made = [*one_record_on_each(shared_cluster), *(make_record(seed) for seed in range(12))]  # 60 values
    assert [await store.put(record) for _, record in made] == [True] * 15
    absent, _ = make_record(91)
    refs = [*(ref for ref, _ in made), absent]
    keys = {ref.key for ref, _ in made}
    assert await store.has(refs, FORM) == keys
    assert set(await store.get(refs, FORM)) == keys
    assert await store.await_tokens(refs, FORM, Deadline.after(0.05)) == {absent.key}
    for index, (ref, _) in enumerate(made[:3]):
        assert shared_cluster.admin(index).exists(manifest(ref)) == 1


async def test_plans_and_leases_are_kept_as_by_one_server(store: TokenStore) -> None:
    for number in range(6):
        await store.remember(f"{number:064x}", b"plan %d" % number)
    assert [await store.recall(f"{number:064x}") for number in range(6)] == [b"plan %d" % n for n in range(6)]
    ref, record = make_record(92)

    async def encode() -> Lease:
        async with store.lease(ref, FORM, Deadline.after(5)) as lease:
            if lease.must_encode:
                await store.put(record)
            return lease

    assert sorted(await asyncio.gather(*(encode() for _ in range(4)))) == [Lease.HELD] + [Lease.REUSED] * 3


async def test_the_servers_memory_is_summed(shared_cluster: RedisCluster, store: TokenStore, metrics: Metrics) -> None:
    assert await store.measure()
    largest = max(shared_cluster.ask(index, "INFO", "memory")["used_memory"] for index in range(3))
    assert sample(metrics, "nvila_cache_used_bytes") > 1.5 * largest
    assert sample(metrics, "nvila_cache_up") == 1


async def test_a_slot_on_its_way_and_one_that_moved_are_followed(own_cluster: RedisCluster, metrics: Metrics) -> None:
    store = TokenStore.open(own_cluster.url, metrics, ttl_s=60)
    (_, _), (ref, record), _ = one_record_on_each(own_cluster)
    assert await store.put(record)
    slot = own_cluster.ask(1, "CLUSTER", "KEYSLOT", manifest(ref))
    source, target = (own_cluster.ask(index, "CLUSTER", "MYID").decode() for index in (1, 2))
    own_cluster.ask(2, "CLUSTER", "SETSLOT", slot, "IMPORTING", source)
    own_cluster.ask(1, "CLUSTER", "SETSLOT", slot, "MIGRATING", target)
    keys = own_cluster.ask(1, "CLUSTER", "GETKEYSINSLOT", slot, 100)
    own_cluster.ask(1, "MIGRATE", "127.0.0.1", own_cluster.ports[2], keys[0], 0, 5000)
    assert await store.get([ref], FORM) != {}, "each part is asked for where it is now"
    assert await store.has([ref], FORM) == set(), "parts on both servers cannot be counted, and that is a miss"
    own_cluster.ask(1, "MIGRATE", "127.0.0.1", own_cluster.ports[2], "", 0, 5000, "KEYS", *keys[1:])
    assert await store.has([ref], FORM) == {ref.key}
    for index in range(3):
        own_cluster.ask(index, "CLUSTER", "SETSLOT", slot, "NODE", target)
    assert set(await store.get([ref], FORM)) == {ref.key}
    assert await store.put(record)
    await store.close()


async def test_a_server_that_goes_costs_its_own_records_only_and_no_waiting(
    own_cluster: RedisCluster, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvila.cache.servers.PROBE_EVERY_S", 0.2)
    store = TokenStore.open(own_cluster.url, metrics, ttl_s=60, timeout_s=0.3)
    made = one_record_on_each(own_cluster)
    refs = [ref for ref, _ in made]
    for _, record in made:
        assert await store.put(record)
    own_cluster.signal(0, signal.SIGSTOP)  # the one whose address the store was given
    alive = {ref.key for ref in refs[1:]}
    assert set(await store.get(refs, FORM)) == alive
    assert sample(metrics, "nvila_cache_reads_total", outcome="unavailable") == 1
    started = time.perf_counter()
    assert await store.has(refs, FORM) == alive
    assert await store.await_tokens(refs, FORM, Deadline.after(60)) == {refs[0].key}
    assert [await store.put(record) for _, record in made] == [False, True, True]
    async with store.lease(refs[0], FORM, Deadline.after(60)) as lease:
        assert lease is Lease.WITHOUT
    assert time.perf_counter() - started < 3
    assert await store.measure()
    assert sample(metrics, "nvila_cache_up") == pytest.approx(2 / 3)
    own_cluster.signal(0, signal.SIGCONT)
    async with asyncio.timeout(30):
        while set(await store.get(refs, FORM)) != {ref.key for ref in refs}:
            await asyncio.sleep(0.05)
    await store.close()


async def test_with_all_servers_gone_everything_is_a_miss(own_cluster: RedisCluster, metrics: Metrics) -> None:
    store = TokenStore.open(own_cluster.url, metrics, ttl_s=60)
    assert await store.measure()
    own_cluster.stop()
    await every_operation_is_a_miss(store)
    assert sample(metrics, "nvila_cache_up") == 0
    await store.close()


async def test_with_the_cluster_absent_from_the_start_everything_is_a_miss(metrics: Metrics) -> None:
    store = TokenStore.open("redis+cluster://127.0.0.1:1", metrics, ttl_s=60)
    await every_operation_is_a_miss(store)
    await store.close()


async def test_a_server_that_is_in_no_cluster_is_a_miss_whose_reason_is_told(
    shared_redis: RedisServer, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    store = TokenStore.open(shared_redis.admin_url.replace("redis://", "redis+cluster://"), metrics, ttl_s=60)
    await every_operation_is_a_miss(store)
    assert "cluster support disabled" in str([vars(record) for record in caplog.records])
    await store.close()


async def test_a_cluster_has_no_databases() -> None:
    with pytest.raises(ValueError, match="database 0 only"):
        connect("redis+cluster://127.0.0.1/3", timeout_s=1)


async def test_an_address_says_whether_tls_is_spoken_to_every_server() -> None:
    servers = connect("rediss+cluster://127.0.0.1/0?ssl_ca_certs=/etc/ca.crt", timeout_s=1)
    assert isinstance(servers, Cluster)
    pool = servers._server(("10.0.0.7", 6379))._client.connection_pool
    assert pool.connection_class.__name__ == "SSLConnection"
    assert (pool.connection_kwargs["host"], pool.connection_kwargs["ssl_ca_certs"]) == ("10.0.0.7", "/etc/ca.crt")
