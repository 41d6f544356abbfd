"""The estimate is what the encoder makes, for any size."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.errors import InvalidRequest
from nvila.model import cost
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import NvilaConfig
from nvila.model.encoder import VisionEncoder
from nvila.model.prompt import lay_out
from nvila.types import (
    EncodeSettings,
    Level,
    MediaKind,
    MediaPart,
    Message,
    PromptMedia,
    Role,
    TokenDtype,
    TokensRef,
)
from tests.model.conftest import GOLDEN, clip, picture

CHECKPOINTS = ("nvila-tiny-s2", "nvila-tiny-lite", "nvila-tiny-video")
ENCODERS = {name: VisionEncoder.load(GOLDEN / "e2e" / name) for name in CHECKPOINTS}
TOKENIZERS = {name: Checkpoint.open(GOLDEN / "e2e" / name).tokenizer() for name in CHECKPOINTS}


def _settings(kind: MediaKind, is_tiled: bool, pools: tuple[tuple[int, int, int], ...] = ()) -> EncodeSettings:
    return EncodeSettings(
        kind=kind, is_tiled=is_tiled, pool_sizes=pools, token_dtype=TokenDtype.FLOAT32, vision_revision=""
    )


def _laid_out(name: str, kind: MediaKind, is_tiled: bool, levels: tuple[Level, ...]) -> int:
    """Positions that a media item adds to an otherwise empty message."""
    config, tokenizer = ENCODERS[name].config, TOKENIZERS[name]
    item = PromptMedia(kind=kind, is_tiled=is_tiled, records=(TokensRef(key="k", levels=levels),))
    with_media = lay_out([Message(Role.USER, (MediaPart(0),))], [item], tokenizer, config)
    without = lay_out([Message(Role.USER, ())], [], tokenizer, config)
    return with_media.usage.total - without.usage.total


@pytest.mark.parametrize("name", CHECKPOINTS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(width=st.integers(1, 900), height=st.integers(1, 900), is_tiled=st.booleans())
def test_an_image_of_any_size_costs_what_was_estimated(name: str, width: int, height: int, is_tiled: bool) -> None:
    encoder = ENCODERS[name]
    size = {"kind": MediaKind.IMAGE, "is_tiled": is_tiled, "width_px": width, "height_px": height}
    settings_ = _settings(MediaKind.IMAGE, is_tiled)

    prepared = encoder.prepare(picture(width, height), settings_)
    values_TD, levels = encoder.finish(encoder.tower(prepared.pixels_N3SS), prepared, settings_)

    assert cost.levels(encoder.config, **size) == levels  # type: ignore[arg-type]
    assert cost.tower_tiles(encoder.config, **size) == prepared.tiles  # type: ignore[arg-type]
    assert cost.tokens(levels) == len(values_TD)
    assert values_TD.shape[1] == encoder.config.llm_width
    stored = cost.record_bytes(levels, encoder.config.llm_width, TokenDtype.FLOAT32)
    assert stored == values_TD.numel() * values_TD.element_size()


@pytest.mark.parametrize("name", CHECKPOINTS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(groups=st.integers(1, 4), pools=st.sampled_from([(), ((8, 1, 1),), ((2, 2, 2), (4, 1, 1)), ((1, 1, 2),)]))
def test_a_video_of_any_length_costs_what_was_estimated(
    name: str, groups: int, pools: tuple[tuple[int, int, int], ...]
) -> None:
    encoder, frames = ENCODERS[name], 8 * groups

    values_TD, levels = encoder.encode(clip(frames, 56), _settings(MediaKind.VIDEO, False, pools))

    size = {"kind": MediaKind.VIDEO, "is_tiled": False, "frames": frames}
    assert cost.levels(encoder.config, **size, pool_sizes=pools) == levels  # type: ignore[arg-type]
    assert cost.tokens(levels) == len(values_TD)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("is_tiled", [False, True])
def test_positions_are_those_of_the_layout(name: str, is_tiled: bool) -> None:
    config = ENCODERS[name].config
    levels = cost.levels(config, kind=MediaKind.IMAGE, is_tiled=is_tiled, width_px=500, height_px=170)
    estimated = cost.positions(config, kind=MediaKind.IMAGE, is_tiled=is_tiled, levels=levels)

    # A newline of text at the end of a message is stripped; anything after the image would keep it.
    is_woven = is_tiled and config.image_mode == "dynamic"
    assert _laid_out(name, MediaKind.IMAGE, is_tiled, levels) == estimated - is_woven


def test_256_frames_of_the_published_video_model_are_8224_positions() -> None:
    config = _published(GOLDEN / "e2e" / "nvila-tiny-video")
    levels = cost.levels(config, kind=MediaKind.VIDEO, is_tiled=False, frames=256, pool_sizes=((8, 1, 1),))

    assert levels == (Level(32, 256),)
    assert cost.positions(config, kind=MediaKind.VIDEO, is_tiled=False, levels=levels) == 8224
    assert cost.record_bytes(levels, 3584, TokenDtype.BFLOAT16) == 8192 * 3584 * 2
    assert cost.record_bytes(levels, 3584, TokenDtype.INT8) == 8192 * (3584 + 4)


def test_a_tile_of_siglip_so400m_is_about_0_9_teraflops() -> None:
    config = _published(GOLDEN / "e2e" / "nvila-tiny-video")

    assert cost.tower_flops(config, 1) == pytest.approx(0.9e12, rel=0.1)


@pytest.mark.parametrize("frames", [0, 7, 12])
def test_frames_that_the_group_does_not_divide_are_refused(frames: int) -> None:
    config = ENCODERS["nvila-tiny-video"].config
    with pytest.raises(InvalidRequest, match=f"{frames} frames"):
        cost.levels(config, kind=MediaKind.VIDEO, is_tiled=False, frames=frames, pool_sizes=config.pool_sizes)


def test_chunks_of_a_video_add_up() -> None:
    assert cost.join_levels([(Level(4, 16), Level(2, 9)), (Level(1, 16), Level(5, 9))]) == (Level(5, 16), Level(7, 9))


def test_chunks_that_disagree_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="disagree"):
        cost.join_levels([(Level(4, 16),), (Level(1, 9),)])


def _published(path: Path) -> NvilaConfig:
    """The published video model's sizes in an opened checkpoint's configuration."""
    from dataclasses import replace

    config = Checkpoint.open(path).config
    tower = replace(config.tower, image_px=448, width=1152, mlp_width=4304, layers=27, heads=16)
    return replace(config, tower=tower, tile_px=448, projector_width=1152)
