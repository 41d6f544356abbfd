"""`/v1/uploads`: resumable uploads by tus (tus.io), version 1.0.0: core, creation, termination, expiration.

Any tus client works. An upload that has all its bytes is a file of `/v1/files`; the answers name it in `Nvila-File-Id`.
"""

from __future__ import annotations

import base64
import binascii
from email.utils import formatdate

from fastapi import FastAPI, Request
from starlette.responses import Response

from nvila.errors import InvalidRequest, LimitExceeded, UnsupportedMedia
from nvila.gateway.http_errors import error_object, json_response
from nvila.gateway.http_services import Having, Tenant
from nvila.gateway.uploads import Upload

PATH = "/v1/uploads"

_VERSION = "1.0.0"
_EXTENSIONS = "creation,termination,expiration"
_CONTENT_TYPE = "application/offset+octet-stream"
_LONGEST_METADATA_CHARS = 4096


def add_uploads(app: FastAPI) -> None:
    headers = {
        name: {"description": text, "schema": {"type": "string"}}
        for name, text in (
            ("Location", "Of the upload."),
            ("Upload-Offset", "Bytes that are here."),
            ("Upload-Length", "Bytes of the whole file."),
            ("Upload-Expires", "When it is forgotten if nothing more comes."),
            ("Nvila-File-Id", "The file of `/v1/files` that it has become."),
        )
    }

    def answers(status: int, *names: str) -> dict[int | str, dict[str, object]]:
        return {status: {"description": "Done.", "headers": {name: headers[name] for name in names}}}

    @app.options(PATH, tags=["uploads"], status_code=204, responses={204: {"description": "In its headers."}})
    async def describe(services: Having, tenant: Tenant) -> Response:
        """What of tus is understood, and the largest file."""
        most = services.resumable.limits.file_bytes
        return Response(
            status_code=204,
            headers={
                "Tus-Resumable": _VERSION,
                "Tus-Version": _VERSION,
                "Tus-Extension": _EXTENSIONS,
                "Tus-Max-Size": str(most),
            },
        )

    @app.post(
        PATH,
        tags=["uploads"],
        status_code=201,
        responses=answers(201, "Location", "Upload-Expires"),
        openapi_extra=_parameters(
            ("Tus-Resumable", "1.0.0."),
            ("Upload-Length", "Bytes of the whole file."),
            ("Upload-Metadata", "tus metadata: `filename` and, if not `vision`, `purpose`."),
        ),
    )
    async def create(request: Request, services: Having, tenant: Tenant) -> Response:
        """Announce a file. Its bytes follow by PATCH at the address in `Location`."""
        if refused := _other_version(request):
            return refused
        metadata = _metadata(request.headers.get("upload-metadata", ""))
        upload = await services.resumable.create(
            tenant,
            size_bytes=_number(request, "Upload-Length"),
            filename=metadata.get("filename", ""),
            purpose=metadata.get("purpose") or "vision",
        )
        return _answer(201, upload, {"Location": f"{PATH}/{upload.id}"})

    @app.head(
        PATH + "/{upload_id}",
        tags=["uploads"],
        responses=answers(200, "Upload-Offset", "Upload-Length", "Upload-Expires", "Nvila-File-Id"),
        openapi_extra=_parameters(("Tus-Resumable", "1.0.0.")),
    )
    async def look(upload_id: str, request: Request, services: Having, tenant: Tenant) -> Response:
        """How far an upload is."""
        if refused := _other_version(request):
            return refused
        upload = await services.resumable.get(tenant, upload_id)
        return _answer(200, upload, {"Upload-Length": str(upload.size_bytes), "Cache-Control": "no-store"})

    @app.patch(
        PATH + "/{upload_id}",
        tags=["uploads"],
        status_code=204,
        responses=answers(204, "Upload-Offset", "Upload-Expires", "Nvila-File-Id"),
        openapi_extra={
            **_parameters(("Tus-Resumable", "1.0.0."), ("Upload-Offset", "Where these bytes begin.")),
            "requestBody": {
                "required": True,
                "content": {_CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}},
            },
        },
    )
    async def append(upload_id: str, request: Request, services: Having, tenant: Tenant) -> Response:
        """Send bytes from `Upload-Offset` on, as many as get through; whatever arrived is kept."""
        if refused := _other_version(request):
            return refused
        if request.headers.get("content-type") != _CONTENT_TYPE:
            raise UnsupportedMedia(f"Content-Type: must be {_CONTENT_TYPE}")
        offset = _number(request, "Upload-Offset")
        announced = int(request.headers.get("content-length", "0"))
        async with services.uploads.permit():
            before = await services.resumable.get(tenant, upload_id)
            if offset == before.offset and announced > before.size_bytes - offset:
                left = before.size_bytes - offset
                raise LimitExceeded.of("bytes left of this upload", asked=announced, limit=left, param="Content-Length")
            upload = await services.resumable.append(tenant, upload_id, offset, request.stream())
        return _answer(204, upload, {})

    @app.delete(
        PATH + "/{upload_id}",
        tags=["uploads"],
        status_code=204,
        openapi_extra=_parameters(("Tus-Resumable", "1.0.0.")),
        responses={204: {"description": "Gone."}},
    )
    async def delete(upload_id: str, request: Request, services: Having, tenant: Tenant) -> Response:
        """Forget an upload; the file that it has become stays."""
        if refused := _other_version(request):
            return refused
        await services.resumable.delete(tenant, upload_id)
        return Response(status_code=204, headers={"Tus-Resumable": _VERSION})


def _answer(status: int, upload: Upload, headers: dict[str, str]) -> Response:
    said = {
        "Tus-Resumable": _VERSION,
        "Upload-Offset": str(upload.offset),
        "Upload-Expires": formatdate(upload.expires_at, usegmt=True),
    }
    if upload.is_done:
        said["Nvila-File-Id"] = upload.file_id
    return Response(status_code=status, headers={**said, **headers})


def _other_version(request: Request) -> Response | None:
    given = request.headers.get("tus-resumable", "")
    if given == _VERSION:
        return None
    message = f"Tus-Resumable: {given[:64]!r} given, must be {_VERSION}"
    content = error_object(412, message=message, code="invalid_request", param="Tus-Resumable")
    return json_response(412, content, {"Tus-Version": _VERSION, "Tus-Resumable": _VERSION})


def _number(request: Request, name: str) -> int:
    given = request.headers.get(name, "")
    if not (given.isascii() and given.isdecimal() and len(given) < 16):
        raise InvalidRequest(f"{name}: {given[:64]!r} given, must be a number of bytes", param=name)
    return int(given)


def _metadata(header: str) -> dict[str, str]:
    """`name base64, name base64, …`; a value may be missing."""
    if len(header) > _LONGEST_METADATA_CHARS:
        raise LimitExceeded.of(
            "characters of Upload-Metadata", asked=len(header), limit=_LONGEST_METADATA_CHARS, param="Upload-Metadata"
        )
    found = {}
    for pair in header.split(",") if header.strip() else ():
        name, _, value = pair.strip().partition(" ")
        try:
            found[name] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise InvalidRequest(
                f"Upload-Metadata: the value of {name[:64]!r} is not base64 of UTF-8", param="Upload-Metadata"
            ) from None
    return found


def _parameters(*headers: tuple[str, str]) -> dict[str, object]:
    return {
        "parameters": [
            {"name": name, "in": "header", "required": name != "Upload-Metadata", "description": text}
            | {"schema": {"type": "string"}}
            for name, text in headers
        ]
    }
