"""Weights that stay in 16 bits while arithmetic is in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.model.layouts import LayoutStyle, Part
from nvila.model.mapped import StoredLinear, compute_in
from nvila.model.projector import Projector
from nvila.model.save import save_checkpoint
from nvila.model.siglip import Tower
from nvila.types import EncodeSettings, MediaKind, TokenDtype
from tests.model.conftest import picture

IMAGE = EncodeSettings(
    kind=MediaKind.IMAGE, is_tiled=True, pool_sizes=(), token_dtype=TokenDtype.FLOAT32, vision_revision=""
)


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=str)
def halved(request: pytest.FixtureRequest, tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    weights = {
        part: {name: t.to(request.param) for name, t in tiny.layout.weights(part).tensors().items()} for part in Part
    }
    target: Path = tmp_path_factory.mktemp("halved") / "nvila-tiny"
    return Checkpoint.open(save_checkpoint(tiny.layout, weights, target, LayoutStyle.HF))


def test_tokens_are_those_of_widened_weights_to_the_bit(halved: Checkpoint) -> None:
    config = halved.config
    mapped = VisionEncoder.from_checkpoint(halved)
    tower, projector = Tower(config.tower, config.tile_px), Projector.of(config)
    tower.load({name: t.float() for name, t in halved.tower_weights().items()})
    projector.load_state_dict({name: t.float() for name, t in halved.projector_weights().items()})
    frames = picture(300, 170)

    assert torch.equal(
        mapped.encode(frames, IMAGE)[0], VisionEncoder(config, tower, projector).encode(frames, IMAGE)[0]
    )


def test_matrices_stay_where_the_file_is_mapped(halved: Checkpoint) -> None:
    tower = Tower(halved.config.tower, halved.config.tile_px)
    stored = halved.tower_weights()
    tower.load(stored)
    compute_in(tower, torch.float32)
    name = "encoder.layers.0.mlp.fc1.weight"

    assert tower.state_dict()[name].data_ptr() == stored[name].data_ptr()
    others = [p.dtype for n, p in tower.named_parameters() if "norm" in n or "embedding" in n]
    assert set(others) == {torch.float32}


def test_other_arithmetic_and_other_weights_are_converted() -> None:
    whole = compute_in(torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.float32)
    half = compute_in(torch.nn.Sequential(torch.nn.Linear(3, 3)).half(), torch.bfloat16)

    assert not any(isinstance(layer, StoredLinear) for layer in (*whole.modules(), *half.modules()))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["resampler_2x2", "token_learner_2x2"])
def test_compressors_that_learn_compute_the_same(kind: str) -> None:
    torch.manual_seed(0)
    half = Projector(kind, 24, 16, 4).bfloat16().eval()
    x_NTC = torch.randn(2, 16, 24)
    widened = Projector(kind, 24, 16, 4).eval()
    widened.load_state_dict({name: t.float() for name, t in half.state_dict().items()})

    with torch.inference_mode():
        torch.testing.assert_close(compute_in(half, torch.float32)(x_NTC), widened(x_NTC))
