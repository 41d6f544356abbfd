"""One trace per request, across every process: spans by OpenTelemetry, context by W3C `traceparent`.

A process calls `configure` once at start. Exporting is switched on by the standard variables
(`OTEL_EXPORTER_OTLP_ENDPOINT` or `…_TRACES_ENDPOINT`, `OTEL_EXPORTER_OTLP_PROTOCOL` grpc or http/protobuf,
`OTEL_SDK_DISABLED`, `OTEL_TRACES_SAMPLER`, …), which the SDK itself reads; without an endpoint spans are made and
propagated, and go nowhere. Content (prompts, answers) enters a span only when
`OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` is true.

Between our processes the context travels as a `traceparent` string in our own messages: Redis has no headers, Ray Serve
drops them, and Triton reads them by luck (vision/triton.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from nvila.errors import Cancelled, NvilaError
from nvila.telemetry.names import ATTR_ERROR_TYPE

_PROPAGATOR = TraceContextTextMapPropagator()
_TRACER = trace.get_tracer("nvila")


def configure(service: str, version: str) -> TracerProvider:
    """Make this process's tracer provider. `service`: gateway, vision or decode (OTEL_SERVICE_NAME wins).

    Call `provider.shutdown()` at the end, so that the last spans are sent.
    """
    resource = Resource.create(
        {SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", f"nvila-{service}"), SERVICE_VERSION: version}
    )
    provider = TracerProvider(resource=resource)
    exporter = _exporter()
    if exporter is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider


def traces_endpoint() -> str | None:
    """Where spans go, or None when no OTLP endpoint is configured."""
    return os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")


def samples_all() -> bool:
    """Whether every trace that begins here is sampled, as this environment's variables say."""
    last_trace_id = (1 << 128) - 1  # a share of all traces is those with the lowest ids
    return TracerProvider().sampler.should_sample(None, last_trace_id, "").decision == Decision.RECORD_AND_SAMPLE


def captures_content() -> bool:
    """Whether prompts and answers may be recorded in spans."""
    return os.environ.get("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "").lower() == "true"


def _exporter() -> SpanExporter | None:
    if traces_endpoint() is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"
    )
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()


@contextmanager
def span(
    name: str, *, parent: str = "", kind: SpanKind = SpanKind.INTERNAL, **attributes: AttributeValue
) -> Iterator[Span]:
    """A span around a block. `parent`: a `traceparent` from another process; empty: the current span.

    Attribute names are written with `__` for the dot: `span("encode", nvila__vision__tiles=4)`; or set later through
    `span.set_attribute` with a name from `names`. An exception marks the span failed with its type, not its text.
    """
    context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
    dotted = {key.replace("__", "."): value for key, value in attributes.items()}
    with _TRACER.start_as_current_span(
        name, context=context, kind=kind, attributes=dotted, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except BaseException as error:
            mark_failed(current, error)
            raise


def mark_failed(current: Span, error: BaseException) -> None:
    """Set a span's error status and type. A cancelled request is not an error (DESIGN §2.4)."""
    code = error.code if isinstance(error, NvilaError) else type(error).__name__
    if not isinstance(error, Cancelled | GeneratorExit) and code != "CancelledError":
        current.set_status(Status(StatusCode.ERROR))
    current.set_attribute(ATTR_ERROR_TYPE, code)


def record(name: str, *, parent: str, start_ns: int, end_ns: int, **attributes: AttributeValue) -> None:
    """A span that is already over, from wall-clock times (`time.time_ns()`): for stages timed outside this thread."""
    dotted = {key.replace("__", "."): value for key, value in attributes.items()}
    context = _PROPAGATOR.extract({"traceparent": parent}) if parent else None
    _TRACER.start_span(name, context=context, start_time=start_ns, attributes=dotted).end(end_ns)


def current_traceparent() -> str:
    """The current span's W3C `traceparent`, to be carried to the next process; empty outside any span."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def is_sampled() -> bool:
    """Whether the current span is kept; False outside any span."""
    return trace.get_current_span().get_span_context().trace_flags.sampled


def link_to(current: Span, traceparent: str) -> None:
    """Link a span to one that is no ancestor of it: a cached token record's writer, Triton's span of the same call."""
    linked = trace.get_current_span(_PROPAGATOR.extract({"traceparent": traceparent})).get_span_context()
    if linked.is_valid:
        current.add_link(linked)


@contextmanager
def continuing(traceparent: str) -> Iterator[None]:
    """Make a remote span the current one: spans inside become its children."""
    token = otel_context.attach(_PROPAGATOR.extract({"traceparent": traceparent}))
    try:
        yield
    finally:
        otel_context.detach(token)
