"""8-bit linears on CUDA, in the Triton language (the compiler, not the server): Ampere, Ada, Hopper and later.

Three kernels make up a block beside attention: a norm and its output's quantisation in one pass; quantisation of
what attention and GELU give; and the product, on the tensor cores' 8-bit instructions, that ends in scales, bias, GELU
or residual before anything is written. They run in Triton's interpreter, too, which is how they are tested without a
GPU (deploy/requirements/triton_interpreter.sh).

T tokens · I, O channels in and out.
"""

# Triton's decorators and kernels have no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from nvila.errors import InvalidRequest
from nvila.model.int8_tower import Int8Linear, Int8Rows

OLDEST = (8, 0)
"""Compute capability of Ampere: older tensor cores are not tried."""

_ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: added and taken off, it leaves a float32 below 2^22 rounded to whole, halves to even."""


@dataclass(frozen=True)
class Piece:
    """Of a product: rows, columns and depth that one program computes at a time, its warps and loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


PIECES = (
    Piece(128, 256, 128, 8, 3),
    Piece(128, 128, 128, 8, 4),
    Piece(128, 128, 128, 4, 3),
    Piece(64, 256, 128, 8, 3),
    Piece(64, 128, 128, 4, 4),
    Piece(128, 64, 128, 4, 4),
    Piece(64, 64, 128, 4, 5),
)
"""Tried out once per size on the device that they run on."""


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _store_quantised(y, values_ptr, scale_ptr, row, columns, mask, width):
    largest = tl.max(tl.abs(y), 0)
    factor = 127.0 / tl.where(largest > 0, largest, 1.0)  # a token of zeros stays zeros
    rounded = (y * factor + _ROUND) - _ROUND
    tl.store(values_ptr + row * width + columns, rounded.to(tl.int8), mask=mask)
    tl.store(scale_ptr + row, largest / 127.0)


@triton.jit
def _quantise(x_ptr, values_ptr, scale_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    _store_quantised(x, values_ptr, scale_ptr, row, columns, mask, width)


@triton.jit
def _normalise(x_ptr, weight_ptr, bias_ptr, values_ptr, scale_ptr, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x, 0) / width, 0.0)
    variance = tl.sum(centred * centred, 0) / width
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = centred / tl.sqrt(variance + eps) * weight + bias
    _store_quantised(y, values_ptr, scale_ptr, row, columns, mask, width)


@triton.jit
def _product(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    T,
    O,  # noqa: E741
    I,  # noqa: E741
    HAS_RESIDUAL: tl.constexpr,
    IS_GELU: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Programs that share columns of weights follow each other in groups of eight, so that both operands stay in cache.
    program = tl.program_id(0)
    row_pieces, column_pieces = tl.cdiv(T, ROWS), tl.cdiv(O, COLUMNS)
    group = program // (8 * column_pieces)
    group_rows = tl.minimum(row_pieces - group * 8, 8)
    row_piece = group * 8 + (program % (8 * column_pieces)) % group_rows
    column_piece = (program % (8 * column_pieces)) // group_rows

    rows = row_piece * ROWS + tl.arange(0, ROWS)
    columns = column_piece * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    safe_rows = tl.where(rows < T, rows, 0).to(tl.int64)
    safe_columns = tl.where(columns < O, columns, 0).to(tl.int64)
    x_at = x_ptr + safe_rows[:, None] * I + depth[None, :]
    weight_at = weight_ptr + safe_columns[None, :] * I + depth[:, None]
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for done in range(0, I, DEPTH):
        if IS_EVEN:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        else:
            x = tl.load(x_at, mask=depth[None, :] < I - done, other=0)
            weight = tl.load(weight_at, mask=depth[:, None] < I - done, other=0)
        sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
        x_at += DEPTH
        weight_at += DEPTH

    x_scale = tl.load(x_scale_ptr + safe_rows)
    weight_scale = tl.load(weight_scale_ptr + safe_columns)
    bias = tl.load(bias_ptr + safe_columns)
    y = sums.to(tl.float32) * x_scale[:, None] * weight_scale[None, :] + bias[None, :]
    if IS_GELU:  # tanh form: y · sigmoid(2u); beyond e^80 it is zero either way
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))
    at = safe_rows[:, None] * O + safe_columns[None, :]
    mask = (rows < T)[:, None] & (columns < O)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


_tuned_product = triton.autotune(
    configs=[
        triton.Config(
            {"ROWS": piece.rows, "COLUMNS": piece.columns, "DEPTH": piece.depth},
            num_warps=piece.warps,
            num_stages=piece.stages,
        )
        for piece in PIECES
    ],
    key=["T", "O", "I", "HAS_RESIDUAL", "IS_GELU"],
)(_product)


# -- as operations ----------------------------------------------------------------------------------------------------


class TritonOps:
    """Implements `Int8Ops`. `piece`: instead of trying `PIECES` out. Raises `InvalidRequest` for a GPU that is too old.

    The first call of each size compiles and tries out: seconds.
    """

    name = "Triton-language kernels"

    def __init__(self, device: torch.device, piece: Piece | None = None) -> None:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
            raise InvalidRequest(
                f"the 8-bit tower needs compute capability {OLDEST[0]}.{OLDEST[1]} or later; "
                f"{torch.cuda.get_device_name(device)} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
            )
        self._device, self._piece = device, piece

    def normalise(self, x_TC: Tensor, norm: nn.LayerNorm) -> Int8Rows:
        x_TC = x_TC.contiguous()
        rows, width = _rows_like(x_TC), x_TC.shape[1]
        _normalise[(len(x_TC),)](
            x_TC, norm.weight, norm.bias, *rows, width, norm.eps, BLOCK=triton.next_power_of_2(width), num_warps=4
        )
        return rows

    def quantise(self, x_TI: Tensor) -> Int8Rows:
        x_TI = x_TI.contiguous()
        rows, width = _rows_like(x_TI), x_TI.shape[1]
        _quantise[(len(x_TI),)](x_TI, *rows, width, BLOCK=triton.next_power_of_2(width), num_warps=4)
        return rows

    def linear(
        self, x: Int8Rows, linear: Int8Linear, *, dtype: torch.dtype, is_gelu: bool = False, residual_TO: Tensor | None
    ) -> Tensor:
        (T, inputs), outputs = x.values_TI.shape, len(linear.values_OI)
        y_TO = torch.empty(T, outputs, dtype=dtype, device=x.values_TI.device)

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (triton.cdiv(T, meta["ROWS"]) * triton.cdiv(outputs, meta["COLUMNS"]),)

        kernel: Callable[..., None] = _tuned_product[grid]
        blocks: dict[str, int] = {}
        if self._piece is not None:
            kernel = _product[grid]
            blocks = {"ROWS": self._piece.rows, "COLUMNS": self._piece.columns, "DEPTH": self._piece.depth}
        kernel(
            x.values_TI,
            x.scale_T,
            linear.values_OI,
            linear.scale_O,
            linear.bias_O,
            y_TO if residual_TO is None else residual_TO.contiguous(),
            y_TO,
            T,
            outputs,
            inputs,
            HAS_RESIDUAL=residual_TO is not None,
            IS_GELU=is_gelu,
            IS_EVEN=all(inputs % piece.depth == 0 for piece in ([self._piece] if self._piece else PIECES)),
            **blocks,
        )
        return y_TO

    def repeated(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return Recorded(run) if self._device.type == "cuda" else run


def _rows_like(x_TI: Tensor) -> Int8Rows:
    return Int8Rows(
        torch.empty_like(x_TI, dtype=torch.int8), torch.empty(len(x_TI), dtype=torch.float32, device=x_TI.device)
    )


# -- whole batches ----------------------------------------------------------------------------------------------------


class Recorded:
    """A function of one tensor, recorded once per shape as a CUDA graph and replayed: one launch for a whole tower.

    Without it a tile's 180 launches take longer than their work. Not for several threads; what is returned is a copy,
    so all shapes may share the memory of what lies between.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self._run = run
        self._memory = torch.cuda.graph_pool_handle()
        self._by_shape: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        if shape not in self._by_shape:
            self._by_shape[shape] = self._record(x)
        graph, given, made = self._by_shape[shape]
        given.copy_(x)
        graph.replay()
        return made.clone()

    def _record(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = x.clone()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # compiles, tries out and allocates, none of which can be recorded
            for _ in range(2):
                self._run(given)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            made = self._run(given)
        return graph, given, made
