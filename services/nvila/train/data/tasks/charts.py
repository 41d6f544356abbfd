"""Charts: the value of a bar or point, the largest share, what rises and falls."""

from __future__ import annotations

from PIL import Image, ImageDraw

from nvila.train.data import words
from nvila.train.data.draw import COLOURS, Colour, Draw, tint, write
from nvila.train.data.fonts import Face
from nvila.train.data.made import Made, Turn, further, images

CHARTS = ("bars", "rows", "line")
HELD_OUT_CHARTS = ("stems",)
INKS = ("red", "blue", "green", "purple", "orange", "brown")
STEP = 10
"""Values are multiples of it, and so are the lines of the grid: they can be read off exactly."""


def make(draw: Draw) -> Made:
    return draw.one_of((value, extreme, pie))(draw)


def value(draw: Draw) -> Made:
    names, values = _series(draw)
    asked = draw.whole(0, len(names) - 1)
    question = draw.one_of(VALUE_QUESTIONS).format(names[asked])
    picture, style = _chart(draw, names, values)
    return Made(
        task="value",
        question=question,
        answer=str(values[asked]),
        media=images(picture),
        notes={"layout": style},
        more=further(draw, _values(draw, names, values)),
    )


VALUE_QUESTIONS = ("What is the value of {}?", "How much is {}?", "What value does {} have?", "Read the value of {}.")


def _values(draw: Draw, names: list[str], values: list[int]) -> list[Turn]:
    return [(draw.one_of(VALUE_QUESTIONS).format(name), str(value)) for name, value in zip(names, values, strict=True)]


def extreme(draw: Draw) -> Made:
    names, values = _series(draw)
    is_largest = draw.chance(0.5)
    answer = names[values.index(max(values) if is_largest else min(values))]
    question = draw.one_of(("Which has the {} value?", "What is {}?", "Which one is {}?")).format(
        "highest" if is_largest else "lowest"
    )
    picture, style = _chart(draw, names, values)
    return Made(
        task="extreme",
        question=question,
        answer=answer,
        media=images(picture),
        metric="anls",
        notes={"layout": style},
        more=further(draw, _values(draw, names, values)),
    )


def pie(draw: Draw) -> Made:
    """The colour of the largest or smallest share; shares differ by a tenth at least."""
    count = draw.whole(3, 5)
    hues = draw.some_of(INKS, count)
    shares = draw.some_of(draw.one_of([s for s in _SHARES if len(s) == count]), count)
    is_largest = draw.chance(0.5)
    answer = hues[shares.index(max(shares) if is_largest else min(shares))]
    side = draw.knobs.canvas_px // 2
    picture = Image.new("RGB", (side * 3, side * 3), tint(draw, (248, 248, 248), 6))
    pen = ImageDraw.Draw(picture)
    box = tuple(side * 3 * at for at in (0.1, 0.1, 0.9, 0.9))
    angle = draw.real(0, 360)
    for hue, share in zip(hues, shares, strict=True):
        pen.pieslice(box, angle, angle + share * 3.6, fill=tint(draw, COLOURS[hue]), outline=(250, 250, 250), width=6)
        angle += share * 3.6
    if draw.layout((False,), (True,)):  # with a hole
        hole = tuple(side * 3 * at for at in (0.32, 0.32, 0.68, 0.68))
        pen.ellipse(hole, fill=(248, 248, 248))
    question = draw.one_of(
        (
            "What color is the {} slice?",
            "Which color has the {} share?",
            "What is the color of the {} part of the pie?",
        )
    ).format("largest" if is_largest else "smallest")
    small = picture.resize((side, side), Image.Resampling.BOX)
    return Made(task="pie", question=question, answer=answer, media=images(small))


_SHARES: tuple[tuple[int, ...], ...] = (
    (60, 30, 10),
    (50, 35, 15),
    (45, 33, 22),
    (45, 28, 17, 10),
    (42, 30, 20, 8),
    (40, 26, 18, 11, 5),
)
"""Percent; neighbours in size differ by a quarter or more."""


def _series(draw: Draw) -> tuple[list[str], list[int]]:
    """Short names and values, all different."""
    names = [words.MONTHS[i] for i in sorted(draw.some_of(range(12), draw.whole(3, 6)))]
    if draw.chance(0.5):
        names = [name for name in draw.some_of(words.PEOPLE, 12) if len(name) <= 5][: draw.whole(3, 5)]
    return names, [STEP * tens for tens in draw.some_of(range(1, 10), len(names))]


def _chart(draw: Draw, names: list[str], values: list[int]) -> tuple[Image.Image, str]:
    style = draw.layout(CHARTS, HELD_OUT_CHARTS)
    width = draw.knobs.canvas_px
    height = width * 3 // 4
    paper: Colour = tint(draw, (250, 250, 250), 5)
    picture = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(picture)
    face = draw.face("sans", "serif", "slab")
    hue: Colour = tint(draw, COLOURS[draw.one_of(INKS)])
    is_labelled = draw.chance(0.5)
    if style == "rows":
        _rows(pen, width, height, names, values, face, hue, is_labelled)
    else:
        _columns(pen, style, width, height, names, values, face, hue, is_labelled)
    return picture, style


_PALE: Colour = (214, 214, 218)
_INK: Colour = (40, 40, 46)


def _columns(
    pen: ImageDraw.ImageDraw,
    style: str,
    width: int,
    height: int,
    names: list[str],
    values: list[int],
    face: Face,
    hue: Colour,
    is_labelled: bool,
) -> None:
    """Bars, a line, or stems, over a grid from 0 to 100."""
    font = face.font(max(11, width // 24))
    left, top, right, bottom = width * 0.12, height * 0.08, width * 0.97, height * 0.86
    for level in range(0, 101, 20):
        level_y = round(bottom - (bottom - top) * level / 100)
        pen.line((left, level_y, right, level_y), fill=_PALE if level else _INK)
        write(pen, (left - width * 0.015, level_y), str(level), font, _INK, "rm")
    step = (right - left) / len(values)
    points = [(left + step * (i + 0.5), bottom - (bottom - top) * value / 100) for i, value in enumerate(values)]
    if style == "line":
        pen.line([(round(x), round(y)) for x, y in points], fill=hue, width=max(2, width // 150))
    for (x, y), name, value in zip(points, names, values, strict=True):
        if style == "bars":
            pen.rectangle((round(x - step * 0.32), round(y), round(x + step * 0.32), round(bottom)), fill=hue)
        else:
            if style == "stems":
                pen.line((round(x), round(y), round(x), round(bottom)), fill=hue, width=max(2, width // 150))
            dot = width / 75
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=hue)
        if is_labelled:
            write(pen, (x, y - height * 0.025), str(value), font, _INK, "ms")
        write(pen, (x, bottom + height * 0.03), name, font, _INK, "ma")


def _rows(
    pen: ImageDraw.ImageDraw,
    width: int,
    height: int,
    names: list[str],
    values: list[int],
    face: Face,
    hue: Colour,
    is_labelled: bool,
) -> None:
    """Bars that lie."""
    font = face.font(max(11, width // 24))
    left, top, right, bottom = width * 0.2, height * 0.05, width * 0.93, height * 0.87
    for level in range(0, 101, 20):
        x = round(left + (right - left) * level / 100)
        pen.line((x, top, x, bottom), fill=_PALE if level else _INK)
        write(pen, (x, bottom + height * 0.03), str(level), font, _INK, "ma")
    step = (bottom - top) / len(values)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y, end = top + step * (i + 0.5), left + (right - left) * value / 100
        pen.rectangle((round(left), round(y - step * 0.32), round(end), round(y + step * 0.32)), fill=hue)
        write(pen, (left - width * 0.02, y), name, font, _INK, "rm")
        if is_labelled:
            write(pen, (end + width * 0.012, y), str(value), font, _INK, "lm")
