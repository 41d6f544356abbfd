"""The made-up checkpoint, opened once, and pictures to give it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nvila.golden.inputs import synthetic
from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.tiny import make_random_checkpoint

torch.set_num_threads(1)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "nvila-tiny")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny_path)


@pytest.fixture(scope="session")
def encoder(tiny: Checkpoint) -> VisionEncoder:
    return VisionEncoder.from_checkpoint(tiny)


def picture(width: int, height: int, seed: int = 1) -> NDArray[np.uint8]:
    """One frame (1, height, width, 3)."""
    return synthetic("waves", width, height, seed)[None]


def clip(frames: int, side: int, seed: int = 1) -> NDArray[np.uint8]:
    """(frames, side, side, 3)."""
    return np.concatenate([picture(side, side, seed + i) for i in range(frames)])


def make_static_s2(folder: Path, **keys: Any) -> Path:
    """`nvila-tiny-s2` as a model with static S2: the same weights and scales (56, 112 and 168 px), other words."""
    shutil.copytree(GOLDEN / "e2e" / "nvila-tiny-s2", folder)
    config = folder / "config.json"
    words = {"s2": True, "dynamic_s2": False, "image_aspect_ratio": "resize", "s2_resize_output_to_scale_idx": 0}
    config.write_text(json.dumps(json.loads(config.read_text()) | words | keys))
    return folder
