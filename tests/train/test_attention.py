"""Attention in training computes what one scaled-dot-product call per sample computes, also in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nvila.train.attention import packed_attention, tile_attention


def draw(heads: int, positions: int, seed: int) -> Tensor:
    return torch.randn(1, heads, positions, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("lengths", [(7,), (3, 40, 4, 5, 39, 1), (12, 12, 12)])
def test_samples_of_a_row_see_only_themselves_and_only_what_was_before(
    lengths: tuple[int, ...], dtype: torch.dtype, within: float
) -> None:
    positions = sum(lengths) + 3
    whole = [draw(heads, positions, seed).requires_grad_() for seed, heads in enumerate((4, 2, 2))]
    q, k, v = (x.to(dtype) for x in whole)
    seen, _ = packed_attention(nn.Module(), q, k, v, None, lengths=lengths, scaling=0.25)
    runs = [torch.split(x, [*lengths, 3], 2)[:-1] for x in whole]
    alone = [
        functional.scaled_dot_product_attention(a, b, c, is_causal=True, scale=0.25, enable_gqa=True)
        for a, b, c in zip(*runs, strict=True)
    ]
    expected = functional.pad(torch.cat(alone, 2), (0, 0, 0, 3)).transpose(1, 2)
    slopes = torch.autograd.grad(seen.float().square().sum(), whole)
    expected_slopes = torch.autograd.grad(expected.square().sum(), whole)

    torch.testing.assert_close(seen.float(), expected, atol=within, rtol=within)
    for one, other in zip(slopes, expected_slopes, strict=True):
        torch.testing.assert_close(one, other, atol=10 * within, rtol=10 * within)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_every_place_of_a_tile_sees_all_of_it(dtype: torch.dtype, within: float) -> None:
    q, k, v = (torch.cat([draw(3, 20, seed), draw(3, 20, seed + 5)]) for seed in range(3))
    seen, _ = tile_attention(nn.Module(), q.to(dtype), k.to(dtype), v.to(dtype), None, scaling=0.25)

    expected = functional.scaled_dot_product_attention(q, k, v, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(seen.float(), expected, atol=within, rtol=within)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_each_turn_sees_what_all_see_and_itself_as_if_it_were_the_only_one(dtype: torch.dtype, within: float) -> None:
    lengths, shared, turns = (14, 9), 5, ((0, 5), (5, 9), (9, 14))
    turns_P = torch.tensor([0] * 5 + [1] * 4 + [2] * 5 + [0] * 9)
    q, k, v = (draw(heads, 26, seed) for seed, heads in enumerate((4, 2, 2)))

    seen, _ = packed_attention(
        nn.Module(), *(x.to(dtype) for x in (q, k, v)), None, lengths=lengths, scaling=0.25, turns_P=turns_P
    )

    for begin, end in (*turns, (14, 23)):
        before = [*range(shared)] if 0 < begin < 14 else []
        places = [*before, *range(begin, end)]
        alone = functional.scaled_dot_product_attention(
            *(x[:, :, places] for x in (q, k, v)), is_causal=True, scale=0.25, enable_gqa=True
        )
        expected = alone.transpose(1, 2)[:, len(before) :]
        torch.testing.assert_close(seen[:, begin:end].float(), expected, atol=within, rtol=within)
