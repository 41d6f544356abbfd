"""Both pools under a load: independent, bounded, nothing lost, the same every time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest

from nvila.capacity.hardware import GPUS, throughput
from nvila.capacity.load import EXAMPLES, Arrival, Ask, poisson
from nvila.capacity.models import nvila_8b_video
from nvila.capacity.rules import DECODE_KEDA, DECODE_RAY, VISION
from nvila.capacity.simulate import Plan, Record, simulate

MODEL = nvila_8b_video()
RATES = throughput(MODEL, GPUS["l40s"], GPUS["l40s"])
PLANS = {
    "ray": Plan(vision=VISION, decode=DECODE_RAY),
    "keda": Plan(vision=VISION, decode=DECODE_KEDA),
}
EVENTS_PER_SWING = 15
TURNS_PER_SWING = 3
"""What docs/operations.md states, for pools of 1 to 8."""


@cache
def _run(example: str, scaler: str, seed: int = 0) -> Record:
    return simulate(MODEL, RATES, EXAMPLES[example](seed, 0.25), PLANS[scaler])


@pytest.mark.parametrize("scaler", PLANS)
def test_pools_move_apart_when_the_load_turns_from_pictures_to_text(scaler: str) -> None:
    record = _run("image-to-text", scaler)

    assert record.vision.at(5100) <= record.vision.at(2100) / 2
    assert record.decode.at(5100) >= record.decode.at(2100) * 1.5


@pytest.mark.parametrize("scaler", PLANS)
@pytest.mark.parametrize("example", ["sinusoid", "steps"])
@pytest.mark.parametrize("seed", [0])
def test_a_swing_of_the_load_costs_a_stated_number_of_scale_events(example: str, scaler: str, seed: int) -> None:
    record = _run(example, scaler, seed)

    for pool in (record.vision, record.decode):
        assert len(pool.events) <= 2 * EVENTS_PER_SWING
        assert pool.turns <= 2 * TURNS_PER_SWING


@pytest.mark.parametrize("scaler", PLANS)
def test_a_steady_load_between_two_sizes_alternates_no_faster_than_the_window(scaler: str) -> None:
    asks = (Ask(kind="image"), Ask(kind="video", frames=64), Ask(prompt_tokens=800, answer_tokens=400))
    arrivals = poisson(3600, [(lambda _: 2.0, ask) for ask in asks], seed=5)

    record = simulate(MODEL, RATES, arrivals, PLANS[scaler])

    assert record.lost == 0
    for pool, rules in ((record.vision, PLANS[scaler].vision), (record.decode, PLANS[scaler].decode)):
        for (grown_s, before, after), (later_s, then, finally_) in itertools.pairwise(pool.events):
            assert not (after > before and finally_ < then) or later_s - grown_s >= rules.down_stabilization_s


@pytest.mark.parametrize("scaler", PLANS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_no_request_is_lost_while_pools_grow_and_shrink(example: str, scaler: str) -> None:
    record = _run(example, scaler)

    assert record.lost == 0
    assert all(work.at_s <= work.first_token_s <= work.done_s for work in record.works)


def test_the_same_load_gives_the_same_record() -> None:
    load = EXAMPLES["image-to-text"](3, 0.1)

    one, other = (simulate(MODEL, RATES, load, PLANS["ray"]) for _ in range(2))

    assert one.first_tokens_s() == other.first_tokens_s()
    assert (one.vision.events, one.decode.events) == (other.vision.events, other.decode.events)


def test_pools_shrink_to_their_least_when_nothing_comes_any_more() -> None:
    record = _run("image-to-text", "keda")

    assert (record.vision.wanted[-1], record.decode.wanted[-1]) == (1, 1)


def test_missing_metrics_hold_the_stated_pods_and_lose_nothing() -> None:
    load = EXAMPLES["sinusoid"](0, 0.1)
    plan = replace(PLANS["keda"], missing=((1200.0, 2400.0),))

    record = simulate(MODEL, RATES, load, plan)

    assert record.lost == 0
    assert record.vision.at(2300) == VISION.fallback_replicas
    assert record.decode.at(2300) == DECODE_KEDA.fallback_replicas
    assert min(record.vision.wanted) >= 1


def test_a_sleeping_pool_wakes_within_the_stated_time_and_answers_what_woke_it() -> None:
    load = [Arrival(0.0, Ask(kind="image")), Arrival(4000.0, Ask(kind="image"))]
    plan = replace(PLANS["keda"], vision=replace(VISION, scale_to_zero=True))

    record = simulate(MODEL, RATES, load, plan)

    assert record.vision.at(3900) == 0
    assert record.lost == 0
    assert record.first_tokens_s()[1] <= VISION.polling_s + plan.vision_start_s + 5


def test_one_request_alone_takes_as_long_as_its_parts() -> None:
    record = simulate(MODEL, RATES, [Arrival(1.0, Ask(kind="video", frames=64, prompt_tokens=0))], PLANS["ray"])

    tower_s, prefill_s = 64 / RATES.tiles_per_s, 2056 / RATES.positions_per_s
    hop_s = 2 * 2048 * 3584 * 2 / PLANS["ray"].cache_bytes_per_s
    assert record.first_tokens_s()[0] == pytest.approx(tower_s + hop_s + prefill_s, rel=0.01)
    assert record.works[0].done_s - record.works[0].first_token_s == pytest.approx(200 * RATES.step_s, rel=0.01)


def test_text_alone_never_touches_the_vision_pool() -> None:
    record = simulate(MODEL, RATES, [Arrival(float(second), Ask()) for second in range(60)], PLANS["ray"])

    assert record.vision.events == []
    assert max(record.vision.queue) == 0


def test_a_load_beyond_both_pools_waits_and_is_answered() -> None:
    load = [Arrival(place * 0.05, Ask(kind="video", frames=256)) for place in range(400)]
    small = replace(PLANS["keda"], vision=replace(VISION, max_replicas=1), decode=replace(DECODE_KEDA, max_replicas=1))

    record = simulate(MODEL, RATES, load, small)

    assert record.lost == 0
    assert not any(math.isnan(value) for value in record.first_tokens_s())
