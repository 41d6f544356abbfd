"""What the taking in of files and of live sources share: the services they work with, and where an attempt goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from nvila.errors import InvalidMedia, NotFound
from nvila.recordings.chunks import ChunkIngest, IngestLimits, MetricSink, last_encoded
from nvila.recordings.claims import LeaseLost
from nvila.recordings.cold import ColdStore
from nvila.recordings.encode import Frames, GroupEncoder, Model, Models
from nvila.recordings.store import RecordingStore
from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class IngestServices:
    """What the taking in of any recording works with. `clock`: seconds since 1970."""

    shelf: RecordingStore
    cold: ColdStore
    frames: Frames
    encoder: GroupEncoder
    models: Models
    metrics: MetricSink
    limits: IngestLimits
    clock: Callable[[], float] = time.time

    async def give_back_for_another_model(self, ingest: ChunkIngest) -> None:
        """Raises `LeaseLost` when the model that this attempt encodes for is not the one that is served; the job waits
        for its next attempt. Raises `Unavailable` when nobody says what is served."""
        if Model.of(await self.models.describe()) == ingest.model:
            return
        await ingest.claim.release()
        raise LeaseLost("given back: another model is served by now")

    async def go_on(self, ingest: ChunkIngest) -> int:
        """Number of the first chunk that is not written; the gate is where it was after the last one."""
        last = await self.shelf.last_chunk(ingest.recording.id)
        if last is None:
            return 0
        group = await last_encoded(self.shelf, ingest.recording, last.number + 1)
        if group is not None and ingest.recording.policy.gate:
            segment = await self.shelf.segment(ingest.recording.id, group.segment)
            try:
                if not segment.path:
                    raise NotFound("it is not kept any more")
                async with self.cold.open(segment.path) as path:
                    await ingest.go_on_from(group, path, self.cold)
            except (NotFound, InvalidMedia):
                _log.info("the last encoded group's footage is gone", extra=fields(recording=ingest.recording.id))
        return last.number + 1
