"""What every gRPC call passes: its server span, and the one place where an error becomes a status."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from opentelemetry.trace import SpanKind

from nvila.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    ForbiddenURL,
    InvalidRequest,
    MediaUnavailable,
    NotFound,
    NvilaError,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from nvila.telemetry import tracing

_STATUS: dict[type[NvilaError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ForbiddenURL: grpc.StatusCode.PERMISSION_DENIED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    MediaUnavailable: grpc.StatusCode.FAILED_PRECONDITION,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    NvilaError: grpc.StatusCode.INTERNAL,
}


@asynccontextmanager
async def answering(context: grpc.aio.ServicerContext, service: str, method: str) -> AsyncIterator[None]:
    """The call's server span; an error becomes a status.

    Trailing metadata: `nvila-error` (the code of nvila.errors), `nvila-param`, `retry-after-s`.
    """
    with tracing.span(f"{service}/{method}", parent=header(context, "traceparent"), kind=SpanKind.SERVER) as current:
        try:
            yield
        except NvilaError as error:
            tracing.mark_failed(current, error)
            code = next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)
            about = [("nvila-error", error.code)]
            if error.param and error.param.isascii():
                about.append(("nvila-param", error.param))
            if error.retry_after_s is not None:
                about.append(("retry-after-s", f"{error.retry_after_s:g}"))
            await context.abort(code, error.message, tuple(about))


def header(context: grpc.aio.ServicerContext, name: str) -> str:
    return next((value for key, value in context.invocation_metadata() or () if key == name), "")
