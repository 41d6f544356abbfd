"""Tables: the value of a cell, the row with the largest or smallest value."""

from __future__ import annotations

from PIL import Image, ImageDraw

from nvila.train.data import words
from nvila.train.data.draw import Colour, Draw, tint, write
from nvila.train.data.made import Made, Turn, further, images

STYLES = ("grid", "rules", "plain")
HELD_OUT_STYLES = ("banded",)
COLUMNS = ("Price", "Stock", "Sold", "Weight", "Score", "Size", "Points", "Visits")


def make(draw: Draw) -> Made:
    return draw.one_of((cell, cell, extreme))(draw)


def cell(draw: Draw) -> Made:
    rows, columns, values = _contents(draw)
    row, column = draw.whole(0, len(rows) - 1), draw.whole(0, len(columns) - 1)
    return Made(
        task="cell",
        question=_ask_for_cell(draw, rows[row], columns[column]),
        answer=str(values[row][column]),
        media=images(_table(draw, rows, columns, values)),
        notes={"cells": len(rows) * len(columns)},
        more=further(draw, _cells(draw, rows, columns, values)),
    )


def _cells(draw: Draw, rows: list[str], columns: list[str], values: list[list[int]]) -> list[Turn]:
    return [
        (_ask_for_cell(draw, row, column), str(value))
        for row, line in zip(rows, values, strict=True)
        for column, value in zip(columns, line, strict=True)
    ]


def _ask_for_cell(draw: Draw, row: str, column: str) -> str:
    ways = (
        "What is the {column} of {row}?",
        "What is the value of {column} for {row}?",
        "Which {column} does {row} have?",
        "In the row {row}, what is the {column}?",
    )
    return draw.one_of(ways).format(row=row, column=column.lower())


def extreme(draw: Draw) -> Made:
    rows, columns, values = _contents(draw)
    column, is_largest = draw.whole(0, len(columns) - 1), draw.chance(0.5)
    ranked = sorted(range(len(rows)), key=lambda row: values[row][column], reverse=is_largest)
    question = draw.one_of(
        ("Which row has the {} {}?", "Who or what has the {} {}?", "Which entry shows the {} {}?")
    ).format("highest" if is_largest else "lowest", columns[column].lower())
    return Made(
        task="extreme",
        question=question,
        answer=rows[ranked[0]],
        media=images(_table(draw, rows, columns, values)),
        metric="anls",
        notes={"cells": len(rows) * len(columns)},
        more=further(draw, _cells(draw, rows, columns, values)),
    )


def _contents(draw: Draw) -> tuple[list[str], list[str], list[list[int]]]:
    """Row names, column names, and values that differ within each column."""
    names = draw.one_of((words.PEOPLE, words.CITIES, words.COMPANIES))
    rows = draw.some_of(names, draw.whole(2, 5))
    columns = draw.some_of(COLUMNS, draw.whole(1, 3))
    by_column = [draw.some_of(range(10, 100), len(rows)) for _ in columns]
    return rows, columns, [[values[row] for values in by_column] for row in range(len(rows))]


def _table(draw: Draw, rows: list[str], columns: list[str], values: list[list[int]]) -> Image.Image:
    side = draw.knobs.canvas_px
    style = draw.layout(STYLES, HELD_OUT_STYLES)
    face = draw.face("sans", "serif", "mono", "slab")
    size_px = round(side / draw.real(19, 26))
    font, strong = face.font(size_px), face.font(size_px, bold=True)
    pad, step = size_px // 2, round(size_px * draw.real(1.8, 2.3))
    texts = [["", *columns], *([name, *map(str, line)] for name, line in zip(rows, values, strict=True))]
    widths = [
        max(round(strong.getlength(line[place])) for line in texts) + 3 * pad for place in range(len(columns) + 1)
    ]
    margin = round(side * draw.real(0.03, 0.08))
    width, height = sum(widths) + 2 * margin, step * len(texts) + 2 * margin
    paper: Colour = tint(draw, (250, 250, 248), 5)
    ink: Colour = tint(draw, (34, 34, 40), 14)
    head: Colour = tint(draw, draw.one_of(((205, 220, 245), (220, 235, 215), (240, 225, 205), (225, 225, 230))), 8)
    picture = Image.new("RGB", (max(width, side // 2), height), paper)
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(texts):
        top, left = margin + row * step, margin
        if (row == 0 and style in ("grid", "plain")) or (style == "banded" and row % 2):
            pen.rectangle((margin, top, margin + sum(widths), top + step), fill=head)
        for place, text in enumerate(line):
            if style == "grid":
                pen.rectangle((left, top, left + widths[place], top + step), outline=ink)
            is_name = row == 0 or place == 0
            at = (left + pad, top + step / 2) if place == 0 else (left + widths[place] - pad, top + step / 2)
            write(pen, at, text, strong if is_name else font, ink, "lm" if place == 0 else "rm")
            left += widths[place]
        if style == "rules":
            pen.line((margin, top + step, margin + sum(widths), top + step), fill=ink)
    return picture
