"""How a recording's window fits into the model's budget: pure arithmetic, no I/O, the same for answers and estimates.

In this order, the first that fits one call: every group's own tokens; of groups that look alike only the first; then
averages over 2, 4, … consecutive groups, up to a declared number, with all groups and again with the first of those
alike. A window that fits none of these is cut into *stretches*, each with all its groups' tokens, for a map over
stretches and a last call over their answers: seconds per frame stay what they are, and calls are what grows (ANCHORS
P10). Averages never cross a gap, because what lies on its two sides did not happen together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nvila.errors import LimitExceeded
from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.types import MediaKind, WindowMode, WindowPlan

MOST_POOL = 8
"""Consecutive groups that one block may stand for: 64 s of a recording sampled once a second by a model with groups of
8. Beyond it a second question would find little of what happened in between."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A group of the window that has tokens. `key`: of its record. `chunk`: number of the chunk that it belongs to.
    `is_after_gap`: something is missing right before it, so it is not averaged with what came before."""

    start_s: float
    key: str
    frames: int
    chunk: int
    is_after_gap: bool = False


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """What groups cost one call: `positions` of the language model each, and `around` once per media item. `can_pool`:
    averages of groups mean something, because the model pools at one level only, and by time."""

    positions: int
    around: int
    can_pool: bool

    @classmethod
    def of(cls, config: NvilaConfig) -> GroupShape:
        def positions(groups: int) -> int:
            frames = groups * config.temporal_group
            levels = cost.levels(
                config, kind=MediaKind.VIDEO, is_tiled=False, frames=frames, pool_sizes=config.pool_sizes
            )
            return cost.positions(config, kind=MediaKind.VIDEO, is_tiled=False, levels=levels)

        one = positions(2) - positions(1)
        can_pool = len(config.pool_sizes) == 1 and config.pool_sizes[0][0] == config.temporal_group
        return cls(positions=one, around=positions(1) - one, can_pool=can_pool)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Of one model call. `positions`: for the window's tokens. `groups`: blocks of a group's size that one prompt may
    hold, whatever its length. `text`, `answer`: positions beside them, for the cost. `part_text`: positions more, of
    what a call over a part is told of it. `most_pool`: largest average."""

    positions: int
    groups: int
    text: int = 0
    answer: int = 0
    part_text: int = 0
    most_pool: int = MOST_POOL

    @classmethod
    def of(cls, config: NvilaConfig, *, longest: int, text: int, answer: int, others: int = 0) -> Budget:
        """What a model of `longest` positions leaves beside text, answer and other media. A prompt holds at most the
        groups of as many frames as the model was trained on."""
        return cls(
            positions=max(0, longest - 1 - text - answer - others),
            groups=max(1, config.max_frames // config.temporal_group),
            text=text,
            answer=answer,
        )

    def of_part(self) -> Budget:
        """Of a call whatever it is about, if that is only a part of what was asked."""
        return replace(self, positions=self.positions - self.part_text, text=self.text + self.part_text, part_text=0)

    def capacity(self, shape: GroupShape, *, is_part: bool = False) -> int:
        """How many blocks fit. Raises `LimitExceeded` when not even one does."""
        room = self.positions - (self.part_text if is_part else 0)
        fits = min(self.groups, (room - shape.around) // shape.positions)
        if fits < 1:
            raise LimitExceeded.of(
                "visual tokens of one moment of a recording",
                asked=shape.positions + shape.around,
                limit=max(0, room),
                param="messages",
            )
        return fits


Run = tuple[int, ...]
"""Places of units, in order, whose average is one block; of one unit: its own tokens."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What one call sees: from `start_s` up to `end_s` (not included), in `blocks`. `chunks`: that it touches."""

    start_s: float
    end_s: float
    blocks: tuple[Run, ...]
    chunks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """`stretches`: one, or for a map several, which together are the whole window. `left_out`: frames of groups that
    look like the one before and are not shown again."""

    plan: WindowPlan
    stretches: tuple[Stretch, ...]
    left_out: int

    @property
    def is_map(self) -> bool:
        return len(self.stretches) > 1


def plan_window(
    units: Sequence[Unit],
    start_s: float,
    end_s: float,
    *,
    missing_s: float,
    budget: Budget,
    shape: GroupShape,
    config: NvilaConfig,
) -> Planned:
    """The plan of a window whose groups with tokens are `units`, in order of time.

    `missing_s`: seconds of gaps inside the window. Raises `LimitExceeded` when the budget holds no group at all. Takes
    time in proportion to the units, and nothing else.
    """
    assert units, "a window without a usable group has no plan"
    capacity = budget.capacity(shape)
    whole = tuple((place,) for place in range(len(units)))
    pools = [1]
    while shape.can_pool and pools[-1] * 2 <= budget.most_pool:
        pools.append(pools[-1] * 2)
    distinct = _distinct(units)
    for pool in pools:
        for leaves_out, places in ((False, range(len(units))), (True, distinct)):
            if -(-len(places) // pool) > capacity:
                continue  # too many even if no gap cut an average short
            blocks = _averaged(units, places, pool) if pool > 1 else tuple((place,) for place in places)
            if len(blocks) <= capacity:
                left_out = leaves_out and len(places) < len(units)
                stretch = Stretch(start_s=start_s, end_s=end_s, blocks=blocks, chunks=_chunks(units, whole))
                return _planned(units, [stretch], pool, left_out, missing_s, budget, shape, config)
    stretches = _cut(units, start_s, end_s, budget.capacity(shape, is_part=True))
    shown = sum(len(stretch.blocks) for stretch in stretches)
    return _planned(units, stretches, 1, shown < len(units), missing_s, budget, shape, config)


def joined_plan(windows: Sequence[Planned], budget: Budget, config: NvilaConfig) -> WindowPlan:
    """Of windows that are asked about apart from each other, with one last call over all their answers."""
    plans = [window.plan for window in windows]
    if len(plans) == 1:
        return plans[0]
    parts = sum(len(window.stretches) for window in windows)
    flops = sum(plan.prefill_flops for plan in plans) + _closing_flops(config, budget, parts)
    flops -= sum(_closing_flops(config, budget, len(window.stretches)) for window in windows if window.is_map)
    blocks, frames = sum(plan.blocks for plan in plans), sum(plan.frames for plan in plans)
    known = [plan.frames + window.left_out for plan, window in zip(plans, windows, strict=True)]
    covered_s = sum(plan.seconds_per_frame * count for plan, count in zip(plans, known, strict=True))
    return WindowPlan(
        mode=WindowMode.MAP_REDUCE,
        pool=max(plan.pool for plan in plans),
        leaves_out_static=any(plan.leaves_out_static for plan in plans),
        calls=parts + 1,
        blocks=blocks,
        tokens=sum(plan.tokens for plan in plans),
        most_tokens=max(plan.most_tokens for plan in plans),
        frames=frames,
        seconds_per_frame=covered_s / sum(known),
        seconds_per_block=covered_s / blocks,
        prefill_flops=flops,
        reason=f"{len(plans):,} windows apart from each other, asked about in {parts:,} parts",
    )


def _distinct(units: Sequence[Unit]) -> list[int]:
    """Places of the units that do not have the tokens of the one right before them."""
    return [
        place for place, unit in enumerate(units) if place == 0 or unit.is_after_gap or unit.key != units[place - 1].key
    ]


def _averaged(units: Sequence[Unit], places: Sequence[int], pool: int) -> tuple[Run, ...]:
    runs: list[Run] = []
    run: list[int] = []
    for place in places:
        if run and (len(run) == pool or units[place].is_after_gap):
            runs.append(tuple(run))
            run = []
        run.append(place)
    return (*runs, tuple(run))


def _cut(units: Sequence[Unit], start_s: float, end_s: float, capacity: int) -> list[Stretch]:
    """Stretches of at most `capacity` blocks, cut where chunks meet; a chunk that is longer is cut anywhere.

    Of units that look alike the first of each stretch is shown, so a static hour is one short stretch.
    """
    is_new = [False] * len(units)
    for place in _distinct(units):
        is_new[place] = True
    pieces: list[list[int]] = [[]]  # places per stretch
    shown = 0  # blocks of the last one
    for first, last in _by_chunk(units):
        inside = sum(is_new[first:last])
        needs = inside + (0 if is_new[first] or shown else 1)
        if shown and shown + needs > capacity:
            pieces.append([])
            shown = 0
        for place in range(first, last):
            if is_new[place] or not shown:
                if shown == capacity:
                    pieces.append([])
                    shown = 0
                shown += 1
            pieces[-1].append(place)
    borders = [start_s, *(units[piece[0]].start_s for piece in pieces[1:]), end_s]
    return [
        Stretch(
            start_s=borders[number],
            end_s=borders[number + 1],
            blocks=tuple((place,) for place in piece if is_new[place] or place == piece[0]),
            chunks=_chunks(units, [tuple(piece)]),
        )
        for number, piece in enumerate(pieces)
    ]


def _by_chunk(units: Sequence[Unit]) -> list[tuple[int, int]]:
    """(first place, place after the last) of each chunk's units."""
    starts = [place for place, unit in enumerate(units) if place == 0 or unit.chunk != units[place - 1].chunk]
    return list(zip(starts, [*starts[1:], len(units)], strict=True))


def _chunks(units: Sequence[Unit], runs: Sequence[Run]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(units[place].chunk for run in runs for place in run))


def _planned(
    units: Sequence[Unit],
    stretches: Sequence[Stretch],
    pool: int,
    leaves_out: bool,
    missing_s: float,
    budget: Budget,
    shape: GroupShape,
    config: NvilaConfig,
) -> Planned:
    sizes = [len(stretch.blocks) * shape.positions + shape.around for stretch in stretches]
    shown = {place for stretch in stretches for run in stretch.blocks for place in run}
    frames = sum(units[place].frames for place in shown)
    left_out = sum(unit.frames for unit in units) - frames
    covered_s = max(0.0, stretches[-1].end_s - stretches[0].start_s - missing_s)
    blocks = sum(len(stretch.blocks) for stretch in stretches)
    is_map = len(stretches) > 1
    mode = WindowMode.MAP_REDUCE if is_map else WindowMode.FULL if pool == 1 else WindowMode.POOLED
    flops = sum(cost.prefill_flops(config, size + budget.text + (budget.part_text if is_map else 0)) for size in sizes)
    if is_map:
        flops += _closing_flops(config, budget, len(stretches))
    plan = WindowPlan(
        mode=mode,
        pool=pool,
        leaves_out_static=leaves_out,
        calls=len(stretches) + is_map,
        blocks=blocks,
        tokens=sum(sizes),
        most_tokens=max(sizes),
        frames=frames,
        seconds_per_frame=covered_s / (frames + left_out),
        seconds_per_block=covered_s / blocks,
        prefill_flops=flops,
        reason=_reason(mode, len(units), blocks, pool, leaves_out, budget, shape),
    )
    return Planned(plan=plan, stretches=tuple(stretches), left_out=left_out)


def _closing_flops(config: NvilaConfig, budget: Budget, parts: int) -> float:
    """Of the last call, over the answers of so many parts."""
    return cost.prefill_flops(config, budget.text + parts * budget.answer)


def _reason(
    mode: WindowMode, groups: int, blocks: int, pool: int, leaves_out: bool, budget: Budget, shape: GroupShape
) -> str:
    capacity = budget.capacity(shape, is_part=mode is WindowMode.MAP_REDUCE)
    limit = f"one call takes {capacity:,}, each {shape.positions:,} positions long"
    static = f"; {blocks:,} are shown, those that look like the one before are not" if leaves_out and pool == 1 else ""
    match mode:
        case WindowMode.FULL:
            return f"{groups:,} groups of frames, {limit}{static}"
        case WindowMode.POOLED:
            those = " that differ" if leaves_out else ""
            return f"{groups:,} groups of frames, {limit}: those{those} are averaged by {pool} into {blocks:,} blocks"
        case WindowMode.MAP_REDUCE:
            pooled = f" even averaged by {budget.most_pool}" if shape.can_pool and budget.most_pool > 1 else ""
            return f"{groups:,} groups of frames, {limit}{pooled}: the window is asked about in parts{static}"
