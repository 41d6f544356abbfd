"""Does jobs: claims what may begin, runs its handler, keeps the lease, and says in the database what came of it.

What a job *is* about is its handler's (`Handler`), how it survives is `jobs.py`'s. Here is decided how many run at a
time, how long one may take, when one is tried again, and how one is stopped: within a second when its client cancels it
or another worker has taken it over, after a while when this worker is to end. A handler is stopped by cancelling it; it
cleans up and lets the cancellation pass.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from nvila.errors import DeadlineExceeded, NvilaError, Overloaded, Unavailable
from nvila.recordings.claims import Claim, LeaseLost
from nvila.recordings.jobs import JobStore
from nvila.recordings.types import JobKind, JobState
from nvila.telemetry import names, tracing
from nvila.telemetry.logs import fields
from nvila.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

Handler = Callable[[Claim], Awaitable[Mapping[str, Any]]]
"""Does one job and returns its result, a JSON object. `Overloaded`, `Unavailable`, `DeadlineExceeded` and what nobody
foresaw are tried again from the last checkpoint; any other `NvilaError` is the job's end."""

Outcome = Literal["done", "failed", "retry", "cancelled", "lost", "released"]

T = TypeVar("T")

_TRANSIENT = (Overloaded, Unavailable, DeadlineExceeded)
_RENEWALS = 4
"""Of a lease in its length, so that two may fail before it ends."""


@dataclass(frozen=True)
class Pool:
    """`slots` jobs of these kinds at a time. `deadline_s`: for one attempt; None: as long as a camera runs.
    `may_begin`: whether what these jobs need is there at all: while it is not, they wait and lose no attempts."""

    kinds: tuple[JobKind, ...]
    slots: int
    deadline_s: float | None
    may_begin: Callable[[], bool] = lambda: True


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """`lease_s`: how long after its worker's death a job is taken over. `look_s`: between looks whether a running job
    must stop. `poll_s`: between looks for jobs while there are none. `drain_s`: for jobs to end when the worker is to
    end; then they are given back. `stop_s`: for a cancelled handler to clean up."""

    pools: tuple[Pool, ...]
    lease_s: float = 30.0
    look_s: float = 0.5
    poll_s: float = 0.5
    drain_s: float = 10.0
    stop_s: float = 10.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 300.0


@dataclass(eq=False)
class _Running:
    claim: Claim
    pool: Pool
    task: asyncio.Task[None]
    renewed_at: float = field(default_factory=time.monotonic)
    stopping: Literal["cancelled", "lost", "released"] | None = None


class Worker:
    """`name`: in logs and in the database, of the process."""

    def __init__(
        self,
        name: str,
        jobs: JobStore,
        handlers: Mapping[JobKind, Handler],
        limits: WorkerLimits,
        metrics: Metrics,
        *,
        pause: Callable[[float], float] = lambda s: s * random.uniform(0.5, 1.0),
    ) -> None:
        """`pause`: what is made of a pause before it is taken (jitter)."""
        missing = {kind for pool in limits.pools for kind in pool.kinds} - set(handlers)
        assert not missing, f"no handlers of {sorted(missing)}"
        self._name = name
        self._jobs = jobs
        self._handlers = handlers
        self._limits = limits
        self._metrics = metrics
        self._pause = pause
        self._running: dict[Claim, _Running] = {}
        self._freed = asyncio.Event()
        self._ending = asyncio.Event()
        self.looked_at = time.monotonic()
        """When the worker last had an answer from the database (monotonic)."""

    async def run(self) -> None:
        """Do jobs until `end` is called, then end or give back those that run."""
        attending = asyncio.create_task(self._attend())
        try:
            while not self._ending.is_set():
                if not await self._begin_next():
                    await self._wait()
            await self._drain()
        finally:
            attending.cancel()
            await asyncio.wait({attending})

    def end(self) -> None:
        """Claim nothing more."""
        self._ending.set()
        self._freed.set()

    @property
    def running(self) -> int:
        return len(self._running)

    # -- beginning

    async def _begin_next(self) -> bool:
        if self._is_late():
            return False
        kinds = tuple(kind for pool in self._limits.pools if self._is_open(pool) for kind in pool.kinds)
        try:
            claim = await self._jobs.claim(self._name, kinds, self._limits.lease_s)
        except Unavailable:
            _log.warning("no jobs: the database does not answer")
            return False
        except Exception:  # the process's edge: it goes on, whatever this was
            _log.exception("no jobs: claiming one failed")
            return False
        self.looked_at = time.monotonic()
        if claim is None:
            return False
        kind = claim.job.kind
        self._metrics.observe(names.JOB_WAIT_SECONDS, claim.waited_s, kind=kind)
        pool = next(pool for pool in self._limits.pools if kind in pool.kinds)
        task = asyncio.create_task(self._do(claim, pool))
        self._running[claim] = _Running(claim, pool, task)
        self._show_running(kind)
        return True

    def _is_late(self) -> bool:
        """Whether a lease of this worker may have run out: to claim now would take its own job away from itself."""
        last = time.monotonic() - self._limits.lease_s / 2
        return any(running.renewed_at < last and not running.stopping for running in self._running.values())

    def _is_open(self, pool: Pool) -> bool:
        return pool.may_begin() and sum(running.pool is pool for running in self._running.values()) < pool.slots

    async def _wait(self) -> None:
        """Until there may be something to begin."""
        waits = {
            asyncio.create_task(self._jobs.wait_for_news(self._pause(self._limits.poll_s))),
            asyncio.create_task(self._freed.wait()),
        }
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
        self._freed.clear()

    # -- one job

    async def _do(self, claim: Claim, pool: Pool) -> None:
        job, began = claim.job, time.monotonic()
        with tracing.span(f"recordings.{job.kind}") as span:
            span.set_attribute(names.ATTR_JOB_ATTEMPT, job.attempt)
            _log.info("job begun", extra=fields(job=job.id, kind=job.kind, attempt=job.attempt, fence=job.fence))
            try:
                outcome = await self._attempt(claim, pool)
            except Unavailable:  # the end could not be told: the lease runs out, and the job goes on elsewhere
                outcome = "lost"
            finally:
                self._running.pop(claim, None)
                self._show_running(job.kind)
                self._freed.set()
            took_s = time.monotonic() - began
            _log.info("job left", extra=fields(job=job.id, kind=job.kind, outcome=outcome, seconds=round(took_s, 3)))
        self._metrics.add(names.JOBS_FINISHED, kind=job.kind, outcome=outcome)
        self._metrics.observe(names.JOB_SECONDS, took_s, kind=job.kind, outcome=outcome)

    async def _attempt(self, claim: Claim, pool: Pool) -> Outcome:
        try:
            async with asyncio.timeout(pool.deadline_s) as limit:
                result = await self._handlers[claim.job.kind](claim)
            await self._tell(lambda: claim.finish(result))
        except LeaseLost:
            return "lost"
        except asyncio.CancelledError:
            return await self._stopped(claim)
        except TimeoutError:
            if not limit.expired():  # not ours: something within waited in vain
                return await self._failed(claim, DeadlineExceeded("a part of the job did not end in time"))
            return await self._failed(claim, DeadlineExceeded(f"one attempt may take {pool.deadline_s:g} s"))
        except NvilaError as error:
            return await self._failed(claim, error)
        except Exception:  # the edge of what is not ours: a handler
            _log.exception("a job's handler broke", extra=fields(job=claim.job.id, kind=claim.job.kind))
            return await self._failed(claim, NvilaError("an unexpected error; the worker's log says which"))
        return "done"

    async def _failed(self, claim: Claim, error: NvilaError) -> Outcome:
        is_transient = isinstance(error, _TRANSIENT) or type(error) is NvilaError
        delay_s = self._pause(
            min(self._limits.longest_pause_s, self._limits.first_pause_s * 2.0 ** min(claim.job.attempt - 1, 30))
        )
        delay_s = max(delay_s, error.retry_after_s or 0.0)
        _log.warning(
            "job failed",
            extra=fields(job=claim.job.id, kind=claim.job.kind, code=error.code, reason=error.message, delay_s=delay_s),
        )
        try:
            state = await self._tell(lambda: claim.fail(error, retry=is_transient, delay_s=delay_s))
        except LeaseLost:
            return "lost"
        return "retry" if state is JobState.QUEUED else "failed"

    async def _stopped(self, claim: Claim) -> Outcome:
        """The handler was cancelled; by whom, `stopping` says. (Nobody: the process is being torn down.)"""
        running = self._running.get(claim)
        reason = running.stopping if running is not None else None
        try:
            if reason == "cancelled":
                await self._tell(claim.cancelled)
            elif reason == "released":
                await self._tell(claim.release)
            elif reason is None:
                raise asyncio.CancelledError
        except LeaseLost:
            return "lost"
        return reason

    async def _tell(self, what: Callable[[], Awaitable[T]]) -> T:
        """Write the job's end, however often it takes while the lease can hold."""
        give_up_at, pause_s = time.monotonic() + self._limits.lease_s, 0.1
        while True:
            try:
                return await what()
            except Unavailable:
                if time.monotonic() + pause_s > give_up_at:
                    raise
                await asyncio.sleep(pause_s)
                pause_s *= 2

    # -- attending to those that run

    async def _attend(self) -> None:
        while True:
            try:
                await self._look()
            except Unavailable:
                _log.warning("leases are not renewed: the database does not answer")
            except Exception:
                _log.exception("attending to the running jobs failed")
            await asyncio.sleep(self._limits.look_s)

    async def _look(self) -> None:
        # By the answer's time, a job may have ended and begun anew under another lease.
        seen = {running.claim.job.id: running for running in self._running.values()}
        interrupted = await self._jobs.interrupted([running.claim for running in seen.values()])
        for job_id, is_cancelled in interrupted.items():
            self._stop(seen[job_id], "cancelled" if is_cancelled else "lost")
        due = time.monotonic() - self._limits.lease_s / _RENEWALS
        late = [running for running in self._running.values() if running.renewed_at < due and not running.stopping]
        answers = await asyncio.gather(*(running.claim.renew() for running in late), return_exceptions=True)
        for running, answer in zip(late, answers, strict=True):
            if answer is None:
                running.renewed_at = time.monotonic()
            elif isinstance(answer, LeaseLost):
                self._stop(running, "lost")
            else:
                _log.warning("a lease was not renewed", extra=fields(job=running.claim.job.id, reason=str(answer)))

    def _stop(self, running: _Running, reason: Literal["cancelled", "lost", "released"]) -> None:
        if running.stopping is None:
            running.stopping = reason
            running.task.cancel()

    async def _drain(self) -> None:
        tasks = {running.task for running in self._running.values()}
        if tasks:
            _log.info("waiting for jobs to end", extra=fields(jobs=len(tasks), at_most_s=self._limits.drain_s))
            await asyncio.wait(tasks, timeout=self._limits.drain_s)
        for running in list(self._running.values()):
            self._stop(running, "released")
        left = {running.task for running in self._running.values()}
        if left:
            await asyncio.wait(left, timeout=self._limits.stop_s)
        for running in self._running.values():
            _log.error("a job did not stop; its lease will run out", extra=fields(job=running.claim.job.id))

    def _show_running(self, kind: JobKind) -> None:
        count = sum(running.claim.job.kind is kind for running in self._running.values())
        self._metrics.set(names.JOBS_RUNNING, count, kind=kind)
