"""The language model in four bits by AWQ, calibrated on what it will be given: visual tokens among text (NVILA-SPEC
§9.1).

llm-awq calibrates with text alone. Visual tokens are most of the positions of a prompt here, and their channels are
others, so the sequences are whole conversations about pictures and clips, cut into blocks of equal length.

B sequences · P positions · D width · I, O channels in and out · G groups of input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from nvila.errors import InvalidCheckpoint, InvalidRequest
from nvila.model.awq import GROUP, Int4Weight, quantise
from nvila.model.awq_layout import LINEARS, linear_of, pack, packed_shapes, quantization
from nvila.model.awq_search import (
    CLIP_TOKENS,
    clip,
    fold_scale,
    linear_inputs,
    linear_named,
    search_clips,
    search_scales,
)
from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.layouts import Part
from nvila.model.qwen2 import llm_shapes, load_llm
from nvila.model.save import save_checkpoint
from nvila.quantize.calibration import Data
from nvila.quantize.checks import check_finite, check_target
from nvila.quantize.report import LayerError, Report, Tally, write_report
from nvila.train.evaluation.model import ModelAnswerer

BLOCKS, POSITIONS, HELD_OUT = 128, 512, 16
"""As llm-awq has them: 128 sequences of 512 positions."""

MADE, NEAREST = "AWQ", "rounded to nearest"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class LlmPlan:
    """`blocks` sequences of `positions` to calibrate with, `held_out` of them to report on."""

    data: Data
    device: torch.device
    blocks: int = BLOCKS
    positions: int = POSITIONS
    held_out: int = HELD_OUT
    group: int = GROUP


def quantise_llm(checkpoint: Checkpoint, target: Path, plan: LlmPlan, progress: Progress = lambda *_: None) -> Report:
    """Write the checkpoint with its language model in four bits to `target`, a report inside.

    Layer by layer, on what the layers before it give in full precision, as llm-awq does. Raises `InvalidCheckpoint`
    (quantised already, sizes that groups do not divide, a weight that is not a number) and `InvalidRequest` (data, a
    folder that is there) before any work.
    """
    config, layout = checkpoint.config, checkpoint.layout
    if "quantization_config" in layout.llm:
        raise InvalidCheckpoint(f"the language model of {checkpoint.name} is quantised already")
    packed_shapes(llm_shapes(config.llm), plan.group)
    check_target(target)
    if plan.blocks * plan.positions < CLIP_TOKENS:
        raise InvalidRequest(
            f"{plan.blocks} sequences of {plan.positions} are {plan.blocks * plan.positions} positions; clipping is "
            f"judged by {CLIP_TOKENS} at least"
        )
    checkpoint.check_llm()
    stored = layout.weights(Part.LLM).tensors()
    check_finite("the language model", stored)

    llm = load_llm(layout, config.llm)
    answerer = ModelAnswerer(checkpoint, VisionEncoder.from_checkpoint(checkpoint, plan.device), llm)
    seen, visual = _sequences(answerer, plan, plan.blocks, is_held_out=False)
    held_out, _ = _sequences(answerer, plan, plan.held_out, is_held_out=True)
    made, layers = _search(llm, seen, held_out, plan, progress)

    kept = {name: tensor for name, tensor in stored.items() if linear_of(name) is None}
    tensors = {name: made.get(name, tensor).to(tensor.dtype) for name, tensor in kept.items()}
    tensors |= {name: tensor for name, tensor in made.items() if name not in tensors}
    packed = replace(layout, llm={**layout.llm, "quantization_config": quantization(plan.group)})
    parts = {Part.LLM: tensors, Part.TOWER: layout.weights(Part.TOWER).tensors()}
    if checkpoint.projector_weights():
        parts[Part.PROJECTOR] = layout.weights(Part.PROJECTOR).tensors()
    save_checkpoint(packed, parts, target, layout.style)
    report = Report(
        part="llm",
        made=MADE,
        layers=layers,
        facts={
            "source": checkpoint.name,
            "group": plan.group,
            "sequences": plan.blocks,
            "positions": plan.positions,
            "visual_share": round(visual, 4),
            "held_out_sequences": plan.held_out,
            "mixture": plan.data.mixture,
            "media": len(plan.data.media),
            "bytes_before": sum(tensor.nbytes for tensor in stored.values()),
            "bytes_after": sum(tensor.nbytes for tensor in tensors.values()),
        },
    )
    write_report(report, checkpoint.path, target)
    return report


def _sequences(answerer: ModelAnswerer, plan: LlmPlan, blocks: int, *, is_held_out: bool) -> tuple[Tensor, float]:
    """Conversations one after the other, cut: (B, P, D) float32 on the processor, and the visual share of positions."""
    wanted = blocks * plan.positions
    pieces: list[Tensor] = []
    found = visual = 0
    for sample in plan.data.samples(is_held_out=is_held_out):
        embeds_PD, usage = answerer.embed(sample, is_answered=True)
        pieces.append(embeds_PD.float().cpu())
        found += len(embeds_PD)
        visual += usage.image + usage.video
        if found >= wanted:
            break
    if found < wanted:
        raise InvalidRequest(
            f"{blocks} sequences of {plan.positions} positions are {wanted:,}; the data that were named give {found:,}"
            f"{' to hold out' if is_held_out else ''}: name more pictures or videos, or a mixture",
            param="data",
        )
    return torch.cat(pieces)[:wanted].reshape(blocks, plan.positions, -1), visual / found


@torch.no_grad()
def _search(
    llm: Qwen2ForCausalLM, seen_BPD: Tensor, held_out_BPD: Tensor, plan: LlmPlan, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, list[LayerError]]]:
    """What is new of the model's tensors, by name, and every layer's errors on what is held out, summed up with those
    of the layers before it."""
    made: dict[str, Tensor] = {}
    layers: dict[str, list[LayerError]] = {MADE: [], NEAREST: []}
    seen_BPD = seen_BPD.to(plan.device)
    wanted_BPD = held_out_BPD.to(plan.device)
    got = dict.fromkeys(layers, wanted_BPD)
    rotations = llm.model.rotary_emb.to(plan.device)(wanted_BPD, torch.arange(plan.positions, device=plan.device)[None])
    attention: dict[str, Any] = {"attention_mask": None, "position_embeddings": rotations}
    for index, stored in enumerate(llm.model.layers):
        layer = _own(stored, plan.device)
        nearest = _own(stored, plan.device)
        for name in LINEARS:
            linear = linear_named(nearest, name)
            linear.weight.data = _rounded(quantise(linear.weight.data, plan.group)).dequantise().float()
        wanted_BPD = _output(layer, wanted_BPD, attention)
        got[NEAREST] = _output(nearest, got[NEAREST], attention)

        inputs = linear_inputs(layer, seen_BPD, **attention)
        seen_BPD = _output(layer, seen_BPD, attention)
        new = _quantise_layer(layer, inputs, plan.group, attention)
        made |= {f"model.layers.{index}.{name}": tensor.cpu() for name, tensor in new.items()}
        got[MADE] = _output(layer, got[MADE], attention)
        for way, found in layers.items():
            tally = Tally()
            tally.add(wanted_BPD, got[way])
            found.append(tally.result())
        progress("quantising layers", index + 1, len(llm.model.layers))
    return made, layers


def _quantise_layer(
    layer: nn.Module, inputs: dict[str, Tensor], group: int, attention: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Scales, then clips, then rounds, in place. Returns packed linears, and norms and biases as folding left them."""
    for scales, search in search_scales(layer, inputs, group, **attention):
        fold_scale(layer, scales, search.best_I, inputs)
    limits = {name: search.best_OG for name, search in search_clips(layer, inputs, group).items()}
    new = {name: tensor.detach() for name, tensor in layer.named_parameters() if linear_of(f".{name}") is None}
    for name in LINEARS:
        linear = linear_named(layer, name)
        weight_OI = linear.weight.data if name not in limits else clip(linear.weight.data, limits[name])
        int4 = _rounded(quantise(weight_OI, group))
        new |= {f"{name}.{kind}": tensor for kind, tensor in pack(int4).items()}
        linear.weight.data = int4.dequantise().float()
    return new


def _rounded(weight: Int4Weight) -> Int4Weight:
    """With scales as they are stored."""
    return weight._replace(scales_OG=weight.scales_OG.half().float())


def _own(layer: Qwen2DecoderLayer, device: torch.device) -> Qwen2DecoderLayer:
    """A copy in float32 that may be written to."""
    with torch.device("meta"):
        made = Qwen2DecoderLayer(layer.self_attn.config, layer.self_attn.layer_idx)
    state = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in layer.state_dict().items()}
    made.load_state_dict(state, strict=True, assign=True)
    made.eval().requires_grad_(False)
    return made


def _output(layer: nn.Module, hidden_BPD: Tensor, attention: Mapping[str, Any]) -> Tensor:
    """One sequence at a time, which bounds memory."""
    outputs = [layer(one[None], **attention) for one in hidden_BPD]
    return torch.cat([output if isinstance(output, Tensor) else output[0] for output in outputs])
