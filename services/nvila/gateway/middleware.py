"""What every HTTP request passes before its route: a name and a span, a key, and a bound on its body.

Plain ASGI, in this order from the outside. Nothing here holds a body or a response back.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from opentelemetry.trace import SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nvila.errors import Cancelled, InvalidRequest, LimitExceeded, NvilaError, Unauthenticated
from nvila.gateway.auth import ApiKeys
from nvila.gateway.http_errors import error_object, json_response, note_code, to_response
from nvila.telemetry import tracing
from nvila.telemetry.logs import fields

_log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/v1/health/live", "/v1/health/ready"})
"""Paths that need no key; they say nothing about requests or tenants."""
CONSOLE_FILES = "/console/"
"""What the console's page at `/` loads."""
_QUIET_PATHS = OPEN_PATHS | {"/metrics"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_LINGER_S = 1.0


class Named:
    """Gives a request its id (the client's `x-request-id`, or a new one) and its server span (a child of the client's
    `traceparent`), returns both, logs one line (with tenant, and the code of an error, also of one that came after the
    status), and answers for whatever nobody else did."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in _QUIET_PATHS:
            await self._answer(scope, receive, send, MutableHeaders())
        else:
            headers = Headers(scope=scope)
            parent = headers.get("traceparent", "")
            if not _TRACEPARENT.fullmatch(parent):
                parent = ""
            with tracing.span(scope["method"], parent=parent, kind=SpanKind.SERVER):
                given = headers.get("x-request-id", "")
                request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
                added = MutableHeaders({"x-request-id": request_id})
                if traceparent := tracing.current_traceparent():
                    added["traceparent"] = traceparent
                state = scope.setdefault("state", {})
                began = time.perf_counter()
                status = await self._answer(scope, receive, send, added)
                seconds = round(time.perf_counter() - began, 3)
                path = scope.get("raw_path", b"").decode(
                    "ascii", "replace"
                )  # as it came: a %0a must not end a log line
                told = {name: state[name] for name in ("tenant", "code") if name in state}
                line = {"request_id": request_id, "method": scope["method"], "path": path, "status": status, **told}
                _log.info("request", extra=fields(**line, seconds=seconds))

    async def _answer(self, scope: Scope, receive: Receive, send: Send, added: MutableHeaders) -> int:
        """The status that was sent, 499 when the client left before."""
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *added.raw]}
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            note_code(scope, Cancelled.code)
            return status or 499
        except Exception:
            note_code(scope, NvilaError.code)
            _log.exception("a request failed in a way nobody expected")
            if not status:
                failed = error_object(500, message="the gateway failed; its log says how", code=NvilaError.code)
                await json_response(500, failed)(scope, receive, send_named)
        return status


class KeyNeeded:
    """Refuses requests without a valid key, whatever their path; leaves the key's tenant in the request's state.

    Open besides health: the console's own files, which hold nothing; and reading by a signed link, which names its
    tenant (`ApiKeys.sign`).
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["method"], scope["path"]):
            try:
                tenant = self._tenant(scope)
            except Unauthenticated as error:
                await to_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str:
        authorization = Headers(scope=scope).get("authorization")
        query = scope.get("query_string", b"").decode("latin-1")
        if authorization is None and scope["method"] in ("GET", "HEAD") and "signature=" in query:
            return self._keys.signed_tenant(scope["path"], query)
        return self._keys.tenant(authorization)


def _is_open(method: str, path: str) -> bool:
    is_console = path == "/" or path.startswith(CONSOLE_FILES)
    return path in OPEN_PATHS or (is_console and method in ("GET", "HEAD"))


class BodyBounded:
    """Refuses bodies over `limit_bytes(path)`: by their Content-Length before anything is read, and by counting what
    really comes, since that header may be absent.

    Whenever an answer begins before the body was read whole, the connection is closed after it: nobody has to receive
    the rest. Then reading goes on for a moment, because closing on unread bytes would lose the answer on its way.
    """

    def __init__(self, app: ASGIApp, limit_bytes: Callable[[str], int]) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_bytes(scope["path"])
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        received = 0
        is_whole = declared == "0" and "transfer-encoding" not in headers
        closes = False

        async def receive_counted() -> Message:
            nonlocal received, is_whole
            message = await receive()
            is_whole = is_whole or message["type"] == "http.disconnect" or not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                raise LimitExceeded.of("body bytes", asked=received, limit=limit)
            return message

        async def send_closing(message: Message) -> None:
            nonlocal closes
            if message["type"] == "http.response.start" and not is_whole:
                closes = True
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            if message["type"] != "http.response.body" or not closes or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            await _linger(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        if not declared.isdecimal():
            await to_response(InvalidRequest("Content-Length is not a number"))(scope, receive, send_closing)
        elif int(declared) > limit:
            refusal = LimitExceeded.of("body bytes", asked=int(declared), limit=limit)
            await to_response(refusal)(scope, receive, send_closing)
        else:
            await self._app(scope, receive_counted, send_closing)


async def _linger(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body", False):
                pass
