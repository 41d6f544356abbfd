"""`/v1/jobs`: long questions about recordings; submitted, followed as server-sent events, cancelled, exported."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from nvila.errors import InvalidRequest, NvilaError
from nvila.gateway.http_errors import note_code, to_object
from nvila.gateway.http_recordings import IdempotencyKey, ShownError
from nvila.gateway.http_services import Having, HttpSettings, Tenant
from nvila.gateway.recordings import Jobs, shown_params
from nvila.gateway.replies import HEARTBEAT
from nvila.recordings.types import Job, JobEvent, JobKind, JobState
from nvila.types import RecordingWindow

PATH = "/v1/jobs"

_LONGEST_STREAM_S = 3600.0
_NOT_RESULTS = frozenset({"progress", "queued", "running", "retry", *JobState})
_EVENTS_AT_ONCE = 1000
_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Bound = Annotated[float | None, Field(allow_inf_nan=False)]


class GivenWindow(BaseModel):
    """On the recording's own clock (`_s`, its first frame is 0) or by capture time (`_at`, seconds since 1970). What is
    left out: from the beginning; to as far as it is ingested."""

    model_config = ConfigDict(extra="forbid")

    start_s: Bound = None
    end_s: Bound = None
    start_at: Bound = None
    end_at: Bound = None


class GivenJob(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["ask", "summary", "timeline", "when", "watch"]
    recording: str
    window: GivenWindow = Field(default_factory=GivenWindow)
    params: dict[str, Any] = Field(
        default_factory=dict, description="Of the kind: `question` for ask, when and watch; see docs/recordings.md."
    )


class JobObject(BaseModel):
    """`attempt`: tries since it last got further; `result`: null until it is done."""

    id: str
    object: Literal["job"] = "job"
    kind: JobKind
    recording: str | None
    state: JobState
    params: dict[str, Any]
    progress: dict[str, Any]
    result: dict[str, Any] | None
    error: ShownError | None
    attempt: int
    max_attempts: int
    created_at: float
    finished_at: float | None
    cancel_asked: bool

    @classmethod
    def of(cls, job: Job) -> JobObject:
        return cls(
            id=job.id,
            kind=job.kind,
            recording=job.recording_id,
            state=job.state,
            params=shown_params(job),
            progress=dict(job.progress),
            result=None if job.result is None else dict(job.result),
            error=ShownError(code=job.error_code, message=job.error) if job.error_code else None,
            attempt=job.attempt,
            max_attempts=job.max_attempts,
            created_at=job.created_at,
            finished_at=job.finished_at,
            cancel_asked=job.cancel_asked,
        )


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    next_cursor: str | None = Field(description="For `cursor` of the next request.")


def add_jobs(app: FastAPI, settings: HttpSettings) -> None:
    _add_resource(app)
    _add_streams(app, settings)


def _add_resource(app: FastAPI) -> None:
    @app.post(PATH, tags=["jobs"], status_code=201)
    async def submit(
        given: GivenJob, services: Having, tenant: Tenant, idempotency_key: IdempotencyKey = None
    ) -> JobObject:
        """Ask about a recording's window, however long: a question, a summary, a timeline, when something happens, or
        a standing question on a live one."""
        window = RecordingWindow(recording_id=given.recording, **given.window.model_dump())
        kind = JobKind(given.kind)
        recordings = services.recordings
        return JobObject.of(await recordings.ask(tenant, kind, given.recording, window, given.params, idempotency_key))

    @app.get(PATH, tags=["jobs"])
    async def list_jobs(
        services: Having,
        tenant: Tenant,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        cursor: str | None = None,
        kind: JobKind | None = None,
        state: JobState | None = None,
        recording: str | None = None,
    ) -> JobList:
        """The jobs of this key's tenant, newest first, without their results: ask for one of them, or for its
        `/results`."""
        page = await services.recordings.jobs.list(
            tenant=tenant, limit=limit, cursor=cursor, kind=kind, state=state, recording_id=recording
        )
        data = [JobObject.of(job) for job in page.items]
        return JobList(
            data=data,
            has_more=page.next_cursor is not None,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            next_cursor=page.next_cursor,
        )

    @app.get(PATH + "/{job_id}", tags=["jobs"])
    async def get(job_id: str, services: Having, tenant: Tenant) -> JobObject:
        """One job."""
        return JobObject.of(await services.recordings.jobs.get(job_id, tenant=tenant))

    @app.post(PATH + "/{job_id}/cancel", tags=["jobs"])
    async def cancel(job_id: str, services: Having, tenant: Tenant) -> JobObject:
        """Stop a job. One that runs is over when its worker has stopped; one that is over stays as it is."""
        return JobObject.of(await services.recordings.jobs.cancel(job_id, tenant=tenant))

    @app.post(PATH + "/{job_id}/retry", tags=["jobs"])
    async def retry(job_id: str, services: Having, tenant: Tenant) -> JobObject:
        """Queue a failed or cancelled job again; it goes on after what it had done."""
        return JobObject.of(await services.recordings.jobs.retry_dead(job_id, tenant=tenant))


def _add_streams(app: FastAPI, settings: HttpSettings) -> None:
    @app.get(
        PATH + "/{job_id}/events",
        tags=["jobs"],
        response_class=StreamingResponse,
        responses={
            200: {"content": {"text/event-stream": {}}, "description": "Events with ids, until the job is over."},
            204: {"description": "The job is over and there is no event after that one."},
        },
    )
    async def events(
        job_id: str,
        request: Request,
        services: Having,
        tenant: Tenant,
        last_event_id: Annotated[str | None, Header(description="Of the last event seen.")] = None,
        after: Annotated[str | None, Query(description="The same, for those who cannot send the header.")] = None,
    ) -> Response:
        """What a job says, as it says it. A client that was cut off names the last event that it saw and misses
        nothing."""
        number = _event_number(after if after is not None else last_event_id)
        jobs = services.recordings.jobs
        job = await jobs.get(job_id, tenant=tenant)
        if job.state.is_over and not await jobs.events_after(job_id, number, tenant=tenant, limit=1):
            return Response(status_code=204)

        async def told() -> AsyncIterator[bytes]:
            try:
                async with services.streams.permit():
                    async for event in beating(jobs.follow(job_id, number, tenant=tenant), settings.heartbeat_s):
                        yield event_bytes(event) if event is not None else HEARTBEAT
            except NvilaError as error:
                note_code(request.scope, error.code)
                yield b"event: error\ndata: " + json.dumps(to_object(error)).encode() + b"\n\n"

        return StreamingResponse(told(), media_type="text/event-stream", headers=_STREAM_HEADERS)

    @app.get(
        PATH + "/{job_id}/results",
        tags=["jobs"],
        response_class=StreamingResponse,
        responses={200: {"content": {"application/jsonl": {}}, "description": "One JSON object per line."}},
    )
    async def results(job_id: str, request: Request, services: Having, tenant: Tenant) -> StreamingResponse:
        """What a job has found so far, as JSON lines: per chunk as it came, and the whole result last when it is
        done. A line of kind error says that what follows is missing."""
        jobs = services.recordings.jobs
        job = await jobs.get(job_id, tenant=tenant)
        lines = result_lines(jobs, job, partial(note_code, request.scope))
        return StreamingResponse(lines, media_type="application/jsonl", headers={"Cache-Control": "no-store"})


async def result_lines(jobs: Jobs, job: Job, note: Callable[[str], None]) -> AsyncIterator[bytes]:
    """What a job has found. `note`: is told the code of an error, which is the last line then."""
    number = 0
    try:
        while found := await jobs.events_after(job.id, number, tenant=job.tenant, limit=_EVENTS_AT_ONCE):
            number = found[-1].number
            for event in found:
                if event.kind not in _NOT_RESULTS:
                    yield _line({"event": event.number, "kind": event.kind, **event.data})
    except NvilaError as error:  # the job may be removed meanwhile
        note(error.code)
        yield _line({"kind": "error", **to_object(error)})
        return
    if job.result is not None:
        yield _line({"kind": "result", "job": job.id, "recording": job.recording_id, **job.result})


async def beating(events: AsyncGenerator[JobEvent, None], every_s: float) -> AsyncGenerator[JobEvent | None, None]:
    """The events, and None whenever there was none for `every_s`. Ends after an hour: the client comes again."""
    give_up_at = time.monotonic() + _LONGEST_STREAM_S
    coming: asyncio.Future[JobEvent] | None = None
    try:
        while time.monotonic() < give_up_at:
            coming = coming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({coming}, timeout=every_s)
            if not done:
                yield None
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield event
    finally:
        if coming is not None:
            coming.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, NvilaError):
                await coming
        await events.aclose()


def event_bytes(event: JobEvent) -> bytes:
    data = json.dumps(event.data, separators=(",", ":"))
    return f"id: {event.number}\nevent: {event.kind}\ndata: {data}\n\n".encode()


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _event_number(given: str | None) -> int:
    if not given:
        return 0
    if not (given.isascii() and given.isdecimal() and len(given) < 10):
        raise InvalidRequest(f"Last-Event-ID: {given[:64]!r} given, must be the id of an event", param="Last-Event-ID")
    return int(given)
