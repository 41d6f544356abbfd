"""Averages of groups' visual tokens: equal to what the model makes of longer groups, in every storage type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nvila.cache.codec import dequantize, quantize
from nvila.errors import InvalidRequest
from nvila.model.compress import pool_frames
from nvila.recordings.pooling import average, pooled_ref
from nvila.types import Level, TokenDtype, TokensRef, VisualTokens

WIDTH = 12


def record(number: int, dtype: TokenDtype = TokenDtype.FLOAT32, tokens: int = 4) -> VisualTokens:
    values_TD = np.random.default_rng(number).normal(size=(tokens, WIDTH)).astype(np.float32)
    stored_TD, scales_T = quantize(values_TD, dtype)
    ref = TokensRef(key=f"{number:064x}", levels=(Level(1, tokens),))
    return VisualTokens(ref=ref, dtype=dtype, values_TD=stored_TD, scales_T=scales_T, vision_revision="r")


def test_the_average_of_groups_is_what_the_model_makes_of_a_group_as_long_as_all() -> None:
    frames_FTD = torch.randn(16, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    short = pool_frames(frames_FTD, (4, 1, 1)).numpy()
    long = pool_frames(frames_FTD, (16, 1, 1)).numpy()[0]
    groups = [
        VisualTokens(
            ref=TokensRef(key=f"{number:064x}", levels=(Level(1, 4),)),
            dtype=TokenDtype.FLOAT32,
            values_TD=values_TD,
            scales_T=None,
            vision_revision="r",
        )
        for number, values_TD in enumerate(short)
    ]

    np.testing.assert_allclose(average(groups).values_TD, long, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_averages_are_stored_as_the_records_are(dtype: str, tolerance: float) -> None:
    records = [record(number, TokenDtype(dtype)) for number in range(3)]
    exact_TD = np.mean([dequantize(one) for one in records], axis=0, dtype=np.float32)

    averaged = average(records)

    assert averaged.dtype == dtype
    assert averaged.ref == pooled_ref([one.ref for one in records])
    largest = np.abs(exact_TD).max(axis=1, keepdims=True)
    assert (np.abs(dequantize(averaged) - exact_TD) <= largest * tolerance + 1e-6).all()


def test_one_record_is_its_own_average() -> None:
    one = record(1)
    assert average([one]) is one
    assert pooled_ref([one.ref]) == one.ref


def test_an_average_is_named_by_what_it_is_made_of_in_order() -> None:
    refs = [record(number).ref for number in range(3)]
    names = {pooled_ref(some).key for some in (refs[:2], refs[:3], refs[1::-1], refs[1:])}
    assert len(names) == 4
    assert all(len(name) == 64 for name in names)


def test_what_cannot_be_averaged_is_refused() -> None:
    small, large = record(1).ref, record(2, tokens=9).ref
    two_levels = TokensRef(key="0" * 64, levels=(Level(1, 4), Level(2, 4)))
    for refs in ([small, large], [two_levels, two_levels]):
        with pytest.raises(InvalidRequest, match="cannot be averaged"):
            pooled_ref(refs)
