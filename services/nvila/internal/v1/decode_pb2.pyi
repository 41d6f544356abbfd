from nvila.internal.v1 import tokens_pb2 as _tokens_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PromptPart(_message.Message):
    __slots__ = ("text", "media")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    text: str
    media: int
    def __init__(self, text: _Optional[str] = ..., media: _Optional[int] = ...) -> None: ...

class PromptMessage(_message.Message):
    __slots__ = ("role", "parts")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    role: str
    parts: _containers.RepeatedCompositeFieldContainer[PromptPart]
    def __init__(self, role: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[PromptPart, _Mapping]]] = ...) -> None: ...

class TokensRef(_message.Message):
    __slots__ = ("key", "levels")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    key: str
    levels: _containers.RepeatedCompositeFieldContainer[_tokens_pb2.Level]
    def __init__(self, key: _Optional[str] = ..., levels: _Optional[_Iterable[_Union[_tokens_pb2.Level, _Mapping]]] = ...) -> None: ...

class PromptMedia(_message.Message):
    __slots__ = ("kind", "is_tiled", "records")
    KIND_FIELD_NUMBER: _ClassVar[int]
    IS_TILED_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    is_tiled: bool
    records: _containers.RepeatedCompositeFieldContainer[TokensRef]
    def __init__(self, kind: _Optional[str] = ..., is_tiled: bool = ..., records: _Optional[_Iterable[_Union[TokensRef, _Mapping]]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: bool = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "messages", "media", "sampling", "timeout_ms", "vision_revision", "cache_salt", "inline", "resume_ids", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    VISION_REVISION_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    RESUME_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    messages: _containers.RepeatedCompositeFieldContainer[PromptMessage]
    media: _containers.RepeatedCompositeFieldContainer[PromptMedia]
    sampling: SamplingParams
    timeout_ms: int
    vision_revision: str
    cache_salt: str
    inline: _containers.RepeatedCompositeFieldContainer[_tokens_pb2.InlineTokens]
    resume_ids: _containers.RepeatedScalarFieldContainer[int]
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[PromptMessage, _Mapping]]] = ..., media: _Optional[_Iterable[_Union[PromptMedia, _Mapping]]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., vision_revision: _Optional[str] = ..., cache_salt: _Optional[str] = ..., inline: _Optional[_Iterable[_Union[_tokens_pb2.InlineTokens, _Mapping]]] = ..., resume_ids: _Optional[_Iterable[int]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class PromptUsage(_message.Message):
    __slots__ = ("text", "image", "video", "cached")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    text: int
    image: int
    video: int
    cached: int
    def __init__(self, text: _Optional[int] = ..., image: _Optional[int] = ..., video: _Optional[int] = ..., cached: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("prompt",)
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    prompt: PromptUsage
    def __init__(self, prompt: _Optional[_Union[PromptUsage, _Mapping]] = ...) -> None: ...

class TextDelta(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TokensMissing(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[_Iterable[str]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "prompt", "completion_tokens", "stage_ms")
    class StageMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAGE_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    prompt: PromptUsage
    completion_tokens: int
    stage_ms: _containers.ScalarMap[str, float]
    def __init__(self, reason: _Optional[str] = ..., prompt: _Optional[_Union[PromptUsage, _Mapping]] = ..., completion_tokens: _Optional[int] = ..., stage_ms: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("code", "message", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retry_after_s: float
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("accepted", "delta", "missing", "finished", "failed")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    delta: TextDelta
    missing: TokensMissing
    finished: Finished
    failed: Failed
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., delta: _Optional[_Union[TextDelta, _Mapping]] = ..., missing: _Optional[_Union[TokensMissing, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("request_id", "text", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("vector", "failed")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    vector: bytes
    failed: Failed
    def __init__(self, vector: _Optional[bytes] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("name", "vision_revision", "config_json", "max_model_len", "token_dtype", "engine", "is_random")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VISION_REVISION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    IS_RANDOM_FIELD_NUMBER: _ClassVar[int]
    name: str
    vision_revision: str
    config_json: str
    max_model_len: int
    token_dtype: _tokens_pb2.TokenDtype
    engine: str
    is_random: bool
    def __init__(self, name: _Optional[str] = ..., vision_revision: _Optional[str] = ..., config_json: _Optional[str] = ..., max_model_len: _Optional[int] = ..., token_dtype: _Optional[_Union[_tokens_pb2.TokenDtype, str]] = ..., engine: _Optional[str] = ..., is_random: bool = ...) -> None: ...
