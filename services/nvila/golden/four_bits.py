"""Recorded four-bit weights of the language model, and the search for their scales and limits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from nvila.golden.compare import (
    MODULE_TOLERANCE,
    STEP_TOLERANCE,
    Case,
    Check,
    Golden,
    Tensors,
    close,
    equal,
    near,
    relative,
)
from nvila.model import awq
from nvila.model.awq_search import fold_scale, linear_inputs, quantise_layer, search_clips, search_scales

SEARCH_TOLERANCE = 1e-4
"""What a search found (golden README)."""

TIE_TOLERANCE = 1e-3
"""Candidates whose errors are relatively this close are a near tie, and either may be recorded: an error is a mean of
squares of small differences between float32 numbers."""


def awq_w4a16(golden: Golden) -> Iterator[Case]:
    kind = [golden.content["n_bit"], golden.content["zero_point"]]
    yield Case("awq_w4a16/kind", partial(equal, "bits, zero point", [4, True], kind))
    if "pack_only.codes" in golden.tensors:
        yield Case("awq_w4a16/pack_only", partial(_pack_only, golden.under("pack_only.")))
    yield from golden.by_case(lambda case: _linear(golden.under(f"{case['case']}."), case))


def _pack_only(tensors: Tensors) -> Iterator[Check]:
    yield from close("packed", awq.pack_codes(tensors["codes"]), tensors["packed"], atol=0)


def _linear(tensors: Tensors, case: dict[str, Any]) -> Iterator[Check]:
    """In float32, and as deployed in float16. The bias is stored as it is."""
    weight_OI, group = tensors["weight"], case["group_size"]
    int4 = awq.quantise(weight_OI, group)
    yield from close("codes", int4.codes_OI, tensors["rederived_codes"], atol=0)
    yield from close("scales", int4.scales_OG, tensors["scales"], atol=STEP_TOLERANCE)
    yield from close("zeros", int4.zeros_OG, tensors["zeros"], atol=0)
    yield from close("weight", int4.dequantise(), tensors["fake_quant_weight"], atol=STEP_TOLERANCE)
    yield from _packed("packed", int4, tensors.under("packed."))
    half = awq.quantise(weight_OI.half(), group)
    yield from close("float16 weight", half.dequantise(), tensors["fp16.fake_quant_weight"], atol=STEP_TOLERANCE)
    yield from _packed("float16 packed", half, tensors.under("fp16.packed."))
    if case["bias"]:
        yield from equal("bias", list(tensors["bias"].shape), [case["out_features"]])
    yield from equal("zeros' width", awq.padded_groups(case["in_features"] // group, group), 8 * case["zeros_width"])


def _packed(what: str, int4: awq.Int4Weight, tensors: Tensors) -> Iterator[Check]:
    packed = awq.pack(int4)
    yield from close(f"{what} codes", packed.codes_oI, tensors["qweight"], atol=0)
    yield from close(f"{what} scales", packed.scales_KO, tensors["scales"], atol=STEP_TOLERANCE)
    yield from close(f"{what} zeros", packed.scaled_zeros_KO, tensors["scaled_zeros"], atol=STEP_TOLERANCE)


# -- search -----------------------------------------------------------------------------------------------------------


def awq_search(golden: Golden) -> Iterator[Case]:
    yield from golden.others("scales", "clipped")
    yield Case("awq_search", partial(_search, golden))


def _search(golden: Golden) -> Iterator[Check]:
    """Each step starts from what is recorded of the one before, so that a near tie there changes nothing here."""
    content, tensors, group = golden.content, golden.tensors, golden.content["group_size"]
    layer, attention = _decoder_layer(content, tensors)
    hidden_BPD = tensors["input"]
    yield from near("output", layer(hidden_BPD, **attention), tensors["output_fp"], MODULE_TOLERANCE)

    inputs = linear_inputs(layer, hidden_BPD, **attention)
    scaled = search_scales(layer, inputs, group, **attention)
    found = [[scales.before, list(scales.linears)] for scales, _ in scaled]
    yield from equal("scaled", found, [[entry["prev_op"], entry["layers"]] for entry in content["scales"]])
    for (scales, search), entry in zip(scaled, content["scales"], strict=True):
        recorded_I = tensors[f"scale.{entry['index']}"]
        distance_R = _relative(search.candidates_RI, recorded_I).amax(1)
        yield from _found(f"scale of {scales.judged}", distance_R, search.errors_R)
        fold_scale(layer, scales, recorded_I, inputs)
    yield from near("scaled output", layer(hidden_BPD, **attention), tensors["output_after_scale"], MODULE_TOLERANCE)

    clips = search_clips(layer, inputs, group)
    yield from equal("clipped", sorted(clips), sorted(content["clipped"]))
    limits = {name: tensors[f"clip.{name}"][..., 0] for name in content["clipped"]}
    for name, clips_of in clips.items():
        yield from _found(f"limits of {name}", _relative(clips_of.limits_ROG, limits[name]), clips_of.errors_ROG)
    quantise_layer(layer, limits, group)
    for name, parameter in layer.named_parameters():
        yield from relative(name, parameter, tensors[f"final.{name}"], MODULE_TOLERANCE)
    yield from near("four-bit output", layer(hidden_BPD, **attention), tensors["output_w4"], MODULE_TOLERANCE)


def _found(what: str, distances: Tensor, errors: Tensor) -> Iterator[Check]:
    """Along the first axis are candidates: their distances from what is recorded, and their errors in the search.

    The recorded one must be a candidate, and as good as the best or nearly so.
    """
    nearest = distances.argmin(0, keepdim=True)
    distance = distances.gather(0, nearest)
    yield from close(f"{what}: distance to a candidate", distance, torch.zeros_like(distance), SEARCH_TOLERANCE)
    best = errors.amin(0, keepdim=True)
    excess = (errors.gather(0, nearest) - best) / best.clamp(min=torch.finfo(best.dtype).tiny)
    yield from close(f"{what}: error over the best", excess, torch.zeros_like(excess), TIE_TOLERANCE)


def _relative(candidates: Tensor, recorded: Tensor) -> Tensor:
    return (candidates - recorded).abs() / recorded.abs().clamp(min=torch.finfo(recorded.dtype).tiny)


def _decoder_layer(content: dict[str, Any], tensors: Tensors) -> tuple[Qwen2DecoderLayer, dict[str, Any]]:
    """The recorded layer, and what it is called with besides its input: rotations and a causal mask."""
    config = Qwen2Config(
        hidden_size=content["hidden"],
        intermediate_size=content["intermediate"],
        num_attention_heads=content["heads"],
        num_key_value_heads=content["kv_heads"],
        rope_theta=content["rope_theta"],
        rms_norm_eps=content["rms_norm_eps"],
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    layer = Qwen2DecoderLayer(config, layer_idx=0).eval()
    layer.load_state_dict({name: tensor.clone() for name, tensor in tensors.under("layer.").items()})
    length = content["length"]
    blocked = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    rotations = Qwen2RotaryEmbedding(config)(tensors["input"], torch.arange(length)[None])
    return layer, {"attention_mask": blocked[None, None], "position_embeddings": rotations}
