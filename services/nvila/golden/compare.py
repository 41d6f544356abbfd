"""What a comparison with recorded numbers is: files, cases, checks, and their tolerances."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nvila.errors import InvalidRequest

MODULE_TOLERANCE = 1e-5
"""Module outputs, float32 on CPU (golden README, "Tolerances"), relative to the largest magnitude of a tensor: small
elements are differences of large ones, and the recorded outputs of the deepest projector are themselves up to 3.3e-6
away from what float64 gives, more than a tolerance of each small element alone would allow."""

STEP_TOLERANCE = 1e-6
"""A single step of such a module (means, weighted sums), relative to the largest magnitude (golden README)."""

FEATURE_TOLERANCE, LOGIT_TOLERANCE = 2e-5, 5e-5
"""Tower features and spliced embeddings, and logits: relative to the largest recorded magnitude (golden README)."""


@dataclass(frozen=True)
class Check:
    """One comparison. `problem` says what differs; it is empty where the recorded value was met.

    `difference`, `allowed`: the largest difference of a tensor's elements, in the tolerance's own measure; 0 allowed is
    an exact comparison.
    """

    problem: str = ""
    difference: float = 0.0
    allowed: float = 0.0


@dataclass(frozen=True)
class Case:
    """One recorded computation; `checks` repeats it and compares."""

    name: str
    checks: Callable[[], Iterator[Check]]


@dataclass(frozen=True)
class Outcome:
    """`problems`: nothing means matched. `closest`: of the checks with a tolerance, the one that came nearest to it."""

    problems: tuple[str, ...]
    closest: Check | None = None


def run(case: Case) -> Outcome:
    """Run a case. An error in our code is a problem, and so is a case in which nothing was compared."""
    try:
        with torch.no_grad():
            checks = list(case.checks())
    except Exception as error:  # the edge of a checking program: reported, and the next case runs
        return Outcome((f"{type(error).__name__}: {error}",))
    if not checks:
        return Outcome(("nothing was compared",))
    tolerated = [check for check in checks if check.allowed > 0]
    closest = max(tolerated, key=lambda check: check.difference / check.allowed, default=None)
    return Outcome(tuple(check.problem for check in checks if check.problem), closest)


# -- recorded files ---------------------------------------------------------------------------------------------------


class Tensors(Mapping[str, Tensor]):
    """Recorded tensors by name, or those under a prefix without it; `seen` gathers the full names of those read."""

    def __init__(self, tensors: Mapping[str, Tensor], seen: set[str], prefix: str = "") -> None:
        self._tensors = tensors
        self._seen = seen
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[self._prefix + name]
        self._seen.add(self._prefix + name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def under(self, prefix: str) -> Tensors:
        return Tensors(self._tensors, self._seen, self._prefix + prefix)


class Golden:
    """A recorded file: `<stem>.json` and, where there are tensors, `<stem>.safetensors`.

    `checkpoints`: folders in which the tiny checkpoints that the file names are looked for.
    """

    def __init__(self, folder: Path, stem: str, checkpoints: Sequence[Path] = ()) -> None:
        self.stem = stem
        self.content: Any = json.loads((folder / f"{stem}.json").read_text("utf-8"))
        self._tensors_path = folder / f"{stem}.safetensors"
        self._checkpoints = checkpoints
        self._seen: set[str] = set()

    @cached_property
    def tensors(self) -> Tensors:
        return Tensors(load_file(self._tensors_path), self._seen)

    def under(self, prefix: str) -> Tensors:
        return self.tensors.under(prefix)

    def unread(self) -> list[str]:
        """Recorded tensors that no case has looked at."""
        return sorted(set(self.tensors) - self._seen) if self._tensors_path.exists() else []

    def checkpoint(self, name: str) -> Path:
        """Where checkpoint `name`, or a folder of one (`name/llm`), lies."""
        for folder in self._checkpoints:
            if (folder / name).is_dir():
                return folder / name
        raise InvalidRequest(f"{self.stem} needs checkpoint {name}, which is in none of the folders given")

    def by_case(self, checks: Callable[[dict[str, Any]], Iterator[Check]]) -> Iterator[Case]:
        """One case per entry of the file's own list of cases."""
        yield from self.others("cases")
        for case in self.content["cases"]:
            yield Case(f"{self.stem}/{case['case']}", partial(checks, case))

    def others(self, *known: str) -> Iterator[Case]:
        """Parts of the file besides the known ones: recorded, and not compared."""
        for key, value in self.content.items():
            if key not in known and isinstance(value, dict | list):
                yield unknown(f"{self.stem}/{key}")


def unknown(name: str) -> Case:
    """A recording that this code has no case for."""
    return Case(name, lambda: iter([Check("this recording is of no known kind")]))


# -- comparing --------------------------------------------------------------------------------------------------------


def equal(what: str, got: object, wanted: object) -> Iterator[Check]:
    yield Check("" if got == wanted else f"{what} is {str(got)[:200]}, recorded {str(wanted)[:200]}")


def close(what: str, got: Tensor, wanted: Tensor, atol: float) -> Iterator[Check]:
    """Within `atol`; 0 is exact."""
    yield _compare(what, got, wanted, scale=1.0, tolerance=atol)


def near(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> Iterator[Check]:
    """Within `tolerance` × max(1, the largest recorded magnitude)."""
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    yield _compare(what, got, wanted, scale, tolerance)


def relative(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> Iterator[Check]:
    """Within `tolerance` × the largest recorded magnitude, however small that is."""
    scale = float(wanted.abs().max()) if wanted.numel() else 1.0
    yield _compare(what, got, wanted, scale or 1.0, tolerance)


def _compare(what: str, got: Tensor, wanted: Tensor, scale: float, tolerance: float) -> Check:
    if got.shape != wanted.shape:
        return Check(f"{what} has shape {tuple(got.shape)}, recorded {tuple(wanted.shape)}")
    difference = float((got.double() - wanted.double()).abs().max()) / scale if wanted.numel() else 0.0
    is_met = difference <= tolerance
    problem = "" if is_met else f"{what} differs by up to {difference:.3g}, allowed {tolerance:.3g}"
    return Check(problem, difference, tolerance)
