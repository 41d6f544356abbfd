"""Puts a decode service together from its settings: the only place that names concrete classes. Knows nothing of Ray.

`app.py` runs it inside a Ray Serve replica; work in one process uses it as it is.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import torch

from nvila.cache.codec import RecordFormat
from nvila.cache.store import TokenStore
from nvila.decode.engine import DTYPES, Engine, EngineModel, choose_dtype, cpu_threads
from nvila.decode.prompt import PromptBuilder, PromptLimits
from nvila.decode.service import DecodeService
from nvila.decode.settings import Settings
from nvila.decode.text import Vocabulary
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import NvilaConfig
from nvila.telemetry.logs import fields
from nvila.telemetry.metrics import Metrics
from nvila.types import ModelCard, TokenDtype

_log = logging.getLogger(__name__)

LONGEST_DEFAULT = 32_768
"""Positions taken by default from a model that was made for more: keys and values of one prompt must fit in memory."""


@dataclass(frozen=True, kw_only=True)
class Decode:
    """A running decode service and what its process needs to know of it. `form`: what visual-token records must be."""

    service: DecodeService
    card: ModelCard
    form: RecordFormat


@asynccontextmanager
async def build(settings: Settings, metrics: Metrics) -> AsyncIterator[Decode]:
    """Load the model, start the engine, connect to the cache; close all of it at the end. Blocks while loading."""
    checkpoint = Checkpoint.open(settings.model)
    engine_name = _engine_name(settings)
    dtype, is_4_bit = choose_precision(checkpoint, engine_name, settings.dtype)
    max_model_len = model_length(checkpoint.config, settings.max_model_len)
    form = RecordFormat(
        width=checkpoint.config.llm_width,
        dtype=token_dtype(settings.token_dtype, dtype),
        vision_revision=await asyncio.to_thread(lambda: checkpoint.vision_revision),
    )
    model = EngineModel(
        llm_path=checkpoint.llm_path if is_4_bit else checkpoint.dense_llm_path,
        dtype=dtype,
        max_model_len=max_model_len,
        stop_ids=checkpoint.stop_ids,
        suppressed_ids=checkpoint.suppressed_ids,
    )
    async with AsyncExitStack() as closing:
        engine = _start_engine(engine_name, model, settings)
        closing.push_async_callback(engine.close)
        tokens = None
        if settings.redis_url:
            tokens = TokenStore.open(
                settings.redis_url, metrics, ttl_s=settings.redis_ttl_s, timeout_s=settings.redis_timeout_s
            )
            closing.push_async_callback(tokens.close)
        card = ModelCard(
            name=settings.model_name or checkpoint.name,
            vision_revision=form.vision_revision,
            config_json=checkpoint.config.to_json(),
            max_model_len=max_model_len,
            token_dtype=form.dtype,
            engine=engine.name,
            is_random=checkpoint.is_random,
        )
        limits = PromptLimits(
            max_model_len=max_model_len,
            token_wait_s=settings.token_wait_s,
            prefill_step=settings.prefill_step_tokens,
        )
        service = DecodeService(
            PromptBuilder(checkpoint, dtype, form, tokens, limits),
            engine,
            Vocabulary(checkpoint.tokenizer()),
            card,
            metrics,
            checkpoint.stop_ids,
        )
        _log.info("model loaded", extra=fields(model=card.name, engine=card.engine, max_model_len=max_model_len))
        yield Decode(service=service, card=card, form=form)


def model_length(config: NvilaConfig, wanted: int) -> int:
    """Positions of prompt plus answer: `wanted`, or for 0 what the model was made for, capped."""
    if wanted > config.max_positions:
        raise ValueError(
            f"NVILA_DECODE_MAX_MODEL_LEN is {wanted:,}; the model was made for {config.max_positions:,} positions"
        )
    return wanted or min(config.max_positions, LONGEST_DEFAULT)


def choose_precision(
    checkpoint: Checkpoint, engine: str, wanted: str, has_kernel: Callable[[], bool] | None = None
) -> tuple[torch.dtype, bool]:
    """The arithmetic, and whether a language model that is stored in four bits is served so.

    Only vLLM has kernels for four bits, which compute in 16: `auto` is bfloat16 for them on a processor, too. Where
    they are missing, or float32 is asked for, the model is written out in 16 bits, and the log says why.
    """
    if not checkpoint.has_int4_llm:
        return choose_dtype(wanted), False
    if engine != "vllm":
        reason = f"the {engine} engine has no kernel for four bits"
    elif wanted == "float32":
        reason = "kernels for four bits compute in 16 bits, NVILA_DECODE_DTYPE is float32"
    elif not (has_kernel or has_4_bit_kernel)():
        reason = "this processor has no kernel for four bits (AVX-512)"
    else:
        _log.info("the language model is served in four bits", extra=fields(model=checkpoint.name))
        return (torch.bfloat16 if wanted == "auto" else DTYPES[wanted]), True
    _log.warning("the language model is served dequantised", extra=fields(model=checkpoint.name, reason=reason))
    return choose_dtype(wanted), False


def has_4_bit_kernel() -> bool:
    """vLLM's for GPUs, or the one for processors, which is made for AVX-512 only (DESIGN §7)."""
    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def token_dtype(wanted: str, dtype: torch.dtype) -> TokenDtype:
    """How visual tokens are stored for a model of this arithmetic."""
    if wanted != "auto":
        return TokenDtype(wanted)
    return TokenDtype.FLOAT32 if dtype == torch.float32 else TokenDtype.BFLOAT16


def _engine_name(settings: Settings) -> str:
    if settings.engine == "auto":
        return "vllm"
    if settings.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "NVILA_DECODE_ENGINE is vllm, which is not installed; install nvila[decode-cpu] or [decode-gpu]"
        )
    return settings.engine


def _start_engine(name: str, model: EngineModel, settings: Settings) -> Engine:
    threads = cpu_threads(settings.cpu_threads)
    if name == "transformers":
        from nvila.decode.engine_transformers import TransformersEngine

        return TransformersEngine(model)
    from nvila.decode.engine_vllm import VllmEngine

    return VllmEngine.start(
        model,
        threads=threads,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_memory=settings.gpu_memory,
        gpus=settings.replica_gpus,
    )
