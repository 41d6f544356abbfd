"""FP8 training of the language model's large linear layers, through torchao (NVILA-SPEC §8.3, COAT's `fp8Linear`).

Weights and activations in E4M3, output gradients in E5M2, scales per tensor, products accumulated in float32;
everything else as in bf16 training. One recipe field switches it (`precision: fp8`); where the hardware or the library
cannot, the run goes on in bf16 and says why.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

ROW_MULTIPLE = 128
"""Positions of a row (`pad_to_multiple_of` of the reference): FP8 products need multiples of 16."""

logger = logging.getLogger(__name__)


def obstacle() -> str:
    """Why FP8 training cannot run here; empty if it can."""
    if not torch.cuda.is_available():
        return "FP8 training needs an NVIDIA GPU of the Hopper or Ada generation or later; there is no GPU here"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        return f"FP8 training needs compute capability 8.9; {torch.cuda.get_device_name()} has {major}.{minor}"
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        return f"FP8 training needs torchao, which cannot be loaded: {error}"
    return ""


def convert(llm: nn.Module, smallest: int, *, emulates: bool = False) -> int:
    """Turn the layers that are large enough to FP8 and compile them, in place; returns how many. With an obstacle,
    none, and a warning.

    `smallest`: least size of a weight's smaller side. `emulates`: compute the same roundings without FP8 hardware, for
    tests.
    """
    reason = "" if emulates else obstacle()
    if reason:
        logger.warning("%s: training in bf16", reason)
        return 0
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_large(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or name.rpartition(".")[2] not in LAYERS:
            return False
        return min(module.weight.shape) >= smallest and all(n % 16 == 0 for n in module.weight.shape)

    chosen = sum(is_large(module, name) for name, module in llm.named_modules())
    convert_to_float8_training(llm, config=Float8LinearConfig(emulate=emulates), module_filter_fn=is_large)
    if chosen and not emulates:
        compile_products(llm)
    if not chosen:
        logger.warning("no linear layer has a smaller side of %d or more: training in bf16", smallest)
    return chosen


def compile_products(llm: nn.Module) -> None:
    """Each block's attention projections and its MLP: scales and casts of FP8 are fused, without which it is slower
    than bf16. Not what is between them: attention sees the lengths of the samples, which differ from row to row."""
    for name, module in llm.named_modules():
        if name.rpartition(".")[2] in (*ATTENTION, "mlp"):
            module.compile(dynamic=True)
