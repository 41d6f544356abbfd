"""Four bits as AutoAWQ packs them, and back."""

from __future__ import annotations

import pytest
import torch

from nvila.errors import InvalidCheckpoint
from nvila.model.awq import quantise
from nvila.model.awq_layout import dense_tensors, is_packed, pack, packed_shapes, quantization, unpack


def test_what_is_packed_is_unpacked_again() -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1)).half()
    int4 = quantise(weight)

    packed = pack(int4)
    back = unpack(packed)

    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == {
        "qweight": (256, 3),
        "qzeros": (2, 3),
        "scales": (2, 24),
    }
    assert torch.equal(back.codes_OI, int4.codes_OI)
    assert torch.equal(back.dequantise(), int4.dequantise())


def test_eight_outputs_lie_in_autoawqs_order() -> None:
    int4 = quantise(torch.zeros(8, 128))._replace(codes_OI=torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 128))

    word = int(pack(int4)["qweight"][0, 0]) & 0xFFFFFFFF

    assert f"{word:08x}" == "75316420"


def test_the_highest_code_makes_no_other_number() -> None:
    int4 = quantise(torch.zeros(8, 128))._replace(codes_OI=torch.full((8, 128), 15, dtype=torch.uint8))

    assert torch.equal(unpack(pack(int4)).codes_OI, int4.codes_OI)


def test_a_model_is_written_out_with_everything_else_as_it_was() -> None:
    int4, norm = quantise(torch.randn(8, 128)), torch.ones(128)
    packed = {f"model.layers.0.mlp.up_proj.{kind}": tensor for kind, tensor in pack(int4).items()}

    dense = dense_tensors(packed | {"model.norm.weight": norm})

    assert list(dense) == ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(
        dense["model.layers.0.mlp.up_proj.weight"].float(), int4.dequantise(), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("shape", [(8, 100), (12, 128)])
def test_sizes_that_cannot_be_packed_are_named(shape: tuple[int, int]) -> None:
    with pytest.raises(
        InvalidCheckpoint, match=rf"mlp\.up_proj is {shape[0]}×{shape[1]}: four bits need inputs in groups"
    ):
        packed_shapes({"model.layers.0.mlp.up_proj.weight": shape}, 128)


def test_only_its_own_kind_is_taken_for_packed() -> None:
    assert is_packed({"quantization_config": quantization()})
    assert not is_packed({})
    assert not is_packed({"quantization_config": {"quant_method": "compressed-tensors"}})
