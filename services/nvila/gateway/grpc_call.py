"""What every gRPC call passes: its server span, its log line, and the one place where an error becomes a status."""

from __future__ import annotations

import asyncio
import logging
import time
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
from nvila.gateway.auth import ApiKeys
from nvila.telemetry import tracing
from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)

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
async def answering(context: grpc.aio.ServicerContext, keys: ApiKeys, service: str, method: str) -> AsyncIterator[str]:
    """The call's server span and its log line; gives the tenant. An error becomes a status.

    Trailing metadata: `nvila-error` (the code of nvila.errors), `nvila-param`, `retry-after-s`.
    """
    began = time.perf_counter()
    line = {"method": "gRPC", "path": f"/{service}/{method}", "status": grpc.StatusCode.OK.name}
    with tracing.span(f"{service}/{method}", parent=header(context, "traceparent"), kind=SpanKind.SERVER) as current:
        try:
            line["tenant"] = keys.tenant(header(context, "authorization"))
            yield line["tenant"]
        except NvilaError as error:
            tracing.mark_failed(current, error)
            code = next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)
            line |= {"status": code.name, "code": error.code}
            about = [("nvila-error", error.code)]
            if error.param and error.param.isascii():
                about.append(("nvila-param", error.param))
            if error.retry_after_s is not None:
                about.append(("retry-after-s", f"{error.retry_after_s:g}"))
            await context.abort(code, error.message, tuple(about))
        except asyncio.CancelledError:
            line |= {"status": grpc.StatusCode.CANCELLED.name, "code": Cancelled.code}
            raise
        except Exception:
            line |= {"status": grpc.StatusCode.UNKNOWN.name, "code": NvilaError.code}
            raise
        finally:
            _log.info("request", extra=fields(**line, seconds=round(time.perf_counter() - began, 3)))


def header(context: grpc.aio.ServicerContext, name: str) -> str:
    return next((value for key, value in context.invocation_metadata() or () if key == name), "")
