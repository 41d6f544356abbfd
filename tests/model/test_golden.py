"""Every recorded number of the reference that is kept under tests/data/golden."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvila.model.golden import Case, cases, differences
from tests.model.conftest import GOLDEN

CASES = list(cases(GOLDEN))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_equals_the_recorded_reference(case: Case) -> None:
    with torch.no_grad():
        assert differences(case) == []


def test_every_recorded_file_about_the_model_has_cases() -> None:
    kinds = {case.name.partition("/")[0] for case in CASES}

    elsewhere = {"frame_sampling"}  # tests/video
    assert kinds == {path.stem for path in GOLDEN.glob("*.json")} - elsewhere | {"e2e"}


def test_the_program_counts_what_matched_and_what_missed(tmp_path: Path) -> None:
    wrong = (GOLDEN / "pos_embed_resize.json").read_text().replace('"new_resolution":84', '"new_resolution":98', 1)
    (tmp_path / "pos_embed_resize.json").write_text(wrong)
    (tmp_path / "pos_embed_resize.safetensors").write_bytes((GOLDEN / "pos_embed_resize.safetensors").read_bytes())

    command = [sys.executable, "-m", "nvila.model.golden", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 matched, 1 missed"
    assert "case0: table has shape" in done.stdout
