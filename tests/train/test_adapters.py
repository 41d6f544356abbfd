"""A language model in 4 bits: adapters learn beside it and are merged into what it was learned against."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nvila.model.checkpoint import Checkpoint
from nvila.train.adapters import adapt, merge, store_in_4_bits
from nvila.train.model import Module, TrainableNvila
from nvila.train.nvila_tiny import TOY, learn_merges, make_base
from nvila.train.recipes import Adapters
from nvila.train.toy import texts

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "toy", TOY, learn_merges(texts(), 300))


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_adapters_learned_is_added_to_the_weights_that_were_packed(base: Path, use_dora: bool) -> None:
    model = TrainableNvila.load(Checkpoint.open(base))
    model.choose([Module.LLM])
    whole = model.llm.model.layers[0].mlp.up_proj.weight.detach().clone()
    store_in_4_bits(model.llm)
    assert model.llm.model.layers[0].mlp.up_proj.weight.dtype is torch.uint8
    adapt(model, Adapters(rank=4, alpha=8, dropout=0.0, use_dora=use_dora))
    learning = [p for p in model.llm.parameters() if p.requires_grad]
    ids = torch.arange(12)[None]
    torch.manual_seed(0)
    for parameter in learning:
        if parameter.ndim == 2:  # B begins as zeros, which would leave nothing to merge
            nn.init.normal_(parameter, std=0.2)
    before = model.llm(ids, lengths=(12,)).logits

    merge(model)

    merged = model.llm.model.layers[0].mlp.up_proj
    assert type(merged) is nn.Linear
    assert merged.weight.shape == whole.shape
    after = model.llm(ids, lengths=(12,)).logits
    assert nn.functional.cosine_similarity(before, after, dim=-1).min() > 0.995
    assert not any("lora" in name for name, _ in model.llm.named_parameters())


def test_gradients_reach_adapters_through_what_is_packed(base: Path) -> None:
    model = TrainableNvila.load(Checkpoint.open(base))
    model.choose([Module.LLM])
    store_in_4_bits(model.llm)
    adapt(model, Adapters(rank=4, alpha=8))

    loss = model.llm(torch.arange(12)[None], lengths=(12,)).logits.square().mean()
    loss.backward()

    learning = {name: p for name, p in model.llm.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in learning)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.values())
