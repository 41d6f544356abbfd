"""Questions as a client asks them, with the official `openai` client, and answers as plain records."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
from PIL import Image

TOKENS = 12
"""Answer length in these tests: long enough to show a difference, short enough to be quick."""


@dataclass
class Answer:
    text: str
    usage: Any
    coverage: dict[str, Any]
    finish_reason: str
    first_token_s: float
    pieces: list[str] = field(default_factory=list)


def data_url(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with edges and colours at several sizes, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height))
    fine = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.blend(coarse, fine, 0.25)


def picture_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def video_part(url: str, **sampling: float) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **sampling}}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def messages(*parts: dict[str, Any], question: str = "What happens here?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


async def ask(client: openai.AsyncOpenAI, asked: list[dict[str, Any]], **options: Any) -> Answer:
    """One answer, streamed. `options` go into the request."""
    began = time.perf_counter()
    create: Any = client.chat.completions.create
    stream = await create(
        model="",
        messages=asked,
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=options.pop("max_tokens", TOKENS),
        **options,
    )
    answer = Answer(text="", usage=None, coverage={}, finish_reason="", first_token_s=0.0)
    async for chunk in stream:
        extra = chunk.model_extra or {}
        answer.coverage = extra.get("coverage", answer.coverage)
        answer.usage = chunk.usage or answer.usage
        for choice in chunk.choices:
            answer.finish_reason = choice.finish_reason or answer.finish_reason
            if choice.delta.content:
                answer.first_token_s = answer.first_token_s or time.perf_counter() - began
                answer.pieces.append(choice.delta.content)
    answer.text = "".join(answer.pieces)
    return answer
