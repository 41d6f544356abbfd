"""A stage that begins with other words about pictures keeps what the projector knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.layouts import Part
from nvila.train.export import reshape_checkpoint
from nvila.train.nvila_tiny import TOY, make_base
from nvila.train.recipes import Reshape
from nvila.types import EncodeSettings, MediaKind, TokenDtype

S2 = Reshape(image_mode="dynamic_s2", s2_scales=(TOY.tile_px, 2 * TOY.tile_px), max_tiles=4)
AS_VIDEO = EncodeSettings(
    kind=MediaKind.VIDEO, is_tiled=False, pool_sizes=(), token_dtype=TokenDtype.FLOAT32, vision_revision=""
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_base(tmp_path_factory.mktemp("toy"), TOY))


def encoded(checkpoint: Checkpoint, pixels: np.ndarray, settings: EncodeSettings) -> torch.Tensor:
    return VisionEncoder.from_checkpoint(checkpoint).encode(pixels, settings)[0].float()


def test_frames_are_seen_as_before_by_a_projector_that_takes_more_scales(base: Checkpoint, tmp_path: Path) -> None:
    wide = Checkpoint.open(reshape_checkpoint(base, tmp_path / "wide", S2))
    frames = np.random.default_rng(0).integers(0, 256, (8, TOY.tile_px, TOY.tile_px, 3), np.uint8)

    assert wide.config.projector_width == 2 * base.config.projector_width
    torch.testing.assert_close(encoded(wide, frames, AS_VIDEO), encoded(base, frames, AS_VIDEO), rtol=1e-4, atol=1e-5)


def test_of_a_picture_the_largest_scale_alone_is_seen_at_first(base: Checkpoint, tmp_path: Path) -> None:
    wide = Checkpoint.open(reshape_checkpoint(base, tmp_path / "wide", S2))
    name = next(name for name, tensor in wide.projector_weights().items() if tensor.ndim == 2)
    weight_DC = wide.projector_weights()[name].unflatten(1, (-1, 2, base.config.projector_width))

    assert (weight_DC[:, :, 0] == 0).all()
    torch.testing.assert_close(weight_DC[:, :, 1].flatten(1), base.projector_weights()[name].to(weight_DC.dtype))


@pytest.mark.parametrize("kind", ["mlp_downsample", "mlp_downsample_3x3_fix"])
def test_a_projector_that_is_named_is_a_fresh_one(base: Checkpoint, tmp_path: Path, kind: str) -> None:
    other = Checkpoint.open(reshape_checkpoint(base, tmp_path / "other", replace(S2, projector=kind)))

    for name, tensor in base.layout.weights(Part.LLM).tensors().items():
        assert torch.equal(other.layout.weights(Part.LLM).tensors()[name], tensor)
    fresh, kept = other.projector_weights(), base.projector_weights()
    assert all(not torch.equal(fresh[name], kept[name]) for name in fresh if name.endswith("4.weight"))
