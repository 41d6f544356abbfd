"""Recordings, chunks and a clock for tests."""

from __future__ import annotations

from dataclasses import replace

from nvila.recordings.claims import Claim
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import new_recording_id
from nvila.recordings.types import (
    ChunkPolicy,
    Group,
    Job,
    JobKind,
    RecordedChunk,
    Recording,
    RecordingState,
    Source,
    SourceKind,
)
from nvila.types import Gap, Level, TokensRef


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def recording(tenant: str = "acme", kind: SourceKind = SourceKind.FILE, created_at: float = 0.0) -> Recording:
    return Recording(
        id=new_recording_id(),
        tenant=tenant,
        name="yard",
        source=Source(kind=kind, file_id="file-1") if kind is SourceKind.FILE else Source(kind=kind, url="rtsp://yard"),
        policy=ChunkPolicy(chunk_s=10),
        state=RecordingState.WAITING,
        created_at=created_at,
    )


def chunk(recording_id: str, number: int, *, key: str | None = None) -> RecordedChunk:
    """Ten seconds, in one group of two frames."""
    ref = TokensRef(key=key or f"key-{number}", levels=(Level(1, 4),))
    start_s = number * 10.0
    return RecordedChunk(
        recording_id=recording_id,
        number=number,
        start_s=start_s,
        end_s=start_s + 10,
        groups=(Group(times_s=(start_s, start_s + 1), segment=0, indices=(number, number + 1), ref=ref),),
        gaps=(Gap(start_s=start_s + 8, end_s=start_s + 10, reason="camera away"),) if number % 2 else (),
        vector=bytes([number % 256] * 8),
        thumbnail=b"\xff\xd8" + bytes([number % 256]),
    )


def bare(chunk: RecordedChunk) -> RecordedChunk:
    """As a list of chunks shows it."""
    return replace(chunk, vector=b"", thumbnail=b"")


async def submit(jobs: JobStore, *, tenant: str = "acme", kind: JobKind = JobKind.ASK, **more: object) -> Job:
    given = {"params": {}, "fingerprint": "f", **more}
    return await jobs.submit(tenant=tenant, kind=kind, **given)  # type: ignore[arg-type]  # what a test says


async def claim(jobs: JobStore, worker: str = "worker-1", *kinds: JobKind, lease_s: float = 30) -> Claim:
    claimed = await jobs.claim(worker, kinds or tuple(JobKind), lease_s)
    assert claimed is not None
    return claimed
