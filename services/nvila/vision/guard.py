"""A process that waits beside the vision backend: Triton and the backend live and die together.

Tried on Triton 2.51: when the backend's process is killed (out of memory, say) the server stays "ready", open calls are
never answered and new ones fail for ever; and when the server is killed the backend lingers for seconds with the model
in memory. So the first of the two to end takes the other along, and whoever started the server starts it again.

Standard library only, and run by path: `python -I guard.py SERVER_PIDFD BACKEND_PIDFD`.
"""

from __future__ import annotations

import contextlib
import select
import signal
import sys


def main(server_fd: int, backend_fd: int) -> None:
    """Wait, then end both. File descriptors of processes (pidfd) never mean another, later process."""
    select.select([server_fd, backend_fd], [], [])
    for fd in (backend_fd, server_fd):
        _send(fd, signal.SIGKILL)
    if not select.select([server_fd], [], [], 1.0)[0]:
        _send(server_fd, signal.SIGTERM)  # process 1 of a container cannot be killed from inside, but asked to leave


def _send(fd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, number)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
