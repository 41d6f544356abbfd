"""From a data description to packed rows, in an order that a checkpoint can hold.

A run's data are dealt into lanes (`recipes.Batch`); each lane is a `SampleSource` of its own, read here or in a process
of its own, which also tiles and tokenises. A process is started with one JSON line and answers with frames on its
standard output: an 8-byte length, a JSON header, the raw bytes of its arrays. It ends when its reader is gone.
"""

from __future__ import annotations

import json
import logging
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nvila.errors import InvalidRequest, NvilaError, Unavailable
from nvila.model.checkpoint import Checkpoint
from nvila.train.data.media import VideoReading
from nvila.train.data.mixture import open_mixture, some
from nvila.train.data.stream import SampleStream
from nvila.train.prepare import Item, Prepared, PrepareSettings, check_fits, prepare
from nvila.train.recipes import Recipe
from nvila.train.samples import SampleSource, Unusable
from nvila.types import MediaKind

AHEAD = 16
"""Samples that a feeding process is ahead of the model."""

_EPOCHS = 12
"""Of places without a usable sample, after which a lane has none. It is dealt other places every epoch: a single usable
one of n is not among 12 n of them with a chance of 1 : 160,000. An only lane has met it within two."""

_ENDLESS = 1000
"""Counts as an epoch of data that have none."""

logger = logging.getLogger(__name__)

State = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fed:
    """One place of a lane: a sample that is ready, or why it is not, or neither where the recipe is for other media.

    `state`: the lane's position after it.
    """

    prepared: Prepared | None
    state: State
    problem: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What one optimizer step sees of this process: its rows, and where each of its lanes is afterwards.

    `places`: how many the lanes have moved on; `skipped`: those among them whose samples cannot be used.
    """

    rows: tuple[tuple[Prepared, ...], ...]
    states: dict[int, State]
    places: int
    skipped: int

    @property
    def targets(self) -> int:
        return sum(sample.targets for row in self.rows for sample in row)


# -- one lane ---------------------------------------------------------------------------------------------------------


def open_source(
    data: str, *, lane: int, lanes: int, seed: int, reading: VideoReading | None = None, is_strict: bool = False
) -> SampleSource:
    """`toy`, `toy:images`, `synthetic:<families>[@<samples to the hardest>]`, `listed:<kept.json>`, or a mixture
    (`train/data/mixture.py`), whose video files are decoded as `reading` says.

    Raises `InvalidRequest` or `NotFound`; `is_strict`: also for records that cannot be used.
    """
    if data in ("toy", "toy:images"):
        from nvila.train.toy import ToySource

        return ToySource(lane=lane, lanes=lanes, seed=seed, has_video=data == "toy")
    if data.startswith("synthetic:"):
        from nvila.train.synthetic import open_synthetic

        return open_synthetic(data, lane=lane, lanes=lanes, seed=seed)
    if data.startswith("listed:"):
        from nvila.train.synthetic import ListedSource

        return ListedSource(_read_kept(Path(data.removeprefix("listed:"))), lane=lane, lanes=lanes, seed=seed)
    if not data:
        raise InvalidRequest("the recipe names no data: say which with --data", param="data")
    folder, _, text = data.rpartition("::")
    mixture = open_mixture(text, Path(folder or "."), reading=reading, is_strict=is_strict)
    return SampleStream(mixture, seed=seed, rank=lane, ranks=lanes, threads=2)


def _read_kept(path: Path) -> dict[str, list[int]]:
    """`kept.json` of a pruning of generated data: numbers by family."""
    try:
        kept: dict[str, list[int]] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path.name} is no list of kept samples: {error}", param="data") from error
    return kept


def feed_lane(
    source: SampleSource, checkpoint: Checkpoint, settings: PrepareSettings, kinds: Sequence[MediaKind]
) -> Iterator[Fed]:
    """Every place of a lane; samples with media of other kinds are passed over."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    for sample in source:
        state = source.state()
        if isinstance(sample, Unusable):
            yield Fed(prepared=None, state=state, problem=str(sample))
            continue
        if any(media.kind not in kinds for media in sample.media):
            yield Fed(prepared=None, state=state)
            continue
        try:
            ready = prepare(sample, config, tokenizer, settings)
            check_fits(ready, settings.max_positions)
        except InvalidRequest as error:
            yield Fed(prepared=None, state=state, problem=f"{sample.where or sample.name}: {error.message}")
            continue
        yield Fed(prepared=ready, state=state)


# -- rows -------------------------------------------------------------------------------------------------------------


class Feed:
    """The rows of this process, step by step. `lanes`: those of the run that are this process's.

    `positions`: states to go on from, by lane. A context: leaving it ends the feeding processes. `samples`: of an epoch
    of all lanes, 0 for data without end; `faults`: records that could not be read when the data were opened. Raises
    `InvalidRequest` for what cannot be used where the recipe leaves nothing out, and where nothing can be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        model_path: Path,
        lanes: Sequence[int],
        positions: dict[int, State] | None = None,
        *,
        has_processes: bool = False,
    ) -> None:
        self._recipe = recipe
        self._states = dict(positions or {})
        self._pending: dict[int, Fed] = {}
        self._closing: list[Callable[[], None]] = []
        whole = open_source(recipe.data, lane=0, lanes=1, seed=recipe.seed, is_strict=not recipe.skips_bad)
        self.samples = len(whole)
        self.faults = whole.mixture.faults if isinstance(whole, SampleStream) else ()
        if self.faults and 0 in lanes:
            logger.warning("%d records are left out%s", len(self.faults), some(self.faults))
        self._patience = (self.samples or _ENDLESS) * (_EPOCHS if recipe.batch.lanes > 1 else 2)
        spawn = self._in_process if has_processes else self._here
        self._streams = {lane: spawn(lane, model_path) for lane in lanes}

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        for close in self._closing:
            close()

    def steps(self) -> Generator[Step, None, None]:
        """Steps without end."""
        lanes = list(self._streams)
        while True:
            places = skipped = 0
            rows = []
            for number in range(self._recipe.batch.rows):
                lane = number % self._recipe.batch.lanes
                if lane in lanes:
                    row, passed, lost = self._row(lane)
                    rows.append(row)
                    places += passed
                    skipped += lost
            yield Step(rows=tuple(rows), states=dict(self._states), places=places, skipped=skipped)

    def _row(self, lane: int) -> tuple[tuple[Prepared, ...], int, int]:
        """As many samples in order as fit, places, and unusable ones among them; the first sample that does not fit
        begins the lane's next row."""
        batch = self._recipe.batch
        row: list[Prepared] = []
        positions = tiles = places = skipped = useless = 0
        while True:
            fed = self._pending.pop(lane, None) or next(self._streams[lane])
            ready = fed.prepared
            if ready is not None:
                positions += ready.positions
                tiles += len(ready.tiles_USS3)
                if row and (positions > batch.row_positions or tiles > batch.row_tiles):
                    self._pending[lane] = fed
                    return tuple(row), places, skipped
                row.append(ready)
                useless = 0
            else:
                skipped += self._left_out(fed.problem)
                useless += 1
                if useless > self._patience:
                    kinds = " and ".join(self._recipe.kinds)
                    why = f"the last: {fed.problem}" if fed.problem else f"the recipe is for {kinds}s"
                    raise InvalidRequest(f"none of {useless:,} samples in turn can be used; {why}", param="data")
            places += 1
            self._states[lane] = fed.state

    def _left_out(self, problem: str) -> bool:
        """Whether this place counts as skipped: not one that the recipe passes over."""
        if problem and not self._recipe.skips_bad:
            raise InvalidRequest(f"a sample cannot be used: {problem}", param="data")
        if problem:
            logger.warning("left out %s", problem)
        return bool(problem)

    # -- lanes --------------------------------------------------------------------------------------------------------

    def _here(self, lane: int, model_path: Path) -> Iterator[Fed]:
        return feed_lane(*_opened(self._request(lane, model_path)))

    def _in_process(self, lane: int, model_path: Path) -> Iterator[Fed]:
        process = subprocess.Popen(
            [sys.executable, "-m", "nvila.train.feed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the trainer, which still has a step to end and a state to write
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(self._request(lane, model_path)).encode() + b"\n")
        process.stdin.flush()  # stays open: when it closes, the process's reader is gone
        ready: queue.Queue[Fed | None] = queue.Queue(AHEAD)
        reader = threading.Thread(target=_read_all, args=(process.stdout, ready), daemon=True, name=f"lane-{lane}")
        reader.start()

        def close() -> None:
            process.kill()
            process.wait()
            while reader.is_alive():  # it may wait for room
                with suppress(queue.Empty):
                    ready.get(timeout=0.05)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

        self._closing.append(close)
        return _received(lane, process, ready)

    def _request(self, lane: int, model_path: Path) -> dict[str, Any]:
        recipe = self._recipe
        return {
            "data": recipe.data,
            "lane": lane,
            "lanes": recipe.batch.lanes,
            "seed": recipe.seed,
            "state": self._states.get(lane),
            "model": str(model_path),
            "prepare": asdict(recipe.prepare),
            "kinds": list(recipe.kinds),
        }


def _opened(request: dict[str, Any]) -> tuple[SampleSource, Checkpoint, PrepareSettings, list[MediaKind]]:
    settings = PrepareSettings(**request["prepare"] | {"frames": tuple(request["prepare"]["frames"])})
    checkpoint = Checkpoint.open(request["model"])
    group = checkpoint.config.temporal_group
    reading = VideoReading(frames=-(-max(settings.frames) // group) * group, side_px=checkpoint.config.tile_px)
    source = open_source(
        request["data"], lane=request["lane"], lanes=request["lanes"], seed=request["seed"], reading=reading
    )
    if request["state"] is not None:
        source.restore(request["state"])
    return source, checkpoint, settings, [MediaKind(kind) for kind in request["kinds"]]


def _received(lane: int, process: subprocess.Popen[bytes], ready: queue.Queue[Fed | None]) -> Iterator[Fed]:
    while (fed := ready.get()) is not None:
        yield fed
    raise Unavailable(f"the process that feeds lane {lane} ended with status {process.wait()}; its output says why")


def _read_all(stream: BinaryIO, ready: queue.Queue[Fed | None]) -> None:
    try:
        while (fed := _read(stream)) is not None:
            ready.put(fed)
    except EOFError:
        logger.debug("a feeding process ended in the middle of a sample")
    finally:
        ready.put(None)


# -- the wire ---------------------------------------------------------------------------------------------------------

_ARRAYS = ("tiles_USS3", "which_N", "ids_P", "labels_P", "rows_V", "turns_P")


def write_fed(fed: Fed, stream: BinaryIO) -> None:
    header: dict[str, Any] = {"state": fed.state, "problem": fed.problem}
    arrays: list[np.ndarray[Any, Any]] = []
    if fed.prepared is not None:
        arrays = [np.ascontiguousarray(getattr(fed.prepared, name)) for name in _ARRAYS]
        header |= {
            "source": fed.prepared.source,
            "visual_rows": fed.prepared.visual_rows,
            "items": [[item.kind, item.tiles, item.block_size] for item in fed.prepared.items],
            "arrays": [[array.dtype.str, array.shape] for array in arrays],
        }
    encoded = json.dumps(header).encode()
    stream.write(struct.pack("<Q", len(encoded)) + encoded)
    for array in arrays:
        stream.write(array.data)
    stream.flush()


def _read(stream: BinaryIO) -> Fed | None:
    """The next frame; None at the end."""
    length = stream.read(8)
    if len(length) < 8:
        return None
    header = json.loads(stream.read(struct.unpack("<Q", length)[0]))
    prepared = None
    if "arrays" in header:
        arrays = {name: _array(stream, *described) for name, described in zip(_ARRAYS, header["arrays"], strict=True)}
        items = tuple(
            Item(kind=MediaKind(kind), tiles=tiles, block_size=tuple(block) if block else None)
            for kind, tiles, block in header["items"]
        )
        prepared = Prepared(items=items, visual_rows=header["visual_rows"], source=header["source"], **arrays)
    return Fed(prepared=prepared, state=header["state"], problem=header["problem"])


def _array(stream: BinaryIO, dtype: str, shape: list[int]) -> np.ndarray[Any, Any]:
    array = np.empty(shape, np.dtype(dtype))
    if array.nbytes:
        view = array.reshape(-1).view(np.uint8).data
        at = 0
        while at < len(view):
            got = stream.readinto(view[at:])  # type: ignore[attr-defined]
            if not got:
                raise EOFError("a feeding process ended in the middle of a sample")
            at += got
    return array


def main() -> int:
    """A feeding process: one JSON line in, frames out until nobody reads."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_reader, daemon=True).start()
    try:
        with closing(sys.stdout.buffer) as stream:
            for fed in feed_lane(*_opened(request)):
                write_fed(fed, stream)
    except BrokenPipeError:
        return 0
    except NvilaError as error:
        print(f"lane {request['lane']}: {error.message}", file=sys.stderr)  # noqa: T201 - a process's own last words
        return 1
    return 0


def _end_with_reader() -> None:
    """Reading ends when the trainer is gone, however it went."""
    import os

    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
