"""Where pushed video waits for its worker: a folder that gateways and workers share.

`<folder>/inbox/<recording>/` holds *pieces*: video files `<number>-<capture time in µs>.<ending>`, numbered from 0
without holes, each of which opens on its own and begins at a key frame. A piece comes into being by one rename, and
goes when its worker has made it durable elsewhere; so a kill of either side loses nothing that was acknowledged. `end`
says that nothing follows. One client at a time writes to a recording, by a lock that dies with its gateway's process.

A client that pushes faster than the worker takes is held back (`wait_for_room`): nothing is dropped on this way.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nvila.errors import Conflict, Overloaded, Unavailable
from nvila.locks import LOCK, lock_file

ENDINGS = ("ts", "mp4", "mkv")

_PIECE = re.compile(r"(\d{9})-(\d{1,18})\.(ts|mp4|mkv)")
_RECORDING = re.compile(r"rec_[0-9a-f]{32}")
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`captured_at`: capture time of its first frame, seconds since 1970."""

    number: int
    path: Path
    captured_at: float
    size_bytes: int


class Inbox:
    """`most_bytes`: of one recording that wait for its worker."""

    def __init__(self, folder: Path, *, most_bytes: int = 256 << 20) -> None:
        self._folder = folder / "inbox"
        self._most_bytes = most_bytes

    # -- the gateway's side

    @contextmanager
    def writing(self, recording_id: str) -> Iterator[Writer]:
        """Raises `Conflict` while another client pushes to the same recording, or when that one has said its last."""
        folder = self._recording_folder(recording_id)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = lock_file(folder / LOCK)
        if lock is None:
            raise Conflict("another client is pushing to this recording", retry_after_s=1)
        try:
            if (folder / "end").exists():
                raise Conflict("this recording has been ended; nothing can be pushed to it any more")
            for left in folder.glob(".making-*"):  # of a writer that was killed
                left.unlink(missing_ok=True)
            yield Writer(folder, self._next_number(folder))
        finally:
            os.close(lock)

    async def wait_for_room(self, recording_id: str, within_s: float) -> None:
        """Until no more than `most_bytes` wait. Raises `Overloaded` when the worker does not get there in time."""
        give_up_at = time.monotonic() + within_s
        while True:
            waiting = sum(piece.size_bytes for piece in await asyncio.to_thread(self.pieces, recording_id))
            if waiting <= self._most_bytes:
                return
            if time.monotonic() > give_up_at:
                raise Overloaded(
                    f"{waiting:,} bytes of this recording wait to be ingested, at most {self._most_bytes:,} may",
                    retry_after_s=within_s,
                )
            await asyncio.sleep(_LOOK_EVERY_S)

    # -- the worker's side

    def pieces(self, recording_id: str) -> list[Piece]:
        """What waits, in order."""
        folder = self._recording_folder(recording_id)
        found = []
        for name in _names(folder):
            if match := _PIECE.fullmatch(name):
                with suppress(FileNotFoundError):  # taken meanwhile
                    size = (folder / name).stat().st_size
                    captured_at = int(match[2]) / 1_000_000
                    found.append(
                        Piece(number=int(match[1]), path=folder / name, captured_at=captured_at, size_bytes=size)
                    )
        return sorted(found, key=lambda piece: piece.number)

    def take(self, piece: Piece) -> None:
        """It is kept elsewhere now. Its number stays taken."""
        making = piece.path.with_name(".taken")
        making.write_text(str(piece.number))
        making.replace(piece.path.with_name("taken"))
        piece.path.unlink(missing_ok=True)

    def is_ended(self, recording_id: str) -> bool:
        return (self._recording_folder(recording_id) / "end").exists()

    def remove(self, recording_id: str) -> None:
        shutil.rmtree(self._recording_folder(recording_id), ignore_errors=True)

    def _next_number(self, folder: Path) -> int:
        there = [int(match[1]) for name in _names(folder) if (match := _PIECE.fullmatch(name))]
        with suppress(FileNotFoundError):
            there.append(int((folder / "taken").read_text()))
        return max(there, default=-1) + 1

    def _recording_folder(self, recording_id: str) -> Path:
        assert _RECORDING.fullmatch(recording_id), "an id of ours, looked up before"
        return self._folder / recording_id


class Writer:
    """The one that may add pieces to a recording."""

    def __init__(self, folder: Path, next_number: int) -> None:
        self._folder = folder
        self._next = next_number

    def new_path(self) -> Path:
        """Where the next piece is written before it is added."""
        return self._folder / f".making-{secrets.token_hex(8)}"

    def add(self, path: Path, ending: str, captured_at: float) -> None:
        """The piece at `path` is complete."""
        assert ending in ENDINGS
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.rename(self._folder / f"{self._next:09d}-{max(0, round(captured_at * 1_000_000))}.{ending}")
        self._next += 1

    def end(self) -> None:
        """Nothing follows."""
        (self._folder / "end").touch(mode=0o600)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError:
        raise Unavailable("the folder of pushed recordings cannot be read") from None
