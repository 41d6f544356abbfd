"""The reference's recorded checkpoints, served by the whole platform, say what the reference said, id for id.

Each has a stack of its own. The transformers engine generates: these checkpoints' attention heads are 16 wide, and
vLLM's attention on processors has kernels from 32 upwards only.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest
from PIL import Image

from nvila.cli.lifecycle import RunningStack, start
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from nvila.golden.inputs import FORMULAS, synthetic
from nvila.model.checkpoint import Checkpoint
from tests.e2e.asking import Answer, ask, data_url, image_part, messages, picture_url, video_part

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "e2e"
CHECKPOINTS = [
    "nvila-tiny-s2",
    pytest.param("nvila-tiny-lite", marks=pytest.mark.slow),
    pytest.param("nvila-tiny-video", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def golden_stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    folder = StackFolder(tmp_path_factory.mktemp("stacks") / "golden")
    running = start(configure(name="golden", model=GOLDEN / request.param, engine="transformers"), folder)
    yield running
    running.stop()


@pytest.fixture
async def golden_client(golden_stack: RunningStack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{golden_stack.config.url}/v1", api_key=golden_stack.config.api_key, max_retries=0, timeout=120
    ) as made:
        yield made


async def test_greedy_answers_are_the_recorded_ones(
    golden_stack: RunningStack, golden_client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(golden_stack.config.model)
    content = json.loads((GOLDEN / f"{checkpoint.name}.json").read_text())
    cases = {name: case for name, case in content.items() if isinstance(case, dict) and "greedy_ids" in case}
    assert cases
    for name, case in cases.items():
        ids = case["greedy_ids"]
        is_stopped = ids[-1] in checkpoint.stop_ids
        asked = messages(*media(case, name, tmp_path), question=text(case))
        estimate = await golden_client.post("/estimate", body={"messages": asked, "max_tokens": 12}, cast_to=object)
        answer = await ask(golden_client, asked, max_tokens=12)

        assert answer.text == checkpoint.tokenizer().decode(ids[:-1] if is_stopped else ids), name
        assert answer.finish_reason == ("stop" if is_stopped else "length"), name
        assert answer.usage.completion_tokens == len(ids), name
        assert answer.usage.prompt_tokens == case["sequence_length_after_splice"], name
        check_estimate(estimate, answer)


def check_estimate(estimate: Any, answer: Answer) -> None:
    """What was told before any pixel was decoded is what the services made."""
    told = [(item["kind"], item["chunks"], item["tiles"], item["positions"]) for item in estimate["media"]]
    made = [(item["kind"], item["chunks"], item["tiles"], item["tokens"]) for item in answer.coverage["media"]]
    assert told == made
    assert estimate["fits"] is True
    assert answer.usage.prompt_tokens <= estimate["positions"]["total_at_most"]


def text(case: dict[str, Any]) -> str:
    """What the user wrote: behind the markers, each of which may have a newline of `dynamic` tiling."""
    content: str = case["prompt_text_after_media_extraction"].split("<|im_start|>user\n")[1].partition("<|im_end|>")[0]
    while content.startswith(("<image>", "<vila/video>")):
        content = content.partition(">")[2].removeprefix("\n")
    return content


def media(case: dict[str, Any], name: str, folder: Path) -> list[dict[str, Any]]:
    if "video" in case:
        frames = recorded_frames(case["video"])
        if case["media"].keys() == {"image"}:  # as the reference's head has it; a client would send images
            count = case["media"]["image"]["num_items"]
            chosen = np.round(np.linspace(0, len(frames) - 1, count)).astype(int)
            return [image_part(picture_url(Image.fromarray(frames[i]))) for i in chosen]
        path = folder / f"{name}.mkv"
        write_lossless(path, frames)
        return [video_part(data_url(path, "video/x-matroska"))]
    pictures = [synthetic(i["formula"], i["width"], i["height"], i["seed"]) for i in case.get("images", [])]
    return [image_part(picture_url(Image.fromarray(rgb))) for rgb in pictures]


def recorded_frames(video: dict[str, Any]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    size = video["width"], video["height"]
    return [synthetic(FORMULAS[i % 4], *size, video["seed0"] + i) for i in range(video["num_source_frames"])]


def write_lossless(path: Path, frames: list[np.ndarray[Any, np.dtype[np.uint8]]]) -> None:
    """H.264 in RGB without quantisation: decodes to exactly these frames."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(10), options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "rgb24"
        for rgb in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, "rgb24")))
        container.mux(stream.encode())
    with av.open(path) as container:
        assert all(
            np.array_equal(frame.to_ndarray(format="rgb24"), rgb)
            for frame, rgb in zip(container.decode(video=0), frames, strict=True)
        )
