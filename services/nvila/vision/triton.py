"""Finds a Triton server on this machine and says how to start it with our model repository.

Two sources: NVIDIA's container image layout (`/opt/tritonserver`, or `tritonserver` on PATH), and the wheel
`nvidia-pytriton`, which carries a real server. The wheel keeps one stub (the program that embeds Python) per Python
version, so a backend folder with the running version's stub is put together first.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from nvila.telemetry import tracing

MODEL_REPOSITORY = Path(__file__).parent / "model_repository"
_SHARED_MEMORY = Path("/dev/shm")
_CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")

_POOL_BYTES = 32 << 20
_POOL_GROWTH_BYTES = 64 << 20
"""Shared memory between server and backend: at start, and each time more is needed. It never shrinks; checks.py bounds
it."""

_CONNECTION_AGE_MS = 60_000


@dataclass(frozen=True)
class TritonInstall:
    """`backends`: the folder with `python/`. `libraries`: what the server needs on LD_LIBRARY_PATH."""

    server: Path
    backends: Path
    libraries: tuple[Path, ...]


@dataclass(frozen=True)
class TritonCommand:
    """`environment`: to be laid over the starting process's own."""

    argv: tuple[str, ...]
    environment: dict[str, str]


def find_triton(cache_folder: Path) -> TritonInstall:
    """A Triton server, its Python backend ready for this interpreter. `FileNotFoundError` says what to install.

    cache_folder: where a backend folder is put together when the wheel's server is used; about 5 MB, made once.
    """
    on_path = shutil.which("tritonserver")
    server = Path(on_path) if on_path else _CONTAINER_SERVER
    backends = server.resolve().parent.parent / "backends"
    if server.exists() and (backends / "python").is_dir():
        return TritonInstall(server, backends, ())
    wheel = importlib.util.find_spec("pytriton")  # not imported: only its files are needed
    if wheel is None or wheel.origin is None:
        raise FileNotFoundError("no tritonserver on PATH or in /opt/tritonserver, and no wheel nvidia-pytriton")
    inside = Path(wheel.origin).parent / "tritonserver"
    libraries = inside.parent.parent / "nvidia_pytriton.libs"
    return TritonInstall(inside / "bin" / "tritonserver", _backend_folder(inside, cache_folder), (libraries,))


def command(
    install: TritonInstall,
    *,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    shm_prefix: str,
    host: str = "127.0.0.1",
    model_repository: Path = MODEL_REPOSITORY,
    exit_timeout_s: int = 30,
    tls_folder: Path | None = None,
) -> TritonCommand:
    """How to start the server in the foreground; settings of our backend come from `NVILA_VISION_*` in its environment.

    shm_prefix: begins the names of its shared memory, see `clean_shared_memory`. HTTP serves health, metadata and
    statistics only, and nobody may load models or change settings over gRPC: those are behind a key that is thrown away
    (the Triton advisories of ANCHORS §4.2). Shared-memory registration and inference stay open on gRPC, so only the
    gateway may reach that port. tls_folder: with ca.crt, tls.crt and tls.key; gRPC is then TLS only, and callers must
    show a certificate of that authority.
    """
    nobody = secrets.token_hex(16)
    argv = [
        str(install.server),
        f"--model-repository={model_repository}",
        f"--backend-directory={install.backends}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        "--exit-on-error=true",
        f"--exit-timeout-secs={exit_timeout_s}",
        f"--http-address={host}",
        f"--http-port={http_port}",
        f"--http-restricted-api=inference,shared-memory,model-repository,trace,logging:key={nobody}",
        f"--grpc-address={host}",
        f"--grpc-port={grpc_port}",
        f"--grpc-restricted-protocol=model-repository,trace,logging:key={nobody}",
        # Clients look their servers up again when a connection ends: so they find new ones. Open calls go on.
        f"--grpc-max-connection-age={_CONNECTION_AGE_MS}",
        "--grpc-http2-min-recv-ping-interval-without-data=5000",  # clients ping each 10 s to notice a partition
        f"--metrics-address={host}",
        f"--metrics-port={metrics_port}",
        f"--allow-gpu-metrics={'true' if Path('/dev/nvidiactl').exists() else 'false'}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--backend-config=python,shm-default-byte-size={_POOL_BYTES}",
        f"--backend-config=python,shm-growth-byte-size={_POOL_GROWTH_BYTES}",
        "--log-format=ISO8601",
        *(_tls_options(tls_folder) if tls_folder is not None else ()),
        *_trace_options(),
    ]
    libraries = [*map(str, install.libraries), sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    return TritonCommand(
        argv=tuple(argv),
        environment={
            "LD_LIBRARY_PATH": os.pathsep.join(part for part in libraries if part),
            # The stub runs the first python3 on PATH: this one, with this environment's packages.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        },
    )


def clean_shared_memory(prefix: str) -> list[str]:
    """Remove what a killed server with this `shm_prefix` left in /dev/shm; returns the names. Only when none runs."""
    assert prefix, "an empty prefix would remove everybody's"
    left = [path for path in _SHARED_MEMORY.iterdir() if path.name.startswith(prefix)]
    for path in left:
        path.unlink(missing_ok=True)
    return sorted(path.name for path in left)


def _backend_folder(inside: Path, cache_folder: Path) -> Path:
    """`<cache>/backends-<python version>/python` with the backend and the stub for this interpreter."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = inside / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        made = sorted(path.name for path in stub.parent.parent.iterdir())
        raise FileNotFoundError(f"the wheel nvidia-pytriton has no stub for Python {version}, only {', '.join(made)}")
    backends = cache_folder / f"backends-{version}"
    if not backends.exists():
        unfinished = cache_folder / f".backends-{version}-{secrets.token_hex(4)}"
        shutil.copytree(inside / "backends" / "python", unfinished / "python", ignore=shutil.ignore_patterns("__py*"))
        shutil.copy2(stub, unfinished / "python" / stub.name)
        for program in ("libtriton_python.so", stub.name):
            (unfinished / "python" / program).chmod(0o755)  # the wheel's own modes do not survive installation
        try:
            unfinished.rename(backends)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return backends


def _tls_options(folder: Path) -> list[str]:
    return [
        "--grpc-use-ssl-mutual=true",
        f"--grpc-root-cert={folder / 'ca.crt'}",
        f"--grpc-server-cert={folder / 'tls.crt'}",
        f"--grpc-server-key={folder / 'tls.key'}",
    ]


def _trace_options() -> list[str]:
    """Triton's own spans; it speaks OTLP over HTTP and nothing else.

    It traces each call whose `traceparent` header it can read, and that fails by chance: it takes the header's value
    for a C string, and no zero byte need follow (tried: 2.51, where a tenth of the calls lost their context). Rate 1
    makes it trace those calls too, as traces of their own, to which our `vision.encode` span is linked. Rate 0 where
    only a share of all traces is sampled: Triton knows no shares, and at rate 1 would send its spans of every call.
    """
    url = _http_traces_url()
    if url is None:
        return []
    return [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        f"--trace-config=rate={1 if tracing.samples_all() else 0}",
        f"--trace-config=opentelemetry,url={url}",
        "--trace-config=opentelemetry,resource=service.name=nvila-triton",
    ]


def _http_traces_url() -> str | None:
    """Where OTLP over HTTP goes: the configured endpoint, or its usual HTTP port when the configured one is gRPC's."""
    endpoint = tracing.traces_endpoint()
    if endpoint is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((os.environ[name] for name in variables if os.environ.get(name)), "grpc")
    if protocol == "grpc":
        if ":4317" not in endpoint:
            return None
        return endpoint.replace(":4317", ":4318").rstrip("/") + "/v1/traces"
    if os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        return endpoint
    return endpoint.rstrip("/") + "/v1/traces"
