"""A page of examples, to be looked at: a row per family, under each picture its question and answer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.samples import Sample, SampleMedia
from nvila.types import MediaKind

_CELL_PX, _TEXT_PX, _LINE_PX, _LETTERS = 190, 54, 15, 31


def contact_sheet(families: Sequence[str], seed: int, knobs: Knobs, columns: int = 6) -> Image.Image:
    """The first training samples of each family. Clips as up to four moments at which something changes."""
    sheet = Image.new("RGB", (columns * _CELL_PX, len(families) * (_CELL_PX + _TEXT_PX)), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for row, family in enumerate(families):
        for column in range(columns):
            sample = make_sample(family, Split.TRAIN, seed, column, knobs)
            left, top = column * _CELL_PX, row * (_CELL_PX + _TEXT_PX)
            _pictures(sheet, sample, left, top)
            lines = textwrap.wrap(sample.question, _LETTERS)[:2]
            for number, line in enumerate(lines):
                pen.text((left + 2, top + _CELL_PX + number * _LINE_PX), line, font=font, fill=(30, 30, 30))
            at = (left + 2, top + _CELL_PX + 2 * _LINE_PX)
            pen.text(at, sample.answer[:_LETTERS], font=font, fill=(0, 110, 40))
    return sheet.quantize(256, kmeans=2, dither=Image.Dither.NONE)  # a third of the bytes


def _pictures(sheet: Image.Image, sample: Sample, left: int, top: int) -> None:
    first = sample.media[0]
    if first.kind is MediaKind.VIDEO:
        pictures = [Image.fromarray(first.frames_FHWC[number]) for number in _moments(first)]
    else:
        pictures = [Image.fromarray(item.frames_FHWC[0]) for item in sample.media]
    across = 1 if len(pictures) == 1 else 2
    side = (_CELL_PX - 6) // across
    for place, picture in enumerate(pictures):
        picture.thumbnail((side - 2, side - 2), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left + 2 + place % across * side, top + 2 + place // across * side))


def _moments(clip: SampleMedia) -> list[int]:
    changes = [0] + [i for i in range(1, len(clip.times_s)) if (clip.frames_FHWC[i] != clip.frames_FHWC[i - 1]).any()]
    return [changes[round(place)] for place in np.linspace(0, len(changes) - 1, min(4, len(changes)))]
