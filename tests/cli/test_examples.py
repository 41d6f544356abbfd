"""What a checkpoint brings along to be asked, and which checkpoint is taken when none is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvila.cli import checkpoint
from nvila.cli.examples import Example, read_examples
from nvila.errors import InvalidCheckpoint


def bring(model: Path, listed: object, *media: str) -> Path:
    folder = model / "examples"
    folder.mkdir(parents=True)
    (folder / "examples.json").write_text(json.dumps(listed))
    for name in media:
        (folder / name).write_bytes(b"\x89PNG")
    return model


def test_examples_come_in_their_order_with_what_is_right(tmp_path: Path) -> None:
    listed = [{"media": "a.png", "question": "What is the total?", "answer": "42.10"}]

    assert read_examples(bring(tmp_path, listed, "a.png")) == [
        Example(media=tmp_path / "examples" / "a.png", question="What is the total?", answer="42.10")
    ]


def test_a_checkpoint_without_examples_has_none(tmp_path: Path) -> None:
    assert read_examples(tmp_path) == []


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([{"media": "b.png", "question": "?", "answer": "!"}], "lacks b.png"),
        ([{"media": "a.png", "question": "?"}], "answer"),
        ({"media": "a.png"}, "cannot be read"),
    ],
)
def test_examples_that_cannot_be_asked_are_named(tmp_path: Path, listed: object, said: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=said):
        read_examples(bring(tmp_path, listed, "a.png"))


def test_nvila_tiny_is_taken_where_it_is_and_a_random_checkpoint_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVILA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checkpoint, "NVILA_TINY", tmp_path / "nvila-tiny")

    assert checkpoint.find_model(None).name == "random-tiny"
    (tmp_path / "nvila-tiny").mkdir()
    (tmp_path / "nvila-tiny" / "config.json").write_text("{}")
    assert checkpoint.find_model(None) == tmp_path / "nvila-tiny"
