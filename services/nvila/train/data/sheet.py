"""A page of examples, to be looked at: a row per family, under each picture its question and answer."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.samples import Sample
from nvila.types import MediaKind

_CELL_PX, _TEXT_PX, _LINE_PX, _LETTERS = 190, 54, 15, 31


def contact_sheet(families: Sequence[str], seed: int, knobs: Knobs, columns: int = 6) -> Image.Image:
    """The first training samples of each family. Clips as four moments, in reading order."""
    sheet = Image.new("RGB", (columns * _CELL_PX, len(families) * (_CELL_PX + _TEXT_PX)), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for row, family in enumerate(families):
        for column in range(columns):
            sample = make_sample(family, Split.TRAIN, seed, column, knobs)
            left, top = column * _CELL_PX, row * (_CELL_PX + _TEXT_PX)
            _pictures(sheet, sample, left, top)
            words = sample.question.replace("\n", " ")
            lines = [words[:_LETTERS], words[_LETTERS : 2 * _LETTERS]]
            for number, line in enumerate(lines):
                pen.text((left + 2, top + _CELL_PX + number * _LINE_PX), line, font=font, fill=(30, 30, 30))
            at = (left + 2, top + _CELL_PX + 2 * _LINE_PX)
            pen.text(at, sample.answer[:_LETTERS], font=font, fill=(0, 110, 40))
    return sheet


def _pictures(sheet: Image.Image, sample: Sample, left: int, top: int) -> None:
    first = sample.media[0]
    if first.kind is MediaKind.VIDEO:
        count = len(first.frames_FHWC)
        pictures = [
            Image.fromarray(first.frames_FHWC[i]) for i in (count // 8, 3 * count // 8, 5 * count // 8, 7 * count // 8)
        ]
    else:
        pictures = [Image.fromarray(item.frames_FHWC[0]) for item in sample.media]
    across = 1 if len(pictures) == 1 else 2
    side = (_CELL_PX - 6) // across
    for place, picture in enumerate(pictures):
        picture.thumbnail((side - 2, side - 2), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left + 2 + place % across * side, top + 2 + place // across * side))
