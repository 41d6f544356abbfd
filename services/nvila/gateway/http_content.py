"""Answers that the libraries below would give as plain text, in the shape of every other error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import h11
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nvila.gateway.http_errors import error_object, json_response
from nvila.gateway.playing import Stored

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class FileContent(FileResponse):
    """A file's bytes, whole or by `Range`; a range that cannot be had is an error object."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: Message | None = None

        async def pass_on(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                refused = message
            elif refused is None:
                await send(message)
            else:
                status = refused["status"]
                size = Headers(raw=refused["headers"]).get("content-range")
                said = message["body"].decode() or f"the file has no such bytes ({size})"
                content = error_object(status, message=f"Range: {said}", code="invalid_request", param="Range")
                await json_response(status, content, {"Content-Range": size} if size else None)(scope, receive, send)

        await super().__call__(scope, receive, pass_on)


def stored_content(stored: Stored, asked: str | None, headers: Mapping[str, str]) -> Response:
    """A file of the store, whole or by a `Range` of one stretch; several stretches at once are answered with all."""
    told = {**headers, "Accept-Ranges": "bytes"}
    size = stored.size_bytes
    match = _RANGE.fullmatch(asked.strip()) if asked else None
    if match is None or match[0] == "bytes=-":
        told["Content-Length"] = str(size)
        return StreamingResponse(stored.blocks(0, size), media_type=stored.media_type, headers=told)
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first > last:
        gone = f"bytes */{size}"
        content = error_object(
            416, message=f"Range: the file has no such bytes ({gone})", code="invalid_request", param="Range"
        )
        return json_response(416, content, {"Content-Range": gone})
    told |= {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": str(last - first + 1)}
    return StreamingResponse(stored.blocks(first, last + 1), 206, media_type=stored.media_type, headers=told)


class Http(H11Protocol):
    """What is no HTTP/1.1 at all is told so by an error object, too."""

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(error_object(400, message=msg, code="invalid_request")).encode()
        headers = [("content-type", "application/json"), ("content-length", f"{len(body)}"), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body)):
            self.transport.write(self.conn.send(event))
        self.transport.close()
