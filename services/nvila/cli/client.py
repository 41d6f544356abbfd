"""A gateway as the command line sees it: upload, ask, read the answer as it comes. Plain HTTP, as any client would."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from nvila.errors import DeadlineExceeded, NvilaError, Unavailable, from_wire
from nvila.types import MediaKind

_IMAGE_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True, kw_only=True)
class Media:
    """A file here, or an address that the gateway fetches."""

    kind: MediaKind
    path: Path | None = None
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question and how it is to be answered. At most one of `num_frames` and `fps`; both are for videos."""

    media: Sequence[Media]
    question: str
    num_frames: int | None = None
    fps: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    timeout_s: float = 300.0

    def sampling(self) -> dict[str, float]:
        given = {"num_frames": self.num_frames, "fps": self.fps, "start_s": self.start_s, "end_s": self.end_s}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Comes after the text: why it ended, lengths, and the API's coverage object."""

    model: str
    finish_reason: str
    usage: dict[str, Any]
    coverage: dict[str, Any]


class GatewayClient:
    def __init__(self, url: str, api_key: str) -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(300, connect=5),
            trust_env=not url.startswith("http://127.0.0.1"),  # no proxy stands before this machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        with self._errors():
            models: list[dict[str, Any]] = self._json(self._http.get("/v1/models"))["data"]
        return models

    def metrics(self) -> str:
        """The gateway's Prometheus text."""
        with self._errors():
            return self._http.get("/metrics", timeout=2).text

    def ask(self, ask: Ask) -> Generator[str | Report, None, None]:
        """Pieces of text, then one `Report`. Raises an `NvilaError` as the gateway named it.

        Local files are uploaded first and deleted afterwards; what they showed stays in the token cache.
        """
        uploaded: list[str] = []
        try:
            with self._errors():
                parts = [self._part(ask, media, uploaded) for media in ask.media]
                yield from self._chat(ask, parts)
        finally:
            for file_id in uploaded:
                self._http.delete(f"/v1/files/{file_id}")

    def ask_about(self, ask: Ask, part: dict[str, Any]) -> Generator[str | Report, None, None]:
        """The same about a media part that the gateway has already, such as a recording's window."""
        with self._errors():
            yield from self._chat(ask, [part])

    def _part(self, ask: Ask, media: Media, uploaded: list[str]) -> dict[str, Any]:
        url = media.url
        if media.path is not None:
            with media.path.open("rb") as file:
                answer = self._http.post(
                    "/v1/files", data={"purpose": "vision"}, files={"file": (media.path.name, file)}
                )
            url = str(self._json(answer)["id"])
            uploaded.append(url)
        if media.kind is MediaKind.IMAGE:
            return {"type": "image_url", "image_url": {"url": url}}
        return {"type": "video_url", "video_url": {"url": url, **ask.sampling()}}

    def _chat(self, ask: Ask, parts: list[dict[str, Any]]) -> Iterator[str | Report]:
        body = {
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": ask.question}]}],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "timeout_s": ask.timeout_s,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        report: dict[str, Any] = {}
        with self._http.stream("POST", "/v1/chat/completions", json=body, timeout=ask.timeout_s + 10) as answer:
            if answer.status_code != 200:
                answer.read()
                raise _error(answer.json() if _is_json(answer) else {}, answer.status_code)
            for event in _events(answer):
                if "error" in event:
                    raise _error(event, answer.status_code)
                report |= {name: event[name] for name in ("model", "usage", "coverage") if event.get(name)}
                for choice in event.get("choices", []):
                    if choice.get("finish_reason"):
                        report["finish_reason"] = choice["finish_reason"]
                    if text := choice["delta"].get("content"):
                        yield text
        if "finish_reason" not in report:
            raise Unavailable("the gateway broke off in the middle of an answer")
        yield Report(
            model=report.get("model", ""),
            finish_reason=report["finish_reason"],
            usage=report.get("usage", {}),
            coverage=report.get("coverage", {}),
        )

    def _json(self, answer: httpx.Response) -> dict[str, Any]:
        record: dict[str, Any] = answer.json() if _is_json(answer) else {}
        if answer.status_code >= 400:
            raise _error(record, answer.status_code)
        return record

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise DeadlineExceeded(f"no answer from {self._url} in time") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"no gateway answers at {self._url}: {error}") from None


def kind_of(path: Path) -> MediaKind:
    """Image or video, by the first bytes; what is neither for sure is left to the gateway to refuse, as a video."""
    with path.open("rb") as file:
        start = file.read(16)
    is_riff_image = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    is_heif = start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"heic", b"mif1")
    return MediaKind.IMAGE if start.startswith(_IMAGE_SIGNATURES) or is_riff_image or is_heif else MediaKind.VIDEO


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """Server-sent events, up to `[DONE]`."""
    for line in answer.iter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield json.loads(data)


def error_of(answer: httpx.Response) -> NvilaError:
    """What an answer that failed says."""
    error = _error(answer.json() if _is_json(answer) and answer.content else {}, answer.status_code)
    if (wait := answer.headers.get("retry-after", "")).isdecimal():
        error.retry_after_s = float(wait)
    return error


_BY_STATUS = {401: "unauthenticated", 404: "not_found", 409: "conflict", 429: "overloaded", 503: "unavailable"}
"""For answers that have no body: those to HEAD."""


def _error(record: dict[str, Any], status: int) -> NvilaError:
    found = record.get("error") or {}
    error = from_wire(
        str(found.get("code") or _BY_STATUS.get(status, "internal")),
        str(found.get("message") or f"HTTP status {status}"),
    )
    error.param = found.get("param")
    return error


def _is_json(answer: httpx.Response) -> bool:
    return str(answer.headers.get("content-type", "")).startswith("application/json")
