"""An OTLP receiver: real OTLP over HTTP, protobuf and JSON, on a thread, for whoever looks at spans."""

from __future__ import annotations

import base64
import gzip
import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class ReceivedSpan:
    """Times are wall-clock nanoseconds; ids are hex, `parent_id` is empty for a root. `links` are span ids."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, object]
    links: tuple[str, ...]
    is_error: bool

    @property
    def ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


class OtlpReceiver:
    """`with OtlpReceiver() as receiver:`; `receiver.environment` makes a process send its spans here."""

    def __init__(self) -> None:
        self._spans: list[ReceivedSpan] = []
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                is_json = self.headers.get("Content-Type") == "application/json"  # Triton's exporter
                receiver._take(_from_json(body) if is_json else ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet: the tests look at spans, not at requests."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """What has come so far of one trace, by start."""
        with self._lock:
            spans = [span for span in self._spans if span.trace_id == trace_id]
        return sorted(spans, key=lambda span: span.start_ns)

    def wait_for(self, trace_id: str, services: set[str], within_s: float = 15.0) -> list[ReceivedSpan]:
        """The trace, as soon as all `services` have sent spans of it and no more came for a second."""
        until, count, calm_since = time.monotonic() + within_s, -1, 0.0
        while time.monotonic() < until:
            spans = self.trace(trace_id)
            if len(spans) != count:
                count, calm_since = len(spans), time.monotonic()
            if services <= {span.service for span in spans} and time.monotonic() - calm_since > 1.0:
                return spans
            time.sleep(0.05)
        came = sorted({span.service for span in self.trace(trace_id)})
        raise AssertionError(f"spans of {sorted(services)} expected within {within_s} s, came: {came}")

    def _take(self, request: ExportTraceServiceRequest) -> None:
        taken = [
            ReceivedSpan(
                service=next(
                    (a.value.string_value for a in resource.resource.attributes if a.key == "service.name"), ""
                ),
                name=span.name,
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                start_ns=span.start_time_unix_nano,
                end_ns=span.end_time_unix_nano,
                attributes={a.key: _plain(a.value) for a in span.attributes},
                links=tuple(link.span_id.hex() for link in span.links),
                is_error=span.status.code == 2,
            )
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans.extend(taken)


def _from_json(body: bytes) -> ExportTraceServiceRequest:
    """OTLP's JSON is protobuf's, except that ids are hex and not base64."""
    record = json.loads(body)
    for resource in record["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                for name in ("traceId", "spanId", "parentSpanId"):
                    span[name] = base64.b64encode(bytes.fromhex(span.get(name, ""))).decode()
    return json_format.ParseDict(record, ExportTraceServiceRequest(), ignore_unknown_fields=True)


def _plain(value: object) -> object:
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]
    if kind == "array_value":
        return [_plain(one) for one in value.array_value.values]  # type: ignore[attr-defined]
    return getattr(value, kind) if kind else None
