"""A decode worker: a process that reads files from outside and may die of it. `pool.py` starts and replaces it.

It is told its limits and the arena in one JSON line on standard input, shuts itself in (`sandbox.py`), says so, and
then answers one JSON line for each JSON line, in order; pixels go into the arena, never through the pipe. It ends when
standard input does, when its parent dies, and after it ran out of memory (what is left of its heap is fragments).
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvila.cache.keys import content_digest
from nvila.errors import InvalidMedia, LimitExceeded, NvilaError, Overloaded
from nvila.model.preprocess import resize_exact
from nvila.types import MediaKind
from nvila.video import sandbox
from nvila.video.animation import WebpReader, is_webp
from nvila.video.decode import VideoReader
from nvila.video.images import probe_image, read_image
from nvila.video.media import DecodeLimits, MediaInfo
from nvila.video.probe import check_file

log = logging.getLogger("nvila.video.worker")


class Worker:
    """Answers requests one after the other. Keeps the last video open, where its decoder stopped."""

    def __init__(self, limits: DecodeLimits, arena_fd: int, arena_bytes: int) -> None:
        self._limits = limits
        self._arena_fd = arena_fd
        self._arena = mmap.mmap(arena_fd, arena_bytes)
        self._reader: VideoReader | WebpReader | None = None
        self._reader_of: tuple[object, ...] = ()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        if self._reader is not None:
            self._reader.decoded_frames = 0
        sandbox.limit_cpu(self._limits.task_s)
        try:
            path, kind = Path(request["path"]), MediaKind(request["kind"])
            reply = self._probe(path, kind) if request["do"] == "probe" else self._decode(path, kind, request)
        except NvilaError as error:
            reply = {"error": error.code, "message": error.message, "retry_after_s": error.retry_after_s}
        except MemoryError:
            mib = self._limits.memory_bytes // 1024**2
            reply = {
                "error": LimitExceeded.code,
                "message": f"decoding needs more than the {mib:,} MiB of memory allowed",
                "is_last": True,
            }
        except Exception:  # the process edge: a decoder's surprise is this request's error, not the worker's end
            log.exception("unexpected failure while decoding")
            self.forget()
            reply = {"error": InvalidMedia.code, "message": "the decoder failed on this file"}
        decoded_frames = self._reader.decoded_frames if self._reader is not None else 0
        return reply | {"busy_s": time.perf_counter() - started, "decoded_frames": decoded_frames}

    def forget(self) -> None:
        """Close the file kept open."""
        if self._reader is not None:
            self._reader.close()
        self._reader, self._reader_of = None, ()

    def _probe(self, path: Path, kind: MediaKind) -> dict[str, Any]:
        info: MediaInfo = probe_image(path, self._limits) if kind is MediaKind.IMAGE else self._open(path).info()
        return {"info": info.to_wire()}

    def _decode(self, path: Path, kind: MediaKind, request: dict[str, Any]) -> dict[str, Any]:
        frames_FHWC = self._frames(int(request["offset"]), tuple(request["shape"]))
        indices: list[int] = request["indices"]
        count, times_s, missing = 0, [], []
        for position, time_s, rgb_HWC in self._pictures(path, kind, indices, frames_FHWC.shape):
            if rgb_HWC is None:
                missing.append(position)
                continue
            frames_FHWC[count] = rgb_HWC
            times_s.append(time_s)
            count += 1
        padded = -count % int(request["group"])
        frames_FHWC[count : count + padded] = frames_FHWC[count - 1]
        frames_FHWC = frames_FHWC[: count + padded]
        return {
            "shape": frames_FHWC.shape,
            "digest": content_digest(frames_FHWC).hex(),
            "times_s": times_s,
            "missing": missing,
            "padded": padded,
        }

    def _pictures(
        self, path: Path, kind: MediaKind, indices: list[int], shape: tuple[int, ...]
    ) -> Iterator[tuple[int, float, NDArray[np.uint8] | None]]:
        """(position in the run, seconds, pixels), each distinct frame decoded once however often it is repeated."""
        if kind is MediaKind.IMAGE:
            yield 0, 0.0, resize_exact(read_image(path, self._limits), shape[2], shape[1])
            return
        position = 0
        for number, time_s, rgb_HWC in self._open(path).read(sorted(set(indices)), (shape[2], shape[1])):
            while position < len(indices) and indices[position] == number:
                yield position, time_s, rgb_HWC
                position += 1

    def _open(self, path: Path) -> VideoReader | WebpReader:
        status = check_file(path, self._limits)
        identity = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._reader is None or self._reader_of != identity:
            self.forget()
            self._reader = WebpReader(path, self._limits) if is_webp(path) else VideoReader(path, self._limits)
            self._reader_of = identity
        return self._reader

    def _frames(self, offset: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A stretch of the arena as an array. Its memory is claimed first: writing to shared memory that the machine
        does not have would kill this process.
        """
        nbytes = int(np.prod(shape))
        try:
            os.posix_fallocate(self._arena_fd, offset, nbytes)
        except OSError:
            raise Overloaded(f"shared memory has no room for {nbytes:,} bytes of frames", retry_after_s=1) from None
        return np.frombuffer(self._arena, np.uint8, nbytes, offset).reshape(shape)


def main() -> None:
    sandbox.die_with_parent(int(sys.argv[1]))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    av.logging.set_level(None)  # a decoder's own words name paths and addresses
    Image.init()  # load Pillow's readers now
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    hello = json.loads(sys.stdin.readline())
    limits = DecodeLimits(**hello["limits"])
    arena_fd = os.open(hello["arena"], os.O_RDWR | os.O_CLOEXEC)
    worker = Worker(limits, arena_fd, int(hello["arena_bytes"]))
    sandbox.limit_resources(limits.memory_bytes)
    is_filtered = sandbox.deny_system_calls()
    replies.write(json.dumps({"is_filtered": is_filtered}) + "\n")
    while True:
        if not select.select([sys.stdin], [], [], limits.idle_s)[0]:
            worker.forget()
            continue
        line = sys.stdin.readline()
        if not line:
            return
        reply = worker.answer(json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        if reply.get("is_last"):
            return


if __name__ == "__main__":
    main()
