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
    """The `model.safetensors`, or the shards that `model.safetensors.index.json` lists, of one folder."""

    def __init__(self, folder: Path) -> None:
        self._label = folder.name
        self._files: dict[str, Any] = {}
        for path in _files(folder):
            try:
                opened: Any = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise InvalidCheckpoint(f"{self._label}/{path.name} cannot be read: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> list[str]:
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        """A view of the file's pages, in the stored dtype: not to be written to."""
        if name not in self._files:
            raise InvalidCheckpoint(f"{self._label}/ lacks tensor {name!r}")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def take(self, shapes: Mapping[str, tuple[int, ...]], unused: Iterable[str] = ()) -> dict[str, Tensor]:
        """Exactly these tensors. `unused`: prefixes of names that may be there besides.

        Raises `InvalidCheckpoint` naming the tensors that are missing or extra, or the first with both shapes.
        """
        missing = sorted(set(shapes) - set(self._files))
        ignored = tuple(unused)
        extra = [name for name in self.names() if name not in shapes and not name.startswith(ignored)]
        if missing or extra:
            raise InvalidCheckpoint(
                f"{self._label}/ does not fit its configuration: "
                f"missing {_listed(missing)}; unexpected {_listed(extra)}"
            )
        taken = {name: self.tensor(name) for name in shapes}
        for name, tensor in taken.items():
            if tuple(tensor.shape) != shapes[name]:
                raise InvalidCheckpoint(
                    f"{self._label}/ tensor {name!r} has shape {tuple(tensor.shape)}, "
                    f"its configuration says {shapes[name]}"
                )
        return taken


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise InvalidCheckpoint(f"{folder.name}/ holds neither {single.name} nor {index.name}")
        return [single]
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InvalidCheckpoint(f"{folder.name}/{index.name} is not an index of shards: {error}") from error
    outside = [shard for shard in shards if Path(shard).name != shard]
    absent = [shard for shard in shards if shard not in outside and not (folder / shard).exists()]
    if outside or absent:
        raise InvalidCheckpoint(f"{folder.name}/{index.name} lists {_listed(outside or absent)}, not in the folder")
    return [folder / shard for shard in shards]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
