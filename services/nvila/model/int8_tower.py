"""The 8-bit tower as it is served: every linear on whole numbers, attention and what lies between in 16 or 32 bits.

What is computed is that of `model/w8a8.py`, whatever computes it: weights per channel, activations per token as they
come, sums in whole numbers (NVILA-SPEC §9.2). So a token made on a GPU, on a processor with 8-bit instructions and on
one without differs by rounding only, and all may share a cache key. Two things differ from the reference's CUDA
kernels: a token's scale is kept in float32 where they round it to float16, and a norm's variance is the mean of squared
differences, not a difference of means.

Which arithmetic runs is chosen in `choose_ops`: kernels of our own on CUDA (`model/int8_cuda.py`), the framework's on a
processor (`model/int8_cpu.py`).

N tiles · T tokens · C channels · I, O channels in and out · A heads · E channels per head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from nvila.errors import InvalidRequest
from nvila.model.config import TowerConfig
from nvila.model.int8_layout import LINEARS, SCALE
from nvila.model.siglip import siglip_config
from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)


class Int8Rows(NamedTuple):
    """`values_TI`: int8. `scale_T`: float32."""

    values_TI: Tensor
    scale_T: Tensor


class Int8Linear(nn.Module):
    """Weights as stored, scales and bias in float32. `Int8Ops.linear` computes it."""

    def __init__(self, values_OI: Tensor, scale_O: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.values_OI: Tensor
        self.scale_O: Tensor
        self.bias_O: Tensor
        self.register_buffer("values_OI", values_OI.contiguous())
        self.register_buffer("scale_O", scale_O.reshape(-1).float())
        self.register_buffer("bias_O", bias_O.float())


class Int8Ops(Protocol):
    """The arithmetic of a block but for attention; rows of all tiles together."""

    @property
    def name(self) -> str:
        """For logs and reports."""
        ...

    def normalise(self, x_TC: Tensor, norm: nn.LayerNorm) -> Int8Rows:
        """The norm's output, quantised."""
        ...

    def quantise(self, x_TI: Tensor) -> Int8Rows: ...

    def linear(
        self, x: Int8Rows, linear: Int8Linear, *, dtype: torch.dtype, is_gelu: bool = False, residual_TO: Tensor | None
    ) -> Tensor:
        """Scaled, with bias, then through GELU (tanh form) or onto the residual: (T, O) of `dtype`."""
        ...

    def repeated(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same function, for being called often with tensors of few shapes on the device."""
        ...


class Int8Block(nn.Module):
    """One transformer block; q, k and v are one linear."""

    def __init__(self, config: TowerConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._heads = config.heads
        self.layer_norm1 = _norm(config, weights, "layer_norm1", dtype)
        self.layer_norm2 = _norm(config, weights, "layer_norm2", dtype)
        self.qkv = _linear(weights, *LINEARS[:3])
        self.out, self.fc1, self.fc2 = (_linear(weights, name) for name in LINEARS[3:])

    def forward(self, x_NTC: Tensor, ops: Int8Ops) -> Tensor:
        N, T, C = x_NTC.shape
        dtype = x_NTC.dtype
        x_TC = x_NTC.reshape(N * T, C)
        qkv = ops.linear(ops.normalise(x_TC, self.layer_norm1), self.qkv, dtype=dtype, residual_TO=None)
        q, k, v = qkv.view(N, T, 3, self._heads, C // self._heads).permute(2, 0, 3, 1, 4)
        seen_NATE = functional.scaled_dot_product_attention(q, k, v)
        seen_TC = seen_NATE.transpose(1, 2).reshape(N * T, C)
        x_TC = ops.linear(ops.quantise(seen_TC), self.out, dtype=dtype, residual_TO=x_TC)
        hidden_TI = ops.linear(
            ops.normalise(x_TC, self.layer_norm2), self.fc1, dtype=dtype, is_gelu=True, residual_TO=None
        )
        return ops.linear(ops.quantise(hidden_TI), self.fc2, dtype=dtype, residual_TO=x_TC).view(N, T, C)


class Int8Tower(nn.Module):
    """Pixels to patch features, as `siglip.Tower`."""

    def __init__(
        self,
        config: TowerConfig,
        tile_px: int,
        weights: Mapping[str, Tensor],
        ops: Int8Ops,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`weights`: as `Checkpoint.tower_weights` gives them, checked. `dtype`: of everything but the linears."""
        super().__init__()
        self._ops = ops
        with torch.device("meta"):
            self.embeddings = SiglipVisionEmbeddings(siglip_config(config, tile_px))
        self.embeddings.load_state_dict(_under(weights, "embeddings."), strict=True, assign=True)
        self.embeddings.position_ids = torch.arange(self.embeddings.num_positions).expand(1, -1)
        self.embeddings.to(dtype)
        blocks = [_under(weights, f"encoder.layers.{i}.") for i in range(config.blocks)]
        self.blocks = nn.ModuleList([Int8Block(config, block, dtype) for block in blocks])
        self.to(device).requires_grad_(False)
        self._repeat = ops.repeated(lambda pixels_N3SS: self.states(pixels_N3SS)[-1])

    @property
    def arithmetic(self) -> str:
        return self._ops.name

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) float of any dtype to (N, T, C) in the tower's dtype; tokens row by row."""
        weight = self.embeddings.patch_embedding.weight
        return self._repeat(pixels_N3SS.to(device=weight.device, dtype=weight.dtype))

    def states(self, pixels_N3SS: Tensor) -> list[Tensor]:
        """What goes into the first block, and what comes out of every block."""
        weight = self.embeddings.patch_embedding.weight
        states = [self.embeddings(pixels_N3SS.to(device=weight.device, dtype=weight.dtype))]
        for block in self.blocks:
            states.append(block(states[-1], self._ops))
        return states


def choose_ops(device: torch.device, config: TowerConfig, *, must_win: bool = False) -> Int8Ops:
    """What computes the 8-bit linears on this device, logged with the reason.

    `must_win`: raises `InvalidRequest` where nothing here is faster than 16 or 32 bits. Raises it, too, for devices
    that no arithmetic is known for.
    """
    if device.type == "cuda":
        from nvila.model.int8_cuda import TritonOps

        ops: Int8Ops = TritonOps(device)
        _log.info("8-bit linears", extra=fields(arithmetic=ops.name, device=str(device)))
        return ops
    if device.type != "cpu":
        raise InvalidRequest(f"the 8-bit tower runs on cuda and cpu devices, not on {device.type!r}")
    from nvila.model.int8_cpu import choose_product

    ops, reason = choose_product(config.mlp_width, config.width)
    _log.log(
        logging.INFO if ops.is_whole else logging.WARNING,
        "8-bit linears" if ops.is_whole else "8-bit linears in 32-bit arithmetic: the same numbers, no faster",
        extra=fields(arithmetic=ops.name, reason=reason, processor=torch.backends.cpu.get_cpu_capability()),
    )
    if must_win and not ops.is_whole:
        raise InvalidRequest(f"8-bit products do not pay on this processor: {reason}")
    return ops


def _norm(config: TowerConfig, weights: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> nn.LayerNorm:
    with torch.device("meta"):
        norm = nn.LayerNorm(config.width, eps=config.norm_eps)
    norm.load_state_dict(_under(weights, f"{name}."), strict=True, assign=True)
    return norm.to(dtype)


def _linear(weights: Mapping[str, Tensor], *names: str) -> Int8Linear:
    """Several of the same input as one."""
    values, scales, biases = (
        torch.cat([weights[f"{name}.{kind}"] for name in names]) for kind in ("weight", SCALE, "bias")
    )
    return Int8Linear(values, scales, biases)


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
