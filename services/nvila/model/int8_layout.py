"""How a tower in 8 bits is stored: which tensors, under which names, and what its configuration says of them."""

from __future__ import annotations

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
"""Of every block, by their names in the checkpoint: these are stored in 8 bits, each with its scales beside."""

SCALE = "weight_scale"
"""Behind a linear's name: (O, 1) float32, as compressed-tensors' `int-quantized` format has it."""

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": [],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""`quantization_config` of a tower that is stored so; other programs that know the format read it, too."""


def int8_linears(blocks: int) -> list[str]:
    """Names in the tower, of as many blocks."""
    return [f"encoder.layers.{i}.{name}" for i in range(blocks) for name in LINEARS]
