"""Records: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nvila.cache.codec import (
    SHARD_BYTES,
    CorruptRecord,
    Record,
    RecordFormat,
    dequantize,
    from_inline,
    pack,
    quantize,
    to_inline,
    unpack,
)
from nvila.internal.v1 import tokens_pb2
from nvila.types import Level, TokenDtype, TokensRef, VisualTokens

KEY = "ab" * 32
WIDTH = 64
REF = TokensRef(key=KEY, levels=(Level(3, 1000), Level(1, 1200)))


def form_of(dtype: TokenDtype) -> RecordFormat:
    return RecordFormat(width=WIDTH, dtype=dtype, vision_revision="rev")


def values(tokens: int = REF.tokens, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(tokens, WIDTH)).astype(np.float32)


def tokens_of(dtype: TokenDtype, ref: TokensRef = REF) -> VisualTokens:
    stored, scales = quantize(values(ref.tokens), dtype)
    return VisualTokens(ref=ref, dtype=dtype, values_TD=stored, scales_T=scales, vision_revision="rev")


def read(record: Record, dtype: TokenDtype, ref: TokensRef = REF) -> VisualTokens:
    return unpack(record.manifest, record.shards, ref, form_of(dtype))


@pytest.mark.parametrize("dtype", TokenDtype)
def test_tokens_come_back_exactly_as_they_were_packed(dtype: TokenDtype) -> None:
    tokens = tokens_of(dtype)
    back = read(pack(tokens), dtype)
    np.testing.assert_array_equal(back.values_TD, tokens.values_TD)
    assert back.values_TD.dtype == tokens.values_TD.dtype
    if tokens.scales_T is not None:
        assert back.scales_T is not None
        np.testing.assert_array_equal(back.scales_T, tokens.scales_T)
    assert (back.ref, back.dtype, back.vision_revision) == (REF, dtype, "rev")


@pytest.mark.parametrize("dtype", TokenDtype)
def test_tokens_travel_inline_unchanged(dtype: TokenDtype) -> None:
    tokens = tokens_of(dtype)
    wire = tokens_pb2.InlineTokens.FromString(to_inline(tokens).SerializeToString())
    np.testing.assert_array_equal(dequantize(from_inline(wire, form_of(dtype))), dequantize(tokens))


def test_payload_is_cut_into_shards_of_one_mebibyte() -> None:
    record = pack(tokens_of(TokenDtype.FLOAT32))
    assert [len(shard) for shard in record.shards] == [SHARD_BYTES, REF.tokens * WIDTH * 4 - SHARD_BYTES]
    assert form_of(TokenDtype.FLOAT32).shards(REF.tokens) == 2


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    x_TD = np.random.default_rng(1).integers(0, 2**32, (512, WIDTH), dtype=np.uint64).astype(np.uint32)
    x_TD = np.where((x_TD & 0x7F800000) == 0x7F800000, 0, x_TD).astype(np.uint32)  # no infinities, no NaN
    x_TD[0, :4] = (0x3F808000, 0x3F818000, 0x3F808001, 0x80000000)  # two ties, just above a tie, minus zero
    floats = x_TD.view(np.float32)
    floats[np.abs(floats) > 3e38] = 0
    stored, _ = quantize(floats, TokenDtype.BFLOAT16)
    expected = torch.from_numpy(floats).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(stored, expected)


def test_int8_is_off_by_at_most_half_a_step_of_its_tokens_scale() -> None:
    x_TD = values() * np.logspace(-30, 30, REF.tokens, dtype=np.float64)[:, None]
    x_TD = x_TD.astype(np.float32)
    x_TD[0] = 0
    stored, scales = quantize(x_TD, TokenDtype.INT8)
    assert scales is not None
    tokens = VisualTokens(ref=REF, dtype=TokenDtype.INT8, values_TD=stored, scales_T=scales, vision_revision="rev")
    error = np.abs(dequantize(tokens) - x_TD)
    assert (error <= scales[:, None] * 0.5001).all()  # a little above half: the division and product round too


@pytest.mark.parametrize("dtype", TokenDtype)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_never_packed(dtype: TokenDtype, bad: float) -> None:
    x_TD = values()
    x_TD[5, 6] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(x_TD, dtype)


def test_values_beyond_bfloat16_are_never_packed() -> None:
    with pytest.raises(ValueError, match="too large"):
        quantize(np.full((1, 1), np.finfo(np.float32).max, dtype=np.float32), TokenDtype.BFLOAT16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("key", "cd" * 32),
        ("vision_revision", "another"),
        ("dtype", tokens_pb2.TOKEN_DTYPE_INT8),
        ("dtype", tokens_pb2.TOKEN_DTYPE_UNSPECIFIED),
        ("width", WIDTH * 2),
        ("width", 2**31),
        ("payload_bytes", 2**40),
        ("payload_bytes", 0),
        ("shard_bytes", 1),
        ("shard_bytes", 0),
    ],
)
def test_a_manifest_that_says_anything_unexpected_is_refused(field: str, value: object) -> None:
    record = pack(tokens_of(TokenDtype.FLOAT32))
    manifest = tokens_pb2.TokenManifest.FromString(record.manifest)
    setattr(manifest, field, value)
    with pytest.raises(CorruptRecord, match="expected"):
        unpack(manifest.SerializeToString(), record.shards, REF, form_of(TokenDtype.FLOAT32))


@pytest.mark.parametrize("levels", [(Level(1, 1200), Level(3, 1000)), (Level(3, 1000),), (Level(4200, 1),), ()])
def test_other_levels_are_refused_even_with_as_many_tokens(levels: tuple[Level, ...]) -> None:
    record = pack(tokens_of(TokenDtype.FLOAT32))
    with pytest.raises(CorruptRecord):
        read(record, TokenDtype.FLOAT32, TokensRef(key=KEY, levels=levels))


def test_a_missing_shard_a_short_shard_and_swapped_shards_are_refused() -> None:
    record = pack(tokens_of(TokenDtype.FLOAT32))
    form = form_of(TokenDtype.FLOAT32)
    first, second = record.shards
    for shards in [(first,), (first, second[:-1]), (first[:-1], second), (second, first), (first, second, second), ()]:
        with pytest.raises(CorruptRecord):
            unpack(record.manifest, shards, REF, form)


@pytest.mark.parametrize("dtype", TokenDtype)
def test_values_that_are_not_finite_are_never_unpacked(dtype: TokenDtype) -> None:
    tokens = tokens_of(dtype)
    if tokens.scales_T is not None:
        tokens.scales_T[7] = np.inf
    else:
        tokens.values_TD[7, 7] = 0x7F80 if dtype is TokenDtype.BFLOAT16 else np.nan  # bfloat16 infinity
    with pytest.raises(CorruptRecord, match="finite"):
        read(pack(tokens), dtype)


@given(st.data())
def test_a_record_changed_anywhere_is_refused_or_unchanged_in_meaning(data: st.DataObject) -> None:
    small = TokensRef(key=KEY, levels=(Level(2, 8),))
    dtype = data.draw(st.sampled_from(TokenDtype))
    tokens = tokens_of(dtype, small)
    record = pack(tokens, group_start_s=(0.0, 1.5), traceparent="t", writer="w")
    manifest, payload = bytearray(record.manifest), bytearray(record.payload)
    target = data.draw(st.sampled_from([manifest, payload]))
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip" if target:
                target[data.draw(st.integers(0, len(target) - 1))] ^= data.draw(st.integers(1, 255))
            case "cut":
                del target[data.draw(st.integers(0, len(target))) :]
            case _:
                target[data.draw(st.integers(0, len(target))) :] = data.draw(st.binary(max_size=20))
    try:
        back = unpack(bytes(manifest), [bytes(payload)], small, form_of(dtype))
    except CorruptRecord:
        return
    np.testing.assert_array_equal(back.values_TD, tokens.values_TD)  # only times, trace or writer were changed


@given(st.binary(max_size=300), st.lists(st.binary(max_size=64), max_size=3))
def test_random_bytes_are_refused(manifest: bytes, shards: list[bytes]) -> None:
    with pytest.raises(CorruptRecord):
        unpack(manifest, shards, REF, form_of(TokenDtype.FLOAT32))
