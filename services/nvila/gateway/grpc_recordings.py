"""The gRPC face of recordings and jobs: `nvila.api.v1.RecordingService`. Protobuf objects stop here."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio

from nvila.api.v1 import recordings_pb2 as pb
from nvila.api.v1.recordings_pb2_grpc import RecordingServiceServicer
from nvila.errors import InvalidRequest, LimitExceeded
from nvila.gateway import push
from nvila.gateway.admission import Admission
from nvila.gateway.auth import ApiKeys
from nvila.gateway.grpc_call import answering
from nvila.gateway.parse import read_json
from nvila.gateway.recordings import NewRecording, Recordings, kept, progress_of, shown_params
from nvila.recordings.types import ChunkPolicy, Job, JobKind, JobState, Recording, RecordingState, SourceKind
from nvila.types import Gap, RecordingWindow

SERVICE: str = pb.DESCRIPTOR.services_by_name["RecordingService"].full_name

_DEFAULT_LIMIT = 100
_MOST_LIMIT = 1000
_LONGEST_PARAMS = 64 << 10

Context: TypeAlias = grpc.aio.ServicerContext


class RecordingService(RecordingServiceServicer):
    """`streams`: permits of calls that last as long as the client likes."""

    def __init__(self, recordings: Recordings | None, keys: ApiKeys, streams: Admission) -> None:
        """`recordings`: None where none are kept."""
        self._recorded = recordings
        self._keys = keys
        self._streams = streams

    @property
    def _recordings(self) -> Recordings:
        """Raises `NotFound` where none are kept."""
        return kept(self._recorded)

    # -- recordings

    async def CreateRecording(self, request: pb.CreateRecordingRequest, context: Context) -> pb.CreateRecordingResponse:
        async with answering(context, self._keys, SERVICE, "CreateRecording") as tenant:
            new = _new_recording(request)
            made = await self._recordings.add(tenant, new, request.idempotency_key or None)
            return pb.CreateRecordingResponse(recording=_recording(made))

    async def GetRecording(self, request: pb.GetRecordingRequest, context: Context) -> pb.GetRecordingResponse:
        async with answering(context, self._keys, SERVICE, "GetRecording") as tenant:
            found = await self._recordings.get(tenant, request.id)
            return pb.GetRecordingResponse(recording=_recording(found))

    async def ListRecordings(self, request: pb.ListRecordingsRequest, context: Context) -> pb.ListRecordingsResponse:
        async with answering(context, self._keys, SERVICE, "ListRecordings") as tenant:
            page = await self._recordings.shelf.list(
                tenant=tenant,
                limit=_limit(request.limit),
                cursor=request.cursor or None,
                state=_one_of(RecordingState, request.state, "state") if request.state else None,
            )
            found = [_recording(one) for one in page.items]
            return pb.ListRecordingsResponse(recordings=found, next_cursor=page.next_cursor or "")

    async def DeleteRecording(self, request: pb.DeleteRecordingRequest, context: Context) -> pb.DeleteRecordingResponse:
        async with answering(context, self._keys, SERVICE, "DeleteRecording") as tenant:
            job = await self._recordings.jobs.delete_recording(request.id, tenant=tenant)
            return pb.DeleteRecordingResponse(job_id=job.id)

    async def GetRecordingCoverage(
        self, request: pb.GetRecordingCoverageRequest, context: Context
    ) -> pb.GetRecordingCoverageResponse:
        async with answering(context, self._keys, SERVICE, "GetRecordingCoverage") as tenant:
            start_s, end_s = _bound(request, "start_s"), _bound(request, "end_s")
            seen = await self._recordings.coverage(tenant, request.id, start_s, end_s)
            return pb.GetRecordingCoverageResponse(
                start_s=seen.start_s,
                end_s=seen.end_s,
                frames=seen.frames,
                frames_static=seen.frames_static,
                frames_lost=seen.frames_lost,
                chunks=seen.chunks,
                gaps=[_gap(gap) for gap in seen.gaps],
                static=[pb.Interval(start_s=one.start_s, end_s=one.end_s) for one in seen.static],
            )

    async def ListChunks(self, request: pb.ListChunksRequest, context: Context) -> pb.ListChunksResponse:
        async with answering(context, self._keys, SERVICE, "ListChunks") as tenant:
            limit = _limit(request.limit)
            chunks = await self._recordings.chunks(
                tenant,
                request.recording_id,
                start_s=_bound(request, "start_s"),
                end_s=_bound(request, "end_s"),
                after=request.after if request.HasField("after") else None,
                limit=limit + 1,
            )
            found = [
                pb.RecordingChunk(
                    number=chunk.number,
                    start_s=chunk.start_s,
                    end_s=chunk.end_s,
                    frames=sum(len(group.times_s) for group in chunk.groups),
                    frames_static=sum(len(group.times_s) for group in chunk.groups if group.is_static),
                    gaps=[_gap(gap) for gap in chunk.gaps],
                )
                for chunk in chunks[:limit]
            ]
            return pb.ListChunksResponse(chunks=found, has_more=len(chunks) > limit)

    async def Push(self, requests: AsyncIterator[pb.PushRequest], context: Context) -> pb.PushResponse:
        async with answering(context, self._keys, SERVICE, "Push") as tenant, self._streams.permit():
            incoming = aiter(requests)
            first = await anext(incoming, None)
            if first is None or first.WhichOneof("part") != "start":
                raise InvalidRequest("start: the first message must say what is pushed", param="start")
            start = first.start
            recordings = self._recordings
            async with recordings.pushing(tenant, start.recording_id) as writer:
                cutter = push.cutter(start.content_type, writer, _bound(start, "captured_at"))
                done = await push.receive(_data(incoming), cutter, lambda: recordings.room(tenant, start.recording_id))
                if start.end:
                    writer.end()
            return pb.PushResponse(bytes=done.bytes, pieces=done.pieces, last_captured_at=done.last_captured_at)

    # -- jobs

    async def CreateJob(self, request: pb.CreateJobRequest, context: Context) -> pb.CreateJobResponse:
        async with answering(context, self._keys, SERVICE, "CreateJob") as tenant:
            window = RecordingWindow(
                recording_id=request.recording_id,
                **{name: _bound(request.window, name) for name in ("start_s", "end_s", "start_at", "end_at")},
            )
            job = await self._recordings.ask(
                tenant,
                _one_of(JobKind, request.kind, "kind"),
                request.recording_id,
                window,
                _params(request.params_json),
                request.idempotency_key or None,
            )
            return pb.CreateJobResponse(job=_job(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        async with answering(context, self._keys, SERVICE, "GetJob") as tenant:
            job = await self._recordings.jobs.get(request.id, tenant=tenant)
            return pb.GetJobResponse(job=_job(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        async with answering(context, self._keys, SERVICE, "ListJobs") as tenant:
            page = await self._recordings.jobs.list(
                tenant=tenant,
                limit=_limit(request.limit),
                cursor=request.cursor or None,
                kind=_one_of(JobKind, request.kind, "kind") if request.kind else None,
                state=_one_of(JobState, request.state, "state") if request.state else None,
                recording_id=request.recording_id or None,
            )
            return pb.ListJobsResponse(jobs=[_job(job) for job in page.items], next_cursor=page.next_cursor or "")

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        async with answering(context, self._keys, SERVICE, "CancelJob") as tenant:
            job = await self._recordings.jobs.cancel(request.id, tenant=tenant)
            return pb.CancelJobResponse(job=_job(job))

    async def RetryJob(self, request: pb.RetryJobRequest, context: Context) -> pb.RetryJobResponse:
        async with answering(context, self._keys, SERVICE, "RetryJob") as tenant:
            job = await self._recordings.jobs.retry_dead(request.id, tenant=tenant)
            return pb.RetryJobResponse(job=_job(job))

    async def FollowJob(self, request: pb.FollowJobRequest, context: Context) -> None:
        """Not a generator: a cancelled one would be closed only when it is collected."""
        async with answering(context, self._keys, SERVICE, "FollowJob") as tenant, self._streams.permit():
            events = self._recordings.jobs.follow(request.id, request.after_event, tenant=tenant)
            try:
                async for event in events:
                    data = json.dumps(dict(event.data))
                    await context.write(
                        pb.FollowJobResponse(number=event.number, kind=event.kind, data_json=data, at=event.at)
                    )
            finally:
                await events.aclose()


# -- from protobuf


def _new_recording(request: pb.CreateRecordingRequest) -> NewRecording:
    source, given = request.source, request.policy
    policy = {name.name: value for name, value in given.ListFields()}
    return NewRecording(
        kind=_one_of(SourceKind, source.type, "source.type"),
        file_id=source.file_id or None,
        url=source.url or None,
        username=source.username or None,
        password=source.password or None,
        name=request.name or None,
        captured_at=_bound(request, "captured_at"),
        policy=ChunkPolicy(**policy),
        metadata=dict(request.metadata),
    )


def _one_of(kinds: Any, given: str, param: str) -> Any:
    try:
        return kinds(given)
    except ValueError:
        raise InvalidRequest(f"{param}: {given[:64]!r} given, must be one of {', '.join(kinds)}", param=param) from None


def _bound(message: Any, name: str) -> float | None:
    if not message.HasField(name):
        return None
    value = float(getattr(message, name))
    if value != value or value in (float("inf"), float("-inf")):
        raise InvalidRequest(f"{name}: {value} given, must be a number of seconds", param=name)
    return value


def _limit(given: int) -> int:
    if given > _MOST_LIMIT:
        raise LimitExceeded.of("limit", asked=given, limit=_MOST_LIMIT, param="limit")
    return given or _DEFAULT_LIMIT


def _params(given: str) -> dict[str, Any]:
    if len(given) > _LONGEST_PARAMS:
        raise LimitExceeded.of(
            "characters of params_json", asked=len(given), limit=_LONGEST_PARAMS, param="params_json"
        )
    params = read_json(given, "params_json", "params_json") if given else {}
    if not isinstance(params, dict):
        raise InvalidRequest("params_json: must be a JSON object", param="params_json")
    return params


async def _data(requests: AsyncIterator[pb.PushRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "data":
            raise InvalidRequest("data: all messages after the first must hold data", param="data")
        yield request.data


# -- to protobuf


def _recording(one: Recording) -> pb.Recording:
    policy = {name: value for name, value in vars(one.policy).items() if value is not None}
    return pb.Recording(
        id=one.id,
        name=one.name,
        created_at=one.created_at,
        source=pb.Source(type=one.source.kind, file_id=one.source.file_id or "", url=one.source.url or ""),
        policy=pb.ChunkPolicy(**policy),
        state=one.state,
        progress=progress_of(one),
        captured_at=one.captured_at,
        duration_s=one.duration_s,
        ingested_s=one.ingested_s,
        counters=pb.Counters(**vars(one.counters)),
        error=pb.Failure(code=one.error_code, message=one.error) if one.error_code else None,
        metadata=dict(one.metadata),
    )


def _job(job: Job) -> pb.Job:
    return pb.Job(
        id=job.id,
        kind=job.kind,
        recording_id=job.recording_id or "",
        state=job.state,
        params_json=json.dumps(shown_params(job)),
        progress_json=json.dumps(dict(job.progress)),
        result_json="" if job.result is None else json.dumps(dict(job.result)),
        error=pb.Failure(code=job.error_code, message=job.error) if job.error_code else None,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        created_at=job.created_at,
        finished_at=job.finished_at,
        cancel_asked=job.cancel_asked,
    )


def _gap(gap: Gap) -> pb.Interval:
    return pb.Interval(start_s=gap.start_s, end_s=gap.end_s, reason=gap.reason)
