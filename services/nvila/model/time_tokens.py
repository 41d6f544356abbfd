"""Points in time as words: seconds to time tokens and back, and intervals read from answers (NVILA-SPEC §6.8).

A model tuned for temporal localisation has N added words `<t0>` … `<t{N-1}>` for equal steps from the start of a clip
to its end. Text between people and the model holds seconds in the same brackets, `<3.5>`. Pure Python.

Follows `encode_time_token` and `decode_time_token` of NVlabs/VILA, and the scoring of its temporal-localisation sets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from nvila.errors import InvalidRequest

SECONDS = re.compile(r"<(\d+\.?\d*|\.\d+)>")
"""A number in angle brackets: digits with an optional fraction; no sign, no space, no exponent."""

Interval = tuple[float, float]
"""(start, end) in seconds."""


def time_tokens(count: int, token_format: str = "<t{t}>") -> tuple[str, ...]:
    """The words themselves, earliest first; look their ids up in the tokenizer (`num_time_tokens` of a checkpoint)."""
    return tuple(token_format.format(t=t) for t in range(count))


def encode_times(text: str, duration_s: float, count: int, token_format: str = "<t{t}>") -> str:
    """Every `<seconds>` replaced by the nearest of `count` time tokens, a half step by the even one.

    Times past the end get numbers past the last token, as in the reference: those words mean nothing to a model.
    Raises `InvalidRequest` for fewer than two tokens, or a duration that is no positive number.
    """
    _check(duration_s, count)
    if duration_s == 0:
        raise InvalidRequest("a clip of 0 s cannot be divided: a positive duration is needed")

    def token(match: re.Match[str]) -> str:
        step = float(match[1]) / duration_s * (count - 1)
        if not math.isfinite(step):
            raise InvalidRequest(f"{match[0][:20]} is no time in a clip of {duration_s} s")
        return token_format.format(t=round(step))

    return SECONDS.sub(token, text)


def decode_times(text: str, duration_s: float, count: int, token_format: str = "<t{t}>") -> str:
    """Every time token replaced by its `<seconds>`, rounded to hundredths; tokens past the last by the duration.

    Raises `InvalidRequest` for fewer than two tokens, or a duration that is no number or negative.
    """
    _check(duration_s, count)
    before, _, after = token_format.partition("{t}")

    def seconds(match: re.Match[str]) -> str:
        t = int(match[1])
        if match[0] != token_format.format(t=t):
            return match[0]  # leading zeros: not one of the words
        at_s = t * duration_s / (count - 1) if t < count else float(duration_s)
        return f"<{round(at_s, 2)}>"

    # Longer runs of digits than any count are left as they are.
    return re.sub(rf"{re.escape(before)}(\d{{1,18}}){re.escape(after)}", seconds, text)


def parse_interval(text: str, duration_s: float) -> Interval:
    """The first two `<seconds>` of an answer, in order and within the clip; the whole clip if there are fewer."""
    times_s = [float(match[1]) for match in SECONDS.finditer(text)][:2]
    if len(times_s) < 2:
        return 0.0, float(duration_s)
    start_s, end_s = sorted(min(time_s, float(duration_s)) for time_s in times_s)
    return start_s, end_s


def interval_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Length that two intervals share, over the length from the first start to the last end; 0 if that is empty."""
    shared_s = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    spanned_s = max(a[1], b[1]) - min(a[0], b[0])
    return shared_s / spanned_s if spanned_s > 0 else 0.0


def precision(iou: float, threshold: float = 0.5) -> float:
    """1 for an interval that overlaps enough; the mean over answers is precision@threshold."""
    return float(iou >= threshold)


def _check(duration_s: float, count: int) -> None:
    if count < 2:
        raise InvalidRequest(f"{count} time tokens cannot divide a clip: at least 2 are needed")
    if not 0 <= duration_s < math.inf:
        raise InvalidRequest(f"a clip cannot last {duration_s} s: a positive duration is needed")
