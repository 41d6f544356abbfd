"""The whole stack on the real programs, started once per session by the code that `nvila up` runs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from nvila.model.tiny import make_random_checkpoint
from tests.otlp import OtlpReceiver


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs the stack, which may take two minutes to come up on a busy machine."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(420))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "random-tiny"
    make_random_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.fixture(scope="session")
def stack(checkpoint: Path, receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    folder = StackFolder(tmp_path_factory.mktemp("stacks") / "e2e")
    before = dict(os.environ)
    os.environ.update(receiver.environment)
    try:
        running = start(configure(name="e2e", model=checkpoint), folder)
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def base_url(stack: RunningStack) -> str:
    return stack.config.url


@pytest.fixture
async def client(stack: RunningStack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{stack.config.url}/v1", api_key=stack.config.api_key, max_retries=0, timeout=120
    ) as made:
        yield made


@pytest.fixture
async def http(stack: RunningStack) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {stack.config.api_key}"}
    async with httpx.AsyncClient(base_url=stack.config.url, headers=headers, timeout=120) as made:
        yield made
