"""Visual tokens as bytes and back: storage types, the record (a manifest and shards of 1 MiB), and its verification.

A reader knows before it reads which layout, width, type and weights a record must have: every size is checked against
what *it* expects before anything is allocated, and a record's own words about its size are only compared. Whatever is
wrong raises `CorruptRecord`, which the store counts as a miss.

Little-endian throughout, as every machine that nvila runs on. Shapes: T visual tokens · D language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from nvila.cache.keys import SCHEMA_VERSION
from nvila.internal.v1 import tokens_pb2
from nvila.types import Level, TokenDtype, TokensRef, VisualTokens

SHARD_BYTES = 1 << 20
"""Redis moved 2.3 GB/s at 1 MB values and 0.4-0.85 GB/s at 7-28 MB on a small machine (DESIGN §3)."""

_ITEM_BYTES = {TokenDtype.FLOAT32: 4, TokenDtype.BFLOAT16: 2, TokenDtype.INT8: 1}
_NUMPY: dict[TokenDtype, np.dtype[Any]] = {
    TokenDtype.FLOAT32: np.dtype("<f4"),
    TokenDtype.BFLOAT16: np.dtype("<u2"),
    TokenDtype.INT8: np.dtype("i1"),
}
_SCALE_BYTES = 4
_WIRE = {
    TokenDtype.FLOAT32: tokens_pb2.TOKEN_DTYPE_FLOAT32,
    TokenDtype.BFLOAT16: tokens_pb2.TOKEN_DTYPE_BFLOAT16,
    TokenDtype.INT8: tokens_pb2.TOKEN_DTYPE_INT8,
}

Buffer = bytes | memoryview


class CorruptRecord(Exception):
    """A record that must not be used: torn, flipped, foreign or hostile. Never leaves the cache and its clients."""


@dataclass(frozen=True, kw_only=True)
class RecordFormat:
    """What all records of one served model have in common, as their reader expects it."""

    width: int
    dtype: TokenDtype
    vision_revision: str

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of a record's values and scales."""
        scales = _SCALE_BYTES if self.dtype is TokenDtype.INT8 else 0
        return tokens * (self.width * _ITEM_BYTES[self.dtype] + scales)

    def shards(self, tokens: int) -> int:
        """How many values a record's payload is cut into."""
        return -(-self.payload_bytes(tokens) // SHARD_BYTES)


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """Visual tokens in their stored form. `manifest`: a serialized `TokenManifest`. `payload`: values, then scales."""

    key: str
    manifest: bytes
    payload: memoryview

    @property
    def shards(self) -> tuple[memoryview, ...]:
        return _cut(self.payload)


# -- storage types ----------------------------------------------------------------------------------------------------


def quantize(
    values_TD: NDArray[np.float32], dtype: TokenDtype
) -> tuple[NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int8], NDArray[np.float32] | None]:
    """Values in their storage type, and one scale per token for INT8 (symmetric, largest magnitude at 127).

    values_TD: float32 (tokens, width). BFLOAT16 rounds to nearest, ties to even. Raises `ValueError` for values that
    are not finite, or not finite once stored.
    """
    if not np.isfinite(values_TD).all():
        bad = int(values_TD.size - np.isfinite(values_TD).sum())
        raise ValueError(f"{bad} of {values_TD.size} visual token values are not finite")
    if dtype is TokenDtype.FLOAT32:
        return np.ascontiguousarray(values_TD, dtype=np.float32), None
    if dtype is TokenDtype.BFLOAT16:
        bits = np.ascontiguousarray(values_TD, dtype=np.float32).view(np.uint32)
        rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
        if not _is_finite_bfloat16(rounded):
            raise ValueError("visual token values are too large for bfloat16")
        return rounded, None
    scales_T = (np.abs(values_TD).max(axis=1, initial=0.0) / np.float32(127)).astype(np.float32)
    divisor_T1 = np.where(scales_T > 0, scales_T, np.float32(1))[:, None]
    return np.clip(np.rint(values_TD / divisor_T1), -127, 127).astype(np.int8), scales_T


def dequantize(tokens: VisualTokens) -> NDArray[np.float32]:
    """float32 (tokens, width), as the language model takes them. FLOAT32 is returned as it is, without a copy."""
    if tokens.dtype is TokenDtype.FLOAT32:
        return tokens.values_TD.astype(np.float32, copy=False)
    if tokens.dtype is TokenDtype.BFLOAT16:
        return (tokens.values_TD.astype(np.uint32) << 16).view(np.float32)
    assert tokens.scales_T is not None, "INT8 tokens have scales"
    return tokens.values_TD.astype(np.float32) * tokens.scales_T[:, None]


def _is_finite_bfloat16(bits: NDArray[np.uint16]) -> bool:
    return not bool(((bits & 0x7F80) == 0x7F80).any())


# -- writing ----------------------------------------------------------------------------------------------------------


def pack(
    tokens: VisualTokens, *, group_start_s: Sequence[float] = (), traceparent: str = "", writer: str = ""
) -> Record:
    """The stored form of `tokens`. `group_start_s`: first presentation time of each temporal group, for videos."""
    parts = [np.ascontiguousarray(tokens.values_TD, dtype=_NUMPY[tokens.dtype]).reshape(-1).view(np.uint8)]
    if tokens.scales_T is not None:
        parts.append(np.ascontiguousarray(tokens.scales_T, dtype="<f4").view(np.uint8))
    payload = (parts[0] if len(parts) == 1 else np.concatenate(parts)).data
    manifest = tokens_pb2.TokenManifest(
        schema_version=SCHEMA_VERSION,
        key=tokens.ref.key,
        vision_revision=tokens.vision_revision,
        dtype=_WIRE[tokens.dtype],
        levels=[tokens_pb2.Level(blocks=level.blocks, tokens=level.tokens) for level in tokens.ref.levels],
        width=tokens.width,
        payload_bytes=len(payload),
        shard_bytes=SHARD_BYTES,
        shard_digests=[blake3(shard).digest() for shard in _cut(payload)],
        group_start_s=group_start_s,
        traceparent=traceparent,
        writer=writer,
    )
    return Record(key=tokens.ref.key, manifest=manifest.SerializeToString(), payload=payload)


def to_inline(tokens: VisualTokens) -> tokens_pb2.InlineTokens:
    """`tokens` as they travel beside the cache."""
    record = pack(tokens)
    return tokens_pb2.InlineTokens(
        manifest=tokens_pb2.TokenManifest.FromString(record.manifest), payload=bytes(record.payload)
    )


def _cut(payload: memoryview) -> tuple[memoryview, ...]:
    return tuple(payload[start : start + SHARD_BYTES] for start in range(0, len(payload), SHARD_BYTES))


# -- reading ----------------------------------------------------------------------------------------------------------


def unpack(
    manifest: Buffer | tokens_pb2.TokenManifest, shards: Sequence[Buffer], expect: TokensRef, form: RecordFormat
) -> VisualTokens:
    """Visual tokens from a record's stored form, or `CorruptRecord`.

    Every statement of the manifest must be what the reader expects, every shard must have its length and digest, every
    value must be finite.
    """
    described = _parsed(manifest)
    _compare("schema version", SCHEMA_VERSION, described.schema_version)
    _compare("key", expect.key, described.key)
    _compare("vision revision", form.vision_revision, described.vision_revision)
    _compare("dtype", _WIRE[form.dtype], described.dtype)
    _compare("levels", expect.levels, tuple(Level(level.blocks, level.tokens) for level in described.levels))
    _compare("width", form.width, described.width)
    size = form.payload_bytes(expect.tokens)
    _compare("payload bytes", size, described.payload_bytes)
    _compare("shard bytes", SHARD_BYTES, described.shard_bytes)
    _compare("shards", form.shards(expect.tokens), len(shards))
    _compare("shard digests", len(shards), len(described.shard_digests))
    for index, (shard, digest) in enumerate(zip(shards, described.shard_digests, strict=True)):
        _compare(f"length of shard {index}", min(SHARD_BYTES, size - index * SHARD_BYTES), len(shard))
        if blake3(shard).digest() != digest:
            raise CorruptRecord(f"shard {index} does not have its digest")
    return _assemble(shards, size, expect, form)


def unpack_payload(
    manifest: Buffer | tokens_pb2.TokenManifest, payload: Buffer, expect: TokensRef, form: RecordFormat
) -> VisualTokens:
    """As `unpack`, of a payload in one piece (inline tokens)."""
    return unpack(manifest, _cut(memoryview(payload)), expect, form)


def from_inline(inline: tokens_pb2.InlineTokens, form: RecordFormat) -> VisualTokens:
    """As `unpack`, of tokens that travelled beside the cache.

    Key and layout are taken from the manifest, for the caller to compare with what it waits for; the length of the
    payload, which is already here, bounds what is allocated.
    """
    levels = tuple(Level(level.blocks, level.tokens) for level in inline.manifest.levels)
    ref = TokensRef(key=inline.manifest.key, levels=levels)
    return unpack_payload(inline.manifest, inline.payload, ref, form)


def traceparent_of(manifest: Buffer) -> str:
    """Trace context of a record's writer, for a span link."""
    return _parsed(manifest).traceparent


def _parsed(manifest: Buffer | tokens_pb2.TokenManifest) -> tokens_pb2.TokenManifest:
    if isinstance(manifest, tokens_pb2.TokenManifest):
        return manifest
    try:
        return tokens_pb2.TokenManifest.FromString(bytes(manifest))
    except DecodeError as error:
        raise CorruptRecord(f"a manifest of {len(manifest)} bytes cannot be parsed") from error


def _compare(what: str, expected: object, came: object) -> None:
    if expected != came:
        raise CorruptRecord(f"{what}: expected {expected}, the record has {came}")


def _assemble(shards: Sequence[Buffer], size: int, expect: TokensRef, form: RecordFormat) -> VisualTokens:
    payload = np.empty(size, dtype=np.uint8)
    for index, shard in enumerate(shards):
        start = index * SHARD_BYTES
        payload[start : start + len(shard)] = np.frombuffer(shard, dtype=np.uint8)
    split = expect.tokens * form.width * _ITEM_BYTES[form.dtype]
    values_TD = payload[:split].view(_NUMPY[form.dtype]).reshape(expect.tokens, form.width)
    scales_T = payload[split:].copy().view("<f4") if form.dtype is TokenDtype.INT8 else None
    if form.dtype is TokenDtype.BFLOAT16:
        is_finite = _is_finite_bfloat16(values_TD)
    else:
        is_finite = bool(np.isfinite(values_TD if scales_T is None else scales_T).all())
    if not is_finite:
        raise CorruptRecord("values are not finite")
    return VisualTokens(
        ref=expect, dtype=form.dtype, values_TD=values_TD, scales_T=scales_T, vision_revision=form.vision_revision
    )
