"""Recorded tile grids and preprocessed pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from nvila.golden.compare import Case, Check, Golden, close, equal
from nvila.golden.inputs import shape, synthetic
from nvila.model.config import ImageMode
from nvila.model.preprocess import normalise, split_image
from nvila.model.tiles import TileGrid, candidate_grids, closest_grid, dynamic_grid, dynamic_s2_grid, dynamic_tiles


def tile_grids(golden: Golden) -> Iterator[Case]:
    yield from golden.others("candidate_scan_order", "find_closest_aspect_ratio", "tile_grids")
    for entry in golden.content["candidate_scan_order"]:
        yield Case(f"tile_grids/candidates {entry['min_tiles']}..{entry['max_tiles']}", partial(_candidates, entry))
    for i, call in enumerate(golden.content["find_closest_aspect_ratio"]):
        yield Case(f"tile_grids/closest {i}", partial(_closest, call))
    for entry in golden.content["tile_grids"]:
        yield Case(f"tile_grids/{entry['width']}x{entry['height']}", partial(_grids, entry))


def _candidates(entry: dict[str, Any]) -> Iterator[Check]:
    got = [list(grid) for grid in candidate_grids(entry["min_tiles"], entry["max_tiles"])]
    yield from equal("order", got, entry["candidates_cols_rows_in_scan_order"])


def _closest(call: dict[str, Any]) -> Iterator[Check]:
    candidates = [TileGrid(*pair) for pair in call["target_ratios"]]
    got = closest_grid(call["width"], call["height"], call["image_size"], candidates)
    yield from equal("grid", list(got), call["result"])


def _grids(entry: dict[str, Any]) -> Iterator[Check]:
    width, height = entry["width"], entry["height"]
    for setting in entry["dynamic"]:
        grid = dynamic_grid(width, height, setting["tile"], setting["min_tiles"], setting["max_tiles"])
        got = (*grid, dynamic_tiles(grid))
        yield from equal("dynamic", got, (setting["cols"], setting["rows"], setting["num_output_images"]))
    for setting in entry["dynamic_s2"]:
        scales = setting["s2_scales"]
        grid = dynamic_s2_grid(width, height, scales, setting["max_tiles"])
        squares = sum((scale // scales[0]) ** 2 for scale in scales[:-1])
        got_s2 = ([*grid.block_size], squares + grid.tiles)
        yield from equal("dynamic_s2", got_s2, (setting["block_size_rows_cols"], setting["num_output_images"]))


def preprocess(golden: Golden) -> Iterator[Case]:
    yield from golden.others("images", "pillow")
    for image, entry in golden.content["images"].items():
        for variant in entry["variants"]:
            yield Case(f"preprocess/{image}.{variant}", partial(_preprocess, golden, image, variant))


def _preprocess(golden: Golden, image: str, variant: str) -> Iterator[Check]:
    entry = golden.content["images"][image]
    recorded = entry["variants"][variant]
    rgb = synthetic(entry["formula"], entry["width"], entry["height"], entry["seed"])
    yield from equal("input", hashlib.sha256(rgb.tobytes()).hexdigest(), entry["rgb_sha256"])
    if "converted_to" in entry:
        pillow_mode = entry["converted_to"].replace(",", " ").split()[0]
        rgb = np.asarray(Image.fromarray(rgb).convert(pillow_mode).convert("RGB"))
    mode = ImageMode(recorded["mode"]) if recorded["mode"] in set(ImageMode) else ImageMode.DYNAMIC_S2
    tile, scales = recorded["tile"], tuple(recorded.get("s2_scales", (recorded["tile"],)))
    limits = {key: recorded[key] for key in ("min_tiles", "max_tiles") if key in recorded}
    config = shape(image_mode=mode, tile_px=tile, s2_scales=scales if mode is ImageMode.DYNAMIC_S2 else (), **limits)
    tiled = split_image(config, rgb, is_tiled=recorded["mode"] in (ImageMode.DYNAMIC, ImageMode.DYNAMIC_S2))
    if "block_size_rows_cols" in recorded:
        yield from equal("block size", [*(tiled.block_size or ())], recorded["block_size_rows_cols"])
    hashes = [hashlib.sha256(tile_HWC.tobytes()).hexdigest() for tile_HWC in tiled.tiles_NHWC]
    if "tile_rgb_sha256" in recorded:
        yield from equal("tiles", hashes, recorded["tile_rgb_sha256"])
    values = torch.from_numpy(normalise(tiled.tiles_NHWC)).view(recorded["pixel_values_shape"])
    tensors = golden.under(f"{image}.{variant}.")
    step = tile // 8
    yield from close("pixels", values[..., ::step, ::step], tensors["pixel_values_sample"], atol=1e-6)
    levels = torch.from_numpy(tiled.tiles_NHWC.copy())
    stored = {"tiles_rgb_u8": levels, "last_tile_rgb_u8": levels[-1], "rgb_u8_chw": levels[0].permute(2, 0, 1)}
    for name in stored.keys() & tensors.keys():
        yield from close(name, stored[name], tensors[name], atol=0)
