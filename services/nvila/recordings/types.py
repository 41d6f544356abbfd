"""What a recording is, and what a job is. NumPy-free and small: the gateway, the workers and the store import this.

Clocks. A *capture time* is seconds since 1970 (UTC). A recording's own clock starts at 0 with its first frame; all
`_s` here are on it unless said otherwise, and `Recording.captured_at` + `_s` is the capture time. On a live recording
the clock runs with the world's: a stretch without frames is a gap, never a jump.

Cutting. A *segment* is a file that holds part of the source as it came (an uploaded file is one segment; a camera
makes one after the other). A *chunk* is a stretch of time of `ChunkPolicy.chunk_s`: what a summary speaks of, and what
an answer is mapped over. A *group* is `temporal_group` sampled frames of a chunk: what the vision service is asked to
encode at a time, and what one pooled block of visual tokens stands for. A group that looks like the one before it is
not encoded again: it has the same tokens (`is_static`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from nvila.types import Gap, TokensRef


class SourceKind(StrEnum):
    FILE = "file"
    """An uploaded file of `/v1/files`."""
    URL = "url"
    """http(s), or an address that fsspec opens (s3://…)."""
    RTSP = "rtsp"
    HLS = "hls"
    PUSH = "push"
    """Frames or encoded segments that a client sends."""

    @property
    def is_live(self) -> bool:
        return self in (SourceKind.RTSP, SourceKind.HLS, SourceKind.PUSH)


class RecordingState(StrEnum):
    WAITING = "waiting"
    """Accepted; no worker has begun, or a camera has not shown a frame yet."""
    INGESTING = "ingesting"
    """A file or URL is being cut and encoded."""
    LIVE = "live"
    """Frames arrive from a camera or a client."""
    INTERRUPTED = "interrupted"
    """The camera is away; a worker tries again with growing pauses."""
    COMPLETE = "complete"
    FAILED = "failed"
    """`error` says why. What was ingested before can be asked about."""
    DELETING = "deleting"
    """No longer shown; its data are being removed."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a recording comes from: `file_id` for FILE, `url` (without credentials) for URL, RTSP and HLS.

    `secret`: user:password of a camera or store, sealed (`seal.py`), never shown, logged or exported.
    """

    kind: SourceKind
    url: str | None = None
    file_id: str | None = None
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class ChunkPolicy:
    """How a source is cut. `fps`: sampled frames per second. `chunk_s`: a chunk's length; `stride_s`: from one chunk's
    start to the next one's (shorter than `chunk_s`: chunks overlap; longer: unseen time between them; None: neither).

    `gate`: near-identical frames are not encoded again; `floor_s`: but at least one group in so many seconds is.
    """

    fps: float = 1.0
    chunk_s: float = 32.0
    stride_s: float | None = None
    gate: bool = True
    floor_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Of a recording so far. Frames: sampled from the source · encoded by the tower in this recording · found static
    and not encoded · reused because the cache or the cold store had the same pixels · dropped under back-pressure ·
    corrupt. `bytes_cold`: of tokens in the cold store. `reconnects`: of a live source."""

    frames_sampled: int = 0
    frames_encoded: int = 0
    frames_static: int = 0
    frames_reused: int = 0
    frames_dropped: int = 0
    frames_corrupt: int = 0
    chunks: int = 0
    bytes_cold: int = 0
    reconnects: int = 0


@dataclass(frozen=True, kw_only=True)
class Recording:
    """`id`: "rec_" and 32 hex digits. `captured_at`: capture time of the first frame; None when nobody knows.
    `duration_s`: how far the source reaches, None until known. `ingested_s`: how far it is cut and encoded.
    `digest`: BLAKE3 of the file's bytes (hex) once known: what makes a second pass encode nothing."""

    id: str
    tenant: str
    name: str
    source: Source
    policy: ChunkPolicy
    state: RecordingState
    created_at: float
    captured_at: float | None = None
    duration_s: float | None = None
    ingested_s: float = 0.0
    counters: Counters = field(default_factory=Counters)
    error_code: str = ""
    error: str = ""
    digest: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A file with part of the source as it came. `path`: relative to the recordings folder, or empty when the file is
    not kept. `start_s`: the recording's clock at the file's first frame.

    `source_number`: what a live source calls it, if it numbers its pieces; `source_until`: capture time of its end, if
    the source says so. There a worker that takes over goes on."""

    recording_id: str
    number: int
    path: str
    start_s: float
    duration_s: float
    size_bytes: int
    digest: str
    source_number: int | None = None
    source_until: float | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """`temporal_group` sampled frames, or fewer at the end. `times_s`: of each. `segment`, `indices`: where the frames
    are, so that lost tokens can be made again. `ref`: their tokens, or those of the last encoded group when
    `is_static`; None when no frame could be decoded. `named_for`: the model that `ref` is a name for (`Model.name`),
    one for all groups of a chunk; empty when nobody noted it."""

    times_s: tuple[float, ...]
    segment: int
    indices: tuple[int, ...]
    ref: TokensRef | None
    is_static: bool = False
    named_for: str = ""


@dataclass(frozen=True, kw_only=True)
class RecordedChunk:
    """`number` counts from 0 without holes. `vector`: the chunk's embedding (float32, little endian, unit length) or
    empty. `thumbnail`: JPEG bytes or empty."""

    recording_id: str
    number: int
    start_s: float
    end_s: float
    groups: tuple[Group, ...]
    gaps: tuple[Gap, ...] = ()
    vector: bytes = b""
    thumbnail: bytes = b""


class JobKind(StrEnum):
    INGEST = "ingest"
    DELETE = "delete"
    ASK = "ask"
    """A question over a window, too long for one model call or for one HTTP request."""
    SUMMARY = "summary"
    TIMELINE = "timeline"
    WHEN = "when"
    WATCH = "watch"
    """A standing question on a recording; each true answer calls a webhook."""
    DELIVER = "deliver"
    """One webhook call."""


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """Dead: it failed for good, or as often as it may. `error` says why; it can be requeued."""
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class Job:
    """`id`: "job_" and 32 hex digits, the same over all attempts. `fingerprint`: BLAKE3 (hex) of what it was asked and
    of what it stands on: a checkpoint of another input is never used. `params`, `result`, `progress`: JSON objects.
    `fence`: grows with each lease; a write with an older one is refused. `not_before`, `created_at`, `finished_at`:
    seconds since 1970."""

    id: str
    tenant: str
    kind: JobKind
    recording_id: str | None
    params: Mapping[str, Any]
    fingerprint: str
    state: JobState
    attempt: int
    max_attempts: int
    fence: int
    created_at: float
    not_before: float
    finished_at: float | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    error_code: str = ""
    error: str = ""
    cancel_asked: bool = False


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """What a job said, for streams: `number` counts from 1 within the job without holes, so a client that was cut off
    asks for what came after the last it saw. `kind`: progress, chunk, delta, done, failed, cancelled, …"""

    job_id: str
    number: int
    kind: str
    data: Mapping[str, Any]
    at: float
