"""Killed in every stage and started again: the same losses, and nothing half-written is ever seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvila.model.checkpoint import Checkpoint
from nvila.train.plot import read_metrics
from nvila.train.state import newest_state, read_progress

pytestmark = pytest.mark.slow

STAGES = [f"toy-{n}" for n in range(1, 6)]
STEPS = 5


def command(out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "nvila.cli.main", "train", "all", "toy", "--out", str(out)),
        *("--steps", str(STEPS), "--in-process", "--device", "cpu", "--json"),
    ]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def kill_after(out: Path, stage: str, step: int) -> None:
    """Start, and kill without warning as soon as the stage has made this step."""
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    metrics = out / stage / "metrics.jsonl"
    until = time.monotonic() + 120
    while len(read_metrics(metrics)) < step:
        assert process.poll() is None, f"ended with {process.returncode} before step {step} of {stage}"
        assert time.monotonic() < until, f"no step {step} of {stage}"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def losses(out: Path, stage: str) -> list[float]:
    return [line["loss"] for line in read_metrics(out / stage / "metrics.jsonl")]


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_losses(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(command(whole), capture_output=True, text=True, env=environment(), check=True)
    assert json.loads(done.stdout.splitlines()[-1])["model"]

    for number, stage in enumerate(STAGES):
        kill_after(broken, stage, 2 + number % 3)
        state = newest_state(broken / stage / "state")
        assert state is None or read_progress(state).step % 2 == 0
        assert not (broken / stage / "model").exists()
    subprocess.run(command(broken), capture_output=True, env=environment(), check=True)

    for stage in STAGES:
        assert losses(broken, stage) == pytest.approx(losses(whole, stage), rel=1e-4)
        steps = [line["step"] for line in read_metrics(broken / stage / "metrics.jsonl")]
        assert steps == list(range(1, STEPS + 1))
        assert (broken / stage / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert not list((broken / stage / "state").glob(".*"))
    first, second = (Checkpoint.open(out / STAGES[-1] / "model") for out in (whole, broken))
    assert first.vision_revision == second.vision_revision
    assert not first.is_random
    record = json.loads((broken / STAGES[0] / "run.json").read_text())
    assert record["recipe"]["trained"] == ["projector"]
    assert record["versions"]["torch"]
