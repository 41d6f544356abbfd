"""A running endpoint answering: any server of the OpenAI API, nvila's own gateway among them. Several at a time.

Media travel inside the request as data URLs, pictures as PNG and clips as H.264 (which needs PyAV).
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from nvila.errors import InvalidRequest, Unavailable
from nvila.train.data.clips import write_h264
from nvila.train.data.shards import png
from nvila.train.samples import Sample, SampleMedia
from nvila.types import MediaKind, MediaPart

_TRIES = 6
_AGAIN = (429, 503)
_FIRST_PAUSE_S = 0.5
"""Where a busy endpoint does not say how long to wait; doubled each time."""


class EndpointAnswerer:
    """Implements `Answerer`."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        model: str | None = None,
        concurrency: int = 4,
        frames: int | None = None,
        max_tokens: int = 32,
        timeout_s: float = 300.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`url`: with or without `/v1`. `timeout_s`: of one request, and of one wait for a busy endpoint.

        Raises `Unavailable` when nobody answers there.
        """
        self._http = httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_s, connect=5),
        )
        self._frames, self._max_tokens = frames, max_tokens
        self._timeout_s, self._sleep = timeout_s, sleep
        self._model = model or self._first_model()
        self.name, self.batch = self._model, 4 * concurrency
        self._pool = ThreadPoolExecutor(concurrency, "nvila-evaluate")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]:
        return list(self._pool.map(self._one, samples))

    def _first_model(self) -> str:
        try:
            answer = self._http.get("/v1/models").raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise Unavailable(f"no model can be had at {self._http.base_url}: {error}") from None

    def _one(self, sample: Sample) -> str | InvalidRequest:
        body = {
            "model": self._model,
            "messages": self._messages(sample),
            "max_tokens": self._max_tokens,
            "temperature": 0,
        }
        for attempt in range(_TRIES):
            try:
                answer = self._http.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                raise Unavailable(f"the endpoint broke off: {error}") from None
            if answer.status_code not in _AGAIN or attempt == _TRIES - 1:
                break
            self._sleep(min(_asked_pause_s(answer) or _FIRST_PAUSE_S * 2**attempt, self._timeout_s))
        if answer.status_code >= 500 or answer.status_code in (401, 403, 404, 429):
            raise Unavailable(f"the endpoint answered {answer.status_code}: {answer.text[:300]}")
        if answer.status_code >= 400:
            return InvalidRequest(f"{answer.status_code}: {answer.text[:300]}")
        return str(answer.json()["choices"][0]["message"]["content"] or "")

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        return [
            {
                "role": str(message.role),
                "content": [
                    self._media(sample.media[part.index])
                    if isinstance(part, MediaPart)
                    else {"type": "text", "text": part.text}
                    for part in message.parts
                ],
            }
            for message in sample.prompt
        ]

    def _media(self, item: SampleMedia) -> dict[str, Any]:
        if item.kind is MediaKind.IMAGE:
            return {"type": "image_url", "image_url": {"url": _data_url("image/png", png(item.frames_FHWC[0]))}}
        with tempfile.TemporaryDirectory(prefix="nvila-") as folder:
            path = Path(folder) / "clip.mp4"
            write_h264(item, path)
            url = _data_url("video/mp4", path.read_bytes())
        sampling = {"num_frames": self._frames} if self._frames else {}
        return {"type": "video_url", "video_url": {"url": url, **sampling}}


def _asked_pause_s(answer: httpx.Response) -> float | None:
    """`Retry-After` in seconds; None where there is none, or a date."""
    try:
        return max(0.0, float(answer.headers.get("retry-after", "")))
    except ValueError:
        return None


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
