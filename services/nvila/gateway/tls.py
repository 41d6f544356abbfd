"""TLS towards vision and decode: both sides show a certificate, and both check the other's."""

from __future__ import annotations

from pathlib import Path

import grpc


def channel_credentials(folder: Path | None) -> grpc.ChannelCredentials | None:
    """From `ca.crt`, `tls.crt` and `tls.key` in a folder, the names that Kubernetes' secrets have for them; None
    without one. Raises `OSError` that names the file."""
    if folder is None:
        return None
    authority, certificate, key = ((folder / name).read_bytes() for name in ("ca.crt", "tls.crt", "tls.key"))
    return grpc.ssl_channel_credentials(authority, key, certificate)
