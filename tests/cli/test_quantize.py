"""`nvila quantize`, and `nvila evaluate --compare` of what it made: results, reports, exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvila.cli.main import main
from nvila.golden.inputs import synthetic
from nvila.model.checkpoint import Checkpoint
from nvila.model.tiny import make_random_checkpoint

torch.set_num_threads(1)

FEW = ["--tiles", "8", "--held-out", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(4):
        Image.fromarray(synthetic("waves", 320, 240, seed)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test set of six questions in a conversation list."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(6):
        name = f"{number % 4}.png"
        (folder / name).write_bytes((pictures / name).read_bytes())
        turns = [{"from": "human", "value": f"<image>\nQuestion {number}?"}, {"from": "gpt", "value": "waves"}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "asked.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def made(tiny: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "w8a8"
    assert main(["quantize", "tower", str(tiny), str(target), "--media", str(pictures), *FEW]) == 0
    return target


def test_a_tower_is_put_into_8_bits(made: Path) -> None:
    assert Checkpoint.open(made).has_int8_tower
    assert json.loads((made / "quantization" / "tower.json").read_text())["facts"]["media"] == 1
    assert (made / "quantization" / "tower.png").is_file()


def test_a_bound_on_the_error_fails_a_build(
    tiny: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "tower", str(tiny), "--media", str(pictures), *FEW, "--json"]

    assert main([*command, str(tmp_path / "a"), "--min-cosine", "0.9"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main([*command, str(tmp_path / "b"), "--min-cosine", "0.9999999"]) == 1

    assert told["made"] == "per token"
    assert len(told["layers"]["per token"]) == 3


@pytest.mark.parametrize(
    ("action", "status"), [(["tower", "--device", "tpu"], 3), (["llm", "--group", "100"], 3), (["tower"], 3)]
)
def test_what_cannot_be_done_is_said_before_any_work(
    tiny: Path, made: Path, tmp_path: Path, action: list[str], status: int
) -> None:
    verb, *options = action
    source = tiny if options else made  # in 8 bits already

    assert main(["quantize", verb, str(source), str(tmp_path / "out"), *options]) == status
    assert not (tmp_path / "out").exists()


def test_two_checkpoints_are_asked_and_compared(
    tiny: Path, made: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["evaluate", str(data), "--tasks", "asked", "--max-tokens", "3", "--device", "cpu", "--json"]

    assert main([*ask, "--compare", str(tiny), str(made), "--max-loss", "0"]) == 0

    (difference,) = json.loads(capsys.readouterr().out)["differences"]
    assert difference["samples"] == 6
    assert 0 <= difference["agreement"] <= 1


def test_tokens_of_8_bits_are_asked_too(tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["evaluate", str(data), "--tasks", "asked", "--model", str(tiny), "--max-tokens", "2", "--device", "cpu"]

    assert main([*ask, "--token-dtype", "int8", "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["samples"] == 6


def test_comparing_with_nothing_is_said(tmp_path: Path) -> None:
    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 5
