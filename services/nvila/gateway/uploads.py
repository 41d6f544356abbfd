"""Resumable uploads: files that arrive in pieces, over hours and over broken connections, and end as `/v1/files`.

`<folder>/<tenant>/<id>/` holds `content`, which only ever grows, and `meta.json`, which never changes. How far an
upload is, is the length of `content`: what was written before a kill counts, and nothing else has to agree with it. One
writer at a time, by a lock on a file in it that dies with its process; several gateways may share all of it.

The file's id is chosen when the upload begins. Finishing links the content into the file store, then leaves a `done` in
its place: a kill at any moment leaves either an upload that finishes when it is next looked at, or the file.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from nvila.errors import Conflict, DeadlineExceeded, InvalidRequest, LimitExceeded, NotFound, Overloaded, Unavailable
from nvila.gateway.files import FILE_PREFIX, PURPOSES, TENANT, FileStore, plain_name
from nvila.gateway.scratch import Scratch, Spooled
from nvila.locks import LOCK, lock_file

UPLOAD_PREFIX = "upload_"

_ID = re.compile(r"upload_[0-9a-f]{32}")
_FLUSH_BYTES = 256 << 10
_HEAD_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Upload:
    """`offset`: bytes that are here. `file_id`: of the file that it becomes; `is_done`: it has. `expires_at`: seconds
    since 1970, when it is forgotten if nothing more comes."""

    id: str
    size_bytes: int
    offset: int
    file_id: str
    filename: str
    purpose: str
    expires_at: float
    is_done: bool

    @property
    def is_whole(self) -> bool:
        return self.offset == self.size_bytes


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """`open`: most unfinished uploads of a tenant. `expiry_s`: how long one waits for its next byte before it is
    forgotten. `silence_s`: how long a connection may say nothing."""

    file_bytes: int
    open: int = 64
    expiry_s: float = 24 * 3600
    silence_s: float = 30


class Uploads:
    def __init__(self, folder: Path, files: FileStore, scratch: Scratch, limits: UploadLimits) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._files = files
        self._scratch = scratch
        self.limits = limits

    async def create(self, tenant: str, *, size_bytes: int, filename: str, purpose: str) -> Upload:
        """Raises `LimitExceeded`, `InvalidRequest`, `Overloaded` (too many unfinished ones) or `Unavailable` (no room),
        all before a byte is sent."""
        if size_bytes > self.limits.file_bytes:
            raise LimitExceeded.of("media bytes", asked=size_bytes, limit=self.limits.file_bytes, param="Upload-Length")
        if not size_bytes:
            raise InvalidRequest("the file is empty", param="Upload-Length")
        if purpose not in PURPOSES:
            raise InvalidRequest(
                f"purpose: {purpose[:64]!r} given, must be one of {', '.join(PURPOSES)}", param="purpose"
            )
        return await asyncio.to_thread(self._create, tenant, size_bytes, plain_name(filename), purpose)

    async def get(self, tenant: str, upload_id: str) -> Upload:
        """How far an upload is. One that has all its bytes but was killed before it became a file becomes one now.

        Raises `NotFound`; one that expired, or another tenant's, is not there.
        """
        upload = await asyncio.to_thread(self._read, self._upload_folder(tenant, upload_id))
        if upload.is_whole and not upload.is_done:
            with (
                suppress(Conflict),
                _locked(self._upload_folder(tenant, upload_id)),
            ):  # else another is just finishing it
                return await self._finish(tenant, upload)
        return upload

    async def append(self, tenant: str, upload_id: str, offset: int, body: AsyncIterable[bytes]) -> Upload:
        """Write what comes at `offset`. Whatever arrives is kept, however the body ends.

        Raises `Conflict` when the upload is not that far or is being written to, `LimitExceeded` for more bytes than
        were announced (none of the surplus is kept), `DeadlineExceeded` when the client falls silent.
        """
        folder = self._upload_folder(tenant, upload_id)
        with _locked(folder):
            upload = await asyncio.to_thread(self._read, folder)
            if offset != upload.offset:
                raise Conflict(f"Upload-Offset: {offset:,} given, this upload is at {upload.offset:,}")
            if not upload.is_whole:
                room = upload.size_bytes - offset
                self._files.check_space(room)
                with (folder / "content").open("ab", buffering=0) as content:
                    await _write(content, body, room, self.limits.silence_s)
                upload = await asyncio.to_thread(self._read, folder)
            return await self._finish(tenant, upload) if upload.is_whole else upload

    async def delete(self, tenant: str, upload_id: str) -> None:
        """Forget an upload. The file that it became stays."""
        folder = self._upload_folder(tenant, upload_id)
        await asyncio.to_thread(self._read, folder)
        await asyncio.to_thread(self._remove, folder)

    async def sweep(self) -> None:
        """Remove what expired, of all tenants."""
        await asyncio.to_thread(self._sweep)

    def _create(self, tenant: str, size_bytes: int, filename: str, purpose: str) -> Upload:
        waiting = [upload for upload in self._list(self._tenant_folder(tenant)) if not upload.is_whole]
        if len(waiting) >= self.limits.open:
            raise Overloaded(
                f"{len(waiting)} uploads are unfinished, the most that are kept; finish or delete one", retry_after_s=60
            )
        self._files.check_space(size_bytes + sum(upload.size_bytes - upload.offset for upload in waiting))
        upload_id = UPLOAD_PREFIX + secrets.token_hex(16)
        folder = self._upload_folder(tenant, upload_id)
        folder.parent.mkdir(exist_ok=True, mode=0o700)
        making = self._scratch.new_path()
        making.mkdir(mode=0o700)
        meta = _Meta(
            size_bytes=size_bytes, filename=filename, purpose=purpose, file_id=FILE_PREFIX + secrets.token_hex(16)
        )
        (making / "content").touch(mode=0o600)
        with (making / "meta.json").open("x") as file:
            json.dump(asdict(meta), file)
            file.flush()
            os.fsync(file.fileno())
        making.rename(folder)
        return self._read(folder)

    def _read(self, folder: Path) -> Upload:
        try:
            meta = _Meta(**json.loads((folder / "meta.json").read_bytes()))
            is_done = (folder / "done").exists()
            content = (folder / ("done" if is_done else "content")).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise _missing() from None
        expires_at = content.st_mtime + self.limits.expiry_s
        if expires_at < time.time():
            raise _missing()
        return Upload(
            id=folder.name,
            size_bytes=meta.size_bytes,
            offset=meta.size_bytes if is_done else content.st_size,
            file_id=meta.file_id,
            filename=meta.filename,
            purpose=meta.purpose,
            expires_at=expires_at,
            is_done=is_done,
        )

    def _list(self, folder: Path) -> list[Upload]:
        found = []
        for name in _names(folder):
            with suppress(NotFound):  # deleted or expired meanwhile
                found.append(self._read(folder / name))
        return found

    async def _finish(self, tenant: str, upload: Upload) -> Upload:
        folder = self._upload_folder(tenant, upload.id)
        if not upload.is_done:
            try:
                await self._files.get(tenant, upload.file_id)
            except NotFound:
                link = self._scratch.new_path()
                try:
                    spooled = await asyncio.to_thread(_link, folder / "content", link)
                    await self._files.add(
                        tenant, spooled, filename=upload.filename, purpose=upload.purpose, file_id=upload.file_id
                    )
                finally:
                    link.unlink(missing_ok=True)
            (folder / "done").touch(mode=0o600)
            (folder / "content").unlink(missing_ok=True)
        return replace(upload, is_done=True)

    def _remove(self, folder: Path) -> None:
        aside = self._scratch.new_path()
        with _locked(folder):
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)  # without the lock: NFS keeps a name of the file while it is open

    def _sweep(self) -> None:
        for tenant in _names(self._folder):
            for name in _names(self._folder / tenant):
                folder = self._folder / tenant / name
                try:
                    self._read(folder)
                except NotFound:
                    with suppress(NotFound, Conflict):
                        self._remove(folder)

    def _tenant_folder(self, tenant: str) -> Path:
        assert TENANT.fullmatch(tenant), "tenants are checked where keys are read"
        return self._folder / tenant

    def _upload_folder(self, tenant: str, upload_id: str) -> Path:
        if not _ID.fullmatch(upload_id):
            raise _missing()
        return self._tenant_folder(tenant) / upload_id


@dataclass(frozen=True, kw_only=True)
class _Meta:
    size_bytes: int
    filename: str
    purpose: str
    file_id: str


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        lock = lock_file(folder / LOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing() from None
    if lock is None:
        raise Conflict("this upload is being written to by another request", retry_after_s=1)
    try:
        yield
    finally:
        os.close(lock)


async def _write(content: BinaryIO, body: AsyncIterable[bytes], room: int, silence_s: float) -> None:
    pending = bytearray()
    pieces = aiter(body)
    try:
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    piece = await anext(pieces, None)
            except TimeoutError:
                raise DeadlineExceeded(f"no byte came for {silence_s:g} s; go on from where it is") from None
            if piece is None:
                break
            if len(piece) > room - len(pending):
                raise LimitExceeded("the body is longer than what is missing of the announced Upload-Length")
            pending += piece
            if len(pending) >= _FLUSH_BYTES:
                flushed, pending = pending, bytearray()
                room -= len(flushed)
                await _to_the_end(_flush, content, flushed)
    finally:  # the client left: what came is still where the next try begins
        _flush(content, pending)
        await _to_the_end(os.fsync, content.fileno())


async def _to_the_end(work: Callable[..., object], *args: object) -> None:
    """In a thread, waited for even when this task is cancelled: the next piece must not overtake this one."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


def _flush(content: BinaryIO, data: bytearray) -> None:
    try:
        with memoryview(data) as left:
            written = 0
            while written < len(left):
                written += content.write(left[written:])
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unavailable("the server's disk is full") from None


def _link(content: Path, link: Path) -> Spooled:
    try:
        os.link(content, link)
    except FileNotFoundError:
        raise _missing() from None
    digest = blake3().update_mmap(link)
    with link.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return Spooled(path=link, size_bytes=link.stat().st_size, digest=digest.digest(), head=head)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _missing() -> NotFound:
    return NotFound("there is no such upload, or it expired", param="upload_id")
