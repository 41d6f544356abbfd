"""Processes by what does not lie: a process id together with its start time, its children, a mark in its environment.

Linux only: /proc and prctl. Nothing here knows what the processes do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MARK = "NVILA_STACK"
"""Environment variable that every process of a stack inherits: `<stack id>/<part>`."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Identity:
    """A process that is not mistaken for a later one with the same number: `started` is boot id and clock ticks."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        started = _start_of(pid)
        return None if started is None else cls(pid, started)

    def is_alive(self) -> bool:
        return _start_of(self.pid) == self.started


def _start_of(pid: int) -> str | None:
    """None when there is no such process, or only its exit status is left of it."""
    try:
        # The name (field 2) may hold spaces and brackets; what follows the last bracket may not.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def become_subreaper() -> None:
    """Make this process the parent of every descendant whose own parent dies (daemons included)."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) was refused")


def die_with_parent(parent_pid: int) -> Callable[[], None]:
    """What a child runs between fork and exec, so that it is killed when `parent_pid` is gone, however that went.

    The signal is tied to the *thread* that forked: fork from the main thread.
    """

    def in_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the line above
            os._exit(127)

    return in_child


def descendants(of_pid: int) -> list[int]:
    """Children, their children and so on; exited ones that nobody has waited for are left out."""
    children: dict[int, list[int]] = {}
    for pid in _all_pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(pid)
    found: list[int] = []
    waiting = [of_pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def marked(mark: str) -> list[int]:
    """Processes whose inherited mark is `mark` or begins with `mark/`.

    Not found by itself: a program that writes its title over its environment (as Redis does) or got an empty one.
    """
    exact, prefix = f"{MARK}={mark}".encode(), f"{MARK}={mark}/".encode()
    found = []
    for pid in _all_pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if pid != os.getpid() and any(entry == exact or entry.startswith(prefix) for entry in environment):
            found.append(pid)
    return found


def kill_all(find: Callable[[], Iterable[int]], *, within_s: float = 10.0) -> int:
    """SIGKILL whatever `find` finds, again and again until it finds nothing: a killed parent may have forked meanwhile.

    Returns how many were killed.
    """
    killed: set[int] = set()
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        left = [pid for pid in find() if pid != os.getpid()]
        if not left:
            break
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except ProcessLookupError:
                pass
        reap()
        time.sleep(0.02)
    return len(killed)


def reap() -> dict[int, int]:
    """Collect every child that has exited, own or inherited: process id → exit status (minus the signal's number)."""
    gone: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return gone
        if pid == 0:
            return gone
        gone[pid] = os.waitstatus_to_exitcode(status)


def wait_until_gone(process: Identity, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while process.is_alive():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def remove_shared_memory(prefixes: Iterable[str]) -> list[str]:
    """Remove the entries of /dev/shm whose names begin with one of `prefixes`; returns their names.

    Call it only when the processes that used them are gone.
    """
    prefixes = tuple(prefixes)
    assert all(len(prefix) >= 8 for prefix in prefixes), "a short prefix could be somebody else's"
    removed = []
    for entry in Path("/dev/shm").iterdir():
        if entry.name.startswith(prefixes):
            entry.unlink(missing_ok=True)
            removed.append(entry.name)
    return removed


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm of what these processes mapped. By inode: a semaphore is mapped before it gets its name."""
    mapped: set[int] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        mapped.update(int(line.split()[4]) for line in lines if "/dev/shm/" in line)
    return {entry.name for entry in os.scandir("/dev/shm") if entry.inode() in mapped}


def remove_unused_shared_memory(names: Iterable[str]) -> list[str]:
    """Remove those of the named entries that no process has mapped any more; returns their names."""
    names = set(names)
    unused = names & set(os.listdir("/dev/shm"))
    if unused:
        unused -= shared_memory_of(_all_pids())
    for name in unused:
        Path("/dev/shm", name).unlink(missing_ok=True)
    return sorted(unused)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
