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
    """embeddings_PD: float. labels_P: int64, `IGNORE` where nothing is to be learned."""

    embeddings_PD: Tensor
    labels_P: Tensor

    def __post_init__(self) -> None:
        if self.embeddings_PD.ndim != 2 or self.labels_P.shape != self.embeddings_PD.shape[:1]:
            raise InvalidRequest(
                f"a sample has embeddings {tuple(self.embeddings_PD.shape)} and labels {tuple(self.labels_P.shape)}"
            )

    def cut(self, max_positions: int) -> Sample:
        """Its first `max_positions` positions."""
        return Sample(embeddings_PD=self.embeddings_PD[:max_positions], labels_P=self.labels_P[:max_positions])


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
    """

    embeddings_1PD: Tensor
    labels_1P: Tensor
    mask_1P: Tensor
    positions_1P: Tensor
    lengths: tuple[int, ...]


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
    positions = [position for length in lengths for position in range(length)] + [0] + [-1] * filling
    return Packed(
        embeddings_1PD=torch.cat([*embeddings, end_D, fill_D])[None],
        labels_1P=torch.cat([*labels, end])[None],
        mask_1P=torch.tensor([mask], dtype=torch.int32, device=end.device),
        positions_1P=torch.tensor([positions], dtype=torch.int32, device=end.device),
        lengths=lengths,
    )
