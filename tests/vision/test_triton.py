"""The vision service on a real Triton with a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from nvila.cache.codec import dequantize
from nvila.cache.store import TokenStore
from nvila.errors import DeadlineExceeded, InvalidRequest, LimitExceeded, NvilaError, Unavailable
from nvila.internal.v1 import vision_pb2
from nvila.model.checkpoint import Checkpoint
from nvila.model.encoder import VisionEncoder
from nvila.telemetry import tracing
from nvila.types import Chunk, Deadline, Encoded, EncodeSettings, TokenDtype
from nvila.video.arena import FrameArena
from nvila.vision.client import VisionClient
from nvila.vision.contract import ENCODE, FRAMES, MODEL, RESULT, EncodeCall, as_tensor
from nvila.vision.triton import clean_shared_memory
from tests.cache.redis_server import RedisServer
from tests.otlp import OtlpReceiver, ReceivedSpan
from tests.vision.chunks import at, form_of, image_settings, make_chunk, ref_of, video_chunk, video_settings
from tests.vision.triton_server import TritonServer


async def encode(
    client: VisionClient,
    checkpoint: Checkpoint,
    chunk: Chunk,
    settings: EncodeSettings,
    *,
    want_inline: bool = False,
    seconds: float = 30,
) -> Encoded:
    ref = ref_of(checkpoint, chunk, settings)
    return await client.encode(chunk, ref, settings, want_inline=want_inline, deadline=Deadline.after(seconds))


def expected(encoder: VisionEncoder, chunk: Chunk, settings: EncodeSettings) -> NDArray[np.float32]:
    values: NDArray[np.float32] = encoder.encode(chunk.frames_FHWC, settings)[0].numpy()
    return values


def assert_same(values_TD: NDArray[np.float32], other_TD: NDArray[np.float32]) -> None:
    """Tiles of other batches may have been summed in another order."""
    np.testing.assert_allclose(values_TD, other_TD, rtol=1e-4, atol=1e-5)


def metric(triton: TritonServer, name: str) -> float:
    lines = [line for line in triton.metrics().splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.05)


@pytest.fixture
async def arena() -> AsyncIterator[FrameArena]:
    made = FrameArena.create("nvtest-arena", 64 << 20)
    yield made
    made.close()


async def in_memory(arena: FrameArena, chunk: Chunk) -> Chunk:
    """The chunk with its frames in shared memory only: nothing of them is left where the client could send it from."""
    location = await arena.allocate(chunk.frames_FHWC.nbytes, Deadline.after(5))
    with arena.path.open("r+b") as file:
        file.seek(location.offset)
        file.write(chunk.frames_FHWC.tobytes())
    return at(replace(chunk, frames_FHWC=np.zeros_like(chunk.frames_FHWC)), location)


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width_px", "height_px"), [(500, 200), (60, 90), (333, 334)])
async def test_a_tiled_image_is_published_as_the_model_alone_would_encode_it(
    client: VisionClient,
    store: TokenStore,
    checkpoint: Checkpoint,
    encoder: VisionEncoder,
    width_px: int,
    height_px: int,
) -> None:
    chunk, settings = make_chunk(1, height_px, width_px, seed=1), image_settings(checkpoint)
    encoded = await encode(client, checkpoint, chunk, settings)
    assert encoded.is_published
    assert encoded.inline is None
    found = await store.get([encoded.ref], form_of(checkpoint, settings))
    assert_same(dequantize(found[encoded.ref.key]), expected(encoder, chunk, settings))


@pytest.mark.parametrize("token_dtype", TokenDtype)
async def test_a_video_chunk_is_pooled_and_stored_as_asked(
    client: VisionClient, store: TokenStore, checkpoint: Checkpoint, encoder: VisionEncoder, token_dtype: TokenDtype
) -> None:
    chunk, settings = video_chunk(checkpoint, 32, seed=2), video_settings(checkpoint, token_dtype=token_dtype)
    encoded = await encode(client, checkpoint, chunk, settings)
    assert encoded.tiles == 32
    assert set(encoded.stage_ms) == {"queue", "preprocess", "tower", "project", "publish"}
    found = await store.get([encoded.ref], form_of(checkpoint, settings))
    values_TD, truth_TD = dequantize(found[encoded.ref.key]), expected(encoder, chunk, settings)
    step = {TokenDtype.FLOAT32: 1e-5, TokenDtype.BFLOAT16: 2**-8, TokenDtype.INT8: 1 / 127}[token_dtype]
    assert np.abs(values_TD - truth_TD).max() <= step * np.abs(truth_TD).max()


async def test_256_frames_are_one_call(client: VisionClient, checkpoint: Checkpoint, encoder: VisionEncoder) -> None:
    chunk, settings = video_chunk(checkpoint, 256, seed=3), video_settings(checkpoint)
    encoded = await encode(client, checkpoint, chunk, settings, want_inline=True)
    assert encoded.inline is not None
    assert encoded.ref.levels[0].blocks == 32
    assert_same(dequantize(encoded.inline), expected(encoder, chunk, settings))


async def test_concurrent_requests_each_get_their_own_tokens(
    client: VisionClient, checkpoint: Checkpoint, encoder: VisionEncoder, triton: TritonServer
) -> None:
    images = [(make_chunk(1, 80 + 40 * n, 300, seed=10 + n), image_settings(checkpoint)) for n in range(4)]
    videos = [(video_chunk(checkpoint, 8 * n, seed=20 + n), video_settings(checkpoint)) for n in range(1, 5)]
    requests = [*images, *videos]
    encoded = await asyncio.gather(
        *(encode(client, checkpoint, chunk, settings, want_inline=True) for chunk, settings in requests)
    )
    for (chunk, settings), one in zip(requests, encoded, strict=True):
        assert one.inline is not None
        assert_same(dequantize(one.inline), expected(encoder, chunk, settings))
    assert metric(triton, "nvila_vision_pending_tiles") == 0


async def test_the_services_metrics_are_on_tritons_page(
    client: VisionClient, checkpoint: Checkpoint, triton: TritonServer
) -> None:
    tiles = metric(triton, "nvila_vision_tiles_total")
    await encode(client, checkpoint, video_chunk(checkpoint, 8, seed=4), video_settings(checkpoint))
    assert metric(triton, "nvila_vision_tiles_total") == tiles + 8
    assert metric(triton, 'nvila_cache_writes_total{outcome="written"}') >= 1
    assert metric(triton, 'nvila_vision_stage_seconds_total{stage="tower"}') > 0


# -- how frames travel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["auto", "shared_memory"])
async def test_frames_in_shared_memory_are_read_there(
    triton: TritonServer,
    arena: FrameArena,
    checkpoint: Checkpoint,
    encoder: VisionEncoder,
    transport: str,
) -> None:
    client = VisionClient(triton.url, transport=transport)  # type: ignore[arg-type]
    settings = video_settings(checkpoint)
    chunks = [video_chunk(checkpoint, 8, seed=seed) for seed in (30, 31)]
    for chunk in chunks:
        encoded = await encode(client, checkpoint, await in_memory(arena, chunk), settings, want_inline=True)
        assert encoded.inline is not None
        assert_same(dequantize(encoded.inline), expected(encoder, chunk, settings))
    await client.close()


async def test_a_region_that_triton_cannot_map_makes_frames_travel_as_bytes(
    client: VisionClient, arena: FrameArena, checkpoint: Checkpoint, encoder: VisionEncoder
) -> None:
    chunk, settings = video_chunk(checkpoint, 8, seed=32), video_settings(checkpoint)
    location = replace(await arena.allocate(chunk.frames_FHWC.nbytes, Deadline.after(5)), region="/nvtest-elsewhere")
    encoded = await encode(client, checkpoint, at(chunk, location), settings, want_inline=True)
    assert encoded.inline is not None
    assert_same(dequantize(encoded.inline), expected(encoder, chunk, settings))


async def test_a_place_outside_the_region_is_refused(
    triton: TritonServer, arena: FrameArena, checkpoint: Checkpoint
) -> None:
    client = VisionClient(triton.url, transport="shared_memory")
    chunk, settings = video_chunk(checkpoint, 8, seed=33), video_settings(checkpoint)
    location = replace(await arena.allocate(chunk.frames_FHWC.nbytes, Deadline.after(5)), offset=arena.size_bytes - 10)
    with pytest.raises(InvalidRequest):
        await encode(client, checkpoint, at(chunk, location), settings)
    await client.close()


async def test_a_closed_client_leaves_nothing_mapped(
    triton: TritonServer, arena: FrameArena, checkpoint: Checkpoint
) -> None:
    client = VisionClient(triton.url)
    chunk = await in_memory(arena, video_chunk(checkpoint, 8, seed=34))
    await encode(client, checkpoint, chunk, video_settings(checkpoint))
    await client.close()
    direct = InferenceServerClient(triton.url)
    status = await direct.get_system_shared_memory_status()
    assert arena.path.name not in status.regions
    await direct.close()


# -- requests that end early ------------------------------------------------------------------------------------------


async def test_requests_whose_caller_left_are_dropped_before_they_are_computed(
    client: VisionClient, checkpoint: Checkpoint, triton: TritonServer
) -> None:
    tiles, cancelled = metric(triton, "nvila_vision_tiles_total"), 'nvila_vision_requests_total{outcome="cancelled"}'
    before = metric(triton, cancelled)
    settings = video_settings(checkpoint)
    calls = [
        asyncio.create_task(encode(client, checkpoint, video_chunk(checkpoint, 256, seed=seed), settings))
        for seed in range(40, 48)
    ]
    await eventually(lambda: metric(triton, "nvila_vision_tiles_total") > tiles)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    await eventually(lambda: metric(triton, "nvila_vision_pending_tiles") == 0)
    await eventually(lambda: metric(triton, cancelled) >= before + 4)  # a slow test lets the first ones finish
    assert metric(triton, "nvila_vision_tiles_total") < tiles + 8 * 256


async def test_a_call_that_takes_too_long_ends_at_its_deadline(client: VisionClient, checkpoint: Checkpoint) -> None:
    with pytest.raises(DeadlineExceeded):
        await encode(client, checkpoint, video_chunk(checkpoint, 256, seed=45), video_settings(checkpoint), seconds=0.1)


async def test_work_not_begun_when_its_time_is_up_is_dropped(
    client: VisionClient, checkpoint: Checkpoint, triton: TritonServer
) -> None:
    settings = video_settings(checkpoint)
    busy = [
        asyncio.create_task(encode(client, checkpoint, video_chunk(checkpoint, 256, seed=seed), settings))
        for seed in (43, 44)
    ]
    await eventually(lambda: metric(triton, "nvila_vision_pending_tiles") > 0)
    late = EncodeCall(key="cd" * 32, settings=settings, timeout_s=0.001).to_bytes()
    result = await infer(triton, video_chunk(checkpoint, 256, seed=46).frames_FHWC, late)
    assert result.error_code == DeadlineExceeded.code
    await asyncio.gather(*busy)


async def test_other_weights_than_the_caller_counts_on_are_unavailable(
    client: VisionClient, checkpoint: Checkpoint
) -> None:
    settings = replace(video_settings(checkpoint), vision_revision="f" * 64)
    with pytest.raises(Unavailable, match="not of one deployment"):
        await encode(client, checkpoint, video_chunk(checkpoint, 8), settings)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [(257 + 7, LimitExceeded, "264 asked, at most 256 allowed"), (9, InvalidRequest, "groups of 8")],
)
async def test_frames_that_do_not_fit_are_refused_with_numbers(
    triton: TritonServer, checkpoint: Checkpoint, frames: int, error: type[NvilaError], message: str
) -> None:
    result = await infer(triton, video_chunk(checkpoint, frames).frames_FHWC, video_settings(checkpoint))
    assert result.error_code == error.code
    assert message in result.error_message


# -- tensors that nobody should send (ANCHORS §4.4, 96-99) ------------------------------------------------------------


async def infer(
    triton: TritonServer,
    frames: NDArray[np.generic],
    settings: EncodeSettings | bytes,
    *,
    dtype: str = "UINT8",
    shape: list[int] | None = None,
) -> vision_pb2.EncodeResult:
    """A call past our client, with anything in it."""
    client = InferenceServerClient(triton.url)
    data = settings if isinstance(settings, bytes) else EncodeCall(key="ab" * 32, settings=settings).to_bytes()
    frames_tensor = InferInput(FRAMES, list(frames.shape), dtype)
    frames_tensor.set_data_from_numpy(frames)
    if shape is not None:
        frames_tensor.set_shape(shape)
    encode_tensor = InferInput(ENCODE, [len(data)], "UINT8")
    encode_tensor.set_data_from_numpy(as_tensor(data))
    try:
        answer = await client.infer(MODEL, [frames_tensor, encode_tensor], client_timeout=30)
        return vision_pb2.EncodeResult.FromString(answer.as_numpy(RESULT).tobytes())
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("frames", "dtype", "shape"),
    [
        (np.zeros((8, 8, 3), np.uint8), "UINT8", None),
        (np.zeros((1, 8, 8, 4), np.uint8), "UINT8", None),
        (np.zeros((1, 8, 8, 3), np.float32), "FP32", None),
        (np.zeros((1, 8, 8, 3), np.uint8), "UINT8", [2**40, 8, 8, 3]),
        (np.zeros((1, 8, 8, 3), np.uint8), "UINT8", [2, 8, 8, 3]),
        (np.zeros((1, 8, 8, 3), np.uint8), "UINT8", [-1, 8, 8, 3]),
    ],
)
async def test_frames_of_a_wrong_rank_type_or_size_are_refused(
    triton: TritonServer, checkpoint: Checkpoint, frames: NDArray[np.generic], dtype: str, shape: list[int] | None
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        await infer(triton, frames, image_settings(checkpoint), dtype=dtype, shape=shape)
    assert "INVALID_ARGUMENT" in str(caught.value.status())


@pytest.mark.parametrize("shape", [(0, 112, 112, 3), (8, 0, 112, 3)])
async def test_empty_frames_are_refused(triton: TritonServer, checkpoint: Checkpoint, shape: tuple[int, ...]) -> None:
    with contextlib.suppress(InferenceServerException):  # refused by Triton itself
        result = await infer(triton, np.zeros(shape, np.uint8), video_settings(checkpoint))
        assert result.error_code == InvalidRequest.code


@pytest.mark.parametrize("data", [b"\xff" * 50, b"", bytes(10_000)])
async def test_bytes_that_are_no_request_are_refused(triton: TritonServer, checkpoint: Checkpoint, data: bytes) -> None:
    frames = video_chunk(checkpoint, 8).frames_FHWC
    with contextlib.suppress(InferenceServerException):  # an empty tensor: by Triton itself
        result = await infer(triton, frames, data)
        assert result.error_code == InvalidRequest.code


async def test_nobody_may_load_models_or_change_settings(triton: TritonServer) -> None:
    client = InferenceServerClient(triton.url)
    for forbidden in (client.load_model(MODEL), client.unload_model(MODEL), client.update_log_settings({})):
        with pytest.raises(InferenceServerException, match="restricted"):
            await forbidden
    await client.close()


# -- one trace --------------------------------------------------------------------------------------------------------


async def traced_encode(
    client: VisionClient, checkpoint: Checkpoint, receiver: OtlpReceiver, caller: str
) -> tuple[str, dict[str, ReceivedSpan]]:
    """Encode something in a new trace; returns its id and our spans by their names."""
    trace_id = secrets.token_hex(16)
    with tracing.continuing(f"00-{trace_id}-{caller}-01"):
        await encode(client, checkpoint, video_chunk(checkpoint, 8, seed=50), video_settings(checkpoint))
    received = await asyncio.to_thread(receiver.wait_for, trace_id, caller, {"nvila-vision"})
    return trace_id, {span.name: span for span in received if span.service == "nvila-vision"}


async def test_spans_of_our_backend_belong_to_the_callers_trace(
    client: VisionClient, checkpoint: Checkpoint, receiver: OtlpReceiver
) -> None:
    caller = secrets.token_hex(8)
    _, spans = await traced_encode(client, checkpoint, receiver, caller)
    assert spans["vision.encode"].parent_id == caller
    parts = {"vision.queue", "vision.preprocess", "vision.tower", "vision.project", "vision.publish"}
    assert {spans[name].parent_id for name in parts} == {spans["vision.encode"].span_id}


async def test_tritons_own_spans_are_linked_and_belong_to_the_callers_trace_when_triton_can_read_it(
    client: VisionClient, checkpoint: Checkpoint, receiver: OtlpReceiver
) -> None:
    """It reads the caller's trace by luck (vision/triton.py); the link holds always."""
    for _ in range(20):
        caller = secrets.token_hex(8)
        trace_id, spans = await traced_encode(client, checkpoint, receiver, caller)
        (linked,) = spans["vision.encode"].links
        of_triton = await asyncio.to_thread(receiver.wait_for_span, linked)
        assert of_triton.service == "nvila-triton"
        parent = caller if of_triton.trace_id == trace_id else ""
        received = await asyncio.to_thread(receiver.wait_for, of_triton.trace_id, parent, {"nvila-triton"})
        by_name = {span.name: span for span in received if span.service == "nvila-triton"}
        assert by_name["InferRequest"].parent_id == parent
        assert by_name[MODEL].parent_id == by_name["InferRequest"].span_id
        if of_triton.trace_id == trace_id:
            return
    raise AssertionError("Triton never read the caller's trace")


async def test_a_trace_that_is_not_sampled_gets_no_spans(
    client: VisionClient, checkpoint: Checkpoint, receiver: OtlpReceiver
) -> None:
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    with tracing.continuing(f"00-{trace_id}-{caller}-00"):
        await encode(client, checkpoint, video_chunk(checkpoint, 8, seed=50), video_settings(checkpoint))
    await traced_encode(client, checkpoint, receiver, caller)  # whose spans come after those that must not come
    assert receiver.trace(trace_id) == []


# -- parts that die ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_without_redis_the_tokens_come_inline(
    tmp_path: Path, checkpoint: Checkpoint, encoder: VisionEncoder
) -> None:
    """And Redis killed under it, and Triton itself killed and started again: one server for all, it takes a while."""
    redis = RedisServer(tmp_path)
    triton = TritonServer(tmp_path, {"NVILA_VISION_MODEL": str(checkpoint.path), "NVILA_VISION_REDIS_URL": redis.url})
    arena = FrameArena.create("nvtest-arena", 8 << 20)
    settings = video_settings(checkpoint)
    try:
        triton.start()
        client = VisionClient(triton.url)

        async def encode_one(seed: int) -> Encoded:
            chunk = video_chunk(checkpoint, 8, seed=seed)
            encoded = await encode(client, checkpoint, await in_memory(arena, chunk), settings)
            if not encoded.is_published:
                assert encoded.inline is not None
                assert_same(dequantize(encoded.inline), expected(encoder, chunk, settings))
            return encoded

        assert not (await encode_one(60)).is_published
        redis.start()
        async with asyncio.timeout(20):  # the store looks for Redis once a second
            while not (await encode_one(61)).is_published:
                await asyncio.sleep(0.2)
        redis.stop()
        assert not (await encode_one(62)).is_published

        children = psutil.Process(triton.pid).children(recursive=True)
        triton.kill()
        started = time.perf_counter()
        with pytest.raises(Unavailable):
            await encode_one(63)
        assert time.perf_counter() - started < 10  # the call had 30 s
        assert not await client.ready()
        await eventually(lambda: not any(child.is_running() for child in children))
        clean_shared_memory(triton.shm_prefix)
        assert triton.shared_memory() == []

        await asyncio.to_thread(triton.start)
        await eventually_ready(client)
        assert not (await encode_one(64)).is_published  # and the region was registered again
        await client.close()
    finally:
        triton.stop()
        redis.stop()
        arena.close()


async def test_a_killed_backend_takes_the_server_along_and_open_calls_end_at_once(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    triton = TritonServer(tmp_path, {"NVILA_VISION_MODEL": str(checkpoint.path)})
    try:
        triton.start()
        client = VisionClient(triton.url)
        settings = video_settings(checkpoint)
        calls = [
            asyncio.create_task(encode(client, checkpoint, video_chunk(checkpoint, 256, seed=seed), settings))
            for seed in (70, 71)
        ]
        await eventually(lambda: metric(triton, "nvila_vision_pending_tiles") > 0)
        children = psutil.Process(triton.pid).children(recursive=True)
        next(child for child in children if "stub" in child.name()).kill()
        async with asyncio.timeout(15):  # the calls had 30 s
            ended = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, Unavailable) for end in ended)
        assert triton.wait(30) != 0
        await eventually(lambda: not any(child.is_running() for child in children))
        await client.close()
    finally:
        triton.stop()


async def eventually_ready(client: VisionClient) -> None:
    async with asyncio.timeout(30):
        while not await client.ready():
            await asyncio.sleep(0.05)


@pytest.mark.slow
def test_a_service_that_cannot_work_does_not_start_and_says_why(tmp_path: Path, checkpoint: Checkpoint) -> None:
    reasons = {"255": "not a multiple of the temporal group", "many": "NVILA_VISION_MAX_FRAMES: "}
    servers: list[tuple[TritonServer, str]] = []
    try:
        for value, reason in reasons.items():
            (tmp_path / value).mkdir()
            environment = {"NVILA_VISION_MODEL": str(checkpoint.path), "NVILA_VISION_MAX_FRAMES": value}
            servers.append((TritonServer(tmp_path / value, environment), reason))
            servers[-1][0].launch()
        for server, reason in servers:
            assert server.wait() != 0
            assert reason in server.log.read_text()
    finally:
        for server, _ in servers:
            server.stop()
