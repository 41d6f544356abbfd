"""Which ports a stack's parts listen on."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass, fields

from nvila.errors import InvalidRequest

HOST = "127.0.0.1"
"""Parts listen on loopback only. Anything wider is the work of docker-compose.yml or the chart."""

HIGHEST_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class Ports:
    gateway: int
    gateway_grpc: int
    cache: int
    vision_http: int
    vision_grpc: int
    vision_metrics: int
    decode_grpc: int
    decode_http: int
    recordings: int


def choose_ports(*, port: int | None = None, base_port: int | None = None) -> Ports:
    """`base_port`: that and the following ones, in the order of `Ports`. Otherwise free ones; `port` for the gateway's
    HTTP, which without it is 8000 when that is free."""
    names = [field.name for field in fields(Ports)]
    _check_range("--port", port, HIGHEST_PORT)
    _check_range("--base-port", base_port, HIGHEST_PORT + 1 - len(names))
    if base_port is not None:
        chosen = dict(zip(names, range(base_port, base_port + len(names)), strict=True))
        if taken := [number for number in chosen.values() if not _is_free(number)]:
            raise InvalidRequest(f"--base-port {base_port}: port {taken[0]} is in use")
        return Ports(**chosen)
    if port is not None and not _is_free(port):
        raise InvalidRequest(f"--port {port}: the port is in use")
    first = port or (8000 if _is_free(8000) else None)
    rest = _free_ports()
    return Ports(**{name: first if name == "gateway" and first else next(rest) for name in names})


def _check_range(option: str, port: int | None, highest: int) -> None:
    if port is not None and not 1 <= port <= highest:
        raise InvalidRequest(f"{option} {port}: must be from 1 to {highest}")


def _free_ports() -> Iterator[int]:
    """Below the range that outgoing connections use (32768 and up on Linux), so that none is taken between now and a
    part's start."""
    for number in random.sample(range(20_000, 32_000), 12_000):
        if _is_free(number):
            yield number


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
