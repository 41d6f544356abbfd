"""Two replicas: requests about the same media go to the same one, as long as it has room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nvila.decode.client import DecodeClient
from nvila.types import SamplingParams
from tests.decode.app_process import DecodeApp
from tests.decode.questions import answer, request

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> AsyncIterator[DecodeApp]:
    running = DecodeApp(
        tmp_path_factory.mktemp("decode"),
        model_folder,
        engine="transformers",
        min_replicas=2,
        max_replicas=2,
        max_ongoing_requests=1,
        max_model_len=2048,
    )
    await running.wait_ready()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
async def client(app: DecodeApp) -> AsyncIterator[DecodeClient]:
    opened = DecodeClient(app.target)
    yield opened
    await opened.close()


async def used(app: DecodeApp, answered: int) -> dict[str, float]:
    """Generations by replica, as soon as this many in all are counted."""
    for _ in range(100):
        counts = {replica: count for replica, count in app.metric("nvila_decode_requests_total").items() if count}
        if sum(counts.values()) >= answered:
            return counts
        await asyncio.sleep(0.1)
    raise AssertionError(f"{answered} generations were answered, {counts} counted")


async def test_the_same_media_go_to_one_replica_different_media_to_both_and_a_full_one_is_passed_over(
    app: DecodeApp, client: DecodeClient
) -> None:
    short = SamplingParams(max_tokens=2)
    for _ in range(6):
        await answer(client.generate(request(sampling=short, affinity="film")))
    assert len(await used(app, 6)) == 1

    for number in range(12):
        await answer(client.generate(request(sampling=short, affinity=f"film {number}")))
    both = await used(app, 18)
    assert len(both) == 2

    long = SamplingParams(max_tokens=200, ignore_eos=True)
    await asyncio.gather(*(answer(client.generate(request(sampling=long, affinity="film"))) for _ in range(2)))
    after = await used(app, 20)
    assert {replica: after[replica] - both[replica] for replica in after} == dict.fromkeys(after, 1.0)
