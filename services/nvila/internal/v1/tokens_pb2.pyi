from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOKEN_DTYPE_UNSPECIFIED: _ClassVar[TokenDtype]
    TOKEN_DTYPE_FLOAT32: _ClassVar[TokenDtype]
    TOKEN_DTYPE_BFLOAT16: _ClassVar[TokenDtype]
    TOKEN_DTYPE_INT8: _ClassVar[TokenDtype]
TOKEN_DTYPE_UNSPECIFIED: TokenDtype
TOKEN_DTYPE_FLOAT32: TokenDtype
TOKEN_DTYPE_BFLOAT16: TokenDtype
TOKEN_DTYPE_INT8: TokenDtype

class Level(_message.Message):
    __slots__ = ("blocks", "tokens")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    tokens: int
    def __init__(self, blocks: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class TokenManifest(_message.Message):
    __slots__ = ("schema_version", "key", "vision_revision", "dtype", "levels", "width", "payload_bytes", "shard_bytes", "shard_digests", "group_start_s", "traceparent", "writer")
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VISION_REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARD_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    GROUP_START_S_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    schema_version: int
    key: str
    vision_revision: str
    dtype: TokenDtype
    levels: _containers.RepeatedCompositeFieldContainer[Level]
    width: int
    payload_bytes: int
    shard_bytes: int
    shard_digests: _containers.RepeatedScalarFieldContainer[bytes]
    group_start_s: _containers.RepeatedScalarFieldContainer[float]
    traceparent: str
    writer: str
    def __init__(self, schema_version: _Optional[int] = ..., key: _Optional[str] = ..., vision_revision: _Optional[str] = ..., dtype: _Optional[_Union[TokenDtype, str]] = ..., levels: _Optional[_Iterable[_Union[Level, _Mapping]]] = ..., width: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., shard_bytes: _Optional[int] = ..., shard_digests: _Optional[_Iterable[bytes]] = ..., group_start_s: _Optional[_Iterable[float]] = ..., traceparent: _Optional[str] = ..., writer: _Optional[str] = ...) -> None: ...

class InlineTokens(_message.Message):
    __slots__ = ("manifest", "payload")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    manifest: TokenManifest
    payload: bytes
    def __init__(self, manifest: _Optional[_Union[TokenManifest, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...
