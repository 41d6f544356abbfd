"""How windows are fitted into a budget: never over it, nothing lost, coarser only as far as needed, and fast."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvila.capacity.models import nvila_8b_video
from nvila.errors import LimitExceeded
from nvila.model import cost
from nvila.recordings.planner import Budget, GroupShape, Planned, Unit, plan_window
from nvila.types import MediaKind, WindowMode

CONFIG = nvila_8b_video()
SHAPE = GroupShape.of(CONFIG)
GROUP_S = 8.0


def units(count: int, *, per_chunk: int = 4, still: int = 0, gaps: frozenset[int] = frozenset()) -> list[Unit]:
    """`count` groups of 8 s; each differs from the one before, but for runs of `still` that look alike."""
    return [
        Unit(
            start_s=place * GROUP_S,
            key=f"{place // still if still else place:x}",
            frames=8,
            chunk=place // per_chunk,
            is_after_gap=place in gaps,
        )
        for place in range(count)
    ]


def plan(some: list[Unit], *, capacity: int = 32, most_pool: int = 8, part_text: int = 0) -> Planned:
    positions = capacity * SHAPE.positions + SHAPE.around
    budget = Budget(positions=positions, groups=32, text=100, answer=50, most_pool=most_pool, part_text=part_text)
    end_s = some[-1].start_s + GROUP_S
    return plan_window(some, 0.0, end_s, missing_s=0.0, budget=budget, shape=SHAPE, config=CONFIG)


def test_what_fits_keeps_all_its_tokens() -> None:
    planned = plan(units(32))
    assert (planned.plan.mode, planned.plan.pool, planned.plan.calls) == (WindowMode.FULL, 1, 1)
    assert planned.plan.frames == 256
    assert planned.plan.tokens == planned.plan.most_tokens == 32 * 257
    assert planned.plan.seconds_per_frame == 1.0
    assert planned.plan.seconds_per_block == 8.0


def test_one_group_more_than_fits_is_averaged_by_two() -> None:
    planned = plan(units(33))
    assert (planned.plan.mode, planned.plan.pool, planned.plan.blocks) == (WindowMode.POOLED, 2, 17)
    assert planned.stretches[0].blocks[-1] == (32,)
    assert planned.plan.seconds_per_frame == 1.0


def test_what_even_the_largest_average_does_not_bring_in_is_asked_about_in_parts() -> None:
    planned = plan(units(32 * 8 + 1))
    assert planned.plan.mode is WindowMode.MAP_REDUCE
    assert planned.plan.pool == 1
    assert planned.plan.calls == 9 + 1
    assert all(len(stretch.blocks) <= 32 for stretch in planned.stretches)
    assert "in parts" in planned.plan.reason


def test_parts_are_cut_where_chunks_meet() -> None:
    planned = plan(units(400, per_chunk=5))
    for before, after in pairwise(planned.stretches):
        assert before.chunks[-1] != after.chunks[0]


def test_a_chunk_longer_than_a_call_is_cut_anywhere() -> None:
    planned = plan(units(300, per_chunk=300))
    assert [len(stretch.blocks) for stretch in planned.stretches] == [32] * 9 + [12]


def test_static_groups_are_left_out_before_anything_is_averaged() -> None:
    planned = plan(units(320, still=10))
    assert (planned.plan.mode, planned.plan.leaves_out_static, planned.plan.blocks) == (WindowMode.FULL, True, 32)
    assert planned.left_out == (320 - 32) * 8
    assert planned.plan.seconds_per_frame == 1.0, "what looks alike was sampled all the same"


def test_a_static_day_is_one_call() -> None:
    planned = plan(units(10_800, still=7))
    assert planned.plan.mode is WindowMode.MAP_REDUCE
    assert plan(units(10_800, still=10_800)).plan.calls == 1


def test_averages_do_not_cross_a_gap() -> None:
    planned = plan(units(60, gaps=frozenset({3, 41})))
    for run in planned.stretches[0].blocks:
        assert not {3, 41} & set(run[1:])


def test_models_of_several_levels_are_not_averaged() -> None:
    config = replace(CONFIG, pool_sizes=((1, 1, 1), (8, 1, 1)))
    shape = GroupShape.of(config)
    assert not shape.can_pool
    budget = Budget.of(config, longest=16_384, text=200, answer=100)
    planned = plan_window(units(64), 0, 512, missing_s=0, budget=budget, shape=shape, config=config)
    assert (planned.plan.mode, planned.plan.pool) == (WindowMode.MAP_REDUCE, 1)
    assert planned.plan.most_tokens <= budget.positions


def test_a_budget_without_room_for_a_moment_names_both_numbers() -> None:
    with pytest.raises(LimitExceeded, match="257 asked, at most 200 allowed"):
        plan_window(units(1), 0, 8, missing_s=0, budget=Budget(positions=200, groups=32), shape=SHAPE, config=CONFIG)


def test_the_budget_is_what_the_model_has_beside_text_answer_and_other_media() -> None:
    budget = Budget.of(CONFIG, longest=16_384, text=300, answer=128, others=1_000)
    assert budget.positions == 16_384 - 1 - 300 - 128 - 1_000
    assert budget.groups == 32, "256 frames: what the model was trained on"
    assert Budget.of(CONFIG, longest=100, text=300, answer=128).positions == 0


def test_parts_leave_room_for_what_they_are_told_of_themselves() -> None:
    planned = plan(units(400), capacity=20, most_pool=1, part_text=96)
    assert planned.plan.most_tokens + 96 <= 20 * 257


def test_ten_thousand_chunks_are_planned_in_milliseconds() -> None:
    many = units(40_000)
    began = time.process_time()
    planned = plan(many)
    assert time.process_time() - began < 1.0, "measured 0.05 s"
    assert planned.plan.calls == 1_250 + 1


WINDOWS = st.builds(
    lambda count, per_chunk, still, gaps: units(count, per_chunk=per_chunk, still=still, gaps=frozenset(gaps)),
    st.integers(1, 200),
    st.integers(1, 50),
    st.integers(0, 6),
    st.sets(st.integers(1, 199), max_size=5),
)


@given(WINDOWS, st.integers(1, 32), st.sampled_from([1, 2, 4, 8]))
def test_no_call_is_over_its_budget(some: list[Unit], capacity: int, most_pool: int) -> None:
    planned = plan(some, capacity=capacity, most_pool=most_pool)
    assert planned.plan.most_tokens <= capacity * SHAPE.positions + SHAPE.around
    for stretch in planned.stretches:
        levels = cost.levels(
            CONFIG,
            kind=MediaKind.VIDEO,
            is_tiled=False,
            frames=8 * len(stretch.blocks),
            pool_sizes=CONFIG.pool_sizes,
        )
        positions = cost.positions(CONFIG, kind=MediaKind.VIDEO, is_tiled=False, levels=levels)
        assert positions <= planned.plan.most_tokens


@given(WINDOWS, st.integers(1, 32))
def test_stretches_make_up_the_window_and_every_group_is_seen_or_looks_like_one_that_is(
    some: list[Unit], capacity: int
) -> None:
    planned = plan(some, capacity=capacity)
    end_s = some[-1].start_s + GROUP_S
    borders = [(stretch.start_s, stretch.end_s) for stretch in planned.stretches]
    assert borders[0][0] == 0.0
    assert borders[-1][1] == end_s
    assert all(before[1] == after[0] for before, after in pairwise(borders))
    assert sum(end - start for start, end in borders) == end_s
    shown = [place for stretch in planned.stretches for run in stretch.blocks for place in run]
    assert shown == sorted(set(shown)), "in order, none twice"
    for place in set(range(len(some))) - set(shown):
        assert some[place].key == some[place - 1].key
    frames = sum(unit.frames for unit in some)
    assert planned.plan.frames + planned.left_out == frames


@given(WINDOWS, st.integers(1, 31))
def test_a_larger_budget_is_never_answered_more_coarsely(some: list[Unit], capacity: int) -> None:
    less, more = plan(some, capacity=capacity).plan, plan(some, capacity=capacity + 1).plan
    order = [WindowMode.FULL, WindowMode.POOLED, WindowMode.MAP_REDUCE]
    assert order.index(more.mode) <= order.index(less.mode)
    if less.mode is not WindowMode.MAP_REDUCE:
        assert more.pool <= less.pool
        assert more.seconds_per_block <= less.seconds_per_block


@given(WINDOWS, st.integers(1, 32))
def test_a_longer_window_never_needs_fewer_calls(some: list[Unit], capacity: int) -> None:
    part = some[: max(1, len(some) * 2 // 3)]
    assert plan(part, capacity=capacity).plan.calls <= plan(some, capacity=capacity).plan.calls


@given(WINDOWS, st.integers(1, 32))
def test_a_part_planned_alone_is_one_call_with_the_tokens_planned(some: list[Unit], capacity: int) -> None:
    planned = plan(some, capacity=capacity)
    if planned.plan.mode is not WindowMode.MAP_REDUCE:
        return
    for stretch in planned.stretches:
        inside = [unit for unit in some if stretch.start_s <= unit.start_s < stretch.end_s]
        alone = plan(inside, capacity=capacity)
        assert alone.plan.mode is WindowMode.FULL
        assert alone.plan.blocks in (len(inside), len(stretch.blocks))
