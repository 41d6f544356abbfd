"""The autoscalers' rules are the chart's numbers, and Ray's own arithmetic; they do not flap."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.capacity import rules
from nvila.capacity.rules import (
    BACKLOG,
    BUSY,
    DECODE_KEDA,
    DECODE_RAY,
    ONGOING,
    VISION,
    KedaScaler,
    RayScaler,
    Rules,
    from_values,
)
from nvila.decode.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray 2.60 declares fields in a way that pydantic deprecates
    from ray.serve import autoscaling_policy as ray_policy
    from ray.serve.config import AutoscalingConfig

CHART = Path(__file__).parents[2] / "charts/nvila"


def _values() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return values


def test_the_defaults_are_the_charts() -> None:
    assert from_values(_values(), "ray") == (VISION, DECODE_RAY)
    assert from_values(_values(), "keda") == (VISION, DECODE_KEDA_OF_CHART)


DECODE_KEDA_OF_CHART = replace(DECODE_KEDA, down_share=DECODE_RAY.down_share)  # one block of values for both


def test_the_defaults_as_values_are_the_charts() -> None:
    for kind in ("ray", "keda"):
        assert from_values(rules.as_values(), kind) == from_values(_values(), kind)


def test_a_replica_takes_on_what_the_values_say_or_the_program_does() -> None:
    assert rules.most_ongoing(_values()) == Settings(model=Path("m")).max_ongoing_requests
    assert rules.most_ongoing({"decode": {"settings": {"max_ongoing_requests": 96}}}) == 96


def test_the_charts_looks_in_vain_and_windows_are_those_simulated() -> None:
    for pool in ("vision", "decode"):
        text = (CHART / f"templates/{pool}/scaledobject.yaml").read_text()
        assert f"failureThreshold: {rules.LOOKS_IN_VAIN}" in text
    assert 'stage=\\"tower\\"}[2m]' in (CHART / "templates/vision/scaledobject.yaml").read_text()
    assert "[1m]" in (CHART / "templates/decode/scaledobject.yaml").read_text()


def _follow(rules: Rules, totals: list[float], signal: str = BACKLOG) -> list[tuple[float, int, int]]:
    """Pool sizes that a scaler decides when the signal's sum over the pool takes these values, look by look."""
    scaler, current, events = KedaScaler(rules), max(rules.min_replicas, 1), []
    for place, total in enumerate(totals):
        now_s = place * rules.polling_s
        after = scaler.decide(now_s, current, dict.fromkeys(rules.targets, 0.0) | {signal: total}, 1)
        if after != current:
            events.append((now_s, current, after))
        current = after
    return events


@settings(max_examples=60, deadline=None, derandomize=True)
@given(totals=st.lists(st.floats(0, 60), min_size=2, max_size=240))
def test_a_pool_that_grew_does_not_shrink_within_the_stabilisation(totals: list[float]) -> None:
    events = _follow(VISION, totals)

    grown_s = [at for at, before, after in events if after > before]
    shrunk_s = [at for at, before, after in events if after < before]
    assert all(down - up >= VISION.down_stabilization_s for up in grown_s for down in shrunk_s if down > up)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(totals=st.lists(st.floats(0, 60), min_size=2, max_size=240))
def test_a_pool_stays_in_its_bounds_and_never_changes_faster_than_stated(totals: list[float]) -> None:
    rules_ = replace(VISION, min_replicas=2, max_replicas=20)

    for _, before, after in _follow(rules_, totals):
        assert 2 <= after <= 20
        assert after <= max(2 * before, before + 2)
        assert after >= int(before * 0.75)


def test_a_short_peak_does_not_grow_a_pool() -> None:
    assert _follow(VISION, [0.0] * 10 + [40.0, 40.0] + [0.0] * 10) == []


def test_a_signal_within_a_tenth_of_its_target_changes_nothing() -> None:
    assert _follow(replace(VISION, min_replicas=4), [8.7] * 40) == []
    assert _follow(replace(VISION, min_replicas=4), [8.9] * 40)[0][1:] == (4, 5)


def test_a_busy_pool_keeps_its_size_while_nothing_waits() -> None:
    assert _follow(replace(VISION, min_replicas=1), [2.9] * 100, BUSY)[-1][2] == 4


def test_missing_metrics_lead_to_the_stated_pods_after_three_looks() -> None:
    scaler = KedaScaler(replace(VISION, fallback_replicas=3))

    assert [scaler.decide(look * 15.0, 1, None, 0) for look in range(6)][:2] == [1, 1]
    assert scaler.decide(90.0, 1, None, 0) == 3


def test_missing_metrics_never_lead_to_none() -> None:
    rules_ = replace(VISION, fallback_replicas=0, scale_to_zero=True, min_replicas=0)
    scaler, current = KedaScaler(rules_), 4

    for look in range(400):
        current = scaler.decide(look * 15.0, current, None, 0)
        assert current >= 1


def test_a_pool_that_may_sleep_goes_after_the_idle_time_and_wakes_for_one_request() -> None:
    scaler = KedaScaler(replace(VISION, scale_to_zero=True, idle_s=60))
    quiet = {BACKLOG: 0.0, BUSY: 0.0}

    assert scaler.decide(0.0, 1, quiet, 1) == 1
    assert scaler.decide(45.0, 1, quiet, 0) == 1
    assert scaler.decide(60.0, 1, quiet, 0) == 0
    assert scaler.decide(75.0, 0, quiet, 0) == 0
    assert scaler.decide(90.0, 0, quiet, 1) == 1


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_decode_follows_rays_own_arithmetic(share: float) -> None:
    ours = RayScaler(replace(DECODE_RAY, down_share=share), look_back_s=0)
    config = AutoscalingConfig(
        min_replicas=1,
        max_replicas=8,
        target_ongoing_requests=16,
        upscale_delay_s=30,
        downscale_delay_s=600,
        downscaling_factor=share,
    )
    state: dict[str, Any] = {}
    current = theirs = 1
    for look in range(600):
        ongoing = float((look * 7919) % 40 + (120 if 100 < look < 260 else 0))
        current = ours.decide(look * 15.0, current, {ONGOING: ongoing}, 1)

        wish, _ = ray_policy._core_replica_queue_length_policy(
            SimpleNamespace(current_num_replicas=theirs, total_num_requests=ongoing, config=config)
        )
        scaled = ray_policy._apply_scaling_factors(wish, theirs, config)
        theirs, state = ray_policy._apply_delay_logic(min(max(scaled, 1), 8), theirs, config, state, look * 15.0 + 1)
        assert current == theirs, f"look {look}"
