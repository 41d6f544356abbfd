"""Recorded frame choices: of videos with faults, with and without a rate, of folders of pictures, and older ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from nvila.golden.compare import Case, Check, Golden, equal
from nvila.train.frames import legacy_indices
from nvila.video.sampling import fps_indices, uniform_indices, usable_frames


def frame_sampling(golden: Golden) -> Iterator[Case]:
    kinds: dict[str, Callable[[dict[str, Any]], Iterator[Check]]] = {
        "head_load_video": partial(_video, is_head=True),
        "jan2025_and_remote_code_load_video": partial(_video, is_head=False),
        "directory": _directory,
        "legacy_opencv_extract_frames": _legacy,
    }
    yield from golden.others(*kinds)
    for kind, checks in kinds.items():
        for i, entry in enumerate(golden.content.get(kind, [])):
            yield Case(f"{golden.stem}/{kind} {i}", partial(checks, entry))


def _video(entry: dict[str, Any], *, is_head: bool) -> Iterator[Check]:
    """`is_head`: the code's head, which samples at a rate where one is configured; the code before it did not."""
    broken = set(entry["undecodable_indices"])
    frames = usable_frames(entry["reported_frame_count"], lambda i: i < entry["decodable_frames"] and i not in broken)
    if frames == 0 or "raises" in entry:
        yield from equal("has no frame", frames == 0, "raises" in entry)
        return
    if is_head and entry["config_fps"] > 0:
        indices = fps_indices(frames, entry["video_fps"], entry["config_fps"], entry["num_video_frames"])
    else:
        indices = uniform_indices(frames, entry["num_video_frames"])
    yield from equal("indices", [i for i in indices if i not in broken], entry["indices"])


def _directory(entry: dict[str, Any]) -> Iterator[Check]:
    """A folder's pictures in the order of their names, which are not padded with zeros: frame10 before frame2."""
    numbers = sorted(range(entry["num_files"]), key=lambda number: f"frame{number}.png")
    got = [numbers[i] for i in uniform_indices(len(numbers), entry["num_video_frames"])]
    yield from equal("frames", got, entry["frame_numbers"])


def _legacy(entry: dict[str, Any]) -> Iterator[Check]:
    """Black pictures stand for no frames; with a rate, the reference draws how many of them at random."""
    indices = legacy_indices(entry["frame_count"], entry["video_fps"], entry["num_frames"], entry["max_fps"])
    recorded = [i for i in entry["indices"] if not isinstance(i, str)]
    yield from equal("indices", [*indices], recorded)
    yield from equal("frames", len(indices), entry["frames_loaded"])
