"""From a user's files to rows: what is counted, what is refused by file and line, and processes that end in time."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvila.errors import InvalidRequest
from nvila.train.data import clips
from nvila.train.feed import Feed
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.recipes import Batch, Recipe, toy_stages
from nvila.train.samples import SampleMedia
from nvila.train.toy import texts
from nvila.types import MediaKind


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "toy", TOY, learn_merges(texts(), 300))


def recipe(folder: Path, *, lanes: int = 1, **changes: Any) -> Recipe:
    """One row a lane of `folder/qa.jsonl`."""
    batch = Batch(rows=lanes, row_positions=512, row_tiles=64, lanes=lanes)
    return replace(toy_stages()[3], data=f"{folder}::qa", batch=batch, **changes)


def write(folder: Path, *records: dict[str, Any]) -> None:
    talk = [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "red"}]
    lines = (json.dumps({"conversations": talk} | record) for record in records)
    (folder / "qa.jsonl").write_text("\n".join(lines) + "\n")
    Image.new("RGB", (40, 30), "red").save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")


GOOD = {"image": "good.png"}
BAD = {"image": "bad.png"}
LONG = {
    "image": "good.png",
    "conversations": [{"from": "human", "value": "why? " * 900}, {"from": "gpt", "value": "because"}],
}


def test_an_epoch_is_as_long_with_feeding_processes_as_without(base: Path, tmp_path: Path) -> None:
    write(tmp_path, GOOD, GOOD, BAD)

    with Feed(recipe(tmp_path, lanes=2), base, [], has_processes=True) as apart:
        assert apart.samples == 3
    with Feed(recipe(tmp_path, lanes=2), base, []) as here:
        assert here.samples == 3


def test_every_place_counts_and_what_is_left_out_is_named_by_file_and_line(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, GOOD, BAD, {"image": "gone.png"}, LONG)

    with caplog.at_level(logging.WARNING), Feed(recipe(tmp_path), base, [0]) as feed:
        step = next(feed.steps())

    assert [(fault.where, fault.reason) for fault in feed.faults] == [("qa.jsonl:3", "there is no image 'gone.png'")]
    used = len(step.rows[0])
    assert used >= 2
    assert step.places == used + step.skipped
    assert step.states[0]["position"] == step.places
    assert "left out qa.jsonl:2: a broken or unknown picture" in caplog.text
    assert "left out qa.jsonl:4: " in caplog.text
    assert "1 records are left out\n  qa.jsonl:3: there is no image 'gone.png'" in caplog.text


@pytest.mark.parametrize(("bad", "line"), [({"image": "gone.png"}, 2), (BAD, 2), (LONG, 2)])
def test_a_strict_recipe_refuses_what_cannot_be_used_by_file_and_line(
    base: Path, tmp_path: Path, bad: dict[str, Any], line: int
) -> None:
    write(tmp_path, GOOD, bad)

    with (
        pytest.raises(InvalidRequest, match=rf"qa\.jsonl:{line}: "),
        Feed(recipe(tmp_path, skips_bad=False), base, [0]) as feed,
    ):
        next(feed.steps())


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(
    ("records", "changes", "reason"),
    [
        ((BAD, BAD), {}, r"the last: qa\.jsonl:\d: a broken or unknown picture"),
        ((LONG,), {}, r"the last: qa\.jsonl:1: "),
        ((GOOD, GOOD), {"kinds": (MediaKind.VIDEO,)}, "the recipe is for videos"),
    ],
)
def test_data_of_which_nothing_can_be_used_end_the_run(
    base: Path, tmp_path: Path, lanes: int, records: tuple[dict[str, Any], ...], changes: dict[str, Any], reason: str
) -> None:
    write(tmp_path, *records)

    with (
        Feed(recipe(tmp_path, lanes=lanes, **changes), base, list(range(lanes))) as feed,
        pytest.raises(InvalidRequest, match=f"can be used; {reason}"),
    ):
        next(feed.steps())


@pytest.mark.parametrize("seed", range(6))
def test_a_single_usable_sample_is_found_by_every_lane(base: Path, tmp_path: Path, seed: int) -> None:
    write(tmp_path, BAD, BAD, GOOD, BAD, BAD)

    with Feed(recipe(tmp_path, lanes=3, seed=seed), base, [0, 1, 2]) as feed:
        assert all(next(feed.steps()).rows)


def test_as_many_frames_of_a_video_file_are_read_as_the_recipe_looks_at(base: Path, tmp_path: Path) -> None:
    frames_FHWC = np.random.default_rng(0).integers(0, 255, (48, 32, 32, 3), np.uint8)
    times_s = tuple(number / 4 for number in range(48))
    clip = SampleMedia(kind=MediaKind.VIDEO, frames_FHWC=frames_FHWC, times_s=times_s, duration_s=12.0)
    clips.write_h264(clip, tmp_path / "noise.mp4")
    write(tmp_path, {"video": "noise.mp4"})
    longer = recipe(tmp_path)
    longer = replace(longer, prepare=replace(longer.prepare, frames=(48,), max_positions=100_000))

    with Feed(longer, base, [0]) as feed:
        sample = next(feed.steps()).rows[0][0]

    assert len(sample.tiles_USS3) == 48


FEEDING = """
import sys, time
from pathlib import Path
from nvila.train.feed import Feed
from nvila.train.recipes import toy_stages

if __name__ == "__main__":
    with Feed(toy_stages()[3], Path(sys.argv[1]), [0], has_processes=True) as feed:
        print("fed", flush=True)
        time.sleep(100)
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_feeding_processes_hear_no_ctrl_c_and_end_with_a_trainer_that_is_killed(base: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", FEEDING, str(base)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "fed\n"
        feeding = children(trainer.pid)

        assert len(feeding) == 1
        assert not {os.getpgid(pid) for pid in feeding} & {os.getpgid(trainer.pid)}

        trainer.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while any(is_running(pid) for pid in feeding):
        assert time.monotonic() < until, "a feeding process outlived its trainer"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Not gone, and no zombie that waits for somebody to look at its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
