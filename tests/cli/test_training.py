"""`nvila train data` and `nvila evaluate` from the command line to their files and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvila.cli.main import main

TINY = ["--set", "canvas_px=96", "--set", "text_px=8..16", "--set", "video_px=48", "--set", "clip_s=3..4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered shards of two families."""
    folder = tmp_path_factory.mktemp("data")
    counts = ["--train", "12", "--validation", "0", "--test", "6", "--workers", "1"]
    assert main(["train", "data", str(folder), "--tasks", "shapes,when", *counts, *TINY]) == 0
    return folder


def test_shards_and_a_manifest_are_rendered(data: Path) -> None:
    assert sorted(path.name for path in data.glob("*.tar")) == [
        "shapes-test-00000.tar",
        "shapes-train-00000.tar",
        "when-test-00000.tar",
        "when-train-00000.tar",
    ]
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["knobs"]["video_px"] == 48
    assert "Crimson Text" in manifest["held_out_fonts"]


def test_good_data_pass_the_check_and_a_broken_record_fails_it_by_file_and_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "data", str(data), "--check", "shapes+when"]) == 0
    (tmp_path / "own.jsonl").write_text('{"conversations": [{"from": "human", "value": "hi"}]}\n{"image": 1}\n')

    assert main(["train", "data", str(tmp_path), "--check", "own"]) == 3
    assert "own:2: `image` must be a file's name" in capsys.readouterr().out


def test_files_are_written_for_people_and_other_programs(tmp_path: Path) -> None:
    counts = ["--train", "0", "--validation", "0", "--test", "2", "--files"]

    assert main(["train", "data", str(tmp_path), "--tasks", "pairs,when", *counts, *TINY]) == 0

    records = json.loads((tmp_path / "when-test.json").read_text())
    assert (tmp_path / records[0]["video"]).stat().st_size > 0
    assert records[0]["conversations"][0]["value"].startswith("<video>\n")
    assert len(json.loads((tmp_path / "pairs-test.json").read_text())[0]["images"]) in (2, 3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tasks", "poems"], "no task family 'poems'"),
        (["--set", "colour=1"], "no knob 'colour'"),
        (["--set", "objects=many"], "'many' is no int"),
        (["--set", "clip_s=4"], "expected LOW..HIGH"),
    ],
)
def test_wrong_wishes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(["train", "data", str(tmp_path), *arguments]) == 3
    assert reason in capsys.readouterr().err


def test_baselines_are_scored_compared_and_gated(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")

    assert main(["evaluate", str(data), "--baseline", "statistics", "--out", a, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"shapes", "when", "all"} <= {score["name"] for score in report["scores"]}
    assert main(["evaluate", str(data), "--baseline", "chance", "--out", b]) == 0
    assert main(["evaluate", "--compare", a, a, "--max-loss", "0"]) == 0
    lines = [json.loads(line) | {"score": 0.0, "answer": ""} for line in Path(a).read_text().splitlines()]
    Path(b).write_text("\n".join(map(json.dumps, lines)) + "\n")

    capsys.readouterr()
    assert main(["evaluate", "--compare", a, b, "--max-loss", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differences"][-1]["loss"] > 0.01


def test_a_folder_without_test_data_is_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 5
    assert "has no test data" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_on_a_gpu_that_is_not_there_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text("{}")
    start = ["--from", str(tmp_path / "start"), "--out", str(tmp_path / "runs")]

    assert main(["train", "recipe", "toy-smoke", *start, "--device", "cuda"]) == 3
    assert "--device cuda: 0 CUDA devices are here" in capsys.readouterr().err
