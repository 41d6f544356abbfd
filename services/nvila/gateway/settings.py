"""The gateway's settings: read once, at start, from `NVILA_GATEWAY_…`; each field below is one variable.

No field is called `port` or `service_…`: Kubernetes sets `NVILA_GATEWAY_PORT=tcp://…` and `NVILA_GATEWAY_SERVICE_…`
in every pod beside a service named nvila-gateway.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from nvila.gateway.egress import AllowRule
from nvila.recordings.seal import Seal

_PREFIX = "NVILA_GATEWAY_"
_MIB = 1 << 20
_KEY = re.compile(r"[!-9;-~]{8,256}(:[a-z0-9][a-z0-9-]{0,62})?")

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
HostPort = Annotated[str, Field(pattern=r"^\S+:\d{1,5}$")]
Count = Annotated[int, Field(ge=1)]


class GatewaySettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    # -- where it listens
    host: str = "0.0.0.0"
    """Address of the interface to listen on, for HTTP and gRPC."""
    http_port: Port = 8080
    """Port of the HTTP API. 0: a free one."""
    grpc_port: Port = 8081
    """Port of the gRPC API. 0: a free one."""
    docs: bool = True
    """Serve /docs and /openapi.json (to holders of a key)."""
    console: bool = True
    """Serve the console, a page for people, at /; it asks for a key."""

    # -- who may ask
    auth: Literal["api-key", "none"] = "api-key"
    """`api-key`: every route but health needs `Authorization: Bearer <key>`. `none`: everybody may ask."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys, separated by commas, each `key` or `key:tenant`. Tenants share no files and no cache entries; a key without
    one belongs to the tenant `default`. A key is 8 to 256 printable ASCII characters without colon and comma."""

    # -- what is behind it
    vision_url: HostPort = "127.0.0.1:8001"
    """host:port of Triton's gRPC API."""
    decode_target: HostPort = "127.0.0.1:9000"
    """host:port of Ray Serve's gRPC proxy."""
    backend_tls_dir: Path | None = None
    """Folder with ca.crt, tls.crt and tls.key, for TLS to vision and decode, both sides showing a certificate. Absent:
    in the clear."""
    redis_url: Annotated[str, Field(pattern=r"^rediss?(\+cluster)?://\S+$")] = "redis://127.0.0.1:6379/0"
    """The token cache; rediss:// for TLS, redis+cluster:// or rediss+cluster:// for a Redis Cluster. It may be away at
    any time: requests are then slower."""
    data_dir: Path = Path("/var/lib/nvila")
    """Folder for uploaded files and media on the way. Replicas that share it share uploaded files."""

    # -- recordings
    recordings: bool = True
    """Keep recordings and do jobs over them, which needs workers: the recordings part. Off: whoever asks for either is
    told, rather than that what they submit waits for ever."""
    recordings_database_url: SecretStr | None = None
    """Where recordings and jobs are kept: sqlite:///folder/file.db, or postgresql://user:password@host/database; the
    recordings part must have the same. Default: recordings.db in the data folder."""
    recordings_dir: Path | None = None
    """Folder for video of live recordings, shared with the recordings part. Default: recordings in the data folder."""
    recordings_cold_url: str = ""
    """Where the recordings part keeps visual tokens and footage for good; the same as its NVILA_RECORDINGS_COLD_URL.
    Default: the folder for live recordings."""
    recordings_secret_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """What seals the passwords of cameras and the secrets of webhooks in the database: the same as the recordings
    part's NVILA_RECORDINGS_SECRET_KEYS."""
    max_recordings: Count = 10_000
    """Most recordings of a tenant."""
    max_live_recordings: Count = 64
    """Most cameras and pushed streams of a tenant at the same time."""
    max_queued_jobs: Count = 1_000
    """Most jobs of a tenant that wait to begin."""
    max_streams: Count = 256
    """Jobs followed and recordings pushed at the same time, over HTTP and gRPC together."""

    # -- what one request may ask
    max_body_bytes: Count = 32 * _MIB
    """Largest JSON body or gRPC message, media as data included."""
    max_media_bytes: Count = 2048 * _MIB
    """Largest media file of a chat request, whether uploaded, fetched or sent as data."""
    max_upload_bytes: Count = 65536 * _MIB
    """Largest uploaded file: recordings are made of larger ones than a chat request may bring."""
    max_pixels: Count = 64 * _MIB
    """Largest image or video frame: width x height, read from the header."""
    max_frames: Count = 256
    """Most frames of one video (the model may allow fewer)."""
    max_media: Count = 32
    """Most images and videos of one request."""
    max_messages: Count = 512
    """Most messages of one request."""
    max_text_chars: Count = 400_000
    """Most characters of text of one request, all messages together."""
    default_answer_tokens: Count = 512
    """Longest answer when the request does not say."""
    max_answer_tokens: Count = 8192
    """Longest answer that a request may ask for."""
    request_timeout_s: Seconds = 300
    """Time for one answer when the request does not say."""
    max_request_timeout_s: Seconds = 3600
    """Most time for one answer that a request may ask for."""
    body_timeout_s: Seconds = 60
    """Time for a JSON body to arrive; a permit is held meanwhile."""
    upload_timeout_s: Seconds = 3600
    """Time for an uploaded file to arrive."""

    # -- how many at once
    max_concurrency: Count = 32
    """Requests answered at the same time, HTTP and gRPC together."""
    max_queue: Annotated[int, Field(ge=0)] = 64
    """Requests that may wait for their turn; beyond, they are refused with 429."""
    queue_timeout_s: Seconds = 30
    """Longest wait for a turn."""
    max_uploads: Count = 8
    """Files being uploaded at the same time."""
    drain_s: Seconds = 20
    """At shutdown: time for requests in flight to end."""

    # -- fetching media from addresses in requests
    fetch_allow: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts that may be fetched from though they are not public, separated by commas: a name, an address or a network
    (10.1.0.0/16), each with an optional port. Without a port any port is allowed. Everything else must resolve to
    public addresses only."""
    fetch_ports: Annotated[frozenset[int], NoDecode] = frozenset({80, 443, 8080, 8443})
    """Ports that public hosts may be fetched from, separated by commas."""
    fetch_timeout_s: Seconds = 120
    """Time for one fetch, redirects included."""
    fetch_connect_timeout_s: Seconds = 5
    """Time to connect."""
    fetch_silence_s: Seconds = 15
    """Longest time without a byte."""
    fetch_redirects: Annotated[int, Field(ge=0, le=20)] = 5
    """Most redirects followed; each is checked like the first address."""

    # -- frames
    decode_workers: Count = 2
    """Processes that decode frames."""
    decode_threads: Count = 1
    """Decoder threads in each."""
    decode_memory_bytes: Count = 1536 * _MIB
    """Memory that decoding may add to one of them."""
    decode_task_s: Seconds = 60
    """Time for one probe, or for the frames of one chunk; then the process is killed and replaced."""
    frame_memory_bytes: Count = 512 * _MIB
    """Shared memory for decoded frames on their way to vision."""
    shared_memory_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,31}$")] = "nvila"
    """Start of the names of shared memory objects, so that several stacks can run side by side."""
    chunk_frames: Count = 32
    """Most frames of one vision call. More: fuller batches; fewer: less waiting for the first one."""
    cache_ttl_s: Seconds = 24 * 3600
    """How long plans live in the cache after their last use, and visual tokens at least that the gateway itself brings
    back from a recording's cold store or reads. For all others: redis_ttl_s of vision and decode."""
    recovery_s: Seconds = 20
    """How long a service behind may be away before a request gives up on it."""

    # -- logs
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level that is logged."""
    log_style: Literal["json", "text"] = "json"
    """One JSON object per line, or text for people."""

    @classmethod
    def load(cls) -> Self:
        """Settings from the environment. Raises `SystemExit` that names the variables at fault, never their values."""
        try:
            return cls()
        except ValidationError as error:
            lines = (f"{_variable(found['loc'])}: {found['msg']}" for found in error.errors(include_input=False))
            raise SystemExit("\n".join(lines)) from None

    @field_validator("api_keys", "recordings_secret_keys", "fetch_allow", "fetch_ports", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(item.strip() for item in value.split(",") if item.strip())
        return value

    @field_validator("recordings_secret_keys")
    @classmethod
    def _check_secret_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        Seal(key.get_secret_value() for key in keys)
        return keys

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for position, key in enumerate(keys):
            if not _KEY.fullmatch(key.get_secret_value()):
                raise ValueError(
                    f"key {position + 1} is not `key` or `key:tenant` "
                    "(8 to 256 printable characters; tenant: lower case letters, digits, hyphens)"
                )
        return keys

    @field_validator("fetch_allow")
    @classmethod
    def _check_allow(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            AllowRule.parse(rule)
        return rules

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.auth == "api-key" and not self.api_keys:
            raise ValueError(f"{_PREFIX}API_KEYS is empty; set it, or set {_PREFIX}AUTH=none to let everybody ask")
        if self.default_answer_tokens > self.max_answer_tokens:
            raise ValueError(
                f"{_PREFIX}DEFAULT_ANSWER_TOKENS is {self.default_answer_tokens}, "
                f"above {_PREFIX}MAX_ANSWER_TOKENS, {self.max_answer_tokens}"
            )
        if self.request_timeout_s > self.max_request_timeout_s:
            raise ValueError(
                f"{_PREFIX}REQUEST_TIMEOUT_S is {self.request_timeout_s:g}, "
                f"above {_PREFIX}MAX_REQUEST_TIMEOUT_S, {self.max_request_timeout_s:g}"
            )
        return self


def _variable(loc: tuple[int | str, ...]) -> str:
    return f"{_PREFIX}{str(loc[0]).upper()}" if loc else "settings"
