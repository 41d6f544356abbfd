"""Settings of the recordings part: read once, at start, from `NVILA_RECORDINGS_…`; each field below is one variable.

No field is called `port` or `service_…`: Kubernetes sets such variables in every pod beside a service of that name.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from nvila.recordings.seal import Seal

_PREFIX = "NVILA_RECORDINGS_"
_MIB = 1 << 20

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
HostPort = Annotated[str, Field(pattern=r"^\S+:\d{1,5}$")]
Count = Annotated[int, Field(ge=1)]


class RecordingsSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    # -- where it listens
    host: str = "0.0.0.0"
    """Address of the interface to listen on, for health and metrics."""
    http_port: Port = 8082
    """Port of health and metrics. 0: a free one."""
    worker_name: str = Field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    """What this process is called in logs and beside the jobs it does."""

    # -- where things are kept
    data_dir: Path = Path("/var/lib/nvila")
    """The gateway's data folder, shared with it: uploaded files are read there."""
    database_url: SecretStr | None = None
    """Where recordings and jobs are kept: sqlite:///folder/file.db, or postgresql://user:password@host/database; the
    gateway must have the same. Default: recordings.db in the data folder."""
    dir: Path | None = None
    """Folder for video of live recordings, shared with the gateway. Default: recordings in the data folder."""
    cold_url: str = ""
    """Where visual tokens and footage are kept for good: a folder, or s3://bucket/prefix and whatever else fsspec
    opens (with the usual variables of that store). Default: the folder of live recordings."""

    secret_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """What seals the passwords of cameras and the secrets of webhooks in the database: keys of 32 random bytes in
    URL-safe base64, separated by commas; the first seals, all open. The gateway must have the same. None: they lie
    there in clear, and a warning says so."""

    # -- what is behind it
    vision_url: HostPort = "127.0.0.1:8001"
    """host:port of Triton's gRPC API."""
    decode_target: HostPort = "127.0.0.1:9000"
    """host:port of Ray Serve's gRPC proxy."""
    backend_tls_dir: Path | None = None
    """Folder with ca.crt, tls.crt and tls.key, for TLS to vision and decode; as the gateway's."""
    redis_url: Annotated[str, Field(pattern=r"^rediss?(\+cluster)?://\S+$")] = "redis://127.0.0.1:6379/0"
    """The token cache; rediss:// for TLS. It may be away at any time: jobs are then slower."""

    # -- how many jobs at once, in this process
    ingest_slots: Count = 4
    """Recordings taken in at the same time; a camera keeps one as long as it runs."""
    question_slots: Count = 4
    """Questions, summaries, timelines and when-questions at the same time."""
    watch_slots: Count = 16
    """Standing questions at the same time; each keeps one as long as it stands."""
    delivery_slots: Count = 8
    """Webhooks called at the same time."""
    question_timeout_s: Seconds = 6 * 3600
    """Time for one attempt at a question, summary, timeline or when-question."""
    call_timeout_s: Seconds = 300
    """Time for one call of the model."""

    # -- how jobs survive
    lease_s: Seconds = 30
    """How long after its worker's death a job is taken over by another."""
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10
    """At shutdown: time for jobs to end; then they are given back, and go on elsewhere where they were."""
    keep_jobs_s: Seconds = 30 * 24 * 3600
    """How long a job that is over is remembered, with its result and events."""

    # -- taking in
    group_window: Count = 4
    """Groups of frames of one recording that are decoded and encoded at the same time."""
    backlog_s: Seconds = 120
    """Footage of a live recording that may wait; beyond, the oldest that waits is left out and counted. What a client
    pushes waits with the client."""
    outage_s: Seconds = 3600
    """The same while, and after, a service that encoding needs was away for longer than recovery_s: so long an outage
    loses nothing."""
    keep_footage_s: Seconds = 24 * 3600
    """How long the footage of a live recording is kept, so that lost visual tokens can be made again."""
    source_stores: Annotated[tuple[str, ...], NoDecode] = ()
    """Object stores that recordings may be made from, separated by commas: s3://bucket/prefix. They are read with this
    process's credentials, whoever asks; none unless you say so."""
    max_source_bytes: Count = 64 << 30
    """Largest file that a recording is made from."""
    max_pixels: Count = 64 * _MIB
    """Largest video frame: width x height, read from the header."""

    # -- addresses in requests: media, cameras, webhooks
    fetch_allow: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts that may be connected to though they are not public, separated by commas: a name, an address or a network
    (10.1.0.0/16), each with an optional port. Cameras are rarely public: name their network here. Without a port any
    port is allowed. Everything else must resolve to public addresses only."""
    fetch_ports: Annotated[frozenset[int], NoDecode] = frozenset({80, 443, 8080, 8443})
    """Ports that public hosts may be fetched from and called back at, separated by commas."""
    camera_ports: Annotated[frozenset[int], NoDecode] = frozenset({322, 554, 8554})
    """Ports of public cameras, separated by commas."""
    fetch_timeout_s: Seconds = 3600
    """Time for a source's bytes to arrive, redirects included."""
    fetch_connect_timeout_s: Seconds = 5
    """Time to connect."""
    fetch_silence_s: Seconds = 15
    """Longest time without a byte."""
    fetch_redirects: Annotated[int, Field(ge=0, le=20)] = 5
    """Most redirects followed; each is checked like the first address. Webhooks follow none."""
    webhook_timeout_s: Seconds = 10
    """Time for one call of a webhook."""

    # -- frames
    decode_workers: Count = 2
    """Processes that decode frames."""
    decode_threads: Count = 1
    """Decoder threads in each."""
    decode_memory_bytes: Count = 1536 * _MIB
    """Memory that decoding may add to one of them."""
    decode_task_s: Seconds = 120
    """Time for one probe, or for the frames of one group; then the process is killed and replaced."""
    frame_memory_bytes: Count = 512 * _MIB
    """Shared memory for decoded frames on their way to vision."""
    shared_memory_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,31}$")] = "nvila-rec"
    """Start of the names of shared memory objects; not the gateway's, which may run beside."""
    cache_ttl_s: Seconds = 24 * 3600
    """How long visual tokens live in the cache, at least, that a worker brings back from the cold store or reads. For
    all others: redis_ttl_s of vision, which puts them there, and of decode, which reads them."""
    recovery_s: Seconds = 20
    """How long a service behind may be away before an attempt gives up on it; a live recording waits on (outage_s)."""

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

    @field_validator("secret_keys", "fetch_allow", "fetch_ports", "camera_ports", "source_stores", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(item.strip() for item in value.split(",") if item.strip())
        return value

    @field_validator("secret_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        Seal(key.get_secret_value() for key in keys)
        return keys

    def seal(self) -> Seal:
        return Seal(key.get_secret_value() for key in self.secret_keys)

    def database(self) -> str:
        return self.database_url.get_secret_value() if self.database_url else f"sqlite:///{self.data_dir}/recordings.db"

    def folder(self) -> Path:
        return self.dir or self.data_dir / "recordings"


def _variable(loc: tuple[int | str, ...]) -> str:
    return f"{_PREFIX}{str(loc[0]).upper()}" if loc else "settings"
