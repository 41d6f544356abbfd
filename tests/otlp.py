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


_WITHIN_S = 30.0
"""For spans to come: they are sent 0.2 s after their end, by processes that share two cores with all else."""


class OtlpReceiver:
    """`with OtlpReceiver() as receiver:`; `receiver.environment` makes a process send its spans here."""

    def __init__(self) -> None:
        self._spans: list[ReceivedSpan] = []
        self._errors: list[str] = []
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                try:
                    body = self.rfile.read(int(self.headers["Content-Length"]))
                    if self.headers.get("Content-Encoding") == "gzip":
                        body = gzip.decompress(body)
                    is_json = self.headers.get("Content-Type") == "application/json"  # Triton's exporter
                    receiver._take(_from_json(body) if is_json else ExportTraceServiceRequest.FromString(body))
                except Exception as error:  # told by whoever waits: nobody reads a thread's traceback
                    receiver._errors.append(f"{type(error).__name__}: {error}")
                    raise
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

    def wait_for(self, trace_id: str, caller: str, services: set[str]) -> list[ReceivedSpan]:
        """The trace, as soon as all `services` have sent spans of it, all parents are there, and a second was calm.

        caller: the id of the span that sent the request and is sent by nobody; empty when the trace begins here.
        """
        until, count, calm_since = time.monotonic() + _WITHIN_S, -1, 0.0
        while time.monotonic() < until:
            spans = self.trace(trace_id)
            if len(spans) != count:
                count, calm_since = len(spans), time.monotonic()
            has_parents = {span.parent_id for span in spans} <= {caller, *(span.span_id for span in spans)}
            is_all_there = has_parents and services <= {span.service for span in spans}
            if is_all_there and time.monotonic() - calm_since > 1.0:
                return spans
            time.sleep(0.05)
        raise self._missing(f"the trace {trace_id} with spans of {sorted(services)}")

    def wait_for_span(self, span_id: str) -> ReceivedSpan:
        """One span, of whatever trace."""
        until = time.monotonic() + _WITHIN_S
        while time.monotonic() < until:
            with self._lock:
                found = [span for span in self._spans if span.span_id == span_id]
            if found:
                return found[0]
            time.sleep(0.05)
        raise self._missing(f"the span {span_id}")

    def _missing(self, expected: str) -> AssertionError:
        with self._lock:
            last = [f"{one.trace_id} {one.service} {one.name} <- {one.parent_id or None}" for one in self._spans[-30:]]
        lines = "\n".join(last)
        return AssertionError(
            f"{expected} did not come within {_WITHIN_S:g} s; requests that failed: {self._errors}; last came:\n{lines}"
        )

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
