"""The handler of ingest: what a worker does with a recording's job.

A file is kept once (a second name for an upload's bytes on the same disk), probed, and taken in chunk by chunk from
where the chunks in the database end; while a service that it needs is away it waits by itself, so the attempt ends and
another one goes on. A live source is taken in as it comes (`live.py`). An attempt is for one model: when another one is
served by now, what waits is given back, and the next attempt goes on for that one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import Any

from nvila.errors import InvalidRequest, NotFound, Overloaded
from nvila.recordings import cut
from nvila.recordings.chunks import NO_FOOTAGE, ChunkIngest, OpenSegment
from nvila.recordings.claims import Claim, LeaseLost
from nvila.recordings.cut import PlannedChunk
from nvila.recordings.encode import Model
from nvila.recordings.ingest_services import IngestServices
from nvila.recordings.live import Live, LiveIngest, LiveLoad
from nvila.recordings.sources import FileSources
from nvila.recordings.types import Recording, RecordingState, Segment
from nvila.types import Deadline, MediaKind

AWAY = "the source was away"

_FULL_PAUSE_S = 15.0


class IngestHandler:
    """Takes in the recordings of one worker, each by a call."""

    def __init__(self, services: IngestServices, files: FileSources, live: Live) -> None:
        self._services = services
        self._files = files
        self._live = live
        self.load = LiveLoad(services.limits.capacity)

    async def __call__(self, claim: Claim) -> Mapping[str, Any]:
        """Until the recording is complete; a camera's never is. What is wrong with the source itself fails the
        recording, everything else is for another attempt."""
        assert claim.job.recording_id is not None, "an ingest job has a recording"
        recording = await self._services.shelf.get(claim.job.recording_id, tenant=claim.job.tenant)
        try:
            cut.check_policy(recording.policy)
            model = Model.of(await self._services.models.describe())
            ingest = ChunkIngest(
                recording=recording,
                claim=claim,
                model=model,
                frames=self._services.frames,
                encoder=self._services.encoder,
                metrics=self._services.metrics,
                limits=self._services.limits,
                gap_reason=AWAY if recording.source.kind.is_live else NO_FOOTAGE,
            )
            if recording.source.kind.is_live:
                await self._admit(recording, claim)
                await LiveIngest(self._services, self._live, self.load, ingest).run()
            else:
                await self._take_file(ingest)
        except (InvalidRequest, NotFound) as error:
            await claim.update_recording(state=RecordingState.FAILED, error_code=error.code, error=error.message)
            raise
        done = await self._services.shelf.get(recording.id, tenant=recording.tenant)
        return {"duration_s": done.duration_s, "counters": asdict(done.counters), "seconds": asdict(ingest.seconds)}

    async def _admit(self, recording: Recording, claim: Claim) -> None:
        """Give a live source back, for another worker or a better moment, when this one has no room for it."""
        refusal = self.load.refusal()
        if refusal:
            await claim.update_recording(error_code=Overloaded.code, error=f"waiting for room: {refusal}")
            await claim.put_off(_FULL_PAUSE_S)
            raise LeaseLost("given back: this worker has no room for another live source")
        self.load.measured(recording.id, 0.0, 0.0)

    # -- a file

    async def _take_file(self, ingest: ChunkIngest) -> None:
        recording, claim = ingest.recording, ingest.claim
        segments = await self._services.shelf.segments(recording.id)
        segment = segments[0] if segments else await self._keep_file(recording, claim)
        async with self._services.cold.open(segment.path) as path:
            info = await self._services.frames.probe(
                path, MediaKind.VIDEO, Deadline.after(self._services.limits.probe_timeout_s)
            )
            ingest.segments[0] = OpenSegment(path=path, start_s=0.0, info=info)
            duration_s = cut.whole_us(info.duration_s)
            await claim.update_recording(state=RecordingState.INGESTING, duration_s=duration_s)
            first = await self._services.go_on(ingest)
            await ingest.run(_chunks_of_file(ingest, first, duration_s))
        await claim.update_recording(state=RecordingState.COMPLETE, ingested_s=duration_s)

    async def _keep_file(self, recording: Recording, claim: Claim) -> Segment:
        deadline = Deadline.after(self._services.limits.fetch_timeout_s)
        async with self._files.open(recording.source, recording.tenant, deadline) as media:
            info = await self._services.frames.probe(
                media.path, MediaKind.VIDEO, Deadline.after(self._services.limits.probe_timeout_s)
            )
            digest = media.digest.hex()  # an address may give an attempt after this one other bytes
            segment = Segment(
                recording_id=recording.id,
                number=0,
                path=await self._services.cold.keep(media.path, recording.id, f"0-{digest[:16]}"),
                start_s=0.0,
                duration_s=cut.whole_us(info.duration_s),
                size_bytes=media.size_bytes,
                digest=digest,
            )
        async with claim.transaction() as now:
            await now.add_segment(segment)
            await now.update_recording(digest=segment.digest)
        return segment


async def _chunks_of_file(ingest: ChunkIngest, first: int, duration_s: float) -> AsyncIterator[PlannedChunk]:
    policy, footage = ingest.recording.policy, [ingest.segments[0].footage(0)]
    for number in range(first, cut.chunk_count(policy, duration_s)):
        yield cut.plan_chunk(policy, number, footage, ingest.model.group, duration_s)
