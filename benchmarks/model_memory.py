"""Memory of a model of full size: how much loading takes beside its file, and one tile's time.

    python -m benchmarks.model_memory [--folder FOLDER] [--layout vila|hf] [--dtype bfloat16|float16] [--json]

Makes a checkpoint of NVILA-Lite-2B's shape (SigLIP-SO400M at 448 px, the 3x3 projector, Qwen2-1.5B) with random
weights, then, in a process of its own: opens it, loads tower, projector and language model, reads every weight,
encodes one tile. Resident memory is what the kernel says: anonymous pages, and pages of the mapped files, each counted
once. What the interpreter and its libraries held before is told apart and taken off.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

LIMIT = 1.1
"""Of the file's size: what loading may take."""

TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 448,
}
LLM = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151648,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
PROJECTOR = "mlp_downsample_3x3_fix"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes and stays (default: a temporary folder)")
    parser.add_argument("--layout", choices=["vila", "hf"], default="vila")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of the weights on disk")
    parser.add_argument("--threads", type=int, default=2, help="of arithmetic (%(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.threads)))
        return 0
    with tempfile.TemporaryDirectory(prefix="nvila-memory-", dir=options.folder) as scratch:
        checkpoint = Path(scratch) / "nvila-lite-2b-random"
        made_s = make(checkpoint, options.layout, options.dtype)
        command = [sys.executable, "-m", "benchmarks.model_memory", "--measure", str(checkpoint)]
        done = subprocess.run([*command, "--threads", str(options.threads)], stdout=subprocess.PIPE, check=True)
        report = json.loads(done.stdout) | {"layout": options.layout, "dtype": options.dtype, "made_s": made_s}
    print(json.dumps(report, indent=2) if options.json else _text(report))
    return 0 if report["ratio"] <= LIMIT else 1


def make(target: Path, layout: str, dtype: str) -> float:
    """Write the checkpoint; seconds. All tensors are views of one run of random numbers, so that making it is light."""
    import torch

    from nvila.model.checkpoint import Checkpoint
    from nvila.model.layouts import LayoutStyle, Part
    from nvila.model.projector import Projector
    from nvila.model.qwen2 import llm_shapes
    from nvila.model.save import save_checkpoint
    from nvila.model.siglip import Tower
    from nvila.model.tiny import make_random_checkpoint

    began = time.perf_counter()
    tiny = Checkpoint.open(make_random_checkpoint(target.with_name("tiny"))).layout
    described = replace(
        tiny,
        path=tiny.path,
        root={**tiny.root, "image_aspect_ratio": "dynamic", "dynamic_s2": False, "num_video_frames": 8},
        llm={**tiny.llm, **LLM},
        tower={**tiny.tower, **TOWER},
        projector={**tiny.projector, "mm_projector_type": PROJECTOR},
        processor={**tiny.processor, "size": {"height": 448, "width": 448}},
    )
    config = Checkpoint(described).config
    with torch.device("meta"):
        whole = replace(config.tower, select_layer=config.tower.layers)  # published folders store the last block too
        tower = {f"vision_model.{n}": tuple(p.shape) for n, p in Tower(whole, config.tile_px).state_dict().items()}
        projector = {n: tuple(p.shape) for n, p in Projector.of(config).state_dict().items()}
    shapes = {Part.LLM: llm_shapes(config.llm), Part.TOWER: tower, Part.PROJECTOR: projector}
    numbers = torch.empty(LLM["vocab_size"] * LLM["hidden_size"] + (1 << 20), dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    for run in torch.split(numbers, 1 << 24):
        run.copy_(torch.randn(len(run), generator=generator) * 0.02)
    weights: dict[Part, dict[str, Any]] = {part: {} for part in shapes}
    for part, by_name in shapes.items():
        for place, (name, shape) in enumerate(by_name.items()):
            count = torch.Size(shape).numel()
            weights[part][name] = numbers[place : place + count].view(shape)
    save_checkpoint(described, weights, target, LayoutStyle(layout))
    return round(time.perf_counter() - began, 1)


def measure(folder: Path, threads: int) -> dict[str, Any]:
    """Run in a fresh process: what each step leaves and, at its highest, takes."""
    import numpy as np
    import torch

    from nvila.model import qwen2
    from nvila.model.checkpoint import Checkpoint
    from nvila.model.encoder import VisionEncoder
    from nvila.model.verify import is_finite
    from nvila.types import EncodeSettings, MediaKind, TokenDtype

    for model in ("qwen2", "siglip"):  # counted as libraries, not as loading
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    torch.set_num_threads(threads)
    torch.ones(64, 64) @ torch.ones(64, 64)
    file_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    libraries = _resident()
    began = time.perf_counter()
    checkpoint = Checkpoint.open(folder)
    encoder = VisionEncoder.from_checkpoint(checkpoint)
    llm = qwen2.load_llm(checkpoint.layout, checkpoint.config.llm)
    loaded_s, opened = time.perf_counter() - began, _resident()
    _reset_peak()
    for parameter in [*llm.parameters(), *_parameters(encoder)]:
        assert is_finite(parameter.detach())
    read_s, read = time.perf_counter() - began - loaded_s, _resident()
    settings = EncodeSettings(
        kind=MediaKind.IMAGE, is_tiled=False, pool_sizes=(), token_dtype=TokenDtype.FLOAT32, vision_revision=""
    )
    picture = np.random.default_rng(0).integers(0, 256, (1, 448, 448, 3), dtype=np.uint8)
    tile_s = []
    for _ in range(2):
        began = time.perf_counter()
        values_TD, _ = encoder.encode(picture, settings)
        tile_s.append(time.perf_counter() - began)
    assert bool(torch.isfinite(values_TD).all())
    encoded = _resident()
    loading = read["peak"] - libraries["now"]
    return {
        "file_bytes": file_bytes,
        "libraries": libraries,
        "opened": opened,
        "read": read,
        "encoded": encoded,
        "loading_bytes": loading,
        "ratio": round(loading / file_bytes, 3),
        "ratio_with_tile": round((encoded["peak"] - libraries["now"]) / file_bytes, 3),
        "loaded_s": round(loaded_s, 2),
        "read_s": round(read_s, 2),
        "tile_s": [round(seconds, 2) for seconds in tile_s],
        "tokens": list(values_TD.shape),
        "machine": f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    }


def _parameters(encoder: Any) -> list[Any]:
    return [*encoder._tower.parameters(), *encoder._projector.parameters()]


def _resident() -> dict[str, int]:
    """Bytes now, by kind, and at the highest since `_reset_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"now": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {name: int(status[field].split()[0]) * 1024 for name, field in names.items()}


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _text(report: dict[str, Any]) -> str:
    size_gb = report["file_bytes"] / 1e9
    lines = [
        f"{report['layout']} layout, {report['dtype']} on disk: {size_gb:.3f} GB; {report['machine']}",
        f"{'':22}{'resident':>10}{'anonymous':>11}{'file':>9}{'peak':>9}   (GB)",
    ]
    for step in ("libraries", "opened", "read", "encoded"):
        row = report[step]
        lines.append(
            f"{step:22}"
            + "".join(f"{row[k] / 1e9:>{w}.3f}" for k, w in (("now", 10), ("anonymous", 11), ("file", 9), ("peak", 9)))
        )
    lines += [
        f"loading, every weight read: {report['ratio']:.3f} x the file (at most {LIMIT}); "
        f"with one tile encoded: {report['ratio_with_tile']:.3f} x",
        f"opened and loaded in {report['loaded_s']} s, read in {report['read_s']} s, "
        f"one tile in {report['tile_s'][0]} s, again {report['tile_s'][1]} s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
