"""The task families by name, and how a sample of one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nvila.errors import InvalidRequest
from nvila.train.data.draw import Draw, Knobs, Split
from nvila.train.data.made import Made
from nvila.train.data.tasks import (
    charts,
    describing,
    documents,
    events,
    motion,
    pairs,
    patches,
    reading,
    scene,
    shapes,
    tables,
)
from nvila.train.samples import Sample, ask

IMAGES: Mapping[str, Callable[[Draw], Made]] = {
    "shapes": shapes.make,
    "scene": scene.make,
    "documents": documents.make,
    "tables": tables.make,
    "charts": charts.make,
    "pairs": pairs.make,
}
VIDEOS: Mapping[str, Callable[[Draw], Made]] = {
    "motion": motion.make,
    "order": events.order,
    "counting": events.counting,
    "brief": events.brief,
    "when": events.when,
}
DENSE: Mapping[str, Callable[[Draw], Made]] = {
    "describing": describing.make,
    "reading": reading.make,
    "page": reading.page,
    "narrating": events.narrate,
}
"""For pre-training: everything that is to be seen is told, so that each picture teaches as much as it can."""
TASKS = {**IMAGES, **VIDEOS}
FAMILIES = {**TASKS, **DENSE, "patches": patches.make}


def make_sample(family: str, split: Split, seed: int, index: int, knobs: Knobs | None = None) -> Sample:
    """The sample of this name: always the same one. Raises `InvalidRequest` for a family there is none of."""
    if family not in FAMILIES:
        raise InvalidRequest(f"there is no task family {family!r}; there are: {', '.join(FAMILIES)}")
    draw = Draw.of(family, split, seed, index, knobs or Knobs())
    made = FAMILIES[family](draw)
    return Sample(
        source=f"{family}-{split}",
        index=index,
        task=f"{family}.{made.task}",
        messages=ask(made.question, made.answer, len(made.media), made.more),
        media=made.media,
        metric=made.metric,
        answers=(made.answer, *made.answers),
        choices=made.choices,
        notes=made.notes | ({"held_out": True} if draw.is_held_out else {}),
        cues=made.cues,
        truth_KHW=made.truth_KHW,
    )
