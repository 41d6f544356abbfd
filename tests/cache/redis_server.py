"""Starts real Redis servers for tests, with the configuration that `nvila up` uses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from nvila.cache.server import command, write_config

PASSWORD = "secret"


class RedisServer:
    """A redis-server started as `nvila up` starts it, plus a second user that may do everything to it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"
        self.admin_url = f"redis://tester:tester@127.0.0.1:{self.port}/0"
        self._config = write_config(folder, port=self.port, maxmemory_bytes=512 << 20, password=PASSWORD)
        with self._config.open("a") as config:
            config.write("user tester on >tester ~* &* +@all\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(command(self._config), stdout=subprocess.DEVNULL)
        give_up = time.monotonic() + 30
        while time.monotonic() < give_up:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise TimeoutError(f"redis-server did not listen on port {self.port} within 30 s")

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
