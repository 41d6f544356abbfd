"""A certificate for tests, in the files that Kubernetes' secrets have."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificate(folder: Path) -> Path:
    """Writes `ca.crt`, `tls.crt` and `tls.key` for 127.0.0.1 into the folder: its own authority."""
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject, *files],
        check=True,
        capture_output=True,
        timeout=60,
    )
    (folder / "ca.crt").write_bytes((folder / "tls.crt").read_bytes())
    return folder
