"""Arithmetic in float32 on weights that stay in 16 bits, where the checkpoint's pages are mapped.

Processors without 16-bit arithmetic compute in float32, which is up to 60 times faster there. Widening a whole model
would hold it a second time, and twice as large; one matrix is widened while it is used, and mapped pages stay shared
between processes. The results are the same: every 16-bit number is a float32. benchmarks/model_memory.py measures it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

HALVES = (torch.float16, torch.bfloat16)


class StoredLinear(nn.Linear):
    """A linear layer whose weights are widened to its input's dtype while it runs, and not before or after."""

    @classmethod
    def of(cls, linear: nn.Linear) -> StoredLinear:
        """On the same tensors."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)


def compute_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make `module` compute in `dtype`: its linear layers widen as they go, the little that is left is converted.

    Weights that are not 16-bit numbers on the processor are converted as `Module.to` does it. Returns the module.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _stays(child.weight, dtype):
                setattr(parent, name, StoredLinear.of(child))
    kept = {id(p) for layer in module.modules() if isinstance(layer, StoredLinear) for p in layer.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return module


def _stays(weight: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and weight.dtype in HALVES and weight.device.type == "cpu"
