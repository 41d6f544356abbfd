"""How an error looks over HTTP: the one place where its class becomes a status, and OpenAI's error object."""

from __future__ import annotations

import json
import math
from typing import Any

from opentelemetry import trace
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nvila.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    ForbiddenURL,
    InvalidRequest,
    LimitExceeded,
    MediaUnavailable,
    NotFound,
    NvilaError,
    Overloaded,
    Unauthenticated,
    Unavailable,
    UnsupportedMedia,
)
from nvila.telemetry import names, tracing

_STATUS: dict[type[NvilaError], int] = {
    InvalidRequest: 422,
    UnsupportedMedia: 415,
    LimitExceeded: 413,
    ForbiddenURL: 403,
    Unauthenticated: 401,
    NotFound: 404,
    Conflict: 409,
    Overloaded: 429,
    Unavailable: 503,
    MediaUnavailable: 424,  # a 503 would say that the gateway is down, to balancers too
    DeadlineExceeded: 504,
    Cancelled: 499,
    NvilaError: 500,
}
_TYPE = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def status_of(error: NvilaError) -> int:
    return next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)


def error_object(status: int, *, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    kind = _TYPE.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_object(error: NvilaError) -> dict[str, Any]:
    return error_object(status_of(error), message=error.message, code=error.code, param=error.param)


def note_failure(error: NvilaError) -> None:
    """On the current span: its type; and that it failed, unless the client is to blame."""
    current = trace.get_current_span()
    if status_of(error) >= 500:
        tracing.mark_failed(current, error)
    else:
        current.set_attribute(names.ATTR_ERROR_TYPE, error.code)


def note_code(scope: Scope, code: str) -> None:
    """For the request's log line: how it failed, which a status that was sent before cannot say."""
    scope.setdefault("state", {})["code"] = code


def to_response(error: NvilaError) -> Response:
    headers = {}
    if error.retry_after_s is not None or isinstance(error, Overloaded | Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer, Basic realm="nvila: any user, the API key as password"'
    return json_response(status_of(error), to_object(error), headers)


def json_response(status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return _JsonResponse(status, content, headers)


class _JsonResponse(Response):
    """Notes the code of an error that it carries."""

    def __init__(self, status: int, content: dict[str, Any], headers: dict[str, str] | None) -> None:
        super().__init__(json.dumps(content), status, headers, "application/json")
        self._code: str = (content.get("error") or {}).get("code", "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._code:
            note_code(scope, self._code)
        await super().__call__(scope, receive, send)
