"""Files of footage whose time is over, and recordings that are deleted: what goes, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from nvila.recordings.claims import Claim
from nvila.recordings.cold import ColdStore
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import Segment

_SWEEP_AT_ONCE = 500


async def forget_footage(shelf: RecordingStore, cold: ColdStore, segment: Segment) -> None:
    """Remove a segment's file; its row stays and says so."""
    await cold.forget_segment(segment.path)
    await shelf.forget_path(segment)


async def sweep_footage(shelf: RecordingStore, cold: ColdStore, ended_before: float) -> int:
    """Remove footage that ended before this time (seconds since 1970), of live recordings that are over: those that
    run look after their own. Returns how many files went."""
    gone = 0
    while segments := await shelf.old_footage(ended_before, limit=_SWEEP_AT_ONCE):
        for segment in segments:
            await forget_footage(shelf, cold, segment)
        gone += len(segments)
    return gone


class DeleteHandler:
    """Removes what a deleted recording has left: tokens that no other recording stands on, footage, rows. Each step may
    be repeated; a deletion that was cut off goes on."""

    def __init__(self, cold: ColdStore, remove_pushed: Callable[[str], None]) -> None:
        self._cold = cold
        self._remove_pushed = remove_pushed

    async def __call__(self, claim: Claim) -> Mapping[str, Any]:
        recording_id = claim.job.recording_id
        assert recording_id is not None, "a deletion has a recording"
        freed = 0
        while True:
            async with claim.transaction() as now:  # whoever comes to stand on these records waits for its end
                keys = await now.drop_keys()
                if keys is None:
                    break
                freed += await self._cold.drop(keys)
        await self._cold.forget_segments(recording_id)
        await asyncio.to_thread(self._remove_pushed, recording_id)
        while True:
            async with claim.transaction() as now:
                if not await now.remove_chunks():
                    await now.remove_recording()
                    break
        return {"bytes_freed": freed}
