"""Decode messages: protobuf to the dataclasses of `types.py` and back, one pair of small functions each. No torch.

What a message says is checked for form here (known roles, kinds, one-of fields set); whether it fits the model is the
service's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nvila.cache.codec import CorruptRecord, RecordFormat, from_inline, to_inline
from nvila.errors import InvalidRequest, NvilaError, from_wire
from nvila.internal.v1 import decode_pb2 as pb
from nvila.internal.v1 import tokens_pb2
from nvila.types import (
    Accepted,
    Deadline,
    DecodeEvent,
    Finished,
    FinishReason,
    GenerateRequest,
    Level,
    MediaKind,
    MediaPart,
    Message,
    ModelCard,
    PromptMedia,
    PromptUsage,
    Role,
    SamplingParams,
    TextDelta,
    TextPart,
    TokenDtype,
    TokensMissing,
    TokensRef,
    VisualTokens,
)

_T = TypeVar("_T")

_DTYPES = {
    TokenDtype.FLOAT32: tokens_pb2.TOKEN_DTYPE_FLOAT32,
    TokenDtype.BFLOAT16: tokens_pb2.TOKEN_DTYPE_BFLOAT16,
    TokenDtype.INT8: tokens_pb2.TOKEN_DTYPE_INT8,
}

# -- requests ---------------------------------------------------------------------------------------------------------


def request_to_proto(request: GenerateRequest) -> pb.GenerateRequest:
    """The deadline becomes what is left of it; raises `DeadlineExceeded` when nothing is. `affinity` does not travel in
    the message: the proxy reads it from the call's metadata."""
    return pb.GenerateRequest(
        request_id=request.request_id,
        messages=[_message_to_proto(message) for message in request.messages],
        media=[_media_to_proto(item) for item in request.media],
        sampling=_sampling_to_proto(request.sampling),
        timeout_ms=max(1, round(request.deadline.left_s() * 1000)),
        vision_revision=request.vision_revision,
        cache_salt=request.cache_salt,
        inline=[to_inline(tokens) for tokens in request.inline],
        resume_ids=request.resume_ids,
        traceparent=request.traceparent,
    )


def request_from_proto(message: pb.GenerateRequest, form: RecordFormat) -> GenerateRequest:
    """`form`: what inline tokens must be. Raises `InvalidRequest` saying what is malformed."""
    return GenerateRequest(
        request_id=message.request_id,
        messages=tuple(_message_from_proto(turn) for turn in message.messages),
        media=tuple(_media_from_proto(item) for item in message.media),
        sampling=_sampling_from_proto(message.sampling),
        deadline=Deadline.after(message.timeout_ms / 1000),
        vision_revision=message.vision_revision,
        cache_salt=message.cache_salt,
        inline=tuple(_inline_from_proto(tokens, form) for tokens in message.inline),
        resume_ids=tuple(message.resume_ids),
        traceparent=message.traceparent,
    )


def _message_to_proto(message: Message) -> pb.PromptMessage:
    return pb.PromptMessage(
        role=message.role,
        parts=[
            pb.PromptPart(text=part.text) if isinstance(part, TextPart) else pb.PromptPart(media=part.index)
            for part in message.parts
        ],
    )


def _message_from_proto(message: pb.PromptMessage) -> Message:
    return Message(_named(Role, message.role, "role"), tuple(_part_from_proto(part) for part in message.parts))


def _part_from_proto(part: pb.PromptPart) -> TextPart | MediaPart:
    match part.WhichOneof("part"):
        case "text":
            return TextPart(part.text)
        case "media":
            return MediaPart(part.media)
        case _:
            raise InvalidRequest("a message part is neither text nor media")


def _media_to_proto(item: PromptMedia) -> pb.PromptMedia:
    return pb.PromptMedia(
        kind=item.kind,
        is_tiled=item.is_tiled,
        records=[
            pb.TokensRef(key=ref.key, levels=[tokens_pb2.Level(blocks=x.blocks, tokens=x.tokens) for x in ref.levels])
            for ref in item.records
        ],
    )


def _media_from_proto(item: pb.PromptMedia) -> PromptMedia:
    records = [
        TokensRef(key=ref.key, levels=tuple(Level(x.blocks, x.tokens) for x in ref.levels)) for ref in item.records
    ]
    return PromptMedia(kind=_named(MediaKind, item.kind, "media kind"), is_tiled=item.is_tiled, records=tuple(records))


def _sampling_to_proto(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop=sampling.stop,
        ignore_eos=sampling.ignore_eos,
    )


def _sampling_from_proto(sampling: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else None,
        stop=tuple(sampling.stop),
        ignore_eos=sampling.ignore_eos,
    )


def _inline_from_proto(inline: tokens_pb2.InlineTokens, form: RecordFormat) -> VisualTokens:
    try:
        return from_inline(inline, form)
    except CorruptRecord as error:
        raise InvalidRequest(f"inline visual tokens cannot be used: {error}") from error


def _named(kind: Callable[[str], _T], value: str, what: str) -> _T:
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequest(f"unknown {what} {value!r}") from None


# -- events -----------------------------------------------------------------------------------------------------------


def event_to_proto(event: DecodeEvent) -> pb.GenerateEvent:
    match event:
        case Accepted():
            return pb.GenerateEvent(accepted=pb.Accepted(prompt=_usage_to_proto(event.prompt)))
        case TextDelta():
            return pb.GenerateEvent(delta=pb.TextDelta(text=event.text, token_ids=event.token_ids))
        case TokensMissing():
            return pb.GenerateEvent(missing=pb.TokensMissing(keys=event.keys))
        case Finished():
            return pb.GenerateEvent(
                finished=pb.Finished(
                    reason=event.reason,
                    prompt=_usage_to_proto(event.prompt),
                    completion_tokens=event.completion_tokens,
                    stage_ms=event.stage_ms,
                )
            )


def failure_to_proto(error: NvilaError) -> pb.GenerateEvent:
    """How a generation that failed ends on the wire."""
    return pb.GenerateEvent(
        failed=pb.Failed(code=error.code, message=error.message, retry_after_s=error.retry_after_s or 0)
    )


def event_from_proto(message: pb.GenerateEvent) -> DecodeEvent:
    """The inverse of both: a failure is raised as the error that it names."""
    match message.WhichOneof("event"):
        case "accepted":
            return Accepted(prompt=_usage_from_proto(message.accepted.prompt))
        case "delta":
            return TextDelta(message.delta.text, tuple(message.delta.token_ids))
        case "missing":
            return TokensMissing(tuple(message.missing.keys))
        case "finished":
            finished = message.finished
            return Finished(
                reason=FinishReason(finished.reason),
                prompt=_usage_from_proto(finished.prompt),
                completion_tokens=finished.completion_tokens,
                stage_ms=dict(finished.stage_ms),
            )
        case "failed":
            failed = message.failed
            raise from_wire(failed.code, failed.message, failed.retry_after_s or None)
        case _:
            raise NvilaError("the decode service sent an event of a kind that this release does not know")


def _usage_to_proto(usage: PromptUsage) -> pb.PromptUsage:
    return pb.PromptUsage(text=usage.text, image=usage.image, video=usage.video, cached=usage.cached)


def _usage_from_proto(usage: pb.PromptUsage) -> PromptUsage:
    return PromptUsage(text=usage.text, image=usage.image, video=usage.video, cached=usage.cached)


# -- texts as vectors --------------------------------------------------------------------------------------------------


def vector_to_proto(vector_D: NDArray[np.float32]) -> pb.EmbedResponse:
    return pb.EmbedResponse(vector=vector_D.astype("<f4").tobytes())


def vector_from_proto(message: pb.EmbedResponse) -> NDArray[np.float32]:
    """The inverse: a failure is raised as the error that it names; so is anything that is no vector."""
    if message.HasField("failed"):
        raise from_wire(message.failed.code, message.failed.message, message.failed.retry_after_s or None)
    if not message.vector or len(message.vector) % 4:
        raise NvilaError(f"the decode service sent {len(message.vector)} bytes, which are no vector of float32")
    vector_D = np.frombuffer(message.vector, "<f4").astype(np.float32)
    if not np.isfinite(vector_D).all():
        raise NvilaError("the decode service sent a vector that is not finite")
    return vector_D


# -- the model card ---------------------------------------------------------------------------------------------------


def card_to_proto(card: ModelCard) -> pb.DescribeResponse:
    return pb.DescribeResponse(
        name=card.name,
        vision_revision=card.vision_revision,
        config_json=card.config_json,
        max_model_len=card.max_model_len,
        token_dtype=_DTYPES[card.token_dtype],
        engine=card.engine,
        is_random=card.is_random,
    )


def card_from_proto(message: pb.DescribeResponse) -> ModelCard:
    dtypes = {wire: dtype for dtype, wire in _DTYPES.items()}
    return ModelCard(
        name=message.name,
        vision_revision=message.vision_revision,
        config_json=message.config_json,
        max_model_len=message.max_model_len,
        token_dtype=dtypes[message.token_dtype],
        engine=message.engine,
        is_random=message.is_random,
    )
