"""Recorded outputs of the model's parts: merging of scales, projectors, media encoders, position tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from nvila.errors import InvalidRequest
from nvila.golden.compare import MODULE_TOLERANCE, STEP_TOLERANCE, Case, Check, Golden, close, equal, near
from nvila.golden.inputs import shape
from nvila.model.compress import pool_levels, space_to_channel
from nvila.model.config import DOWNSAMPLE
from nvila.model.dynamic_s2 import merge_chessboard, merge_scales, project_map, split_chessboard, tokens_to_maps
from nvila.model.projector import Projector
from nvila.model.prompt import media_blocks, splice
from nvila.model.published import media_encoder, wrap_ids
from nvila.model.siglip import resize_positions
from nvila.types import Level, MediaKind, PromptMedia, TokensRef


def chessboard(golden: Golden) -> Iterator[Case]:
    def checks(case: dict[str, Any]) -> Iterator[Check]:
        tensors = golden.under(f"{case['case']}.")
        rows, columns, x = case["num_split_h"], case["num_split_w"], tensors["input"]
        if case["op"] == "split":
            got = split_chessboard(x, rows, columns)
        else:
            got = merge_chessboard(tokens_to_maps(x) if case["op"] == "merge_bnc" else x, rows, columns)
        yield from close("output", got, tensors["output"], atol=0)

    yield from golden.by_case(checks)


def dynamic_s2_merge(golden: Golden) -> Iterator[Case]:
    def checks(case: dict[str, Any]) -> Iterator[Check]:
        tensors = golden.under(f"{case['case']}.")
        blocks = [None if size is None else tuple(size) for size in case["block_sizes"]]
        index = case["resize_output_to_scale_idx"]
        maps, sizes = merge_scales(tensors["image_features"], blocks, case["scales"], index)
        yield from equal("block sizes", [list(size) for size in sizes], case["new_block_sizes"])
        for i, merged in enumerate(maps):
            yield from near(f"map {i}", merged, tensors[f"merged.{i}"], STEP_TOLERANCE)

    yield from golden.by_case(checks)


def encode_images(golden: Golden) -> Iterator[Case]:
    def checks(case: dict[str, Any]) -> Iterator[Check]:
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

    yield from golden.by_case(checks)


def projectors(golden: Golden) -> Iterator[Case]:
    def checks(case: dict[str, Any]) -> Iterator[Check]:
        tensors, kind = golden.under(f"{case['case']}."), case["mm_projector_type"]
        state = golden.under(f"{case['case']}.state.")
        projector = _projector(kind, case["mm_hidden_size"], case["hidden_size"], state)
        shapes = {name: list(parameter.shape) for name, parameter in projector.state_dict().items()}
        yield from equal("parameters", shapes, case["state_dict_keys"])
        if "after_downsample" in tensors:
            got = space_to_channel(tensors["input"], DOWNSAMPLE[kind])
            yield from close("compressed", got, tensors["after_downsample"], atol=0)
        yield from near("output", projector(tensors["input"]), tensors["output"], MODULE_TOLERANCE)

    yield from golden.by_case(checks)


def _projector(kind: str, width: int, llm_width: int, state: Mapping[str, Tensor]) -> Projector:
    projector = Projector(kind, width, llm_width)
    projector.load_state_dict(dict(state))
    return projector


def media_encoders(golden: Golden) -> Iterator[Case]:
    yield from golden.by_case(partial(_media_encoder, golden))


def _media_encoder(golden: Golden, case: dict[str, Any]) -> Iterator[Check]:
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
    if is_video:
        items = [tensors[f"features.{i}"] for i in range(len(case["num_frames"]))]
    else:
        items = list(tensors["features"][:, None])
    try:
        for i, features_FTD in enumerate(items):
            values, levels = pool_levels(features_FTD, pools)
            item = _one_record(MediaKind.VIDEO if is_video else MediaKind.IMAGE, levels)
            got = splice(media_blocks(0, item, config), lambda ids: table[ids], {"k": values})
            yield from near(f"embeddings {i}", got, tensors[f"output.{i}"], STEP_TOLERANCE)
    except InvalidRequest as error:
        yield Check("" if "raises" in case else f"raised {error}")
        return
    yield Check(f"did not raise, recorded {case['raises']}" if "raises" in case else "")


def _one_record(kind: MediaKind, levels: tuple[Level, ...]) -> PromptMedia:
    return PromptMedia(kind=kind, is_tiled=False, records=(TokensRef(key="k", levels=levels),))


def position_tables(golden: Golden) -> Iterator[Case]:
    def checks(case: dict[str, Any]) -> Iterator[Check]:
        tensors = golden.under(f"{case['case']}.")
        tokens = (case["new_resolution"] // case["patch"]) ** 2
        yield from near("table", resize_positions(tensors["old"], tokens), tensors["new"], STEP_TOLERANCE)

    yield from golden.by_case(checks)
