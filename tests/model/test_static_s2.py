"""Static S2, beyond the recorded towers in tests/golden: a whole checkpoint of it, from pixels to costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nvila.model import cost
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import NvilaConfig
from nvila.model.encoder import VisionEncoder
from nvila.model.layouts import LayoutStyle, flat_kind, read_layout
from nvila.model.preprocess import pad_square, pixel_values, resize_exact, resize_padded
from nvila.model.projector import Projector
from nvila.model.save import convert_checkpoint
from nvila.model.static_s2 import static_s2_features
from nvila.types import EncodeSettings, Level, MediaKind, TokenDtype
from tests.model.conftest import GOLDEN, clip, make_static_s2, picture

SCALES = (56, 112, 168)


def mean_colours(pixels_N3SS: Tensor) -> Tensor:
    """A stand-in tower: 2×2 patches, three channels."""
    return functional.adaptive_avg_pool2d(pixels_N3SS, 2).flatten(2).transpose(1, 2)


def test_a_single_scale_of_one_tile_is_the_towers_own_features() -> None:
    pixels = torch.rand(2, 3, 8, 8)

    torch.testing.assert_close(static_s2_features(pixels, mean_colours, [8], max_tile_px=8), mean_colours(pixels))


def test_scales_stand_beside_each_other_at_the_size_of_the_chosen_one() -> None:
    pixels = torch.rand(2, 3, 16, 16)

    small = static_s2_features(pixels, mean_colours, [8, 16], max_tile_px=8, merge_index=0)
    large = static_s2_features(pixels, mean_colours, [8, 16], max_tile_px=8, merge_index=-1)

    assert small.shape == (2, 4, 6)
    assert large.shape == (2, 16, 6)
    tiled = functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(large[..., 3:], tiled)


# -- a checkpoint -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1, -1], ids=["first", "second", "last"])
def static(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("static") / "static-s2"
    return Checkpoint.open(make_static_s2(folder, s2_resize_output_to_scale_idx=request.param))


def settings(kind: MediaKind, pool_sizes: tuple[tuple[int, int, int], ...] = ()) -> EncodeSettings:
    return EncodeSettings(
        kind=kind, is_tiled=False, pool_sizes=pool_sizes, token_dtype=TokenDtype.FLOAT32, vision_revision=""
    )


def by_hand(checkpoint: Checkpoint, square_HWC: NDArray[np.uint8]) -> Tensor:
    """Visual tokens (T, D) of one picture, scale by scale and square by square, as §3.6 of the specification says."""
    config = checkpoint.config
    tower = VisionEncoder.load(GOLDEN / "e2e" / "nvila-tiny-s2").tower  # the same weights, one square at a time
    pixels = torch.from_numpy(pixel_values(resize_exact(square_HWC, SCALES[-1], SCALES[-1])[None])).half()
    maps = []
    for side in SCALES:
        sized = functional.interpolate(pixels.float(), size=(side, side), mode="bicubic").half().float()
        rows = []
        for top in range(0, side, 56):
            squares = [sized[:, :, top : top + 56, left : left + 56] for left in range(0, side, 56)]
            rows.append(torch.cat([tower(one).reshape(4, 4, -1) for one in squares], 1))
        maps.append(torch.cat(rows))
    size = maps[config.s2_merge_index].shape[:2]
    joined = torch.cat([functional.interpolate(x.permute(2, 0, 1)[None], size=size, mode="area") for x in maps], 1)
    projector = Projector.of(config).eval()
    projector.load_state_dict({name: w.float() for name, w in checkpoint.projector_weights().items()})
    with torch.no_grad():
        tokens: Tensor = projector(joined.flatten(2).transpose(1, 2))[0]
    return tokens


def test_its_sizes_are_those_of_its_keys(static: Checkpoint) -> None:
    config = static.config

    assert (config.tile_px, config.tower_px, config.squares, config.can_tile) == (168, 56, 1 + 4 + 9, False)
    assert config.projector_width == 3 * config.tower.width
    assert (config.grid, config.map_grid) == (4, 4 * {0: 1, 1: 2, -1: 3}[config.s2_merge_index])
    assert NvilaConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("width", "height"), [(150, 90), (31, 400), (168, 168)])
def test_a_picture_is_seen_at_every_scale(static: Checkpoint, width: int, height: int) -> None:
    frames = picture(width, height)

    values_TD, levels = VisionEncoder.from_checkpoint(static).encode(frames, settings(MediaKind.IMAGE))

    assert levels == (Level(1, static.config.side**2),)
    torch.testing.assert_close(values_TD, by_hand(static, frames[0]), rtol=0, atol=1e-5)


def test_frames_are_seen_like_pictures(static: Checkpoint) -> None:
    frames = np.concatenate([picture(168, 168, seed) for seed in range(3)])

    values_TD, levels = VisionEncoder.from_checkpoint(static).encode(frames, settings(MediaKind.VIDEO))

    assert levels == (Level(3, static.config.side**2),)
    expected = torch.cat([by_hand(static, frame) for frame in frames])
    torch.testing.assert_close(values_TD, expected, rtol=0, atol=1e-5)


def test_frames_of_it_can_be_pooled(static: Checkpoint) -> None:
    pools = ((4, 1, 1), (1, 2, 2))
    _, levels = VisionEncoder.from_checkpoint(static).encode(clip(8, 168), settings(MediaKind.VIDEO, pools))

    size = {"kind": MediaKind.VIDEO, "is_tiled": False, "frames": 8, "pool_sizes": pools}
    assert levels == cost.levels(static.config, **size)  # type: ignore[arg-type]
    assert levels == (Level(2, static.config.side**2), Level(8, static.config.side**2 // 4))


def test_pad_mode_pads_before_the_scales(tmp_path: Path) -> None:
    padded = Checkpoint.open(make_static_s2(tmp_path / "padded", image_aspect_ratio="pad"))
    frames = picture(150, 90)

    values_TD, _ = VisionEncoder.from_checkpoint(padded).encode(frames, settings(MediaKind.IMAGE))

    torch.testing.assert_close(values_TD, by_hand(padded, pad_square(frames[0])), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 5000), (5000, 1), (7, 3001), (2999, 1500), (1024, 1100), (168, 168), (168, 30), (31, 30)],
    ids=str,
)
def test_a_padded_picture_is_brought_to_size_without_its_square(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb = picture(*size)[0]
    for strip in (1 << 12, 1 << 20):
        monkeypatch.setattr("nvila.model.preprocess.PAD_STRIP_PX", strip)
        assert np.array_equal(resize_padded(rgb, 168), resize_exact(pad_square(rgb), 168, 168))


def test_scales_in_any_order_are_sorted_as_the_reference_does(tmp_path: Path) -> None:
    assert Checkpoint.open(make_static_s2(tmp_path / "s", s2_scales="168,56,112")).config.s2_scales == SCALES


def test_dynamic_s2_goes_before_static_s2_as_in_the_reference(tmp_path: Path) -> None:
    both = make_static_s2(tmp_path / "both", dynamic_s2=True, image_aspect_ratio="dynamic_s2")

    assert not Checkpoint.open(both).config.is_static_s2


def test_the_towers_work_is_counted(static: Checkpoint) -> None:
    """Against torch's own counter, which does not see into attention on a processor: scores and values are added."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder, config = VisionEncoder.from_checkpoint(static), static.config
    pixels = encoder.prepare(picture(9, 9), settings(MediaKind.IMAGE)).pixels_N3SS
    with FlopCounterMode(display=False) as counter:
        features = encoder.tower(pixels)
        Projector.of(config)(features)

    attention = config.squares * config.tower.blocks * 4 * config.grid**4 * config.tower.width
    assert counter.get_total_flops() + attention == cost.tower_flops(config, 1) + cost.projector_flops(config, 1)


@pytest.mark.parametrize("style", LayoutStyle)
def test_it_stays_the_same_model_in_every_layout(static: Checkpoint, style: LayoutStyle, tmp_path: Path) -> None:
    there = convert_checkpoint(static.layout, tmp_path / "there" / static.name, style)
    back = Checkpoint.open(convert_checkpoint(read_layout(there), tmp_path / static.name, LayoutStyle.VILA))

    for copy in (Checkpoint.open(there), back):
        assert copy.config == static.config
        assert copy.vision_revision == static.vision_revision
    assert json.loads((back.path / "config.json").read_text())["s2"] is True
    frames = picture(60, 40)
    values = [VisionEncoder.from_checkpoint(one).encode(frames, settings(MediaKind.IMAGE))[0] for one in (static, back)]
    assert torch.equal(*values)


def test_its_tokens_have_another_revision_than_those_of_dynamic_s2(static: Checkpoint) -> None:
    assert static.vision_revision != Checkpoint.open(GOLDEN / "e2e" / "nvila-tiny-s2").vision_revision


def test_a_flat_file_of_it_says_no_type_whose_readers_would_compute_something_else(tmp_path: Path) -> None:
    folder = make_static_s2(tmp_path / "static", image_aspect_ratio="dynamic")
    (folder / "mm_projector" / "config.json").write_text(json.dumps({"mm_projector_type": "mlp_downsample_3x3_fix"}))

    assert flat_kind(read_layout(folder)) == "vila"
