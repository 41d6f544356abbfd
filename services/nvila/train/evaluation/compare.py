"""Two runs over the same questions side by side: accuracy, agreement, and whether a difference is more than chance.

What a change of model, precision or cache costs is said here, and a gate fails when it costs too much.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from nvila.errors import InvalidRequest
from nvila.train.evaluation.metrics import normalised
from nvila.train.evaluation.run import Answer

_EXACT_BELOW = 1000
"""Up to so many differing answers the binomial sum is computed; above it, its normal approximation."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of one family. `agreement`: share of equal answers; an error agrees with nothing. `only_a`, `only_b`: right (a
    score of one half or more) in one run only. `p`: McNemar's exact two-sided test over those two; small means that the
    runs really differ.
    """

    name: str
    samples: int
    a: float
    b: float
    agreement: float
    only_a: int
    only_b: int
    p: float

    @property
    def loss(self) -> float:
        """What B scores less than A, 0 to 1."""
        return self.a - self.b


def compare(a: Sequence[Answer], b: Sequence[Answer]) -> list[Difference]:
    """Per family, then over all. Raises `InvalidRequest` when the runs are not of the same questions."""
    ours, others = ({(one.name, one.question): one for one in run} for run in (a, b))
    lonely = sorted(ours.keys() ^ others.keys())
    if lonely:
        raise InvalidRequest(
            f"the runs are not of the same questions: {len(ours):,} in A, {len(others):,} in B, {len(lonely):,} "
            f"of them in one run only, such as {lonely[0][0]}"
        )
    if not ours:
        raise InvalidRequest("the runs hold no answer")
    pairs = [(one, others[key]) for key, one in ours.items()]
    groups: defaultdict[str, list[tuple[Answer, Answer]]] = defaultdict(list)
    for one, other in pairs:
        groups[one.task.split(".")[0]].append((one, other))
    found = [_difference(name, group) for name, group in groups.items()]
    return [*found, _difference("all", pairs)] if len(groups) > 1 else found


def mcnemar(only_a: int, only_b: int) -> float:
    """Probability of a split at least as uneven, if right-in-one-only were a fair coin."""
    n, few = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    if n > _EXACT_BELOW:
        return math.erfc((abs(only_a - only_b) - 1) / math.sqrt(2 * n))
    tail: float = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    return min(1.0, 2 * tail)


def table(title: str, differences: Sequence[Difference]) -> Table:
    found = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="dim", title_justify="left")
    for head in ("task", "samples", "A", "B", "B - A", "agree", "only A", "only B", "p"):
        found.add_column(head, justify="left" if head == "task" else "right", no_wrap=True)
    for one in differences:
        found.add_row(
            one.name,
            f"{one.samples:,}",
            f"{100 * one.a:.1f}",
            f"{100 * one.b:.1f}",
            f"{100 * (one.b - one.a):+.1f}",
            f"{100 * one.agreement:.1f} %",
            str(one.only_a),
            str(one.only_b),
            f"{one.p:.3f}",
            style="bold" if one.name == "all" else "",
        )
    return found


def _difference(name: str, pairs: Sequence[tuple[Answer, Answer]]) -> Difference:
    only_a = sum(one.score >= 0.5 > other.score for one, other in pairs)
    only_b = sum(other.score >= 0.5 > one.score for one, other in pairs)
    n = len(pairs)
    return Difference(
        name=name,
        samples=n,
        a=sum(one.score for one, _ in pairs) / n,
        b=sum(other.score for _, other in pairs) / n,
        agreement=sum(_agree(one, other) for one, other in pairs) / n,
        only_a=only_a,
        only_b=only_b,
        p=mcnemar(only_a, only_b),
    )


def _agree(one: Answer, other: Answer) -> bool:
    return not (one.error or other.error) and normalised(one.answer) == normalised(other.answer)
