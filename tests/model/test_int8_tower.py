"""The 8-bit tower on a processor: the same numbers as the plain arithmetic, whichever product computes them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nvila.errors import InvalidRequest
from nvila.golden.inputs import shape
from nvila.model.config import TowerConfig
from nvila.model.int8_cpu import FLOAT, WHOLE, ProcessorOps, choose_product, is_exact
from nvila.model.int8_tower import Int8Linear, Int8Rows, Int8Tower, choose_ops
from nvila.model.siglip import Tower
from nvila.model.w8a8 import int8_linear, quantise_activation, quantise_weight
from nvila.quantize.tower import int8_weights

CPU = torch.device("cpu")


def drawn(*size: int, seed: int = 3) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def made(config: TowerConfig) -> Tower:
    torch.manual_seed(6)
    return Tower(config, 56).eval().requires_grad_(False)


CONFIG = type(shape().tower)(**{**vars(shape().tower), "layers": 3, "heads": 2})


def in_8_bits(tower: Tower, ops: ProcessorOps) -> Int8Tower:
    weights = dict(tower.state_dict()) | int8_weights(tower)
    return Int8Tower(CONFIG, 56, weights, ops, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("ops", [FLOAT, pytest.param(WHOLE, marks=pytest.mark.skipif(not is_exact(WHOLE), reason=""))])
def test_a_linear_computes_what_the_recorded_arithmetic_does(ops: ProcessorOps) -> None:
    x, weight, bias = drawn(7, 72), drawn(24, 72, seed=4), drawn(24, seed=5)
    quantised = quantise_weight(weight)
    rows = ops.quantise(x)

    got = ops.linear(rows, Int8Linear(*quantised, bias), dtype=torch.float32, residual_TO=None)

    assert torch.equal(rows.values_TI, quantise_activation(x).values_TI)
    torch.testing.assert_close(got, int8_linear(x, quantised, bias), rtol=1e-3, atol=1e-3)  # scales there in float16


def test_a_row_of_zeros_stays_zeros() -> None:
    rows = FLOAT.quantise(torch.stack([torch.zeros(8), torch.ones(8)]))

    assert rows.values_TI[0].tolist() == [0] * 8
    assert rows.scale_T.tolist()[0] == 0
    assert rows.values_TI[1].tolist() == [127] * 8


def test_the_tower_comes_close_to_its_original_after_every_block() -> None:
    tower, pixels = made(CONFIG), drawn(2, 3, 56, 56)

    states = in_8_bits(tower, FLOAT).states(pixels)

    assert len(states) == 1 + CONFIG.blocks
    similarity = torch.cosine_similarity(states[-1], tower(pixels), dim=-1)
    assert float(similarity.min()) > 0.999


@pytest.mark.skipif(not is_exact(WHOLE), reason="this processor's 8-bit products overflow")
def test_both_products_give_the_same_tokens() -> None:
    tower, pixels = made(CONFIG), drawn(2, 3, 56, 56)

    whole, plain = (in_8_bits(tower, ops)(pixels) for ops in (WHOLE, FLOAT))

    # A sum that is rounded otherwise may take a value to its neighbour: far less than 8 bits themselves cost.
    assert float((whole - plain).norm() / plain.norm()) < 2e-3


def overflowing(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Neighbouring products added in 16 bits, one side without sign, as processors without 8-bit dot products do it."""
    products = ((x_TI[:, None].int() + 128) * weight_OI.int()).unflatten(-1, (-1, 2)).sum(-1)
    return (products.clamp(-(1 << 15), (1 << 15) - 1).sum(-1) - 128 * weight_OI.int().sum(-1)).float()


def test_a_product_that_overflows_is_found_and_not_used() -> None:
    broken = ProcessorOps(overflowing, name="broken", is_whole=True)

    ops, reason = choose_product(64, 32, broken)

    assert ops is FLOAT
    assert "broken adds products wrongly" in reason


def ticks(*seconds: float) -> Iterator[float]:
    """A clock on which each run takes this long."""
    now = 0.0
    for taken in seconds:
        yield now
        now += taken
        yield now


@pytest.mark.parametrize(("whole_s", "plain_s", "is_whole"), [(0.001, 0.005, True), (0.006, 0.005, False)])
def test_the_faster_arithmetic_is_taken(whole_s: float, plain_s: float, is_whole: bool) -> None:
    clock = ticks(*[whole_s] * 3, *[plain_s] * 3)
    right = ProcessorOps(lambda x, w: x.float() @ w.float().T, name="right", is_whole=True)

    ops, reason = choose_product(64, 32, right, clock=lambda: next(clock))

    assert ops.is_whole == is_whole
    assert f"{1000 * whole_s:.2f} ms against {1000 * plain_s:.2f} ms in float32" in reason


def test_the_choice_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nvila.model.int8_tower"):
        ops = choose_ops(CPU, CONFIG)

    (record,) = caplog.records
    assert record.levelno == (logging.INFO if ops is WHOLE else logging.WARNING)
    assert "8-bit linears" in record.getMessage()


def test_a_device_without_8_bit_arithmetic_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="runs on cuda and cpu devices, not on 'meta'"):
        choose_ops(torch.device("meta"), CONFIG)


def test_the_largest_sums_are_exact_in_the_fallback() -> None:
    inputs = 4304
    rows = Int8Rows(torch.full((2, inputs), 127, dtype=torch.int8), torch.ones(2))
    linear = Int8Linear(torch.full((3, inputs), -127, dtype=torch.int8), torch.ones(3), torch.zeros(3))

    got = FLOAT.linear(rows, linear, dtype=torch.float32, residual_TO=None)

    torch.testing.assert_close(got, torch.full((2, 3), -(127.0**2) * inputs), rtol=1e-6, atol=0)
