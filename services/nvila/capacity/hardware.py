"""What GPUs do for this model: peaks from data sheets, the share of them that is reached, and what follows per second.

Peaks are the makers' dense figures. The shares are **assumed**: two numbers for all GPUs, chosen so that the published
single-request measurements of NVILA on an A100 (github.com/NVlabs/VILA README: 82.1 tokens/s for NVILA-8B, 0.72 s to
the first token of 64 frames for NVILA-8B-Video) come out; a test holds them to that. Give measured throughput instead
wherever you have it (`Throughput` is what everything else uses).
"""

from __future__ import annotations

from dataclasses import dataclass

from nvila.capacity.models import llm_parameters, step_parameters
from nvila.errors import LimitExceeded
from nvila.model import cost
from nvila.model.config import NvilaConfig

WEIGHT_BYTES = 2
KV_BYTES = 2
"""16-bit weights, keys and values."""
GPU_MEMORY_SHARE = 0.9
"""Of a GPU's memory that vLLM takes (`decode.settings.gpu_memory`)."""
WORKSPACE_BYTES = 2 << 30
"""Activations and graphs beside weights and cache. Assumed."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`tflops`: dense 16-bit matrix arithmetic with 32-bit sums, 10^12 per second; `memory_bytes_per_s`: bandwidth."""

    name: str
    memory_bytes: int
    tflops: float
    memory_bytes_per_s: float
    source: str
    compute_share: float = 0.40
    bandwidth_share: float = 0.60


_GB = 10**9
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="t4", memory_bytes=16 * _GB, tflops=65, memory_bytes_per_s=320e9, source="NVIDIA T4 data sheet"),
        Gpu(name="l4", memory_bytes=24 * _GB, tflops=121, memory_bytes_per_s=300e9, source="NVIDIA L4 data sheet"),
        Gpu(name="a10", memory_bytes=24 * _GB, tflops=125, memory_bytes_per_s=600e9, source="NVIDIA A10 data sheet"),
        Gpu(name="l40s", memory_bytes=48 * _GB, tflops=362, memory_bytes_per_s=864e9, source="NVIDIA L40S data sheet"),
        Gpu(
            name="a100", memory_bytes=80 * _GB, tflops=312, memory_bytes_per_s=2039e9, source="A100 80GB SXM data sheet"
        ),
        Gpu(name="h100", memory_bytes=80 * _GB, tflops=989, memory_bytes_per_s=3350e9, source="H100 SXM data sheet"),
        Gpu(name="h200", memory_bytes=141 * _GB, tflops=989, memory_bytes_per_s=4800e9, source="H200 SXM data sheet"),
        Gpu(
            name="b200",
            memory_bytes=180 * _GB,
            tflops=2250,
            memory_bytes_per_s=7700e9,
            source="DGX B200 data sheet / 8",
        ),
        Gpu(
            name="h100-3g",
            memory_bytes=40 * _GB,
            tflops=989 * 3 / 7,
            memory_bytes_per_s=3350e9 / 2,
            source="MIG 3g.40gb of an H100: 3 of 7 compute slices, half of the memory",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What one pod of each pool does. All the capacity model and the simulator know of hardware.

    tiles_per_s:       tower tiles of one vision pod, batches full
    positions_per_s:   prompt positions prefilled by one decode replica that generates nothing meanwhile
    step_s:            one decoding step for a batch of one
    step_per_sequence_s: what each further sequence adds to a step: its keys and values are read
    sequences:         generated together by one replica, as memory and settings allow
    gpus:              of one decode replica
    """

    tiles_per_s: float
    positions_per_s: float
    step_s: float
    step_per_sequence_s: float
    sequences: int
    gpus: int = 1
    is_measured: bool = False

    def step_of(self, sequences: int) -> float:
        """Seconds of one step for so many sequences together."""
        return self.step_s + self.step_per_sequence_s * max(sequences - 1, 0)


def throughput(
    config: NvilaConfig,
    vision: Gpu,
    decode: Gpu,
    *,
    gpus: int = 1,
    mean_positions: int = 4096,
    max_sequences: int = 32,
    tiles_per_s: float | None = None,
    positions_per_s: float | None = None,
) -> Throughput:
    """Assumed throughput of a model on these GPUs; given numbers are measured ones and win.

    `mean_positions`: of a sequence while it generates, for what its keys and values cost to read and to hold. Raises
    `LimitExceeded` when the weights do not fit.
    """
    weights = llm_parameters(config.llm) * WEIGHT_BYTES
    room = int(gpus * (decode.memory_bytes * GPU_MEMORY_SHARE - WORKSPACE_BYTES)) - weights
    if room <= 0:
        raise LimitExceeded.of(
            f"bytes of {config.name} on {gpus} × {decode.name}",
            asked=weights,
            limit=int(gpus * (decode.memory_bytes * GPU_MEMORY_SHARE - WORKSPACE_BYTES)),
        )
    kv = cost.kv_bytes(config, mean_positions, KV_BYTES)
    bandwidth = gpus * decode.memory_bytes_per_s * decode.bandwidth_share
    per_position = cost.prefill_flops(config, mean_positions) / mean_positions
    return Throughput(
        tiles_per_s=tiles_per_s or vision.tflops * 1e12 * vision.compute_share / cost.tower_flops(config, 1),
        positions_per_s=positions_per_s or gpus * decode.tflops * 1e12 * decode.compute_share / per_position,
        step_s=(step_parameters(config.llm) * WEIGHT_BYTES + kv) / bandwidth,
        step_per_sequence_s=kv / bandwidth,
        sequences=max(1, min(max_sequences, room // kv)),
        gpus=gpus,
        is_measured=bool(tiles_per_s and positions_per_s),
    )


def gpus_needed(config: NvilaConfig, decode: Gpu) -> int:
    """GPUs over which a decode replica is spread, for its weights and one prompt of 16,384 positions; a power of 2."""
    wanted = llm_parameters(config.llm) * WEIGHT_BYTES + cost.kv_bytes(config, 16_384, KV_BYTES)
    gpus = 1
    while gpus * (decode.memory_bytes * GPU_MEMORY_SHARE - WORKSPACE_BYTES) < wanted:
        gpus *= 2
    return gpus
