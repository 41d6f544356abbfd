"""Pages of text: receipts, forms and letters. Find a value, read a line."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

from nvila.train.data import words
from nvila.train.data.draw import Colour, Draw, tint, write
from nvila.train.data.made import Made, further, images

RECEIPTS = ("ruled", "dotted", "centered")
HELD_OUT_RECEIPTS = ("boxed",)
FORMS = ("colon", "columns", "boxes")
HELD_OUT_FORMS = ("stacked",)


def make(draw: Draw) -> Made:
    return draw.one_of((receipt, form, line))(draw)


# -- receipts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    item: str
    pieces: int
    price_cents: int

    @property
    def total_cents(self) -> int:
        return self.pieces * self.price_cents


def receipt(draw: Draw) -> Made:
    """The total, the price or the number of an item, the date, the shop or the number of the receipt."""
    items = draw.some_of(words.ITEMS, draw.whole(2, 5))
    entries = [_Entry(item, draw.whole(1, 4), words.cents(draw)) for item in items]
    shop, day, number = draw.one_of(words.COMPANIES), words.date(draw), words.number(draw, 4)
    total = words.amount(sum(entry.total_cents for entry in entries))
    whole = (
        ("total", total, ("What is the total?", "How much is the total?", "What is the total amount?")),
        ("date", day, ("What is the date?", "On which date was this bought?", "Read the date.")),
        ("shop", shop, ("What is the name of the shop?", "Which shop is this from?")),
        ("number", number, ("What is the receipt number?", "Read the receipt number.")),
    )
    asked, answer, phrasings = draw.one_of((*whole, *_asked_of(draw.one_of(entries))))
    picture = _receipt(draw, entries, shop, day, number, total)
    others = [one for one in (*whole, *(one for entry in entries for one in _asked_of(entry))) if one[2] != phrasings]
    return Made(
        task="receipt",
        question=draw.one_of(phrasings),
        answer=answer,
        media=images(picture),
        metric="anls",
        notes={"asked": asked},
        more=further(draw, [(draw.one_of(ways), value) for _, value, ways in others]),
    )


def _asked_of(entry: _Entry) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    price, item = words.amount(entry.total_cents), entry.item
    return (
        ("price", price, (f"How much do the {item} cost?", f"What is the price of {item}?")),
        ("pieces", str(entry.pieces), (f"How many {item} were bought?", f"What is the quantity of {item}?")),
    )


def _receipt(draw: Draw, entries: list[_Entry], shop: str, day: str, number: str, total: str) -> Image.Image:
    side = draw.knobs.canvas_px
    paper, ink = _paper(draw)
    size_px = round(side / draw.real(19, 25))
    face = draw.face("mono", "sans", "serif")
    font, strong = face.font(size_px), face.font(size_px, bold=True)
    step, margin = round(size_px * 1.45), round(side * 0.06)
    width = round(side * draw.real(0.66, 0.9))
    height = margin * 2 + step * (len(entries) + 6)
    picture = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(picture)
    style = draw.layout(RECEIPTS, HELD_OUT_RECEIPTS)
    y = margin
    if style == "centered" or style == "boxed":
        write(pen, (width / 2, y), shop, face.font(round(size_px * 1.3), bold=True), ink, "ma")
    else:
        write(pen, (margin, y), shop, face.font(round(size_px * 1.3), bold=True), ink)
    y += round(step * 1.4)
    write(pen, (margin, y), f"No. {number}", font, ink)
    write(pen, (width - margin, y), day, font, ink, "ra")
    y += round(step * 1.3)
    top = y
    for entry in entries:
        price = words.amount(entry.total_cents)
        write(pen, (margin, y), f"{entry.pieces} x {entry.item}", font, ink)
        write(pen, (width - margin, y), price, font, ink, "ra")
        if style == "dotted":
            left = margin + pen.textlength(f"{entry.pieces} x {entry.item} ", font=font)
            right = width - margin - pen.textlength(f" {price}", font=font)
            for x in range(round(left), round(right), max(4, size_px // 3)):
                pen.point((x, y + size_px), fill=ink)
        y += step
    if style == "boxed":
        pen.rectangle((margin // 2, top - step // 4, width - margin // 2, y), outline=ink)
    else:
        pen.line((margin, y + step // 4, width - margin, y + step // 4), fill=ink)
    y += step // 2
    write(pen, (margin, y), draw.one_of(("Total", "TOTAL", "Total due")), strong, ink)
    write(pen, (width - margin, y), total, strong, ink, "ra")
    return picture


# -- forms ------------------------------------------------------------------------------------------------------------


def form(draw: Draw) -> Made:
    """The value of one field of several."""
    fields = {
        "Name": draw.one_of(words.PEOPLE),
        "City": draw.one_of(words.CITIES),
        "Company": draw.one_of(words.COMPANIES),
        "Date": words.date(draw),
        "Code": words.code(draw),
        "Room": words.number(draw, 3),
        "Age": words.number(draw, 2),
        "Phone": f"{words.number(draw, 3)} {words.number(draw, 4)}",
    }
    shown = draw.some_of(tuple(fields), draw.whole(3, 6))
    asked = draw.one_of(shown)
    ways = ("What is the {}?", "Which {} is given?", "Read the {}.", "What does the field {} say?", "Find the {}.")
    return Made(
        task="form",
        question=draw.one_of(ways).format(asked.lower()),
        answer=fields[asked],
        media=images(_form(draw, {name: fields[name] for name in shown})),
        metric="anls",
        notes={"asked": asked},
        more=further(draw, [(draw.one_of(ways).format(name.lower()), fields[name]) for name in shown if name != asked]),
    )


def _form(draw: Draw, fields: dict[str, str]) -> Image.Image:
    side = draw.knobs.canvas_px
    paper, ink = _paper(draw)
    size_px = round(side / draw.real(17, 24))
    face = draw.face()
    font, strong = face.font(size_px), face.font(size_px, bold=True)
    style = draw.layout(FORMS, HELD_OUT_FORMS)
    margin, step = round(side * 0.07), round(size_px * (2.7 if style == "stacked" else 2.0))
    width = round(side * draw.real(0.75, 1.0))
    height = margin * 2 + round(step * (len(fields) + 1.2))
    picture = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(picture)
    title = draw.one_of(("Visitor form", "Registration", "Order form", "Member record", "Booking"))
    write(pen, (margin, margin), title, face.font(round(size_px * 1.3), bold=True), ink)
    y = margin + round(step * 1.2)
    column = margin + max(round(pen.textlength(f"{name}:  ", font=strong)) for name in fields)
    pale: Colour = tint(draw, (225, 228, 236), 6)
    for name, value in fields.items():
        if style == "colon":
            write(pen, (margin, y), f"{name}:", strong, ink)
            write(pen, (margin + pen.textlength(f"{name}: ", font=strong) + size_px // 4, y), value, font, ink)
        elif style == "stacked":
            write(pen, (margin, y), name, face.font(round(size_px * 0.8)), (110, 110, 116))
            write(pen, (margin, y + size_px), value, font, ink)
        else:
            write(pen, (margin, y), name, strong, ink)
            if style == "boxes":
                pen.rectangle(
                    (column - 4, y - 4, width - margin, y + size_px * 1.4), fill=pale, outline=(150, 150, 160)
                )
            write(pen, (column + 4, y), value, font, ink)
        y += step
    return picture


# -- letters ----------------------------------------------------------------------------------------------------------


def line(draw: Draw) -> Made:
    """One line of a page, by its number."""
    count = draw.whole(3, 6)
    lines = [" ".join(words.word(draw) for _ in range(draw.whole(2, 3))) for _ in range(count)]
    asked = draw.whole(0, count - 1)
    side = draw.knobs.canvas_px
    paper, ink = _paper(draw)
    size_px = round(side / draw.real(15, 24))
    font = draw.face().font(size_px)
    margin, step = round(side * 0.08), round(size_px * draw.real(1.5, 2.2))
    picture = Image.new("RGB", (side, margin * 2 + step * count), paper)
    pen = ImageDraw.Draw(picture)
    is_numbered = draw.layout((True, False), (False,))
    for row, text in enumerate(lines):
        shown = f"{row + 1}. {text}" if is_numbered else text
        write(pen, (margin, margin + row * step), shown, font, ink)
    return Made(
        task="line",
        question=ask_for_line(draw, asked),
        answer=lines[asked],
        media=images(picture),
        metric="anls",
        notes={"lines": count},
        more=further(draw, [(ask_for_line(draw, row), text) for row, text in enumerate(lines) if row != asked]),
    )


def ask_for_line(draw: Draw, row: int) -> str:
    """`row` counts from 0."""
    ordinal = ("first", "second", "third", "fourth", "fifth", "sixth")[row]
    return draw.one_of(
        (
            f"What does line {row + 1} say?",
            f"Read line {row + 1}.",
            f"What is written in the {ordinal} line?",
            f"Read the {ordinal} line.",
        )
    )


def _paper(draw: Draw) -> tuple[Colour, Colour]:
    """Paper and ink."""
    paper: Colour = tint(draw, draw.one_of(((252, 252, 250), (246, 240, 226), (236, 240, 246))), 4)
    level = draw.whole(10, 70)
    return paper, tint(draw, (level, level, level + 10), 8)
