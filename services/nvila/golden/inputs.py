"""What the recorded cases were given, where a recording does not hold it: pictures by formula, small configurations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvila.errors import InvalidRequest
from nvila.model.config import ImageMode, LlmConfig, NvilaConfig, TowerConfig, Wrap

FORMULAS = ("gradient", "waves", "checker", "hash")
"""Frame i of a recorded video is made by formula i mod 4."""


def synthetic(formula: str, width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """The recorded inputs, (height, width, 3): integer formulas of the golden README."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    s = seed
    if formula == "gradient":
        channels = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), ((x + y) * 7 + 13 * s) % 256]
    elif formula == "waves":
        channels = [(3 * x**2 + 5 * y + 17 * s) // 8, (x * y + 29 * s) // 4, (3 * y**2 + 11 * x + 31 * s) // 8]
    elif formula == "checker":
        k = 7 + s % 5
        channels = [(x // k + y // k) % 2 * 255, (x // (2 * k) + y // k) % 3 * 127, (x // k) * (y // (3 * k)) % 4 * 85]
    elif formula == "hash":
        mixed = [(73856093 * x) ^ (19349663 * y) ^ (83492791 * (c + 1)) ^ (2654435761 * s) for c in range(3)]
        channels = [(v % 2**32 * 2654435761) % 2**32 // 2**24 for v in mixed]
    else:
        raise InvalidRequest(f"unknown picture formula {formula!r}")
    rgb: NDArray[np.uint8] = np.stack(channels, -1).astype(np.uint8)
    return rgb


def shape(**changes: Any) -> NvilaConfig:
    """A small configuration for functions that need only some of it."""
    mode = changes.get("image_mode", ImageMode.RESIZE)
    scales = len(changes.get("s2_scales", ())) if mode is ImageMode.DYNAMIC_S2 else 1
    tower = TowerConfig(
        image_px=56, patch_px=14, width=8, mlp_width=8, layers=1, heads=1, norm_eps=1e-6, select_layer=-2
    )
    llm = LlmConfig(
        width=8,
        mlp_width=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_width=8,
        vocab=8,
        is_tied=False,
        max_positions=8,
        norm_eps=1e-6,
        rope_base=1e6,
    )
    base: dict[str, Any] = {"name": "", "tower": tower, "llm": llm, "image_mode": mode, "tile_px": 56}
    rest = {
        "projector_type": "mlp_downsample",
        "projector_width": 8 * scales,
        "image_wrap": Wrap(),
        "video_wrap": Wrap(),
    }
    return NvilaConfig(**(base | rest | changes))
