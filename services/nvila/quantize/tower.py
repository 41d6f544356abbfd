"""The tower in 8 bits: outliers measured and smoothed into weights, weights rounded, the result compared (NVILA-SPEC
§9.2).

N tiles · S tile side · T tokens · I channels in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nvila.errors import InvalidCheckpoint
from nvila.model.checkpoint import POSITIONS, TOWER_PREFIX, Checkpoint
from nvila.model.int8_layout import QUANTIZATION, SCALE, int8_linears
from nvila.model.int8_tower import Int8Ops, Int8Tower
from nvila.model.layouts import Part
from nvila.model.save import save_checkpoint
from nvila.model.siglip import Tower
from nvila.model.w8a8 import ALPHA, LEVELS, activation_maxima, quantise_weight, smooth_tower
from nvila.quantize.calibration import Data, collect_tiles
from nvila.quantize.checks import check_finite, check_target
from nvila.quantize.report import LayerError, Report, Tally, write_report

TILES, HELD_OUT = 64, 16
"""Looked at by default."""

TILES_AT_ONCE = 4

MADE = "per token"
"""The way that is kept: smoothed, one scale per token as it comes."""

Progress = Callable[[str, int, int], None]
"""What is done now, how much of it, of how much."""


@dataclass(frozen=True, kw_only=True)
class TowerPlan:
    """`tiles` to calibrate with, `held_out` to report on. `alpha`: how much of the outliers moves into weights."""

    data: Data
    device: torch.device
    tiles: int = TILES
    held_out: int = HELD_OUT
    alpha: float = ALPHA


def quantise_tower(
    checkpoint: Checkpoint, target: Path, plan: TowerPlan, ops: Int8Ops, progress: Progress = lambda *_: None
) -> Report:
    """Write the checkpoint with its tower in 8 bits to `target`, a report inside. `ops`: computes what is reported.

    The blocks that NVILA does not use, the pooling head and the final norm are left out. Raises `InvalidCheckpoint` (in
    8 bits already, or a weight that is not a number) and `InvalidRequest` (data, a folder that is there) before any
    work.
    """
    if checkpoint.has_int8_tower:
        raise InvalidCheckpoint(f"the tower of {checkpoint.name} is in 8 bits already")
    check_target(target)
    stored = checkpoint.tower_weights()
    check_finite("the tower", stored)
    config = checkpoint.config
    seen = collect_tiles(config, plan.data, plan.tiles, is_held_out=False)
    held_out = collect_tiles(config, plan.data, plan.held_out, is_held_out=True)

    tower = _float_tower(checkpoint, stored, plan.device)
    maxima = measure(tower, seen, progress)
    smoothed = _float_tower(checkpoint, stored, plan.device)
    smooth_tower(smoothed, maxima, plan.alpha)
    weights = stored | int8_weights(smoothed)
    made = Int8Tower(config.tower, config.tower_px, weights, ops, device=plan.device, dtype=torch.float32)
    layers = compare(tower, smoothed, made, measure(smoothed, seen, progress), held_out, progress)

    if config.tower_px != config.tower.image_px:  # the table as it was stored; loading resamples it again
        weights[POSITIONS] = checkpoint.layout.weights(Part.TOWER).tensor(TOWER_PREFIX + POSITIONS)
    named = {TOWER_PREFIX + name: tensor.cpu() for name, tensor in weights.items()}
    layout = replace(checkpoint.layout, tower={**checkpoint.layout.tower, "quantization_config": QUANTIZATION})
    parts = {Part.LLM: layout.weights(Part.LLM).tensors(), Part.TOWER: named}
    if checkpoint.projector_weights():
        parts[Part.PROJECTOR] = layout.weights(Part.PROJECTOR).tensors()
    save_checkpoint(layout, parts, target, layout.style)
    report = Report(
        part="tower",
        made=MADE,
        layers=layers,
        facts={
            "source": checkpoint.name,
            "vision_revision": checkpoint.vision_revision,
            "alpha": plan.alpha,
            "tiles": len(seen),
            "held_out_tiles": len(held_out),
            "mixture": plan.data.mixture,
            "media": len(plan.data.media),
            "arithmetic": ops.name,
            "bytes_before": sum(tensor.nbytes for tensor in stored.values()),
            "bytes_after": sum(tensor.nbytes for tensor in named.values()),
        },
    )
    write_report(report, checkpoint.path, target)
    return report


def int8_weights(tower: Tower) -> dict[str, Tensor]:
    """Of a tower that is smoothed already: its linears' values, scales and biases, and its norms."""
    parameters = dict(tower.named_parameters())
    weights = {name: tensor.detach() for name, tensor in parameters.items() if "layer_norm" in name}
    for name in int8_linears(len(tower.encoder.layers)):
        quantised = quantise_weight(parameters[f"{name}.weight"].detach())
        weights[f"{name}.weight"] = quantised.values_OI
        weights[f"{name}.{SCALE}"] = quantised.scale_O[:, None]
    return weights


def measure(tower: Tower, tiles_N3SS: Tensor, progress: Progress) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of every linear, over all tiles."""
    maxima: dict[str, Tensor] = {}
    for done, tiles in _batches(tiles_N3SS, tower):
        for name, found_I in activation_maxima(tower, tiles).items():
            maxima[name] = torch.maximum(maxima[name], found_I) if name in maxima else found_I
        progress("measuring activations", done, len(tiles_N3SS))
    return maxima


@torch.inference_mode()
def compare(
    tower: Tower,
    smoothed: Tower,
    made: Int8Tower,
    maxima: Mapping[str, Tensor],
    held_out_N3SS: Tensor,
    progress: Progress,
) -> dict[str, list[LayerError]]:
    """What comes out of every block, against the original, in the way that is kept and in two others: one scale per
    tensor found in calibration (`maxima`, of the smoothed tower), and per token without smoothing."""
    blocks = len(tower.encoder.layers)
    ways = (MADE, "per tensor, static", "per token, not smoothed")
    tallies = {way: [Tally() for _ in range(blocks)] for way in ways}
    for done, tiles in _batches(held_out_N3SS, tower):
        wanted = _states(tower, tiles)
        found = {MADE: made.states(tiles)[1:]}
        with simulated(smoothed, maxima):
            found[ways[1]] = _states(smoothed, tiles)
        with simulated(tower, None):
            found[ways[2]] = _states(tower, tiles)
        for way, states in found.items():
            for tally, one, other in zip(tallies[way], wanted, states, strict=True):
                tally.add(one, other)
        progress("comparing layers", done, len(held_out_N3SS))
    return {way: [tally.result() for tally in found] for way, found in tallies.items()}


@contextmanager
def simulated(tower: Tower, maxima: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The tower's linears on rounded weights and inputs while the block lasts: one scale per tensor, of `maxima`, or
    per token where there are none."""
    originals: dict[nn.Linear, Tensor] = {}

    def rounded(largest: Tensor | None, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        scale = (x.abs().amax(-1, keepdim=True) if largest is None else largest).clamp(min=1e-12) / LEVELS
        return (torch.round(x / scale).clamp(-LEVELS, LEVELS) * scale,)

    with ExitStack() as closing:
        for name in int8_linears(len(tower.encoder.layers)):
            linear: nn.Module = tower.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            originals[linear] = linear.weight.data
            linear.weight.data = quantise_weight(linear.weight.data).dequantise()
            largest = None if maxima is None else maxima[name].amax()
            closing.callback(linear.register_forward_pre_hook(partial(rounded, largest)).remove)
        try:
            yield
        finally:
            for changed, weight in originals.items():
                changed.weight.data = weight


def _states(tower: Tower, tiles_N3SS: Tensor) -> list[Tensor]:
    states: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for block in tower.encoder.layers:
            hooks.callback(block.register_forward_hook(keep).remove)
        tower(tiles_N3SS)
    return states


def _batches(tiles_N3SS: Tensor, tower: Tower) -> Iterator[tuple[int, Tensor]]:
    """How many are done with it, and a batch on the tower's device."""
    device = tower.embeddings.patch_embedding.weight.device
    done = 0
    for tiles in torch.split(tiles_N3SS, TILES_AT_ONCE):
        done += len(tiles)
        yield done, tiles.to(device)


def _float_tower(checkpoint: Checkpoint, stored: Mapping[str, Tensor], device: torch.device) -> Tower:
    """In float32, on copies that may be written to."""
    config = checkpoint.config
    with torch.device("meta"):
        tower = Tower(config.tower, config.tower_px)
    tower.load({name: tensor.to(device, torch.float32, copy=True) for name, tensor in stored.items()})
    tower.embeddings.position_ids = tower.embeddings.position_ids.to(device)
    return tower.eval().requires_grad_(False)
