"""An ASGI app as a whole process: served over HTTP until a signal ends it, and its last spans sent after that.

The gateway and the recordings part both run in it; what they serve is their own.
"""

from __future__ import annotations

import signal
from importlib.metadata import version

import uvicorn
from starlette.types import ASGIApp

from nvila.gateway.http_content import Http
from nvila.telemetry import tracing

_LONGEST_HEADERS_BYTES = 32 << 10
_KEEP_ALIVE_S = 75


def serve(app: ASGIApp, service: str, *, host: str, port: int, drain_s: float) -> None:
    """Returns when the app has shut down. `service`: its name in traces. `drain_s`: for requests in flight to end."""
    traces = tracing.configure(service, version("nvila"))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="uvloop",
        http=Http,  # strict about framing: no smuggling by two lengths
        h11_max_incomplete_event_size=_LONGEST_HEADERS_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(drain_s)),
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
    )
    # The server raises the signal that ended it once more, after its own handlers are gone; by default that would end
    # the process before the last spans are sent.
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda *_: None)
    try:
        uvicorn.Server(config).run()
    finally:
        traces.shutdown()
