"""What quantising a part changed, layer by layer: numbers as JSON and as a picture, kept inside the new checkpoint.

T tokens · C channels.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from nvila.model.save import write_json

FOLDER = "quantization"
"""Of the checkpoint: reports of every quantisation that made it."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Of one layer's output. `cosine`: mean over tokens of their similarity with the original; `lowest`: the least of
    any token. `error`: root of the summed squared differences over that of the original's squares."""

    cosine: float
    lowest: float
    error: float


class Tally:
    """Takes outputs batch after batch."""

    def __init__(self) -> None:
        self._cosines = 0.0
        self._tokens = 0
        self._lowest = 1.0
        self._difference = self._size = 0.0

    def add(self, wanted: Tensor, got: Tensor) -> None:
        """(…, C) both."""
        wanted_TC, got_TC = wanted.double().flatten(0, -2), got.double().flatten(0, -2)
        cosine_T = torch.cosine_similarity(wanted_TC, got_TC, dim=1)
        self._cosines += float(cosine_T.sum())
        self._tokens += len(cosine_T)
        self._lowest = min(self._lowest, float(cosine_T.min()))
        self._difference += float((wanted_TC - got_TC).square().sum())
        self._size += float(wanted_TC.square().sum())

    def result(self) -> LayerError:
        return LayerError(
            cosine=self._cosines / max(1, self._tokens),
            lowest=self._lowest,
            error=math.sqrt(self._difference / self._size) if self._size else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """`layers`: by what was done, one error per layer, of held-out data; `made` names what the checkpoint holds, the
    others were computed to compare with. `facts`: what it was made from and with; bytes of the part before and after.
    """

    part: str
    made: str
    layers: Mapping[str, Sequence[LayerError]]
    facts: Mapping[str, str | int | float]

    @property
    def last(self) -> LayerError:
        return self.layers[self.made][-1]

    @property
    def worst_cosine(self) -> float:
        return min(layer.cosine for layer in self.layers[self.made])

    def to_json(self) -> dict[str, object]:
        layers = {name: [asdict(layer) for layer in found] for name, found in self.layers.items()}
        return {"part": self.part, "made": self.made, "facts": dict(self.facts), "layers": layers}

    @classmethod
    def read(cls, path: Path) -> Report:
        told = json.loads(path.read_text("utf-8"))
        layers = {name: [LayerError(**layer) for layer in found] for name, found in told["layers"].items()}
        return cls(part=told["part"], made=told["made"], layers=layers, facts=told["facts"])


def write_report(report: Report, source: Path, target: Path) -> Path:
    """`quantization/<part>.json` and `.png` in the checkpoint `target`, beside what its source has there already."""
    folder = target / FOLDER
    if (source / FOLDER).is_dir():
        shutil.copytree(source / FOLDER, folder, dirs_exist_ok=True)
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{report.part}.json", report.to_json())
    plot(report, folder / f"{report.part}.png")
    return folder / f"{report.part}.json"


def plot(report: Report, target: Path) -> None:
    """Relative error after every layer, one curve per way of quantising."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name, layers in report.layers.items():
        style = {"linewidth": 2.0, "marker": "o", "markersize": 3} if name == report.made else {"linestyle": "--"}
        places = range(1, len(layers) + 1)
        left.plot(places, [layer.error for layer in layers], label=name, **style)
        right.plot(places, [max(1 - layer.cosine, 1e-9) for layer in layers], label=name, **style)
    left.set_ylabel("relative error of the output")
    right.set_ylabel("1 − mean cosine similarity")
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(f"{report.part}, held-out data")
    figure.tight_layout()
    figure.savefig(target, dpi=120, format="png")
    pyplot.close(figure)


def table(report: Report) -> Table:
    """The last layer, and the least similar one, of every way."""
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for head in ("", "last: cosine", "lowest", "error", "worst: cosine"):
        found.add_column(head, justify="left" if not head else "right", no_wrap=True)
    for name, layers in report.layers.items():
        last = layers[-1]
        worst = min(layer.cosine for layer in layers)
        style = "bold" if name == report.made else ""
        found.add_row(
            name, f"{last.cosine:.5f}", f"{last.lowest:.5f}", f"{100 * last.error:.2f} %", f"{worst:.5f}", style=style
        )
    return found
