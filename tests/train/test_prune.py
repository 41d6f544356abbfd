"""DeltaLoss and its baselines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.prune import prune, spread, top
from nvila.train.toy import texts

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, merges = tmp_path_factory.mktemp("models"), learn_merges(texts(), 300)
    return make_base(folder / "large", TOY, merges, seed=1), make_base(folder / "small", TOY, merges, seed=2)


def test_the_highest_scores_are_kept() -> None:
    assert top(np.array([0.1, 3.0, -1.0, 2.0]), 0.5) == [1, 3]
    assert top(np.array([1.0, 1.0]), 0.5) == [0]
    assert top(np.array([1.0, 2.0, 3.0]), 0.01) == [2]
    assert top(np.array([]), 0.5) == []


def test_clusters_give_evenly() -> None:
    points = np.concatenate([np.full((6, 2), 0.0), np.full((2, 2), 9.0)]) + np.arange(8)[:, None] * 1e-3

    chosen = spread(points, 0.5)

    assert len(chosen) == 4
    assert {6, 7} & set(chosen)


def test_a_score_is_what_the_small_model_loses_more(models: tuple[Path, Path], tmp_path: Path) -> None:
    report = prune(*models, "toy", tmp_path, keep=0.5, limit=6)

    scores = [json.loads(line) for line in (tmp_path / "scores-toy.jsonl").read_text().splitlines()]
    left_out = json.loads((tmp_path / "toy.json").read_text())
    kept = [one["delta"] for one in scores if one["index"] not in left_out]
    assert all(one["delta"] == pytest.approx(one["small"] - one["large"]) for one in scores)
    assert len(kept) == len(left_out) == 3
    assert min(kept) >= max(one["delta"] for one in scores if one["index"] in left_out)
    assert report.sets[0].mean_delta_kept >= report.sets[0].mean_delta_left
    assert report.mixture == f"toy@{tmp_path / 'toy.json'}"
    assert "| toy | 6 | 3 | 0 |" in report.to_markdown()


@pytest.mark.parametrize("by", ["random", "cluster"])
def test_a_baseline_keeps_as_many_and_needs_no_large_model(models: tuple[Path, Path], tmp_path: Path, by: str) -> None:
    report = prune(None, models[1], "toy", tmp_path, keep=0.5, by=by, limit=8)

    assert report.sets[0].kept == 4
    assert len(json.loads((tmp_path / "toy.json").read_text())) == 4


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_impossible_shares_are_refused(models: tuple[Path, Path], tmp_path: Path, keep: float) -> None:
    with pytest.raises(InvalidRequest, match="cannot be kept"):
        prune(*models, "toy", tmp_path, keep=keep)
