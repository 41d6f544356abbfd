"""What Ray Serve is told, without starting it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from nvila.decode.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's use of pydantic
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from nvila.decode import app


def deployment(**settings: Any) -> Any:
    return app.build(Settings(model=Path("m"), **settings))._bound_deployment


def test_equal_bounds_mean_a_fixed_number_of_replicas() -> None:
    fixed = deployment(min_replicas=2, max_replicas=2)
    assert fixed.num_replicas == 2
    assert fixed._deployment_config.autoscaling_config is None


def test_different_bounds_mean_autoscaling_on_ongoing_requests() -> None:
    scaling = deployment(
        min_replicas=1, max_replicas=4, target_ongoing_requests=7
    )._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 7)


def test_requests_are_bounded_at_the_replica_and_at_the_proxy() -> None:
    bounded = deployment(max_ongoing_requests=5, max_queued_requests=6)
    assert (bounded.max_ongoing_requests, bounded.max_queued_requests) == (5, 6)


def test_a_serve_config_s_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVILA_DECODE_MODEL", "m")
    monkeypatch.setenv("NVILA_DECODE_MAX_ONGOING_REQUESTS", "5")
    built: Any = call_user_app_builder_with_args_if_necessary(app.application, {"max_queued_requests": 6})
    assert built._bound_deployment.max_ongoing_requests == 5
    assert built._bound_deployment.max_queued_requests == 6


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("NVILA_DECODE_GRPC_PORT", "none", "NVILA_DECODE_GRPC_PORT: Input should be a valid integer"),
        ("NVILA_DECODE_MODEL", "/nowhere", "NVILA_DECODE_MODEL: the folder holds no config.json"),
    ],
)
def test_a_malformed_setting_stops_the_process_and_is_named(variable: str, value: str, words: str) -> None:
    environment = os.environ | {"NVILA_DECODE_MODEL": "m", variable: value}
    done = subprocess.run(
        [sys.executable, "-m", "nvila.decode.app"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
