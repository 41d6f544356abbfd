"""A worker as a process of its own, to be killed: `python -m tests.recordings.working URL NAME`.

Its ingest writes `params["chunks"]` chunks, from where the attempt before came to; its summary is made of checkpoints.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from typing import Any

from nvila.recordings.claims import Claim
from nvila.recordings.database import Database
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import Counters, JobKind, RecordingState
from nvila.recordings.worker import Pool, Worker, WorkerLimits
from nvila.telemetry.metrics import Metrics
from tests.recordings import made

LIMITS = WorkerLimits(
    pools=(Pool((JobKind.INGEST, JobKind.SUMMARY), 2, None),),
    lease_s=1,
    look_s=0.1,
    poll_s=0.05,
    drain_s=0,
    first_pause_s=0.1,
)


async def main(url: str, name: str) -> None:
    database = Database.open(url)
    await database.migrate()
    shelf = RecordingStore(database)

    async def ingest(claim: Claim) -> Mapping[str, Any]:
        recording_id, count = claim.job.recording_id, claim.job.params["chunks"]
        assert recording_id is not None
        last = await shelf.last_chunk(recording_id)
        for number in range(0 if last is None else last.number + 1, count):
            async with claim.transaction() as now:
                await now.add_chunk(made.chunk(recording_id, number), Counters(chunks=1, frames_sampled=2))
                await now.update_recording(ingested_s=(number + 1) * 10.0)
                await now.event("chunk", {"number": number})
        await claim.update_recording(state=RecordingState.COMPLETE)
        return {"chunks": count}

    async def summary(claim: Claim) -> Mapping[str, Any]:
        done = dict(await claim.checkpoints())
        for number in range(claim.job.params["steps"]):
            step = f"map/{number}"
            if step not in done:
                done[step] = {"text": f"part {number}"}
                async with claim.transaction() as now:
                    await now.checkpoint(step, done[step])
                    await now.event("part", {"number": number})
        return {"text": " ".join(done[f"map/{n}"]["text"] for n in range(claim.job.params["steps"]))}

    worker = Worker(name, JobStore(database), {JobKind.INGEST: ingest, JobKind.SUMMARY: summary}, LIMITS, Metrics())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.end)
    await worker.run()
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
