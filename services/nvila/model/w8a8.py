"""The tower in 8 bits: weights per channel, activations per token, outliers smoothed into weights (NVILA-SPEC §9.2).

Plain arithmetic, one linear at a time, that fast kernels are compared with. Follows mit-han-lab/llm-awq
(tinychat/modules W8A8OF16LinearDynamicInputScale and awq/quantize/smooth.py; SmoothQuant, arXiv:2211.10438) to the bit
where its results can be recorded; its CUDA kernels' arithmetic is re-derived.

N tiles · T tokens · I, O channels in and out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nvila.errors import InvalidRequest
from nvila.model.siglip import Tower

LEVELS = 127
"""Symmetric: -127 … 127."""

SMALLEST = 1e-5
"""Lower bound of weight maxima and of smoothing factors."""

ALPHA = 0.3
"""How much of the outliers moves from activations to weights: what llm-awq's VILA demo smooths towers with."""


class Int8Weight(NamedTuple):
    """`values_OI`: int8. `scale_O`: in the dtype of the weight."""

    values_OI: Tensor
    scale_O: Tensor

    def dequantise(self) -> Tensor:
        return self.values_OI.to(self.scale_O.dtype) * self.scale_O[:, None]


class Int8Activation(NamedTuple):
    """`values_TI`: int8. `scale_T`: float16."""

    values_TI: Tensor
    scale_T: Tensor


# -- weights and activations ------------------------------------------------------------------------------------------


def quantise_weight(weight_OI: Tensor) -> Int8Weight:
    """One scale per output channel, computed in the weight's own dtype, half a step rounded to the even one."""
    scale_O = weight_OI.abs().amax(1).clamp(min=SMALLEST) / LEVELS
    return Int8Weight(torch.round(weight_OI / scale_O[:, None]).to(torch.int8), scale_O)


def fuse(weights_OI: Sequence[Tensor], biases_O: Sequence[Tensor]) -> tuple[Int8Weight, Tensor]:
    """Several linears of the same input (q, k, v) as one: channels keep their own scales. Returns weight and bias."""
    parts = [quantise_weight(weight) for weight in weights_OI]
    joined = Int8Weight(torch.cat([p.values_OI for p in parts]), torch.cat([p.scale_O for p in parts]))
    return joined, torch.cat(list(biases_O))


def quantise_activation(x_TI: Tensor) -> Int8Activation:
    """One scale per token, as it comes. A token of zeros stays zeros.

    The stored scale is rounded to float16, the values are made with the scale before that.
    """
    largest_T = x_TI.float().abs().amax(1)
    factor_T = torch.where(largest_T > 0, LEVELS / largest_T, 0.0)
    values_TI = torch.round(x_TI.float() * factor_T[:, None]).to(torch.int8)
    return Int8Activation(values_TI, (largest_T / LEVELS).half())


def int8_linear(x_TI: Tensor, weight: Int8Weight, bias_O: Tensor | None = None) -> Tensor:
    """What the int8 kernel computes, before its last rounding to 16 bit: (T, O) float32.

    Products add up in whole numbers; then the token's and the channel's scale, then the bias.
    """
    x = quantise_activation(x_TI)
    # float64 holds every such sum exactly, and is faster on a CPU than integer products
    sums_TO = (x.values_TI.double() @ weight.values_OI.double().T).float()
    scaled_TO = sums_TO * x.scale_T.float()[:, None] * weight.scale_O.float()
    return scaled_TO if bias_O is None else scaled_TO + bias_O.float()


def fake_linear(x_TI: Tensor, weight: Int8Weight, bias_O: Tensor | None = None) -> Tensor:
    """The same in the dtype of the input, with both sides rounded to 8 bit and scaled back first (SmoothQuant's own
    simulation, `W8A8Linear`): for accuracy, not for speed."""
    scale_T = x_TI.abs().amax(1).clamp(min=SMALLEST) / LEVELS
    rounded_TI = torch.round(x_TI / scale_T[:, None]) * scale_T[:, None]
    return functional.linear(rounded_TI, weight.dequantise().to(x_TI.dtype), bias_O)


# -- smoothing --------------------------------------------------------------------------------------------------------


def smoothing_factors(activation_I: Tensor, weights_OI: Sequence[Tensor], alpha: float = ALPHA) -> Tensor:
    """By what each input channel is divided, and the weights that read it multiplied: (I,).

    activation_I: largest magnitude seen of each channel. Factors follow activations to the power of `alpha` and, the
    other way, the largest of all consumers' weights.
    """
    largest_I = torch.stack([weight.abs().amax(0) for weight in weights_OI]).amax(0).clamp(min=SMALLEST)
    activation_I = activation_I.to(largest_I)
    return (activation_I.pow(alpha) / largest_I.pow(1 - alpha)).clamp(min=SMALLEST)


def smooth(norm: nn.LayerNorm, linears: Sequence[nn.Linear], activation_I: Tensor, alpha: float = ALPHA) -> None:
    """Move outliers from a norm's output into the linears that read it, in place; the results stay what they were."""
    factors_I = smoothing_factors(activation_I, [linear.weight for linear in linears], alpha)
    with torch.no_grad():
        norm.weight.div_(factors_I)
        norm.bias.div_(factors_I)
        for linear in linears:
            linear.weight.mul_(factors_I)


@torch.inference_mode()
def activation_maxima(tower: Tower, pixels_N3SS: Tensor) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of each linear over all tokens, by the linear's name in the tower.

    Call it on several batches and take the larger of both for more data than fits in memory at once.
    """
    maxima: dict[str, Tensor] = {}

    def record(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maxima[name] = inputs[0].abs().flatten(0, -2).amax(0).float()

    with ExitStack() as hooks:
        for name, module in tower.encoder.named_modules(prefix="encoder"):
            if isinstance(module, nn.Linear):
                hook = module.register_forward_pre_hook(partial(record, name))
                hooks.callback(hook.remove)
        tower(pixels_N3SS)
    return maxima


def smooth_tower(tower: Tower, maxima: Mapping[str, Tensor], alpha: float = ALPHA) -> None:
    """Smooth what stands before q, k, v and before the first linear of the MLP of every block, in place.

    Not the inputs of the attention's output and of the MLP's second linear, which no norm precedes. Raises
    `InvalidRequest` naming a linear without recorded maxima.
    """
    for i, block in enumerate(tower.encoder.layers):
        attention = block.self_attn
        groups = {
            f"encoder.layers.{i}.self_attn.q_proj": (
                block.layer_norm1,
                [attention.q_proj, attention.k_proj, attention.v_proj],
            ),
            f"encoder.layers.{i}.mlp.fc1": (block.layer_norm2, [block.mlp.fc1]),
        }
        for name, (norm, linears) in groups.items():
            if name not in maxima:
                raise InvalidRequest(f"no activation maxima were recorded for {name}")
            smooth(norm, linears, maxima[name], alpha)
