"""Every metric, span and attribute name that nvila emits: dashboards, alerts and tests use only these.

Metrics are `nvila_<noun>_<unit>`, counters end in `_total`, units are base units (seconds, bytes). Labels are few and
bounded: never ids, addresses or content. GenAI names follow OpenTelemetry's GenAI conventions, which are still in
development; that is why they live in this one module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
TOKEN_BUCKETS = tuple(float(4**n) for n in range(14))  # 1 .. 67,108,864, as the GenAI conventions ask
TILE_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# gateway
REQUESTS = Metric("nvila_requests_total", "counter", "Requests by face and how they ended.", ("face", "outcome"))
REQUESTS_IN_FLIGHT = Metric("nvila_requests_in_flight", "gauge", "Requests being answered now.")
REQUEST_SECONDS = Metric(
    "nvila_request_seconds", "histogram", "From request to last byte.", ("outcome",), SECONDS_BUCKETS
)
FIRST_TOKEN_SECONDS = Metric(
    "nvila_time_to_first_token_seconds", "histogram", "From request to first text.", ("media",), SECONDS_BUCKETS
)
STAGE_SECONDS = Metric("nvila_stage_seconds", "histogram", "Time in one stage.", ("stage",), SECONDS_BUCKETS)
TOKENS = Metric("nvila_tokens_total", "counter", "Language-model tokens by kind.", ("kind",))
FRAMES = Metric("nvila_frames_total", "counter", "Video frames and images by what became of them.", ("fate",))
MEDIA_BYTES = Metric("nvila_media_bytes_total", "counter", "Media bytes taken in.", ("source",))
RECOVERIES = Metric(
    "nvila_recoveries_total", "counter", "Requests that went on after a part failed, by what failed.", ("cause",)
)
# video decoding, in the gateway
DECODE_BUSY_SECONDS = Metric("nvila_decode_busy_seconds_total", "counter", "Busy time of the frame-decoding workers.")
DECODE_WORKERS = Metric("nvila_decode_workers", "gauge", "Frame-decoding workers alive.")
DECODE_KILLS = Metric("nvila_decode_worker_kills_total", "counter", "Workers killed, by reason.", ("reason",))
FRAME_MEMORY_BYTES = Metric("nvila_frame_memory_bytes", "gauge", "Shared memory holding decoded frames.")
# token cache
CACHE_READS = Metric("nvila_cache_reads_total", "counter", "Token records looked for, by outcome.", ("outcome",))
CACHE_WRITES = Metric("nvila_cache_writes_total", "counter", "Token records written, by outcome.", ("outcome",))
CACHE_BYTES = Metric("nvila_cache_bytes_total", "counter", "Token bytes moved.", ("direction",))
CACHE_SECONDS = Metric("nvila_cache_seconds", "histogram", "Round trips to the cache.", ("operation",), SECONDS_BUCKETS)
CACHE_LEASES = Metric("nvila_cache_leases_total", "counter", "Encode leases, by outcome.", ("outcome",))
CACHE_USED_BYTES = Metric("nvila_cache_used_bytes", "gauge", "Memory that the cache's servers use.")
CACHE_EVICTED = Metric(
    "nvila_cache_evicted_keys", "gauge", "Keys that the cache's servers have evicted since they started."
)
CACHE_UP = Metric("nvila_cache_up", "gauge", "Share of the cache's servers that answer.")
# vision
VISION_REQUESTS = Metric("nvila_vision_requests_total", "counter", "Encode calls, by outcome.", ("outcome",))
VISION_TILES = Metric("nvila_vision_tiles_total", "counter", "Tower tiles computed.")
VISION_PENDING_TILES = Metric("nvila_vision_pending_tiles", "gauge", "Tiles waiting for the tower.")
VISION_BACKLOG_SECONDS = Metric(
    "nvila_vision_backlog_seconds", "gauge", "Waiting tiles over the tower's recent tiles per second."
)
VISION_BATCHES = Metric("nvila_vision_batches_total", "counter", "Tower batches run.")
VISION_STAGE_SECONDS = Metric("nvila_vision_stage_seconds_total", "counter", "Time by stage.", ("stage",))
# decode
DECODE_REQUESTS = Metric("nvila_decode_requests_total", "counter", "Generations, by outcome.", ("outcome",))
DECODE_TOKENS = Metric("nvila_decode_tokens_total", "counter", "Positions by kind.", ("kind",))
DECODE_FIRST_TOKEN_SECONDS = Metric(
    "nvila_decode_first_token_seconds", "histogram", "From call to first token.", (), SECONDS_BUCKETS
)
DECODE_PENDING_TOKENS = Metric("nvila_decode_pending_tokens", "gauge", "Prompt positions of generations not begun.")
DECODE_BACKLOG_SECONDS = Metric(
    "nvila_decode_backlog_seconds", "gauge", "Waiting prompt positions over the engine's recent positions per second."
)
# recordings
RECORDED_FRAMES = Metric(
    "nvila_recorded_frames_total", "counter", "Sampled frames of recordings by what became of them.", ("fate",)
)
CAPTURES = Metric(
    "nvila_captures", "gauge", "Live sources that are read over the network, by kind and state.", ("source", "state")
)
CAPTURE_RECONNECTS = Metric("nvila_capture_reconnects_total", "counter", "Live sources that were connected to again.")
CAPTURE_LOST_SECONDS = Metric(
    "nvila_capture_lost_seconds_total", "counter", "Footage of cameras that was lost: it could not be kept in time."
)
INGEST_LAG_SECONDS = Metric(
    "nvila_ingest_lag_seconds", "gauge", "Footage of the live source furthest behind that waits to be ingested."
)
# jobs of recordings, in the workers
JOBS_FINISHED = Metric(
    "nvila_jobs_finished_total", "counter", "Attempts at jobs, by kind and how they ended.", ("kind", "outcome")
)
JOBS_RUNNING = Metric("nvila_jobs_running", "gauge", "Jobs that this worker does now, by kind.", ("kind",))
JOBS = Metric("nvila_jobs", "gauge", "Jobs in the database that wait, run or are dead, by kind.", ("kind", "state"))
JOBS_OLDEST_SECONDS = Metric(
    "nvila_jobs_oldest_seconds", "gauge", "How long the oldest waiting job could have begun, by kind.", ("kind",)
)
JOB_WAIT_SECONDS = Metric(
    "nvila_job_wait_seconds", "histogram", "From when a job could begin to its claim.", ("kind",), SECONDS_BUCKETS
)
JOB_SECONDS = Metric(
    "nvila_job_seconds", "histogram", "Of one attempt.", ("kind", "outcome"), (*SECONDS_BUCKETS, 1800, 7200, 43200)
)
RECORDINGS_DATABASE_UP = Metric("nvila_recordings_database_up", "gauge", "1 when the database of recordings answers.")


ALL_METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

# -- spans and attributes ---------------------------------------------------------------------------------------------

PROVIDER = "nvila"
ATTR_OPERATION = "gen_ai.operation.name"
ATTR_PROVIDER = "gen_ai.provider.name"
ATTR_REQUEST_MODEL = "gen_ai.request.model"
ATTR_MAX_TOKENS = "gen_ai.request.max_tokens"
ATTR_TEMPERATURE = "gen_ai.request.temperature"
ATTR_TOP_P = "gen_ai.request.top_p"
ATTR_TOP_K = "gen_ai.request.top_k"
ATTR_SEED = "gen_ai.request.seed"
ATTR_STREAM = "gen_ai.request.stream"
ATTR_RESPONSE_ID = "gen_ai.response.id"
ATTR_RESPONSE_MODEL = "gen_ai.response.model"
ATTR_FINISH_REASONS = "gen_ai.response.finish_reasons"
ATTR_TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
ATTR_INPUT_TOKENS = "gen_ai.usage.input_tokens"
ATTR_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
ATTR_CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
ATTR_IMAGE_TOKENS = "gen_ai.usage.image.input_tokens"
ATTR_VIDEO_TOKENS = "gen_ai.usage.video.input_tokens"
ATTR_TEXT_TOKENS = "gen_ai.usage.text.input_tokens"
ATTR_INPUT_MESSAGES = "gen_ai.input.messages"
ATTR_OUTPUT_MESSAGES = "gen_ai.output.messages"
ATTR_ERROR_TYPE = "error.type"
ATTR_FRAMES_ASKED = "nvila.video.frames.requested"
ATTR_FRAMES_DECODED = "nvila.video.frames.decoded"
ATTR_FRAMES_ENCODED = "nvila.video.frames.encoded"
ATTR_FRAMES_DROPPED = "nvila.video.frames.dropped"
ATTR_TILES = "nvila.vision.tiles"
ATTR_CACHE_HIT = "nvila.cache.hit"
ATTR_CACHE_BYTES = "nvila.cache.bytes"
ATTR_CHUNK_FRAMES = "nvila.chunk.frames"
ATTR_KIND = "nvila.media.kind"
ATTR_JOB_ATTEMPT = "nvila.job.attempt"
