"""The same stages on a Ray cluster: Ray Train starts the processes, everything else is `train/loop.py`.

Needs `ray[train]` (the extra `train-gpu`). `out` has to be a folder that all machines share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.errors import InvalidRequest
from nvila.train.recipes import Recipe, recipe_from

if TYPE_CHECKING:
    from nvila.train.loop import Report


def train_on_ray(
    stages: Sequence[Recipe],
    start: Path,
    out: Path,
    workers: int,
    device: str | None = None,
    *,
    reporter: Callable[[], Report],
) -> dict[str, Any]:
    """Run, or go on with, the stages on `workers` workers, one GPU each where the cluster has any.

    `reporter`: called in every worker; what it makes is told of the first one's steps. Ray passes on what is printed.
    Raises `InvalidRequest` where Ray Train is not installed.
    """
    try:
        import ray
        from ray.train import ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise InvalidRequest(
            f"training on a Ray cluster needs ray[train], the extra nvila[train-gpu]: {error}"
        ) from error
    ray.init(ignore_reinit_error=True)
    uses_gpu = wants_gpus(device, ray.cluster_resources())
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "stages": [recipe.to_json() for recipe in stages],
            "start": str(start),
            "out": str(out),
            "device": "cuda" if uses_gpu else "cpu",
            "reporter": reporter,
        },
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=uses_gpu),
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
    )
    trainer.fit()
    return {"out": str(out), "workers": workers}


def wants_gpus(device: str | None, resources: Mapping[str, float]) -> bool:
    """As was asked for; else where any machine of the cluster has one. The one that asks may have none itself."""
    return device == "cuda" or (device is None and resources.get("GPU", 0) > 0)


def work(described: dict[str, Any]) -> None:
    """One worker."""
    from nvila.train.distributed import Ranks
    from nvila.train.loop import train_all

    stages = tuple(recipe_from(recipe) for recipe in described["stages"])
    ranks = Ranks.join(described["device"])
    train_all(
        stages,
        Path(described["start"]),
        Path(described["out"]),
        ranks=ranks,
        has_processes=True,
        report=described["reporter"](),
    )
