"""The 8-bit tower, beyond the recorded values in tests/golden."""

from __future__ import annotations

import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.golden.inputs import shape
from nvila.model.siglip import Tower
from nvila.model.w8a8 import (
    activation_maxima,
    fake_linear,
    int8_linear,
    quantise_activation,
    quantise_weight,
    smooth_tower,
)


def drawn(*size: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_eight_bits_come_close_to_the_whole() -> None:
    x, weight, bias = drawn(5, 64), drawn(16, 64, seed=4), drawn(16, seed=5)
    wanted = torch.nn.functional.linear(x, weight, bias)

    for got in (int8_linear(x, quantise_weight(weight), bias), fake_linear(x, quantise_weight(weight), bias)):
        assert float((got - wanted).norm() / wanted.norm()) < 0.02


def test_tokens_and_channels_of_zeros_stay_zero() -> None:
    x, weight = drawn(3, 8), drawn(4, 8)
    x[1], weight[2] = 0, 0

    output = int8_linear(x, quantise_weight(weight))

    assert quantise_activation(x).values_TI[1].tolist() == [0] * 8
    assert not output[1].any()
    assert not output[:, 2].any()
    assert output.isfinite().all()


def made_tower() -> Tower:
    torch.manual_seed(6)
    config = shape().tower
    tower = Tower(type(config)(**{**vars(config), "layers": 3, "heads": 2}), 56).eval().requires_grad_(False)
    tower.encoder.layers[0].layer_norm1.weight[0] = 30.0  # an outlier
    return tower


def test_smoothing_leaves_the_towers_output_and_tames_its_outliers() -> None:
    tower, pixels = made_tower(), drawn(2, 3, 56, 56)
    before, maxima = tower(pixels), activation_maxima(tower, pixels)

    smooth_tower(tower, maxima)

    torch.testing.assert_close(tower(pixels), before, rtol=1e-4, atol=1e-5)
    name = "encoder.layers.0.self_attn.q_proj"
    smoothed = activation_maxima(tower, pixels)[name]
    assert float(smoothed.max() / smoothed.median()) < float(maxima[name].max() / maxima[name].median()) / 1.5


def test_maxima_are_of_every_linear_and_over_every_token() -> None:
    tower, pixels = made_tower(), drawn(4, 3, 56, 56)

    whole = activation_maxima(tower, pixels)
    halves = [activation_maxima(tower, half) for half in torch.split(pixels, 2)]

    assert len(whole) == 2 * 6
    for name, maximum in whole.items():
        torch.testing.assert_close(torch.maximum(halves[0][name], halves[1][name]), maximum)


def test_a_linear_without_maxima_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"encoder\.layers\.0\.self_attn\.q_proj"):
        smooth_tower(made_tower(), {})
