"""The batching engine: what it computes is the model's, and who waits for whom is fair."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from nvila.errors import Cancelled, InvalidRequest, NvilaError, Overloaded, Unavailable
from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import Prepared, VisionEncoder
from nvila.telemetry.metrics import Metrics
from nvila.types import EncodeSettings, Level, MediaKind, TokenDtype
from nvila.vision.engine import Engine, EngineLimits, Features, choose
from nvila.vision.service import VisionService
from tests.model.conftest import make_static_s2
from tests.vision.chunks import image_settings, make_chunk, video_chunk, video_settings

SETTINGS = EncodeSettings(
    kind=MediaKind.VIDEO, is_tiled=False, pool_sizes=(), token_dtype=TokenDtype.FLOAT32, vision_revision="r"
)
LIMITS = EngineLimits(batch_tiles=8, pending_tiles=100, is_padded=False)


class GatedEncoder:
    """One tile per frame, whose feature is the frame's first value; the tower waits for `gate` before each batch."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.gate = threading.Semaphore(10**6 if is_open else 0)
        self.batches: list[list[int]] = []
        self.breaks_on: int | None = None

    def prepare(self, frames_FHWC: NDArray[np.uint8], settings: EncodeSettings) -> Prepared:
        if frames_FHWC[0, 0, 0, 0] == 255:
            raise InvalidRequest("these frames cannot be prepared")
        values = torch.from_numpy(frames_FHWC[:, 0, 0, 0].astype(np.float32))
        return Prepared(pixels_N3SS=values[:, None, None, None].expand(-1, 3, 1, 1))

    def tower(self, pixels_N3SS: Tensor) -> Tensor:
        assert self.gate.acquire(timeout=20)
        values = pixels_N3SS[:, 0, 0, 0]
        self.batches.append([int(value) for value in values])
        if self.breaks_on in self.batches[-1]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return values[:, None, None]

    def finish(
        self, features_NTC: Tensor, prepared: Prepared, settings: EncodeSettings
    ) -> tuple[Tensor, tuple[Level, ...]]:
        if features_NTC[0, 0, 0] == 254:
            raise InvalidRequest("these features cannot be finished")
        return features_NTC[:, 0], (Level(len(features_NTC), 1),)


def frames_of(value: int, count: int) -> NDArray[np.uint8]:
    return np.full((count, 1, 1, 3), value, dtype=np.uint8)


def never() -> None:
    return None


@pytest.fixture
def gated() -> GatedEncoder:
    return GatedEncoder()


@pytest.fixture
def engine(gated: GatedEncoder) -> Iterator[Engine]:
    made = Engine(gated, LIMITS, Metrics())
    yield made
    gated.gate.release(1000)
    made.close()


def submit(engine: Engine, value: int, count: int) -> Future[Features]:
    return engine.submit(frames_of(value, count), SETTINGS, tiles=count, why_gone=never)


def result(future: Future[Features]) -> list[float]:
    return [float(value) for value in future.result(20).values_TD[:, 0]]


def wait_for_batches(gated: GatedEncoder, engine: Engine, count: int) -> None:
    """Let `count` batches pass."""
    gated.gate.release(count)
    with engine._changed:
        assert engine._changed.wait_for(lambda: len(gated.batches) >= count, 20)


# -- what it computes -------------------------------------------------------------------------------------------------


def test_requests_computed_together_get_what_the_model_gives_each_alone(
    checkpoint: Checkpoint, encoder: VisionEncoder
) -> None:
    requests = [
        (make_chunk(1, 200, 500, seed=1), image_settings(checkpoint)),
        (video_chunk(checkpoint, 24, seed=2), video_settings(checkpoint)),
        (make_chunk(1, 90, 60, seed=3), image_settings(checkpoint, is_tiled=False)),
        (video_chunk(checkpoint, 8, seed=4), video_settings(checkpoint)),
    ]
    engine = Engine(encoder, EngineLimits(batch_tiles=7, pending_tiles=1000, is_padded=True), Metrics())
    futures = [engine.submit(chunk.frames_FHWC, settings, tiles=32, why_gone=never) for chunk, settings in requests]
    for (chunk, settings), future in zip(requests, futures, strict=True):
        values_TD, levels = encoder.encode(chunk.frames_FHWC, settings)
        features = future.result(60)
        assert features.levels == levels
        # Other batch sizes may sum in another order.
        np.testing.assert_allclose(features.values_TD, values_TD.numpy(), rtol=1e-4, atol=1e-5)
        assert set(features.stage_ms) == {"queue", "preprocess", "tower", "project"}
    engine.close()


def test_pictures_of_static_s2_are_its_tiles(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_static_s2(tmp_path / "static"))
    encoder = VisionEncoder.from_checkpoint(checkpoint)
    requests = [
        (make_chunk(1, 200, 500, seed=1), image_settings(checkpoint, is_tiled=False)),
        (video_chunk(checkpoint, 5, seed=2), video_settings(checkpoint)),
    ]
    side = checkpoint.config.tile_px
    encoder.tower(torch.zeros(2, 3, side, side))  # as the service warms up
    engine = Engine(encoder, EngineLimits(batch_tiles=4, pending_tiles=6, is_padded=True), Metrics())
    futures = [
        engine.submit(chunk.frames_FHWC, settings, tiles=len(chunk.frames_FHWC), why_gone=never)
        for chunk, settings in requests
    ]
    for (chunk, settings), future in zip(requests, futures, strict=True):
        values_TD, levels = encoder.encode(chunk.frames_FHWC, settings)
        features = future.result(60)
        assert (features.levels, features.tiles) == (levels, len(chunk.frames_FHWC))
        np.testing.assert_allclose(features.values_TD, values_TD.numpy(), rtol=1e-4, atol=1e-5)
    engine.close()


def test_tiles_of_waiting_requests_share_batches_and_find_their_owners(gated: GatedEncoder, engine: Engine) -> None:
    futures = [submit(engine, value, 3) for value in range(8)]
    gated.gate.release(100)
    assert [result(future) for future in futures] == [[value] * 3 for value in range(8)]
    assert max(len(set(batch)) for batch in gated.batches) > 1
    assert sum(map(len, gated.batches)) == 24


def test_batches_are_padded_to_powers_of_two_where_shapes_matter() -> None:
    gated = GatedEncoder(is_open=True)
    engine = Engine(gated, EngineLimits(batch_tiles=8, pending_tiles=100, is_padded=True), Metrics())
    assert result(submit(engine, 5, 3)) == [5] * 3
    assert result(submit(engine, 5, 13)) == [5] * 13
    assert [len(batch) for batch in gated.batches] == [4, 8, 8]
    engine.close()


# -- who waits for whom -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 64))
def test_a_batch_is_full_when_it_can_be_and_the_oldest_gets_half(left: list[int], room: int) -> None:
    counts = choose(left, room)
    assert sum(counts) == min(room, sum(left))
    assert all(0 <= count <= waiting for count, waiting in zip(counts, left, strict=True))
    assert counts[0] >= min(left[0], (room + 1) // 2)


def test_equal_requests_end_in_order_of_arrival() -> None:
    assert choose([8, 8, 8], 8) == [8, 0, 0]


def test_a_small_request_does_not_wait_for_a_large_one(gated: GatedEncoder, engine: Engine) -> None:
    large = submit(engine, 1, 64)
    wait_for_batches(gated, engine, 1)
    small = submit(engine, 2, 4)
    with engine._changed:  # it is prepared although the large one's pixels are more than may be ready
        assert engine._changed.wait_for(lambda: len(engine._waiting) == 2, 20)
    gated.gate.release(3)
    assert result(small) == [2] * 4
    assert not large.done()
    gated.gate.release(100)
    assert result(large) == [1] * 64


# -- requests that end early ------------------------------------------------------------------------------------------


def test_a_request_whose_caller_left_is_not_computed(gated: GatedEncoder, engine: Engine) -> None:
    gone: list[NvilaError] = []
    first = submit(engine, 1, 16)
    leaver = engine.submit(frames_of(9, 60), SETTINGS, tiles=60, why_gone=lambda: gone[0] if gone else None)
    wait_for_batches(gated, engine, 1)
    gone.append(Cancelled("the caller left"))
    gated.gate.release(100)
    assert result(first) == [1] * 16
    with pytest.raises(Cancelled):
        leaver.result(20)
    assert sum(batch.count(9) for batch in gated.batches) < 60


@pytest.mark.parametrize("value", [255, 254])
def test_one_requests_failure_is_its_own(gated: GatedEncoder, engine: Engine, value: int) -> None:
    good, bad, other = submit(engine, 1, 2), submit(engine, value, 2), submit(engine, 2, 2)
    gated.gate.release(100)
    assert result(good) == [1, 1]
    assert result(other) == [2, 2]
    with pytest.raises(InvalidRequest):
        bad.result(20)


def test_a_broken_batch_is_unavailable_without_internals_and_the_next_works(
    gated: GatedEncoder, engine: Engine
) -> None:
    gated.breaks_on = 3
    gated.gate.release(100)
    with pytest.raises(Unavailable) as caught:
        submit(engine, 3, 2).result(20)
    assert "illegal memory" not in caught.value.message
    assert result(submit(engine, 4, 2)) == [4, 4]


def test_an_accelerator_that_failed_is_reported_as_broken() -> None:
    class Lost(GatedEncoder):
        def tower(self, pixels_N3SS: Tensor) -> Tensor:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    broken = threading.Event()
    engine = Engine(Lost(), LIMITS, Metrics(), on_broken=broken.set)
    with pytest.raises(Unavailable):
        submit(engine, 1, 2).result(20)
    assert broken.wait(20)
    engine.close()


def test_more_tiles_than_may_wait_are_refused(gated: GatedEncoder, engine: Engine) -> None:
    waiting = [submit(engine, 1, 50), submit(engine, 2, 50)]
    with pytest.raises(Overloaded, match="at most 100"):
        submit(engine, 3, 8)
    gated.gate.release(100)
    assert [len(result(future)) for future in waiting] == [50, 50]


def test_closing_fails_what_waits(gated: GatedEncoder) -> None:
    engine = Engine(gated, LIMITS, Metrics())
    waiting = [submit(engine, value, 8) for value in range(6)]
    gated.gate.release(1)
    engine.close()
    ended = [future.exception(20) for future in waiting]
    assert all(error is None or isinstance(error, Unavailable) for error in ended)
    assert any(isinstance(error, Unavailable) for error in ended)
    with pytest.raises(Unavailable):
        submit(engine, 1, 1)


# -- what it reports --------------------------------------------------------------------------------------------------


def test_a_service_that_nobody_has_asked_yet_reports_that_nothing_waits_and_nothing_was_computed(
    gated: GatedEncoder, checkpoint: Checkpoint
) -> None:
    metrics = Metrics()
    engine = Engine(gated, LIMITS, metrics)
    VisionService(
        engine, None, metrics, config=checkpoint.config, vision_revision="r", max_frames=8, max_request_bytes=1,
        max_pending_bytes=1,
    )  # fmt: skip
    engine.close()
    assert {
        "nvila_vision_pending_tiles 0.0",
        "nvila_vision_backlog_seconds 0.0",
        'nvila_vision_stage_seconds_total{stage="tower"} 0.0',
    } <= set(metrics.render().decode().splitlines())
