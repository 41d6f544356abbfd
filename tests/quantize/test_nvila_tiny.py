"""The gate of a trained model's accuracy: nvila-tiny in eight and in four bits, against itself in sixteen, on questions
and pictures that neither training nor calibration has seen. One point may be lost by the tower, two by both."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from nvila.cli.checkpoint import NVILA_TINY
from nvila.model.checkpoint import Checkpoint
from nvila.model.int8_cpu import WHOLE
from nvila.quantize.calibration import Data
from nvila.quantize.llm import LlmPlan, quantise_llm
from nvila.quantize.report import Report
from nvila.quantize.tower import TowerPlan, quantise_tower
from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Split
from nvila.train.evaluation.compare import Difference, compare
from nvila.train.evaluation.model import ModelAnswerer
from nvila.train.evaluation.run import Answer, evaluate
from nvila.types import TokenDtype
from tests.quantize.conftest import CPU

FAMILIES = ("shapes", "scene", "documents")
SAMPLES = 30
SEED = 31_000
CALIBRATION = Data(mixture="synthetic:all")


def answers(model: Path, tokens: TokenDtype = TokenDtype.FLOAT32) -> list[Answer]:
    samples = (make_sample(family, Split.TEST, SEED, n) for family, n in product(FAMILIES, range(SAMPLES)))
    answerer = ModelAnswerer.load(model, device="cpu", frames=32, batch=10, max_tokens=24, token_dtype=tokens)
    try:
        return evaluate(samples, answerer, None, lambda _: None, time_tokens=100)
    finally:
        answerer.close()


def over_all(whole: list[Answer], other: list[Answer]) -> Difference:
    return compare(whole, other)[-1]


@pytest.fixture(scope="module")
def whole() -> list[Answer]:
    return answers(NVILA_TINY)


@pytest.fixture(scope="module")
def tower_in_8_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("tiny") / "w8a8"
    plan = TowerPlan(data=CALIBRATION, device=CPU)
    return folder, quantise_tower(Checkpoint.open(NVILA_TINY), folder, plan, WHOLE)


def test_every_layer_of_a_trained_tower_stays_near_its_original(tower_in_8_bits: tuple[Path, Report]) -> None:
    assert tower_in_8_bits[1].worst_cosine > 0.995


def test_the_tower_in_8_bits_loses_one_point_at_most(whole: list[Answer], tower_in_8_bits: tuple[Path, Report]) -> None:
    difference = over_all(whole, answers(tower_in_8_bits[0]))

    assert difference.a > 0.5, "a model that knows nothing cannot lose anything"
    assert difference.loss <= 0.01
    assert difference.agreement >= 0.9


def test_both_parts_and_their_tokens_lose_two_points_at_most(
    whole: list[Answer], tower_in_8_bits: tuple[Path, Report], tmp_path: Path
) -> None:
    plan = LlmPlan(data=CALIBRATION, device=CPU, blocks=12, positions=256, held_out=1)
    quantise_llm(Checkpoint.open(tower_in_8_bits[0]), tmp_path / "w8a8-w4", plan)

    difference = over_all(whole, answers(tmp_path / "w8a8-w4", TokenDtype.INT8))

    assert difference.loss <= 0.02
    assert difference.agreement >= 0.75
