"""`/v1/recordings`: long videos and live sources. What is asked of them is a job (`http_jobs.py`)."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from nvila.gateway import push
from nvila.gateway.http_content import FileContent, stored_content
from nvila.gateway.http_services import Having, Tenant
from nvila.gateway.playing import HEAD_BYTES, Stored, media_type
from nvila.gateway.recordings import NewRecording, Seen, progress_of, static_of
from nvila.recordings.types import ChunkPolicy, RecordedChunk, Recording, RecordingState, SourceKind

PATH = "/v1/recordings"
FRAMES = "/frames"
"""How the one address ends whose body has no end."""

_LINK_S = 6 * 3600
_MEDIA_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "private, no-store",
    "Content-Security-Policy": "default-src 'none'; sandbox",
}

_FINITE = Field(allow_inf_nan=False)

Name = Annotated[str, Field(max_length=256)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[int, Field(ge=0, lt=2**31)]
"""Of a chunk or a segment, as the database counts them."""
IdempotencyKey = Annotated[
    str | None, Header(description="The same key gives what the first request with it made, instead of a second one.")
]


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GivenSource(_Given):
    type: SourceKind
    file_id: str | None = Field(None, description="Of type file: an uploaded one.")
    url: str | None = Field(
        None, description="Of type url (http, https, s3, gs, az), rtsp or hls. User and password in it are kept apart."
    )
    username: str | None = None
    password: str | None = None


class GivenPolicy(_Given):
    """How the source is cut and sampled."""

    fps: Annotated[float, _FINITE, Field(description="Sampled frames per second.")] = ChunkPolicy.fps
    chunk_s: Annotated[float, _FINITE, Field(description="Length of a chunk.")] = ChunkPolicy.chunk_s
    stride_s: Annotated[
        float | None,
        _FINITE,
        Field(
            description="From one chunk's start to the next one's. Shorter than `chunk_s`: they overlap; longer: time "
            "between them is not looked at."
        ),
    ] = None
    gate: Annotated[bool, Field(description="Near-identical frames are not encoded again.")] = ChunkPolicy.gate
    floor_s: Annotated[float, _FINITE, Field(description="But one group of frames in so many seconds is.")] = (
        ChunkPolicy.floor_s
    )


class GivenRecording(_Given):
    source: GivenSource
    name: Name | None = None
    captured_at: Seconds | None = Field(None, description="Capture time of the first frame, seconds since 1970.")
    policy: GivenPolicy = GivenPolicy()
    metadata: dict[str, str] = Field(default_factory=dict)

    def to_new(self) -> NewRecording:
        source = self.source
        return NewRecording(
            kind=source.type,
            file_id=source.file_id,
            url=source.url,
            username=source.username,
            password=source.password,
            name=self.name,
            captured_at=self.captured_at,
            policy=ChunkPolicy(**self.policy.model_dump()),
            metadata=self.metadata,
        )


class ShownSource(BaseModel):
    type: SourceKind
    file_id: str | None
    url: str | None
    is_live: bool


class ShownCounters(BaseModel):
    """Frames: sampled · encoded · found static, not encoded · reused from the cache · dropped · corrupt."""

    frames_sampled: int
    frames_encoded: int
    frames_static: int
    frames_reused: int
    frames_dropped: int
    frames_corrupt: int
    chunks: int
    bytes_cold: int
    reconnects: int


class ShownError(BaseModel):
    code: str
    message: str


class RecordingObject(BaseModel):
    id: str
    object: Literal["recording"] = "recording"
    name: str
    created_at: float
    source: ShownSource
    policy: GivenPolicy
    state: RecordingState
    progress: float | None = Field(description="From 0 to 1; null while the length is not known.")
    captured_at: float | None
    duration_s: float | None
    ingested_s: float = Field(description="How far it can be asked about.")
    counters: ShownCounters
    error: ShownError | None
    metadata: dict[str, str]

    @classmethod
    def of(cls, recording: Recording) -> RecordingObject:
        source, policy = recording.source, recording.policy
        return cls(
            id=recording.id,
            name=recording.name,
            created_at=recording.created_at,
            source=ShownSource(type=source.kind, file_id=source.file_id, url=source.url, is_live=source.kind.is_live),
            policy=GivenPolicy(**vars(policy)),
            state=recording.state,
            progress=progress_of(recording),
            captured_at=recording.captured_at,
            duration_s=recording.duration_s,
            ingested_s=recording.ingested_s,
            counters=ShownCounters(**vars(recording.counters)),
            error=ShownError(code=recording.error_code, message=recording.error) if recording.error_code else None,
            metadata=dict(recording.metadata),
        )


class RecordingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[RecordingObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    next_cursor: str | None = Field(description="For `cursor` of the next request.")


class DeletedRecording(BaseModel):
    """It is gone for every reader; `job` removes its data."""

    id: str
    object: Literal["recording"] = "recording"
    deleted: Literal[True] = True
    job: str


class Interval(BaseModel):
    start_s: float
    end_s: float


class GapInterval(Interval):
    reason: str


class RecordingCoverageObject(BaseModel):
    """What a window stands on. `static`: near-identical to the frames before, not encoded again."""

    object: Literal["recording.coverage"] = "recording.coverage"
    recording: str
    start_s: float
    end_s: float
    frames: int
    frames_static: int
    frames_lost: int
    chunks: int
    gaps: list[GapInterval]
    static: list[Interval]

    @classmethod
    def of(cls, recording_id: str, seen: Seen) -> RecordingCoverageObject:
        return cls(
            recording=recording_id,
            start_s=seen.start_s,
            end_s=seen.end_s,
            frames=seen.frames,
            frames_static=seen.frames_static,
            frames_lost=seen.frames_lost,
            chunks=seen.chunks,
            gaps=[GapInterval(**vars(gap)) for gap in seen.gaps],
            static=[Interval(**vars(stretch)) for stretch in seen.static],
        )


class ChunkObject(BaseModel):
    object: Literal["recording.chunk"] = "recording.chunk"
    number: int
    start_s: float
    end_s: float
    frames: int
    frames_static: int
    gaps: list[GapInterval]
    static: list[Interval]
    thumbnail: str = Field(description="Address of its picture, if it has one.")

    @classmethod
    def of(cls, chunk: RecordedChunk) -> ChunkObject:
        return cls(
            number=chunk.number,
            start_s=chunk.start_s,
            end_s=chunk.end_s,
            frames=sum(len(group.times_s) for group in chunk.groups),
            frames_static=sum(len(group.times_s) for group in chunk.groups if group.is_static),
            gaps=[GapInterval(**vars(gap)) for gap in chunk.gaps],
            static=[Interval(**vars(stretch)) for stretch in static_of(chunk)],
            thumbnail=f"{PATH}/{chunk.recording_id}/chunks/{chunk.number}/thumbnail",
        )


class ChunkList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ChunkObject]
    has_more: bool
    next_cursor: str | None = Field(description="For `cursor` of the next request.")


class SegmentObject(BaseModel):
    """A file of the recording's video, whose first frame is at `start_s` on the recording's clock."""

    object: Literal["recording.segment"] = "recording.segment"
    number: int
    start_s: float
    duration_s: float
    bytes: int


class SegmentList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SegmentObject]
    has_more: bool
    next_cursor: str | None = Field(description="For `cursor` of the next request.")


class MediaLink(BaseModel):
    """An address that plays without a key, for players that can send none."""

    object: Literal["recording.media_link"] = "recording.media_link"
    url: str
    expires_at: int


class Pushed(BaseModel):
    """What a push has brought so far. `last_captured_at`: of the last piece; null when nothing was whole."""

    object: Literal["recording.pushed"] = "recording.pushed"
    id: str
    bytes: int
    pieces: int
    last_captured_at: float | None
    ended: bool


def add_recordings(app: FastAPI) -> None:
    _add_resource(app)
    _add_contents(app)
    _add_push(app)


def _add_resource(app: FastAPI) -> None:
    @app.post(PATH, tags=["recordings"], status_code=201)
    async def create(
        given: GivenRecording, services: Having, tenant: Tenant, idempotency_key: IdempotencyKey = None
    ) -> RecordingObject:
        """Add a recording; a worker begins with it at once."""
        return RecordingObject.of(await services.recordings.add(tenant, given.to_new(), idempotency_key))

    @app.get(PATH, tags=["recordings"])
    async def list_recordings(
        services: Having,
        tenant: Tenant,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        cursor: str | None = None,
        state: RecordingState | None = None,
        source: SourceKind | None = None,
    ) -> RecordingList:
        """The recordings of this key's tenant, newest first."""
        page = await services.recordings.shelf.list(tenant=tenant, limit=limit, cursor=cursor, state=state, kind=source)
        data = [RecordingObject.of(recording) for recording in page.items]
        return RecordingList(
            data=data,
            has_more=page.next_cursor is not None,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            next_cursor=page.next_cursor,
        )

    @app.get(PATH + "/{recording_id}", tags=["recordings"])
    async def get(recording_id: str, services: Having, tenant: Tenant) -> RecordingObject:
        """One recording: its state, how far it is, and its counters."""
        return RecordingObject.of(await services.recordings.get(tenant, recording_id))

    @app.delete(PATH + "/{recording_id}", tags=["recordings"], status_code=202)
    async def delete(recording_id: str, services: Having, tenant: Tenant) -> DeletedRecording:
        """Forget a recording. It is gone at once; its data are removed behind. An uploaded file stays."""
        job = await services.recordings.jobs.delete_recording(recording_id, tenant=tenant)
        return DeletedRecording(id=recording_id, job=job.id)


def _add_contents(app: FastAPI) -> None:
    @app.get(PATH + "/{recording_id}/coverage", tags=["recordings"])
    async def coverage(
        recording_id: str,
        services: Having,
        tenant: Tenant,
        start_s: Seconds | None = None,
        end_s: Seconds | None = None,
    ) -> RecordingCoverageObject:
        """Gaps and static stretches of a window, and what stands on how many frames."""
        seen = await services.recordings.coverage(tenant, recording_id, start_s, end_s)
        return RecordingCoverageObject.of(recording_id, seen)

    @app.get(PATH + "/{recording_id}/chunks", tags=["recordings"])
    async def chunks(
        recording_id: str,
        services: Having,
        tenant: Tenant,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        cursor: Number | None = None,
        start_s: Seconds | None = None,
        end_s: Seconds | None = None,
    ) -> ChunkList:
        """Chunks that reach into the window, in order."""
        found = await services.recordings.chunks(
            tenant, recording_id, start_s=start_s, end_s=end_s, after=cursor, limit=limit + 1
        )
        has_more, found = len(found) > limit, found[:limit]
        return ChunkList(
            data=[ChunkObject.of(chunk) for chunk in found],
            has_more=has_more,
            next_cursor=str(found[-1].number) if has_more else None,
        )

    @app.get(
        PATH + "/{recording_id}/chunks/{number}/thumbnail",
        tags=["recordings"],
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}, "description": "A picture of the chunk."}},
    )
    async def thumbnail(recording_id: str, number: Number, services: Having, tenant: Tenant) -> Response:
        """A small picture of a chunk."""
        await services.recordings.get(tenant, recording_id)
        picture = await services.recordings.shelf.thumbnail(recording_id, number)
        headers = {**_MEDIA_HEADERS, "Cache-Control": "private, max-age=86400, immutable"}
        return Response(picture, media_type="image/jpeg", headers=headers)

    @app.get(PATH + "/{recording_id}/segments", tags=["recordings"])
    async def segments(
        recording_id: str,
        services: Having,
        tenant: Tenant,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        cursor: Number | None = None,
        start_s: Seconds | None = None,
        end_s: Seconds | None = None,
    ) -> SegmentList:
        """The files that hold the video, in order: a file's recording has one, a camera's many. Those of a camera are
        kept for a day or as long as the operator says; older ones are listed, and cannot be played."""
        found = await services.recordings.segments(
            tenant, recording_id, start_s=start_s, end_s=end_s, after=cursor, limit=limit + 1
        )
        has_more, found = len(found) > limit, found[:limit]
        return SegmentList(
            data=[
                SegmentObject(number=one.number, start_s=one.start_s, duration_s=one.duration_s, bytes=one.size_bytes)
                for one in found
            ],
            has_more=has_more,
            next_cursor=str(found[-1].number) if has_more else None,
        )

    @app.get(PATH + "/{recording_id}/media", tags=["recordings"], response_class=FileContent)
    async def media(
        recording_id: str,
        request: Request,
        services: Having,
        tenant: Tenant,
        segment: Number | None = None,
    ) -> Response:
        """The video of a segment (the first, unless told) where its file is kept, wherever that is. Ranges are
        understood. What browsers do not play is put into MP4, packets as they are."""
        found = await services.recordings.media(tenant, recording_id, segment)
        if isinstance(found, Stored):
            return stored_content(found, request.headers.get("range"), _MEDIA_HEADERS)
        with found.open("rb") as file:
            kind = media_type(file.read(HEAD_BYTES))
        return FileContent(found, media_type=kind, headers=_MEDIA_HEADERS)

    @app.post(PATH + "/{recording_id}/media_link", tags=["recordings"])
    async def media_link(
        recording_id: str, services: Having, tenant: Tenant, segment: Number | None = None
    ) -> MediaLink:
        """An address of the video that needs no key for six hours, for a browser's player."""
        await services.recordings.media(tenant, recording_id, segment)
        expires_at = int(time.time()) + _LINK_S
        path = f"{PATH}/{recording_id}/media"
        query = services.keys.sign(path, tenant, expires_at) + (f"&segment={segment}" if segment is not None else "")
        return MediaLink(url=f"{path}?{query}", expires_at=expires_at)


def _add_push(app: FastAPI) -> None:
    binary: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}

    @app.post(
        PATH + "/{recording_id}" + FRAMES,
        tags=["recordings"],
        openapi_extra={"requestBody": {"required": True, "content": dict.fromkeys(push.CUTTERS, binary)}},
    )
    async def frames(
        recording_id: str,
        request: Request,
        services: Having,
        tenant: Tenant,
        captured_at: Annotated[
            Seconds | None, Query(description="Capture time of the body's first frame; none: when it arrives.")
        ] = None,
        end: Annotated[bool, Query(description="Nothing follows this body: the recording is complete then.")] = False,
    ) -> Pushed:
        """Send video as it is made, for as long as you like: MPEG-TS or fragmented MP4 as an encoder writes them, or
        JPEG pictures, each after its capture time (float64, big endian) and its length (uint32, big endian). A client
        that is faster than ingestion is held back. What came before a broken connection is kept."""
        recordings = services.recordings
        async with services.streams.permit(), recordings.pushing(tenant, recording_id) as writer:
            cutter = push.cutter(request.headers.get("content-type", ""), writer, captured_at)
            done = await push.receive(request.stream(), cutter, lambda: recordings.room(tenant, recording_id))
            if end:
                writer.end()
        return Pushed(
            id=recording_id,
            bytes=done.bytes,
            pieces=done.pieces,
            last_captured_at=done.last_captured_at,
            ended=end,
        )
