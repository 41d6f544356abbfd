"""Compare this code with the reference's recorded numbers: `python -m nvila.model.golden FOLDER`.

A folder holds JSON and safetensors files in the format that its own README describes, and tiny checkpoints. Prints one
line per difference and ends with `N matched, M missed`; exits with 1 if any was missed. The same cases run in the test
suite, on the part of the folder that is kept with the tests.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from nvila.errors import InvalidRequest
from nvila.model.compress import pool_levels, space_to_channel
from nvila.model.config import DOWNSAMPLE, ImageMode, LlmConfig, NvilaConfig, TowerConfig, Wrap
from nvila.model.dynamic_s2 import merge_chessboard, merge_scales, project_map, split_chessboard, tokens_to_maps
from nvila.model.preprocess import normalise, split_image
from nvila.model.projector import Projector
from nvila.model.prompt import media_blocks, splice
from nvila.model.published import media_encoder, wrap_ids
from nvila.model.siglip import resize_positions
from nvila.model.tiles import TileGrid, candidate_grids, closest_grid, dynamic_grid, dynamic_s2_grid, dynamic_tiles
from nvila.types import Level, MediaKind, PromptMedia, TokensRef

MODULE_TOLERANCE = 1e-5
"""Module outputs, float32 on CPU (golden README, "Tolerances"), relative to the largest magnitude of a tensor: small
elements are differences of large ones, and the recorded outputs of the deepest projector are themselves up to 3.3e-6
away from what float64 gives, more than a tolerance of each small element alone would allow."""


@dataclass(frozen=True)
class Case:
    """One recorded computation; `problems` repeats it and says what differs (nothing: it matches)."""

    name: str
    problems: Callable[[], Iterator[str]]


class Golden:
    """A recorded file: `<stem>.json` and, where there are tensors, `<stem>.safetensors`."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        self.stem = stem
        self.content: Any = json.loads((folder / f"{stem}.json").read_text("utf-8"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.folder / f"{self.stem}.safetensors")
        return tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with the prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write("usage: python -m nvila.model.golden FOLDER\n")
        return 2
    torch.set_grad_enabled(False)
    matched = missed = 0
    for case in cases(Path(arguments[0])):
        problems = differences(case)
        matched, missed = matched + (not problems), missed + bool(problems)
        for problem in problems:
            sys.stdout.write(f"{case.name}: {problem}\n")
    sys.stdout.write(f"{matched} matched, {missed} missed\n")
    return 1 if missed else 0


def cases(folder: Path) -> Iterator[Case]:
    """Every case of a folder whose subject is the model."""
    from nvila.model.golden_models import conversation, end_to_end

    readers: dict[str, Callable[[Golden], Iterator[Case]]] = {
        "tile_grids": tile_grids,
        "preprocess": preprocess,
        "chessboard": chessboard,
        "dynamic_s2_merge": dynamic_s2_merge,
        "encode_images_dynamic_s2": encode_images,
        "projectors": projectors,
        "media_encoders": media_encoders,
        "pos_embed_resize": position_tables,
        "conversation": conversation,
    }
    for stem, reader in readers.items():
        if (folder / f"{stem}.json").exists():
            yield from reader(Golden(folder, stem))
    for checkpoint in sorted((folder / "e2e").glob("*/config.json")):
        yield from end_to_end(Golden(folder / "e2e", checkpoint.parent.name))


def differences(case: Case) -> list[str]:
    """What differs; an error in our code is a difference."""
    try:
        return list(case.problems())
    except Exception as error:  # the edge of a checking program: reported, and the next case runs
        return [f"{type(error).__name__}: {error}"]


# -- comparing --------------------------------------------------------------------------------------------------------


def equal(what: str, got: object, wanted: object) -> Iterator[str]:
    if got != wanted:
        yield f"{what} is {str(got)[:200]}, recorded {str(wanted)[:200]}"


def close(what: str, got: Tensor, wanted: Tensor, atol: float) -> Iterator[str]:
    """Within `atol`; 0 is exact."""
    if got.shape != wanted.shape:
        yield f"{what} has shape {tuple(got.shape)}, recorded {tuple(wanted.shape)}"
        return
    difference = float((got.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
    if not difference <= atol:
        yield f"{what} differs by up to {difference:.3g}, allowed {atol:.3g}"


def near(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> Iterator[str]:
    """Within `tolerance` × max(1, the largest recorded magnitude)."""
    return close(what, got, wanted, atol=tolerance * max(1.0, float(wanted.abs().max())))


# -- pictures ---------------------------------------------------------------------------------------------------------


def synthetic(formula: str, width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """The recorded inputs, (height, width, 3): integer formulas of the golden README."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    s = seed
    if formula == "gradient":
        channels = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), ((x + y) * 7 + 13 * s) % 256]
    elif formula == "waves":
        channels = [(3 * x**2 + 5 * y + 17 * s) // 8, (x * y + 29 * s) // 4, (3 * y**2 + 11 * x + 31 * s) // 8]
    elif formula == "checker":
        k = 7 + s % 5
        channels = [(x // k + y // k) % 2 * 255, (x // (2 * k) + y // k) % 3 * 127, (x // k) * (y // (3 * k)) % 4 * 85]
    elif formula == "hash":
        mixed = [(73856093 * x) ^ (19349663 * y) ^ (83492791 * (c + 1)) ^ (2654435761 * s) for c in range(3)]
        channels = [(v % 2**32 * 2654435761) % 2**32 // 2**24 for v in mixed]
    else:
        raise InvalidRequest(f"unknown picture formula {formula!r}")
    rgb: NDArray[np.uint8] = np.stack(channels, -1).astype(np.uint8)
    return rgb


def shape(**changes: Any) -> NvilaConfig:
    """A small configuration for functions that need only some of it."""
    mode = changes.get("image_mode", ImageMode.RESIZE)
    scales = len(changes.get("s2_scales", ())) if mode is ImageMode.DYNAMIC_S2 else 1
    tower = TowerConfig(
        image_px=56, patch_px=14, width=8, mlp_width=8, layers=1, heads=1, norm_eps=1e-6, select_layer=-2
    )
    llm = LlmConfig(
        width=8,
        mlp_width=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_width=8,
        vocab=8,
        is_tied=False,
        max_positions=8,
        norm_eps=1e-6,
        rope_base=1e6,
    )
    base: dict[str, Any] = {"name": "", "tower": tower, "llm": llm, "image_mode": mode, "tile_px": 56}
    rest = {
        "projector_type": "mlp_downsample",
        "projector_width": 8 * scales,
        "image_wrap": Wrap(),
        "video_wrap": Wrap(),
    }
    return NvilaConfig(**(base | rest | changes))


def tile_grids(golden: Golden) -> Iterator[Case]:
    for entry in golden.content["candidate_scan_order"]:
        yield Case(f"tile_grids/candidates {entry['min_tiles']}..{entry['max_tiles']}", partial(_candidates, entry))
    for i, call in enumerate(golden.content["find_closest_aspect_ratio"]):
        yield Case(f"tile_grids/closest {i}", partial(_closest, call))
    for entry in golden.content["tile_grids"]:
        yield Case(f"tile_grids/{entry['width']}x{entry['height']}", partial(_grids, entry))


def _candidates(entry: dict[str, Any]) -> Iterator[str]:
    got = [list(grid) for grid in candidate_grids(entry["min_tiles"], entry["max_tiles"])]
    yield from equal("order", got, entry["candidates_cols_rows_in_scan_order"])


def _closest(call: dict[str, Any]) -> Iterator[str]:
    candidates = [TileGrid(*pair) for pair in call["target_ratios"]]
    got = closest_grid(call["width"], call["height"], call["image_size"], candidates)
    yield from equal("grid", list(got), call["result"])


def _grids(entry: dict[str, Any]) -> Iterator[str]:
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
    for image, entry in golden.content["images"].items():
        for variant in entry["variants"]:
            yield Case(f"preprocess/{image}.{variant}", partial(_preprocess, golden, image, variant))


def _preprocess(golden: Golden, image: str, variant: str) -> Iterator[str]:
    entry = golden.content["images"][image]
    recorded = entry["variants"][variant]
    rgb = synthetic(entry["formula"], entry["width"], entry["height"], entry["seed"])
    yield from equal("input", hashlib.sha256(rgb.tobytes()).hexdigest(), entry["rgb_sha256"])
    if entry.get("converted_to", "").startswith("L "):
        rgb = np.asarray(Image.fromarray(rgb).convert("L").convert("RGB"))
    mode = ImageMode(recorded["mode"]) if recorded["mode"] in set(ImageMode) else ImageMode.DYNAMIC_S2
    tile, scales = recorded["tile"], tuple(recorded.get("s2_scales", (recorded["tile"],)))
    limits = {key: recorded[key] for key in ("min_tiles", "max_tiles") if key in recorded}
    config = shape(image_mode=mode, tile_px=tile, s2_scales=scales if mode is ImageMode.DYNAMIC_S2 else (), **limits)
    tiled = split_image(config, rgb, is_tiled=recorded["mode"] in (ImageMode.DYNAMIC, ImageMode.DYNAMIC_S2))
    if "block_size_rows_cols" in recorded:
        yield from equal("block size", [*(tiled.block_size or ())], recorded["block_size_rows_cols"])
    hashes = [hashlib.sha256(tile_HWC.tobytes()).hexdigest() for tile_HWC in tiled.tiles_NHWC]
    yield from equal("tiles", hashes, recorded.get("tile_rgb_sha256", hashes))
    values = torch.from_numpy(normalise(tiled.tiles_NHWC)).view(recorded["pixel_values_shape"])
    tensors = golden.under(f"{image}.{variant}.")
    step = tile // 8
    yield from close("pixels", values[..., ::step, ::step], tensors["pixel_values_sample"], atol=1e-6)
    levels = torch.from_numpy(tiled.tiles_NHWC.copy())
    stored = {"tiles_rgb_u8": levels, "last_tile_rgb_u8": levels[-1], "rgb_u8_chw": levels[0].permute(2, 0, 1)}
    for name in stored.keys() & tensors.keys():
        yield from close(name, stored[name], tensors[name], atol=0)


# -- modules ----------------------------------------------------------------------------------------------------------


def chessboard(golden: Golden) -> Iterator[Case]:
    def problems(case: dict[str, Any]) -> Iterator[str]:
        tensors = golden.under(f"{case['case']}.")
        rows, columns, x = case["num_split_h"], case["num_split_w"], tensors["input"]
        if case["op"] == "split":
            got = split_chessboard(x, rows, columns)
        else:
            got = merge_chessboard(tokens_to_maps(x) if case["op"] == "merge_bnc" else x, rows, columns)
        yield from close("output", got, tensors["output"], atol=0)

    yield from _by_case(golden, problems)


def dynamic_s2_merge(golden: Golden) -> Iterator[Case]:
    def problems(case: dict[str, Any]) -> Iterator[str]:
        tensors = golden.under(f"{case['case']}.")
        blocks = [None if size is None else tuple(size) for size in case["block_sizes"]]
        index = case["resize_output_to_scale_idx"]
        maps, sizes = merge_scales(tensors["image_features"], blocks, case["scales"], index)
        yield from equal("block sizes", [list(size) for size in sizes], case["new_block_sizes"])
        for i, merged in enumerate(maps):
            yield from close(f"map {i}", merged, tensors[f"merged.{i}"], atol=1e-6)

    yield from _by_case(golden, problems)


def encode_images(golden: Golden) -> Iterator[Case]:
    def problems(case: dict[str, Any]) -> Iterator[str]:
        tensors = golden.under(f"{case['case']}.")
        blocks = [None if size is None else tuple(size) for size in case["block_sizes"]]
        features, index = tensors["tower_features"], case["resize_output_to_scale_idx"]
        maps, sizes = merge_scales(features, blocks, case["scales"], index)
        state = golden.under(f"{case['case']}.projector.")
        projector = _projector(case["projector"], maps[0].shape[1], case["output_shapes"][0][1], state)
        for i, (merged, size) in enumerate(zip(maps, sizes, strict=True)):
            yield from near(
                f"tokens {i}", project_map(merged, size, projector), tensors[f"output.{i}"], MODULE_TOLERANCE
            )

    yield from _by_case(golden, problems)


def projectors(golden: Golden) -> Iterator[Case]:
    def problems(case: dict[str, Any]) -> Iterator[str]:
        tensors, kind = golden.under(f"{case['case']}."), case["mm_projector_type"]
        state = golden.under(f"{case['case']}.state.")
        projector = _projector(kind, case["mm_hidden_size"], case["hidden_size"], state)
        shapes = {name: list(parameter.shape) for name, parameter in projector.state_dict().items()}
        yield from equal("parameters", shapes, case["state_dict_keys"])
        if "after_downsample" in tensors:
            got = space_to_channel(tensors["input"], DOWNSAMPLE[kind])
            yield from close("compressed", got, tensors["after_downsample"], atol=0)
        yield from near("output", projector(tensors["input"]), tensors["output"], MODULE_TOLERANCE)

    yield from _by_case(golden, problems)


def _projector(kind: str, width: int, llm_width: int, state: dict[str, Tensor]) -> Projector:
    projector = Projector(kind, width, llm_width)
    projector.load_state_dict(state)
    return projector


def media_encoders(golden: Golden) -> Iterator[Case]:
    yield from _by_case(golden, partial(_media_encoder, golden))


def _media_encoder(golden: Golden, case: dict[str, Any]) -> Iterator[str]:
    """Recorded with a stand-in tokenizer, a character's id being its code point mod 50, and with an identity tower."""
    tensors = golden.under(f"{case['case']}.")
    arguments = case.get("args", {k: case[k] for k in ("start_tokens", "end_tokens") if k in case})
    target = {"_target_": f"llava.model.encoders.{case['encoder']}", **arguments}
    encoder = media_encoder(target, "encoder", (case["encoder"],))
    wrap = wrap_ids(encoder, lambda text: [ord(character) % 50 for character in text])
    config = shape(image_wrap=wrap, video_wrap=wrap)
    table = golden.tensors["embed_tokens.weight"]
    is_video = "Video" in case["encoder"]
    pools = tuple(tuple(pool) for pool in encoder.get("pool_sizes", [(1, 1, 1)]))
    items = golden.under(f"{case['case']}.features.").values() if is_video else tensors["features"][:, None]
    try:
        for i, features_FTD in enumerate(items):
            values, levels = pool_levels(features_FTD, pools)
            item = _one_record(MediaKind.VIDEO if is_video else MediaKind.IMAGE, levels)
            got = splice(media_blocks(0, item, config), lambda ids: table[ids], {"k": values})
            yield from close(f"embeddings {i}", got, tensors[f"output.{i}"], atol=1e-6)
    except InvalidRequest as error:
        if "raises" not in case:
            yield f"raised {error}"
        return
    if "raises" in case:
        yield f"did not raise, recorded {case['raises']}"


def _one_record(kind: MediaKind, levels: tuple[Level, ...]) -> PromptMedia:
    return PromptMedia(kind=kind, is_tiled=False, records=(TokensRef(key="k", levels=levels),))


def position_tables(golden: Golden) -> Iterator[Case]:
    def problems(case: dict[str, Any]) -> Iterator[str]:
        tensors = golden.under(f"{case['case']}.")
        tokens = (case["new_resolution"] // case["patch"]) ** 2
        yield from close("table", resize_positions(tensors["old"], tokens), tensors["new"], atol=1e-6)

    yield from _by_case(golden, problems)


def _by_case(golden: Golden, problems: Callable[[dict[str, Any]], Iterator[str]]) -> Iterator[Case]:
    for case in golden.content["cases"]:
        yield Case(f"{golden.stem}/{case['case']}", partial(problems, case))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
