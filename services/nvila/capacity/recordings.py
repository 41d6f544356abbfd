"""What cameras cost that are recorded day and night: towers, what is kept, and the traffic behind it.

Taking a recording in encodes each group of `temporal_group` sampled frames once, unless it shows what the group before
it showed: `1 - still` of the groups, and of a still scene one group in `floor_s`. A group that is encoded is put into
Redis once by vision, comes back to the worker beside Redis, and is put into the cold store once; nothing is read. A
group at a chunk's end that is not full costs as much as a full one. Footage of a camera is kept as it came.

Questions are not in it: `sizing.py` has what they cost, and tokens that Redis has forgotten are read from the cold
store once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvila.capacity.hardware import Throughput
from nvila.errors import InvalidRequest
from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.types import MediaKind, TokenDtype

DAY_S = 86_400
RECORD_OVERHEAD_BYTES = 300
"""A record's manifest, with digests of one or two shards, and its length. A test holds it to what is written."""
VECTOR_VALUE_BYTES = 4
"""float32, one value per dimension of the language model: a chunk's row in the database."""
FOOTAGE_BITS_PER_S = 4e6
"""Of a camera's stream: H.264, 1080p. Assumed."""
KEPT = (TokenDtype.BFLOAT16, TokenDtype.INT8)
"""Precisions of `decode.settings.token_dtype` that production chooses from."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How cameras are cut (`ChunkPolicy`, whose defaults these are), and the share of time that nothing happens."""

    fps: float = 1.0
    chunk_s: float = 32.0
    floor_s: float = 60.0
    still: float = 0.0

    def __post_init__(self) -> None:
        for name in ("fps", "chunk_s", "floor_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{name}: {value} given, a number above 0 is needed")
        if self.chunk_s * self.fps < 1:
            raise InvalidRequest(f"a chunk of {self.chunk_s:g} s holds no frame at {self.fps:g} frames per second")
        if not 0 <= self.still <= 1:
            raise InvalidRequest(f"still: {self.still} given, a share from 0 to 1 is needed")


@dataclass(frozen=True, kw_only=True)
class CameraCost:
    """Of one camera. `groups_per_s`: that are encoded; each is one put to Redis and one to the cold store."""

    groups_per_s: float
    tiles_per_s: float
    record_bytes: float
    footage_bytes_per_s: float
    vector_bytes_per_s: float

    @property
    def token_bytes_per_s(self) -> float:
        return self.groups_per_s * self.record_bytes

    @property
    def store_bytes_per_s(self) -> float:
        """To the cold store: tokens and footage."""
        return self.token_bytes_per_s + self.footage_bytes_per_s


def camera_cost(
    config: NvilaConfig, sampling: Sampling, dtype: TokenDtype, *, footage_bits_per_s: float = FOOTAGE_BITS_PER_S
) -> CameraCost:
    if not (math.isfinite(footage_bits_per_s) and footage_bits_per_s >= 0):
        raise InvalidRequest(f"footage of {footage_bits_per_s} bits per second; a number from 0 is needed")
    group = config.temporal_group
    in_chunk = math.ceil(round(sampling.chunk_s * sampling.fps, 6) / group)
    floor_groups = math.ceil(sampling.floor_s * sampling.fps / group)
    encoded = 1 - sampling.still + sampling.still / floor_groups
    groups_per_s = encoded * in_chunk / sampling.chunk_s
    levels = cost.levels(config, kind=MediaKind.VIDEO, is_tiled=False, frames=group, pool_sizes=config.pool_sizes)
    tiles = cost.tower_tiles(config, kind=MediaKind.VIDEO, is_tiled=False, frames=group)
    return CameraCost(
        groups_per_s=groups_per_s,
        tiles_per_s=groups_per_s * tiles,
        record_bytes=float(cost.record_bytes(levels, config.llm_width, dtype) + RECORD_OVERHEAD_BYTES),
        footage_bytes_per_s=footage_bits_per_s / 8,
        vector_bytes_per_s=config.llm_width * VECTOR_VALUE_BYTES / sampling.chunk_s,
    )


def cameras_per_gpu(each: CameraCost, rates: Throughput, load_share: float) -> int:
    """Live streams that one vision pod takes in, beside no other work."""
    return math.floor(load_share * rates.tiles_per_s / each.tiles_per_s)
