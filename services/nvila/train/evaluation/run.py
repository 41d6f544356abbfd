"""Ask something every question of a data set and keep what it said: one line of JSON an answer, so a run can go on.

What answers is any `Answerer`: the model in this process, a running endpoint, or a baseline that does not look.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from nvila.errors import InvalidRequest
from nvila.model.time_tokens import decode_times
from nvila.train.evaluation.metrics import score
from nvila.train.samples import Sample
from nvila.types import MediaPart, Message


class Answerer(Protocol):
    """`batch`: how many samples it is given at once. An answer it cannot give is an `InvalidRequest` in its place."""

    name: str
    batch: int

    def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One judged answer. `error`: why there is none; it counts as wrong. `slice`: `held_out` or empty."""

    name: str
    task: str
    metric: str
    question: str
    answer: str
    right: str
    score: float
    error: str = ""
    slice: str = ""


def evaluate(
    samples: Iterable[Sample],
    answerer: Answerer,
    out: Path | None,
    progress: Callable[[Answer], None],
    *,
    time_tokens: int = 0,
    time_token_format: str = "<t{t}>",
) -> list[Answer]:
    """Answers in the order of the samples. With `out`, those already there are kept and new ones appended.

    `time_tokens`: how many the model has; they become `<seconds>` before an answer is judged.
    """
    kept = {answer.name: answer for answer in read_answers(out)} if out and out.exists() else {}
    answers: list[Answer] = []
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") if out else nullcontext() as file:
        for batch in _batches(samples, answerer.batch, kept, answers, progress):
            for sample, said in zip(batch, answerer.answer(batch), strict=True):
                if isinstance(said, str) and time_tokens and sample.duration_s:
                    said = decode_times(said, sample.duration_s, time_tokens, time_token_format)
                answer = judge(sample, said)
                if file:
                    file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                    file.flush()
                answers.append(answer)
                progress(answer)
    return answers


def judge(sample: Sample, said: str | InvalidRequest) -> Answer:
    text = said.strip() if isinstance(said, str) else ""
    return Answer(
        name=sample.name,
        task=sample.task,
        metric=sample.metric,
        question=sample.question,
        answer=text,
        right=sample.answers[0] if sample.answers else "",
        score=score(sample, text) if isinstance(said, str) else 0.0,
        error="" if isinstance(said, str) else said.message,
        slice="held_out" if sample.notes.get("held_out") else "",
    )


def read_answers(path: Path) -> list[Answer]:
    """Those of an earlier run; a line cut off by a kill is dropped. Raises `InvalidRequest` for anything else."""
    answers = []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            answers.append(Answer(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                path.write_text("".join(lines[:-1]), "utf-8")
                break
            raise InvalidRequest(f"{path.name}:{number} is no answer of an evaluation: {error}") from None
    return answers


class TextOnly:
    """The same answerer with nothing to look at: what it knows from the questions alone."""

    def __init__(self, inner: Answerer) -> None:
        self._inner = inner
        self.name, self.batch = f"{inner.name}, text only", inner.batch

    def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]:
        return self._inner.answer([_without_media(sample) for sample in samples])

    def close(self) -> None:
        self._inner.close()


def _without_media(sample: Sample) -> Sample:
    messages = tuple(
        Message(message.role, tuple(part for part in message.parts if not isinstance(part, MediaPart)))
        for message in sample.messages
    )
    return replace(sample, messages=messages, media=())


def _batches(
    samples: Iterable[Sample],
    size: int,
    kept: dict[str, Answer],
    answers: list[Answer],
    progress: Callable[[Answer], None],
) -> Iterator[list[Sample]]:
    """Samples that were not answered yet, in runs; those that were are taken over at once."""
    batch: list[Sample] = []
    for sample in samples:
        if sample.name in kept:
            answers.append(kept[sample.name])
            progress(kept[sample.name])
            continue
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
