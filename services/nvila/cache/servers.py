"""How the store talks to Redis: to one server, or to a Redis Cluster, of which only this module knows.

`redis://` and `rediss://` (TLS) name one server, `redis+cluster://` and `rediss+cluster://` any server of a cluster (or
a name that leads to all of them), from which the others are learnt. Further options stand in the query, as redis-py
names them: `?ssl_ca_certs=/etc/ca.crt`.

In a cluster each command goes to the server that holds its first key; the store names its keys so that those of one
command share a slot. What moved is followed, once with MOVED or ASK. A server that is away costs its own keys and
nobody else's: their commands answer with its error, at once after the first time, and the slots are looked up anew.
Commands, for ACLs, besides the store's: CLUSTER SLOTS, ASKING.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis.asyncio as redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, RedisError, ResponseError
from redis.exceptions import ConnectionError as NoAnswer

from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)

Command = tuple[Any, ...]
Address = tuple[str, int]

PROBE_EVERY_S = 1.0
_PIPELINE_DEPTH = 32
"""Commands sent before their answers are read: at most 32 MiB in flight on a connection (ANCHORS P58)."""


def connect(
    url: str, *, timeout_s: float, connect_timeout_s: float = 0.5, max_connections: int = 16
) -> OneServer | Cluster:
    """The server or the cluster at an address; nothing is sent yet. Raises `ValueError` for an address that is not one.

    `timeout_s`: of one round trip. `max_connections`: to each server.
    """
    plain = url.replace("+cluster://", "://", 1)
    options: dict[str, Any] = {**parse_url(plain)}
    seed = (options.pop("host", "localhost"), options.pop("port", 6379))

    def open_server(address: Address) -> OneServer:
        pool = redis.BlockingConnectionPool(
            **options,
            host=address[0],
            port=address[1],
            max_connections=max_connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=connect_timeout_s,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,  # no CLIENT SETINFO, which a narrow ACL forbids
        )
        return OneServer(redis.Redis.from_pool(pool), timeout_s)

    if plain == url:
        return open_server(seed)
    if options.get("db"):
        raise ValueError(f"a Redis Cluster has database 0 only, and the address says {options['db']}")
    return Cluster(seed, open_server)


class OneServer:
    """Connections to one Redis server."""

    def __init__(self, client: redis.Redis, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Answers of all commands, in order; an error answer is in its place. One round trip per 32 commands.

        Raises `RedisError`, `OSError` or `TimeoutError` when the server does not answer.
        """
        answers: list[Any] = []
        for start in range(0, len(commands), _PIPELINE_DEPTH):
            pipeline = self._client.pipeline(transaction=False)
            for command in commands[start : start + _PIPELINE_DEPTH]:
                pipeline.execute_command(*command)
            async with asyncio.timeout(self._timeout_s):
                answers += await pipeline.execute(raise_on_error=False)
        return answers

    async def info(self) -> list[Mapping[str, Any] | None]:
        """What the server says about itself; raises as `ask` does."""
        return [await self._client.info()]

    async def close(self) -> None:
        await self._client.aclose()


class Cluster:
    """Connections to the primaries of a Redis Cluster."""

    def __init__(self, seed: Address, open_server: Callable[[Address], OneServer]) -> None:
        self._seed = seed
        self._open_server = open_server
        self._servers: dict[Address, OneServer] = {}
        self._breakers: defaultdict[Address, Breaker] = defaultdict(Breaker)
        self._holders: list[tuple[int, int, Address]] = []
        """(first slot, last slot, who holds them)"""
        self._moved: dict[int, Address] = {}
        """Slots that have gone elsewhere since the holders were learnt."""
        self._looks_again_s = 0.0
        """When the holders are to be learnt anew; infinite while nothing speaks against them."""
        self._lock = asyncio.Lock()

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Answers of all commands, in order; an error answer, or that of a server which is away, is in its place.

        Raises `RedisError`, `OSError` or `TimeoutError` when no server answers.
        """
        await self._learn()
        slots = [key_slot(_key(command).encode()) for command in commands]
        wanted = {index: self._holder(slot) for index, slot in enumerate(slots)}
        answers = await self._gather(commands, wanted)
        led_elsewhere = {}
        for index, answer in answers.items():
            if isinstance(answer, AskError):  # or MOVED, which derives from it
                led_elsewhere[index] = (answer.host or self._seed[0], answer.port)
            if isinstance(answer, MovedError):
                self._moved[slots[index]] = led_elsewhere[index]
                self._doubt()
        if led_elsewhere:
            # ASKING concerns the next command only, and says nothing where a slot has moved for good.
            followed = [command for index in led_elsewhere for command in (("ASKING",), commands[index])]
            places = [(index, place) for index, place in led_elsewhere.items() for _ in range(2)]
            second = await self._gather(followed, {number: place for number, (_, place) in enumerate(places)})
            answers |= {index: second[number] for number, (index, _) in enumerate(places) if number % 2}
        if all(self._breakers[holder].is_open for _, _, holder in self._holders):
            raise NoAnswer(f"none of the cluster's servers answers: {answers.get(0)}")
        return [answers[index] for index in range(len(commands))]

    async def info(self) -> list[Mapping[str, Any] | None]:
        """What each primary says about itself, None for those that are away; raises as `ask` does."""
        await self._learn()
        holders = sorted({holder for _, _, holder in self._holders})
        found = await asyncio.gather(*(self._server(one).info() for one in holders), return_exceptions=True)
        heard = [one if isinstance(one, list) else None for one in found]
        if not any(heard):
            raise NoAnswer(f"none of {len(holders)} servers answers: {found}")
        return [one[0] if one else None for one in heard]

    async def close(self) -> None:
        for server in self._servers.values():
            await server.close()

    async def _gather(self, commands: Sequence[Command], wanted: Mapping[int, Address | None]) -> dict[int, Any]:
        """Ask each server at once for what is wanted of it, in order."""
        by_server: defaultdict[Address | None, list[int]] = defaultdict(list)
        for index, address in wanted.items():
            by_server[address].append(index)
        asked = (self._ask_one(address, [commands[index] for index in those]) for address, those in by_server.items())
        answers: dict[int, Any] = {}
        for those, found in zip(by_server.values(), await asyncio.gather(*asked), strict=True):
            answers.update(zip(those, found, strict=True))
        return answers

    async def _ask_one(self, address: Address | None, commands: Sequence[Command]) -> list[Any]:
        if address is None:
            self._doubt()
            return [NoAnswer("no server holds this slot")] * len(commands)
        breaker = self._breakers[address]
        if not breaker.allows():
            return [NoAnswer(f"{address[0]}:{address[1]} did not answer just now")] * len(commands)
        try:
            answers = await self._server(address).ask(commands)
        except (RedisError, OSError, TimeoutError) as error:
            if breaker.failed():
                where = f"{address[0]}:{address[1]}"
                _log.warning("a server of the cache does not answer", extra=fields(server=where, reason=told(error)))
            self._doubt()
            return [NoAnswer(f"{address[0]}:{address[1]}: {told(error)}")] * len(commands)
        breaker.succeeded()
        return answers

    def _server(self, address: Address) -> OneServer:
        if address not in self._servers:
            self._servers[address] = self._open_server(address)
        return self._servers[address]

    def _holder(self, slot: int) -> Address | None:
        found = (holder for first, last, holder in self._holders if first <= slot <= last)
        return self._moved.get(slot) or next(found, None)

    def _doubt(self) -> None:
        self._looks_again_s = min(self._looks_again_s, time.monotonic() + PROBE_EVERY_S)

    async def _learn(self) -> None:
        """Ask who holds which slots where that is not known or in doubt: the seed first, whose name may lead elsewhere
        by now, then those that were known. While one call asks, others go on with what is known."""
        if time.monotonic() < self._looks_again_s or (self._holders and self._lock.locked()):
            return
        async with self._lock:
            if time.monotonic() < self._looks_again_s:
                return
            reasons = []
            for address in dict.fromkeys([self._seed, *(holder for _, _, holder in self._holders)]):
                [answer] = await self._ask_one(address, [("CLUSTER", "SLOTS")])
                if isinstance(answer, list) and answer:
                    self._holders = [
                        (first, last, (str(host or b"", "utf-8") or address[0], port))
                        for first, last, (host, port, *_), *_ in answer
                    ]
                    self._moved.clear()
                    self._looks_again_s = float("inf")
                    await self._forget_others()
                    return
                reasons.append(f"{address[0]}:{address[1]} says {answer}")
            if not self._holders:
                raise NoAnswer(f"no server tells who holds which keys: {'; '.join(reasons)}")
            self._looks_again_s = time.monotonic() + PROBE_EVERY_S

    async def _forget_others(self) -> None:
        kept = {self._seed, *(holder for _, _, holder in self._holders)}
        for address in [one for one in self._servers if one not in kept]:
            self._breakers.pop(address, None)
            with contextlib.suppress(RedisError, OSError):
                await self._servers.pop(address).close()


class Breaker:
    """Closed while a server answers; after a failure it lets one call through each `PROBE_EVERY_S`."""

    def __init__(self) -> None:
        self._is_up: bool | None = None
        self._next_probe_s = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the last call failed."""
        return self._is_up is False

    def allows(self) -> bool:
        if not self.is_open:
            return True
        now = time.monotonic()
        if now < self._next_probe_s:
            return False
        self._next_probe_s = now + PROBE_EVERY_S
        return True

    def failed(self) -> bool:
        """True when this is news."""
        was_up, self._is_up = self._is_up, False
        self._next_probe_s = time.monotonic() + PROBE_EVERY_S
        return was_up is not False

    def succeeded(self) -> bool:
        """True when this is news."""
        was_up, self._is_up = self._is_up, True
        return was_up is not True


def is_silence(answer: Any) -> bool:
    """Whether what stands in an answer's place says that nobody answered, and not that somebody refused."""
    return isinstance(answer, RedisError | OSError | TimeoutError) and not isinstance(answer, ResponseError)


def told(error: BaseException) -> str:
    """A failure's kind and words; redis-py's own `repr` leaves the words out."""
    return f"{type(error).__name__}: {error}"


def _key(command: Command) -> str:
    """The first key of one of the store's commands."""
    return str(command[3] if command[0] == "EVAL" else command[1])
