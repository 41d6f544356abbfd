"""Who works in a folder of a shared file system, other nodes leave alone: also on NFS, whose client keeps some locks to
itself."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nvila.errors import Conflict
from nvila.gateway.files import FileStore
from nvila.gateway.scratch import Scratch
from nvila.gateway.uploads import UploadLimits, Uploads
from nvila.locks import LOCK, OwnFolder, lock_file
from nvila.recordings.inbox import Inbox

_RECORDING = "rec_" + 32 * "0"


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lock is asked for from a node of its own, over NFS: locks on folders are the node's alone; those on files
    are the server's, which asks for a file open for writing (flock(2))."""
    on_one_host = fcntl.flock

    def flock(handle: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            return
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        on_one_host(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("nfs")
def test_a_process_that_starts_on_another_node_leaves_what_others_have_on_the_way(tmp_path: Path) -> None:
    living = Scratch(tmp_path)
    living.new_path().write_bytes(b"on the way")
    beside = Scratch(tmp_path)
    assert len(_content(tmp_path)) == 1
    beside.close()
    living.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nfs")
def test_nobody_pushes_to_a_recording_that_a_client_of_another_node_pushes_to(tmp_path: Path) -> None:
    with Inbox(tmp_path).writing(_RECORDING), pytest.raises(Conflict), Inbox(tmp_path).writing(_RECORDING):
        pass
    assert Inbox(tmp_path).pieces(_RECORDING) == []


@pytest.mark.usefixtures("nfs")
async def test_nobody_writes_to_an_upload_that_another_node_writes_to(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch")
    uploads = Uploads(
        tmp_path / "uploads", FileStore(tmp_path / "files", scratch), scratch, UploadLimits(file_bytes=1 << 20)
    )
    upload = await uploads.create("acme", size_bytes=2, filename="a", purpose="vision")

    async def body() -> AsyncIterator[bytes]:
        yield b"a"
        with pytest.raises(Conflict, match="another request"):
            await uploads.append("acme", upload.id, 0, body())
        yield b"b"

    assert (await uploads.append("acme", upload.id, 0, body())).is_done
    await uploads.delete("acme", upload.id)
    assert _content(tmp_path / "uploads") == []
    scratch.close()


@pytest.mark.parametrize("names", [(), (LOCK,)], ids=["by a version before", "by this one"])
def test_what_a_dead_process_left_is_removed(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in ("piece", *names):
        path = tmp_path / "1-abc" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    own = OwnFolder(tmp_path)
    assert list(tmp_path.iterdir()) == [own.path]
    own.close()


def test_what_a_living_process_of_a_version_before_has_is_left_alone(tmp_path: Path) -> None:
    piece = tmp_path / "1-abc" / "piece"
    piece.parent.mkdir()
    piece.write_bytes(b"")
    held = os.open(piece.parent, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    OwnFolder(tmp_path).close()
    assert piece.exists()
    os.close(held)


def test_a_file_in_the_way_stops_nobody_from_starting(tmp_path: Path) -> None:
    in_the_way = tmp_path / ".nfs0000"
    in_the_way.write_bytes(b"")
    mine = OwnFolder(tmp_path)
    assert mine.path.is_dir()
    mine.close()
    assert list(tmp_path.iterdir()) == [in_the_way]


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LOCK
    on_time = fcntl.flock

    def late(handle: int, operation: int) -> None:
        path.unlink()
        on_time(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert lock_file(path) is None


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OSError, match="No locks available"):
        OwnFolder(tmp_path)


def _content(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
