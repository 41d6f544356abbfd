"""The batching engine: tiles of all waiting requests go through one tower in batches.

It knows nothing of Triton, Redis or wires: frames in, a future of projected tokens out. Two threads: one prepares
(tiles and pixel values, on the CPU), one owns the tower and what follows it. Waiting is bounded in tiles, prepared
pixels are bounded in tiles too, and a request whose caller is gone is dropped before each step that would cost.

F frames · N tiles · S tile side · C channels · T visual tokens · D language-model width.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvila.errors import NvilaError, Overloaded, Unavailable
from nvila.model.encoder import Prepared
from nvila.telemetry import names
from nvila.telemetry.logs import fields
from nvila.telemetry.names import Metric
from nvila.types import EncodeSettings, Level

_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """What the engine asks of `model/encoder.py`."""

    def prepare(self, frames_FHWC: NDArray[np.uint8], settings: EncodeSettings) -> Prepared: ...
    def tower(self, pixels_N3SS: Tensor) -> Tensor: ...
    def finish(
        self, features_NTC: Tensor, prepared: Prepared, settings: EncodeSettings
    ) -> tuple[Tensor, tuple[Level, ...]]: ...


class MetricSink(Protocol):
    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None: ...
    def set(self, metric: Metric, value: float, **labels: str) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the engine made of a request's frames.

    `values_TD`: float32. `spans_ns`: (begin, end) by stage in wall-clock nanoseconds, for spans; stages of one request
    may interleave with other requests' batches, so `stage_ms` holds the time that was this request's own.
    """

    values_TD: NDArray[np.float32]
    levels: tuple[Level, ...]
    tiles: int
    stage_ms: dict[str, float]
    spans_ns: dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """`batch_tiles`: most tiles of one tower call. `pending_tiles`: how many may wait before requests are refused.
    `is_padded`: batches are filled up to powers of two, so that an accelerator sees few shapes."""

    batch_tiles: int
    pending_tiles: int
    is_padded: bool


@dataclass(eq=False)
class _Job:
    """One request on its way through the engine."""

    frames_FHWC: NDArray[np.uint8] | None
    settings: EncodeSettings
    estimate: int
    why_gone: Callable[[], NvilaError | None]
    future: Future[Features] = field(default_factory=Future)
    prepared: Prepared | None = None
    begun: int = 0
    features: list[Tensor] = field(default_factory=list)
    submitted_ns: int = field(default_factory=time.time_ns)
    spans_ns: dict[str, tuple[int, int]] = field(default_factory=dict)
    tower_ns: int = 0

    @property
    def left(self) -> int:
        """Tiles that have not been through the tower."""
        return self.estimate if self.prepared is None else self.prepared.tiles - self.begun

    def fail_if_gone(self) -> bool:
        error = self.why_gone()
        if error is not None:
            self.future.set_exception(error)
        return error is not None


class Engine:
    """Start it by making it; `close` fails what is waiting and ends the threads.

    `on_broken` is called when nothing more can be computed here: the accelerator failed, or one of the threads did.
    """

    def __init__(
        self,
        encoder: Encoder,
        limits: EngineLimits,
        metrics: MetricSink,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self._encoder = encoder
        self._limits = limits
        self._metrics = metrics
        self._on_broken = on_broken
        self._rate = _Rate()
        self._changed = threading.Condition()
        self._unprepared: list[_Job] = []
        self._waiting: list[_Job] = []
        self._is_closed = False
        self._note()  # an engine that nobody has asked yet reports, too
        self._threads = [
            threading.Thread(target=self._live, args=(self._prepare_all,), name="nvila-prepare", daemon=True),
            threading.Thread(target=self._live, args=(self._compute_all,), name="nvila-tower", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        frames_FHWC: NDArray[np.uint8],
        settings: EncodeSettings,
        *,
        tiles: int,
        why_gone: Callable[[], NvilaError | None],
    ) -> Future[Features]:
        """Queue a request. The frames are read until the future is done, and not afterwards.

        tiles: how many it will make, at most. why_gone: asked before each step; an error ends the request. Raises
        `Overloaded` when too many tiles wait already.
        """
        job = _Job(frames_FHWC, settings, tiles, why_gone)
        job.future.set_running_or_notify_cancel()  # whoever awaits it cannot end it: the frames may be in use
        with self._changed:
            if self._is_closed:
                raise Unavailable("the vision service is stopping")
            pending = self._pending()
            if pending and pending + tiles > self._limits.pending_tiles:
                raise Overloaded(
                    f"vision queue: {pending} tiles wait and {tiles} more came, at most {self._limits.pending_tiles}",
                    retry_after_s=self._rate.seconds(pending),
                )
            self._unprepared.append(job)
            self._note()
            self._changed.notify_all()
        return job.future

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            left, self._unprepared, self._waiting = self._unprepared + self._waiting, [], []
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for job in left:
            if not job.future.done():
                job.future.set_exception(Unavailable("the vision service is stopping"))

    def _live(self, work: Callable[[], None]) -> None:
        """A thread that ended on its own would leave every request waiting, so that is not survived."""
        try:
            work()
        except BaseException:
            _log.critical("a thread of the engine ended", exc_info=True)
            self._on_broken()
            raise

    # -- the preparing thread

    def _prepare_all(self) -> None:
        while (job := self._next_unprepared()) is not None:
            began = time.time_ns()
            try:
                assert job.frames_FHWC is not None
                job.prepared = self._encoder.prepare(job.frames_FHWC, job.settings)
            except Exception as error:  # whatever one request's pixels cause is that request's error
                job.future.set_exception(_described(error, "preparing frames"))
                continue
            job.frames_FHWC = None
            job.spans_ns["queue"] = (job.submitted_ns, began)
            job.spans_ns["preprocess"] = (began, time.time_ns())
            with self._changed:
                if self._is_closed:
                    job.future.set_exception(Unavailable("the vision service is stopping"))
                    return
                self._waiting.append(job)
                self._note()
                self._changed.notify_all()

    def _next_unprepared(self) -> _Job | None:
        """The next request worth preparing, when there is room for its pixels; None at the end."""
        with self._changed:
            while True:
                for job in [job for job in self._unprepared if job.fail_if_gone()]:
                    self._unprepared.remove(job)
                    self._note()
                if self._is_closed:
                    return None
                for job in self._unprepared:
                    if self._has_room(job):
                        self._unprepared.remove(job)
                        return job
                self._changed.wait()

    def _has_room(self, job: _Job) -> bool:
        """Two batches' worth of pixels may be ready: of requests that fit one batch, and again of larger ones, so that
        neither kind keeps the other from being prepared."""
        limit = self._limits.batch_tiles
        held = sum(other.estimate for other in self._waiting if (other.estimate <= limit) == (job.estimate <= limit))
        return held < 2 * limit

    # -- the tower's thread

    def _compute_all(self) -> None:
        while batch := self._next_batch():
            try:
                self._compute(batch)
            except Exception as error:  # a broken batch fails its requests, not the process
                _log.exception("a tower batch failed", extra=fields(requests=len(batch)))
                for job, _ in batch:
                    self._end(job, error=_described(error, "computing visual tokens"))
                if isinstance(error, torch.AcceleratorError):
                    self._on_broken()

    def _next_batch(self) -> list[tuple[_Job, int]]:
        with self._changed:
            while True:
                for job in [job for job in self._waiting if job.fail_if_gone()]:
                    self._forget(job)
                if self._is_closed:
                    return []
                if self._waiting:
                    counts = choose([job.left for job in self._waiting], self._limits.batch_tiles)
                    return [(job, count) for job, count in zip(self._waiting, counts, strict=True) if count]
                self._changed.wait()

    def _compute(self, batch: Sequence[tuple[_Job, int]]) -> None:
        began_ns = time.time_ns()
        pixels_N3SS = torch.cat([_pixels(job)[job.begun : job.begun + count] for job, count in batch])
        tiles = len(pixels_N3SS)
        features_NTC = self._encoder.tower(self._padded(pixels_N3SS))[:tiles]
        if features_NTC.is_cuda:
            torch.cuda.synchronize(features_NTC.device)  # so that times are the tower's, not the queue's
        ended_ns = time.time_ns()
        self._rate.note(tiles, (ended_ns - began_ns) / 1e9)
        self._metrics.add(names.VISION_BATCHES)
        self._metrics.add(names.VISION_TILES, tiles)
        start = 0
        for job, count in batch:
            job.features.append(features_NTC[start : start + count])
            job.begun += count
            job.tower_ns += (ended_ns - began_ns) * count // tiles
            job.spans_ns["tower"] = (job.spans_ns.get("tower", (began_ns, 0))[0], ended_ns)
            start += count
        for job, _ in batch:
            if job.left == 0:
                self._finish(job)
        with self._changed:
            self._note()
            self._changed.notify_all()  # requests that wait to be prepared are asked again whether they are gone

    def _padded(self, pixels_N3SS: Tensor) -> Tensor:
        if not self._limits.is_padded:
            return pixels_N3SS  # on a CPU a padded tile costs as much as a real one
        size = min(self._limits.batch_tiles, 1 << (len(pixels_N3SS) - 1).bit_length())
        return torch.nn.functional.pad(pixels_N3SS, (0, 0, 0, 0, 0, 0, 0, size - len(pixels_N3SS)))

    def _finish(self, job: _Job) -> None:
        assert job.prepared is not None
        began_ns = time.time_ns()
        try:
            values_TD, levels = self._encoder.finish(torch.cat(job.features), job.prepared, job.settings)
            values = np.ascontiguousarray(values_TD.cpu().numpy())
        except Exception as error:  # whatever one request's layout causes is that request's error
            self._end(job, error=_described(error, "projecting visual tokens"))
            return
        job.spans_ns["project"] = (began_ns, time.time_ns())
        own = {stage: (end - begin) / 1e6 for stage, (begin, end) in job.spans_ns.items()}
        own["tower"] = job.tower_ns / 1e6
        own["queue"] = (job.spans_ns["project"][1] - job.submitted_ns) / 1e6 - sum(
            own[stage] for stage in ("preprocess", "tower", "project")
        )
        features = Features(
            values_TD=values, levels=levels, tiles=job.prepared.tiles, stage_ms=own, spans_ns=job.spans_ns
        )
        self._end(job, features=features)

    def _end(self, job: _Job, *, features: Features | None = None, error: NvilaError | None = None) -> None:
        with self._changed:
            if job in self._waiting:
                self._forget(job)
        if job.future.done():
            return
        if error is not None:
            job.future.set_exception(error)
        elif features is not None:
            job.future.set_result(features)

    def _forget(self, job: _Job) -> None:
        """Under the lock."""
        self._waiting.remove(job)
        self._note()
        self._changed.notify_all()

    def _pending(self) -> int:
        return sum(job.left for job in self._unprepared) + sum(job.left for job in self._waiting)

    def _note(self) -> None:
        pending = self._pending()
        self._metrics.set(names.VISION_PENDING_TILES, pending)
        self._metrics.set(names.VISION_BACKLOG_SECONDS, self._rate.seconds(pending))


def choose(left: Sequence[int], room: int) -> list[int]:
    """How many tiles of each waiting request go into a batch of `room`; requests in order of arrival.

    Half of the batch goes to the oldest, so that the largest request is never starved and chunks of a video come out in
    order; the other half to those that need least, so that a picture does not wait behind 256 frames. What one half
    leaves the other may take.
    """
    counts = [0] * len(left)
    by_size = sorted(range(len(left)), key=lambda index: left[index])
    for order, share in ((range(len(left)), (room + 1) // 2), (by_size, room)):
        for index in order:
            take = min(left[index] - counts[index], share - sum(counts))
            counts[index] += max(take, 0)
    return counts


def _pixels(job: _Job) -> Tensor:
    assert job.prepared is not None
    return job.prepared.pixels_N3SS


def _described(error: Exception, doing: str) -> NvilaError:
    """An error for the caller: our own as it is, anything else without its internals."""
    if isinstance(error, NvilaError):
        return error
    _log.error("a request failed", extra=fields(doing=doing), exc_info=error)
    return Unavailable(f"the vision service failed while {doing}: {type(error).__name__}")


class _Rate:
    """The tower's recent tiles per second."""

    def __init__(self) -> None:
        self._tiles_per_s = 0.0

    def note(self, tiles: int, seconds: float) -> None:
        now = tiles / max(seconds, 1e-9)
        self._tiles_per_s = now if not self._tiles_per_s else 0.8 * self._tiles_per_s + 0.2 * now

    def seconds(self, tiles: int) -> float:
        """How long that many tiles take; 0 before anything was measured."""
        return tiles / self._tiles_per_s if self._tiles_per_s else 0.0
