"""Shapes on a ground, told in full: every thing with its place, and then the questions of `shapes` about the same."""

from __future__ import annotations

from collections import Counter

from nvila.train.data.draw import COLOURS, SHAPES, Draw
from nvila.train.data.made import Made, Turn, images, told_last
from nvila.train.data.tasks.shapes import (
    COLOR_QUESTIONS,
    COUNT_QUESTIONS,
    PLACES,
    POSITION_QUESTIONS,
    RELATION_QUESTIONS,
    SHAPE_QUESTIONS,
    SIDES,
    VERIFY_QUESTIONS,
    Thing,
    arrange,
    many,
)

DESCRIBE = ("Describe the picture.", "What is in the picture?", "List everything you see.")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")

At = tuple[float, float]
"""The centre of a thing, in shares of the picture's side."""


def make(draw: Draw) -> Made:
    count = draw.whole(1, draw.knobs.objects)
    hues, kinds = draw.some_of(tuple(COLOURS), draw.whole(1, 3)), draw.some_of(SHAPES, draw.whole(1, 3))
    things: list[Thing] = [(draw.one_of(hues), draw.one_of(kinds)) for _ in range(count)]
    if draw.chance(0.5):  # else what is asked for can be guessed: most of few things look alike
        things = [*zip(draw.some_of(tuple(COLOURS), count), draw.some_of(SHAPES, count), strict=True)]
    picture, centres, truth_KHW = arrange(draw, things, draw.knobs.canvas_px // 2)
    order = sorted(range(count), key=lambda i: (_third(centres[i][1]), centres[i][0]))
    things, centres = [things[i] for i in order], [centres[i] for i in order]
    told = ", ".join(f"{hue} {kind} {place(*at)}" for (hue, kind), at in zip(things, centres, strict=True))
    asked: list[Turn] = [(draw.one_of(DESCRIBE), f"{count}: {told}"), *_traits(draw, things)]
    asked += [*_counts(draw, things), *_places(draw, things, centres), *_relations(draw, things, centres)]
    (question, answer), more = told_last(draw, asked)
    return Made(
        task="scene",
        question=question,
        answer=answer,
        media=images(picture),
        more=more,
        cues=_cues(draw, things, centres),
        truth_KHW=truth_KHW,
    )


def _third(share: float) -> int:
    return min(2, int(share * 3))


def place(x: float, y: float) -> str:
    """Of a point, in shares of the picture's width and height: `top left`, `left`, `center`."""
    return f"{ROWS[_third(y)]} {COLUMNS[_third(x)]}".strip() or "center"


def _traits(draw: Draw, things: list[Thing]) -> list[Turn]:
    """Colour by shape and shape by colour where only one thing fits, openly and among options."""
    turns: list[Turn] = []
    for names, other, ways, options in (
        ([kind for _, kind in things], [hue for hue, _ in things], COLOR_QUESTIONS, tuple(COLOURS)),
        ([hue for hue, _ in things], [kind for _, kind in things], SHAPE_QUESTIONS, SHAPES),
    ):
        for name, trait in zip(names, other, strict=True):
            if names.count(name) > 1:
                continue
            turns.append((draw.one_of(ways).format(name), trait))
            wrong = draw.some_of([option for option in options if option != trait], 3)
            right = draw.whole(0, 3)
            listed = [*wrong[:right], trait, *wrong[right:]]
            lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", listed, strict=True))
            turns.append((f"{ways[0].format(name)}\n{lines}\nAnswer with the letter.", "ABCD"[right]))
    return turns


def _cues(draw: Draw, things: list[Thing], centres: list[At]) -> tuple[Turn, ...]:
    """The shortest questions that the picture answers: "star color" is red."""
    kinds, hues = [kind for _, kind in things], [hue for hue, _ in things]
    cues = [(f"{kind} color", f" {hue}") for hue, kind in things if kinds.count(kind) == 1]
    cues += [(f"{hue} shape", f" {kind}") for hue, kind in things if hues.count(hue) == 1]
    cues += [(f"{many((kind, kind), 'shape')} number", f" {kinds.count(kind)}") for kind in dict.fromkeys(kinds)]
    cues += [(f"{many((hue, hue), 'color')} number", f" {hues.count(hue)}") for hue in dict.fromkeys(hues)]
    cues += [
        (f"{' '.join(thing)} place", f" {place(*at)}")
        for thing, at in zip(things, centres, strict=True)
        if things.count(thing) == 1
    ]
    cues += [(f"{one}, {other}", f" {side}") for one, other, side in _sides(things, centres)]
    return tuple(draw.some_of(cues, min(len(cues), 2 * draw.knobs.questions)))


def _counts(draw: Draw, things: list[Thing]) -> list[Turn]:
    turns: list[Turn] = []
    for way, counted in (
        ("shape", Counter(kind for _, kind in things)),
        ("color", Counter(hue for hue, _ in things)),
        ("both", Counter(" ".join(thing) for thing in things)),
    ):
        for name, number in counted.items():
            thing = (name, name) if way != "both" else tuple(name.split())
            turns.append((draw.one_of(COUNT_QUESTIONS).format(many((thing[0], thing[1]), way)), str(number)))
    return turns


def _places(draw: Draw, things: list[Thing], centres: list[At]) -> list[Turn]:
    return [
        (draw.one_of(POSITION_QUESTIONS).format(" ".join(thing)), place(*at))
        for thing, at in zip(things, centres, strict=True)
        if things.count(thing) == 1 and place(*at) in PLACES
    ]


def _relations(draw: Draw, things: list[Thing], centres: list[At]) -> list[Turn]:
    turns: list[Turn] = []
    for one, other, side in _sides(things, centres):
        turns.append((draw.one_of(RELATION_QUESTIONS).format(one, other), side))
        right, down = SIDES[side]
        opposite = next(name for name, way in SIDES.items() if way == (-right, -down))
        claimed = draw.one_of((side, opposite))
        claim = draw.one_of(VERIFY_QUESTIONS).format(one, claimed, other)
        turns.append((claim, "yes" if claimed == side else "no"))
    return turns


def _sides(things: list[Thing], centres: list[At]) -> list[tuple[str, str, str]]:
    """Pairs that stand clearly beside, or clearly above each other, and how the first stands to the second."""
    found: list[tuple[str, str, str]] = []
    for one, at in zip(things, centres, strict=True):
        for other, its_at in zip(things, centres, strict=True):
            dx, dy = at[0] - its_at[0], at[1] - its_at[1]
            if max(things.count(one), things.count(other)) > 1:
                continue
            if max(abs(dx), abs(dy)) < 0.25 or min(abs(dx), abs(dy)) > 0.12:
                continue
            step = (round(dx / abs(dx)), 0) if abs(dx) > abs(dy) else (0, round(dy / abs(dy)))
            side = next(name for name, way in SIDES.items() if way == step)
            found.append((" ".join(one), " ".join(other), side))
    return found
