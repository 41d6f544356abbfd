"""One decode worker process as `pool.py` sees it: started, asked, ended. What runs in it is `worker.py`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvila.errors import InvalidMedia, LimitExceeded, NvilaError, Unavailable
from nvila.video.arena import FrameArena
from nvila.video.media import DecodeLimits

log = logging.getLogger(__name__)

_START_S = 30.0
"""A worker imports NumPy, PyAV and Pillow, in 0.3 s on an idle core."""
_MAX_REPLY_BYTES = 16 * 1024**2


class WorkerProcess:
    """`path`, `position`: the file that it has open and the last frame read there."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._errors = asyncio.create_task(self._log_errors())
        self.path: Path | None = None
        self.position = 0

    @classmethod
    async def start(cls, limits: DecodeLimits, arena: FrameArena) -> WorkerProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-W", "ignore", "-m", "nvila.video.worker", str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_REPLY_BYTES,
            env={"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C at the terminal is the gateway's to handle
        )  # fmt: skip
        worker = cls(process)
        hello = {"limits": asdict(limits), "arena": str(arena.path), "arena_bytes": arena.size_bytes}
        try:
            async with asyncio.timeout(_START_S):
                await worker.ask(hello)
        except (TimeoutError, InvalidMedia, Unavailable):
            await worker.end()
            raise Unavailable("a decode worker did not start") from None
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def wait(self) -> None:
        """Until the process has ended."""
        await self._process.wait()

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One line there, one line back. Raises what the worker's death means to the request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
            line = await self._process.stdout.readline()
            if line.endswith(b"\n"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died, of which below
        except ValueError:
            raise Unavailable("a decode worker's reply could not be read; try again") from None
        raise self._died_of(await self._process.wait())

    def _died_of(self, code: int) -> NvilaError:
        log.warning("decode worker %d ended with code %d", self.pid, code)
        if code == -signal.SIGXCPU:
            return LimitExceeded("decoding took more processor time than allowed")
        if code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE, -signal.SIGTRAP):
            return InvalidMedia("the decoder broke on this file")
        return Unavailable("a decode worker was lost; try again")

    async def end(self) -> None:
        """Kill the process and wait until it is gone; twice does no harm."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._errors

    async def _log_errors(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            log.warning("decode worker %d: %s", self.pid, line.decode(errors="replace").rstrip())
