"""Published benchmarks in the files they are published in, from a local folder: AI2D, DocVQA, TextVQA, MMMU, Video-MME.

Each adapter is a `Source` whose media are opened when a sample is asked for. Prompts are those of lmms-eval, which the
published figures of most models were made with: a short instruction after the question.
"""

from __future__ import annotations

import ast
import importlib
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.errors import InvalidRequest, NotFound, Unavailable
from nvila.train.data.media import VideoReading, image_of, open_media
from nvila.train.samples import Sample, SampleMedia, ask
from nvila.types import MediaKind

_BRIEFLY = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One question as its benchmark has it. `media`: paths, or the encoded bytes of a picture."""

    place: str
    task: str
    question: str
    answers: tuple[str, ...]
    metric: str
    media: tuple[Path | bytes, ...]
    kind: MediaKind = MediaKind.IMAGE
    choices: tuple[str, ...] = ()


class BenchmarkSource:
    """Implements `Source` (train/data/mixture.py) over the entries of one benchmark."""

    def __init__(self, name: str, folder: Path, reading: VideoReading | None = None) -> None:
        """Raises `InvalidRequest` for a benchmark that is not known or a broken file, `NotFound` for files missing."""
        if name not in READERS:
            raise InvalidRequest(f"there is no adapter {name!r}; there are: {', '.join(READERS)}")
        if not folder.is_dir():
            raise NotFound(f"there is no folder {folder}")
        self.name = name
        self._reading = reading or VideoReading()
        try:
            self._entries = tuple(READERS[name](folder))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InvalidRequest(f"{folder} does not hold {name} as it is published: {error!r}") from None
        if not self._entries:
            raise NotFound(f"{folder} holds no question of {name}")

    def __len__(self) -> int:
        return len(self._entries)

    def where(self, index: int) -> str:
        return self._entries[index].place

    def load(self, index: int) -> Sample:
        entry = self._entries[index]
        media = tuple(self._media(entry.kind, item) for item in entry.media)
        return Sample(
            source=self.name,
            index=index,
            task=entry.task,
            messages=ask(entry.question, entry.answers[0], len(media)),
            media=media,
            metric=entry.metric,
            answers=entry.answers,
            choices=entry.choices,
        )

    def _media(self, kind: MediaKind, item: Path | bytes) -> SampleMedia:
        return image_of(item) if isinstance(item, bytes) else open_media(kind, item, self._reading)


def _ai2d(folder: Path) -> Iterator[Entry]:
    """`questions/*.json` beside `images/`, and optionally `ai2d_test_ids.csv`, which then chooses."""
    chosen = folder / "ai2d_test_ids.csv"
    test_ids = set(chosen.read_text("utf-8").split()) if chosen.is_file() else None
    for path in sorted((folder / "questions").glob("*.json")):
        content = _json(path)
        picture = content["imageName"]
        if test_ids is not None and picture.removesuffix(".png") not in test_ids:
            continue
        for question, about in content["questions"].items():
            options = [str(option) for option in about["answerTexts"]]
            yield Entry(
                place=f"{path.name}:{about.get('questionId', question)}",
                task="ai2d",
                question=_with_options(question, options),
                answers=(string.ascii_uppercase[int(about["correctAnswer"])],),
                metric="choice",
                media=(folder / "images" / picture,),
                choices=tuple(options),
            )


def _docvqa(folder: Path) -> Iterator[Entry]:
    """`val_v1.0*.json` (or `train…`); questions of the test set have no answers and cannot be scored."""
    for path in _first(folder, "val*.json", "train*.json"):
        for entry in _json(path)["data"]:
            yield Entry(
                place=f"{path.name}:{entry['questionId']}",
                task="docvqa",
                question=f"{entry['question']}\n{_BRIEFLY}",
                answers=tuple(entry["answers"]),
                metric="anls",
                media=(folder / entry["image"],),
            )


def _textvqa(folder: Path) -> Iterator[Entry]:
    """`TextVQA_0.5.1_val.json` beside `train_images/`, which hold the validation pictures too."""
    for path in _first(folder, "TextVQA_*_val.json", "*val*.json"):
        for entry in _json(path)["data"]:
            yield Entry(
                place=f"{path.name}:{entry['question_id']}",
                task="textvqa",
                question=f"{entry['question'].capitalize()}\n{_BRIEFLY}",
                answers=tuple(entry["answers"]),
                metric="vqa",
                media=(folder / "train_images" / f"{entry['image_id']}.jpg",),
            )


def _mmmu(folder: Path) -> Iterator[Entry]:
    """Parquet files per subject, `<Subject>/validation-*.parquet`, with pictures inside."""
    for path, row in _rows(folder, "validation", "dev"):
        options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else list(row["options"])
        pictures = [row.get(f"image_{number}") for number in range(1, 8)]
        media = tuple(picture.get("bytes") or path.parent / picture["path"] for picture in pictures if picture)
        question = row["question"]
        for number in range(1, 8):
            question = question.replace(f"<image {number}>", f"image {number}")
        is_choice = row["question_type"] == "multiple-choice"
        subject = row["id"].removeprefix("validation_").removeprefix("dev_").rpartition("_")[0]
        yield Entry(
            place=f"{path.name}:{row['id']}",
            task=f"mmmu.{subject or 'all'}",
            question=_with_options(question, options) if is_choice else f"{question}\n{_BRIEFLY}",
            answers=_open_answers(row["answer"]),
            metric="choice" if is_choice else "exact",
            media=media,
            choices=tuple(options) if is_choice else (),
        )


def _video_mme(folder: Path) -> Iterator[Entry]:
    """`videomme/test-*.parquet`, videos in `data/` (or `videos/`) by `videoID`."""
    for path, row in _rows(folder, "test"):
        options = [str(option).partition(". ")[2] or str(option) for option in row["options"]]
        name = f"{row['videoID']}.mp4"
        places = [folder / place / name for place in ("data", "videos", ".")]
        yield Entry(
            place=f"{path.name}:{row['question_id']}",
            task=f"videomme.{row['duration']}",
            question=_with_options(row["question"], options),
            answers=(str(row["answer"]),),
            metric="choice",
            media=(next((place for place in places if place.is_file()), places[0]),),
            kind=MediaKind.VIDEO,
            choices=tuple(options),
        )


READERS: Mapping[str, Callable[[Path], Iterator[Entry]]] = {
    "ai2d": _ai2d,
    "docvqa": _docvqa,
    "textvqa": _textvqa,
    "mmmu": _mmmu,
    "videomme": _video_mme,
}


def _with_options(question: str, options: Sequence[str]) -> str:
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))
    return f"{question}\n{listed}\n{_LETTER}"


def _open_answers(answer: str) -> tuple[str, ...]:
    """An open question of MMMU may have several right answers, written as a list."""
    if answer.startswith("["):
        return tuple(map(str, ast.literal_eval(answer)))
    return (answer,)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path.name} is no JSON: {error}") from None


def _first(folder: Path, *patterns: str) -> list[Path]:
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise NotFound(f"{folder} has no file {patterns[0]}")


def _rows(folder: Path, *splits: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Rows of `SPLIT-*.parquet`, wherever under the folder; or of `SPLIT-*.jsonl` with the same fields, in which a
    picture is {"path": …} beside the file. Parquet needs pyarrow, which the serving environment does not have.
    """
    for path in _first(folder, *(f"**/{split}-*.{ending}" for ending in ("parquet", "jsonl") for split in splits)):
        if path.suffix == ".jsonl":
            for line in path.read_text("utf-8").splitlines():
                yield path, json.loads(line)
            continue
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise Unavailable("reading parquet files needs pyarrow: pip install pyarrow") from None
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield path, row
