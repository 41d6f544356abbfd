"""One question about each chunk of a window, each answer kept: what summaries, timelines and when-questions begin with.

A chunk whose frames all look like those of the chunk before it is not asked about again: what was said of that holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from nvila.recordings.asking import Piece, Steps, together

Say = Callable[[Piece], Awaitable[Mapping[str, Any]]]
"""What is to be said of a chunk, as a JSON object."""


async def say_of_each(
    steps: Steps,
    pieces: Sequence[Piece],
    say: Say,
    *,
    holds: Collection[str],
    at_once: int,
    done: int = 0,
    of: int | None = None,
) -> list[Mapping[str, Any]]:
    """For each chunk in order: its number, times and gaps, and what `say` gives. Each is a checkpoint and an event of
    kind "chunk". Chunks without frames have only their gaps; `is_unchanged` ones those fields that `holds` names of
    what was said of the chunk before.

    `done`, `of`: progress of the whole job.
    """
    turns = asyncio.Semaphore(at_once)
    total = of if of is not None else len(pieces)

    told: list[asyncio.Future[Mapping[str, Any]]] = [asyncio.get_running_loop().create_future() for _ in pieces]
    finished = done

    def progress() -> Mapping[str, Any]:
        return {"done": finished + 1, "of": total}

    async def one(place: int) -> Mapping[str, Any]:
        nonlocal finished
        piece = pieces[place]

        async def work() -> Mapping[str, Any]:
            if not piece.has_frames:
                return piece.told()
            if piece.is_unchanged and place > 0:
                before = await told[place - 1]
                kept = {name: value for name, value in before.items() if name in holds}
                return {**piece.told(), **kept, "is_unchanged": True}
            return {**piece.told(), **await say(piece)}

        # A turn lasts until its result is kept. They are taken in order, so one that waits for the chunk before it
        # never keeps that from its turn.
        async with turns:
            said = await steps.once(f"chunk/{piece.number}", work, event="chunk", progress=progress)
        finished += 1
        told[place].set_result(said)
        return said

    return await together(one(place) for place in range(len(pieces)))
