"""The recordings part as a process: it says what it is and what it misses, waits without it, and ends when told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvila.recordings.database import Database
from nvila.recordings.jobs import JobStore
from nvila.recordings.settings import RecordingsSettings
from nvila.recordings.types import JobKind, JobState
from tests.recordings import made

PATIENCE_S = 60


class Program:
    def __init__(self, folder: Path, **more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        given = {
            "HOST": "127.0.0.1",
            "HTTP_PORT": str(self.port),
            "DATA_DIR": str(folder),
            "SHARED_MEMORY_PREFIX": f"nvt-{os.getpid()}",
            "DECODE_WORKERS": "1",
            # Port 9 (discard) is served nowhere: the services behind are away.
            "VISION_URL": "127.0.0.1:9",
            "DECODE_TARGET": "127.0.0.1:9",
            "REDIS_URL": "redis://127.0.0.1:9/0",
            **more,
        }
        environment = {f"NVILA_RECORDINGS_{name}": value for name, value in given.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nvila.recordings.app"],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()

    def wait_until(self, path: str, part: str) -> tuple[int, str]:
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            try:
                status, body = self.get(path)
            except OSError:
                status, body = 0, ""
            if part in body:
                return status, body
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.1)
        raise TimeoutError(f"no {part!r} at {path} within {PATIENCE_S} s")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    started = Program(tmp_path)
    yield started
    started.process.kill()
    started.process.communicate()


async def test_without_the_services_behind_it_is_alive_says_what_is_missing_and_leaves_jobs_alone(
    program: Program, tmp_path: Path
) -> None:
    program.wait_until("/health/live", "live")
    status, body = program.wait_until("/health/ready", "does not answer")
    database = Database.open(f"sqlite:///{tmp_path}/recordings.db")
    jobs = JobStore(database)
    asked = await made.submit(jobs)
    ingest = await made.submit(jobs, kind=JobKind.INGEST, recording=made.recording())
    deletion = await jobs.delete_recording(ingest.recording_id or "", tenant="acme")

    _, metrics = program.wait_until("/metrics", 'nvila_jobs_finished_total{kind="delete",outcome="done"} 1.0')

    assert status == 503
    reasons = " ".join(json.loads(body)["reasons"])
    assert "decode" in reasons
    assert "vision" in reasons
    assert "nvila_recordings_database_up 1.0" in metrics
    assert (await jobs.get(deletion.id, tenant="acme")).state is JobState.DONE
    waiting = await jobs.get(asked.id, tenant="acme")
    assert (waiting.state, waiting.attempt) == (JobState.QUEUED, 0)
    await database.close()

    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(PATIENCE_S) == 0
    left = [name for name in os.listdir("/dev/shm") if name.startswith(f"nvt-{os.getpid()}")]
    assert left == []


def test_a_malformed_variable_stops_it_and_is_named(tmp_path: Path) -> None:
    started = Program(tmp_path, INGEST_SLOTS="many")

    _, said = started.process.communicate(timeout=PATIENCE_S)

    assert started.process.returncode == 1
    assert "NVILA_RECORDINGS_INGEST_SLOTS" in said
    assert "many" not in said


def test_a_key_that_is_none_stops_it_and_is_not_repeated(tmp_path: Path) -> None:
    started = Program(tmp_path, SECRET_KEYS="hunter2hunter2")

    _, said = started.process.communicate(timeout=PATIENCE_S)

    assert started.process.returncode == 1
    assert "NVILA_RECORDINGS_SECRET_KEYS" in said
    assert "key 1 is not 32 bytes in URL-safe base64" in said
    assert "hunter2" not in said


def test_all_is_in_the_data_folder_unless_told_otherwise() -> None:
    plain = RecordingsSettings(data_dir=Path("/d"))
    told = RecordingsSettings(data_dir=Path("/d"), dir=Path("/live"), database_url="postgresql://u:hunter2@h/d")  # type: ignore[arg-type]

    assert (plain.database(), plain.folder()) == ("sqlite:////d/recordings.db", Path("/d/recordings"))
    assert (told.database(), told.folder()) == ("postgresql://u:hunter2@h/d", Path("/live"))
    assert "hunter2" not in repr(told)
