"""What moves the weights: AdamW, or Muon for the matrices inside blocks."""

from __future__ import annotations

import pytest
import torch

from nvila.errors import InvalidRequest
from nvila.model.checkpoint import Checkpoint
from nvila.train.model import Module, TrainableNvila
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.optim import make_optimizer, set_rate
from nvila.train.recipes import Optim
from nvila.train.toy import texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainableNvila:
    base = make_base(tmp_path_factory.mktemp("base") / "toy", TOY, learn_merges(texts(), 300))
    model = TrainableNvila.load(Checkpoint.open(base))
    model.choose(Module)
    return model


def test_muon_moves_the_matrices_of_blocks_and_adamw_everything_else(model: TrainableNvila) -> None:
    optimizer = make_optimizer(model, Optim(lr=1e-3, tower_lr=1e-4, muon=5.0))
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: (g["by_muon"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}

    assert set(rates) == set(names.values())
    assert rates["llm.model.layers.0.mlp.up_proj.weight"] == (True, 5e-3)
    assert rates["tower.encoder.layers.0.mlp.fc1.weight"] == (True, pytest.approx(5e-4))
    assert rates["tower.encoder.layers.0.mlp.fc1.bias"] == (False, 1e-4)
    assert rates["llm.model.embed_tokens.weight"] == (False, 1e-3)


def test_a_rate_of_nothing_is_a_rate(model: TrainableNvila) -> None:
    optimizer = make_optimizer(model, Optim(lr=1e-3, tower_lr=0.0))
    tower = {id(p) for p in model.tower.parameters()}

    assert all(g["lr"] == (0.0 if id(p) in tower else 1e-3) for g in optimizer.param_groups for p in g["params"])


def test_a_rate_that_is_set_moves_the_weights_of_both_and_all_moments_are_kept(model: TrainableNvila) -> None:
    optimizer = make_optimizer(model, Optim(lr=1e-3, muon=5.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_rate(optimizer, Optim(lr=1e-3, warmup=0.5), 0.0)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    set_rate(optimizer, Optim(lr=1e-3, warmup=0.5), 0.5)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(optimizer.state) == set(model.parameters())
    optimizer.zero_grad()


def test_muon_with_moments_of_few_bits_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="float32"):
        Optim(lr=1e-3, muon=5.0, states="8bit")
