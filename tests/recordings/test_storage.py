"""What the capacity model says is kept and moved, held to what taking a recording in really writes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from nvila.cache.codec import pack, quantize
from nvila.capacity.models import nvila_8b_video
from nvila.capacity.recordings import DAY_S, KEPT, RECORD_OVERHEAD_BYTES, CameraCost, Sampling, camera_cost
from nvila.errors import InvalidRequest
from nvila.model import cost
from nvila.recordings.jobs import JobStore
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import ChunkPolicy
from nvila.types import MediaKind, TokenDtype, TokensRef, VisualTokens
from nvila.video.pool import DecodePool
from tests.recordings.taking import CARD, CONFIG, Taking, write_clip
from tests.video.conftest import decode_pool

PLAIN = ChunkPolicy()
"""The defaults of a recording, and of `Sampling`."""


@pytest.fixture(scope="module")
async def frames() -> AsyncIterator[DecodePool]:
    async with decode_pool(arena_bytes=96 * 1024**2) as pool:
        yield pool


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/recordings.db"


@pytest.fixture
def taking(store: RecordingStore, jobs: JobStore, frames: DecodePool, tmp_path: Path) -> Taking:
    return Taking.over(store, jobs, frames, tmp_path)


def sampling_of(policy: ChunkPolicy, still: float = 0.0) -> Sampling:
    return Sampling(fps=policy.fps, chunk_s=policy.chunk_s, floor_s=policy.floor_s, still=still)


def test_defaults_are_those_of_a_recording() -> None:
    assert sampling_of(PLAIN) == Sampling()


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        (ChunkPolicy(fps=1.0, chunk_s=32.0, gate=False), 64.0),
        (ChunkPolicy(fps=0.5, chunk_s=32.0, gate=False), 64.0),
        (ChunkPolicy(fps=2.0, chunk_s=10.0, gate=False), 40.0),  # the last group of each chunk is not full
    ],
)
async def test_an_ingest_writes_what_the_arithmetic_says(
    taking: Taking, tmp_path: Path, policy: ChunkPolicy, seconds: float
) -> None:
    recording = await taking.take_in(write_clip(tmp_path / "a.mp4", seconds), policy)
    each = camera_cost(CONFIG, sampling_of(policy), CARD.token_dtype)

    groups = each.groups_per_s * seconds
    assert taking.vision.calls == pytest.approx(groups)
    assert len(taking.hot.records) == pytest.approx(groups), "one put each"
    files = [path for path in (tmp_path / "cold" / "tokens").rglob("*") if path.is_file()]
    assert len(files) == pytest.approx(groups), "one put each"
    written = sum(path.stat().st_size for path in files)
    assert written == recording.counters.bytes_cold
    assert written == pytest.approx(each.token_bytes_per_s * seconds, abs=160 * len(files)), "names are short here"
    vectors = sum(len(vector) for _, vector in await taking.shelf.vectors(recording.id))
    assert vectors == pytest.approx(each.vector_bytes_per_s * seconds)


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        (ChunkPolicy(fps=1.0, chunk_s=32.0, floor_s=60.0), 128.0),
        (ChunkPolicy(fps=2.0, chunk_s=32.0, floor_s=16.0), 64.0),
    ],
)
async def test_a_still_scene_is_taken_in_as_often_as_the_arithmetic_says(
    taking: Taking, tmp_path: Path, policy: ChunkPolicy, seconds: float
) -> None:
    recording = await taking.take_in(write_clip(tmp_path / "a.mp4", seconds, still=True), policy)
    each = camera_cost(CONFIG, sampling_of(policy, still=1.0), CARD.token_dtype)

    came = recording.counters
    # A drawn scene has no noise, so that pixels may repeat; a camera's do not.
    assert came.frames_encoded + came.frames_reused == pytest.approx(each.tiles_per_s * seconds)


@pytest.mark.parametrize("dtype", KEPT)
def test_a_group_of_the_published_model_is_as_large_as_its_record(dtype: TokenDtype) -> None:
    config = nvila_8b_video()
    levels = cost.levels(config, kind=MediaKind.VIDEO, is_tiled=False, frames=8, pool_sizes=config.pool_sizes)
    ref = TokensRef(key="0" * 64, levels=levels)
    values_TD, scales_T = quantize(np.ones((ref.tokens, config.llm_width), np.float32), dtype)
    record = pack(
        VisualTokens(ref=ref, dtype=dtype, values_TD=values_TD, scales_T=scales_T, vision_revision="f" * 64),
        group_start_s=(3600.0,),
        writer="recordings",
    )

    written = 4 + len(record.manifest) + len(record.payload)
    each = camera_cost(config, Sampling(), dtype)
    assert written == pytest.approx(each.record_bytes, abs=100)
    assert 0 < each.record_bytes - len(record.payload) == RECORD_OVERHEAD_BYTES


def test_int8_halves_tokens_and_leaves_footage() -> None:
    wide, narrow = (camera_cost(nvila_8b_video(), Sampling(), dtype) for dtype in KEPT)

    assert narrow.token_bytes_per_s * DAY_S == pytest.approx(wide.token_bytes_per_s * DAY_S / 2, rel=0.01)
    assert wide.token_bytes_per_s * DAY_S == pytest.approx(19.8e9, rel=0.01)
    assert narrow.footage_bytes_per_s == wide.footage_bytes_per_s == 500_000
    assert narrow.tiles_per_s == wide.tiles_per_s == 1.0


def test_a_camera_costs_more_the_more_it_is_looked_at_and_less_the_stiller_it_is() -> None:
    def kept(**sampling: float) -> CameraCost:
        return camera_cost(nvila_8b_video(), Sampling(**sampling), TokenDtype.INT8)

    rising = [kept(fps=fps).token_bytes_per_s for fps in (0.25, 0.5, 1, 2, 4)]
    falling = [kept(still=still).tiles_per_s for still in (0, 0.25, 0.5, 0.75, 1)]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(1 / 8), "one group of eight in 60 s"


@pytest.mark.parametrize(
    "given", [{"fps": 0}, {"fps": float("nan")}, {"still": 1.1}, {"still": -1}, {"chunk_s": 0.5}, {"floor_s": 0}]
)
def test_samplings_that_mean_nothing_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Sampling(**given)
