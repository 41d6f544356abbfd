"""What training and evaluation see of a data set: conversations with their decoded media. NumPy only.

A `SampleStream` (train/data/stream.py) yields `Sample`s; `train/labels.py` and `model/prompt.py` turn one into token
ids and labels, the vision tower turns its media into visual tokens. Nothing here knows of files or of tokens.

F frames · H, W rows and columns of pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nvila.model.preprocess import resize_exact
from nvila.types import MediaKind, MediaPart, Message, Role, TextPart
from nvila.video.sampling import uniform_indices

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleMedia:
    """One image, or the stored frames of one video. frames_FHWC: uint8 RGB; an image has one frame.

    `times_s`: each frame's presentation time; empty for an image. `duration_s`: of the whole clip, 0 for an image. A
    clip is usually stored with more frames than a model looks at: `look` chooses.
    """

    kind: MediaKind
    frames_FHWC: NDArray[np.uint8]
    times_s: tuple[float, ...] = ()
    duration_s: float = 0.0

    def look(self, num_frames: int, side_px: int) -> NDArray[np.uint8]:
        """`num_frames` frames of a video by the reference's rule (NVILA-SPEC §5.1), resized to (side, side).

        What the decode workers hand to the vision tower. Returns uint8 (F, side, side, 3).
        """
        indices = uniform_indices(len(self.frames_FHWC), num_frames)
        seen = {i: resize_exact(self.frames_FHWC[i], side_px, side_px) for i in dict.fromkeys(indices)}
        return np.stack([seen[i] for i in indices])


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A conversation that ends with the answer to be learned, and the media it is about, in the order of its parts.

    `source` and `index`: the data set and the place in it, which name the sample (and its line, for a JSON file).
    `task`: such as `shapes.count`; the part before the dot is the family that figures are reported by. `metric`: how
    an answer is judged (train/evaluation/metrics.py); `answers`: all that count as right, the first being the one that
    is trained; `choices`: for multiple choice, the options in the order of their letters.
    """

    source: str
    index: int
    task: str
    messages: tuple[Message, ...]
    media: tuple[SampleMedia, ...] = ()
    metric: str = "exact"
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    """What the generator knows besides: font, text height in pixels, layout. Never shown to a model."""
    cues: tuple[tuple[str, str], ...] = ()
    """Questions of a few words about the media, and what follows them at once; asked only where questions are asked
    apart (`prepare.PrepareSettings`)."""
    truth_KHW: NDArray[np.uint8] | None = None
    """What each pixel of the only picture shows, for naming patches and visual tokens (data/tasks/truth.py)."""
    where: str = ""
    """File and line, or shard and member, for people; empty for a sample that no file holds."""

    @property
    def name(self) -> str:
        return f"{self.source}:{self.index}"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation without its last answer: what a model is asked."""
        return self.messages[:-1] if self.messages[-1].role is Role.ASSISTANT else self.messages

    @property
    def answer(self) -> str:
        """The last answer, as it is trained; empty if the conversation ends with a question."""
        return text_of(self.messages[-1]) if self.messages[-1].role is Role.ASSISTANT else ""

    @property
    def question(self) -> str:
        """The text of the last question."""
        return next((text_of(message) for message in reversed(self.messages) if message.role is Role.USER), "")

    @property
    def duration_s(self) -> float:
        """Of the last video, as the reference takes it for time tokens (NVILA-SPEC §6.8); 0 without one."""
        return next((media.duration_s for media in reversed(self.media) if media.kind is MediaKind.VIDEO), 0.0)


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """What stands in the place of a sample that cannot be read: its file and line, and what is wrong with it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class SampleSource(Protocol):
    """What a training loop asks of data: samples without end, and a position that a checkpoint can hold.

    `state()` counts only places that the iterator has handed out, however many are already being decoded, and is
    plain JSON. `restore(state)` comes before iteration; what follows is exactly what would have followed then.
    """

    def __iter__(self) -> Iterator[Sample | Unusable]: ...

    def __len__(self) -> int:
        """Samples of one epoch on this rank."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


def usable(source: Iterable[Sample | Unusable]) -> Iterator[Sample]:
    """The samples alone; what cannot be read is logged."""
    for sample in source:
        if isinstance(sample, Unusable):
            logger.warning("left out %s", sample)
        else:
            yield sample


def text_of(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, TextPart)).strip()


def ask(question: str, answer: str, media: int, more: Sequence[tuple[str, str]] = ()) -> tuple[Message, ...]:
    """A question about `media` items, all of them before its text, and the answer; then `more` of both."""
    parts: tuple[TextPart | MediaPart, ...] = (*map(MediaPart, range(media)), TextPart(question))
    asked = [Message(Role.USER, parts), Message(Role.ASSISTANT, (TextPart(answer),))]
    for further, its_answer in more:
        asked += [Message(Role.USER, (TextPart(further),)), Message(Role.ASSISTANT, (TextPart(its_answer),))]
    return tuple(asked)
