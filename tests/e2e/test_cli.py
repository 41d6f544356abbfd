"""The command line on the running stack: what a person types after `nvila up`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from nvila.cli import lifecycle, processes
from nvila.cli.lifecycle import RunningStack
from nvila.cli.stack import configure
from nvila.cli.state import StackFolder
from tests.clips import BIKES


def nvila(stack: RunningStack, *line: str) -> subprocess.CompletedProcess[str]:
    """Run a command on the stack, as another program would."""
    return subprocess.run(
        [sys.executable, "-m", "nvila.cli.main", *line, "--stack", stack.folder.name],
        env={**os.environ, "NVILA_HOME": str(stack.folder.path.parent)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_ask_streams_an_answer_and_says_what_it_stands_on(stack: RunningStack) -> None:
    done = nvila(stack, "ask", str(BIKES), "What happens?", "--frames", "16", "--max-tokens", "8")

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "first token" in done.stderr
    assert " 16 " in done.stderr


def test_a_second_question_decodes_and_encodes_nothing(stack: RunningStack) -> None:
    for question in ("What happens?", "Who is it?"):
        done = nvila(stack, "ask", str(BIKES), question, "--frames", "24", "--max-tokens", "4", "--json")
        assert done.returncode == 0, done.stdout

    (media,) = json.loads(done.stdout)["coverage"]["media"]
    assert (media["frames_decoded"], media["frames_encoded"], media["frames_reused"]) == (0, 0, 24)


def test_status_tells_every_part(stack: RunningStack) -> None:
    done = nvila(stack, "status", "--json")

    assert done.returncode == 0, done.stdout
    told = json.loads(done.stdout)
    assert told["model"] == "random-tiny"
    assert set(told["parts"]) == {"cache", "vision", "decode", "gateway", "recordings"}
    for part in told["parts"].values():
        assert part["health"] == "ready"
        assert part["pid"]
        assert part["port"]
        assert part["version"]
        assert part["memory_bytes"] > 1 << 20


def test_logs_hold_what_the_parts_said(stack: RunningStack) -> None:
    done = nvila(stack, "logs", "-n", "1000")

    assert done.returncode == 0
    for part in ("vision", "decode", "gateway", "recordings", "supervisor"):
        assert f"{part:10} │ " in done.stdout


def test_a_stack_that_runs_is_not_started_twice(stack: RunningStack) -> None:
    done = nvila(stack, "up", "--model", stack.config.model)

    assert done.returncode == 7
    assert "is running already" in done.stderr


def test_a_checkpoint_that_is_broken_ends_the_start_with_the_parts_own_words(stack: RunningStack) -> None:
    """Beside the running stack: its own name, ports, folder and shared memory."""
    folder = StackFolder(stack.folder.path.parent / "broken")
    model = folder.path.parent / "no-weights"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "something else"}')
    config = configure(name="broken", model=model)
    began = time.monotonic()
    try:
        lifecycle.start(config, folder)
    except lifecycle.StartFailed as error:
        failure = error
    else:
        raise AssertionError("a stack started without a model")

    assert failure.part in ("vision", "decode")
    assert any("something else" in line for line in failure.log_tail), failure.log_tail
    assert time.monotonic() - began < 90
    assert folder.read() is None
    assert not processes.marked(config.stack_id)
