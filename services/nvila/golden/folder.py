"""Every recorded file of a folder, with the cases that repeat it; what nobody knows how to repeat is a missed case."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nvila.golden import conversations, four_bits, frames, modules, quantised, tiling, times, training
from nvila.golden.compare import Case, Check, Golden, unknown
from nvila.golden.end_to_end import end_to_end

READERS: dict[str, Callable[[Golden], Iterator[Case]]] = {
    "tile_grids": tiling.tile_grids,
    "preprocess": tiling.preprocess,
    "chessboard": modules.chessboard,
    "dynamic_s2_merge": modules.dynamic_s2_merge,
    "encode_images_dynamic_s2": modules.encode_images,
    "projectors": modules.projectors,
    "media_encoders": modules.media_encoders,
    "pos_embed_resize": modules.position_tables,
    "frame_sampling": frames.frame_sampling,
    "time_tokens": times.time_tokens,
    "conversation": conversations.conversation,
    "soft_cross_entropy": training.soft_cross_entropy,
    "batching_packing": training.batching_packing,
    "fp8_fake_quant": quantised.fp8_fake_quant,
    "w8a8": quantised.w8a8_linears,
    "w8a8_tower_smoothing": quantised.w8a8_tower_smoothing,
    "awq_w4a16": four_bits.awq_w4a16,
    "awq_search": four_bits.awq_search,
}
"""By the name of the recorded file; those under `e2e/` are named after their checkpoint."""

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RecordedFile:
    """`cases` in order. `unread`: once all of them have run, a case that misses the tensors which none has read."""

    name: str
    cases: tuple[Case, ...]
    golden: Golden | None = None

    def unread(self) -> Iterator[Case]:
        names = self.golden.unread() if self.golden else []
        if names:
            problem = f"{len(names)} recorded tensors were not compared: {', '.join(names[:5])}"
            yield Case(f"{self.name}/tensors", lambda: iter([Check(problem)]))


def recorded_files(folder: Path, checkpoints: Sequence[Path] = ()) -> Iterator[RecordedFile]:
    """All of a folder. `checkpoints`: where checkpoints are looked for that are not under its own `e2e/`."""
    ends = folder / "e2e"
    places = (ends, *checkpoints)
    if (folder / MANIFEST).exists():
        yield RecordedFile(MANIFEST, (Case(MANIFEST, partial(_manifest, folder)),))
    for stem in _stems(folder):
        reader = READERS.get(stem)
        yield _file(stem, folder, places, reader)
    for stem in _stems(ends):
        yield _file(f"e2e/{stem}", folder, places, end_to_end)


def _file(
    name: str, folder: Path, checkpoints: Sequence[Path], reader: Callable[[Golden], Iterator[Case]] | None
) -> RecordedFile:
    path = folder / f"{name}.json"
    if reader is None or not path.exists():
        return RecordedFile(name, (unknown(name),))
    try:
        golden = Golden(path.parent, path.stem, checkpoints)
        return RecordedFile(name, tuple(reader(golden)), golden)
    except Exception as error:  # a file of another form than its name promises: all of it is missed
        problem = f"the file cannot be read: {type(error).__name__}: {error}"
        return RecordedFile(name, (Case(name, lambda: iter([Check(problem)])),))


def _stems(folder: Path) -> list[str]:
    """Names of recorded files: JSON, and tensors that have lost theirs."""
    paths = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    return sorted({path.stem for path in paths if path.name != MANIFEST})


def _manifest(folder: Path) -> Iterator[Check]:
    """The files that the manifest lists are there."""
    for name in json.loads((folder / MANIFEST).read_text("utf-8"))["files"]:
        yield Check("" if (folder / name).exists() else f"{name} is listed and missing")
