"""The 8-bit tower's speed: floors first, then `transformers` in bfloat16, the same compiled, torchao's int8, and ours.

    python -m benchmarks.tower                       on a GPU: SigLIP-SO400M at 448 px, batches 1, 8, 32, 128
    python -m benchmarks.tower --tiny --batches 1 4  anywhere: the command works, the figures mean nothing

Random weights, one process, one device. Times are medians after warming up; a tile's time is the batch's over its
size. 256 frames go from tiles to projected and pooled tokens. Errors are against float64: of the kernels on one
block's sizes, and of features against a float64 tower's. A way that cannot run here says why. On a GPU host:
`pip install torch triton torchao transformers` and this package.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nvila.model.config import ImageMode, LlmConfig, NvilaConfig, TowerConfig, Wrap
from nvila.model.encoder import Prepared, VisionEncoder
from nvila.model.int8_tower import Int8Linear, Int8Ops, Int8Rows, Int8Tower, choose_ops
from nvila.model.projector import Projector
from nvila.model.siglip import Tower
from nvila.quantize.tower import int8_weights
from nvila.types import EncodeSettings, MediaKind, TokenDtype

SO400M = TowerConfig(
    image_px=448, patch_px=14, width=1152, mlp_width=4304, layers=27, heads=16, norm_eps=1e-6, select_layer=-2
)
TINY = TowerConfig(
    image_px=112, patch_px=14, width=144, mlp_width=272, layers=3, heads=2, norm_eps=1e-6, select_layer=-2
)
FRAMES, FRAMES_AT_ONCE = 256, 32

PEAKS = {
    "H100": {"int8": 1979e12, "bf16": 989e12, "bytes": 3.35e12},
    "H200": {"int8": 1979e12, "bf16": 989e12, "bytes": 4.8e12},
}
"""Dense operations and bytes per second: NVIDIA H100 and H200 (SXM) data sheets."""


@dataclass(frozen=True)
class Floors:
    """Of one tile. Operations count a multiplication and an addition as two. `small_bytes`: of the kernels between
    products and attention, which nothing but memory bounds; `weight_bytes`: of a whole batch, in 8 bits."""

    linear_operations: int
    attention_operations: int
    weight_bytes: int
    activation_bytes: int
    small_bytes: int

    @classmethod
    def of(cls, tower: TowerConfig) -> Floors:
        T, C, M, blocks = (tower.image_px // tower.patch_px) ** 2, tower.width, tower.mlp_width, tower.blocks
        # Bytes of a block, the residual stream in 16 bits: norms with quantisation 2 · 3 C; q, k, v 7 C; attention 8 C;
        # quantisation 3 C; output 5 C; MLP C + 2 M, 3 M, M + 4 C.
        return cls(
            linear_operations=blocks * 2 * T * (4 * C * C + 2 * C * M),
            attention_operations=blocks * 4 * T * T * C,
            weight_bytes=blocks * (4 * C * C + 2 * C * M),
            activation_bytes=blocks * T * (34 * C + 6 * M),
            small_bytes=blocks * T * (9 * C + 3 * M),
        )

    def seconds(self, peaks: dict[str, float], batch: int) -> dict[str, float]:
        """The least that a tile takes, by way of computing. `int8, as built`: products and attention at their peaks,
        and the kernels between them at that of memory, one after the other."""
        attention = self.attention_operations / peaks["bf16"]
        int8 = self.linear_operations / peaks["int8"] + attention
        return {
            "bf16 operations": self.linear_operations / peaks["bf16"] + attention,
            "int8 operations": int8,
            "int8, as built": int8 + self.small_bytes / peaks["bytes"],
            "bytes": (self.activation_bytes + self.weight_bytes / batch) / peaks["bytes"],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tower of toy size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--runs", type=int, default=10, help="timed, of each (%(default)s)")
    parser.add_argument("--blocks", type=int, help="fewer transformer blocks than the model has")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, help="of a processor")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = TINY if options.tiny else SO400M
    if options.blocks:
        config = replace(config, layers=options.blocks + 1)
    report = measure(config, options)
    print(json.dumps(report, indent=1) if options.json else text(report))
    return 0


def measure(config: TowerConfig, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    whole = Tower(config, config.image_px).eval().requires_grad_(False)
    pixels = torch.rand(max(options.batches), 3, config.image_px, config.image_px) * 2 - 1
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "tower": asdict(config),
        "floors": asdict(Floors.of(config)),
        "floor_ms": _floors(config, options.batches),
        "ways": {},
        "frames": options.frames,
    }
    few = pixels[: min(2, len(pixels))]
    exact = _double(whole)(few).double()
    for name in options.ways:
        try:
            report["ways"][name] = _measure_way(WAYS[name](whole, config, device), config, pixels, exact, options)
        except (ImportError, RuntimeError, AttributeError, TypeError) as error:
            report["ways"][name] = {"cannot": f"{type(error).__name__}: {error}".splitlines()[0]}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report["kernels"] = kernel_errors(choose_ops(device, config), config, device)
    return report


def _measure_way(
    tower: nn.Module, config: TowerConfig, pixels: Tensor, exact: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    weight = tower.embeddings.patch_embedding.weight
    pixels = pixels.to(weight.device, weight.dtype)
    with torch.inference_mode():
        made = tower(pixels[: len(exact)]).double().cpu()
        found: dict[str, Any] = {
            "error": float((made - exact).norm() / exact.norm()),
            "cosine": float(torch.cosine_similarity(made, exact, dim=-1).mean()),
            "tile_ms": {},
        }
        for batch in options.batches:
            some = pixels[:batch]
            seconds = timed(lambda some=some: tower(some), options.runs)
            found["tile_ms"][str(batch)] = 1000 * seconds / batch
        found["frames_s"] = _frames_s(tower, config, pixels, options)
    return found


def _frames_s(tower: nn.Module, config: TowerConfig, pixels: Tensor, options: argparse.Namespace) -> float:
    """Tiles on the device to projected and pooled tokens on it."""
    model = nvila(config)
    projector = Projector.of(model).to(pixels.device, pixels.dtype)
    encoder = VisionEncoder(model, tower, projector)  # type: ignore[arg-type]  # a compiled tower, too
    tiles = pixels[:1].expand(options.frames, -1, -1, -1).contiguous()
    settings = EncodeSettings(
        kind=MediaKind.VIDEO,
        is_tiled=False,
        pool_sizes=model.pool_sizes,
        token_dtype=TokenDtype.BFLOAT16,
        vision_revision="",
    )
    prepared = Prepared(pixels_N3SS=tiles)

    def run() -> Tensor:
        features = torch.cat([encoder.tower(some) for some in torch.split(tiles, FRAMES_AT_ONCE)])
        return encoder.finish(features, prepared, settings)[0]

    return timed(run, max(2, options.runs // 4))


# -- ways -------------------------------------------------------------------------------------------------------------


def _plain(whole: Tower, config: TowerConfig, device: torch.device) -> nn.Module:
    return _copy(whole, config).to(device, torch.bfloat16)


def _compiled(whole: Tower, config: TowerConfig, device: torch.device) -> nn.Module:
    return _compile(_plain(whole, config, device))


def _torchao(whole: Tower, config: TowerConfig, device: torch.device) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    tower = _plain(whole, config, device)
    quantize_(tower.encoder, Int8DynamicActivationInt8WeightConfig())
    return _compile(tower)


def _ours(whole: Tower, config: TowerConfig, device: torch.device) -> nn.Module:
    weights = dict(whole.state_dict()) | int8_weights(whole)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return Int8Tower(config, config.image_px, weights, choose_ops(device, config), device=device, dtype=dtype)


def _float32(whole: Tower, config: TowerConfig, device: torch.device) -> nn.Module:
    return _copy(whole, config).to(device)


WAYS: dict[str, Callable[[Tower, TowerConfig, torch.device], nn.Module]] = {
    "float32": _float32,
    "bf16": _plain,
    "bf16 compiled": _compiled,
    "torchao int8 compiled": _torchao,
    "ours": _ours,
}


def _compile(tower: nn.Module) -> nn.Module:
    tower.forward = torch.compile(tower.forward, mode="max-autotune", dynamic=False)  # type: ignore[method-assign]
    return tower


def _copy(whole: Tower, config: TowerConfig) -> Tower:
    made = Tower(config, config.image_px).eval().requires_grad_(False)
    made.load_state_dict(whole.state_dict())
    return made


def _double(whole: Tower) -> Tower:
    made = Tower(_config_of(whole), whole.embeddings.image_size).eval().requires_grad_(False)
    made.load_state_dict(whole.state_dict())
    return made.double()


def _config_of(tower: Tower) -> TowerConfig:
    told = tower.embeddings.config
    return TowerConfig(
        image_px=told.image_size,
        patch_px=told.patch_size,
        width=told.hidden_size,
        mlp_width=told.intermediate_size,
        layers=told.num_hidden_layers,
        heads=told.num_attention_heads,
        norm_eps=told.layer_norm_eps,
        select_layer=-1,
    )


def nvila(tower: TowerConfig) -> NvilaConfig:
    """A model of the 8B's width around the tower, frames pooled by eight."""
    llm = LlmConfig(
        width=3584,
        mlp_width=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        head_width=128,
        vocab=151648,
        is_tied=False,
        max_positions=32768,
        norm_eps=1e-6,
        rope_base=1e6,
    )
    return NvilaConfig(
        name="random",
        tower=tower,
        llm=llm,
        image_mode=ImageMode.RESIZE,
        tile_px=tower.image_px,
        projector_type="mlp_downsample",
        projector_width=tower.width,
        image_wrap=Wrap(),
        video_wrap=Wrap(),
        pool_sizes=((8, 1, 1),),
    )


# -- errors and times -------------------------------------------------------------------------------------------------


def kernel_errors(ops: Int8Ops, config: TowerConfig, device: torch.device) -> dict[str, float]:
    """Largest difference from float64 on the same whole numbers, over the largest magnitude; for rows, in steps."""
    C, M, T = config.width, config.mlp_width, 1024
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, C, generator=generator).to(device)
    norm = nn.LayerNorm(C, eps=config.norm_eps).to(device).requires_grad_(False)
    exact = nn.functional.layer_norm(x.double(), (C,), eps=config.norm_eps)
    rows = ops.normalise(x, norm)
    steps = exact / exact.abs().amax(1, keepdim=True) * 127
    found = {"norm and quantise, steps": float((rows.values_TI.double() - steps).abs().max())}
    weight = torch.randint(-127, 128, (M, C), generator=generator).to(torch.int8).to(device)
    linear = Int8Linear(weight, torch.rand(M, generator=generator) / 127, torch.randn(M, generator=generator)).to(
        device
    )
    wanted = _exact_linear(rows, linear)
    bent = nn.functional.gelu(wanted, approximate="tanh")
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        plain = ops.linear(rows, linear, dtype=dtype, residual_TO=None).double()
        gelu = ops.linear(rows, linear, dtype=dtype, is_gelu=True, residual_TO=None).double()
        found[f"product, {name}"] = float((plain - wanted).abs().max() / wanted.abs().max())
        found[f"product with GELU, {name}"] = float((gelu - bent).abs().max() / bent.abs().max())
    return found


def _exact_linear(rows: Int8Rows, linear: Int8Linear) -> Tensor:
    sums = rows.values_TI.double() @ linear.values_OI.double().T
    return sums * rows.scale_T.double()[:, None] * linear.scale_O.double() + linear.bias_O.double()


def timed(run: Callable[[], object], runs: int) -> float:
    """Median seconds of a call, after three that are not counted (they compile, try out and record)."""
    for _ in range(3 if torch.cuda.is_available() else 1):
        run()
    taken = []
    for _ in range(runs):
        with _clock(taken):
            run()
    return statistics.median(taken)


@contextmanager
def _clock(taken: list[float]) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken.append(time.perf_counter() - began)


def _floors(config: TowerConfig, batches: list[int]) -> dict[str, dict[str, dict[str, float]]]:
    floors = Floors.of(config)
    return {
        device: {str(batch): {name: 1000 * s for name, s in floors.seconds(peaks, batch).items()} for batch in batches}
        for device, peaks in PEAKS.items()
    }


def text(report: dict[str, Any]) -> str:
    floors = report["floors"]
    lines = [
        f"{report['device']}, torch {report['torch']}",
        f"a tile: {floors['linear_operations'] / 1e9:.1f} G operations in linears, "
        f"{floors['attention_operations'] / 1e9:.1f} G in attention; {floors['activation_bytes'] / 1e6:.1f} MB of "
        f"activations; weights {floors['weight_bytes'] / 1e6:.1f} MB",
    ]
    batches = next(iter(report["floor_ms"].values()))
    for device, by_batch in report["floor_ms"].items():
        for name in next(iter(by_batch.values())):
            told = "".join(f"{by_batch[batch][name]:10.3f}" for batch in by_batch)
            lines.append(f"{f'floor {device}, {name}':34}{told}")
    lines.append(f"{'ms a tile, batch of':34}" + "".join(f"{batch:>10}" for batch in batches) + "   frames_s    error")
    for name, way in report["ways"].items():
        if "cannot" in way:
            lines.append(f"{name:34} {way['cannot']}")
            continue
        told = "".join(f"{ms:10.3f}" for ms in way["tile_ms"].values())
        lines.append(f"{name:34}{told}{way['frames_s']:11.3f}{way['error']:9.2%}  cosine {way['cosine']:.6f}")
    lines += [f"{f'kernel: {name}':34}{error:10.2e}" for name, error in report["kernels"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
