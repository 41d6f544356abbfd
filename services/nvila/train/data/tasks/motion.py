"""Moving shapes: which way, and which of several."""

from __future__ import annotations

from PIL import Image

from nvila.train.data.clips import film, length
from nvila.train.data.draw import COLOURS, SHAPES, Draw, background, paste, stamp, tint
from nvila.train.data.made import Made, clip

WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def make(draw: Draw) -> Made:
    return draw.one_of((direction, mover))(draw)


def direction(draw: Draw) -> Made:
    """Which way the only moving shape goes; another may stand by."""
    way = draw.one_of(tuple(WAYS))
    hues, kinds = draw.some_of(tuple(COLOURS), 2), draw.some_of(SHAPES, 2)
    question = draw.one_of(
        (
            "Which way does the {} move?",
            "In which direction does the {} move?",
            "Where does the {} go: left, right, up or down?",
        )
    ).format(f"{hues[0]} {kinds[0]}")
    ways: list[str | None] = [way, None] if draw.chance(0.5) else [way]
    return _made(draw, "direction", question, way, hues, kinds, ways)


def mover(draw: Draw) -> Made:
    """Which of two or three shapes goes a given way."""
    count = draw.whole(2, 3)
    hues, kinds = draw.some_of(tuple(COLOURS), count), draw.some_of(SHAPES, count)
    ways: list[str | None] = list(draw.some_of(tuple(WAYS), count))
    asked = draw.whole(0, count - 1)
    question = draw.one_of(("Which shape moves {}?", "What shape goes {}?", "Name the shape that moves {}."))
    return _made(draw, "mover", question.format(ways[asked]), kinds[asked], hues, kinds, ways)


def _made(
    draw: Draw, task: str, question: str, answer: str, hues: list[str], kinds: list[str], ways: list[str | None]
) -> Made:
    side, frames = draw.knobs.video_px, length(draw)
    used = list(zip(hues, kinds, ways, strict=False))
    ground = background(draw, side, side, avoid=[COLOURS[hue] for hue, _, _ in used])
    size = round(side * 0.2)
    # Those that go sideways share the height, those that go up or down the width: each has a lane of its own.
    paths = [_path(draw, side, size, lane, len(used), way) for lane, (_, _, way) in enumerate(used)]
    stamps = [stamp(kind, size, tint(draw, COLOURS[hue])) for hue, kind, _ in used]

    def paint(frame: Image.Image, number: int) -> None:
        done = number / max(1, frames - 1)
        for picture, (start, end) in zip(stamps, paths, strict=True):
            x, y = (a + (b - a) * done for a, b in zip(start, end, strict=True))
            paste(frame, picture, (x, y))

    film_FHWC = film(ground, frames, paint)
    return Made(task=task, question=question, answer=answer, media=clip(film_FHWC, draw.knobs.video_fps))


def _path(
    draw: Draw, side: int, size: int, lane: int, lanes: int, way: str | None
) -> tuple[tuple[float, float], tuple[float, float]]:
    low, high = size / 2, side - size / 2
    across = low + (high - low) * (lane + 0.5) / lanes
    reach = (high - low) * draw.real(0.45, 0.95)
    first = draw.real(low, high - reach)
    right, down = WAYS[way] if way else (0, 0)
    if way is None:
        at = (draw.real(low, high), across)
        return at, at
    begin, end = (first, first + reach) if right + down > 0 else (first + reach, first)
    return ((begin, across), (end, across)) if right else ((across, begin), (across, end))
