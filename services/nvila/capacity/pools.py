"""The two pools as queues: pods that start, serve, drain and go; what each request waits for.

Vision: each chunk of a request goes to the next ready pod in turn, which computes its tiles first come, first served.
Decode: a request goes to the ready replica with the fewest; prompts are prefilled one after another, and while one is,
an engine step computes a piece of it and one token of every sequence that generates (chunked prefill). Where several
requests wait nothing is refused: the gateways hold them.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from nvila.capacity.hardware import Throughput

PREFILL_PIECE = 2048
"""Positions of one engine step (`decode.settings.max_batched_tokens`)."""
NEVER = float("inf")
_SLACK = 1e-6
"""Positions and tokens by which sums of floating-point numbers may be off."""


@dataclass(eq=False)
class Work:
    """One request on its way. Times are seconds of the simulation; NaN until they are."""

    at_s: float
    chunks: tuple[int, ...]
    positions: int
    answer_tokens: int
    kind: str
    hop_s: float = 0.0
    """Of its tokens through the cache."""
    first_token_s: float = float("nan")
    done_s: float = float("nan")
    left: int = 0


@dataclass(eq=False)
class Pod:
    ready_s: float
    is_draining: bool = False

    def is_idle(self, now_s: float) -> bool:
        raise AssertionError("each pool's pods say so themselves")


P = TypeVar("P", bound=Pod)


class Pool(Generic[P]):
    """Pods that come and go. Work waits in `held` while no pod is ready to take it."""

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.pods: list[P] = []
        self.held: deque[tuple[Work, int]] = deque()

    def make(self, ready_s: float) -> P:
        raise AssertionError("each pool makes its own pods")

    @property
    def wanted(self) -> int:
        return sum(not pod.is_draining for pod in self.pods)

    def ready(self, now_s: float) -> list[P]:
        return [pod for pod in self.pods if pod.ready_s <= now_s and not pod.is_draining]

    def resize(self, now_s: float, count: int, start_s: float | None = None) -> None:
        """More pods become ready after their start; fewer: those that are not ready yet go first, then the newest,
        and what they have begun they finish."""
        delay = self.start_s if start_s is None else start_s
        for _ in range(count - self.wanted):
            self.pods.append(self.make(now_s + delay))
        staying = [pod for pod in self.pods if not pod.is_draining]
        for pod in sorted(staying, key=lambda pod: pod.ready_s, reverse=True)[: max(self.wanted - count, 0)]:
            pod.is_draining = True
        self.sweep(now_s)

    def sweep(self, now_s: float) -> None:
        """Let drained pods go."""
        self.pods = [pod for pod in self.pods if not (pod.is_draining and (pod.ready_s > now_s or pod.is_idle(now_s)))]


# -- vision -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class VisionPod(Pod):
    free_s: float = 0.0
    tiles: int = 0

    def is_idle(self, now_s: float) -> bool:
        return self.free_s <= now_s


class VisionPool(Pool[VisionPod]):
    def __init__(self, rates: Throughput, start_s: float) -> None:
        super().__init__(start_s)
        self._rate = rates.tiles_per_s
        self._turn = 0

    def make(self, ready_s: float) -> VisionPod:
        return VisionPod(ready_s=ready_s)

    def take(self, work: Work) -> None:
        """Its chunks wait for `assign`."""
        self.held.extend((work, tiles) for tiles in work.chunks)

    def assign(self, now_s: float) -> list[tuple[Work, float]]:
        """Give held chunks to ready pods, in turn."""
        pods = self.ready(now_s)
        given = []
        while pods and self.held:
            work, tiles = self.held.popleft()
            pod = pods[self._turn % len(pods)]
            self._turn += 1
            pod.free_s = max(pod.free_s, now_s) + tiles / self._rate
            given.append((work, pod.free_s))
        return given

    def backlog_s(self, now_s: float) -> float:
        """Seconds of waiting work, summed over the pods, as their metric says it: held work is not in it."""
        return sum(max(pod.free_s - now_s, 0.0) for pod in self.pods)

    def waiting_tiles(self, now_s: float) -> float:
        return self.backlog_s(now_s) * self._rate + sum(tiles for _, tiles in self.held)

    def busy(self, now_s: float) -> int:
        """Pods that compute now."""
        return sum(pod.free_s > now_s for pod in self.pods)


# -- decode -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Replica(Pod):
    """Between two events its rates are constant. `said`: tokens that a sequence would have generated since the start,
    so that one that began at `said` = s ends at s + its answer's length."""

    rates: Throughput | None = None
    now_s: float = 0.0
    said: float = 0.0
    prompts: deque[Work] = field(default_factory=deque)
    done_positions: float = 0.0
    speaking: list[tuple[float, int, Work]] = field(default_factory=list)
    count: int = 0
    due_s: float = NEVER
    """When something happens here next, if nothing comes."""

    def is_idle(self, now_s: float) -> bool:
        return not self.prompts and not self.speaking

    @property
    def ongoing(self) -> int:
        return len(self.prompts) + len(self.speaking)

    @property
    def waiting_positions(self) -> float:
        """Of prompts that are not through: what the replica's backlog metric counts."""
        return sum(work.positions for work in self.prompts) - self.done_positions

    def _speeds(self) -> tuple[float, float]:
        """(positions, tokens of each sequence) per second, now."""
        assert self.rates is not None
        step_s = self.rates.step_of(len(self.speaking)) if self.speaking else 0.0
        if not self.prompts or len(self.speaking) >= self.rates.sequences:
            return 0.0, 1 / step_s if step_s else 0.0
        both_s = PREFILL_PIECE / self.rates.positions_per_s + step_s
        return PREFILL_PIECE / both_s, 1 / both_s if self.speaking else 0.0

    def _next_s(self) -> float:
        prefill, speech = self._speeds()
        next_s = NEVER
        if prefill:
            next_s = self.now_s + (self.prompts[0].positions - self.done_positions) / prefill
        if self.speaking:
            next_s = min(next_s, self.now_s + max(self.speaking[0][0] - self.said, 0.0) / speech)
        return next_s

    def advance(self, to_s: float) -> int:
        """Live until then, which is no later than `due_s`. Returns how many requests ended."""
        prefill, speech = self._speeds()
        passed = max(to_s - self.now_s, 0.0)
        self.now_s = max(to_s, self.now_s)
        self.said += passed * speech
        self.done_positions += passed * prefill
        is_due, ended = to_s >= self.due_s, 0
        if self.prompts and self.done_positions >= self.prompts[0].positions - _SLACK:
            self._begin_to_speak(self.prompts.popleft())
        while self.speaking and self.speaking[0][0] <= self.said + _SLACK:
            heapq.heappop(self.speaking)[2].done_s = self.now_s
            ended += 1
        if is_due or ended:
            self.due_s = self._next_s()
        return ended

    def _begin_to_speak(self, work: Work) -> None:
        self.done_positions = 0.0
        work.first_token_s = self.now_s
        self.count += 1
        heapq.heappush(self.speaking, (self.said + work.answer_tokens, self.count, work))
        self.due_s = self.now_s

    def take(self, work: Work) -> None:
        """The replica has been brought to now."""
        self.prompts.append(work)
        self.due_s = self._next_s()


class DecodePool(Pool[Replica]):
    def __init__(self, rates: Throughput, start_s: float, most_ongoing: int) -> None:
        super().__init__(start_s)
        self._rates = rates
        self._most_ongoing = most_ongoing
        self.ended = 0
        """Requests answered so far."""

    def make(self, ready_s: float) -> Replica:
        return Replica(ready_s=ready_s, rates=self._rates, now_s=ready_s)

    def take(self, now_s: float, work: Work) -> None:
        self.held.append((work, work.positions))
        self.assign(now_s)

    def assign(self, now_s: float) -> None:
        """Give held requests to ready replicas that have room, the emptiest first."""
        pods = self.ready(now_s)
        while pods and self.held:
            replica = min(pods, key=lambda pod: pod.ongoing)
            if replica.ongoing >= self._most_ongoing:
                return
            self.ended += replica.advance(now_s)
            replica.take(self.held.popleft()[0])

    def advance(self, to_s: float) -> None:
        """Live until then, event by event; a place that becomes free is taken at once."""
        while self.pods and (first := min(self.pods, key=lambda pod: pod.due_s)).due_s <= to_s:
            at_s = first.due_s
            self.ended += first.advance(at_s)
            if self.held:
                self.assign(at_s)
        for pod in self.pods:
            if pod.now_s < to_s:
                self.ended += pod.advance(to_s)

    def ongoing(self) -> int:
        return sum(pod.ongoing for pod in self.pods) + len(self.held)

    def running(self) -> int:
        return sum(len(pod.speaking) for pod in self.pods)

    def backlog_s(self) -> float:
        """Seconds of prompts in the replicas, summed, as their metric says it."""
        return sum(pod.waiting_positions for pod in self.pods) / self._rates.positions_per_s

    def waiting_positions(self) -> float:
        return sum(pod.waiting_positions for pod in self.pods) + sum(size for _, size in self.held)
