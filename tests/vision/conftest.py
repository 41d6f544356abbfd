"""A random checkpoint, and one real Triton and Redis for all tests here; tests that harm them start their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from nvila.cache.store import TokenStore
from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.tiny import make_random_checkpoint
from nvila.telemetry.metrics import Metrics
from nvila.vision.client import VisionClient
from tests.cache.redis_server import RedisServer
from tests.otlp import OtlpReceiver
from tests.vision.triton_server import TritonServer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_random_checkpoint(tmp_path_factory.mktemp("model") / "nvila-random"))


@pytest.fixture(scope="session")
def encoder(checkpoint: Checkpoint) -> VisionEncoder:
    """The plain model, to compare with."""
    return VisionEncoder.from_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiving:
        yield receiving


@pytest.fixture(scope="session")
def vision_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def triton(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint, vision_redis: RedisServer, receiver: OtlpReceiver
) -> Iterator[TritonServer]:
    environment = {
        "NVILA_VISION_MODEL": str(checkpoint.path),
        "NVILA_VISION_REDIS_URL": vision_redis.url,
        **receiver.environment,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in receiver.environment.items():
            patch.setenv(name, value)  # the command line has Triton's own trace options, made of these
        server = TritonServer(tmp_path_factory.mktemp("triton"), environment)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def client(triton: TritonServer) -> AsyncIterator[VisionClient]:
    opened = VisionClient(triton.url)
    yield opened
    await opened.close()


@pytest.fixture
async def store(vision_redis: RedisServer) -> AsyncIterator[TokenStore]:
    opened = TokenStore.open(vision_redis.url, Metrics(), ttl_s=60)
    yield opened
    await opened.close()
