"""Questions that a checkpoint brings along with what is right: `examples/examples.json` in its folder.

A list of `{"media": "receipt.png", "question": "What is the total?", "answer": "42.10"}`, media beside the list.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nvila.errors import InvalidCheckpoint


@dataclass(frozen=True, kw_only=True)
class Example:
    media: Path
    question: str
    answer: str


def read_examples(model: Path) -> list[Example]:
    """In their order; none for a checkpoint that brings none. Raises `InvalidCheckpoint`."""
    folder = model / "examples"
    if not folder.is_dir():
        return []
    try:
        listed = json.loads((folder / "examples.json").read_text("utf-8"))
        found = [Example(media=folder / one["media"], question=one["question"], answer=one["answer"]) for one in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{model.name}/examples/examples.json cannot be read: {error!r}") from error
    missing = [example.media.name for example in found if not example.media.is_file()]
    if missing:
        raise InvalidCheckpoint(f"{model.name}/examples lacks {', '.join(missing)}")
    return found
