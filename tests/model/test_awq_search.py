"""The search for scales and limits, on a made-up decoder layer; a recorded one is compared by `make golden`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from nvila.errors import InvalidRequest
from nvila.model.awq_search import (
    fold_scale,
    linear_inputs,
    quantise_layer,
    scale_groups,
    search_clip,
    search_clips,
    search_scales,
)

GROUP = 32


def made_layer(kv_heads: int) -> tuple[Qwen2DecoderLayer, torch.Tensor, dict[str, Any]]:
    """A layer, hidden states of which a few channels are much larger than the rest, and what attention needs."""
    torch.manual_seed(8)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    layer = Qwen2DecoderLayer(config, layer_idx=0).eval().requires_grad_(False)
    layer.input_layernorm.weight[:4] = 20.0
    layer.post_attention_layernorm.weight[:4] = 20.0
    hidden_BPD = torch.randn(16, 32, 64)
    mask = torch.full((32, 32), torch.finfo(torch.float32).min).triu(1)[None, None]
    rotations = Qwen2RotaryEmbedding(config)(hidden_BPD, torch.arange(32)[None])
    return layer, hidden_BPD, {"attention_mask": mask, "position_embeddings": rotations}


def test_values_are_scaled_only_where_each_query_head_has_its_own() -> None:
    grouped, plain = made_layer(kv_heads=2)[0], made_layer(kv_heads=4)[0]

    assert [scales.before for scales in scale_groups(grouped)] == [
        "input_layernorm",
        "post_attention_layernorm",
        "mlp.up_proj",
    ]
    assert "self_attn.v_proj" in [scales.before for scales in scale_groups(plain)]


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_folding_keeps_the_layers_output_and_the_search_lowers_its_error(kv_heads: int) -> None:
    layer, hidden, attention = made_layer(kv_heads)
    plain = made_layer(kv_heads)[0]
    wanted = layer(hidden, **attention)
    inputs = linear_inputs(layer, hidden, **attention)

    for scales, search in search_scales(layer, inputs, GROUP, **attention):
        fold_scale(layer, scales, search.best_I, inputs)
    torch.testing.assert_close(layer(hidden, **attention), wanted, rtol=1e-4, atol=1e-4)
    recorded = linear_inputs(layer, hidden, **attention)
    for name, x in inputs.items():
        torch.testing.assert_close(x, recorded[name], rtol=1e-3, atol=1e-4)

    clips = search_clips(layer, inputs, GROUP)
    assert set(clips) == set(inputs) - {"self_attn.q_proj", "self_attn.k_proj"}
    quantise_layer(layer, {name: clip.best_OG for name, clip in clips.items()}, GROUP)
    quantise_layer(plain, {}, GROUP)
    searched, rounded = ((x(hidden, **attention) - wanted).pow(2).mean() for x in (layer, plain))
    assert searched < 0.8 * rounded


def test_a_limit_is_never_worse_than_none() -> None:
    layer, hidden, attention = made_layer(kv_heads=2)
    x = linear_inputs(layer, hidden, **attention)["mlp.gate_proj"].flatten(0, -2)

    search = search_clip(layer.mlp.gate_proj.weight, x, GROUP)

    assert (search.errors_ROG.amin(0) <= search.errors_ROG[0]).all()
    assert search.best_OG.shape == (96, 2)


def test_too_few_tokens_to_judge_by_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"511 tokens.*512"):
        search_clip(torch.zeros(4, 32), torch.zeros(511, 32), GROUP)
