"""The rendered tasks: the same bytes from the same seed, splits apart, and pictures that show what the answer says."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from nvila.errors import InvalidRequest
from nvila.model.time_tokens import parse_interval
from nvila.train.data import fonts
from nvila.train.data.catalogue import DENSE, FAMILIES, IMAGES, TASKS, VIDEOS, make_sample
from nvila.train.data.draw import COLOURS, Draw, Knobs, Split
from nvila.train.evaluation.metrics import METRICS, score
from nvila.train.samples import Sample, text_of
from nvila.types import Role

SMALL = Knobs(canvas_px=224, text_px=(10, 32), video_px=64, clip_s=(3.0, 5.0))


def visible_runs(sample: Sample) -> list[tuple[int, int]]:
    """Stretches of frames that differ from the first one, which is empty."""
    frames_FHWC = sample.media[0].frames_FHWC
    shows = (frames_FHWC != frames_FHWC[0]).any(axis=(1, 2, 3))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], shows.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_name_gives_the_same_sample_and_another_split_another_one(family: str) -> None:
    one, again = (make_sample(family, Split.TRAIN, 7, 3, SMALL) for _ in range(2))
    other = make_sample(family, Split.VALIDATION, 7, 3, SMALL)

    assert (one.question, one.answer) == (again.question, again.answer)
    assert all(np.array_equal(a.frames_FHWC, b.frames_FHWC) for a, b in zip(one.media, again.media, strict=True))
    assert one.media[0].frames_FHWC.shape != other.media[0].frames_FHWC.shape or not np.array_equal(
        one.media[0].frames_FHWC, other.media[0].frames_FHWC
    )


@pytest.mark.parametrize("family", TASKS)
def test_every_sample_has_a_short_answer_that_its_own_metric_calls_right(family: str) -> None:
    for index in range(12):
        sample = make_sample(family, Split.TEST, 1, index, SMALL)
        assert sample.task.startswith(f"{family}.")
        assert sample.metric in METRICS
        assert 0 < len(sample.answer) <= 40, sample.answer
        assert score(sample, sample.answer) == pytest.approx(1.0)
        assert all(item.frames_FHWC.dtype == np.uint8 for item in sample.media)
        assert bool(sample.duration_s) == (family in VIDEOS)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_questions_as_the_knobs_allow_are_asked_about_one_picture_and_no_one_twice(family: str) -> None:
    most = 0
    for index in range(12):
        one, several = (make_sample(family, Split.TRAIN, 5, index, replace(SMALL, questions=count)) for count in (1, 6))
        asked = [text_of(message) for message in several.messages if message.role is Role.USER]
        assert len(one.messages) == 2
        assert several.messages[:2] == one.messages
        assert len(asked) == len(set(asked)) <= 6
        most = max(most, len(asked))
    assert most > 3 or family not in DENSE


def test_what_is_told_of_a_picture_agrees_with_the_answers_about_it() -> None:
    for index in range(60):
        sample = make_sample("describing", Split.TRAIN, 4, index, replace(SMALL, questions=40))
        turns = list(zip(map(text_of, sample.messages[::2]), map(text_of, sample.messages[1::2]), strict=True))
        told = next(answer for _, answer in turns if ": " in answer and answer[0].isdigit())
        things = [thing.split(" ", 2) for thing in told.split(": ")[1].split(", ")]
        assert int(told.split(":")[0]) == len(things)
        for question, answer in turns:
            place = next((p for hue, kind, p in things if f"the {hue} {kind}?" in question), None)
            if place and question.startswith("Where is") and "relative" not in question:
                assert answer == place
            if question.startswith("How many") and " shapes " in question:
                assert int(answer) == sum(f" {hue} shapes " in question for hue, _, _ in things)


def test_a_story_tells_when_each_thing_was_there_as_the_question_about_it_does() -> None:
    for index in range(30):
        sample = make_sample("narrating", Split.TRAIN, 4, index, replace(SMALL, questions=40))
        turns = list(zip(map(text_of, sample.messages[::2]), map(text_of, sample.messages[1::2]), strict=True))
        story = max((answer for _, answer in turns), key=len)
        asked = [(q, a) for q, a in turns if a.startswith("<")]
        assert all(f"{' '.join(q.split(' is ')[0].split()[-2:])} {a}" in story for q, a in asked if " is shown" in q)
        assert [float(start) for start in re.findall(r"<([\d.]+)> <", story)] == sorted(
            float(start) for start in re.findall(r"<([\d.]+)> <", story)
        )


def test_the_truth_about_pixels_has_the_colours_and_the_letters_of_the_picture() -> None:
    hues = [np.array(colour) for colour in COLOURS.values()]
    letters: set[int] = set()
    for index in range(40):
        sample = make_sample("patches", Split.TRAIN, 3, index)
        assert sample.truth_KHW is not None
        shape_HW, color_HW, letter_HW = sample.truth_KHW
        assert ((shape_HW > 0) == (color_HW > 0)).all()
        letters |= set(np.unique(letter_HW).tolist())
        for label in set(np.unique(color_HW).tolist()) - {0}:
            own_NC = sample.media[0].frames_FHWC[0][color_HW == label].astype(float)
            assert np.linalg.norm(np.median(own_NC, axis=0) - hues[label - 1]) < 40
    assert len(letters) > 50


def test_held_out_typefaces_are_drawn_with_in_half_of_the_test_split_only() -> None:
    for split, expected in ((Split.TRAIN, 0), (Split.VALIDATION, 0), (Split.TEST, 10)):
        draws = [Draw.of("scene", split, 0, index, SMALL) for index in range(20)]
        assert sum(draw.is_held_out for draw in draws) == expected
        for draw in draws:
            assert (draw.face() in fonts.HELD_OUT) == draw.is_held_out
    assert not set(fonts.TRAINED) & set(fonts.HELD_OUT)


@pytest.mark.parametrize(
    ("family", "task", "most"),
    [
        ("shapes", "shapes.count", 0.4),
        ("shapes", "shapes.verify", 0.65),
        ("pairs", "pairs.same", 0.65),
        ("counting", "counting.flashes", 0.4),
    ],
)
def test_no_answer_of_a_task_is_much_likelier_than_the_others(family: str, task: str, most: float) -> None:
    samples = (make_sample(family, Split.TRAIN, 2, index, SMALL) for index in range(240))
    answers = Counter(sample.answer for sample in samples if sample.task == task)

    assert max(answers.values()) / answers.total() < most, answers


def test_something_comes_and_goes_exactly_when_the_answer_says() -> None:
    for index in range(20):
        sample = make_sample("when", Split.TRAIN, 3, index, SMALL)
        frames_FHWC = sample.media[0].frames_FHWC
        for seconds in parse_interval(sample.answer, sample.duration_s):
            number = round(seconds * SMALL.video_fps)
            is_inside = 0 < number < len(frames_FHWC)
            assert not is_inside or not np.array_equal(frames_FHWC[number], frames_FHWC[number - 1])


def test_flashes_are_as_many_as_the_answer_says() -> None:
    for index in range(20):
        sample = make_sample("counting", Split.TRAIN, 4, index, SMALL)
        assert len(visible_runs(sample)) == int(sample.answer), sample.question


def test_brief_text_is_shown_for_the_time_that_the_notes_give() -> None:
    for index in range(8):
        sample = make_sample("brief", Split.TRAIN, 5, index, SMALL)
        ((first, end),) = visible_runs(sample)
        assert (end - first) / SMALL.video_fps == pytest.approx(sample.notes["shown_s"])


def test_text_of_many_sizes_is_evenly_spread_over_doublings() -> None:
    sizes = [make_sample("scene", Split.TRAIN, 6, index).notes["text_px"] for index in range(120)]

    assert min(sizes) < 12
    assert max(sizes) > 35


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"no task family 'poems'.*shapes"):
        make_sample("poems", Split.TRAIN, 0, 0)


def test_pictures_of_one_question_differ_in_number_only_where_several_are_asked_about() -> None:
    for family in IMAGES:
        counts = {len(make_sample(family, Split.TRAIN, 8, index, SMALL).media) for index in range(15)}
        assert counts == ({2, 3} if family == "pairs" else {1})
