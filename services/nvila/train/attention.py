"""Attention over a packed row: every sample sees only itself, and no mask of the row's size is ever made.

Registered with `transformers` under `PACKED`; the lengths of the samples come through the model's keyword arguments.
On a GPU in 16 bits it is one variable-length flash-attention call; elsewhere one scaled-dot-product call per sample,
which computes the same. Positions after the last sample (packing's dummy and filling) get zeros.

A heads · K key-value heads · P positions of the row · E channels per head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "nvila_packed"

logger = logging.getLogger(__name__)


def packed_attention(
    module: nn.Module, q_1APE: Tensor, k_1KPE: Tensor, v_1KPE: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What `transformers` calls in each block, with `lengths` given to the model. Returns (1, P, A, E)."""
    lengths: Sequence[int] = kwargs["lengths"]
    scale: float = kwargs["scaling"]
    # Under autocast, rotation in float32 leaves queries and keys wider than values.
    q_1APE, k_1KPE = q_1APE.to(v_1KPE.dtype), k_1KPE.to(v_1KPE.dtype)
    if q_1APE.is_cuda and q_1APE.dtype in (torch.bfloat16, torch.float16) and _flash_works(q_1APE.shape[-1]):
        return _flash(q_1APE, k_1KPE, v_1KPE, lengths, scale), None
    return _sample_by_sample(q_1APE, k_1KPE, v_1KPE, lengths, scale), None


def _sample_by_sample(q_1APE: Tensor, k_1KPE: Tensor, v_1KPE: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    left = q_1APE.shape[2] - sum(lengths)
    runs = [torch.split(x, [*lengths, left], 2)[:-1] for x in (q_1APE, k_1KPE, v_1KPE)]
    seen = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in zip(*runs, strict=True)
    ]
    joined_1APE = functional.pad(torch.cat(seen, 2), (0, 0, 0, left))
    return joined_1APE.transpose(1, 2)


def _flash(q_1APE: Tensor, k_1KPE: Tensor, v_1KPE: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    group = q_1APE.shape[1] // k_1KPE.shape[1]
    real = sum(lengths)
    q, k, v = (x[0, :, :real].transpose(0, 1).contiguous() for x in (q_1APE, k_1KPE, v_1KPE))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = ends.pin_memory().to(q.device, non_blocking=True)
    longest = max(lengths)
    seen_PAE = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return functional.pad(seen_PAE, (0, 0, 0, 0, 0, q_1APE.shape[2] - real))[None]


@cache
def _flash_works(head_width: int) -> bool:
    """Whether this build of torch has the kernel, with our arguments and gradients, and computes the same with it."""
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        generator = torch.Generator("cuda").manual_seed(0)
        q = torch.randn(1, 4, 24, head_width, device="cuda", dtype=torch.bfloat16, generator=generator)
        k, v = q[:, :2].flip(2).contiguous(), q[:, 2:].flip(2).contiguous()
        q.requires_grad_()
        try:
            fast, slow = (one(q, k, v, (5, 16), 0.125) for one in (_flash, _sample_by_sample))
            (by_fast,), (by_slow,) = (torch.autograd.grad(x.float().square().sum(), q) for x in (fast, slow))
        except (RuntimeError, TypeError, AttributeError) as error:
            logger.warning("no variable-length flash attention, samples are attended one by one: %s", error)
            return False
        is_same = torch.allclose(fast, slow, atol=3e-2) and torch.allclose(by_fast, by_slow, atol=1e-1, rtol=5e-2)
    if not is_same:
        logger.warning("variable-length flash attention computes something else here; samples are attended one by one")
    return is_same


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
