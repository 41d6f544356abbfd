"""The sum of a request's cost is what encoder, codec, prompt and memory really show."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvila.cache.codec import quantize
from nvila.errors import LimitExceeded
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import NvilaConfig
from nvila.model.encoder import VisionEncoder
from nvila.model.estimate import MOST_PADDED_PX, MediaSize, media_cost, preparation_bytes, request_cost, text_at_most
from nvila.model.layouts import read_layout
from nvila.model.prompt import lay_out
from nvila.types import (
    EncodeSettings,
    MediaKind,
    MediaPart,
    Message,
    PromptMedia,
    Role,
    TextPart,
    TokenDtype,
    TokensRef,
)
from tests.model.conftest import GOLDEN, clip, picture

STATIC_S2 = ("resize, static S2", "pad, static S2", "dynamic, static S2")
CHECKPOINTS = ("nvila-tiny-s2", "nvila-tiny-lite", "nvila-tiny-video", *STATIC_S2)


def _open(name: str) -> Checkpoint:
    """A recorded checkpoint, or the recorded Dynamic-S2 one with other words about its scales."""
    if name not in STATIC_S2:
        return Checkpoint.open(GOLDEN / "e2e" / name)
    layout = read_layout(GOLDEN / "e2e" / "nvila-tiny-s2")
    words = {"s2": True, "dynamic_s2": False, "image_aspect_ratio": name.partition(",")[0], "max_tiles": 3}
    return Checkpoint(replace(layout, root={**layout.root, **words, "s2_resize_output_to_scale_idx": 0}))


OPENED = {name: _open(name) for name in CHECKPOINTS}
ENCODERS = {name: VisionEncoder.from_checkpoint(opened) for name, opened in OPENED.items()}
DTYPES = st.sampled_from([TokenDtype.FLOAT32, TokenDtype.INT8])


def _settings(size: MediaSize, dtype: TokenDtype) -> EncodeSettings:
    return EncodeSettings(
        kind=size.kind, is_tiled=size.is_tiled, pool_sizes=size.pool_sizes, token_dtype=dtype, vision_revision=""
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), is_tiled=st.booleans(), dtype=DTYPES)
@example(width=1, height=1, is_tiled=True, dtype=TokenDtype.FLOAT32)
@example(width=1, height=10_000, is_tiled=True, dtype=TokenDtype.INT8)
@example(width=10_000, height=1, is_tiled=True, dtype=TokenDtype.INT8)
@example(width=10_000, height=1, is_tiled=False, dtype=TokenDtype.FLOAT32)
def test_an_image_of_any_shape_costs_what_was_estimated(
    name: str, width: int, height: int, is_tiled: bool, dtype: TokenDtype
) -> None:
    encoder, opened = ENCODERS[name], OPENED[name]
    is_tiled = is_tiled and encoder.config.can_tile
    size = MediaSize(kind=MediaKind.IMAGE, is_tiled=is_tiled, width_px=width, height_px=height, runs=(1,))
    expected = media_cost(encoder.config, size, dtype)

    prepared = encoder.prepare(picture(width, height), _settings(size, dtype))
    values_TD, levels = encoder.finish(encoder.tower(prepared.pixels_N3SS), prepared, _settings(size, dtype))
    values, scales = quantize(values_TD.numpy(), dtype)

    assert (expected.tiles, expected.levels, expected.tokens) == (prepared.tiles, levels, len(values_TD))
    assert expected.record_bytes == values.nbytes + (scales.nbytes if scales is not None else 0)
    assert expected.positions == _laid_out(opened, size, [levels])


@pytest.mark.parametrize("name", CHECKPOINTS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(groups=st.lists(st.integers(1, 4), min_size=1, max_size=3), dtype=DTYPES)
def test_a_video_of_any_length_costs_what_was_estimated(name: str, groups: list[int], dtype: TokenDtype) -> None:
    encoder, opened = ENCODERS[name], OPENED[name]
    config = encoder.config
    runs = tuple(config.temporal_group * count for count in sorted(groups, reverse=True))
    size = MediaSize(
        kind=MediaKind.VIDEO, is_tiled=False, width_px=56, height_px=56, runs=runs, pool_sizes=config.pool_sizes
    )
    expected = media_cost(config, size, dtype)

    encoded = [encoder.encode(clip(frames, 56), _settings(size, dtype)) for frames in runs]
    stored = [quantize(values_TD.numpy(), dtype) for values_TD, _ in encoded]

    assert (expected.frames, expected.tiles, expected.chunks) == (sum(runs), sum(runs), len(runs))
    assert expected.tokens == sum(len(values_TD) for values_TD, _ in encoded)
    assert expected.record_bytes == sum(v.nbytes + (s.nbytes if s is not None else 0) for v, s in stored)
    assert expected.positions == _laid_out(opened, size, [levels for _, levels in encoded])


def _laid_out(opened: Checkpoint, size: MediaSize, records: list[object]) -> int:
    """Positions that the media item adds to a prompt; a word behind it keeps its last newline."""
    refs = tuple(TokensRef(key=str(i), levels=levels) for i, levels in enumerate(records))  # type: ignore[arg-type]
    item = PromptMedia(kind=size.kind, is_tiled=size.is_tiled, records=refs)
    word = TextPart("the")
    with_media = lay_out([Message(Role.USER, (MediaPart(0), word))], [item], opened.tokenizer(), opened.config)
    without = lay_out([Message(Role.USER, (word,))], [], opened.tokenizer(), opened.config)
    return with_media.usage.total - without.usage.total


@pytest.mark.parametrize("name", CHECKPOINTS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(max_size=60), min_size=1, max_size=4),
    has_system=st.booleans(),
)
@example(texts=["日本語 \U0001d160\u0344"], has_system=False)  # grows when it is normalised
def test_text_never_takes_more_positions_than_estimated(name: str, texts: list[str], has_system: bool) -> None:
    opened = OPENED[name]
    roles = [Role.USER, Role.ASSISTANT] * 3
    messages = [Message(role, (TextPart(text),)) for role, text in zip(roles, texts, strict=False)]
    if has_system:
        messages.insert(0, Message(Role.SYSTEM, (TextPart("Be brief."),)))

    assert lay_out(messages, [], opened.tokenizer(), opened.config).usage.total <= text_at_most(messages)


def test_the_published_video_model_is_summed_up() -> None:
    config = _published()
    size = MediaSize(
        kind=MediaKind.VIDEO, is_tiled=False, width_px=1920, height_px=1080, runs=(32,) * 8, pool_sizes=((8, 1, 1),)
    )
    asked = [Message(Role.USER, (MediaPart(0), TextPart("What happens?")))]
    cost = request_cost(config, [size], asked, answer_tokens=512, longest=16384, dtype=TokenDtype.BFLOAT16)

    assert cost.visual(MediaKind.VIDEO) == cost.visual() == 8224
    assert cost.record_bytes == 8192 * config.llm_width * 2
    assert cost.tower_flops == pytest.approx(256 * 0.9e12, rel=0.1)
    assert cost.kv_cache_bytes == (cost.positions_at_most + 512) * 2 * 2 * config.llm.layers * 2 * 16
    assert (cost.fits, cost.excess) == (True, None)


def test_what_does_not_fit_says_both_numbers() -> None:
    size = MediaSize(
        kind=MediaKind.VIDEO, is_tiled=False, width_px=9, height_px=9, runs=(8,) * 9, pool_sizes=((1, 1, 1),)
    )
    cost = request_cost(_published(), [size], [], answer_tokens=24, longest=1024, dtype=TokenDtype.INT8)

    assert cost.fits is False
    assert cost.excess is not None
    assert cost.excess.startswith("visual tokens: 18,504 asked, at most 1,000 allowed")


MEASURE = """
import resource, sys
from nvila.model.config import NvilaConfig
from nvila.model.preprocess import pixel_values, split_image
import numpy as np
config = NvilaConfig.from_json(sys.stdin.read())
width, height = map(int, sys.argv[1:])
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
def reset():
    open("/proc/self/clear_refs", "w").write("5")
def now():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
def pixels_of(rgb):
    pixels = pixel_values(split_image(config, rgb, True).tiles_NHWC)
    return torch.from_numpy(pixels).half() if config.is_static_s2 else pixels  # as the encoder prepares them
if config.is_static_s2:
    import torch
pixels_of(np.zeros((9, 9, 3), np.uint8))
reset()
before = now()
rgb = np.zeros((height, width, 3), np.uint8)
rgb += 1
pixels = pixels_of(rgb)
print(peak() - before)
"""
ALLOWANCE_BYTES = 16 << 20
"""For the allocator and the interpreter, whatever the picture."""


@pytest.mark.parametrize("size", [(1, 1), (1, 16_384), (65_535, 1), (4000, 3000), (300, 9000)], ids=str)
@pytest.mark.parametrize("name", ["nvila-tiny-s2", "nvila-tiny-lite", "pad, static S2"])
def test_memory_of_preparing_stays_within_the_stated_bound(name: str, size: tuple[int, int]) -> None:
    """At the published sizes, in a process of its own: the highest resident size, which nothing can hide from."""
    config = _full_size(OPENED[name].config)
    width, height = (min(side, MOST_PADDED_PX) for side in size) if name.startswith("pad") else size
    asked = MediaSize(kind=MediaKind.IMAGE, is_tiled=True, width_px=width, height_px=height, runs=(1,))
    bound = preparation_bytes(config, asked, media_cost(config, asked, TokenDtype.INT8).tiles)

    command = [sys.executable, "-c", MEASURE, str(width), str(height)]
    done = subprocess.run(command, input=config.to_json(), capture_output=True, text=True, timeout=60, check=True)

    assert int(done.stdout) <= bound + ALLOWANCE_BYTES


def test_a_picture_whose_square_would_be_huge_is_refused() -> None:
    size = MediaSize(kind=MediaKind.IMAGE, is_tiled=False, width_px=1, height_px=65_535, runs=(1,))
    with pytest.raises(LimitExceeded, match="65,535 asked, at most 16,384"):
        media_cost(OPENED["pad, static S2"].config, size, TokenDtype.INT8)
    assert media_cost(OPENED["resize, static S2"].config, size, TokenDtype.INT8).tiles == 1


def _full_size(config: NvilaConfig) -> NvilaConfig:
    tower = replace(config.tower, image_px=448, width=1152, mlp_width=4304, layers=27, heads=16)
    scales = tuple(448 * (scale // config.tower_px) for scale in config.s2_scales)
    width, side = 1152 * max(1, len(scales)), scales[-1] if config.is_static_s2 else 448
    return replace(config, tower=tower, tile_px=side, s2_scales=scales, projector_width=width)


def _published() -> NvilaConfig:
    return _full_size(Checkpoint.open(Path(GOLDEN / "e2e" / "nvila-tiny-video")).config)
