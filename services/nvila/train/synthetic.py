"""The generated tasks without files: sample number n is rendered when it is asked for, so an epoch has no end.

For training at the speed of the processors that render; `nvila train data` writes the same samples to files. Needs
neither PyAV nor fonts from anywhere else than `train/data`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from nvila.errors import InvalidRequest
from nvila.train.data.catalogue import DENSE, FAMILIES, IMAGES, TASKS, VIDEOS, make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.samples import Sample

PREFIX = "synthetic:"
TRAINING = Knobs(questions=12)
EASY = Knobs(questions=12, objects=1, letters=1, lines=1, text_px=(48, 64))
_DATA = re.compile(r"([^@>]*)(?:@(\d+))?(?:>(\d+))?")
_PART = re.compile(r"([a-z_]+)(?:\*(\d+))?")


class SyntheticSource:
    """A `SampleSource` over families in proportion. `families`: (name, weight).

    `ramp`: how many samples it takes from one shape and one letter to everything (`knobs_at`). From random weights a
    model otherwise learns how answers sound, and for long nothing of the pictures: with all tasks from the start,
    nvila-tiny read none of 48 texts after 700 steps of its base stage. `smallest_px`: no letters smaller than this, for
    models that see one tile: to guess what cannot be read teaches nothing.
    """

    def __init__(
        self,
        families: tuple[tuple[str, float], ...],
        *,
        lane: int,
        lanes: int,
        seed: int,
        split: Split = Split.TRAIN,
        ramp: int = 0,
        smallest_px: int = 0,
    ) -> None:
        self._names = [name for name, _ in families]
        weights = np.array([weight for _, weight in families])
        self._ends = np.cumsum(weights / weights.sum())
        self._lane, self._lanes, self._seed, self._split, self._ramp = lane, lanes, seed, split, ramp
        self._smallest_px = smallest_px
        self._next = 0

    def __len__(self) -> int:
        """There are no epochs."""
        return 0

    def __iter__(self) -> Iterator[Sample]:
        while True:
            number = self._lane + self._lanes * self._next
            self._next += 1
            yield self.load(number)

    def load(self, number: int) -> Sample:
        point, ease = np.random.Generator(np.random.PCG64([self._seed, number])).random(2)
        family = self._names[min(int(np.searchsorted(self._ends, point)), len(self._names) - 1)]
        share = min(1.0, number / self._ramp) if self._ramp else 1.0
        if family in TASKS and ease > share:
            family = "describing"
        knobs = knobs_at(share)
        smallest, largest = knobs.text_px
        knobs = replace(knobs, text_px=(max(smallest, self._smallest_px), largest))
        return make_sample(family, self._split, self._seed, number, knobs)

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = int(state["next"])


def open_synthetic(data: str, *, lane: int, lanes: int, seed: int) -> SyntheticSource:
    """`synthetic:shapes+when*3@12000>28`: families, after how many samples they are as hard as they get, and the
    smallest letters (`SyntheticSource`).

    Raises `InvalidRequest`.
    """
    match = _DATA.fullmatch(data.removeprefix(PREFIX))
    if match is None:
        raise InvalidRequest(f"{data!r}: expected families, then @SAMPLES and >PIXELS where wanted", param="data")
    ramp, smallest_px = (int(number or 0) for number in match.groups()[1:])
    return SyntheticSource(families(match[1]), lane=lane, lanes=lanes, seed=seed, ramp=ramp, smallest_px=smallest_px)


def knobs_at(share: float) -> Knobs:
    """From `EASY` to `TRAINING`: more things, smaller letters, longer words, more lines."""

    def between(easy: int, hard: int) -> int:
        return round(easy + (hard - easy) * share)

    return replace(
        TRAINING,
        objects=between(EASY.objects, TRAINING.objects),
        letters=between(EASY.letters, TRAINING.letters),
        lines=between(EASY.lines, TRAINING.lines),
        text_px=(between(EASY.text_px[0], TRAINING.text_px[0]), TRAINING.text_px[1]),
    )


@cache
def families(text: str) -> tuple[tuple[str, float], ...]:
    """`videos*2+images`, `shapes+when*3`: families, or groups of them that share their group's weight.

    Raises `InvalidRequest` naming the part that is unknown.
    """
    groups = {"images": tuple(IMAGES), "videos": tuple(VIDEOS), "all": tuple(TASKS), "dense": tuple(DENSE)}
    weights: dict[str, float] = {}
    for part in text.split("+"):
        match = _PART.fullmatch(part)
        names = groups.get(match[1], (match[1],)) if match else ()
        if match is None or any(name not in FAMILIES for name in names):
            raise InvalidRequest(
                f"{part!r} is no task family; there are {', '.join([*groups, *FAMILIES])}", param="data"
            )
        for name in names:
            weights[name] = weights.get(name, 0.0) + float(match[2] or 1) / len(names)
    return tuple(weights.items())


class ListedSource:
    """Generated samples by family and number, shuffled anew every epoch: what pruning kept (`train/prune.py`)."""

    def __init__(self, kept: dict[str, list[int]], *, lane: int, lanes: int, seed: int, data_seed: int = 0) -> None:
        self._kept = [(family, index) for family, indices in kept.items() for index in indices]
        if not self._kept:
            raise InvalidRequest("the list of kept samples is empty", param="data")
        self._lane, self._lanes, self._seed, self._data_seed = lane, lanes, seed, data_seed
        self._next = 0

    def __len__(self) -> int:
        return -(-len(self._kept) // self._lanes)

    def __iter__(self) -> Iterator[Sample]:
        while True:
            epoch, place = divmod(self._lane + self._lanes * self._next, len(self._kept))
            self._next += 1
            order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._kept))
            family, index = self._kept[int(order[place])]
            yield make_sample(family, Split.TRAIN, self._data_seed, index)

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = int(state["next"])
