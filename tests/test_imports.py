"""Light modules stay light: each is imported in a fresh interpreter, and what came along is checked (STYLE §2)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "vllm", "ray", "tritonclient", "av", "PIL", "fastapi", "rich", "kubernetes", "scipy"}

ALLOWED = {
    "nvila.types": set(),
    "nvila.errors": set(),
    "nvila.cli.main": set(),
    "nvila.telemetry.tracing": set(),
    "nvila.telemetry.metrics": set(),
    "nvila.cache.keys": set(),
    "nvila.cache.store": set(),
    "nvila.model.config": set(),
    "nvila.model.cost": set(),
    "nvila.model.time_tokens": set(),
    "nvila.model.wording": set(),
    "nvila.model.preprocess": {"PIL"},
    "nvila.video.plan": set(),
    "nvila.video.pool": set(),
    "nvila.video.worker": {"av", "PIL"},
    "nvila.vision.contract": set(),
    "nvila.vision.client": {"tritonclient"},
    "nvila.decode.client": set(),
    "nvila.capacity.simulate": set(),
    "nvila.capacity.sizing": set(),
    "nvila.recordings.camera": set(),
    "nvila.recordings.ingest": {"PIL"},
    "nvila.recordings.types": set(),
    "nvila.recordings.jobs": set(),
    "nvila.recordings.worker": set(),
    "nvila.gateway.pipeline": set(),
    "nvila.recordings.app": {"tritonclient", "rich", "PIL"},
    "nvila.gateway.app": {"fastapi", "tritonclient", "rich"},  # httpx takes rich along where it is installed
}


@pytest.mark.parametrize("module", ALLOWED)
def test_a_light_module_brings_nothing_heavy_along(module: str) -> None:
    program = f"import json, sys, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    came_along = set(json.loads(loaded.stdout)) & HEAVY
    assert came_along <= ALLOWED[module], f"{module} brings {came_along - ALLOWED[module]}"
