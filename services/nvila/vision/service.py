"""One encode call, from unpacked tensors to the answer: checked, computed by the engine, published, described.

It knows nothing of Triton; `backend.py` brings it calls and takes its answers. Publishing runs beside the tower, on the
event loop that calls `encode`, so that the tower never waits for Redis.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import lcm

import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import SpanKind

from nvila.cache.codec import Record, pack, quantize
from nvila.cache.store import TokenStore
from nvila.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    NvilaError,
    Overloaded,
    Unavailable,
)
from nvila.internal.v1 import tokens_pb2, vision_pb2
from nvila.model import cost
from nvila.model.config import NvilaConfig
from nvila.telemetry import names, tracing
from nvila.telemetry.logs import fields
from nvila.types import MediaKind, TokensRef, VisualTokens
from nvila.vision.contract import EncodeCall
from nvila.vision.engine import Engine, Features, MetricSink

_log = logging.getLogger(__name__)


class VisionService:
    """`store` None: nothing is published, every answer carries its tokens."""

    def __init__(
        self,
        engine: Engine,
        store: TokenStore | None,
        metrics: MetricSink,
        *,
        config: NvilaConfig,
        vision_revision: str,
        max_frames: int,
        max_request_bytes: int,
        max_pending_bytes: int,
    ) -> None:
        self._engine = engine
        self._store = store
        self._metrics = metrics
        metrics.add(names.VISION_STAGE_SECONDS, 0, stage="tower")  # autoscaling falls back where it is missing
        self._config = config
        self._vision_revision = vision_revision
        self._max_frames = max_frames
        self._max_request_bytes = max_request_bytes
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        self._writer = f"{socket.gethostname()}:{os.getpid()}"

    async def encode(
        self, frames_FHWC: NDArray[np.uint8], encode: bytes, is_cancelled: Callable[[], bool], *, triton_span: str
    ) -> vision_pb2.EncodeResult:
        """The answer to one call; an error of the call is in the answer. Never raises.

        The frames are read until this returns, and not afterwards. is_cancelled: asked, from other threads, before work
        that costs something. triton_span: Triton's own span of this call, as a `traceparent`, or empty; ours is linked
        to it, because it may be in another trace (triton.py).
        """
        began = time.monotonic()
        try:
            call = EncodeCall.from_bytes(encode)
            with tracing.span("vision.encode", parent=call.traceparent, kind=SpanKind.SERVER) as current:
                tracing.link_to(current, triton_span)
                result = await self._encode(frames_FHWC, call, began, is_cancelled)
                current.set_attribute(names.ATTR_TILES, result.tiles)
            outcome = "ok"
        except NvilaError as error:
            result = vision_pb2.EncodeResult(
                error_code=error.code, error_message=error.message, retry_after_s=error.retry_after_s or 0
            )
            outcome = error.code
        except Exception as error:  # the process edge: one call's failure is that call's answer
            _log.exception("an encode call failed")
            result = vision_pb2.EncodeResult(
                error_code=Unavailable.code, error_message=f"the vision service failed: {type(error).__name__}"
            )
            outcome = NvilaError.code
        self._metrics.add(names.VISION_REQUESTS, outcome=outcome)
        return result

    async def _encode(
        self, frames_FHWC: NDArray[np.uint8], call: EncodeCall, began: float, is_cancelled: Callable[[], bool]
    ) -> vision_pb2.EncodeResult:
        tiles = self._check(frames_FHWC, call)

        def why_gone() -> NvilaError | None:
            if call.timeout_s is not None and time.monotonic() - began >= call.timeout_s:
                return DeadlineExceeded(f"not encoded within the {call.timeout_s:.3g} s that were left")
            return Cancelled("the caller left") if is_cancelled() else None

        with self._held(frames_FHWC.nbytes):
            features = await asyncio.wrap_future(
                self._engine.submit(frames_FHWC, call.settings, tiles=tiles, why_gone=why_gone)
            )
        self._record_spans(features)
        began_ns = time.time_ns()
        with tracing.span("vision.publish") as current:
            record = await asyncio.to_thread(self._pack, features, call)
            is_published = self._store is not None and await self._store.put(record)
            current.set_attribute(names.ATTR_CACHE_BYTES, len(record.payload))
        stage_ms = {**features.stage_ms, "publish": (time.time_ns() - began_ns) / 1e6}
        for stage, ms in stage_ms.items():
            self._metrics.add(names.VISION_STAGE_SECONDS, ms / 1000, stage=stage)
        _log.debug("encoded", extra=fields(key=call.key, tiles=features.tiles, is_published=is_published))
        return vision_pb2.EncodeResult(
            manifest=tokens_pb2.TokenManifest.FromString(record.manifest),
            is_published=is_published,
            inline_payload=b"" if is_published and not call.want_inline else bytes(record.payload),
            tiles=features.tiles,
            stage_ms=stage_ms,
        )

    @contextmanager
    def _held(self, nbytes: int) -> Iterator[None]:
        """Pixels in shared memory are counted while they are held."""
        if self._pending_bytes and self._pending_bytes + nbytes > self._max_pending_bytes:
            raise Overloaded(
                f"vision queue: {self._pending_bytes:,} bytes of pixels wait and {nbytes:,} more came, at most "
                f"{self._max_pending_bytes:,}"
            )
        self._pending_bytes += nbytes
        try:
            yield
        finally:
            self._pending_bytes -= nbytes

    def _check(self, frames_FHWC: NDArray[np.uint8], call: EncodeCall) -> int:
        """The tiles that this call will make; raises what is wrong with it."""
        if call.settings.vision_revision != self._vision_revision:
            raise Unavailable(
                f"the vision service has weights {self._vision_revision[:12]}, the caller counts on "
                f"{call.settings.vision_revision[:12]}: the services are not of one deployment"
            )
        if frames_FHWC.dtype != np.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[3] != 3 or not frames_FHWC.size:
            raise InvalidRequest(
                f"frames: expected uint8 (frames, rows, columns, 3), none empty; came {frames_FHWC.dtype} "
                f"{frames_FHWC.shape}"
            )
        frames, height_px, width_px, _ = frames_FHWC.shape
        if frames > self._max_frames:
            raise LimitExceeded.of("frames of one call", asked=frames, limit=self._max_frames)
        if frames_FHWC.nbytes > self._max_request_bytes:
            raise LimitExceeded.of("bytes of pixels", asked=frames_FHWC.nbytes, limit=self._max_request_bytes)
        settings = call.settings
        if settings.kind is MediaKind.IMAGE and frames != 1:
            raise InvalidRequest(f"an image is one frame, {frames} came")
        cost.levels(  # raises when the frames cannot be pooled as asked, before anything is computed
            self._config,
            kind=settings.kind,
            is_tiled=settings.is_tiled,
            width_px=width_px,
            height_px=height_px,
            frames=frames,
            pool_sizes=settings.pool_sizes,
        )
        return cost.tower_tiles(
            self._config,
            kind=settings.kind,
            is_tiled=settings.is_tiled,
            width_px=width_px,
            height_px=height_px,
            frames=frames,
        )

    def _pack(self, features: Features, call: EncodeCall) -> Record:
        try:
            values_TD, scales_T = quantize(features.values_TD, call.settings.token_dtype)
        except ValueError as error:
            raise Unavailable(f"the vision tower gave unusable tokens: {error}") from None
        tokens = VisualTokens(
            ref=TokensRef(key=call.key, levels=features.levels),
            dtype=call.settings.token_dtype,
            values_TD=values_TD,
            scales_T=scales_T,
            vision_revision=self._vision_revision,
        )
        group = lcm(*(pool[0] for pool in call.settings.pool_sizes))
        return pack(
            tokens,
            group_start_s=call.times_s[::group] if call.settings.kind is MediaKind.VIDEO else (),
            traceparent=tracing.current_traceparent(),
            writer=self._writer,
        )

    def _record_spans(self, features: Features) -> None:
        parent = tracing.current_traceparent()
        for stage, (start_ns, end_ns) in features.spans_ns.items():
            tracing.record(f"vision.{stage}", parent=parent, start_ns=start_ns, end_ns=end_ns)
