"""A checkpoint with its tower in 8 bits and its language model in four, served by the whole platform, tokens in 8 bits.

It has a stack of its own. vLLM loads the four bits with its own kernel where the processor has AVX-512, and dequantised
elsewhere; both say so.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
import redis
import torch

from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.stack import configure, redis_url
from nvila.cli.state import StackFolder
from nvila.decode.build import has_4_bit_kernel
from nvila.internal.v1 import tokens_pb2
from nvila.model.checkpoint import Checkpoint
from nvila.model.int8_cpu import WHOLE
from nvila.model.tiny import make_random_checkpoint
from nvila.quantize.calibration import Data
from nvila.quantize.llm import LlmPlan, quantise_llm
from nvila.quantize.tower import TowerPlan, quantise_tower
from tests.e2e.asking import ask, image_part, messages, picture, picture_url

DATA = Data(mixture="synthetic:documents+shapes")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("quantised")
    whole = Checkpoint.open(make_random_checkpoint(folder / "tiny"))
    quantise_tower(whole, folder / "w8a8", TowerPlan(data=DATA, device=CPU, tiles=8, held_out=2), WHOLE)
    plan = LlmPlan(data=DATA, device=CPU, blocks=2, positions=256, held_out=1)
    quantise_llm(Checkpoint.open(folder / "w8a8"), folder / "w8a8-w4", plan)
    return Checkpoint.open(folder / "w8a8-w4")


@pytest.fixture(scope="module")
def small_stack(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    before = dict(os.environ)
    os.environ["NVILA_DECODE_TOKEN_DTYPE"] = "int8"
    try:
        running = start(
            configure(name="small", model=small.path), StackFolder(tmp_path_factory.mktemp("stacks") / "small")
        )
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield running
    running.stop()


@pytest.fixture
async def small_client(small_stack: RunningStack) -> AsyncIterator[openai.AsyncOpenAI]:
    config = small_stack.config
    async with openai.AsyncOpenAI(
        base_url=f"{config.url}/v1", api_key=config.api_key, max_retries=0, timeout=120
    ) as made:
        yield made


async def test_it_answers_from_tokens_of_8_bits_under_its_own_keys(
    small: Checkpoint, small_stack: RunningStack, small_client: openai.AsyncOpenAI
) -> None:
    asked = messages(image_part(picture_url(picture(300, 200, seed=4))))

    first, second = await ask(small_client, asked), await ask(small_client, asked)

    assert first.text
    assert first.text == second.text
    with redis.Redis.from_url(redis_url(small_stack.config)) as cache:
        names = list(cache.scan_iter("nvila:{*}:m"))
        (manifest,) = [tokens_pb2.TokenManifest.FromString(cache.get(name)) for name in names]
    assert manifest.dtype == tokens_pb2.TOKEN_DTYPE_INT8
    assert manifest.vision_revision == small.vision_revision
    tokens = sum(level.blocks * level.tokens for level in manifest.levels)
    assert manifest.payload_bytes == tokens * (small.config.llm_width + 4)  # a float32 scale per token


def test_the_logs_say_in_which_precision_it_is_served(small_stack: RunningStack) -> None:
    vision, decode = (small_stack.folder.log(part).read_text() for part in ("vision", "decode"))

    assert "8-bit linears" in vision
    expected = "served in four bits" if has_4_bit_kernel() else "served dequantised"
    assert expected in decode
