"""A picture of a simulation: load, both pools, queues and times to the first token, one above the other, over time.

Drawn with Pillow at three times the size and scaled down, which gives smooth lines without a plotting library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nvila.capacity.simulate import SAMPLE_S, Record

_SCALE = 3
_WIDTH, _LEFT, _RIGHT, _TOP, _GAP = 1180, 78, 26, 74, 46
_PANEL = 150
_INK, _FAINT, _GRID, _PAPER = (31, 35, 41), (116, 124, 134), (229, 232, 236), (255, 255, 255)
VISION, DECODE, THIRD = (217, 119, 6), (37, 99, 235), (5, 150, 105)

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Line:
    name: str
    values: Sequence[float]
    color: Color
    is_step: bool = False
    is_faint: bool = False
    is_filled: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]
    is_whole: bool = False
    """Ticks at whole numbers only."""
    is_log: bool = False


def draw(record: Record, path: Path, title: str, subtitle: str) -> None:
    """Write the picture as PNG."""
    panels = _panels(record)
    hours = record.times_s[-1] if record.times_s else SAMPLE_S
    height = _TOP + len(panels) * (_PANEL + _GAP) + 18
    canvas = _Canvas(_WIDTH, height)
    canvas.text((_LEFT, 18), title, 20, _INK)
    canvas.text((_LEFT, 45), subtitle, 13, _FAINT)
    for place, panel in enumerate(panels):
        _draw_panel(canvas, panel, _TOP + place * (_PANEL + _GAP) + 22, hours)
    canvas.save(path)


def _panels(record: Record) -> list[Panel]:
    span = len(record.times_s)
    window = max(1, round(60 / SAMPLE_S))
    arrived: dict[str, NDArray[np.float64]] = {"with media": np.zeros(span), "text only": np.zeros(span)}
    first_s: list[list[float]] = [[] for _ in range(span)]
    for work in record.works:
        index = min(int(work.at_s / SAMPLE_S), span - 1)
        arrived["text only" if work.kind == "text" else "with media"][index] += 1 / SAMPLE_S
        first_s[index].append(work.first_token_s - work.at_s)
    smooth = {name: np.convolve(values, np.ones(window) / window, "same") for name, values in arrived.items()}
    return [
        Panel(
            "requests per second",
            [
                Line("with media", smooth["with media"].tolist(), VISION),
                Line("text only", smooth["text only"].tolist(), DECODE),
            ],
        ),
        Panel(
            "vision pods",
            [
                Line("wanted", record.vision.wanted, VISION, is_step=True, is_faint=True),
                Line("ready", record.vision.ready, VISION, is_step=True, is_filled=True),
            ],
            is_whole=True,
        ),
        Panel(
            "decode replicas",
            [
                Line("wanted", record.decode.wanted, DECODE, is_step=True, is_faint=True),
                Line("ready", record.decode.ready, DECODE, is_step=True, is_filled=True),
            ],
            is_whole=True,
        ),
        Panel("tiles waiting for vision", [Line("", record.vision.queue, VISION, is_filled=True)]),
        Panel("prompt positions waiting for decode", [Line("", record.decode.queue, DECODE, is_filled=True)]),
        Panel(
            "seconds to the first token, by time of arrival",
            [
                Line("95th percentile", _rolling(first_s, window, 95), THIRD, is_faint=True),
                Line("median", _rolling(first_s, window, 50), THIRD),
            ],
            is_log=True,
        ),
    ]


def _rolling(samples: list[list[float]], window: int, percent: float) -> list[float]:
    values = []
    for index in range(len(samples)):
        near = [value for some in samples[max(0, index - window + 1) : index + 1] for value in some]
        near = [value for value in near if not math.isnan(value)]
        values.append(float(np.percentile(near, percent)) if near else float("nan"))
    return values


def _draw_panel(canvas: _Canvas, panel: Panel, top: int, span_s: float) -> None:
    most = max((value for line in panel.lines for value in line.values if not math.isnan(value)), default=0.0)
    ticks = _decades(panel) if panel.is_log else nice_ticks(most, is_whole=panel.is_whole)
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, top + _PANEL
    canvas.text((left, top - 21), panel.title, 13, _INK)
    _legend(canvas, panel, right, top - 21)

    def height(value: float) -> float:
        if not panel.is_log:
            return bottom - (bottom - top) * value / ticks[-1]
        return bottom - (bottom - top) * math.log(max(value, ticks[0]) / ticks[0]) / math.log(ticks[-1] / ticks[0])

    for tick in ticks:
        y = height(tick)
        canvas.line([(left, y), (right, y)], _FAINT if tick == ticks[0] else _GRID, 1)
        canvas.text((left - 8, y - 8), _label(tick), 12, _FAINT, is_right=True)
    step_s = next(
        step for step in (60, 300, 600, 900, 1800, 3600, 7200, 21_600, 86_400) if span_s / step <= 13 or step == 86_400
    )
    for tick in np.arange(0, span_s + 1, step_s):
        x = left + (right - left) * tick / span_s
        canvas.line([(x, bottom), (x, bottom + 4)], _FAINT, 1)
        canvas.text(
            (x, bottom + 6),
            f"{tick / 60:.0f} min" if span_s < 36_000 else f"{tick / 3600:.0f} h",
            11,
            _FAINT,
            is_middle=True,
        )
    for line in panel.lines:
        points = [
            (left + (right - left) * index * SAMPLE_S / span_s, height(value))
            for index, value in enumerate(line.values)
            if not math.isnan(value)
        ]
        canvas.curve(points, line, bottom)


def _legend(canvas: _Canvas, panel: Panel, right: int, top: int) -> None:
    x = float(right)
    for line in reversed([line for line in panel.lines if line.name]):
        x -= canvas.width_of(line.name, 12)
        canvas.text((x, top + 1), line.name, 12, _FAINT)
        canvas.line([(x - 24, top + 9), (x - 6, top + 9)], _tone(line), 3)
        x -= 42


def nice_ticks(most: float, *, is_whole: bool = False) -> list[float]:
    """From 0 to at least `most`, three to six of them, in steps of 1, 2, 2.5 or 5."""
    if most <= 0:
        return [0.0, 1.0]
    size = 10.0 ** math.floor(math.log10(most))
    steps = [size * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0)]
    steps = [step for step in steps if not is_whole or (step >= 1 and step == int(step))] or [1.0]
    step = next((one for one in steps if most / one <= 5), steps[-1])
    return [step * place for place in range(math.ceil(most / step - 1e-9) + 1)]


def _decades(panel: Panel) -> list[float]:
    """Powers of ten around what the lines show."""
    values = [value for line in panel.lines for value in line.values if value > 0] or [1.0]
    least, most = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) - 1e-9)
    return [10.0**power for power in range(least, max(most, least + 1) + 1)]


def _label(value: float) -> str:
    if value >= 10_000_000:
        return f"{value / 1e6:g} M"
    return f"{value / 1000:g} k" if value >= 10_000 else f"{value:g}"


def _tone(line: Line) -> Color:
    return tuple(255 - (255 - part) * 2 // 5 for part in line.color) if line.is_faint else line.color  # type: ignore[return-value]  # three stay three


class _Canvas:
    def __init__(self, width: int, height: int) -> None:
        self._size = width, height
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return self._fonts.setdefault(size, ImageFont.load_default(size * _SCALE))

    def width_of(self, text: str, size: int) -> float:
        return self._draw.textlength(text, font=self._font(size)) / _SCALE

    def text(
        self,
        at: tuple[float, float],
        text: str,
        size: int,
        color: Color,
        *,
        is_right: bool = False,
        is_middle: bool = False,
    ) -> None:
        x = at[0] - self.width_of(text, size) * (1 if is_right else 0.5 if is_middle else 0)
        self._draw.text((x * _SCALE, at[1] * _SCALE), text, fill=color, font=self._font(size))

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: float) -> None:
        self._draw.line([(x * _SCALE, y * _SCALE) for x, y in points], fill=color, width=round(width * _SCALE))

    def curve(self, points: Sequence[tuple[float, float]], line: Line, bottom: float) -> None:
        if len(points) < 2:
            return
        if line.is_step:
            corners = [((x, before[1]), (x, y)) for before, (x, y) in itertools.pairwise(points)]
            points = [points[0], *(corner for pair in corners for corner in pair)]
        if line.is_filled:
            pale = tuple(255 - (255 - part) // 6 for part in line.color)
            area = [(points[0][0], bottom), *points, (points[-1][0], bottom)]
            self._draw.polygon([(x * _SCALE, y * _SCALE) for x, y in area], fill=pale)
            self.line([(points[0][0], bottom), (points[-1][0], bottom)], _FAINT, 1)
        self.line(points, _tone(line), 1.6)

    def save(self, path: Path) -> None:
        small = self._image.resize(self._size, Image.Resampling.LANCZOS)
        small.quantize(160, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)
