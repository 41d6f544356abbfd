"""A checkpoint whose tower is put into 8 bits: what is written, how near it stays, what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.errors import InvalidCheckpoint, InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.int8_cpu import FLOAT
from nvila.model.layouts import LayoutStyle
from nvila.model.save import convert_checkpoint
from nvila.model.tiny import make_random_checkpoint
from nvila.model.verify import verify
from nvila.quantize.calibration import Data, collect_tiles
from nvila.quantize.checks import find_device
from nvila.quantize.report import FOLDER, Report
from nvila.quantize.tower import MADE, TowerPlan, quantise_tower
from nvila.train.model import TrainableNvila
from tests.quantize.conftest import CPU

Made = tuple[Checkpoint, Report]

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "waves"}]


def test_every_layer_stays_near_its_original_on_pictures_held_out(made: Made) -> None:
    _, report = made

    layers = report.layers[MADE]

    assert len(layers) == 3  # the tiny tower has four blocks, of which NVILA computes three
    assert min(layer.cosine for layer in layers) > 0.995
    assert min(layer.lowest for layer in layers) > 0.99
    assert all(0 < layer.error < 0.05 for layer in layers)


def test_the_report_compares_with_static_scales_and_without_smoothing(made: Made) -> None:
    _, report = made

    assert list(report.layers) == [MADE, "per tensor, static", "per token, not smoothed"]
    assert report.layers[MADE][-1].error < report.layers["per tensor, static"][-1].error


def test_features_of_the_saved_tower_are_near_the_originals(tiny: Checkpoint, made: Made, data: Data) -> None:
    tiles = collect_tiles(tiny.config, data, 4, is_held_out=True)

    wanted, got = (VisionEncoder.from_checkpoint(one, ops=FLOAT).tower(tiles) for one in (tiny, _opened(made)))

    assert float(torch.cosine_similarity(wanted, got, dim=-1).min()) > 0.99


def test_the_saved_tower_is_a_quarter_of_float32(made: Made) -> None:
    checkpoint, report = made

    weights = load_file(checkpoint.path / "vision_tower" / "model.safetensors")

    name = "vision_model.encoder.layers.0.mlp.fc1"
    assert weights[f"{name}.weight"].dtype == torch.int8
    assert weights[f"{name}.weight_scale"].shape == (256, 1)
    assert report.facts["bytes_after"] == sum(tensor.nbytes for tensor in weights.values())
    assert int(report.facts["bytes_after"]) < 0.4 * int(report.facts["bytes_before"])


def test_cache_keys_tell_the_precisions_apart(tiny: Checkpoint, made: Made) -> None:
    assert _opened(made).vision_revision != tiny.vision_revision


def test_it_is_verified_and_converted_like_any_other(made: Made, tmp_path: Path) -> None:
    checkpoint, _ = made

    flat = convert_checkpoint(checkpoint.layout, tmp_path / "flat", LayoutStyle.HF)

    assert [finding.problem for finding in verify(checkpoint)] == [None] * 5
    assert Checkpoint.open(flat).has_int8_tower
    assert Checkpoint.open(flat).vision_revision == checkpoint.vision_revision


def test_the_report_is_kept_in_the_checkpoint_with_a_picture(made: Made) -> None:
    checkpoint, report = made
    folder = checkpoint.path / FOLDER

    assert Report.read(folder / "tower.json") == report
    assert (folder / "tower.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_held_out_was_not_calibrated_with(tiny: Checkpoint, data: Data) -> None:
    seen, held_out = (collect_tiles(tiny.config, data, 8, is_held_out=side) for side in (False, True))

    assert not any(torch.equal(one, other) for one in seen for other in held_out)


def test_no_sample_of_small_data_is_both_calibrated_with_and_held_out(pictures: Path, tmp_path: Path) -> None:
    """However often they are gone through."""
    folder = Path(shutil.copytree(pictures, tmp_path / "own"))
    records = [{"image": path.name, "conversations": TURNS} for path in sorted(folder.glob("*.png"))]
    (folder / "own.json").write_text(json.dumps(records))
    data = Data(mixture=f"{folder}::own")

    seen, held_out = ({one.index for one in islice(data.samples(is_held_out=side), 12)} for side in (False, True))

    assert (seen, held_out) == ({0, 2, 4}, {1, 3, 5})
    (folder / "own.json").write_text(json.dumps(records[:1]))
    assert list(data.samples(is_held_out=True)) == []


def test_rendered_pages_are_taken_where_nothing_is_named(tiny: Checkpoint) -> None:
    tiles = collect_tiles(tiny.config, Data(mixture="synthetic:documents"), 6, is_held_out=False)

    assert tuple(tiles.shape) == (6, 3, 112, 112)


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(checkpoint: Checkpoint, data: Data, target: Path) -> None:
    """Nothing may be left of it."""
    quantise_tower(checkpoint, target, TowerPlan(data=data, device=CPU, tiles=8, held_out=2), FLOAT)


def test_too_little_to_calibrate_with_is_refused(tiny: Checkpoint, pictures: Path, tmp_path: Path) -> None:
    one = Data(media=(pictures / "0.png",), mixture="")

    with pytest.raises(InvalidRequest, match=r"needs 8 tiles at least, the data that were named give 4"):
        refused(tiny, one, tmp_path / "out")
    with pytest.raises(InvalidRequest, match="there is no such file"):
        refused(tiny, Data(media=(tmp_path / "none.png",)), tmp_path / "out")
    with pytest.raises(InvalidRequest, match="no picture or video in this folder"):
        refused(tiny, Data(media=(tmp_path,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_number_is_named(data: Data, tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / "bad")
    file = folder / "vision_tower" / "model.safetensors"
    weights = load_file(file)
    weights["vision_model.encoder.layers.1.mlp.fc2.weight"][3, 5] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(InvalidCheckpoint, match=r"encoder\.layers\.1\.mlp\.fc2\.weight.*not numbers"):
        refused(Checkpoint.open(folder), data, tmp_path / "out")


def test_a_tower_in_8_bits_is_not_quantised_again_nor_trained(made: Made, data: Data, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="in 8 bits already"):
        refused(_opened(made), data, tmp_path / "out")
    with pytest.raises(InvalidCheckpoint, match="is quantised; train its original"):
        TrainableNvila.load(_opened(made))


def test_a_folder_that_is_there_is_kept(tiny: Checkpoint, data: Data, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("work")

    with pytest.raises(InvalidRequest, match="something is there already"):
        refused(tiny, data, tmp_path)


def test_another_quantisation_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_random_checkpoint(tmp_path / "other")
    config = folder / "vision_tower" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))

    with pytest.raises(InvalidCheckpoint, match="quantised in a way that is not known here"):
        Checkpoint.open(folder).tower_weights()


def test_scales_that_are_missing_are_named(made: Made, tmp_path: Path) -> None:
    folder = convert_checkpoint(_opened(made).layout, tmp_path / "copy", LayoutStyle.VILA)
    file = folder / "vision_tower" / "model.safetensors"
    weights = load_file(file)
    del weights["vision_model.encoder.layers.0.mlp.fc1.weight_scale"]
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(InvalidCheckpoint, match=r"missing vision_model\.encoder\.layers\.0\.mlp\.fc1\.weight_scale"):
        VisionEncoder.load(folder)


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"--device {name}"):
        find_device(name)


def _opened(made: Made) -> Checkpoint:
    return made[0]
