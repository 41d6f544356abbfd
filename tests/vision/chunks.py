"""Chunks and settings for tests of the vision stage."""

from __future__ import annotations

import numpy as np

from nvila.cache.codec import RecordFormat
from nvila.cache.keys import content_digest, record_key
from nvila.model import cost
from nvila.model.checkpoint import Checkpoint
from nvila.types import Chunk, EncodeSettings, FrameLocation, MediaKind, TokenDtype, TokensRef


def image_settings(checkpoint: Checkpoint, *, is_tiled: bool = True) -> EncodeSettings:
    return EncodeSettings(
        kind=MediaKind.IMAGE,
        is_tiled=is_tiled,
        pool_sizes=(),
        token_dtype=TokenDtype.FLOAT32,
        vision_revision=checkpoint.vision_revision,
    )


def video_settings(checkpoint: Checkpoint, *, token_dtype: TokenDtype = TokenDtype.FLOAT32) -> EncodeSettings:
    return EncodeSettings(
        kind=MediaKind.VIDEO,
        is_tiled=False,
        pool_sizes=checkpoint.config.pool_sizes,
        token_dtype=token_dtype,
        vision_revision=checkpoint.vision_revision,
    )


def make_chunk(frames: int, height_px: int, width_px: int, *, seed: int = 0) -> Chunk:
    """Noise, so that every chunk of another seed has another digest."""
    frames_FHWC = np.random.default_rng(seed).integers(0, 256, (frames, height_px, width_px, 3), dtype=np.uint8)
    times_s = tuple(index / 2 for index in range(frames))
    return Chunk(frames_FHWC=frames_FHWC, content_digest=content_digest(frames_FHWC), times_s=times_s)


def video_chunk(checkpoint: Checkpoint, frames: int, *, seed: int = 0) -> Chunk:
    return make_chunk(frames, checkpoint.config.tile_px, checkpoint.config.tile_px, seed=seed)


def at(chunk: Chunk, location: FrameLocation) -> Chunk:
    """The same chunk, said to lie in shared memory."""
    return Chunk(
        frames_FHWC=chunk.frames_FHWC,
        content_digest=chunk.content_digest,
        times_s=chunk.times_s,
        location=location,
    )


def ref_of(checkpoint: Checkpoint, chunk: Chunk, settings: EncodeSettings, tenant: str = "t") -> TokensRef:
    frames, height_px, width_px, _ = chunk.frames_FHWC.shape
    levels = cost.levels(
        checkpoint.config,
        kind=settings.kind,
        is_tiled=settings.is_tiled,
        width_px=width_px,
        height_px=height_px,
        frames=frames,
        pool_sizes=settings.pool_sizes,
    )
    return TokensRef(key=record_key(chunk.content_digest, settings, tenant), levels=levels)


def form_of(checkpoint: Checkpoint, settings: EncodeSettings) -> RecordFormat:
    return RecordFormat(
        width=checkpoint.config.llm_width,
        dtype=settings.token_dtype,
        vision_revision=settings.vision_revision,
    )
