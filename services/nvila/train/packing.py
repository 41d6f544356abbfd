"""Samples to batches: cut, padded, or packed into one row (NVILA-SPEC §6.4-6.5).

A sample is one conversation after the splice: input embeddings and a label per position. Follows `_truncate_sequence`,
`__batchify_sequence` and `repack_multimodal_data` in llava/model/llava_arch.py of NVlabs/VILA.

B samples · P positions · D language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nvila.errors import InvalidRequest
from nvila.train.loss import IGNORE


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """embeddings_PD: float. labels_P: int64, `IGNORE` where nothing is to be learned. turns_P: `prepare.Prepared`;
    without, all positions see what was before."""

    embeddings_PD: Tensor
    labels_P: Tensor
    turns_P: Tensor | None = None

    def __post_init__(self) -> None:
        if self.embeddings_PD.ndim != 2 or self.labels_P.shape != self.embeddings_PD.shape[:1]:
            raise InvalidRequest(
                f"a sample has embeddings {tuple(self.embeddings_PD.shape)} and labels {tuple(self.labels_P.shape)}"
            )

    @property
    def positions_P(self) -> Tensor:
        """The first of every turn stands right behind what all turns see."""
        at_P = torch.arange(len(self.labels_P), device=self.labels_P.device)
        if self.turns_P is None:
            return at_P
        return at_P - torch.searchsorted(self.turns_P, self.turns_P) + (self.turns_P > 0) * (self.turns_P == 0).sum()

    def cut(self, max_positions: int) -> Sample:
        """Its first `max_positions` positions."""
        kept = slice(max_positions)
        turns_P = None if self.turns_P is None else self.turns_P[kept]
        return Sample(embeddings_PD=self.embeddings_PD[kept], labels_P=self.labels_P[kept], turns_P=turns_P)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Samples side by side, the shorter ones filled up: zero embeddings, labels `IGNORE`, mask False."""

    embeddings_BPD: Tensor
    labels_BP: Tensor
    mask_BP: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Samples one after the other in a single row. `mask_1P`, `positions_1P`: int32; positions restart per sample.

    `lengths`: positions of each sample, which keep their attention apart; what follows them in the row is no sample.
    turns_P: of all samples, None where no sample has turns.
    """

    embeddings_1PD: Tensor
    labels_1P: Tensor
    mask_1P: Tensor
    positions_1P: Tensor
    lengths: tuple[int, ...]
    turns_P: Tensor | None = None


def pad(samples: Sequence[Sample], *, side: str = "right") -> Batch:
    """To the longest sample's length, with what fills the rest on `side`."""
    return Batch(
        embeddings_BPD=pad_sequence([s.embeddings_PD for s in samples], batch_first=True, padding_side=side),
        labels_BP=pad_sequence(
            [s.labels_P for s in samples], batch_first=True, padding_value=IGNORE, padding_side=side
        ),
        mask_BP=pad_sequence(
            [torch.ones_like(s.labels_P, dtype=torch.bool) for s in samples], batch_first=True, padding_side=side
        ),
    )


def pack(samples: Sequence[Sample], *, multiple_of: int = 1, fill: float = 0.0) -> Packed:
    """Into one row, then one dummy position, which makes attention look at the mask at all, then filling to a multiple.

    The first label of a sample is dropped: the position before it belongs to another. The dummy has zero embedding,
    mask and position; filling (for FP8, `pad_to_multiple_of`) has embedding `fill`, in the reference the number of the
    padding token's id, mask 0 and position -1.
    """
    embeddings = [sample.embeddings_PD for sample in samples]
    labels = [torch.cat([sample.labels_P.new_full((1,), IGNORE), sample.labels_P[1:]]) for sample in samples]
    lengths = tuple(len(label) for label in labels)
    filling = -(sum(lengths) + 1) % multiple_of
    end_D, end = embeddings[0].new_zeros(1, embeddings[0].shape[1]), labels[0].new_full((1 + filling,), IGNORE)
    fill_D = end_D.new_full((filling, end_D.shape[1]), fill)
    mask = [1] * sum(lengths) + [0] * (1 + filling)
    positions = torch.cat([*(sample.positions_P for sample in samples), end.new_zeros(1), end.new_full((filling,), -1)])
    turns = [torch.zeros_like(one.labels_P) if one.turns_P is None else one.turns_P for one in samples]
    has_turns = any(sample.turns_P is not None for sample in samples)
    return Packed(
        embeddings_1PD=torch.cat([*embeddings, end_D, fill_D])[None],
        labels_1P=torch.cat([*labels, end])[None],
        mask_1P=torch.tensor([mask], dtype=torch.int32, device=end.device),
        positions_1P=positions.to(torch.int32)[None],
        lengths=lengths,
        turns_P=torch.cat(turns) if has_turns else None,
    )
