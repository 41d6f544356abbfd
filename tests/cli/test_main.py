"""The command line as a person or a program meets it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nvila import errors
from nvila.cli.main import EXIT_CODES, main, parser

HEAVY = {
    "rich",
    "httpx",
    "psutil",
    "torch",
    "numpy",
    "pydantic",
    "opentelemetry",
    "grpc",
    "redis",
    "importlib.metadata",
}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVILA_HOME", str(tmp_path / "home"))


def test_help_brings_only_the_standard_library_along() -> None:
    """That is what makes it instant: time itself would measure the machine."""
    program = (
        "import contextlib, sys\nfrom nvila.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "usage: nvila" in done.stdout
    loaded = set(done.stderr.split())
    assert not HEAVY & loaded


@pytest.mark.parametrize("verb", ["up", "down", "status", "logs", "ask", "demo"])
def test_each_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])

    assert done.value.code == 0
    assert f"usage: nvila {verb}" in capsys.readouterr().out


def test_every_error_code_has_an_exit_status() -> None:
    importlib.import_module("nvila.cli.cluster_api")  # errors of its own
    importlib.import_module("nvila.cli.lifecycle")
    shown = [cls for cls in errors._tree(errors.NvilaError) if not cls.__module__.startswith("nvila.recordings")]
    codes = {cls.code for cls in shown} - {"cancelled", "invalid_checkpoint"}
    assert codes <= EXIT_CODES.keys()


def test_the_last_word_of_ask_is_the_question() -> None:
    args = parser().parse_args(["ask", "a.mp4", "b.png", "What?", "--frames", "8"])

    assert (args.media, args.question, args.frames) == (["a.mp4", "b.png"], "What?", 8)


def test_frames_and_fps_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["ask", "a.mp4", "What?", "--frames", "8", "--fps", "1"])

    assert done.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        (["ask", "nowhere.mp4", "What?"], 5, "there is no file nowhere.mp4"),
        (["ask", "What?"], 7, "no stack 'default' is running here"),
        (["ask", "What?", "--url", "http://127.0.0.1:9"], 7, "no gateway answers at http://127.0.0.1:9"),
        (["status"], 7, "no stack 'default' here"),
        (["logs"], 5, "has no logs"),
        (["up", "--model", "nowhere"], 3, "not a checkpoint folder"),
        (["up", "--model", "nowhere", "--stack", "NO"], 3, "not a checkpoint folder"),
    ],
)
def test_what_goes_wrong_is_one_clear_line_and_a_status(
    line: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == status

    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("nvila: ")
    assert told.err.count("\n") == 1
    assert says in told.err


def test_a_program_gets_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 7

    assert json.loads(capsys.readouterr().out)["error"]["code"] == "unavailable"


def test_nothing_to_stop_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down"]) == 0
    assert main(["down", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": []}
