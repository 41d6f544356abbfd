"""The JSON of `POST /v1/chat/completions`: OpenAI's request, with videos.

Types only: what is a string, what a number, which fields exist. Ranges and meaning are checked in `request.py`, for
HTTP and gRPC alike. Of OpenAI's fields, those that nvila cannot honour are refused unless they ask for nothing
(`n: 1`, `frequency_penalty: 0`, …), and those that change nothing about an answer are accepted and ignored:
`user`, `metadata`, `store`, `service_tier`, `safety_identifier`, `prompt_cache_key`, `prompt_cache_options`,
`prompt_cache_retention`, `parallel_tool_calls`, `reasoning_effort`, `verbosity`, `name` of a message, `detail` of an
image, `uuid` of a media part (records are found by content, whatever they are called).

Videos: `video_url` parts as vLLM, SGLang and VILA's server take them. Which frames: `media_io_kwargs.video` (vLLM) for
the whole request, `num_frames` or `fps` and `start_s`, `end_s` in `video_url` for one video; understood too are VILA's
`frames` and `fps` beside it, VSS's `media_info` and Gemini's `video_metadata`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag


class Closed(BaseModel):
    """No unknown fields, no guessing of types ("5" is not 5), no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _only(*neutral: object, why: str) -> AfterValidator:
    """For a field of OpenAI's that is refused unless it is absent, null or asks for nothing."""

    def check(value: object) -> object:
        for allowed in neutral:
            if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
                return value
        if value is None:
            return value
        raise ValueError(why)

    return AfterValidator(check)


_NO_PENALTY = "penalties are not supported: prompts hold visual tokens, which have no ids to count"
_NO_TOOLS = "tools are not supported: the model has not learned to call them"
_NO_LOGPROBS = "log probabilities are not supported"
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]

# -- messages


class TextPart(Closed):
    type: Literal["text"]
    text: str


class ImageUrl(Closed):
    url: str = Field(description="http(s) or data URL, or the id of an uploaded file (file-…).")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Closed):
    type: Literal["image_url"]
    image_url: ImageUrl
    uuid: Ignored = None


class VideoUrl(Closed):
    url: str = Field(description="http(s) or data URL, or the id of an uploaded file (file-…).")
    num_frames: int | None = Field(None, description="This many frames, evenly spaced. Not together with fps.")
    fps: float | None = Field(None, description="Frames per second of video.")
    start_s: float | None = Field(None, description="Start of the window, seconds of the video's clock.")
    end_s: float | None = Field(None, description="End of the window.")


class MediaInfo(Closed):
    """VSS's window."""

    type: Literal["offset"]
    start_offset: float | None = None
    end_offset: float | None = None


class VideoMetadata(BaseModel):
    """Gemini's window and rate. Durations are like "3.5s"."""

    model_config = Closed.model_config | {"populate_by_name": True}

    start_offset: str | None = Field(None, alias="startOffset")
    end_offset: str | None = Field(None, alias="endOffset")
    fps: float | None = None


class VideoPart(BaseModel):
    model_config = Closed.model_config | {"populate_by_name": True}

    type: Literal["video_url"]
    video_url: VideoUrl
    frames: int | None = None
    fps: float | None = None
    media_info: MediaInfo | None = None
    video_metadata: VideoMetadata | None = Field(None, alias="videoMetadata")
    uuid: Ignored = None


class File(Closed):
    file_id: str | None = None
    file_data: str | None = Field(None, description="A data URL.")
    filename: str | None = None


class FilePart(Closed):
    """OpenAI's file part: an image or a video, as its bytes say."""

    type: Literal["file"]
    file: File


class RecordingStretch(Closed):
    """A window on the recording's clock or by capture time; absent bounds: its beginning, as far as it is ingested."""

    id: str = Field(description="A recording's id (rec_…).")
    start_s: float | None = Field(None, description="Seconds of the recording's clock.")
    end_s: float | None = Field(None, description="Seconds of the recording's clock.")
    start_time: str | None = Field(None, description='Capture time instead, RFC 3339: "2026-09-01T12:00:00Z".')
    end_time: str | None = Field(None, description="Capture time instead.")


class RecordingPart(Closed):
    """Extension. What was ingested of the window is asked about; nothing is decoded or encoded again."""

    type: Literal["recording"]
    recording: RecordingStretch


def _part_type(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


# Tags stand in angle brackets so that `field_path` can tell them from field names.
Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[VideoPart, Tag("<video_url>")]
    | Annotated[FilePart, Tag("<file>")]
    | Annotated[RecordingPart, Tag("<recording>")],
    Discriminator(
        _part_type,
        custom_error_type="part_type",
        custom_error_message="a part's type must be text, image_url, video_url, file or recording",
    ),
]


def _content_form(value: Any) -> str | None:
    return {str: "<string>", list: "<parts>", type(None): "<null>"}.get(type(value))


Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Tag("<parts>")] | Annotated[None, Tag("<null>")],
    Discriminator(
        _content_form,
        custom_error_type="content_form",
        custom_error_message="content must be a string or a list of parts",
    ),
]


class ChatMessage(Closed):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    name: Ignored = None
    refusal: Annotated[Any, _only(why="refusals cannot be replayed")] = None
    audio: Annotated[Any, _only(why="audio is not supported")] = None
    tool_calls: Annotated[Any, _only([], why=_NO_TOOLS)] = None
    function_call: Annotated[Any, _only(why=_NO_TOOLS)] = None


# -- the request


class StreamOptions(Closed):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class VideoIo(Closed):
    num_frames: int | None = None
    fps: float | None = None


class MediaIo(Closed):
    video: VideoIo | None = None
    image: Annotated[dict[str, Any] | None, Field(max_length=0)] = None


class ChatRequest(Closed):
    messages: list[ChatMessage]
    model: str = Field("", description="A served model's id; empty or absent: the only one.")
    max_completion_tokens: int | None = None
    max_tokens: int | None = Field(None, description="The older name of max_completion_tokens.")
    temperature: float | None = Field(None, description="0 (greedy, the default, as NVILA's own code) to 2.")
    top_p: float | None = Field(None, description="From 0 (greedy) to 1.")
    top_k: int | None = Field(None, description="Extension. 0 or -1: all.")
    min_p: float | None = Field(None, description="Extension. 0 to 1.")
    seed: int | None = None
    stop: str | list[str] | None = Field(None, description="At most 4 strings.")
    ignore_eos: bool | None = Field(None, description="Extension, for benchmarks: go on to max_completion_tokens.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    media_io_kwargs: MediaIo | None = Field(
        None,
        description='{"video": {"num_frames": n}} or {"video": {"fps": x}}: for videos that do not say themselves.',
    )
    timeout_s: float | None = Field(None, description="Extension. Seconds for the whole answer.")

    n: Annotated[Any, _only(1, why="one answer per request is given")] = None
    best_of: Annotated[Any, _only(1, why="one answer per request is given")] = None
    frequency_penalty: Annotated[Any, _only(0, why=_NO_PENALTY)] = None
    presence_penalty: Annotated[Any, _only(0, why=_NO_PENALTY)] = None
    repetition_penalty: Annotated[Any, _only(1, why=_NO_PENALTY)] = None
    logit_bias: Annotated[Any, _only({}, why="not supported")] = None
    logprobs: Annotated[Any, _only(False, why=_NO_LOGPROBS)] = None
    top_logprobs: Annotated[Any, _only(0, why=_NO_LOGPROBS)] = None
    tools: Annotated[Any, _only([], why=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, _only("none", "auto", why=_NO_TOOLS)] = None
    functions: Annotated[Any, _only([], why=_NO_TOOLS)] = None
    function_call: Annotated[Any, _only("none", "auto", why=_NO_TOOLS)] = None
    response_format: Annotated[Any, _only({"type": "text"}, why="answers are plain text")] = None
    modalities: Annotated[Any, _only(["text"], why="answers are text")] = None
    audio: Annotated[Any, _only(why="audio is not supported")] = None
    prediction: Annotated[Any, _only(why="predicted outputs are not supported")] = None
    moderation: Annotated[Any, _only(why="moderation is not supported")] = None
    web_search_options: Annotated[Any, _only(why="web search is not supported")] = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None


def field_path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].video_url.fps`, as OpenAI spells it."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step}" if path else step
    return path
