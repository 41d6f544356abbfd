"""How a request's work is timed, repeated and grouped: helpers of `pipeline.py` that know nothing of media."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from opentelemetry.trace import Span

from nvila.errors import NvilaError
from nvila.telemetry import names, tracing
from nvila.telemetry.logs import fields
from nvila.telemetry.metrics import Metrics

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Clock:
    """Milliseconds by stage of one request, summed over chunks; each stage is a span too."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._stage_ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, **attributes: Any) -> Iterator[Span]:
        began = time.perf_counter()
        with tracing.span(name, **attributes) as current:
            try:
                yield current
            finally:
                seconds = time.perf_counter() - began
                self.add_parts("", {name: seconds * 1000})
                self._metrics.observe(names.STAGE_SECONDS, seconds, stage=name)

    def add_parts(self, stage: str, parts_ms: Mapping[str, float]) -> None:
        """Times inside a stage, as the service that did the work tells them: `vision.tower`, `decode.prefill`."""
        for part, ms in parts_ms.items():
            name = f"{stage}.{part}" if stage else part
            self._stage_ms[name] = self._stage_ms.get(name, 0.0) + ms

    def mark(self, name: str, at: float) -> None:
        """A moment (`perf_counter`), as milliseconds since the request came."""
        self._stage_ms[name] = (at - self._began) * 1000

    def summary(self) -> dict[str, float]:
        """All stages, and `total`."""
        self.mark("total", time.perf_counter())
        return {name: round(ms, 3) for name, ms in self._stage_ms.items()}


class Patience:
    """Growing pauses between tries of one service (0.1 to 2 s), until it has been away for `limit_s`."""

    def __init__(self, service: str, limit_s: float, metrics: Metrics) -> None:
        self._service = service
        self._limit_s = limit_s
        self._metrics = metrics
        self.renew()

    def renew(self) -> None:
        """There was progress since the last failure."""
        self._give_up_at: float | None = None
        self._pause_s = 0.1

    async def wait(self, error: NvilaError) -> None:
        """Pause before the next try; raises `error` when there is to be none."""
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self._limit_s
        if now + self._pause_s > self._give_up_at:
            raise error
        self._metrics.add(names.RECOVERIES, cause=self._service)
        _log.warning("a service is away, trying again", extra=fields(service=self._service, error=error.message))
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, 2.0)


async def gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first failure cancels the rest and is raised."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    return [task.result() for task in tasks]


async def stop(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it is over, whatever it ended with."""
    task.cancel()
    await asyncio.wait({task})


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that the others came with: one of our own before any that says that something is broken."""
    leaves = list(_leaves(group))
    return next((leaf for leaf in leaves if isinstance(leaf, NvilaError)), leaves[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
