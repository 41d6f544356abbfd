from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nvila.cache.codec import RecordFormat, to_inline
from nvila.decode import wire
from nvila.errors import DeadlineExceeded, InvalidRequest, NvilaError, Overloaded
from nvila.internal.v1 import decode_pb2 as pb
from nvila.types import (
    Accepted,
    Deadline,
    DecodeEvent,
    Finished,
    FinishReason,
    ModelCard,
    PromptUsage,
    SamplingParams,
    TextDelta,
    TokenDtype,
    TokensMissing,
)
from tests.decode.questions import request, tokens_of, video

FORM = RecordFormat(width=8, dtype=TokenDtype.FLOAT32, vision_revision="rev")
FILM = video("film")

EVENTS: list[DecodeEvent] = [
    Accepted(prompt=PromptUsage(text=1, image=2, video=3, cached=4)),
    TextDelta("naïve 🦊", (1, 2, 3)),
    TextDelta("", (7,)),
    TokensMissing(("a", "b")),
    Finished(
        reason=FinishReason.LENGTH,
        prompt=PromptUsage(text=1, image=0, video=3),
        completion_tokens=9,
        stage_ms={"fetch": 1.5, "prefill": 2.5},
    ),
]


def test_a_request_comes_back_as_it_was() -> None:
    sampling = SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=2**64 - 1, stop=("x",), ignore_eos=True
    )
    sent = request("é", media=[FILM], inline=tokens_of(FILM, FORM), sampling=sampling, resume_ids=(1, 2))
    came = wire.request_from_proto(pb.GenerateRequest.FromString(wire.request_to_proto(sent).SerializeToString()), FORM)
    assert replace(came, inline=(), deadline=sent.deadline) == replace(sent, inline=())
    assert came.deadline.left_s() == pytest.approx(sent.deadline.left_s(), abs=0.1)
    for before, after in zip(sent.inline, came.inline, strict=True):
        assert after.ref == before.ref
        np.testing.assert_array_equal(after.values_TD, before.values_TD)


def test_no_seed_stays_no_seed() -> None:
    came = wire.request_from_proto(wire.request_to_proto(request()), FORM)
    assert came.sampling.seed is None


def test_a_request_whose_time_is_up_is_not_sent() -> None:
    with pytest.raises(DeadlineExceeded):
        wire.request_to_proto(replace(request(), deadline=Deadline.after(-1)))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.GenerateRequest(messages=[pb.PromptMessage(role="robot")]), "unknown role 'robot'"),
        (
            pb.GenerateRequest(messages=[pb.PromptMessage(role="user", parts=[pb.PromptPart()])]),
            "neither text nor media",
        ),
        (pb.GenerateRequest(media=[pb.PromptMedia(kind="smell")]), "unknown media kind 'smell'"),
    ],
)
def test_malformed_messages_are_refused(message: pb.GenerateRequest, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        wire.request_from_proto(message, FORM)


def _flip(message: pb.GenerateRequest) -> None:
    payload = bytearray(message.inline[0].payload)
    payload[3] ^= 1
    message.inline[0].payload = bytes(payload)


def _not_finite(message: pb.GenerateRequest) -> None:
    tokens = tokens_of(FILM, FORM)
    tokens[0].values_TD[0, 0] = np.nan
    message.inline[0].CopyFrom(to_inline(tokens[0]))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda m: setattr(m.inline[0].manifest, "width", 9), "width: expected 8, the record has 9"),
        (lambda m: setattr(m.inline[0].manifest, "dtype", 3), "dtype"),
        (lambda m: setattr(m.inline[0].manifest, "vision_revision", "other"), "vision revision"),
        (lambda m: setattr(m.inline[0].manifest, "payload_bytes", 1 << 50), "payload bytes"),
        (lambda m: setattr(m.inline[0].manifest.levels[0], "blocks", 1 << 31), "payload bytes"),
        (lambda m: setattr(m.inline[0].manifest.levels[0], "tokens", 17), "payload bytes"),
        (lambda m: setattr(m.inline[0], "payload", m.inline[0].payload[:-1]), "length of shard 0"),
        (_flip, "digest"),
        (_not_finite, "not finite"),
    ],
)
def test_inline_tokens_that_are_not_what_they_should_be_are_refused(harm: object, words: str) -> None:
    message = wire.request_to_proto(request(media=[FILM], inline=tokens_of(FILM, FORM)))
    assert callable(harm)
    harm(message)
    with pytest.raises(InvalidRequest, match=words):
        wire.request_from_proto(message, FORM)


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_comes_back_as_it_was(event: DecodeEvent) -> None:
    assert wire.event_from_proto(wire.event_to_proto(event)) == event


def test_a_failure_is_raised_as_the_error_that_it_names() -> None:
    message = wire.failure_to_proto(Overloaded("queue full", retry_after_s=2))
    with pytest.raises(Overloaded, match="queue full") as caught:
        wire.event_from_proto(message)
    assert caught.value.retry_after_s == 2


def test_an_event_of_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(NvilaError, match="kind"):
        wire.event_from_proto(pb.GenerateEvent())


@pytest.mark.parametrize("dtype", list(TokenDtype))
def test_a_model_card_comes_back_as_it_was(dtype: TokenDtype) -> None:
    card = ModelCard(
        name="m", vision_revision="r", config_json="{}", max_model_len=9, token_dtype=dtype, engine="e", is_random=True
    )
    assert wire.card_from_proto(wire.card_to_proto(card)) == card


def test_a_vector_comes_back_bit_by_bit() -> None:
    vector_D = np.random.default_rng(1).normal(size=64).astype(np.float32)
    sent = pb.EmbedResponse.FromString(wire.vector_to_proto(vector_D).SerializeToString())
    np.testing.assert_array_equal(wire.vector_from_proto(sent), vector_D)


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (pb.EmbedResponse(), NvilaError, "0 bytes"),
        (pb.EmbedResponse(vector=b"12345"), NvilaError, "5 bytes"),
        (pb.EmbedResponse(vector=np.array([np.nan], "<f4").tobytes()), NvilaError, "not finite"),
        (pb.EmbedResponse(failed=pb.Failed(code="invalid_request", message="empty")), InvalidRequest, "empty"),
        (pb.EmbedResponse(failed=pb.Failed(code="overloaded", message="full", retry_after_s=2)), Overloaded, "full"),
    ],
)
def test_what_is_no_vector_is_an_error(answer: pb.EmbedResponse, error: type[NvilaError], says: str) -> None:
    with pytest.raises(error, match=says):
        wire.vector_from_proto(answer)
