"""Starts a real Redis Cluster of three servers on loopback, with the users that the chart's NOTES ask for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot

from nvila.cache.server import find_redis_server

PASSWORD = "secret"
_SLOTS = 16384


class RedisCluster:
    """Three primaries without replicas; `admin(index)` may do everything to one of them."""

    def __init__(self, folder: Path, *, user_rules: str) -> None:
        self.ports = [_free_port() for _ in range(3)]
        self.url = f"redis+cluster://app:{PASSWORD}@127.0.0.1:{self.ports[0]}/0"
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for port in self.ports:
            (folder / str(port)).mkdir()
            config = folder / str(port) / "redis.conf"
            config.write_text(
                f"bind 127.0.0.1\nport {port}\ndir {config.parent}\nsave ''\ncluster-enabled yes\n"
                "cluster-node-timeout 1000\ncluster-require-full-coverage no\n"
                f"user app on >{PASSWORD} {user_rules}\n"
            )
            self._processes[port] = subprocess.Popen([str(find_redis_server()), str(config)], stdout=subprocess.DEVNULL)

    def form(self) -> None:
        """Have the servers meet and share the slots; returns when all agree."""
        ends = [_SLOTS * number // 3 for number in range(4)]
        for index, port in enumerate(self.ports):
            admin = self.admin(index)
            _until(admin.ping, f"the server on port {port} answers")
            self.ask(index, "CLUSTER", "ADDSLOTS", *range(ends[index], ends[index + 1]))
            if index:
                self.ask(index, "CLUSTER", "MEET", "127.0.0.1", self.ports[0])
        for index in range(3):
            _until(partial(self._is_whole, index), "the servers know each other and all slots")

    def admin(self, index: int) -> redis.Redis:
        return redis.Redis(port=self.ports[index], socket_timeout=5)

    def ask(self, index: int, *command: object) -> Any:
        """The answer of one server to a command of its administrator."""
        return self.admin(index).execute_command(*command)  # type: ignore[no-untyped-call]

    def holder(self, name: str) -> int:
        """Index of the server that holds a key since the cluster was formed."""
        return key_slot(name.encode()) * 3 // _SLOTS

    def signal(self, index: int, number: signal.Signals) -> None:
        os.kill(self._processes[self.ports[index]].pid, number)

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _is_whole(self, index: int) -> bool:
        told: list[bytes] = self.ask(index, "CLUSTER", "INFO").splitlines()
        return b"cluster_state:ok" in told and b"cluster_slots_assigned:%d" % _SLOTS in told


def _until(holds: Callable[[], Any], what: str) -> None:
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        with contextlib.suppress(redis.ConnectionError):
            if holds():
                return
        time.sleep(0.02)
    raise TimeoutError(f"not within 20 s: {what}")


def _free_port() -> int:
    """One whose cluster bus, 10000 above it, is a port too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:
            return port
