"""What the vision service refuses to start with."""

from __future__ import annotations

import pytest

from nvila.model.checkpoint import Checkpoint
from nvila.vision.checks import free_shared_bytes, reasons_not_to_start
from nvila.vision.settings import Settings

PLENTY = 1 << 40


def settings_of(checkpoint: Checkpoint, **changes: int) -> Settings:
    return Settings.model_validate({"model": checkpoint.path, **changes})


def test_the_defaults_fit_the_largest_request(checkpoint: Checkpoint) -> None:
    assert reasons_not_to_start(settings_of(checkpoint), checkpoint.config, PLENTY) == []
    assert free_shared_bytes() > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_frames": 255}, "MAX_FRAMES 255 is not a multiple of the temporal group 8"),
        ({"max_request_bytes": 1 << 20}, "MAX_REQUEST_BYTES allows 1,048,576"),
        ({"max_pending_tiles": 255}, "MAX_PENDING_TILES 255"),
        ({"max_pending_bytes": 1 << 20}, "MAX_PENDING_BYTES 1,048,576"),
    ],
)
def test_a_limit_below_the_largest_request_is_named(
    checkpoint: Checkpoint, changes: dict[str, int], reason: str
) -> None:
    (only,) = reasons_not_to_start(settings_of(checkpoint, **changes), checkpoint.config, PLENTY)
    assert reason in only


def test_too_little_shared_memory_is_named_with_both_numbers(checkpoint: Checkpoint) -> None:
    (only,) = reasons_not_to_start(settings_of(checkpoint), checkpoint.config, 64 << 20)
    assert "/dev/shm has 67,108,864 free" in only
