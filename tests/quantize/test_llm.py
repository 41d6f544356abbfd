"""A checkpoint whose language model is put into four bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.errors import InvalidCheckpoint, InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.model.layouts import LayoutStyle
from nvila.model.save import convert_checkpoint
from nvila.model.summary import summarise
from nvila.model.tiny import make_random_checkpoint
from nvila.model.unpack import widen_llm
from nvila.model.verify import verify
from nvila.quantize.calibration import Data
from nvila.quantize.llm import MADE, NEAREST, LlmPlan, quantise_llm
from nvila.quantize.report import FOLDER, Report
from tests.quantize.conftest import CPU

Made = tuple[Checkpoint, Report]
PLAN = LlmPlan(data=Data(mixture="synthetic:documents+shapes"), device=CPU, blocks=2, positions=256, held_out=2)


@pytest.fixture(scope="module")
def packed(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Made:
    target = tmp_path_factory.mktemp("made") / "nvila-tiny-w4"
    report = quantise_llm(tiny, target, PLAN)
    return Checkpoint.open(target), report


def test_searching_beats_rounding_to_nearest(packed: Made) -> None:
    _, report = packed

    assert len(report.layers[MADE]) == 3
    assert report.layers[MADE][-1].error < report.layers[NEAREST][-1].error
    assert report.worst_cosine > 0.97  # random weights, which no trained model's redundancy helps


def test_most_positions_of_the_calibration_are_visual(packed: Made) -> None:
    _, report = packed

    assert float(report.facts["visual_share"]) > 0.5


def test_what_is_saved_is_what_was_reported(tiny: Checkpoint, packed: Made) -> None:
    checkpoint, report = packed

    config = json.loads((checkpoint.path / "llm" / "config.json").read_text())
    weights = load_file(checkpoint.path / "llm" / "model.safetensors")

    assert config["quantization_config"]["quant_method"] == "awq"
    assert weights["model.layers.0.mlp.down_proj.qweight"].shape == (512, 256 // 8)
    assert "model.layers.0.mlp.down_proj.weight" not in weights
    assert report.facts["bytes_after"] == sum(tensor.nbytes for tensor in weights.values())
    assert Report.read(checkpoint.path / FOLDER / "llm.json") == report
    assert checkpoint.vision_revision == tiny.vision_revision  # the tower is the same, and so are its tokens
    checkpoint.check_llm()


def test_it_is_verified_and_converted_like_any_other(packed: Made, tmp_path: Path) -> None:
    checkpoint, _ = packed

    flat = Checkpoint.open(convert_checkpoint(checkpoint.layout, tmp_path / "flat", LayoutStyle.HF))

    assert [finding.problem for finding in verify(checkpoint)] == [None] * 5
    assert flat.has_int4_llm
    flat.check_llm()


def test_without_kernels_it_is_written_out_in_16_bits_once(packed: Made, tmp_path: Path) -> None:
    checkpoint, _ = packed

    folder = widen_llm(checkpoint.layout, tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again = widen_llm(checkpoint.layout, tmp_path)

    dense = replace(
        checkpoint.layout,
        llm=json.loads((folder / "config.json").read_text()),
        weights_at={**checkpoint.layout.weights_at, "llm": (folder, "")},
    )
    assert again == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "quantization_config" not in dense.llm
    Checkpoint(dense).check_llm()


def test_it_has_as_many_parameters_as_its_original(tiny: Checkpoint, packed: Made) -> None:
    wanted, got = ({m.name: m.parameters for m in summarise(one).modules} for one in (tiny, packed[0]))

    assert got == wanted


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_quantised_model_is_not_quantised_again(packed: Made, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="is quantised already"):
        quantise_llm(packed[0], tmp_path / "out", PLAN)


def test_groups_that_do_not_divide_are_refused_before_any_work(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="inputs in groups of 100"):
        quantise_llm(tiny, tmp_path / "out", replace(PLAN, group=100))


def test_too_little_to_calibrate_with_is_refused(tiny: Checkpoint, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="judged by 512 at least"):
        quantise_llm(tiny, tmp_path / "out", replace(PLAN, blocks=1))
    with pytest.raises(InvalidRequest, match="name more pictures or videos"):
        quantise_llm(tiny, tmp_path / "out", replace(PLAN, data=Data(media=(pictures,), mixture=""), blocks=64))
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / "bad")
    file = folder / "llm" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(InvalidCheckpoint, match=r"layers\.2\.mlp\.up_proj\.weight.*infinite"):
        quantise_llm(Checkpoint.open(folder), tmp_path / "out", PLAN)
