"""Every recorded number of the reference that is kept under tests/data/golden, and how a folder of them is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.golden.__main__ import main
from nvila.golden.compare import Case, Check, close, near, run
from nvila.golden.folder import MANIFEST, READERS, recorded_files

torch.set_num_threads(1)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FILES = list(recorded_files(GOLDEN))
CASES = [case for file in FILES for case in file.cases]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_equals_the_recorded_reference(case: Case) -> None:
    assert run(case).problems == ()


def test_every_kind_of_recorded_file_is_kept_with_the_tests() -> None:
    too_large = {"awq_search"}  # 2 MB: tests/model/test_awq_search.py makes its own

    assert {file.name for file in FILES if "/" not in file.name} == set(READERS) - too_large


def a_folder(tmp_path: Path, *stems: str) -> Path:
    for stem in stems:
        for path in GOLDEN.glob(f"{stem}.*"):
            shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def output(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = main([str(folder)])
    return status, capsys.readouterr().out.splitlines()


def test_the_program_counts_what_matched_and_what_missed(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, "pos_embed_resize")
    path = folder / "pos_embed_resize.json"
    path.write_text(path.read_text().replace('"new_resolution":84', '"new_resolution":98', 1))

    command = [sys.executable, "-m", "nvila.golden", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 matched, 1 missed"
    assert "case0: table has shape" in done.stdout


def test_a_file_of_no_known_kind_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_folder(tmp_path, "time_tokens")
    save_file({"x": torch.zeros(1)}, folder / "novelty.safetensors")

    status, lines = output(folder, capsys)

    assert status == 1
    assert "novelty: this recording is of no known kind" in lines
    assert lines[-1].endswith(" 1 missed")


def test_a_file_that_cannot_be_read_is_missed_and_the_rest_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_folder(tmp_path, "time_tokens")
    (folder / "chessboard.json").write_text("{")

    status, lines = output(folder, capsys)

    assert status == 1
    assert any(line.startswith("chessboard: the file cannot be read") for line in lines)
    assert not any("time_tokens: 0 matched" in line for line in lines)


def test_a_recorded_tensor_that_no_case_looks_at_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_folder(tmp_path, "pos_embed_resize")
    path = folder / "pos_embed_resize.safetensors"
    save_file(load_file(path) | {"case0.more": torch.zeros(1)}, path)

    status, lines = output(folder, capsys)

    assert status == 1
    assert "pos_embed_resize/tensors: 1 recorded tensors were not compared: case0.more" in lines


def test_a_part_of_a_file_that_no_case_knows_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_folder(tmp_path, "time_tokens")
    path = folder / "time_tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": [{"text": "<1>"}]}))

    assert "time_tokens/more: this recording is of no known kind" in output(folder, capsys)[1]


def test_a_listed_file_that_is_missing_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_folder(tmp_path, "time_tokens")
    (folder / MANIFEST).write_text(json.dumps({"files": {"gone.json": {}, "time_tokens.json": {}}}))

    assert f"{MANIFEST}: gone.json is listed and missing" in output(folder, capsys)[1]


def test_a_checkpoint_that_the_folder_lacks_is_found_where_the_caller_says(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, "conversation")

    def missed(*checkpoints: Path) -> list[str]:
        cases = [case for file in recorded_files(folder, checkpoints) for case in file.cases]
        return [problem for case in cases for problem in run(case).problems]

    assert "nvila-tiny-s2/llm" in missed()[0]
    assert missed(GOLDEN / "e2e") == []


def test_an_empty_folder_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(tmp_path, capsys) == (1, ["0 matched, 0 missed"])


def test_a_case_without_a_comparison_is_missed() -> None:
    assert run(Case("empty", lambda: iter([]))).problems == ("nothing was compared",)


def test_an_error_is_a_problem() -> None:
    assert run(Case("broken", lambda: iter([Check(str(1 // 0))]))).problems[0].startswith("ZeroDivisionError")


def test_what_is_not_a_number_never_matches() -> None:
    nan = torch.tensor([float("nan")])

    assert next(close("x", nan, torch.zeros(1), atol=1.0)).problem
    assert next(near("x", nan, torch.zeros(1), tolerance=1.0)).problem
