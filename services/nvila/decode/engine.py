"""The seam to what generates: embeddings go in, token ids come out. Text, stop strings and media are not its business.

Shapes: T positions · D language-model width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from nvila.telemetry.logs import fields
from nvila.types import FinishReason, SamplingParams

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineStep:
    """The next ids of one generation, a stop id included. `reason` is set on the last step.

    On the first step only: `cached`, prompt positions that the prefix cache already held, and `queue_s`, how long the
    prompt waited before its computation began.
    """

    token_ids: tuple[int, ...]
    reason: FinishReason | None = None
    cached: int | None = None
    queue_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """What an engine is made for.

    `llm_path`: a Qwen2 folder. `stop_ids` end an answer; `suppressed_ids` are never sampled (media markers, rows that
    no token stands for). `max_model_len`: prompt plus answer.
    """

    llm_path: Path
    dtype: torch.dtype
    max_model_len: int
    stop_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]


class Engine(Protocol):
    """One language model. Several generations run at once."""

    @property
    def name(self) -> str:
        """With its version, as the model card says."""
        ...

    @property
    def keeps_prefixes(self) -> bool:
        """A prompt whose beginning was computed before costs only the rest."""
        ...

    def generate(
        self,
        embeds_TD: torch.Tensor,
        sampling: SamplingParams,
        *,
        request_id: str,
        cache_salt: str,
        traceparent: str = "",
    ) -> AsyncGenerator[EngineStep, None]:
        """Generate after a prompt of (positions, width) in the model's dtype; stop strings are ignored.

        The prompt must leave room for one position. Leaving the iterator, or cancelling who waits for it, frees what
        the generation holds. Requests share prefixes only under equal `cache_salt`. Raises `Unavailable` when the
        engine is dead.
        """
        ...

    async def check(self) -> None:
        """Raises `Unavailable` when the engine is dead."""
        ...

    async def close(self) -> None: ...


def choose_dtype(wanted: str) -> torch.dtype:
    """The arithmetic for `auto`, logged with what this machine has; any other value is taken as it is.

    On processors float32: 16-bit products are up to 60 times slower without AVX-512 (DESIGN §7), and only float32 gives
    the reference's greedy tokens exactly.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    is_gpu = torch.cuda.is_available()
    chosen = torch.bfloat16 if is_gpu else torch.float32
    capability = torch.cuda.get_device_name() if is_gpu else torch.backends.cpu.get_cpu_capability()
    _log.info("dtype chosen", extra=fields(dtype=str(chosen).removeprefix("torch."), processor=capability))
    return chosen


def cpu_threads(wanted: int) -> int:
    """Threads of arithmetic; 0 means one per core that this process may use."""
    return wanted or len(os.sched_getaffinity(0))
