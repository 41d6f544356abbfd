"""A language model in four bits as AutoAWQ stores it, which vLLM loads with its own kernels: packing, and undoing it.

Every linear of the decoder has, in place of `weight` (O, I): `qweight` int32 (I, O / 8), `qzeros` int32 (G, O / 8),
`scales` float16 (G, O), with weight = (code - zero) · scale. Eight outputs share an int32, in an order of AutoAWQ's own
(`AWQ_ORDER` in awq/utils/packing_utils.py of casper-hansen/AutoAWQ). TinyChat's packing is in `model/awq.py`.

I, O channels in and out · G groups of input channels · X of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nvila.errors import InvalidCheckpoint
from nvila.model.awq import GROUP, Int4Weight

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Of every decoder layer."""

KINDS = ("qweight", "qzeros", "scales")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies where, from the lowest four bits on."""


def quantization(group: int = GROUP) -> dict[str, Any]:
    """`quantization_config` of a language model that is stored so."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def is_packed(llm: Mapping[str, Any]) -> bool:
    """Whether a language model's configuration says so."""
    told = llm.get("quantization_config") or {}
    return {key: told.get(key) for key in ("quant_method", "bits", "version")} == {
        "quant_method": "awq",
        "bits": 4,
        "version": "gemm",
    }


def pack(weight: Int4Weight) -> dict[str, Tensor]:
    """By kind. Outputs must be a multiple of eight."""
    return {
        "qweight": _pack(weight.codes_OI.T),
        "qzeros": _pack(weight.zeros_OG.T),
        "scales": weight.scales_OG.T.contiguous().half(),
    }


def unpack(packed: Mapping[str, Tensor]) -> Int4Weight:
    """The inverse of `pack`."""
    return Int4Weight(
        _unpack(packed["qweight"]).T.contiguous(),
        packed["scales"].T.contiguous(),
        _unpack(packed["qzeros"]).T.to(packed["scales"].dtype).contiguous(),
    )


def packed_shapes(shapes: Mapping[str, tuple[int, ...]], group: int) -> dict[str, tuple[int, ...]]:
    """What tensors there must be in place of these (`qwen2.llm_shapes`). Raises `InvalidCheckpoint` for sizes that
    cannot be packed."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        linear = linear_of(name)
        if linear is None:
            found[name] = shape
            continue
        outputs, inputs = shape
        if group < 1 or inputs % group or outputs % 8:
            raise InvalidCheckpoint(
                f"{linear} is {outputs}×{inputs}: four bits need inputs in groups of {group} and outputs in eights"
            )
        sizes = ((inputs, outputs // 8), (inputs // group, outputs // 8), (inputs // group, outputs))
        found |= {f"{linear}.{kind}": size for kind, size in zip(KINDS, sizes, strict=True)}
    return found


def dense_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of a packed model's tensors with its linears' weights as four bits left them, in float16."""
    dense = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(f".{kind}" for kind in KINDS))}
    for name in tensors:
        if name.endswith(".qweight"):
            linear = name.removesuffix(".qweight")
            dense[f"{linear}.weight"] = unpack({kind: tensors[f"{linear}.{kind}"] for kind in KINDS}).dequantise()
    return dense


def linear_of(name: str) -> str | None:
    """The decoder's linear whose weight has this name."""
    linear = name.removesuffix(".weight")
    return linear if name.endswith(".weight") and linear.endswith(tuple(f".{one}" for one in LINEARS)) else None


def _pack(codes_XO: Tensor) -> Tensor:
    """(X, O) of 0 … 15 to int32 (X, O / 8)."""
    eights = codes_XO.to(torch.int64).reshape(len(codes_XO), -1, 8)
    packed = sum(eights[..., place] << 4 * at for at, place in enumerate(_ORDER))
    assert isinstance(packed, Tensor)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)  # the highest bit is the sign


def _unpack(packed_XO: Tensor) -> Tensor:
    at_of = [_ORDER.index(place) for place in range(8)]
    return torch.stack([packed_XO >> 4 * at & 15 for at in at_of], -1).flatten(1).to(torch.uint8)
