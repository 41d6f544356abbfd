"""Files come from where they may come from, and from nowhere else."""

from __future__ import annotations

import errno
import secrets
from pathlib import Path

import fsspec
import pytest
from blake3 import blake3
from fsspec.implementations.memory import MemoryFileSystem

from nvila.errors import ForbiddenURL, InvalidMedia, InvalidRequest, LimitExceeded, MediaUnavailable
from nvila.recordings.sources import FileSources, LiveSources, check_store_url
from nvila.recordings.types import Source, SourceKind
from nvila.types import Deadline
from tests.recordings import made
from tests.recordings.taking import Uploads

_STORES = ("memory://yard",)


@pytest.fixture
def sources() -> FileSources:
    return FileSources(Uploads(), stores=_STORES, most_bytes=1000)


def url_source(url: str) -> Source:
    return Source(kind=SourceKind.URL, url=url)


async def test_an_object_of_an_allowed_store_is_brought_to_disk_and_hashed(sources: FileSources) -> None:
    name = f"yard/{secrets.token_hex(4)}.mp4"
    fsspec.filesystem("memory").pipe_file(f"/{name}", b"a video")
    async with sources.open(url_source(f"memory://{name}"), "acme", Deadline.after(10)) as media:
        assert media.path.read_bytes() == b"a video"
        assert (media.digest, media.size_bytes) == (blake3(b"a video").digest(), 7)
        path = media.path
    assert not path.exists()


@pytest.mark.parametrize(
    "url",
    [
        "memory://other/a.mp4",
        "memory://yardstick/a.mp4",
        "memory://yard/../other/a.mp4",
        "file:///etc/passwd",
        "/etc/passwd",
        "s3://bucket/a.mp4",
        "simplecache::memory://yard/a.mp4",
        "gopher://yard/a",
    ],
)
async def test_every_other_address_is_refused(sources: FileSources, url: str) -> None:
    with pytest.raises(ForbiddenURL):
        async with sources.open(url_source(url), "acme", Deadline.after(10)):
            pass


def test_without_stores_nothing_is_opened() -> None:
    with pytest.raises(ForbiddenURL):
        check_store_url("memory://yard/a.mp4", ())


async def test_an_object_that_is_too_large_or_not_there_says_so(sources: FileSources) -> None:
    name = f"yard/{secrets.token_hex(4)}.mp4"
    fsspec.filesystem("memory").pipe_file(f"/{name}", bytes(2000))
    with pytest.raises(LimitExceeded):
        async with sources.open(url_source(f"memory://{name}"), "acme", Deadline.after(10)):
            pass
    with pytest.raises(InvalidMedia):
        async with sources.open(url_source("memory://yard/nothing"), "acme", Deadline.after(10)):
            pass


class _Away(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store that answers 503 (as s3fs words it)."""

    protocol = "away"

    def _open(self, path: str, mode: str = "rb", **more: object) -> object:
        raise OSError(errno.EBUSY, "Please reduce your request rate")


async def test_a_store_that_is_away_is_worth_another_try() -> None:
    fsspec.register_implementation("away", _Away, clobber=True)
    sources = FileSources(Uploads(), stores=("away://yard",))
    with pytest.raises(MediaUnavailable):
        async with sources.open(url_source("away://yard/a.mp4"), "acme", Deadline.after(10)):
            pass


async def test_an_upload_is_opened_by_its_id(tmp_path: Path) -> None:
    uploads = Uploads()
    uploads.paths["file-1"] = tmp_path / "a"
    uploads.paths["file-1"].write_bytes(b"bytes")
    source = Source(kind=SourceKind.FILE, file_id="file-1")
    async with FileSources(uploads).open(source, "acme", Deadline.after(10)) as media:
        assert media.size_bytes == 5


def test_a_kind_of_source_that_is_not_read_here_says_so() -> None:
    with pytest.raises(InvalidRequest, match="rtsp"):
        LiveSources({}).events(made.recording(kind=SourceKind.RTSP))
