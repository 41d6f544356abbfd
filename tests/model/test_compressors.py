"""The two compressors that learn: as many tokens as pooling, weights that can be trained, the same every time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvila.errors import InvalidCheckpoint
from nvila.model import cost
from nvila.model.checkpoint import Checkpoint
from nvila.model.compressors import Resampler, sine_positions
from nvila.model.config import RESAMPLERS, TOKEN_LEARNER_WIDTH, TOKEN_LEARNERS
from nvila.model.encoder import VisionEncoder
from nvila.model.projector import Projector
from nvila.model.save import save_checkpoint
from nvila.types import EncodeSettings, Level, MediaKind, TokenDtype
from tests.model.conftest import clip, picture

LEARNED = (*TOKEN_LEARNERS, *RESAMPLERS)
WIDTH, LLM_WIDTH = 24, 16


def made(kind: str, tokens: int, seed: int = 0) -> Projector:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Projector(kind, WIDTH, LLM_WIDTH, tokens)


def features(tiles: int = 2, side: int = 4) -> torch.Tensor:
    return torch.randn(tiles, side * side, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("side", [4, 7])
def test_a_tile_becomes_as_many_tokens_as_pooling_gives(kind: str, side: int) -> None:
    block = 2 if kind.endswith("2x2") else 3
    tokens = (-(-side // block)) ** 2
    pooled = Projector({2: "mlp_downsample", 3: "mlp_downsample_3x3_fix"}[block], WIDTH, LLM_WIDTH)

    assert made(kind, tokens)(features(side=side)).shape == pooled(features(side=side)).shape == (2, tokens, LLM_WIDTH)


@pytest.mark.parametrize("kind", LEARNED)
def test_every_weight_gets_a_gradient(kind: str) -> None:
    projector = made(kind, 4)
    projector(features()).square().mean().backward()

    without = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Softmax does not see what is added to all of its scores, so biases before it cannot matter.
    assert set(without) <= {"layers.attention.in_proj_bias", "layers.0.scores.3.bias"}


@pytest.mark.parametrize("kind", LEARNED)
def test_it_can_learn(kind: str) -> None:
    projector = made(kind, 4)
    wanted = torch.randn(2, 4, LLM_WIDTH, generator=torch.Generator().manual_seed(2))
    optimiser = torch.optim.Adam(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (projector(features()) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))

    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("kind", LEARNED)
def test_the_same_seed_gives_the_same_tokens_and_tiles_do_not_see_each_other(kind: str) -> None:
    together = made(kind, 4)(features(3))

    assert torch.equal(together, made(kind, 4)(features(3)))
    assert not torch.equal(together, made(kind, 4, seed=1)(features(3)))
    torch.testing.assert_close(together[1:2], made(kind, 4)(features(3)[1:2]))


def test_parameters_are_few_beside_poolings() -> None:
    """NVILA's own sizes: 1,024 tokens of width 3,456 to 256 of width 3,584."""
    with torch.device("meta"):
        counts = {
            kind: sum(p.numel() for p in Projector(kind, 3456, 3584, 256).parameters())
            for kind in ("mlp_downsample", "token_learner_2x2", "resampler_2x2")
        }
    W, D, M, narrow = 3456, 3584, 256, TOKEN_LEARNER_WIDTH

    assert counts["token_learner_2x2"] == (
        (2 * W + W * narrow + narrow + narrow * M + M) + (2 * W + W * D + D) + (D * D + D)
    )
    assert counts["resampler_2x2"] == M * D + W * D + 3 * 2 * D + (4 * D * D + 4 * D) + D * D
    assert counts["token_learner_2x2"] < counts["mlp_downsample"] // 2


def test_positions_tell_every_place_from_every_other() -> None:
    positions = sine_positions(6, torch.zeros(1, 32))

    assert positions.shape == (36, 32)
    assert torch.cdist(positions, positions).add(torch.eye(36)).min() > 0.1


def test_a_width_that_positions_cannot_have_is_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="multiple of 4, not 30"):
        Resampler(WIDTH, 30, 4)


@pytest.mark.parametrize("kind", LEARNED)
def test_a_checkpoint_of_our_own_may_have_it(kind: str, tiny: Checkpoint, tmp_path: Path) -> None:
    config = replace(tiny.config, projector_type=kind)
    layout = replace(tiny.layout, projector={"model_type": "v2l_projector", "mm_projector_type": kind})
    weights = {part: layout.weights(part).tensors() for part in layout.weights_at}
    torch.manual_seed(0)
    weights = {part: Projector.of(config).state_dict() if part == "mm_projector" else w for part, w in weights.items()}
    saved = save_checkpoint(layout, weights, tmp_path / "learned")
    encoder = VisionEncoder.load(saved)
    image = EncodeSettings(
        kind=MediaKind.IMAGE, is_tiled=True, pool_sizes=(), token_dtype=TokenDtype.FLOAT32, vision_revision=""
    )
    video = replace(image, kind=MediaKind.VIDEO, is_tiled=False, pool_sizes=((8, 1, 1),))

    values_TD, levels = encoder.encode(picture(300, 200), image)
    assert levels == cost.levels(config, kind=MediaKind.IMAGE, is_tiled=True, width_px=300, height_px=200)
    assert torch.isfinite(values_TD).all()
    _, levels = encoder.encode(clip(16, 112), video)
    assert levels == (Level(2, config.side**2),)


@pytest.mark.parametrize("kind", LEARNED)
def test_its_work_is_counted(kind: str, tiny: Checkpoint) -> None:
    """Against torch's own counter, which does not see into attention on a processor: scores and values are added."""
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(tiny.config, projector_type=kind)
    projector = Projector.of(config)
    x_NTC = torch.randn(3, config.grid**2, config.projector_width)
    with FlopCounterMode(display=False) as counter:
        projector(x_NTC)

    inside = 3 * 4 * config.side**2 * config.grid**2 * config.llm_width if kind in RESAMPLERS else 0
    assert counter.get_total_flops() + inside == cost.projector_flops(config, 3)


@pytest.mark.parametrize("kind", ["mlp_downsample", "mlp_downsample_3x3_fix", "mlp_downsample_3x3_s2", "mlp2x_gelu"])
def test_the_work_of_published_projectors_is_counted(kind: str, tiny: Checkpoint) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(tiny.config, projector_type=kind)
    with FlopCounterMode(display=False) as counter:
        Projector.of(config)(torch.randn(2, config.grid**2, config.projector_width))

    assert counter.get_total_flops() == cost.projector_flops(config, 2)


def test_its_name_is_one_that_published_checkpoints_never_use(tiny_path: Path) -> None:
    said = json.loads((tiny_path / "mm_projector" / "config.json").read_text())["mm_projector_type"]

    assert said not in LEARNED
    assert not any(kind.startswith(("mlp", "linear", "identity")) for kind in LEARNED)
