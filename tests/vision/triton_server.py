"""Starts a real Triton with our model repository for tests, as `nvila up` does."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from nvila.vision.triton import clean_shared_memory, command, find_triton


class TritonServer:
    """`environment`: settings of the backend (NVILA_VISION_*). `tls_folder`: with a certificate, for gRPC over TLS."""

    def __init__(self, folder: Path, environment: dict[str, str], tls_folder: Path | None = None) -> None:
        self.http_port, self.grpc_port, self.metrics_port = _free_ports(3)
        self.url = f"127.0.0.1:{self.grpc_port}"
        self.shm_prefix = f"nvtest-{secrets.token_hex(4)}-"
        self.log = folder / "triton.log"
        self._command = command(
            find_triton(folder),
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            metrics_port=self.metrics_port,
            shm_prefix=self.shm_prefix,
            exit_timeout_s=5,
            tls_folder=tls_folder,
        )
        self._environment = {"OMP_NUM_THREADS": "1", **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start it, without waiting."""
        environment = {**os.environ, **self._environment, **self._command.environment}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command.argv, env=environment, stdout=log, stderr=log)

    def start(self, timeout_s: float = 90) -> None:
        """Start it and wait until it is ready."""
        self.launch()
        give_up = time.monotonic() + timeout_s
        while not self.is_ready():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise TimeoutError(f"Triton is not ready; its log ends:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/v2/health/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    def wait(self, timeout_s: float = 120) -> int:
        """Wait for its end; returns its exit status."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """kill -9, and what `nvila up` does after it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        clean_shared_memory(self.shm_prefix)

    def shared_memory(self) -> list[str]:
        return [path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(self.shm_prefix)]


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
