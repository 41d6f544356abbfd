"""The Triton model: takes each call at once, answers it later, owns what lives as long as the process.

`execute` returns without an answer and keeps the request's response sender; Triton (tried: 2.51) allows that without
the decoupled mode, so a plain ModelInfer call gets its one answer when the engine has it, and many calls are open at
once. Requests differ in shape, which is why Triton's own dynamic batching cannot gather them (ANCHORS P44).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine, Sequence
from importlib.metadata import version
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from pydantic import ValidationError

from nvila.cache.store import TokenStore
from nvila.errors import NvilaError
from nvila.model.checkpoint import Checkpoint
from nvila.model.config import NvilaConfig
from nvila.model.encoder import VisionEncoder
from nvila.telemetry import logs, tracing
from nvila.telemetry.logs import fields
from nvila.telemetry.names import Metric
from nvila.vision import guard
from nvila.vision.checks import free_shared_bytes, reasons_not_to_start
from nvila.vision.contract import ENCODE, FRAMES, RESULT, as_tensor
from nvila.vision.engine import Engine, EngineLimits
from nvila.vision.precision import choose_precision
from nvila.vision.service import VisionService
from nvila.vision.settings import Settings

_log = logging.getLogger(__name__)


class TritonPythonModel:
    """Triton makes one per instance (one per GPU, or one on a CPU), in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Raises `TritonModelException` with the reason when the service must not start."""
        settings = _read_settings()
        logs.configure("vision", level=settings.log_level, style=settings.log_style)
        self._traces = tracing.configure("vision", version("nvila"))
        metrics = TritonMetrics()
        try:
            checkpoint = Checkpoint.open(settings.model)
            _refuse(reasons_not_to_start(settings, checkpoint.config, free_shared_bytes()))
            device, dtype = choose_device(settings, args)
            if settings.cpu_threads:
                torch.set_num_threads(settings.cpu_threads)
            ops = choose_precision(settings.precision, checkpoint, device)
            encoder = VisionEncoder.from_checkpoint(checkpoint, device, dtype, ops)
        except NvilaError as error:
            raise pb_utils.TritonModelException(error.message) from error
        limits = EngineLimits(
            batch_tiles=settings.max_batch_tiles,
            pending_tiles=settings.max_pending_tiles,
            is_padded=device.type == "cuda",
        )
        warm_up(encoder, checkpoint.config, limits)
        self._guard = start_guard()
        self._loop = _LoopThread()
        self._store = self._loop.run(_open_store(settings, metrics)) if settings.redis_url else None
        self._engine = Engine(encoder, limits, metrics, on_broken=_die)
        self._service = VisionService(
            self._engine,
            self._store,
            metrics,
            config=checkpoint.config,
            vision_revision=checkpoint.vision_revision,
            max_frames=settings.max_frames,
            max_request_bytes=settings.max_request_bytes,
            max_pending_bytes=settings.max_pending_bytes,
        )
        _log.info(
            "vision is ready",
            extra=fields(
                model=checkpoint.name,
                vision_revision=checkpoint.vision_revision,
                is_random=checkpoint.is_random,
                device=str(device),
                dtype=str(dtype),
                int8=encoder.arithmetic or "no",
                threads=torch.get_num_threads(),
                batch_tiles=limits.batch_tiles,
                is_published=self._store is not None,
            ),
        )

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            self._loop.start(self._answer(request, sender))

    def finalize(self) -> None:
        """Triton has waited for the answers of all open calls."""
        self._guard.kill()
        self._guard.wait()
        self._engine.close()
        if self._store is not None:
            self._loop.run(self._store.close())
        self._loop.close()
        self._traces.shutdown()

    async def _answer(self, request: Any, sender: Any) -> None:
        # The frames are a view into memory that lives as long as `request`, so that is held until the answer is sent.
        frames = pb_utils.get_input_tensor_by_name(request, FRAMES).as_numpy()
        encode = pb_utils.get_input_tensor_by_name(request, ENCODE).as_numpy().tobytes()
        result = await self._service.encode(frames, encode, sender.is_cancelled, triton_span=_triton_span(request))
        tensor = pb_utils.Tensor(RESULT, as_tensor(result.SerializeToString()))
        response = pb_utils.InferenceResponse(output_tensors=[tensor])
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _triton_span(request: Any) -> str:
    """Triton's own span of this call, as a `traceparent`; empty when it has none."""
    context = request.trace().get_context()
    return str(json.loads(context).get("traceparent", "")) if context else ""


def choose_device(settings: Settings, args: dict[str, str]) -> tuple[torch.device, torch.dtype]:
    """Where and in which arithmetic tower and projector run."""
    name = settings.device
    if name == "auto":
        is_gpu = args.get("model_instance_kind") == "GPU" and torch.cuda.is_available()
        name = f"cuda:{args.get('model_instance_device_id', '0')}" if is_gpu else "cpu"
    device = torch.device(name)
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    automatic = torch.float16 if device.type == "cuda" else torch.float32
    return device, dtypes.get(settings.dtype, automatic)


def warm_up(encoder: VisionEncoder, config: NvilaConfig, limits: EngineLimits) -> None:
    """Run every batch shape once, so that the first request does not pay for it and a full batch is known to fit."""
    sizes = {limits.batch_tiles}
    if limits.is_padded:
        sizes |= {1 << power for power in range(limits.batch_tiles.bit_length()) if 1 << power < limits.batch_tiles}
    for tiles in sorted(sizes if limits.is_padded else {1}, reverse=True):
        encoder.tower(torch.zeros(tiles, 3, config.tile_px, config.tile_px))


def start_guard() -> subprocess.Popen[bytes]:
    """See `guard.py`. Triton's server is this process's parent."""
    processes = [os.pidfd_open(os.getppid()), os.pidfd_open(os.getpid())]
    started = subprocess.Popen([sys.executable, "-I", guard.__file__, *map(str, processes)], pass_fds=processes)
    for fd in processes:
        os.close(fd)
    return started


class TritonMetrics:
    """Our metrics on Triton's own `/metrics`, in the shape of telemetry/metrics.py.

    This Triton has no custom histograms: one becomes its `_sum` and `_count`, which is what a rate needs.
    """

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}
        self._made: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._lock = threading.Lock()

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        self._get(metric.name, metric, pb_utils.MetricFamily.COUNTER, labels).increment(amount)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self._get(metric.name, metric, pb_utils.MetricFamily.GAUGE, labels).set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        kind = pb_utils.MetricFamily.COUNTER
        self._get(f"{metric.name}_sum", metric, kind, labels).increment(value)
        self._get(f"{metric.name}_count", metric, kind, labels).increment(1)

    def _get(self, name: str, metric: Metric, kind: Any, labels: dict[str, str]) -> Any:
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            if key not in self._made:
                if name not in self._families:
                    self._families[name] = pb_utils.MetricFamily(name=name, description=metric.help, kind=kind)
                self._made[key] = self._families[name].Metric(labels=labels)
            return self._made[key]


class _LoopThread:
    """An event loop in a thread of its own: calls wait and publish there, away from Triton's thread and the tower's."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nvila-calls", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).add_done_callback(_log_failure)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _log_failure(future: Any) -> None:
    if not future.cancelled() and future.exception() is not None:
        _log.error("an answer could not be sent", exc_info=future.exception())


async def _open_store(settings: Settings, metrics: TritonMetrics) -> TokenStore:
    return TokenStore.open(settings.redis_url, metrics, ttl_s=settings.redis_ttl_s, timeout_s=settings.redis_timeout_s)


def _read_settings() -> Settings:
    try:
        return Settings()  # type: ignore[call-arg]  # from the environment
    except ValidationError as error:
        wrong = [f"NVILA_VISION_{'_'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors()]
        raise pb_utils.TritonModelException("; ".join(wrong)) from None


def _die() -> None:
    """What broke stays broken in this process, so it ends; the guard ends the server, and both are started anew."""
    _log.critical("the vision service cannot go on and ends")
    os._exit(1)


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise pb_utils.TritonModelException("vision cannot start: " + "; ".join(reasons))
