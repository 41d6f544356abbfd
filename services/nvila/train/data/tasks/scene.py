"""Text in a scene: signs of many sizes, so that how much a model sees decides what it reads."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from nvila.train.data import words
from nvila.train.data.draw import COLOURS, Colour, Draw, background, ink_on, paste, text_size, tint, write
from nvila.train.data.made import Made, further, images

SIGNS = ("board", "plate", "label")
HELD_OUT_SIGNS = ("banner",)
SMALLEST_EM = 0.6
"""A sign narrower than this many letters looks like none."""
WIDEST = 0.66
"""Share of the canvas that a sign may take, so that it fits the narrow scenes too."""


def make(draw: Draw) -> Made:
    return draw.one_of((sign, sign, colored))(draw)


def sign(draw: Draw) -> Made:
    """The only sign in the picture; its letters from barely to easily read."""
    text, kind = _text(draw)
    size_px = _size(draw)
    picture, letters_px = _sign(draw, text, size_px, draw.one_of(tuple(COLOURS)))
    scene = _scene(draw, [picture])
    question = draw.one_of(
        (
            "What does the sign say?",
            "Read the sign.",
            "What is written on the sign?",
            "What text do you see?",
            "Which {} is on the sign?",
        )
    ).format(kind)
    return Made(
        task="sign",
        question=question,
        answer=text,
        media=images(scene),
        metric="anls",
        notes={"text_px": letters_px, "kind": kind},
    )


def colored(draw: Draw) -> Made:
    """One of several signs, told by its colour."""
    hues = draw.some_of(tuple(COLOURS), draw.whole(2, 3))
    texts = [_text(draw) for _ in hues]
    size_px = min(_size(draw), draw.knobs.canvas_px // 16)
    made = [_sign(draw, text, size_px, hue) for (text, _), hue in zip(texts, hues, strict=True)]
    ways = (
        "What does the {} sign say?",
        "Read the {} sign.",
        "What is written on the {} sign?",
        "Which text is on the {} sign?",
    )
    return Made(
        task="colored",
        question=draw.one_of(ways).format(hues[0]),
        answer=texts[0][0],
        media=images(_scene(draw, [picture for picture, _ in made])),
        metric="anls",
        notes={"text_px": made[0][1], "kind": texts[0][1]},
        more=further(
            draw,
            [(draw.one_of(ways).format(hue), text) for hue, (text, _) in zip(hues[1:], texts[1:], strict=True)],
        ),
    )


def _text(draw: Draw) -> tuple[str, str]:
    kind = draw.one_of(("word", "word", "code", "number"))
    if kind == "word":
        text = words.word(draw)
        return (text.upper() if draw.chance(0.4) else text), kind
    return (words.code(draw) if kind == "code" else words.number(draw)), kind


def _size(draw: Draw) -> int:
    """Pixels per em, evenly over doublings: each size of letters is as frequent as twice it."""
    low, high = draw.knobs.text_px
    return round(low * 2 ** (draw.random.random() * math.log2(high / low)))


def _sign(draw: Draw, text: str, size_px: int, hue: str) -> tuple[Image.Image, int]:
    """A sign, and the height of its letters in pixels."""
    ground: Colour = tint(draw, COLOURS[hue])
    ink = ink_on(ground)
    face, is_bold = draw.face(), draw.chance(0.4)
    style = draw.layout(SIGNS, HELD_OUT_SIGNS)
    while text_size(text, face.font(size_px, bold=is_bold))[0] > draw.knobs.canvas_px * WIDEST - 2 * size_px:
        size_px -= 1
    font = face.font(size_px, bold=is_bold)
    width, height = text_size(text, font)
    margin_x, margin_y = round(size_px * draw.real(0.4, 0.9)), round(size_px * draw.real(0.3, 0.6))
    box = (max(width, round(size_px * SMALLEST_EM)) + 2 * margin_x, height + 2 * margin_y)
    picture = Image.new("RGBA", box, (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    corners = (0, 0, box[0] - 1, box[1] - 1)
    line = max(1, size_px // 14)
    if style == "board":
        pen.rectangle(corners, fill=ground)
    elif style == "plate":
        pen.rounded_rectangle(corners, radius=size_px // 3, fill=ground, outline=ink, width=line)
    elif style == "label":
        pen.rectangle(corners, fill=ground, outline=tuple(level * 3 // 5 for level in ground), width=line * 2)
    else:
        notch = margin_x // 2
        middle = box[1] // 2
        pen.polygon(
            [(0, 0), (box[0], 0), (box[0] - notch, middle), (box[0], box[1]), (0, box[1]), (notch, middle)], fill=ground
        )
    write(pen, (box[0] / 2, box[1] / 2), text, font, ink, "mm")
    if draw.chance(0.3):
        picture = picture.rotate(draw.real(-6, 6), Image.Resampling.BICUBIC, expand=True)
    return picture, height


def _scene(draw: Draw, signs: list[Image.Image]) -> Image.Image:
    """A ground with some blocks, like walls and sky, and the signs apart from each other."""
    side = draw.knobs.canvas_px
    width, height = draw.one_of(((side, side), (side, side * 3 // 4), (side * 3 // 4, side)))
    scene = background(draw, width, height)
    pen = ImageDraw.Draw(scene)
    for _ in range(draw.whole(0, 3)):
        left, top = draw.whole(0, width), draw.whole(0, height)
        level = draw.whole(110, 220)
        pen.rectangle(
            (left, top, left + draw.whole(40, width // 2), top + draw.whole(40, height // 2)),
            fill=tint(draw, (level, level, level), 14),
        )
    fitted = [_fitted(picture, width * 0.94, height / len(signs) * 0.8) for picture in signs]
    if len(fitted) == 1:
        room_x, room_y = width - fitted[0].width, height - fitted[0].height
        at = (fitted[0].width / 2 + draw.real(0, room_x), fitted[0].height / 2 + draw.real(0, room_y))
        paste(scene, fitted[0], at)
        return scene
    band = height / len(fitted)  # each sign in its own band, in random order
    for row, picture in zip(draw.some_of(range(len(fitted)), len(fitted)), fitted, strict=True):
        x = picture.width / 2 + draw.real(0, width - picture.width)
        y = row * band + picture.height / 2 + draw.real(0, band - picture.height)
        paste(scene, picture, (x, y))
    return scene


def _fitted(picture: Image.Image, width: float, height: float) -> Image.Image:
    scale = min(1.0, width / picture.width, height / picture.height)
    if scale == 1.0:
        return picture
    return picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.LANCZOS)
