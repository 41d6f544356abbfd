"""Tar shards in WebDataset's layout, by the standard library: members of a sample share the name up to the first dot.

`12.json` is the conversation record (`records.py`), `12.0.png` and `12.1.png` its pictures, `12.0.clip.npz` its clip
(`clips.py`). Shards of others may hold `.jpg`, `.mp4`, `.txt` captions and so on as WebDataset has them; what is read
is the record and the members it names. Members are read in place, in any order, so a stream can be shuffled as a whole.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nvila.errors import InvalidMedia, InvalidRequest
from nvila.train.data import clips
from nvila.train.data.media import VideoReading, image_of, video_of
from nvila.train.data.records import MediaName, read_record, write_record
from nvila.train.samples import Sample, SampleMedia
from nvila.types import MediaKind

_MEDIA_ENDINGS = {
    MediaKind.IMAGE: ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"),
    MediaKind.VIDEO: (clips.ENDING, "mp4", "mov", "m4v", "mkv", "webm", "avi", "ts", "mpg", "mpeg", "flv", "gif"),
}
TOO_DEEP = "lists and objects are nested too deeply"


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write a shard, all at once or not at all; returns the number of samples. Equal samples give equal bytes."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with tarfile.open(made, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                for name, data in _members(sample):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                count += 1
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    return count


def _members(sample: Sample) -> list[tuple[str, bytes]]:
    key = f"{sample.index:08d}"
    media = [_encoded(item) for item in sample.media]
    names = [f"{place}.{ending}" for place, (ending, _) in enumerate(media)]
    record = json.dumps(write_record(sample, names), ensure_ascii=False).encode()
    return [(f"{key}.json", record), *((f"{key}.{n}", data) for n, (_, data) in zip(names, media, strict=True))]


def _encoded(item: SampleMedia) -> tuple[str, bytes]:
    if item.kind is MediaKind.VIDEO:
        return clips.ENDING, clips.pack(item)
    return "png", png(item.frames_FHWC[0])


def png(pixels_HWC: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


class ShardSource:
    """Samples of one or more shards. Only the members' places are kept in memory."""

    def __init__(self, name: str, paths: Iterable[Path], reading: VideoReading) -> None:
        """Raises `InvalidRequest` for a file that is no tar archive."""
        self.name = name
        self._reading = reading
        self._samples: list[tuple[Path, str, dict[str, tuple[int, int]]]] = []
        for path in paths:
            self._samples += [(path, key, members) for key, members in _index(path).items()]

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, index: int) -> str:
        path, key, _ = self._samples[index]
        return f"{path.name}:{key}"

    def load(self, index: int) -> Sample:
        """Raises `InvalidRequest` and its kin for whatever is wrong with this sample."""
        path, _, members = self._samples[index]
        with path.open("rb") as file:
            read = {ending: _read(file, place) for ending, place in members.items() if ending != "json"}
            if "json" not in members:
                raise InvalidRequest("the sample has no .json record")
            raw = parse(_read(file, members["json"]))
        record = read_record(raw)
        media = tuple(_decoded(item, read, self._reading) for item in record.media)
        return Sample(
            source=self.name,
            index=index,
            task=record.task or self.name,
            messages=record.messages,
            media=media,
            metric=record.metric,
            answers=record.answers,
            choices=record.choices,
            notes=record.notes,
            where=self.where(index),
        )


def parse(text: bytes | str) -> Any:
    """JSON. Raises `InvalidRequest` with the place of the mistake."""
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise InvalidRequest("the record is no UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"wrong JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise InvalidRequest(f"wrong JSON: {TOO_DEEP}") from None


def _index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key, then ending, to (offset, size)."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isfile():
                    folder, _, base = member.name.rpartition("/")
                    key, _, ending = base.partition(".")
                    key = f"{folder}/{key}" if folder else key
                    samples.setdefault(key, {})[ending.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise InvalidRequest(f"{path.name} is no whole tar archive: {error}") from None
    if path.stat().st_size < end + 2 * tarfile.BLOCKSIZE:  # two empty blocks end an archive; `tarfile` does not mind
        raise InvalidRequest(f"{path.name} is no whole tar archive: it was cut off")
    return samples


def _read(file: io.BufferedReader, place: tuple[int, int]) -> bytes:
    offset, size = place
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise InvalidMedia(f"the shard ends {size - len(data):,} bytes too early")
    return data


def _decoded(item: MediaName, members: dict[str, bytes], reading: VideoReading) -> SampleMedia:
    """The member that a record names: by its ending, by its whole name, or the only one there is."""
    ending = item.name.lower()
    if ending not in members:
        ending = ending.rpartition("/")[2].partition(".")[2]
    if ending not in members:
        there = [name for name in members if name.endswith(_MEDIA_ENDINGS[item.kind])]
        if len(there) != 1:
            raise InvalidMedia(f"the shard has no member {item.name!r} of this sample")
        ending = there[0]
    data = members[ending]
    if ending.endswith(clips.ENDING):
        return clips.unpack(data)
    return image_of(data) if item.kind is MediaKind.IMAGE else video_of(data, reading)
