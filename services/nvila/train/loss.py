"""The loss of a training step: next-token cross-entropy, smoothed over time tokens (NVILA-SPEC §6.6, §6.8).

B sequences · P positions · V vocabulary · n positions with a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100
"""The label of positions that are no target: what torch's own cross-entropy leaves out."""


def next_token_loss(logits_BPV: Tensor, labels_BP: Tensor, time_ids: Sequence[int] = (), std: float = 1.0) -> Tensor:
    """Mean over all targets of the cross-entropy between each position's logits and the label after it.

    Where that label is one of `time_ids`, the target is spread over all of them by `time_targets` with `std`, so that a
    near miss in time costs less than a far one (`soft_cross_entropy` in llava/model/loss.py of NVlabs/VILA). Both kinds
    of target weigh the same. logits_BPV: any float dtype, in which the spread is computed. Returns a scalar; 0, and no
    gradient, where there is no target at all (the reference gives NaN).
    """
    logits_nV, targets_n = logits_BPV[:, :-1].flatten(0, 1), labels_BP[:, 1:].flatten()
    is_target_n = targets_n != IGNORE
    targets_n = targets_n[is_target_n]
    return summed_loss(logits_nV[is_target_n], targets_n, time_ids, std) / max(1, len(targets_n))


def summed_loss(logits_nV: Tensor, targets_n: Tensor, time_ids: Sequence[int] = (), std: float = 1.0) -> Tensor:
    """The same, summed over targets that are already picked out: a step whose batch is cut into rows, or spread over
    processes, divides by the targets of all of them once."""
    times = torch.tensor(list(time_ids), dtype=targets_n.dtype, device=targets_n.device)
    is_time_n = torch.isin(targets_n, times)
    words = functional.cross_entropy(logits_nV[~is_time_n], targets_n[~is_time_n], reduction="sum")
    spread_nV = time_targets(targets_n[is_time_n], times, std, like_nV=logits_nV[is_time_n])
    return words + functional.cross_entropy(logits_nV[is_time_n], spread_nV, reduction="sum")


def time_targets(targets_n: Tensor, time_ids: Tensor, std: float, *, like_nV: Tensor) -> Tensor:
    """A Gaussian of `std` around each target over the time tokens, normalised; zero for every other token.

    Distances are between token ids, as in the reference, which are steps in time only where the ids are contiguous.
    Returns the shape and dtype of `like_nV`.
    """
    distance_nt = targets_n[:, None] - time_ids[None, :]
    weights_nt = torch.exp(-(distance_nt**2) / (2 * std**2))
    spread_nV = torch.zeros_like(like_nV)
    spread_nV[:, time_ids] = (weights_nt / weights_nt.sum(1, keepdim=True)).to(spread_nV.dtype)
    return spread_nV
