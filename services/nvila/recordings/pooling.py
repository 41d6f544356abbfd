"""More temporal pooling for long windows: averages of whole blocks of visual tokens of consecutive groups.

Exact for models with one pooling level, because they average over time after the projector: the average of k groups'
blocks is what the model itself would have made of groups k times as long, up to the rounding of what is stored. (In a
group that was filled up, its last frame counts as often as it stands there, as it does for the model.) Pure NumPy.

Shapes: T visual tokens · D language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nvila.cache.codec import dequantize, quantize
from nvila.cache.keys import pooled_key
from nvila.errors import InvalidRequest
from nvila.types import TokensRef, VisualTokens


def pooled_ref(refs: Sequence[TokensRef]) -> TokensRef:
    """Name and layout of the average of these records; of one record, itself.

    Raises `InvalidRequest` for records that cannot be averaged: of several levels, or of different layouts.
    """
    first = refs[0]
    if len(refs) == 1:
        return first
    if len(first.levels) != 1 or any(ref.levels != first.levels for ref in refs):
        raise InvalidRequest(
            f"records of layouts {[ref.levels for ref in refs][:4]} cannot be averaged: one level, the same in all, "
            "is needed"
        )
    return TokensRef(key=pooled_key([ref.key for ref in refs]), levels=first.levels)


def average(records: Sequence[VisualTokens]) -> VisualTokens:
    """The average of several records' values, in their storage type; the mean is taken in float32.

    All must be of one layout, type and weights, as records of one recording and model are.
    """
    first = records[0]
    ref = pooled_ref([record.ref for record in records])
    if len(records) == 1:
        return first
    total_TD = np.zeros(first.values_TD.shape, np.float32)
    for record in records:
        total_TD += dequantize(record)
    values_TD, scales_T = quantize(total_TD / np.float32(len(records)), first.dtype)
    return VisualTokens(
        ref=ref, dtype=first.dtype, values_TD=values_TD, scales_T=scales_T, vision_revision=first.vision_revision
    )
