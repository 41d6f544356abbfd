"""The capacity model: what one request costs each part, and how many of each part a load needs.

A request costs vision its tower tiles, decode its prompt positions and its answer's steps, the cache one put (if it was
encoded) and one get of its visual tokens, the network its raw pixels to vision where gateway and vision stand on
different hosts. All of it from `model/cost.py`; seconds by `hardware.Throughput`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvila.capacity.hardware import Gpu, Throughput, gpus_needed, throughput
from nvila.capacity.load import CAMERA_PERIOD_S, Mix, demand
from nvila.errors import InvalidRequest
from nvila.model import cost
from nvila.model.config import NvilaConfig

REDIS_BYTES_PER_S = 1.2e9
"""Of one Redis process, puts and gets of 1 MB shards together. Assumed: half of the 2.3 GB/s that one moved over
loopback on a two-core machine, near the 1.4 GB/s that LMCache reports between hosts (RFC #1239) and a 10 GbE link."""
REDIS_SHARE = 0.6
"""Of that which is planned for; digests spread keys evenly, but not load in a second."""
FRAMES_PER_CORE_S = 350.0
"""Frames of 720p that a gateway core decodes (measured: 700 on two cores, PyAV)."""
DECODED_PER_SAMPLED = 4.0
"""Frames decoded for each that is kept: a sparse sample seeks, but key frames are far apart. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of an average request of a mix. Seconds are of one pod, at full batches."""

    tiles: float
    positions: float
    answer_tokens: float
    vision_s: float
    decode_s: float
    put_bytes: float
    get_bytes: float
    pixel_bytes: float
    frames: float
    kv_bytes: float


def cost_of(config: NvilaConfig, mix: Mix, rates: Throughput) -> Cost:
    tiles = positions = answer = put = get = pixels = frames = 0.0
    for share, ask in mix.shares:
        one = demand(config, ask)
        tiles += share * one.tiles
        positions += share * one.positions
        answer += share * one.answer_tokens
        put += share * one.record_bytes * bool(one.chunks)
        get += share * one.record_bytes
        pixels += share * one.pixel_bytes
        frames += share * (one.tiles if ask.kind == "video" else 0)
    speaking_s = answer * rates.step_of(rates.sequences) / rates.sequences
    return Cost(
        tiles=tiles,
        positions=positions,
        answer_tokens=answer,
        vision_s=tiles / rates.tiles_per_s,
        decode_s=positions / rates.positions_per_s + speaking_s,
        put_bytes=put,
        get_bytes=get,
        pixel_bytes=pixels,
        frames=frames,
        kv_bytes=float(cost.kv_bytes(config, round(positions + answer))),
    )


@dataclass(frozen=True, kw_only=True)
class Size:
    """A deployment. `gpus`: in all. On a single machine `is_shared`: both stages take turns on the same GPUs.

    redis:        Redis processes by the bytes that pass and the bytes that are kept; keys are spread by digest
    cache_bytes:  visual tokens that are kept for `ttl_s`
    network_bytes_per_s: tokens put and got, and pixels on their way to vision
    gateway_cores: for decoding frames
    """

    requests_per_s: float
    vision_gpus: int
    decode_gpus: int
    is_shared: bool
    redis: int
    redis_bytes_per_s: float
    cache_bytes: float
    pixel_bytes_per_s: float
    gateway_cores: int
    of_shared: float
    """Requests per second over those of as many GPUs that all take turns at both stages, one after the other."""

    @property
    def gpus(self) -> int:
        return self.vision_gpus if self.is_shared else self.vision_gpus + self.decode_gpus

    @property
    def streams(self) -> float:
        """Live streams that ask once in `CAMERA_PERIOD_S`; means something for the mix `camera`."""
        return self.requests_per_s * CAMERA_PERIOD_S


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """`load_share`: of what the GPUs could do, so that queues stay short. `ttl_s`: how long tokens should
    stay for a second question; Redis evicts older ones first. `redis_memory_bytes`: of one process."""

    load_share: float = 0.7
    ttl_s: float = 600.0
    redis_memory_bytes: float = 64e9
    redis_bytes_per_s: float = REDIS_BYTES_PER_S


def size_for_rate(each: Cost, rates: Throughput, requests_per_s: float, assumed: Assumptions) -> Size:
    """What so many requests per second need, in two pools."""
    if not (requests_per_s > 0 and math.isfinite(requests_per_s)):
        raise InvalidRequest(f"{requests_per_s} requests per second; a number above 0 is needed")
    vision = math.ceil(requests_per_s * each.vision_s / assumed.load_share - 1e-9)
    replicas = max(math.ceil(requests_per_s * each.decode_s / assumed.load_share - 1e-9), 1)
    return _size(each, rates, requests_per_s, vision, replicas * rates.gpus, False, assumed)


def size_for_gpus(each: Cost, rates: Throughput, gpus: int, assumed: Assumptions) -> Size:
    """What so many GPUs can do: the split into two pools that serves most. One GPU, or fewer than a decode replica
    and a vision pod need, is shared by both stages."""
    if gpus < 1:
        raise InvalidRequest(f"{gpus} GPUs; at least 1 is needed")
    needs_vision = each.vision_s > 0
    if gpus < rates.gpus + (1 if needs_vision else 0):
        rate = assumed.load_share / (each.vision_s + each.decode_s)
        return _size(each, rates, rate, gpus, gpus, True, assumed)

    def rate_with(vision: int) -> float:
        by_decode = (gpus - vision) // rates.gpus / each.decode_s
        return min(vision / each.vision_s, by_decode) if needs_vision else by_decode

    split = gpus * each.vision_s / (each.vision_s + each.decode_s * rates.gpus)
    least, most = (1, gpus - rates.gpus) if needs_vision else (0, 0)
    around = range(math.floor(split) - rates.gpus, math.ceil(split) + rates.gpus + 1)
    best = max({min(max(one, least), most) for one in around}, key=lambda one: (rate_with(one), -one))
    decode = (gpus - best) // rates.gpus * rates.gpus
    return _size(each, rates, rate_with(best) * assumed.load_share, best, decode, False, assumed)


def _size(
    each: Cost, rates: Throughput, rate: float, vision: int, decode: int, is_shared: bool, assumed: Assumptions
) -> Size:
    gpus = vision if is_shared else vision + decode
    decode_gpus = 1 if is_shared else rates.gpus
    moved = rate * (each.put_bytes + each.get_bytes)
    kept = rate * each.put_bytes * assumed.ttl_s
    by_bandwidth = moved / (assumed.redis_bytes_per_s * REDIS_SHARE)
    return Size(
        requests_per_s=rate,
        vision_gpus=vision,
        decode_gpus=decode,
        is_shared=is_shared,
        redis=max(1, math.ceil(max(by_bandwidth, kept / assumed.redis_memory_bytes) - 1e-9)) if moved else 0,
        redis_bytes_per_s=moved,
        cache_bytes=kept,
        pixel_bytes_per_s=rate * each.pixel_bytes,
        of_shared=rate / (gpus * assumed.load_share / (each.vision_s + each.decode_s * decode_gpus)),
        gateway_cores=max(1, math.ceil(rate * each.frames * DECODED_PER_SAMPLED / FRAMES_PER_CORE_S)),
    )


def rates_for(
    config: NvilaConfig,
    mix: Mix,
    vision: Gpu,
    decode: Gpu,
    *,
    gpus: int | None = None,
    tiles_per_s: float | None = None,
    positions_per_s: float | None = None,
) -> Throughput:
    """Throughput for a mix: its mean length decides what keys and values cost."""
    lengths = [(share, demand(config, ask)) for share, ask in mix.shares]
    mean = sum(share * (one.positions + one.answer_tokens / 2) for share, one in lengths)
    return throughput(
        config,
        vision,
        decode,
        gpus=gpus or gpus_needed(config, decode),
        mean_positions=max(round(mean), 1),
        tiles_per_s=tiles_per_s,
        positions_per_s=positions_per_s,
    )
