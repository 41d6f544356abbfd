"""Render data sets in parallel: a folder of tar shards and a manifest that says how to make it again.

Each worker is a process of its own that is told shard by shard what to make, in a line of JSON, and says how far it is,
in lines of JSON. Shards that are there already are kept, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nvila.errors import InvalidRequest, NvilaError
from nvila.train.data.catalogue import FAMILIES, TASKS, make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.data.fonts import HELD_OUT, TRAINED
from nvila.train.data.shards import write_shard
from nvila.train.data.tasks import charts, documents, scene, tables

VERSION = 1
"""Raised whenever the same seed gives other samples."""

_SAY_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A data set to be rendered. `counts`: samples of each family, by split."""

    families: tuple[str, ...] = tuple(TASKS)
    counts: Mapping[Split, int]
    seed: int = 0
    knobs: Knobs = field(default_factory=Knobs)
    shard_samples: int = 1000

    def __post_init__(self) -> None:
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            raise InvalidRequest(f"there is no task family {', '.join(unknown)!r}; there are: {', '.join(FAMILIES)}")

    @property
    def samples(self) -> int:
        return len(self.families) * sum(self.counts.values())


@dataclass(frozen=True)
class _Job:
    path: Path
    family: str
    split: Split
    first: int
    count: int


def generate(plan: Plan, folder: Path, workers: int, progress: Callable[[int], None]) -> int:
    """Render what is missing; `progress` is told how many samples came. Returns how many were rendered now.

    Raises `InvalidRequest` when the folder holds another data set, `NvilaError` when a worker fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, plan)
    jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    rendered = 0
    for job in _jobs(plan, folder):
        if job.path.exists():
            progress(job.count)
        else:
            jobs.put(job)
            rendered += job.count
    crew = [_Worker(plan, jobs, progress) for _ in range(max(1, min(workers, jobs.qsize())))] if rendered else []
    try:
        for worker in crew:
            worker.start()
        for worker in crew:
            worker.join()
    finally:
        for worker in crew:
            worker.stop()
    failed = next((worker.failure for worker in crew if worker.failure), None)
    if failed:
        raise NvilaError(f"rendering failed: {failed}")
    return rendered


def _jobs(plan: Plan, folder: Path) -> list[_Job]:
    jobs = []
    for split, count in plan.counts.items():
        for family in plan.families:
            for number, first in enumerate(range(0, count, plan.shard_samples)):
                path = folder / f"{family}-{split}-{number:05d}.tar"
                jobs.append(_Job(path, family, split, first, min(plan.shard_samples, count - first)))
    return jobs


def _claim(folder: Path, plan: Plan) -> None:
    """Write the manifest, or check that the one there is of the same data."""
    path = folder / "manifest.json"
    manifest = {
        "version": VERSION,
        "seed": plan.seed,
        "knobs": asdict(plan.knobs),
        "shard_samples": plan.shard_samples,
        "fonts": [face.name for face in TRAINED],
        "held_out_fonts": [face.name for face in HELD_OUT],
        "held_out_layouts": held_out_layouts(),
    }
    manifest = json.loads(json.dumps(manifest))
    if path.exists():
        there = json.loads(path.read_text("utf-8"))
        other = [key for key, value in manifest.items() if there.get(key) != value]
        if other:
            raise InvalidRequest(f"{folder} holds data of another {', '.join(other)}; choose another folder")
        manifest["counts"] = there.get("counts", {})
    counts = manifest.setdefault("counts", {})
    for family in plan.families:
        counts.setdefault(family, {}).update({str(split): count for split, count in plan.counts.items()})
    path.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def held_out_layouts() -> dict[str, Sequence[str]]:
    """By family: what is drawn in the test split only, in half of its samples."""
    return {
        "documents": (*documents.HELD_OUT_RECEIPTS, *documents.HELD_OUT_FORMS),
        "tables": tables.HELD_OUT_STYLES,
        "charts": (*charts.HELD_OUT_CHARTS, "ring"),
        "scene": scene.HELD_OUT_SIGNS,
    }


class _Worker(threading.Thread):
    """Feeds one process."""

    def __init__(self, plan: Plan, jobs: queue.SimpleQueue[_Job], progress: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self._plan, self._jobs, self._progress = plan, jobs, progress
        self.failure = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nvila.train.data.generate"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self) -> None:
        try:
            while not self.failure:
                self._make(self._jobs.get_nowait())
        except queue.Empty:
            pass

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _make(self, job: _Job) -> None:
        order = {
            "path": str(job.path),
            "family": job.family,
            "split": job.split,
            "seed": self._plan.seed,
            "first": job.first,
            "count": job.count,
            "knobs": asdict(self._plan.knobs),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.failure = "the worker ended"
            return
        done = 0
        for line in self._process.stdout:
            reply = json.loads(line)
            if "error" in reply:
                self.failure = f"{job.path.name}: {reply['error']}"
                return
            self._progress(reply["done"] - done)
            done = reply["done"]
            if done == job.count:
                return
        assert self._process.stderr is not None
        self.failure = f"{job.path.name}: the worker ended: {self._process.stderr.read().strip()[-500:]}"


def _serve() -> None:
    """A worker: jobs in on standard input, progress out on standard output, until the input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        try:
            _render(order)
        except NvilaError as error:
            _say({"error": error.message})
        except OSError as error:
            _say({"error": str(error)})


def _render(order: Mapping[str, Any]) -> None:
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in order["knobs"].items()}
    knobs = Knobs(**given)
    first, count = order["first"], order["count"]

    def samples() -> Any:
        for done, index in enumerate(range(first, first + count)):
            if done and done % _SAY_EVERY == 0:
                _say({"done": done})
            yield make_sample(order["family"], Split(order["split"]), order["seed"], index, knobs)

    write_shard(Path(order["path"]), samples())
    _say({"done": count})


def _say(reply: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
