"""The shape of an NVILA model: everything that decides tiles, tokens and sizes, without weights and without I/O.

`model/published.py` makes one from a checkpoint's own JSON files; it travels as JSON inside the decode service's model
card, so that the gateway can count tokens without having the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from nvila.errors import InvalidCheckpoint

DOWNSAMPLE = {
    "identity": 1,
    "linear": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_3x3_s2": 3,
    "mlp_downsample_3x3_s2_new": 3,
    "token_learner_2x2": 2,
    "token_learner_3x3": 3,
    "resampler_2x2": 2,
    "resampler_3x3": 3,
}
"""Tower tokens per visual token and axis, by projector type; `mlp{n}x_gelu` keeps every token, like `linear`.

From NVlabs/VILA llava/model/multimodal_projector/base_projector.py; the last four are ours (`model/compressors.py`): as
many tokens as the pooling of that name gives, which no published checkpoint uses.
"""

TOKEN_LEARNERS = ("token_learner_2x2", "token_learner_3x3")
RESAMPLERS = ("resampler_2x2", "resampler_3x3")
TOKEN_LEARNER_WIDTH = 64
"""Hidden width of the layers that weigh tokens (`bottleneck_dim` of scenic's TokenLearnerModuleV11)."""

SUPPORTED_FRAMES = 256
"""Frames that one prompt may hold: what the published video model was trained with (stage 5 of NVlabs/VILA)."""


def projector_widths(kind: str, width: int, llm_width: int) -> tuple[int, ...]:
    """Widths from linear layer to linear layer of a projector, behind its compression; empty without any layer."""
    W, D = width, llm_width
    if kind.endswith("x_gelu"):
        return (W, *([D] * int(kind.removeprefix("mlp").removesuffix("x_gelu"))))
    return {
        "identity": (),
        "linear": (W, D),
        "mlp_downsample": (4 * W, D, D),
        "mlp_downsample_2x2_fix": (4 * W, D, D),
        "mlp_downsample_3x3_fix": (9 * W, 3 * W, D, D),
        "mlp_downsample_3x3_s2": (9 * W, 3 * W, W, W // 3, D, D),
        "mlp_downsample_3x3_s2_new": (9 * W, 4 * W, 2 * W, W, W // 3, D, D),
        **dict.fromkeys(TOKEN_LEARNERS, (W, D, D)),
        **dict.fromkeys(RESAMPLERS, (D, D)),
    }[kind]


class ImageMode(StrEnum):
    """How a picture becomes tiles (`image_aspect_ratio` of a checkpoint)."""

    RESIZE = "resize"
    PAD = "pad"
    DYNAMIC = "dynamic"
    DYNAMIC_S2 = "dynamic_s2"


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """SigLIP. `select_layer` indexes [embeddings, block 1, …, block n]: -2 is the output of the last block but one."""

    image_px: int
    patch_px: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    norm_eps: float
    select_layer: int

    def __post_init__(self) -> None:
        if not -self.layers - 1 <= self.select_layer <= self.layers:
            raise InvalidCheckpoint(
                f"mm_vision_select_layer is {self.select_layer}; the tower has {self.layers} layers"
            )
        if self.width % self.heads:
            raise InvalidCheckpoint(f"tower width {self.width} is not a multiple of its {self.heads} heads")

    @property
    def blocks(self) -> int:
        """Transformer blocks that are computed; the rest of the tower is not needed."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


@dataclass(frozen=True, kw_only=True)
class LlmConfig:
    """Qwen2. `vocab`: embedding rows that are stored; ids from there on have no meaning to this model."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocab: int
    is_tied: bool
    max_positions: int
    norm_eps: float
    rope_base: float


@dataclass(frozen=True, kw_only=True)
class Wrap:
    """Text ids whose embeddings surround visual tokens: `start` and `end` around every block (image, tile, frame or
    pooled frame), `sep` after every pooling level, the last included."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    sep: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NvilaConfig:
    """One model.

    `tile_px`: side of a tile. `s2_scales`: ascending; with `dynamic_s2` multiples of the tile, and with any other image
    mode static S2: a tile is a picture of the last scale, which the tower sees at every scale, cut into squares.
    `s2_merge_index`: the scale to whose size all are brought. `projector_width`: channels that enter the projector
    (tower width × scales).
    `pool_sizes`: (frames, rows, columns) per level; ((1, 1, 1),) is the basic video encoder. `default_frames`: sampled
    when a request does not say.
    """

    name: str
    tower: TowerConfig
    llm: LlmConfig
    image_mode: ImageMode
    tile_px: int
    s2_scales: tuple[int, ...] = ()
    s2_merge_index: int = -1
    min_tiles: int = 1
    max_tiles: int = 12
    projector_type: str
    projector_width: int
    image_wrap: Wrap
    video_wrap: Wrap
    pool_sizes: tuple[tuple[int, int, int], ...] = ((1, 1, 1),)
    default_frames: int = 8
    fps: float = 0.0
    time_tokens: int = 0
    time_token_format: str = "<t{t}>"

    def __post_init__(self) -> None:
        if self.tower_px % self.tower.patch_px:
            raise InvalidCheckpoint(f"tiles of {self.tower_px} px are not whole patches of {self.tower.patch_px} px")
        if self.image_mode is ImageMode.DYNAMIC_S2 or self.is_static_s2:
            self._check_scales()
        if self.projector_width != self.tower.width * self.scales:
            raise InvalidCheckpoint(
                f"the projector takes {self.projector_width} channels; "
                f"{self.scales} scale(s) of a tower of width {self.tower.width} give {self.tower.width * self.scales}"
            )
        _ = self.downsample
        if not self.pool_sizes or any(len(pool) != 3 or min(pool) < 1 for pool in self.pool_sizes):
            raise InvalidCheckpoint(f"pool_sizes must be triples of positive numbers, not {self.pool_sizes}")

    def _check_scales(self) -> None:
        scales = self.s2_scales
        if not scales or list(scales) != sorted(set(scales)):
            raise InvalidCheckpoint(f"s2_scales must ascend, not {scales}")
        if self.is_static_s2:
            if scales[-1] != self.tile_px or any(scale % self.tower_px for scale in scales):
                raise InvalidCheckpoint(
                    f"s2_scales {scales} are not multiples of the tower's {self.tower_px} px up to the picture's "
                    f"{self.tile_px} px"
                )
        elif scales[0] != self.tile_px or any(scale % scales[0] for scale in scales):
            raise InvalidCheckpoint(f"s2_scales must ascend in multiples of the tile, {self.tile_px} px, not {scales}")
        if not -len(scales) <= self.s2_merge_index < len(scales):
            raise InvalidCheckpoint(f"s2_resize_output_to_scale_idx is {self.s2_merge_index} of {len(scales)} scales")

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def is_static_s2(self) -> bool:
        """Every tile is seen at several scales (`model/static_s2.py`)."""
        return bool(self.s2_scales) and self.image_mode is not ImageMode.DYNAMIC_S2

    @property
    def scales(self) -> int:
        """How many scales are joined along the channels: 1 without S2."""
        return max(1, len(self.s2_scales))

    @property
    def tower_px(self) -> int:
        """Side of what the tower sees: a tile, or with static S2 one of the squares that a tile becomes."""
        return self.tower.image_px if self.is_static_s2 else self.tile_px

    @property
    def squares(self) -> int:
        """How many times the tower looks at a tile: once, or with static S2 at every square of every scale."""
        return sum((scale // self.tower_px) ** 2 for scale in self.s2_scales) if self.is_static_s2 else 1

    @property
    def can_tile(self) -> bool:
        """The single image of a prompt is tiled; otherwise every picture is one tile."""
        return self.image_mode in (ImageMode.DYNAMIC, ImageMode.DYNAMIC_S2)

    @property
    def grid(self) -> int:
        """Patches per side of what the tower sees."""
        return self.tower_px // self.tower.patch_px

    @property
    def map_grid(self) -> int:
        """Patches per side of what the projector sees: a tile's, or with static S2 those of the scale merged to."""
        return self.grid * (self.s2_scales[self.s2_merge_index] // self.tower_px if self.is_static_s2 else 1)

    @property
    def downsample(self) -> int:
        """Patches per visual token and axis."""
        kind = self.projector_type
        if kind in DOWNSAMPLE:
            return DOWNSAMPLE[kind]
        depth = kind.removeprefix("mlp").removesuffix("x_gelu")
        if kind == f"mlp{depth}x_gelu" and depth.isdecimal() and int(depth) > 0:
            return 1
        raise InvalidCheckpoint(f"unknown mm_projector_type {kind!r}; known: {', '.join(DOWNSAMPLE)}, mlp<n>x_gelu")

    @property
    def side(self) -> int:
        """Visual tokens per tile side, before pooling; a short last block is padded."""
        return -(-self.map_grid // self.downsample)

    @property
    def temporal_group(self) -> int:
        """Frames come in multiples of this, so that every pooling level divides them."""
        return math.lcm(*(frames for frames, _, _ in self.pool_sizes))

    @property
    def max_frames(self) -> int:
        """Frames that one prompt may hold."""
        return max(SUPPORTED_FRAMES, self.default_frames)

    @property
    def llm_width(self) -> int:
        return self.llm.width

    @property
    def vocab(self) -> int:
        return self.llm.vocab

    @property
    def max_positions(self) -> int:
        return self.llm.max_positions

    # -- wire -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Compact and with sorted keys: equal configurations are equal strings."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> NvilaConfig:
        """The inverse of `to_json`; raises `InvalidCheckpoint` for anything else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(
                **fields
                | {
                    "tower": TowerConfig(**fields["tower"]),
                    "llm": LlmConfig(**fields["llm"]),
                    "image_mode": ImageMode(fields["image_mode"]),
                    "s2_scales": tuple(fields["s2_scales"]),
                    "image_wrap": _wrap(fields["image_wrap"]),
                    "video_wrap": _wrap(fields["video_wrap"]),
                    "pool_sizes": tuple(tuple(pool) for pool in fields["pool_sizes"]),
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidCheckpoint(f"not a model configuration: {error}") from error


def _wrap(fields: Mapping[str, list[int]]) -> Wrap:
    return Wrap(**{place: tuple(ids) for place, ids in fields.items()})
