"""The loss, beyond the recorded values in tests/golden."""

from __future__ import annotations

import torch
from torch.nn import functional

from nvila.train.loss import IGNORE, next_token_loss

TIMES = [10, 11, 12, 13]


def logits(rows: int = 6, vocabulary: int = 16) -> torch.Tensor:
    return torch.randn(1, rows, vocabulary, generator=torch.Generator().manual_seed(1))


def test_without_time_tokens_it_is_the_mean_cross_entropy_of_the_next_token() -> None:
    x, labels = logits(), torch.tensor([[3, IGNORE, 11, 5, IGNORE, 2]])

    loss = next_token_loss(x, labels)

    torch.testing.assert_close(loss, functional.cross_entropy(x[0, [1, 2, 4]], torch.tensor([11, 5, 2])))


def test_with_nothing_to_learn_it_is_zero_and_pulls_nowhere() -> None:
    x = logits().requires_grad_()

    loss = next_token_loss(x, torch.full((1, 6), IGNORE), TIMES)

    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, x)
    assert not gradient.any()


def test_a_near_miss_in_time_costs_less_than_a_far_one() -> None:
    labels = torch.tensor([[0, 10]])
    says = {t: torch.zeros(1, 2, 16).index_fill_(2, torch.tensor([t]), 9.0) for t in (10, 11, 13)}

    costs = [float(next_token_loss(x, labels, TIMES)) for x in says.values()]

    assert costs == sorted(costs)


def test_a_narrow_spread_is_the_plain_loss() -> None:
    x, labels = logits(), torch.tensor([[3, 12, 11, 5, 10, 2]])

    torch.testing.assert_close(next_token_loss(x, labels, TIMES, std=0.01), next_token_loss(x, labels))


def test_half_precision_logits_give_a_finite_loss() -> None:
    loss = next_token_loss(logits().bfloat16(), torch.tensor([[3, 12, 11, 5, 10, 2]]), TIMES)

    assert loss.dtype == torch.bfloat16
    assert loss.isfinite()
