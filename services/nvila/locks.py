"""Locks that end with their process, among all processes of a host and of the hosts that share a file system.

They are `flock` on regular files open for writing: Linux's NFS client shows those to other hosts, while locks on
folders stay with the host that took them (flock(2), "NFS details"; a folder cannot be opened for writing).
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

LOCK = "lock"
"""Name of the file in a folder that whoever has the folder holds the lock on."""

_NOT_HAD = (errno.EAGAIN, errno.ENOENT, errno.ESTALE)


class OwnFolder:
    """A folder in `root`, at `path`, that is this process's alone while it lives. What dead ones left is removed."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in root.iterdir():
            with suppress(OSError):  # no folder, another user's, or gone since it was listed
                if (locks := _hold(left)) is not None:
                    _remove(left, locks)
        while True:  # another process, starting at the same moment, may take the new folder for one left behind
            self.path = root / f"{os.getpid()}-{secrets.token_hex(8)}"
            self.path.mkdir(mode=0o700)
            with suppress(FileNotFoundError):
                if (held := _hold(self.path)) is not None:
                    self._locks = held
                    return

    def close(self) -> None:
        _remove(self.path, self._locks)


def lock_file(path: Path) -> int | None:
    """The lock on a file, made where there is none, held until the handle is closed or the process ends; None when
    another has it. Raises `FileNotFoundError` where there is no folder for it."""
    return _lock(path, os.O_RDWR | os.O_CREAT)


def _lock(path: Path, flags: int) -> int | None:
    handle = os.open(path, flags, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(handle)
        if mine.st_nlink and os.path.samestat(mine, path.stat()):  # else it was removed before the lock was had
            return handle
    except OSError as error:
        if error.errno not in _NOT_HAD:
            os.close(handle)
            raise
    os.close(handle)
    return None


def _hold(folder: Path) -> ExitStack | None:
    """The lock on a folder's file, and the one on the folder: the versions before know no other."""
    with ExitStack() as held:
        for path, flags in ((folder, os.O_RDONLY | os.O_DIRECTORY), (folder / LOCK, os.O_RDWR | os.O_CREAT)):
            handle = _lock(path, flags)
            if handle is None:
                break
            held.callback(os.close, handle)
        else:
            return held.pop_all()
    return None


def _remove(folder: Path, locks: ExitStack) -> None:
    """From the moment its file is gone another may make a new one in it: then the folder stays, and is that one's."""
    shutil.rmtree(folder, ignore_errors=True)
    locks.close()
    with suppress(OSError):
        folder.rmdir()  # NFS keeps a name in it until the lock's file is closed
