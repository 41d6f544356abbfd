"""Data-set pruning: keep what a large model finds easier than a small one (DeltaLoss, NVILA-SPEC §8.2).

score(x) = log p_large(answer) − log p_small(answer), summed over the answer's tokens, so loss of the small model minus
loss of the large one. What both find easy teaches nothing, what both find hard may be noise; the top share of every
data set is kept. Two baselines: chance, and evenly from clusters of what the small model sees.

The result is, for each data set, the sample numbers to leave out, as `train/data/mixture.py` takes them (`name@FILE`);
for generated data, those to keep (`listed:FILE`, `train/feed.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvila.errors import InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.model.save import write_json
from nvila.train.data.catalogue import make_sample
from nvila.train.data.draw import Split
from nvila.train.data.mixture import Source, open_mixture
from nvila.train.data.stream import read
from nvila.train.distributed import Ranks
from nvila.train.model import Row, TrainableNvila
from nvila.train.prepare import Prepared, PrepareSettings, check_fits, prepare
from nvila.train.samples import Sample, Unusable
from nvila.train.synthetic import PREFIX, families
from nvila.train.tables import Table

CLUSTERS = 32
"""Of the cluster baseline, at most; fewer for small data sets."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """`indices`: samples that the mixture takes, `times` times an epoch; `written`: its name there."""

    source: Source
    indices: Sequence[int]
    written: str = ""
    times: int = 1


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One sample. `large`, `small`: summed loss over the answer, in nats; `targets`: its tokens."""

    index: int
    task: str
    large: float
    small: float
    targets: int

    @property
    def delta(self) -> float:
        return self.small - self.large


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What became of one data set. `samples`: that were looked at; `leave_out`: file with the numbers of all those that
    are not kept."""

    name: str
    samples: int
    kept: int
    unusable: int
    mean_delta_kept: float
    mean_delta_left: float
    leave_out: str


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """`mixture`: to train on what is kept, `--data`."""

    by: str
    keep: float
    sets: tuple[Pruned, ...]
    mixture: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        table = Table(
            title=f"Kept by {self.by}",
            columns=("data set", "samples", "kept", "unusable", "mean score kept", "mean score left out"),
            rows=tuple(
                (p.name, p.samples, p.kept, p.unusable, round(p.mean_delta_kept, 3), round(p.mean_delta_left, 3))
                for p in self.sets
            ),
        )
        return f"{table.to_markdown()}\n\ntrain on what is kept with --data '{self.mixture}'"


def prune(
    large: Path | None,
    small: Path,
    data: str,
    out: Path,
    *,
    keep: float = 0.5,
    by: str = "delta",
    limit: int | None = None,
    seed: int = 0,
) -> PruneReport:
    """Score every data set of a mixture, choose, and write `out/<name>.json` (what to leave out), `out/kept.json` (what
    stays, by set) and `out/scores-<name>.jsonl`. `limit`: look only at the first so many samples of each data set; the
    others are left out too."""
    if not 0 < keep <= 1:
        raise InvalidRequest(f"a share of {keep} cannot be kept: more than 0, at most 1", param="keep")
    if by == "delta" and large is None:
        raise InvalidRequest("DeltaLoss compares two models: name a large one too", param="large")
    device = Ranks.join().device
    models = {"small": _load(small, device)} | ({"large": _load(large, device)} if large and by == "delta" else {})
    pruned = []
    kept_numbers: dict[str, list[int]] = {}
    sets = open_sets(data)
    for part in sets:
        source, looked_at = part.source, part.indices[:limit]
        if by == "random":
            usable = list(looked_at)
            scores = np.random.Generator(np.random.PCG64(seed)).random(len(usable))
            chosen, deltas = [usable[i] for i in top(scores, keep)], dict.fromkeys(usable, 0.0)
        elif by == "cluster":
            usable, seen = _look(models["small"], source, looked_at)
            chosen, deltas = [usable[i] for i in spread(seen, keep, seed)], dict.fromkeys(usable, 0.0)
        else:
            scored = list(score(models["large"], models["small"], source, looked_at))
            usable = [one.index for one in scored]
            _write_scores(out / f"scores-{source.name}.jsonl", scored)
            chosen = [usable[i] for i in top(np.array([one.delta for one in scored]), keep)]
            deltas = {one.index: one.delta for one in scored}
        kept = set(chosen)
        left = [i for i in range(len(source)) if i not in kept]
        target = out / f"{source.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(left), "utf-8")
        pruned.append(
            Pruned(
                name=source.name,
                samples=len(looked_at),
                kept=len(kept),
                unusable=len(looked_at) - len(usable),
                mean_delta_kept=_mean([deltas[i] for i in kept]),
                mean_delta_left=_mean([deltas[i] for i in left if i in deltas]),
                leave_out=str(target.resolve()),
            )
        )
        kept_numbers[source.name] = sorted(kept)
    write_json(out / "kept.json", kept_numbers)
    report = PruneReport(by=by, keep=keep, sets=tuple(pruned), mixture=_mixture(data, sets, pruned, out))
    write_json(out / "report.json", report.to_json())
    return report


def open_sets(data: str) -> list[DataSet]:
    """The data sets of a mixture; generated ones by family, 1,000 samples each."""
    if data.startswith(PREFIX):
        generated = [_Generated(name) for name, _ in families(data.removeprefix(PREFIX))]
        return [DataSet(source=source, indices=range(len(source))) for source in generated]
    folder, _, text = data.rpartition("::")
    return [
        DataSet(source=part.source, indices=part.indices, written=_NAME.split(piece.strip())[0], times=part.times)
        for piece, part in zip(text.split("+"), open_mixture(text, Path(folder or ".")).parts, strict=True)
    ]


_NAME = re.compile(r"[@*]")
"""What ends a name in a mixture."""


def _mixture(data: str, sets: Sequence[DataSet], pruned: Sequence[Pruned], out: Path) -> str:
    if data.startswith(PREFIX):
        return f"listed:{(out / 'kept.json').resolve()}"
    folder, colons, _ = data.rpartition("::")
    parts = [f"{part.written}@{one.leave_out}*{part.times}" for part, one in zip(sets, pruned, strict=True) if one.kept]
    return folder + colons + "+".join(part.removesuffix("*1") for part in parts)


@dataclass
class _Generated:
    name: str

    def __len__(self) -> int:
        return 1000

    def where(self, index: int) -> str:
        return f"{self.name}:{index}"

    def load(self, index: int) -> Sample:
        return make_sample(self.name, Split.TRAIN, 0, index)


# -- scores -----------------------------------------------------------------------------------------------------------


def score(large: TrainableNvila, small: TrainableNvila, source: Source, indices: Sequence[int]) -> Iterator[Scored]:
    """Both models' losses on the answers; samples that either cannot use are left out."""
    for index, task, by_large in _ready(large, source, indices):
        for _, _, by_small in _ready(small, source, [index]):
            yield Scored(
                index=index,
                task=task,
                large=_loss(large, by_large),
                small=_loss(small, by_small),
                targets=by_large.targets,
            )


def _ready(model: TrainableNvila, source: Source, indices: Sequence[int]) -> Iterator[tuple[int, str, Prepared]]:
    settings = PrepareSettings(max_positions=model.config.max_positions, tiles_every_image=False, frames=(32,))
    for index in indices:
        sample = read(source, index)
        if isinstance(sample, Unusable):
            continue
        try:
            ready = prepare(sample, model.config, model.tokenizer, settings)
            check_fits(ready, settings.max_positions)
        except InvalidRequest:
            continue
        yield index, sample.task, ready


@torch.inference_mode()
def _loss(model: TrainableNvila, ready: Prepared) -> float:
    return float(model(Row.of([ready], model.device)))


def top(scores: NDArray[np.float64], keep: float) -> list[int]:
    """Numbers of the highest scores, ties by number; at least one."""
    count = max(1, round(keep * len(scores))) if len(scores) else 0
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


# -- the cluster baseline ---------------------------------------------------------------------------------------------


def _look(model: TrainableNvila, source: Source, looked_at: Sequence[int]) -> tuple[list[int], NDArray[np.float64]]:
    """What the small model's projector makes of each sample's media, averaged."""
    indices, seen = [], []
    for index, _, ready in _ready(model, source, looked_at):
        with torch.inference_mode():
            values_TD = model.see(Row.of([ready], model.device))
        indices.append(index)
        seen.append(values_TD.float().mean(0).cpu().numpy() if len(values_TD) else np.zeros(model.config.llm_width))
    return indices, np.array(seen, np.float64)


def spread(points_ND: NDArray[np.float64], keep: float, seed: int = 0) -> list[int]:
    """Numbers of a share of the points, evenly from k-means clusters, nearest to their middle first."""
    if not len(points_ND):
        return []
    total = max(1, round(keep * len(points_ND)))
    middles, owner = _cluster(points_ND, min(CLUSTERS, len(points_ND)), seed)
    far = np.linalg.norm(points_ND - middles[owner], axis=1)
    queues = [sorted(np.flatnonzero(owner == k), key=lambda i: far[i]) for k in range(len(middles))]
    chosen: list[int] = []
    while len(chosen) < total:
        for waiting in queues:
            if waiting and len(chosen) < total:
                chosen.append(int(waiting.pop(0)))
    return sorted(chosen)


def _cluster(
    points_ND: NDArray[np.float64], count: int, seed: int, rounds: int = 20
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    draw = np.random.Generator(np.random.PCG64(seed))
    middles = points_ND[draw.choice(len(points_ND), count, replace=False)]
    owner = np.zeros(len(points_ND), np.int64)
    for _ in range(rounds):
        # Squared distances but for the point's own square, which is the same to every middle.
        owner = ((middles**2).sum(1) - 2 * points_ND @ middles.T).argmin(1)
        middles = np.stack([points_ND[owner == k].mean(0) if (owner == k).any() else middles[k] for k in range(count)])
    return middles, owner


def _load(path: Path, device: torch.device) -> TrainableNvila:
    model = TrainableNvila.load(Checkpoint.open(path), device)
    model.choose([])
    return model


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _write_scores(path: Path, scored: Sequence[Scored]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(one) | {"delta": one.delta}) + "\n" for one in scored), "utf-8")
