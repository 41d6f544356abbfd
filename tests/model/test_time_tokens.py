"""Seconds and time tokens; the recorded conversions are in tests/golden."""

from __future__ import annotations

import pytest

from nvila.errors import InvalidRequest
from nvila.model.time_tokens import decode_times, encode_times, interval_iou, parse_interval, precision, time_tokens


def test_the_words_of_a_model_are_numbered_from_zero() -> None:
    assert time_tokens(3) == ("<t0>", "<t1>", "<t2>")
    assert time_tokens(2, "[time {t}]") == ("[time 0]", "[time 1]")


@pytest.mark.parametrize("duration_s", [0.4, 7.0, 61.7, 5400.0])
def test_a_time_comes_back_within_half_a_step_and_its_rounding(duration_s: float) -> None:
    for i in range(50):
        time_s = round(duration_s * i / 49, 3)
        start_s, _ = parse_interval(
            decode_times(encode_times(f"<{time_s}> <{time_s}>", duration_s, 100), duration_s, 100), duration_s
        )
        assert abs(start_s - time_s) <= duration_s / 99 / 2 + 0.006


def test_times_past_the_end_get_words_that_decode_to_the_end() -> None:
    assert encode_times("<12>", 10.0, 100) == "<t119>"
    assert decode_times("<t119>", 10.0, 100) == "<10.0>"


def test_other_formats_of_time_tokens_are_read_and_written() -> None:
    assert encode_times("at <5>", 10.0, 11, "[{t}]") == "at [5]"
    assert decode_times("at [5] or [11]", 10.0, 11, "[{t}]") == "at <5.0> or <10.0>"


@pytest.mark.parametrize("text", ["<t05>", "<t-1>", "<t>", "<t1", f"<t{'9' * 40}>"])
def test_what_is_no_time_token_stays(text: str) -> None:
    assert decode_times(text, 10.0, 100) == text


@pytest.mark.parametrize("duration_s", [-1.0, float("nan"), float("inf")])
def test_a_clip_without_a_length_is_refused(duration_s: float) -> None:
    with pytest.raises(InvalidRequest, match="positive duration"):
        encode_times("<1>", duration_s, 100)
    with pytest.raises(InvalidRequest, match="positive duration"):
        decode_times("<t1>", duration_s, 100)


def test_an_empty_clip_has_only_one_time() -> None:
    assert decode_times("<t0> <t99>", 0.0, 100) == "<0.0> <0.0>"
    with pytest.raises(InvalidRequest, match="positive duration"):
        encode_times("<0>", 0.0, 100)


def test_fewer_than_two_tokens_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least 2"):
        encode_times("<1>", 10.0, 1)


def test_a_number_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no time"):
        encode_times(f"<{'9' * 400}>", 10.0, 100)


def test_an_answer_is_sorted_and_held_within_the_clip() -> None:
    assert parse_interval("from <80.5> back to <.5>", 60.0) == (0.5, 60.0)
    assert parse_interval("<3>", 60.0) == (0.0, 60.0)


def test_overlap_is_none_all_or_a_part() -> None:
    assert interval_iou((0, 1), (2, 3)) == 0.0
    assert interval_iou((1, 2), (1, 2)) == 1.0
    assert interval_iou((0, 2), (1, 3)) == pytest.approx(1 / 3)
    assert interval_iou((1, 1), (1, 1)) == 0.0
    assert [precision(iou) for iou in (0.49, 0.5)] == [0.0, 1.0]
