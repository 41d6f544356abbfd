"""What is asked: a request's sizes, mixes of requests, and traces of them over time (files, made-up examples)."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nvila.errors import InvalidRequest
from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.types import Level, MediaKind, TokenDtype

DTYPE = TokenDtype.BFLOAT16
"""Of visual tokens in the cache; int8 halves their bytes."""
CHUNK_FRAMES = 32
"""`gateway.settings.chunk_frames`."""
MOST_FRAMES = 256
"""`gateway.settings.max_frames`."""
MOST_ANSWER_TOKENS = 8192
"""`gateway.settings.max_answer_tokens`."""
MOST_POSITIONS = 32_768
"""What decode takes of a model that was made for more (`decode.settings.max_model_len`)."""
KINDS = ("text", "image", "video")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One kind of request. `frames`: of one video; `tiles`: tower tiles of the images where not computed from their
    size; `prompt_tokens`: text only; `reused`: its visual tokens are in the cache already."""

    kind: str = "text"
    frames: int = 0
    tiles: int = 0
    prompt_tokens: int = 200
    answer_tokens: int = 200
    reused: bool = False


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a request needs. `chunks`: tower tiles of each call to vision. `positions`: of the whole prompt.
    `record_bytes`: visual tokens in the cache; `pixel_bytes`: raw frames on their way to vision."""

    chunks: tuple[int, ...]
    positions: int
    answer_tokens: int
    record_bytes: int
    pixel_bytes: int

    @property
    def tiles(self) -> int:
        return sum(self.chunks)


def demand(config: NvilaConfig, ask: Ask) -> Demand:
    """By the arithmetic that the gateway's estimate uses (`model/cost.py`). Reused media cost no tower."""
    levels: tuple[Level, ...] = ()
    tiles, positions = 0, 0
    if ask.kind == "video":
        group = config.temporal_group
        frames = max(-(-(ask.frames or config.default_frames) // group) * group, group)
        levels = cost.levels(config, kind=MediaKind.VIDEO, is_tiled=False, frames=frames, pool_sizes=config.pool_sizes)
        tiles = frames
        positions = cost.positions(config, kind=MediaKind.VIDEO, is_tiled=False, levels=levels)
    elif ask.kind == "image":
        side = 3 * config.tile_px
        size = {"kind": MediaKind.IMAGE, "is_tiled": config.can_tile, "width_px": side, "height_px": side}
        levels = cost.levels(config, **size)  # type: ignore[arg-type]  # one mapping for three calls
        tiles = cost.tower_tiles(config, **size)  # type: ignore[arg-type]  # likewise
        positions = cost.positions(config, kind=MediaKind.IMAGE, is_tiled=config.can_tile, levels=levels)
        if ask.tiles:  # images of another size: everything in proportion
            levels = tuple(Level(max(1, round(one.blocks * ask.tiles / tiles)), one.tokens) for one in levels)
            positions, tiles = max(1, round(positions * ask.tiles / tiles)), ask.tiles
    whole, rest = divmod(tiles, CHUNK_FRAMES)
    chunks = (CHUNK_FRAMES,) * whole + ((rest,) if rest else ())
    return Demand(
        chunks=() if ask.reused else chunks,
        positions=positions + ask.prompt_tokens,
        answer_tokens=max(ask.answer_tokens, 1),
        record_bytes=cost.record_bytes(levels, config.llm_width, DTYPE),
        pixel_bytes=0 if ask.reused else tiles * config.tile_px**2 * 3,
    )


def refusal(config: NvilaConfig, ask: Ask) -> str:
    """Why the platform, with its default limits, refuses such a request before any work; empty when it takes it."""
    most_frames = min(MOST_FRAMES, config.max_frames)
    if ask.kind == "video" and ask.frames > most_frames:
        return f"{ask.frames:,} frames, at most {most_frames:,} are taken"
    if ask.answer_tokens > MOST_ANSWER_TOKENS:
        return f"{ask.answer_tokens:,} tokens of answer, at most {MOST_ANSWER_TOKENS:,} are given"
    longest = min(MOST_POSITIONS, config.max_positions)
    if ask.tiles > longest:
        return f"{ask.tiles:,} tiles, each of which takes one of {longest:,} positions at least"
    positions = demand(config, ask).positions + ask.answer_tokens
    return f"{positions:,} positions, at most {longest:,} fit" if positions > longest else ""


# -- mixes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """Shares of kinds of requests; they add up to 1."""

    name: str
    what: str
    shares: tuple[tuple[float, Ask], ...]


MIXES = {
    mix.name: mix
    for mix in (
        Mix("text", "questions without media", ((1.0, Ask()),)),
        Mix("image", "one image each", ((1.0, Ask(kind="image")),)),
        Mix("clip", "64 frames each", ((1.0, Ask(kind="video", frames=64)),)),
        Mix("video", "256 frames each", ((1.0, Ask(kind="video", frames=256)),)),
        Mix(
            "camera",
            "live streams: 80 frames and 100 tokens of answer every 10 s",
            ((1.0, Ask(kind="video", frames=80, prompt_tokens=60, answer_tokens=100)),),
        ),
        Mix(
            "mixed",
            "a fifth each: text, image, 64 frames, 256 frames, second question on a video",
            (
                (0.2, Ask()),
                (0.2, Ask(kind="image")),
                (0.2, Ask(kind="video", frames=64)),
                (0.2, Ask(kind="video", frames=256)),
                (0.2, Ask(kind="video", frames=256, reused=True)),
            ),
        ),
    )
}
CAMERA_PERIOD_S = 10.0


# -- traces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    at_s: float
    ask: Ask


_FIELDS = {
    "at_s": ("time", "time_s", "at_s", "t", "timestamp", "arrival_s", "arrived_at"),
    "kind": ("kind", "type", "media"),
    "frames": ("frames", "num_frames"),
    "tiles": ("tiles",),
    "images": ("images", "num_images"),
    "prompt_tokens": ("prompt_tokens", "prompt", "input_tokens", "context_tokens", "input_length"),
    "answer_tokens": ("answer_tokens", "answer", "output_tokens", "max_tokens", "generated_tokens", "output_length"),
    "reused": ("reused", "cached"),
}
"""Names that a trace's columns may have, however they are capitalised and joined; the first is ours."""
_NUMBERS = ("frames", "tiles", "images", "prompt_tokens", "answer_tokens")
_LONGEST_TRACE_S = 31 * 24 * 3600.0
_TRUE = ("1", "true", "yes")


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals in order, times counted from the first.

    A file of JSON (a list, or `{"requests": […]}`), JSON lines, or CSV with a header, one request per row: `time`
    (seconds, or a date with time), `kind` (text, image, video), `frames`, `images` or `tiles`, `prompt_tokens` (text
    only), `answer_tokens`, `reused`. Raises `InvalidRequest` naming row and field.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
    rows = _rows(path, text)
    if not rows:
        raise InvalidRequest(f"{path} holds no request")
    arrivals = sorted((_arrival(path, number, row) for number, row in enumerate(rows, 1)), key=lambda one: one.at_s)
    length_s = arrivals[-1].at_s - arrivals[0].at_s
    if length_s > _LONGEST_TRACE_S:
        raise InvalidRequest(
            f"{path} spans {length_s:,.0f} s, at most {_LONGEST_TRACE_S:,.0f} (31 days) are replayed; "
            "are its times in other units than seconds?"
        )
    return [Arrival(one.at_s - arrivals[0].at_s, one.ask) for one in arrivals]


def _rows(path: Path, text: str) -> Sequence[Any]:
    if path.suffix == ".csv" or text.lstrip()[:1] not in ("[", "{"):
        return list(csv.DictReader(text.splitlines()))
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"{path} is neither JSON nor JSON lines: {error}") from None
    if isinstance(found, dict):
        found = next((found[key] for key in ("requests", "arrivals", "trace") if key in found), [found])
    if not isinstance(found, list):
        raise InvalidRequest(f"{path} holds a {type(found).__name__}, not a list of requests")
    return found


def _arrival(path: Path, number: int, row: Any) -> Arrival:
    if not isinstance(row, Mapping):
        raise InvalidRequest(f"{path}, request {number}: {row!r} is not an object")
    named = {_folded(str(name)): value for name, value in row.items() if value not in (None, "")}
    given = {name: _find(named, names) for name, names in _FIELDS.items()}
    if given["at_s"] is None:
        raise InvalidRequest(f"{path}, request {number} has no `time` (seconds)")
    numbers = {name: int(_number(path, number, name, given[name])) for name in _NUMBERS if given[name] is not None}
    images = numbers.pop("images", 0)
    if images > 1:
        numbers.setdefault("tiles", images)  # several images of one prompt are one tile each
    kind = str(
        given["kind"] or ("video" if numbers.get("frames") else "image" if images or numbers.get("tiles") else "text")
    )
    kind = kind.strip().lower()
    if kind not in KINDS:
        raise InvalidRequest(f"{path}, request {number}: kind {kind!r}; known are {', '.join(KINDS)}")
    if kind == "video" and numbers.get("tiles") and not numbers.get("frames"):
        numbers["frames"] = numbers.pop("tiles")  # a frame is a tile
    reused = str(given["reused"] or "").strip().lower() in _TRUE
    return Arrival(_time_s(path, number, given["at_s"]), Ask(kind=kind, reused=reused, **numbers))


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _find(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((row[_folded(name)] for name in names if _folded(name) in row), None)


def _time_s(path: Path, number: int, value: Any) -> float:
    """Seconds since the trace's own beginning of time; a date without zone is UTC's."""
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) and "-" in value[1:] else None
    except ValueError:
        moment = None
    if moment is None:
        return _number(path, number, "time", value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(path: Path, number: int, name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{path}, request {number}: {name} is {value!r}, not a number") from None
    if not math.isfinite(found) or found < 0:
        raise InvalidRequest(f"{path}, request {number}: {name} is {value!r}; a number from 0 is needed")
    return found


# -- examples ---------------------------------------------------------------------------------------------------------

Rate = Callable[[float], float]


def poisson(seconds: float, rates: Sequence[tuple[Rate, Ask]], seed: int) -> list[Arrival]:
    """Random arrivals whose rate per second varies in time; the same seed gives the same trace."""
    random = np.random.default_rng(seed)
    arrivals = []
    for rate, ask in rates:
        most = max(rate(second) for second in np.arange(0, seconds, 1.0)) or 1e-9
        at_s = 0.0
        while (at_s := at_s + float(random.exponential(1 / most))) < seconds:
            if random.random() * most < rate(at_s):  # thinning
                arrivals.append(Arrival(at_s, ask))
    return sorted(arrivals, key=lambda one: one.at_s)


_MEDIA = Ask(kind="video", frames=96, prompt_tokens=60, answer_tokens=20)
_TEXT = Ask(kind="text", prompt_tokens=1500, answer_tokens=700)
_MEDIA_PEAK, _TEXT_PEAK = 14.0, 14.0
"""Requests per second: each keeps four to five H100 busy."""


def image_to_text(seed: int = 0, scale: float = 1.0) -> list[Arrival]:
    """An hour and a half that begins heavy on pictures and short of text, and ends the other way round."""

    def fade(second: float) -> float:
        return min(max((second - 2400) / 900, 0.0), 1.0)

    def begin(second: float) -> float:
        return min(second / 900, 1.0)

    rates: list[tuple[Rate, Ask]] = [
        (lambda second: scale * _MEDIA_PEAK * begin(second) * (1 - 0.95 * fade(second)), _MEDIA),
        (lambda second: scale * _TEXT_PEAK * (0.05 + 0.95 * fade(second)), _TEXT),
    ]
    return poisson(5400, rates, seed)


def sinusoid(seed: int = 0, scale: float = 1.0, period_s: float = 3600.0, periods: int = 2) -> list[Arrival]:
    """A day's swing in small: load between a tenth and all of the peak."""

    def swing(second: float) -> float:
        return 0.55 - 0.45 * math.cos(2 * math.pi * second / period_s)

    rates: list[tuple[Rate, Ask]] = [
        (lambda second: scale * _MEDIA_PEAK * swing(second), _MEDIA),
        (lambda second: scale * _TEXT_PEAK * swing(second), _TEXT),
    ]
    return poisson(period_s * periods, rates, seed)


def steps(seed: int = 0, scale: float = 1.0) -> list[Arrival]:
    """Load that jumps from low to high and back, twice."""

    def square(second: float) -> float:
        return 1.0 if 900 <= second % 3600 < 2400 else 0.15

    rates: list[tuple[Rate, Ask]] = [
        (lambda second: scale * _MEDIA_PEAK * square(second), _MEDIA),
        (lambda second: scale * _TEXT_PEAK * square(second), _TEXT),
    ]
    return poisson(7200, rates, seed)


EXAMPLES = {"image-to-text": image_to_text, "sinusoid": sinusoid, "steps": steps}
