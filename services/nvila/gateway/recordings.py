"""What both faces do about recordings and jobs: check what was asked, and hand it to the stores.

Nothing here waits for work: whatever takes long is a job in the database, done by a worker (`nvila.recordings.app`).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from nvila.errors import Conflict, ForbiddenURL, InvalidRequest, LimitExceeded, NotFound, Unavailable
from nvila.gateway.files import StoredFile
from nvila.gateway.playing import Player, Stored
from nvila.gateway.push import ROOM_S
from nvila.recordings.asking import fingerprint, window_params
from nvila.recordings.cut import check_policy
from nvila.recordings.inbox import Inbox, Writer
from nvila.recordings.seal import SECRET, Seal
from nvila.recordings.store import Page, Quota, new_recording_id
from nvila.recordings.types import (
    ChunkPolicy,
    Job,
    JobEvent,
    JobKind,
    JobState,
    RecordedChunk,
    Recording,
    RecordingState,
    Segment,
    Source,
    SourceKind,
)
from nvila.recordings.window import NOT_SAMPLED
from nvila.types import Gap, MediaKind, RecordingWindow

ASKED_KINDS = (JobKind.ASK, JobKind.SUMMARY, JobKind.TIMELINE, JobKind.WHEN, JobKind.WATCH)
"""What a client may submit; the other kinds come of what it does to recordings."""
NEVER_SHOWN = frozenset({SECRET})
"""Params that go in and never come out."""

_SCHEMES = {
    SourceKind.URL: ("http", "https", "s3", "gs", "az", "abfs"),
    SourceKind.HLS: ("http", "https"),
    SourceKind.RTSP: ("rtsp", "rtsps"),
}
_WITH_CREDENTIALS = ("http", "https", "rtsp", "rtsps")
_LONGEST_URL = 2048
_LONGEST_NAME = 256
_MOST_METADATA = 16
_LONGEST_METADATA = 512
_KEY = re.compile(r"[!-~]{1,255}")
_CHUNKS_AT_ONCE = 1000
_LATEST_S = 1e10
"""Beyond the year 2286 milliseconds were meant; windows end there, too."""


class Shelf(Protocol):
    """What is asked of `recordings.store.RecordingStore`."""

    async def get(self, recording_id: str, *, tenant: str) -> Recording: ...
    async def list(
        self,
        *,
        tenant: str,
        limit: int = 100,
        cursor: str | None = None,
        state: RecordingState | None = None,
        kind: SourceKind | None = None,
    ) -> Page[Recording]: ...
    async def chunks(
        self,
        recording_id: str,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        after: int | None = None,
        limit: int | None = None,
    ) -> Sequence[RecordedChunk]: ...
    async def thumbnail(self, recording_id: str, number: int) -> bytes: ...
    async def segments(
        self,
        recording_id: str,
        *,
        start_s: float | None = None,
        end_s: float | None = None,
        after: int | None = None,
        limit: int | None = None,
    ) -> Sequence[Segment]: ...
    async def segment(self, recording_id: str, number: int) -> Segment: ...


class Jobs(Protocol):
    """What is asked of `recordings.jobs.JobStore`."""

    async def submit(
        self,
        *,
        tenant: str,
        kind: JobKind,
        params: Mapping[str, Any],
        fingerprint: str,
        idempotency_key: str | None = None,
        recording_id: str | None = None,
        recording: Recording | None = None,
        quota: Quota | None = None,
    ) -> Job: ...
    async def get(self, job_id: str, *, tenant: str) -> Job: ...
    async def list(
        self,
        *,
        tenant: str,
        limit: int = 100,
        cursor: str | None = None,
        kind: JobKind | None = None,
        state: JobState | None = None,
        recording_id: str | None = None,
    ) -> Page[Job]: ...
    async def cancel(self, job_id: str, *, tenant: str) -> Job: ...
    async def retry_dead(self, job_id: str, *, tenant: str) -> Job: ...
    async def delete_recording(self, recording_id: str, *, tenant: str) -> Job: ...
    async def events_after(
        self, job_id: str, number: int = 0, *, tenant: str, limit: int = 1000
    ) -> Sequence[JobEvent]: ...
    def follow(self, job_id: str, number: int = 0, *, tenant: str) -> AsyncGenerator[JobEvent, None]: ...


class Files(Protocol):
    """What is asked of `FileStore`."""

    async def get(self, tenant: str, file_id: str) -> StoredFile: ...
    def content_path(self, tenant: str, file_id: str) -> Path: ...


@dataclass(frozen=True, kw_only=True)
class NewRecording:
    """What a client says of a recording. `url` may hold user and password; they are taken out of it."""

    kind: SourceKind
    file_id: str | None = None
    url: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    name: str | None = None
    captured_at: float | None = None
    policy: ChunkPolicy = field(default_factory=ChunkPolicy)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a window of a recording stands on. `gaps`: without usable frames. `static`: near-identical to the frames
    before, not encoded again. Frames: sampled · of them static · not decodable (in groups without tokens)."""

    start_s: float
    end_s: float
    frames: int
    frames_static: int
    frames_lost: int
    chunks: int
    gaps: tuple[Gap, ...]
    static: tuple[Stretch, ...]


class Recordings:
    def __init__(
        self,
        *,
        shelf: Shelf,
        jobs: Jobs,
        files: Files,
        inbox: Inbox,
        player: Player,
        quota: Quota | None = None,
        seal: Seal | None = None,
    ) -> None:
        self.shelf = shelf
        self.jobs = jobs
        self.inbox = inbox
        self._files = files
        self.player = player
        self._quota = quota or Quota()
        self._seal = seal or Seal()

    async def add(self, tenant: str, new: NewRecording, idempotency_key: str | None = None) -> Recording:
        """The recording, durable, and a job that ingests it. Raises `InvalidRequest`, `NotFound` (its file),
        `ForbiddenURL`, `LimitExceeded` or `Overloaded` (quota)."""
        source, name = await self._source(tenant, new)
        check_policy(new.policy)
        _check_metadata(new.metadata)
        if new.captured_at is not None and not 0 <= new.captured_at <= _LATEST_S:
            raise InvalidRequest(
                f"captured_at: {new.captured_at:g} given, must be seconds since 1970, at most {_LATEST_S:g}",
                param="captured_at",
            )
        if source.secret is not None:
            source = replace(source, secret=self._seal.close(source.secret))
        recording = Recording(
            id=new_recording_id(),
            tenant=tenant,
            name=_plain(new.name or name),
            source=source,
            policy=new.policy,
            state=RecordingState.WAITING,
            created_at=time.time(),
            captured_at=new.captured_at,
            metadata=dict(new.metadata),
        )
        asked = {
            "source": {**asdict(source), "secret": source.secret is not None},
            "name": recording.name,
            "policy": asdict(new.policy),
            "captured_at": new.captured_at,
            "metadata": recording.metadata,
        }
        job = await self.jobs.submit(
            tenant=tenant,
            kind=JobKind.INGEST,
            params={},
            fingerprint=fingerprint(JobKind.INGEST, asked, ""),
            idempotency_key=_idempotency_key(idempotency_key),
            recording=recording,
            quota=self._quota,
        )
        assert job.recording_id is not None, "it came with the recording"
        if job.recording_id == recording.id:
            return recording
        there = await self.get(tenant, job.recording_id)
        self._check_same_secret(there.source.secret, source.secret)
        return there

    async def get(self, tenant: str, recording_id: str) -> Recording:
        return await self.shelf.get(recording_id, tenant=tenant)

    async def ask(
        self,
        tenant: str,
        kind: JobKind,
        recording_id: str,
        window: RecordingWindow,
        params: Mapping[str, Any],
        idempotency_key: str | None = None,
    ) -> Job:
        """Submit a job about a window. Params are checked as far as they can be now; the rest its worker refuses."""
        if kind not in ASKED_KINDS:
            raise InvalidRequest(f"kind: {kind} given, must be one of {', '.join(ASKED_KINDS)}", param="kind")
        check_window(window)
        _check_numbers(params)
        recording = await self.get(tenant, recording_id)
        _check_reach(window, recording)
        whole = {**params, **window_params(window)}
        if isinstance(whole.get(SECRET), str):
            whole[SECRET] = self._seal.close(whole[SECRET])
        if kind in (JobKind.ASK, JobKind.WHEN, JobKind.WATCH) and not str(whole.get("question") or "").strip():
            raise InvalidRequest(f"question: missing; a job of kind {kind} needs one", param="params.question")
        job = await self.jobs.submit(
            tenant=tenant,
            kind=kind,
            params=whole,
            fingerprint=fingerprint(kind, whole, recording_id),
            idempotency_key=_idempotency_key(idempotency_key),
            recording_id=recording_id,
            quota=self._quota,
        )
        self._check_same_secret(job.params.get(SECRET), whole.get(SECRET))
        return job

    async def chunks(
        self,
        tenant: str,
        recording_id: str,
        *,
        start_s: float | None,
        end_s: float | None,
        after: int | None,
        limit: int,
    ) -> Sequence[RecordedChunk]:
        """Those that reach into a window, in order. `after`: only greater numbers."""
        check_window(RecordingWindow(recording_id=recording_id, start_s=start_s, end_s=end_s))
        await self.get(tenant, recording_id)
        return await self.shelf.chunks(recording_id, start_s=start_s, end_s=end_s, after=after, limit=limit)

    async def segments(
        self,
        tenant: str,
        recording_id: str,
        *,
        start_s: float | None,
        end_s: float | None,
        after: int | None,
        limit: int,
    ) -> Sequence[Segment]:
        """Those that reach into a window, in order. `after`: only greater numbers."""
        check_window(RecordingWindow(recording_id=recording_id, start_s=start_s, end_s=end_s))
        await self.get(tenant, recording_id)
        return await self.shelf.segments(recording_id, start_s=start_s, end_s=end_s, after=after, limit=limit)

    async def coverage(self, tenant: str, recording_id: str, start_s: float | None, end_s: float | None) -> Seen:
        """Gaps and static stretches of a window, and the frames in it; neighbours are joined, what lies between
        chunks is a gap, and a frame that several chunks have counts once. Reads every chunk of the window, a thousand
        at a time."""
        check_window(RecordingWindow(recording_id=recording_id, start_s=start_s, end_s=end_s))
        recording = await self.get(tenant, recording_id)
        start = start_s or 0.0
        end = max(start, recording.ingested_s if end_s is None else min(end_s, recording.ingested_s))
        gaps: list[Gap] = []
        static: list[Stretch] = []
        frames = still = lost = count = 0
        reach_s = start
        counted_s: set[float] = set()
        after: int | None = None
        while True:
            chunks = await self.shelf.chunks(
                recording_id, start_s=start_s, end_s=end_s, after=after, limit=_CHUNKS_AT_ONCE
            )
            for chunk in chunks:
                count += 1
                for gap in (Gap(start_s=reach_s, end_s=chunk.start_s, reason=NOT_SAMPLED), *chunk.gaps):
                    _join_gap(gaps, gap, start, end)
                reach_s = max(reach_s, chunk.end_s)
                # A chunk's first frame may have come on show before it begins, after the instant before.
                before_s = {at_s for at_s in counted_s if at_s > chunk.start_s - 1 / recording.policy.fps}
                counted_s = set(before_s)
                for group in chunk.groups:
                    times_s = [at_s for at_s in _inside(group.times_s, start, end_s) if at_s not in before_s]
                    counted_s.update(times_s)
                    frames += len(times_s)
                    lost += len(times_s) if group.ref is None else 0
                    if group.is_static and times_s:
                        still += len(times_s)
                        _join(static, Stretch(start_s=times_s[0], end_s=times_s[-1]), recording.policy)
            if len(chunks) < _CHUNKS_AT_ONCE:
                break
            after = chunks[-1].number
        _join_gap(gaps, Gap(start_s=reach_s, end_s=end, reason=NOT_SAMPLED), start, end)
        return Seen(
            start_s=start,
            end_s=end,
            frames=frames,
            frames_static=still,
            frames_lost=lost,
            chunks=count,
            gaps=tuple(gaps),
            static=tuple(static),
        )

    async def media(self, tenant: str, recording_id: str, segment: int | None) -> Path | Stored:
        """What a player can open: a kept segment, or the uploaded file while none is kept yet. Raises `NotFound` when
        there is none."""
        recording = await self.get(tenant, recording_id)
        try:
            return await self.player.open(await self.shelf.segment(recording_id, segment or 0))
        except NotFound:
            if recording.source.file_id is None or segment:
                raise NotFound("this recording keeps no file that could be played", param="recording_id") from None
        await self._files.get(tenant, recording.source.file_id)
        return self._files.content_path(tenant, recording.source.file_id)

    @asynccontextmanager
    async def pushing(self, tenant: str, recording_id: str) -> AsyncIterator[Writer]:
        """Where frames that a client pushes go. Raises `Conflict` for a recording that takes none, and `NotFound`, also
        when it was deleted meanwhile: then nothing is left behind."""
        await self._check_pushable(tenant, recording_id)
        try:
            with self.inbox.writing(recording_id) as writer:
                await self._check_pushable(tenant, recording_id)  # a deletion removes the folder that is there now
                yield writer
        except FileNotFoundError:  # a deletion has removed it
            await self._check_pushable(tenant, recording_id)
            raise Unavailable("the folder of what is pushed to this recording is gone") from None
        finally:
            with suppress(Unavailable):
                await self._remove_if_deleted(tenant, recording_id)

    async def room(self, tenant: str, recording_id: str) -> None:
        """Until the next piece may be taken on. Raises `Overloaded` when that takes too long, and what `pushing` does
        when the recording takes no more; a database that is away stops nobody."""
        with suppress(Unavailable):
            await self._check_pushable(tenant, recording_id)
        await self.inbox.wait_for_room(recording_id, ROOM_S)

    async def _check_pushable(self, tenant: str, recording_id: str) -> None:
        recording = await self.get(tenant, recording_id)
        if recording.source.kind is not SourceKind.PUSH:
            raise Conflict(f"this recording's source is {recording.source.kind}; only one of kind push takes frames")
        if recording.state in (RecordingState.COMPLETE, RecordingState.FAILED):
            raise Conflict(f"this recording is {recording.state}; nothing can be pushed to it any more")

    async def _remove_if_deleted(self, tenant: str, recording_id: str) -> None:
        """What was added while its deletion removed what there was."""
        try:
            await self.get(tenant, recording_id)
        except NotFound:
            await asyncio.to_thread(self.inbox.remove, recording_id)

    def _check_same_secret(self, kept: Any, given: Any) -> None:
        """Of a request and of what its idempotency key stands for, sealed: a fingerprint leaves secrets out, because it
        would be a way to guess them. Raises `Conflict`."""
        opened = [self._seal.open(one) if isinstance(one, str) else None for one in (kept, given)]
        if opened[0] != opened[1]:
            raise Conflict("the idempotency key was used with another secret", param="Idempotency-Key")

    async def _source(self, tenant: str, new: NewRecording) -> tuple[Source, str]:
        """And a name for it."""
        given = {"file_id": new.file_id, "url": new.url, "username": new.username, "password": new.password}
        allowed = {SourceKind.FILE: {"file_id"}, SourceKind.PUSH: set()}.get(new.kind, set(given) - {"file_id"})
        for name, value in given.items():
            if value is not None and name not in allowed:
                raise InvalidRequest(f"source.{name}: a source of kind {new.kind} has none", param=f"source.{name}")
        if new.kind is SourceKind.PUSH:
            return Source(kind=new.kind), "pushed"
        if new.kind is SourceKind.FILE:
            if new.file_id is None:
                raise InvalidRequest("source.file_id: missing", param="source.file_id")
            file = await self._files.get(tenant, new.file_id)
            if file.kind is not MediaKind.VIDEO:
                raise InvalidRequest("source.file_id: this file is an image, not a video", param="source.file_id")
            return Source(kind=new.kind, file_id=file.id), file.filename
        return _address(new)


def kept(recordings: Recordings | None) -> Recordings:
    """Raises `NotFound` where no recordings are kept."""
    if recordings is None:
        raise NotFound("recordings are not enabled on this gateway")
    return recordings


def check_window(window: RecordingWindow, param: str = "window") -> None:
    """Raises `InvalidRequest` for bounds that are negative, reversed, or on both clocks."""
    on_own = (window.start_s, window.end_s)
    by_capture = (window.start_at, window.end_at)
    if any(bound is not None for bound in on_own) and any(bound is not None for bound in by_capture):
        raise InvalidRequest(
            f"{param}: give start_s and end_s, or start_at and end_at, not some of both", param=f"{param}.start_at"
        )
    for names, (start, end) in ((("start_s", "end_s"), on_own), (("start_at", "end_at"), by_capture)):
        for name, bound in zip(names, (start, end), strict=True):
            if bound is not None and bound < 0:
                raise InvalidRequest(f"{param}.{name}: {bound:g} given, must not be negative", param=f"{param}.{name}")
        if start is not None and end is not None and end <= start:
            raise InvalidRequest(
                f"{param}.{names[1]}: {end:g} given, must be above {names[0]}, {start:g}", param=f"{param}.{names[1]}"
            )


def static_of(chunk: RecordedChunk) -> list[Stretch]:
    """Where a chunk's frames look like those before them."""
    return [
        Stretch(start_s=group.times_s[0], end_s=group.times_s[-1])
        for group in chunk.groups
        if group.is_static and group.times_s
    ]


def progress_of(recording: Recording) -> float | None:
    """From 0 to 1; None while the length is not known."""
    if recording.state is RecordingState.COMPLETE:
        return 1.0
    if recording.source.kind.is_live or not recording.duration_s:
        return None
    return min(1.0, recording.ingested_s / recording.duration_s)


def shown_params(job: Job) -> dict[str, Any]:
    return {name: value for name, value in job.params.items() if name not in NEVER_SHOWN}


def _check_numbers(params: Mapping[str, Any]) -> None:
    """What is read as infinity, such as 1e999, is no number that a job could keep."""
    try:
        json.dumps(dict(params), allow_nan=False)
    except ValueError:
        raise InvalidRequest("params: a number in it is too large", param="params") from None


def _check_reach(window: RecordingWindow, recording: Recording) -> None:
    """A window that lies wholly behind a finished recording's end can never be answered."""
    if recording.state is RecordingState.COMPLETE and window.start_s is not None:
        longest = max(recording.ingested_s, recording.duration_s or 0.0)
        if window.start_s >= longest:
            raise InvalidRequest(
                f"window.start_s: {window.start_s:g} given, this recording is {longest:g} s long",
                param="window.start_s",
            )


def _join_gap(gaps: list[Gap], gap: Gap, start_s: float, end_s: float) -> None:
    """What of it lies in the window."""
    gap = replace(gap, start_s=max(gap.start_s, start_s), end_s=min(gap.end_s, end_s))
    if gap.end_s <= gap.start_s + 1e-6:
        return
    if gaps and gaps[-1].reason == gap.reason and gap.start_s <= gaps[-1].end_s + 1e-6:
        gaps[-1] = replace(gaps[-1], end_s=max(gaps[-1].end_s, gap.end_s))
    else:
        gaps.append(gap)


def _inside(times_s: Sequence[float], start_s: float, end_s: float | None) -> Sequence[float]:
    if not times_s or (times_s[0] >= start_s and (end_s is None or times_s[-1] < end_s)):
        return times_s
    return [at_s for at_s in times_s if at_s >= start_s and (end_s is None or at_s < end_s)]


def _join(stretches: list[Stretch], stretch: Stretch, policy: ChunkPolicy) -> None:
    """Two groups are neighbours when no sample lies between them."""
    if stretches and stretch.start_s <= stretches[-1].end_s + 1.5 / policy.fps:
        stretches[-1] = replace(stretches[-1], end_s=max(stretches[-1].end_s, stretch.end_s))
    else:
        stretches.append(stretch)


def _address(new: NewRecording) -> tuple[Source, str]:
    schemes = _SCHEMES[new.kind]
    url = new.url or ""
    if not url:
        raise InvalidRequest("source.url: missing", param="source.url")
    if len(url) > _LONGEST_URL:
        raise LimitExceeded.of("characters of source.url", asked=len(url), limit=_LONGEST_URL, param="source.url")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InvalidRequest("source.url: not an address", param="source.url") from None
    if parts.scheme not in schemes:
        given = parts.scheme[:16] or "none"
        raise ForbiddenURL(f"source.url: scheme {given} given, must be one of {', '.join(schemes)}", param="source.url")
    if not host or any(char.isspace() or ord(char) < 32 for char in url):
        raise InvalidRequest("source.url: not an address", param="source.url")
    shown = f"[{host}]" if ":" in host else host
    bare = urlunsplit(parts._replace(netloc=shown if port is None else f"{shown}:{port}", fragment=""))
    user = new.username if new.username is not None else unquote(parts.username or "")
    password = new.password if new.password is not None else unquote(parts.password or "")
    secret = f"{user}:{password}" if user or password else None
    if secret is not None and parts.scheme not in _WITH_CREDENTIALS:
        raise InvalidRequest(
            f"source: user and password given for {parts.scheme}://, which is read with the service's own credentials",
            param="source.username",
        )
    return Source(kind=new.kind, url=bare, secret=secret), f"{host}{parts.path}".rstrip("/")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > _MOST_METADATA:
        raise LimitExceeded.of("metadata entries", asked=len(metadata), limit=_MOST_METADATA, param="metadata")
    for name, value in metadata.items():
        if len(name) > 64 or len(value) > _LONGEST_METADATA:
            raise LimitExceeded.of(
                "characters of a metadata value", asked=len(value), limit=_LONGEST_METADATA, param="metadata"
            )


def _idempotency_key(given: str | None) -> str | None:
    if given is not None and not _KEY.fullmatch(given):
        raise InvalidRequest("Idempotency-Key: must be 1 to 255 printable ASCII characters", param="Idempotency-Key")
    return given


def _plain(name: str) -> str:
    """Without invisible characters, not too long."""
    return "".join(char for char in name if char.isprintable()).strip()[:_LONGEST_NAME] or "recording"
