"""The Triton-language kernels, in Triton's interpreter on a processor; on a GPU the same tests run the kernels.

Skipped where the compiler is not installed: `deploy/requirements/triton_interpreter.sh` makes a folder with it and runs
these tests.
"""

# ruff: noqa: E402
from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

HAS_GPU = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None or not (HAS_GPU or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs Triton's compiler and a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from nvila.model.int8_cuda import Piece, TritonOps
from nvila.model.int8_tower import Int8Linear, Int8Rows
from nvila.model.w8a8 import int8_linear, quantise_activation, quantise_weight

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
OPS = TritonOps(DEVICE, Piece(rows=16, columns=32, depth=32, warps=4, stages=2))


def drawn(*size: int, seed: int = 3) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rows_of(x: Tensor) -> Int8Rows:
    """By `model/w8a8.py`, with the scale as it was before rounding."""
    return Int8Rows(quantise_activation(x).values_TI, x.float().abs().amax(1) / 127)


def check_rows(got: Int8Rows, wanted: Int8Rows) -> None:
    """Half a step may go either way where the products were rounded differently."""
    assert int((got.values_TI.int() - wanted.values_TI.int()).abs().max()) <= 1
    assert float((got.values_TI != wanted.values_TI).float().mean()) < 0.001
    torch.testing.assert_close(got.scale_T, wanted.scale_T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [64, 72, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_quantised_as_the_plain_arithmetic_does(width: int, dtype: torch.dtype) -> None:
    x = drawn(5, width).to(dtype)
    x[2] = 0

    got = OPS.quantise(x)

    check_rows(got, rows_of(x))
    assert not got.values_TI[2].any()
    assert float(got.scale_T[2]) == 0


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.0]], device=DEVICE)

    assert OPS.quantise(x).values_TI[0].tolist() == [127, 0, 2, 2, 0, -2, -126, 0]


def test_a_norm_is_quantised_in_the_same_pass() -> None:
    norm = nn.LayerNorm(72, eps=1e-6).to(DEVICE)
    with torch.no_grad():
        norm.weight.copy_(drawn(72, seed=8))
        norm.bias.copy_(drawn(72, seed=9))
    x = 3 + drawn(6, 72)

    got = OPS.normalise(x, norm)

    wanted = rows_of(functional.layer_norm(x.double(), (72,), norm.weight.double(), norm.bias.double(), 1e-6).float())
    assert int((got.values_TI.int() - wanted.values_TI.int()).abs().max()) <= 1
    torch.testing.assert_close(got.scale_T, wanted.scale_T, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(16, 64, 32), (19, 72, 40), (3, 200, 7)])
def test_a_product_is_that_of_whole_numbers(tokens: int, inputs: int, outputs: int) -> None:
    x, weight, bias = drawn(tokens, inputs), drawn(outputs, inputs, seed=4), drawn(outputs, seed=5)
    linear, rows = made_linear(weight, bias), rows_of(x)

    got = OPS.linear(rows, linear, dtype=torch.float32, residual_TO=None)

    exact = rows.values_TI.double() @ linear.values_OI.double().T
    wanted = exact * rows.scale_T.double()[:, None] * linear.scale_O.double() + linear.bias_O.double()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    recorded = int8_linear(x, quantise_weight(weight), bias)  # rounds the token's scale to float16
    torch.testing.assert_close(got, recorded, rtol=2e-3, atol=2e-3)


def test_the_largest_sums_do_not_overflow() -> None:
    inputs = 4304
    rows = Int8Rows(torch.full((2, inputs), 127, dtype=torch.int8, device=DEVICE), torch.ones(2, device=DEVICE))
    linear = Int8Linear(*(t.to(DEVICE) for t in (torch.full((4, inputs), -127).to(torch.int8), torch.ones(4))), ZEROS)

    assert OPS.linear(rows, linear, dtype=torch.float32, residual_TO=None).tolist() == [[-(127.0**2) * inputs] * 4] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu_and_residual_are_part_of_the_product(dtype: torch.dtype) -> None:
    x, weight, bias, residual = drawn(5, 64), drawn(24, 64, seed=4), drawn(24, seed=5), drawn(5, 24, seed=6).to(dtype)
    linear, rows = made_linear(weight, bias), rows_of(x)
    plain = OPS.linear(rows, linear, dtype=torch.float32, residual_TO=None)

    bent = OPS.linear(rows, linear, dtype=dtype, is_gelu=True, residual_TO=None)
    added = OPS.linear(rows, linear, dtype=dtype, residual_TO=residual)

    step = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(bent.float(), functional.gelu(plain, approximate="tanh"), **step)
    torch.testing.assert_close(added.float(), plain + residual.float(), **step)
    assert bent.dtype == added.dtype == dtype


ZEROS = torch.zeros(4, device=DEVICE)


def made_linear(weight: Tensor, bias: Tensor) -> Int8Linear:
    quantised = quantise_weight(weight)
    return Int8Linear(quantised.values_OI, quantised.scale_O, bias)
