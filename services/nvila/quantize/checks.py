"""What would make a quantisation worthless, found before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nvila.errors import InvalidCheckpoint, InvalidRequest
from nvila.model.verify import is_finite


def check_finite(part: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `InvalidCheckpoint` naming the first tensor with a value that is infinite or not a number."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise InvalidCheckpoint(f"{part}: tensor {name!r} holds values that are infinite or not numbers")


def check_target(target: Path) -> None:
    """Raises `InvalidRequest` when something is there."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidRequest(f"{target.name}: something is there already; name a new folder")


def find_device(named: str | None) -> torch.device:
    """The device of this name, or the best there is. Raises `InvalidRequest` for one that is not here."""
    if named is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(named)
    except RuntimeError as error:
        raise InvalidRequest(f"--device {named}: no such kind of device; cpu, cuda and cuda:N are known") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"--device {named}: cpu, cuda and cuda:N are known")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(f"--device {named}: {torch.cuda.device_count()} CUDA devices are here")
    return device
