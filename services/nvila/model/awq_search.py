"""What to scale and to clip before four bits: AWQ's search over one decoder layer (NVILA-SPEC §9.1).

Some input channels matter more. Multiplying their weights by a factor, and dividing what feeds them, keeps the layer's
output and lowers their rounding error; which power of the activations' size is best is tried out. Then the largest
weights of each group are clipped as far as that lowers the error. All scales of a layer are searched on its original
weights, folded, and then clipping is searched.

Follows `auto_scale_block`, `apply_scale` and `auto_clip_layer` in awq/quantize of mit-han-lab/llm-awq (AWQ,
arXiv:2306.00978).

B sequences · P positions · T tokens, of all sequences · I, O channels in and out · G groups of input channels ·
R candidates · D width of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nvila.errors import InvalidRequest
from nvila.model.awq import GROUP, fake_quantise

RATIOS = tuple(i / 20 for i in range(20))
"""Powers of the activations' size that are tried as scale."""

SHRINKS = tuple(1 - i / 20 for i in range(10))
"""Parts of a group's largest magnitude that are tried as its limit."""

SMALLEST_SCALE = 1e-4
CLIP_TOKENS = 512
"""Tokens by which clipping is judged: every n-th of what was recorded."""

OUTPUTS_AT_ONCE = 64
"""Output channels whose partial products are held at once (64 outputs of 3584 inputs: 470 MB)."""

NOT_CLIPPED = ("q_proj", "k_proj")
"""Their products are multiplied with each other: a limit found for one alone says little."""


class ScaleGroup(NamedTuple):
    """Linears that read the same input, `before` whose output that is, and the module by whose output scales are
    judged. All are names in the decoder layer."""

    before: str
    linears: tuple[str, ...]
    judged: str


@dataclass(frozen=True, eq=False)
class ScaleSearch:
    """`candidates_RI` and the mean squared error of the judged output with each."""

    candidates_RI: Tensor
    errors_R: Tensor

    @property
    def best_I(self) -> Tensor:
        """The first of the best."""
        return self.candidates_RI[int(self.errors_R.argmin())]


@dataclass(frozen=True, eq=False)
class ClipSearch:
    """`limits_ROG` and the mean squared error of each group's share of the output with each."""

    limits_ROG: Tensor
    errors_ROG: Tensor

    @property
    def best_OG(self) -> Tensor:
        """Group by group, the first of the best."""
        best_1OG = self.errors_ROG.argmin(0, keepdim=True)
        return self.limits_ROG.gather(0, best_1OG)[0]


# -- a layer ----------------------------------------------------------------------------------------------------------


def scale_groups(layer: nn.Module) -> list[ScaleGroup]:
    """Of a Qwen2 decoder layer. Values feed the attention's output only without grouped-query heads."""
    attention = ScaleGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn")
    values = ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj")
    up = ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp")
    down = ScaleGroup("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")
    is_plain = linear_named(layer, values.before).weight.shape == linear_named(layer, "self_attn.o_proj").weight.shape
    return [attention, values, up, down] if is_plain else [attention, up, down]


@torch.no_grad()
def linear_inputs(layer: nn.Module, hidden_BPD: Tensor, **attention: Any) -> dict[str, Tensor]:
    """What each linear of the layer is given, (B, P, I) by name. `attention`: the layer's arguments besides."""
    inputs: dict[str, Tensor] = {}

    def record(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[name] = given[0]

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_pre_hook(partial(record, name)).remove)
        layer(hidden_BPD, **attention)
    return inputs


@torch.no_grad()
def search_scales(
    layer: nn.Module, inputs: Mapping[str, Tensor], group: int = GROUP, **attention: Any
) -> list[tuple[ScaleGroup, ScaleSearch]]:
    """For every scale group of the layer. `inputs` of `linear_inputs`; `attention` as there."""
    found = []
    for scales in scale_groups(layer):
        judged = layer.get_submodule(scales.judged)
        names = [name.removeprefix(scales.judged).removeprefix(".") for name in scales.linears]
        parameters = [f"{name}.weight" if name else "weight" for name in names]
        arguments = attention if scales.judged == "self_attn" else {}
        x_BPI = inputs[scales.linears[0]]

        def output(
            weights: Sequence[Tensor],
            judged: nn.Module = judged,
            parameters: Sequence[str] = parameters,
            x_BPI: Tensor = x_BPI,
            arguments: Mapping[str, Any] = arguments,
        ) -> Tensor:
            out = functional_call(judged, dict(zip(parameters, weights, strict=True)), (x_BPI,), dict(arguments))
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first

        weights = [linear_named(layer, name).weight for name in scales.linears]
        found.append((scales, search_scale(output, weights, x_BPI, group)))
    return found


@torch.no_grad()
def fold_scale(layer: nn.Module, scales: ScaleGroup, scale_I: Tensor, inputs: dict[str, Tensor]) -> None:
    """Divide what comes before by the scale and multiply the linears by it, in place; recorded inputs follow."""
    before: Any = layer.get_submodule(scales.before)
    if isinstance(before, nn.Linear):
        before.weight[-len(scale_I) :].div_(scale_I[:, None])
    else:
        before.weight.div_(scale_I)
    if getattr(before, "bias", None) is not None:
        before.bias[-len(scale_I) :].div_(scale_I)
    for name in scales.linears:
        linear_named(layer, name).weight.mul_(scale_I)
        inputs[name] = inputs[name] / scale_I


@torch.no_grad()
def search_clips(layer: nn.Module, inputs: Mapping[str, Tensor], group: int = GROUP) -> dict[str, ClipSearch]:
    """For every linear that is clipped, by name. Call it after folding."""
    clipped = [name for name in inputs if not name.endswith(NOT_CLIPPED)]
    return {name: search_clip(linear_named(layer, name).weight, inputs[name].flatten(0, -2), group) for name in clipped}


@torch.no_grad()
def quantise_layer(layer: nn.Module, limits_OG_by_name: Mapping[str, Tensor], group: int = GROUP) -> None:
    """Clip, and leave every linear's weight as four bits leave it, in place."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            limit_OG = limits_OG_by_name.get(name)
            weight_OI = module.weight if limit_OG is None else clip(module.weight, limit_OG)
            module.weight.copy_(fake_quantise(weight_OI, group))


def linear_named(layer: nn.Module, name: str) -> nn.Linear:
    """Raises `InvalidRequest` for a module of another kind."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise InvalidRequest(f"{name} is a {type(module).__name__}; only linears can be scaled")
    return module


# -- one search -------------------------------------------------------------------------------------------------------


def search_scale(
    output: Callable[[Sequence[Tensor]], Tensor], weights_OI: Sequence[Tensor], x_BPI: Tensor, group: int = GROUP
) -> ScaleSearch:
    """Try every candidate for the common input of some weights; `output` computes what is judged with given weights."""
    wanted = output(weights_OI)
    candidates_RI = scale_candidates(x_BPI)
    errors = []
    for scale_I in candidates_RI:
        rounded = [fake_quantise(weight * scale_I, group) / scale_I for weight in weights_OI]
        errors.append((wanted - output(rounded)).float().pow(2).mean())
    return ScaleSearch(candidates_RI, torch.stack(errors))


def scale_candidates(x_BPI: Tensor) -> Tensor:
    """(R, I): powers of each channel's mean magnitude, centred so that the largest times the smallest is 1."""
    size_I = x_BPI.abs().flatten(0, -2).mean(0)
    powers = [size_I.pow(ratio).clamp(min=SMALLEST_SCALE) for ratio in RATIOS]
    return torch.stack([power / (power.max() * power.min()).sqrt() for power in powers])


def search_clip(weight_OI: Tensor, x_TI: Tensor, group: int = GROUP) -> ClipSearch:
    """Try every limit for every group of a weight. Raises `InvalidRequest` for fewer than `CLIP_TOKENS` tokens."""
    if len(x_TI) < CLIP_TOKENS:
        raise InvalidRequest(f"{len(x_TI)} tokens were recorded; at least {CLIP_TOKENS} are needed to judge clipping")
    x_TGg = _grouped(x_TI[:: len(x_TI) // CLIP_TOKENS], group)
    parts = [_search_clip(part, x_TGg, group) for part in torch.split(weight_OI, OUTPUTS_AT_ONCE)]
    return ClipSearch(
        torch.cat([part.limits_ROG for part in parts], 1), torch.cat([part.errors_ROG for part in parts], 1)
    )


def _search_clip(weight_OI: Tensor, x_TGg: Tensor, group: int) -> ClipSearch:
    def shares(weight_OI: Tensor) -> Tensor:
        """Each group's part of each output, (O, T, G); multiplied and added as the reference does, ties and all."""
        return (x_TGg * _grouped(weight_OI, group)[:, None]).sum(-1)

    wanted_OTG = shares(weight_OI)
    largest_OG = _grouped(weight_OI, group).abs().amax(-1)
    limits_ROG = torch.stack([largest_OG * shrink for shrink in SHRINKS])
    errors = [
        (shares(fake_quantise(clip(weight_OI, limit_OG), group)) - wanted_OTG).pow(2).mean(1) for limit_OG in limits_ROG
    ]
    return ClipSearch(limits_ROG, torch.stack(errors))


def _grouped(x_XI: Tensor, group: int) -> Tensor:
    return x_XI.reshape(len(x_XI), -1, group)


def clip(weight_OI: Tensor, limit_OG: Tensor) -> Tensor:
    """Each group held within ± its limit."""
    outputs, groups = limit_OG.shape
    grouped = weight_OI.reshape(outputs, groups, -1)
    return grouped.clamp(-limit_OG[..., None], limit_OG[..., None]).flatten(1)
