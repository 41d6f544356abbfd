"""Four-bit weights and their packing, beyond the recorded ones in tests/golden."""

from __future__ import annotations

import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.model.awq import fake_quantise, pack, pack_codes, padded_groups, quantise


def drawn(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(7))


def test_a_weight_comes_back_within_a_step_of_its_group() -> None:
    weight = drawn(8, 128)

    int4 = quantise(weight, group=32)

    steps = int4.scales_OG.repeat_interleave(32, 1)
    assert ((int4.dequantise() - weight).abs() <= steps).all()
    assert int(int4.codes_OI.max()) <= 15


def test_a_group_of_equal_weights_has_a_scale() -> None:
    assert quantise(torch.zeros(4, 64), group=64).dequantise().isfinite().all()


def test_rounding_again_changes_nothing() -> None:
    once = fake_quantise(drawn(8, 128), group=64)

    torch.testing.assert_close(fake_quantise(once, group=64), once, rtol=1e-5, atol=1e-6)


def test_every_code_has_a_place_of_its_own_among_the_packed() -> None:
    places = set()
    for output in range(4):
        for channel in range(64):
            codes = torch.zeros(4, 64, dtype=torch.int32)
            codes[output, channel] = 15
            word = pack_codes(codes)[0].int() & 0xFFFF
            at = int(word.nonzero())
            places.add((at, int(word[at])))

    assert places == {(at, 15 << shift) for at in range(64) for shift in (0, 4, 8, 12)}


def test_the_packed_scales_say_what_the_codes_mean() -> None:
    int4 = quantise(drawn(4, 128), group=32)

    packed = pack(int4)

    assert packed.scales_KO.shape == (padded_groups(4, 32), 4) == (32, 4)
    meant = int4.codes_OI * packed.scales_KO[:4].T.repeat_interleave(32, 1)
    meant = meant + packed.scaled_zeros_KO[:4].T.repeat_interleave(32, 1)
    torch.testing.assert_close(meant, int4.dequantise())
    assert not packed.scales_KO[4:].any()


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(6, 64, 32), (4, 96, 32), (4, 64, 48)])
def test_sizes_that_cannot_be_packed_are_refused(outputs: int, inputs: int, group: int) -> None:
    with pytest.raises(InvalidRequest):
        pack(quantise(drawn(outputs, inputs), group))
