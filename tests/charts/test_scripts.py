"""What runs inside the chart's pods, run here: the token cache with its users, the preparation of weights, the test."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import av
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from nvila.cache.server import find_redis_server
from nvila.cache.store import Lease, TokenStore
from nvila.telemetry.metrics import Metrics
from nvila.types import Deadline
from tests.cache.test_store import FORM, make_record, sample
from tests.charts.helm import CHART, Rendered, render

# -- Redis, with the configuration and the script of the chart


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real server that was started as the StatefulSet starts it, its folders moved."""
    folder = tmp_path_factory.mktemp("redis")
    rendered = render({"redis": {"maxMemoryMiB": 100}})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    _write_acl(rendered, folder)
    config = rendered.get("ConfigMap", "redis")["data"]["redis.conf"]
    config = config.replace("port 6379", f"bind 127.0.0.1\nport {port}").replace("/run/nvila", str(folder))
    (folder / "redis.conf").write_text(config.replace("dir /tmp", f"dir {folder}"))
    server = subprocess.Popen([find_redis_server(), folder / "redis.conf"], stdout=subprocess.DEVNULL)
    try:
        _await(port)
        yield port
    finally:
        server.kill()
        server.wait()


def _write_acl(rendered: Rendered, folder: Path) -> None:
    passwords = folder / "passwords"
    passwords.mkdir()
    for name, value in rendered.get("Secret", "redis")["data"].items():
        (passwords / name).write_bytes(base64.b64decode(value))
    script = rendered.get("ConfigMap", "redis")["data"]["write-acl.sh"]
    script = script.replace("/etc/nvila/passwords", str(passwords)).replace("/run/nvila", str(folder))
    subprocess.run(["sh", "-c", script], check=True, timeout=60)


def _await(port: int) -> None:
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise TimeoutError(f"redis-server did not listen on port {port} within 30 s")


def _url(port: int, role: str) -> str:
    password = base64.b64decode(
        render({"redis": {"maxMemoryMiB": 100}}).get("Secret", "redis")["data"][f"{role}-password"]
    )
    return f"redis://{role}:{password.decode()}@127.0.0.1:{port}/0"


async def test_each_role_can_do_its_work_with_the_rights_that_the_chart_gives_it(cache: int) -> None:
    metrics = Metrics()
    stores = {role: TokenStore.open(_url(cache, role), metrics, ttl_s=60) for role in ("gateway", "vision", "decode")}
    gateway, vision, decode = stores["gateway"], stores["vision"], stores["decode"]
    ref, record = make_record(1)
    assert await gateway.has([ref], FORM) == set()
    async with gateway.lease(ref, FORM, Deadline.after(5)) as lease:
        assert lease is Lease.HELD
        assert await vision.put(record)
    async with gateway.lease(ref, FORM, Deadline.after(5)) as lease:
        assert lease is Lease.REUSED
    assert await decode.await_tokens([ref], FORM, Deadline.after(1)) == set()
    assert set(await decode.get([ref], FORM)) == {ref.key}
    await gateway.remember("a" * 64, b"a plan")
    assert await gateway.recall("a" * 64) == b"a plan"
    assert await gateway.measure()
    assert sample(metrics, "nvila_cache_up") == 1
    for store in stores.values():
        await store.close()


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("vision", ("GET", "nvila:x")),
        ("vision", ("SET", "elsewhere", "1")),
        ("decode", ("SET", "nvila:x", "1")),
        ("decode", ("UNLINK", "nvila:x")),
        ("gateway", ("SET", "elsewhere", "1")),
        ("gateway", ("EVAL", "return redis.call('flushall')", "0")),
        *((role, command) for role in ("gateway", "vision", "decode", "probe")
          for command in (("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("ACL", "LIST"), ("SHUTDOWN",))),
        ("probe", ("GET", "nvila:x")),
    ],
)  # fmt: skip
def test_a_role_can_do_nothing_else(cache: int, role: str, command: tuple[str, ...]) -> None:
    with (
        redis.Redis.from_url(_url(cache, role)) as client,
        pytest.raises(redis.ResponseError, match=r"(?i)perm|can't run this command"),
    ):
        client.execute_command(*command)


def test_nobody_without_a_name_gets_in(cache: int) -> None:
    with redis.Redis(port=cache, retry=Retry(NoBackoff(), 0)) as client, pytest.raises(redis.RedisError):
        client.ping()


def test_the_probe_may_ask_whether_it_lives(cache: int) -> None:
    with redis.Redis.from_url(_url(cache, "probe")) as client:
        assert client.ping()


# -- weights


def _prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = CHART / "files" / "prepare_model.py"
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "llm").mkdir()
    (folder / "llm" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_weights_of_another_digest_are_refused_with_both(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "model")
    digest = _prepare("digest", folder).stdout.strip()
    assert _prepare("existingClaim", folder, f"--sha256={digest}").returncode == 0
    (folder / "llm" / "model.safetensors").write_bytes(b"others")
    refused = _prepare("existingClaim", folder, f"--sha256={digest}")
    assert refused.returncode == 1
    assert digest in refused.stderr
    assert _prepare("digest", folder).stdout.strip() in refused.stderr


def test_a_copied_checkpoint_is_marked_complete_once_and_looked_at_again_when_the_values_change(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "model")
    assert "is ready" in _prepare("objectStore", folder).stdout
    assert "is complete" in _prepare("objectStore", folder).stdout
    assert _prepare("objectStore", folder, f"--sha256={'0' * 64}").returncode == 1


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in _prepare("existingClaim", tmp_path / "empty").stderr


def test_made_up_weights_are_a_checkpoint_that_opens(tmp_path: Path) -> None:
    from nvila.model.checkpoint import Checkpoint

    done = _prepare("random", tmp_path / "random-tiny")
    assert done.returncode == 0, done.stderr
    assert Checkpoint.open(tmp_path / "random-tiny").is_random


# -- helm test


@pytest.fixture(scope="module")
def first_answer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_answer", CHART / "files" / "first_answer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_clip_is_a_real_video_of_all_its_frames(first_answer: ModuleType) -> None:
    with av.open(io.BytesIO(first_answer.render(0x2040C0))) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == first_answer.FRAMES
    assert (frames[0].width, frames[0].height) == (first_answer.WIDTH_PX, first_answer.HEIGHT_PX)


def test_two_clips_differ_so_that_each_test_encodes_anew(first_answer: ModuleType) -> None:
    assert first_answer.render(0x2040C0) != first_answer.render(0x20C040)


def test_the_test_needs_only_what_the_gateway_image_has() -> None:
    """The pod runs it in that image: PyAV, httpx, NumPy and the standard library."""
    source = (CHART / "files" / "first_answer.py").read_text()
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"av", "httpx", "numpy"}
