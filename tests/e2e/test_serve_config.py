"""The chart's `serveConfigV2`, given to a real Ray cluster the way KubeRay gives it: through the head's HTTP API."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvila.cli import processes
from nvila.decode.client import DecodeClient
from tests.charts.helm import container, environment, render

TOKEN = "0123456789abcdef0123456789abcdef"
VALUES = {
    "decode": {
        "mode": "rayservice",
        "autoscaling": {"kind": "ray", "maxReplicas": 2},
        "settings": {"engine": "transformers"},
    }
}


@dataclass(frozen=True)
class Head:
    """A Ray head that asks for a token, as KubeRay starts it. `environment`: of the chart's head container."""

    environment: dict[str, str]
    dashboard: int
    http: int
    grpc: int


def _free_ports(count: int) -> list[int]:
    """Not from 10002 to 19999, which Ray gives to its workers."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def head(checkpoint: Path) -> Iterator[Head]:
    gcs, dashboard, agent, client, metrics, http, grpc = _free_ports(7)
    cluster = render(VALUES).get("RayService", "decode")["spec"]["rayClusterConfig"]
    told = environment(container(cluster["headGroupSpec"]["template"]["spec"]))
    ours = {name: value for name, value in told.items() if name.startswith("NVILA_") and "REDIS" not in name}
    variables = {**os.environ, **ours, "NVILA_DECODE_MODEL": str(checkpoint), "OMP_NUM_THREADS": "1",
                 "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
                 processes.MARK: f"serve-config-{os.getpid()}"}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={gcs}", "--num-cpus=1",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--object-store-memory=100000000",
            f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}",
        ]  # fmt: skip
        ray = subprocess.Popen(
            command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _await(f"http://127.0.0.1:{dashboard}/api/gcs_healthz", 90)  # the head's probe
            yield Head(variables, dashboard, http, grpc)
        finally:
            _end(ray, variables[processes.MARK])


def _end(ray: subprocess.Popen[bytes], mark: str) -> None:
    """Ask, and soon make sure: Ray's own end can take forever, and its workers survive their parents."""
    pids = (ray.pid, *processes.descendants(ray.pid))
    known = [identity for pid in pids if (identity := processes.Identity.of(pid))]
    ray.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        ray.wait(5)
    until = time.monotonic() + 30
    while left := [*processes.marked(mark), *(one.pid for one in known if one.is_alive())]:
        assert time.monotonic() < until, f"processes {left} cannot be killed"
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    ray.wait(30)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _await(url: str, within_s: float) -> None:
    until = time.monotonic() + within_s
    while _status(url) != 200:
        assert time.monotonic() < until, f"{url} answers {_status(url)}"
        time.sleep(0.2)


async def test_ray_runs_what_the_chart_tells_it(head: Head, tmp_path: Path) -> None:
    config = render(VALUES).get("RayService", "decode")["spec"]["serveConfigV2"]
    config = config.replace("port: 8100", f"port: {head.http}").replace("port: 9000", f"port: {head.grpc}")
    (tmp_path / "serve.yaml").write_text(config)
    deploy = [str(Path(sys.executable).with_name("serve")), "deploy", str(tmp_path / "serve.yaml")]
    deploy += ["-a", f"http://127.0.0.1:{head.dashboard}"]
    done = subprocess.run(deploy, env=head.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _await(f"http://127.0.0.1:{head.http}/metrics", 300)  # a worker's readiness probe
    client = DecodeClient(f"dns:///127.0.0.1:{head.grpc}")
    card = await client.describe()
    await client.close()
    assert card.name == "random-tiny"


def test_nobody_without_the_token_starts_programs(head: Head) -> None:
    assert _status(f"http://127.0.0.1:{head.dashboard}/api/jobs/") == 401
