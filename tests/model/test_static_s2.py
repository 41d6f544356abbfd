"""Static S2, beyond the recorded values in tests/golden."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nvila.model.static_s2 import static_s2_features


def mean_colours(pixels_N3SS: Tensor) -> Tensor:
    """A stand-in tower: 2×2 patches, three channels."""
    return functional.adaptive_avg_pool2d(pixels_N3SS, 2).flatten(2).transpose(1, 2)


def test_a_single_scale_of_one_tile_is_the_towers_own_features() -> None:
    pixels = torch.rand(2, 3, 8, 8)

    torch.testing.assert_close(static_s2_features(pixels, mean_colours, [8], max_tile_px=8), mean_colours(pixels))


def test_scales_stand_beside_each_other_at_the_size_of_the_chosen_one() -> None:
    pixels = torch.rand(2, 3, 16, 16)

    small = static_s2_features(pixels, mean_colours, [8, 16], max_tile_px=8, merge_index=0)
    large = static_s2_features(pixels, mean_colours, [8, 16], max_tile_px=8, merge_index=-1)

    assert small.shape == (2, 4, 6)
    assert large.shape == (2, 16, 6)
    tiled = functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(large[..., 3:], tiled)
