"""Runs the real decode application, as production does: `python -m nvila.decode.app`, its own Ray cluster and all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from nvila.cache.codec import RecordFormat
from nvila.decode.client import DecodeClient
from nvila.errors import Unavailable
from nvila.types import ModelCard

START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60


class DecodeApp:
    """One started application. Settings are given by field name."""

    def __init__(
        self, folder: Path, model: Path, environment: dict[str, str] | None = None, **settings: object
    ) -> None:
        self.grpc_port, self.http_port = _free_ports(2)
        self.log = folder / "decode.log"
        given = {
            "model": model,
            "grpc_port": self.grpc_port,
            "http_port": self.http_port,
            "log_style": "text",
            "cpu_threads": 1,
            "drain_s": 2,
        } | settings
        variables = {f"NVILA_DECODE_{name.upper()}": str(value) for name, value in given.items()}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nvila.decode.app"],
                env=os.environ | variables | (environment or {}),
                stdout=log,
                stderr=log,
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    async def wait_ready(self) -> ModelCard:
        """What is served, as soon as it is. Fails with the end of the log."""
        client = DecodeClient(self.target)
        give_up = time.monotonic() + START_TIMEOUT_S
        try:
            while True:
                if b" ready" in self.log.read_bytes():
                    with contextlib.suppress(Unavailable):  # the word may be another's than the application's
                        return await client.describe(timeout_s=30)
                assert self._process.poll() is None, f"the application ended:\n{self.log.read_text()[-4000:]}"
                assert time.monotonic() < give_up, f"not ready in time:\n{self.log.read_text()[-4000:]}"
                await asyncio.sleep(0.2)
        finally:
            await client.close()

    def replicas(self) -> list[psutil.Process]:
        """Processes of the decode replicas."""
        return [process for process in self._processes() if "ServeReplica:decode:" in _title(process)]

    def engines(self) -> list[psutil.Process]:
        """vLLM's engine cores."""
        return [process for process in self._processes() if "EngineCore" in _title(process)]

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/metrics", timeout=30) as answer:
            page: str = answer.read().decode()
            return page

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """Values of a metric's samples with these labels, summed by replica."""
        values: dict[str, float] = {}
        for line in self.metrics().splitlines():
            if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                replica = re.search(r'replica="([^"]*)"', line)
                assert replica is not None, line
                values[replica[1]] = values.get(replica[1], 0.0) + float(line.rsplit(" ", 1)[1])
        return values

    def stop(self) -> int:
        """Ask it to stop; its exit status. Whatever it leaves running fails the test that asked."""
        self._processes()
        self._process.terminate()
        try:
            status = self._process.wait(STOP_TIMEOUT_S)
        finally:
            _, alive = psutil.wait_procs(list(self._seen.values()), timeout=30)
            for process in alive:
                process.kill()
            if self._process.poll() is None:
                self._process.kill()
        assert not alive, f"left running: {[_title(process) for process in alive]}"
        return status

    def _processes(self) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        processes = psutil.Process(self._process.pid).children(recursive=True)
        self._seen |= {process.pid: process for process in processes}
        return processes


def form_of(card: ModelCard, width: int) -> RecordFormat:
    return RecordFormat(width=width, dtype=card.token_dtype, vision_revision=card.vision_revision)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
