"""`nvila train data` and `nvila evaluate` from the command line to their files and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvila.cli.main import main
from nvila.model.checkpoint import Checkpoint
from nvila.model.tiny import make_random_checkpoint
from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.data.listing import write_listing

KNOBS = Knobs(canvas_px=96, text_px=(8, 16), video_px=48, clip_s=(3.0, 4.0))
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
    assert "own.jsonl:2: `image` must be a file's name" in capsys.readouterr().out


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


def test_a_gate_also_bounds_how_many_answers_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    answer = {"task": "a.b", "metric": "exact", "question": "q", "right": "x", "score": 0.0}
    for path, last in ((a, "red"), (b, "blue")):
        said = ["red"] * 99 + [last]
        lines = [answer | {"name": f"set:{i}", "answer": text} for i, text in enumerate(said)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = ["evaluate", "--compare", str(a), str(b), "--max-loss", "0"]

    assert main([*compared, "--min-agreement", "99"]) == 0
    assert main([*compared, "--min-agreement", "99.5"]) == 1
    assert "99.0 % of the answers are equal; at least 99.5 %" in capsys.readouterr().err
    b.write_text(b.read_text().splitlines()[0] + "\n")
    assert main(compared) == 3
    assert main([*compared, "--token-dtype-b", "int8"]) == 3
    assert main(["evaluate", str(tmp_path), "--min-agreement", "99"]) == 3
    assert "name them with --compare" in capsys.readouterr().err


def test_checkpoints_are_compared_each_with_its_own_tokens_and_what_cannot_be_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(make_random_checkpoint(tmp_path / "tiny"))
    write_listing(tmp_path / "own-test.json", [make_sample("when", Split.TEST, 0, 0, KNOBS)], media_folder="media")
    whole = (tmp_path / "own-test.json").read_text()
    (tmp_path / "own-test.json").write_text(whole.rstrip().removesuffix("]") + ",\n{cut off")
    asked = ["evaluate", str(tmp_path), "--compare", checkpoint, checkpoint, "--device", "cpu", "--max-tokens", "3"]

    assert main([*asked, "--token-dtype-b", "int8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["differences"][-1]["samples"] == 1
    assert len(report["left_out"]) == 1
    assert report["left_out"][0].startswith("own-test.json:4: wrong JSON")

    asked = ["evaluate", str(tmp_path), "--model", checkpoint, "--max-tokens", "3", "--json"]
    assert main([*asked, "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frames"] == Checkpoint.open(checkpoint).config.default_frames
    assert len(report["left_out"]) == 1
    assert main([*asked, "--device", "tpu"]) == 3
    assert "--device tpu: no such kind" in capsys.readouterr().out


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
