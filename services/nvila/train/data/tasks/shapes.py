"""Shapes on a ground: what colour, how many, where, and how two of them stand to each other."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvila.train.data.draw import COLOURS, SHAPES, Colour, Draw, background, paste, places, stamp, tint
from nvila.train.data.made import Made, images
from nvila.train.data.tasks.truth import put, unknown

Thing = tuple[str, str]
"""(colour, shape) by name."""

PLACES = ("top left", "top right", "bottom left", "bottom right", "center")
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

COLOR_QUESTIONS = (
    "What color is the {}?",
    "Which color does the {} have?",
    "What is the color of the {}?",
    "Name the color of the {}.",
    "The {} is which color?",
)
SHAPE_QUESTIONS = (
    "What shape is {}?",
    "Which shape is {}?",
    "What is the {} shape?",
    "Name the {} shape.",
    "What shape is the {} object?",
)
COUNT_QUESTIONS = (
    "How many {} are there?",
    "How many {} do you see?",
    "Count the {}.",
    "What is the number of {}?",
    "How many {} are in the picture?",
)
POSITION_QUESTIONS = (
    "Where is the {}?",
    "In which part of the picture is the {}?",
    "What is the position of the {}?",
    "Where do you see the {}?",
)
RELATION_QUESTIONS = (
    "Where is the {} relative to the {}: left of, right of, above or below?",
    "Is the {} left of, right of, above or below the {}?",
)
VERIFY_QUESTIONS = ("Is the {} {} the {}?", "Do you see the {} {} the {}?")


def make(draw: Draw) -> Made:
    return draw.one_of((colour, shape, count, position, relation, choice))(draw)


def colour(draw: Draw) -> Made:
    """The colour of the only shape of its kind, among others."""
    asked = draw.one_of(tuple(COLOURS))
    kinds = draw.some_of(SHAPES, draw.whole(1, min(4, draw.knobs.objects)))
    things = [(asked, kinds[0]), *((draw.one_of(tuple(COLOURS)), kind) for kind in kinds[1:])]
    question = draw.one_of(COLOR_QUESTIONS)
    return Made(task="color", question=question.format(kinds[0]), answer=asked, media=images(scatter(draw, things)))


def shape(draw: Draw) -> Made:
    """The shape that is of a colour."""
    asked = draw.one_of(SHAPES)
    colours = draw.some_of(tuple(COLOURS), draw.whole(1, min(4, draw.knobs.objects)))
    things = [(colours[0], asked), *((other, draw.one_of(SHAPES)) for other in colours[1:])]
    question = draw.one_of(SHAPE_QUESTIONS)
    return Made(task="shape", question=question.format(colours[0]), answer=asked, media=images(scatter(draw, things)))


def count(draw: Draw) -> Made:
    """How many there are of a kind, with others in between."""
    number = draw.whole(1, draw.knobs.count)
    wanted = (draw.one_of(tuple(COLOURS)), draw.one_of(SHAPES))
    way = draw.one_of(("shape", "color", "both"))
    others = _others(draw, wanted, way)
    things = []
    for _ in range(number):
        kind = wanted[1] if way != "color" else draw.one_of(SHAPES)
        hue = wanted[0] if way != "shape" else draw.one_of(tuple(COLOURS))
        things.append((hue, kind))
    things += [draw.one_of(others) for _ in range(draw.whole(0, 3))]
    question = draw.one_of(COUNT_QUESTIONS)
    return Made(
        task="count",
        question=question.format(many(wanted, way)),
        answer=str(number),
        media=images(scatter(draw, things)),
        notes={"objects": len(things)},
    )


def position(draw: Draw) -> Made:
    """In which part of the picture a shape is."""
    asked = draw.one_of(PLACES)
    side = draw.knobs.canvas_px // 2
    hues = draw.some_of(tuple(COLOURS), draw.whole(1, 4))
    kinds = draw.some_of(SHAPES, len(hues))
    spots = [asked, *draw.some_of([place for place in PLACES if place != asked], len(hues) - 1)]
    picture = background(draw, side, side, avoid=[COLOURS[hue] for hue in hues])
    centres = dict(zip(PLACES, [(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8), (0.5, 0.5)], strict=True))
    for hue, kind, spot in zip(hues, kinds, spots, strict=True):
        x, y = (side * (at + draw.real(-0.06, 0.06)) for at in centres[spot])
        paste(picture, _stamp(draw, (hue, kind), side * draw.real(0.16, 0.24)), (x, y))
    question = draw.one_of(POSITION_QUESTIONS)
    return Made(task="position", question=question.format(f"{hues[0]} {kinds[0]}"), answer=asked, media=images(picture))


def relation(draw: Draw) -> Made:
    """How two shapes stand to each other: as a word, or true or not."""
    side = draw.knobs.canvas_px // 2
    (hue, other_hue), (kind, other_kind) = draw.some_of(tuple(COLOURS), 2), draw.some_of(SHAPES, 2)
    asked = draw.one_of(tuple(SIDES))
    right, down = SIDES[asked]
    apart, aside = draw.real(0.3, 0.5) * side, draw.real(-0.08, 0.08) * side
    dx, dy = right * apart + (not right) * aside, down * apart + (not down) * aside
    size = side * draw.real(0.16, 0.22)
    room_x, room_y = (side - abs(dx) - size) / 2 - 2, (side - abs(dy) - size) / 2 - 2
    x, y = side / 2 + draw.real(-room_x, room_x), side / 2 + draw.real(-room_y, room_y)
    picture = background(draw, side, side, avoid=[COLOURS[hue], COLOURS[other_hue]])
    paste(picture, _stamp(draw, (hue, kind), size), (x + dx / 2, y + dy / 2))
    paste(picture, _stamp(draw, (other_hue, other_kind), size), (x - dx / 2, y - dy / 2))
    one, other = f"{hue} {kind}", f"{other_hue} {other_kind}"
    if draw.chance(0.5):
        question = draw.one_of(RELATION_QUESTIONS)
        return Made(task="relation", question=question.format(one, other), answer=asked, media=images(picture))
    is_so = draw.chance(0.5)
    opposite = next(name for name, step in SIDES.items() if step == (-right, -down))
    question = draw.one_of(VERIFY_QUESTIONS)
    claimed = asked if is_so else opposite
    return Made(
        task="verify",
        question=question.format(one, claimed, other),
        answer="yes" if is_so else "no",
        media=images(picture),
    )


def choice(draw: Draw) -> Made:
    """A colour or shape among four options with letters."""
    asks_colour = draw.chance(0.5)
    options = draw.some_of(tuple(COLOURS) if asks_colour else SHAPES, 4)
    right = draw.whole(0, 3)
    thing = (options[right], draw.one_of(SHAPES)) if asks_colour else (draw.one_of(tuple(COLOURS)), options[right])
    question = f"What color is the {thing[1]}?" if asks_colour else f"What shape is {thing[0]}?"
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    return Made(
        task="choice",
        question=f"{question}\n{listed}\nAnswer with the letter.",
        answer="ABCD"[right],
        media=images(scatter(draw, [thing])),
        metric="choice",
        choices=tuple(options),
    )


def scatter(draw: Draw, things: list[Thing], side: int = 0) -> Image.Image:
    """Things of different sizes on one ground, none over another."""
    return arrange(draw, things, side or draw.knobs.canvas_px // 2)[0]


def arrange(
    draw: Draw, things: list[Thing], side: int
) -> tuple[Image.Image, list[tuple[float, float]], NDArray[np.uint8]]:
    """`scatter`, where the centre of each thing is, in shares of the side, and what each pixel shows (`truth`)."""
    picture = background(draw, side, side, avoid=[COLOURS[hue] for hue, _ in things])
    largest = {1: 0.5, 2: 0.34, 3: 0.3, 4: 0.27}.get(len(things), 0.22)
    sizes = [side * draw.real(0.15, largest) for _ in things]
    centres = places(draw, side, side, sizes)
    truth_KHW = unknown(picture)
    for thing, size, centre in zip(things, sizes, centres, strict=True):
        put(picture, truth_KHW, _stamp(draw, thing, size), centre, thing)
    return picture, [(x / side, y / side) for x, y in centres], truth_KHW


def many(thing: Thing, way: str) -> str:
    """Things like this one by `shape`, `color` or `both`, in the plural."""
    named = {"shape": f"{thing[1]}s", "color": f"{thing[0]} shapes", "both": f"{thing[0]} {thing[1]}s"}[way]
    return named.replace("crosss", "crosses")


def _stamp(draw: Draw, thing: Thing, size: float) -> Image.Image:
    shade: Colour = tint(draw, COLOURS[thing[0]])
    return stamp(thing[1], round(size), shade, draw.real(-14, 14))


def _others(draw: Draw, wanted: Thing, way: str) -> list[Thing]:
    """What is not to be counted."""
    hue, kind = wanted
    if way == "shape":
        return [thing for thing in product(COLOURS, SHAPES) if thing[1] != kind]
    if way == "color":
        return [thing for thing in product(COLOURS, SHAPES) if thing[0] != hue]
    return [thing for thing in product(COLOURS, SHAPES) if (thing[0] == hue) != (thing[1] == kind)]
