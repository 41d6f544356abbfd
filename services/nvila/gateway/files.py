"""Uploaded files: kept on disk, per tenant, until they are deleted.

`<folder>/<tenant>/<id>/` holds `content` and `meta.json`. A file comes into being by one rename of its whole folder and
goes by another, so that whatever happens in between it is there whole or not at all; several gateways may share the
folder. Nothing of what a client says becomes part of a path.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from nvila.errors import InvalidRequest, NotFound, Unavailable
from nvila.gateway.scratch import Scratch, Spooled
from nvila.types import MediaKind

PURPOSES = ("vision", "user_data", "assistants")
FILE_PREFIX = "file-"
TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
"""How a tenant may be called: its name is that of a folder."""

_ID = re.compile(r"file-[0-9a-f]{32}")
_LONGEST_NAME = 255
_SPARE_BYTES = 256 << 20
"""Disk space that uploads leave free."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """`digest`: BLAKE3 of the bytes, hex. `created_ns`: since 1970. `kind`: what the first bytes look like."""

    id: str
    filename: str
    purpose: str
    kind: MediaKind
    size_bytes: int
    digest: str
    created_ns: int


@dataclass(frozen=True, kw_only=True)
class OpenedFile:
    """A stored file in use: a name of its own for the bytes, which stay until the context ends, deleted or not."""

    path: Path
    size_bytes: int
    digest: bytes


class FileStore:
    def __init__(self, folder: Path, scratch: Scratch) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._scratch = scratch

    def check_space(self, size_bytes: int) -> None:
        """Raise `Unavailable` when a file of this size would fill the disk."""
        free = shutil.disk_usage(self._folder).free
        if size_bytes + _SPARE_BYTES > free:
            raise Unavailable("there is no room for this file on the server's disk")

    async def add(
        self, tenant: str, content: Spooled, *, filename: str, purpose: str, file_id: str | None = None
    ) -> StoredFile:
        """Keep a spooled file, which is moved. `file_id`: one that was promised before.

        Raises `InvalidRequest` for an empty one or an unknown purpose."""
        if purpose not in PURPOSES:
            raise InvalidRequest(
                f"purpose: {purpose[:64]!r} given, must be one of {', '.join(PURPOSES)}", param="purpose"
            )
        if not content.size_bytes:
            raise InvalidRequest("the file is empty", param="file")
        file = StoredFile(
            id=file_id or FILE_PREFIX + secrets.token_hex(16),
            filename=plain_name(filename),
            purpose=purpose,
            kind=look_at(content.head),
            size_bytes=content.size_bytes,
            digest=content.digest.hex(),
            created_ns=time.time_ns(),
        )
        await asyncio.to_thread(self._keep, self._tenant_folder(tenant) / file.id, content.path, file)
        return file

    async def get(self, tenant: str, file_id: str) -> StoredFile:
        """Raises `NotFound`; a file of another tenant is not there."""
        return await asyncio.to_thread(_read, self._file_folder(tenant, file_id))

    async def list(
        self, tenant: str, *, limit: int, after: str | None, order: Literal["asc", "desc"], purpose: str | None
    ) -> tuple[list[StoredFile], bool]:
        """Files by age, and whether there are more. `after`: the last id of the page before."""
        files = await asyncio.to_thread(_read_all, self._tenant_folder(tenant))
        files = [file for file in files if purpose is None or file.purpose == purpose]
        files.sort(key=lambda file: (file.created_ns, file.id), reverse=order == "desc")
        if after is not None:
            ids = [file.id for file in files]
            if after not in ids:
                raise InvalidRequest(f"after: there is no file {after[:64]!r}", param="after")
            files = files[ids.index(after) + 1 :]
        return files[:limit], len(files) > limit

    async def delete(self, tenant: str, file_id: str) -> None:
        folder = self._file_folder(tenant, file_id)
        await asyncio.to_thread(_remove, folder, self._scratch.new_path())

    def content_path(self, tenant: str, file_id: str) -> Path:
        return self._file_folder(tenant, file_id) / "content"

    @asynccontextmanager
    async def open(self, tenant: str, file_id: str) -> AsyncIterator[OpenedFile]:
        file = await self.get(tenant, file_id)
        path = self._scratch.new_path()
        try:
            os.link(self.content_path(tenant, file_id), path)
        except FileNotFoundError:
            raise _missing() from None
        try:
            yield OpenedFile(path=path, size_bytes=file.size_bytes, digest=bytes.fromhex(file.digest))
        finally:
            path.unlink(missing_ok=True)

    def _tenant_folder(self, tenant: str) -> Path:
        assert TENANT.fullmatch(tenant), "tenants are checked where keys are read"
        return self._folder / tenant

    def _file_folder(self, tenant: str, file_id: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise _missing()
        return self._tenant_folder(tenant) / file_id

    def _keep(self, folder: Path, content: Path, file: StoredFile) -> None:
        folder.parent.mkdir(exist_ok=True, mode=0o700)
        making = self._scratch.new_path()
        making.mkdir(mode=0o700)
        content.rename(making / "content")
        with (making / "meta.json").open("x") as meta:
            json.dump(asdict(file), meta)
            meta.flush()
            os.fsync(meta.fileno())
        making.rename(folder)


def _missing() -> NotFound:
    return NotFound("there is no such file", param="file_id")


def _read(folder: Path) -> StoredFile:
    try:
        plain = json.loads((folder / "meta.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise _missing() from None
    return StoredFile(**{**plain, "kind": MediaKind(plain["kind"])})


def _read_all(folder: Path) -> list[StoredFile]:
    found = []
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    for name in names:
        try:
            found.append(_read(folder / name))
        except NotFound:
            continue  # deleted meanwhile
    return found


def _remove(folder: Path, aside: Path) -> None:
    try:
        folder.rename(aside)
    except FileNotFoundError:
        raise _missing() from None
    shutil.rmtree(aside, ignore_errors=True)


def plain_name(filename: str) -> str:
    """A client's file name without folders, control and invisible characters; only ever shown, never used as a path."""
    name = PurePosixPath(filename.replace("\\", "/")).name
    name = "".join(char for char in name if unicodedata.category(char)[0] != "C").strip()
    return name[:_LONGEST_NAME] if name not in ("", ".", "..") else "upload"


_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")


def look_at(head: bytes) -> MediaKind:
    """Whether a file's first bytes are an image's; anything else is taken for a video, and checked when opened."""
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_heif = head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS
    return MediaKind.IMAGE if head.startswith(_IMAGE_STARTS) or is_webp or is_heif else MediaKind.VIDEO
