"""From the bytes of a request's JSON to what it holds; a chat request's to `Asked`."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from nvila.errors import InvalidRequest
from nvila.gateway import schema
from nvila.gateway.files import FILE_PREFIX
from nvila.gateway.request import Asked, AskedMedia, AskedMessage, RequestLimits, capture_time, check_counts
from nvila.types import MediaKind, RecordingWindow, Role, VideoSampling

_ROLES = {"system": Role.SYSTEM, "developer": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s")


def read_json(data: bytes | str, what: str = "the body", param: str | None = None) -> Any:
    """As strictly as what is made of it must be written again: NaN, Infinity and halves of surrogate pairs are not
    JSON, and nesting is bounded (200 levels). Raises `InvalidRequest`."""
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"{what} is not valid JSON: {error}", param=param) from None


def parse_chat(body: bytes, limits: RequestLimits) -> schema.ChatRequest:
    """Raises `InvalidRequest` with the path of the first field that is wrong. Messages and parts are counted before
    anything else is looked at."""
    plain = read_json(body)
    if not isinstance(plain, dict):
        raise InvalidRequest("the body must be a JSON object")
    _count(plain, limits)
    try:
        return schema.ChatRequest.model_validate(plain)
    except ValidationError as error:
        raise _refusal(error) from None


def to_asked(chat: schema.ChatRequest) -> Asked:
    """Raises `InvalidRequest` where fields contradict each other."""
    tokens = [limit for limit in (chat.max_completion_tokens, chat.max_tokens) if limit is not None]
    if len(set(tokens)) > 1:
        raise InvalidRequest(
            f"max_completion_tokens ({tokens[0]}) and max_tokens ({tokens[1]}) differ; give one", param="max_tokens"
        )
    if chat.stream_options is not None and not chat.stream:
        raise InvalidRequest("stream_options is for stream: true", param="stream_options")
    video = chat.media_io_kwargs.video if chat.media_io_kwargs is not None else None
    for_all = VideoSampling() if video is None else VideoSampling(num_frames=video.num_frames, fps=video.fps)
    return Asked(
        model=chat.model,
        messages=tuple(_message(message, index, for_all) for index, message in enumerate(chat.messages)),
        max_tokens=tokens[0] if tokens else None,
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=chat.top_k,
        min_p=chat.min_p,
        seed=chat.seed,
        stop=(chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ()),
        ignore_eos=bool(chat.ignore_eos),
        timeout_s=chat.timeout_s,
    )


def _count(plain: dict[str, Any], limits: RequestLimits) -> None:
    messages = plain.get("messages")
    if not isinstance(messages, list):
        return
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    media = sum(isinstance(part, dict) and part.get("type") != "text" for part in parts)
    check_counts(messages=len(messages), parts=len(parts), media=media, limits=limits)


def _refusal(error: ValidationError) -> InvalidRequest:
    found = error.errors(include_input=False, include_url=False)[0]
    path = schema.field_path(found["loc"])
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        message = "there is no such field"
    return InvalidRequest(f"{path}: {message}" if path else message, param=path or None)


def _message(message: schema.ChatMessage, index: int, for_all: VideoSampling) -> AskedMessage:
    param = f"messages[{index}]"
    content = message.content
    if content is None:
        parts: tuple[str | AskedMedia, ...] = ()
    elif isinstance(content, str):
        parts = (content,)
    else:
        parts = tuple(_part(part, f"{param}.content[{place}]", for_all) for place, part in enumerate(content))
    return AskedMessage(param=param, role=_ROLES[message.role], parts=parts)


def _part(part: schema.Part, param: str, for_all: VideoSampling) -> str | AskedMedia:
    match part:
        case schema.TextPart():
            return part.text
        case schema.ImagePart():
            return AskedMedia(param=f"{param}.image_url", kind=MediaKind.IMAGE, address=part.image_url.url)
        case schema.VideoPart():
            sampling = _video_sampling(part, param, for_all)
            return AskedMedia(
                param=f"{param}.video_url", kind=MediaKind.VIDEO, address=part.video_url.url, sampling=sampling
            )
        case schema.FilePart():
            if part.file.file_id is not None and not part.file.file_id.startswith(FILE_PREFIX):
                raise InvalidRequest("file_id must be the id of an uploaded file", param=f"{param}.file.file_id")
            given = [address for address in (part.file.file_id, part.file.file_data) if address is not None]
            if len(given) != 1:
                raise InvalidRequest("file: exactly one of file_id and file_data is needed", param=f"{param}.file")
            if part.file.file_data is not None and not part.file.file_data[:5].lower() == "data:":
                raise InvalidRequest("file_data must be a data URL", param=f"{param}.file.file_data")
            return AskedMedia(param=f"{param}.file", kind=None, address=given[0], sampling=for_all)
        case schema.RecordingPart():
            return AskedMedia(
                param=f"{param}.recording",
                kind=MediaKind.VIDEO,
                recording=_recording_window(part.recording, f"{param}.recording"),
            )
    raise AssertionError(part)


def _recording_window(asked: schema.RecordingStretch, param: str) -> RecordingWindow:
    return RecordingWindow(
        recording_id=asked.id,
        start_s=asked.start_s,
        end_s=asked.end_s,
        start_at=capture_time(asked.start_time, f"{param}.start_time"),
        end_at=capture_time(asked.end_time, f"{param}.end_time"),
    )


def _video_sampling(part: schema.VideoPart, param: str, for_all: VideoSampling) -> VideoSampling:
    """What a part says in any of the spellings, completed by what the request says for all videos."""
    url = part.video_url
    gemini = part.video_metadata or schema.VideoMetadata(startOffset=None, endOffset=None)
    vss = part.media_info or schema.MediaInfo(type="offset")
    num_frames = _one(f"{param}.video_url.num_frames", url.num_frames, part.frames)
    fps = _one(f"{param}.video_url.fps", url.fps, part.fps, gemini.fps)
    if num_frames is None and fps is None:
        num_frames, fps = for_all.num_frames, for_all.fps
    start_s = _one(
        f"{param}.video_url.start_s",
        url.start_s,
        vss.start_offset,
        _seconds(gemini.start_offset, f"{param}.videoMetadata.startOffset"),
    )
    end_s = _one(
        f"{param}.video_url.end_s",
        url.end_s,
        vss.end_offset,
        _seconds(gemini.end_offset, f"{param}.videoMetadata.endOffset"),
    )
    return VideoSampling(
        num_frames=None if num_frames is None else int(num_frames), fps=fps, start_s=start_s, end_s=end_s
    )


def _one(param: str, *spellings: float | None) -> float | None:
    given = {value for value in spellings if value is not None}
    if len(given) > 1:
        raise InvalidRequest(f"the same is said twice and differently: {sorted(given)}", param=param)
    return given.pop() if given else None


def _seconds(duration: str | None, param: str) -> float | None:
    if duration is None:
        return None
    found = _DURATION.fullmatch(duration)
    if found is None:
        raise InvalidRequest(f"{duration[:32]!r} given, must be seconds like '3.5s'", param=param)
    return float(found[1])
