from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Source(_message.Message):
    __slots__ = ("type", "file_id", "url", "username", "password")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    type: str
    file_id: str
    url: str
    username: str
    password: str
    def __init__(self, type: _Optional[str] = ..., file_id: _Optional[str] = ..., url: _Optional[str] = ..., username: _Optional[str] = ..., password: _Optional[str] = ...) -> None: ...

class ChunkPolicy(_message.Message):
    __slots__ = ("fps", "chunk_s", "stride_s", "gate", "floor_s")
    FPS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_S_FIELD_NUMBER: _ClassVar[int]
    STRIDE_S_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    FLOOR_S_FIELD_NUMBER: _ClassVar[int]
    fps: float
    chunk_s: float
    stride_s: float
    gate: bool
    floor_s: float
    def __init__(self, fps: _Optional[float] = ..., chunk_s: _Optional[float] = ..., stride_s: _Optional[float] = ..., gate: bool = ..., floor_s: _Optional[float] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("frames_sampled", "frames_encoded", "frames_static", "frames_reused", "frames_dropped", "frames_corrupt", "chunks", "bytes_cold", "reconnects")
    FRAMES_SAMPLED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_ENCODED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_STATIC_FIELD_NUMBER: _ClassVar[int]
    FRAMES_REUSED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_DROPPED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_COLD_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    frames_sampled: int
    frames_encoded: int
    frames_static: int
    frames_reused: int
    frames_dropped: int
    frames_corrupt: int
    chunks: int
    bytes_cold: int
    reconnects: int
    def __init__(self, frames_sampled: _Optional[int] = ..., frames_encoded: _Optional[int] = ..., frames_static: _Optional[int] = ..., frames_reused: _Optional[int] = ..., frames_dropped: _Optional[int] = ..., frames_corrupt: _Optional[int] = ..., chunks: _Optional[int] = ..., bytes_cold: _Optional[int] = ..., reconnects: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Recording(_message.Message):
    __slots__ = ("id", "name", "created_at", "source", "policy", "state", "progress", "captured_at", "duration_s", "ingested_s", "counters", "error", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_AT_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    INGESTED_S_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    created_at: float
    source: Source
    policy: ChunkPolicy
    state: str
    progress: float
    captured_at: float
    duration_s: float
    ingested_s: float
    counters: Counters
    error: Failure
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., created_at: _Optional[float] = ..., source: _Optional[_Union[Source, _Mapping]] = ..., policy: _Optional[_Union[ChunkPolicy, _Mapping]] = ..., state: _Optional[str] = ..., progress: _Optional[float] = ..., captured_at: _Optional[float] = ..., duration_s: _Optional[float] = ..., ingested_s: _Optional[float] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., error: _Optional[_Union[Failure, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class CreateRecordingRequest(_message.Message):
    __slots__ = ("source", "name", "captured_at", "policy", "metadata", "idempotency_key")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_AT_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    source: Source
    name: str
    captured_at: float
    policy: ChunkPolicy
    metadata: _containers.ScalarMap[str, str]
    idempotency_key: str
    def __init__(self, source: _Optional[_Union[Source, _Mapping]] = ..., name: _Optional[str] = ..., captured_at: _Optional[float] = ..., policy: _Optional[_Union[ChunkPolicy, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class CreateRecordingResponse(_message.Message):
    __slots__ = ("recording",)
    RECORDING_FIELD_NUMBER: _ClassVar[int]
    recording: Recording
    def __init__(self, recording: _Optional[_Union[Recording, _Mapping]] = ...) -> None: ...

class GetRecordingRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetRecordingResponse(_message.Message):
    __slots__ = ("recording",)
    RECORDING_FIELD_NUMBER: _ClassVar[int]
    recording: Recording
    def __init__(self, recording: _Optional[_Union[Recording, _Mapping]] = ...) -> None: ...

class ListRecordingsRequest(_message.Message):
    __slots__ = ("limit", "cursor", "state")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    limit: int
    cursor: str
    state: str
    def __init__(self, limit: _Optional[int] = ..., cursor: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class ListRecordingsResponse(_message.Message):
    __slots__ = ("recordings", "next_cursor")
    RECORDINGS_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    recordings: _containers.RepeatedCompositeFieldContainer[Recording]
    next_cursor: str
    def __init__(self, recordings: _Optional[_Iterable[_Union[Recording, _Mapping]]] = ..., next_cursor: _Optional[str] = ...) -> None: ...

class DeleteRecordingRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteRecordingResponse(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("start_s", "end_s", "start_at", "end_at")
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    START_AT_FIELD_NUMBER: _ClassVar[int]
    END_AT_FIELD_NUMBER: _ClassVar[int]
    start_s: float
    end_s: float
    start_at: float
    end_at: float
    def __init__(self, start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., start_at: _Optional[float] = ..., end_at: _Optional[float] = ...) -> None: ...

class Interval(_message.Message):
    __slots__ = ("start_s", "end_s", "reason")
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    start_s: float
    end_s: float
    reason: str
    def __init__(self, start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class GetRecordingCoverageRequest(_message.Message):
    __slots__ = ("id", "start_s", "end_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    start_s: float
    end_s: float
    def __init__(self, id: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ...) -> None: ...

class GetRecordingCoverageResponse(_message.Message):
    __slots__ = ("start_s", "end_s", "frames", "frames_static", "frames_lost", "chunks", "gaps", "static")
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_STATIC_FIELD_NUMBER: _ClassVar[int]
    FRAMES_LOST_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    STATIC_FIELD_NUMBER: _ClassVar[int]
    start_s: float
    end_s: float
    frames: int
    frames_static: int
    frames_lost: int
    chunks: int
    gaps: _containers.RepeatedCompositeFieldContainer[Interval]
    static: _containers.RepeatedCompositeFieldContainer[Interval]
    def __init__(self, start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., frames: _Optional[int] = ..., frames_static: _Optional[int] = ..., frames_lost: _Optional[int] = ..., chunks: _Optional[int] = ..., gaps: _Optional[_Iterable[_Union[Interval, _Mapping]]] = ..., static: _Optional[_Iterable[_Union[Interval, _Mapping]]] = ...) -> None: ...

class RecordingChunk(_message.Message):
    __slots__ = ("number", "start_s", "end_s", "frames", "frames_static", "gaps")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_STATIC_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    number: int
    start_s: float
    end_s: float
    frames: int
    frames_static: int
    gaps: _containers.RepeatedCompositeFieldContainer[Interval]
    def __init__(self, number: _Optional[int] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., frames: _Optional[int] = ..., frames_static: _Optional[int] = ..., gaps: _Optional[_Iterable[_Union[Interval, _Mapping]]] = ...) -> None: ...

class ListChunksRequest(_message.Message):
    __slots__ = ("recording_id", "limit", "after", "start_s", "end_s")
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    recording_id: str
    limit: int
    after: int
    start_s: float
    end_s: float
    def __init__(self, recording_id: _Optional[str] = ..., limit: _Optional[int] = ..., after: _Optional[int] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ...) -> None: ...

class ListChunksResponse(_message.Message):
    __slots__ = ("chunks", "has_more")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[RecordingChunk]
    has_more: bool
    def __init__(self, chunks: _Optional[_Iterable[_Union[RecordingChunk, _Mapping]]] = ..., has_more: bool = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("start", "data")
    START_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    start: PushStart
    data: bytes
    def __init__(self, start: _Optional[_Union[PushStart, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PushStart(_message.Message):
    __slots__ = ("recording_id", "content_type", "captured_at", "end")
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_AT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    recording_id: str
    content_type: str
    captured_at: float
    end: bool
    def __init__(self, recording_id: _Optional[str] = ..., content_type: _Optional[str] = ..., captured_at: _Optional[float] = ..., end: bool = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("bytes", "pieces", "last_captured_at")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    LAST_CAPTURED_AT_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    pieces: int
    last_captured_at: float
    def __init__(self, bytes: _Optional[int] = ..., pieces: _Optional[int] = ..., last_captured_at: _Optional[float] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "kind", "recording_id", "state", "params_json", "progress_json", "result_json", "error", "attempt", "max_attempts", "created_at", "finished_at", "cancel_asked")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PARAMS_JSON_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_JSON_FIELD_NUMBER: _ClassVar[int]
    RESULT_JSON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_ASKED_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    recording_id: str
    state: str
    params_json: str
    progress_json: str
    result_json: str
    error: Failure
    attempt: int
    max_attempts: int
    created_at: float
    finished_at: float
    cancel_asked: bool
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., recording_id: _Optional[str] = ..., state: _Optional[str] = ..., params_json: _Optional[str] = ..., progress_json: _Optional[str] = ..., result_json: _Optional[str] = ..., error: _Optional[_Union[Failure, _Mapping]] = ..., attempt: _Optional[int] = ..., max_attempts: _Optional[int] = ..., created_at: _Optional[float] = ..., finished_at: _Optional[float] = ..., cancel_asked: bool = ...) -> None: ...

class CreateJobRequest(_message.Message):
    __slots__ = ("kind", "recording_id", "window", "params_json", "idempotency_key")
    KIND_FIELD_NUMBER: _ClassVar[int]
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    PARAMS_JSON_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    kind: str
    recording_id: str
    window: Window
    params_json: str
    idempotency_key: str
    def __init__(self, kind: _Optional[str] = ..., recording_id: _Optional[str] = ..., window: _Optional[_Union[Window, _Mapping]] = ..., params_json: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class CreateJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("limit", "cursor", "kind", "state", "recording_id")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    limit: int
    cursor: str
    kind: str
    state: str
    recording_id: str
    def __init__(self, limit: _Optional[int] = ..., cursor: _Optional[str] = ..., kind: _Optional[str] = ..., state: _Optional[str] = ..., recording_id: _Optional[str] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_cursor")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_cursor: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_cursor: _Optional[str] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class RetryJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class RetryJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class FollowJobRequest(_message.Message):
    __slots__ = ("id", "after_event")
    ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_EVENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    after_event: int
    def __init__(self, id: _Optional[str] = ..., after_event: _Optional[int] = ...) -> None: ...

class FollowJobResponse(_message.Message):
    __slots__ = ("number", "kind", "data_json", "at")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_JSON_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    number: int
    kind: str
    data_json: str
    at: float
    def __init__(self, number: _Optional[int] = ..., kind: _Optional[str] = ..., data_json: _Optional[str] = ..., at: _Optional[float] = ...) -> None: ...
