from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from nvila.decode.build import model_length, token_dtype
from nvila.decode.settings import Settings
from nvila.model.checkpoint import Checkpoint
from nvila.types import TokenDtype


def test_settings_survive_the_way_to_a_replica() -> None:
    settings = Settings(model=Path("m"), ray_folder=Path("r"), max_replicas=3)
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("field", "value"), [("grpc_port", 0), ("engine", "llama.cpp"), ("kv_cache_bytes", -1), ("gpu_memory", 1.5)]
)
def test_a_malformed_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Settings.model_validate({"model": "m", field: value})


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ValidationError, match="MIN_REPLICAS 3 is more than MAX_REPLICAS 2"):
        Settings(model=Path("m"), min_replicas=3, max_replicas=2)


def test_tokens_are_stored_as_the_model_computes() -> None:
    assert token_dtype("auto", torch.float32) is TokenDtype.FLOAT32
    assert token_dtype("auto", torch.bfloat16) is TokenDtype.BFLOAT16
    assert token_dtype("int8", torch.bfloat16) is TokenDtype.INT8


def test_a_length_beyond_what_the_model_was_made_for_is_refused(checkpoint: Checkpoint) -> None:
    made_for = checkpoint.config.max_positions
    assert model_length(checkpoint.config, 0) == made_for
    assert model_length(checkpoint.config, 100) == 100
    with pytest.raises(ValueError, match="NVILA_DECODE_MAX_MODEL_LEN"):
        model_length(checkpoint.config, made_for + 1)
