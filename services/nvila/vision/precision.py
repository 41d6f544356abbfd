"""In which precision the tower is served: as its checkpoint stores it, or not at all."""

from __future__ import annotations

import torch

from nvila.errors import InvalidCheckpoint
from nvila.model.checkpoint import Checkpoint
from nvila.model.int8_tower import Int8Ops, choose_ops


def choose_precision(wanted: str, checkpoint: Checkpoint, device: torch.device) -> Int8Ops | None:
    """What computes the tower's linears in 8 bits; None for a tower that is not stored so. `wanted`: `auto` or `int8`.

    Raises `InvalidCheckpoint` or `InvalidRequest` where NVILA_VISION_PRECISION asks for what cannot be had.
    """
    must_win = wanted == "int8"
    if checkpoint.has_int8_tower:
        return choose_ops(device, checkpoint.config.tower, must_win=must_win)
    if must_win:
        raise InvalidCheckpoint(
            f"NVILA_VISION_PRECISION is int8, and the tower of {checkpoint.name} was not calibrated for it: "
            "make a checkpoint with `nvila quantize tower`"
        )
    return None
