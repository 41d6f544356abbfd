"""The plain engine: transformers' Qwen2 with its own key-value cache, one generation after the other.

The reference that vLLM is compared with, and the default for work in one process. No paging, no batching, no prefix
cache. Needs neither vLLM nor Ray.

Shapes: T positions · D language-model width · V vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import torch
import transformers
from transformers import Qwen2ForCausalLM

from nvila.decode.engine import EngineModel, EngineStep
from nvila.types import FinishReason, SamplingParams


class TransformersEngine:
    """Runs on a GPU when there is one. Generations take turns token by token."""

    name = f"transformers {transformers.__version__}"
    keeps_prefixes = False

    def __init__(self, model: EngineModel) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._llm = Qwen2ForCausalLM.from_pretrained(model.llm_path, dtype=model.dtype, local_files_only=True)
        self._llm.to(self._device).eval()
        self._model = model
        self._suppressed = torch.tensor(model.suppressed_ids, dtype=torch.long, device=self._device)
        self._thread = ThreadPoolExecutor(1, "nvila-llm")
        self.running = 0
        """Generations that hold keys and values now."""

    async def generate(
        self,
        embeds_TD: torch.Tensor,
        sampling: SamplingParams,
        *,
        request_id: str,
        cache_salt: str,
        traceparent: str = "",
    ) -> AsyncGenerator[EngineStep, None]:
        """As `Engine.generate`; `request_id`, `cache_salt` and `traceparent` concern engines that share things."""
        room = self._model.max_model_len - len(embeds_TD)
        assert room >= 1, f"{len(embeds_TD)} positions leave no room in {self._model.max_model_len}"
        run = _Run(self._llm, sampling, self._suppressed)
        limit = min(sampling.max_tokens, room)
        self.running += 1
        try:
            entry = embeds_TD.to(self._device, self._model.dtype)[None]
            for count in range(1, limit + 1):
                token_id = await self._in_thread(run.step, entry)
                reason = self._reason(token_id, sampling, is_last=count == limit)
                yield EngineStep((token_id,), reason, 0 if count == 1 else None)
                if reason is not None:
                    return
                entry = await self._in_thread(self._embed, token_id)
        finally:
            self.running -= 1

    def _reason(self, token_id: int, sampling: SamplingParams, *, is_last: bool) -> FinishReason | None:
        if token_id in self._model.stop_ids and not sampling.ignore_eos:
            return FinishReason.STOP
        return FinishReason.LENGTH if is_last else None

    async def _in_thread(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _embed(self, token_id: int) -> torch.Tensor:
        with torch.inference_mode():
            embedded: torch.Tensor = self._llm.get_input_embeddings()(torch.tensor([[token_id]], device=self._device))
            return embedded

    async def check(self) -> None:
        """It lives as long as its process."""

    async def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class _Run:
    """One generation's keys, values and random numbers."""

    def __init__(self, llm: Qwen2ForCausalLM, sampling: SamplingParams, suppressed: torch.Tensor) -> None:
        self._llm = llm
        self._sampling = sampling
        self._suppressed = suppressed
        self._past: Any = None
        self._random = torch.Generator()
        self._random.manual_seed(sampling.seed) if sampling.seed is not None else self._random.seed()

    @torch.inference_mode()
    def step(self, entry_1TD: torch.Tensor) -> int:
        output = self._llm(
            inputs_embeds=entry_1TD, past_key_values=self._past, use_cache=True, logits_to_keep=1, return_dict=True
        )
        self._past = output.past_key_values
        logits_V = output.logits[0, -1].float()
        logits_V[self._suppressed] = -torch.inf
        return choose(logits_V.cpu(), self._sampling, self._random)


def choose(logits_V: torch.Tensor, sampling: SamplingParams, random: torch.Generator) -> int:
    """The next id: the likeliest (lowest id among equals) at temperature 0, else drawn from what the limits leave.

    logits_V: float32. Order as vLLM's sampler: temperature, min_p, top_k, top_p.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if sampling.min_p > 0:
        probabilities_V = logits_V.softmax(-1)
        logits_V = logits_V.masked_fill(probabilities_V < sampling.min_p * probabilities_V.max(), -torch.inf)
    if 0 < sampling.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities_V = logits_V.softmax(-1)
    if sampling.top_p < 1:
        ordered_V, order_V = probabilities_V.sort(descending=True)
        is_beyond_V = ordered_V.cumsum(-1) - ordered_V >= sampling.top_p
        probabilities_V[order_V[is_beyond_V]] = 0
    return int(torch.multinomial(probabilities_V, 1, generator=random))


async def collect(steps: AsyncGenerator[EngineStep, None]) -> tuple[list[int], FinishReason | None]:
    """All ids of a generation and why it ended; for tests and benchmarks."""
    ids: list[int] = []
    reason = None
    async with aclosing(steps) as opened:
        async for step in opened:
            ids.extend(step.token_ids)
            reason = step.reason
    return ids, reason
