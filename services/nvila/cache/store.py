"""The token store: visual-token records, leases and remembered plans in Redis, none of which a request depends on.

Every failure of Redis is counted, logged and treated as a miss (STYLE §8): callers see records or no records, never an
exception. After a failure a breaker answers for Redis at once, and lets one call through each second to look again, so
that a dead Redis costs microseconds.

Names in Redis, one hash slot per record: `nvila:{key}:m` manifest · `nvila:{key}:s0`… shards · `nvila:{key}:l` lease ·
`nvila:plan:{key}` plan. All expire, so `volatile-lru` may evict any of them; a record is complete only when manifest
and all shards are there, and a reader knows their number beforehand. Commands, for ACLs: vision SET UNLINK; decode
EXISTS GET EVAL (with PTTL PEXPIRE); gateway EXISTS SET GET EVAL (with PTTL PEXPIRE UNLINK) INFO. In a cluster
(cache/servers.py) a server that is away is a miss for the records that it holds.

Each program has a `ttl_s` of its own. Who reads a record makes it live that long from then on, or leaves it the longer
life that another gave it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from blake3 import blake3
from opentelemetry import trace
from redis.exceptions import RedisError, ResponseError

from nvila.cache.codec import CorruptRecord, Record, RecordFormat, traceparent_of, unpack
from nvila.cache.servers import Breaker, Cluster, OneServer, connect, is_silence, told
from nvila.telemetry import names, tracing
from nvila.telemetry.logs import fields
from nvila.telemetry.names import Metric
from nvila.types import Deadline, TokensRef, VisualTokens

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_PROLONG = (  # PEXPIRE GT does the same, from Redis 7 on
    "if redis.call('pttl', KEYS[1]) < tonumber(ARGV[1]) then return redis.call('pexpire', KEYS[1], ARGV[1]) end "
    "return 0"
)
_RENEW = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('unlink', KEYS[1]) end return 0"


class MetricSink(Protocol):
    """What the store asks of its process's metrics (telemetry/metrics.py)."""

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None: ...
    def set(self, metric: Metric, value: float, **labels: str) -> None: ...
    def observe(self, metric: Metric, value: float, **labels: str) -> None: ...


class Lease(StrEnum):
    """What a caller who asked for a record's lease is to do."""

    HELD = "held"
    """Encode: nobody else is doing so."""
    TAKEN_OVER = "taken_over"
    """Encode: whoever was doing so stopped before the record was there."""
    REUSED = "reused"
    """Do not encode: the record is there now."""
    WITHOUT = "without"
    """Encode: Redis does not answer, so nobody can be asked."""

    @property
    def must_encode(self) -> bool:
        return self is not Lease.REUSED


class TokenStore:
    """One process's connections to Redis. Make it with `open` inside a running event loop; `close` it at the end."""

    def __init__(
        self, servers: OneServer | Cluster, metrics: MetricSink, *, ttl_s: float, lease_s: float = 10.0
    ) -> None:
        self._servers = servers
        self._metrics = metrics
        self._ttl_ms = round(ttl_s * 1000)
        self._lease_ms = round(lease_s * 1000)
        self._breaker = Breaker()

    @classmethod
    def open(
        cls, url: str, metrics: MetricSink, *, ttl_s: float, timeout_s: float = 2.0, lease_s: float = 10.0
    ) -> TokenStore:
        """A store on `redis[s]://[user:password@]host:port/db` or, for a Redis Cluster, `redis[s]+cluster://…`; nothing
        is sent yet.

        `ttl_s`: how long a record lives after its last use here, at least. `timeout_s`: of one round trip. Raises
        `ValueError` for an address that is not one.
        """
        return cls(connect(url, timeout_s=timeout_s), metrics, ttl_s=ttl_s, lease_s=lease_s)

    async def close(self) -> None:
        await self._servers.close()

    # -- records

    async def has(self, refs: Iterable[TokensRef], form: RecordFormat) -> set[str]:
        """Keys of those records that are complete (not verified: that is for who reads them)."""
        complete, _ = await self._present(list(refs), form)
        return complete

    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]:
        """The verified tokens of those records that are there, by key; their lives are prolonged."""
        wanted = list({ref.key: ref for ref in refs}.values())
        values = await self._read("get", [name for ref in wanted for name in _names(ref, form)])
        if values is None:
            self._metrics.add(names.CACHE_READS, len(wanted), outcome="unavailable")
            return {}
        found: dict[str, VisualTokens] = {}
        position = 0
        for ref in wanted:
            count = len(_names(ref, form))
            parts, position = values[position : position + count], position + count
            tokens = await self._verified(ref, form, parts)
            if tokens is not None:
                found[ref.key] = tokens
        return found

    async def put(self, record: Record) -> bool:
        """Write a record, its manifest last; True when Redis has all of it. Writing twice is harmless."""
        parts = [*((f"s{index}", shard) for index, shard in enumerate(record.shards)), ("m", record.manifest)]
        commands = [("SET", _name(record.key, part), value, "PX", self._ttl_ms) for part, value in parts]
        answers = await self._attempt("put", lambda: self._servers.ask(commands))
        if answers is None or any(is_silence(answer) for answer in answers):
            outcome = "unavailable"
        elif all(answer is not None and not isinstance(answer, Exception) for answer in answers):
            outcome = "written"
            self._metrics.add(names.CACHE_BYTES, len(record.payload), direction="written")
        else:
            outcome = "refused"
            refusal = next(answer for answer in answers if isinstance(answer, Exception))
            _log.warning("the cache refused a record", extra=fields(key=record.key, reason=str(refusal)))
            await self._attempt(
                "put", lambda: self._servers.ask([("UNLINK", *(_name(record.key, part) for part, _ in parts))])
            )
        self._metrics.add(names.CACHE_WRITES, outcome=outcome)
        return outcome == "written"

    async def await_tokens(self, refs: Iterable[TokensRef], form: RecordFormat, deadline: Deadline) -> set[str]:
        """Wait until all those records are complete; returns the keys of those that are not, by the deadline or as soon
        as Redis does not answer. Never raises."""
        missing = {ref.key: ref for ref in refs}
        given_up: set[str] = set()
        pause_s = 0.005
        while missing:
            complete, silent = await self._present(list(missing.values()), form)
            given_up |= silent
            missing = {key: ref for key, ref in missing.items() if key not in complete | silent}
            left_s = deadline.at_s - time.monotonic()
            if left_s <= 0:
                break
            if missing:
                await asyncio.sleep(min(pause_s, left_s))
                pause_s = min(pause_s * 1.5, 0.05)
        return given_up | set(missing)

    # -- leases

    @asynccontextmanager
    async def lease(self, ref: TokensRef, form: RecordFormat, deadline: Deadline) -> AsyncIterator[Lease]:
        """Be the one who encodes a record, or wait for who does. Raises `DeadlineExceeded` when the wait is too long.

        A held lease is renewed until the block ends, and expires on its own if this process dies. It only saves work:
        two writers of one record write the same bytes.
        """
        name, owner = _name(ref.key, "l"), secrets.token_hex(16)
        lease = await self._claim(ref, form, name, owner, deadline)
        self._metrics.add(names.CACHE_LEASES, outcome=lease)
        if lease not in (Lease.HELD, Lease.TAKEN_OVER):
            yield lease
            return
        renewal = asyncio.create_task(self._renew(name, owner))
        try:
            yield lease
        finally:
            renewal.cancel()
            await self._release(name, owner)

    async def _claim(self, ref: TokensRef, form: RecordFormat, name: str, owner: str, deadline: Deadline) -> Lease:
        record = _names(ref, form)
        commands = [("SET", name, owner, "NX", "PX", self._lease_ms), ("EXISTS", *record)]
        pause_s, has_waited = 0.02, False
        while True:
            answers = await self._attempt("lease", lambda: self._servers.ask(commands))
            if answers is None or isinstance(answers[0], Exception):
                return Lease.WITHOUT
            is_mine, is_there = answers[0] is not None, answers[1] == len(record)
            if is_there:
                if is_mine:
                    await self._release(name, owner)
                return Lease.REUSED
            if is_mine:
                return Lease.TAKEN_OVER if has_waited else Lease.HELD
            has_waited = True
            await asyncio.sleep(min(pause_s, deadline.left_s()))
            pause_s = min(pause_s * 1.5, 0.2)

    async def _renew(self, name: str, owner: str) -> None:
        while True:
            await asyncio.sleep(self._lease_ms / 3000)
            await self._attempt("lease", lambda: self._servers.ask([("EVAL", _RENEW, 1, name, owner, self._lease_ms)]))

    async def _release(self, name: str, owner: str) -> None:
        await self._attempt("lease", lambda: self._servers.ask([("EVAL", _RELEASE, 1, name, owner)]))

    # -- plans

    async def recall(self, plan_key: str) -> bytes | None:
        """What was remembered under a plan key (cache/keys.py), intact, or None."""
        values = await self._read("plan", [_plan_name(plan_key)])
        value = values[0] if values else None
        if not isinstance(value, bytes):
            return None
        digest, plan = value[:32], value[32:]
        return plan if digest == _plan_digest(plan_key, plan) else None

    async def remember(self, plan_key: str, plan: bytes) -> None:
        """Keep a few bytes under a plan key for as long as a record lives."""
        value = _plan_digest(plan_key, plan) + plan
        commands = [("SET", _plan_name(plan_key), value, "PX", self._ttl_ms)]
        await self._attempt("plan", lambda: self._servers.ask(commands))

    # -- health

    async def measure(self) -> bool:
        """Set the gauges about the servers; call it every few seconds. True when Redis answers."""
        found = await self._attempt("info", self._servers.info)
        heard = [one for one in found or [] if one is not None]
        if heard:
            self._metrics.set(names.CACHE_USED_BYTES, sum(one["used_memory"] for one in heard))
            self._metrics.set(names.CACHE_EVICTED, sum(one["evicted_keys"] for one in heard))
        self._metrics.set(names.CACHE_UP, len(heard) / len(found) if found else 0)
        return bool(heard)

    # -- inside

    async def _read(self, operation: str, names_in_redis: Sequence[str]) -> list[Any] | None:
        """What is under these names, whose lives are prolonged."""
        reads = [("GET", name) for name in names_in_redis]
        prolongs = [("EVAL", _PROLONG, 1, name, self._ttl_ms) for name in names_in_redis]
        answers = await self._attempt(operation, lambda: self._servers.ask([*reads, *prolongs]))
        return None if answers is None else answers[: len(reads)]

    async def _present(self, refs: Sequence[TokensRef], form: RecordFormat) -> tuple[set[str], set[str]]:
        """Keys of the complete ones, and of those about which nobody answers."""
        commands = [("EXISTS", *_names(ref, form)) for ref in refs]
        counts = await self._attempt("has", lambda: self._servers.ask(commands))
        if counts is None:
            return set(), {ref.key for ref in refs}
        answered = list(zip(refs, commands, counts, strict=True))
        complete = {ref.key for ref, command, count in answered if count == len(command) - 1}
        return complete, {ref.key for ref, _, count in answered if is_silence(count)}

    async def _verified(self, ref: TokensRef, form: RecordFormat, parts: Sequence[Any]) -> VisualTokens | None:
        manifest, *shards = parts
        if any(not isinstance(part, bytes) for part in parts):
            silent = any(is_silence(part) for part in parts)
            self._metrics.add(names.CACHE_READS, outcome="unavailable" if silent else "miss")
            return None
        try:
            tokens = await asyncio.to_thread(unpack, manifest, shards, ref, form)
        except CorruptRecord as error:
            self._metrics.add(names.CACHE_READS, outcome="corrupt")
            _log.warning("a cached record is corrupt", extra=fields(key=ref.key, reason=str(error)))
            return None
        self._metrics.add(names.CACHE_READS, outcome="hit")
        self._metrics.add(names.CACHE_BYTES, sum(map(len, shards)), direction="read")
        tracing.link_to(trace.get_current_span(), traceparent_of(manifest))
        return tokens

    async def _attempt(self, operation: str, work: Callable[[], Awaitable[_T]]) -> _T | None:
        """The one place where Redis fails: the result, or None when it does not answer."""
        if not self._breaker.allows():
            return None
        started = time.perf_counter()
        try:
            result = await work()
        except ResponseError as error:  # it answers, though not as we like
            _log.warning("the cache refused", extra=fields(operation=operation, reason=str(error)))
            return None
        except (RedisError, OSError, TimeoutError) as error:
            if self._breaker.failed():
                _log.warning("the cache does not answer", extra=fields(operation=operation, reason=told(error)))
            self._metrics.set(names.CACHE_UP, 0)
            return None
        if self._breaker.succeeded():
            _log.info("the cache answers")
            self._metrics.set(names.CACHE_UP, 1)
        self._metrics.observe(names.CACHE_SECONDS, time.perf_counter() - started, operation=operation)
        return result


def _name(key: str, part: str) -> str:
    return f"nvila:{{{key}}}:{part}"


def _names(ref: TokensRef, form: RecordFormat) -> list[str]:
    """All that makes a record complete, manifest first."""
    shards = form.shards(ref.tokens)
    return [_name(ref.key, "m"), *(_name(ref.key, f"s{index}") for index in range(shards))]


def _plan_name(plan_key: str) -> str:
    return f"nvila:plan:{{{plan_key}}}"


def _plan_digest(plan_key: str, plan: bytes) -> bytes:
    return blake3(plan_key.encode() + plan, derive_key_context="nvila plan").digest()
