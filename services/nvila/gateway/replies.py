"""What `POST /v1/chat/completions` answers: OpenAI's objects, with `coverage` (what of the media the answer stands on).

In a stream `coverage` rides on the last chunk before `[DONE]`: the one with `usage` when that was asked for, the one
with `finish_reason` otherwise, so that clients that index `choices[0]` never meet a chunk they did not ask for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from nvila.types import Answered, Coverage, FinishReason, PromptUsage

_COVERAGE = TypeAdapter(Coverage)


class PromptTokensDetails(BaseModel):
    """By modality; `cached_tokens` of them were in the prefix cache."""

    cached_tokens: int
    text_tokens: int
    image_tokens: int
    video_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: Literal[0] = 0
    message: ReplyMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    coverage: Coverage


def usage(prompt: PromptUsage, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt.total,
        completion_tokens=completion_tokens,
        total_tokens=prompt.total + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=prompt.cached, text_tokens=prompt.text, image_tokens=prompt.image, video_tokens=prompt.video
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What all objects of one answer share. `created`: seconds since 1970."""

    id: str
    created: int
    model: str
    fingerprint: str
    has_usage: bool = False
    """The client asked for a last chunk with `usage`; then all others carry `usage: null`."""

    def whole(self, text: str, answered: Answered) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=[Choice(message=ReplyMessage(content=text), finish_reason=answered.reason)],
            usage=usage(answered.usage, answered.completion_tokens),
            coverage=answered.coverage,
        )

    def first(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def last(self, answered: Answered) -> bytes:
        """The chunk with `finish_reason`, the one with `usage` if asked for, and `[DONE]`."""
        coverage = {"coverage": _COVERAGE.dump_python(answered.coverage, mode="json")}
        if not self.has_usage:
            return self._chunk({}, answered.reason, coverage) + DONE
        counted = usage(answered.usage, answered.completion_tokens).model_dump()
        tail = self._object([], {"usage": counted, **coverage})
        return self._chunk({}, answered.reason) + _event(tail) + DONE

    def _chunk(
        self, delta: dict[str, Any], reason: FinishReason | None = None, more: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        null_usage = {"usage": None} if self.has_usage else {}
        return _event(self._object([choice], {**null_usage, **(more or {})}))

    def _object(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still working\n\n"


def _event(content: dict[str, Any]) -> bytes:
    """ASCII only: some clients split lines at U+2028 too."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def error_event(content: dict[str, Any]) -> bytes:
    """An error after the stream began, when there is no status left to carry it."""
    return _event(content)
