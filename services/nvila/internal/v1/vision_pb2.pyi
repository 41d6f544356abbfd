from nvila.internal.v1 import tokens_pb2 as _tokens_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EncodeRequest(_message.Message):
    __slots__ = ("key", "kind", "is_tiled", "pool_sizes", "dtype", "vision_revision", "want_inline", "timeout_ms", "traceparent", "times_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    IS_TILED_FIELD_NUMBER: _ClassVar[int]
    POOL_SIZES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VISION_REVISION_FIELD_NUMBER: _ClassVar[int]
    WANT_INLINE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TIMES_S_FIELD_NUMBER: _ClassVar[int]
    key: str
    kind: str
    is_tiled: bool
    pool_sizes: _containers.RepeatedScalarFieldContainer[int]
    dtype: _tokens_pb2.TokenDtype
    vision_revision: str
    want_inline: bool
    timeout_ms: int
    traceparent: str
    times_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, key: _Optional[str] = ..., kind: _Optional[str] = ..., is_tiled: bool = ..., pool_sizes: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[_tokens_pb2.TokenDtype, str]] = ..., vision_revision: _Optional[str] = ..., want_inline: bool = ..., timeout_ms: _Optional[int] = ..., traceparent: _Optional[str] = ..., times_s: _Optional[_Iterable[float]] = ...) -> None: ...

class EncodeResult(_message.Message):
    __slots__ = ("error_code", "error_message", "manifest", "is_published", "inline_payload", "tiles", "stage_ms", "retry_after_s")
    class StageMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    IS_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    INLINE_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    STAGE_MS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    error_code: str
    error_message: str
    manifest: _tokens_pb2.TokenManifest
    is_published: bool
    inline_payload: bytes
    tiles: int
    stage_ms: _containers.ScalarMap[str, float]
    retry_after_s: float
    def __init__(self, error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., manifest: _Optional[_Union[_tokens_pb2.TokenManifest, _Mapping]] = ..., is_published: bool = ..., inline_payload: _Optional[bytes] = ..., tiles: _Optional[int] = ..., stage_ms: _Optional[_Mapping[str, float]] = ..., retry_after_s: _Optional[float] = ...) -> None: ...
