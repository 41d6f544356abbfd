"""In which precision a language model is served, by what it is stored in and what there is to compute it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvila.decode.build import choose_precision
from nvila.decode.engine import choose_dtype
from nvila.model.awq_layout import quantization
from nvila.model.checkpoint import Checkpoint
from nvila.model.tiny import make_random_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny"))


@pytest.fixture(scope="module")
def packed(whole: Checkpoint) -> Checkpoint:
    return Checkpoint(replace(whole.layout, llm={**whole.layout.llm, "quantization_config": quantization()}))


def test_a_model_in_16_bits_is_served_as_before(whole: Checkpoint) -> None:
    assert choose_precision(whole, "vllm", "auto", lambda: True) == (choose_dtype("auto"), False)


@pytest.mark.parametrize(("wanted", "dtype"), [("auto", torch.bfloat16), ("float16", torch.float16)])
def test_four_bits_are_computed_in_16_where_there_is_a_kernel(
    packed: Checkpoint, wanted: str, dtype: torch.dtype
) -> None:
    assert choose_precision(packed, "vllm", wanted, lambda: True) == (dtype, True)


@pytest.mark.parametrize(
    ("engine", "wanted", "has_kernel", "reason"),
    [
        ("vllm", "auto", False, "no kernel for four bits (AVX-512)"),
        ("transformers", "auto", True, "the transformers engine has no kernel"),
        ("vllm", "float32", True, "NVILA_DECODE_DTYPE is float32"),
    ],
)
def test_without_a_kernel_it_is_dequantised_and_the_log_says_why(
    packed: Checkpoint, caplog: pytest.LogCaptureFixture, engine: str, wanted: str, has_kernel: bool, reason: str
) -> None:
    with caplog.at_level(logging.WARNING, "nvila.decode.build"):
        chosen = choose_precision(packed, engine, wanted, lambda: has_kernel)

    assert chosen == (choose_dtype(wanted), False)
    assert [record.getMessage() for record in caplog.records] == ["the language model is served dequantised"]
    assert reason in str(vars(caplog.records[0]))


def test_the_copy_in_16_bits_is_not_made_for_a_model_that_needs_none(whole: Checkpoint) -> None:
    assert whole.dense_llm_path == whole.llm_path == Path(whole.path) / "llm"
