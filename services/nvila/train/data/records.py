"""The conversation record of LLaVA and VILA, read and written: {`image` | `images` | `video`, `conversations`}.

Media stand before the first message's text, whatever place their marks had in it, as in the reference's data sets
(NVILA-SPEC §8.1). What a record holds beyond the published format is under `nvila`: task, metric, right answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nvila.errors import InvalidRequest
from nvila.train.samples import Sample, text_of
from nvila.types import MediaKind, MediaPart, Message, Role, TextPart

ROLES = {
    "system": Role.SYSTEM,
    "human": Role.USER,
    "user": Role.USER,
    "gpt": Role.ASSISTANT,
    "assistant": Role.ASSISTANT,
}
MARKS = {"<image>": MediaKind.IMAGE, "<video>": MediaKind.VIDEO, "<vila/video>": MediaKind.VIDEO}
_PLACEHOLDER = re.compile(
    r"<(?:vila/\w+|image[-_ ]?\w*|video[-_ ]?\w*|audio|speech|sound|depth|mask|region|point_?cloud)>"
)
"""What stands for media in data sets of this kind; those not in `MARKS` stand for something that is not read here."""
_HALF_PAIR = re.compile("[\ud800-\udfff]")
"""JSON can spell it; no tokenizer takes it."""

KEYS = {"image": MediaKind.IMAGE, "images": MediaKind.IMAGE, "video": MediaKind.VIDEO, "videos": MediaKind.VIDEO}


@dataclass(frozen=True)
class MediaName:
    """One medium of a record: a file's path, or the name of a member of the shard."""

    kind: MediaKind
    name: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record that has been checked; its media are only named."""

    messages: tuple[Message, ...]
    media: tuple[MediaName, ...]
    task: str = ""
    metric: str = "exact"
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    notes: dict[str, Any]


def read_record(raw: Any) -> Record:
    """Check one record. Raises `InvalidRequest` saying what is wrong; the caller adds where."""
    if not isinstance(raw, dict):
        raise InvalidRequest(f"a record is an object, not {type(raw).__name__}")
    media = tuple(_media(raw))
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InvalidRequest("`conversations` must be a list with at least one message")
    messages = tuple(_message(turn) for turn in turns)
    _check_turns(messages)
    _check_marks(messages, media)
    extra = _object(raw, "nvila")
    answers = _texts(extra, "answers")
    if not answers and messages[-1].role is Role.ASSISTANT:
        answers = (text_of(messages[-1]),)
    return Record(
        messages=_with_media(messages, len(media)),
        media=media,
        task=str(extra.get("task", "")),
        metric=str(extra.get("metric", "exact")),
        answers=answers,
        choices=_texts(extra, "choices"),
        notes=_object(extra, "notes"),
    )


def write_record(sample: Sample, names: Sequence[str]) -> dict[str, Any]:
    """The record of a sample whose media are kept under `names`."""
    record: dict[str, Any] = {"id": sample.name}
    kinds = {media.kind for media in sample.media}
    assert len(kinds) <= 1, "a record holds images or one video"
    if kinds == {MediaKind.VIDEO}:
        record["video"] = names[0]
    elif len(names) == 1:
        record["image"] = names[0]
    elif names:
        record["images"] = list(names)
    mark = "<video>\n" if kinds == {MediaKind.VIDEO} else "<image>\n" * len(names)
    turns = []
    for place, message in enumerate(sample.messages):
        sender = {Role.SYSTEM: "system", Role.USER: "human", Role.ASSISTANT: "gpt"}[message.role]
        turns.append({"from": sender, "value": (mark if place == 0 else "") + text_of(message)})
    record["conversations"] = turns
    extra: dict[str, Any] = {"task": sample.task, "metric": sample.metric, "answers": list(sample.answers)}
    if sample.choices:
        extra["choices"] = list(sample.choices)
    record["nvila"] = extra | ({"notes": sample.notes} if sample.notes else {})
    return record


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{key}` must be an object, not {type(value).__name__}")
    return value


def _texts(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key, [])
    if not isinstance(value, list):
        raise InvalidRequest(f"`{key}` must be a list, not {type(value).__name__}")
    return tuple(map(str, value))


def _media(raw: dict[str, Any]) -> list[MediaName]:
    found = []
    for key, kind in KEYS.items():
        value = raw.get(key)
        if value is None:
            continue
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and name for name in names):
            raise InvalidRequest(f"`{key}` must be a file's name or a list of them, not {type(value).__name__}")
        found += [MediaName(kind, name) for name in names]
    return found


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise InvalidRequest("a message is an object with `from` and a text `value`")
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in ROLES:
        raise InvalidRequest(f"a message is from {sender!r}; known: {', '.join(ROLES)}")
    if _HALF_PAIR.search(turn["value"]):
        raise InvalidRequest("a message holds half of a surrogate pair, which is no character")
    return Message(ROLES[sender], (TextPart(turn["value"]),))


def _check_turns(messages: Sequence[Message]) -> None:
    said = [message.role for message in messages if message.role is not Role.SYSTEM]
    for place, role in enumerate(said):
        expected = Role.USER if place % 2 == 0 else Role.ASSISTANT
        if role is not expected:
            raise InvalidRequest(f"message {place + 1} is from the {role}; {expected} and the other take turns")
    if not said:
        raise InvalidRequest("a conversation needs a question")


def _check_marks(messages: Sequence[Message], media: Sequence[MediaName]) -> None:
    """Marks may be left out altogether; where there are any, there is one for each medium."""
    marks = [mark for message in messages for mark in _PLACEHOLDER.findall(text_of(message))]
    unknown = [mark for mark in marks if mark not in MARKS]
    if unknown:
        raise InvalidRequest(f"unknown placeholder {unknown[0]}; known: {', '.join(MARKS)}")
    for kind in MediaKind:
        marked = sum(MARKS[mark] is kind for mark in marks)
        named = sum(item.kind is kind for item in media)
        if marked and marked != named:
            raise InvalidRequest(f"{marked} placeholders for {kind}s, but {named} {kind}s are named")


def _with_media(messages: Sequence[Message], count: int) -> tuple[Message, ...]:
    """Marks taken out of the text, and the media put before the first message that is no system message."""
    first = next(place for place, message in enumerate(messages) if message.role is not Role.SYSTEM)
    placed = []
    for place, message in enumerate(messages):
        text = TextPart(_PLACEHOLDER.sub("", text_of(message)).strip())
        media = tuple(map(MediaPart, range(count))) if place == first else ()
        placed.append(Message(message.role, (*media, text)))
    return tuple(placed)
