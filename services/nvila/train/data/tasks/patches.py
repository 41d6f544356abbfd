"""What each place of a picture shows, pixel by pixel: shapes, colours, letters, for a tower that has seen nothing yet.

There is no SigLIP of nvila-tiny's size to begin with. Through answers alone a tower learns slowly what a letter is:
after 700 steps of its base stage from random weights nvila-tiny read none of 48 texts. Here every patch of a tile has
labels of its own: after 110,000 tiles the tower named 79 % of the letters (74 % in typefaces it had never seen), 94 %
of the shapes and 97 % of the colours.

K kinds of labels · H, W rows and columns of pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from nvila.train.data.draw import COLOURS, SHAPES, Draw, background, ink_on, places, stamp, tint
from nvila.train.data.made import Made, images
from nvila.train.data.tasks.reading import any_piece
from nvila.train.data.tasks.truth import KINDS, LETTER, length_of, mark, put

SIDE_PX = 224


def make(draw: Draw) -> Made:
    """Letters, shapes, or shapes over letters, in a picture that was larger or smaller before."""
    side = draw.one_of((SIDE_PX // 2, SIDE_PX * 5 // 7, SIDE_PX, SIDE_PX, SIDE_PX * 2))
    hues = draw.some_of(tuple(COLOURS), 4)
    picture = background(draw, side, side, avoid=[COLOURS[hue] for hue in hues])
    truth_KHW = np.zeros((len(KINDS), side, side), np.uint8)
    what = draw.one_of(("letters", "letters", "letters", "shapes", "both"))
    if what != "shapes":
        _write(draw, picture, truth_KHW)
    if what != "letters":
        _stamp(draw, picture, truth_KHW, hues)
    if side != SIDE_PX:
        how = Image.Resampling.BICUBIC if draw.chance(0.7) else Image.Resampling.BOX
        picture = picture.resize((SIDE_PX, SIDE_PX), how)
        at = (np.arange(SIDE_PX) + 0.5) * side / SIDE_PX
        truth_KHW = truth_KHW[:, at.astype(int)][:, :, at.astype(int)]
    return Made(
        task="tile", question="What does each place show?", answer="-", media=images(picture), truth_KHW=truth_KHW
    )


def _write(draw: Draw, picture: Image.Image, truth_KHW: NDArray[np.uint8]) -> None:
    """Lines of text from top to bottom, each in its own typeface, size and colours.

    Letters are as large as in a picture that one tile shows whole, up to as large as in the tile of its largest scale.
    """
    side = picture.width
    pen = ImageDraw.Draw(picture)
    smallest, largest = draw.knobs.text_px
    low, high = smallest * side / draw.knobs.canvas_px, largest * side / SIDE_PX
    size_px = low * (high / low) ** draw.random.random()
    is_even = draw.chance(0.6)
    y = draw.real(0, side * 0.1)
    while True:
        if not is_even:
            size_px = low * (high / low) ** draw.random.random()
        font = draw.face().font(max(6, round(size_px)), bold=draw.chance(0.4))
        line = any_piece(draw)
        while length_of(font, longer := f"{line} {any_piece(draw)}") < side * draw.real(0.3, 0.95):
            line = longer
        left, top, right, bottom = font.getbbox(line, anchor="la")
        if y + bottom > side:
            return
        x = draw.real(0, max(0.0, side - right))
        if draw.chance(0.75):
            box = (round(x + left), round(y + top), round(x + right), round(y + bottom))
            ink = _ink(draw, pen, picture, box)
            pen.text((round(x), round(y)), line, font=font, fill=ink, anchor="la")
            mark(truth_KHW[LETTER], line, font, round(x), box[1], box[3])
        y += size_px * draw.real(1.1, 1.8)


def _ink(draw: Draw, pen: ImageDraw.ImageDraw, picture: Image.Image, box: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Read well on what is there, or on a plate of a colour that is put there first."""
    if draw.chance(0.4):
        ground = tint(draw, COLOURS[draw.one_of(tuple(COLOURS))])
        margin = max(1, (box[3] - box[1]) // 4)
        pen.rectangle((box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin), fill=ground)
        return ink_on(ground)
    middle = picture.getpixel((min(max(box[0], 0), picture.width - 1), min(max(box[1], 0), picture.height - 1)))
    assert isinstance(middle, tuple)
    dark, light = draw.whole(0, 70), draw.whole(200, 255)
    level = dark if sum(middle[:3]) > 3 * 128 else light
    return tint(draw, (level, level, level), 10)


def _stamp(draw: Draw, picture: Image.Image, truth_KHW: NDArray[np.uint8], hues: list[str]) -> None:
    side = picture.width
    count = draw.whole(1, draw.knobs.objects)
    sizes = [side * draw.real(0.14, {1: 0.5, 2: 0.34, 3: 0.3, 4: 0.27}.get(count, 0.22)) for _ in range(count)]
    for size, (x, y) in zip(sizes, places(draw, side, side, sizes), strict=True):
        hue, kind = draw.one_of(hues), draw.one_of(SHAPES)
        drawn = stamp(kind, round(size), tint(draw, COLOURS[hue]), draw.real(-14, 14))
        put(picture, truth_KHW, drawn, (x, y), (hue, kind))
