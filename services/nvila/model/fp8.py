"""8-bit floating point as COAT trains with it: scales per block, and rounding to the format (NVILA-SPEC §8.3).

Follows the fake quantiser of NVlabs/VILA (llava/model/qlinear, `floatExMy_quantize_torch`). Training itself uses a
library's kernels; this is what they are compared with.

R rows · C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nvila.errors import InvalidRequest

EPSILON = 1e-10
"""Added to a block's largest magnitude, so that a block of zeros has a scale."""


@dataclass(frozen=True, kw_only=True)
class Fp8Format:
    """`largest`: magnitude that a block's largest is scaled to. Exponents below `min_exponent` are subnormal; above
    `max_exponent` the steps grow no further."""

    largest: float
    mantissa_bits: int
    min_exponent: int
    max_exponent: int


E4M3 = Fp8Format(largest=448.0, mantissa_bits=3, min_exponent=-6, max_exponent=8)
"""For weights and activations."""

E5M2 = Fp8Format(largest=57344.0, mantissa_bits=2, min_exponent=-14, max_exponent=16)
"""For gradients of outputs."""


class Fp8Blocks(NamedTuple):
    """`values_RC`: float32, each one of the format's numbers. `scales_bc`: float32, one per block."""

    values_RC: Tensor
    scales_bc: Tensor

    def dequantise(self) -> Tensor:
        rows, columns = (
            size // blocks for size, blocks in zip(self.values_RC.shape, self.scales_bc.shape, strict=True)
        )
        scales_RC = self.scales_bc.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return self.values_RC * scales_RC


def quantise(x_RC: Tensor, fmt: Fp8Format, rows: int = -1, columns: int = -1) -> Fp8Blocks:
    """Blocks of `rows` × `columns` scaled so that their largest magnitude is the format's, then rounded.

    -1 is the whole side: by default one scale for the tensor. Raises `InvalidRequest` where a block does not divide.
    """
    height, width = x_RC.shape
    rows, columns = (height if rows == -1 else rows), (width if columns == -1 else columns)
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise InvalidRequest(f"blocks of {rows}×{columns} do not divide a tensor of {height}×{width}")
    blocks = x_RC.float().reshape(height // rows, rows, width // columns, columns)
    scales_bc = (blocks.abs().amax((1, 3)) + EPSILON) / fmt.largest
    values = round_to(blocks / scales_bc[:, None, :, None], fmt)
    return Fp8Blocks(values.reshape(height, width), scales_bc)


def round_to(x: Tensor, fmt: Fp8Format) -> Tensor:
    """The nearest number of the format, half a step to the even one; float32.

    Equal to torch's cast up to `largest`. Beyond it nothing is clipped: the steps of the last exponent go on, so that
    E4M3 also gives 480 and 512 here.
    """
    exponent = torch.frexp(x.float()).exponent - 1
    step = torch.exp2((exponent.clamp(fmt.min_exponent, fmt.max_exponent) - fmt.mantissa_bits).float())
    return torch.round(x.float() / step) * step
