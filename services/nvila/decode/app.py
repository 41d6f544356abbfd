"""The decode service on Ray Serve: `python -m nvila.decode.app` starts it; KubeRay imports `application`.

A replica is one engine. Serve's gRPC proxy takes the calls of `protos/nvila/internal/v1/decode.proto` and hands each to
a replica: requests about the same media to the same one, by consistent hashing over the call's `session_id` metadata,
and to the next on the ring when that one is full. What fails travels as a `Failed` event, because Serve would turn an
exception into INTERNAL with a stack trace (ANCHORS P54).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import ray
from opentelemetry.trace import SpanKind
from pydantic import ValidationError
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig, gRPCOptions
from starlette.requests import Request
from starlette.responses import Response

from nvila.decode import exposition, wire
from nvila.decode.settings import Settings
from nvila.errors import NvilaError
from nvila.internal.v1 import decode_pb2 as pb
from nvila.telemetry import logs, tracing
from nvila.telemetry.logs import fields
from nvila.telemetry.metrics import CONTENT_TYPE, Metrics

_log = logging.getLogger(__name__)

APPLICATION = "decode"
METRICS_APPLICATION = "decode-metrics"
SERVICER = "nvila.decode.proxy.add_servicer"
"""For Serve's `grpc_servicer_functions`, here and in a `serveConfigV2`."""
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Serve's own log lines: one per request would say nothing that spans and metrics do not."""

_LOOK_EVERY_S = 2.0
"""How often the process that started the cluster looks whether there still is one."""


# -- in a replica -----------------------------------------------------------------------------------------------------


class Replica:
    """One engine behind Serve. Methods in capitals are the rpcs of `DecodeService`."""

    async def __init__(self, settings_json: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self._closing = contextlib.AsyncExitStack()
        from nvila.decode.build import build  # heavy; the process that only describes the application does without

        settings = Settings.model_validate_json(settings_json)
        logs.configure(APPLICATION, level=settings.log_level, style=settings.log_style)
        self._closing.callback(tracing.configure(APPLICATION, importlib.metadata.version("nvila")).shutdown)
        self._metrics = Metrics()
        try:
            self._decode = await self._closing.enter_async_context(build(settings, self._metrics))
        except (NvilaError, ValueError) as error:
            _log.error("the model cannot be served", extra=fields(reason=str(error)))
            raise
        self._closing.callback(asyncio.create_task(self._report()).cancel)

    async def Generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        try:
            question = await asyncio.to_thread(wire.request_from_proto, request, self._decode.form)
            async with contextlib.aclosing(self._decode.service.generate(question)) as events:
                async for event in events:
                    yield wire.event_to_proto(event)
        except NvilaError as error:
            yield wire.failure_to_proto(error)
        except Exception:  # the edge of this process: whatever it is, the caller gets a typed error
            _log.exception("a generation failed unexpectedly", extra=fields(request_id=request.request_id))
            yield wire.failure_to_proto(NvilaError("the decode service failed; its log says why"))

    async def Describe(self, request: pb.DescribeRequest) -> pb.DescribeResponse:
        return wire.card_to_proto(self._decode.card)

    async def Embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        try:
            with tracing.span("decode.embed", parent=request.traceparent, kind=SpanKind.SERVER):
                return wire.vector_to_proto(await self._decode.service.embed(request.text))
        except NvilaError as error:
            return pb.EmbedResponse(failed=wire.failure_to_proto(error).failed)
        except Exception:  # as above
            _log.exception("a text could not be embedded", extra=fields(request_id=request.request_id))
            failed = NvilaError("the decode service failed; its log says why")
            return pb.EmbedResponse(failed=wire.failure_to_proto(failed).failed)

    async def __call__(self, request: Request) -> Response:
        """Serve's gRPC proxy knows only applications that have an HTTP route, too."""
        return Response("this service speaks gRPC\n", status_code=404)

    async def check_health(self) -> None:
        """Asked by Serve; a dead engine makes the replica unhealthy, and Serve starts another."""
        await self._decode.service.check()

    async def _report(self) -> None:
        """Tell the metrics page what this replica has counted."""
        replica = serve.get_replica_context().replica_id.unique_id
        page = serve.get_deployment_handle(MetricsPage.__name__, app_name=METRICS_APPLICATION)
        while True:
            text = (self._metrics.render() + exposition.engine_page()).decode()
            try:
                async with asyncio.timeout(exposition.REPORT_EVERY_S):
                    await page.report.remote(replica, text)
            except Exception as error:  # of whatever kind Ray raises: metrics must not harm the service
                _log.debug("metrics were not reported", extra=fields(error=type(error).__name__))
            await asyncio.sleep(exposition.REPORT_EVERY_S)

    async def __del__(self) -> None:
        """Called by Serve when the replica is to go, its requests answered."""
        await self._closing.aclose()


class MetricsPage:
    """Answers `/metrics` for all replicas."""

    def __init__(self) -> None:
        self._reports = exposition.Reports()

    async def report(self, replica: str, page: str) -> None:
        self._reports.take(replica, page)

    async def __call__(self, request: Request) -> Response:
        page = self._reports.page()
        if page is None:
            return Response("no replica has reported yet\n", status_code=503)
        return Response(page, media_type=CONTENT_TYPE)


# -- what Serve is told -----------------------------------------------------------------------------------------------


def application(overrides: dict[str, Any] | None = None) -> serve.Application:
    """The decode service as a Serve application, from `NVILA_DECODE_*`; `overrides`: settings by field name (the `args`
    of a `serveConfigV2`). Its import path is `nvila.decode.app:application`."""
    return build(Settings(**(overrides or {})))


def metrics_application(overrides: dict[str, Any] | None = None) -> serve.Application:
    """The metrics page as a Serve application; route prefix `/metrics`."""
    page = serve.deployment(
        MetricsPage,
        name=MetricsPage.__name__,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=1,
        logging_config=_QUIET,
    )
    return page.bind()


def build(settings: Settings) -> serve.Application:
    """The application of these settings."""
    is_fixed = settings.min_replicas == settings.max_replicas
    options: dict[str, Any] = (
        {"num_replicas": settings.max_replicas}
        if is_fixed
        else {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "initial_replicas": max(1, settings.min_replicas),
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
            }
        }
    )
    replica = serve.deployment(
        Replica,
        name=Replica.__name__,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER,
            request_router_kwargs={"num_fallback_replicas": settings.max_replicas - 1},
        ),
        max_constructor_retry_count=3,
        health_check_period_s=settings.health_check_period_s,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_QUIET,
        **options,
    )
    return replica.bind(settings.model_dump_json())


# -- the process ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(settings: Settings) -> Iterator[None]:
    """A Ray cluster with Serve and its proxies: the one at `ray_address`, or an own one, which ends with the block."""
    _prepare_environment()
    if settings.ray_address:
        ray.init(settings.ray_address, namespace=APPLICATION, log_to_driver=False, logging_level=logging.WARNING)
        serve.start(**_proxies(settings))
        try:
            yield
        finally:
            ray.shutdown()
        return
    for name, port in (("GRPC_PORT", settings.grpc_port), ("HTTP_PORT", settings.http_port)):
        _check_free(name, port)
    folder = settings.ray_folder or Path(tempfile.mkdtemp(prefix="nvila-ray-"))
    try:
        ray.init(
            "local",
            namespace=APPLICATION,
            num_cpus=_reserved_cpus(settings),
            object_store_memory=settings.object_store_bytes,
            include_dashboard=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
            _node_ip_address="127.0.0.1",
        )
        serve.start(proxy_location="HeadOnly", **_proxies(settings))
        yield
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        if settings.ray_folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Start, say `ready`, serve until SIGTERM or SIGINT."""
    try:
        settings = Settings()  # type: ignore[call-arg]  # from the environment
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(("NVILA_DECODE", *map(str, problem["loc"]))).upper()
            print(f"{name}: {problem['msg']}", file=sys.stderr)  # noqa: T201  # before logging is configured
        return 2
    if not (settings.model / "config.json").is_file() and not (settings.model / "model" / "config.json").is_file():
        print("NVILA_DECODE_MODEL: the folder holds no config.json", file=sys.stderr)  # noqa: T201
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logs.configure(APPLICATION, level=settings.log_level, style=settings.log_style)
    logging.getLogger("ray").setLevel(logging.WARNING)
    with cluster(settings):
        try:
            serve.run_many(
                [
                    serve.RunTarget(metrics_application(), name=METRICS_APPLICATION, route_prefix="/metrics"),
                    serve.RunTarget(build(settings), name=APPLICATION, route_prefix=f"/{APPLICATION}"),
                ]
            )
        except RuntimeError as error:  # Serve's only word for a replica that cannot start
            _log.error("the application did not start", extra=fields(reason=str(error)))
            return 1
        _log.info("ready", extra=fields(grpc_port=settings.grpc_port, http_port=settings.http_port))
        if not _serve_until_told():
            _log.error("Ray's node died, and every replica with it")
            ray.shutdown()  # Serve has nobody left to stop
            return 1
        _log.info("stopping")
    return 0


def _serve_until_told() -> bool:
    """Until SIGTERM or SIGINT; False when no node of the cluster is left, so that whoever started this starts it anew.

    Ray has put its own handlers in place by now; ours end the process in order.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(_LOOK_EVERY_S):
        if not any(node["Alive"] for node in ray.nodes()):
            return False
    return True


def _prepare_environment() -> None:
    """What Ray reads from the environment and takes no argument for. Values that the operator has set win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # replicas serve people; Ray's own choice is 15
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; else a warning per replica


def _proxies(settings: Settings) -> dict[str, Any]:
    return {
        "http_options": HTTPOptions(host=settings.host, port=settings.http_port),
        "grpc_options": gRPCOptions(
            port=settings.grpc_port, grpc_servicer_functions=[SERVICER], enable_reflection=False
        ),
        "logging_config": _QUIET,
    }


def _reserved_cpus(settings: Settings) -> int:
    """Ray's own count of processor shares: enough for every replica, whatever this machine has."""
    return max(1, -int(-settings.max_replicas * settings.replica_cpus // 1))


def _check_free(name: str, port: int) -> None:
    """Ray's servers share ports with whoever allows it, so a second stack would get half of the calls."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections of an earlier run do not count
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            raise SystemExit(f"NVILA_DECODE_{name}: port {port} is in use") from None


if __name__ == "__main__":
    # From the module by its name: what Ray sends to its workers must not belong to `__main__`.
    from nvila.decode import app

    sys.exit(app.main())
