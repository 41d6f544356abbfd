"""8-bit linears on a processor: the framework's product of whole numbers where it is right and pays, else float32.

Measured at 1024 × 1152 × 4304 on one thread (benchmarks/tower.md): float32 125 ms, `torch._int_mm` 12 ms on a processor
with AVX-512 VNNI. Without VNNI the libraries add neighbouring products in 16 bits, which overflow: oneDNN's product was
wrong and fbgemm's off by 8 % with instructions held to AVX2. So both speed and sums are tried out, once, at start.

T tokens · I, O channels in and out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from nvila.model.int8_tower import Int8Linear, Int8Rows
from nvila.model.w8a8 import LEVELS

PROBE_TOKENS = 128
"""Enough that a product takes milliseconds, not so many that a start takes long."""

Product = Callable[[Tensor, Tensor], Tensor]
"""int8 (T, I) and (O, I) to their sums, (T, O) of int32, or of float32 holding whole numbers but for rounding."""


class ProcessorOps:
    """Implements `Int8Ops`. `is_whole`: sums are taken in whole numbers."""

    def __init__(self, product: Product, *, name: str, is_whole: bool) -> None:
        self._product, self.name, self.is_whole = product, name, is_whole

    def normalise(self, x_TC: Tensor, norm: nn.LayerNorm) -> Int8Rows:
        return self.quantise(
            functional.layer_norm(x_TC, norm.normalized_shape, norm.weight.to(x_TC), norm.bias.to(x_TC), norm.eps)
        )

    def quantise(self, x_TI: Tensor) -> Int8Rows:
        x_TI = x_TI.float()
        largest_T1 = x_TI.abs().amax(1, keepdim=True)  # in two passes ten times quicker than vector_norm's one
        factor_T1 = (LEVELS / largest_T1).nan_to_num_(posinf=0.0)  # a token of zeros stays zeros
        return Int8Rows((x_TI * factor_T1).round_().to(torch.int8), largest_T1[:, 0] / LEVELS)

    def linear(
        self, x: Int8Rows, linear: Int8Linear, *, dtype: torch.dtype, is_gelu: bool = False, residual_TO: Tensor | None
    ) -> Tensor:
        y_TO = self._product(x.values_TI, linear.values_OI) * linear.scale_O
        torch.addcmul(linear.bias_O, y_TO, x.scale_T[:, None], out=y_TO)
        if is_gelu:
            y_TO = functional.gelu(y_TO, approximate="tanh")
        return (y_TO if residual_TO is None else y_TO.add_(residual_TO)).to(dtype)

    def repeated(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return run


def whole_product(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    return torch._int_mm(x_TI, weight_OI.t())


def float_product(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Weights are widened while they are used, and stay 8 bits in memory."""
    return functional.linear(x_TI.float(), weight_OI.float())


WHOLE = ProcessorOps(whole_product, name="torch._int_mm", is_whole=True)
FLOAT = ProcessorOps(float_product, name="float32", is_whole=False)


def choose_product(
    outputs: int, inputs: int, ops: ProcessorOps = WHOLE, clock: Callable[[], float] = time.perf_counter
) -> tuple[ProcessorOps, str]:
    """`ops` where its sums are exact and it is faster than float32 at this size, else `FLOAT`; and why."""
    if not is_exact(ops):
        return FLOAT, f"{ops.name} adds products wrongly here (no 8-bit dot products, AVX-512 VNNI or AMX)"
    x_TI = torch.full((PROBE_TOKENS, inputs), 3, dtype=torch.int8)
    weight_OI = torch.full((outputs, inputs), 5, dtype=torch.int8)
    linear = Int8Linear(weight_OI, torch.ones(outputs), torch.zeros(outputs))
    wide_TI, wide_OI = x_TI.float(), weight_OI.float()

    def whole() -> None:
        ops.linear(ops.quantise(wide_TI), linear, dtype=torch.float32, residual_TO=None)

    def plain() -> None:
        functional.linear(wide_TI, wide_OI, linear.bias_O)

    whole_ms, plain_ms = (1000 * _seconds(run, clock) for run in (whole, plain))
    told = f"{whole_ms:.2f} ms against {plain_ms:.2f} ms in float32 for {PROBE_TOKENS} tokens"
    return (ops, told) if whole_ms < plain_ms else (FLOAT, told)


def is_exact(ops: ProcessorOps) -> bool:
    """The largest sums there can be, of both signs, come out right."""
    pattern = torch.tensor([LEVELS, -LEVELS, LEVELS, LEVELS], dtype=torch.int8).repeat(16)
    x_TI = torch.stack([pattern, -pattern, pattern.flip(0), torch.full_like(pattern, LEVELS)]).repeat(8, 1)
    weight_OI = x_TI.roll(1, 1)
    linear = Int8Linear(weight_OI, torch.ones(len(weight_OI)), torch.zeros(len(weight_OI)))
    rows = Int8Rows(x_TI, torch.ones(len(x_TI)))
    return torch.equal(
        ops.linear(rows, linear, dtype=torch.float32, residual_TO=None), x_TI.float() @ weight_OI.float().T
    )


def _seconds(run: Callable[[], None], clock: Callable[[], float], times: int = 3) -> float:
    """The quickest of a few runs, after one that is not counted."""
    run()
    taken = []
    for _ in range(times):
        began = clock()
        run()
        taken.append(clock() - began)
    return min(taken)
