"""A name that stands for several servers: calls take turns among them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvila.vision.client import VisionClient


class ReadyServer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Says that every model is ready, and counts how often it was asked."""

    def __init__(self, name: str, asked: Counter[str]) -> None:
        self._name = name
        self._asked = asked

    async def ModelReady(self, request: Any, context: Any) -> Any:
        self._asked[self._name] += 1
        return service_pb2.ModelReadyResponse(ready=True)


async def test_calls_take_turns_among_the_servers_of_one_name() -> None:
    asked: Counter[str] = Counter()
    servers, ports = [], []
    for name in ("one", "two"):
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(ReadyServer(name, asked), server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        servers.append(server)
    client = VisionClient("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports))
    try:
        while min(asked["one"], asked["two"]) < 5:
            assert await client.ready()
            assert sum(asked.values()) < 100, f"calls stay with one server: {asked}"
    finally:
        await client.close()
        for server in servers:
            await server.stop(None)
