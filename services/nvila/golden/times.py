"""Recorded conversions between seconds and time tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from nvila.golden.compare import Case, Check, Golden, equal
from nvila.model.time_tokens import decode_times, encode_times, interval_iou, parse_interval, precision


def time_tokens(golden: Golden) -> Iterator[Case]:
    kinds: dict[str, Callable[[dict[str, Any]], Iterator[Check]]] = {
        "encode_time_token": partial(_convert, encode_times),
        "decode_time_token": partial(_convert, decode_times),
        "parse_timestamps": _parse,
        "iou": _iou,
    }
    yield from golden.others(*kinds)
    for kind, checks in kinds.items():
        for i, entry in enumerate(golden.content.get(kind, [])):
            yield Case(f"{golden.stem}/{kind} {i}", partial(checks, entry))


def _convert(convert: Callable[[str, float, int, str], str], entry: dict[str, Any]) -> Iterator[Check]:
    got = convert(entry["text"], entry["duration"], entry["num_time_tokens"], entry["format"])
    yield from equal("text", got, entry["result"])


def _parse(entry: dict[str, Any]) -> Iterator[Check]:
    yield from equal("interval", [*parse_interval(entry["text"], entry["duration"])], entry["result"])


def _iou(entry: dict[str, Any]) -> Iterator[Check]:
    iou = interval_iou(entry["a"], entry["b"])
    yield from equal("IoU", iou, entry["iou"])
    yield from equal("precision", precision(iou), entry["precision@0.5"])
