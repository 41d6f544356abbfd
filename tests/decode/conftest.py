"""One made-up checkpoint for all decode tests, and the decode service in this process on the plain engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nvila.decode.build import Decode, build
from nvila.decode.settings import Settings
from nvila.model.checkpoint import Checkpoint
from nvila.model.tiny import make_random_checkpoint
from nvila.telemetry.metrics import Metrics

MAX_MODEL_LEN = 4096


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def checkpoint(model_folder: Path) -> Checkpoint:
    return Checkpoint.open(model_folder)


@pytest.fixture(scope="session")
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture(scope="session")
async def decode(model_folder: Path, metrics: Metrics) -> AsyncIterator[Decode]:
    """The service without a cache: visual tokens come inline."""
    settings = Settings(model=model_folder, engine="transformers", dtype="float32", max_model_len=MAX_MODEL_LEN)
    async with build(settings, metrics) as running:
        yield running
