"""What a worker of a Ray cluster does, and where workers get GPUs; without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvila.train.cluster import wants_gpus, work
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.recipes import toy_stages
from nvila.train.toy import texts


def test_the_first_worker_tells_of_its_steps(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", TOY, learn_merges(texts(), 300))
    told: list[dict[str, Any]] = []
    stages = [toy_stages(1)[3].to_json()]

    work({"stages": stages, "start": str(base), "out": str(tmp_path), "device": "cpu", "reporter": lambda: told.append})

    assert [(metrics["name"], metrics["step"], metrics["done"]) for metrics in told] == [("toy-4", 1, 1.0)]


@pytest.mark.parametrize(
    ("device", "resources", "uses"),
    [
        (None, {"CPU": 8.0, "GPU": 16.0}, True),
        (None, {"CPU": 8.0}, False),
        ("cpu", {"CPU": 8.0, "GPU": 16.0}, False),
        ("cuda", {"CPU": 8.0}, True),  # machines with GPUs may still come
    ],
)
def test_gpus_are_used_where_the_cluster_has_them(device: str | None, resources: dict[str, float], uses: bool) -> None:
    assert wants_gpus(device, resources) is uses
