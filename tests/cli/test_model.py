"""`nvila model`: what is printed, and what the exit status says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.cli.main import main
from nvila.model.layouts import LayoutStyle, read_layout
from nvila.model.save import convert_checkpoint
from tests.model.conftest import make_static_s2

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
S2, LITE, VIDEO = (GOLDEN / "e2e" / f"nvila-tiny-{name}" for name in ("s2", "lite", "video"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["model", *map(str, arguments)])
    return status, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    status, out = run(capsys, *arguments, "--json")
    return status, json.loads(out)


def test_inspect_tells_configuration_parameters_tokens_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = run_json(capsys, "inspect", S2)
    modules = {module["name"]: module for module in said["modules"]}

    assert status == 0
    assert (said["name"], said["layout"]) == ("nvila-tiny-s2", "vila")
    assert said["config"]["projector_type"] == "mlp_downsample"
    assert list(modules) == ["llm embeddings", "llm blocks", "llm head", "vision_tower", "mm_projector"]
    stored = [
        t
        for part in ("llm", "vision_tower", "mm_projector")
        for t in load_file(S2 / part / "model.safetensors").values()
    ]
    assert sum(module["parameters"] for module in modules.values()) == sum(t.numel() for t in stored)
    assert sum(module["stored_bytes"] for module in modules.values()) == sum(t.nbytes for t in stored)
    memory = modules["llm blocks"]["memory_bytes"]
    assert memory["float32"] == 2 * memory["bfloat16"] > 2 * memory["int8"] > 2 * memory["w4"]
    wide = next(image["cost"] for image in said["images"] if (image["width_px"], image["height_px"]) == (1280, 720))
    assert (wide["grid"], wide["tiles"], wide["tokens"], wide["positions"]) == ([4, 3], 17, 48, 49)
    assert [(video["frames"], video["cost"]["tokens"]) for video in said["videos"]][-1] == (256, 1024)


def test_memory_of_8_and_4_bits_counts_scales() -> None:
    """The W4 and int8 columns by hand: 3,584 × 3,584 takes half a byte each and 4 bytes per 128."""
    from nvila.model.summary import weight_bytes

    square = {"model.layers.0.self_attn.q_proj.weight": (3584, 3584)}
    assert weight_bytes(square, "w4") == 3584 * 3584 // 2 + 3584 * 28 * 4
    assert weight_bytes(square, "int8") == 3584 * 3584 + 3584 * 2
    assert weight_bytes({"model.embed_tokens.weight": (10, 4)}, "w4") == 80


def test_a_model_with_static_s2_is_inspected_converted_and_verified(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = make_static_s2(tmp_path / "static")
    status, out = run(capsys, "inspect", folder)
    assert status == 0
    assert "scales 56/112/168 in 56 px squares (static S2)" in " ".join(out.split())

    status, said = run_json(capsys, "inspect", folder)
    assert {tuple(image["cost"][key] for key in ("tiles", "tokens", "positions")) for image in said["images"]} == {
        (1, 4, 5)
    }
    assert [(video["frames"], video["cost"]["tokens"]) for video in said["videos"]][-1] == (256, 1024)

    for copy, style in (("flat", "hf"), ("back", "vila")):
        assert run(capsys, "convert", folder, tmp_path / copy, "--to", style)[0] == 0
        status, said = run_json(capsys, "verify", tmp_path / copy)
        assert (status, said["ok"], len(said["findings"])) == (0, True, 5)
        folder = tmp_path / copy


@pytest.mark.parametrize("path", [S2, LITE, VIDEO], ids=lambda path: path.name)
def test_inspect_prints_tables(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    status, out = run(capsys, "inspect", path)

    assert status == 0
    for title in (path.name, "Weights", "Tokens per image", "Tokens per video", "1920×1080", "bfloat16"):
        assert title in out


def test_convert_says_what_it_wrote_and_the_way_back_is_the_same_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out = run(capsys, "convert", LITE, tmp_path / "flat", "--to", "hf")
    assert status == 0
    assert "hf layout" in out
    assert "vision revision" in out
    assert (tmp_path / "flat" / "model.safetensors").exists()

    status, said = run_json(
        capsys, "convert", tmp_path / "flat", tmp_path / "back", "--to", "vila", "--shard-gb", "0.0001"
    )
    assert status == 0
    assert said["layout"] == "vila"
    assert len(list((tmp_path / "back" / "llm").glob("model-*.safetensors"))) > 1


def test_convert_does_not_write_over_something(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    status, said = run_json(capsys, "convert", LITE, tmp_path, "--to", "hf")

    assert status == 3
    assert "something is there already" in said["error"]["message"]


@pytest.mark.parametrize("style", LayoutStyle)
def test_verify_finds_nothing_wrong_with_a_whole_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, style: LayoutStyle
) -> None:
    status, said = run_json(capsys, "verify", convert_checkpoint(read_layout(VIDEO), tmp_path / "model", style))

    assert status == 0
    assert said["ok"]
    assert [finding["name"] for finding in said["findings"]] == [
        "tensors",
        "values",
        "tokens",
        "chat template",
        "picture",
    ]


def test_verify_names_a_weight_that_is_no_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = convert_checkpoint(read_layout(S2), tmp_path / "copy", LayoutStyle.VILA)
    weights = copy / "llm" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, weights)
    status, out = run(capsys, "verify", copy)

    assert status == 1
    assert "✗ values llm: tensor 'model.norm.weight' holds values that are infinite or not numbers" in " ".join(
        out.split()
    )


def test_verify_names_ids_that_disagree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flat = convert_checkpoint(read_layout(S2), tmp_path / "flat", LayoutStyle.HF)
    config = json.loads((flat / "config.json").read_text())
    (flat / "config.json").write_text(json.dumps(config | {"image_token_id": 151649}))
    status, said = run_json(capsys, "verify", flat)

    assert status == 1
    assert [f["problem"] for f in said["findings"] if f["problem"]] == [
        "config.json says image_token_id 151649, the tokenizer 426"
    ]


def test_verify_runs_recorded_cases_against_a_copy_of_another_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = convert_checkpoint(read_layout(LITE), tmp_path / "copy", LayoutStyle.VILA)
    status, said = run_json(capsys, "verify", copy, "--golden", GOLDEN, "--name", "nvila-tiny-lite")
    assert status == 0
    assert len(said["findings"]) == 3


def test_verify_against_recorded_cases_sees_other_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = convert_checkpoint(read_layout(LITE), tmp_path / "nvila-tiny-lite", LayoutStyle.VILA)
    weights = copy / "mm_projector" / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    status, said = run_json(capsys, "verify", copy, "--golden", GOLDEN)

    assert status == 1
    assert all("differs by" in finding["problem"] for finding in said["findings"])


def test_verify_names_the_recordings_that_there_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copy = convert_checkpoint(read_layout(LITE), tmp_path / "mine", LayoutStyle.VILA)
    status, said = run_json(capsys, "verify", copy, "--golden", GOLDEN)

    assert status == 3
    assert "no recording of 'mine'; there are: nvila-tiny-lite" in said["error"]["message"]


def test_a_model_that_is_none_is_an_error_with_a_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, said = run_json(capsys, "inspect", tmp_path)

    assert status == 3
    assert said["error"]["code"] == "invalid_checkpoint"
