"""Answers without looking: what chance gives, and what the training answers' statistics give. No model.

The statistics are a strong text-only baseline: the commonest answer to exactly this question in the training data, else
to questions that begin like it, else in its task; where the right answer is always one of the words of the question,
the one of them that is right most often. Times are taken as shares of the clip, whose length is known.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from nvila.errors import InvalidRequest
from nvila.model.time_tokens import parse_interval
from nvila.train.evaluation.metrics import normalised
from nvila.train.samples import Sample

_BEGINNING_WORDS = 3
_SEEN_ENOUGH = 5
_NAMED_ENOUGH = 0.9


@dataclass
class _Task:
    """What the training answers of one task are like."""

    answers: Counter[str] = field(default_factory=Counter)
    by_question: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    by_beginning: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    named: int = 0
    named_first: int = 0
    intervals: list[tuple[float, float]] = field(default_factory=list)
    duration_s: list[float] = field(default_factory=list)

    def learn(self, sample: Sample) -> None:
        answer = sample.answers[0]
        question = sample.question
        self.answers[answer] += 1
        self.by_question[question][answer] += 1
        self.by_beginning[_beginning(question)][answer] += 1
        if sample.metric == "interval":
            start_s, end_s = parse_interval(answer, sample.duration_s)
            self.intervals.append((start_s / sample.duration_s, end_s / sample.duration_s))

    def count_named(self, sample: Sample) -> None:
        candidates = self.candidates(sample.question)
        answer = normalised(sample.answers[0])
        self.named += answer in candidates and len(candidates) > 1
        self.named_first += len(candidates) > 1 and answer == candidates[0]

    def candidates(self, question: str) -> list[str]:
        """Answers of this task that the question itself names, in its order."""
        known = {normalised(answer) for answer in self.answers}
        return [word for word in dict.fromkeys(normalised(question).split()) if word in known]


class _Baseline:
    batch = 64

    def __init__(self, training: Iterable[Sample]) -> None:
        """Raises `InvalidRequest` when there is nothing to learn from."""
        samples = [sample for sample in training if sample.answers]
        if not samples:
            raise InvalidRequest("a baseline needs training samples to learn from")
        self._tasks: defaultdict[str, _Task] = defaultdict(_Task)
        for sample in samples:
            self._tasks[sample.task].learn(sample)
        for sample in samples:
            self._tasks[sample.task].count_named(sample)

    def answer(self, samples: Sequence[Sample]) -> list[str | InvalidRequest]:
        return [self._one(sample, self._tasks[sample.task]) for sample in samples]

    def close(self) -> None:
        """Nothing is held."""

    def _one(self, sample: Sample, task: _Task) -> str:
        raise AssertionError

    def _named(self, sample: Sample, task: _Task) -> list[str]:
        """The answers to choose between, where the question names them as a rule."""
        is_rule = task.named >= _NAMED_ENOUGH * max(1, sum(task.answers.values()))
        return task.candidates(sample.question) if is_rule else []


class Chance(_Baseline):
    """Any of the answers that a task has, each as likely as the other; of those that the question names, if it does."""

    name = "chance"

    def __init__(self, training: Iterable[Sample], seed: int = 0) -> None:
        super().__init__(training)
        self._random = random.Random(seed)

    def _one(self, sample: Sample, task: _Task) -> str:
        if task.intervals:
            a, b = sorted((self._random.random(), self._random.random()))
            return _interval(a, b, sample.duration_s)
        return self._random.choice(self._named(sample, task) or sorted(task.answers) or [""])


class Statistics(_Baseline):
    """The likeliest answer by the training data, from the text of the question alone."""

    name = "text statistics"

    def _one(self, sample: Sample, task: _Task) -> str:
        if task.intervals:
            middle = [median(ends) for ends in zip(*task.intervals, strict=True)]
            return _interval(middle[0], middle[1], sample.duration_s)
        named = self._named(sample, task)
        if named:
            return named[0 if 2 * task.named_first >= task.named else -1]
        question = sample.question
        for counts in (task.by_question.get(question), task.by_beginning.get(_beginning(question))):
            if counts and counts.total() >= _SEEN_ENOUGH:
                return counts.most_common(1)[0][0]
        return task.answers.most_common(1)[0][0] if task.answers else ""


def _beginning(question: str) -> str:
    return " ".join(question.lower().split()[:_BEGINNING_WORDS])


def _interval(start: float, end: float, duration_s: float) -> str:
    return f"<{start * duration_s:.2f}> <{end * duration_s:.2f}>"
