"""What a task makes of a draw: a question, its answer, and pictures or a clip (a `Sample` without its name)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvila.train.data.draw import Draw, pixels
from nvila.train.samples import SampleMedia
from nvila.types import MediaKind

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """`task`: after the family's dot. `answers`: besides `answer`, what counts as right too. `more`: further questions
    about the same media with their answers, as many as the knobs allow. `cues`: `samples.Sample`. `truth_KHW`: what
    each pixel of a picture shows (`tasks/truth.py`)."""

    task: str
    question: str
    answer: str
    media: tuple[SampleMedia, ...]
    metric: str = "exact"
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    more: tuple[Turn, ...] = ()
    cues: tuple[Turn, ...] = ()
    truth_KHW: NDArray[np.uint8] | None = None


def further(draw: Draw, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """What is asked besides the first question: some of these, in random order."""
    return tuple(draw.some_of(turns, min(len(turns), draw.knobs.questions - 1)))


def told_last(draw: Draw, turns: Sequence[Turn]) -> tuple[Turn, tuple[Turn, ...]]:
    """The question to begin with, and the further ones. The first of `turns`, which tells everything, comes last or
    alone: no answer can be copied from it."""
    others = draw.some_of(turns[1:], len(turns) - 1)
    if not others or draw.chance(0.15):
        return turns[0], ()
    room = draw.knobs.questions - 1
    return others[0], (*others[1:room], turns[0]) if room else ()


def images(*pictures: Image.Image) -> tuple[SampleMedia, ...]:
    return tuple(SampleMedia(kind=MediaKind.IMAGE, frames_FHWC=pixels(picture)) for picture in pictures)


def clip(frames: Sequence[Image.Image] | NDArray[np.uint8], fps: float) -> tuple[SampleMedia, ...]:
    """One video of equal steps. Its duration is its frame count over its rate, as the reference takes it."""
    if isinstance(frames, np.ndarray):
        frames_FHWC = frames
    else:
        frames_FHWC = np.stack([np.asarray(frame.convert("RGB"), dtype=np.uint8) for frame in frames])
    count = len(frames_FHWC)
    times_s = tuple(round(i / fps, 4) for i in range(count))
    return (SampleMedia(kind=MediaKind.VIDEO, frames_FHWC=frames_FHWC, times_s=times_s, duration_s=count / fps),)
