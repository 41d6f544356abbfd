"""What a run can be stopped with and go on from: weights that learn, moments, chance, and places in the data.

A state is a folder that appears whole or not at all (`model.save.whole_folder`), and the one before it is removed only
after that; so whenever a process dies, the newest state is complete. Safetensors and JSON only.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvila.errors import InvalidCheckpoint
from nvila.model.save import save_part, whole_folder, write_json
from nvila.model.weights import Weights
from nvila.train.distributed import Ranks, fill, whole

WEIGHTS, MOMENTS, CHANCE = "weights", "moments", "chance"


@dataclass
class Progress:
    """How far a run is. `places`: of the data, also those whose samples were left out. `lanes`: of each lane, its
    source's position; keys are lane numbers."""

    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    positions: int = 0
    places: int = 0
    skipped: int = 0
    lanes: dict[str, dict[str, Any]] = field(default_factory=dict)


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, ranks: Ranks
) -> None:
    """Write `folder/step-<n>` and then remove older ones. Every process calls; the first one writes."""
    names = {id(p): name for name, p in model.named_parameters()}
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: whole(p.detach()).cpu() for name, p in learning.items()}
    moments: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                moments[f"{names[id(parameter)]}|{key}"] = _plain(whole(value)).cpu()
    chance = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        chance["cuda"] = torch.cuda.get_rng_state(ranks.device)
    if not ranks.is_first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{progress.step:08d}"
    if not target.exists():
        with whole_folder(target) as new:
            save_part(new / WEIGHTS, weights)
            save_part(new / MOMENTS, moments)
            save_part(new / CHANCE, chance)
            write_json(new / "progress.json", asdict(progress))
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def clean(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def newest_state(folder: Path) -> Path | None:
    return max(folder.glob("step-*"), default=None, key=lambda path: path.name)


def read_progress(state: Path) -> Progress:
    try:
        return Progress(**json.loads((state / "progress.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidCheckpoint(f"{state.name}/progress.json cannot be read: {error}") from error


def restore_state(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Put weights, moments and chance back. Raises `InvalidCheckpoint` for a state of another recipe."""
    restore_weights(state, model)
    _make_moments(optimizer)
    saved = Weights(state / MOMENTS)
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            if isinstance(value, Tensor):
                fill(value, saved.tensor(f"{names[id(parameter)]}|{key}"))
    chance = Weights(state / CHANCE)
    torch.set_rng_state(chance.tensor("cpu").clone())
    if ranks.device.type == "cuda" and "cuda" in chance:
        torch.cuda.set_rng_state(chance.tensor("cuda").clone(), ranks.device)


def restore_weights(state: Path, model: nn.Module) -> None:
    """Only what was learned. Raises `InvalidCheckpoint` for a state of another recipe."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = Weights(state / WEIGHTS).take({name: tuple(p.shape) for name, p in learning.items()})
    for name, tensor in weights.items():
        fill(learning[name], tensor)


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its moments, by a step at rate 0 with no gradient; what is in them is overwritten."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _plain(value: Tensor) -> Tensor:
    """Low-bit moments as ordinary numbers."""
    if type(value) is Tensor:
        return value
    plain: Tensor = value.dequantize()
    return plain
