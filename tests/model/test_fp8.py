"""8-bit floats against torch's own, which the recorded ones in tests/golden equal too."""

from __future__ import annotations

import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.model.fp8 import E4M3, E5M2, Fp8Format, quantise, round_to

FORMATS = [pytest.param(E4M3, torch.float8_e4m3fn, id="E4M3"), pytest.param(E5M2, torch.float8_e5m2, id="E5M2")]


@pytest.mark.parametrize(("fmt", "dtype"), FORMATS)
def test_rounding_is_torchs_cast_up_to_the_largest_number(fmt: Fp8Format, dtype: torch.dtype) -> None:
    exponents = torch.linspace(-20, 8, 4001)
    x = torch.cat([torch.exp2(exponents), -torch.exp2(exponents), torch.arange(-448, 449) / 8, torch.zeros(1)])

    torch.testing.assert_close(round_to(x, fmt), x.to(dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize(("fmt", "dtype"), FORMATS)
def test_what_comes_back_is_within_half_a_step(fmt: Fp8Format, dtype: torch.dtype) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))

    error = (quantise(x, fmt, rows=1, columns=16).dequantise() - x).abs()

    assert (error <= x.abs() * 2.0 ** -(fmt.mantissa_bits + 1) + 1e-4).all()


def test_a_block_of_zeros_stays_zero() -> None:
    assert not quantise(torch.zeros(4, 4), E4M3).dequantise().any()


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="3×4 do not divide a tensor of 8×4"):
        quantise(torch.zeros(8, 4), E4M3, rows=3)
