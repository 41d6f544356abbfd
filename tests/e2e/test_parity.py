"""The platform's greedy answers are, token for token, those of the same model in one process (float32)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from nvila.cli.lifecycle import start
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from tests.clips import BIKES
from tests.e2e.asking import Answer, ask, data_url, image_part, messages, picture, picture_url, video_part
from tests.model.conftest import make_static_s2

TOKENS = 24


def in_process(checkpoint: Path, media: list[Path], *options: str) -> dict[str, object]:
    """What `nvila ask --in-process --json` prints, in an interpreter of its own: it loads no service."""
    command = [sys.executable, "-m", "nvila.cli.main", "ask", "--in-process", "--json"]
    command += ["--model", str(checkpoint), "--max-tokens", str(TOKENS), *options]
    done = subprocess.run(
        [*command, *map(str, media), "What happens here?"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, object] = json.loads(done.stdout)
    return record


def check_same(platform: Answer, alone: dict[str, object]) -> None:
    assert platform.text.strip() == alone["answer"]
    usage = alone["usage"]
    assert isinstance(usage, dict)
    assert platform.usage.completion_tokens == usage["completion_tokens"]
    assert platform.usage.prompt_tokens == usage["prompt_tokens"]


@pytest.mark.parametrize("size", [(517, 203), (91, 640)], ids=str)
async def test_an_image_of_odd_shape(
    client: openai.AsyncOpenAI, checkpoint: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    image = picture(*size, seed=3)
    image.save(tmp_path / "one.png")
    platform = await ask(client, messages(image_part(picture_url(image))), max_tokens=TOKENS)
    check_same(platform, in_process(checkpoint, [tmp_path / "one.png"]))


async def test_two_images(client: openai.AsyncOpenAI, checkpoint: Path, tmp_path: Path) -> None:
    images = [picture(300, 222, seed=4), picture(64, 500, seed=5)]
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    asked = messages(*(image_part(picture_url(image)) for image in images))
    check_same(await ask(client, asked, max_tokens=TOKENS), in_process(checkpoint, paths))


async def test_a_video_of_256_frames(client: openai.AsyncOpenAI, checkpoint: Path) -> None:
    asked = messages(video_part(data_url(BIKES), num_frames=256))
    check_same(await ask(client, asked, max_tokens=TOKENS), in_process(checkpoint, [BIKES], "--frames", "256"))


@pytest.mark.slow
async def test_a_model_with_static_s2(tmp_path: Path) -> None:
    """In a stack of its own, where the estimate has to be right as well."""
    model = make_static_s2(tmp_path / "static")
    image = picture(300, 170, seed=7)
    image.save(tmp_path / "one.png")
    asked = messages(image_part(picture_url(image)), video_part(data_url(BIKES)))
    running = start(configure(name="static", model=model, engine="transformers"), StackFolder(tmp_path / "stack"))
    try:
        async with openai.AsyncOpenAI(
            base_url=f"{running.config.url}/v1", api_key=running.config.api_key, max_retries=0, timeout=120
        ) as client:
            estimate: Any = await client.post("/estimate", body={"messages": asked}, cast_to=object)
            answer = await ask(client, asked, max_tokens=TOKENS)
    finally:
        running.stop()

    told = [(item["kind"], item["tiles"], item["positions"]) for item in estimate["media"]]
    assert told == [(item["kind"], item["tiles"], item["tokens"]) for item in answer.coverage["media"]]
    assert told == [("image", 1, 5), ("video", 8, 40)]
    check_same(answer, in_process(model, [tmp_path / "one.png", BIKES]))
