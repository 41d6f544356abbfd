"""Write checkpoints in the published layouts: whole or not at all, tensor by tensor, in shards above a size.

Converting is reading one layout and writing the other: tensors keep their bits, and what the flat layout has no place
for is kept beside (`layouts.KEPT_KEY`), so that the way there and back changes nothing. Training saves the same way,
with its own tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvila.errors import InvalidRequest
from nvila.model.layouts import KEPT_KEY, Json, Layout, LayoutStyle, Part, flat_kind
from nvila.model.tokenizer import ChatTokenizer

SHARD_BYTES = 5_000_000_000
"""Largest weight file, as `transformers` saves them; a single tensor that is larger has a file of its own."""

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
PAPERS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "README.md")
"""Who may use the weights for what: goes wherever they go."""

Tensors = Mapping[str, Tensor]


def save_checkpoint(
    layout: Layout,
    weights: Mapping[Part, Tensors],
    target: str | Path,
    style: LayoutStyle = LayoutStyle.VILA,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint: what `layout` describes, with these tensors, under the names of the `vila` layout.

    `target` must not exist, or be an empty folder. Memory: one tensor at most that is not memory-mapped already. Raises
    `InvalidRequest` when something is there, or the disk has no room.
    """
    target = Path(target)
    needed = sum(tensor.nbytes for tensors in weights.values() for tensor in tensors.values())
    with whole_folder(target, needed_bytes=needed) as folder:
        copy_files(layout.path, folder, PAPERS)
        if style is LayoutStyle.VILA:
            _write_folders(layout, weights, folder, shard_bytes)
        else:
            _write_flat(layout, weights, folder, shard_bytes)
    return target


def convert_checkpoint(layout: Layout, target: str | Path, style: LayoutStyle, shard_bytes: int = SHARD_BYTES) -> Path:
    """The same model in another layout (or, to change the size of its shards, in the same one)."""
    weights = {part: layout.weights(part).tensors() for part in Part if _has_weights(layout, part)}
    return save_checkpoint(layout, weights, target, style, shard_bytes)


def _has_weights(layout: Layout, part: Part) -> bool:
    """The `identity` projector has no tensors, and a folder without any may have no weight file."""
    return part is not Part.PROJECTOR or layout.projector.get("mm_projector_type") != "identity"


def _write_folders(layout: Layout, weights: Mapping[Part, Tensors], folder: Path, shard_bytes: int) -> None:
    configs: dict[Part, Json] = {Part.LLM: layout.llm, Part.TOWER: layout.tower, Part.PROJECTOR: layout.projector}
    copies = {
        f"{part}_cfg": config
        for part, config in configs.items()
        if not isinstance(layout.root.get(f"{part}_cfg"), dict)
    }
    write_json(folder / "config.json", {**layout.root, **copies})
    for part, config in configs.items():
        write_json(folder / part / "config.json", config)
        if part in weights:
            save_part(folder / part, weights[part], shard_bytes)
    write_json(folder / Part.TOWER / "preprocessor_config.json", layout.processor)
    copy_files(layout.tokenizer, folder / Part.LLM, TOKENIZER_FILES)


def _write_flat(layout: Layout, weights: Mapping[Part, Tensors], folder: Path, shard_bytes: int) -> None:
    kind = flat_kind(layout)
    tokenizer = ChatTokenizer.open(layout.tokenizer)
    config = {
        "architectures": [
            "NVILALiteForConditionalGeneration" if kind == "nvila_lite" else "NVILAForConditionalGeneration"
        ],
        "model_type": kind,
        "image_token_id": tokenizer.image_id,
        "video_token_id": tokenizer.video_id,
        "text_config": layout.llm,
        "vision_config": layout.tower,
        KEPT_KEY: {"root": layout.root, "projector": layout.projector},
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", layout.processor)
    copy_files(layout.tokenizer, folder, TOKENIZER_FILES)
    flat = {f"{part}.{name}": tensor for part, tensors in weights.items() for name, tensor in tensors.items()}
    save_part(folder, flat, shard_bytes)


# -- weights ----------------------------------------------------------------------------------------------------------

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_part(folder: Path, tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> None:
    """`model.safetensors`, or shards of it and their index, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", shards[0])
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: Tensors, shard_bytes: int) -> list[dict[str, Tensor]]:
    """In the given order, as many tensors to a shard as fit; always one shard at least."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _write_safetensors(path: Path, tensors: Tensors) -> None:
    """The format's own order: wide element types first, then by name, so that every tensor is aligned.

    Written here because the library's `save_file` first copies all tensors into memory.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        spans = [at, at + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": spans}
        at += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in ordered:
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


# -- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(target: Path, *, needed_bytes: int = 0, is_kept: bool = False) -> Iterator[Path]:
    """A folder to write to, that becomes `target` when the block ends well and vanishes when it does not.

    `is_kept`: when another process has made `target` in the meantime, its work is as good as ours.
    """
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not is_kept:
        raise InvalidRequest(f"{target.name}: something is there already; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed_bytes > free:
        raise InvalidRequest(f"the checkpoint takes {needed_bytes:,} bytes; {free:,} are free where {target.name} goes")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not (is_kept and target.is_dir()):
                raise


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
