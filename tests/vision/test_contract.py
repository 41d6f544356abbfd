"""The vision leg's contract: Triton, Python and the messages say the same."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from nvila.errors import InvalidRequest
from nvila.internal.v1 import vision_pb2
from nvila.types import EncodeSettings, MediaKind, TokenDtype
from nvila.vision.contract import ENCODE, FRAMES, FRAMES_DIMS, MODEL, RESULT, EncodeCall
from nvila.vision.triton import MODEL_REPOSITORY

calls = st.builds(
    EncodeCall,
    key=st.text("0123456789abcdef", min_size=64, max_size=64),
    settings=st.builds(
        EncodeSettings,
        kind=st.sampled_from(MediaKind),
        is_tiled=st.booleans(),
        pool_sizes=st.lists(st.tuples(*[st.integers(1, 256)] * 3), max_size=8).map(tuple),
        token_dtype=st.sampled_from(TokenDtype),
        vision_revision=st.text(max_size=10),
    ),
    want_inline=st.booleans(),
    timeout_s=st.none() | st.integers(1, 10_000_000).map(lambda ms: ms / 1000),
    traceparent=st.text(max_size=10),
    times_s=st.lists(st.floats(0, 1e6), max_size=5).map(tuple),
)


def test_config_pbtxt_says_what_the_contract_says() -> None:
    text = (MODEL_REPOSITORY / MODEL / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    uint8 = model_config_pb2.TYPE_UINT8
    assert config.name == MODEL
    assert [(one.name, one.data_type, tuple(one.dims)) for one in config.input] == [
        (FRAMES, uint8, FRAMES_DIMS),
        (ENCODE, uint8, (-1,)),
    ]
    assert [(one.name, one.data_type, tuple(one.dims)) for one in config.output] == [(RESULT, uint8, (-1,))]
    assert config.max_batch_size == 0


@given(calls)
def test_a_call_comes_back_from_the_wire_as_it_was(call: EncodeCall) -> None:
    assert EncodeCall.from_bytes(call.to_bytes()) == call


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", "ab"),
        ("key", "AB" * 32),
        ("key", "../" * 21 + "x"),
        ("kind", "audio"),
        ("kind", ""),
        ("dtype", 0),
        ("dtype", 99),
        ("pool_sizes", [8, 1]),
        ("pool_sizes", [0, 1, 1]),
        ("pool_sizes", [2**31, 1, 1]),
        ("pool_sizes", [1] * 27),
    ],
)
def test_a_call_with_a_field_out_of_range_is_refused(field: str, value: object) -> None:
    settings = EncodeSettings(
        kind=MediaKind.VIDEO, is_tiled=False, pool_sizes=(), token_dtype=TokenDtype.INT8, vision_revision="r"
    )
    message = vision_pb2.EncodeRequest.FromString(EncodeCall(key="ab" * 32, settings=settings).to_bytes())
    if isinstance(value, list):
        getattr(message, field).extend(value)
    else:
        setattr(message, field, value)
    with pytest.raises(InvalidRequest, match=f"EncodeRequest.{field}"):
        EncodeCall.from_bytes(message.SerializeToString())


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        EncodeCall.from_bytes(data)
