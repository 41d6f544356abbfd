"""What must hold before the vision service says that it is ready: the largest allowed request fits every limit."""

from __future__ import annotations

import os
from pathlib import Path

from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.types import MediaKind, TokenDtype
from nvila.vision.contract import MAX_MESSAGE_BYTES
from nvila.vision.settings import Settings

_SPARE_SHARED_BYTES = 64 << 20
"""What Triton's Python backend takes at start, before any request, and its bookkeeping."""


def reasons_not_to_start(settings: Settings, config: NvilaConfig, free_shared_bytes: int) -> list[str]:
    """Each names the setting and both numbers; empty when all is well."""
    reasons = []
    frames = settings.max_frames
    if frames % config.temporal_group:
        reasons.append(
            f"NVILA_VISION_MAX_FRAMES {frames} is not a multiple of the temporal group {config.temporal_group}"
        )
        frames += -frames % config.temporal_group
    pixels = frames * config.tile_px**2 * 3
    if pixels > settings.max_request_bytes:
        reasons.append(
            f"{frames} frames of {config.tile_px}² pixels are {pixels:,} bytes, NVILA_VISION_MAX_REQUEST_BYTES allows "
            f"{settings.max_request_bytes:,}"
        )
    if frames > settings.max_pending_tiles:
        reasons.append(
            f"{frames} frames are more tiles than NVILA_VISION_MAX_PENDING_TILES {settings.max_pending_tiles}"
        )
    levels = cost.levels(config, kind=MediaKind.VIDEO, is_tiled=False, frames=frames, pool_sizes=config.pool_sizes)
    answer = cost.record_bytes(levels, config.llm_width, TokenDtype.FLOAT32)
    if max(pixels, answer) > MAX_MESSAGE_BYTES:
        reasons.append(
            f"{frames} frames need a message of {max(pixels, answer):,} bytes, gRPC takes {MAX_MESSAGE_BYTES:,}"
        )
    if pixels > settings.max_pending_bytes:
        reasons.append(
            f"{frames} frames are {pixels:,} bytes, NVILA_VISION_MAX_PENDING_BYTES {settings.max_pending_bytes:,}"
        )
    shared = settings.max_pending_bytes + _SPARE_SHARED_BYTES
    if shared > free_shared_bytes:
        reasons.append(
            f"open calls (NVILA_VISION_MAX_PENDING_BYTES) take up to {shared:,} bytes of shared memory, /dev/shm has "
            f"{free_shared_bytes:,} free: enlarge it or let fewer bytes wait"
        )
    return reasons


def free_shared_bytes(folder: Path = Path("/dev/shm")) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize
