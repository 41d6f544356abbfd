"""What is told about a part that did not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvila.cli.lifecycle import said_reasons
from nvila.cli.state import StackFolder


@pytest.fixture
def folder(tmp_path: Path) -> StackFolder:
    made = StackFolder(tmp_path / "one")
    made.make()
    return made


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '2026-11-21T11:13:04Z E 21360 backend_model.cc:692] "ERROR: no such model: x\\n\\nAt:\\n  model.py(3)"',
            "ERROR: no such model: x",
        ),
        (
            '{"level": "ERROR", "event": "it cannot start", "exception": "Traceback\\n  x\\nValueError: 3 is not 4"}',
            "it cannot start: ValueError: 3 is not 4",
        ),
        ("ValueError: NVILA_DECODE_MODEL: field required", "ValueError: NVILA_DECODE_MODEL: field required"),
        ("error: creating server: Internal", "error: creating server: Internal"),
        (
            '\x1b[36m(Replica pid=3)\x1b[0m {"level": "ERROR", "event": "cannot serve", "reason": "no such model"}',
            "cannot serve: no such model",
        ),
    ],
)
def test_the_lines_that_say_why_are_told_without_what_surrounds_them(
    folder: StackFolder, line: str, reason: str
) -> None:
    harmless = ['{"level": "INFO", "event": "no error so far"}', "| x | UNAVAILABLE: failed | ", "loading", ""]
    folder.log("vision").write_text("\n".join([*harmless, line, line, *harmless]))

    assert said_reasons(folder, "vision") == (reason,)


def test_our_own_words_are_preferred_to_those_of_others(folder: StackFolder) -> None:
    folder.log("decode").write_text('ValueError: 3\n{"level": "ERROR", "event": "no model"}\nRuntimeError: Traceback\n')

    assert said_reasons(folder, "decode") == ("no model",)


def test_without_such_lines_the_end_of_the_log_is_told(folder: StackFolder) -> None:
    folder.log("vision").write_text("".join(f"line {number}\n\n" for number in range(30)))

    assert said_reasons(folder, "vision") == tuple(f"line {number}" for number in range(18, 30))


def test_a_part_that_wrote_nothing_has_no_reasons(folder: StackFolder) -> None:
    assert said_reasons(folder, "vision") == ()
