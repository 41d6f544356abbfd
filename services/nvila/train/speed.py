"""Training speed in bf16 and FP8, with and without gradient checkpointing, in the form of the paper's Table 4.

A language model of the published size with random weights on random rows: speed and memory do not depend on what the
numbers mean. The loss after a few steps on the same rows shows that FP8 learns like bf16. Without a GPU that has FP8,
its lines stay open and say why.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from nvila.train import fp8
from nvila.train.attention import PACKED
from nvila.train.tables import Table

SIZES: dict[str, dict[str, int]] = {
    "toy": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    # Qwen2.5-1.5B and -7B, the language models of NVILA-Lite-2B and NVILA-8B (NVILA-SPEC §1).
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "8b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
KV_HEADS = {"toy": 1, "2b": 2, "8b": 4}
FP8_SMALLEST = {"toy": 128, "2b": 1536, "8b": 3584}
VOCABULARY = {"toy": 512, "2b": 32_768, "8b": 32_768}
POSITIONS = {"toy": 256, "2b": 8192, "8b": 4096}
SAMPLE_POSITIONS = 1024


def compare(size: str, steps: int) -> Table:
    """Every combination that runs here, on a GPU with the same parts compiled. A step is a forward, a backward and a
    fused SGD step in place of AdamW, whose states alone would not fit beside 8 billion weights."""
    rows = []
    for precision in ("bf16", "fp8"):
        for recomputes in (True, False):
            obstacle = fp8.obstacle() if precision == "fp8" else ""
            measured = (None, None, None, None) if obstacle else _measure(size, steps, precision, recomputes)
            rows.append((precision, "yes" if recomputes else "no", *measured))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    note = f"{device}, torch {torch.__version__}, {size}, rows of {POSITIONS[size]:,} positions, {steps} steps."
    reason = fp8.obstacle()
    columns = ("precision", "gradient checkpointing", "positions/s", "memory GB", "first loss", "last loss")
    return Table(
        title="Training speed (Table 4)",
        columns=columns,
        rows=tuple(rows),
        note=f"{note} Open: {reason}." if reason else note,
    )


def _measure(size: str, steps: int, precision: str, recomputes: bool) -> tuple[Any, ...]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        llm = _make(size).to(dtype)
        row = torch.randint(0, VOCABULARY[size], (1, POSITIONS[size]))
    llm.train()
    if recomputes:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    if precision == "fp8":
        fp8.convert(llm, FP8_SMALLEST[size])
    elif device.type == "cuda":
        fp8.compile_products(llm)  # as FP8 is: like is compared with like
    optimizer = torch.optim.SGD(llm.parameters(), lr=1e-2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    try:
        for step in range(steps + 2):
            if step == 2:  # the first ones warm up and compile
                _wait(device)
                began = time.monotonic()
            loss = _loss(llm, row)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        _wait(device)
    except torch.OutOfMemoryError:
        return None, "does not fit", None, None
    rate = steps * POSITIONS[size] / (time.monotonic() - began)
    memory = round(torch.cuda.max_memory_allocated() / 1e9, 1) if device.type == "cuda" else None
    return round(rate), memory, round(losses[0], 4), round(losses[-1], 4)


def _make(size: str) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        **SIZES[size],
        num_key_value_heads=KV_HEADS[size],
        vocab_size=VOCABULARY[size],
        max_position_embeddings=POSITIONS[size],
        tie_word_embeddings=True,
    )
    llm = Qwen2ForCausalLM(config)
    llm.set_attn_implementation(PACKED)
    return llm


def _loss(llm: Qwen2ForCausalLM, row_1P: Tensor) -> Tensor:
    positions = row_1P.shape[1]
    length = min(SAMPLE_POSITIONS, positions)
    hidden_1PD = llm.model(
        input_ids=row_1P,
        position_ids=torch.arange(positions, device=row_1P.device)[None] % length,
        attention_mask={"full_attention": None},
        use_cache=False,
        lengths=(length,) * (positions // length),
    ).last_hidden_state
    logits_PV = llm.lm_head(hidden_1PD[0, :-1]).float()
    return functional.cross_entropy(logits_PV, row_1P[0, 1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
