"""Replay a load against both pools under their autoscalers' rules: replicas, queues and times to the first token.

Left out: decoding of frames in the gateways, which do not limit when sized as the capacity model says; prompts that
are prefilled while later chunks are still encoded; nodes that must be bought before a pod can start (put their time
into the pods' start). So times are a little too long where these overlap, and too short where nodes must come first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from nvila.capacity import rules as signals
from nvila.capacity.hardware import Throughput
from nvila.capacity.load import Arrival, demand
from nvila.capacity.pools import DecodePool, VisionPool, Work
from nvila.capacity.rules import KedaScaler, RayScaler, Rules, scaler
from nvila.model.config import NvilaConfig

SAMPLE_S = 5.0
_BUSY_WINDOW_S = 120.0
"""`rate(…[2m])` of the chart's trigger."""
_RUNNING_WINDOW_S = 60.0
"""`avg_over_time(…[1m])` of the chart's trigger."""
_SETTLE_S = 1800.0
"""The simulation goes on after the last answer, so that pools can shrink again."""
_PATIENCE_S = 24 * 3600.0
"""After which what is not answered will never be."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is simulated.

    `*_start_s`: from the wish for a pod until it is ready. `most_ongoing`: requests that a decode replica takes on
    (`decode.settings.max_ongoing_requests`); others wait before it. `missing`: spans (from, to) without metrics.
    """

    vision: Rules
    decode: Rules
    vision_start_s: float = 60.0
    decode_start_s: float = 120.0
    most_ongoing: int = 32
    cache_bytes_per_s: float = 1.2e9
    missing: tuple[tuple[float, float], ...] = ()


@dataclass
class PoolRecord:
    """One pool over time, sampled every `SAMPLE_S`. `events`: (second, pods before, pods after)."""

    wanted: list[int] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    events: list[tuple[float, int, int]] = field(default_factory=list)
    pod_s: float = 0.0

    @property
    def turns(self) -> int:
        """How often growing turned into shrinking or the other way round: what flapping is."""
        signs = [1 if after > before else -1 for _, before, after in self.events]
        return sum(one != other for one, other in itertools.pairwise(signs))

    def at(self, second: float) -> int:
        """Pods wanted then."""
        return self.wanted[min(int(second / SAMPLE_S), len(self.wanted) - 1)]


@dataclass
class Record:
    times_s: list[float]
    vision: PoolRecord
    decode: PoolRecord
    works: list[Work]

    @property
    def answered(self) -> int:
        return sum(not math.isnan(work.done_s) for work in self.works)

    @property
    def lost(self) -> int:
        return len(self.works) - self.answered

    def first_tokens_s(self, kind: str = "") -> list[float]:
        """Times to the first token, in order of arrival."""
        return [work.first_token_s - work.at_s for work in self.works if kind in ("", work.kind)]


def simulate(config: NvilaConfig, rates: Throughput, arrivals: Sequence[Arrival], plan: Plan) -> Record:
    """The same arguments give the same record."""
    return _Simulation(config, rates, arrivals, plan).run()


class _Simulation:
    def __init__(self, config: NvilaConfig, rates: Throughput, arrivals: Sequence[Arrival], plan: Plan) -> None:
        self._plan = plan
        self._vision = VisionPool(rates, plan.vision_start_s)
        self._decode = DecodePool(rates, plan.decode_start_s, plan.most_ongoing)
        self._vision_scaler, self._decode_scaler = scaler(plan.vision), scaler(plan.decode)
        self._events: list[tuple[float, int, str, Work | None]] = []
        self._count = 0
        self._works = []
        for arrival in arrivals:
            wanted = demand(config, arrival.ask)
            hop_s = wanted.record_bytes / plan.cache_bytes_per_s
            work = Work(
                at_s=arrival.at_s,
                chunks=wanted.chunks,
                positions=wanted.positions,
                answer_tokens=wanted.answer_tokens,
                kind=arrival.ask.kind,
                hop_s=hop_s * (2 if wanted.chunks else 1),  # put and get, or get alone
                left=len(wanted.chunks),
            )
            self._works.append(work)
            self._at(work.at_s, "arrives", work)
        self._arrived = 0
        self._computed: deque[tuple[float, float]] = deque()
        self._assigned_s = 0.0
        self._runs: deque[tuple[float, float]] = deque()
        self._record = Record([], PoolRecord(), PoolRecord(), self._works)

    def _at(self, second: float, what: str, work: Work | None = None) -> None:
        self._count += 1
        heapq.heappush(self._events, (second, self._count, what, work))

    def run(self) -> Record:
        plan = self._plan
        self._vision.resize(0.0, max(plan.vision.min_replicas, 1), start_s=0.0)
        self._decode.resize(0.0, max(plan.decode.min_replicas, 1), start_s=0.0)
        for what in ("sample", "vision looks", "decode looks"):
            self._at(0.0, what)
        end_s = (self._works[-1].at_s if self._works else 0.0) + _SETTLE_S
        while self._events:
            now_s, _, what, work = heapq.heappop(self._events)
            self._decode.advance(now_s)
            if work is not None:
                self._go_on(now_s, what, work)
            elif what == "ready":
                self._give(now_s)
                self._decode.assign(now_s)
            elif now_s <= end_s or (self._decode.ended < len(self._works) and now_s <= end_s + _PATIENCE_S):
                self._look(now_s, what)
        return self._record

    # -- a request's way

    def _go_on(self, now_s: float, what: str, work: Work) -> None:
        if what == "arrives":
            self._arrived += 1
            if work.chunks:
                self._vision.take(work)
                self._give(now_s)
            else:
                self._at(now_s + work.hop_s, "cached", work)
        elif what == "encoded":
            work.left -= 1
            if not work.left:
                self._at(now_s + work.hop_s, "cached", work)
        else:
            self._decode.take(now_s, work)

    def _give(self, now_s: float) -> None:
        before_s = self._vision.backlog_s(now_s)
        for work, done_s in self._vision.assign(now_s):
            self._at(done_s, "encoded", work)
        self._assigned_s += self._vision.backlog_s(now_s) - before_s

    # -- what is looked at from time to time

    def _look(self, now_s: float, what: str) -> None:
        plan = self._plan
        if what == "sample":
            self._sample(now_s)
            self._at(now_s + SAMPLE_S, what)
            return
        is_missing = any(begin <= now_s < end for begin, end in plan.missing)
        if what == "vision looks":
            seen = None if is_missing else self._vision_signals(now_s)
            self._scale(now_s, self._vision, self._record.vision, self._vision_scaler, seen)
            self._at(now_s + plan.vision.polling_s, what)
        else:
            is_blind = is_missing and plan.decode.kind != "ray"  # Ray asks its replicas itself
            seen = None if is_blind else self._decode_signals(now_s)
            self._scale(now_s, self._decode, self._record.decode, self._decode_scaler, seen)
            self._at(now_s + plan.decode.polling_s, what)

    def _scale(
        self,
        now_s: float,
        pool: VisionPool | DecodePool,
        record: PoolRecord,
        scales: KedaScaler | RayScaler,
        seen: dict[str, float] | None,
    ) -> None:
        before = pool.wanted
        after = scales.decide(now_s, before, seen, self._arrived - self._decode.ended)
        if after != before:
            record.events.append((now_s, before, after))
            pool.resize(now_s, after)
            self._at(now_s + pool.start_s, "ready")

    def _vision_signals(self, now_s: float) -> dict[str, float]:
        backlog_s = self._vision.backlog_s(now_s)
        self._computed.append((now_s, self._assigned_s - backlog_s))
        while len(self._computed) > 1 and self._computed[0][0] < now_s - _BUSY_WINDOW_S:
            self._computed.popleft()
        (since_s, before), (_, after) = self._computed[0], self._computed[-1]
        return {signals.BACKLOG: backlog_s, signals.BUSY: (after - before) / max(now_s - since_s, 1e-9)}

    def _decode_signals(self, now_s: float) -> dict[str, float]:
        self._runs.append((now_s, self._decode.running()))
        while self._runs[0][0] < now_s - _RUNNING_WINDOW_S:
            self._runs.popleft()
        return {
            signals.BACKLOG: self._decode.backlog_s(),
            signals.RUNNING: sum(value for _, value in self._runs) / len(self._runs),
            signals.ONGOING: self._decode.ongoing(),
        }

    def _sample(self, now_s: float) -> None:
        self._vision.sweep(now_s)
        self._decode.sweep(now_s)
        self._record.times_s.append(now_s)
        vision, decode = self._record.vision, self._record.decode
        for pool, record, queue in (
            (self._vision, vision, self._vision.waiting_tiles(now_s)),
            (self._decode, decode, self._decode.waiting_positions()),
        ):
            record.wanted.append(pool.wanted)
            record.ready.append(len(pool.ready(now_s)))
            record.queue.append(queue)
            record.pod_s += len(pool.pods) * SAMPLE_S
