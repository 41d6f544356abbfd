"""What a checkpoint is, in numbers: parameters per module, tokens per picture and per video, memory per precision.

Read from configuration and from the headers of its weight files; no weight is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvila.model.checkpoint import EMBEDDING, Checkpoint
from nvila.model.estimate import MediaCost, MediaSize, media_cost
from nvila.model.int8_layout import SCALE
from nvila.model.layouts import Part
from nvila.types import MediaKind, TokenDtype

IMAGE_SIZES = ((448, 448), (640, 480), (1280, 720), (1920, 1080), (1080, 1920), (4000, 1000))
FRAME_COUNTS = (8, 32, 64, 128, 256)

GROUP = 128
"""Weights that share a scale and a zero point of 16 bits each in W4 (AWQ as llm-awq deploys it, NVILA-SPEC §9)."""

PRECISIONS = ("float32", "bfloat16", "int8", "w4")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ModuleSummary:
    """`stored_bytes`: in the weight files. `dtypes`: of its tensors, as safetensors calls them. `memory_bytes`: what
    its weights take, by precision."""

    name: str
    parameters: int
    stored_bytes: int
    dtypes: tuple[str, ...]
    memory_bytes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class ImageSummary:
    width_px: int
    height_px: int
    cost: MediaCost


@dataclass(frozen=True, kw_only=True)
class VideoSummary:
    frames: int
    cost: MediaCost


@dataclass(frozen=True, kw_only=True)
class Summary:
    modules: tuple[ModuleSummary, ...]
    images: tuple[ImageSummary, ...]
    videos: tuple[VideoSummary, ...]


def summarise(checkpoint: Checkpoint) -> Summary:
    """Raises `InvalidCheckpoint` when a weight file cannot be read."""
    config = checkpoint.config
    pictures = [
        MediaSize(kind=MediaKind.IMAGE, is_tiled=config.can_tile, width_px=width, height_px=height, runs=(1,))
        for width, height in IMAGE_SIZES
    ]
    videos = [
        MediaSize(
            kind=MediaKind.VIDEO,
            is_tiled=False,
            width_px=config.tile_px,
            height_px=config.tile_px,
            runs=(math.ceil(frames / config.temporal_group) * config.temporal_group,),
            pool_sizes=config.pool_sizes,
        )
        for frames in FRAME_COUNTS
    ]
    dtype = TokenDtype.BFLOAT16
    return Summary(
        modules=tuple(module for part in Part for module in _modules(checkpoint, part)),
        images=tuple(
            ImageSummary(width_px=size.width_px, height_px=size.height_px, cost=media_cost(config, size, dtype))
            for size in pictures
        ),
        videos=tuple(VideoSummary(frames=size.runs[0], cost=media_cost(config, size, dtype)) for size in videos),
    )


def _modules(checkpoint: Checkpoint, part: Part) -> list[ModuleSummary]:
    """A part, the language model as its embeddings, its blocks and its head."""
    if part is Part.PROJECTOR and checkpoint.config.projector_type == "identity":
        return []
    weights = checkpoint.layout.weights(part)
    shapes = weights.shapes()
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(_module(part, name), []).append(name)
    return [
        ModuleSummary(
            name=module,
            parameters=sum(math.prod(shape) for shape in _whole(names, shapes).values()),
            stored_bytes=sum(math.prod(shapes[name]) * _WIDTHS.get(weights.dtype(name), 4) for name in names),
            dtypes=tuple(sorted({weights.dtype(name) for name in names})),
            memory_bytes={p: weight_bytes(_whole(names, shapes), p) for p in PRECISIONS},
        )
        for module, names in sorted(groups.items(), key=lambda group: _ORDER.index(group[0]))
    ]


def _whole(names: Sequence[str], shapes: Shapes) -> Shapes:
    """As the model has them: linears in four bits by their own sizes, and no scales and zero points of quantising."""
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name.endswith(".qweight"):
            inputs, eighths = shapes[name]
            found[f"{name.removesuffix('.qweight')}.weight"] = (8 * eighths, inputs)
        elif not name.endswith((".qzeros", ".scales", f".{SCALE}")):
            found[name] = shapes[name]
    return found


_ORDER = ("vision_tower", "mm_projector", "llm embeddings", "llm blocks", "llm head")
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def _module(part: Part, name: str) -> str:
    if part is not Part.LLM:
        return part.value
    if name == EMBEDDING:
        return "llm embeddings"
    return "llm head" if name.startswith("lm_head.") else "llm blocks"


def weight_bytes(shapes: Shapes, precision: str) -> int:
    """Of weights held in a precision. `int8` and `w4` are for the matrices of linear layers, with their scales; what is
    left (embeddings, norms, biases, convolutions) takes 16 bits, as in W8A8 and AWQ deployments."""
    return sum(_tensor_bytes(name, shape, precision) for name, shape in shapes.items())


def _tensor_bytes(name: str, shape: tuple[int, ...], precision: str) -> int:
    count = math.prod(shape)
    is_matrix = len(shape) == 2 and "embed" not in name and name != "lm_head.weight"
    if precision == "float32":
        return 4 * count
    if precision == "int8" and is_matrix:
        return count + 2 * shape[0]  # a 16-bit scale per output channel
    if precision == "w4" and is_matrix:
        return -(-count // 2) + shape[0] * -(-shape[1] // GROUP) * 4
    return 2 * count
