"""A flat checkpoint's language model as a folder of its own, for engines that load nothing else.

vLLM reads a Qwen2 folder; a flat checkpoint has its tensors under a prefix, in files shared with the tower's. So they
are copied once, under a name made from the files' identity, into a folder beside the hub's cache. `nvila model convert
--to vila` gives a checkpoint that needs no such copy.
"""

from __future__ import annotations

import logging
from pathlib import Path

from blake3 import blake3

from nvila.errors import InvalidCheckpoint
from nvila.model.layouts import Layout, Part
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
        with whole_folder(target, is_kept=True) as folder:
            write_json(folder / "config.json", layout.llm)
            copy_files(layout.tokenizer, folder, TOKENIZER_FILES)
            save_part(folder, layout.weights(Part.LLM).tensors())
    except OSError as error:
        raise InvalidCheckpoint(
            f"the language model of a flat checkpoint cannot be copied into the cache folder ({error.strerror}); make "
            "HF_HOME writable, or convert the checkpoint: nvila model convert --to vila"
        ) from error
    return target


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "nvila"


def _identity(layout: Layout) -> str:
    """Names, sizes and times of the weight files: a folder that is written anew is unpacked anew."""
    digest = blake3(str(layout.path).encode())
    for path in sorted(layout.path.glob("*.safetensors*")):
        status = path.stat()
        digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
