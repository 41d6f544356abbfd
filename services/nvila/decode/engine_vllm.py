"""vLLM behind the engine seam: continuous batching, paged keys and values, a prefix cache that works on embeddings.

vLLM serves the language-model half only (ANCHORS P37), without a tokenizer: ids are the seam. Its engine core runs in a
process of its own, started here.

Shapes: T positions · D language-model width.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import torch

from nvila.decode.engine import EngineModel, EngineStep
from nvila.errors import Unavailable
from nvila.telemetry import tracing
from nvila.telemetry.logs import fields
from nvila.types import FinishReason, SamplingParams

_log = logging.getLogger(__name__)

SUPPRESSED_BIAS = -100.0
"""Added to the logits of ids that must not be sampled: the strongest that vLLM takes, e^-100 on the odds."""

CPU_BLOCK_TOKENS = 32
"""Positions per block of keys and values on a processor: the smallest that vLLM's kernels there like; prefixes are
shared in whole blocks. vLLM's own default is 128."""

_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class VllmEngine:
    """Make it with `start`, inside the event loop that will use it; `close` it."""

    keeps_prefixes = True

    def __init__(self, llm: Any, model: EngineModel) -> None:
        self._llm = llm
        self._model = model
        self._bias = dict.fromkeys(model.suppressed_ids, SUPPRESSED_BIAS) or None

    @classmethod
    def start(
        cls,
        model: EngineModel,
        *,
        threads: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        kv_cache_bytes: int,
        gpu_memory: float,
        gpus: int,
    ) -> VllmEngine:
        """Start the engine core and wait until it can generate (10-30 s on a processor). Sizes as in `Settings`."""
        is_gpu = torch.cuda.is_available()
        _prepare_environment(threads, is_gpu)
        logging.getLogger("vllm").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {
            "model": str(model.llm_path),
            "skip_tokenizer_init": True,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # not the folder's own: its penalties would apply unseen
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_batched_tokens,
            "kv_cache_memory_bytes": kv_cache_bytes or None,
            "gpu_memory_utilization": gpu_memory,
            "tensor_parallel_size": max(1, gpus),
            "use_tqdm_on_load": False,
            "served_model_name": model.llm_path.parent.name,  # a label of its metrics
            "otlp_traces_endpoint": tracing.traces_endpoint(),
        }
        if not is_gpu:
            # Eager: compiling costs minutes at start. One process for engine core and worker: 10 s and 0.7 GB less.
            arguments |= {
                "enforce_eager": True,
                "distributed_executor_backend": "uni",
                "block_size": CPU_BLOCK_TOKENS,
                "kv_cache_memory_bytes": kv_cache_bytes or default_kv_cache_bytes(model),
            }
        return cls(AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments)), model)

    @property
    def name(self) -> str:
        import vllm

        return f"vllm {vllm.__version__}"

    async def generate(
        self,
        embeds_TD: torch.Tensor,
        sampling: SamplingParams,
        *,
        request_id: str,
        cache_salt: str,
        traceparent: str = "",
    ) -> AsyncGenerator[EngineStep, None]:
        """As `Engine.generate`. Positions that are missing from the prefix cache are computed in pieces, between which
        other generations go on."""
        from vllm.exceptions import VLLMError
        from vllm.inputs.engine import embeds_input

        outputs = self._llm.generate(
            embeds_input(embeds_TD.to("cpu", self._model.dtype).contiguous(), cache_salt=cache_salt or None),
            self._sampling(sampling, room=self._model.max_model_len - len(embeds_TD)),
            request_id,
            trace_headers={"traceparent": traceparent} if traceparent and tracing.traces_endpoint() else None,
        )
        is_first = True
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    answer = output.outputs[0]
                    if answer.finish_reason is not None and answer.finish_reason not in _REASONS:
                        raise Unavailable(f"the engine ended the generation: {answer.finish_reason}")
                    reason = _REASONS[answer.finish_reason] if answer.finish_reason else None
                    step = EngineStep(tuple(answer.token_ids), reason)
                    if is_first:
                        times = output.metrics
                        queue_s = max(0.0, times.scheduled_ts - times.queued_ts)
                        step = replace(step, cached=output.num_cached_tokens or 0, queue_s=queue_s)
                    is_first = False
                    yield step
        except VLLMError as error:
            _log.error("the engine failed", extra=fields(error=type(error).__name__, reason=str(error)))
            raise Unavailable("the engine failed; worth trying again") from error

    def _sampling(self, sampling: SamplingParams, *, room: int) -> Any:
        from vllm.sampling_params import RequestOutputKind
        from vllm.sampling_params import SamplingParams as VllmSamplingParams

        assert room >= 1, "the prompt leaves no room for an answer"
        return VllmSamplingParams(
            max_tokens=min(sampling.max_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            # vLLM's seeds are of 64 bits with sign; ours without.
            seed=None if sampling.seed is None else sampling.seed & (2**63 - 1),
            stop_token_ids=[] if sampling.ignore_eos else list(self._model.stop_ids),
            ignore_eos=True,  # its own idea of the end; ours are the stop ids
            logit_bias=self._bias,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    async def check(self) -> None:
        if self._llm.errored:
            raise Unavailable("the engine is dead")

    async def close(self) -> None:
        await asyncio.to_thread(self._llm.shutdown, 5.0)


def default_kv_cache_bytes(model: EngineModel) -> int:
    """Room for two sequences of full length, 256 MiB at least."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.llm_path, local_files_only=True)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width * model.dtype.itemsize
    return int(max(256 << 20, 2 * per_position * (model.max_model_len + CPU_BLOCK_TOKENS)))


def _prepare_environment(threads: int, is_gpu: bool) -> None:
    """What vLLM, and the process it starts, read from the environment: the one place where we write to it.

    vLLM offers no arguments for these. Values that the operator has set win.
    """
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about our choices, a dozen per start
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if not is_gpu:
        # The worker in the engine core's own process, and no pinning of threads to cores that others use too.
        wanted |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray sets it to a replica's processor share
        torch.set_num_threads(threads)
    if tracing.traces_endpoint() is not None:
        # vLLM's spans of requests are made in this process, by our provider, which is configured by now. The engine
        # core's own are about loading weights, each a trace of its own: switched off.
        wanted["OTEL_SDK_DISABLED"] = "true"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
