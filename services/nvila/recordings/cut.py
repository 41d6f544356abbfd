"""How time is cut: chunks of a recording, the instants at which it is sampled, and groups of those. Pure arithmetic.

Instants are counted off for the whole recording, at 0, 1/fps, 2/fps … on its clock, and belong to every chunk in whose
stretch [start, end) they lie: to one where chunks touch, to several where they overlap, to none between chunks that
leave time unseen. A group is `temporal_group` instants of one chunk in order, the last of a chunk maybe fewer; so no
group crosses a chunk's border, and where the stride is a whole number of groups, overlapping chunks share theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nvila.errors import InvalidRequest, LimitExceeded
from nvila.recordings.types import ChunkPolicy
from nvila.types import Gap

_SLACK_S = 1e-6
"""Instants come from a division and borders from a product: closer than this they are equal."""

_RANGES = {"fps": (0.01, 30.0), "chunk_s": (1.0, 3600.0), "stride_s": (1.0, 7200.0), "floor_s": (1.0, 86400.0)}
_MOST_CHUNK_FRAMES = 4096


def check_policy(policy: ChunkPolicy) -> None:
    """Refuse a policy that means nothing or whose chunks no worker should hold, when it comes and when it is used."""
    for name, (least, most) in _RANGES.items():
        value = getattr(policy, name)
        if value is not None and not least <= value <= most:
            raise InvalidRequest(
                f"policy.{name}: {value:g} given, must be from {least:g} to {most:g}", param=f"policy.{name}"
            )
    frames = policy.chunk_s * policy.fps
    if frames < 1:
        raise InvalidRequest(
            f"a chunk of {policy.chunk_s:g} s at {policy.fps:g} frames per second holds less than one frame",
            param="policy.chunk_s",
        )
    if frames > _MOST_CHUNK_FRAMES:
        raise LimitExceeded.of("frames in a chunk", asked=frames, limit=_MOST_CHUNK_FRAMES, param="policy.chunk_s")
    if stride_s(policy) * policy.fps < 1:
        raise InvalidRequest(
            f"a stride of {stride_s(policy):g} s is shorter than the {1 / policy.fps:g} s between two frames",
            param="policy.stride_s",
        )


def stride_s(policy: ChunkPolicy) -> float:
    """From one chunk's start to the next one's."""
    return policy.chunk_s if policy.stride_s is None else policy.stride_s


def chunk_span(policy: ChunkPolicy, number: int) -> tuple[float, float]:
    """Start and end of a chunk on the recording's clock; the end of a recording may come before that of its last."""
    start_s = number * stride_s(policy)
    return start_s, start_s + policy.chunk_s


def chunk_count(policy: ChunkPolicy, duration_s: float) -> int:
    """How many chunks a recording of this length has: each that begins before its end and adds an instant of its own.

    Where chunks overlap, one that would hold only what the chunk before it holds already is none.
    """
    last = last_instant(policy, duration_s)
    if last < 0:
        return 0
    number = math.floor(last / policy.fps / stride_s(policy)) + 1
    while number > 0 and max(_instants(policy, number)[0], _instants(policy, number - 1)[1]) > last:
        number -= 1
    return number + 1


def whole_us(time_s: float) -> float:
    """A time in whole microseconds: what is written, so that arithmetic leaves no tails behind."""
    return round(time_s, 6)


def last_instant(policy: ChunkPolicy, duration_s: float) -> int:
    """Number of the last instant before `duration_s`; -1 when there is none."""
    return math.ceil((duration_s - _SLACK_S) * policy.fps) - 1


def chunk_times(policy: ChunkPolicy, number: int, duration_s: float = math.inf) -> tuple[float, ...]:
    """The instants of a chunk, seconds on the recording's clock, those before `duration_s`."""
    first, end = _instants(policy, number)
    if math.isfinite(duration_s):
        end = min(end, last_instant(policy, duration_s) + 1)
    return tuple(instant / policy.fps for instant in range(first, end))


def cut_groups(count: int, group: int) -> tuple[slice, ...]:
    """Which of a chunk's `count` instants make each group."""
    return tuple(slice(at, min(at + group, count)) for at in range(0, count, group))


@dataclass(frozen=True, kw_only=True, eq=False)
class Footage:
    """A segment's frames on the recording's clock. `times_s`: presentation time of every frame, ascending. `end_s`: how
    long the last one is on show. `holes`: stretches (from, to) that the file should hold and does not."""

    segment: int
    start_s: float
    end_s: float
    times_s: NDArray[np.float64]
    holes: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlannedGroup:
    """Frames to be decoded together: for each instant its frame. `is_still`: the frame was on show at the instant
    before already, so that the picture's own time says less than the instant."""

    segment: int
    instants_s: tuple[float, ...]
    indices: tuple[int, ...]
    is_still: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedChunk:
    """A chunk before it is decoded. `missing_s`: its instants for which there is no footage; `lost_s`: those for which
    there was some, which could not be kept. `is_left_out`: it is not to be decoded at all, since ingest fell behind."""

    number: int
    start_s: float
    end_s: float
    groups: tuple[PlannedGroup, ...]
    missing_s: tuple[float, ...]
    lost_s: tuple[float, ...] = ()
    is_left_out: bool = False


def plan_chunk(
    policy: ChunkPolicy, number: int, footage: Sequence[Footage], group: int, duration_s: float = math.inf
) -> PlannedChunk:
    """Which frames a chunk is made of. footage: all segments that reach into the chunk, in order. duration_s: the
    recording's length when it is known. A group lies in one segment."""
    start_s, end_s = chunk_span(policy, number)
    instants_s = chunk_times(policy, number, duration_s)
    groups: list[PlannedGroup] = []
    missing_s = set(instants_s)
    for film in footage:
        found = frames_on_show(instants_s, film.times_s, film.end_s, film.holes)
        before = frames_on_show([time_s - 1 / policy.fps for time_s in instants_s], film.times_s, film.end_s)
        shown = [
            (time_s, index, index == last)
            for time_s, index, last in zip(instants_s, found, before, strict=True)
            if index >= 0 and time_s in missing_s
        ]
        missing_s -= {time_s for time_s, _, _ in shown}
        for part in cut_groups(len(shown), group):
            times_s, indices, is_still = zip(*shown[part], strict=True)
            groups.append(PlannedGroup(segment=film.segment, instants_s=times_s, indices=indices, is_still=is_still))
    return PlannedChunk(
        number=number,
        start_s=start_s,
        end_s=min(end_s, duration_s),
        groups=tuple(groups),
        missing_s=tuple(sorted(missing_s)),
    )


def with_lost(planned: PlannedChunk, lost: Iterable[tuple[float, float]]) -> PlannedChunk:
    """The chunk, with its missing instants that lie in one of these stretches of the recording's clock told apart."""
    stretches = tuple(lost)
    lost_s = tuple(time_s for time_s in planned.missing_s if any(start <= time_s < end for start, end in stretches))
    return replace(
        planned, missing_s=tuple(time_s for time_s in planned.missing_s if time_s not in lost_s), lost_s=lost_s
    )


def frames_on_show(
    instants_s: Sequence[float], times_s: NDArray[np.float64], end_s: float, holes: Iterable[tuple[float, float]] = ()
) -> tuple[int, ...]:
    """For each instant the number of the frame on show; -1 before the first, from `end_s` on, and in a hole.

    All on one clock. times_s: presentation time of every frame, ascending. holes: stretches without frames.
    """
    at_s = np.asarray(instants_s, np.float64)
    shown = np.searchsorted(times_s, at_s + _SLACK_S, side="right") - 1
    shown[at_s + _SLACK_S >= end_s] = -1
    for start_s, stop_s in holes:
        shown[(at_s >= start_s - _SLACK_S) & (at_s < stop_s - _SLACK_S)] = -1
    return tuple(int(number) for number in shown)


def gaps_between(lost_s: Iterable[float], fps: float, end_s: float, reason: str) -> tuple[Gap, ...]:
    """Instants without a usable frame as stretches: each stands for the time until the next instant.

    end_s: where the chunk ends; a gap never reaches past it.
    """
    gaps: list[Gap] = []
    for time_s in sorted(lost_s):
        until_s = min(time_s + 1 / fps, end_s)
        if gaps and abs(gaps[-1].end_s - time_s) < _SLACK_S:
            gaps[-1] = Gap(start_s=gaps[-1].start_s, end_s=until_s, reason=reason)
        else:
            gaps.append(Gap(start_s=time_s, end_s=until_s, reason=reason))
    return tuple(gaps)


def _instants(policy: ChunkPolicy, number: int) -> tuple[int, int]:
    """Numbers [first, end) of a chunk's instants."""
    start_s, end_s = chunk_span(policy, number)
    return (
        max(0, math.ceil((start_s - _SLACK_S) * policy.fps)),
        max(0, math.ceil((end_s - _SLACK_S) * policy.fps)),
    )
