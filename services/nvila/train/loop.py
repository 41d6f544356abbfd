"""One stage: from a checkpoint and a recipe to a checkpoint, resumable at any moment.

out/<recipe>/run.json       the recipe, what it starts from, versions, commit: written before the first step
             metrics.jsonl  one line per step
             loss.png       redrawn with every state
             state/step-*   where to go on from (train/state.py)
             model/         the result in the published layout; when it is there, the stage is done
"""

from __future__ import annotations

import json
import logging
import platform
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from blake3 import blake3

from nvila.errors import InvalidRequest, NotFound
from nvila.model.checkpoint import Checkpoint
from nvila.model.layouts import LayoutStyle, Part, read_layout
from nvila.model.save import write_json
from nvila.train import adapters, fp8
from nvila.train.distributed import Ranks, clip, shard
from nvila.train.export import DTYPES, export_model, reshape_checkpoint
from nvila.train.feed import Feed, Step
from nvila.train.model import LossSettings, Module, Row, TrainableNvila
from nvila.train.optim import make_optimizer, set_rate
from nvila.train.plot import plot_losses, read_metrics
from nvila.train.recipes import Duration, Precision, Recipe, recipe_from
from nvila.train.state import Progress, clean, newest_state, read_progress, restore_state, restore_weights, save_state

logger = logging.getLogger(__name__)

_FEW_STEPS = 10

Report = Callable[[dict[str, Any]], None]
"""Called by the first process after every step, with the step's metrics and `done`, the share of the run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`model`: the finished checkpoint, or None when the run was stopped and can go on."""

    model: Path | None
    progress: Progress
    loss: float


def train(
    recipe: Recipe,
    start: Path,
    out: Path,
    *,
    ranks: Ranks | None = None,
    stop_after_s: float | None = None,
    has_processes: bool = False,
    report: Report = lambda metrics: None,
    export_dtype: torch.dtype | None = None,
) -> Outcome:
    """Run, or go on with, one stage. `stop_after_s`: of this call, then a state is written and the call returns.

    Ctrl-C and SIGTERM end the step, write a state and return. Raises `InvalidRequest` when `out` holds a run of another
    recipe or from another checkpoint, `InvalidCheckpoint` for a model that cannot be read.
    """
    began = time.monotonic()
    ranks = ranks or Ranks.join()
    folder = out / recipe.name
    recipe = _begin(recipe, start, folder, ranks)
    if (folder / "model" / "config.json").exists():
        return Outcome(model=folder / "model", progress=Progress(), loss=_last_loss(folder))
    start = _reshaped(recipe, start, folder, ranks)
    clean(folder / "state")
    checkpoint = Checkpoint.open(start)
    torch.manual_seed(recipe.seed)
    model = TrainableNvila.load(checkpoint)
    _prepare(model, recipe)
    model.to(ranks.device)  # not before: what is packed into 4 bits never lies there whole
    if not recipe.optim.muon:  # which takes whole matrices
        shard(model, ranks)
    optimizer = make_optimizer(model, recipe.optim)
    state = newest_state(folder / "state")
    progress = Progress()
    if state is not None:
        progress = read_progress(state)
        restore_state(state, model, optimizer, ranks)
    if ranks.is_first:
        _cut_metrics(folder / "metrics.jsonl", progress.step)
    positions = {int(lane): place for lane, place in progress.lanes.items()}
    lanes = ranks.lanes(recipe.batch.lanes)
    run = _Run(model, optimizer, recipe, ranks, folder, progress)
    with (
        _stopping() as is_stopped,
        Feed(
            recipe, start, lanes, {i: positions[i] for i in lanes if i in positions}, has_processes=has_processes
        ) as feed,
    ):
        run.epoch_samples = feed.samples
        if state is None:
            progress.skipped = len(feed.faults)
        for step in _ahead(feed):
            if run.share >= 1:
                break
            metrics = run.step(step)
            if ranks.is_first:
                report(metrics)
            is_late = stop_after_s is not None and time.monotonic() - began > stop_after_s
            if ranks.max(float(is_stopped() or is_late)):
                run.save()
                return Outcome(model=None, progress=progress, loss=run.last_loss)
            run.save_if_due()
    if recipe.duration.epochs and progress.step < _FEW_STEPS and ranks.is_first:
        logger.warning(
            "%s was over after %d steps: its data fill no more batches of %d rows of %d positions; make them smaller",
            *(recipe.name, progress.step, recipe.batch.rows, recipe.batch.row_positions),
        )
    run.save()
    adapters.merge(model)
    dtype = export_dtype or (torch.float32 if recipe.precision is Precision.FLOAT32 else torch.bfloat16)
    export_model(model, checkpoint, folder / "model", dtype=dtype, is_writer=ranks.is_first)
    ranks.wait()  # the next stage starts from what the first process writes
    return Outcome(model=folder / "model", progress=progress, loss=run.last_loss)


def _prepare(model: TrainableNvila, recipe: Recipe) -> None:
    model.loss = LossSettings(time_std=recipe.time_std)
    model.choose([Module(name) for name in recipe.trained], recomputes=recipe.recomputes)
    if recipe.prepare.names_patches:
        model.name_patches()
    if recipe.tower_norms_only:
        adapters.freeze_all_but_norms(model.tower)
    if recipe.adapters is not None:
        adapters.adapt(model, recipe.adapters)
        model.set_recompute()
    if recipe.precision is Precision.FP8:
        model.row_multiple = fp8.ROW_MULTIPLE
        fp8.convert(model.llm, recipe.fp8_smallest)


class _Run:
    """What a step changes."""

    def __init__(
        self,
        model: TrainableNvila,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        ranks: Ranks,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._model, self._optimizer, self._recipe, self._ranks = model, optimizer, recipe, ranks
        self._folder, self._progress = folder, progress
        self._learning = [p for p in model.parameters() if p.requires_grad]
        self._saved = progress.step
        self._saved_at = self._stepped_at = time.monotonic()
        self.epoch_samples = 0
        self.last_loss = _last_loss(folder)

    @property
    def share(self) -> float:
        """Of the run, what is done."""
        duration: Duration = self._recipe.duration
        if duration.steps:
            return self._progress.step / duration.steps
        if duration.seconds:
            return self._ranks.max(self._progress.seconds) / duration.seconds
        if not self.epoch_samples:
            raise InvalidRequest("data without an end have no epochs: let the recipe last steps or seconds")
        return self._progress.places / (duration.epochs * self.epoch_samples)

    def step(self, step: Step) -> dict[str, Any]:
        """Gradients over all rows, divided by all targets of all processes; one move; the step's metrics."""
        targets, samples, positions, places, skipped = self._ranks.sum(
            step.targets,
            sum(len(row) for row in step.rows),
            sum(sample.positions for row in step.rows for sample in row),
            step.places,
            step.skipped,
        )
        rate = set_rate(self._optimizer, self._recipe.optim, self.share)
        loss = torch.zeros((), device=self._ranks.device)
        for samples_of_row in step.rows:
            with self._autocast():
                summed = self._model(Row.of(samples_of_row, self._ranks.device))
            # Gradients are averaged over processes, and the sum is wanted.
            (summed * (self._ranks.world / max(1.0, targets))).backward()
            loss += summed.detach() / max(1.0, targets)
        if self._recipe.optim.muon:
            self._ranks.average(p.grad for p in self._learning if p.grad is not None)
        norm = clip(self._learning, self._recipe.optim.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.last_loss = self._ranks.sum(float(loss))[0]
        if not torch.isfinite(torch.tensor([self.last_loss, norm])).all():
            raise InvalidRequest(
                f"step {self._progress.step + 1}: loss {self.last_loss}, gradient norm {norm}; the last state is kept, "
                "lower the learning rate"
            )
        self._progress.places += int(places)
        self._progress.skipped += int(skipped)
        return self._count(step, rate, norm, targets, samples, positions)

    def _count(
        self, step: Step, rate: float, norm: float, targets: float, samples: float, positions: float
    ) -> dict[str, Any]:
        now = time.monotonic()
        took = now - self._stepped_at
        self._stepped_at = now
        progress = self._progress
        progress.step += 1
        progress.seconds += took
        progress.samples += int(samples)
        progress.positions += int(positions)
        progress.lanes |= {str(lane): state for lane, state in step.states.items()}
        metrics = {
            "step": progress.step,
            "loss": self.last_loss,
            "lr": rate,
            "grad_norm": norm,
            "samples": int(samples),
            "positions": int(positions),
            "targets": int(targets),
            "skipped": progress.skipped,
            "seconds": took,
            "positions_per_s": positions / max(took, 1e-9),
        }
        if self._ranks.device.type == "cuda":
            metrics["memory_gb"] = torch.cuda.max_memory_allocated(self._ranks.device) / 1e9
        if self._ranks.is_first:
            with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        return metrics | {"done": min(1.0, self.share), "name": self._recipe.name}

    def save_if_due(self) -> None:
        due = self._progress.step - self._saved >= self._recipe.save_every
        late = time.monotonic() - self._saved_at >= self._recipe.save_every_s
        if self._ranks.max(float(due or late)):
            self.save()

    def save(self) -> None:
        everyone = self._ranks.gather(self._progress.lanes)
        lanes: dict[str, dict[str, Any]] = {}
        for held in everyone:
            assert isinstance(held, dict)
            lanes |= held
        self._progress.lanes = lanes
        save_state(self._folder / "state", self._model, self._optimizer, self._progress, self._ranks)
        if self._ranks.is_first:
            plot_losses(
                {self._recipe.name: self._folder / "metrics.jsonl"}, self._folder / "loss.png", self._recipe.name
            )
        self._saved, self._saved_at = self._progress.step, time.monotonic()
        self._stepped_at = time.monotonic()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._recipe.precision is Precision.FLOAT32:
            return nullcontext()
        return torch.autocast(self._ranks.device.type, dtype=torch.bfloat16)


def _ahead(feed: Feed) -> Iterator[Step]:
    """Steps, the next two being put together while the model is busy."""
    ready: queue.Queue[Step | BaseException] = queue.Queue(2)
    is_over = threading.Event()

    def fill() -> None:
        try:
            for step in feed.steps():
                while not is_over.is_set():
                    try:
                        ready.put(step, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if is_over.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=fill, daemon=True, name="feed")
    thread.start()
    try:
        while True:
            step = ready.get()
            if isinstance(step, BaseException):
                raise step
            yield step
    finally:
        is_over.set()


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C came; a second one acts at once. Only in a program's main thread."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: FrameType | None) -> None:
        came.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- the run's folder -------------------------------------------------------------------------------------------------


def _begin(recipe: Recipe, start: Path, folder: Path, ranks: Ranks) -> Recipe:
    """The recipe with lanes for the processes that the run began with, and its record, written once.

    Raises `InvalidRequest` when the record is of another recipe or start.
    """
    record = folder / "run.json"
    before = json.loads(record.read_text("utf-8")) if record.exists() else {}
    recipe = replace(recipe, batch=recipe.batch.dealt_to(before.get("processes", ranks.world)))
    described = json.loads(json.dumps(recipe.to_json()))
    weights = _told_apart(start)
    if before:
        had = before["recipe"]
        changed = sorted(key for key in described if had.get(key) != described[key] and key not in _MAY_CHANGE)
        if changed:
            raise InvalidRequest(f"{folder.name} holds a run whose {', '.join(changed)} differ: name another --out")
        if before.get("start_weights", weights) != weights:
            raise InvalidRequest(
                f"{folder.name} holds a run that began from {before['start']}, which had other weights than {start}: "
                "name that one, or another --out"
            )
    elif ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        described = {"recipe": described, "start": str(start), "start_weights": weights, **_circumstances(ranks)}
        write_json(record.with_suffix(".new"), described)
        record.with_suffix(".new").replace(record)
    return recipe


def _told_apart(start: Path) -> str:
    """Of a checkpoint's weights, wherever it lies: the first values of every tensor, which training changes."""
    told = blake3()
    layout = read_layout(start)
    for part in Part:
        for name, tensor in layout.weights(part).tensors().items():
            told.update(f"{part}.{name}".encode())
            told.update(tensor.flatten()[:_VALUES].contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest(16)


_VALUES = 1024


def _reshaped(recipe: Recipe, start: Path, folder: Path, ranks: Ranks) -> Path:
    """The checkpoint to start from, with another head where the recipe says so."""
    if recipe.reshape is None:
        return start
    reshaped = folder / "start"
    if ranks.is_first and not reshaped.exists():
        reshape_checkpoint(Checkpoint.open(start), reshaped, recipe.reshape)
    while not reshaped.exists():
        time.sleep(0.1)
    return reshaped


_MAY_CHANGE = ("save_every", "save_every_s", "skips_bad")


def _circumstances(ranks: Ranks) -> dict[str, Any]:
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "processes": ranks.world,
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


_PACKAGES = ("nvila", "torch", "transformers", "numpy", "torchao", "peft")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the working tree that this file belongs to, with `+` when it has changes; None outside one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _cut_metrics(path: Path, last: int) -> None:
    """Forget steps after the state that is gone on from: they are made again."""
    lines = [line for line in read_metrics(path) if line["step"] <= last]
    beside = path.with_suffix(".new")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    beside.replace(path)


def _last_loss(folder: Path) -> float:
    lines = read_metrics(folder / "metrics.jsonl")
    return float(lines[-1]["loss"]) if lines else float("nan")


def train_all(
    recipes: tuple[Recipe, ...],
    start: Path,
    out: Path,
    *,
    stop_after_s: float | None = None,
    **options: Any,
) -> Outcome:
    """Stage after stage, each from the one before; finished ones are passed over."""
    began = time.monotonic()
    outcome = Outcome(model=start, progress=Progress(), loss=float("nan"))
    for recipe in recipes:
        left_s = None if stop_after_s is None else max(0.0, stop_after_s - (time.monotonic() - began))
        assert outcome.model is not None
        outcome = train(recipe, outcome.model, out, stop_after_s=left_s, **options)
        if outcome.model is None:
            return outcome
    return outcome


def export_state(
    folder: Path, target: Path, *, dtype: str = "bfloat16", style: str = "vila", shard_bytes: int = 5_000_000_000
) -> Path:
    """The newest state of a run, finished or not, as a checkpoint. Raises `NotFound` when there is none."""
    state = newest_state(folder / "state")
    if state is None or not (folder / "run.json").exists():
        raise NotFound(f"{folder} holds no run that has come to its first state")
    record = json.loads((folder / "run.json").read_text("utf-8"))
    recipe = recipe_from(record["recipe"])
    start = folder / "start" if recipe.reshape is not None else Path(record["start"])
    checkpoint = Checkpoint.open(start)
    model = TrainableNvila.load(checkpoint)
    _prepare(model, replace(recipe, precision=Precision.FLOAT32))
    restore_weights(state, model)
    adapters.merge(model)
    export_model(model, checkpoint, target, dtype=DTYPES[dtype], style=LayoutStyle(style), shard_bytes=shard_bytes)
    return target
