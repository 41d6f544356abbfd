"""From what a client asked to a `Question`: the rules that HTTP and gRPC share.

A face reads its own wire into `Asked`, types checked; here everything else is: who may say what, how much of it, which
numbers make sense. Messages name the field as the client wrote it (`param`) and both numbers.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from nvila.errors import ForbiddenURL, InvalidRequest, LimitExceeded, NotFound
from nvila.gateway.files import FILE_PREFIX, StoredFile
from nvila.types import (
    Deadline,
    MediaKind,
    MediaPart,
    MediaSource,
    Message,
    ModelCard,
    Question,
    RecordingWindow,
    Role,
    SamplingParams,
    TextPart,
    VideoSampling,
)

_LONGEST_URL = 8192
_MOST_STOPS = 4
_LONGEST_STOP = 256
_MOST_PARTS = 4096
"""Of all messages together, so that a request cannot consist of a million empty texts."""
_RECORDING_ID = re.compile(r"rec_[0-9a-f]{32}")
_MOST_FPS = 1000.0
_LATEST_S = 1e6
_WHOLE_VIDEO = VideoSampling()


@dataclass(frozen=True, kw_only=True)
class AskedMedia:
    """A media part as it came. `address`: a URL or a file's id; or, without one, a `recording`'s window. `kind` None:
    as the file's bytes say."""

    param: str
    kind: MediaKind | None
    address: str = ""
    recording: RecordingWindow | None = None
    sampling: VideoSampling = _WHOLE_VIDEO


@dataclass(frozen=True, kw_only=True)
class AskedMessage:
    param: str
    role: Role
    parts: tuple[str | AskedMedia, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as it came. None: the client did not say."""

    messages: tuple[AskedMessage, ...]
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    messages: int
    media: int
    text_chars: int
    media_bytes: int
    frames: int
    answer_tokens: int
    default_answer_tokens: int
    timeout_s: float
    default_timeout_s: float


class Files(Protocol):
    async def get(self, tenant: str, file_id: str) -> StoredFile: ...


async def to_question(asked: Asked, tenant: str, card: ModelCard, files: Files, limits: RequestLimits) -> Question:
    """Raises `InvalidRequest` and its kin, and `NotFound` for an unknown model or file."""
    if asked.model not in ("", card.name):
        raise NotFound(f"there is no model {asked.model[:64]!r}; served is {card.name!r}", param="model")
    _check_messages(asked.messages, limits)
    sampling = _sampling(asked, limits)
    timeout_s = _within("timeout_s", asked.timeout_s, above=0, most=limits.timeout_s) or limits.default_timeout_s
    media: list[MediaSource] = []
    messages = []
    for message in asked.messages:
        parts: list[TextPart | MediaPart] = []
        for part in message.parts:
            if isinstance(part, str):
                parts.append(TextPart(part))
            else:
                parts.append(MediaPart(len(media)))
                media.append(await _source(part, tenant, files, limits))
        messages.append(Message(message.role, tuple(parts)))
    return Question(
        request_id=uuid.uuid4().hex,
        tenant=tenant,
        messages=tuple(messages),
        media=tuple(media),
        sampling=sampling,
        deadline=Deadline.after(timeout_s),
    )


def capture_time(text: str | None, param: str) -> float | None:
    """Seconds since 1970 of a time in RFC 3339 (`2026-09-01T12:00:00Z`), which says its zone. Raises
    `InvalidRequest`."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or len(text) < len("2026-09-01T12:00:00Z"):
        raise InvalidRequest(
            f"{param}: {text[:40]!r} given, must be a time like '2026-09-01T12:00:00Z' or '…+02:00'", param=param
        )
    return moment.timestamp()


def check_counts(*, messages: int, parts: int, media: int, limits: RequestLimits) -> None:
    """For the faces: before they look at what a request's messages and parts hold."""
    if messages > limits.messages:
        raise LimitExceeded.of("messages", asked=messages, limit=limits.messages, param="messages")
    if media > limits.media:
        raise LimitExceeded.of("images and videos", asked=media, limit=limits.media, param="messages")
    if parts > _MOST_PARTS:
        raise LimitExceeded.of("parts", asked=parts, limit=_MOST_PARTS, param="messages")


def _check_messages(messages: Sequence[AskedMessage], limits: RequestLimits) -> None:
    if not messages:
        raise InvalidRequest("messages: none given, at least one is needed", param="messages")
    parts = [part for message in messages for part in message.parts]
    media = sum(isinstance(part, AskedMedia) for part in parts)
    check_counts(messages=len(messages), parts=len(parts), media=media, limits=limits)
    chars = sum(len(part) for message in messages for part in message.parts if isinstance(part, str))
    if chars > limits.text_chars:
        raise LimitExceeded.of("characters of text", asked=chars, limit=limits.text_chars, param="messages")
    for position, message in enumerate(messages):
        if message.role is Role.SYSTEM and position:
            raise InvalidRequest("only the first message may have the role system", param=f"{message.param}.role")
        if message.role is not Role.USER and any(isinstance(part, AskedMedia) for part in message.parts):
            raise InvalidRequest(
                f"only the user's messages may hold images and videos, not the role {message.role}",
                param=f"{message.param}.content",
            )
        if not any(message.parts):
            raise InvalidRequest("a message has no content", param=f"{message.param}.content")
    if messages[-1].role is not Role.USER:
        raise InvalidRequest(
            f"the last message must be the user's, not the role {messages[-1].role}", param=f"{messages[-1].param}.role"
        )


def _sampling(asked: Asked, limits: RequestLimits) -> SamplingParams:
    if asked.max_tokens is not None:
        if asked.max_tokens < 1:
            raise InvalidRequest(f"max_tokens: {asked.max_tokens} given, must be at least 1", param="max_tokens")
        if asked.max_tokens > limits.answer_tokens:
            raise LimitExceeded.of(
                "answer tokens", asked=asked.max_tokens, limit=limits.answer_tokens, param="max_tokens"
            )
    if asked.top_k is not None and not -1 <= asked.top_k < 2**31:
        raise InvalidRequest(f"top_k: {asked.top_k} given, must be at least 1, or 0 for all", param="top_k")
    if asked.seed is not None and not -(2**63) <= asked.seed < 2**63:
        raise InvalidRequest(f"seed: {asked.seed} given, must fit 64 bits with a sign", param="seed")
    if len(asked.stop) > _MOST_STOPS:
        raise LimitExceeded.of("stop strings", asked=len(asked.stop), limit=_MOST_STOPS, param="stop")
    for stop in asked.stop:
        if not 0 < len(stop) <= _LONGEST_STOP:
            raise InvalidRequest(
                f"stop: a string of {len(stop)} characters given, must have 1 to {_LONGEST_STOP}", param="stop"
            )
    temperature = _within("temperature", asked.temperature, least=0, most=2) or 0.0
    top_p = _within("top_p", asked.top_p, least=0, most=1)
    return SamplingParams(
        max_tokens=asked.max_tokens or limits.default_answer_tokens,
        temperature=0.0 if top_p == 0 else temperature,  # the likeliest token only: greedy
        top_p=top_p or 1.0,
        top_k=max(0, asked.top_k or 0),
        min_p=_within("min_p", asked.min_p, least=0, most=1) or 0.0,
        seed=None if asked.seed is None else asked.seed % 2**63,
        stop=asked.stop,
        ignore_eos=asked.ignore_eos,
    )


def _within(
    param: str, value: float | None, *, most: float, least: float = -math.inf, above: float = -math.inf
) -> float | None:
    """The value, if it is in range. Written so that NaN is not."""
    if value is None or (least <= value <= most and value > above):
        return value
    bound = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
    raise InvalidRequest(f"{param}: {value:g} given, must be {bound} and at most {most:g}", param=param)


async def _source(asked: AskedMedia, tenant: str, files: Files, limits: RequestLimits) -> MediaSource:
    if asked.recording is not None:
        if _RECORDING_ID.fullmatch(asked.recording.recording_id) is None:
            raise NotFound(f"no recording {asked.recording.recording_id[:64]!r}", param=asked.param)
        return MediaSource(kind=MediaKind.VIDEO, recording=asked.recording, param=asked.param)
    _check_video_sampling(asked, limits)
    if asked.address.startswith(FILE_PREFIX):
        try:
            file = await files.get(tenant, asked.address)
        except NotFound as error:
            raise NotFound(error.message, param=asked.param) from None
        if file.size_bytes > limits.media_bytes:
            raise LimitExceeded.of("media bytes", asked=file.size_bytes, limit=limits.media_bytes, param=asked.param)
        return MediaSource(kind=asked.kind or file.kind, file_id=file.id, param=asked.param, sampling=asked.sampling)
    scheme = asked.address[:8].partition(":")[0].lower()
    if scheme not in ("http", "https", "data"):
        raise ForbiddenURL(
            "the media address must be http, https or data, or the id of an uploaded file", param=asked.param
        )
    if scheme != "data" and len(asked.address) > _LONGEST_URL:
        raise LimitExceeded.of(
            "characters of an address", asked=len(asked.address), limit=_LONGEST_URL, param=asked.param
        )
    kind = asked.kind
    if kind is None:
        kind = MediaKind.IMAGE if asked.address[:11].lower() == "data:image/" else MediaKind.VIDEO
    return MediaSource(kind=kind, url=asked.address, param=asked.param, sampling=asked.sampling)


def _check_video_sampling(asked: AskedMedia, limits: RequestLimits) -> None:
    ask, param = asked.sampling, asked.param
    if ask.num_frames is not None and ask.fps is not None:
        raise InvalidRequest(
            f"num_frames ({ask.num_frames}) and fps ({ask.fps:g}) are both given; give one of them", param=param
        )
    if ask.num_frames is not None:
        if ask.num_frames < 1:
            raise InvalidRequest(f"num_frames: {ask.num_frames} given, must be at least 1", param=param)
        if ask.num_frames > limits.frames:
            raise LimitExceeded.of("frames", asked=ask.num_frames, limit=limits.frames, param=param)
    try:
        _within("fps", ask.fps, above=0, most=_MOST_FPS)
        _within("start_s", ask.start_s, least=0, most=_LATEST_S)
        _within("end_s", ask.end_s, above=0, most=_LATEST_S)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=param) from None
    if ask.start_s is not None and ask.end_s is not None and ask.end_s <= ask.start_s:
        raise InvalidRequest(
            f"the window ends at {ask.end_s:g} s, not after its start at {ask.start_s:g} s", param=param
        )
