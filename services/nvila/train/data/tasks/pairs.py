"""Several pictures in one question: which of them, the same or not, and where there are more."""

from __future__ import annotations

from nvila.train.data.draw import COLOURS, SHAPES, Draw
from nvila.train.data.made import Made, images
from nvila.train.data.tasks.shapes import Thing, scatter

ORDINALS = ("first", "second", "third")


def make(draw: Draw) -> Made:
    return draw.one_of((find, same, more))(draw)


def find(draw: Draw) -> Made:
    """Which picture holds a thing; the others hold something like it."""
    count = draw.whole(2, 3)
    right = draw.whole(0, count - 1)
    wanted = (draw.one_of(tuple(COLOURS)), draw.one_of(SHAPES))
    pictures = [[wanted if i == right else _like(draw, wanted)] for i in range(count)]
    for things in pictures:
        things += [_like(draw, wanted) for _ in range(draw.whole(0, 2))]
    question = draw.one_of(
        (
            "Which picture has a {}?",
            "In which picture is the {}?",
            "Which image shows the {}?",
            "Where is the {}: {}?",
        )
    ).format(" ".join(wanted), _options(count))
    return _made(draw, "find", question, ORDINALS[right], pictures)


def same(draw: Draw) -> Made:
    """Whether one thing in two pictures has the same colour, or the same shape."""
    is_same, asks_colour = draw.chance(0.5), draw.chance(0.5)
    hues, kinds = draw.some_of(tuple(COLOURS), 2), draw.some_of(SHAPES, 2)
    if is_same:
        (hues if asks_colour else kinds)[1] = (hues if asks_colour else kinds)[0]
    pictures: list[list[Thing]] = [[(hues[0], kinds[0])], [(hues[1], kinds[1])]]
    what = "color" if asks_colour else "shape"
    question = draw.one_of(
        (
            "Do both pictures show the same {}?",
            "Is the {} the same in both pictures?",
            "Are the two objects of the same {}?",
        )
    ).format(what)
    return _made(draw, "same", question, "yes" if is_same else "no", pictures)


def more(draw: Draw) -> Made:
    """Where there are more, or fewer, of a thing."""
    few, many = sorted(draw.some_of(range(1, draw.knobs.count + 1), 2))
    right, asks_more = draw.whole(0, 1), draw.chance(0.5)
    wanted = (draw.one_of(tuple(COLOURS)), draw.one_of(SHAPES))
    counts = [few, few]
    counts[right if asks_more else 1 - right] = many
    pictures = [[wanted] * number + [_like(draw, wanted) for _ in range(draw.whole(0, 1))] for number in counts]
    named = f"{' '.join(wanted)}s".replace("crosss", "crosses")
    question = draw.one_of(
        ("Which picture has {} {}?", "Which image shows {} {}?", "In which picture are there {} {}?")
    ).format("more" if asks_more else "fewer", named)
    return _made(draw, "more", question, ORDINALS[right], pictures)


def _made(draw: Draw, task: str, question: str, answer: str, pictures: list[list[Thing]]) -> Made:
    side = draw.knobs.canvas_px // 2
    return Made(
        task=task, question=question, answer=answer, media=images(*(scatter(draw, things, side) for things in pictures))
    )


def _like(draw: Draw, thing: Thing) -> Thing:
    """Another thing with one trait in common."""
    hue, kind = thing
    if draw.chance(0.5):
        return hue, draw.one_of([other for other in SHAPES if other != kind])
    return draw.one_of([other for other in COLOURS if other != hue]), kind


def _options(count: int) -> str:
    return ", ".join(ORDINALS[: count - 1]) + f" or {ORDINALS[count - 1]}"
