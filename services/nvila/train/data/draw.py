"""What all tasks draw with: chance, knobs, colours, backgrounds, shapes and text.

All chance comes from Python's own generator, seeded by text, so the same (task, split, seed, index) gives the same
picture on every machine (to the byte where Pillow and FreeType have the same versions).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nvila.train.data.fonts import HELD_OUT, TRAINED, Face, Style

T = TypeVar("T")
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""


class Split(StrEnum):
    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """How hard the tasks are. The defaults suit a small model; every one is recorded in the data set's manifest."""

    canvas_px: int = 448
    """Longer side of documents, charts and scenes; plain shapes take half of it."""
    text_px: tuple[int, int] = (14, 64)
    """Smallest and largest letters (pixels per em) of scene text at this canvas."""
    objects: int = 6
    """Most shapes in a picture."""
    count: int = 5
    """Largest number to be counted."""
    video_px: int = 160
    """Side of video frames."""
    video_fps: int = 8
    clip_s: tuple[float, float] = (4.0, 12.0)
    """Shortest and longest clip."""
    brief_s: tuple[float, float] = (0.4, 1.0)
    """How long text is shown that is there for part of a clip: shorter is harder with few frames."""
    letters: int = 16
    """Longest words, codes and numbers of what is to be read in full."""
    lines: int = 5
    """Most lines of it."""
    questions: int = 1
    """Most that are asked about one picture or clip. Training asks several: seeing costs most, and is paid once."""


@dataclass(frozen=True)
class Draw:
    """The chance of one sample."""

    random: random.Random
    split: Split
    knobs: Knobs
    is_held_out: bool
    """Whether this sample uses held-out typefaces and layouts: half of the test split, nothing elsewhere."""

    @classmethod
    def of(cls, task: str, split: Split, seed: int, index: int, knobs: Knobs) -> Draw:
        """Splits share no seeds: the split's name is part of each."""
        chance = random.Random(f"nvila/{task}/{split}/{seed}/{index}")
        return cls(chance, split, knobs, is_held_out=split is Split.TEST and index % 2 == 1)

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.random.randrange(len(choices))]

    def some_of(self, choices: Sequence[T], count: int) -> list[T]:
        """Different ones, in random order."""
        return self.random.sample(list(choices), count)

    def whole(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return self.random.randint(low, high)

    def real(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def face(self, *styles: Style) -> Face:
        """A typeface of these styles, or of any."""
        faces = HELD_OUT if self.is_held_out else TRAINED
        fitting = [face for face in faces if not styles or face.style in styles]
        return self.one_of(fitting or faces)

    def layout(self, trained: Sequence[T], held_out: Sequence[T]) -> T:
        return self.one_of(held_out if self.is_held_out else trained)


COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "blue": (38, 84, 200),
    "green": (38, 148, 70),
    "yellow": (242, 204, 40),
    "purple": (134, 58, 168),
    "orange": (242, 132, 32),
    "black": (28, 28, 30),
    "white": (250, 250, 250),
    "pink": (240, 130, 180),
    "brown": (124, 78, 44),
}
"""Names that people agree on, and what they look like; each use varies a little (`tint`)."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")


def tint(draw: Draw, colour: Colour, spread: int = 10) -> Colour:
    """A colour that still has the same name."""
    red, green, blue = (max(0, min(255, level + draw.whole(-spread, spread))) for level in colour)
    return red, green, blue


def background(draw: Draw, width: int, height: int, *, avoid: Sequence[Colour] = ()) -> Image.Image:
    """A pale or grey ground, plain, shaded or grained, that nothing in `avoid` disappears on."""
    for _ in range(20):
        level = draw.one_of((draw.whole(200, 245), draw.whole(200, 245), draw.whole(90, 150)))
        base: Colour = tint(draw, (level, level, level), 12)
        if all(distance(base, colour) > 90 for colour in avoid):
            break
    pixels_HWC = np.empty((height, width, 3), np.int16)
    pixels_HWC[:] = base
    kind = draw.whole(0, 2)
    if kind == 1:  # shaded from one side to the other
        ramp = np.linspace(-14, 14, height if draw.chance(0.5) else width).astype(np.int16)
        pixels_HWC += ramp[:, None, None] if len(ramp) == height else ramp[None, :, None]
    if kind == 2:  # grained
        grain = np.frombuffer(draw.random.randbytes(64 * 64), np.uint8).reshape(64, 64).astype(np.int16) // 16 - 8
        repeats = (-(-height // 64), -(-width // 64))
        pixels_HWC += np.tile(grain, repeats)[:height, :width, None]
    return Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))


def distance(a: Colour, b: Colour) -> float:
    return math.dist(a, b)


def ink_on(ground: Colour) -> Colour:
    """Black or white, whichever is read better."""
    return (20, 20, 24) if luminance(ground) > 128 else (250, 250, 248)


def luminance(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


_SMOOTH = 3
"""Shapes are drawn this many times larger and shrunk: Pillow draws no smooth edges itself."""


def stamp(shape: str, size: int, colour: Colour, angle_deg: float = 0.0) -> Image.Image:
    """One shape on a transparent square of `size` pixels, with a thin darker rim."""
    large = size * _SMOOTH
    picture = Image.new("RGBA", (large, large), (*colour, 0))
    pen = ImageDraw.Draw(picture)
    rim: Colour = (colour[0] * 2 // 3, colour[1] * 2 // 3, colour[2] * 2 // 3)
    _outline(pen, shape, large, rim, 0.0)
    _outline(pen, shape, large, colour, 0.035)
    if angle_deg:
        picture = picture.rotate(angle_deg, Image.Resampling.BICUBIC)
    return picture.resize((size, size), Image.Resampling.BOX)


def _outline(pen: ImageDraw.ImageDraw, shape: str, size: int, colour: Colour, inset: float) -> None:
    low, high = size * (0.06 + inset), size * (0.94 - inset)
    middle, reach = size / 2, (high - low) / 2
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=colour)
    elif shape == "ring":
        pen.ellipse((low, low, high, high), fill=colour)
        hole = reach * (0.5 + inset * 4)
        pen.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), fill=(0, 0, 0, 0))
    elif shape == "square":
        edge = size * 0.06
        pen.rectangle((low + edge, low + edge, high - edge, high - edge), fill=colour)
    elif shape == "cross":
        arm = reach * 0.36
        pen.rectangle((middle - arm, low, middle + arm, high), fill=colour)
        pen.rectangle((low, middle - arm, high, middle + arm), fill=colour)
    elif shape == "heart":
        lobe = reach * 0.54
        for side in (-1, 1):
            x, y = middle + side * reach * 0.44, middle - reach * 0.3
            pen.ellipse((x - lobe, y - lobe, x + lobe, y + lobe), fill=colour)
        flank = reach * 0.93
        top = middle - reach * 0.1
        pen.polygon([(middle - flank, top), (middle + flank, top), (middle, middle + reach * 0.95)], fill=colour)
    else:
        pen.polygon(_corners(shape, middle, reach), fill=colour)


def _corners(shape: str, middle: float, reach: float) -> list[tuple[float, float]]:
    if shape == "star":
        radii = [reach * (1.0 if i % 2 == 0 else 0.45) for i in range(10)]
    elif shape == "diamond":
        radii = [reach, reach * 0.7, reach, reach * 0.7]
    else:
        assert shape == "triangle", shape
        radii = [reach] * 3
    turn = 2 * math.pi / len(radii)
    return [(middle + r * math.sin(i * turn), middle - r * math.cos(i * turn)) for i, r in enumerate(radii)]


def paste(canvas: Image.Image, picture: Image.Image, centre: tuple[float, float]) -> None:
    left, top = round(centre[0] - picture.width / 2), round(centre[1] - picture.height / 2)
    canvas.paste(picture, (left, top), picture)


def places(
    draw: Draw, width: float, height: float, sizes: Sequence[float], gap: float = 4
) -> list[tuple[float, float]]:
    """Centres for squares of these sizes so that none overlap; larger ones shrink nothing: callers keep them few."""
    for _ in range(200):
        centres: list[tuple[float, float]] = []
        for size in sizes:
            for _ in range(60):
                x, y = draw.real(size / 2 + 2, width - size / 2 - 2), draw.real(size / 2 + 2, height - size / 2 - 2)
                if all(
                    max(abs(x - ox), abs(y - oy)) >= (size + other) / 2 + gap
                    for (ox, oy), other in zip(centres, sizes, strict=False)
                ):
                    centres.append((x, y))
                    break
            else:
                break
        if len(centres) == len(sizes):
            return centres
    raise AssertionError(f"{len(sizes)} shapes of {max(sizes):.0f} px do not fit {width:.0f} x {height:.0f}")


def text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text)
    return math.ceil(right - left), math.ceil(bottom - top)


def write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: Colour,
    anchor: str = "la",
) -> None:
    """Text with its anchor (Pillow's two letters) at whole pixels."""
    pen.text((round(at[0]), round(at[1])), text, font=font, fill=colour, anchor=anchor)


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """(1, rows, columns, 3): a picture as `SampleMedia` holds it."""
    return np.asarray(image.convert("RGB"), dtype=np.uint8)[None]
