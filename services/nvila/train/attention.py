"""Attention in training: over a packed row, where every sample sees only itself, and over the tiles of the tower.

Registered with `transformers` under `PACKED` and `TILES`; the lengths of a row's samples come through the model's
keyword arguments, and no mask of the row's size is ever made. On a GPU in 16 bits a row is one variable-length
flash-attention call; elsewhere samples of about one length are filled up to the longest and attended together, which
computes the same. Positions after the last sample (packing's dummy and filling) get zeros.

On a processor in bfloat16 two matrix products and a softmax take a fifth of the time of torch's own kernel: forward
and backward over 44 tiles of 196 tokens, 3 heads of 64, two cores with AVX-512 BF16: 13 ms against 68.

A heads · K key-value heads · P positions · T tokens of a tile · E channels per head · B samples side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "nvila_packed"
TILES = "nvila_tiles"
FILLED = 1.25
"""Samples are attended together while the longest is at most so many times the shortest."""

logger = logging.getLogger(__name__)


def packed_attention(
    module: nn.Module, q_1APE: Tensor, k_1KPE: Tensor, v_1KPE: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What `transformers` calls in each block, with `lengths` and `turns_P` (`packing.Packed`) given to the model.
    Returns (1, P, A, E)."""
    lengths: Sequence[int] = kwargs["lengths"]
    turns_P: Tensor | None = kwargs.get("turns_P")
    scale: float = kwargs["scaling"]
    # Under autocast, rotation in float32 leaves queries and keys wider than values.
    q_1APE, k_1KPE = q_1APE.to(v_1KPE.dtype), k_1KPE.to(v_1KPE.dtype)
    if (
        turns_P is None
        and q_1APE.is_cuda
        and q_1APE.dtype in (torch.bfloat16, torch.float16)
        and _flash_works(q_1APE.shape[-1])
    ):
        return _flash(q_1APE, k_1KPE, v_1KPE, lengths, scale), None
    return _side_by_side(q_1APE, k_1KPE, v_1KPE, lengths, scale, turns_P), None


def tile_attention(
    module: nn.Module, q_NATE: Tensor, k_NATE: Tensor, v_NATE: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What `transformers` calls in each block of the tower. Returns (N, T, A, E)."""
    return _attend(q_NATE, k_NATE, v_NATE, kwargs["scaling"]).transpose(1, 2), None


def _side_by_side(
    q_1APE: Tensor,
    k_1KPE: Tensor,
    v_1KPE: Tensor,
    lengths: Sequence[int],
    scale: float,
    turns_P: Tensor | None = None,
) -> Tensor:
    q_PAE, k_PKE, v_PKE = (x[0].transpose(0, 1) for x in (q_1APE, k_1KPE, v_1KPE))
    seen: list[Tensor] = []
    groups, back = _places(tuple(lengths))
    for places_BP in groups:
        places_BP = places_BP.to(q_PAE.device)
        q, k, v = (x[places_BP].transpose(1, 2) for x in (q_PAE, k_PKE, v_PKE))
        hidden = None if turns_P is None else _hidden(places_BP, turns_P)
        seen.append(_attend(q, k, v, scale, hidden, is_causal=True).transpose(1, 2).flatten(0, 1))
    joined_PAE = torch.cat(seen)[back.to(q_PAE.device)]
    return functional.pad(joined_PAE, (0, 0, 0, 0, 0, q_1APE.shape[2] - sum(lengths)))[None]


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """For samples of about one length, side by side: places in the row, (B, P), filled up behind with any place, since
    causal attention never looks there; and for each place of the row where it is among all of those."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[i] <= FILLED * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    back = torch.empty(starts[-1], dtype=torch.long)
    places: list[Tensor] = []
    at = 0
    for group in groups:
        longest = lengths[group[-1]]
        places.append((torch.tensor([starts[i] for i in group])[:, None] + torch.arange(longest)).clamp(max=starts[-1]))
        for i in group:
            back[starts[i] : starts[i + 1]] = torch.arange(at, at + lengths[i])
            at += longest
    return places, back


def _hidden(places_BP: Tensor, turns_P: Tensor) -> Tensor:
    """Which position (last dimension) is not seen by which, (B, 1, P, P): what comes later, and other turns."""
    turns_BP = turns_P[places_BP.clamp(max=len(turns_P) - 1)]
    of_others_BPP = (turns_BP[:, None] > 0) & (turns_BP[:, None] != turns_BP[:, :, None])
    return (of_others_BPP | _later(places_BP.shape[1], places_BP.device))[:, None]


def _later(positions: int, device: torch.device) -> Tensor:
    return torch.ones(positions, positions, dtype=torch.bool, device=device).triu(1)


def _attend(
    q_BAPE: Tensor,
    k_BKPE: Tensor,
    v_BKPE: Tensor,
    scale: float,
    hidden_B1PP: Tensor | None = None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """`hidden_B1PP`: what is not seen, in place of what `is_causal` says."""
    if q_BAPE.device.type != "cpu" or q_BAPE.dtype != torch.bfloat16:
        mask = None if hidden_B1PP is None else ~hidden_B1PP
        seen: Tensor = functional.scaled_dot_product_attention(
            q_BAPE, k_BKPE, v_BKPE, attn_mask=mask, is_causal=is_causal and mask is None, scale=scale, enable_gqa=True
        )
        return seen
    group, positions = q_BAPE.shape[1] // k_BKPE.shape[1], q_BAPE.shape[2]
    k_BAPE, v_BAPE = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k_BKPE, v_BKPE))
    with torch.autocast("cpu", enabled=False):
        scores_BAPP = (q_BAPE * scale) @ k_BAPE.transpose(-1, -2)
        if hidden_B1PP is not None:
            scores_BAPP = scores_BAPP.masked_fill(hidden_B1PP, -torch.inf)
        elif is_causal:
            scores_BAPP = scores_BAPP + scores_BAPP.new_full((positions, positions), -torch.inf).triu(1)
        return torch.softmax(scores_BAPP, -1) @ v_BAPE


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
            fast, slow = (one(q, k, v, (5, 16), 0.125) for one in (_flash, _side_by_side))
            (by_fast,), (by_slow,) = (torch.autograd.grad(x.float().square().sum(), q) for x in (fast, slow))
        except (RuntimeError, TypeError, AttributeError) as error:
            logger.warning("no variable-length flash attention, samples are attended side by side: %s", error)
            return False
        is_same = torch.allclose(fast, slow, atol=3e-2) and torch.allclose(by_fast, by_slow, atol=1e-1, rtol=5e-2)
    if not is_same:
        logger.warning(
            "variable-length flash attention computes something else here; samples are attended side by side"
        )
    return is_same


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(TILES, tile_attention)
