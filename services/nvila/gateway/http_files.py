"""`/v1/files`: OpenAI's routes over the file store."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel

from nvila.errors import DeadlineExceeded, InvalidRequest
from nvila.gateway import multipart
from nvila.gateway.files import PURPOSES, StoredFile
from nvila.gateway.http_content import FileContent
from nvila.gateway.http_services import Having, HttpSettings, Tenant

PATH = "/v1/files"


class FileObject(BaseModel):
    """OpenAI's file object."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, file: StoredFile) -> FileObject:
        return cls(
            id=file.id,
            bytes=file.size_bytes,
            created_at=file.created_ns // 1_000_000_000,
            filename=file.filename,
            purpose=file.purpose,
        )


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def add_files(app: FastAPI, settings: HttpSettings) -> None:
    form = {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": list(PURPOSES)}},
    }

    @app.post(
        PATH,
        tags=["files"],
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}},
    )
    async def upload(request: Request, services: Having, tenant: Tenant) -> FileObject:
        """Keep an image or a video, to be asked about by its id."""
        services.files.check_space(int(request.headers.get("content-length", "0")))
        content_type = request.headers.get("content-type", "")
        async with services.uploads.permit(), services.scratch.spool(settings.upload_bytes, param="file") as spool:
            try:
                async with asyncio.timeout(settings.upload_s):
                    form = await multipart.receive(request.stream(), content_type, spool)
            except TimeoutError:
                raise DeadlineExceeded(f"the file did not arrive whole in {settings.upload_s:g} s") from None
            unknown = sorted(form.fields.keys() - {"purpose"})
            if unknown:
                raise InvalidRequest(f"{unknown[0][:64]}: there is no such field", param=unknown[0][:64])
            if "purpose" not in form.fields:
                raise InvalidRequest(f"purpose: missing, must be one of {', '.join(PURPOSES)}", param="purpose")
            kept = await services.files.add(tenant, form.file, filename=form.filename, purpose=form.fields["purpose"])
        return FileObject.of(kept)

    @app.get(PATH, tags=["files"])
    async def list_files(
        services: Having,
        tenant: Tenant,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> FileList:
        """The files of this key's tenant."""
        files, has_more = await services.files.list(tenant, limit=limit, after=after, order=order, purpose=purpose)
        return FileList(
            data=[FileObject.of(file) for file in files],
            has_more=has_more,
            first_id=files[0].id if files else None,
            last_id=files[-1].id if files else None,
        )

    @app.get(PATH + "/{file_id}", tags=["files"])
    async def get_file(file_id: str, services: Having, tenant: Tenant) -> FileObject:
        """One file's description."""
        return FileObject.of(await services.files.get(tenant, file_id))

    @app.get(PATH + "/{file_id}/content", tags=["files"], response_class=FileContent)
    async def get_content(file_id: str, services: Having, tenant: Tenant) -> FileContent:
        """One file's bytes, as they came. Ranges are understood."""
        file = await services.files.get(tenant, file_id)
        return FileContent(
            services.files.content_path(tenant, file_id),
            media_type="application/octet-stream",
            filename=file.filename,
            headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-store"},
        )

    @app.delete(PATH + "/{file_id}", tags=["files"])
    async def delete_file(file_id: str, services: Having, tenant: Tenant) -> Deleted:
        """Forget a file. Answers that are on their way still use it."""
        await services.files.delete(tenant, file_id)
        return Deleted(id=file_id)
