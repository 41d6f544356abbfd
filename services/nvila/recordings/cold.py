"""What must outlive Redis: token records and source segments, in one folder of a local disk or an object store.

`tokens/<first two digits>/<key>`: one file per record: 4 bytes with the manifest's length (little endian), the
manifest, the payload (cache/codec.py). A key holds its tenant (cache/keys.py), so tenants share no record.
`segments/<recording>/<name>`: files as they came. Files appear whole or not at all: written beside and renamed on a
local disk, one PUT on an object store. Names come from digests and our own ids, never from a client.

Reading never fails: a record that is missing, cut off, corrupt or of another model is None, and whoever asked encodes
it again. Writing does: a worker must not believe that tokens are kept that are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nvila.cache.codec import CorruptRecord, Record, RecordFormat, unpack_payload
from nvila.errors import NotFound, Unavailable
from nvila.telemetry.logs import fields
from nvila.types import TokensRef, VisualTokens

_log = logging.getLogger(__name__)
T = TypeVar("T")

_LINGER_S = 60.0
"""A segment that was fetched from an object store stays at hand for so long: who asks for one group of it asks for
others next."""
_LENGTH_BYTES = 4
_MOST_MANIFEST_BYTES = 1 << 20


class ColdStore:
    """One per process; safe to use from many tasks. Calls run in threads, since fsspec blocks."""

    def __init__(self, url: str) -> None:
        """`url`: a folder, or an address that fsspec opens (`s3://bucket/prefix`). Made when it does not exist."""
        self._fs, root = _opened(url)
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._copies: dict[str, _Copy] = {}
        if self._is_local:
            Path(self._root).mkdir(parents=True, exist_ok=True, mode=0o700)

    # -- token records

    async def has(self, key: str) -> bool:
        """Whether a record is there; it is verified when it is read. False also when the store does not answer."""
        try:
            return await asyncio.to_thread(self._fs.exists, self._token_path(key))
        except Exception as error:  # the edge to whichever store this is: each has errors of its own
            _refused("look for a record", error)
            return False

    async def get(self, ref: TokensRef, form: RecordFormat) -> VisualTokens | None:
        """The verified tokens of a record, or None."""
        try:
            return await asyncio.to_thread(self._read, ref, form)
        except FileNotFoundError:
            return None
        except CorruptRecord as error:
            _log.warning("a cold record is corrupt", extra=fields(key=ref.key, reason=str(error)))
            return None
        except Exception as error:  # as in `has`
            _refused("read a record", error)
            return None

    async def put(self, record: Record) -> int:
        """Keep a record; returns its size in bytes. Writing twice is harmless. Raises `Unavailable`."""
        manifest = record.manifest
        data = b"".join((len(manifest).to_bytes(_LENGTH_BYTES, "little"), manifest, record.payload))
        await self._guarded("keep a record", self._write, self._token_path(record.key), data)
        return len(data)

    async def drop(self, keys: Iterable[str]) -> int:
        """Remove records; returns how many bytes were freed. What is gone already is no error. Raises `Unavailable`."""
        paths = [self._token_path(key) for key in keys]
        return await self._guarded("remove records", self._remove, paths)

    # -- segments

    async def keep(self, source: Path, recording_id: str, name: str) -> str:
        """Keep a file of the local disk; returns `Segment.path`. On one disk it is a second name for the same bytes, so
        nothing is copied, and a deletion of the original leaves it. Raises `Unavailable`."""
        relative = str(PurePosixPath("segments", recording_id, name))
        await self._guarded("keep a segment", self._link_or_put, source, self._path(relative))
        return relative

    @asynccontextmanager
    async def open(self, relative: str) -> AsyncIterator[Path]:
        """A segment as a file of the local disk until the end of the block. However many open it at a time, and shortly
        after each other, it is fetched once. Raises `NotFound`, `Unavailable`."""
        if self._is_local:
            path = Path(self._path(relative))
            if not await asyncio.to_thread(path.is_file):
                raise _no_segment()
            yield path
            return
        copy = self._copies.get(relative)
        if copy is None:
            copy = self._copies[relative] = _Copy(relative)
        with copy.in_use(lambda: self._let_go(copy)):
            async with copy.turn:
                if not copy.is_there:
                    try:
                        await self._guarded("read a segment", self._fs.get_file, self._path(relative), str(copy.path))
                    except FileNotFoundError:
                        raise _no_segment() from None
                    copy.is_there = True
            yield copy.path

    async def local(self, relative: str) -> Path | None:
        """A segment's file where the store is a local disk; None on any other. Raises `NotFound`."""
        if not self._is_local:
            return None
        path = Path(self._path(relative))
        if not await asyncio.to_thread(path.is_file):
            raise _no_segment()
        return path

    async def size(self, relative: str) -> int:
        """Of a segment, in bytes. Raises `NotFound`, `Unavailable`."""
        try:
            return int(await self._guarded("look for a segment", self._fs.size, self._path(relative)) or 0)
        except FileNotFoundError:
            raise _no_segment() from None

    async def read(self, relative: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a segment. Raises `NotFound`, `Unavailable`."""
        try:
            return bytes(await self._guarded("read a segment", self._fs.cat_file, self._path(relative), start, end))
        except FileNotFoundError:
            raise _no_segment() from None

    async def forget_segments(self, recording_id: str) -> None:
        """Remove all segments of a recording. Raises `Unavailable`."""
        for copy in [copy for copy in self._copies.values() if copy.is_of(recording_id)]:
            self._let_go(copy)
        await self._guarded("remove segments", self._remove_folder, self._path(f"segments/{recording_id}"))

    async def forget_segment(self, relative: str) -> None:
        """Remove one segment; one that is gone already is no error. Raises `Unavailable`."""
        if relative in self._copies:
            self._let_go(self._copies[relative])
        await self._guarded("remove a segment", self._remove, [self._path(relative)])

    # -- inside

    def _let_go(self, copy: _Copy) -> None:
        """Whoever opens the segment from now on has it fetched again; who has it open keeps it."""
        if self._copies.get(copy.relative) is copy:
            del self._copies[copy.relative]

    async def _guarded(self, what: str, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.to_thread(work, *arguments)
        except FileNotFoundError:
            raise
        except Exception as error:  # as in `has`
            _refused(what, error)
            raise Unavailable(f"the store of recordings could not {what}") from None

    def _path(self, relative: str) -> str:
        return f"{self._root}/{relative}"

    def _token_path(self, key: str) -> str:
        return self._path(f"tokens/{key[:2]}/{key}")

    def _read(self, ref: TokensRef, form: RecordFormat) -> VisualTokens:
        size = form.payload_bytes(ref.tokens)
        limit = _LENGTH_BYTES + _MOST_MANIFEST_BYTES + size
        with self._fs.open(self._token_path(ref.key), "rb") as file:
            data = memoryview(file.read(limit + 1))
        length = int.from_bytes(data[:_LENGTH_BYTES], "little")
        body = data[_LENGTH_BYTES:]
        if len(data) > limit or length > len(body):
            raise CorruptRecord(f"a record of {len(data)} bytes, of which {length} are to be its manifest")
        return unpack_payload(bytes(body[:length]), body[length:], ref, form)

    def _write(self, path: str, data: bytes) -> None:
        if not self._is_local:
            self._fs.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with beside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def _link_or_put(self, source: Path, path: str) -> None:
        if not self._is_local:
            self._fs.put_file(str(source), path)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            try:
                os.link(source, target)
                return
            except FileExistsError:
                raise
            except OSError:  # another disk, or one without links
                beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
                try:
                    shutil.copyfile(source, beside)
                    beside.replace(target)
                except BaseException:
                    beside.unlink(missing_ok=True)
                    raise

    def _remove(self, paths: list[str]) -> int:
        freed = 0
        for path in paths:
            try:
                freed += int(self._fs.size(path) or 0)
                self._fs.rm_file(path)
            except FileNotFoundError:
                continue
        return freed

    def _remove_folder(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)


class _Copy:
    """A segment of an object store on the local disk: removed with this object."""

    def __init__(self, relative: str) -> None:
        folder = tempfile.mkdtemp(prefix="nvila-segment-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.relative = relative
        self.path = Path(folder) / PurePosixPath(relative).name
        self.turn = asyncio.Lock()
        self.is_there = False
        self._users = 0
        self._leaving: asyncio.TimerHandle | None = None

    def is_of(self, recording_id: str) -> bool:
        return PurePosixPath(self.relative).parts[1] == recording_id

    @contextlib.contextmanager
    def in_use(self, let_go: Callable[[], None]) -> Iterator[None]:
        """`let_go` is called when it has not been in use for a while, or has nothing to use."""
        self._users += 1
        if self._leaving is not None:
            self._leaving.cancel()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                delay_s = _LINGER_S if self.is_there else 0.0
                self._leaving = asyncio.get_running_loop().call_later(delay_s, let_go)


def _opened(url: str) -> tuple[Any, str]:
    fs, root = fsspec.core.url_to_fs(url)
    return fs, str(root)


def _refused(what: str, error: Exception) -> None:
    _log.warning("the cold store refused", extra=fields(operation=what, reason=type(error).__name__))


def _no_segment() -> NotFound:
    return NotFound("this part of the recording's source is not kept any more")
