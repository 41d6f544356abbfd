"""Answers that the libraries below would give as plain text, in the shape of every other error."""

from __future__ import annotations

import json

import h11
from starlette.datastructures import Headers
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nvila.gateway.http_errors import error_object, json_response


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


class Http(H11Protocol):
    """What is no HTTP/1.1 at all is told so by an error object, too."""

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(error_object(400, message=msg, code="invalid_request")).encode()
        headers = [("content-type", "application/json"), ("content-length", f"{len(body)}"), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body)):
            self.transport.write(self.conn.send(event))
        self.transport.close()
