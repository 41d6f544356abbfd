"""The made-up checkpoint, quantised once, with pictures and a clip of its own to calibrate with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvila.golden.inputs import synthetic
from nvila.model.checkpoint import Checkpoint
from nvila.model.int8_cpu import FLOAT
from nvila.model.tiny import make_random_checkpoint
from nvila.quantize.calibration import Data
from nvila.quantize.report import Report
from nvila.quantize.tower import TowerPlan, quantise_tower

torch.set_num_threads(1)

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "nvila-tiny"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files: every other one is held out."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(6):
        rgb_HW3: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = synthetic("waves", 300 + 40 * seed, 260, seed)
        Image.fromarray(rgb_HW3).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def data(pictures: Path) -> Data:
    return Data(media=(pictures,), mixture="")


@pytest.fixture(scope="session")
def made(tiny: Checkpoint, data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Report]:
    """With its tower in 8 bits, and the report."""
    target = tmp_path_factory.mktemp("made") / "nvila-tiny-w8a8"
    report = quantise_tower(tiny, target, TowerPlan(data=data, device=CPU, tiles=8, held_out=8), FLOAT)
    return Checkpoint.open(target), report
