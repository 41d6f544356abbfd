"""How an answer is judged: 0 for wrong to 1 for right. Pure Python.

- `exact`: equal to one of the right answers, after what does not matter is taken out (`normalised`);
- `anls`: average normalised Levenshtein similarity, for read text (DocVQA, arXiv:1907.00490): 0 below one half;
- `vqa`: the share of ten people that gave this answer, three being enough (VQA, arXiv:1505.00468; TextVQA);
- `choice`: the letter of the right option;
- `interval`: intersection over union of two intervals in time (NVILA-SPEC §6.8).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from nvila.errors import InvalidRequest
from nvila.model.time_tokens import interval_iou, parse_interval
from nvila.train.samples import Sample

METRICS = ("exact", "anls", "vqa", "choice", "interval")

_ARTICLES = ("a", "an", "the")
_NUMBERS = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve".split(),  # noqa: SIM905
        map(str, range(13)),
        strict=True,
    )
)
_ANLS_THRESHOLD = 0.5
_VQA_PEOPLE = 3


def score(sample: Sample, answer: str) -> float:
    """Raises `InvalidRequest` for a metric there is none of, or a sample without a right answer."""
    if not sample.answers:
        raise InvalidRequest(f"{sample.name} has no right answer to compare with")
    if sample.metric == "exact":
        return exact(answer, sample.answers)
    if sample.metric == "anls":
        return anls(answer, sample.answers)
    if sample.metric == "vqa":
        return vqa(answer, sample.answers)
    if sample.metric == "choice":
        return choice(answer, sample.answers[0], sample.choices)
    if sample.metric == "interval":
        duration_s = sample.duration_s
        right = parse_interval(sample.answers[0], duration_s)
        return interval_iou(parse_interval(answer, duration_s), right)
    raise InvalidRequest(f"{sample.name} asks for metric {sample.metric!r}; known: {', '.join(METRICS)}")


def exact(answer: str, right: Sequence[str]) -> float:
    return float(normalised(answer) in {normalised(one) for one in right})


def anls(answer: str, right: Sequence[str]) -> float:
    """The best similarity to any right answer; capitals and repeated spaces do not count."""
    return max(_similarity(" ".join(answer.lower().split()), " ".join(one.lower().split())) for one in right)


def vqa(answer: str, people: Sequence[str]) -> float:
    """Averaged over leaving out each person in turn, as the official script does."""
    said = normalised(answer)
    agree = [normalised(person) == said for person in people]
    total = sum(agree)
    if len(people) <= _VQA_PEOPLE:
        return float(total > 0)
    return sum(min(1.0, (total - own) / _VQA_PEOPLE) for own in agree) / len(people)


def choice(answer: str, right: str, options: Sequence[str]) -> float:
    return float(chosen_letter(answer, options) == right.strip().upper())


def chosen_letter(answer: str, options: Sequence[str]) -> str:
    """The option that an answer chooses, by its letter or its own words; empty when it does not choose one."""
    text = answer.strip()
    announced = re.search(r"\b(?:answer|option)(?: is|:)?\s*(.+)", text, re.IGNORECASE | re.DOTALL)
    return _letter(text, options) or (_letter(announced[1], options) if announced else "")


def _letter(text: str, options: Sequence[str]) -> str:
    """What a text begins with, or says in an option's words. An A before other words is an article, an I a pronoun."""
    letters = string.ascii_uppercase[: len(options)] if options else string.ascii_uppercase
    any_case = letters + letters.lower()
    found = re.match(rf"\(?([{any_case}])\)?(?:[.:,)]|\s*$)|\(([{any_case}])\)", text)
    if found:
        return (found[1] or found[2]).upper()
    said = normalised(text)
    matching = [letter for letter, option in zip(letters, options, strict=False) if normalised(option) == said]
    if len(matching) == 1:
        return matching[0]
    found = re.match(
        rf"([{any_case}])\s+(?:(?:is|because|since)\b|[-–])|(?![AI]\b)([{any_case}])\s", text, re.IGNORECASE
    )
    return (found[1] or found[2]).upper() if found else ""


def normalised(text: str) -> str:
    """Lower case, without articles, punctuation at the ends of words and extra spaces; number words as digits.

    A text of nothing but articles keeps them.
    """
    words = [word.strip(string.punctuation) or word for word in text.lower().split()]
    told = [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(told or words)


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    if longest == 0:
        return 1.0
    similarity = 1.0 - levenshtein(a, b) / longest
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and replacements from one text to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[len(b)]
