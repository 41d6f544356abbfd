"""Scores per task and family with 95 % confidence intervals, as plain data and as a table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from nvila.train.evaluation.run import Answer

_Z = 1.959964
"""Standard deviations of a normal distribution that hold 95 %."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one task or family. `mean`: of the metric, 0 to 1. `low`, `high`: its 95 % interval.

    `precision_at_50`: share of intervals with IoU of one half or more; None for other metrics.
    """

    name: str
    metric: str
    samples: int
    mean: float
    low: float
    high: float
    errors: int
    precision_at_50: float | None = None


def scores(answers: Sequence[Answer]) -> list[Score]:
    """Per task, per family (its tasks' answers together), of what is drawn with held-out fonts or layouts, over all."""
    groups: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.task].append(answer)
    families: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        families[answer.task.split(".")[0]].append(answer)
    found = [_score(name, group) for name, group in groups.items() if "." in name]
    found += [_score(name, group) for name, group in families.items()]
    held_out = [answer for answer in answers if answer.slice]
    if held_out:
        found.append(_score("held out", held_out))
    if len(families) > 1:
        found.append(_score("all", answers))
    return found


def _score(name: str, answers: Sequence[Answer]) -> Score:
    values = [answer.score for answer in answers]
    mean = sum(values) / len(values)
    low, high = interval(values)
    ious = [answer.score for answer in answers if answer.metric == "interval"]
    return Score(
        name=name,
        metric="/".join(sorted({answer.metric for answer in answers})),
        samples=len(values),
        mean=mean,
        low=low,
        high=high,
        errors=sum(bool(answer.error) for answer in answers),
        precision_at_50=sum(iou >= 0.5 for iou in ious) / len(ious) if ious and len(ious) == len(values) else None,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Wilson's interval where all scores are 0 or 1, else the normal one of a mean."""
    n, mean = len(values), sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        middle = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    else:
        variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
        middle, half = mean, _Z * math.sqrt(variance / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def as_json(model: str, answers: Sequence[Answer], extra: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "samples": len(answers), **extra, "scores": [asdict(score) for score in scores(answers)]}


def table(title: str, answers: Sequence[Answer]) -> Table:
    found = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left")
    for head in ("task", "metric", "samples", "score", "95 %", "P@0.5", "errors"):
        found.add_column(head, justify="left" if head in ("task", "metric") else "right", no_wrap=True)
    for score in scores(answers):
        is_whole = "." not in score.name
        found.add_row(
            score.name,
            score.metric if "/" not in score.metric else "mixed",
            f"{score.samples:,}",
            f"{100 * score.mean:.1f}",
            f"{100 * score.low:.1f}–{100 * score.high:.1f}",
            "" if score.precision_at_50 is None else f"{100 * score.precision_at_50:.1f}",
            str(score.errors or ""),
            style="bold" if is_whole else "",
        )
    return found
