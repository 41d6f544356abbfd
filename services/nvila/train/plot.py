"""A run's loss as a picture, from its metrics file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines that are whole; a killed process may have left half of one."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def plot_losses(metrics: dict[str, Path], target: Path, title: str = "") -> None:
    """One curve per named metrics file, raw and smoothed, over positions seen; PNG, replaced at once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, path in metrics.items():
        lines = read_metrics(path)
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        (raw,) = axes.plot(steps, losses, alpha=0.25, linewidth=0.8)
        window = max(1, len(losses) // 50)
        axes.plot(steps, smoothed(losses, window), color=raw.get_color(), label=name, linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per target (nats)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if len(metrics) > 1:
        axes.legend()
    figure.tight_layout()
    beside = target.with_name(f".{target.name}")
    figure.savefig(beside, dpi=120, format="png")
    pyplot.close(figure)
    beside.replace(target)
