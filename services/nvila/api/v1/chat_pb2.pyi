from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_SYSTEM: _ClassVar[Role]
    ROLE_USER: _ClassVar[Role]
    ROLE_ASSISTANT: _ClassVar[Role]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
ROLE_UNSPECIFIED: Role
ROLE_SYSTEM: Role
ROLE_USER: Role
ROLE_ASSISTANT: Role
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class VideoSampling(_message.Message):
    __slots__ = ("num_frames", "fps", "start_s", "end_s")
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    num_frames: int
    fps: float
    start_s: float
    end_s: float
    def __init__(self, num_frames: _Optional[int] = ..., fps: _Optional[float] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("url", "file_id", "data")
    URL_FIELD_NUMBER: _ClassVar[int]
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    url: str
    file_id: str
    data: bytes
    def __init__(self, url: _Optional[str] = ..., file_id: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Video(_message.Message):
    __slots__ = ("url", "file_id", "data", "sampling")
    URL_FIELD_NUMBER: _ClassVar[int]
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    url: str
    file_id: str
    data: bytes
    sampling: VideoSampling
    def __init__(self, url: _Optional[str] = ..., file_id: _Optional[str] = ..., data: _Optional[bytes] = ..., sampling: _Optional[_Union[VideoSampling, _Mapping]] = ...) -> None: ...

class RecordingStretch(_message.Message):
    __slots__ = ("recording_id", "start_s", "end_s", "start_at_s", "end_at_s")
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    START_AT_S_FIELD_NUMBER: _ClassVar[int]
    END_AT_S_FIELD_NUMBER: _ClassVar[int]
    recording_id: str
    start_s: float
    end_s: float
    start_at_s: float
    end_at_s: float
    def __init__(self, recording_id: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., start_at_s: _Optional[float] = ..., end_at_s: _Optional[float] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("text", "image", "video", "recording")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    RECORDING_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: Image
    video: Video
    recording: RecordingStretch
    def __init__(self, text: _Optional[str] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., video: _Optional[_Union[Video, _Mapping]] = ..., recording: _Optional[_Union[RecordingStretch, _Mapping]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "parts")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ...) -> None: ...

class ChatRequest(_message.Message):
    __slots__ = ("model", "messages", "sampling")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    model: str
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    sampling: Sampling
    def __init__(self, model: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("text_tokens", "image_tokens", "video_tokens", "completion_tokens", "cached_tokens")
    TEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VIDEO_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text_tokens: int
    image_tokens: int
    video_tokens: int
    completion_tokens: int
    cached_tokens: int
    def __init__(self, text_tokens: _Optional[int] = ..., image_tokens: _Optional[int] = ..., video_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Gap(_message.Message):
    __slots__ = ("start_s", "end_s", "reason")
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    start_s: float
    end_s: float
    reason: str
    def __init__(self, start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class WindowPlan(_message.Message):
    __slots__ = ("mode", "pool", "leaves_out_static", "calls", "blocks", "tokens", "most_tokens", "frames", "seconds_per_frame", "seconds_per_block", "prefill_flops", "reason")
    MODE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    LEAVES_OUT_STATIC_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_FRAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FLOPS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    mode: str
    pool: int
    leaves_out_static: bool
    calls: int
    blocks: int
    tokens: int
    most_tokens: int
    frames: int
    seconds_per_frame: float
    seconds_per_block: float
    prefill_flops: float
    reason: str
    def __init__(self, mode: _Optional[str] = ..., pool: _Optional[int] = ..., leaves_out_static: bool = ..., calls: _Optional[int] = ..., blocks: _Optional[int] = ..., tokens: _Optional[int] = ..., most_tokens: _Optional[int] = ..., frames: _Optional[int] = ..., seconds_per_frame: _Optional[float] = ..., seconds_per_block: _Optional[float] = ..., prefill_flops: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class RecordingCoverage(_message.Message):
    __slots__ = ("recording_id", "start_s", "end_s", "captured_from_s", "captured_to_s", "frames_static", "frames_left_out", "chunks", "plan")
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_FROM_S_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_TO_S_FIELD_NUMBER: _ClassVar[int]
    FRAMES_STATIC_FIELD_NUMBER: _ClassVar[int]
    FRAMES_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    recording_id: str
    start_s: float
    end_s: float
    captured_from_s: float
    captured_to_s: float
    frames_static: int
    frames_left_out: int
    chunks: int
    plan: WindowPlan
    def __init__(self, recording_id: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., captured_from_s: _Optional[float] = ..., captured_to_s: _Optional[float] = ..., frames_static: _Optional[int] = ..., frames_left_out: _Optional[int] = ..., chunks: _Optional[int] = ..., plan: _Optional[_Union[WindowPlan, _Mapping]] = ...) -> None: ...

class MediaCoverage(_message.Message):
    __slots__ = ("kind", "frames_asked", "frames_decoded", "frames_encoded", "frames_reused", "frames_dropped", "frames_padded", "start_s", "end_s", "gaps", "tokens", "chunks", "cache_hits", "tiles", "recording")
    KIND_FIELD_NUMBER: _ClassVar[int]
    FRAMES_ASKED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_DECODED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_ENCODED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_REUSED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_DROPPED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PADDED_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    RECORDING_FIELD_NUMBER: _ClassVar[int]
    kind: str
    frames_asked: int
    frames_decoded: int
    frames_encoded: int
    frames_reused: int
    frames_dropped: int
    frames_padded: int
    start_s: float
    end_s: float
    gaps: _containers.RepeatedCompositeFieldContainer[Gap]
    tokens: int
    chunks: int
    cache_hits: int
    tiles: int
    recording: RecordingCoverage
    def __init__(self, kind: _Optional[str] = ..., frames_asked: _Optional[int] = ..., frames_decoded: _Optional[int] = ..., frames_encoded: _Optional[int] = ..., frames_reused: _Optional[int] = ..., frames_dropped: _Optional[int] = ..., frames_padded: _Optional[int] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., gaps: _Optional[_Iterable[_Union[Gap, _Mapping]]] = ..., tokens: _Optional[int] = ..., chunks: _Optional[int] = ..., cache_hits: _Optional[int] = ..., tiles: _Optional[int] = ..., recording: _Optional[_Union[RecordingCoverage, _Mapping]] = ...) -> None: ...

class Coverage(_message.Message):
    __slots__ = ("media", "stage_ms")
    class StageMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    STAGE_MS_FIELD_NUMBER: _ClassVar[int]
    media: _containers.RepeatedCompositeFieldContainer[MediaCoverage]
    stage_ms: _containers.ScalarMap[str, float]
    def __init__(self, media: _Optional[_Iterable[_Union[MediaCoverage, _Mapping]]] = ..., stage_ms: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("id", "model")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "usage", "coverage")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    usage: Usage
    coverage: Coverage
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., coverage: _Optional[_Union[Coverage, _Mapping]] = ...) -> None: ...

class ChatResponse(_message.Message):
    __slots__ = ("started", "delta", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    delta: Delta
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "max_model_len", "max_frames", "is_random")
    ID_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    IS_RANDOM_FIELD_NUMBER: _ClassVar[int]
    id: str
    max_model_len: int
    max_frames: int
    is_random: bool
    def __init__(self, id: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_frames: _Optional[int] = ..., is_random: bool = ...) -> None: ...
