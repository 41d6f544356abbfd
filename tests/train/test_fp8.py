"""FP8 training where there is no such GPU, and what would be converted where there is one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from nvila.train import fp8
from nvila.train.speed import compare


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_converted_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    llm = nn.Sequential(nn.Linear(64, 64))

    with caplog.at_level(logging.WARNING):
        assert fp8.convert(llm, 16) == 0

    assert "needs an NVIDIA GPU" in caplog.text
    assert type(llm[0]) is nn.Linear


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_table_of_speeds_leaves_open_what_cannot_run() -> None:
    table = compare("toy", 2)

    assert [row[0] for row in table.rows] == ["bf16", "bf16", "fp8", "fp8"]
    assert all(row[2] is None for row in table.rows[2:])
    assert all(row[2] > 0 for row in table.rows[:2])
    assert "Open: FP8 training needs" in table.to_markdown()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_projections_and_mlps_are_compiled_where_training_calls_them() -> None:
    """And nothing that sees the lengths of a row's samples."""
    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1
    )
    llm = Qwen2ForCausalLM(config)

    fp8.compile_products(llm)

    compiled = {name for name, module in llm.named_modules() if module._compiled_call_impl is not None}
    block = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp")
    assert compiled == {f"model.layers.{number}.{part}" for number in range(2) for part in block}
