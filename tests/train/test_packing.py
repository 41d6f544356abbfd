"""Batches and packed rows, beyond the recorded ones in tests/golden."""

from __future__ import annotations

import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.train.loss import IGNORE
from nvila.train.packing import Sample, pack, pad


def sample(length: int) -> Sample:
    return Sample(embeddings_PD=torch.full((length, 2), float(length)), labels_P=torch.arange(length))


def test_samples_keep_their_lengths_and_positions_in_a_packed_row() -> None:
    row = pack([sample(3), sample(2)])

    assert row.lengths == (3, 2)
    assert row.positions_1P.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert row.mask_1P.tolist() == [[1, 1, 1, 1, 1, 0]]
    assert row.labels_1P.tolist() == [[IGNORE, 1, 2, IGNORE, 1, IGNORE]]


def test_packing_leaves_the_samples_as_they_were() -> None:
    one = sample(3)
    pack([one])

    assert one.labels_P.tolist() == [0, 1, 2]


@pytest.mark.parametrize("length", range(1, 10))
def test_a_row_is_filled_up_to_a_multiple(length: int) -> None:
    row = pack([sample(length)], multiple_of=4, fill=7.0)

    filling = row.embeddings_1PD.shape[1] - length - 1
    assert row.embeddings_1PD.shape[1] % 4 == 0
    assert 0 <= filling < 4
    assert (row.embeddings_1PD[0, length + 1 :] == 7.0).all()
    assert row.positions_1P[0, length + 1 :].tolist() == [-1] * filling


def test_a_batch_is_filled_on_the_side_that_was_asked_for() -> None:
    assert pad([sample(1), sample(3)]).mask_BP.tolist() == [[True, False, False], [True] * 3]
    assert pad([sample(1), sample(3)], side="left").mask_BP.tolist() == [[False, False, True], [True] * 3]


def test_a_sample_needs_a_label_for_each_position() -> None:
    with pytest.raises(InvalidRequest, match=r"\(3, 2\).*\(2,\)"):
        Sample(embeddings_PD=torch.zeros(3, 2), labels_P=torch.zeros(2))
