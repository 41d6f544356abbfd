"""The autoscalers' rules: the numbers of the chart, and what the Horizontal Pod Autoscaler, KEDA and Ray do with them.

The defaults are those of `charts/nvila/values.yaml` (a test compares), `Rules.from_values` reads others. What the
algorithms do is written after kubernetes/kubernetes:pkg/controller/podautoscaler/horizontal.go (tolerance,
stabilisation, rate limits), keda.sh's description of `fallback`, `activation` and `cooldownPeriod`, and
ray-project/ray:python/ray/serve/autoscaling_policy.py (a wish must last for a delay; then the last one counts).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

TOLERANCE = 0.1
"""The autoscaler lets a metric be off by this share before it acts (Kubernetes' default)."""
MOST_ONGOING = 32
"""Requests that a decode replica takes on (`max_ongoing_requests` in decode/settings.py, a test compares)."""
LOOKS_IN_VAIN = 3
"""Failed looks after which KEDA falls back (`fallback.failureThreshold` in the chart)."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """One pool's. `targets`: by signal, what one pod is to carry. `kind`: `keda` or `ray`."""

    kind: str
    targets: Mapping[str, float]
    min_replicas: int = 1
    max_replicas: int = 8
    polling_s: float = 15
    up_stabilization_s: float = 30
    up_percent_per_minute: float = 100
    down_stabilization_s: float = 300
    down_percent_per_minute: float = 25
    fallback_replicas: int = 2
    scale_to_zero: bool = False
    idle_s: float = 1800
    down_share: float = 1.0
    """`ray`: share of the way down that one decision goes (Serve's `downscaling_factor`)."""

    @classmethod
    def of(cls, values: Mapping[str, Any], kind: str, targets: Mapping[str, str]) -> Self:
        """From a chart's `autoscaling` block; `targets`: its key by signal."""
        zero = values.get("scaleToZero") or {}
        return cls(
            kind=kind,
            targets={signal: float(values[key]) for signal, key in targets.items()},
            scale_to_zero=bool(zero.get("enabled", False)),
            idle_s=float(zero.get("idleSeconds", 1800)),
            **{name: values[key] for name, key in _KEYS.items() if key in values},
        )


_KEYS = {
    "min_replicas": "minReplicas",
    "max_replicas": "maxReplicas",
    "polling_s": "pollingSeconds",
    "up_stabilization_s": "upStabilizationSeconds",
    "up_percent_per_minute": "upPercentPerMinute",
    "down_stabilization_s": "downStabilizationSeconds",
    "down_percent_per_minute": "downPercentPerMinute",
    "fallback_replicas": "fallbackReplicas",
    "down_share": "downFactor",
}
BACKLOG, BUSY, RUNNING, ONGOING = "backlog_s", "busy", "running", "ongoing"

VISION = Rules(kind="keda", targets={BACKLOG: 2, BUSY: 0.75})
DECODE_RAY = Rules(kind="ray", targets={ONGOING: 16}, down_stabilization_s=600, down_share=0.5)
DECODE_KEDA = Rules(kind="keda", targets={BACKLOG: 2, RUNNING: 24}, down_stabilization_s=600)


def from_values(values: Mapping[str, Any], decode_kind: str = "") -> tuple[Rules, Rules]:
    """(vision, decode) as a chart's values have them; `decode_kind` chooses where they leave it open (`none`)."""
    vision, decode = values["vision"]["autoscaling"], values["decode"]["autoscaling"]
    kind = decode_kind or str(decode.get("kind", "none"))
    ray = kind not in ("keda", "hpa")
    return (
        Rules.of(vision, "keda", {BACKLOG: "targetBacklogSeconds", BUSY: "targetBusy"}),
        Rules.of(decode, "ray", {ONGOING: "targetOngoingRequests"})
        if ray
        else Rules.of(decode, "keda", {BACKLOG: "targetBacklogSeconds", RUNNING: "targetRunning"}),
    )


def most_ongoing(values: Mapping[str, Any]) -> int:
    """Requests that a decode replica takes on, as a chart's values have it."""
    return int((values["decode"].get("settings") or {}).get("max_ongoing_requests", MOST_ONGOING))


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm lays values over defaults."""
    out = dict(defaults)
    for key, value in given.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def as_values() -> dict[str, Any]:
    """The defaults in the form of a chart's values."""

    def block(rules: Rules, **targets: float | str) -> dict[str, Any]:
        return {key: getattr(rules, name) for name, key in _KEYS.items()} | targets

    return {
        "vision": {"autoscaling": block(VISION, targetBacklogSeconds=2, targetBusy=0.75)},
        "decode": {
            "autoscaling": block(
                DECODE_RAY, kind="ray", targetOngoingRequests=16, targetBacklogSeconds=2, targetRunning=24
            )
        },
    }


# -- what decides -----------------------------------------------------------------------------------------------------


@dataclass
class KedaScaler:
    """A ScaledObject and the Horizontal Pod Autoscaler that KEDA makes of it, called every `polling_s`."""

    rules: Rules
    _wishes: deque[tuple[float, int]] = field(default_factory=deque)
    _changes: deque[tuple[float, int]] = field(default_factory=deque)
    _in_vain: int = 0
    _active_s: float = 0.0

    def decide(self, now_s: float, current: int, signals: Mapping[str, float] | None, in_flight: int) -> int:
        """Pods to have. `signals`: sums over the pool; None: the metrics are missing. `in_flight`: requests that the
        gateways hold, which is what wakes a pool from zero."""
        rules = self.rules
        if signals is None:
            self._in_vain += 1
            if self._in_vain < LOOKS_IN_VAIN:
                return current
            return self._limited(now_s, current, max(rules.fallback_replicas, 1))
        self._in_vain = 0
        if in_flight:
            self._active_s = now_s
        if rules.scale_to_zero:
            if current == 0:
                return 1 if in_flight else 0
            if now_s - self._active_s >= rules.idle_s:
                self._wishes.clear()
                self._changes.clear()
                return 0
        return self._limited(now_s, current, self._wish(current, signals))

    @property
    def _floor(self) -> int:
        """A pool that may sleep wakes with one pod, whatever else is its least."""
        return 1 if self.rules.scale_to_zero else max(self.rules.min_replicas, 1)

    def _wish(self, current: int, signals: Mapping[str, float]) -> int:
        """The largest of what each signal asks for; one within the tolerance asks for no change."""
        wishes = []
        for signal, target in self.rules.targets.items():
            total = signals[signal]
            ratio = total / (target * max(current, 1))
            wishes.append(current if abs(ratio - 1) <= TOLERANCE else math.ceil(total / target - 1e-9))
        return max(wishes)

    def _limited(self, now_s: float, current: int, wish: int) -> int:
        rules = self.rules
        floor, ceiling = self._floor, rules.max_replicas
        wish = min(max(wish, floor), ceiling)
        keep = max(rules.up_stabilization_s, rules.down_stabilization_s)
        self._wishes.append((now_s, wish))
        while self._wishes[0][0] < now_s - keep:
            self._wishes.popleft()
        least = min((w for at, w in self._wishes if at >= now_s - rules.up_stabilization_s), default=wish)
        most = max((w for at, w in self._wishes if at >= now_s - rules.down_stabilization_s), default=wish)
        steady = least if current < least else most if current > most else current
        decided = self._at_pace(now_s, current, steady)
        decided = min(max(decided, floor), ceiling)
        if decided != current:
            self._changes.append((now_s, decided - current))
        return decided

    def _at_pace(self, now_s: float, current: int, steady: int) -> int:
        """No faster than so many percent of the pool per minute."""
        while self._changes and self._changes[0][0] <= now_s - 60:
            self._changes.popleft()
        added = sum(change for _, change in self._changes if change > 0)
        removed = -sum(change for _, change in self._changes if change < 0)
        if steady > current:
            base = current - added
            most = max(math.ceil(base * (1 + self.rules.up_percent_per_minute / 100)), base + 2)
            return max(min(steady, most), current)
        base = current + removed
        least = int(base * (1 - self.rules.down_percent_per_minute / 100))
        return min(max(steady, least), current)


@dataclass
class RayScaler:
    """Ray Serve's own autoscaling: the mean of requests in progress over a window, a wish that must last for a delay.

    Ray asks the replicas themselves, so there is no metrics server to lose; a replica that does not answer is replaced.
    """

    rules: Rules
    look_back_s: float = 30
    _seen: deque[tuple[float, float]] = field(default_factory=deque)
    _since_s: float | None = None
    _direction: int = 0

    def decide(self, now_s: float, current: int, signals: Mapping[str, float] | None, in_flight: int) -> int:
        rules = self.rules
        if signals is None:
            return current
        self._seen.append((now_s, signals[ONGOING]))
        while self._seen[0][0] < now_s - self.look_back_s:
            self._seen.popleft()
        mean = sum(value for _, value in self._seen) / len(self._seen)
        wanted = mean / rules.targets[ONGOING]
        share = rules.down_share if wanted < current else 1.0
        wish = math.ceil(current + share * (wanted - current) - 1e-9)
        if wish == current and math.ceil(wanted - 1e-9) < current:
            wish -= 1
        wish = min(max(wish, rules.min_replicas), rules.max_replicas)
        direction = (wish > current) - (wish < current)
        if direction != self._direction:
            self._direction, self._since_s = direction, now_s
        delay = rules.up_stabilization_s if direction > 0 else rules.down_stabilization_s
        if direction and self._since_s is not None and now_s - self._since_s >= delay:
            self._direction, self._since_s = 0, None
            return wish
        return current


def scaler(rules: Rules) -> KedaScaler | RayScaler:
    return RayScaler(rules) if rules.kind == "ray" else KedaScaler(rules)


def changed(rules: Rules, **changes: Any) -> Rules:
    """The same rules but for `changes`; None leaves a field as it is."""
    known = {one.name for one in fields(Rules)}
    return replace(rules, **{name: value for name, value in changes.items() if name in known and value is not None})
