"""Tensors of a folder of safetensors, by name: memory-mapped, so nothing is read before it is used, and once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nvila.errors import InvalidCheckpoint


class Weights:
    """The `model.safetensors`, or the shards that `model.safetensors.index.json` lists, of one folder.

    `prefix`: only tensors whose names begin with it are seen, and they are called by the rest of their names.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._label = prefix or f"{folder.name}/"
        self._prefix = prefix
        self._files: dict[str, Any] = {}
        for path in _files(folder, prefix):
            try:
                opened: Any = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise InvalidCheckpoint(f"{folder.name}/{path.name} cannot be read: {error}") from error
            names = [name for name in list(opened.keys()) if name.startswith(prefix)]
            self._files |= {name.removeprefix(prefix): opened for name in names}

    def names(self) -> list[str]:
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        """A view of the file's pages, in the stored dtype: not to be written to."""
        tensor: Tensor = self._file(name).get_tensor(self._prefix + name)
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {name: self.tensor(name) for name in self.names()}

    def shape(self, name: str) -> tuple[int, ...]:
        """As the file's header says; nothing else is read."""
        return tuple(self._file(name).get_slice(self._prefix + name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self.names()}

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, …"""
        return str(self._file(name).get_slice(self._prefix + name).get_dtype())

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise InvalidCheckpoint(f"{self._label} lacks tensor {name!r}")
        return self._files[name]

    def take(self, shapes: Mapping[str, tuple[int, ...]], unused: Iterable[str] = ()) -> dict[str, Tensor]:
        """Exactly these tensors. `unused`: prefixes of names that may be there besides. Raises as `check` does."""
        self.check(shapes, unused)
        return {name: self.tensor(name) for name in shapes}

    def check(self, shapes: Mapping[str, tuple[int, ...]], unused: Iterable[str] = ()) -> None:
        """Look whether exactly these tensors are there, in the headers only.

        Raises `InvalidCheckpoint` naming the tensors that are missing or extra, or the first with both shapes.
        """
        missing = sorted(set(shapes) - set(self._files))
        ignored = tuple(unused)
        extra = [name for name in self.names() if name not in shapes and not name.startswith(ignored)]
        if missing or extra:
            raise InvalidCheckpoint(
                f"{self._label} does not fit its configuration: missing {_listed(missing)}; unexpected {_listed(extra)}"
            )
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise InvalidCheckpoint(
                    f"{self._label} tensor {name!r} has shape {self.shape(name)}, its configuration says {shape}"
                )


def _files(folder: Path, prefix: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise InvalidCheckpoint(f"{folder.name}/ holds neither {single.name} nor {index.name}{_pickled(folder)}")
        return [single]
    try:
        places = json.loads(index.read_text("utf-8"))["weight_map"].items()
        shards = sorted({shard for name, shard in places if name.startswith(prefix)})
    except (ValueError, KeyError, AttributeError) as error:
        raise InvalidCheckpoint(f"{folder.name}/{index.name} is not an index of shards: {error}") from error
    outside = [shard for shard in shards if Path(shard).name != shard]
    absent = [shard for shard in shards if shard not in outside and not (folder / shard).exists()]
    if outside or absent:
        raise InvalidCheckpoint(f"{folder.name}/{index.name} lists {_listed(outside or absent)}, not in the folder")
    return [folder / shard for shard in shards]


def _pickled(folder: Path) -> str:
    found = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
    if not found:
        return ""
    return (
        f", only {_listed(found)}: pickled files are not read, because reading one runs its code; save as safetensors"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
