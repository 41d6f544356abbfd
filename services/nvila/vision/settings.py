"""Settings of the vision service, read once from `NVILA_VISION_*` by the backend inside Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """A malformed value stops the process and names the variable."""

    model_config = SettingsConfigDict(env_prefix="NVILA_VISION_", extra="ignore")

    # the model
    model: Path
    """NVILA checkpoint: a folder in any published layout, or a hub id (organisation/name, @revision to pin it)."""
    device: str = "auto"
    """`auto`: the GPU that Triton gives the instance, the processor where there is none. Or `cpu`, `cuda:0`, …"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Arithmetic of tower and projector. `auto`: float16 on a GPU, as the reference computes (NVILA-SPEC §6.7), float32
    on a processor (DESIGN §7)."""
    precision: Literal["auto", "int8"] = "auto"
    """Of the tower. `auto`: as the checkpoint stores it; one of `nvila quantize tower` computes in 8 bits, where the
    device has no instructions for that the same numbers in `dtype`, and the log says so. `int8`: refuse to start
    unless the checkpoint is in 8 bits and they are the faster way on this device."""
    cpu_threads: int = Field(default=0, ge=0)
    """Threads of arithmetic on a processor; 0: what the environment says (OMP_NUM_THREADS), else one per core."""

    # limits
    max_frames: int = Field(default=256, ge=1)
    """Most frames of one call."""
    max_request_bytes: int = Field(default=512 << 20, ge=1 << 20, lt=1 << 31)
    """Most bytes of pixels of one call; the largest image that is tiled here must fit, too."""
    max_batch_tiles: int = Field(default=16, ge=1)
    """Most tiles of one tower call. Larger batches fill a GPU better and make everybody wait longer."""
    max_pending_tiles: int = Field(default=1024, ge=1)
    """Tiles that may wait; beyond that requests are refused as overload."""
    max_pending_bytes: int = Field(default=768 << 20, ge=1 << 20)
    """Bytes of pixels of all calls that are open; beyond that, too, requests are refused. They lie in shared memory,
    which must be that large."""

    # the token cache
    redis_url: str = ""
    """redis[s][+cluster]://[user:password@]host:port/db. Empty: nothing is published, tokens travel inline."""
    redis_ttl_s: float = Field(default=3600, gt=0)
    """How long a record lives after it was made; who reads it prolongs that (decode: its redis_ttl_s)."""
    redis_timeout_s: float = Field(default=2, gt=0)
    """Of one round trip."""

    # logs
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Of our own log lines."""
    log_style: Literal["json", "text"] = "json"
    """One JSON object per line, or plain text for people."""
