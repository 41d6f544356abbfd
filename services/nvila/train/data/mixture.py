"""Data sets by name: `shapes*3+my_data` is each sample of one three times and of the other once (NVILA-SPEC §8.1).

A name is looked up in a folder: NAME-*.tar (or NAME-train-*.tar) are shards, NAME.json and NAME.jsonl conversation
lists whose media are in the same folder; or it is a path to one of those. `name@FILE` leaves out the sample numbers
that FILE lists as JSON, which is how pruned data sets are trained on (NVILA-SPEC §8.2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nvila.errors import InvalidRequest, NotFound
from nvila.train.data.listing import ListingSource
from nvila.train.data.media import VideoReading
from nvila.train.data.shards import ShardSource
from nvila.train.samples import Sample, Unusable

_PART = re.compile(r"(?P<name>[^*@+]+)(?:@(?P<without>[^*@+]+))?(?:\*(?P<times>\d+))?")


class Source(Protocol):
    """A data set whose samples can be had in any order. `where` names a sample's file and line for people."""

    name: str

    def __len__(self) -> int: ...

    def where(self, index: int) -> str: ...

    def load(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Part:
    """One name of a mixture: its samples that are used, each `times` times an epoch."""

    source: Source
    indices: tuple[int, ...]
    times: int

    def __len__(self) -> int:
        return len(self.indices) * self.times


@dataclass(frozen=True)
class Mixture:
    """`faults`: records that were left out when the files were opened."""

    parts: tuple[Part, ...]
    faults: tuple[Unusable, ...]

    def __len__(self) -> int:
        """Samples of one epoch."""
        return sum(map(len, self.parts))

    def locate(self, place: int) -> tuple[Source, int]:
        """The source and sample number at this place of an unshuffled epoch."""
        for part in self.parts:
            if place < len(part):
                return part.source, part.indices[place % len(part.indices)]
            place -= len(part)
        raise IndexError(place)


def open_mixture(
    text: str,
    folder: Path,
    *,
    split: str = "train",
    reading: VideoReading | None = None,
    is_strict: bool = False,
) -> Mixture:
    """Open every data set that the text names. `is_strict`: refuse if any record is unusable.

    Raises `InvalidRequest` (syntax, empty set, bad records when strict) or `NotFound`.
    """
    parts: list[Part] = []
    faults: list[Unusable] = []
    for piece in text.split("+"):
        match = _PART.fullmatch(piece.strip())
        if match is None:
            raise InvalidRequest(
                f"{piece.strip()!r} is no part of a mixture; write name, name*3 or name@FILE, joined by +"
            )
        name, times = match["name"].strip(), int(match["times"] or 1)
        source = open_source(name, folder, split=split, reading=reading)
        faults += getattr(source, "faults", ())
        indices = tuple(range(len(source)))
        if match["without"]:
            left_out = _indices(folder / match["without"].strip(), len(source))
            indices = tuple(i for i in indices if i not in left_out)
        if not indices or times < 1:
            raise InvalidRequest(f"{piece.strip()!r} has no samples" + some(faults))
        parts.append(Part(source, indices, times))
    if is_strict and faults:
        raise InvalidRequest(f"{len(faults)} records cannot be used" + some(faults))
    return Mixture(tuple(parts), tuple(faults))


def open_source(name: str, folder: Path, *, split: str = "train", reading: VideoReading | None = None) -> Source:
    """One data set by name or path. Raises `NotFound` or `InvalidRequest`."""
    reading = reading or VideoReading()
    path = Path(name).expanduser() if Path(name).is_absolute() else folder / name
    for pattern in (f"{path.name}-{split}-*.tar", f"{path.name}-[0-9]*.tar", f"{path.name}.tar", path.name):
        shards = sorted(shard for shard in path.parent.glob(pattern) if shard.suffix == ".tar")
        if shards:
            return ShardSource(path.name, shards, reading)
    for file in (path, path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.jsonl")):
        if file.is_file():
            return ListingSource(path.name, file, file.parent, reading)
    raise NotFound(
        f"there is no data set {name!r}: neither {path.name}-{split}-*.tar nor {path.name}.json(l) in {folder}"
    )


def _indices(path: Path, count: int) -> set[int]:
    try:
        indices = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFound(f"there is no list of left-out samples {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path.name} is no JSON: {error}") from None
    if not isinstance(indices, list) or not all(isinstance(i, int) and 0 <= i < count for i in indices):
        raise InvalidRequest(f"{path.name} must be a list of sample numbers from 0 to {count - 1}")
    return set(indices)


def some(faults: Sequence[Unusable], most: int = 20) -> str:
    """The first of them, a line each."""
    lines = [f"\n  {fault}" for fault in faults[:most]]
    return "".join(lines) + (f"\n  and {len(faults) - most} more" if len(faults) > most else "")
