"""Two processes that share one model do what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvila.errors import InvalidRequest
from nvila.train.distributed import Ranks
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.plot import read_metrics
from nvila.train.recipes import RECIPES, recipe_named
from nvila.train.toy import texts

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(out: Path, recipe: str, *launcher: str, lanes: int | None = 2) -> list[dict[str, float]]:
    program = [*launcher, "-m", "nvila.cli.main", "train", "recipe", recipe, "--from", str(out / "random")]
    options = ["--out", str(out), "--data", "toy", "--steps", "3", "--in-process"]
    options += ["--lanes", str(lanes)] if lanes else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *program, *options, "--precision", "float32", "--device", "cpu"],
        check=True,
        capture_output=True,
        env=environment,
    )
    return read_metrics(out / recipe / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", ["nvila-tiny-image", "toy-smoke"])
def test_two_processes_learn_what_one_does(tmp_path: Path, recipe: str) -> None:
    """The first moves whole matrices, by Muon; the second shares them out."""
    for folder in ("one", "two"):
        make_base(tmp_path / folder / "random", TOY, learn_merges(texts(), 300))
    alone = run(tmp_path / "one", recipe)
    together = run(tmp_path / "two", recipe, *TWO)

    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["samples"] == one["samples"]
    assert (tmp_path / "two" / recipe / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_share_a_recipe_of_one_lane(tmp_path: Path) -> None:
    make_base(tmp_path / "random", TOY, learn_merges(texts(), 300))

    assert recipe_named("toy-smoke").batch.lanes == 1
    assert len(run(tmp_path, "toy-smoke", *TWO, lanes=None)) == 3
    record = json.loads((tmp_path / "toy-smoke" / "run.json").read_text())
    assert record["recipe"]["batch"]["lanes"] == record["recipe"]["batch"]["rows"] == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_go_from_stage_to_stage_and_an_error_of_one_ends_both(tmp_path: Path) -> None:
    program = [
        sys.executable,
        *TWO,
        "-m",
        "nvila.cli.main",
        "train",
        "all",
        "toy",
        "--out",
        str(tmp_path),
        "--steps",
        "1",
        "--in-process",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*program, "--device", "cpu"], check=True, capture_output=True, env=environment, timeout=400)
    assert all((tmp_path / f"toy-{number}" / "model" / "config.json").exists() for number in range(1, 6))

    (tmp_path / "toy-5" / "model" / "config.json").unlink()
    (tmp_path / "toy-4" / "model" / "config.json").write_text("{}")
    failed = subprocess.run([*program, "--from", str(tmp_path / "toy-4" / "model")], env=environment, timeout=200)
    assert failed.returncode != 0


def test_lanes_are_dealt_evenly_or_not_at_all() -> None:
    assert Ranks(rank=1, world=2).lanes(6) == [1, 3, 5]
    with pytest.raises(InvalidRequest, match="5 lanes cannot be dealt to 2"):
        Ranks(rank=0, world=2).lanes(5)


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_can_be_shared_by_any_number_of_processes(name: str, processes: int) -> None:
    batch = recipe_named(name).batch
    dealt = batch.dealt_to(processes)

    assert len(Ranks(rank=0, world=processes).lanes(dealt.lanes)) == dealt.lanes // processes
    assert dealt.rows % dealt.lanes == 0
    assert batch.rows <= dealt.rows < batch.rows + dealt.lanes
    assert dealt.dealt_to(processes) == dealt
    assert batch.dealt_to(1) == batch
