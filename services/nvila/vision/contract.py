"""What gateway and vision service say to each other: the Triton model's tensors and the messages that ride in them.

Light: the gateway imports it. `model_repository/nvila_vision/config.pbtxt` declares the same tensors to Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from nvila.errors import InvalidRequest
from nvila.internal.v1 import tokens_pb2, vision_pb2
from nvila.types import EncodeSettings, MediaKind, TokenDtype

MODEL = "nvila_vision"

FRAMES = "FRAMES"
FRAMES_DIMS = (-1, -1, -1, 3)
"""UINT8: frames, rows, columns, RGB."""

ENCODE = "ENCODE"
"""UINT8 [n]: one serialized EncodeRequest."""

RESULT = "RESULT"
"""UINT8 [n]: one serialized EncodeResult."""

MAX_MESSAGE_BYTES = 2**31 - 1
"""Largest gRPC message that Triton and protobuf take; said explicitly, since a gRPC client's own default is 4 MB."""

_DTYPES = {
    tokens_pb2.TOKEN_DTYPE_FLOAT32: TokenDtype.FLOAT32,
    tokens_pb2.TOKEN_DTYPE_BFLOAT16: TokenDtype.BFLOAT16,
    tokens_pb2.TOKEN_DTYPE_INT8: TokenDtype.INT8,
}
_WIRE_DTYPES = {dtype: number for number, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class EncodeCall:
    """What is asked about the frames of one call.

    `timeout_s`: what is left of the request's time; None means no limit. `times_s`: presentation times of the frames.
    """

    key: str
    settings: EncodeSettings
    want_inline: bool = False
    timeout_s: float | None = None
    traceparent: str = ""
    times_s: tuple[float, ...] = ()

    def to_bytes(self) -> bytes:
        timeout_ms = 0 if self.timeout_s is None else max(1, round(self.timeout_s * 1000))
        return vision_pb2.EncodeRequest(
            key=self.key,
            kind=self.settings.kind,
            is_tiled=self.settings.is_tiled,
            pool_sizes=[size for pool in self.settings.pool_sizes for size in pool],
            dtype=_WIRE_DTYPES[self.settings.token_dtype],
            vision_revision=self.settings.vision_revision,
            want_inline=self.want_inline,
            timeout_ms=min(timeout_ms, 2**32 - 1),
            traceparent=self.traceparent,
            times_s=self.times_s,
        ).SerializeToString()

    @classmethod
    def from_bytes(cls, data: bytes) -> EncodeCall:
        """Raises `InvalidRequest` for anything that is not a complete request."""
        try:
            message = vision_pb2.EncodeRequest.FromString(data)
        except DecodeError:
            raise InvalidRequest(f"tensor {ENCODE} of {len(data)} bytes is not an EncodeRequest") from None
        return cls(
            key=_checked_key(message.key),
            settings=EncodeSettings(
                kind=_checked_kind(message.kind),
                is_tiled=message.is_tiled,
                pool_sizes=_checked_pools(message.pool_sizes),
                token_dtype=_checked_dtype(message.dtype),
                vision_revision=message.vision_revision,
            ),
            want_inline=message.want_inline,
            timeout_s=message.timeout_ms / 1000 if message.timeout_ms else None,
            traceparent=message.traceparent,
            times_s=tuple(message.times_s),
        )


def as_tensor(data: bytes) -> NDArray[np.uint8]:
    """Bytes as a tensor of this contract."""
    return np.frombuffer(data, dtype=np.uint8)


def _checked_key(key: str) -> str:
    if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
        raise InvalidRequest("EncodeRequest.key: expected 64 lower-case hex digits")
    return key


def _checked_kind(kind: str) -> MediaKind:
    if kind not in list(MediaKind):
        raise InvalidRequest(f"EncodeRequest.kind: expected one of {', '.join(MediaKind)}")
    return MediaKind(kind)


def _checked_dtype(dtype: tokens_pb2.TokenDtype) -> TokenDtype:
    if dtype not in _DTYPES:
        raise InvalidRequest(f"EncodeRequest.dtype: {dtype} is not a storage type")
    return _DTYPES[dtype]


def _checked_pools(sizes: object) -> tuple[tuple[int, int, int], ...]:
    numbers = list(sizes)  # type: ignore[call-overload]  # a repeated field has no importable type
    if len(numbers) % 3 or 0 in numbers or len(numbers) > 24 or any(number > 256 for number in numbers):
        raise InvalidRequest("EncodeRequest.pool_sizes: expected at most 8 times three numbers from 1 to 256")
    return tuple((a, b, c) for a, b, c in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
