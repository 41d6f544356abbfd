"""DeltaLoss and its baselines."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.data.listing import write_listing
from nvila.train.feed import open_source
from nvila.train.loop import train
from nvila.train.model import TrainableNvila
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.prune import open_sets, prune, score, spread, top
from nvila.train.recipes import toy_stages
from nvila.train.samples import usable
from nvila.train.toy import texts

SMALL = Knobs(canvas_px=96, text_px=(8, 16))

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


def test_clusters_of_many_points_take_little_memory() -> None:
    points = np.random.Generator(np.random.PCG64(0)).random((20_000, 64))

    tracemalloc.start()
    chosen = spread(points, 0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(chosen) == 10_000
    assert peak < 10 * points.nbytes  # distances to 32 clusters, coordinate by coordinate, would be 32
    assert spread(np.empty((0, 64)), 0.5) == []


def test_a_score_is_what_the_small_model_loses_more(models: tuple[Path, Path], tmp_path: Path) -> None:
    report = prune(*models, "synthetic:shapes", tmp_path, keep=0.5, limit=6)

    scores = [json.loads(line) for line in (tmp_path / "scores-shapes.jsonl").read_text().splitlines()]
    left_out = json.loads((tmp_path / "shapes.json").read_text())
    kept = [one["delta"] for one in scores if one["index"] not in left_out]
    assert all(one["delta"] == pytest.approx(one["small"] - one["large"]) for one in scores)
    assert len(kept) == 3
    assert len(left_out) == 997  # also all that were not looked at
    assert min(kept) >= max(one["delta"] for one in scores if one["index"] in left_out)
    assert report.sets[0].mean_delta_kept >= report.sets[0].mean_delta_left
    assert "| shapes | 6 | 3 | 0 |" in report.to_markdown()
    assert trained(report.mixture, models[1], tmp_path) == sorted({*range(1000)} - {*left_out})


def test_what_is_printed_trains_on_what_is_kept_of_own_data(models: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder in a picture's place is counted, and ends nothing."""
    samples = [make_sample("shapes", Split.TRAIN, 0, number, SMALL) for number in range(8)]
    write_listing(tmp_path / "own.json", samples, media_folder="media")
    records = json.loads((tmp_path / "own.json").read_text())
    records[2]["image"] = "media"
    (tmp_path / "own.json").write_text(json.dumps(records))
    (tmp_path / "without.json").write_text("[0]")

    report = prune(*models, f"{tmp_path}::own@without.json*2", tmp_path / "out", keep=0.5, limit=5)

    assert report.mixture == f"{tmp_path}::own@{tmp_path / 'out' / 'own.json'}*2"
    assert (report.sets[0].samples, report.sets[0].unusable, report.sets[0].kept) == (5, 1, 2)
    kept = trained(report.mixture, models[1], tmp_path)
    assert len(kept) == 2
    assert not {0, 2, 6, 7} & {*kept}


def trained(mixture: str, start: Path, out: Path) -> list[int]:
    """One step on what was pasted into --data; the numbers of the samples that there are to learn from."""
    recipe = replace(toy_stages(1)[3], data=mixture)
    outcome = train(recipe, start, out / "runs")
    assert outcome.model is not None
    source = open_source(mixture, lane=0, lanes=1, seed=0)
    return sorted({sample.index for sample in usable(islice(iter(source), len(source)))})


def test_a_sample_that_only_the_large_model_can_take_is_left_out(models: tuple[Path, Path]) -> None:
    large, small = (TrainableNvila.load(Checkpoint.open(path)) for path in models)
    small.config = replace(small.config, llm=replace(small.config.llm, max_positions=8))
    (shapes,) = open_sets("synthetic:shapes")

    assert list(score(large, small, shapes.source, range(1))) == []


@pytest.mark.parametrize("by", ["random", "cluster"])
def test_a_baseline_keeps_as_many_and_needs_no_large_model(models: tuple[Path, Path], tmp_path: Path, by: str) -> None:
    report = prune(None, models[1], "synthetic:shapes", tmp_path, keep=0.5, by=by, limit=8)

    assert report.sets[0].kept == 4
    assert len(json.loads((tmp_path / "kept.json").read_text())["shapes"]) == 4


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_impossible_shares_are_refused(models: tuple[Path, Path], tmp_path: Path, keep: float) -> None:
    with pytest.raises(InvalidRequest, match="cannot be kept"):
        prune(*models, "synthetic:shapes", tmp_path, keep=keep)
