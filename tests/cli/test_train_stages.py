"""`nvila train finetune` and its kin from the command line to a checkpoint, as docs/training.md has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvila.cli.main import main
from nvila.model.checkpoint import Checkpoint
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.toy import texts

torch.set_num_threads(1)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Tuning a toy model on six conversations: of one the picture is missing, of another it is broken."""
    base = make_base(tmp_path / "base", TOY, learn_merges(texts(), 300))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    talk = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    images = ["good.png"] * 4 + ["gone.png", "bad.png"]
    records = ",\n".join(json.dumps({"image": name, "conversations": talk}) for name in images)
    (tmp_path / "qa.json").write_text(f"[\n{records}\n]")
    tuning = ["train", "finetune", "--model", str(base), "--data", f"{tmp_path}::qa", "--out", str(tmp_path / "runs")]
    tuning += ["--method", "full", "--tower", "frozen", "--rows", "1", "--row-positions", "64"]
    return [*tuning, "--device", "cpu", "--precision", "float32"]


def test_a_model_is_tuned_for_an_epoch_of_a_users_own_conversations(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--json"]) == 0

    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    result = steps.pop()
    assert steps[-1]["done"] == 1.0
    assert result["skipped"] == steps[-1]["skipped"] == 2
    assert result["samples"] == 4
    assert Checkpoint.open(result["model"]).config.llm.layers == 2


def test_bad_data_end_a_strict_run_by_file_and_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--strict"]) == 3

    assert "qa.json:6: there is no image 'gone.png'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--stop-after", "5"], ["--in-process"]])
def test_what_a_ray_cluster_cannot_do_is_refused(
    command: list[str], option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--workers", "2", *option]) == 3

    assert "not for a Ray cluster" in capsys.readouterr().err
