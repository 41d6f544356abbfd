"""`POST /v1/estimate`: what a chat request would cost, and whether it fits, before any pixel is decoded."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field

from nvila.errors import DeadlineExceeded
from nvila.gateway.front import in_time
from nvila.gateway.http_services import Having, HttpSettings, Tenant
from nvila.gateway.parse import parse_chat, to_asked
from nvila.model.estimate import MediaCost, RequestCost
from nvila.types import MediaKind, ModelCard, RecordingCoverage

PATH = "/v1/estimate"


class EstimatedMedia(BaseModel):
    """One image, video or recording's window, in the order of the request. Of a window that needs several calls,
    `tokens` and `positions` are those of the largest; `recording.plan` has all."""

    kind: MediaKind
    frames: int = Field(description="Frames that are encoded, whole temporal groups; 1 for an image.")
    chunks: int = Field(description="Vision calls and token records that they make.")
    tile_grid: tuple[int, int] = Field(description="Columns and rows that an image is cut into; [1, 1]: not cut.")
    tiles: int = Field(description="Tiles that the vision tower computes.")
    tokens: int = Field(description="Visual tokens after compression.")
    positions: int = Field(description="Positions of the prompt: tokens, and what stands around them.")
    record_bytes: int = Field(description="Of its token records in the cache.")
    pixel_bytes: int = Field(description="Most memory that the pixels of one of its chunks take at a time.")
    recording: RecordingCoverage | None = Field(
        None, description="Of a recording: its window, what of it is known, and how it would be answered about."
    )

    @classmethod
    def of(cls, media: MediaCost) -> EstimatedMedia:
        names = set(cls.model_fields) - {"tile_grid"}
        return cls(tile_grid=media.grid, **{name: getattr(media, name) for name in names})


class EstimatedPositions(BaseModel):
    """Of the prompt, by modality. Text is counted without the tokenizer: it may be less, never more, given NVILA's own
    chat template."""

    text_at_most: int
    image: int
    video: int
    total_at_most: int


class EstimatedFlops(BaseModel):
    """Floating-point operations if nothing is cached; a multiply-add is two. Prefill counts the text at its most."""

    tower: float
    projector: float
    prefill: float


class EstimatedBytes(BaseModel):
    """Token records in the cache; keys and values of prompt and longest answer in the language model."""

    records: int
    kv_cache: int


class Estimate(BaseModel):
    object: Literal["estimate"] = "estimate"
    model: str
    fits: bool | None = Field(
        description="Whether a chat request would be accepted. null: the media fit, and whether the text does too only "
        "its exact length can tell."
    )
    reason: str | None = Field(description="Why it does not fit.")
    max_model_len: int = Field(description="Positions of prompt and answer together.")
    max_answer_tokens: int = Field(description="Longest answer that was asked for.")
    positions: EstimatedPositions
    media: list[EstimatedMedia]
    flops: EstimatedFlops
    bytes: EstimatedBytes

    @classmethod
    def of(cls, cost: RequestCost, card: ModelCard) -> Estimate:
        return cls(
            model=card.name,
            fits=cost.fits,
            reason=cost.excess,
            max_model_len=cost.longest,
            max_answer_tokens=cost.answer_tokens,
            positions=EstimatedPositions(
                text_at_most=cost.text_at_most,
                image=cost.visual(MediaKind.IMAGE),
                video=cost.visual(MediaKind.VIDEO),
                total_at_most=cost.positions_at_most,
            ),
            media=[EstimatedMedia.of(media) for media in cost.media],
            flops=EstimatedFlops(tower=cost.tower_flops, projector=cost.projector_flops, prefill=cost.prefill_flops),
            bytes=EstimatedBytes(records=cost.record_bytes, kv_cache=cost.kv_cache_bytes),
        )


def add_estimate(app: FastAPI, settings: HttpSettings, body: dict[str, Any]) -> None:
    """`body`: the OpenAPI description of a chat request's body."""

    @app.post(PATH, tags=["chat"], openapi_extra={"requestBody": body})
    async def estimate(request: Request, services: Having, tenant: Tenant) -> Estimate:
        """What a chat request would cost: the same body, answered from the media's headers. Addresses are fetched under
        the same limits as for an answer; nothing is decoded, encoded or generated. What a chat request would be refused
        for is refused here too, but for too many tokens: `fits` tells."""
        front = services.front
        async with front.admitted("http"):
            chat = parse_chat(await _body(request, settings.body_s), front.limits)
            question, card = await front.question(to_asked(chat), tenant)
            async with in_time(question.deadline):
                return Estimate.of(await front.estimate(question), card)


async def _body(request: Request, within_s: float) -> bytes:
    try:
        async with asyncio.timeout(within_s):
            return await request.body()
    except TimeoutError:
        raise DeadlineExceeded(f"the body did not arrive whole in {within_s:g} s") from None
