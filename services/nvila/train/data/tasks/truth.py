"""What each pixel of a picture shows, letters, shapes and their colours: for patches and visual tokens to name.

K kinds of labels · H, W rows and columns of pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from nvila.train.data.draw import COLOURS, SHAPES, paste

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.:"
KINDS = {"shape": len(SHAPES) + 1, "color": len(COLOURS) + 1, "letter": len(LETTERS) + 1}
"""Labels of each kind; 0 is none of them."""
SHAPE, COLOR, LETTER = range(3)


def unknown(picture: Image.Image) -> NDArray[np.uint8]:
    """truth_KHW of a picture that shows nothing yet."""
    return np.zeros((len(KINDS), picture.height, picture.width), np.uint8)


def put(
    picture: Image.Image,
    truth_KHW: NDArray[np.uint8],
    drawn: Image.Image,
    centre: tuple[float, float],
    thing: tuple[str, str],
) -> None:
    """Paste a shape that was drawn (`draw.stamp`); `thing`: its colour and its shape, by name."""
    paste(picture, drawn, centre)
    left, top = round(centre[0] - drawn.width / 2), round(centre[1] - drawn.height / 2)
    inside_HW = np.asarray(drawn)[:, :, 3] > 128
    where = (slice(top, top + drawn.height), slice(left, left + drawn.width))
    hue, kind = thing
    for layer, label in ((SHAPE, SHAPES.index(kind) + 1), (COLOR, list(COLOURS).index(hue) + 1), (LETTER, 0)):
        truth_KHW[layer][where][inside_HW] = label


def mark(
    letters_HW: NDArray[np.uint8], line: str, font: ImageFont.FreeTypeFont, x: float, top: int, bottom: int
) -> None:
    """Label, from 1, of each letter of a line that begins at `x`; other characters have none."""
    for letter in line:
        end = x + _advance(font, letter)
        label = LETTERS.find(letter) + 1
        if label:
            letters_HW[max(0, top) : bottom, max(0, round(x)) : round(end)] = label
        x = end


@lru_cache(maxsize=1 << 16)
def _advance(font: ImageFont.FreeTypeFont, letter: str) -> float:
    return font.getlength(letter)


def length_of(font: ImageFont.FreeTypeFont, line: str) -> float:
    """Without kerning, which is less than a pixel here."""
    return sum(_advance(font, letter) for letter in line)
