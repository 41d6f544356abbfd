"""Frames in, visual tokens out: preprocessing, tower, and what follows it, as three steps and as one.

A service that batches runs them apart: `prepare` per request, `tower` over the tiles of many, `finish` per request.
Values are projected tokens without start, end or separator embeddings, which are text and belong to `model/prompt.py`.

F frames · N tiles · S tile side · T visual tokens · C tower channels · D language-model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nvila.errors import InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.model.compress import pool_levels
from nvila.model.config import ImageMode, NvilaConfig
from nvila.model.dynamic_s2 import BlockSize, merge_scales, project_map
from nvila.model.int8_tower import Int8Ops, Int8Tower, choose_ops
from nvila.model.mapped import compute_in
from nvila.model.preprocess import pixel_values, split_frames, split_image
from nvila.model.projector import Projector
from nvila.model.siglip import Tower
from nvila.model.static_s2 import static_s2_features
from nvila.types import EncodeSettings, Level, MediaKind

TOWER_TILES = 16
"""Tiles per tower call of `encode`, and per projector call: bounds memory (448 px on 3 scales: 14 MB in float32)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """One picture or run of frames, ready for the tower.

    `pixels_N3SS`: float32 holding float16 values; float16 for static S2, which resizes them further and, as the
    reference does, rounds what it gets to their dtype. `block_size`: (rows, columns) of a tiled Dynamic-S2 image.
    """

    pixels_N3SS: Tensor
    block_size: BlockSize | None = None

    @property
    def tiles(self) -> int:
        return int(self.pixels_N3SS.shape[0])


class VisionEncoder:
    """Tower and projector of one checkpoint on one device."""

    def __init__(self, config: NvilaConfig, tower: Tower | Int8Tower, projector: Projector) -> None:
        self.config = config
        self._tower = tower.eval().requires_grad_(False)
        self._projector = projector.eval().requires_grad_(False)

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> VisionEncoder:
        """Weights of a checkpoint folder or hub id, memory-mapped where the device allows; arithmetic in `dtype`.

        Float32 arithmetic on a processor leaves 16-bit weights as they are stored (`model/mapped.py`). A tower stored
        in 8 bits computes its linears so (`model/int8_tower.py`). Raises `InvalidCheckpoint`.
        """
        return cls.from_checkpoint(Checkpoint.open(path), device, dtype)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        ops: Int8Ops | None = None,
    ) -> VisionEncoder:
        """`ops`: the arithmetic of a tower in 8 bits, where it is not to be chosen here."""
        config, device = checkpoint.config, torch.device(device)
        tower: Tower | Int8Tower
        if checkpoint.has_int8_tower:
            ops = ops or choose_ops(device, config.tower)
            weights = checkpoint.tower_weights()
            tower = Int8Tower(config.tower, config.tower_px, weights, ops, device=device, dtype=dtype)
        else:
            with torch.device("meta"):
                tower = Tower(config.tower, config.tower_px)
            tower.load(checkpoint.tower_weights())
            _bring(tower, device, dtype)
        with torch.device("meta"):
            projector = Projector.of(config)
        projector.load_state_dict(checkpoint.projector_weights(), strict=True, assign=True)
        _bring(projector, device, dtype)
        return cls(config, tower, projector)

    @property
    def arithmetic(self) -> str:
        """Of the tower's linears, where they are in 8 bits: what computes them; else empty."""
        return self._tower.arithmetic if isinstance(self._tower, Int8Tower) else ""

    def prepare(self, frames_FHWC: NDArray[np.uint8], settings: EncodeSettings) -> Prepared:
        """Tiles and pixel values of one image (F = 1, any size) or a run of video frames. CPU only."""
        if frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3 or 0 in frames_FHWC.shape:
            raise InvalidRequest(f"frames must be (frames, rows, columns, 3) and not empty, not {frames_FHWC.shape}")
        if settings.kind is MediaKind.VIDEO:
            tiled = split_frames(self.config, frames_FHWC)
        elif len(frames_FHWC) == 1:
            tiled = split_image(self.config, frames_FHWC[0], settings.is_tiled)
        else:
            raise InvalidRequest(f"an image is one frame, not {len(frames_FHWC)}")
        pixels = torch.from_numpy(pixel_values(tiled.tiles_NHWC))
        return Prepared(pixels_N3SS=pixels.half() if self.config.is_static_s2 else pixels, block_size=tiled.block_size)

    @torch.inference_mode()
    def tower(self, pixels_N3SS: Tensor) -> Tensor:
        """Features of any tiles, (N, map_grid², C) in the tower's dtype and on its device, with static S2 all scales'
        along the channels; tiles do not see each other."""
        device = self._tower.embeddings.patch_embedding.weight.device
        return tower_features(self.config, pixels_N3SS.to(device), self._tower)

    @torch.inference_mode()
    def finish(
        self, features_NTC: Tensor, prepared: Prepared, settings: EncodeSettings
    ) -> tuple[Tensor, tuple[Level, ...]]:
        """Scales merged, tokens compressed, projected and pooled: rows (T, D) in float32, and their layout."""
        if len(features_NTC) != prepared.tiles:
            raise InvalidRequest(f"{len(features_NTC)} tiles of features came for {prepared.tiles} tiles of pixels")
        values_TD, levels = visual_tokens(
            self.config, features_NTC, prepared.block_size, settings.kind, settings.pool_sizes, self._project
        )
        return values_TD.float(), levels

    def encode(self, frames_FHWC: NDArray[np.uint8], settings: EncodeSettings) -> tuple[Tensor, tuple[Level, ...]]:
        """All three steps, for use in process."""
        prepared = self.prepare(frames_FHWC, settings)
        features = torch.cat([self.tower(tiles) for tiles in torch.split(prepared.pixels_N3SS, TOWER_TILES)])
        return self.finish(features, prepared, settings)

    def _project(self, x_NTC: Tensor) -> Tensor:
        config = self.config
        run_tiles = max(1, TOWER_TILES * config.grid**2 // config.map_grid**2)
        return torch.cat([self._projector(run) for run in torch.split(x_NTC, run_tiles)])


def _bring(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu":
        compute_in(module, dtype)
    else:
        module.to(device=device, dtype=dtype)


def tower_features(config: NvilaConfig, pixels_N3SS: Tensor, tower: Callable[[Tensor], Tensor]) -> Tensor:
    """What the tower makes of tiles, for serving and training alike. With static S2 a few tiles at a time become their
    squares, which bounds memory.

    `tower`: (n, 3, s, s) to (n, t, C) with s = `config.tower_px`. Differentiable.
    """
    if not config.is_static_s2:
        return tower(pixels_N3SS)
    runs = torch.split(pixels_N3SS, max(1, TOWER_TILES // config.squares))
    features = [
        static_s2_features(run, tower, config.s2_scales, max_tile_px=config.tower_px, merge_index=config.s2_merge_index)
        for run in runs
    ]
    return torch.cat(features)


def visual_tokens(
    config: NvilaConfig,
    features_NTC: Tensor,
    block_size: BlockSize | None,
    kind: MediaKind,
    pool_sizes: Sequence[tuple[int, int, int]],
    project: Callable[[Tensor], Tensor],
    which_F: Tensor | None = None,
) -> tuple[Tensor, tuple[Level, ...]]:
    """What follows the tower, for serving and training alike: rows (T, D) in the projector's dtype, and their layout.

    `project`: (N, T, C) to (N, T', D), tile by tile. `which_F`: for a video whose features are given once for each
    different frame, the row of every frame. Differentiable.
    """
    if block_size is not None:
        maps, sizes = merge_scales(features_NTC, [block_size], config.s2_scales, config.s2_merge_index)
        values_TD = project_map(maps[0], sizes[0], project)
        return values_TD, (Level(1, len(values_TD)),)
    tokens_NTD = _project_tiles(config, features_NTC, project)
    if which_F is not None:
        tokens_NTD = tokens_NTD.index_select(0, which_F)
    if kind is MediaKind.VIDEO:
        return pool_levels(tokens_NTD, pool_sizes or ((1, 1, 1),))
    return tokens_NTD.flatten(0, 1), (Level(tokens_NTD.shape[0], tokens_NTD.shape[1]),)


def _project_tiles(config: NvilaConfig, features_NTC: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """Tiles on their own; a Dynamic-S2 projector gets their channels once per scale (spec §3.3)."""
    if config.image_mode is not ImageMode.DYNAMIC_S2:
        return project(features_NTC)
    runs = torch.split(features_NTC, TOWER_TILES)
    return torch.cat([project(run.repeat(1, 1, config.scales)) for run in runs])
