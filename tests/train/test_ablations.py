"""What the ablations compare, and how their variants are scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvila.train.ablations import STUDIES, held_out_scores
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.toy import texts

torch.set_num_threads(1)


def test_scores_are_kept_for_the_same_samples_only_with_precision_for_intervals(tmp_path: Path) -> None:
    model = make_base(tmp_path / "toy", TOY, learn_merges(texts(), 300))
    kept = tmp_path / "scores.json"

    first = held_out_scores(model, kept, ("when", "toy"), 1, 8)
    doctored = json.loads(kept.read_text())
    doctored["scores"]["toy"] = 55.0
    kept.write_text(json.dumps(doctored))

    assert list(first) == ["when", "when, P@0.5", "toy"]
    assert held_out_scores(model, kept, ("when", "toy"), 1, 8)["toy"] == 55.0
    assert held_out_scores(model, kept, ("when", "toy"), 2, 8)["toy"] in (0.0, 50.0, 100.0)
    kept.write_text(json.dumps({"when": 55.0, "toy": 55.0}))
    assert held_out_scores(model, kept, ("toy",), 1, 8)["toy"] in (0.0, 100.0)


def test_table_2_says_that_its_clips_are_shorter_than_256_frames() -> None:
    assert "at most 96 frames" in STUDIES["2"](1.0).note


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_table_5_says_why_it_has_no_qlora() -> None:
    study = STUDIES["5"](1.0)

    assert not any("qlora" in variant.label for variant in study.variants)
    assert "needs an NVIDIA GPU" in study.note
