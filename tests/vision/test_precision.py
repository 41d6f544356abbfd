"""NVILA_VISION_PRECISION: what it asks for is had, or the service does not start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvila.errors import InvalidCheckpoint, InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.model.int8_layout import QUANTIZATION
from nvila.model.tiny import make_random_checkpoint
from nvila.vision.precision import choose_precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = make_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def small(whole: Checkpoint) -> Checkpoint:
    """Its words only: nothing here reads the weights."""
    return Checkpoint(replace(whole.layout, tower={**whole.layout.tower, "quantization_config": QUANTIZATION}))


def test_a_checkpoint_decides(whole: Checkpoint, small: Checkpoint) -> None:
    assert choose_precision("auto", whole, CPU) is None
    assert choose_precision("auto", small, CPU) is not None


def test_8_bits_without_calibration_are_refused(whole: Checkpoint) -> None:
    with pytest.raises(
        InvalidCheckpoint, match="was not calibrated for it: make a checkpoint with `nvila quantize tower`"
    ):
        choose_precision("int8", whole, CPU)


def test_8_bits_are_refused_on_a_device_without_them(small: Checkpoint) -> None:
    with pytest.raises(InvalidRequest, match="not on 'meta'"):
        choose_precision("int8", small, torch.device("meta"))


def test_8_bits_that_do_not_pay_are_refused_when_they_were_asked_for(
    small: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvila.model import int8_cpu

    monkeypatch.setattr(int8_cpu, "is_exact", lambda _: False)

    assert choose_precision("auto", small, CPU) is int8_cpu.FLOAT
    with pytest.raises(InvalidRequest, match=r"8-bit products do not pay on this processor: .* adds products wrongly"):
        choose_precision("int8", small, CPU)
