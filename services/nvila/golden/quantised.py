"""Recorded quantisation of training and of the tower: 8-bit floats and 8-bit integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from safetensors.torch import load_file
from torch import nn

from nvila.golden.compare import STEP_TOLERANCE, Case, Check, Golden, Tensors, close, equal, near, relative
from nvila.model import fp8, w8a8
from nvila.model.checkpoint import Checkpoint
from nvila.model.siglip import Tower

SMOOTHED_TOLERANCE = 1e-4
"""Activation maxima and features of a smoothed tower (golden README)."""

INT8_OUTPUT_TOLERANCE = 1e-3
"""Output of the re-derived int8 path (golden README)."""

PREFIX = "vision_tower.vision_model."
"""Before a tower's names in recorded ones."""

FORMATS = {"E4M3": fp8.E4M3, "E5M2": fp8.E5M2}


# -- fp8 --------------------------------------------------------------------------------------------------------------


def fp8_fake_quant(golden: Golden) -> Iterator[Case]:
    def checks(case: dict[str, Any]) -> Iterator[Check]:
        tensors = golden.under(f"{case['case']}.")
        blocks = fp8.quantise(tensors["input"], FORMATS[case["format"]], case["row_block"], case["col_block"])
        yield from close("scales", blocks.scales_bc.flatten(), tensors["scales"], atol=0)
        yield from close("values", blocks.values_RC, tensors["quantised_values"], atol=0)
        yield from close("dequantised", blocks.dequantise(), tensors["dequantised"], atol=0)

    def rounding(name: str) -> Iterator[Check]:
        tensors = golden.under(f"round.{name}.")
        yield from close("rounded", fp8.round_to(tensors["input"], FORMATS[name]), tensors["output"], atol=0)

    yield Case("fp8_fake_quant/epsilon", partial(equal, "epsilon", fp8.EPSILON, golden.content["epsilon"]))
    for name in sorted({name.split(".")[0] for name in golden.under("round.")}):
        yield Case(f"fp8_fake_quant/round {name}", partial(rounding, name))
    yield from golden.by_case(checks)


# -- w8a8 -------------------------------------------------------------------------------------------------------------


def w8a8_linears(golden: Golden) -> Iterator[Case]:
    yield from golden.others("w8_linear", "smooth")
    for case in golden.content["w8_linear"]:
        yield Case(f"w8a8/linear {case['case']}", partial(_linear, golden.under(f"w8.{case['case']}.")))
    yield Case("w8a8/qkv", partial(_qkv, golden.under("qkv.")))
    for case in golden.content["smooth"]:
        yield Case(f"w8a8/smooth {case['case']}", partial(_smooth, golden.under(f"smooth.{case['case']}."), case))


def _linear(tensors: Tensors) -> Iterator[Check]:
    weight, x_TI = w8a8.quantise_weight(tensors["weight"]), tensors["input"]
    bias = tensors.get("bias")
    yield from close("weight", weight.values_OI, tensors["int8.weight"], atol=0)
    yield from close("weight scale", weight.scale_O, tensors["int8.dequant_scale"], atol=0)
    yield from close("fake weight", weight.dequantise(), tensors["fake.weight"], atol=0)
    fake = w8a8.fake_linear(x_TI, weight, bias)
    # float16 sums in another order may end one step of float16 apart
    yield from near("fake output", fake.float(), tensors["fake.output"].float(), INT8_OUTPUT_TOLERANCE)
    activation = w8a8.quantise_activation(x_TI)
    yield from close("activation", activation.values_TI, tensors["rederived.act_int8"], atol=1)
    yield from close("activation scale", activation.scale_T, tensors["rederived.act_scale_fp16"], atol=0)
    output = w8a8.int8_linear(x_TI, weight, bias)
    yield from near("output", output, tensors["rederived.output_fp32"], INT8_OUTPUT_TOLERANCE)


def _qkv(tensors: Tensors) -> Iterator[Check]:
    weight, bias = w8a8.fuse([tensors[f"{x}.weight"] for x in "qkv"], [tensors[f"{x}.bias"] for x in "qkv"])
    yield from close("weight", weight.values_OI, tensors["int8.weight"], atol=0)
    yield from close("scale", weight.scale_O, tensors["int8.dequant_scale"], atol=0)
    yield from close("bias", bias, tensors["int8.bias"], atol=0)


def _smooth(tensors: Tensors, case: dict[str, Any]) -> Iterator[Check]:
    norm = nn.LayerNorm(case["dim"])
    norm.load_state_dict({name: tensors[f"ln.{name}"] for name in ("weight", "bias")})
    linears = [nn.Linear(case["dim"], out, bias=False) for out in case["fc_out"]]
    for i, linear in enumerate(linears):
        linear.weight.copy_(tensors[f"fc{i}.weight"])
    w8a8.smooth(norm, linears, tensors["act_scales"], case["alpha"])
    yield from relative("norm weight", norm.weight, tensors["ln.weight.after"], STEP_TOLERANCE)
    yield from relative("norm bias", norm.bias, tensors["ln.bias.after"], STEP_TOLERANCE)
    for i, linear in enumerate(linears):
        yield from relative(f"weight {i}", linear.weight, tensors[f"fc{i}.weight.after"], STEP_TOLERANCE)


def w8a8_tower_smoothing(golden: Golden) -> Iterator[Case]:
    yield from golden.others("act_scale_keys")
    yield Case(golden.stem, partial(_tower, golden))


def _tower(golden: Golden) -> Iterator[Check]:
    """Maxima are recorded of every block, features where the model takes them."""
    content, tensors = golden.content, golden.tensors
    folder = golden.checkpoint(content["checkpoint"])
    config = Checkpoint.open(folder).config
    whole = replace(config.tower, select_layer=config.tower.layers)
    stored = load_file(folder / "vision_tower" / "model.safetensors")
    towers = [Tower(tower, config.tile_px).eval() for tower in (whole, config.tower)]
    for tower in towers:
        tower.load({name: stored[f"vision_model.{name}"].float() for name in tower.state_dict()})
    maxima = w8a8.activation_maxima(towers[0], tensors["input"])
    yield from equal("linears", sorted(f"{PREFIX}{name}" for name in maxima), sorted(content["act_scale_keys"]))
    for name, maximum in maxima.items():
        recorded = tensors[f"act_scales.{PREFIX}{name}"]
        yield from relative(f"maxima of {name}", maximum, recorded, SMOOTHED_TOLERANCE)
    before = towers[1](tensors["input"])
    yield from near("features", before, tensors["features_before"], SMOOTHED_TOLERANCE)
    w8a8.smooth_tower(towers[1], maxima, content["alpha"])
    after = towers[1](tensors["input"])
    yield from near("smoothed features", after, tensors["features_after_smoothing"], SMOOTHED_TOLERANCE)
