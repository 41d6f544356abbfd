"""Settings of the decode service, read once from `NVILA_DECODE_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class ProxySettings(BaseSettings):
    """What Serve's gRPC proxy, a process of its own, reads of them."""

    model_config = SettingsConfigDict(env_prefix="NVILA_DECODE_", extra="ignore")

    tls_dir: Path | None = None
    """Folder with ca.crt, tls.crt and tls.key: calls come over TLS on `tls_port`, both sides showing a certificate, and
    are refused on `grpc_port`, which Ray opens in any case. Absent: in the clear."""
    tls_port: Port = 9443
    """Serve's gRPC proxy over TLS."""


class Settings(ProxySettings):
    """A malformed value stops the process and names the variable."""

    # the model
    model: Path
    """NVILA checkpoint: a folder in any published layout, or a hub id (organisation/name, @revision to pin it)."""
    model_name: str = ""
    """Id under which the model is served; empty: the folder's name."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What generates: vLLM (`auto`), or the plain reference that needs neither vLLM nor a GPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the language model. `auto`: bfloat16 on a GPU, float32 on a processor (DESIGN §7), but bfloat16
    for one in four bits where the processor has a kernel for that."""
    token_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How visual tokens are stored. `auto`: float32 for a float32 model, else bfloat16. int8 halves the bytes."""
    max_model_len: Amount = 0
    """Positions of prompt plus answer; 0: what the model was made for, at most 32,768."""

    # the engine
    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 32
    """Sequences generated together by one replica."""
    max_batched_tokens: Annotated[int, Field(ge=64)] = 2048
    """Positions computed in one engine step: a long prefill is cut into pieces of this, between which others go on."""
    kv_cache_bytes: Amount = 0
    """Memory for keys and values per replica. 0: on a GPU what `gpu_memory` leaves, on a processor two prompts of full
    length, 256 MiB at least."""
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Fraction of a GPU's memory that vLLM may take."""
    cpu_threads: Amount = 0
    """Threads of arithmetic on a processor; 0: one per core this process may use."""
    prefill_step_tokens: Amount = 1024
    """Streaming prefill: while later chunks are still being encoded, the prompt's beginning is prefilled whenever it
    has grown by this many positions. 0: off."""

    # the token cache
    redis_url: str = ""
    """redis[s][+cluster]://[user:password@]host:port/db. Empty: no cache; visual tokens must come inline."""
    redis_ttl_s: Seconds = 3600
    """How long a record lives after decode has read it, at least."""
    redis_timeout_s: Seconds = 2
    """Of one round trip."""
    token_wait_s: Seconds = 60
    """How long a request waits for visual tokens before it says which are missing (its deadline may end it sooner)."""

    # listening
    host: str = "127.0.0.1"
    """Address of Serve's HTTP proxy. The gRPC proxy always listens on all: Ray offers no choice."""
    grpc_port: Port = 9000
    """Serve's gRPC proxy: the decode service itself."""
    http_port: Port = 8100
    """Serve's HTTP proxy: `/metrics`, `/-/healthz`."""

    # scaling
    min_replicas: Amount = 1
    """Replicas kept. Equal to `max_replicas`: a fixed number, no autoscaling."""
    max_replicas: Count = 1
    """Most replicas."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    """Requests per replica that autoscaling aims at."""
    max_ongoing_requests: Count = 32
    """Requests that a replica takes on; further ones go to another or wait."""
    max_queued_requests: Annotated[int, Field(ge=-1)] = 64
    """Requests that wait at a proxy; further ones are refused as overload. -1: no limit."""
    replica_gpus: Amount = 0
    """GPUs of one replica; several are used together (tensor parallel)."""
    replica_cpus: Annotated[float, Field(ge=0)] = 1
    """Processor share that Ray reserves for one replica."""
    health_check_period_s: Seconds = 2
    """How often Serve asks a replica, and that its engine, whether it lives; three times no, and another is started."""
    drain_s: Annotated[float, Field(ge=0)] = 30
    """How long a replica that is to stop may finish what it has begun."""

    # Ray
    ray_address: str = ""
    """A running Ray cluster (`auto`, host:port); empty: an own one on this machine, stopped with this process."""
    ray_folder: Path | None = None
    """Where the own cluster keeps sockets and logs; a short path. Absent: a temporary folder, removed at the end."""
    object_store_bytes: Annotated[int, Field(ge=80 << 20)] = 128 << 20
    """Ray's shared memory on the own cluster; requests with inline tokens pass through it."""

    # logs
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Of our own log lines; libraries log from WARNING."""
    log_style: Literal["json", "text"] = "json"
    """One JSON object per line, or plain text for people."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"MIN_REPLICAS {self.min_replicas} is more than MAX_REPLICAS {self.max_replicas}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"MAX_BATCHED_TOKENS {self.max_batched_tokens} is less than MAX_NUM_SEQS {self.max_num_seqs}: "
                "a step computes one position of every sequence at least"
            )
        return self
