"""Which letter stands at which pixels of a picture: what patches and visual tokens are to name.

H, W rows and columns of pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.:"


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
