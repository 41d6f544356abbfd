"""The drawn recording of minutes: what it says is shown is what its frames show, and overlaps are counted once."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from nvila.train.data.draw import Split
from nvila.train.data.recording import SCENE_S, Story, overlap

STORY = Story.drawn(3, 90)


def test_one_thing_after_the_other_is_shown_and_nothing_between() -> None:
    edges = [edge for one in STORY.shown for edge in (one.start_s, one.end_s)]
    assert edges == sorted(edges)
    assert edges[-1] < STORY.seconds
    frames = list(islice(STORY.frames(), int(SCENE_S * STORY.fps)))
    ground = np.asarray(STORY.grounds[0])
    for number, frame in enumerate(frames):
        is_shown = any(one.start_s <= number / STORY.fps < one.end_s for one in STORY.shown)
        assert (frame != ground).any() == is_shown


def test_what_is_never_shown_is_told_apart_and_the_same_seed_gives_the_same() -> None:
    again, other = Story.drawn(3, 90), Story.drawn(3, 90, Split.TRAIN)
    assert [one.name for one in again.shown] == [one.name for one in STORY.shown] != [one.name for one in other.shown]
    assert not set(STORY.absent) & set(STORY.names)
    assert [STORY.times_of(name) for name in STORY.absent] == [[]] * len(STORY.absent)


def test_pairs_for_order_questions_have_colours_that_are_there_once() -> None:
    pairs = STORY.pairs(40)
    assert pairs
    for one, other in pairs:
        between = [thing.name.split()[0] for thing in STORY.shown if one.start_s <= thing.start_s <= other.start_s]
        assert len(between) >= 3
        assert [between.count(between[0]), between.count(between[-1])] == [1, 1]
        assert other.end_s - one.start_s <= 40


def test_it_is_written_whole(tmp_path: Path) -> None:
    Story.drawn(3, 6).write(tmp_path / "short.mp4")
    with av.open(str(tmp_path / "short.mp4")) as clip:
        times = [float(frame.time or 0) for frame in clip.decode(video=0)]
    assert len(times) == 6 * STORY.fps
    assert {round(b - a, 3) for a, b in pairwise(times)} == {1 / STORY.fps}


@pytest.mark.parametrize(
    ("found", "right", "share"),
    [
        ([(0, 4)], [(0, 4)], 1.0),
        ([(0, 2)], [(0, 4)], 0.5),
        ([(0, 2), (1, 4)], [(0, 4)], 1.0),
        ([(0, 4)], [(0, 1), (3, 4)], 0.5),
        ([], [(0, 4)], 0.0),
        ([(5, 6)], [(0, 4)], 0.0),
        ([], [], 1.0),
    ],
)
def test_overlap_is_of_the_time_that_intervals_cover_together(
    found: list[tuple[float, float]], right: list[tuple[float, float]], share: float
) -> None:
    assert overlap(found, right) == pytest.approx(share)
