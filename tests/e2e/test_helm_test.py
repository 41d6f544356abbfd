"""The chart's own check, `helm test`, against the real stack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nvila.cli.lifecycle import RunningStack

SCRIPT = Path(__file__).parents[2] / "charts" / "nvila" / "files" / "first_answer.py"


def ask(stack: RunningStack, key: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "API_KEY": key, "TIMEOUT_S": "120"}
    return subprocess.run(
        [sys.executable, SCRIPT, stack.config.url], env=environment, capture_output=True, text=True, timeout=240
    )


def test_the_first_answer_is_whole_and_the_second_comes_from_the_cache(stack: RunningStack) -> None:
    done = ask(stack, stack.config.api_key)
    assert done.returncode == 0, done.stderr
    assert "the second question took 16 of 16 frames from the cache" in done.stdout


def test_a_wrong_key_fails_it(stack: RunningStack) -> None:
    assert ask(stack, "not-a-key-of-this-stack").returncode != 0
