"""The encoder's promises beyond the recorded numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.model.encoder import VisionEncoder
from nvila.types import EncodeSettings, Level, MediaKind, TokenDtype
from tests.model.conftest import clip, picture

IMAGE = EncodeSettings(
    kind=MediaKind.IMAGE, is_tiled=True, pool_sizes=(), token_dtype=TokenDtype.FLOAT32, vision_revision=""
)
VIDEO = EncodeSettings(
    kind=MediaKind.VIDEO, is_tiled=False, pool_sizes=((8, 1, 1),), token_dtype=TokenDtype.FLOAT32, vision_revision=""
)
BATCH_TOLERANCE = 1e-5
"""Relative to the largest feature: matrix products of another height may add in another order, in float32."""


@pytest.mark.parametrize("batch", [1, 3, 16, 17])
def test_a_tile_is_the_same_in_any_batch(encoder: VisionEncoder, batch: int) -> None:
    tiles = encoder.prepare(picture(700, 333), IMAGE).pixels_N3SS
    together = encoder.tower(tiles)

    apart = torch.cat([encoder.tower(run) for run in torch.split(tiles, batch)])

    assert (apart - together).abs().max() <= BATCH_TOLERANCE * together.abs().max()


def test_chunks_of_a_video_give_the_tokens_of_the_whole(encoder: VisionEncoder) -> None:
    frames = clip(64, 112)
    whole, levels = encoder.encode(frames, VIDEO)

    chunks = [encoder.encode(frames[at : at + 32], VIDEO) for at in (0, 32)]

    assert levels == (Level(8, 16),)
    assert [part_levels for _, part_levels in chunks] == [(Level(4, 16),)] * 2
    torch.testing.assert_close(torch.cat([values for values, _ in chunks]), whole, rtol=0, atol=1e-5)


def test_frames_of_another_size_are_resized(encoder: VisionEncoder) -> None:
    _, levels = encoder.encode(np.repeat(picture(64, 48), 8, axis=0), VIDEO)

    assert levels == (Level(1, 16),)


def test_values_are_float32_and_finite(encoder: VisionEncoder) -> None:
    values_TD, _ = encoder.encode(picture(1, 1), IMAGE)

    assert values_TD.dtype is torch.float32
    assert torch.isfinite(values_TD).all()


def test_pixels_hold_float16_values(encoder: VisionEncoder) -> None:
    pixels = encoder.prepare(picture(50, 50), IMAGE).pixels_N3SS

    assert pixels.dtype is torch.float32
    assert torch.equal(pixels, pixels.half().float())


def test_bfloat16_weights_give_nearly_the_same_tokens(tiny_path: Path, encoder: VisionEncoder) -> None:
    exact, _ = encoder.encode(clip(8, 112), VIDEO)

    rough, _ = VisionEncoder.load(tiny_path, dtype=torch.bfloat16).encode(clip(8, 112), VIDEO)

    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.99


def test_two_frames_are_no_image(encoder: VisionEncoder) -> None:
    with pytest.raises(InvalidRequest, match="one frame, not 2"):
        encoder.prepare(clip(2, 112), IMAGE)


def test_no_frames_are_refused(encoder: VisionEncoder) -> None:
    with pytest.raises(InvalidRequest, match="not empty"):
        encoder.prepare(np.zeros((0, 112, 112, 3), np.uint8), VIDEO)


def test_a_run_that_the_group_does_not_divide_is_refused(encoder: VisionEncoder) -> None:
    with pytest.raises(InvalidRequest, match="12 frames"):
        encoder.encode(clip(12, 112), VIDEO)
