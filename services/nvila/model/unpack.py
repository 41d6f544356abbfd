"""A checkpoint's language model as a folder of its own, for engines that load nothing else.

A language model in four bits is written out in 16 for engines and processors that have no kernel for it.

vLLM reads a Qwen2 folder; a flat checkpoint has its tensors under a prefix, in files shared with the tower's. So they
are copied once, under a name made from the files' identity, into a folder beside the hub's cache. `nvila model convert
--to vila` gives a checkpoint that needs no such copy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3
from torch import Tensor

from nvila.errors import InvalidCheckpoint
from nvila.model.awq_layout import dense_tensors
from nvila.model.layouts import Json, Layout, Part
from nvila.model.save import TOKENIZER_FILES, copy_files, save_part, whole_folder, write_json
from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)


def unpack_llm(layout: Layout, cache: Path | None = None) -> Path:
    """The folder, made on first use (atomic: several processes may ask at once). `cache`: where, for tests."""
    target = (cache or _cache()) / f"{layout.path.name}-{_identity(layout)}"
    if (target / "config.json").exists():
        return target
    _log.warning(
        "copying the language model out of a flat checkpoint, once; `nvila model convert --to vila` avoids it",
        extra=fields(model=layout.name),
    )
    try:
        _write(target, layout, layout.llm, layout.weights(Part.LLM).tensors())
    except OSError as error:
        raise InvalidCheckpoint(
            f"the language model of a flat checkpoint cannot be copied into the cache folder ({error.strerror}); make "
            "HF_HOME writable, or convert the checkpoint: nvila model convert --to vila"
        ) from error
    return target


def widen_llm(layout: Layout, cache: Path | None = None) -> Path:
    """As `unpack_llm`, of a language model in four bits, which becomes one in 16."""
    target = (cache or _cache()) / f"{layout.path.name}-{_identity(layout)}-16-bit"
    if (target / "config.json").exists():
        return target
    _log.warning("writing the language model's four bits out in 16, once", extra=fields(model=layout.name))
    config = {key: value for key, value in layout.llm.items() if key != "quantization_config"}
    try:
        _write(target, layout, config, dense_tensors(layout.weights(Part.LLM).tensors()))
    except OSError as error:
        raise InvalidCheckpoint(
            f"the language model cannot be written to the cache folder in 16 bits ({error.strerror}); make HF_HOME "
            "writable, or serve the checkpoint that it was quantised from"
        ) from error
    return target


def _write(target: Path, layout: Layout, config: Json, tensors: Mapping[str, Tensor]) -> None:
    with whole_folder(target, is_kept=True) as folder:
        write_json(folder / "config.json", config)
        copy_files(layout.tokenizer, folder, TOKENIZER_FILES)
        save_part(folder, tensors)


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "nvila"


def _identity(layout: Layout) -> str:
    """Names, sizes and times of the weight files: a folder that is written anew is unpacked anew."""
    digest = blake3(str(layout.path).encode())
    for path in sorted(layout.weights_at[Part.LLM][0].glob("*.safetensors*")):
        status = path.stat()
        digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
