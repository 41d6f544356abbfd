"""The language model's linears in four bits: groups with a zero point, and TinyChat's packing (NVILA-SPEC §9.1).

Follows mit-han-lab/llm-awq (AWQ, arXiv:2306.00978): `pseudo_quantize_tensor` in awq/quantize/quantizer.py, and
`pack_intweight` and WQLinear in awq/quantize/qmodule.py. `model/awq_search.py` looks for what to quantise.

I, O channels in and out · G groups of input channels · K padded groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nvila.errors import InvalidRequest

GROUP = 128
"""Input channels that share a scale and a zero point, in published NVILA-AWQ weights."""

LARGEST_CODE = 15
SMALLEST_RANGE = 1e-5
"""Lower bound of a group's largest less smallest weight, which keeps its scale above zero."""

PACKED_ROWS, PACKED_COLUMNS = 4, 64
"""Output and input channels of TinyChat's smallest packed piece."""


class Int4Weight(NamedTuple):
    """`codes_OI`: uint8 in 0 … 15. `scales_OG`, `zeros_OG`: in the weight's dtype; zeros are whole numbers 0 … 15."""

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor

    def dequantise(self) -> Tensor:
        """What the codes stand for, (O, I) in the scales' dtype."""
        outputs, groups = self.scales_OG.shape
        codes_OGg = self.codes_OI.reshape(outputs, groups, -1).to(self.scales_OG.dtype)
        return ((codes_OGg - self.zeros_OG[..., None]) * self.scales_OG[..., None]).flatten(1)


class PackedInt4(NamedTuple):
    """A linear as TinyChat stores it: weight = code · `scales_KO` + `scaled_zeros_KO` of the code's group.

    `codes_oI`: int16, (O / 4, I). Rows of the others beyond the groups are zero.
    """

    codes_oI: Tensor
    scales_KO: Tensor
    scaled_zeros_KO: Tensor


def quantise(weight_OI: Tensor, group: int = GROUP) -> Int4Weight:
    """Asymmetric, per group of consecutive input channels, computed in the weight's own dtype.

    Raises `InvalidRequest` where the groups do not divide the inputs.
    """
    outputs, inputs = weight_OI.shape
    if group < 1 or inputs % group:
        raise InvalidRequest(f"groups of {group} do not divide {inputs} input channels")
    weight_OGg = weight_OI.reshape(outputs, inputs // group, group)
    largest, smallest = weight_OGg.amax(-1, keepdim=True), weight_OGg.amin(-1, keepdim=True)
    scales = (largest - smallest).clamp(min=SMALLEST_RANGE) / LARGEST_CODE
    zeros = (-torch.round(smallest / scales)).clamp(0, LARGEST_CODE)
    codes = (torch.round(weight_OGg / scales) + zeros).clamp(0, LARGEST_CODE)
    return Int4Weight(codes.flatten(1).to(torch.uint8), scales[..., 0], zeros[..., 0])


def fake_quantise(weight_OI: Tensor, group: int = GROUP) -> Tensor:
    """The weight as four bits leave it."""
    return quantise(weight_OI, group).dequantise()


def pack(weight: Int4Weight) -> PackedInt4:
    """Codes, scales and scaled zeros in TinyChat's form; raises `InvalidRequest` as `pack_codes` does."""
    groups = weight.scales_OG.shape[1]
    missing = padded_groups(groups, weight.codes_OI.shape[1] // groups) - groups
    scales_KO = functional.pad(weight.scales_OG, (0, missing)).T.contiguous()
    zeros_KO = functional.pad(weight.scales_OG * weight.zeros_OG, (0, missing)).T.contiguous()
    return PackedInt4(pack_codes(weight.codes_OI), scales_KO, -zeros_KO)


def pack_codes(codes_OI: Tensor) -> Tensor:
    """Codes 0 … 15 to int16, (O / 4, I), in the order in which TinyChat's kernels read them.

    Of every 32 inputs, pairs from the four runs of eight are interleaved, and then the even and odd ones of each eight
    parted; four outputs share a piece of 64 inputs, one after the other; four neighbours make an int16, the first in
    the lowest bits. Raises `InvalidRequest` for sizes that are no multiples of 4 outputs and 64 inputs.
    """
    outputs, inputs = codes_OI.shape
    if outputs % PACKED_ROWS or inputs % PACKED_COLUMNS:
        raise InvalidRequest(
            f"a linear of {outputs}×{inputs} cannot be packed: multiples of {PACKED_ROWS}×{PACKED_COLUMNS} are needed"
        )
    pairs = codes_OI.to(torch.int32).reshape(outputs, inputs // 32, 4, 4, 2).transpose(2, 3)
    parted = pairs.reshape(outputs, inputs // 8, 4, 2).transpose(2, 3).reshape(outputs, inputs)
    pieces = parted.reshape(outputs // PACKED_ROWS, PACKED_ROWS, inputs // PACKED_COLUMNS, PACKED_COLUMNS)
    fours = pieces.transpose(1, 2).reshape(outputs // PACKED_ROWS, inputs, 4)
    packed = fours[..., 0] | fours[..., 1] << 4 | fours[..., 2] << 8 | fours[..., 3] << 12
    return packed.to(torch.int16)


def padded_groups(groups: int, group: int) -> int:
    """Rows of TinyChat's scales: groups in eights, themselves in ones, twos or fours (`calculate_zeros_width`)."""
    factor = 1 if group >= 128 else {64: 2, 32: 4}.get(group)
    if factor is None:
        raise InvalidRequest(f"TinyChat packs groups of 32, 64, 128 and more, not {group}")
    eights = -(-groups // 8)
    return -(-eights // factor) * factor * 8
