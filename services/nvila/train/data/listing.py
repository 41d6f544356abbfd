"""A user's own data: a conversation JSON (a list, or one record a line) beside a folder with its media.

Everything that can be known without decoding is checked when the file is opened, so that training does not find out
after hours: the JSON itself, each record's form, and that its media are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvila.errors import InvalidRequest, NotFound, NvilaError
from nvila.train.data.clips import write_h264
from nvila.train.data.media import VideoReading, open_media
from nvila.train.data.records import Record, read_record, write_record
from nvila.train.data.shards import TOO_DEEP, parse, png
from nvila.train.samples import Sample, Unusable
from nvila.types import MediaKind


class ListingSource:
    """Samples of one JSON or JSONL file. `faults`: records that cannot be used."""

    def __init__(self, name: str, path: Path, media_folder: Path, reading: VideoReading) -> None:
        """Raises `NotFound` for a file that is not there."""
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
        self.name = name
        self._path, self._media_folder, self._reading = path, media_folder, reading
        self._records: list[tuple[int, Record]] = []
        self.faults: list[Unusable] = []
        for line, raw in _entries(path):
            try:
                if isinstance(raw, NvilaError):
                    raise raw
                record = read_record(raw)
                self._check_files(record)
            except (InvalidRequest, NotFound) as error:
                self.faults.append(Unusable(where=self._at(line), reason=error.message))
            else:
                self._records.append((line, record))

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        return self._at(self._records[index][0])

    def _at(self, line: int) -> str:
        return f"{self._path.name}:{line}"

    def load(self, index: int) -> Sample:
        _, record = self._records[index]
        media = tuple(open_media(item.kind, self._media_folder / item.name, self._reading) for item in record.media)
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

    def _check_files(self, record: Record) -> None:
        for item in record.media:
            try:
                (self._media_folder / item.name).stat()
            except (OSError, ValueError):  # also a name that no file can have
                raise NotFound(f"there is no {item.kind} {item.name!r}") from None


def write_listing(path: Path, samples: Sequence[Sample] | Iterator[Sample], *, media_folder: str) -> int:
    """Samples as one JSON list, their pictures as PNG and clips as H.264 files in a folder beside it."""
    folder = path.parent / media_folder
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for sample in samples:
        names = []
        for place, item in enumerate(sample.media):
            is_video = item.kind is MediaKind.VIDEO
            name = f"{sample.source}-{sample.index:06d}-{place}.{'mp4' if is_video else 'png'}"
            if is_video:
                write_h264(item, folder / name)
            else:
                (folder / name).write_bytes(png(item.frames_FHWC[0]))
            names.append(f"{media_folder}/{name}")
        records.append(json.dumps(write_record(sample, names), ensure_ascii=False))
    path.write_text("[\n" + ",\n".join(records) + "\n]\n", "utf-8")
    return len(records)


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) from the file; in place of a record that is no JSON, the error."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        yield 1, InvalidRequest(f"the file is no UTF-8 text at byte {error.start}")
        return
    if text.lstrip().startswith("["):
        yield from _list_entries(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, parse(line)
            except InvalidRequest as error:
                yield number, error


def _list_entries(text: str) -> Iterator[tuple[int, Any]]:
    """Record by record, each with the line it begins in. After wrong JSON nothing more can be told apart."""
    decoder = json.JSONDecoder()
    at, line, counted = _skip(text, text.index("[") + 1, " \t\r\n"), 1, 0
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            raw, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, InvalidRequest(f"wrong JSON: {error.msg}; nothing after it could be read")
            return
        except RecursionError:
            yield line, InvalidRequest(f"wrong JSON: {TOO_DEEP}; nothing after it could be read")
            return
        yield line, raw
        at = _skip(text, end, " \t\r\n")
        if at < len(text) and text[at] == ",":
            at = _skip(text, at + 1, " \t\r\n")
        elif at < len(text) and text[at] != "]":
            line += text.count("\n", counted, at)
            yield line, InvalidRequest(f"wrong JSON: expected ',' or ']', not {text[at]!r}; nothing after it was read")
            return
    if at >= len(text):
        yield text.count("\n") + 1, InvalidRequest("wrong JSON: the list has no end")


def _skip(text: str, at: int, blanks: str) -> int:
    while at < len(text) and text[at] in blanks:
        at += 1
    return at
