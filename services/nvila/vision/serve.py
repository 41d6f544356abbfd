"""Becomes a Triton server with our model repository: `python -m nvila.vision.serve`, what the vision image runs.

The backend reads its settings from `NVILA_VISION_*`; what is Triton's own (ports) comes on the command line.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nvila.vision import triton


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--host", default="0.0.0.0")
    options.add_argument("--http-port", type=int, default=8000, help="health, metadata and statistics only")
    options.add_argument("--grpc-port", type=int, default=8001, help="for the gateway only")
    options.add_argument("--metrics-port", type=int, default=8002)
    options.add_argument("--shm-prefix", default="nvila-vision", help="begins the names of its shared memory")
    options.add_argument("--cache-folder", type=Path, default=Path("/tmp/nvila-triton"), help="for the Python backend")
    options.add_argument(
        "--tls-folder",
        type=Path,
        help="with ca.crt, tls.crt and tls.key: gRPC over TLS, for callers with a certificate",
    )
    args = options.parse_args()
    triton.clean_shared_memory(args.shm_prefix)  # of a predecessor that was killed in the same container
    run = triton.command(
        triton.find_triton(args.cache_folder),
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        shm_prefix=args.shm_prefix,
        host=args.host,
        tls_folder=args.tls_folder,
    )
    os.execve(run.argv[0], run.argv, {**os.environ, **run.environment})


if __name__ == "__main__":
    main()
