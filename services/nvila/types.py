"""What travels along the path, from a question to its streamed answer. NumPy only: every service imports this.

Shape letters, here and in every file: F frames · S scales · N tiles · H, W grid rows and columns · T visual tokens ·
C vision channels · D language-model width · B sequences · A heads · E channels per head.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from nvila.errors import DeadlineExceeded

# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deadline:
    """When a request's time is up, on this process's monotonic clock. On a wire it travels as what is left of it."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds left; raises `DeadlineExceeded` when none are."""
        left = self.at_s - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the request's time is up")
        return left


# -- media ------------------------------------------------------------------------------------------------------------


class MediaKind(StrEnum):
    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True, kw_only=True)
class VideoSampling:
    """Which frames of a video are asked for: at most one of `num_frames` and `fps`; neither means the model's default.

    `start_s` and `end_s` are a window on the video's own clock (first frame = 0).
    """

    num_frames: int | None = None
    fps: float | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RecordingWindow:
    """A stretch of a recording, on its own clock (`_s`, first frame = 0) or by capture time (`_at`, since 1970).

    None: its beginning; as far as it is ingested.
    """

    recording_id: str
    start_s: float | None = None
    end_s: float | None = None
    start_at: float | None = None
    end_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """One media part of a question: where it is to be had. Exactly one of `url`, `file_id` and `recording` is set.

    `url` is http(s) or `data:`. `sampling` is for videos only; a recording was sampled when it was ingested. `param`:
    the part of the request that brought it, for messages about it. `credentials`: user:password for the host of `url`,
    and for no other that it redirects to.
    """

    kind: MediaKind
    url: str | None = None
    file_id: str | None = None
    recording: RecordingWindow | None = None
    param: str | None = None
    sampling: VideoSampling = field(default_factory=VideoSampling)
    credentials: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        given = [one for one in (self.url, self.file_id, self.recording) if one is not None]
        assert len(given) == 1, "exactly one of url, file_id and recording"


@dataclass(frozen=True, kw_only=True)
class FrameRun:
    """A run of sampled frames of one media item: what one vision call encodes (a *chunk*), before it is decoded.

    `indices` are frame numbers of the container in presentation order, non-decreasing, repeats allowed (the reference's
    sampling rule repeats frames of short videos). An image is a run of the one index 0.
    """

    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FrameLocation:
    """Where a chunk's frames lie in shared memory: a named POSIX region, so that a service on the same host can map it.

    `region`: its name as `shm_open` takes it, with the leading slash. `region_bytes`: size of the whole region.
    """

    region: str
    region_bytes: int
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Decoded frames of one `FrameRun`, ready to be encoded.

    `frames_FHWC`: uint8 RGB, all of one size: for video frames the tile side (S, S), for an image its own size. Frames
    that could not be decoded are left out (`missing`: their positions in the run); then the last frame is repeated
    `padded` times so that F is a multiple of the temporal group and pooling never crosses a chunk border.
    `times_s`: presentation times of the frames that were decoded, in order. `content_digest`: BLAKE3 over shape, format
    and bytes (cache/keys.py), taken where the pixels were decoded so that they are read once. `location`: set when
    `frames_FHWC` is a view of shared memory. F is 0 when no frame of the run could be decoded.
    """

    frames_FHWC: NDArray[np.uint8]
    content_digest: bytes
    times_s: tuple[float, ...]
    missing: tuple[int, ...] = ()
    padded: int = 0
    location: FrameLocation | None = None


# -- visual tokens ----------------------------------------------------------------------------------------------------


class TokenDtype(StrEnum):
    """How visual tokens are stored. INT8 has one float32 scale per token. FLOAT32 is for float32 models (CPU)."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """All that shapes visual tokens besides the pixels; part of their key.

    `is_tiled`: the checkpoint's tiling (Dynamic-S2 or dynamic) is applied; only for the single image of a prompt
    (NVILA-SPEC §2.5). `pool_sizes`: (frames, rows, columns) per pooling level for videos, empty for images.
    `vision_revision`: digest of tower, projector and their configuration (model/checkpoint.py).
    """

    kind: MediaKind
    is_tiled: bool
    pool_sizes: tuple[tuple[int, int, int], ...]
    token_dtype: TokenDtype
    vision_revision: str

    def canonical(self) -> bytes:
        """A stable byte form for hashing."""
        pools = ";".join(",".join(map(str, p)) for p in self.pool_sizes)
        return f"{self.kind}|{int(self.is_tiled)}|{pools}|{self.token_dtype}|{self.vision_revision}".encode()


@dataclass(frozen=True)
class Level:
    """One pooling level of a token record: `blocks` runs (tiles, frames or pooled frames) of `tokens` tokens each.

    A Dynamic-S2 image is one block; a `dynamic` image has one block per tile; a video has one per (pooled) frame.
    """

    blocks: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TokensRef:
    """A chunk's visual tokens by name, with the layout that they must have; decode refuses anything else.

    `key`: hex digest (cache/keys.py).
    """

    key: str
    levels: tuple[Level, ...]

    @property
    def tokens(self) -> int:
        return sum(level.blocks * level.tokens for level in self.levels)


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualTokens:
    """Compressed, projected visual tokens of one chunk, without any start, end or separator embeddings.

    `values_TD`: float32, or uint16 holding bfloat16 bits, or int8; contiguous. `scales_T`: float32, INT8 only.
    Rows are level by level, block by block. `width` is D.
    """

    ref: TokensRef
    dtype: TokenDtype
    values_TD: NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int8]
    scales_T: NDArray[np.float32] | None
    vision_revision: str

    @property
    def width(self) -> int:
        return int(self.values_TD.shape[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """The vision service's answer about one chunk.

    `is_published`: the tokens are in the cache. `inline`: the tokens themselves, present when they were asked for or
    could not be published. `tiles`: tower tiles computed (0 when another request's result was reused).
    """

    ref: TokensRef
    is_published: bool
    inline: VisualTokens | None
    tiles: int
    stage_ms: Mapping[str, float]


# -- the prompt -------------------------------------------------------------------------------------------------------


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class MediaPart:
    """Stands for the media item with this position in the question's or request's `media`."""

    index: int


@dataclass(frozen=True)
class Message:
    role: Role
    parts: tuple[TextPart | MediaPart, ...]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the answer is sampled. `temperature` 0 is greedy. `top_k` 0 means all."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class Question:
    """A client's request, the same from HTTP, gRPC and the command line: what `gateway/pipeline.py` answers.

    `tenant`: the salt of caches; requests of different tenants share nothing.
    """

    request_id: str
    tenant: str
    messages: tuple[Message, ...]
    media: tuple[MediaSource, ...]
    sampling: SamplingParams
    deadline: Deadline


@dataclass(frozen=True, kw_only=True)
class PromptMedia:
    """One media item of a decode request: its kind and the token records that make it up, in time order."""

    kind: MediaKind
    is_tiled: bool
    records: tuple[TokensRef, ...]


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What the decode service is asked. Records not in `inline` are awaited in the cache.

    `resume_ids`: tokens already generated by a replica that died; generation goes on after them and their text is
    not sent again. `cache_salt` keeps tenants apart in the language model's prefix cache. `affinity`: requests with
    the same value go to the same replica when it has room (the first media record's key; empty for text).
    """

    request_id: str
    messages: tuple[Message, ...]
    media: tuple[PromptMedia, ...]
    sampling: SamplingParams
    deadline: Deadline
    vision_revision: str
    cache_salt: str
    affinity: str = ""
    inline: tuple[VisualTokens, ...] = ()
    resume_ids: tuple[int, ...] = ()
    traceparent: str = ""


# -- the answer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PromptUsage:
    """Prompt length in language-model positions, by modality. `image` and `video` include end-of-block embeddings."""

    text: int
    image: int
    video: int
    cached: int = 0
    """How many of them the prefix cache already held."""

    @property
    def total(self) -> int:
        return self.text + self.image + self.video


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """First event of a generation: the prompt is laid out and fits."""

    prompt: PromptUsage


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer, and exactly the token ids that made it.

    Ids whose text is held back (half a character, the possible beginning of a stop string) come with the delta that
    lets it go: then the ids received so far always stand for the text received so far, and a generation can be resumed.
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TokensMissing:
    """The generation cannot begin: these records are not in the cache (or not usable) and did not come in time."""

    keys: tuple[str, ...]


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Last event of a generation that went well. `stage_ms`: fetch, prompt, queue, prefill, generate."""

    reason: FinishReason
    prompt: PromptUsage
    completion_tokens: int
    stage_ms: Mapping[str, float]


DecodeEvent = Accepted | TextDelta | TokensMissing | Finished
"""Anything else that ends a generation is raised as an `NvilaError`."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A stretch of the asked time range without usable frames, in seconds on the media's clock, and why."""

    start_s: float
    end_s: float
    reason: str


class WindowMode(StrEnum):
    """How a recording's window was brought into the model's budget."""

    FULL = "full"
    """One call sees every group's own tokens."""
    POOLED = "pooled"
    """One call sees averages over consecutive groups."""
    MAP_REDUCE = "map_reduce"
    """Calls over parts of the window, each with all its tokens, and a last one over their answers."""


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """How a window is answered about, and why so. Made by `recordings/planner.py`.

    `pool`: consecutive groups that make one block; 1: none are averaged. `leaves_out_static`: of a run of groups with
    the same tokens only the first is shown. `calls`: of the model, the last one over the parts' answers included.
    `tokens`: visual positions of all calls; `most_tokens`: of any one. `frames`: sampled frames that the calls stand
    on. `seconds_per_frame`: the window without its gaps over those frames (ANCHORS P10); `seconds_per_block`: over the
    blocks of visual tokens. `prefill_flops`: of all calls, an upper bound. `reason`: in words.
    """

    mode: WindowMode
    pool: int
    leaves_out_static: bool
    calls: int
    blocks: int
    tokens: int
    most_tokens: int
    frames: int
    seconds_per_frame: float
    seconds_per_block: float
    prefill_flops: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class RecordingCoverage:
    """What of a recording an answer stands on, besides `MediaCoverage`'s frames, gaps and tokens.

    `start_s`, `end_s`: the window, on the recording's clock. `captured_from`, `captured_to`: its capture times (seconds
    since 1970), None when nobody knows. Frames in the window: `frames_static` were found near-identical to those before
    and have their tokens; `frames_left_out`: of them, not shown to the model again. `chunks`: that the window touches.
    """

    recording_id: str
    start_s: float
    end_s: float
    captured_from: float | None
    captured_to: float | None
    frames_static: int
    frames_left_out: int
    chunks: int
    plan: WindowPlan


@dataclass(frozen=True, kw_only=True)
class MediaCoverage:
    """What of one media item the answer stands on.

    Frames asked by the client (or the model's default; of a recording: sampled in the window) · decoded in this request
    · encoded by the tower in this request · reused from the cache · dropped because they could not be decoded · added
    to fill the last temporal group. `start_s`, `end_s`: first and last frame's presentation time. `tokens`:
    language-model positions.
    """

    kind: MediaKind
    frames_asked: int
    frames_decoded: int
    frames_encoded: int
    frames_reused: int
    frames_dropped: int
    frames_padded: int
    start_s: float
    end_s: float
    gaps: tuple[Gap, ...]
    tokens: int
    chunks: int
    cache_hits: int
    tiles: int
    recording: RecordingCoverage | None = None


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Of every answer: what it stands on, and the milliseconds each stage took (summed over chunks, so stages that
    overlap add up to more than the wall time `total`)."""

    media: tuple[MediaCoverage, ...]
    stage_ms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Last event of an answer."""

    reason: FinishReason
    usage: PromptUsage
    completion_tokens: int
    coverage: Coverage


AnswerEvent = TextDelta | Answered


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the decode service serves, and so what the gateway may promise.

    `config_json`: the checkpoint's configuration as `model/config.py` reads it. `max_model_len`: positions of prompt
    plus answer. `token_dtype`: how visual tokens are stored for it.
    """

    name: str
    vision_revision: str
    config_json: str
    max_model_len: int
    token_dtype: TokenDtype
    engine: str
    is_random: bool
    """True for the made-up checkpoint with random weights: its words mean nothing."""
