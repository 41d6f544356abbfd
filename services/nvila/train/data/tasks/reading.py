"""Text of all kinds on a plain ground, read in full: what a tower learns letters from, many at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from nvila.train.data import words
from nvila.train.data.draw import COLOURS, Colour, Draw, background, ink_on, text_size, tint, write
from nvila.train.data.made import Made, further, images
from nvila.train.data.tasks.documents import ask_for_line
from nvila.train.data.tasks.truth import LETTER, mark, unknown

PAGE_LINES = 6
"""Most of a page: what is read in one answer has its limits."""
ALL = ("Read all the text.", "What is written here?", "Read everything.")


def make(draw: Draw) -> Made:
    """A line or several in one typeface, from barely to easily read."""
    side = draw.one_of((draw.knobs.canvas_px // 2, draw.knobs.canvas_px))
    size_px = _size_px(draw)
    face, bold = draw.face(), draw.chance(0.4)
    lines = [_line(draw) for _ in range(draw.whole(1, max(1, min(draw.knobs.lines, side // (2 * size_px)))))]
    while max(text_size(line, face.font(size_px, bold=bold))[0] for line in lines) > side * 0.94:
        size_px -= 1
    step = round(size_px * draw.real(1.3, 2.0))
    height = min(side, max(side // 2, step * len(lines) + size_px))
    indents = draw.chance(0.5) or len(lines) == 1
    return _written(draw, lines, face.font(size_px, bold=bold), step, (side, height), indents=indents)


def page(draw: Draw) -> Made:
    """A picture full of text: many more letters to read for each picture that is looked at."""
    side, size_px = draw.knobs.canvas_px // 2, _size_px(draw)
    font, step = draw.face().font(size_px, bold=draw.chance(0.4)), round(size_px * draw.real(1.2, 1.6))
    lines = [_full_line(draw, font, side * 0.94) for _ in range(min(PAGE_LINES, (side - 4) // step))]
    return _written(draw, lines, font, step, (side, side), indents=False)


def _size_px(draw: Draw) -> int:
    low, high = draw.knobs.text_px
    return round(low * 2 ** (draw.random.random() * math.log2(high / low)))


def _full_line(draw: Draw, font: ImageFont.FreeTypeFont, width: float) -> str:
    line = any_piece(draw)
    while text_size(line, font)[0] > width:
        line = words.code(draw, draw.whole(1, max(1, len(line) // 2)))
    while draw.chance(0.9) and text_size(longer := f"{line} {any_piece(draw)}", font)[0] <= width:
        line = longer
    return line


def _written(
    draw: Draw,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    step: int,
    size: tuple[int, int],
    *,
    indents: bool,
) -> Made:
    """`step`: pixels from line to line; `size`: width and height of the picture; `indents`: each line by its own."""
    width, height = size
    picture, ink = _ground(draw, width, height)
    pen = ImageDraw.Draw(picture)
    top = draw.real(0, max(0, height - step * len(lines)))
    truth_KHW = unknown(picture)
    for row, line in enumerate(lines):
        room = max(0, width - text_size(line, font)[0] - 4)
        left = 2 + (draw.real(0, room) if indents else room * 0.1)
        at = (left, top + row * step)
        write(pen, at, line, font, ink)
        _, above, _, below = font.getbbox(line, anchor="la")
        mark(truth_KHW[LETTER], line, font, round(at[0]), round(at[1] + above), round(at[1] + below))
    asked = [(ask_for_line(draw, row), line) for row, line in enumerate(lines) if len(lines) > 1]
    return Made(
        task="text",
        question=draw.one_of(ALL),
        answer=" ".join(lines),  # a line feed would not be learned: the template's is taken for it (train/labels.py)
        media=images(picture),
        metric="anls",
        notes={"text_px": round(font.size) * draw.knobs.canvas_px // width},
        more=further(draw, asked),
        truth_KHW=truth_KHW,
    )


def _ground(draw: Draw, width: int, height: int) -> tuple[Image.Image, Colour]:
    if draw.chance(0.5):
        ground: Colour = tint(draw, COLOURS[draw.one_of(tuple(COLOURS))])
        return Image.new("RGB", (width, height), ground), ink_on(ground)
    level = draw.whole(10, 70)
    return background(draw, width, height, avoid=[(level, level, level)]), (level, level, level)


def _line(draw: Draw) -> str:
    count = draw.one_of((1, 1, 1, 2, 2, 3))
    return " ".join(_piece(draw) for _ in range(min(count, draw.knobs.lines)))


def _piece(draw: Draw) -> str:
    """A word, code, number, date or amount; a shorter code where that is longer than the knobs allow."""
    text = any_piece(draw)
    most = draw.knobs.letters
    return text if len(text) <= most else words.code(draw, draw.whole(1, most))


def any_piece(draw: Draw) -> str:
    kind = draw.whole(0, 9)
    if kind < 4:
        text = draw.one_of((words.NOUNS, words.NOUNS, words.ITEMS, words.PEOPLE, words.CITIES, words.COMPANIES))
        return draw.one_of((str.lower, str.upper, str.capitalize))(draw.one_of(text))
    makers = (words.code, words.code, words.number, words.number, words.date)
    return words.amount(words.cents(draw)) if kind == 9 else makers[kind - 4](draw)
