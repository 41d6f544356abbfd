"""Stages in this process: what learns, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvila.errors import InvalidRequest, NotFound
from nvila.model.checkpoint import Checkpoint
from nvila.model.layouts import Part
from nvila.train import feed as feeding
from nvila.train.feed import Feed
from nvila.train.loop import export_state, train
from nvila.train.nvila_tiny import TINY, TOY, learn_merges, make_base, parameters
from nvila.train.plot import read_metrics
from nvila.train.prepare import PrepareSettings
from nvila.train.recipes import (
    RECIPES,
    Adapters,
    Batch,
    Duration,
    Optim,
    Recipe,
    family,
    finetuning,
    recipe_from,
    recipe_named,
    toy_stages,
)
from nvila.train.samples import Sample, ask
from nvila.train.toy import ToySource, texts

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "toy", TOY, learn_merges(texts(), 300))


def short(**changes: object) -> Recipe:
    return replace(toy_stages(3)[3], **changes)  # type: ignore[arg-type]


def changed(before: Path, after: Path) -> set[Part]:
    """The parts with other weights."""
    one, two = Checkpoint.open(before).layout, Checkpoint.open(after).layout
    return {
        part
        for part in Part
        if any(not torch.equal(t, two.weights(part).tensor(n)) for n, t in one.weights(part).tensors().items())
    }


def test_a_stage_changes_only_what_it_trains(base: Path, tmp_path: Path) -> None:
    outcome = train(short(trained=("tower", "projector")), base, tmp_path)

    assert outcome.model is not None
    assert changed(base, outcome.model) == {Part.TOWER, Part.PROJECTOR}
    assert outcome.progress.step == 3


def test_a_finished_stage_is_not_run_again(base: Path, tmp_path: Path) -> None:
    first = train(short(), base, tmp_path)
    again = train(short(), base, tmp_path)

    assert again.model == first.model
    assert again.progress.step == 0
    assert again.loss == first.loss


def test_a_stopped_run_goes_on_where_it_was_and_exports_its_state(base: Path, tmp_path: Path) -> None:
    whole = train(short(), base, tmp_path / "whole")
    stopped = train(short(), base, tmp_path / "cut", stop_after_s=0.0)
    exported = export_state(tmp_path / "cut" / short().name, tmp_path / "early", dtype="float32")
    rest = train(short(), base, tmp_path / "cut")

    assert stopped.model is None
    assert stopped.progress.step == 1
    assert Checkpoint.open(exported).config.llm.layers == 2
    assert rest.loss == pytest.approx(whole.loss, rel=1e-5)


def test_a_tower_learns_to_name_patches_and_keeps_nothing_of_the_head_that_named_them(
    base: Path, tmp_path: Path
) -> None:
    recipe = short(trained=("tower",), data="synthetic:patches", prepare=PrepareSettings(names_patches=True))
    longer = replace(recipe, duration=Duration(steps=12), optim=Optim(lr=3e-3))
    whole = train(longer, base, tmp_path / "whole")
    train(longer, base, tmp_path / "cut", stop_after_s=0.0)
    rest = train(longer, base, tmp_path / "cut")

    assert whole.model is not None
    assert changed(base, whole.model) == {Part.TOWER}
    assert whole.loss < read_metrics(tmp_path / "whole" / longer.name / "metrics.jsonl")[0]["loss"] - 0.3
    assert rest.loss == pytest.approx(whole.loss, rel=1e-5)


def test_data_without_truth_cannot_teach_a_tower_to_name_patches(base: Path, tmp_path: Path) -> None:
    recipe = short(data="toy", prepare=PrepareSettings(names_patches=True), skips_bad=False)

    with pytest.raises(InvalidRequest, match="no truth"):
        train(recipe, base, tmp_path)


def test_another_recipe_in_the_same_folder_is_refused(base: Path, tmp_path: Path) -> None:
    train(short(), base, tmp_path, stop_after_s=0.0)

    with pytest.raises(InvalidRequest, match="optim"):
        train(short(optim=Optim(lr=1.0)), base, tmp_path)


def test_another_recipe_is_refused_also_when_the_stage_is_finished(base: Path, tmp_path: Path) -> None:
    train(short(duration=Duration(steps=1)), base, tmp_path)

    with pytest.raises(InvalidRequest, match="optim"):
        train(short(duration=Duration(steps=1), optim=Optim(lr=1.0)), base, tmp_path)


def test_a_run_goes_on_from_the_checkpoint_that_it_began_from_wherever_that_lies_now(
    base: Path, tmp_path: Path
) -> None:
    other = make_base(tmp_path / "other", TOY, learn_merges(texts(), 300), seed=1)
    train(short(), base, tmp_path / "out", stop_after_s=0.0)
    shutil.copytree(base, tmp_path / "copy")

    with pytest.raises(InvalidRequest, match="other weights than"):
        train(short(), other, tmp_path / "out")
    assert train(short(), tmp_path / "copy", tmp_path / "out").model is not None


def test_a_run_keeps_the_lanes_of_the_processes_that_it_began_with(base: Path, tmp_path: Path) -> None:
    recipe = short(batch=Batch(rows=1, row_positions=512, row_tiles=32))
    train(recipe, base, tmp_path, stop_after_s=0.0)
    shutil.rmtree(tmp_path / recipe.name / "state")
    record = tmp_path / recipe.name / "run.json"
    described = json.loads(record.read_text())
    described["recipe"]["batch"] |= {"rows": 2, "lanes": 2}
    record.write_text(json.dumps(described | {"processes": 2}))

    outcome = train(recipe, base, tmp_path, stop_after_s=0.0)

    assert set(outcome.progress.lanes) == {"0", "1"}


def test_feeding_processes_give_the_batches_of_feeding_here(base: Path) -> None:
    recipe = short()
    with Feed(recipe, base, [0, 1], has_processes=True) as apart, Feed(recipe, base, [0, 1]) as here:
        for one, two, _ in zip(apart.steps(), here.steps(), range(2), strict=False):
            assert [[s.source for s in row] for row in one.rows] == [[s.source for s in row] for row in two.rows]
            assert one.states == two.states
            assert (one.rows[0][0].tiles_USS3 == two.rows[0][0].tiles_USS3).all()


def test_two_lanes_of_one_process_are_the_lanes_of_two(base: Path) -> None:
    recipe = short()

    def names(lanes: list[int]) -> list[list[str]]:
        with Feed(recipe, base, lanes) as feed:
            return [[sample.source for sample in row] for row in next(feed.steps()).rows]

    assert names([0, 1]) == names([0]) + names([1])


class BadSource(ToySource):
    """Every third sample has an answer that no row holds."""

    def __iter__(self) -> Iterator[Sample]:
        for sample in super().__iter__():
            is_bad = sample.index % 3 == 1
            yield replace(sample, messages=ask("Why?", "because " * 900, 1)) if is_bad else sample


def test_samples_that_cannot_be_used_are_counted_or_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_bad(data: str, *, lane: int, lanes: int, seed: int, **_: object) -> BadSource:
        return BadSource(lane=lane, lanes=lanes, seed=seed)

    monkeypatch.setattr(feeding, "open_source", open_bad)
    recipe = short(prepare=replace(short().prepare, max_positions=300))
    cut = short(prepare=replace(short().prepare, max_positions=20))

    with Feed(recipe, base, [0, 1]) as feed:
        assert next(feed.steps()).skipped == 0  # cut to fit, still with something to learn
    with Feed(replace(cut, skips_bad=False), base, [0, 1]) as feed, pytest.raises(InvalidRequest, match="toy:0"):
        next(feed.steps())


def test_lora_trains_little_and_leaves_no_trace(base: Path, tmp_path: Path) -> None:
    recipe = replace(
        finetuning("lora"),
        adapters=Adapters(rank=4, alpha=8),
        data="toy",
        duration=Duration(steps=3),
        batch=short().batch,
        prepare=short().prepare,
        precision=short().precision,
        recomputes=False,
        save_every=2,
    )
    stopped = train(recipe, base, tmp_path, stop_after_s=0.0)
    outcome = train(recipe, base, tmp_path)

    assert stopped.model is None
    assert outcome.model is not None
    assert changed(base, outcome.model) == {Part.LLM, Part.TOWER, Part.PROJECTOR}
    before, after = (Checkpoint.open(p).layout.weights(Part.LLM) for p in (base, outcome.model))
    assert before.names() == after.names()
    moved = {n for n in before.names() if not torch.equal(before.tensor(n), after.tensor(n))}
    assert moved == {n for n in before.names() if n.endswith("_proj.weight")}
    towers = [Checkpoint.open(p).layout.weights(Part.TOWER) for p in (base, outcome.model)]
    learned = {n for n in towers[0].names() if not torch.equal(towers[0].tensor(n), towers[1].tensor(n))}
    assert learned
    assert all("layer_norm" in name for name in learned)


def test_qlora_says_what_it_needs_where_there_is_no_gpu(base: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = replace(finetuning("qlora"), data="toy", duration=Duration(steps=1), batch=short().batch)

    with pytest.raises(InvalidRequest, match="needs an NVIDIA GPU"):
        train(recipe, base, tmp_path)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("tower", ["norms", "full", "lora", "frozen"])
def test_every_combination_of_fine_tuning_takes_a_step(base: Path, tmp_path: Path, method: str, tower: str) -> None:
    recipe = replace(
        finetuning(method, tower),
        data="toy",
        duration=Duration(steps=1),
        batch=Batch(rows=1, row_positions=300, row_tiles=8),
        prepare=short().prepare,
        precision=short().precision,
        optim=Optim(lr=1e-2, warmup=0.0),
    )
    outcome = train(recipe, base, tmp_path)

    assert outcome.model is not None
    assert (Part.TOWER in changed(base, outcome.model)) == (tower != "frozen")


def test_the_published_stages_train_what_the_scripts_train() -> None:
    trained = [recipe.trained for recipe in family("nvila")]

    assert trained == [
        ("projector",),
        ("tower", "projector"),
        ("projector", "llm"),
        ("tower", "projector", "llm"),
        ("tower", "projector", "llm"),
    ]
    assert [recipe.optim.lr for recipe in family("nvila")] == [1e-3, 2e-5, 2e-5, 1.5e-5, 2e-5]
    assert [recipe.optim.lr for recipe in family("lite")] == [1e-3, 5e-5, 5e-5, 2e-5]
    assert [recipe.prepare.max_positions for recipe in family("nvila")] == [8192] * 4 + [16384]


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_comes_back_from_its_record(name: str) -> None:
    recipe = recipe_named(name)

    assert recipe_from(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_unknown_recipes_are_named_beside_the_known() -> None:
    with pytest.raises(NotFound, match="nvila-stage1"):
        recipe_named("nvila-stage9")


def test_the_minutes_of_nvila_tiny_are_shared_out_among_its_stages() -> None:
    assert sum(recipe.duration.seconds for recipe in family("nvila-tiny", minutes=10)) == pytest.approx(600)


@pytest.mark.slow
def test_nvila_tiny_fits_in_40_megabytes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_base(tmp_path / "tiny", TINY))
    biases = sum(parameters(checkpoint).values())

    assert 2 * biases < 38_500_000
    assert checkpoint.config.time_tokens == 100
    assert checkpoint.tokenizer().id_of("<t99>") < checkpoint.config.vocab
